"""Whole inputs: OBS for groups that are rows of the weight.

All units lose the same inputs, so they share the support S and G = (H_SS)^-1. Removing input p
raises the layer's loss by

    sum over units of w_pu^2 / G_pp  =  ||w_p||^2 / G_pp ,

and weights and inverse are updated as in greedy.py, for all units at once.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from solvers.obs.greedy import PATH_DAMPING
from solvers.obs.hessian import decoupled, inverse_cholesky
from solvers.obs.pattern import Pattern, require
from solvers.obs.problem import LayerProblem, Pruned, finish, in_numpy
from solvers.obs.refit import REFIT_DAMPING, refit_weight


@dataclass(frozen=True)
class InputPath:
    """The order in which whole inputs go.

    Attributes
    ----------
    order : ndarray of int64, shape (n_prunable,)
        Rows, the first to go first.
    loss : ndarray of float64, shape (n_prunable + 1,)
        Damped layer error after k removals.
    damping : float
        Fraction of the mean diagonal.
    """

    order: np.ndarray
    loss: np.ndarray
    damping: float


def input_path(problem: LayerProblem, *, damping: float = PATH_DAMPING) -> InputPath:
    """Remove inputs one by one, the cheapest first, to the end.

    Parameters
    ----------
    problem : LayerProblem
        The layer. Rows that its mask forbids altogether go first.
    damping : float, optional
        Fraction of the mean diagonal.

    Returns
    -------
    InputPath

    Raises
    ------
    ValueError
        If the mask forbids a part of a row (the units would not share a support), or the Hessian is
        singular to working precision.

    Notes
    -----
    n_in^2 (n_in + n_out) multiplications, with no compaction.
    """
    arrays = in_numpy(problem)
    forbidden = _forbidden_rows(arrays)
    inverse = inverse_cholesky(decoupled(arrays.hessian, damping))
    weight = np.where((np.diagonal(arrays.hessian) == 0)[:, None], 0.0, arrays.weight)
    candidates = arrays.prunable.copy()
    order, loss = [], [0.0]
    for _ in range(int(candidates.sum())):
        diagonal = np.diagonal(inverse)
        if not np.all(diagonal[candidates] > 0):
            raise ValueError("damping: the inverse lost its digits on the way; raise the damping")
        now = candidates & forbidden if np.any(candidates & forbidden) else candidates
        cost = np.full(len(now), np.inf)
        cost[now] = np.sum(weight[now] ** 2, axis=1) / diagonal[now]
        p = int(np.argmin(cost))
        scaled = inverse[p] / inverse[p, p]
        weight = weight - np.outer(scaled, weight[p])
        inverse = inverse - np.outer(scaled, inverse[p])
        candidates[p] = False
        order.append(p)
        loss.append(loss[-1] + float(cost[p]))
    return InputPath(np.array(order, dtype=np.int64), np.array(loss), damping)


def prune_inputs(
    problem: LayerProblem,
    pattern: Pattern,
    *,
    damping: float = PATH_DAMPING,
    refit_damping: float = REFIT_DAMPING,
    threads: int = 1,
) -> Pruned:
    """Prune whole inputs along the exact greedy path, then refit.

    Parameters
    ----------
    problem : LayerProblem
        The layer.
    pattern : Pattern
        ``inputs``.
    damping, refit_damping : float, optional
        Fractions of the mean diagonal: for the path, for the final weights.
    threads : int, optional
        Threads over the units, for the refit.

    Returns
    -------
    Pruned

    Raises
    ------
    ValueError
        If the pattern is another, the mask forbids parts of rows, or the Hessian is singular.
    """
    require(pattern, ("inputs",), "prune_inputs")
    path = input_path(problem, damping=damping)
    arrays = in_numpy(problem)
    removed = max(pattern.removed(len(path.order)), int(_forbidden_rows(arrays).sum()))
    kept = np.ones(arrays.weight.shape, dtype=bool)
    kept[path.order[:removed]] = False
    weight = refit_weight(arrays, kept, refit_damping, threads)
    return finish(problem, weight, kept, method="inputs", damping=damping)


def _forbidden_rows(problem: LayerProblem) -> np.ndarray:
    """Mark the rows the mask forbids, (n_in,) bool."""
    some = np.any(~problem.allowed, axis=1)
    if np.any(some & np.any(problem.allowed, axis=1)):
        raise ValueError("allowed: forbids a part of an input; whole inputs need whole rows")
    return some
