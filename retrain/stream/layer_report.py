"""The report of each retrained layer, as a run and its record hold it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from retrain.files import Count, Positive, read_as
from retrain.stream.details import Details, NetTrimDetails, details_from_json
from retrain.stream.stream import Array
from solvers.result import Status

_STATUSES = tuple(status.value for status in Status)  # valid values of a report's status


@dataclass(frozen=True)
class LayerReport:
    """Outcome of one layer, in plain numbers, as `run.json` holds it.

    Attributes
    ----------
    name, kind : str
        Name and kind of the layer, as in `retrain.stream.stream.LayerSpec`.
    shape : tuple of int
        (n_in, n_out) of one group, without the bias row.
    follows : {"relu", "linear"}
        Operation after the response.
    method : str
        Method that retrained it: ``"net-trim"`` or ``"lobs"``.
    weights, zeros_before, zeros : int
        Number of prunable weights, and of those that are exactly zero before and after.
    rows, total_rows : int
        Number of rows that the solve (and its certificate) used, and that the layer has on the
        data.
    status : Status
        How the solve ended, the worst over groups.
    certified : bool
        Whether the saved weights meet the certificate asked for.
    dense_units : int
        Number of units that kept their dense weights because the new ones were not certified.
    error, relative_error : float
        |activated response - target|_F over the rows used, absolute and relative to the targets.
    seconds : float
        Wall time of stating and solving.
    details : Details
        Figures of the method (`retrain.stream.details`); `PlainDetails` for a method of one's own.
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
    status: Status
    certified: bool
    dense_units: Count
    error: float
    relative_error: float
    seconds: float
    details: Details

    @property
    def all_units(self) -> int:
        """Units of all groups."""
        return self.weights // self.shape[0]

    @property
    def sparsity(self) -> float:
        """Share of the prunable weights that are exactly zero."""
        return self.zeros / self.weights

    def to_json(self) -> dict[str, Any]:
        """Return the fields, and the sparsity, as JSON values.

        Returns
        -------
        dict
            JSON values of all fields, and ``sparsity``.
        """
        return {
            **{entry.name: getattr(self, entry.name) for entry in fields(self)},
            "shape": list(self.shape),
            "status": self.status.value,
            "details": self.details.to_json(),
            "sparsity": self.sparsity,
        }

    def check_certificate(self) -> None:
        """Check that a certified layer has the figures that the run's direct bound needs.

        Raises
        ------
        ValueError
            If one is missing, as in a record of an older version.
        """
        details = self.details
        if not isinstance(details, NetTrimDetails) or details.form != "constrained":
            return
        for name in ("epsilon", "residual", "ceiling_norm", "over"):
            value = getattr(details, name)
            if self.certified and (value is None or math.isnan(value)):
                raise ValueError(f"its report: `details`: lacks `{name}`")

    @staticmethod
    def from_json(record: Any, what: str = "layer report", at: str = "") -> LayerReport:
        """Read the record that `to_json` returned.

        Parameters
        ----------
        record : object
            JSON values.
        what : str
            Beginning of messages, as for `retrain.files.read_as`.
        at : str
            Place of the record in what was read: ``layers[3]``.

        Returns
        -------
        LayerReport
            Report of the layer.

        Raises
        ------
        ValueError
            If a field is missing, of another type, or contradicts another.
        """
        said = record.get("status") if isinstance(record, Mapping) else None
        if isinstance(said, str) and said not in _STATUSES:
            raise ValueError(
                f"{what}: `{f'{at}.' if at else ''}status`: got {said!r:.80}, want one of "
                f"{', '.join(_STATUSES)}"
            )
        if isinstance(record, Mapping) and {"method", "details"} <= record.keys():
            place = f"{at}.details" if at else "details"
            details = details_from_json(str(record["method"]), record["details"], what, place)
            record = {**record, "details": details}
        report = read_as(LayerReport, record, what, at)
        if report.zeros > report.weights or report.zeros_before > report.weights:
            raise ValueError(f"{what}: `{at or 'zeros'}`: has more zeros than weights")
        return report


@dataclass(frozen=True, eq=False)
class LayerResult:
    """A layer's new weights, as they were committed, and their report.

    Attributes
    ----------
    weights : sequence of array, shape (n_in [+ 1], n_out) each
        Weight matrix per group.
    report : LayerReport
        Report of the layer.
    """

    weights: Sequence[Array]
    report: LayerReport
