import numpy as np
import pytest
import torch
from obs_cases import correlated, exact_loss, problem_of

from solvers import Status
from solvers.obs import (
    admm_support,
    layer_problem,
    n_of_m,
    per_layer,
    per_unit,
    prune_greedy,
    prune_large,
    prune_sweep,
    refit,
    whole_inputs,
)

PATTERNS = [per_layer(0.6), per_unit(0.5), n_of_m(2, 4), n_of_m(4, 8), n_of_m(3, 7)]


def both(seed, **options):
    inputs, weight = correlated(seed, n_in=26, n_out=6, samples=200, **options)
    hessian = inputs.T @ inputs / len(inputs)
    numpy = layer_problem(weight, hessian)
    return numpy, layer_problem(torch.from_numpy(weight), torch.from_numpy(hessian))


def assert_groups(kept, keep, group):
    for first in range(0, len(kept), group):
        part = kept[first : first + group]
        assert np.all(part.sum(axis=0) == min(keep, len(part)))


@pytest.mark.parametrize("pattern", [*PATTERNS, whole_inputs(0.5)])
def test_admm_on_torch_agrees_with_numpy(pattern):
    numpy, torch_ = both(0)
    ours = admm_support(numpy, pattern, dtype="float64")
    theirs = admm_support(torch_, pattern, dtype="float64")
    assert isinstance(theirs.weight, torch.Tensor) and theirs.status is ours.status is Status.SOLVED
    np.testing.assert_array_equal(theirs.kept.numpy(), ours.kept)
    np.testing.assert_allclose(theirs.weight.numpy(), ours.weight, rtol=1e-6, atol=1e-8)
    assert theirs.error == pytest.approx(ours.error, rel=1e-6)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_sweep_on_torch_agrees_with_numpy(pattern):
    numpy, torch_ = both(1)
    ours, theirs = prune_sweep(numpy, pattern, block=8), prune_sweep(torch_, pattern, block=8)
    np.testing.assert_array_equal(theirs.kept.numpy(), ours.kept)
    np.testing.assert_allclose(theirs.weight.numpy(), ours.weight, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("max_iterations", [0, 1, 4])
@pytest.mark.parametrize("pattern", [*PATTERNS, whole_inputs(0.5)])
def test_admm_stopped_early_is_feasible_and_says_so(pattern, max_iterations):
    problem, _ = both(2)
    found = admm_support(problem, pattern, max_iterations=max_iterations)
    assert "still moving" in found.note and "raise max_iterations" in found.note
    assert not np.any(found.weight[~found.kept])
    change = found.weight - problem.weight
    assert found.error == pytest.approx(np.sum(change * (problem.hessian @ change)))
    finished = prune_large(problem, pattern, max_iterations=max_iterations, max_swaps=0)
    assert "still moving" in finished.note
    assert finished.error <= found.error * (1 + 1e-6)


def test_admm_beats_the_sweep_and_swaps_help():
    problem, _ = both(3)
    pattern = per_layer(0.7)
    sweep = refit(problem, prune_sweep(problem, pattern).kept)
    found = admm_support(problem, pattern)
    large = prune_large(problem, pattern)
    assert found.status is Status.SOLVED
    assert large.error <= refit(problem, found.kept).error <= found.error
    assert large.error < 0.9 * sweep.error
    assert large.error < 1.05 * prune_greedy(problem, pattern).error


def test_slower_penalty_takes_more_iterations():
    problem, _ = both(4)
    fast, slow = (admm_support(problem, per_layer(0.7), pace=p) for p in (0.2, 0.02))
    assert len(slow.history["rho"]) > 2 * len(fast.history["rho"])
    assert np.all(np.diff(fast.history["rho"]) > 0) and fast.history["moved"][-1] == 0


@pytest.mark.parametrize("iterations", [1, 3, 5, 6, 9])
def test_no_iteration_more_or_less_than_asked_for(iterations):
    problem, _ = both(4)
    found = admm_support(problem, per_layer(0.7), max_iterations=iterations, pace=1e-3)
    assert f"after {iterations} iterations" in found.note
    assert len(found.history["moved"]) == len(found.history["rho"]) == iterations // 3


@pytest.mark.parametrize("pace", [0.02, 0.05])
def test_the_penalty_grows_the_faster_the_more_moves(pace):
    """By 1 + 3 pace where a tenth of the support moved, 1 + 2 pace, at last 1 + pace."""
    inputs, weight = correlated(12, n_in=60, n_out=60, samples=300)
    found = admm_support(problem_of(inputs, weight), per_layer(0.7), pace=pace, rho=0.02)
    moved, rho = (np.array(found.history[name]) for name in ("moved", "rho"))
    assert rho[0] == 0.02
    times = np.where(moved >= 0.1, 3, np.where(moved >= 0.005, 2, 1))[:-1]
    assert set(times) == {1, 2, 3}
    np.testing.assert_allclose(rho[1:] / rho[:-1], 1 + pace * times, rtol=1e-12)


@pytest.mark.parametrize("method", [admm_support, prune_large])
def test_units_that_lose_nothing_are_returned_as_they_came(method):
    """To the last bit: neither the scaling nor the refit may touch them."""
    problem, _ = both(13)
    np.testing.assert_array_equal(method(problem, per_layer(0.0)).weight, problem.weight)
    inputs, weight = correlated(13, n_in=24, n_out=6, samples=200)
    weight[:, ::2] *= np.tile([True, False, True, False], 6)[:, None]
    sparse = problem_of(inputs, weight)
    result = method(sparse, n_of_m(2, 4))
    np.testing.assert_array_equal(result.weight[:, ::2], weight[:, ::2])
    assert np.all(
        result.weight[:, 1::2][result.kept[:, 1::2]] != weight[:, 1::2][result.kept[:, 1::2]]
    )


@pytest.mark.parametrize("block", [1, 5, 6, 128])
@pytest.mark.parametrize(("keep", "group"), [(2, 4), (4, 8), (1, 4), (2, 3)])
def test_groups_do_not_restart_with_each_block(block, keep, group):
    problem, _ = both(5)
    result = prune_sweep(problem, n_of_m(keep, group), block=block)
    assert_groups(result.kept, keep, group)
    # the block size is of no account for N:M
    np.testing.assert_array_equal(result.kept, prune_sweep(problem, n_of_m(keep, group)).kept)


def test_four_of_eight_is_freer_than_two_of_four():
    problem, _ = both(6)
    result = prune_large(problem, n_of_m(4, 8))
    assert_groups(result.kept, 4, 8)
    halves = result.kept[:24].reshape(6, 4, 6).sum(axis=1)
    assert np.any(halves != 2)


@pytest.mark.parametrize("sparsity", [0.0, 0.03, 0.5, 0.77, 1.0])
@pytest.mark.parametrize("block", [1, 7, 128])
def test_sweep_counts_are_exact(sparsity, block):
    problem, _ = both(7)
    assert prune_sweep(problem, per_layer(sparsity), block=block).removed == (
        per_layer(sparsity).removed(156)
    )
    by_unit = prune_sweep(problem, per_unit(sparsity), block=block).kept
    assert np.all((~by_unit).sum(axis=0) == per_unit(sparsity).removed(26))


@pytest.mark.parametrize("pattern", [per_layer(0.6), per_unit(0.5), n_of_m(2, 4)])
@pytest.mark.parametrize("method", [prune_sweep, prune_large])
def test_mask_and_free_rows(pattern, method):
    inputs, weight = correlated(8, n_in=12, n_out=5, samples=100, bias=True)
    allowed = np.random.default_rng(3).random(weight.shape) < 0.7
    allowed[[0, -1]] = True
    problem = problem_of(inputs, weight, allowed=allowed, free_rows=[0, -1])
    result = method(problem, pattern)
    assert np.all(result.kept[[0, -1]]) and not np.any(result.weight[~allowed])
    gone = (~result.kept)[1:-1]
    forbidden = (~allowed)[1:-1]
    if pattern.kind == "layer":
        assert gone.sum() == max(pattern.removed(55), forbidden.sum()) == result.removed
    elif pattern.kind == "unit":
        np.testing.assert_array_equal(
            gone.sum(0), np.maximum(pattern.removed(11), forbidden.sum(0))
        )
    else:
        assert np.all((~gone)[:4].sum(0) <= 2) and np.all((~gone)[8:].sum(0) <= 2)
    refitted = exact_loss(inputs, weight, result.kept)
    assert result.error >= refitted * (1 - 1e-9)


def test_sweep_with_diagonal_hessian_is_magnitude():
    rng = np.random.default_rng(9)
    weight = rng.standard_normal((10, 4))
    result = prune_sweep(layer_problem(weight, np.eye(10)), per_layer(0.5))
    threshold = np.sort(np.abs(weight), axis=None)[20]
    np.testing.assert_array_equal(result.kept, np.abs(weight) >= threshold)
    np.testing.assert_allclose(result.weight, np.where(result.kept, weight, 0))


def test_sweep_updates_are_optimal_ahead():
    """With everything of the first block gone, what follows is the least-squares compensation."""
    inputs, weight = correlated(10, n_in=6, n_out=2)
    allowed = np.ones((6, 2), dtype=bool)
    allowed[:3] = False
    problem = problem_of(inputs, weight, allowed=allowed)
    swept = prune_sweep(problem, per_layer(0.0), damping=0.0)
    np.testing.assert_allclose(swept.weight, refit(problem, swept.kept, damping=0.0).weight)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda p: admm_support(p, per_layer(0.5), dtype="float16"),
            "dtype: got 'float16', want one of float32, float64",
        ),
        (
            lambda p: admm_support(p, per_layer(0.5), rho=0.0),
            r"rho: got 0\.0, want a positive finite number",
        ),
        (
            lambda p: admm_support(p, per_layer(0.5), pace=-1.0),
            r"pace: got -1\.0, want a positive finite number",
        ),
        (
            lambda p: prune_sweep(p, per_layer(0.5), block=0),
            "block: got 0, want a whole",
        ),
        (lambda p: prune_sweep(p, whole_inputs(0.5)), "prune_sweep does not support 'inputs'"),
    ],
)
def test_refusals(call, message):
    problem, _ = both(11)
    with pytest.raises(ValueError, match=message):
        call(problem)
