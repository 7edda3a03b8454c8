"""Paths of solutions: a layer at many radii.

From one radius (or fit weight) to the next the solution moves little, so each solve starts from the
last, and all share one factorisation. The points are the curve of sparsity against discrepancy that
a person chooses epsilon from. `solvers.path.count` looks for one point of it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from array_api_compat import array_namespace

from solvers.admm.solve import prepare
from solvers.arrays import to_numpy
from solvers.newton.layer import solve_newton
from solvers.program import ConstrainedProgram, Program
from solvers.result import SolveResult

Array = Any
Solve = Callable[..., SolveResult]
"""`solve_newton`, `solve_admm`, or what takes the same arguments."""


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
        Exact zeros among the weights counted.
    weights : int
        The weights counted: the penalised ones, unless rows were named.
    residual : float
        |(XU - y)_Omega|_F of the weights.
    relative_residual : float
        The same over |y_Omega|_F; 0 when both are 0.
    """

    program: Program
    result: SolveResult
    zeros: int
    weights: int
    residual: float
    relative_residual: float

    @property
    def sparsity(self) -> float:
        """Zeros over weights counted."""
        return self.zeros / self.weights


def solve_path(
    program: Program,
    values: Sequence[float],
    *,
    tolerance: float = 1e-4,
    solve: Solve = solve_newton,
    **options: Any,
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
    solve : callable
        The solver.
    **options : object
        Further arguments of `solve`.

    Returns
    -------
    list of PathPoint

    Raises
    ------
    ValueError
        If `values` is empty, or one of them is no radius or no fit weight.

    Notes
    -----
    Each solve begins at the last one's result, so a path costs less than its solves one by one.

    Examples
    --------
    >>> import numpy as np
    >>> from solvers import solve_path, trim_program
    >>> rng = np.random.default_rng(0)
    >>> X, W = rng.standard_normal((50, 10)), rng.standard_normal((10, 3))
    >>> Y = np.maximum(X @ W, 0)
    >>> program = trim_program(X, Y, epsilon=1.0, old_weight=W)
    >>> points = solve_path(program, [1.0, 2.0, 4.0])
    >>> zeros = [point.zeros for point in points]
    >>> zeros == sorted(zeros)
    True
    """
    if not len(values):
        raise ValueError("values: got none, want at least one epsilon or fit weight")
    factor = prepare(program.inputs)
    points: list[PathPoint] = []
    for value in values:
        here = _at(program, float(value))
        warm = points[-1].result if points else None
        result = solve(here, tolerance=tolerance, warm_start=warm, factor=factor, **options)
        points.append(point_of(here, result, program.penalised))
    return points


def _at(program: Program, value: float) -> Program:
    """The program at another epsilon or fit weight; its own checks name a wrong one."""
    if isinstance(program, ConstrainedProgram):
        return replace(program, epsilon=value)
    return replace(program, fit_weight=value)


def point_of(program: Program, result: SolveResult, counted: np.ndarray) -> PathPoint:
    """Count the zeros and measure the residual of a solution.

    Parameters
    ----------
    program : ConstrainedProgram or RegularisedProgram
        The layer's program.
    result : SolveResult
        Its solution.
    counted : int array
        Rows whose zeros count.

    Returns
    -------
    PathPoint
        The solution with its zeros and its residual.
    """
    weight = to_numpy(result.weight)[counted]
    response = program.forward(result.weight)
    xp = array_namespace(program.inputs)
    residual = norm_on_omega(program, response - xp.astype(program.level, xp.float64))
    size = norm_on_omega(program, program.level)
    return PathPoint(
        program,
        result,
        int((weight == 0).sum()),
        weight.size,
        residual,
        residual / size if size > 0 else 0.0,
    )


def norm_on_omega(program: Program, values: Array) -> float:
    """Norm of `values` over Omega, in float64.

    Parameters
    ----------
    program : ConstrainedProgram or RegularisedProgram
        The layer's program.
    values : array, shape (n_samples, n_out)
        One number for each response.

    Returns
    -------
    float
        Root of the sum of squares where the program fits.
    """
    xp = array_namespace(program.inputs)
    wide = xp.astype(values, xp.float64)
    return float(xp.linalg.vector_norm(xp.where(program.active, wide, 0 * wide)))
