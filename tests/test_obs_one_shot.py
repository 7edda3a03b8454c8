import numpy as np
import pytest
from obs_cases import correlated, exact_unit_loss, problem_of

from solvers.obs import (
    inverse_recursion,
    layer_problem,
    mean_diagonal,
    n_of_m,
    per_layer,
    per_layer_count,
    prune_one_shot,
    prune_to_tolerance,
    sensitivities,
    whole_inputs,
)


def test_sensitivity_is_half_the_loss_of_one_removal():
    inputs, weight = correlated(0)
    known = sensitivities(problem_of(inputs, weight), damping=0.0)
    for q, u in np.ndindex(8, 3):
        kept = np.ones(8, dtype=bool)
        kept[q] = False
        loss = exact_unit_loss(inputs, weight[:, u], kept)
        assert 2 * known.saliency[q, u] == pytest.approx(loss, rel=1e-8)


def test_one_removal_is_optimal():
    inputs, weight = correlated(1)
    problem = problem_of(inputs, weight)
    result = prune_one_shot(problem, per_layer_count(1), damping=0.0)
    q, u = np.argwhere(~result.kept)[0]
    assert (q, u) == np.unravel_index(
        np.argmin(sensitivities(problem, damping=0.0).saliency), (8, 3)
    )
    assert result.error == pytest.approx(
        exact_unit_loss(inputs, weight[:, u], result.kept[:, u]), rel=1e-8
    )


def test_updates_follow_the_paper():
    """No downdate; each step from the weights as they are by then; masked at the end."""
    inputs, weight = correlated(2)
    problem = problem_of(inputs, weight)
    known = sensitivities(problem, damping=1e-4)
    result = prune_one_shot(problem, per_layer(0.4))
    expected = weight.copy()
    by_size = np.argsort(known.saliency, axis=None)[:10]
    for q, u in zip(*np.unravel_index(by_size, (8, 3)), strict=True):
        step = expected[q, u] / known.inverse[q, q]
        expected[:, u] -= step * known.inverse[:, q]
    gone = np.zeros((8, 3), dtype=bool)
    gone[np.unravel_index(by_size, (8, 3))] = True
    np.testing.assert_array_equal(result.kept, ~gone)
    np.testing.assert_allclose(result.weight, np.where(gone, 0.0, expected), rtol=1e-9)


def test_diagonal_hessian_selects_by_h_w_squared():
    rng = np.random.default_rng(3)
    diagonal, weight = rng.uniform(0.1, 9, 10), rng.standard_normal((10, 4))
    result = prune_one_shot(layer_problem(weight, np.diag(diagonal)), per_layer(0.5), damping=0.0)
    score = diagonal[:, None] * weight**2
    np.testing.assert_array_equal(result.kept, score >= np.sort(score, axis=None)[20])
    np.testing.assert_allclose(result.weight, np.where(result.kept, weight, 0.0))


def test_the_recursion_serves_as_the_inverse():
    inputs, weight = correlated(4)
    problem = problem_of(inputs, weight)
    alpha = 1e-4 * mean_diagonal(problem.hessian)
    inverse = inverse_recursion([inputs], len(inputs), alpha)
    given = sensitivities(problem, damping=1e-4, inverse=inverse)
    np.testing.assert_allclose(given.saliency, sensitivities(problem).saliency, rtol=1e-5)
    ours, theirs = (
        prune_one_shot(problem, per_layer(0.5), given=given),
        prune_one_shot(problem, per_layer(0.5)),
    )
    np.testing.assert_array_equal(ours.kept, theirs.kept)
    np.testing.assert_allclose(ours.weight, theirs.weight, rtol=1e-4, atol=1e-7)


def test_bias_is_updated_and_stays():
    inputs, weight = correlated(5, bias=True)
    problem = problem_of(inputs, weight, free_rows=[-1])
    assert np.all(np.isinf(sensitivities(problem).saliency[-1]))
    result = prune_one_shot(problem, per_layer(0.5))
    assert result.kept[-1].all() and result.removed == 12
    assert np.all(result.weight[-1] != weight[-1])
    # leaving it alone: its row is not given
    smaller = layer_problem(weight[:-1], problem.hessian[:-1, :-1])
    assert prune_one_shot(smaller, per_layer(0.5)).removed == 12


@pytest.mark.parametrize("tolerance", [0.0, 0.3, 1.0, 3.0, 1e6])
def test_tolerance_is_met_and_one_more_would_break_it(tolerance):
    inputs, weight = correlated(6)
    problem = problem_of(inputs, weight)
    result = prune_to_tolerance(problem, tolerance)
    assert np.sqrt(result.error) <= tolerance
    if result.removed < 24:
        more = prune_one_shot(problem, per_layer_count(result.removed + 1))
        assert np.sqrt(more.error) > tolerance
    if tolerance == 0.0:
        np.testing.assert_array_equal(result.weight, weight)
    if tolerance == 1e6:
        assert result.removed == 24


def test_tolerance_with_a_mask():
    inputs, weight = correlated(7)
    allowed = np.ones((8, 3), dtype=bool)
    allowed[2] = False
    result = prune_to_tolerance(problem_of(inputs, weight, allowed=allowed), 0.0)
    np.testing.assert_array_equal(~result.kept, ~allowed)


def test_patterns():
    inputs, weight = correlated(8)
    problem = problem_of(inputs, weight)
    assert np.all(prune_one_shot(problem, n_of_m(2, 4)).kept[:4].sum(axis=0) == 2)
    gone = ~prune_one_shot(problem, whole_inputs(0.25)).kept
    assert gone.all(axis=1).sum() == 2 and gone.sum() == 6


def test_refusals():
    inputs, weight = correlated(9)
    problem = problem_of(inputs, weight)
    with pytest.raises(ValueError, match="tolerance: got nan, want a finite number >= 0"):
        prune_to_tolerance(problem, float("nan"))
    with pytest.raises(ValueError, match="inverse: want a positive definite"):
        sensitivities(problem, inverse=-np.eye(8))
    inputs[:, 1] = inputs[:, 0]
    with pytest.raises(ValueError, match="raise the damping"):
        prune_one_shot(problem_of(inputs, weight), per_layer(0.5), damping=0.0)
