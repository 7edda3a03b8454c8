"""Joint refit: the exact least-squares weights on a support that is given.

With S the kept and R the removed weights of a unit, the minimiser of (w - w0)^T H (w - w0) over
w_R = 0 is, from the normal equations of the change,

    w_S = w0_S + H_SS^-1 H_SR w0_R .

Written this way nothing cancels, a unit that loses nothing keeps its weights bit for bit, and the
damping, which pulls towards the old weights, vanishes with the change. The support may come from
anywhere: ours, magnitude, |w| ||x||.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import scipy.linalg
from array_api_compat import array_namespace

from solvers.arrays import to_numpy
from solvers.obs.hessian import cholesky, decoupled
from solvers.obs.problem import LayerProblem, Pruned, finish, in_numpy
from solvers.units import map_units

Array = Any

REFIT_DAMPING = 1e-9
"""Fraction of the mean diagonal: enough for float64, too little to be seen in the error."""


def check_support(problem: LayerProblem, kept: Array) -> np.ndarray:
    """Check a support and copy it to numpy.

    Parameters
    ----------
    problem : LayerProblem
        The layer: weights, Hessian, mask, prunable inputs.
    kept : bool array, shape (n_in, n_out)
        Support: True where a weight stays.

    Returns
    -------
    bool ndarray, shape (n_in, n_out)
        A copy.

    Raises
    ------
    ValueError
        If shape or dtype is wrong, or it keeps what the problem forbids, or removes a free row.
    """
    support = to_numpy(kept)
    if support.shape != tuple(problem.weight.shape) or support.dtype != np.bool_:
        raise ValueError(
            f"kept: got {support.dtype} {support.shape}, want bool {tuple(problem.weight.shape)}"
        )
    if np.any(support & ~to_numpy(problem.allowed)):
        raise ValueError("kept: keeps a weight that the problem does not allow")
    if not np.all(support[~problem.prunable]):
        raise ValueError("kept: removes a weight of a free row")
    return support.copy()


def refit(
    problem: LayerProblem,
    kept: Array,
    *,
    damping: float = REFIT_DAMPING,
    threads: int = 1,
    method: str = "refit",
) -> Pruned:
    """Solve for the weights on a fixed support, by one Cholesky factorisation a unit.

    Parameters
    ----------
    problem : LayerProblem
        The layer.
    kept : bool array, shape (n_in, n_out)
        The support; any mask that contains the free rows and respects `allowed`.
    damping : float, optional
        Fraction of the mean diagonal.
    threads : int, optional
        Threads over the units.
    method : str, optional
        What the result says made it.

    Returns
    -------
    Pruned

    Raises
    ------
    ValueError
        If the support is malformed, or H on a support is singular to working precision.

    Notes
    -----
    sum over units of |S|^3/3 multiplications and one |S| x |S| matrix a thread.
    """
    support = check_support(problem, kept)
    arrays = in_numpy(problem)
    weight = refit_weight(arrays, support, damping, threads)
    return finish(problem, weight, support, method=method, damping=damping)


def refit_weight(
    problem: LayerProblem, kept: np.ndarray, damping: float, threads: int
) -> np.ndarray:
    """Refit a numpy problem; see `refit`.

    Parameters
    ----------
    problem : LayerProblem
        In numpy.
    kept : bool array, shape (n_in, n_out)
        Support: True where a weight stays.
    damping : float
        Fraction of the mean diagonal that is added to the Hessian's diagonal.
    threads : int
        Threads over the units.

    Returns
    -------
    ndarray, shape (n_in, n_out), float64
        Optimal weights on the support, 0 elsewhere.
    """
    hessian = decoupled(problem.hessian, damping)
    removed = np.where(kept, 0.0, problem.weight)
    gradient = hessian @ removed

    def solve(unit: int) -> np.ndarray:
        support = np.flatnonzero(kept[:, unit])
        column = np.where(kept[:, unit], problem.weight[:, unit], 0.0)
        if support.size and np.any(removed[:, unit]):
            factor = cholesky(hessian[np.ix_(support, support)], f"raise the damping (unit {unit})")
            column[support] += scipy.linalg.cho_solve(
                (factor, True), gradient[support, unit], check_finite=False
            )
        return column

    columns = map_units(solve, range(problem.weight.shape[1]), threads)
    return np.stack(columns, axis=1)


def refit_cg(
    problem: LayerProblem,
    kept: Array,
    *,
    damping: float = REFIT_DAMPING,
    tolerance: float = 1e-8,
    max_iterations: int = 500,
) -> Pruned:
    """Solve for the weights on a fixed support, all units at once, by preconditioned CG.

    The same program as `refit`, for layers where a factorisation a unit costs too much. Works
    where the problem's arrays are (numpy, torch, any device that has float64).

    Parameters
    ----------
    problem : LayerProblem
        The layer.
    kept : bool array, shape (n_in, n_out)
        The support.
    damping : float, optional
        Fraction of the mean diagonal.
    tolerance : float, optional
        Stop when every unit's residual is below this fraction of its right-hand side.
    max_iterations : int, optional
        Products with H at most.

    Returns
    -------
    Pruned
        `note` is empty, or names the number of units that miss the tolerance after
        `max_iterations`; every iterate is feasible, and better than the mask alone. `history`
        holds the largest relative residual of each iteration.

    Raises
    ------
    ValueError
        If the support is malformed.

    Notes
    -----
    Jacobi preconditioner; one (n_in, n_in) x (n_in, n_out) product an iteration. A unit that has
    arrived takes steps of length zero.
    """
    check_support(problem, kept)
    xp = array_namespace(problem.weight)
    hessian = decoupled(problem.hessian, damping)
    support = xp.astype(kept, xp.float64)
    old = xp.astype(problem.weight, xp.float64)
    scale = support / xp.linalg.diagonal(hessian)[:, None]

    residual = support * (hessian @ (old * (1.0 - support)))
    target = xp.sqrt(xp.sum(residual * residual, axis=0))
    change = xp.zeros_like(old)
    direction = scale * residual
    product = xp.sum(residual * direction, axis=0)
    worst: list[float] = []
    missing = 0
    for _ in range(max_iterations + 1):
        size = xp.sqrt(xp.sum(residual * residual, axis=0))
        open_units = size > tolerance * target
        missing = int(xp.sum(xp.astype(open_units, xp.int64)))
        worst.append(float(xp.max(size / xp.where(target > 0, target, 1.0))))
        if missing == 0 or len(worst) > max_iterations:
            break
        image = support * (hessian @ direction)
        curvature = xp.sum(direction * image, axis=0)
        # an arrived unit has curvature 0 or a step that no longer matters: it stays where it is
        going = open_units & (curvature > 0)
        step = xp.where(going, product / xp.where(going, curvature, 1.0), 0.0)
        change = change + step * direction
        residual = residual - step * image
        following = xp.sum(scale * residual * residual, axis=0)
        ratio = xp.where(going, following / xp.where(product > 0, product, 1.0), 0.0)
        direction = scale * residual + ratio * direction
        product = following
    note = "" if missing == 0 else f"{missing} units miss the tolerance; raise max_iterations"
    return finish(
        problem,
        old * support + change,
        kept,
        method="refit_cg",
        damping=damping,
        note=note,
        history={"residual": worst},
    )
