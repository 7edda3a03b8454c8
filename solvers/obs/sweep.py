"""The fast baseline: one blocked sweep over the inputs, all units at once.

Inputs are visited in order. At input i, with U the upper factor H^-1 = U^T U, removing w_i costs
w_i^2 / U_ii^2 given that the inputs before it are settled, and the inputs after it take up

    w_j <- w_j - (w_i / U_ii) U_ij      for j > i .

Which weights of a block of inputs go is decided when the block is reached. The counts are exact:
what a mask forbids, and of the rest a share that is spread evenly over the blocks. The blocks
where N:M groups end, whatever their size.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
from array_api_compat import array_namespace
from array_api_compat import device as device_of

from solvers import checks
from solvers.arrays import to_numpy
from solvers.obs.hessian import cholesky, dead_inputs, decoupled, inverse_cholesky
from solvers.obs.pattern import Pattern, kept_by, require, row_groups
from solvers.obs.problem import LayerProblem, Pruned, finish

Array = Any

SWEEP_DAMPING = 1e-2
"""Fraction of the mean diagonal added to the Hessian: the value of SparseGPT's code, with which its
results are compared. Twice as much moves the kept weights less."""


def prune_sweep(
    problem: LayerProblem,
    pattern: Pattern,
    *,
    damping: float = SWEEP_DAMPING,
    block: int = 128,
) -> Pruned:
    """Prune a layer in one blocked sweep over its inputs.

    Parameters
    ----------
    problem : LayerProblem
        The layer, numpy or torch; the sweep runs where its arrays are, the factorisation in numpy.
    pattern : Pattern
        ``layer``, ``unit`` or ``n:m``.
    damping : float, optional
        Fraction of the mean diagonal.
    block : int, optional
        Inputs decided together. An N:M pattern decides group by group instead.

    Returns
    -------
    Pruned

    Raises
    ------
    ValueError
        If the pattern is not supported, `block` not positive, or the damped Hessian singular to
        working precision.

    Notes
    -----
    n_in^2 n_out multiplications. A removal never moves an input before its own: `refit` does.

    References
    ----------
    Frantar, Alistarh (ICML 2023), SparseGPT; there a threshold decides, here a count.
    """
    require(pattern, ("layer", "unit", "n:m"), "prune_sweep")
    checks.count(1, block=block)
    xp = array_namespace(problem.weight)
    where = device_of(problem.weight)
    factor = xp.asarray(
        cholesky(inverse_cholesky(to_numpy(decoupled(problem.hessian, damping)))).T.copy(),
        device=where,
    )
    dead = dead_inputs(problem.hessian)[:, None]
    given = xp.astype(problem.weight, xp.float64)
    weight = xp.where(dead, xp.zeros_like(given), given)
    kept = xp.asarray(problem.allowed, copy=True)
    edges = _edges(pattern, problem.prunable, block)
    extra = _extra(pattern, problem, edges)
    for number, (start, stop) in enumerate(pairwise(edges)):
        rows = slice(start, stop)
        part = xp.asarray(weight[rows, :], copy=True)
        pivots = xp.linalg.diagonal(factor)[rows]
        kept[rows, :] = _choose(
            (part / pivots[:, None]) ** 2,
            problem.allowed[rows, :],
            problem.prunable[rows],
            pattern,
            None if extra is None else extra[number],
        )
        errors = xp.zeros_like(part)
        for i in range(stop - start):
            gone = xp.where(kept[start + i, :], xp.zeros_like(part[i, :]), part[i, :])
            errors[i, :] = gone / pivots[i]
            part[i:, :] = part[i:, :] - factor[start + i, start + i : stop][:, None] * errors[i, :]
        weight[rows, :] = part
        weight[stop:, :] = weight[stop:, :] - factor[rows, stop:].T @ errors
    weight = xp.where(dead, given, weight)
    return finish(problem, weight, kept, method="sweep", damping=damping)


def _edges(pattern: Pattern, prunable: np.ndarray, block: int) -> list[int]:
    """Cut the inputs into blocks of a size, or for N:M into its groups."""
    n_in = prunable.shape[0]
    if pattern.kind != "n:m":
        return [*range(0, n_in, block), n_in]
    groups = row_groups(pattern, prunable)
    firsts = np.flatnonzero(prunable)
    starts = firsts[np.flatnonzero(np.diff(groups[firsts])) + 1] if firsts.size else firsts
    return [0, *(int(i) for i in starts), n_in]


def _extra(pattern: Pattern, problem: LayerProblem, edges: list[int]) -> list[np.ndarray] | None:
    """Count what goes of each block beside what is forbidden, for each line; None for N:M.

    A line is the layer, or a unit. With A allowed weights in a line and E to go, the blocks up to
    one that holds a of them have lost round(E a / A): no block loses more than it has, and in the
    end exactly E are gone.
    """
    if pattern.kind == "n:m":
        return None
    allowed = to_numpy(problem.allowed) & problem.prunable[:, None]
    by_row = allowed if pattern.kind == "unit" else allowed.sum(axis=1, keepdims=True)
    reached = np.concatenate([np.zeros((1, by_row.shape[1])), np.cumsum(by_row, axis=0)])[edges]
    size = problem.size if pattern.kind == "layer" else int(problem.prunable.sum())
    total = reached[-1]
    to_go = np.maximum(0, pattern.removed(size) - (size - total))
    gone = np.floor(to_go * reached / np.maximum(total, 1) + 0.5).astype(np.int64)
    return list(np.diff(gone, axis=0))


def _choose(
    score: Array, allowed: Array, prunable: np.ndarray, pattern: Pattern, extra: np.ndarray | None
) -> Array:
    """Return the support of one block."""
    if extra is None:
        return kept_by(score, pattern, allowed, prunable)
    xp = array_namespace(score)
    where = device_of(score)
    free = xp.asarray(~prunable, device=where)[:, None]
    # forbidden weights behind all others, free ones before all
    worth = xp.where(allowed, score, -1.0)
    worth = xp.where(free, float("inf"), worth)
    lines = worth.T if pattern.kind == "unit" else xp.reshape(worth, (1, -1))
    possible = allowed.T if pattern.kind == "unit" else xp.reshape(allowed, (1, -1))
    keep = xp.sum(xp.astype(possible, xp.int64), axis=1) - xp.asarray(extra, device=where)
    order = xp.argsort(lines, axis=1, descending=True, stable=True)
    rank = xp.argsort(order, axis=1, stable=True)
    chosen = rank < keep[:, None]
    return chosen.T if pattern.kind == "unit" else xp.reshape(chosen, tuple(score.shape))
