"""The quadratic that second-order pruning minimises for a layer, streamed, and its check from rows.

With x the rows of the layer's inputs, r the dense network's responses, W the layer's weight as it
is and D the change, all three forms of calibration are one quadratic in D:

    E(D) = base - 2 tr(D^T G) + tr(D^T H D),        H = (1/n) sum x x^T

    dense       (1/n) sum |D^T x|^2             x from the dense network,   G = 0, base = 0
    sequential  (1/n) sum |D^T x|^2             x from the current network, G = 0, base = 0
    corrected   (1/n) sum |(W + D)^T x - r|^2   x from the current network,
                                                G = (1/n) sum x (r - W^T x)^T,
                                                base = (1/n) sum |r - W^T x|^2

Dense is the paper's. Sequential, which is what most people run, asks the pruned layer to do on the
pruned network's activations what the old layer would have done there; corrected asks it to do what
the dense network does, so that later layers make up for earlier ones.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
from array_api_compat import array_namespace

from retrain.stream.chain import activate
from retrain.stream.stream import Array, LayerBatch, LayerSpec, LayerStream
from solvers.arrays import like, to_numpy
from solvers.obs import HessianSum, add_rows, decoupled, inverse_cholesky, mean_hessian

_log = logging.getLogger(__name__)

Calibration = Literal["dense", "sequential", "corrected"]
"""Form of the quadratic, as the module describes it."""


@dataclass(frozen=True, eq=False)
class Moments:
    """The quadratic E of one layer (one group of it).

    Attributes
    ----------
    hessian : array of float64, shape (n_in [+ 1], n_in [+ 1])
        H, undamped, the bias column last.
    gradient : array of float64, shape (n_in [+ 1], n_out), or None
        G; None stands for zero.
    base : float
        E(0).
    rows : int
        n, the number of rows.
    """

    hessian: Array
    gradient: Array | None
    base: float
    rows: int

    def error(self, change: Array) -> float:
        """Compute E(D) for a change of the weight.

        Parameters
        ----------
        change : array, shape (n_in [+ 1], n_out)
            D, in any float dtype.

        Returns
        -------
        float
            E(D) in float64, at least 0.
        """
        xp = array_namespace(self.hessian)
        wide = xp.astype(change, xp.float64)
        value = self.base + float(xp.sum(wide * (self.hessian @ wide)))
        if self.gradient is not None:
            value -= 2 * float(xp.sum(wide * self.gradient))
        return max(0.0, value)

    def rounding(self, change: Array) -> float:
        """Bound how far E(D) in float64 can be from the sum over rows.

        64 (n_in + 64) eps (base + 2 |D|.|G| + tr |D|^T |H| |D|), from the sizes of the terms that
        cancel: the rounding of the products, with a margin for the order in which the n rows were
        summed. The factor 64 is chosen by hand; a larger one accepts larger disagreements.

        Parameters
        ----------
        change : array, shape (n_in [+ 1], n_out)
            D, in any float dtype.

        Returns
        -------
        float
            Bound in the unit of E.
        """
        xp = array_namespace(self.hessian)
        wide = xp.abs(xp.astype(change, xp.float64))
        size = self.base + float(xp.sum(wide * (xp.abs(self.hessian) @ wide)))
        if self.gradient is not None:
            size += 2 * float(xp.sum(wide * xp.abs(self.gradient)))
        return 64 * (self.hessian.shape[0] + 64) * float(np.finfo(np.float64).eps) * size


def stream_moments(
    stream: LayerStream, spec: LayerSpec, group: int, calibration: Calibration
) -> Moments:
    """Accumulate a layer's quadratic over all its rows, in float64, batch by batch.

    Parameters
    ----------
    stream : LayerStream
        Network and calibration data.
    spec : LayerSpec
        Layer.
    group : int
        Index of the group, from 0.
    calibration : {"dense", "sequential", "corrected"}
        Inputs and targets of the quadratic, see the module.

    Returns
    -------
    Moments
        Quadratic of the group.

    Raises
    ------
    ValueError
        If the layer has no rows, or an activation is not finite.

    Notes
    -----
    Memory: one batch, H, and G where there is one, whatever the number of rows.

    References
    ----------
    Dong, Chen, Pan, L-OBS (2017): the layer-wise Hessian (dense calibration). The other two forms
    of calibration are not in the paper.
    """
    state: HessianSum | None = None
    gradient: Array | None = None
    base = 0.0
    weight = stream.weight(spec.name, group)
    for batch in stream.batches(spec.name, group):
        inputs = _inputs(batch, calibration)
        state = add_rows(state, inputs)
        _log.debug("moments: layer %s, %d rows", spec.name, state.count)
        if calibration == "corrected":
            xp = array_namespace(inputs)
            wide = xp.astype(inputs, xp.float64)
            missing = xp.astype(batch.responses, xp.float64) - wide @ xp.astype(weight, xp.float64)
            product = wide.T @ missing
            gradient = product if gradient is None else gradient + product
            base += float(xp.sum(missing * missing))
    hessian = mean_hessian(state)
    rows = 0 if state is None else state.count
    return Moments(hessian, None if gradient is None else gradient / rows, base / rows, rows)


def best_dense(weight: Array, moments: Moments, damping: float) -> Array:
    """Minimise E without a pattern: W + (H + damping I)^-1 G, in the weight's dtype.

    Pruning `weight` under `corrected` calibration is pruning this one under the plain quadratic:
    the gradient vanishes there.

    Parameters
    ----------
    weight : array, shape (n_in [+ 1], n_out)
        W.
    moments : Moments
        Quadratic.
    damping : float
        Damping as a fraction of the mean diagonal of H.

    Returns
    -------
    array, shape (n_in [+ 1], n_out)
        Minimiser in the dtype of `weight`; `weight` itself where G is zero.

    Raises
    ------
    ValueError
        If the damped Hessian is singular to working precision.
    """
    if moments.gradient is None:
        return weight
    xp = array_namespace(weight)
    inverse = inverse_cholesky(to_numpy(decoupled(moments.hessian, damping)))
    step = like(inverse @ to_numpy(moments.gradient), moments.hessian)
    return xp.astype(xp.astype(weight, xp.float64) + step, weight.dtype)


@dataclass(frozen=True)
class RowErrors:
    """What a layer's new weight does on its rows, measured row by row.

    Attributes
    ----------
    error : float
        E(D), the mean over the rows.
    energy : float
        (1/n) sum of the squared responses that E compares with.
    activated, target : float
        |act(new response) - act(dense response)|_F and |act(dense response)|_F over all rows.
    rows : int
        n, the number of rows.
    """

    error: float
    energy: float
    activated: float
    target: float
    rows: int


def row_errors(
    stream: LayerStream,
    spec: LayerSpec,
    group: int,
    calibration: Calibration,
    old: Array,
    new: Array,
) -> RowErrors:
    """Measure a weight's errors in a second pass over the rows, in float64, without the Hessian.

    Parameters
    ----------
    stream : LayerStream
        Network and calibration data.
    spec : LayerSpec
        Layer.
    group : int
        Index of the group, from 0.
    calibration : {"dense", "sequential", "corrected"}
        Inputs and targets, see the module.
    old, new : array, shape (n_in [+ 1], n_out)
        W and W + D.

    Returns
    -------
    RowErrors
        Errors over all rows of the group.
    """
    error = energy = activated = target = 0.0
    rows = 0
    for inputs, responses in _wide(stream, spec, group, calibration):
        xp = array_namespace(inputs)
        before = inputs @ xp.astype(old, xp.float64)
        # from the change: the difference of two responses would cancel
        moved = inputs @ (xp.astype(new, xp.float64) - xp.astype(old, xp.float64))
        wanted = responses if calibration == "corrected" else before
        missed = (before - wanted) + moved
        goal = activate(spec.follows, before if calibration == "dense" else responses)
        apart = activate(spec.follows, before + moved) - goal
        error += float(xp.sum(missed * missed))
        energy += float(xp.sum(wanted * wanted))
        activated += float(xp.sum(apart * apart))
        target += float(xp.sum(goal * goal))
        rows += int(inputs.shape[0])
    return RowErrors(error / rows, energy / rows, math.sqrt(activated), math.sqrt(target), rows)


def _wide(
    stream: LayerStream, spec: LayerSpec, group: int, calibration: Calibration
) -> Iterator[tuple[Array, Array]]:
    """Yield inputs and dense responses in float64."""
    for batch in stream.batches(spec.name, group):
        inputs = _inputs(batch, calibration)
        xp = array_namespace(inputs)
        yield xp.astype(inputs, xp.float64), xp.astype(batch.responses, xp.float64)


def _inputs(batch: LayerBatch, calibration: Calibration) -> Array:
    return batch.dense_inputs if calibration == "dense" else batch.inputs
