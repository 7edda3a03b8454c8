"""Whatever the numbers, a solver ends with a status: not converging never raises."""

import warnings
from dataclasses import replace

import numpy as np
import pytest
from instances import KINDS, of_a_layer

from solvers import (
    ElasticNet,
    Group,
    SolveResult,
    Status,
    solve_admm,
    solve_count,
    solve_newton,
    solve_osqp,
    solve_path,
)

SIZES = (0.0, 1e-300, 1e-30, 1e-6, 1.0, 1e6, 1e30, 1e300)


def extreme(seed):
    """A small layer with radii, weights of the fit, ridges and ranges far from any usual ones."""
    rng = np.random.default_rng([seed, 7])
    form = str(rng.choice(["constrained", "regularised"]))
    dtype = (np.float64, np.float32)[int(rng.integers(2))]
    kind = str(rng.choice(KINDS))
    program = of_a_layer(seed, form, kind=kind, dtype=dtype, bias=bool(rng.random() < 0.5))
    size = float(rng.choice(SIZES))
    change = {"epsilon": size} if form == "constrained" else {"fit_weight": size or 1e-12}
    reach = 100 if dtype is np.float64 else 25
    inputs, level = program.inputs.copy(), program.level.copy()
    for array in (inputs, level):
        if rng.random() < 0.4:
            array *= dtype(10.0 ** rng.uniform(-reach, reach))
        if rng.random() < 0.4:
            array *= (10.0 ** rng.uniform(-6, 6, array.shape[1])).astype(dtype)
        if rng.random() < 0.3:
            array[rng.random(array.shape) < 0.3] = 0
    if rng.random() < 0.3:
        level += rng.standard_normal(level.shape).astype(dtype) * np.abs(level).max()
    if rng.random() < 0.3:
        change["old_weight"] = None
    elif rng.random() < 0.3:
        change["old_weight"] = program.old_weight * dtype(10.0 ** rng.uniform(-reach, reach))
    if rng.random() < 0.3:
        change["penalty"] = ElasticNet(float(rng.choice(SIZES[1:])))
    elif rng.random() < 0.2 and form == "constrained":
        change["penalty"] = Group(float(rng.choice([1e-6, 1.0, 1e6])))
    return replace(program, inputs=inputs, level=level, **change)


def judged(result, program, tolerance):
    """A status that the certificate bears out."""
    assert isinstance(result, SolveResult)
    certificate = program.certificate(result.weight, result.multiplier)
    within = bool(np.all(certificate.within(tolerance, tolerance)))
    assert (result.status is Status.SOLVED) == within


@pytest.mark.parametrize("first", range(0, 120, 20))
def test_no_numbers_make_a_solver_raise(first):
    for seed in range(first, first + 20):
        program = extreme(seed)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # overflows are judged, not hidden
            judged(solve_admm(program, tolerance=1e-3, max_iterations=300), program, 1e-3)
            if program.penalty.separable:
                result = solve_newton(program, tolerance=1e-3, max_iterations=100)
                judged(result, program, 1e-3)


@pytest.mark.parametrize("seed", range(12))
def test_no_numbers_make_a_search_raise(seed):
    program = extreme(seed)
    if not program.penalty.separable:
        program = replace(program, penalty=ElasticNet(1.0))
    total = len(program.penalised) * program.shape[2]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        point = solve_count(program, total // 2, tolerance=1e-2, max_iterations=50)
        assert isinstance(point.result.status, Status)
        for point in solve_path(program, [1e-9, 1.0, 1e9], tolerance=1e-2, max_iterations=50):
            assert isinstance(point.result.status, Status)


@pytest.mark.parametrize("seed", range(8))
def test_the_quadratic_program_does_not_raise_where_it_has_no_solution(seed):
    program = of_a_layer(seed, "regularised")
    inputs, level, active = (getattr(program, n).copy() for n in ("inputs", "level", "active"))
    inputs[7], active[7, 2], level[7, 2] = 0, False, -1.0
    broken = replace(program, inputs=inputs, level=level, active=active)
    result = solve_osqp(broken, max_iterations=500)
    assert result.status is not Status.SOLVED
    for size in (1e-30, 1e30):
        wide = replace(program, fit_weight=size)
        assert isinstance(solve_osqp(wide, max_iterations=100).status, Status)
