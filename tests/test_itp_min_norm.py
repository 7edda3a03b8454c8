"""The subproblem (15): closed form, faces, and cvxpy agree; degenerate gradients are handled."""

import cvxpy as cp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from retrain.trainers.itp.min_norm import min_norm_weights
from retrain.verify.itp import shortest_weights

KINDS = ("generic", "scaled", "tiny", "equal", "nearly", "zero", "opposed", "hull", "parallel")


def draw(kind, q, rng):
    """Gradients (q, n), generic or degenerate as `kind` says."""
    n = int(rng.integers(2, 12))
    g = rng.standard_normal((q, n))
    if kind == "scaled":
        g[1] *= 1e4
    elif kind == "tiny":
        g *= 1e-7
    elif kind == "equal":
        g[:] = g[0]
    elif kind == "nearly":
        g[1] = g[0] + 1e-7 * g[1]
    elif kind == "zero":
        g[-1] = 0
    elif kind == "opposed":
        g[1] = -rng.uniform(0.1, 3) * g[0]
    elif kind == "hull":  # 0 is a convex combination of all of them
        shares = rng.dirichlet(np.ones(q))
        g[-1] = -(shares[:-1] @ g[:-1]) / shares[-1]
    elif kind == "parallel":
        g[1] = rng.uniform(0.1, 3) * g[0]
    return g


def length(weights, g):
    """Squared length of the mixture over the longest gradient's."""
    return float(np.sum((weights @ g) ** 2) / np.max(np.sum(g**2, axis=1)))


def feasible(weights, q):
    return weights.shape == (q,) and weights.min() >= 0 and abs(weights.sum() - 1) < 1e-12


def test_equals_the_quadratic_program_on_a_thousand_cases():
    """Against every face of the hull in turn: 500 cases of two, 250 of three, 250 of five."""
    rng = np.random.default_rng(15)
    cases = [(2, 500), (3, 250), (5, 250)]
    for q, count in cases:
        for index in range(count):
            g = draw(KINDS[index % len(KINDS)], q, rng)
            scale = np.sqrt(np.max(np.sum(g**2, axis=1)))
            weights, wanted = min_norm_weights(g @ g.T), shortest_weights(g / scale)
            assert feasible(weights, q)
            assert abs(length(weights, g) - length(wanted, g)) < 1e-8
            # The shortest vector itself is unique, whatever the weights.
            assert np.linalg.norm((weights - wanted) @ g) < 1e-8 * scale


@pytest.mark.parametrize("q", [2, 3, 6])
def test_equals_a_solver(q):
    """cvxpy's Clarabel, at its tightest, on 40 cases."""
    rng = np.random.default_rng(q)
    weights = cp.Variable(q, nonneg=True)
    for index in range(40):
        g = draw(KINDS[index % len(KINDS)], q, rng)
        g /= np.sqrt(np.max(np.sum(g**2, axis=1)))
        problem = cp.Problem(cp.Minimize(cp.sum_squares(weights @ g)), [cp.sum(weights) == 1])
        problem.solve(
            solver="CLARABEL", tol_gap_abs=1e-11, tol_gap_rel=1e-11, tol_feas=1e-11, max_iter=200
        )
        assert abs(length(min_norm_weights(g @ g.T), g) - problem.value) < 1e-8


@settings(deadline=None, max_examples=200)
@given(seed=st.integers(0, 2**32 - 1), q=st.integers(1, 6), kind=st.sampled_from(KINDS))
def test_the_direction_descends_along_every_objective(seed, q, kind):
    """KKT: g . g_j >= |g|^2, with equality where g_j has weight."""
    g = draw(kind if q > 1 else "generic", q, np.random.default_rng(seed))
    weights = min_norm_weights(g @ g.T)
    assert feasible(weights, q)
    direction, scale = weights @ g, np.max(np.sum(g**2, axis=1))
    slack = (g @ direction - direction @ direction) / scale
    assert slack.min() > -1e-9
    assert np.abs(slack * weights).max() < 1e-9


@pytest.mark.parametrize("q", [2, 4])
def test_zero_gradients_share_the_weight(q):
    """0 is in the hull already: the network stays where it is."""
    g = np.random.default_rng(0).standard_normal((q, 5))
    g[1] = 0
    assert min_norm_weights(g @ g.T).tolist() == [float(j == 1) for j in range(q)]
    assert min_norm_weights(np.zeros((q, q))).tolist() == [1 / q] * q


def test_equal_gradients_share_the_weight():
    g = np.ones((2, 3))
    assert min_norm_weights(g @ g.T).tolist() == [0.5, 0.5]


def test_scaling_all_gradients_changes_nothing():
    g = np.random.default_rng(3).standard_normal((3, 6))
    np.testing.assert_allclose(
        min_norm_weights(g @ g.T), min_norm_weights(1e10 * (g @ g.T)), atol=1e-12
    )


def test_wrong_arguments_are_told():
    with pytest.raises(ValueError, match=r"gram: got \(2, 3\), want shape \(q, q\) with q >= 1"):
        min_norm_weights(np.zeros((2, 3)))
    with pytest.raises(FloatingPointError, match="a gradient is NaN or infinite"):
        min_norm_weights(np.array([[1.0, np.nan], [np.nan, 1.0]]))
