"""What a run knows of each layer it retrained."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import msgspec

from retrain.files import Count, Positive, Size, read_as
from retrain.stream.stream import Array
from solvers.result import Status

_STATUSES = tuple(status.value for status in Status)


@dataclass(frozen=True)
class LayerReport:
    """Outcome of one layer, in plain numbers, as `run.json` holds it.

    Attributes
    ----------
    name, kind, shape, follows
        As in `retrain.stream.stream.LayerSpec`.
    method : str
        What retrained it.
    weights, zeros_before, zeros : int
        Prunable weights, and how many of them were and are exactly zero.
    rows, total_rows : int
        Rows the solve (and its certificate) used, of all the layer has on the data.
    status : str
        `solvers.Status` value, the worst over groups.
    certified : bool
        Whether the saved weights meet the certificate asked for.
    dense_units : int
        Units that kept their old weights because theirs were not certified.
    error, relative_error : float
        |activated response - target|_F over the rows used, absolute and relative to the targets.
    seconds : float
        Wall time of stating and solving.
    details : dict
        Numbers of the method: epsilon, gap, violations, ... (JSON values only).
    """

    name: str
    kind: str
    shape: tuple[Positive, Positive]
    follows: str
    method: str
    weights: Positive
    zeros_before: Count
    zeros: Count
    rows: Count
    total_rows: Count
    status: str
    certified: bool
    dense_units: Count
    error: float
    relative_error: float
    seconds: float
    details: dict[str, Any]

    @property
    def all_units(self) -> int:
        """Units of all groups."""
        return self.weights // self.shape[0]

    @property
    def sparsity(self) -> float:
        """Share of the prunable weights that are exactly zero."""
        return self.zeros / self.weights

    def to_json(self) -> dict[str, Any]:
        """Return the fields, and the sparsity, as JSON values."""
        return {**asdict(self), "shape": list(self.shape), "sparsity": self.sparsity}

    def check_certificate(self) -> None:
        """Check that a certified layer has the numbers that the run's direct bound is made of.

        Raises
        ------
        ValueError
            If one is missing, as in a layer of an older version.
        """
        if not self.certified or self.details.get("form") != "constrained":
            return
        for name in ("epsilon", "residual", "ceiling_norm", "over"):
            if self.details.get(name) is None:
                raise ValueError(f"its report: `details`: lacks `{name}`")

    @staticmethod
    def from_json(record: Any, what: str = "layer report", at: str = "") -> LayerReport:
        """Read what `to_json` gave; `what` and `at` are as for `retrain.files.read_as`.

        Raises
        ------
        ValueError
            If a field is missing, of another type, or contradicts another.
        """
        report = read_as(LayerReport, record, what, at)
        place = f"{at}.details" if at else "details"
        if report.method == "lobs":
            read_as(_LobsDetails, report.details, what, place)
        else:
            read_as(_NetTrimDetails, report.details, what, place)
        if report.status not in _STATUSES:
            raise ValueError(
                f"{what}: `{f'{at}.' if at else ''}status`: got {report.status!r:.80}, want one of "
                f"{', '.join(_STATUSES)}"
            )
        if report.zeros > report.weights or report.zeros_before > report.weights:
            raise ValueError(f"{what}: `{at or 'zeros'}`: has more zeros than weights")
        return report


class _NetTrimDetails(msgspec.Struct, frozen=True):
    """Details of a Net-Trim layer that reports and bounds read."""

    scheme: str | None = None
    form: str | None = None
    epsilon: float | None = None
    relative_epsilon: float | None = None
    gap: float | None = None
    ball_violation: float | None = None
    ceiling_violation: float | None = None
    ceiling_norm: float | None = None
    residual: float | None = None
    over: float | None = None
    asked_zeros: Count | None = None
    asked_sparsity: float | None = None

    def __post_init__(self) -> None:
        if (self.asked_zeros is None) != (self.asked_sparsity is None):
            raise ValueError("want asked_zeros and asked_sparsity together")


class _LobsDetails(msgspec.Struct, frozen=True):
    """Details of an L-OBS layer that reports read."""

    method: str
    pattern: str
    rms_error: Size | None
    relative_layer_error: Size | None


@dataclass(frozen=True, eq=False)
class LayerResult:
    """A layer's new weights, one matrix a group, as they were committed, and their report."""

    weights: Sequence[Array]
    report: LayerReport
