"""Bounds on the change of a retrained network's outputs: the theorems as numbers.

For a network with biases and without link normalisation, let e_j be layer j's discrepancy
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

**Rounding.** The theorems assume exact arithmetic, while the networks compute in float32 or
float64. So e_j is measured in float64, the networks' outputs in their own dtype are compared with
those in float64, and the rounding of float64 itself is bounded at every node of the graph and
multiplied by the node's gain (`retrain.adapters.network.passage` has the sums). `Passage.rounding`
is the total, by which both bounds are widened; they then hold for the exact networks and for the
computed ones. Where a value overflows, or a node's gain is not available, there is no bound.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from array_api_compat import array_namespace

from retrain.files import read_as
from retrain.stream.chain import Chain, activate
from retrain.stream.details import NetTrimDetails
from retrain.stream.layer_report import LayerReport
from retrain.stream.stream import LayerStream, Norm, Passage, layer
from solvers.arrays import norm as frobenius
from solvers.arrays import to_numpy

SUMS = 1 + 1e-9
"""Factor by which every bound is enlarged for the rounding of its own computation in float64.
Derived: a sum of n terms loses at most n 2^-53 relative, which is 1e-9 for nine million terms, and
far less in practice. A smaller factor could print a bound below the true one; a
larger one loosens the bounds."""


@dataclass(frozen=True)
class Direct:
    """The bound (**), before rounding, or the reason why there is none.

    Attributes
    ----------
    value : float or None
        Bound on |Yhat - Y|_F of the outputs.
    reason : str or None
        Why `value` is None.
    """

    value: float | None
    reason: str | None


def below(name: str, bound: float, measured: float) -> str | None:
    """Describe a bound that is below the measured deviation, which is a defect of this package.

    Parameters
    ----------
    name : str
        Name of the bound in the message.
    bound : float
        Bound.
    measured : float
        Measured deviation, in the same unit.

    Returns
    -------
    str or None
        Message; None where the bound holds or the measured value is NaN.
    """
    if bound >= measured or math.isnan(measured):  # a value overflowed: there is no bound then
        return None
    return (
        f"{name}, {bound:.6g}, is below the measured deviation, {measured:.6g}: a defect of this "
        "package; nothing is proven, please report it"
    )


NO_DIRECT = Direct(None, "only the calibration rows of a constrained cascade have one")
"""The absent direct bound of every other method, form and data set."""


@dataclass(frozen=True)
class OutputBound:
    """A bound on |Yhat - Y|_F of the network's outputs beside what was measured, on one data set.

    Attributes
    ----------
    rows : int
        Number of samples.
    measured : float
        |Yhat - Y|_F of the outputs.
    relative : float
        The same over |Y|_F.
    bound : float or None
        The sum (*), None where some layer has no finite gain.
    direct : float or None
        (**), None where it does not apply.
    rounding : float or None
        Allowance in both bounds for the arithmetic of the two networks; None where it has no bound.
    reason, direct_reason : str or None
        Why `bound` and `direct` are None.
    discrepancies, gains : dict from str to float
        e_j and gain_j by layer name; a gain is None where it is not finite.
    """

    rows: int
    measured: float
    relative: float
    bound: float | None
    direct: float | None
    rounding: float | None
    reason: str | None
    discrepancies: dict[str, float]
    gains: dict[str, float | None]
    direct_reason: str | None = None

    @property
    def defect(self) -> str | None:
        """The first bound that is below the measured deviation, in words; None as it should be."""
        named = (("the direct bound", self.direct), ("the sum over layers", self.bound))
        found = [below(name, value, self.measured) for name, value in named if value is not None]
        return next((text for text in found if text is not None), None)

    @property
    def best(self) -> float | None:
        """The smallest available bound; None without one, or where one is a defect."""
        known = [value for value in (self.bound, self.direct) if value is not None]
        return min(known) if known and self.defect is None else None

    @property
    def ratio(self) -> float | None:
        """The best bound over the measured deviation: 1 would be exact."""
        if self.best is None:
            return None
        if self.measured == 0:
            return 1.0 if self.best == 0 else math.inf
        return self.best / self.measured

    def to_json(self) -> dict[str, Any]:
        """Return the fields, the best bound, the ratio and the defect as JSON values.

        Returns
        -------
        dict
            JSON values of all fields, ``best``, ``ratio`` (None where it is infinite) and
            ``defect``.
        """
        ratio = self.ratio
        finite = None if ratio is None or math.isinf(ratio) else ratio
        return {**asdict(self), "best": self.best, "ratio": finite, "defect": self.defect}

    @staticmethod
    def from_json(record: dict[str, Any]) -> OutputBound:
        """Read the record that `to_json` returned; entries that older records lack become None.

        Parameters
        ----------
        record : dict
            JSON values.

        Returns
        -------
        OutputBound
            Bound and measured deviation.

        Raises
        ------
        ValueError
            If an entry is missing or of another type.
        """
        return read_as(OutputBound, record, "output bound")


def discrepancy(stream: LayerStream, name: str) -> float:
    """Measure e_j of one layer from its rows: new against dense response on the dense inputs.

    Parameters
    ----------
    stream : LayerStream
        Network with the new weights committed, and the data.
    name : str
        Name of the layer.

    Returns
    -------
    float
        e_j in float64.

    Notes
    -----
    Cost: one pass of the data up to the layer. `LayerStream.passage` measures the same for all
    layers at once.
    """
    spec = layer(stream, name)
    total = 0.0
    for group in range(spec.groups):
        weight = stream.weight(spec.name, group)
        xp = array_namespace(weight)
        wide = xp.astype(weight, xp.float64)
        for batch in stream.batches(name, group):
            new = activate(spec.follows, xp.astype(batch.dense_inputs, xp.float64) @ wide)
            old = activate(spec.follows, xp.astype(batch.responses, xp.float64))
            total = math.hypot(total, frobenius(new - old))
    return total


def output_bound(
    stream: LayerStream,
    *,
    passage: Passage | None = None,
    direct: Direct = NO_DIRECT,
    norm: Norm = "spectral",
) -> OutputBound:
    """Bound (*) and the measured deviation of a retrained network on the stream's data.

    Parameters
    ----------
    stream : LayerStream
        Network with the new weights committed, and the data.
    passage : Passage, optional
        Result of `LayerStream.passage` for the current weights; computed where it is not given.
    direct : Direct
        (**), from `cascade_bound`; it holds on the calibration rows only.
    norm : {"spectral", "frobenius"}
        Norm of the gains. Theorem 3.2 of L-OBS has Frobenius norms, which are looser.

    Returns
    -------
    OutputBound
        Bounds, with their reasons where they are None, and the measured deviation.

    Notes
    -----
    Cost: one `LayerStream.passage` over the data where none is given, and one norm per layer.

    References
    ----------
    Aghasi et al., Net-Trim (2017), theorems 1 and 2, without link normalisation; Dong, Chen, Pan,
    L-OBS (2017), theorem 3.2, with the error taken after the activation.
    """
    if passage is None:
        passage = stream.passage()
    gains = {name: stream.gain(name, norm=norm) for name in passage.discrepancies}
    reasons = [f"{name}: {gain.reason}" for name, gain in gains.items() if gain.value is None]
    total = sum(
        passage.discrepancies[name] * gain.value
        for name, gain in gains.items()
        if gain.value is not None
    )
    bound = None if reasons else widened(total, passage)
    if bound is None and not reasons:
        reasons = [unbounded(passage)]
    exact = None if direct.value is None else widened(direct.value, passage)
    reason = unbounded(passage) if exact is None and direct.reason is None else direct.reason
    return OutputBound(
        rows=passage.rows,
        measured=passage.measured,
        relative=passage.measured / passage.size if passage.size > 0 else 0.0,
        bound=bound,
        direct=exact,
        rounding=passage.rounding,
        reason=reasons[0] if reasons else None,
        discrepancies=passage.discrepancies,
        gains={name: gain.value for name, gain in gains.items()},
        direct_reason=reason,
    )


def widened(bound: float, passage: Passage) -> float | None:
    """Add the allowance for rounding to a bound.

    Parameters
    ----------
    bound : float
        Bound for exact arithmetic.
    passage : Passage
        Passage that has the allowance.

    Returns
    -------
    float or None
        Widened bound; None where the allowance or the result is not finite.
    """
    if passage.rounding is None or not math.isfinite(passage.measured):
        return None
    total = (bound + passage.rounding) * SUMS
    return total if math.isfinite(total) else None


def unbounded(passage: Passage) -> str:
    """Say why `widened` returns None.

    Parameters
    ----------
    passage : Passage
        Passage that has the allowance.

    Returns
    -------
    str
        Reason.
    """
    if passage.reason is not None:
        return passage.reason
    return "the outputs, or a bound on them, overflow"


def cascade_bound(stream: LayerStream, reports: Sequence[LayerReport]) -> Direct:
    """Compute (**) for a finished cascade, including what the last layer's saved weights violate.

    ``sqrt(max(epsilon, residual)^2 + (|max(V, 0)| + over)^2)``, `residual` the fitted entries'
    distance from the targets and `over` what lies above the ceilings, both measured in float64.

    The bound needs the output to be the last retrained layer's activated response and nothing else
    (`LayerStream.output_layer`): the contribution of every other layer then passes through this
    one, on whose current inputs its program was solved. It also needs that layer to be retrained,
    certified, by the constrained form and on all its rows.

    Parameters
    ----------
    stream : LayerStream
        Network with the new weights committed, on the calibration data.
    reports : sequence of LayerReport
        Reports of the retrained layers.

    Returns
    -------
    Direct
        Bound, or the reason why it does not apply.

    References
    ----------
    Aghasi et al., Net-Trim (2017), program (6) and Algorithm 2: the last program's constraints.
    """
    name, reason = stream.output_layer()
    if name is None:
        return Direct(None, reason)
    report = next((entry for entry in reports if entry.name == name), None)
    if report is None:
        return Direct(None, f"{name}, whose response is the output, was not retrained")
    details = report.details
    if not isinstance(details, NetTrimDetails) or details.scheme != "cascade":
        return NO_DIRECT
    if details.form != "constrained":
        return NO_DIRECT
    if not report.certified:
        return Direct(None, f"{name}, whose response is the output, is not certified")
    if report.rows != report.total_rows:
        return Direct(
            None, f"{name} was solved on {report.rows} of its {report.total_rows} rows only"
        )
    if details.residual is None or details.ceiling_norm is None or details.over is None:
        return Direct(None, f"{name}: its report is of an older version")
    fitted = max(details.epsilon, details.residual)
    return Direct(math.hypot(fitted, details.ceiling_norm + details.over), None)


def theorem_1(epsilons: Sequence[float]) -> np.ndarray:
    """Bound of theorem 1 for every layer of a link-normalised network: sum of epsilon_j, j <= l.

    Parameters
    ----------
    epsilons : sequence of float, length L
        Radii of the parallel programs (5), in the unit of the link-normalised outputs.

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
        Radius of the first layer's program, in the unit of the link-normalised outputs.
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
        raise ValueError(f"inflations: got {rates.min():g}, want every rate >= 1")
    return epsilon * np.sqrt(np.concatenate([[1.0], np.cumprod(rates)]))


def check_link_normalised(chain: Chain, *, slack: float = 1e-6) -> list[str]:
    """List the layers whose entry-wise norm |W_l|_1 exceeds 1: theorem 1's premise fails there.

    Parameters
    ----------
    chain : Chain
        Retrained, link-normalised network.
    slack : float
        Excess over 1 that is accepted, for a solver's tolerance and rounding. Dimensionless.

    Returns
    -------
    list of str
        One text per layer that exceeds the norm; empty where the premise holds.

    References
    ----------
    Aghasi et al., Net-Trim (2017), theorem 1.
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

    Raises
    ------
    ValueError
        If the two lengths differ.

    References
    ----------
    Dong, Chen, Pan, L-OBS (2017), theorem 3.2 (supplement); the display before its last line has
    its indices off by one.
    """
    if len(errors) != len(norms):
        raise ValueError(f"norms: got {len(norms)}, want {len(errors)}, one a layer")
    total = 0.0
    for error, norm in zip(errors, norms, strict=True):
        # Horner: each layer multiplies what came before it by its norm and adds its own error.
        total = total * norm + error
    return total
