"""`retrain.net_trim` and `retrain.load`: a network in, a run out."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, is_dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import joblib
import numpy as np
from threadpoolctl import threadpool_limits

from retrain.bounds.outputs import Direct, OutputBound, cascade_bound, output_bound
from retrain.data.labels import labels_for
from retrain.data.sources import Data, as_data
from retrain.methods.amounts import layers_named
from retrain.methods.net_trim import method as net_trim_method
from retrain.methods.net_trim.options import NetTrimOptions
from retrain.runs.directory import RUN_FILE, RunDirectory, check_out, open_run, read_record
from retrain.runs.identity import run_identity
from retrain.runs.prepare import Oversized, prepare
from retrain.runs.record import check_finished
from retrain.runs.subject import Subject, apart_from_caller, reopen, subject_of
from retrain.stream.layer_report import LayerReport, LayerResult
from retrain.stream.stream import LayerStream, Passage, layer
from solvers.arrays import to_numpy

if TYPE_CHECKING:
    from retrain.runs.epsilon_search import OnTrial

_log = logging.getLogger(__name__)

OnLayer = Callable[[LayerReport, int], None]
_MOST_EPOCHS = 10**6  # more would end in no one's lifetime
Steps = Callable[[LayerStream, Sequence[str], Mapping[str, Sequence[Any]]], Iterator[LayerResult]]


@dataclass(frozen=True, eq=False)
class Run:
    """A retraining run.

    Attributes
    ----------
    model : torch.nn.Module or Chain
        The retrained network, of the kind that was given.
    layers : tuple of LayerReport
        What became of each layer.
    bounds : dict of OutputBound
        Output deviation, bound beside measured: ``"calibration"`` and, with held-out data,
        ``"held_out"``. Of the retrained network before any fine-tuning.
    record : dict
        All that ``run.json`` holds: options, versions, totals, accuracies, seconds.
    directory : Path or None
        Where the run was written, if anywhere.
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


@apart_from_caller()
def net_trim(
    model: Any,
    data: Any,
    *,
    out: str | Path | None = None,
    evaluate: Any = None,
    layers: str | Sequence[str] | None = None,
    skip: str | Sequence[str] | None = None,
    fine_tune: int = 0,
    device: str | None = None,
    sparsity_of: Literal["layer", "network"] = "layer",
    max_drop: float | None = None,
    max_trials: int = 12,
    on_layer: OnLayer | None = None,
    on_trial: OnTrial | None = None,
    options: NetTrimOptions | None = None,
    **settings: Any,
) -> Run:
    """Retrain a network layer by layer with Net-Trim.

    Parameters
    ----------
    model : torch.nn.Module, Chain or LoadedModel
        The trained network. It is not changed. Wrappers (DataParallel, DistributedDataParallel,
        torch.compile) are taken off: the run's model and its names are those of the plain module.
    data : array, tensor, DataLoader, Data, or anything that yields batches
        Calibration inputs; (inputs, labels) pairs give accuracies too, and allow fine-tuning.
        Labels are class numbers from 0, or what can be read as such (`retrain.data.labels`).
    out : path, optional
        Run directory: written as the run goes, resumed by the same call. Without one nothing is
        written.
    evaluate : like `data`, optional
        Held-out data for accuracies and bounds.
    layers, skip : str or sequence of str, optional
        Shell patterns of layer names to retrain, and to leave out.
    fine_tune : int, optional
        Epochs of training after pruning, zeros kept at zero. Wants labels and a torch module.
    device : str, optional
        Where torch computes; by default where the module is.
    sparsity_of : {"layer", "network"}
        What has the ``sparsity`` asked for: each layer, with an epsilon of its own, or all
        retrained layers together, with one relative epsilon that is searched for.
    max_drop : float, optional
        Instead of an epsilon or a sparsity: points of held-out accuracy that may be lost. The one
        relative epsilon is searched for that prunes most within it. Wants `evaluate` with labels.
    max_trials : int
        Networks that a search for one epsilon retrains at most.
    on_layer : callable, optional
        Called with each LayerReport as its layer is done, and the number of layers.
    on_trial : callable, optional
        Called with each `retrain.runs.epsilon_search.Trial` of such a search, and its Goal.
    options : NetTrimOptions, optional
        What to do; `settings` are its fields, given one by one or to replace some: ``scheme``,
        ``relative_epsilon``, ``sparsity``, ... ``tolerance`` may be a pair (gap, violation).

    Returns
    -------
    Run

    Raises
    ------
    ValueError
        If the model, the data, an option or the run directory is unfit; the message names it.
    OSError
        If the run directory cannot be written. Finished layers are kept, and the call resumes.
    """
    from retrain.runs.epsilon_search import goal_of, search_epsilon

    check_out(out)
    options = _options(options, settings)
    goal = goal_of(options, sparsity_of, max_drop, max_trials)
    subject, calibration = subject_of(model, device), as_data(data)
    held_out = None if evaluate is None else as_data(evaluate)

    def run(given: NetTrimOptions, place: str | Path | None, notify: OnLayer | None) -> Run:
        return drive(
            "net-trim",
            lambda stream, names, finished: net_trim_method.net_trim(
                stream, given, layers=names, finished=finished
            ),
            subject,
            calibration,
            held_out=held_out,
            settings=_settings(given),
            layers=layers_named(given.sparsity) if layers is None else layers,
            skip=skip,
            oversized=lambda stream, spec: net_trim_method.oversized(stream, spec, given),
            fine_tune=fine_tune,
            out=place,
            on_layer=notify,
            direct=cascade_bound,
        )

    def check(stream: LayerStream) -> None:
        prepared = prepare(
            subject,
            calibration,
            held_out,
            layers=layers,
            skip=skip,
            oversized=lambda stream, spec: net_trim_method.oversized(stream, spec, options),
            fine_tune=fine_tune,
            out=out,
        )
        if goal is not None and goal.sparsity is not None and options.zeros == "stay":
            _check_sparsity(stream, prepared.names, goal.sparsity)
        if goal is not None and goal.max_drop is not None and held_out is not None:
            outputs = next(prepared.held_out.outputs(dense=True))
            if outputs.ndim != 2 or outputs.shape[1] < 2:
                raise ValueError(
                    "max_drop: wants a network with an output for each class, to have an accuracy; "
                    f"this one's outputs are of shape {tuple(outputs.shape[1:])}"
                )

    if goal is None:
        return run(options, out, on_layer)
    return search_epsilon(
        goal,
        lambda epsilon, place, notify: run(
            replace(options, sparsity=None, relative_epsilon=epsilon), place, notify
        ),
        subject,
        calibration,
        held_out=held_out,
        settings={
            "options": _settings(options),
            "select": [layers, skip],
            "fine_tune": fine_tune,
        },
        check=check,
        out=out,
        on_layer=on_layer,
        on_trial=on_trial,
    )


def _check_sparsity(stream: LayerStream, names: Sequence[str], sparsity: float) -> None:
    """Refuse a network's sparsity below the one that its layers have, whose zeros stay."""
    specs = [layer(stream, name) for name in names]
    zeros = sum(
        int((to_numpy(stream.weight(spec.name, group))[: spec.shape[0]] == 0).sum())
        for spec in specs
        for group in range(spec.groups)
    )
    share = zeros / sum(spec.size for spec in specs)
    if sparsity < share:
        raise ValueError(
            f"sparsity: got {sparsity:g}, but {share:.4g} of the weights are zero in the dense "
            "network and stay; want more, or let them go (zeros='free', --free-zeros)"
        )


def drive(
    method: str,
    steps: Steps,
    subject: Subject,
    data: Data,
    *,
    held_out: Data | None,
    settings: dict[str, Any],
    layers: str | Sequence[str] | None,
    skip: str | Sequence[str] | None,
    oversized: Oversized,
    fine_tune: int,
    out: str | Path | None,
    on_layer: OnLayer | None,
    direct: Callable[[LayerStream, Sequence[LayerReport]], Direct],
    theorems: Callable[[LayerStream, Passage], dict[str, Any]] | None = None,
) -> Run:
    """Run a layer method over a network: resume, retrain, save, bound, evaluate, report.

    `steps` is the method bound to its options; `direct` gives its own bound on the calibration
    rows, if it has one; `theorems` what its paper proves, in numbers, on each data set.
    """
    started = time.perf_counter()
    if fine_tune > _MOST_EPOCHS:
        raise ValueError(f"fine_tune: want at most {_MOST_EPOCHS} epochs, got {fine_tune}")
    with ExitStack() as stack:
        stack.enter_context(threadpool_limits(joblib.cpu_count()))
        prepared = prepare(
            subject,
            data,
            held_out,
            layers=layers,
            skip=skip,
            oversized=oversized,
            fine_tune=fine_tune,
            out=out,
        )
        stream, other, names = prepared.stream, prepared.held_out, prepared.names
        identity = {
            "method": method,
            "layers": names,
            "options": settings,
            "fine_tune": fine_tune,
            **run_identity(stream),
            **subject.identity(training=fine_tune > 0),
        }
        directory = None
        if out is not None:
            every = tuple(spec.name for spec in stream.layers)
            directory = stack.enter_context(open_run(out, identity, every))
        reports = _retrain(stream, steps, names, directory, on_layer)
        _log.info("bounds: calibration data")
        passage = stream.passage()
        proof = direct(stream, reports)
        bounds = {"calibration": output_bound(stream, passage=passage, direct=proof)}
        accuracy = {"calibration": _accuracies(stream, data)}
        proven = {} if theorems is None else {"calibration": theorems(stream, passage)}
        if held_out is not None and other is not None:
            _log.info("bounds: held-out data")
            _copy_weights(stream, other, names)
            passage = other.passage()
            bounds["held_out"] = output_bound(other, passage=passage)
            accuracy["held_out"] = _accuracies(other, held_out)
            if theorems is not None:
                proven["held_out"] = theorems(other, passage)
        tuned = None
        if fine_tune:
            _log.info("fine-tuning: %d epochs", fine_tune)
            tuned = subject.fine_tune(stream, data, fine_tune, held_out, settings.get("seed", 0))
            for name, value in tuned.accuracies.items():
                accuracy[name]["fine_tuned"] = value
        model = subject.model(stream) if tuned is None else tuned.model
        record: dict[str, Any] = {
            "state": "finished",
            "identity": identity,
            "method": method,
            "model": subject.describe(stream),
            "data": {"name": data.name, "samples": len(data)},
            "held_out": None
            if held_out is None
            else {"name": held_out.name, "samples": len(held_out)},
            "options": settings,
            "layers": [report.to_json() for report in reports],
            "left": [
                {
                    "name": spec.name,
                    "kind": spec.kind,
                    "reason": prepared.left.get(spec.name) or spec.reason or "not selected",
                }
                for spec in stream.layers
                if spec.name not in names
            ],
            "totals": totals(reports),
            "accuracy": accuracy,
            "bounds": {name: bound.to_json() for name, bound in bounds.items()},
            "theorems": proven,
            "fine_tune": fine_tune,
            "seconds": time.perf_counter() - started,
        }
        if directory is not None:
            _log.info("saving: %s", directory.path)
            subject.save(model, directory.path)
            directory.write_record(record)
    return Run(model, tuple(reports), bounds, record, None if out is None else Path(out))


@apart_from_caller()
def load(path: str | Path, model: Any = None) -> Run:
    """Read a finished run back.

    Parameters
    ----------
    path : path
        The run directory.
    model : torch.nn.Module, optional
        The architecture, for a network that was given as a module and that is no plain chain; a
        copy of it is filled.

    Returns
    -------
    Run

    Raises
    ------
    ValueError
        If there is no finished run, or the network's architecture must be given and is not.
    """
    directory = Path(path)
    record = read_record(directory)
    if record.get("state") != "finished":
        raise ValueError(f"run: {str(path)!r} is not finished; repeat its command to resume it")
    checked = check_finished(record, f"run: {directory / RUN_FILE}")
    return Run(
        model=reopen(checked.record.model, directory, model),
        layers=checked.layers,
        bounds=checked.bounds,
        record=record,
        directory=directory,
    )


def totals(reports: Sequence[LayerReport]) -> dict[str, Any]:
    """Sum up the retrained layers."""
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


def _options(options: NetTrimOptions | None, settings: dict[str, Any]) -> NetTrimOptions:
    """Options from an object, from single settings, or both."""
    unknown = sorted(set(settings) - set(NetTrimOptions.__dataclass_fields__))
    if unknown:
        known = ", ".join(NetTrimOptions.__dataclass_fields__)
        raise ValueError(f"{unknown[0]}: no such option of Net-Trim; there are {known}")
    pair = settings.get("tolerance")
    if isinstance(pair, tuple | list):
        if len(pair) != 2 or "violation_tolerance" in settings:
            raise ValueError(
                "tolerance: want a number, or the pair (gap, violation) without "
                f"violation_tolerance, got {pair!r}"
            )
        settings = {**settings, "tolerance": pair[0], "violation_tolerance": pair[1]}
    if "epsilon" in settings and settings["epsilon"] is not None:
        settings.setdefault("relative_epsilon", None)
    return replace(options or NetTrimOptions(), **settings)


def _settings(options: NetTrimOptions) -> dict[str, Any]:
    """Options as a run's record and identity have them."""
    return {**_plain(options), "threads": options.threads_per_job}


def _plain(options: Any) -> dict[str, Any]:
    """Options as JSON values; a penalty by its name and parameters."""
    values = {name: getattr(options, name) for name in options.__dataclass_fields__}
    for name, value in values.items():
        if is_dataclass(value) and not isinstance(value, type):
            values[name] = {"name": getattr(value, "name", type(value).__name__), **asdict(value)}
        elif isinstance(value, Mapping):
            values[name] = dict(value)
    return values


def _retrain(
    stream: LayerStream,
    steps: Steps,
    names: list[str],
    directory: RunDirectory | None,
    on_layer: OnLayer | None,
) -> list[LayerReport]:
    """Go through the layers, writing each as it is done; return all reports in execution order."""
    finished = directory.finished(stream) if directory is not None else {}
    finished = {name: result for name, result in finished.items() if name in names}
    reports = {name: result.report for name, result in finished.items()}
    for report in reports.values():
        if on_layer is not None:
            on_layer(report, len(names))
    weights = {name: result.weights for name, result in finished.items()}
    for result in steps(stream, names, weights):
        if directory is not None:
            directory.write_layer(result)
        reports[result.report.name] = result.report
        if on_layer is not None:
            on_layer(result.report, len(names))
    return [reports[name] for name in names]


def _copy_weights(source: LayerStream, target: LayerStream, names: Sequence[str]) -> None:
    for name in names:
        for group in range(layer(source, name).groups):
            target.commit(name, source.weight(name, group), group)


def _accuracies(stream: LayerStream, data: Data) -> dict[str, Any]:
    """Accuracy before and after; None with the `reason`, and `labels` where they were converted."""
    labels = labels_for(stream, data.y)
    said = {"labels": labels.note, "reason": labels.reason}
    return {
        "before": _accuracy(stream, labels.classes, dense=True),
        "after": _accuracy(stream, labels.classes, dense=False),
        **{name: text for name, text in said.items() if text},
    }


def _accuracy(stream: LayerStream, classes: np.ndarray | None, *, dense: bool) -> float | None:
    """Share of samples whose largest output is their class's; None without classes."""
    if classes is None:
        return None
    which = "dense" if dense else "retrained"
    hits, start = 0, 0
    for outputs in stream.outputs(dense=dense):
        values = to_numpy(outputs)
        hits += int((values.argmax(axis=1) == classes[start : start + len(values)]).sum())
        start += len(values)
        _log.debug("accuracy: the %s network, %d of %d samples", which, start, len(classes))
    return hits / start
