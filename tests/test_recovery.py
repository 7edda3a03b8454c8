import itertools
import math

import cvxpy as cp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from retrain.verify.recovery_statistics import (
    clopper_pearson,
    columns_probability,
    monte_carlo,
    sample_size,
    samples_needed,
    sparse_weights,
    statistical_dimension,
    success_probability,
)
from solvers import trim_program
from solvers.recovery import certificate_margin, dual_certificate, is_unique, recover, recovers


def gaussian(seed, n_in, sparsity, samples):
    rng = np.random.default_rng(seed)
    weight = sparse_weights(n_in, sparsity, rng)
    inputs = rng.standard_normal((samples, n_in))
    return inputs, np.maximum(inputs @ weight, 0), weight


def by_cvxpy(inputs, response):
    weight, active = cp.Variable(inputs.shape[1]), response > 0
    constraints = [inputs[active] @ weight == response[active], inputs[~active] @ weight <= 0]
    problem = cp.Problem(cp.Minimize(cp.norm1(weight)), constraints)
    problem.solve(solver="CLARABEL")
    return problem.value


@pytest.mark.parametrize("samples", [5, 12, 25, 60])
@pytest.mark.parametrize("seed", range(4))
def test_recover_is_optimal(samples, seed):
    inputs, response, _ = gaussian(seed, 20, 4, samples)
    found = recover(inputs, response)
    assert np.abs(found.weight).sum() == pytest.approx(by_cvxpy(inputs, response), rel=1e-6)
    # The program's own certificate, from the multiplier.
    program = trim_program(inputs, response[:, None], epsilon=0.0)
    certificate = program.certificate(found.weight[:, None], found.multiplier[:, None])
    assert certificate.gap < 1e-8
    assert certificate.violation < 1e-8


def test_recover_adds_ceilings():
    # Without its ceiling the cheaper first column would be taken.
    inputs = np.array([[2.0, 1.0], [1.0, -1.0]])
    found = recover(inputs, np.array([1.0, 0.0]))
    assert found.rounds == 2
    assert np.allclose(found.weight, [1 / 3, 1 / 3])
    assert found.multiplier[1] > 0


def test_recover_nothing():
    found = recover(np.ones((3, 2)), np.zeros(3))
    assert not found.weight.any()
    assert is_unique(np.ones((3, 2)), np.zeros(3), found.weight)


def test_recover_infeasible():
    with pytest.raises(ValueError, match=r"response: no weights give it"):
        recover(np.array([[1.0], [1.0]]), np.array([1.0, 0.0]))


@given(st.integers(0, 10**6), st.floats(1e-3, 1e3), st.floats(1e-3, 1e3))
@settings(max_examples=20, deadline=None)
def test_scaling(seed, a, b):
    """(aX, bY) has the weights b/a W and the same decision."""
    inputs, response, weight = gaussian(seed, 12, 3, 25)
    first = recover(inputs, response)
    second = recover(a * inputs, b * response)
    assert np.allclose(second.weight, first.weight * b / a, atol=1e-7 * b / a)
    assert (
        recovers(inputs, response, weight)[0]
        == recovers(a * inputs, b * response, weight * b / a)[0]
    )


@pytest.mark.parametrize("samples", [8, 14, 20, 26, 40, 80])
@pytest.mark.parametrize("seed", range(5))
def test_certificate_decides_as_solving_does(samples, seed):
    inputs, response, weight = gaussian(seed, 25, 3, samples)
    same = np.allclose(recover(inputs, response).weight, weight, atol=1e-8)
    certificate = dual_certificate(inputs, response, weight)
    assert (certificate is not None) == same == recovers(inputs, response, weight)[0]
    if certificate is None:
        return
    # Proposition 2, condition by condition.
    dual, support = inputs.T @ certificate.multiplier, weight != 0
    assert np.allclose(dual[support], -np.sign(weight[support]))
    assert np.abs(dual[~support]).max() <= 1 - certificate.margin + 1e-12
    assert certificate.margin > 0
    assert not certificate.multiplier[response == 0].any()


def test_both_ways_to_a_certificate_occur():
    found = set()
    for seed in range(20):
        certificate = dual_certificate(*gaussian(seed, 25, 3, 30))
        found.add(certificate and certificate.found_by)
    assert {"least squares", "linear program"} <= found


def test_equal_columns_are_not_unique():
    inputs, _, weight = gaussian(0, 10, 2, 60)
    first = int(np.flatnonzero(weight)[0])
    second = int(np.flatnonzero(weight == 0)[0])
    inputs[:, second] = inputs[:, first]
    response = np.maximum(inputs @ weight, 0)
    assert not is_unique(inputs, response, weight)


def test_dependent_support_fails_by_rank_alone():
    inputs, _, weight = gaussian(0, 10, 2, 60)
    first = int(np.flatnonzero(weight)[0])
    second = int(np.flatnonzero(weight == 0)[0])
    inputs[:, second] = inputs[:, first]
    weight[second] = weight[first]
    response = np.maximum(inputs @ weight, 0)
    # Both signs are met and the rest is strictly inside: only the rank says that mass may move.
    assert dual_certificate(inputs, response, weight) is None
    support = np.flatnonzero(weight)
    active = response > 0
    nu = np.zeros(len(response))
    nu[active] = np.linalg.lstsq(
        inputs[active][:, support].T, -np.sign(weight[support]), rcond=None
    )[0]
    assert np.abs(np.delete(inputs.T @ nu, support)).max() < 1
    assert certificate_margin(inputs, response, weight, nu) == -math.inf


def test_tight_ceiling_needs_a_positive_multiplier():
    # w* = (1, 0): sample 2 is orthogonal to it, and its ceiling is what makes w* unique.
    inputs, response = np.array([[1.0, 1.0], [0.0, 1.0]]), np.array([1.0, 0.0])
    weight = np.array([1.0, 0.0])
    certificate = dual_certificate(inputs, response, weight)
    assert certificate is not None
    assert certificate.found_by == "linear program"
    assert certificate.multiplier[1] > 0
    assert recovers(inputs, response, weight) == (True, "comparison")
    assert not is_unique(inputs[:1], response[:1], weight)  # (0, 1) is as short


def test_margin_refuses_a_wrong_multiplier():
    inputs, response, weight = gaussian(1, 12, 2, 60)
    good = dual_certificate(inputs, response, weight).multiplier
    assert certificate_margin(inputs, response, weight, good) > 0
    assert certificate_margin(inputs, response, weight, -good) == -math.inf
    slack = np.flatnonzero(response == 0)[0]
    moved = good.copy()
    moved[slack] = 1e-3
    assert certificate_margin(inputs, response, weight, moved) == -math.inf


def test_too_few_equations():
    inputs, response, weight = gaussian(0, 10, 6, 4)
    assert recovers(inputs, response, weight) == (False, "certificate")


def test_uniqueness_by_brute_force():
    """On tiny instances, compare with all vertices of the solution set of |w|_1 <= |w*|_1."""
    for seed in range(30):
        inputs, response, weight = gaussian(seed, 4, 2, 4)
        active = response > 0
        rows = inputs[active]
        best = math.inf
        # A minimiser of an l1 program has at most as many nonzeros as equations.
        for size in range(min(len(rows), 4) + 1):
            for support in itertools.combinations(range(4), size):
                other = np.zeros(4)
                if size:
                    other[list(support)] = np.linalg.lstsq(
                        rows[:, support], response[active], rcond=None
                    )[0]
                feasible = np.allclose(rows @ other, response[active], atol=1e-9)
                differs = np.abs(other - weight).max() > 1e-9
                if feasible and differs:
                    best = min(best, np.abs(other).sum())
        # Off the active samples w* is slack, so only the equations matter near it.
        assert is_unique(inputs, response, weight) == (
            best > np.abs(weight).sum() and len(rows) >= 2
        )


def test_theorem_3s_numbers():
    assert sample_size(2, 200, 1.5) == math.ceil(29 * 1.5 * math.log(200)) == 231
    assert sample_size(10, 200, 2.0) == 1240
    assert success_probability(200, 2.0) == pytest.approx(1 - 1 / 200)
    assert columns_probability([3], 200, 1.5) == pytest.approx(success_probability(200, 1.5))
    # Equal columns: the plain union bound; sparser ones cost less.
    assert columns_probability([3, 3], 50, 2.0) == pytest.approx(1 - 2 / 50)
    assert columns_probability([1, 3], 50, 2.0) > columns_probability([3, 3], 50, 2.0)


def test_clopper_pearson():
    low, high = clopper_pearson(20, 20)
    assert (low, high) == (pytest.approx(0.025 ** (1 / 20)), 1.0)
    low, high = clopper_pearson(0, 20)
    assert (low, high) == (0.0, pytest.approx(1 - 0.025 ** (1 / 20)))
    assert clopper_pearson(7, 20)[0] < 0.35 < clopper_pearson(7, 20)[1]


def test_monte_carlo_does_not_depend_on_the_jobs():
    kwargs = {"trials": 12, "seed": 5}
    one = monte_carlo(30, [3], 20, jobs=1, **kwargs)
    two = monte_carlo(30, [3], 20, jobs=2, **kwargs)
    assert one == two
    assert 0 < one.successes < 12
    assert one.lower < one.successes / 12 < one.upper
    assert monte_carlo(30, [3], 20, trials=12, seed=6) != one


def test_monte_carlo_of_columns_is_harder():
    one = monte_carlo(30, [3], 20, trials=40, seed=0)
    four = monte_carlo(30, [3] * 4, 20, trials=40, seed=0)
    assert four.successes < one.successes
    assert monte_carlo(30, [3], 200, trials=5, seed=0).underdetermined == 0
    assert monte_carlo(30, [3], 20, trials=5, seed=0).underdetermined == 5


@pytest.mark.parametrize("seed", range(6))
def test_samples_needed_is_the_first_that_recovers(seed):
    n_in, sparsity = 20, 2
    needed = samples_needed(n_in, sparsity, np.random.default_rng(seed))
    # The same draws again, one sample more at a time.
    rng = np.random.default_rng(seed)
    weight = sparse_weights(n_in, sparsity, rng)
    inputs = rng.standard_normal((2 * n_in, n_in))
    response = np.maximum(inputs @ weight, 0)
    while np.count_nonzero(response) < n_in:
        inputs = np.concatenate([inputs, rng.standard_normal((2 * n_in, n_in))])
        response = np.maximum(inputs @ weight, 0)
    works = [
        recovers(inputs[:count], response[:count], weight)[0] for count in range(1, needed + 3)
    ]
    assert works.index(True) + 1 == needed
    assert all(works[needed - 1 :])


def test_statistical_dimension():
    assert statistical_dimension(1.0) == pytest.approx(1.0)
    values = [statistical_dimension(fraction) for fraction in (0.01, 0.05, 0.1, 0.3, 0.7)]
    assert values == sorted(values)
    # Donoho and Tanner's weak threshold at delta = 0.5 is rho = 0.386, that is s/N = 0.193.
    assert statistical_dimension(0.193) == pytest.approx(0.5, abs=0.005)


def test_errors():
    inputs, response, weight = gaussian(0, 5, 2, 8)
    with pytest.raises(ValueError, match=r"inputs: got shape \(8,\), want a nonempty matrix"):
        recover(inputs[:, 0], response)
    with pytest.raises(ValueError, match=r"response: got \(7,\), want shape \(8,\)"):
        recover(inputs, response[:-1])
    with pytest.raises(ValueError, match=r"response: got -1, want rectified values >= 0"):
        recover(inputs, -np.ones(8))
    with pytest.raises(
        ValueError, match="inputs, response: got NaN or infinity, want finite numbers"
    ):
        recover(inputs * np.nan, response)
    with pytest.raises(ValueError, match=r"weight: got \(4,\), want shape \(5,\)"):
        dual_certificate(inputs, response, weight[:-1])
    with pytest.raises(ValueError, match=r"weight: not feasible, [0-9]+ constraints"):
        is_unique(inputs, response, 2 * weight)
    with pytest.raises(ValueError, match=r"sparsity: got 0, want 1 to n_in = 5"):
        sample_size(0, 5, 2.0)
    with pytest.raises(ValueError, match=r"sparsity: got 6, want 1 to n_in = 5"):
        sparse_weights(5, 6, np.random.default_rng(0))
    with pytest.raises(ValueError, match=r"mu: got 1.0, want a number > 1"):
        sample_size(2, 5, 1.0)
    with pytest.raises(ValueError, match="samples, trials: got 5 and 0, want at least 1"):
        monte_carlo(5, [2], 5, trials=0, seed=0)
    with pytest.raises(ValueError, match="fraction: got 0, want 0 < s/N <= 1"):
        statistical_dimension(0)
