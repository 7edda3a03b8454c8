"""How far a retrained network's outputs can have moved: the theorems' bounds as numbers.

For a network as it is, with biases and without link normalisation: let e_j be layer j's discrepancy
on the dense inputs,

    e_j = |act(Y^(j-1) What_j + b_j) - Y^(j)|_F .

ReLU is 1-Lipschitz, so replacing the layers one after the other from the last to the first gives

    |Yhat^(L) - Y^(L)|_F  <=  sum_j e_j gain_j,        gain_j = prod_{k>j} |What_k|_2            (*)

with spectral norms of the weights without bias rows (`LayerStream.gain` knows other layers too).
The cascade has a second, direct bound, which does not add up: its last program holds on the
retrained inputs, so on its own rows

    |Yhat^(L) - Y^(L)|_F  <=  sqrt(epsilon_L^2 + |max(V, 0) off Omega|_F^2).                    (**)

The papers' own forms, on link-normalised networks (Net-Trim) and with Frobenius norms (L-OBS), are
functions here too.

The theorems speak of exact arithmetic; what is measured comes from networks computed with unit
roundoff u (6e-8 in float32). Rounding errors of a layer of n inputs add up to about sqrt(n) u of
its response (Higham and Mary, 2019: with high probability, for errors of mean zero), so both bounds
of a changed network are widened by 2 sqrt(n) u L |Y|_F, n the largest layer's inputs, L the number
of layers, for the two networks that are compared.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from array_api_compat import array_namespace

from retrain.chain import Chain, activate
from retrain.layer_report import LayerReport
from retrain.stream import LayerStream, Norm, changed, layer
from solvers.arrays import to_numpy


@dataclass(frozen=True)
class OutputBound:
    """A bound on |Yhat - Y|_F of the network's outputs beside what was measured, on one data set.

    Attributes
    ----------
    rows : int
        Samples.
    measured : float
        |Yhat - Y|_F of the outputs.
    relative : float
        The same over |Y|_F.
    bound : float or None
        The sum (*), None where some layer has no finite gain.
    direct : float or None
        (**), None where it does not apply.
    rounding : float
        What both bounds contain for the arithmetic of the two networks.
    reason : str or None
        Why a bound is None.
    discrepancies, gains : dict
        e_j and gain_j by layer name.
    """

    rows: int
    measured: float
    relative: float
    bound: float | None
    direct: float | None
    rounding: float
    reason: str | None
    discrepancies: dict[str, float]
    gains: dict[str, float | None]

    @property
    def best(self) -> float | None:
        """The smaller of the bounds there are."""
        known = [value for value in (self.bound, self.direct) if value is not None]
        return min(known) if known else None

    @property
    def ratio(self) -> float | None:
        """The best bound over the measured deviation: 1 would be exact."""
        if self.best is None:
            return None
        if self.measured == 0:
            return 1.0 if self.best == 0 else math.inf
        return self.best / self.measured

    def to_json(self) -> dict[str, Any]:
        """Return the fields, the best bound and the ratio as JSON values."""
        ratio = self.ratio
        finite = None if ratio is None or math.isinf(ratio) else ratio
        return {**asdict(self), "best": self.best, "ratio": finite}

    @staticmethod
    def from_json(record: dict[str, Any]) -> OutputBound:
        """Read what `to_json` gave."""
        return OutputBound(**{name: record[name] for name in OutputBound.__dataclass_fields__})


def discrepancy(stream: LayerStream, name: str) -> float:
    """Measure e_j of one layer: its activated response on the dense inputs, new against old.

    All rows the layer has on the stream's data are used, batch by batch, summed in float64.
    """
    spec = layer(stream, name)
    square = 0.0
    for group in range(spec.groups):
        weight = stream.weight(name, group)
        for batch in stream.batches(name, group):
            xp = array_namespace(batch.responses)
            new = activate(spec.follows, batch.dense_inputs @ weight)
            change = new - activate(spec.follows, batch.responses)
            square += float(xp.sum(change * change, dtype=xp.float64))
    return math.sqrt(square)


@dataclass(frozen=True)
class Deviation:
    """What came of a network's outputs: |Yhat - Y|_F, |Y|_F, samples, and rounding (see above)."""

    measured: float
    size: float
    rows: int
    rounding: float


def deviation(stream: LayerStream) -> Deviation:
    """Measure how far the current network's outputs are from the given one's."""
    change, size, rows, roundoff = 0.0, 0.0, 0, 0.0
    for dense, current in zip(stream.outputs(dense=True), stream.outputs(dense=False), strict=True):
        xp = array_namespace(dense)
        difference = current - dense
        change += float(xp.sum(difference * difference, dtype=xp.float64))
        size += float(xp.sum(dense * dense, dtype=xp.float64))
        rows += dense.shape[0]
        roundoff = float(xp.finfo(dense.dtype).eps) / 2
    widest = max(spec.shape[0] for spec in stream.layers)
    rounding = 2 * math.sqrt(widest) * roundoff * len(stream.layers) * math.sqrt(size)
    return Deviation(math.sqrt(change), math.sqrt(size), rows, rounding)


def output_bound(
    stream: LayerStream, *, direct: float | None = None, norm: Norm = "spectral"
) -> OutputBound:
    """Bound (*) and the measured deviation of a retrained network on the stream's data.

    Parameters
    ----------
    stream : LayerStream
        With the new weights committed.
    direct : float, optional
        (**), from `cascade_bound`; it holds on the calibration rows only.
    norm : {"spectral", "frobenius"}
        Of the gains. Theorem 3.2 of L-OBS has Frobenius norms, which are looser.

    Notes
    -----
    Costs one pass over the data a layer. Layers that did not change contribute 0 and are not
    measured.
    """
    errors: dict[str, float] = {}
    gains: dict[str, float | None] = {}
    total: float | None = 0.0
    reason = None
    for spec in stream.layers:
        if spec.reason is not None or not changed(stream, spec):
            continue
        errors[spec.name] = discrepancy(stream, spec.name)
        gain = stream.gain(spec.name, norm=norm)
        gains[spec.name] = gain.value
        if gain.value is None:
            total, reason = None, f"{spec.name}: {gain.reason}"
        elif total is not None:
            total += errors[spec.name] * gain.value
    moved = deviation(stream)
    rounding = moved.rounding if errors else 0.0
    return OutputBound(
        rows=moved.rows,
        measured=moved.measured,
        relative=moved.measured / moved.size if moved.size > 0 else 0.0,
        bound=None if total is None else total + rounding,
        direct=None if direct is None else direct + rounding,
        rounding=rounding,
        reason=reason,
        discrepancies=errors,
        gains=gains,
    )


def cascade_bound(stream: LayerStream, reports: Sequence[LayerReport]) -> float | None:
    """(**) for a finished cascade, widened by what the certificate lets the last layer violate.

    ``sqrt((epsilon (1 + ball violation))^2 + (|max(V, 0)| + ceiling violation)^2)``. None unless
    the network's last layer was retrained, certified, by the constrained form and on all its rows,
    and its activated response is the network's output (its gain is 1 because nothing follows).
    """
    if not stream.layers:
        return None
    last = stream.layers[-1].name
    report = next((entry for entry in reports if entry.name == last), None)
    if report is None or not report.certified or report.rows != report.total_rows:
        return None
    details = report.details
    if details.get("scheme") != "cascade" or details.get("form") != "constrained":
        return None
    output_rows = sum(batch.shape[0] for batch in stream.outputs(dense=True))
    if report.kind != "linear" or output_rows != report.rows or stream.gain(last).value != 1.0:
        return None
    fitted = details["epsilon"] * (1 + details["ball_violation"])
    above = details["ceiling_norm"] + details["ceiling_violation"] * details["target_norm"]
    return math.hypot(fitted, above)


def theorem_1(epsilons: Sequence[float]) -> np.ndarray:
    """Bound of theorem 1 for every layer of a link-normalised network: sum of epsilon_j, j <= l.

    Parameters
    ----------
    epsilons : sequence of float, length L
        Radii of the parallel programs (5).

    Returns
    -------
    ndarray, shape (L,)
        Bounds on |Yhat^(l) - Y^(l)|_F. For equal radii the last is the corollary's L epsilon.

    Notes
    -----
    The proof needs |What_l|_1 <= 1 for every retrained layer (`check_link_normalised`), which the
    l1 programs give and others need not.

    References
    ----------
    Aghasi et al., Net-Trim (2017), theorem 1 and the display after it.
    """
    return np.cumsum(np.asarray(epsilons, dtype=np.float64))


def theorem_2(epsilon: float, inflations: Sequence[float]) -> np.ndarray:
    """Bound of theorem 2 for every layer: epsilon_1 times the root of the product of gamma_j.

    Parameters
    ----------
    epsilon : float
        Radius of the first layer's program.
    inflations : sequence of float, length L - 1
        gamma_2, ..., gamma_L of (7), each >= 1.

    Returns
    -------
    ndarray, shape (L,)
        Bounds on |Yhat^(l) - Y^(l)|_F. For equal inflations the last is the corollary's
        gamma^((L-1)/2) epsilon.

    Raises
    ------
    ValueError
        If an inflation is below 1.

    References
    ----------
    Aghasi et al., Net-Trim (2017), theorem 2 and the display before section 4.
    """
    rates = np.asarray(inflations, dtype=np.float64)
    if np.any(rates < 1):
        raise ValueError(f"inflations: want every rate >= 1, got {rates.min():g}")
    return epsilon * np.sqrt(np.concatenate([[1.0], np.cumprod(rates)]))


def check_link_normalised(chain: Chain, *, slack: float = 1e-6) -> list[str]:
    """List the layers whose entry-wise norm |W_l|_1 exceeds 1: theorem 1's premise fails there.

    Parameters
    ----------
    chain : Chain
        A retrained, link-normalised network.
    slack : float
        For a solver's tolerance and rounding.
    """
    broken = []
    for index, weight in enumerate(chain.weights):
        rows = to_numpy(weight).astype(np.float64)
        size = np.abs(rows[:-1] if chain.biases[index] else rows).sum()
        if size > 1 + slack:
            broken.append(f"layer {index}: |W|_1 = {size:.6g}")
    return broken


def l_obs_bound(errors: Sequence[float], norms: Sequence[float]) -> float:
    """Theorem 3.2 of L-OBS: sum over h < L of prod_{k>h} |What_k| sqrt(dE^h), plus sqrt(dE^L).

    Parameters
    ----------
    errors : sequence of float, length L
        sqrt(dE^h), the root mean squared layer errors on the dense inputs.
    norms : sequence of float, length L
        Norms of the retrained weights, spectral or, as in the paper, Frobenius.

    Returns
    -------
    float
        Bound on (1/sqrt n) |Yhat^(L) - Y^(L)|_F.

    References
    ----------
    Dong, Chen, Pan, L-OBS (2017), theorem 3.2 (supplement); the display before its last line has
    its indices off by one.
    """
    if len(errors) != len(norms):
        raise ValueError(f"norms: want {len(errors)}, one a layer, got {len(norms)}")
    total = 0.0
    for error, norm in zip(errors, norms, strict=True):
        # Horner: each layer multiplies what came before it by its norm and adds its own error.
        total = total * norm + error
    return total
