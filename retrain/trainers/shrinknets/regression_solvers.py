"""Group sparsity and ShrinkNet regressions by proximal methods.

Group sparsity is convex: accelerated proximal gradient descent finds its minimum. ShrinkNet is not.
Its penalty, a concave function of the columns' norms, is replaced by its tangents, weighted group
sparsities, one after the other. That only ever descends, and what it finds depends on where it
starts. These are references that switch layers, trained by any optimiser, can be held against.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from retrain.trainers.shrinknets.regression import (
    Regression,
    equivalent_penalty,
    group_objective,
    shrink_objective,
    split_columns,
)
from solvers import checks

Prox = Callable[[np.ndarray, float], np.ndarray]
"""Takes a matrix and a step size."""

_INNER = 25
"""Gradients on one tangent."""


@dataclass(frozen=True, eq=False)
class Fit:
    """What a solver found.

    Attributes
    ----------
    A : ndarray, shape (n, p)
        The regression's matrix; for ShrinkNet A diag(beta), the switches folded in.
    objective : float
        Loss and penalty.
    gradients : int
        How many gradients of the loss were taken.
    converged : bool
        Whether a step changed less than the tolerance before the gradients ran out.
    beta : ndarray or None, shape (p,)
        The switches; 1 for free columns.
    """

    A: np.ndarray
    objective: float
    gradients: int
    converged: bool
    beta: np.ndarray | None = None


def solve_group(
    problem: Regression,
    strength: float,
    *,
    gradients: int = 10_000,
    tolerance: float = 1e-8,
    start: np.ndarray | None = None,
) -> Fit:
    """Minimise (6) by accelerated proximal gradient descent, restarted when momentum goes uphill.

        minimise_A  l(A) + lambda sum_j |A_j|_2

    Parameters
    ----------
    problem : Regression
        Gives l; free columns are not penalised.
    strength : float
        lambda, at least 0, with sqrt(n) inside it as in (4).
    gradients : int
        At most so many gradients of the loss.
    tolerance : float
        Stop when a step moves A by less than this times max(1, |A|_F).
    start : ndarray, shape (n, p), optional
        Zeros by default.

    Returns
    -------
    Fit
        ``converged`` is False where the gradients ran out first.

    References
    ----------
    The draft's (6); Beck and Teboulle, FISTA (2009); O'Donoghue and Candes,
    adaptive restart (2015).
    """
    checks.not_negative(strength=strength)
    A, count, moved = _descend(
        problem,
        _start(problem, start),
        lambda values, step: _shrink_columns(values, step * strength, problem.penalised),
        gradients,
        tolerance,
    )
    return Fit(A, group_objective(problem, A, strength), count, moved < tolerance)


def solve_shrink(
    problem: Regression,
    strength: float,
    weight_strength: float,
    *,
    power: int = 2,
    gradients: int = 10_000,
    tolerance: float = 1e-8,
    start: np.ndarray | None = None,
) -> Fit:
    """Descend on (7) by majorising its penalty, and minimising that, in turn.

        minimise_A,beta  l(A diag(beta)) + lambda |beta|_1 + lambda_2 |A|_p^p
        = minimise_C     l(C) + sum_j phi(|C_j|_p),       phi by `equivalent_penalty`

    phi is concave, so it lies below its tangent at the present norms c_j: what is minimised next is
    ``l(C) + sum_j phi'(c_j) |C_j|_p``, by accelerated proximal steps. A column that is zero has an
    infinite slope there, and stays zero.

    Parameters
    ----------
    problem : Regression
        Gives l; free columns are not penalised and keep beta_j = 1.
    strength, weight_strength : float
        lambda and lambda_2. Both above 0, or there is no minimum (proposition A.3).
    power : {1, 2}
        p.
    gradients, tolerance
        As for `solve_group`; the tolerance is on C from tangent to tangent.
    start : ndarray, shape (n, p), optional
        C to begin with. By default the minimum with all switches at 1, which for p = 2 is a ridge
        regression, sought with a quarter of the gradients.

    Returns
    -------
    Fit
        A local minimum, or where the gradients ran out. The objective never rises.

    References
    ----------
    The draft's (7) and (8). Majorising a concave penalty by its tangents: Zou and Li (2008);
    reweighted l1, Candes, Wakin and Boyd (2008).
    """
    checks.not_negative(strength=strength, weight_strength=weight_strength)
    if strength == 0 or weight_strength == 0:
        raise ValueError(
            f"strength, weight_strength: got {strength} and {weight_strength}, want more than 0: "
            f"without one of them there is no minimum"
        )
    checks.one_of((1, 2), power=power)
    columns = problem.penalised
    count, moved = 0, math.inf
    C = _start(problem, start)
    if start is None:
        with_all = _prox_weights(weight_strength, power, columns)
        C, count, _ = _descend(problem, C, with_all, gradients // 4, tolerance)

    def value(C: np.ndarray) -> float:
        norms = _norms(C[:, columns], power)
        penalty = equivalent_penalty(norms, strength, weight_strength, power)
        return problem.loss(C) + float(np.sum(penalty))

    best, inner = value(C), _INNER
    while count < gradients and moved >= tolerance:
        slopes = _slopes(_norms(C[:, columns], power), strength, weight_strength, power)
        prox = _prox_tangent(slopes, power, columns)
        new, taken, _ = _descend(problem, C, prox, min(inner, gradients - count), tolerance / 10)
        count += taken
        reached = value(new)
        if reached > best and inner > 1:
            inner = 1  # momentum overshot; a step without it cannot
            continue
        moved, C, best, inner = _moved(C, new), new, reached, _INNER
    A, beta = C.copy(), np.ones(C.shape[1])
    A[:, columns], beta[columns] = split_columns(C[:, columns], strength, weight_strength, power)
    objective = shrink_objective(problem, A, beta, strength, weight_strength, power)
    return Fit(C, objective, count, moved < tolerance, beta)


def _descend(
    problem: Regression,
    A: np.ndarray,
    prox: Prox,
    gradients: int,
    tolerance: float,
) -> tuple[np.ndarray, int, float]:
    """Descend by accelerated proximal steps, restarted when momentum goes uphill.

    Returns A, how many gradients were taken, and how far
    the last step went.
    """
    ahead, momentum, step = A, 1.0, 1 / problem.curvature
    count, moved = 0, math.inf
    while count < gradients and moved >= tolerance:
        count += 1
        new = prox(ahead - step * problem.gradient(ahead), step)
        if np.sum((ahead - new) * (new - A)) > 0:
            momentum = 1.0
        following = (1 + math.sqrt(1 + 4 * momentum**2)) / 2
        ahead = new + (momentum - 1) / following * (new - A)
        moved, A, momentum = _moved(A, new), new, following
    return A, count, moved


def _norms(C: np.ndarray, power: int) -> np.ndarray:
    return np.linalg.norm(C, ord=power, axis=0)


def _slopes(norms: np.ndarray, strength: float, weight_strength: float, power: int) -> np.ndarray:
    """Return phi' at the norms; infinite at 0."""
    safe = np.where(norms > 0, norms, 1.0)
    share = 1 / 2 if power == 1 else 2 / 3  # phi is a multiple of the norm to this power
    slopes = share * equivalent_penalty(safe, strength, weight_strength, power) / safe
    return np.where(norms > 0, slopes, np.inf)


def _prox_tangent(slopes: np.ndarray, power: int, columns: slice) -> Prox:
    """The proximal step of ``sum_j slope_j |C_j|_p``."""

    def prox(values: np.ndarray, step: float) -> np.ndarray:
        if power == 2:
            return _shrink_columns(values, step * slopes, columns)
        shrunk = values.copy()
        shrunk[:, columns] = _shrink(values[:, columns], step * slopes)
        return shrunk

    return prox


def _prox_weights(weight_strength: float, power: int, columns: slice) -> Prox:
    """The proximal step of ``lambda_2 |C|_p^p``."""

    def prox(values: np.ndarray, step: float) -> np.ndarray:
        shrunk = values.copy()
        if power == 2:
            shrunk[:, columns] /= 1 + 2 * step * weight_strength
        else:
            shrunk[:, columns] = _shrink(values[:, columns], step * weight_strength)
        return shrunk

    return prox


def _shrink(values: np.ndarray, amount: np.ndarray | float) -> np.ndarray:
    return np.sign(values) * np.maximum(np.abs(values) - amount, 0.0)


def _shrink_columns(A: np.ndarray, amount: np.ndarray | float, columns: slice) -> np.ndarray:
    """Return A with columns shrunk by `amount`, those no longer than it exactly zero."""
    shrunk = A.copy()
    norms = np.linalg.norm(A[:, columns], axis=0)
    scale = np.maximum(1 - amount / np.where(norms > 0, norms, 1.0), 0.0)
    shrunk[:, columns] *= np.where(norms > 0, scale, 0.0)
    return shrunk


def _start(problem: Regression, start: np.ndarray | None) -> np.ndarray:
    shape = (problem.Y.shape[1], problem.X.shape[1])
    if start is None:
        return np.zeros(shape)
    if start.shape != shape:
        raise ValueError(f"start: got {start.shape}, want shape {shape}")
    return start.astype(float)


def _moved(before: np.ndarray, after: np.ndarray) -> float:
    return float(np.linalg.norm(after - before) / max(1.0, float(np.linalg.norm(after))))
