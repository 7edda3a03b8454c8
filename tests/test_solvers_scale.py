"""Scales of data and of columns: solvers take the same path, and certify the same."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from instances import of_a_layer

from solvers import L1, ElasticNet, Group, Status, prepare, solve_admm, solve_newton
from solvers.program import ConstrainedProgram

FORMS = ("constrained", "regularised")
SOLVERS = {"admm": solve_admm, "newton": solve_newton}


def in_units(program, a, b):
    """The program (aX, bY), its fit weight or radius and its ridge in the new units."""
    penalty = program.penalty
    if isinstance(penalty, ElasticNet):
        penalty = ElasticNet(penalty.ridge * a / b)
    form = (
        {"epsilon": b * program.epsilon}
        if isinstance(program, ConstrainedProgram)
        else {"fit_weight": program.fit_weight / (a * b)}
    )
    old = None if program.old_weight is None else program.old_weight * (b / a)
    data = {"inputs": a * program.inputs, "level": b * program.level}
    return replace(program, penalty=penalty, old_weight=old, **data, **form)


UNITS = [
    (1.0, 2.0**-100),
    (1.0, 2.0**100),
    (2.0**-60, 1.0),
    (2.0**40, 2.0**-40),
    (2.0**-3, 2.0**5),
]


@pytest.mark.parametrize(("a", "b"), UNITS)
@pytest.mark.parametrize("dtype", [np.float64, np.float32])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("penalty", [L1(), ElasticNet(0.4), Group(1.5)], ids=lambda p: p.name)
@pytest.mark.parametrize("solver", SOLVERS)
def test_powers_of_two_change_no_bit(solver, penalty, form, dtype, a, b):
    if isinstance(penalty, Group) and (solver == "newton" or form == "regularised"):
        pytest.skip("the group penalty couples the units")
    for seed, bias in ((5, True), (6, False)):
        program = of_a_layer(seed, form, bias=bias, dtype=dtype, penalty=penalty)
        one = SOLVERS[solver](program, tolerance=1e-5)
        two = SOLVERS[solver](in_units(program, a, b), tolerance=1e-5)
        assert one.status is Status.SOLVED
        assert two.status is one.status
        assert two.iterations == one.iterations
        assert (two.weight * (a / b)).tobytes() == one.weight.tobytes()
        assert (two.multiplier * a).tobytes() == one.multiplier.tobytes()
        for name in ("gap", "violation"):
            want = getattr(one.certificate, name)
            np.testing.assert_array_equal(getattr(two.certificate, name), want)


@pytest.mark.parametrize("b", [2.0**-100, 1.0, 2.0**100])
@pytest.mark.parametrize("radius", [0.999, 1.5, 1e6])
@pytest.mark.parametrize("dtype", [np.float64, np.float32])
@pytest.mark.parametrize("solver", SOLVERS)
def test_a_ball_around_zero_is_solved_by_zero_at_any_scale(solver, dtype, radius, b):
    program = of_a_layer(7, "constrained", dtype=dtype, bias=False)
    size = float(np.linalg.norm(program.fitted_norms()))
    program = in_units(replace(program, epsilon=radius * size), 1.0, b)
    result = SOLVERS[solver](program)
    assert result.status is Status.SOLVED
    assert np.all(result.weight == 0) == (radius > 1)


def scaled_columns(program, decades, seed=0):
    """The program with its columns scaled at random, and its old weights divided accordingly."""
    rng = np.random.default_rng(seed)
    sizes = 10 ** rng.uniform(-decades / 2, decades / 2, program.shape[1])
    sizes[list(program.free_rows)] = 1.0
    sizes = sizes.astype(program.inputs.dtype)
    old = None if program.old_weight is None else program.old_weight / sizes[:, None]
    return replace(program, inputs=program.inputs * sizes, old_weight=old)


CASES = [
    ("newton", "constrained", L1(), 8, 1e-5),
    ("newton", "regularised", L1(), 8, 1e-6),
    ("newton", "constrained", ElasticNet(0.1), 8, 1e-6),
    ("newton", "regularised", ElasticNet(0.1), 8, 1e-6),
    ("admm", "constrained", L1(), 3, 1e-3),
    ("admm", "regularised", L1(), 3, 1e-3),
    ("admm", "constrained", ElasticNet(0.1), 3, 1e-3),
    ("admm", "constrained", Group(1.0), 3, 1e-3),
]


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("mask", [False, True])
@pytest.mark.parametrize(("solver", "form", "penalty", "decades", "tolerance"), CASES)
def test_columns_of_any_size_are_certified(solver, form, penalty, decades, tolerance, mask, bias):
    for seed in range(3):
        program = of_a_layer(seed, form, bias=bias, penalty=penalty)
        program = scaled_columns(program, decades, seed)
        if mask:
            support = np.random.default_rng(seed).random(program.shape[1:]) < 0.8
            support |= program.old_weight != 0
            program = replace(program, support=support)
        result = SOLVERS[solver](program, tolerance=tolerance, max_iterations=50_000)
        assert result.status is Status.SOLVED, seed
        again = program.certificate(result.weight, result.multiplier)
        assert again.within(tolerance, tolerance).all()


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("form", FORMS)
def test_warm_starts_and_factors_are_in_the_caller_s_units(solver, form):
    program = scaled_columns(of_a_layer(4, form, bias=True), 4)
    solve = SOLVERS[solver]
    limits = {"tolerance": 1e-5, "max_iterations": 50_000}
    first = solve(program, **limits)
    again = solve(program, warm_start=first, factor=prepare(program.inputs), **limits)
    assert first.status is again.status is Status.SOLVED
    assert again.iterations <= max(50, first.iterations // 2)


@pytest.mark.parametrize("form", FORMS)
def test_tensors_of_any_column_sizes_agree_with_arrays(form):
    program = scaled_columns(of_a_layer(4, form, bias=True), 3)
    names = ("inputs", "active", "level", "old_weight")
    tensors = replace(program, **{name: torch.asarray(getattr(program, name)) for name in names})
    ours, theirs = (solve_admm(each, max_iterations=50_000) for each in (program, tensors))
    assert ours.status is theirs.status is Status.SOLVED
    np.testing.assert_allclose(theirs.certificate.objective, ours.certificate.objective, rtol=1e-3)
