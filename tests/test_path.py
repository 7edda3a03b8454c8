"""Paths of solutions and wanted numbers of zeros."""

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from instances import of_a_layer
from kkt import assert_kkt

from solvers import Status, solve_count, solve_newton, solve_path, trim_program


def layer(seed=0, bias=True):
    """A layer with 24 inputs and 6 units, wide enough for its counts to be told apart."""
    rng = np.random.default_rng(seed)
    inputs = np.maximum(rng.standard_normal((120, 24)) + 0.3 * rng.random((120, 1)), 0)
    weight = rng.standard_normal((24, 6)) * np.where(rng.random((24, 6)) < 0.3, 1, 0.1)
    if bias:
        inputs[:, -1] = 1
    targets = np.maximum(inputs @ weight, 0)
    return trim_program(
        inputs,
        targets,
        epsilon=0.05 * float(np.linalg.norm(targets)),
        free_rows=(23,) if bias else (),
        old_weight=weight,
    )


@pytest.mark.parametrize("form", ["constrained", "regularised"])
def test_a_path_is_the_solutions_one_by_one(form):
    program = of_a_layer(3, form, kind="correlated", bias=True)
    values = [2.0, 1.0, 0.5, 0.25] if form == "constrained" else [0.5, 1.0, 4.0]
    points = solve_path(program, values, tolerance=1e-7)
    name = "epsilon" if form == "constrained" else "fit_weight"
    for value, point in zip(values, points, strict=True):
        assert point.result.status is Status.SOLVED
        assert getattr(point.program, name) == value
        alone = solve_newton(replace(program, **{name: value}), tolerance=1e-7)
        np.testing.assert_allclose(
            point.result.certificate.objective, alone.certificate.objective, rtol=1e-6
        )
        difference = program.inputs @ point.result.weight - program.level
        residual = np.linalg.norm(difference[program.active])
        assert point.residual == pytest.approx(residual)
        size = np.linalg.norm(program.level[program.active])
        assert point.relative_residual == pytest.approx(residual / size)
        assert point.zeros == (point.result.weight[:-1] == 0).sum()
        assert point.sparsity == point.zeros / 44
    # A smaller ball, or a larger weight of the fit, fits better.
    for before, after in pairwise(points):
        assert after.residual < before.residual


def test_a_smaller_ball_costs_more_and_the_cost_is_convex():
    values = [2.0, 1.5, 1.0, 0.5]
    points = solve_path(layer(), values, tolerance=1e-8)
    costs = [float(point.result.certificate.objective) for point in points]
    slopes = np.diff(costs) / np.diff(values)
    assert np.all(slopes < 0)
    assert np.all(np.diff(slopes) < 1e-6)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("share", [0.1, 0.4, 0.7, 0.95])
def test_a_wanted_count_is_met_and_certified(bias, share):
    program = layer(bias=bias)
    total = (23 if bias else 24) * 6
    wanted = round(share * total)
    point = solve_count(program, wanted, tolerance=1e-6)
    # A unit under ceilings of zero leaves zero with several weights at once, so the count jumps.
    assert abs(point.zeros - wanted) <= 6
    assert point.result.status is Status.SOLVED
    certificate = point.program.certificate(point.result.weight, point.result.multiplier)
    assert certificate.within(1e-6, 1e-6)
    # It is the program's own solution at the epsilon that it names.
    again = solve_newton(point.program, tolerance=1e-7)
    assert again.certificate.objective == pytest.approx(certificate.objective, rel=1e-5)
    # A gap of 1e-6 allows a weight that was set, or an input in sign, an error of its root.
    assert_kkt(point.program, point.result.weight, point.result.multiplier, 5e-3)


def test_all_zeros_and_none():
    program = layer(bias=False)
    everything = solve_count(program, 144)
    assert everything.zeros == 144
    assert everything.relative_residual == pytest.approx(1)
    assert everything.result.status is Status.SOLVED
    nothing = solve_count(program, 0)
    assert nothing.zeros <= 12
    assert nothing.relative_residual < 1e-2


def test_malformed_arguments_are_refused():
    program = layer()
    with pytest.raises(
        ValueError, match="values: got none, want at least one epsilon or fit weight"
    ):
        solve_path(program, [])
    with pytest.raises(ValueError, match=r"epsilon: got -1\.0, want a finite number >= 0"):
        solve_path(program, [-1])
    with pytest.raises(ValueError, match="zeros: got 139, want a count from 0 to 138"):
        solve_count(program, 139)


def test_nothing_to_fit_has_one_solution():
    program = layer()
    empty = replace(program, active=np.zeros_like(program.active))
    point = solve_count(empty, 3)
    assert point.zeros == point.weights == 138
    assert point.result.status is Status.SOLVED
