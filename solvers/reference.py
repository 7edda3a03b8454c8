"""The layer programs stated in cvxpy, as the paper writes them: the oracle of the tests.

Slow and general: both forms, every penalty, any solver cvxpy has installed. The multiplier comes
from the constraints' dual values, and the certificate from the program's own data, so that a
solver that claims more than it has is found out.
"""

from __future__ import annotations

import time
import warnings
from typing import Any

import numpy as np

from solvers import checks
from solvers.arrays import like, to_numpy
from solvers.penalties import L1, ElasticNet, Group
from solvers.program import Program, RegularisedProgram
from solvers.result import SolveResult, judge

Array = Any


def solve_cvxpy(
    program: Program,
    *,
    tolerance: float = 1e-6,
    violation_tolerance: float | None = None,
    solver: str = "CLARABEL",
    options: dict[str, Any] | None = None,
) -> SolveResult:
    """Solve a layer program with any solver that cvxpy has installed.

    Parameters
    ----------
    program : ConstrainedProgram or RegularisedProgram
        Any penalty. Solved in float64 on the CPU.
    tolerance, violation_tolerance : float
        What the certificate must meet for the status to be solved. They are not passed on to the
        solver; `options` is.
    solver : str
        Name of an installed cvxpy solver that takes second-order cones (constrained form) or
        quadratic objectives (regularised form).
    options : dict, optional
        Keyword arguments for ``cvxpy.Problem.solve``.

    Returns
    -------
    SolveResult
        In the dtype, namespace and device of the program. When the solver breaks down or returns no
        point, the weights are NaN and the status is a numerical error.

    Raises
    ------
    ValueError
        If cvxpy has no such solver installed, or it cannot state this program.

    Notes
    -----
    Entries below 1e-9 of the largest weight are the solver's rounding, not set to zero here: an
    interior-point method's weights are not exactly sparse.

    Examples
    --------
    >>> import numpy as np
    >>> from solvers import solve_cvxpy, trim_program
    >>> rng = np.random.default_rng(0)
    >>> X, W = rng.standard_normal((50, 10)), rng.standard_normal((10, 3))
    >>> Y = np.maximum(X @ W, 0)
    >>> program = trim_program(X, Y, fit_weight=1.0, old_weight=W)
    >>> solve_cvxpy(program).status.value
    'solved'
    """
    import cvxpy as cp

    violation_tolerance = tolerance if violation_tolerance is None else violation_tolerance
    checks.one_of(cp.installed_solvers(), solver=solver)
    started = time.perf_counter()
    data = _Data(program)
    weight = cp.Variable((data.inputs.shape[1], data.level.shape[1]))
    response = cp.Variable(data.level.shape)
    link = response == data.inputs @ weight
    constraints = [link]
    if (~data.active).any():
        rows, columns = np.nonzero(~data.active)
        constraints.append(response[rows, columns] <= data.level[rows, columns])
    if data.support is not None and (~data.support).any():
        rows, columns = np.nonzero(~data.support)
        constraints.append(weight[rows, columns] == 0)
    objective = _penalty(program, weight)
    rows, columns = np.nonzero(data.active)
    if len(rows):
        residual = response[rows, columns] - data.level[rows, columns]
        if isinstance(program, RegularisedProgram):
            objective = objective + program.fit_weight * cp.sum_squares(residual)
        elif program.epsilon > 0:
            constraints.append(cp.norm(residual, 2) <= program.epsilon)
        else:
            constraints.append(residual == 0)
    problem = cp.Problem(cp.Minimize(objective), constraints)
    setup = time.perf_counter() - started
    started = time.perf_counter()
    try:
        with warnings.catch_warnings():
            # cvxpy warns of inaccuracy; the certificate measures it.
            warnings.filterwarnings("ignore", message="Solution may be inaccurate")
            problem.solve(solver=solver, **(options or {}))
    except cp.DCPError as error:
        raise ValueError(f"program: cvxpy cannot state it: {error}") from error
    except cp.SolverError as error:
        if "cannot" in str(error).lower() and "solve" in str(error).lower():
            raise ValueError(f"solver: {solver} cannot solve this program: {error}") from error
    solve = time.perf_counter() - started

    failed = weight.value is None or link.dual_value is None
    value = np.full(weight.shape, np.nan) if failed else np.asarray(weight.value)
    # cvxpy's Lagrangian is f + <dual, response - X weight>, ours <nu, X weight - z>: nu = -dual.
    nu = np.zeros(response.shape) if failed else -np.asarray(link.dual_value)
    dtype = to_numpy(program.level[:1, :1]).dtype
    new_weight = like(value.astype(dtype), program.inputs)
    multiplier = like(nu, program.inputs)
    certificate = program.certificate(new_weight, multiplier)
    certified = certificate.within(tolerance, violation_tolerance)
    stats = problem.solver_stats
    return SolveResult(
        weight=new_weight,
        multiplier=multiplier,
        status=judge(certified, finite=not failed, exhausted=problem.status == cp.USER_LIMIT),
        certificate=certificate,
        certified=certified,
        iterations=0 if stats is None or stats.num_iters is None else int(stats.num_iters),
        solver=f"cvxpy/{solver.lower()}",
        setup_seconds=setup,
        solve_seconds=solve,
    )


class _Data:
    """A program's arrays in float64 numpy."""

    def __init__(self, program: Program) -> None:
        self.inputs = to_numpy(program.inputs).astype(np.float64)
        self.level = to_numpy(program.level).astype(np.float64)
        self.active = to_numpy(program.active)
        self.support = None if program.support is None else to_numpy(program.support)


def _penalty(program: Program, weight: Any) -> Any:
    """State the penalty on the rows that have one."""
    import cvxpy as cp

    rows = weight[program.penalised, :]
    penalty = program.penalty
    if isinstance(penalty, L1):
        return cp.sum(cp.abs(rows))
    if isinstance(penalty, ElasticNet):
        return cp.sum(cp.abs(rows)) + penalty.ridge / 2 * cp.sum_squares(rows)
    if isinstance(penalty, Group):
        return penalty.weight * cp.sum(cp.norm(rows, 2, axis=1))
    raise ValueError(f"penalty: no cvxpy form of {penalty!r}")
