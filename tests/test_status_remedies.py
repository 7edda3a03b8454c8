"""Every status is reached on purpose, and its remedy, applied, ends in a certified layer."""

from dataclasses import replace

import numpy as np
import pytest
from instances import of_a_layer

from solvers import (
    Group,
    Status,
    solve_admm,
    solve_count,
    solve_cvxpy,
    solve_newton,
    solve_path,
    trim_program,
)

FORMS = ("constrained", "regularised")
SOLVERS = {"admm": solve_admm, "newton": solve_newton}


def noisy(seed, *, dtype=np.float64, activation="linear", part=1e-6, shape=(150, 12, 4)):
    """A layer whose targets are not in the range of its inputs, and a ball far too small."""
    rng = np.random.default_rng(seed)
    n_samples, n_in, n_out = shape
    inputs = rng.standard_normal((n_samples, n_in))
    targets = inputs @ rng.standard_normal((n_in, n_out)) + rng.standard_normal((n_samples, n_out))
    if activation == "relu":
        targets = np.maximum(targets, 0)
    return trim_program(
        inputs.astype(dtype),
        targets.astype(dtype),
        activation=activation,
        epsilon=part * float(np.linalg.norm(targets)),
    )


def widened(program):
    """The remedy of a ball that cannot be reached."""
    missed = float(solve_newton(program).certificate.ball_violation)
    if program.epsilon > 0:
        return replace(program, epsilon=(1 + 2 * missed) * program.epsilon)
    size = float(np.linalg.norm(program.fitted_norms()))
    return replace(program, epsilon=2 * missed * size)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("part", [0.0, 1e-6, 1e-2])
@pytest.mark.parametrize("activation", ["linear", "relu"])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("solver", SOLVERS)
def test_a_ball_out_of_reach_is_told_and_a_wider_one_is_solved(
    solver, dtype, activation, part, seed
):
    program = noisy(seed, dtype=dtype, activation=activation, part=part)
    result = SOLVERS[solver](program, tolerance=1e-4)
    assert result.status is Status.UNREACHABLE
    assert not result.certified
    assert len(result.history) <= 20  # it is not gone on with to the limit
    assert "raise epsilon" in result.status.remedy
    again = SOLVERS[solver](widened(program), tolerance=1e-4)
    assert again.status is Status.SOLVED


def test_the_bound_that_proves_it_is_the_program_s_own():
    program = noisy(1)
    for solve in SOLVERS.values():
        result = solve(program)
        assert program.dual_bound(result.multiplier) == result.certificate.dual_bound
        # No weights of twice, of ten times, ... the size that targets and inputs suggest.
        assert result.certificate.dual_bound > 1e6 * np.abs(widest(program)).sum()


def widest(program):
    lengths = np.linalg.norm(program.inputs, axis=0)
    return program.fitted_norms()[None] / lengths[:, None]


def test_a_ball_that_couples_units_out_of_reach_is_told_too():
    program = replace(noisy(2), penalty=Group())
    result = solve_admm(program, max_iterations=20_000)
    assert result.status is Status.UNREACHABLE
    wider = replace(program, epsilon=widened(noisy(2)).epsilon)
    assert solve_admm(wider).status is Status.SOLVED


@pytest.mark.parametrize("solver", SOLVERS)
def test_a_ceiling_out_of_reach_is_told_unit_by_unit(solver):
    program = of_a_layer(3, "regularised")
    inputs, level, active = (getattr(program, n).copy() for n in ("inputs", "level", "active"))
    inputs[7], active[7, 2], level[7, 2] = 0, False, -1.0
    broken = replace(program, inputs=inputs, level=level, active=active)
    result = SOLVERS[solver](broken, max_iterations=20_000)
    assert result.status is Status.UNREACHABLE
    assert not result.certified[2]
    assert result.certified[[0, 1, 3]].all()
    assert "raise the ceilings" in result.status.remedy
    level[7, 2] = 0.0
    assert SOLVERS[solver](replace(broken, level=level)).status is Status.SOLVED


@pytest.mark.parametrize("part", [1e-6, 0.0])
def test_paths_and_counts_out_of_reach_do_not_raise(part):
    program = noisy(3, part=part)
    values = [program.epsilon, 0.9 * float(np.linalg.norm(program.fitted_norms()))]
    first, second = solve_path(program, values)
    assert first.result.status is Status.UNREACHABLE
    assert second.result.status is Status.SOLVED
    for solve in SOLVERS.values():
        point = solve_count(program, 24, solve=solve)
        assert abs(point.zeros - 24) <= 4  # the path may jump over it
        assert point.result.status is Status.SOLVED


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("solver", SOLVERS)
def test_an_iteration_limit_can_be_raised_gone_on_from_loosened_or_left_to_newton(solver, form):
    program = of_a_layer(18, form, kind="correlated", bias=True)
    solve = SOLVERS[solver]
    few = {"admm": 20, "newton": 8}[solver]
    result = solve(program, tolerance=1e-5, max_iterations=few)
    assert result.status is Status.ITERATION_LIMIT
    for word in ("max_iterations", "warm_start", "tolerance", "solve_newton"):
        assert word in result.status.remedy
    assert solve(program, tolerance=1e-5, max_iterations=50_000).status is Status.SOLVED
    again = solve(program, tolerance=1e-5, warm_start=result, max_iterations=50_000)
    assert again.status is Status.SOLVED
    met = 2 * max(np.max(result.certificate.gap), np.max(result.certificate.violation))
    assert solve(program, tolerance=met, max_iterations=few).status is Status.SOLVED
    assert solve_newton(program, tolerance=1e-5).status is Status.SOLVED


@pytest.mark.parametrize("form", FORMS)
def test_what_float32_leaves_inexact_is_solved_in_float64_or_by_less(form):
    program = of_a_layer(3, form, dtype=np.float32, bias=True)
    result = solve_newton(program, tolerance=1e-10)
    assert result.status is Status.INEXACT
    for word in ("tolerance", "float64"):
        assert word in result.status.remedy
    met = 1.01 * max(np.max(result.certificate.gap), np.max(result.certificate.violation))
    assert solve_newton(program, tolerance=met).status is Status.SOLVED
    wide = {n: getattr(program, n).astype(float) for n in ("inputs", "level", "old_weight")}
    assert solve_newton(replace(program, **wide), tolerance=1e-10).status is Status.SOLVED


@pytest.mark.parametrize("solver", SOLVERS)
def test_no_finite_point_is_told_and_a_fresh_start_finds_one(solver):
    program = of_a_layer(4, "constrained")
    failed = solve_cvxpy(trim_program(np.zeros((40, 12)), np.ones((40, 4)), epsilon=0.1))
    assert failed.status is Status.NUMERICAL_ERROR
    assert np.isnan(failed.weight).all()
    result = SOLVERS[solver](program, warm_start=failed)
    assert result.status is Status.NUMERICAL_ERROR
    for word in ("warm_start", "another solver"):
        assert word in result.status.remedy
    assert SOLVERS[solver](program).status is Status.SOLVED


def test_what_the_oracle_found_no_point_for_another_solver_explains():
    program = trim_program(np.zeros((4, 3)), np.ones((4, 2)), epsilon=0.1)
    assert solve_cvxpy(program).status is Status.NUMERICAL_ERROR
    result = solve_newton(program)
    assert result.status is Status.UNREACHABLE
    assert solve_newton(widened(program)).status is Status.SOLVED
