"""Theorems 3.2 and 5.1 of L-OBS in numbers: what they bound, measured, beside their bounds.

`retrain.bounds.outputs` has the tighter run bound that every method shares; this is the paper's
own, whose layer errors are taken before the activation and whose norms are Frobenius or spectral.
"""

from __future__ import annotations

import logging
import math
from dataclasses import asdict, dataclass
from typing import Any

from array_api_compat import array_namespace

from retrain.bounds.outputs import SUMS, below, unbounded, widened
from retrain.stream.chain import activate, spectral_norm
from retrain.stream.stream import LayerSpec, LayerStream, Norm, Passage
from solvers.arrays import norm

_log = logging.getLogger(__name__)

ROUNDOFF = 2.0**-53  # unit roundoff of float64 (derived from its 53 bits)


@dataclass(frozen=True)
class LayerDeviation:
    """One layer in theorems 3.2 and 5.1 of L-OBS, on one data set; Frobenius norms over all rows.

    Attributes
    ----------
    name : str
        Name of the layer.
    layer_error : float
        sqrt(n dE) = |X (What - W)|_F, before the activation, on the dense inputs.
    inputs : float
        sqrt(n) eps^(l-1) = |Xhat - X|_F, the change of the layer's inputs.
    measured : float
        |act(Xhat What) - act(X What)|_F, the quantity that theorem 5.1 bounds.
    spectral, frobenius : float
        Theorem 5.1's bound on it, |What| |Xhat - X|_F, with either norm (without the bias row). The
        paper has the Frobenius norm.
    """

    name: str
    layer_error: float
    inputs: float
    measured: float
    spectral: float
    frobenius: float


@dataclass(frozen=True)
class SecondOrderBounds:
    """Theorems 3.2 and 5.1 of L-OBS in numbers, on one data set.

    Attributes
    ----------
    rows : int
        Number of samples, n.
    measured : float
        |Yhat - Y|_F of the network's outputs; the paper's accumulated error is 1/sqrt(n) of it.
    spectral, frobenius : float or None
        Theorem 3.2's bound on it, with either norm; None where a layer has no finite gain.
    reason : str or None
        Why a bound is not available.
    layers : tuple of LayerDeviation
        Theorem 5.1, layer by layer.
    """

    rows: int
    measured: float
    spectral: float | None
    frobenius: float | None
    reason: str | None
    layers: tuple[LayerDeviation, ...]

    @property
    def defect(self) -> str | None:
        """The first bound that is below its measured value, in words; None as it should be."""
        pairs = [("theorem 3.2", self.measured, (self.spectral, self.frobenius))]
        for entry in self.layers:
            what = f"theorem 5.1 of layer {entry.name}"
            pairs.append((what, entry.measured, (entry.spectral, entry.frobenius)))
        for what, measured, bounds in pairs:
            for bound in bounds:
                if bound is not None and (defect := below(f"the bound of {what}", bound, measured)):
                    return defect
        return None

    def to_json(self) -> dict[str, Any]:
        """Return the fields and the defect as JSON values.

        Returns
        -------
        dict
            JSON values of all fields, and ``defect``.
        """
        layers = [asdict(entry) for entry in self.layers]
        return {**asdict(self), "layers": layers, "defect": self.defect}


def second_order_bounds(stream: LayerStream, passage: Passage | None = None) -> SecondOrderBounds:
    """Measure what theorems 3.2 and 5.1 of L-OBS bound, beside their bounds.

        |Yhat^(L) - Y^(L)|_F <= sum_h gain_h sqrt(n dE^h)                      theorem 3.2
        |act(Xhat What) - act(X What)|_F <= |What| |Xhat - X|_F                theorem 5.1

    gain_h is the product of the later layers' norms (`LayerStream.gain`, which knows convolutions
    and branches too). Unlike in `retrain.bounds.outputs`, dE is measured before the activation, as
    the paper has it.

    Parameters
    ----------
    stream : LayerStream
        Network with the new weights committed, on calibration or held-out data.
    passage : Passage, optional
        Result of `LayerStream.passage` for the current weights; computed where it is not given.

    Returns
    -------
    SecondOrderBounds
        Measured values and bounds.

    Notes
    -----
    Cost: one pass over the data per layer that can be retrained, and one `LayerStream.passage`
    where none is given.

    References
    ----------
    Dong, Chen, Pan, L-OBS (2017), theorems 3.2 and 5.1 (supplement).
    """
    if passage is None:
        passage = stream.passage()
    specs = [spec for spec in stream.layers if spec.reason is None]
    layers = tuple(
        _layer_deviation(stream, spec, f"{number} of {len(specs)}")
        for number, spec in enumerate(specs, start=1)
    )
    totals: dict[Norm, float | None] = {}
    reason = None
    kinds: tuple[Norm, ...] = ("spectral", "frobenius")
    for kind in kinds:
        total: float | None = 0.0
        for name, error in passage.errors.items():
            gain = stream.gain(name, norm=kind)
            if total is None or error == 0:
                continue
            if gain.value is None:
                total, reason = None, f"{name}: {gain.reason}"
            else:
                total += error * gain.value
        totals[kind] = None if total is None else widened(total, passage)
        if total is not None and totals[kind] is None:
            reason = unbounded(passage)
    return SecondOrderBounds(
        passage.rows, passage.measured, totals["spectral"], totals["frobenius"], reason, layers
    )


def _layer_deviation(stream: LayerStream, spec: LayerSpec, number: str) -> LayerDeviation:
    """Measure a layer in float64; groups add their squares."""
    _log.info("theorem 5.1: layer %s (%s)", spec.name, number)
    error = inputs = apart = spectral = frobenius = 0.0
    for group in range(spec.groups):
        new = stream.weight(spec.name, group)
        xp = array_namespace(new)
        new = xp.astype(new, xp.float64)
        change = new - xp.astype(stream.weight(spec.name, group, dense=True), xp.float64)
        moved = size = 0.0
        for batch in stream.batches(spec.name, group):
            dense = xp.astype(batch.dense_inputs, xp.float64)
            current = xp.astype(batch.inputs, xp.float64)
            response = activate(spec.follows, dense @ new)
            accumulated = activate(spec.follows, current @ new)
            error = math.hypot(error, norm(dense @ change))
            moved = math.hypot(moved, norm(current - dense))
            size = math.hypot(size, norm(dense), norm(current))
            apart = math.hypot(apart, norm(accumulated - response))
        inputs = math.hypot(inputs, moved)
        rows = new[: spec.shape[0], :]
        # Bound on the rounding of both responses in float64: K u |X| |W| for sums of K terms.
        lost = 2 * new.shape[0] * ROUNDOFF * size * norm(new)
        spectral = math.hypot(spectral, moved * spectral_norm(rows) + lost)
        frobenius = math.hypot(frobenius, moved * norm(rows) + lost)
    return LayerDeviation(spec.name, error, inputs, apart, spectral * SUMS, frobenius * SUMS)
