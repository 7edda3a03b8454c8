"""Solutions with a wanted number of zeros."""

from dataclasses import replace

import numpy as np
import pytest

from solvers import (
    ElasticNet,
    Group,
    RegularisedProgram,
    Status,
    solve_admm,
    solve_count,
    solve_newton,
    trim_program,
)


def layer(form="epsilon", n_out=40, seed=0, **options):
    """30 inputs, the last of them ones, and more units than the first search takes."""
    rng = np.random.default_rng(seed)
    inputs = np.maximum(rng.standard_normal((150, 30)) + 0.3 * rng.random((150, 1)), 0)
    weight = rng.standard_normal((30, n_out)) * np.where(rng.random((30, n_out)) < 0.3, 1, 0.1)
    inputs[:, -1] = 1
    targets = np.maximum(inputs @ weight, 0)
    value = 0.05 * float(np.linalg.norm(targets)) if form == "epsilon" else 5.0
    return trim_program(
        inputs, targets, free_rows=(29,), old_weight=weight, **{form: value}, **options
    )


@pytest.mark.parametrize("form", ["epsilon", "fit_weight"])
@pytest.mark.parametrize("solve", [solve_newton, solve_admm])
@pytest.mark.parametrize("share", [0.3, 0.85])
def test_the_count_is_exact_where_the_tolerance_has_room(form, solve, share):
    program = layer(form)
    wanted = round(share * 29 * 40)
    point = solve_count(program, wanted, tolerance=1e-2, violation_tolerance=1e-3, solve=solve)
    assert point.zeros == wanted == (point.result.weight[:-1] == 0).sum()
    assert (point.weights, point.sparsity) == (29 * 40, wanted / (29 * 40))
    assert point.result.status is Status.SOLVED
    certificate = point.program.certificate(point.result.weight, point.result.multiplier)
    assert np.all(certificate.within(1e-2, 1e-3))
    assert isinstance(point.program, RegularisedProgram) == (form == "fit_weight")
    if form == "epsilon":
        assert point.program.epsilon == pytest.approx(point.residual)
        assert not certificate.ball_violation > 1e-12
    # The units of the first search spare the whole layer most of the trials.
    assert len(point.result.history) <= 15
    assert {"value", "zeros", "gap", "violation"} <= set(point.result.history[0])


def test_setting_the_rest_costs_nothing_that_the_tolerance_counts():
    """The weights that were set are small: the objective is that of the program's own solution."""
    point = solve_count(layer(), 700, tolerance=1e-2, violation_tolerance=1e-3)
    best = solve_newton(point.program, tolerance=1e-6)
    objective = float(point.result.certificate.objective)
    assert objective == pytest.approx(float(best.certificate.objective), rel=1e-2)
    assert point.result.certificate.dual_bound <= best.certificate.objective * (1 + 1e-6)


def test_a_penalty_that_couples_units_is_searched_along_its_own_ball():
    program = layer(n_out=6, penalty=Group(0.7))
    point = solve_count(program, 9 * 6, tolerance=1e-3, solve=solve_admm)
    rows = (point.result.weight[:-1] == 0).all(axis=1)
    assert point.zeros == rows.sum() * 6 == 9 * 6
    assert point.result.status is Status.SOLVED
    with pytest.raises(ValueError, match="couples the units, which Newton"):
        solve_count(program, 9 * 6)


def test_an_elastic_net():
    program = layer("fit_weight", penalty=ElasticNet(0.3))
    point = solve_count(program, 500, tolerance=1e-2, violation_tolerance=1e-3)
    assert (point.zeros, point.result.status) == (500, Status.SOLVED)


def test_rows_that_count():
    """With the bias under the penalty too, only the rows named are counted."""
    program = replace(layer(), free_rows=())
    point = solve_count(program, 600, tolerance=1e-2, violation_tolerance=1e-3, rows=np.arange(29))
    assert point.zeros == (point.result.weight[:29] == 0).sum() == 600
    assert point.weights == 29 * 40


def test_an_exact_fit_is_where_a_search_may_begin():
    point = solve_count(
        replace(layer(), epsilon=0.0), 600, tolerance=1e-2, violation_tolerance=1e-3
    )
    assert (point.zeros, point.result.status) == (600, Status.SOLVED)


def test_the_nearest_count_where_the_path_jumps():
    """Two units alike lose their only weight together, and one alone is no solution."""
    inputs = np.abs(np.random.default_rng(0).standard_normal((20, 1)))
    program = trim_program(
        inputs, inputs @ np.ones((1, 2)), epsilon=0.1, old_weight=np.ones((1, 2))
    )
    point = solve_count(program, 1, tolerance=1e-6)
    assert point.zeros in (0, 2)
    assert point.result.status is Status.SOLVED


def test_two_searches_give_the_same_bytes():
    first, second = (solve_count(layer(seed=3), 500, tolerance=1e-2) for _ in range(2))
    assert np.array_equal(first.result.weight, second.result.weight)
    assert first.program.epsilon == second.program.epsilon


@pytest.mark.parametrize("seed", range(3))
def test_small_layers_meet_most_counts(seed):
    """Where the few weights that are left cannot be set to zero, the count itself is aimed at."""
    rng = np.random.default_rng(seed)
    inputs, weight = rng.standard_normal((50, 10)), rng.standard_normal((10, 3))
    program = trim_program(inputs, np.maximum(inputs @ weight, 0), epsilon=1.0, old_weight=weight)
    found = {zeros: solve_count(program, zeros).zeros for zeros in range(2, 28, 2)}
    assert sum(zeros == got for zeros, got in found.items()) >= 9
    assert max(abs(zeros - got) for zeros, got in found.items()) <= 4
