"""What `run.json` of a finished run holds, as types: every reader has the file checked first."""

from __future__ import annotations

from typing import Any, Literal

import msgspec
from msgspec import UNSET, UnsetType

from retrain.bounds.outputs import OutputBound
from retrain.files import Count, Positive, read_as
from retrain.stream.layer_report import LayerReport


class Totals(msgspec.Struct, frozen=True):
    """Sums over the retrained layers.

    Attributes
    ----------
    weights : int
        Number of prunable weights.
    zeros_before, zeros : int
        Number of weights that are exactly zero in the dense and in the retrained network.
    sparsity : float
        Zeros over weights.
    certified : bool
        Whether every layer is certified.
    solve_seconds : float
        Wall time of stating and solving, in seconds.
    """

    weights: Positive
    zeros_before: Count
    zeros: Count
    sparsity: float
    certified: bool
    solve_seconds: float


class Accuracy(msgspec.Struct, frozen=True):
    """Shares of samples that are classified correctly.

    Attributes
    ----------
    before, after : float or None
        Accuracy in [0, 1] of the dense and of the retrained network; None without classes.
    fine_tuned : float or None
        Accuracy in [0, 1] after fine-tuning; None without it.
    labels : str or None
        Conversion of the labels, if there was one.
    reason : str or None
        Why there is no accuracy.
    """

    before: float | None
    after: float | None
    fine_tuned: float | None = None
    labels: str | None = None
    reason: str | None = None


class Left(msgspec.Struct, frozen=True):
    """A layer that was not retrained.

    Attributes
    ----------
    name, kind : str
        Name and kind of the layer, as in `LayerSpec`.
    reason : str
        Why it was not retrained.
    """

    name: str
    kind: str
    reason: str


class ChainModel(msgspec.Struct, frozen=True, tag_field="kind", tag="chain"):
    """How a chain of arrays is built again.

    Attributes
    ----------
    biases : list of bool
        Whether each layer has a bias row.
    follows : list of {"relu", "linear"}
        Activation after each layer.
    """

    biases: list[bool]
    follows: list[Literal["relu", "linear"]]


class Dense(msgspec.Struct, frozen=True):
    """A layer of a chain that was derived from the shapes in a file.

    Attributes
    ----------
    name : str
        Dotted name of the layer in the module.
    shape : tuple of int
        (n_in, n_out).
    bias : bool
        Whether it has a bias.
    dtype : str
        Torch's name of its dtype.
    activation : str
        Activation after it.
    """

    name: str
    shape: tuple[Positive, Positive]
    bias: bool
    dtype: Literal["torch.float16", "torch.bfloat16", "torch.float32", "torch.float64"]
    activation: str


class ModuleModel(msgspec.Struct, frozen=True, tag_field="kind", tag="module"):
    """How a torch module is built again.

    Attributes
    ----------
    names : dict from str to str
        Name in the file by name in the module, of every tensor.
    plain : bool
        Whether `retrain.adapters.files.load.load_model` can rebuild the network from its file
        alone.
    path : str or None
        File that the network was read from.
    note : str
        Assumptions that were made on reading that file.
    description : dict or None
        Architecture as `retrain.adapters.files.description` writes it; None where it cannot.
    dense_layers : list of Dense
        Layers of a chain that was derived from the shapes in a file; empty for other networks.
    hugging_face : bool
        Whether the run directory has a configuration from which transformers builds the network.
    factory : str or None
        ``package.module:factory`` that built the architecture; imported only when it is allowed.
    """

    names: dict[str, str]
    plain: bool
    path: str | None = None
    note: str = ""
    description: dict[str, Any] | None = None
    dense_layers: list[Dense] = []
    hugging_face: bool = False
    factory: str | None = None


class Theorem(msgspec.Struct, frozen=True):
    """Theorem 3.2 of L-OBS in numbers.

    Attributes
    ----------
    rows : int
        Number of samples.
    measured : float or None
        |Yhat - Y|_F of the outputs; None where it is not finite.
    spectral, frobenius : float or None
        Bounds of theorem 3.2 on it, with either norm.
    reason : str or None
        Why there is no bound.
    defect : str or None
        Message about a bound below the measured value; None as it should be.
    """

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
    """A trial of a search for one epsilon.

    Attributes
    ----------
    relative_epsilon : float
        Relative epsilon of the trial.
    zeros, weights : int
        Zeros and prunable weights of all retrained layers.
    drop : float or None
        Held-out accuracy lost, in percentage points.
    certified : bool
        Whether every layer is certified.
    seconds : float
        Wall time.
    """

    relative_epsilon: float
    zeros: Count
    weights: Positive
    drop: float | None
    certified: bool
    seconds: float


class Asked(msgspec.Struct, frozen=True):
    """Aim of a search: a sparsity, or a drop of accuracy.

    Attributes
    ----------
    sparsity : float
        Zeros over weights; absent in a search for a drop.
    zeros : int
        The same as a count; absent in a search for a drop.
    max_drop : float
        Held-out accuracy that may be lost, in percentage points; absent in a search for a sparsity.
    """

    sparsity: float | UnsetType = UNSET
    zeros: Count | UnsetType = UNSET
    max_drop: float | UnsetType = UNSET


class Got(msgspec.Struct, frozen=True):
    """Result of a search.

    Attributes
    ----------
    sparsity : float
        Zeros over weights of the chosen trial.
    zeros : int
        The same as a count; absent in a search for a drop.
    drop : float or None
        Held-out accuracy lost, in percentage points; absent in a search for a sparsity.
    """

    sparsity: float
    zeros: Count | UnsetType = UNSET
    drop: float | UnsetType | None = UNSET


class Search(msgspec.Struct, frozen=True):
    """A search for one epsilon.

    Attributes
    ----------
    asked : Asked
        Aim of the search.
    got : Got
        Result of the chosen trial.
    met : bool
        Whether the result meets the aim.
    relative_epsilon : float
        Relative epsilon of the chosen trial.
    chosen : int
        Number of the chosen trial, from 1.
    trials : list of Tried
        All trials in their order.
    """

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
    """One stage of an iterative run.

    Attributes
    ----------
    totals : Totals
        Sums over the layers of the stage.
    accuracy : dict from str to Accuracy
        Accuracies by data set.
    """

    totals: Totals
    accuracy: dict[str, Accuracy]


class RunRecord(msgspec.Struct, frozen=True):
    """The record of a finished retraining run (`check_finished` checks `layers` and `bounds`).

    Attributes
    ----------
    state : {"finished"}
        State of the run.
    method : str
        ``"net-trim"`` or ``"lobs"``.
    identity : dict
        Everything that could change a weight.
    model : ChainModel or ModuleModel
        Description from which the network is built again.
    layers : list of dict
        Report of each layer, as JSON values.
    bounds : dict from str to dict
        Output bound by data set, as JSON values.
    totals : Totals
        Sums over the retrained layers.
    accuracy : dict from str to Accuracy
        Accuracies by data set.
    left : list of Left
        Layers that were not retrained.
    options : dict
        Options of the method, as JSON values.
    seconds : float
        Wall time of the run.
    theorems : dict from str to Theorem
        Bounds of the method's paper by data set; empty where there are none.
    search : Search or None
        Search for one epsilon, if there was one.
    stages : list of Stage
        Stages of an iterative run; empty for others.
    """

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
    """The record of a finished run, with its parts as types.

    Attributes
    ----------
    record : RunRecord
        The record.
    layers : tuple of LayerReport
        Reports of the layers.
    bounds : dict from str to OutputBound
        Output bounds by data set.
    """

    record: RunRecord
    layers: tuple[LayerReport, ...]
    bounds: dict[str, OutputBound]


def check_finished(record: dict[str, Any], what: str) -> Checked:
    """Check the record of a finished retraining run.

    Parameters
    ----------
    record : dict
        JSON values, as `retrain.runs.directory.read_record` returns them.
    what : str
        Beginning of messages: ``run: DIR/run.json``.

    Returns
    -------
    Checked
        The record, the layer reports and the bounds as types.

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
