"""The paper's L-OBS: sensitivities of a whole layer from one inverse, sorted, and its updates.

    L_q = 1/2 w_q^2 / [H^-1]_qq                          sensitivity of weight q of a unit
    dw  = -(w_q / [H^-1]_qq) H^-1 e_q                    what its removal does to the unit

H^-1 is the same for all units and is never downdated. Removals are made in the order of the L_q of
the whole layer; each update starts from the unit's weights as they are by then, moves weights that
are gone already, too, and those are masked at the end. `greedy.py` is the exact method.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numba import njit

from solvers import checks
from solvers.obs.hessian import decoupled, inverse_cholesky
from solvers.obs.pattern import Pattern, kept_by, layer_count, per_layer_count
from solvers.obs.problem import LayerProblem, Pruned, finish, in_numpy, layer_error

ONE_SHOT_DAMPING = 1e-4
"""Fraction of the mean diagonal added to the Hessian before it is inverted. Twice as much makes
saliencies less exact and the inverse better conditioned. Chosen by hand; the L-OBS paper adds a
constant."""


@dataclass(frozen=True)
class Sensitivities:
    """What the paper knows of a layer before it removes anything.

    Attributes
    ----------
    saliency : ndarray of float64, shape (n_in, n_out)
        L_q; half the loss of removing q alone. 0 for dead inputs, inf for free rows.
    inverse : ndarray of float64, shape (n_in, n_in)
        The inverse of the damped Hessian, dead inputs cut out.
    damping : float
        Fraction of the mean diagonal.
    """

    saliency: np.ndarray
    inverse: np.ndarray
    damping: float


def sensitivities(
    problem: LayerProblem, *, damping: float = ONE_SHOT_DAMPING, inverse: np.ndarray | None = None
) -> Sensitivities:
    """Compute L_q = 1/2 w_q^2 / [H^-1]_qq for every weight of a layer.

    Parameters
    ----------
    problem : LayerProblem
        The layer.
    damping : float, optional
        Fraction of the mean diagonal.
    inverse : ndarray, optional
        An inverse computed elsewhere, by the paper's recursion for one; by Cholesky by default.

    Returns
    -------
    Sensitivities

    Raises
    ------
    ValueError
        If the damped Hessian is singular to working precision, or the inverse is not one.
    """
    arrays = in_numpy(problem)
    if inverse is None:
        inverse = inverse_cholesky(decoupled(arrays.hessian, damping))
    if inverse.shape != arrays.hessian.shape or not np.all(np.diagonal(inverse) > 0):
        raise ValueError(f"inverse: want a positive definite {arrays.hessian.shape} matrix")
    saliency = 0.5 * arrays.weight**2 / np.diagonal(inverse)[:, None]
    saliency[np.diagonal(arrays.hessian) == 0] = 0.0
    saliency[~arrays.prunable] = np.inf
    return Sensitivities(saliency, inverse, damping)


def prune_one_shot(
    problem: LayerProblem,
    pattern: Pattern,
    *,
    damping: float = ONE_SHOT_DAMPING,
    given: Sensitivities | None = None,
) -> Pruned:
    """Prune a layer to a pattern by the paper's L-OBS.

    Parameters
    ----------
    problem : LayerProblem
        The layer.
    pattern : Pattern
        Any. The paper's is ``layer``; the others take the smallest L_q that they let one take.
    damping : float, optional
        Fraction of the mean diagonal.
    given : Sensitivities, optional
        From `sensitivities`, to be shared between calls.

    Returns
    -------
    Pruned

    Raises
    ------
    ValueError
        If the damped Hessian is singular to working precision.

    References
    ----------
    Dong, Chen, Pan (NIPS 2017), algorithm 1.
    """
    known = sensitivities(problem, damping=damping) if given is None else given
    weight, kept = _removed(in_numpy(problem), known, pattern)
    return finish(problem, weight, kept, method="one_shot", damping=known.damping)


def prune_to_tolerance(
    problem: LayerProblem, tolerance: float, *, damping: float = ONE_SHOT_DAMPING
) -> Pruned:
    """Remove the smallest L_q while sqrt(layer error) does not exceed a tolerance.

    Parameters
    ----------
    problem : LayerProblem
        The layer.
    tolerance : float
        Bound on sqrt((1/n) ||X (What - W)||_F^2), in the units of the layer's output.
    damping : float, optional
        Fraction of the mean diagonal.

    Returns
    -------
    Pruned
        `error` <= tolerance^2, measured on the masked weights. What the problem's mask forbids is
        removed whatever it costs.

    Raises
    ------
    ValueError
        If the tolerance is negative or NaN, or the Hessian singular to working precision.

    Notes
    -----
    The count is found by bisection with the exact error: at the count returned it is within the
    tolerance and with one removal more it is not. Where the error is not monotone in the count
    there may be several such counts.
    """
    checks.not_negative(tolerance=tolerance)
    known = sensitivities(problem, damping=damping)
    arrays = in_numpy(problem)
    least = per_layer_count(0)
    low = layer_count(least, arrays.allowed, arrays.prunable)
    high = problem.size
    best = _removed(arrays, known, least)
    while low < high:
        middle = (low + high + 1) // 2
        trial = _removed(arrays, known, per_layer_count(middle))
        if layer_error(arrays.hessian, arrays.weight, trial[0]) <= tolerance**2:
            low, best = middle, trial
        else:
            high = middle - 1
    return finish(problem, *best, method="one_shot", damping=known.damping)


def _removed(
    problem: LayerProblem, known: Sensitivities, pattern: Pattern
) -> tuple[np.ndarray, np.ndarray]:
    """Choose by saliency, update in the order of saliency, mask."""
    finite = np.where(np.isfinite(known.saliency), known.saliency, 0.0)
    kept = kept_by(finite, pattern, problem.allowed, problem.prunable)
    weight = problem.weight.copy()
    for unit in range(weight.shape[1]):
        gone = np.flatnonzero(~kept[:, unit])
        order = gone[np.argsort(finite[gone, unit], kind="stable")]
        column = weight[:, unit].copy()
        _update(known.inverse, column, order)
        column[gone] = 0.0
        weight[:, unit] = column
    return weight, kept


@njit(cache=True, nogil=True)
def _update(P: np.ndarray, w: np.ndarray, order: np.ndarray) -> None:  # pragma: no cover
    """Apply dw = -(w_q / P_qq) P e_q for every q in order, in place."""
    for q in order:
        step = w[q] / P[q, q]
        row = P[q]
        for j in range(w.shape[0]):
            w[j] -= step * row[j]
