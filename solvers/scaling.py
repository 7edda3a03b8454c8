"""The units that solvers iterate in: data of size 1 and columns of like size, by powers of two.

Where columns of X differ by orders of magnitude, so do the weights that they get, and one metric
|u|^2 serves neither the small nor the large. With a size s_i for each column, a size b of the
responses and a reference size g of the columns, solvers see

    X' = X / s,      y' = y / b,      u' = s u / b,      z' = z / b,      nu' = g nu,

and the objective times g / b. A penalty phi becomes phi'(w u'), with the weights w_i = g / s_i and
phi' the same penalty in the unit b / g (`Penalty.in_unit`):

    penalised     phi(u) g / b = phi'(w u'),                  e.g.  sum_i w_i |u'_i|,
    fit           fit_weight' = fit_weight g b,               ball    epsilon' = epsilon / b,
    dual          X'^T nu' = w X^T nu,                        so the l1 box is |c'_i| <= w_i.

All sizes are powers of two, so that scaling rounds nothing: data (aX, bY) with a, b powers of two
lead to the same iterates, bit by bit. Programs and certificates stay in the caller's units.

**Sizes.** The reference is the root mean square of the columns' norms, rounded to a power of two. A
column within a factor of 32 of it has its size: there, sizes of their own gain nothing, and the
penalty stays unweighted. Others have their own norm, likewise rounded.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from array_api_compat import array_namespace

from solvers.arrays import like, to_numpy
from solvers.penalties import Group
from solvers.program import ConstrainedProgram, Program
from solvers.repair import into_boxes
from solvers.result import SolveResult, Status

Array = Any

_ALIKE = 5
"""Columns within a factor of 2^5 of the reference keep its size: scaling them would change programs
that need none. A larger one scales fewer columns."""

_FURTHEST = 40
"""No size is further than 2^40 from the reference, since squares of the weights must fit float32.
Derived from its range."""

_LARGEST_FIRST = 2.0**60
"""Largest old weight, in a solver's units, taken as a first point; a larger one would overflow
float32 in its square."""

_WIDEST_LEVELS = 2.0**60
"""How far the largest ceiling may lie above the fitted levels' size; beyond, the unit of responses
follows the ceiling, whose square must fit float32. Derived from its range."""

_LEAST, _MOST = 1e-300, 1e300
"""Bounds of epsilon and of the fit's weight in a solver's units, where quotients stay finite in
float64."""

_SAFE = 2.0**64
"""Within this factor of 1, float32 multipliers can be scaled without overflow; beyond, float64 is
used. Derived from float32's range."""


@dataclass(frozen=True, eq=False)
class Sizes:
    """What X is divided by.

    Attributes
    ----------
    columns : array, shape (n_in,), float64
        s, powers of two.
    reference : float
        g, a power of two.
    """

    columns: np.ndarray
    reference: float

    @staticmethod
    def of(norms: np.ndarray) -> Sizes:
        """Choose the sizes from the columns' norms over the root of the number of samples.

        Parameters
        ----------
        norms : ndarray, shape (n_in,)
            Root mean square of each input.

        Returns
        -------
        Sizes
            Powers of two.
        """
        largest = float(np.max(norms))
        if largest == 0:
            return Sizes(np.ones(len(norms)), 1.0)
        rms = largest * math.sqrt(float(np.mean((norms / largest) ** 2)))
        reference = int(_exponents(np.asarray(rms)))
        steps = _exponents(np.where(norms > 0, norms, rms)) - reference
        steps = np.where(np.abs(steps) <= _ALIKE, 0, np.maximum(steps, -_FURTHEST))
        return Sizes(np.ldexp(1.0, steps + reference), math.ldexp(1.0, reference))

    @property
    def weights(self) -> np.ndarray | None:
        """W of the module, shape (n_in,); None if all are 1."""
        weights = self.reference / self.columns
        return None if (weights == 1).all() else weights

    def divide(self, inputs: Array) -> Array:
        """X' = X / s, in the dtype of X; X itself if there is nothing to divide by.

        Parameters
        ----------
        inputs : array, shape (n_samples, n_in)
            X.

        Returns
        -------
        array, shape (n_samples, n_in)
            X', exact.
        """
        if (self.columns == 1).all():
            return inputs
        xp = array_namespace(inputs)
        return inputs / xp.astype(like(self.columns, inputs), inputs.dtype, copy=False)


@dataclass(frozen=True, eq=False)
class Scaling:
    """A program in a solver's units, and the way back.

    Attributes
    ----------
    program : ConstrainedProgram or RegularisedProgram
        Its data in those units. Its penalty lacks the weights w: `weights` has them.
    sizes : Sizes
    response : float
        b, a power of two.
    """

    program: Program
    sizes: Sizes
    response: float

    @staticmethod
    def of(program: Program, sizes: Sizes) -> Scaling:
        """State a program in the units that its own data and the sizes of its inputs ask for.

        Parameters
        ----------
        program : ConstrainedProgram or RegularisedProgram
            The layer's program.
        sizes : Sizes
            Of its inputs.

        Returns
        -------
        Scaling
            Both programs, and what leads from one to the other.
        """
        xp = array_namespace(program.inputs)
        response = _response_size(program)
        unit = response / sizes.reference
        old = program.old_weight
        if old is not None:
            factor = like(sizes.columns / response, program.inputs)[:, None]
            old = xp.clip(xp.astype(old, xp.float64) * factor, -_LARGEST_FIRST, _LARGEST_FIRST)
            old = xp.astype(old, program.inputs.dtype)
        form: dict[str, Any] = (
            {"epsilon": _held(program.epsilon / response)}
            if isinstance(program, ConstrainedProgram)
            else {"fit_weight": _held(program.fit_weight * sizes.reference * response)}
        )
        scaled = replace(
            program,
            inputs=sizes.divide(program.inputs),
            level=program.level if response == 1 else program.level / response,
            penalty=program.penalty.in_unit(unit),
            old_weight=old,
            **form,
        )
        return Scaling(scaled, sizes, response)

    @property
    def weights(self) -> np.ndarray | None:
        """W of the module, shape (n_in,); None if all are 1."""
        return self.sizes.weights

    @property
    def objective(self) -> float:
        """An objective in these units over the same in the caller's."""
        return self.sizes.reference / self.response

    def weight_back(self, weight: Array) -> Array:
        """Return weights (n_in, n_out) in the caller's units and the inputs' dtype.

        Parameters
        ----------
        weight : array, shape (n_in, n_out)
            In a solver's units.

        Returns
        -------
        array, shape (n_in, n_out)
            In the caller's.
        """
        xp = array_namespace(self.program.inputs)
        factor = self.response / self.sizes.columns
        if not (factor == 1).all():
            weight = xp.astype(weight, xp.float64) * like(factor, self.program.inputs)[:, None]
        # A step may lead beyond what the given type holds; the certificate judges what it can hold.
        largest = float(xp.finfo(self.program.inputs.dtype).max)
        return xp.astype(xp.clip(weight, -largest, largest), self.program.inputs.dtype)

    def into_boxes(self, multiplier: Array) -> Array:
        """Move a multiplier in these units into its boxes (`solvers.repair`), in float64.

        Parameters
        ----------
        multiplier : array, shape (n_samples, n_out)
            In a solver's units.

        Returns
        -------
        array, shape (n_samples, n_out), float64
            With X^T nu within each input's box.
        """
        program, weights = self.program, self.weights
        inputs, nu = (to_numpy(array) for array in (program.inputs, multiplier))
        box = np.ones(inputs.shape[1]) if weights is None else weights.copy()
        box[list(program.free_rows)] = 0.0
        if isinstance(program.penalty, Group):
            # Rows share a ball: each entry gets the part of it that it has now.
            dual = np.abs(inputs.astype(np.float64).T @ nu)
            norms = np.sqrt(np.sum(dual**2, axis=1, keepdims=True))
            share = dual / np.where(norms > 0, norms, 1.0)
            box = program.penalty.weight * box[:, None] * share
            box[[i for i in range(len(box)) if i not in program.free_rows]] += np.finfo(float).tiny
        support = None if program.support is None else to_numpy(program.support)
        active = to_numpy(program.active)
        repaired = into_boxes(inputs.astype(np.float64, copy=False), box, active, nu, support)
        return like(repaired, program.inputs)

    def multiplier_back(self, multiplier: Array) -> Array:
        """Return a multiplier (n_samples, n_out) in the caller's units.

        Parameters
        ----------
        multiplier : array, shape (n_samples, n_out)
            In a solver's units.

        Returns
        -------
        array, shape (n_samples, n_out)
            In the caller's.
        """
        return self._times(multiplier, 1 / self.sizes.reference)

    def penalty_parameter_back(self, rho: Array) -> Array:
        """Return ADMM's penalty in the caller's units, those of 1 / weight, in float64.

        Parameters
        ----------
        rho : array, shape () or (n_out,)
            In a solver's units.

        Returns
        -------
        array, shape () or (n_out,), float64
            In the caller's.
        """
        xp = array_namespace(rho)
        return xp.astype(rho, xp.float64) * self.objective

    def warm_start(self, result: SolveResult | None) -> SolveResult | None:
        """Return an earlier result in these units.

        The multiplier of a program that is unreachable is a proof, not a start: it is left out.

        Parameters
        ----------
        result : SolveResult or None
            In the caller's units.

        Returns
        -------
        SolveResult or None
            In a solver's units; None without one.

        Raises
        ------
        ValueError
            If it is one of other shapes.
        """
        if result is None:
            return None
        n_samples, n_in, n_out = self.program.shape
        for name, array, want in (
            ("weights", result.weight, (n_in, n_out)),
            ("a multiplier", result.multiplier, (n_samples, n_out)),
        ):
            if tuple(array.shape) != want:
                raise ValueError(
                    f"warm_start: got {tuple(array.shape)}, want {name} of shape {want}"
                )
        weight, rho = result.weight, result.penalty_parameter
        multiplier = self._times(result.multiplier, self.sizes.reference)
        if result.status is Status.UNREACHABLE:
            multiplier, rho = 0 * multiplier, None
        factor = self.sizes.columns / self.response
        if not (factor == 1).all():
            xp = array_namespace(weight)
            weight = xp.astype(weight, xp.float64) * like(factor, weight)[:, None]
        return replace(
            result,
            weight=weight,
            multiplier=multiplier,
            penalty_parameter=None if rho is None else rho / self.objective,
        )

    def _times(self, multiplier: Array, factor: float) -> Array:
        if factor == 1:
            return multiplier
        if not 1 / _SAFE <= factor <= _SAFE:
            xp = array_namespace(self.program.inputs)
            multiplier = xp.astype(multiplier, xp.float64, copy=False)
        return multiplier * factor


def _response_size(program: Program) -> float:
    """Root mean square of the fitted entries, but no less than the largest level's 2^-60; or 1."""
    xp = array_namespace(program.level)
    largest = float(xp.max(xp.abs(program.level)))
    if largest == 0:
        return 1.0
    fitted = max(float(xp.sum(xp.astype(program.active, xp.float64))), 1.0)
    size = float(np.linalg.norm(program.fitted_norms())) / math.sqrt(fitted)
    size = max(size, largest / _WIDEST_LEVELS) if size > 0 else largest
    return math.ldexp(1.0, int(_exponents(np.asarray(size))))


def _held(value: float) -> float:
    """Keep a positive number finite and positive; 0 stays 0."""
    return min(max(value, _LEAST), _MOST) if value > 0 else value


def _exponents(sizes: np.ndarray) -> np.ndarray:
    """Exponents of the powers of two nearest to positive numbers, by ratio."""
    mantissas, exponents = np.frexp(sizes)  # mantissas in [1/2, 1)
    return np.where(mantissas >= math.sqrt(0.5), exponents, exponents - 1)
