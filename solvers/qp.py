"""The paper's quadratic program (14), one unit at a time, by OSQP.

For a unit with fitted samples Omega (regularised form (11)), the paper doubles the variables,
u = u+ - u-, and arrives at

    minimise    x^T Q x + (1 + 2 q)^T x          x = [u+; u-]
    subject to  P x <= c,   x >= 0

    Q = lambda [1 -1; -1 1] (x) X_Omega^T X_Omega,   q = lambda [-X_Omega^T y; X_Omega^T y],
    P = [X_off  -X_off],   c = v_off.

This is the paper's own solver, kept as the yardstick for ours and as an independent check. Two
things are added to it: a free row (bias) has cost 0 instead of 1 on both halves, which (14) allows
as it stands, and an entry held at zero is left out.
"""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import scipy.sparse as sp

from solvers.arrays import like, to_numpy
from solvers.penalties import ElasticNet
from solvers.program import Program, RegularisedProgram
from solvers.result import SolveResult, judge

Array = Any


def solve_osqp(
    program: Program,
    *,
    tolerance: float = 1e-4,
    violation_tolerance: float | None = None,
    max_iterations: int = 20_000,
    options: dict[str, Any] | None = None,
) -> SolveResult:
    """Solve the regularised program by the paper's QP (14), unit by unit, with OSQP.

    Parameters
    ----------
    program : RegularisedProgram
        With the l1 penalty or the elastic net.
    tolerance, violation_tolerance : float
        What the certificate must meet for the status to be solved, and OSQP's own eps_abs and
        eps_rel unless `options` says otherwise.
    max_iterations : int
        OSQP's, for each unit.
    options : dict, optional
        Further OSQP settings.

    Returns
    -------
    SolveResult
        OSQP's weights are not exactly sparse: entries it leaves at rounding level stay as they are,
        and the certificate is of what is returned.

    Raises
    ------
    ValueError
        For the constrained form, whose ball is not a quadratic program.

    Notes
    -----
    Each unit is a quadratic program of its own with 2 n_in + n_samples variables and constraints.

    References
    ----------
    Aghasi et al., Net-Trim (2017), equations (12)-(14). Stellato et al., OSQP (2020).

    Examples
    --------
    >>> import numpy as np
    >>> from solvers import solve_osqp, trim_program
    >>> rng = np.random.default_rng(0)
    >>> X, W = rng.standard_normal((50, 10)), rng.standard_normal((10, 3))
    >>> Y = np.maximum(X @ W, 0)
    >>> program = trim_program(X, Y, fit_weight=1.0, old_weight=W)
    >>> solve_osqp(program).status.value
    'solved'
    """
    import osqp

    if not isinstance(program, RegularisedProgram):
        raise ValueError(
            "program: the paper's QP (14) is the regularised form; this is the constrained one, "
            "whose ball is not a quadratic program (use solve_admm or solve_cvxpy)"
        )
    violation_tolerance = tolerance if violation_tolerance is None else violation_tolerance
    settings = {
        "eps_abs": tolerance,
        "eps_rel": tolerance,
        "max_iter": max_iterations,
        "polishing": True,
        "verbose": False,
        **(options or {}),
    }
    inputs = to_numpy(program.inputs).astype(np.float64)
    level = to_numpy(program.level).astype(np.float64)
    active = to_numpy(program.active)
    n_samples, n_in, n_out = program.shape
    support = np.ones((n_in, n_out), bool) if program.support is None else to_numpy(program.support)
    weight = np.zeros((n_in, n_out))
    nu = np.zeros((n_samples, n_out))
    iterations, setup, solve = 0, 0.0, 0.0
    exhausted, finite = False, True
    for unit in range(n_out):
        started = time.perf_counter()
        kept = np.flatnonzero(support[:, unit])
        fitted = active[:, unit]
        if not len(kept):
            nu[fitted, unit] = -2 * program.fit_weight * level[fitted, unit]
            continue
        quadratic, linear, matrix, upper = program_14(
            program, inputs[:, kept], level[:, unit], fitted, kept
        )
        lower = np.concatenate([np.full((~fitted).sum(), -np.inf), np.zeros(2 * len(kept))])
        solver = osqp.OSQP()
        solver.setup(quadratic, linear, matrix, lower, upper, **settings)
        setup += time.perf_counter() - started
        started = time.perf_counter()
        answer = solver.solve(raise_error=False)
        solve += time.perf_counter() - started
        iterations = max(iterations, int(answer.info.iter))
        exhausted |= answer.info.status_val == osqp.SolverStatus.OSQP_MAX_ITER_REACHED
        if answer.x is None or not np.all(np.isfinite(answer.x)):
            finite = False
            weight[kept, unit] = np.nan
            continue
        weight[kept, unit] = answer.x[: len(kept)] - answer.x[len(kept) :]
        residual = inputs[fitted] @ weight[:, unit] - level[fitted, unit]
        nu[fitted, unit] = 2 * program.fit_weight * residual
        nu[~fitted, unit] = np.maximum(answer.y[: (~fitted).sum()], 0)
    dtype = to_numpy(program.level[:1, :1]).dtype
    new_weight = like(weight.astype(dtype), program.inputs)
    multiplier = like(nu, program.inputs)
    certificate = program.certificate(new_weight, multiplier)
    certified = certificate.within(tolerance, violation_tolerance)
    return SolveResult(
        weight=new_weight,
        multiplier=multiplier,
        status=judge(certified, finite=finite, exhausted=exhausted),
        certificate=certificate,
        certified=certified,
        iterations=iterations,
        solver="osqp",
        setup_seconds=setup,
        solve_seconds=solve,
    )


def program_14(
    program: RegularisedProgram,
    inputs: np.ndarray,
    level: np.ndarray,
    fitted: np.ndarray,
    kept: np.ndarray,
) -> tuple[sp.csc_matrix, np.ndarray, sp.csc_matrix, np.ndarray]:
    """(P, q, A, u) of OSQP's ``min x^T P x / 2 + q^T x, l <= A x <= u`` for one unit of (14).

    Parameters
    ----------
    program : RegularisedProgram
        The layer's program.
    inputs : ndarray, shape (n_samples, kept)
        Inputs of the weights that are not held at zero.
    level : ndarray, shape (n_samples,)
        Targets on Omega and ceilings off it.
    fitted : bool array, shape (n_samples,)
        Omega.
    kept : int array
        Numbers of these inputs.

    Returns
    -------
    tuple
        P, q, A and u.
    """
    # notation: eq. (13), (14)
    penalised = np.isin(kept, program.free_rows, invert=True)
    Q_m = program.fit_weight * inputs[fitted].T @ inputs[fitted]
    q_m = -program.fit_weight * inputs[fitted].T @ level[fitted]
    if isinstance(program.penalty, ElasticNet):
        Q_m = Q_m + np.diag(program.penalty.ridge / 2 * penalised)
    Q = np.block([[Q_m, -Q_m], [-Q_m, Q_m]])
    one = np.concatenate([penalised, penalised]).astype(np.float64)
    P_m = inputs[~fitted]
    matrix = sp.vstack([sp.csc_matrix(np.hstack([P_m, -P_m])), sp.eye(2 * len(kept))], format="csc")
    upper = np.concatenate([level[~fitted], np.full(2 * len(kept), np.inf)])
    return sp.csc_matrix(np.triu(2 * Q)), one + 2 * np.concatenate([q_m, -q_m]), matrix, upper
