"""What a run returns, and what `retrain.load` reads back."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from retrain.bounds.outputs import OutputBound
from retrain.runs.directory import RUN_FILE
from retrain.runs.record import check_finished
from retrain.runs.subject import reopen
from retrain.stream.layer_report import LayerReport

if TYPE_CHECKING:
    pass


OnLayer = Callable[[LayerReport, int], None]
"""Receives the report of each layer as soon as the layer is done, and the number of layers."""


def counting(on_layer: OnLayer | None, runs: int) -> OnLayer | None:
    """Make a callback that multiplies the number of layers by the number of runs.

    Parameters
    ----------
    on_layer : callable or None
        Callback with a LayerReport and the number of layers.
    runs : int
        Number of runs over the same layers.

    Returns
    -------
    callable or None
        Callback for each single run; None where `on_layer` is None.
    """
    if on_layer is None:
        return None
    return lambda report, total: on_layer(report, total * runs)


@dataclass(frozen=True, eq=False)
class Run:
    """A retraining run.

    Attributes
    ----------
    model : torch.nn.Module or Chain
        Retrained network, of the kind that was given.
    layers : tuple of LayerReport
        Outcome of each retrained layer.
    bounds : dict of OutputBound
        Output deviation, bound beside measured: ``"calibration"`` and, with held-out data,
        ``"held_out"``. Both concern the retrained network before any fine-tuning.
    record : dict
        JSON values of ``run.json``: options, versions, totals, accuracies, seconds.
    directory : Path or None
        Run directory; None where nothing was written.
    """

    model: Any
    layers: tuple[LayerReport, ...]
    bounds: dict[str, OutputBound]
    record: dict[str, Any]
    directory: Path | None

    @property
    def bound(self) -> float | None:
        """Best bound on |Yhat - Y|_F of the outputs on the calibration rows."""
        return self.bounds["calibration"].best

    @property
    def measured(self) -> float:
        """Measured |Yhat - Y|_F of the outputs on the calibration rows."""
        return self.bounds["calibration"].measured

    @property
    def certified(self) -> bool:
        """Whether every layer's saved weights are certified."""
        return all(report.certified for report in self.layers)

    @property
    def defects(self) -> list[str]:
        """Bounds below what was measured. There should be none: each is an error of this package.

        Where there is one, the command line says so, prints no bound as proven, and ends with 1.
        """
        theorems = self.record.get("theorems", {}).values()
        found = [bound.defect for bound in self.bounds.values()]
        found += [entry.get("defect") for entry in theorems]
        return [defect for defect in found if defect is not None]


def totals(reports: Sequence[LayerReport]) -> dict[str, Any]:
    """Sum up the retrained layers.

    Parameters
    ----------
    reports : sequence of LayerReport
        Reports of all retrained layers, at least one.

    Returns
    -------
    dict
        JSON values: ``weights``, ``zeros_before``, ``zeros``, ``sparsity``, ``certified``,
        ``solve_seconds``.
    """
    weights = sum(report.weights for report in reports)
    zeros = sum(report.zeros for report in reports)
    return {
        "weights": weights,
        "zeros_before": sum(report.zeros_before for report in reports),
        "zeros": zeros,
        "sparsity": zeros / weights,
        "certified": all(report.certified for report in reports),
        "solve_seconds": sum(report.seconds for report in reports),
    }


def read_run(
    directory: Path, record: dict[str, Any], model: Any = None, *, trust: bool = False
) -> Run:
    """Read a finished run from its directory.

    Parameters
    ----------
    directory : Path
        Run directory.
    record : dict
        JSON values of its ``run.json``.
    model : torch.nn.Module, optional
        Architecture of the network, where the run could not describe it.
    trust : bool, optional
        Whether the factory that the record names may be imported and called.

    Returns
    -------
    Run
        Run as `retrain.net_trim` or `retrain.lobs` returned it.

    Raises
    ------
    ValueError
        If a file is damaged, or the architecture is needed and `model` is not given.
    """
    checked = check_finished(record, f"run: {directory / RUN_FILE}")
    return Run(
        model=reopen(checked.record.model, directory, model, trust=trust),
        layers=checked.layers,
        bounds=checked.bounds,
        record=record,
        directory=directory,
    )
