import numpy as np
import pytest
from obs_cases import (
    best_grouped_loss,
    best_layer_loss,
    correlated,
    exact_loss,
    exact_unit_loss,
    problem_of,
)

from solvers import Status
from solvers.obs import (
    improve,
    kept_by,
    n_of_m,
    per_layer,
    per_unit,
    prune_best,
    prune_greedy,
    prune_swaps,
    whole_inputs,
)
from solvers.obs.swaps import Room, Tableau, take_swaps


def random_support(seed, weight, pattern, allowed=None, prunable=None):
    allowed = np.ones(weight.shape, dtype=bool) if allowed is None else allowed
    prunable = np.ones(len(weight), dtype=bool) if prunable is None else prunable
    score = np.random.default_rng(seed).random(weight.shape)
    return kept_by(score, pattern, allowed, prunable)


def neighbours(kept, *, across, movable, group=None):
    """All supports one exchange away."""
    leavers, enterers = np.argwhere(kept & movable), np.argwhere(~kept & movable)
    for p, u in leavers:
        for q, v in enterers:
            if (u != v and not across) or (group and p // group != q // group):
                continue
            other = kept.copy()
            other[p, u], other[q, v] = False, True
            yield other


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("pattern", [per_layer(0.5), per_unit(0.625), n_of_m(2, 4), n_of_m(1, 3)])
def test_ends_at_a_local_optimum(seed, pattern):
    inputs, weight = correlated(seed)
    start = random_support(seed, weight, pattern)
    result = improve(problem_of(inputs, weight), start, pattern, damping=1e-12)
    assert result.status is Status.SOLVED
    loss = exact_loss(inputs, weight, result.kept)
    assert loss <= exact_loss(inputs, weight, start)
    assert result.error == pytest.approx(loss, rel=1e-6)
    assert result.history["loss"][-1] == pytest.approx(loss, rel=1e-6)
    others = neighbours(
        result.kept, across=pattern.kind == "layer",
        movable=np.ones(weight.shape, dtype=bool), group=pattern.group,
    )  # fmt: skip
    assert min(exact_loss(inputs, weight, o) for o in others) >= loss * (1 - 1e-6)


def test_local_optimum_with_mask_and_bias():
    inputs, weight = correlated(9, bias=True)
    allowed = np.random.default_rng(1).random(weight.shape) < 0.85
    allowed[-1] = True
    problem = problem_of(inputs, weight, allowed=allowed, free_rows=[-1])
    pattern = per_layer(0.6)
    start = random_support(2, weight, pattern, allowed, problem.prunable)
    result = improve(problem, start, pattern, damping=1e-12)
    assert result.removed == pattern.removed(24)
    assert not np.any(result.kept & ~allowed) and result.kept[-1].all()
    loss = exact_loss(inputs, weight, result.kept)
    movable = allowed & problem.prunable[:, None]
    others = neighbours(result.kept, across=True, movable=movable)
    assert min(exact_loss(inputs, weight, o) for o in others) >= loss * (1 - 1e-6)


@pytest.mark.parametrize("seed", range(6))
def test_best_method_against_all_supports(seed):
    inputs, weight = correlated(seed, n_in=6, n_out=2)
    problem = problem_of(inputs, weight)
    for removed in (4, 6, 8):
        optimum = best_layer_loss(inputs, weight, removed)
        greedy = prune_greedy(problem, per_layer(removed / 12))
        best = prune_best(problem, per_layer(removed / 12), kicks=10)
        assert optimum * (1 - 1e-9) <= best.error <= greedy.error * (1 + 1e-9)
        # what these sizes reach: the optimum, for every seed here
        assert best.error == pytest.approx(optimum, rel=1e-4)


@pytest.mark.parametrize("seed", range(3))
def test_grouped_against_all_supports(seed):
    inputs, weight = correlated(seed, n_in=8, n_out=2)
    best = prune_best(problem_of(inputs, weight), n_of_m(2, 4), kicks=10)
    optimum = sum(best_grouped_loss(inputs, weight[:, u], 2, 4) for u in range(2))
    assert best.error == pytest.approx(optimum, rel=1e-4)


def test_swaps_beat_greedy_and_kicks_beat_swaps():
    inputs, weight = correlated(0, n_in=40, n_out=10, samples=400)
    problem = problem_of(inputs, weight)
    pattern = per_layer(0.8)
    errors = [
        prune_greedy(problem, pattern).error,
        prune_swaps(problem, pattern).error,
        prune_swaps(problem, pattern, kicks=30).error,
    ]
    assert errors[2] < errors[1] < 0.97 * errors[0]


def test_many_swaps_lose_no_digits():
    """After hundreds of pivots the tableau's loss is still that of a fresh least squares."""
    inputs, weight = correlated(3, n_in=150, n_out=4, samples=600)
    pattern = per_unit(0.7)
    start = random_support(5, weight, pattern)
    result = improve(problem_of(inputs, weight), start, pattern, damping=1e-9)
    assert result.history["swaps"][0] > 100
    assert result.history["loss"][0] == pytest.approx(
        exact_loss(inputs, weight, result.kept), rel=1e-6
    )


def test_result_depends_on_the_seed_alone():
    inputs, weight = correlated(4, n_in=20, n_out=6)
    problem, pattern = problem_of(inputs, weight), per_layer(0.7)
    start = random_support(0, weight, pattern)
    one, two = (improve(problem, start, pattern, kicks=5, seed=3, threads=t) for t in (1, 2))
    np.testing.assert_array_equal(one.weight, two.weight)


def test_dead_inputs_are_swapped_out():
    inputs, weight = correlated(6)
    inputs[:, [1, 4]] = 0.0
    start = np.zeros((8, 3), dtype=bool)
    start[[1, 4]] = True  # the worst: two dead inputs are all that is kept
    result = improve(problem_of(inputs, weight), start, per_unit(0.75), damping=0.0)
    assert not np.any(result.kept[[1, 4]])
    loss = [exact_unit_loss(inputs, weight[:, u], result.kept[:, u]) for u in range(3)]
    assert result.error == pytest.approx(sum(loss), rel=1e-6)


def test_limits_are_reported():
    inputs, weight = correlated(7, n_in=30, n_out=4, samples=300)
    problem, pattern = problem_of(inputs, weight), per_layer(0.7)
    start = random_support(1, weight, pattern)
    few = improve(problem, start, pattern, max_rounds=1)
    assert few.note == "exchanges left; raise max_rounds"
    assert (
        improve(problem, start, pattern, max_rounds=0).status is Status.SOLVED
    )  # none were asked for
    few = improve(problem, random_support(1, weight, per_unit(0.7)), per_unit(0.7), max_swaps=1)
    assert few.note == "swaps left; raise max_swaps" and few.history["swaps"] == [4]
    none = improve(problem, start, pattern, max_swaps=0, max_rounds=0)
    np.testing.assert_array_equal(none.kept, start)
    assert (none.history["swaps"], none.history["exchanges"]) == ([0], [0])
    once = improve(problem, start, pattern, max_rounds=1)
    assert 0 < once.history["exchanges"][0] <= 2  # four units, each once
    assert len(once.history["loss"]) == 2


@pytest.mark.parametrize(("leaver", "enterer"), [(0.5, 1.0), (0.0, 1.0), (-0.5, -1.0), (-0.5, 0.0)])
def test_a_swap_on_lost_digits_is_not_made(leaver, enterer):
    """A kept weight's diagonal is negative, a removed one's positive; the kernel's own check."""
    diagonal = np.array([leaver, enterer])
    table, line = np.array([[-leaver, 1.0]]), np.array([1.0, 2.0])
    bounds = np.zeros(2, dtype=np.int64), np.full(2, 2)
    kept = np.array([True, False])
    tableau = Tableau(np.eye(2), table, line, diagonal, np.array([0]), kept)
    done, loss = take_swaps(tableau, Room(np.ones(2, dtype=bool), *bounds), 1, 3.0, 0.0)
    assert (done, loss) == (-1, 3.0)
    np.testing.assert_array_equal(kept, [True, False])


def test_refusals():
    inputs, weight = correlated(8)
    problem = problem_of(inputs, weight)
    start = random_support(0, weight, per_layer(0.5))
    with pytest.raises(
        ValueError, match=r"kept: layer 0\.25 removes 6 weights here, this support 12"
    ):
        improve(problem, start, per_layer(0.25))
    lopsided = np.ones((8, 3), dtype=bool)
    lopsided[:, 0] = False
    lopsided[:4, 1] = False
    with pytest.raises(ValueError, match=r"kept: the support does not fit the pattern unit 0\.5"):
        improve(problem, lopsided, per_unit(0.5))
    with pytest.raises(ValueError, match="improve does not support 'inputs'"):
        improve(problem, start, whole_inputs(0.5))
    inputs[:, 1] = inputs[:, 0]
    with pytest.raises(ValueError, match="damping"):
        improve(problem_of(inputs, weight), np.ones((8, 3), bool), per_layer(0.0), damping=0.0)
