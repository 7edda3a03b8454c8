"""Penalties of the layer programs: l1, elastic net and group.

A penalty is a value, a proximal operator and, for the certificate, its conjugate. Weights and
their duals come as matrices (n_in, n_out) of the penalised rows only. In the dual of a layer
program a multiplier may be scaled by any s >= 0, which moves the bound along

    D(s) = s * linear - s^2 * quadratic - conjugate(s * c),        c = -X^T nu,

so each penalty also knows the best s, `Penalty.scale_dual`. Any s gives a valid bound; the best one
gives the tightest.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from array_api_compat import array_namespace, is_numpy_array
from numba import njit

from solvers import checks

Array = Any

_BISECTIONS = 60
"""Halvings for the scale of an elastic net's multiplier: float64 has 53 digits. More change
nothing."""

_SMALLEST_RIDGE = 1e-300
"""Smallest ridge after a change of unit, so that it stays positive in float64."""


class Penalty(Protocol):
    """What the programs and the solvers ask of a penalty."""

    @property
    def name(self) -> str:
        """Name for messages and reports."""
        ...

    @property
    def separable(self) -> bool:
        """Whether the units (columns) decouple."""
        ...

    def value(self, weight: Array) -> Array:
        """Penalty of each unit, shape (n_out,); of all units together, shape (), if coupled.

        Parameters
        ----------
        weight : array, shape (n_in, n_out)
            Weights.

        Returns
        -------
        array, shape (n_out,) or ()
            The penalty; not negative.
        """
        ...

    def prox(self, weight: Array, step: Array) -> Array:
        """Minimise penalty(u) + |u - weight|^2 / (2 step).

        `step` is a scalar, one for each unit (n_out,), one for each input (n_in, 1), or one for
        each weight (n_in, n_out), which divides its own square.

        Parameters
        ----------
        weight : array, shape (n_in, n_out)
            Where the prox is taken.
        step : array
            Step, above 0, in one of the shapes above.

        Returns
        -------
        array, shape (n_in, n_out)
            The minimiser u.
        """
        ...

    def in_unit(self, unit: float) -> Penalty:
        """Return the penalty p with ``p(u) = penalty(unit u) / unit``.

        Parameters
        ----------
        unit : float
            Size of a weight in the new unit, above 0.

        Returns
        -------
        Penalty
            For weights in that unit.
        """
        ...

    def conjugate(self, dual: Array) -> Array:
        """Finite part of sup_u <dual, u> - penalty(u), shaped like `value`.

        Where the conjugate is an indicator, the caller has scaled `dual` into its domain.

        Parameters
        ----------
        dual : array, shape (n_in, n_out)
            Dual point.

        Returns
        -------
        array, shape (n_out,) or ()
            Of each unit, or of all together.
        """
        ...

    def shrink_units(self, dual: Array) -> Array:
        """Scale <= 1 of each unit, (n_out,), that brings it into its own part of the domain.

        Parameters
        ----------
        dual : array, shape (n_in, n_out)
            Dual point.

        Returns
        -------
        array, shape (n_out,)
            Factors from 0 to 1.
        """
        ...

    def scale_dual(self, dual: Array, linear: Array, quadratic: Array) -> Array:
        """Scale s >= 0 that maximises ``s linear - s^2 quadratic - conjugate(s dual)``.

        Parameters
        ----------
        dual : array, shape (n_in, n_out)
            Dual point c.
        linear, quadratic : array, shape (n_out,) or ()
            Coefficients of the dual function.

        Returns
        -------
        array, shape (n_out,) or ()
            The scales.
        """
        ...


def _clip_scale(linear: Array, quadratic: Array, size: Array, radius: float) -> Array:
    """Maximise s linear - s^2 quadratic over s >= 0 with s * size <= radius, elementwise.

    Where neither the quadratic nor the size limits s (then linear > 0 only if the program is
    infeasible), s = 1 is as good as any.
    """
    xp = array_namespace(linear)
    one = xp.ones_like(linear)
    limit = xp.where(size > 0, radius / xp.where(size > 0, size, one), xp.inf * one)
    curved = quadratic > 0
    free = xp.where(curved, linear / xp.where(curved, 2 * quadratic, one), limit)
    best = xp.minimum(free, limit)
    best = xp.where(xp.isfinite(best), best, one)
    return xp.where(linear > 0, best, xp.zeros_like(linear))


@njit(cache=True, nogil=True)
def _shrunk(weight, step):  # type: ignore[no-untyped-def]
    """`L1.prox` in one pass."""
    out = np.empty_like(weight)
    for i in range(weight.shape[0]):
        for m in range(weight.shape[1]):
            t = weight[i, m]
            out[i, m] = t - min(max(t, -step[m]), step[m])
    return out


@dataclass(frozen=True)
class L1:
    """The sum of absolute values, ``|u|_1``; its conjugate is the indicator of |c| <= 1."""

    name = "l1"
    separable = True

    def value(self, weight: Array) -> Array:
        """Return ``sum_i |u_i|`` of each unit, shape (n_out,)."""
        xp = array_namespace(weight)
        return xp.sum(xp.abs(weight), axis=0)

    def prox(self, weight: Array, step: Array) -> Array:
        """Shrink towards zero by `step`."""
        if is_numpy_array(weight) and np.ndim(step) < 2:
            return _shrunk(weight, np.broadcast_to(step, weight.shape[1:]))
        xp = array_namespace(weight)
        return weight - xp.clip(weight, -step, step)

    def in_unit(self, unit: float) -> L1:
        """Return this penalty: it is homogeneous."""
        return self

    def conjugate(self, dual: Array) -> Array:
        """Return zero for each unit: `dual` lies in the box."""
        xp = array_namespace(dual)
        return xp.zeros_like(dual[0, :])

    def shrink_units(self, dual: Array) -> Array:
        """Return ``min(1, 1 / |c|_inf)`` of each unit."""
        xp = array_namespace(dual)
        largest = xp.max(xp.abs(dual), axis=0)
        return 1 / xp.maximum(largest, xp.ones_like(largest))

    def scale_dual(self, dual: Array, linear: Array, quadratic: Array) -> Array:
        """Return the best scale of each unit that keeps it in the box |s c| <= 1."""
        xp = array_namespace(dual)
        return _clip_scale(linear, quadratic, xp.max(xp.abs(dual), axis=0), 1.0)


@dataclass(frozen=True)
class ElasticNet:
    """``|u|_1 + (ridge / 2) |u|^2``; its conjugate is ``sum (|c| - 1)_+^2 / (2 ridge)``: no box.

    Attributes
    ----------
    ridge : float
        Weight of the quadratic term, > 0, in units of 1 / weight.
    """

    ridge: float
    name = "elastic net"
    separable = True

    def __post_init__(self) -> None:
        checks.positive(ridge=self.ridge)

    def value(self, weight: Array) -> Array:
        """Return the penalty of each unit, shape (n_out,)."""
        xp = array_namespace(weight)
        return xp.sum(xp.abs(weight) + (self.ridge / 2) * weight * weight, axis=0)

    def prox(self, weight: Array, step: Array) -> Array:
        """Shrink by `step`, then divide by 1 + ridge step."""
        xp = array_namespace(weight)
        return (weight - xp.clip(weight, -step, step)) / (1 + self.ridge * step)

    def in_unit(self, unit: float) -> ElasticNet:
        """Return the same with the ridge in that unit, kept positive and finite."""
        return ElasticNet(min(max(self.ridge * unit, _SMALLEST_RIDGE), 1 / _SMALLEST_RIDGE))

    def conjugate(self, dual: Array) -> Array:
        """Return ``sum_i (|c_i| - 1)_+^2 / (2 ridge)`` of each unit."""
        xp = array_namespace(dual)
        over = xp.maximum(xp.abs(dual) - 1, xp.zeros_like(dual))
        return xp.sum(over * over, axis=0) / (2 * self.ridge)

    def shrink_units(self, dual: Array) -> Array:
        """Return ones: the conjugate is finite everywhere."""
        xp = array_namespace(dual)
        return xp.ones_like(dual[0, :])

    def scale_dual(self, dual: Array, linear: Array, quadratic: Array) -> Array:
        """Return the root of the derivative of D(s), unit by unit, by bisection.

        ``D'(s) = linear - 2 s quadratic - sum_i |c_i| (s |c_i| - 1)_+ / ridge`` decreases.
        """
        xp = array_namespace(dual)
        size = xp.abs(dual)

        def slope(s: Array) -> Array:
            bend = xp.sum(size * xp.maximum(s * size - 1, xp.zeros_like(size)), axis=0)
            return linear - 2 * s * quadratic - bend / self.ridge

        low = xp.zeros_like(linear)
        high = xp.ones_like(linear)
        for _ in range(_BISECTIONS):
            rising = slope(high) > 0
            if not bool(xp.any(rising)):
                break
            high = xp.where(rising, 2 * high, high)
        for _ in range(_BISECTIONS):
            middle = (low + high) / 2
            rising = slope(middle) > 0
            low, high = xp.where(rising, middle, low), xp.where(rising, high, middle)
        return low


@dataclass(frozen=True)
class Group:
    """``weight * sum_i |u_i|_2`` over the inputs i: a whole input leaves the layer or stays.

    It couples the units, so it goes with the constrained program only. Its conjugate is the
    indicator of ``|c_i|_2 <= weight`` for every row.

    Attributes
    ----------
    weight : float
        Weight of the rows' norms, > 0.
    """

    weight: float = 1.0
    name = "group"
    separable = False

    def __post_init__(self) -> None:
        checks.positive(weight=self.weight)

    def _norms(self, matrix: Array) -> Array:
        xp = array_namespace(matrix)
        return xp.sqrt(xp.sum(matrix * matrix, axis=1))

    def value(self, weight: Array) -> Array:
        """Return the penalty of all units together, shape ()."""
        xp = array_namespace(weight)
        return self.weight * xp.sum(self._norms(weight))

    def prox(self, weight: Array, step: Array) -> Array:
        """Shrink each row's norm by ``weight * step``, a scalar or one for each input (n_in, 1)."""
        xp = array_namespace(weight)
        norms = self._norms(weight)[:, None]
        kept = xp.maximum(norms - self.weight * step, xp.zeros_like(norms))
        return kept / xp.where(norms > 0, norms, xp.ones_like(norms)) * weight

    def in_unit(self, unit: float) -> Group:
        """Return this penalty: it is homogeneous."""
        return self

    def conjugate(self, dual: Array) -> Array:
        """Return zero: `dual` lies in the product of balls."""
        xp = array_namespace(dual)
        return xp.zeros_like(dual[0, 0])

    def shrink_units(self, dual: Array) -> Array:
        """Return ones: the balls tie the units together, so only a joint scale is of use."""
        xp = array_namespace(dual)
        return xp.ones_like(dual[0, :])

    def scale_dual(self, dual: Array, linear: Array, quadratic: Array) -> Array:
        """Return the best joint scale that keeps every row's norm within `weight`."""
        xp = array_namespace(dual)
        return _clip_scale(linear, quadratic, xp.max(self._norms(dual)), self.weight)
