"""Exact greedy OBS: every unit's whole removal path, and the best budget of each unit.

For a unit with support S, G = (H_SS)^-1 and optimal weights w on S, removing p raises the loss by
exactly w_p^2 / G_pp, and

    w <- w - (w_p / G_pp) G e_p,       G <- G - G e_p e_p^T G / G_pp,

are the optimal weights and the inverse on S without p. The path takes the cheapest p each time.
It is recorded to its end, so one run serves every sparsity. (The paper's L-OBS, in one_shot.py,
takes all its decisions with the first G.)
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numba import njit

from solvers import checks
from solvers.obs.hessian import decoupled, inverse_cholesky
from solvers.obs.pattern import Pattern, layer_count, require, row_groups
from solvers.obs.problem import LayerProblem, Pruned, finish, in_numpy
from solvers.obs.refit import REFIT_DAMPING, refit_weight
from solvers.units import map_units

PATH_DAMPING = 1e-4
"""Fraction of the mean diagonal; the choice of weights gains from more than rounding needs."""


@dataclass(frozen=True)
class RemovalPath:
    """The removal path of every unit.

    Attributes
    ----------
    order : ndarray of int64, shape (n_out, n_prunable)
        Rows in the order they go; -1 behind the end of a path that an N:M pattern stopped.
    loss : ndarray of float64, shape (n_out, n_prunable + 1)
        Damped loss of the unit after k removals, in the units of H w^2; inf behind the end.
    forced : ndarray of int64, shape (n_out,)
        How many of the first removals the problem's mask demands.
    length : ndarray of int64, shape (n_out,)
        Where the path ends.
    damping : float
        Fraction of the mean diagonal it was computed with.
    """

    order: np.ndarray
    loss: np.ndarray
    forced: np.ndarray
    length: np.ndarray
    damping: float


@dataclass(frozen=True)
class Allocation:
    """How many weights each unit loses.

    Attributes
    ----------
    removed : ndarray of int64, shape (n_out,)
        Per unit.
    loss : float
        Sum of the paths' losses there.
    bound : float
        No allocation of the same total on these paths has a smaller loss than this.
    """

    removed: np.ndarray
    loss: float
    bound: float


def removal_path(
    problem: LayerProblem,
    *,
    pattern: Pattern | None = None,
    damping: float = PATH_DAMPING,
    threads: int = 1,
) -> RemovalPath:
    """Compute every unit's removal path.

    Parameters
    ----------
    problem : LayerProblem
        The layer. Weights that its mask forbids go first, in the order of their rows.
    pattern : Pattern, optional
        An N:M pattern restricts each removal to groups that hold more than N, and ends the path
        when none does. Other patterns do not restrict it.
    damping : float, optional
        Fraction of the mean diagonal.
    threads : int, optional
        Threads over the units.

    Returns
    -------
    RemovalPath

    Raises
    ------
    ValueError
        If the damped Hessian is singular to working precision, at the start or on the way.

    Notes
    -----
    n_in^3 / 3 multiplications a unit: rows and columns of G that are gone are compacted away.
    """
    arrays = in_numpy(problem)
    hessian = decoupled(arrays.hessian, damping)
    inverse = inverse_cholesky(hessian)
    weight = np.where((np.diagonal(arrays.hessian) == 0)[:, None], 0.0, arrays.weight)
    grouped = pattern if pattern is not None and pattern.kind == "n:m" else Pattern("unit")
    groups = row_groups(grouped, arrays.prunable)
    keep = grouped.keep or 0

    def run(unit: int) -> tuple[np.ndarray, np.ndarray, int, int]:
        return _path(inverse, weight[:, unit].copy(), groups, ~arrays.allowed[:, unit], keep)

    paths = map_units(run, range(weight.shape[1]), threads)
    if any(length < 0 for *_, length in paths):
        raise ValueError("damping: the inverse lost its digits on the way; raise the damping")
    return RemovalPath(
        np.stack([order for order, *_ in paths]),
        np.stack([loss for _, loss, *_ in paths]),
        np.array([forced for *_, forced, _ in paths], dtype=np.int64),
        np.array([length for *_, length in paths], dtype=np.int64),
        damping,
    )


def allocate(path: RemovalPath, removed: int) -> Allocation:
    """Split a total over the units so that the sum of the paths' losses is least.

        minimise sum_u loss_u(k_u)   over integers forced_u <= k_u <= length_u, sum_u k_u = removed

    A path's losses need not be convex in k (two inputs that cancel are dear one by one and free
    together). So: each unit's lower convex hull; the hulls' segments taken by slope, which is
    optimal whenever the total falls on a corner; and where it falls inside a segment, the rest,
    shorter than that segment, by an exact dynamic program over advances from the last corner.
    The Lagrangian bound, which the hulls give for free, says how far from optimal that can be.

    Parameters
    ----------
    path : RemovalPath
        From `removal_path`.
    removed : int
        Total; raised to what the mask demands where it is less.

    Returns
    -------
    Allocation

    Raises
    ------
    ValueError
        If the paths do not reach that far.
    """
    counts = path.forced.copy()
    if removed > int(path.length.sum()):
        raise ValueError(f"removed: {removed} wanted, the paths end at {int(path.length.sum())}")
    rest = max(0, removed - int(counts.sum()))
    corners = [_hull(path.loss[u], path.forced[u], path.length[u]) for u in range(len(counts))]
    units = np.repeat(np.arange(len(counts)), [len(c) - 1 for c in corners])
    starts = np.concatenate([c[:-1] for c in corners])
    ends = np.concatenate([c[1:] for c in corners])
    slopes = (path.loss[units, ends] - path.loss[units, starts]) / (ends - starts)
    # a unit's slopes rise along its hull; the stable sort keeps equal ones in the hull's order
    by_slope = np.argsort(slopes, kind="stable")
    reached = np.cumsum((ends - starts)[by_slope])
    whole = int(np.searchsorted(reached, rest, side="right"))
    for segment in by_slope[:whole]:
        counts[units[segment]] = ends[segment]
    rest -= int(reached[whole - 1]) if whole else 0
    rows = np.arange(len(counts))
    bound = float(path.loss[rows, counts].sum())
    if rest:
        bound += rest * float(slopes[by_slope[whole]])
        counts = counts + _advance(path, counts, rest)
    return Allocation(counts, float(path.loss[rows, counts].sum()), bound)


def allocate_to_loss(path: RemovalPath, limit: float) -> Allocation:
    """Return the longest allocation whose loss does not exceed a limit.

    The limit is one on the damped layer error (the square of the paper's tolerance): a removal
    that the mask demands is made whatever it costs.

    Parameters
    ----------
    path : RemovalPath
        Order and cost of each unit's removals.
    limit : float
        Largest damped layer error.

    Returns
    -------
    Allocation
        How many removals each unit makes, and their loss.
    """
    low, high = int(path.forced.sum()), int(path.length.sum())
    best = allocate(path, low)
    while low < high:
        middle = (low + high + 1) // 2
        trial = allocate(path, middle)
        if trial.loss <= limit:
            low, best = middle, trial
        else:
            high = middle - 1
    return best


def path_support(problem: LayerProblem, path: RemovalPath, removed: np.ndarray) -> np.ndarray:
    """Return the support (n_in, n_out) after each unit's first ``removed[unit]`` removals.

    Parameters
    ----------
    problem : LayerProblem
        The layer: weights, Hessian, mask, prunable inputs.
    path : RemovalPath
        Order and cost of each unit's removals.
    removed : int array, shape (n_out,)
        Removals of each unit.

    Returns
    -------
    bool ndarray, shape (n_in, n_out)
        True where a weight stays.
    """
    kept = np.ones(tuple(problem.weight.shape), dtype=bool)
    for unit, count in enumerate(removed):
        kept[path.order[unit, :count], unit] = False
    return kept


def pattern_support(problem: LayerProblem, path: RemovalPath, pattern: Pattern) -> np.ndarray:
    """Cut a path to a pattern: a support with exactly the pattern's count removed.

    Parameters
    ----------
    problem : LayerProblem
        The layer: weights, Hessian, mask, prunable inputs.
    path : RemovalPath
        Order and cost of each unit's removals.
    pattern : Pattern
        Where zeros are counted, and how many.

    Returns
    -------
    bool ndarray, shape (n_in, n_out)
        True where a weight stays.

    Raises
    ------
    ValueError
        If the pattern is of whole inputs; or N:M and the path was not run for it.
    """
    require(pattern, ("layer", "unit", "n:m"), "the removal path")
    arrays = in_numpy(problem)
    if pattern.kind == "layer":
        counts = allocate(path, pattern.removed(problem.size)).removed
    elif pattern.kind == "unit":
        counts = np.maximum(path.forced, pattern.removed(int(problem.prunable.sum())))
    else:
        counts = path.length
    if int(counts.sum()) != layer_count(pattern, arrays.allowed, arrays.prunable):
        raise ValueError(f"path: was not run for the pattern {pattern}")
    return path_support(problem, path, counts)


def prune_greedy(
    problem: LayerProblem,
    pattern: Pattern,
    *,
    damping: float = PATH_DAMPING,
    refit_damping: float = REFIT_DAMPING,
    threads: int = 1,
) -> Pruned:
    """Prune a layer along the exact greedy path, then refit.

    For several sparsities of one layer call `removal_path` once and `pattern_support` for each.

    Parameters
    ----------
    problem : LayerProblem
        The layer.
    pattern : Pattern
        ``layer``, ``unit`` or ``n:m``.
    damping, refit_damping : float, optional
        Fractions of the mean diagonal: for the path, for the final weights.
    threads : int, optional
        Threads over the units.

    Returns
    -------
    Pruned

    Raises
    ------
    ValueError
        If the pattern is not supported, or a Hessian is singular to working precision.

    References
    ----------
    Hassibi, Stork (NIPS 1993): OBS. Frantar, Singh, Alistarh (NeurIPS 2022): a layer's rows as
    independent paths, with a global choice from the recorded losses (here by hulls, there by a
    heap of single steps).
    """
    require(pattern, ("layer", "unit", "n:m"), "prune_greedy")
    path = removal_path(problem, pattern=pattern, damping=damping, threads=threads)
    kept = pattern_support(problem, path, pattern)
    weight = refit_weight(in_numpy(problem), kept, refit_damping, threads)
    return finish(problem, weight, kept, method="greedy", damping=damping)


def prune_greedy_to_tolerance(
    problem: LayerProblem,
    tolerance: float,
    *,
    damping: float = PATH_DAMPING,
    refit_damping: float = REFIT_DAMPING,
    threads: int = 1,
) -> Pruned:
    """Remove along the exact paths while sqrt(layer error) does not exceed a tolerance, then refit.

    Parameters
    ----------
    problem : LayerProblem
        The layer.
    tolerance : float
        Bound on sqrt((1/n) ||X (What - W)||_F^2), in the units of the layer's output.
    damping, refit_damping : float, optional
        Fractions of the mean diagonal: for the paths, for the final weights.
    threads : int, optional
        Threads over the units.

    Returns
    -------
    Pruned
        `error` <= tolerance^2: the paths' losses are damped, and the refit can only lower them.
        What the problem's mask forbids is removed whatever it costs.

    Raises
    ------
    ValueError
        If the tolerance is negative or NaN, or a Hessian singular to working precision.
    """
    checks.not_negative(tolerance=tolerance)
    path = removal_path(problem, damping=damping, threads=threads)
    kept = path_support(problem, path, allocate_to_loss(path, tolerance**2).removed)
    weight = refit_weight(in_numpy(problem), kept, refit_damping, threads)
    return finish(problem, weight, kept, method="greedy", damping=damping)


@njit(cache=True, nogil=True, error_model="numpy")
def _path(
    inverse: np.ndarray, w: np.ndarray, groups: np.ndarray, forbidden: np.ndarray, keep: int
) -> tuple[np.ndarray, np.ndarray, int, int]:  # pragma: no cover
    """Remove a unit's weights one by one, the cheapest first; length -1 on lost digits."""
    n = w.shape[0]
    G = inverse.copy()
    index = np.arange(n)
    surplus = np.zeros(n, dtype=np.int64)  # how many more a group may lose
    total = 0
    forced = 0
    for i in range(n):
        if groups[i] >= 0:
            surplus[groups[i]] += 1
            total += 1
            forced += forbidden[i]
    for g in range(n):
        surplus[g] -= keep
    order = np.full(total, -1)
    loss = np.full(total + 1, np.inf)
    loss[0] = 0.0
    row = np.empty(n)
    for t in range(total):
        k = n - t
        p = -1
        best = np.inf
        for i in range(k):
            g = groups[index[i]]
            if g < 0:
                continue
            if t < forced:
                if forbidden[index[i]] and (p < 0 or index[i] < index[p]):
                    p = i
                    best = w[i] * w[i] / G[i, i]
            elif surplus[g] > 0:
                cost = w[i] * w[i] / G[i, i]
                if cost < best or (cost == best and index[i] < index[p]):
                    p = i
                    best = cost
        if p < 0:
            # nothing left to lose is the end of an N:M path; without groups it means NaNs
            return order, loss, forced, t if keep > 0 else -1
        if not G[p, p] > 0.0:
            return order, loss, forced, -1
        loss[t + 1] = loss[t] + best
        order[t] = index[p]
        surplus[groups[index[p]]] -= 1
        row[:k] = G[p, :k]
        d = row[p]
        step = w[p] / d
        for i in range(k):
            f = row[i] / d
            for j in range(k):
                G[i, j] -= f * row[j]
            w[i] -= step * row[i]
        last = k - 1
        if p != last:
            for j in range(k):
                G[p, j] = G[last, j]
            for j in range(k):
                G[j, p] = G[j, last]
            w[p] = w[last]
            index[p] = index[last]
    return order, loss, forced, total


@njit(cache=True, nogil=True, error_model="numpy")
def _hull(loss: np.ndarray, first: int, last: int) -> np.ndarray:  # pragma: no cover
    """Return the corners of the lower convex hull of loss[first..last]."""
    corners = np.empty(last - first + 1, dtype=np.int64)
    corners[0] = first
    size = 1
    for k in range(first + 1, last + 1):
        while size > 1:
            a, b = corners[size - 2], corners[size - 1]
            if (loss[b] - loss[a]) * (k - b) < (loss[k] - loss[b]) * (b - a):
                break
            size -= 1
        corners[size] = k
        size += 1
    return corners[:size]


def _advance(path: RemovalPath, counts: np.ndarray, rest: int) -> np.ndarray:
    """Spend exactly `rest` more removals at least cost: a knapsack over the units."""
    best = np.full(rest + 1, np.inf)
    best[0] = 0.0
    choices = []
    for unit, count in enumerate(counts):
        most = min(rest, int(path.length[unit] - count))
        extra = path.loss[unit, count : count + most + 1] - path.loss[unit, count]
        table = np.full((most + 1, rest + 1), np.inf)
        for more in range(most + 1):
            table[more, more:] = best[: rest + 1 - more] + extra[more]
        choice = np.argmin(table, axis=0)
        choices.append(choice)
        best = table[choice, np.arange(rest + 1)]
    advance = np.zeros_like(counts)
    for unit in range(len(counts) - 1, -1, -1):
        advance[unit] = choices[unit][rest]
        rest -= int(advance[unit])
    return advance
