"""What a run knows of each layer it retrained."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

from retrain.stream import Array


@dataclass(frozen=True)
class LayerReport:
    """Outcome of one layer, in plain numbers, as `run.json` holds it.

    Attributes
    ----------
    name, kind, shape, follows
        As in `retrain.stream.LayerSpec`.
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
    shape: tuple[int, int]
    follows: str
    method: str
    weights: int
    zeros_before: int
    zeros: int
    rows: int
    total_rows: int
    status: str
    certified: bool
    dense_units: int
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

    @staticmethod
    def from_json(record: dict[str, Any]) -> LayerReport:
        """Read what `to_json` gave.

        Raises
        ------
        ValueError
            If a field is missing or of another type.
        """
        if not isinstance(record, dict):
            raise ValueError(f"layer report: want named fields, got a {type(record).__name__}")
        missing = [entry.name for entry in fields(LayerReport) if entry.name not in record]
        if missing:
            raise ValueError(f"layer report: lacks {', '.join(missing)}")
        values: dict[str, Any] = {}
        for entry in fields(LayerReport):
            value = record[entry.name]
            if entry.type == "float" and value is None:
                value = math.nan  # which JSON cannot hold
            if not _is_of(value, str(entry.type)):
                raise ValueError(f"layer report: {entry.name}: want {entry.type}, got {value!r}")
            values[entry.name] = tuple(value) if entry.name == "shape" else value
        return LayerReport(**values)


def _is_of(value: Any, annotation: str) -> bool:
    """Whether a JSON value is of a field's type; true and false are no numbers."""
    if annotation == "tuple[int, int]":
        return isinstance(value, list) and [type(size) for size in value] == [int, int]
    kinds: dict[str, tuple[type, ...]] = {
        "str": (str,),
        "int": (int,),
        "float": (int, float),
        "bool": (bool,),
        "dict[str, Any]": (dict,),
    }
    return type(value) in kinds[annotation]


@dataclass(frozen=True, eq=False)
class LayerResult:
    """A layer's new weights, one matrix a group, as they were committed, and their report."""

    weights: Sequence[Array]
    report: LayerReport
