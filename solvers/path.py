"""Paths of solutions: a layer at many radii, and at a wanted number of zeros.

**Path.** From one radius (or fit weight) to the next the solution moves little, so each solve
starts from the last, and all share one factorisation. The points are the curve of sparsity against
discrepancy that a person chooses epsilon from.

**A wanted count.** The solution of (11) for fit weight lambda solves (4) for the epsilon that is
its own residual, with the same multiplier: its optimality conditions are the ball's, with
2 lambda (Xu - y)_Omega = nu_Omega. So the epsilon at which a layer has a wanted number of zeros is
searched for along (11), whose units are independent, and only the last point is a program (4). The
number of zeros is not continuous and, in rare cases, not monotone in lambda: the search keeps
a bracket of log lambda and ends with the nearest count it met.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
from array_api_compat import array_namespace

from solvers.admm import prepare
from solvers.newton import solve_newton
from solvers.program import ConstrainedProgram, LayerProgram, Program, RegularisedProgram, to_numpy
from solvers.result import SolveResult, Status, judge

Array = Any

_SEARCH_STEPS = 40
_NEAREST = 1e-6  # relative change of lambda below which counts are not told apart
_FIRST_FACTOR = 4.0
_WIDEST = 1e8  # of lambda, either way from where the search begins
_SMALL_RADIUS = 0.05  # where an exact fit's search begins, relative to the targets
_FINER = 0.1  # part of the tolerance for (11), whose objective has the fit beside the penalty


@dataclass(frozen=True, eq=False)
class PathPoint:
    """One solution of a path.

    Attributes
    ----------
    program : ConstrainedProgram or RegularisedProgram
        What was solved, with its epsilon or fit weight.
    result : SolveResult
        Its solution and certificate.
    zeros : int
        Exact zeros among the penalised weights.
    residual : float
        |(XU - y)_Omega|_F of the weights.
    relative_residual : float
        The same over |y_Omega|_F; 0 when both are 0.
    """

    program: Program
    result: SolveResult
    zeros: int
    residual: float
    relative_residual: float

    @property
    def sparsity(self) -> float:
        """Zeros over penalised weights."""
        return self.zeros / (len(self.program.penalised) * self.program.shape[2])


def solve_path(
    program: Program, values: Sequence[float], *, tolerance: float = 1e-4, **options: Any
) -> list[PathPoint]:
    """Solve a program at several radii or fit weights, each from the last.

    Parameters
    ----------
    program : ConstrainedProgram or RegularisedProgram
        Its own epsilon or fit weight is not used.
    values : sequence of float
        Epsilons (constrained) or fit weights (regularised), in the order to solve in.
    tolerance : float
        On gap and violation.
    options
        Further arguments of `solve_newton`.

    Returns
    -------
    list of PathPoint

    Raises
    ------
    ValueError
        If `values` is empty, or one of them is no radius or no fit weight.
    """
    if not len(values):
        raise ValueError("values: want at least one epsilon or fit weight, got none")
    factor = prepare(program.inputs)
    points: list[PathPoint] = []
    for value in values:
        here = _at(program, float(value))
        warm = points[-1].result if points else None
        result = solve_newton(here, tolerance=tolerance, warm_start=warm, factor=factor, **options)
        points.append(_point(here, result))
    return points


def solve_count(
    program: ConstrainedProgram, zeros: int, *, tolerance: float = 1e-4, **options: Any
) -> PathPoint:
    """Find the radius at which a layer's solution has a wanted number of zeros.

    Parameters
    ----------
    program : ConstrainedProgram
        Its epsilon is where the search begins.
    zeros : int
        Zeros wanted among the penalised weights.
    tolerance : float
        On gap and violation.
    options
        Further arguments of `solve_newton`.

    Returns
    -------
    PathPoint
        The certified solution of (4) at the epsilon found. ``zeros`` is the count it has: the
        nearest the search met, which is the wanted one unless the path has none.

    Raises
    ------
    ValueError
        If `zeros` is not between 0 and the number of penalised weights, or the program has
        nothing to fit.
    """
    total = len(program.penalised) * program.shape[2]
    if not 0 <= zeros <= total:
        raise ValueError(f"zeros: want a count from 0 to {total}, got {zeros!r}")
    factor = prepare(program.inputs)
    size = _norm(program, program.level)
    if size == 0:
        raise ValueError("program: nothing to fit, so every radius has the same solution")
    first = weight = _first_weight(program, size)
    best: PathPoint | None = None
    dense: float | None = None  # the smallest fit weight with too few zeros
    sparse: float | None = None  # the largest with too many
    for _ in range(_SEARCH_STEPS):
        here = _regularised(program, weight)
        warm = None if best is None else best.result
        result = solve_newton(
            here, tolerance=_FINER * tolerance, warm_start=warm, factor=factor, **options
        )
        point = _point(here, result)
        if best is None or abs(point.zeros - zeros) < abs(best.zeros - zeros):
            best = point
        if point.zeros == zeros:
            break
        if point.zeros < zeros:
            dense = weight if dense is None else min(dense, weight)
        else:
            sparse = weight if sparse is None else max(sparse, weight)
        if dense is None:
            weight *= _FIRST_FACTOR
        elif sparse is None:
            weight /= _FIRST_FACTOR
        else:
            if dense / sparse - 1 < _NEAREST:
                break
            weight = math.sqrt(dense * sparse)
        if not first / _WIDEST < weight < first * _WIDEST:
            break
    assert best is not None
    final = replace(program, epsilon=best.residual)
    certificate = final.certificate(best.result.weight, best.result.multiplier)
    certified = certificate.within(tolerance, options.get("violation_tolerance", tolerance))
    finite = bool(np.isfinite(certificate.objective))
    exhausted = best.result.status is Status.ITERATION_LIMIT
    result = replace(
        best.result,
        status=judge(certified, finite=finite, exhausted=exhausted),
        certificate=certificate,
        certified=certified,
    )
    return replace(best, program=final, result=result)


def _at(program: Program, value: float) -> Program:
    """The program at another epsilon or fit weight; its own checks name a wrong one."""
    if isinstance(program, ConstrainedProgram):
        return replace(program, epsilon=value)
    return replace(program, fit_weight=value)


def _regularised(program: ConstrainedProgram, fit_weight: float) -> RegularisedProgram:
    """The program's data in the form (11)."""
    data = {entry.name: getattr(program, entry.name) for entry in fields(LayerProgram)}
    return RegularisedProgram(**data, fit_weight=fit_weight)


def _first_weight(program: ConstrainedProgram, size: float) -> float:
    """|W|_1 / epsilon^2, which weighs penalty and fit alike; without old weights by scale alone."""
    xp = array_namespace(program.inputs)
    epsilon = program.epsilon if program.epsilon > 0 else _SMALL_RADIUS * size
    penalty = float(xp.sum(program._old_penalty()))
    if penalty == 0:
        inputs = float(xp.sqrt(xp.sum(xp.astype(program.inputs, xp.float64) ** 2)))
        penalty = size * math.sqrt(len(program.penalised) * program.shape[2]) / (inputs or 1.0)
    return penalty / epsilon**2


def _point(program: Program, result: SolveResult) -> PathPoint:
    """Count the zeros and measure the residual of a solution."""
    weight = to_numpy(result.weight)[program.penalised]
    response = program._forward(result.weight)
    xp = array_namespace(program.inputs)
    residual = _norm(program, response - xp.astype(program.level, xp.float64))
    size = _norm(program, program.level)
    return PathPoint(
        program,
        result,
        int((weight == 0).sum()),
        residual,
        residual / size if size > 0 else 0.0,
    )


def _norm(program: Program, values: Array) -> float:
    """Norm of `values` over Omega, in float64."""
    xp = array_namespace(program.inputs)
    wide = xp.astype(values, xp.float64)
    return float(xp.linalg.vector_norm(xp.where(program.active, wide, 0 * wide)))
