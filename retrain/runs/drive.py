"""Run a layer method over a network: prepare, resume, retrain, bound, evaluate, save."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import joblib
from threadpoolctl import threadpool_limits

from retrain.bounds.outputs import Direct, output_bound
from retrain.data.arrays import Data
from retrain.runs.accuracy import accuracies, copy_weights
from retrain.runs.directory import RunDirectory, open_run
from retrain.runs.identity import run_identity
from retrain.runs.outcome import OnLayer, Run, totals
from retrain.runs.prepare import Oversized, prepare
from retrain.runs.subject import Subject
from retrain.stream.layer_report import LayerReport, LayerResult
from retrain.stream.stream import LayerStream, Passage

if TYPE_CHECKING:
    pass

_log = logging.getLogger(__name__)


_MOST_EPOCHS = 10**6  # more would end in no one's lifetime


Steps = Callable[[LayerStream, Sequence[str], Mapping[str, Sequence[Any]]], Iterator[LayerResult]]


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
        accuracy = {"calibration": accuracies(stream, data)}
        proven = {} if theorems is None else {"calibration": theorems(stream, passage)}
        if held_out is not None and other is not None:
            _log.info("bounds: held-out data")
            copy_weights(stream, other, names)
            passage = other.passage()
            bounds["held_out"] = output_bound(other, passage=passage)
            accuracy["held_out"] = accuracies(other, held_out)
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
