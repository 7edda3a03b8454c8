"""Theorems 3.2 and 5.1 of L-OBS in numbers: what they bound, measured, beside their bounds.

`retrain.bounds` has the tighter run bound that every method shares; this is the paper's own, whose
layer errors are taken before the activation and whose norms are Frobenius or spectral.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from array_api_compat import array_namespace

from retrain.bounds import deviation
from retrain.chain import activate
from retrain.stream import LayerSpec, LayerStream, Norm
from solvers.arrays import to_numpy

# Theorem 5.1 is computed in float64: a product of norms, rounded.
_ROUNDING = 1 + 1e-9


@dataclass(frozen=True)
class LayerDeviation:
    """One layer in theorems 3.2 and 5.1 of L-OBS, on one data set; Frobenius norms over all rows.

    Attributes
    ----------
    name : str
        The layer.
    layer_error : float
        sqrt(n dE) = |X (What - W)|_F, before the activation, on the dense inputs.
    inputs : float
        sqrt(n) eps^(l-1) = |Xhat - X|_F, by how much its inputs moved.
    measured : float
        |act(Xhat What) - act(X What)|_F, what theorem 5.1 bounds.
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
        Samples, n.
    measured : float
        |Yhat - Y|_F of the network's outputs; the paper's accumulated error is 1/sqrt(n) of it.
    spectral, frobenius : float or None
        Theorem 3.2's bound on it, with either norm; None where a layer has no finite gain.
    reason : str or None
        Why there is none.
    layers : tuple of LayerDeviation
        Theorem 5.1, layer by layer.
    """

    rows: int
    measured: float
    spectral: float | None
    frobenius: float | None
    reason: str | None
    layers: tuple[LayerDeviation, ...]

    def to_json(self) -> dict[str, Any]:
        """Return the fields as JSON values."""
        return {**asdict(self), "layers": [asdict(entry) for entry in self.layers]}


def second_order_bounds(stream: LayerStream) -> SecondOrderBounds:
    """Measure what theorems 3.2 and 5.1 of L-OBS bound, beside their bounds.

        |Yhat^(L) - Y^(L)|_F <= sum_h gain_h sqrt(n dE^h)                      theorem 3.2
        |act(Xhat What) - act(X What)|_F <= |What| |Xhat - X|_F                theorem 5.1

    gain_h is the product of the later layers' norms (`LayerStream.gain`, which knows convolutions
    and branches too). Unlike in `retrain.bounds`, dE is measured before the activation, as the
    paper has it.

    Parameters
    ----------
    stream : LayerStream
        With the new weights committed; calibration rows or held-out ones.

    Notes
    -----
    One pass over the data a layer that can be retrained.

    References
    ----------
    Dong, Chen, Pan, L-OBS (2017), theorems 3.2 and 5.1 (supplement).
    """
    specs = [spec for spec in stream.layers if spec.reason is None]
    layers = tuple(_layer_deviation(stream, spec) for spec in specs)
    totals: dict[Norm, float | None] = {}
    reason = None
    norms: tuple[Norm, ...] = ("spectral", "frobenius")
    for norm in norms:
        total: float | None = 0.0
        for entry in layers:
            if entry.layer_error == 0:
                continue
            gain = stream.gain(entry.name, norm=norm)
            if gain.value is None:
                total, reason = None, f"{entry.name}: {gain.reason}"
                break
            total = (total or 0.0) + entry.layer_error * gain.value
        totals[norm] = total
    outputs = deviation(stream)
    for norm, total in totals.items():
        if total:
            totals[norm] = total + outputs.rounding
    return SecondOrderBounds(
        outputs.rows, outputs.measured, totals["spectral"], totals["frobenius"], reason, layers
    )


def _layer_deviation(stream: LayerStream, spec: LayerSpec) -> LayerDeviation:
    """Measure a layer in float64; groups add their squares."""
    sums = np.zeros(5)
    for group in range(spec.groups):
        new = stream.weight(spec.name, group)
        xp = array_namespace(new)
        new = xp.astype(new, xp.float64)
        change = new - xp.astype(stream.weight(spec.name, group, dense=True), xp.float64)
        error = moved = apart = 0.0
        for batch in stream.batches(spec.name, group):
            dense = xp.astype(batch.dense_inputs, xp.float64)
            current = xp.astype(batch.inputs, xp.float64)
            response = activate(spec.follows, dense @ new)
            accumulated = activate(spec.follows, current @ new)
            error += float(xp.sum((dense @ change) ** 2))
            moved += float(xp.sum((current - dense) ** 2))
            apart += float(xp.sum((accumulated - response) ** 2))
        rows = to_numpy(new)[: spec.shape[0]]
        squares = [float(np.linalg.norm(rows, 2)) ** 2, float(np.linalg.norm(rows)) ** 2]
        sums += [error, moved, apart, moved * squares[0], moved * squares[1]]
    error, moved, apart, spectral, frobenius = (math.sqrt(value) for value in sums)
    return LayerDeviation(
        spec.name, error, moved, apart, spectral * _ROUNDING, frobenius * _ROUNDING
    )
