import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from obs_cases import correlated, exact_loss, problem_of

from solvers import Status
from solvers.obs import kept_by, layer_problem, per_layer, refit, refit_cg


def magnitude(weight, sparsity):
    everything = np.ones(weight.shape, dtype=bool), np.ones(len(weight), dtype=bool)
    return kept_by(np.abs(weight), per_layer(sparsity), *everything)


@given(st.integers(0, 10**6), st.floats(0, 1))
@settings(max_examples=40, deadline=None)
def test_refit_is_least_squares_on_the_inputs(seed, density):
    inputs, weight = correlated(seed)
    kept = np.random.default_rng(seed).random(weight.shape) < density
    result = refit(problem_of(inputs, weight), kept, damping=0.0)
    for unit in range(3):
        support = np.flatnonzero(kept[:, unit])
        if support.size:
            expected = np.linalg.lstsq(inputs[:, support], inputs @ weight[:, unit], rcond=None)[0]
            np.testing.assert_allclose(result.weight[support, unit], expected, rtol=1e-5, atol=1e-6)
    assert not np.any(result.weight[~kept])
    change = inputs @ (result.weight - weight)
    assert result.error == pytest.approx(np.sum(change**2) / len(inputs), rel=1e-9, abs=1e-15)


def test_normal_equations_hold_for_a_foreign_mask():
    inputs, weight = correlated(1, n_in=30, n_out=6, samples=200)
    kept = magnitude(weight, 0.7)
    problem = problem_of(inputs, weight)
    masked = np.where(kept, weight, 0.0)
    result = refit(problem, kept, threads=2)
    gradient = problem.hessian @ (result.weight - weight)
    start = problem.hessian @ (masked - weight)
    assert np.abs(gradient[kept]).max() < 1e-5 * np.abs(start[kept]).max()
    assert result.error < np.sum((inputs @ (masked - weight)) ** 2) / len(inputs)
    assert result.removed == (~kept).sum() and result.method == "refit"


def test_untouched_units_keep_their_bits():
    inputs, weight = correlated(2)
    weight = weight.astype(np.float32)
    kept = np.ones((8, 3), dtype=bool)
    kept[3, 1] = False
    result = refit(problem_of(inputs, weight), kept)
    assert result.weight.dtype == np.float32
    np.testing.assert_array_equal(result.weight[:, [0, 2]], weight[:, [0, 2]])
    assert not np.allclose(result.weight[:, 1], weight[:, 1])


def test_cg_agrees_with_cholesky():
    inputs, weight = correlated(3, n_in=40, n_out=9, samples=300)
    problem = problem_of(inputs, weight)
    kept = magnitude(weight, 0.6)
    kept[:, 4] = True  # nothing to do
    kept[:, 5] = False  # nothing to do it with
    exact = refit(problem, kept, damping=1e-3)
    ours = refit_cg(problem, kept, damping=1e-3, tolerance=1e-11)
    assert ours.status is Status.SOLVED
    np.testing.assert_allclose(ours.weight, exact.weight, atol=1e-6)
    np.testing.assert_array_equal(ours.weight[:, 4], weight[:, 4])
    assert ours.history["residual"][-1] <= 1e-11 < ours.history["residual"][0]


def test_cg_ends_after_as_many_steps_as_there_are_weights():
    """Conjugate directions: at most |S| steps, up to rounding; steepest descent needs far more."""
    inputs, weight = correlated(8, n_in=12, samples=400)
    kept = magnitude(weight, 0.5)
    result = refit_cg(problem_of(inputs, weight), kept, tolerance=1e-7)
    assert result.status is Status.SOLVED
    assert len(result.history["residual"]) <= kept.sum(axis=0).max() + 2


def test_cg_does_not_mind_the_scale_of_the_inputs():
    """What the preconditioner is for: its steps are those of the inputs at one scale."""
    inputs, weight = correlated(9, n_in=12, samples=400)
    kept = magnitude(weight, 0.5)
    plain = refit_cg(problem_of(inputs, weight), kept, damping=0.0, tolerance=1e-7)
    scales = 10.0 ** np.linspace(-4, 4, 12)
    scaled = problem_of(inputs * scales, weight / scales[:, None])
    result = refit_cg(scaled, kept, damping=0.0, tolerance=1e-7)
    assert result.status is Status.SOLVED
    assert len(result.history["residual"]) <= len(plain.history["residual"]) + 6
    np.testing.assert_allclose(result.weight * scales[:, None], plain.weight, rtol=1e-3, atol=1e-3)


def test_cg_says_when_it_stops_early_and_is_feasible_then():
    inputs, weight = correlated(4, n_in=40, samples=300)
    kept = magnitude(weight, 0.5)
    problem = problem_of(inputs, weight)
    stopped = refit_cg(problem, kept, max_iterations=2)
    assert "3 units miss the tolerance; raise max_iterations" in stopped.note
    assert not np.any(stopped.weight[~kept])
    masked = np.where(kept, weight, 0.0)
    assert stopped.error < np.sum((inputs @ (masked - weight)) ** 2) / len(inputs)


def test_cg_on_torch_agrees_with_numpy():
    inputs, weight = correlated(5, n_in=20)
    kept = magnitude(weight, 0.5)
    hessian = inputs.T @ inputs / len(inputs)
    ours = refit_cg(layer_problem(weight, hessian), kept)
    theirs = refit_cg(
        layer_problem(torch.from_numpy(weight), torch.from_numpy(hessian)), torch.from_numpy(kept)
    )
    assert isinstance(theirs.weight, torch.Tensor)
    np.testing.assert_allclose(theirs.weight.numpy(), ours.weight, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("method", [refit, refit_cg])
def test_fewer_samples_than_inputs(method):
    # the rank is 4: five kept inputs of a unit can reproduce it; the damping picks among them
    inputs, weight = correlated(6, samples=4)
    kept = np.ones((8, 3), dtype=bool)
    kept[:3] = False
    result = method(problem_of(inputs, weight), kept)
    assert np.all(np.isfinite(result.weight))
    assert result.relative_error < 1e-8
    assert exact_loss(inputs, weight, kept) == pytest.approx(0, abs=1e-20)


def test_singular_support_without_damping_is_told():
    inputs, weight = correlated(6)
    inputs[:, 1] = inputs[:, 0]
    kept = np.ones((8, 3), dtype=bool)
    kept[5] = False
    with pytest.raises(ValueError, match=r"singular|not positive definite.*raise the damping"):
        refit(problem_of(inputs, weight), kept, damping=0.0)


def test_malformed_supports():
    inputs, weight = correlated(7, bias=True)
    allowed = np.ones(weight.shape, dtype=bool)
    allowed[0, 0] = False
    problem = problem_of(inputs, weight, allowed=allowed, free_rows=[8])
    for kept, message in [
        (np.ones((2, 2), dtype=bool), r"kept: got bool \(2, 2\), want bool \(9, 3\)"),
        (np.ones((9, 3)), r"kept: got float64 \(9, 3\), want bool \(9, 3\)"),
        (np.ones((9, 3), dtype=bool), "kept: keeps a weight that the problem does not allow"),
        (np.zeros((9, 3), dtype=bool), "kept: removes a weight of a free row"),
    ]:
        for method in (refit, refit_cg):
            with pytest.raises(ValueError, match=message):
                method(problem, kept)
