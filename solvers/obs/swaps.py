"""Local search: exchange a kept weight for a removed one while the exact loss falls.

For a unit with support S and removed weights N, the symmetric tableau

    T_SS = -(H_SS)^-1,   T_SN = H_SS^-1 H_SN = U,   T_NN = H_NN - H_NS U = C,
    t_S  = the optimal weights on S,   t_N = the gradient there,

knows what every move does to the loss, and one principal pivot carries it to the next support:

    remove p:            + t_p^2 / G_pp                                       (G = -T_SS)
    add q:               - t_q^2 / C_qq
    remove p and add q:  (C_qq t_p^2 - 2 U_pq t_p t_q - G_pp t_q^2) / (G_pp C_qq + U_pq^2) .

The last is the 2 x 2 principal pivot. Only the rows of S are stored, |S| x n_in; the row of C that
an addition needs is made when it is needed. Of all pairs of a unit the best is taken each time.
Under one budget for the layer, a weight of one unit is then exchanged for one of another while that
pays, units being independent given their supports, and the units touched are searched again.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import scipy.linalg.lapack
from numba import njit

from solvers.obs.hessian import cholesky, decoupled
from solvers.obs.pattern import Pattern, kept_by, require
from solvers.obs.problem import LayerProblem, Pruned, finish, in_numpy
from solvers.obs.refit import REFIT_DAMPING, check_support, refit_weight
from solvers.units import map_units

Array = Any

SEARCH_DAMPING = 1e-6
"""Fraction of the mean diagonal: pivots must survive many updates in float64."""

RELATIVE_GAIN = 1e-9
"""A move counts when it lowers the loss by more than this fraction of it (rounding stays below)."""


class Unit(NamedTuple):
    """What a search leaves of a unit: its support, and the best single moves from there."""

    kept: np.ndarray
    loss: float
    swaps: int
    leaver: int
    cost: float
    enterer: int
    gain: float


class Room(NamedTuple):
    """Where a unit's weights may move: which may at all, and where a row's partners lie."""

    movable: np.ndarray
    starts: np.ndarray
    stops: np.ndarray


class Tableau(NamedTuple):
    """A unit's tableau in the module's notation; all but `hessian` is updated in place.

    `rows` holds the rows of T that belong to the support, `diagonal` the diagonal of T. `support`
    has the weight of each row, `kept` the same set as flags.
    """

    hessian: np.ndarray
    rows: np.ndarray
    t: np.ndarray
    diagonal: np.ndarray
    support: np.ndarray
    kept: np.ndarray


def improve(
    problem: LayerProblem,
    kept: Array,
    pattern: Pattern,
    *,
    damping: float = SEARCH_DAMPING,
    refit_damping: float = REFIT_DAMPING,
    max_swaps: int = 1000,
    max_rounds: int = 100,
    kicks: int = 0,
    kick_size: int = 3,
    seed: int = 0,
    threads: int = 1,
    method: str = "swaps",
) -> Pruned:
    """Improve a support by swaps within the units and, for a layer's budget, across them.

    Parameters
    ----------
    problem : LayerProblem
        The layer.
    kept : bool array, shape (n_in, n_out)
        A support that fits the pattern: ours, or any mask.
    pattern : Pattern
        ``layer``, ``unit`` or ``n:m``; its count is checked. Swaps keep to a unit, and to a group.
    damping, refit_damping : float, optional
        Fractions of the mean diagonal: for the search, for the final weights.
    max_swaps : int, optional
        Swaps a unit at most, each time it is searched.
    max_rounds : int, optional
        Rounds of exchange across units at most; 0 for none.
    kicks : int, optional
        Each time a unit is searched, how often its best support is perturbed by `kick_size` random
        swaps and searched again, the better one kept.
    kick_size : int, optional
        Random swaps in a kick.
    seed : int, optional
        Of the kicks; the result does not depend on the number of threads.
    threads : int, optional
        Threads over the units.
    method : str, optional
        What the result says made it.

    Returns
    -------
    Pruned
        Refitted on the final support. ``note`` is empty at a local optimum, or says which
        limit came first. ``history``: the layer's loss after each round, and the numbers of swaps
        and exchanges.

    Raises
    ------
    ValueError
        If the pattern is not supported, the support malformed or of another count than the
        pattern's, or H on a support singular to working precision.

    Notes
    -----
    A unit costs |S|^2 n_in to set up and a few |S| n_in a swap; |S| n_in numbers a thread.
    """
    require(pattern, ("layer", "unit", "n:m"), "improve")
    support = check_support(problem, kept)
    arrays = in_numpy(problem)
    check_pattern(arrays, support, pattern)
    hessian = decoupled(arrays.hessian, damping)
    weight = np.where((np.diagonal(arrays.hessian) == 0)[:, None], 0.0, arrays.weight)
    starts, stops = _group_bounds(pattern, arrays.prunable)

    def search(unit: int) -> Unit:
        old = weight[:, unit]
        room = Room(arrays.prunable & arrays.allowed[:, unit], starts, stops)
        noise = 1e-15 * float(old @ hessian @ old)
        best = _search(hessian, old, support[:, unit], room, max_swaps, noise)
        random = np.random.default_rng([seed, unit])
        for _ in range(kicks):
            start = _kicked(best.kept, room, kick_size, random)
            trial = _search(hessian, old, start, room, max_swaps, noise)
            if trial.loss < best.loss:
                best = trial
        return best

    units: list[Unit] = map_units(search, range(support.shape[1]), threads)
    across = pattern.kind == "layer" and max_rounds > 0
    swaps, exchanges, stuck = sum(u.swaps for u in units), 0, False
    losses = [sum(u.loss for u in units)]
    for round_ in range(max_rounds + 1):
        for index, unit in enumerate(units):
            support[:, index] = unit.kept
        pairs = _exchanges(units, losses[-1]) if across else []
        stuck = bool(pairs) and round_ == max_rounds
        if not pairs or stuck:
            break
        for loser, winner in pairs:
            support[units[loser].leaver, loser] = False
            support[units[winner].enterer, winner] = True
        touched = sorted(unit for pair in pairs for unit in pair)
        for index, unit in zip(touched, map_units(search, touched, threads), strict=True):
            units[index] = unit
            swaps += unit.swaps
        exchanges += len(pairs)
        losses.append(sum(u.loss for u in units))

    if stuck:
        note = "exchanges left; raise max_rounds"
    elif any(u.swaps >= max_swaps for u in units):
        note = "swaps left; raise max_swaps"
    else:
        note = ""
    return finish(
        problem,
        refit_weight(arrays, support, refit_damping, threads),
        support,
        method=method,
        damping=damping,
        note=note,
        history={"loss": losses, "swaps": [swaps], "exchanges": [exchanges]},
    )


def check_pattern(problem: LayerProblem, kept: np.ndarray, pattern: Pattern) -> None:
    """Check that a numpy support has the pattern's counts.

    Parameters
    ----------
    problem : LayerProblem
        In numpy.
    kept : bool array, shape (n_in, n_out)
        Support: True where a weight stays.
    pattern : Pattern
        Where zeros are counted, and how many.

    Raises
    ------
    ValueError
        If it has not.
    """
    fitting = kept_by(kept.astype(np.float64), pattern, problem.allowed, problem.prunable)
    wanted, got = int((~fitting).sum()), int((~kept).sum())
    if wanted != got:
        raise ValueError(f"kept: {pattern} removes {wanted} weights here, this support {got}")
    if np.any(fitting != kept):
        raise ValueError(f"kept: the support does not fit the pattern {pattern}")


def _group_bounds(pattern: Pattern, prunable: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return from where to where a row's partners may lie: its group, or everywhere."""
    n = prunable.shape[0]
    starts, stops = np.zeros(n, dtype=np.int64), np.full(n, n)
    if pattern.group is not None:
        rows = np.flatnonzero(prunable)
        for first in range(0, len(rows), pattern.group):
            group = rows[first : first + pattern.group]
            # a free row in between does no harm: it is not movable
            starts[group], stops[group] = group[0], group[-1] + 1
    return starts, stops


def _exchanges(units: list[Unit], loss: float) -> list[tuple[int, int]]:
    """Pair the cheapest removals with the best additions of other units, each unit once."""
    losers = sorted(range(len(units)), key=lambda u: units[u].cost)
    winners = sorted(range(len(units)), key=lambda u: -units[u].gain)
    used: set[int] = set()
    pairs = []
    for loser in losers:
        if loser in used:
            continue
        winner = next((u for u in winners if u not in used and u != loser), None)
        if winner is None:
            break
        gain = units[winner].gain - units[loser].cost
        if not gain > RELATIVE_GAIN * loss:
            break
        used.update((loser, winner))
        pairs.append((loser, winner))
    return pairs


def _kicked(kept: np.ndarray, room: Room, size: int, random: np.random.Generator) -> np.ndarray:
    """Swap `size` random pairs that the pattern lets one swap."""
    kept = kept.copy()
    for _ in range(size):
        leavers = np.flatnonzero(kept & room.movable)
        if leavers.size == 0:
            break
        p = int(random.choice(leavers))
        nearby = np.arange(room.starts[p], room.stops[p])
        enterers = nearby[(~kept & room.movable)[nearby]]
        if enterers.size:
            kept[p] = False
            kept[random.choice(enterers)] = True
    return kept


def _search(
    hessian: np.ndarray,
    old: np.ndarray,
    kept: np.ndarray,
    room: Room,
    max_swaps: int,
    noise: float,
) -> Unit:
    """Set up one unit's tableau and swap to a local optimum."""
    support = np.flatnonzero(kept)
    n, s = hessian.shape[0], support.size
    rows = np.zeros((s, n))
    gone = np.where(kept, 0.0, old)
    line = hessian @ gone
    diagonal = np.diagonal(hessian).copy()
    if s:
        beside = hessian[support]
        factor = cholesky(beside[:, support])
        inverse, _ = scipy.linalg.lapack.dpotri(factor, lower=1)
        inverse = np.tril(inverse) + np.tril(inverse, -1).T
        outside = np.flatnonzero(~kept)
        rows[:, support] = -inverse
        rows[:, outside] = inverse @ beside[:, outside]
        change = inverse @ line[support]
        diagonal[outside] -= np.einsum("ij,ij->j", rows[:, outside], beside[:, outside])
        diagonal[support] = -np.diagonal(inverse)
        line = line - beside.T @ change
        line[support] = old[support] + change
    loss = float(gone @ np.where(kept, 0.0, line))
    kept = kept.copy()
    tableau = Tableau(hessian, rows, line, diagonal, support, kept)
    done, loss = take_swaps(tableau, room, max_swaps, loss, noise)
    if done < 0:
        raise ValueError("damping: a pivot lost its digits in the swaps; raise the damping")
    costs = np.where(kept & room.movable, -(line**2) / diagonal, np.inf)
    gains = np.where(~kept & room.movable, line**2 / diagonal, -np.inf)
    p, q = int(np.argmin(costs)), int(np.argmax(gains))
    return Unit(kept, loss, done, p, float(costs[p]), q, float(gains[q]))


@njit(cache=True, nogil=True, error_model="numpy", fastmath={"nsz", "contract"})
def take_swaps(
    tableau: Tableau, room: Room, max_swaps: int, loss: float, noise: float
) -> tuple[int, float]:  # pragma: no cover
    """Take the best swap until none lowers the loss; the tableau is updated in place.

    Parameters
    ----------
    tableau : Tableau
        The unit's, at its support.
    room : Room
        Where its weights may move.
    max_swaps : int
        Swaps at most.
    loss : float
        The unit's loss at the support.
    noise : float
        A swap must lower the loss by more than this: its rounding.

    Returns
    -------
    done : int
        Swaps taken; -1 where a pivot lost its digits.
    loss : float
        At the support reached.
    """
    H, T, t, diagonal, support, kept = tableau
    movable, starts, stops = room
    s, n = T.shape
    C = np.empty(n)
    tq = np.empty(n)
    row = np.empty(n)
    for done in range(max_swaps):
        # what may not enter gets C = 1, t_q = 0: the formula then never calls it a gain
        for j in range(n):
            enters = movable[j] and not kept[j]
            C[j] = diagonal[j] if enters else 1.0
            tq[j] = t[j] if enters else 0.0
        least = -(RELATIVE_GAIN * loss + noise)
        a_best = -1
        q_best = -1
        for a in range(s):
            p = support[a]
            if not movable[p]:
                continue
            tp = t[p]
            g = -diagonal[p]
            # change < least, without a division: one vectorised pass rejects most rows
            margin = 0.0
            for j in range(starts[p], stops[p]):
                u = T[a, j]
                top = tp * (C[j] * tp - 2.0 * u * tq[j]) - g * tq[j] * tq[j]
                margin = min(margin, top - least * (g * C[j] + u * u))
            if margin < 0.0:
                for j in range(starts[p], stops[p]):
                    u = T[a, j]
                    top = tp * (C[j] * tp - 2.0 * u * tq[j]) - g * tq[j] * tq[j]
                    change = top / (g * C[j] + u * u)
                    if change < least:
                        least = change
                        a_best = a
                        q_best = j
        if a_best < 0:
            return done, loss
        p = support[a_best]
        if not (diagonal[p] < 0.0 and diagonal[q_best] > 0.0):
            return -1, loss
        row[:] = T[a_best]
        loss += _pivot(tableau, row, a_best, p, -1.0)
        kept[p] = False
        # the entering row: C = H_q - U_q^T H_S beside the support, U_q on it; the leaver's own
        # line of T now lies outside the support
        q = q_best
        for j in range(n):
            row[j] = H[q, j]
        for b in range(s):
            if b != a_best:
                u = T[b, q]
                h = H[support[b]]
                for j in range(n):
                    row[j] -= u * h[j]
        for b in range(s):
            if b != a_best:
                row[support[b]] = T[b, q]
        row[q] = diagonal[q]
        if not row[q] > 0.0:
            return -1, loss
        loss += _pivot(tableau, row, a_best, q, 1.0)
        support[a_best] = q
        kept[q] = True
    return max_swaps, loss


@njit(cache=True, nogil=True, error_model="numpy")
def _pivot(
    tableau: Tableau, row: np.ndarray, a: int, k: int, sign: float
) -> float:  # pragma: no cover
    """Pivot on the weight k whose line of the tableau is `row`; return the change of the loss.

    sign +1: k enters, and its line becomes line `a`. sign -1: k, stored in line `a`, leaves.
    """
    T, t, diagonal = tableau.rows, tableau.t, tableau.diagonal
    s, n = T.shape
    d = row[k]
    tk = t[k]
    for b in range(s):
        if b != a:
            old = T[b, k]
            f = old / d
            for j in range(n):
                T[b, j] -= f * row[j]
            T[b, k] = sign * old / d
    f = tk / d
    for j in range(n):
        t[j] -= f * row[j]
        diagonal[j] -= row[j] * row[j] / d
    t[k] = sign * tk / d
    diagonal[k] = -1.0 / d
    if sign > 0.0:
        for j in range(n):
            T[a, j] = row[j] / d
        T[a, k] = -1.0 / d
    return -tk * tk / d
