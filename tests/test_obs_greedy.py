import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from obs_cases import best_split, correlated, exact_loss, exact_unit_loss, problem_of

from solvers.obs import (
    RemovalPath,
    allocate,
    allocate_to_loss,
    layer_problem,
    n_of_m,
    path_support,
    pattern_support,
    per_layer,
    per_layer_count,
    per_unit,
    prune_greedy,
    prune_greedy_to_tolerance,
    prune_inputs,
    prune_to_tolerance,
    removal_path,
    whole_inputs,
)
from solvers.obs.structured import input_path


def made_up_path(loss):
    loss = np.asarray(loss, dtype=float)
    units, length = loss.shape[0], loss.shape[1] - 1
    return RemovalPath(
        np.tile(np.arange(length), (units, 1)),
        loss,
        np.zeros(units, dtype=np.int64),
        np.full(units, length),
        0.0,
    )


@pytest.mark.parametrize("seed", range(4))
def test_losses_are_exact_and_each_step_is_the_cheapest(seed):
    inputs, weight = correlated(seed)
    path = removal_path(problem_of(inputs, weight), damping=0.0)
    for unit in range(3):
        kept = np.ones(8, dtype=bool)
        for step, p in enumerate(path.order[unit]):
            trials = {}
            for q in np.flatnonzero(kept):
                kept[q] = False
                trials[q] = exact_unit_loss(inputs, weight[:, unit], kept)
                kept[q] = True
            kept[p] = False
            assert trials[p] <= min(trials.values()) * (1 + 1e-9) + 1e-12
            assert path.loss[unit, step + 1] == pytest.approx(trials[p], rel=1e-8)
    assert sorted(path.order[0]) == list(range(8))


def test_damped_losses_are_those_of_the_damped_inputs():
    inputs, weight = correlated(5)
    problem = problem_of(inputs, weight)
    path = removal_path(problem, damping=0.3)
    ridge = np.sqrt(len(inputs) * 0.3 * np.diagonal(problem.hessian).mean())
    # sqrt(n lambda) I below X; exact_loss divides by the number of rows, hence the factor
    taller = np.vstack([inputs, ridge * np.eye(8)])
    factor = len(taller) / len(inputs)
    kept = path_support(problem, path, np.array([3, 5, 8]))
    total = sum(path.loss[u, k] for u, k in enumerate((3, 5, 8)))
    assert total == pytest.approx(factor * exact_loss(taller, weight, kept), rel=1e-9)


def test_diagonal_hessian_selects_by_h_w_squared():
    rng = np.random.default_rng(0)
    diagonal, weight = rng.uniform(0.1, 9, 10), rng.standard_normal((10, 4))
    problem = layer_problem(weight, np.diag(diagonal))
    result = prune_greedy(problem, per_layer(0.6))
    score = diagonal[:, None] * weight**2
    threshold = np.sort(score, axis=None)[24]
    np.testing.assert_array_equal(result.kept, score >= threshold)
    np.testing.assert_allclose(result.weight, np.where(result.kept, weight, 0.0))
    assert result.error == pytest.approx(score[~result.kept].sum())


def test_one_run_serves_every_sparsity():
    inputs, weight = correlated(7)
    problem = problem_of(inputs, weight)
    path = removal_path(problem)
    before = np.ones((8, 3), dtype=bool)
    for removed in range(25):
        kept = pattern_support(problem, path, per_layer_count(removed))
        assert (~kept).sum() == removed
        assert exact_loss(inputs, weight, kept) >= exact_loss(inputs, weight, before) - 1e-9
        before = kept
    for removed in range(9):
        assert np.all((~pattern_support(problem, path, per_unit(removed / 8))).sum(0) == removed)


def test_threads_do_not_change_a_bit():
    inputs, weight = correlated(8, n_in=20, n_out=7)
    problem = problem_of(inputs, weight)
    one, three = (removal_path(problem, threads=t) for t in (1, 3))
    np.testing.assert_array_equal(one.order, three.order)
    np.testing.assert_array_equal(one.loss, three.loss)
    with pytest.raises(ValueError, match="threads: got 0, want a whole number >= 1"):
        removal_path(problem, threads=0)


@given(st.integers(0, 10**6), st.booleans())
@settings(max_examples=80, deadline=None)
def test_allocation_is_bounded_and_optimal_for_convex_paths(seed, convex):
    rng = np.random.default_rng(seed)
    steps = rng.exponential(size=(4, 5)) ** 3
    if convex:
        steps = np.sort(steps, axis=1)
    loss = np.hstack([np.zeros((4, 1)), np.cumsum(steps, axis=1)])
    for removed in range(21):
        got = allocate(made_up_path(loss), removed)
        best = best_split(loss, removed)
        assert got.removed.sum() == removed
        assert got.loss == pytest.approx(loss[np.arange(4), got.removed].sum())
        assert got.bound <= best * (1 + 1e-12) + 1e-12
        assert got.loss >= best * (1 - 1e-12) - 1e-12
        if convex:
            assert got.loss == pytest.approx(best, rel=1e-12, abs=1e-12)
        if got.loss <= got.bound * (1 + 1e-14):  # a corner of the hulls: proved optimal
            assert got.loss == pytest.approx(best)


def test_allocation_sees_through_a_costly_first_step():
    # unit 0: two inputs that cancel, dear one by one, free together
    loss = [[0.0, 10.0, 0.1, 20.0], [0.0, 3.0, 6.0, 9.0]]
    assert list(allocate(made_up_path(loss), 2).removed) == [2, 0]
    # one removal: the best split takes it from unit 1, though the hull's segment is unit 0's
    assert list(allocate(made_up_path(loss), 1).removed) == [0, 1]
    with pytest.raises(ValueError, match="removed: 7 wanted, the paths end at 6"):
        allocate(made_up_path(loss), 7)


def test_allocation_to_a_loss():
    inputs, weight = correlated(9)
    path = removal_path(problem_of(inputs, weight))
    for limit in (0.0, 0.5, 5.0, 1e9):
        got = allocate_to_loss(path, limit)
        assert got.loss <= limit
        if got.removed.sum() < 24:
            assert allocate(path, int(got.removed.sum()) + 1).loss > limit


@pytest.mark.parametrize("tolerance", [0.0, 0.5, 2.0, 1e9])
def test_removal_to_a_tolerance(tolerance):
    inputs, weight = correlated(10)
    problem = problem_of(inputs, weight)
    result = prune_greedy_to_tolerance(problem, tolerance)
    assert np.sqrt(result.error) <= tolerance
    assert result.removed >= prune_to_tolerance(problem, tolerance).removed
    assert (result.removed == 0) == (tolerance == 0.0)
    with pytest.raises(ValueError, match="tolerance: got -1, want a finite number >= 0"):
        prune_greedy_to_tolerance(problem, -1)


@pytest.mark.parametrize(("keep", "group"), [(2, 4), (1, 3), (4, 8), (2, 3)])
def test_grouped_path(keep, group):
    inputs, weight = correlated(3, n_in=8)
    pattern = n_of_m(keep, group)
    problem = problem_of(inputs, weight)
    path = removal_path(problem, pattern=pattern)
    kept = pattern_support(problem, path, pattern)
    for first in range(0, 8, group):
        part = kept[first : first + group]
        assert np.all(part.sum(axis=0) == min(keep, len(part)))
    assert np.all(path.order[:, path.length[0] :] == -1)
    assert np.all(np.isinf(path.loss[:, path.length[0] + 1 :]))


def test_a_path_is_not_cut_to_a_pattern_it_was_not_run_for():
    inputs, weight = correlated(3)
    problem = problem_of(inputs, weight)
    with pytest.raises(ValueError, match="path: was not run for the pattern 2:4"):
        pattern_support(problem, removal_path(problem), n_of_m(2, 4))
    with pytest.raises(ValueError, match="the removal path does not support 'inputs'"):
        pattern_support(problem, removal_path(problem), whole_inputs(0.5))


def test_mask_is_respected_and_bias_is_free():
    inputs, weight = correlated(11, bias=True)
    allowed = np.random.default_rng(0).random(weight.shape) < 0.8
    allowed[-1] = True
    problem = problem_of(inputs, weight, allowed=allowed, free_rows=[-1])
    path = removal_path(problem)
    forbidden = (~allowed).sum(axis=0)
    np.testing.assert_array_equal(path.forced, forbidden)
    for unit in range(3):
        first = path.order[unit, : forbidden[unit]]
        np.testing.assert_array_equal(first, np.flatnonzero(~allowed[:, unit]))
        assert 8 not in path.order[unit]
    exact = removal_path(problem, damping=0.0)
    for unit in range(3):
        kept = np.ones(9, dtype=bool)
        for step, p in enumerate(exact.order[unit]):
            kept[p] = False
            # What the mask demands costs what it costs, like what is chosen.
            wanted = exact_unit_loss(inputs, weight[:, unit], kept)
            assert exact.loss[unit, step + 1] == pytest.approx(wanted, rel=1e-8)
    for pattern in (per_layer(0.0), per_layer(0.7), per_unit(0.5), n_of_m(2, 4)):
        result = prune_greedy(problem, pattern)
        assert not np.any(result.weight[~allowed]) and np.all(result.kept[-1])
        assert result.error == pytest.approx(exact_loss(inputs, weight, result.kept), rel=1e-5)
    # the bias alone, updated: the mean of what it stands for
    only = prune_greedy(problem, per_layer(1.0))
    np.testing.assert_allclose(only.weight[-1], (inputs @ weight).mean(axis=0), rtol=1e-6)


def test_lost_digits_are_told():
    inputs, weight = correlated(1)
    inputs[:, 1] = inputs[:, 0]
    with pytest.raises(ValueError, match="raise the damping"):
        removal_path(problem_of(inputs, weight), damping=0.0)
    assert removal_path(problem_of(inputs, weight)).length[0] == 8


def test_whole_inputs_cheapest_first_and_exact():
    inputs, weight = correlated(2)
    problem = problem_of(inputs, weight)
    path = input_path(problem, damping=0.0)
    kept = np.ones((8, 3), dtype=bool)
    for step, p in enumerate(path.order):
        trials = {}
        for q in np.flatnonzero(kept[:, 0]):
            kept[q] = False
            trials[q] = exact_loss(inputs, weight, kept)
            kept[q] = True
        assert trials[p] <= min(trials.values()) * (1 + 1e-9)
        assert path.loss[step + 1] == pytest.approx(trials[p], rel=1e-8)
        kept[p] = False
    for sparsity, gone in [(0.0, 0), (0.5, 4), (1.0, 8)]:
        result = prune_inputs(problem, whole_inputs(sparsity))
        assert (~result.kept.any(axis=1)).sum() == gone
        assert result.error == pytest.approx(exact_loss(inputs, weight, result.kept), abs=1e-6)


def test_whole_inputs_with_a_mask():
    inputs, weight = correlated(2)
    allowed = np.ones((8, 3), dtype=bool)
    allowed[[2, 5]] = False
    result = prune_inputs(problem_of(inputs, weight, allowed=allowed), whole_inputs(0.125))
    np.testing.assert_array_equal(np.flatnonzero(~result.kept.any(axis=1)), [2, 5])
    allowed[3, 0] = False
    with pytest.raises(ValueError, match="allowed: forbids a part of an input"):
        prune_inputs(problem_of(inputs, weight, allowed=allowed), whole_inputs(0.5))
    with pytest.raises(ValueError, match="prune_inputs does not support 'layer', only inputs"):
        prune_inputs(problem_of(inputs, weight), per_layer(0.5))
