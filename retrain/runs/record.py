"""What `run.json` of a finished run holds, as types: whoever reads one has it checked first."""

from __future__ import annotations

from typing import Any, Literal

import msgspec
from msgspec import UNSET, UnsetType

from retrain.bounds.outputs import OutputBound
from retrain.files import Count, Positive, read_as
from retrain.stream.layer_report import LayerReport


class Totals(msgspec.Struct, frozen=True):
    """Sums over the retrained layers."""

    weights: Positive
    zeros_before: Count
    zeros: Count
    sparsity: float
    certified: bool
    solve_seconds: float


class Accuracy(msgspec.Struct, frozen=True):
    """Shares of samples classified rightly; `reason` says why there are none."""

    before: float | None
    after: float | None
    fine_tuned: float | None = None
    labels: str | None = None
    reason: str | None = None


class Left(msgspec.Struct, frozen=True):
    """A layer that was not retrained."""

    name: str
    kind: str
    reason: str


class ChainModel(msgspec.Struct, frozen=True, tag_field="kind", tag="chain"):
    """How a chain of arrays is built again."""

    biases: list[bool]
    follows: list[Literal["relu", "linear"]]


class Dense(msgspec.Struct, frozen=True):
    """A layer of a chain that was read off the shapes in a file."""

    name: str
    shape: tuple[Positive, Positive]
    bias: bool
    dtype: Literal["torch.float16", "torch.bfloat16", "torch.float32", "torch.float64"]
    activation: str


class ModuleModel(msgspec.Struct, frozen=True, tag_field="kind", tag="module"):
    """How a torch module is built again."""

    names: dict[str, str]
    plain: bool
    path: str | None = None
    note: str = ""
    description: dict[str, Any] | None = None
    dense_layers: list[Dense] = []


class Theorem(msgspec.Struct, frozen=True):
    """Theorem 3.2 of L-OBS in numbers."""

    rows: Positive
    measured: float | None
    spectral: float | None
    frobenius: float | None
    reason: str | None
    defect: str | None = None

    def __post_init__(self) -> None:
        if (self.spectral is None) != (self.frobenius is None):
            raise ValueError("want spectral and frobenius together")


class Tried(msgspec.Struct, frozen=True):
    """A trial of a search for one epsilon."""

    relative_epsilon: float
    zeros: Count
    weights: Positive
    drop: float | None
    certified: bool
    seconds: float


class Asked(msgspec.Struct, frozen=True):
    """What was searched for: a sparsity, or a drop of accuracy."""

    sparsity: float | UnsetType = UNSET
    zeros: Count | UnsetType = UNSET
    max_drop: float | UnsetType = UNSET


class Got(msgspec.Struct, frozen=True):
    """What was found."""

    sparsity: float
    zeros: Count | UnsetType = UNSET
    drop: float | UnsetType | None = UNSET


class Search(msgspec.Struct, frozen=True):
    """A search for one epsilon."""

    asked: Asked
    got: Got
    met: bool
    relative_epsilon: float
    chosen: Positive
    trials: list[Tried]

    def __post_init__(self) -> None:
        of_sparsity = UNSET not in (self.asked.sparsity, self.asked.zeros, self.got.zeros)
        of_drop = UNSET not in (self.asked.max_drop, self.got.drop)
        if of_sparsity == of_drop or (of_drop and self.asked.sparsity is not UNSET):
            raise ValueError("want a sparsity and its zeros, or a drop, asked for and got")


class Stage(msgspec.Struct, frozen=True):
    """One stage of an iterative run."""

    totals: Totals
    accuracy: dict[str, Accuracy]


class RunRecord(msgspec.Struct, frozen=True):
    """The record of a finished retraining run, but for `layers` and `bounds`."""

    state: Literal["finished"]
    method: str
    identity: dict[str, Any]
    model: ChainModel | ModuleModel
    layers: list[dict[str, Any]]
    bounds: dict[str, dict[str, Any]]
    totals: Totals
    accuracy: dict[str, Accuracy]
    left: list[Left]
    options: dict[str, Any]
    seconds: float
    theorems: dict[str, Theorem] = {}
    search: Search | None = None
    stages: list[Stage] = []


class Checked(msgspec.Struct, frozen=True):
    """What a finished run's record says, in types."""

    record: RunRecord
    layers: tuple[LayerReport, ...]
    bounds: dict[str, OutputBound]


def check_finished(record: dict[str, Any], what: str) -> Checked:
    """Check the record of a finished retraining run.

    Parameters
    ----------
    record : dict
        As `retrain.runs.directory.read_record` gives it.
    what : str
        How messages begin: ``run: DIR/run.json``.

    Raises
    ------
    ValueError
        If an entry is missing or of another type, or there is no bound on the calibration data.
    """
    try:
        checked = read_as(RunRecord, record, what)
        reports = tuple(
            LayerReport.from_json(entry, what, f"layers[{number}]")
            for number, entry in enumerate(checked.layers)
        )
        bounds = {
            name: read_as(OutputBound, entry, what, f"bounds.{name}")
            for name, entry in checked.bounds.items()
        }
        if "calibration" not in bounds:
            raise ValueError(f"{what}: `bounds`: lacks `calibration`")
    except ValueError as error:
        raise ValueError(f"{error}; repeat its command") from error
    return Checked(checked, reports, bounds)
