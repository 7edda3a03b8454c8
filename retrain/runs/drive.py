"""Run a layer method over a network: prepare, resume, retrain, bound, evaluate, save."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import joblib
from threadpoolctl import threadpool_limits

from retrain.bounds.outputs import NO_DIRECT, Direct, OutputBound, output_bound
from retrain.runs.accuracy import accuracies, copy_weights
from retrain.runs.directory import RunDirectory, open_run
from retrain.runs.identity import run_identity
from retrain.runs.outcome import OnLayer, Run, totals
from retrain.runs.prepare import Oversized, Prepared, prepare
from retrain.runs.request import Request
from retrain.stream.layer_report import LayerReport, LayerResult
from retrain.stream.stream import LayerStream, Passage

_log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class LayerMethod:
    """A method over layers, bound to its options.

    Attributes
    ----------
    name : str
        Name in the record: ``"net-trim"``, ``"lobs"``.
    settings : dict
        Options as JSON values, for the record and the identity.
    layers : sequence of str or None
        Layers that the options name, used where the request names none.
    steps : callable
        (stream, names, finished weights by layer) -> iterator of LayerResult.
    oversized : callable
        (stream, spec) -> reason why a layer cannot be solved in the memory allowed, or None.
    direct : callable
        (stream, reports) -> the method's own bound on the calibration rows.
    theorems : callable or None
        (stream, passage) -> the bounds of the method's paper as JSON values.
    """

    name: str
    settings: dict[str, Any]
    layers: Sequence[str] | None
    steps: Callable[
        [LayerStream, Sequence[str], Mapping[str, Sequence[Any]]], Iterator[LayerResult]
    ]
    oversized: Oversized
    direct: Callable[[LayerStream, Sequence[LayerReport]], Direct] = lambda stream, reports: (
        NO_DIRECT
    )
    theorems: Callable[[LayerStream, Passage], dict[str, Any]] | None = None


def drive(method: LayerMethod, request: Request) -> Run:
    """Run a layer method over a network: resume, retrain, save, bound, evaluate, report.

    Parameters
    ----------
    method : LayerMethod
        Method applied to each layer.
    request : Request
        Network, data, layers and run directory.

    Returns
    -------
    Run
        Network, report per layer, bounds and record.

    Raises
    ------
    ValueError
        If the network, the data or the run directory is invalid; the message names it.
    OSError
        If the run directory cannot be written.
    """
    started = time.perf_counter()
    request = request.choosing(method.layers)
    subject, data, held_out = request.subject, request.data, request.held_out
    with ExitStack() as stack:
        stack.enter_context(threadpool_limits(joblib.cpu_count()))
        prepared = prepare(request, method.oversized)
        stream, other, names = prepared.stream, prepared.held_out, prepared.names
        identity = {
            "method": method.name,
            "layers": names,
            "options": method.settings,
            "fine_tune": request.fine_tune,
            **run_identity(stream),
            **subject.identity(training=request.fine_tune > 0),
        }
        directory = None
        if request.out is not None:
            every = tuple(spec.name for spec in stream.layers)
            directory = stack.enter_context(open_run(request.out, identity, every))
        reports = _retrain(stream, method, names, directory, request.on_layer)
        _log.info("bounds: calibration data")
        bounds, proven = {}, {}
        bound, theorems = _prove(method, stream, method.direct(stream, reports))
        bounds["calibration"], proven["calibration"] = bound, theorems
        accuracy = {"calibration": accuracies(stream, data)}
        if held_out is not None and other is not None:
            _log.info("bounds: held-out data")
            copy_weights(stream, other, names)
            bounds["held_out"], proven["held_out"] = _prove(method, other, NO_DIRECT)
            accuracy["held_out"] = accuracies(other, held_out)
        model = subject.model(stream)
        if request.fine_tune:
            _log.info("fine-tuning: %d epochs", request.fine_tune)
            seed = method.settings.get("seed", 0)
            tuned = subject.fine_tune(stream, data, request.fine_tune, held_out, seed)
            model = tuned.model
            for name, value in tuned.accuracies.items():
                accuracy[name]["fine_tuned"] = value
        record: dict[str, Any] = {
            "state": "finished",
            "identity": identity,
            "method": method.name,
            "model": subject.describe(stream),
            "data": {"name": data.name, "samples": len(data)},
            "held_out": None
            if held_out is None
            else {"name": held_out.name, "samples": len(held_out)},
            "options": method.settings,
            "layers": [report.to_json() for report in reports],
            "left": _left(prepared),
            "totals": totals(reports),
            "accuracy": accuracy,
            "bounds": {name: bound.to_json() for name, bound in bounds.items()},
            "theorems": {name: said for name, said in proven.items() if said is not None},
            "fine_tune": request.fine_tune,
            "seconds": time.perf_counter() - started,
        }
        if directory is not None:
            _log.info("saving: %s", directory.path)
            subject.save(model, directory.path)
            directory.write_record(record)
    return Run(model, tuple(reports), bounds, record, request.out)


def _retrain(
    stream: LayerStream,
    method: LayerMethod,
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
    for result in method.steps(stream, names, weights):
        if directory is not None:
            directory.write_layer(result)
        reports[result.report.name] = result.report
        if on_layer is not None:
            on_layer(result.report, len(names))
    return [reports[name] for name in names]


def _prove(
    method: LayerMethod, stream: LayerStream, direct: Direct
) -> tuple[OutputBound, dict[str, Any] | None]:
    """Send the data through both networks once: the run's bound and the paper's bounds."""
    passage = stream.passage()
    bound = output_bound(stream, passage=passage, direct=direct)
    # Where no layer's deviation was measured on the way, the theorems' would cost a pass a layer.
    unmeasured = passage.reason is not None and not passage.errors
    if method.theorems is None or unmeasured:
        return bound, None
    return bound, method.theorems(stream, passage)


def _left(prepared: Prepared) -> list[dict[str, str]]:
    """Layers that were not retrained, each with the reason."""
    return [
        {
            "name": spec.name,
            "kind": spec.kind,
            "reason": prepared.left.get(spec.name) or spec.reason or "not selected",
        }
        for spec in prepared.stream.layers
        if spec.name not in prepared.names
    ]
