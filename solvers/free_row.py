"""Multipliers that a free row allows: their projection onto {x^T nu = 0, nu >= 0 off Omega}.

A row of the weights without penalty (the bias), with samples x, has a dual that must vanish. The
Euclidean projection of a unit's nu is nu - t x on Omega and (nu - t x)_+ off it, t the root of

    phi(t) = x^T nu(t),

which is continuous, piecewise linear and decreasing. The root is bracketed, then found by Newton
steps on the current piece, with bisection where a step would leave the bracket; the last step
solves its piece exactly.

Arrays on the CPU go through a compiled loop, unit by unit, each of which stays in the cache;
others through the array API. One is the other's test.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from array_api_compat import array_namespace, device, is_numpy_array, is_torch_array
from numba import njit

Array = Any

_ROOT_STEPS = 100
"""Steps for the root at most: Newton needs under ten, bisection alone some sixty. Twice as many
change nothing."""

_ROUNDING = 1e-15
"""Value of x^T nu, relative to |x| |nu|, at which the root counts as found: float64's rounding of
one such sum. Twice as large stops at most a step earlier."""

_ORTHOGONAL = 1e-12
"""The same for what counts as orthogonal in the end, with room for sums over many samples. A column
beyond it is made of rounding and becomes zero; a much larger value would let multipliers pass that
prove a false bound."""


def orthogonalise(nu: Array, x: Array, active: Array) -> Array:
    """Project each column of nu onto {x^T nu = 0, nu >= 0 where not active}.

    Twice: where almost all of nu lies along x, the rest of the first projection is orthogonal only
    to the rounding of nu, the rest of the second to its own. A column that is not orthogonal even
    then is made of rounding alone and becomes zero, which is admissible: any scale may multiply nu
    later, so a remainder would prove a bound that is not one.

    Parameters
    ----------
    nu : array, shape (n_samples, n_out), float64
        Multipliers.
    x : array, shape (n_samples, 1), float64
        Samples of the free row.
    active : bool array, shape (n_samples, n_out)
        Omega: where multipliers may be negative.

    Returns
    -------
    array, shape (n_samples, n_out), float64
        The projections; of the kind and on the device of `nu`.
    """
    if is_numpy_array(nu):
        columns = np.ascontiguousarray(nu.T)
        _project_columns(
            columns, np.ascontiguousarray(x[:, 0]), np.ascontiguousarray(active.T), _ROOT_STEPS
        )
        return columns.T
    if is_torch_array(nu) and str(device(nu)) == "cpu":
        xp = array_namespace(nu)
        return xp.asarray(orthogonalise(nu.numpy(), x.numpy(), active.numpy()))
    return orthogonalise_arrays(nu, x, active)


def orthogonalise_arrays(nu: Array, x: Array, active: Array) -> Array:
    """Do the same by the array API, for all units at once.

    Parameters
    ----------
    nu : array, shape (n_samples, n_out), float64
        Multipliers.
    x : array, shape (n_samples, 1), float64
        Samples of the free row.
    active : bool array, shape (n_samples, n_out)
        Omega: where multipliers may be negative.

    Returns
    -------
    array, shape (n_samples, n_out), float64
        The projections.
    """
    xp = array_namespace(nu)
    for _ in range(2):
        # The projection is homogeneous; at size 1 no square overflows.
        largest = xp.max(xp.abs(nu), axis=0)
        largest = xp.where(largest > 0, largest, xp.ones_like(largest))
        nu = largest * _shift_to_root(nu / largest, x, active)
    moment = xp.abs(xp.sum(x * (nu / largest), axis=0))
    size = xp.sqrt(xp.sum(x * x) * xp.sum((nu / largest) ** 2, axis=0))
    return xp.where(moment <= _ORTHOGONAL * size, nu, xp.zeros_like(nu))


def _shift_to_root(nu: Array, x: Array, active: Array) -> Array:
    """Return nu(t) = nu - t x, clipped at 0 off Omega, at the root t of phi(t) = x^T nu(t)."""
    xp = array_namespace(nu)
    zero = xp.zeros_like(nu)

    def point(t: Array) -> Array:
        shifted = nu - t * x
        return xp.where(active, shifted, xp.maximum(shifted, zero))

    def value_and_slope(t: Array) -> tuple[Array, Array]:
        shifted = nu - t * x
        moving = active | (shifted > 0)
        value = xp.sum(xp.where(moving, shifted, zero) * x, axis=0)
        return value, -xp.sum(xp.where(moving, x * x + zero, zero), axis=0)

    largest = xp.max(xp.abs(nu), axis=0)
    smallest = xp.min(xp.where(x != 0, xp.abs(x), xp.inf * xp.ones_like(x)))
    # From t = largest/smallest on phi <= 0, from the opposite on phi >= 0, since |t x| >= |nu|
    # there. Twice that leaves a root within, where steps may land: not on an end, which has been
    # tried, for two ends on different pieces can lead to each other for ever.
    high = xp.where(xp.isfinite(smallest), 2 * largest / smallest, xp.zeros_like(largest))
    low = -high
    rounding = _ROUNDING * xp.sqrt(xp.sum(x * x) * xp.sum(nu * nu, axis=0))
    t = xp.zeros_like(largest)
    for _ in range(_ROOT_STEPS):
        value, slope = value_and_slope(t)
        low = xp.where(value > 0, xp.maximum(low, t), low)
        high = xp.where(value < 0, xp.minimum(high, t), high)
        step = xp.where(
            slope < 0, value / xp.where(slope < 0, -slope, xp.ones_like(slope)), zero[0, :]
        )
        newton = t + step
        inside = (newton > low) & (newton < high) & (slope < 0)
        following = xp.where(inside, newton, (low + high) / 2)
        following = xp.where(xp.abs(value) <= rounding, t, following)
        if bool(xp.all(following == t)):
            break
        t = following
    return point(t)


_SUMS = {"reassoc", "contract"}
"""Fast-math flags of the compiled sums: terms may be added in any order, so that they run in vector
registers. The outcome is judged by `_ORTHOGONAL`."""


@njit(cache=True, nogil=True, fastmath=_SUMS)
def _value_and_slope(nu, x, active, t):  # type: ignore[no-untyped-def]
    """phi(t) and its derivative."""
    value, slope = 0.0, 0.0
    for j in range(len(nu)):
        shifted = nu[j] - t * x[j]
        share = 1.0 if active[j] or shifted > 0 else 0.0
        value += share * shifted * x[j]
        slope -= share * x[j] * x[j]
    return value, slope


@njit(cache=True, nogil=True, fastmath=_SUMS)
def _moments(nu, x):  # type: ignore[no-untyped-def]
    """x^T nu, |x|^2 and |nu|^2."""
    moment, xx, nn = 0.0, 0.0, 0.0
    for j in range(len(nu)):
        moment += x[j] * nu[j]
        xx += x[j] * x[j]
        nn += nu[j] * nu[j]
    return moment, xx, nn


@njit(cache=True, nogil=True)
def _root(nu, x, active, smallest, steps):  # type: ignore[no-untyped-def]
    """The t of `_shift_to_root` for one unit, |nu|_inf = 1."""
    if not math.isfinite(smallest):
        return 0.0
    high = 2.0 / smallest
    low = -high
    _, xx, nn = _moments(nu, x)
    rounding = _ROUNDING * math.sqrt(xx * nn)
    t = 0.0
    for _ in range(steps):
        value, slope = _value_and_slope(nu, x, active, t)
        if abs(value) <= rounding:
            break
        if value > 0:
            low = max(low, t)
        else:
            high = min(high, t)
        following = t - value / slope if slope < 0 else math.inf
        if not low < following < high:
            following = (low + high) / 2
        if following == t:
            break
        t = following
    return t


@njit(cache=True, nogil=True)
def _project_columns(columns, x, active, steps):  # type: ignore[no-untyped-def]
    """`orthogonalise` of the rows of `columns` (n_out, n_samples), in place."""
    smallest = math.inf
    for j in range(len(x)):
        if x[j] != 0:
            smallest = min(smallest, abs(x[j]))
    for m in range(len(columns)):
        nu, fitted = columns[m], active[m]
        largest = np.max(np.abs(nu))
        for _ in range(2):
            if largest == 0:
                break
            for j in range(len(nu)):
                nu[j] /= largest
            t = _root(nu, x, fitted, smallest, steps)
            peak = 0.0
            for j in range(len(nu)):
                shifted = nu[j] - t * x[j]
                if not fitted[j]:
                    shifted = max(shifted, 0.0)
                nu[j] = largest * shifted
                peak = max(peak, abs(nu[j]))
            largest = peak
        if largest == 0:
            continue
        scaled = nu / largest
        moment, xx, nn = _moments(scaled, x)
        if not abs(moment) <= _ORTHOGONAL * math.sqrt(xx * nn):
            nu[:] = 0.0
