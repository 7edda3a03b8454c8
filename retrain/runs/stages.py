"""Pruning in stages: each a run of its own on the network that the stage before it left."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

from retrain.bounds.l_obs import second_order_bounds
from retrain.bounds.outputs import NO_DIRECT
from retrain.data.arrays import Data
from retrain.methods.amounts import Amount, layers_named
from retrain.methods.lobs import method
from retrain.methods.lobs.options import LobsOptions, check_stages, stage_amounts
from retrain.runs.directory import RUN_FILE, read_record
from retrain.runs.drive import drive
from retrain.runs.outcome import OnLayer, Run, read_run, totals
from retrain.runs.record import check_finished
from retrain.runs.subject import subject_of
from retrain.stream.chain import Chain
from retrain.stream.layer_report import LayerReport, LayerResult
from retrain.stream.stream import LayerSpec, LayerStream


def plan_stages(
    options: LobsOptions | None,
    sparsity: Amount | Sequence[Amount] | None,
    tolerance: Amount | Sequence[Amount] | None,
    stages: int | None,
    settings: Mapping[str, Any],
) -> list[LobsOptions]:
    """Return the options of every stage.

    Raises
    ------
    ValueError
        If an option is unknown or unfit, or an N:M pattern is to have several stages.
    """
    unknown = sorted(set(settings) - set(LobsOptions.__dataclass_fields__))
    if unknown:
        known = ", ".join(LobsOptions.__dataclass_fields__)
        raise ValueError(f"{unknown[0]}: no such option of lobs; there are {known}")
    if stages is not None:
        check_stages(stages)
    given = {} if options is None else asdict(options)
    given.update(settings)
    if sparsity is not None:
        given.update(sparsity=sparsity, tolerance=None)
    if tolerance is not None:
        given.update(tolerance=tolerance)
        if sparsity is None:
            given["sparsity"] = None
    if given.get("tolerance") is not None and given.get("sparsity") is None:
        entries = given["tolerance"]
        if not isinstance(entries, Sequence) and stages is not None:
            entries = [entries] * stages
        tolerances = stage_amounts(entries, stages)
        return [LobsOptions(**{**given, "tolerance": _plain(entry)}) for entry in tolerances]
    if given.get("sparsity") is None:
        if stages not in (None, 1):
            raise ValueError(f"stages: {stages} want a sparsity or a tolerance for each")
        return [LobsOptions(**given)]
    amounts = stage_amounts(given["sparsity"], stages)
    return [LobsOptions(**{**given, "sparsity": _plain(entry)}) for entry in amounts]


def _plain(amount: Amount) -> Amount:
    return dict(amount) if isinstance(amount, Mapping) else amount


def layers_of(options: LobsOptions) -> list[str] | None:
    """Layers that the options name, as shell patterns; None when they name none."""
    return layers_named(options.sparsity if options.tolerance is None else options.tolerance)


def _stage(
    network: Any,
    data: Data,
    options: LobsOptions,
    *,
    held_out: Data | None,
    layers: str | Sequence[str] | None,
    skip: str | Sequence[str] | None,
    fine_tune: int,
    device: str | None,
    out: Path | None,
    on_layer: OnLayer | None,
) -> Run:
    """Run one stage."""

    def steps(
        stream: LayerStream, names: Sequence[str], finished: Mapping[str, Sequence[Any]]
    ) -> Iterator[LayerResult]:
        return method.lobs(stream, options, layers=names, finished=finished)

    return drive(
        "lobs",
        steps,
        subject_of(network, device),
        data,
        held_out=held_out,
        settings=_settings(options),
        layers=layers_of(options) if layers is None else layers,
        skip=skip,
        oversized=partial(_oversized, options),
        fine_tune=fine_tune,
        out=out,
        on_layer=on_layer,
        direct=lambda stream, reports: NO_DIRECT,
        theorems=lambda stream, passage: second_order_bounds(stream, passage).to_json(),
    )


def _oversized(options: LobsOptions, _: LayerStream, spec: LayerSpec) -> str | None:
    return method.oversized(spec, options)


def _settings(options: LobsOptions) -> dict[str, Any]:
    return {**asdict(options), "threads": options.threads_per_job}


def _is_finished(directory: Path, stream: LayerStream, options: LobsOptions) -> bool:
    """Whether a stage's directory holds this very stage, to its end.

    What else the stage depends on, the directory above has in its identity.
    """
    if not (directory / RUN_FILE).is_file():
        return False
    record = read_record(directory)
    if record.get("state") != "finished":
        return False
    identity = check_finished(record, f"run: {directory / RUN_FILE}").record.identity
    return identity.get("network and data") == stream.fingerprint and identity.get(
        "options"
    ) == json.loads(json.dumps(_settings(options)))


def _read_back(directory: Path, network: Any, on_layer: OnLayer | None) -> Run:
    """Read a finished stage, announcing its layers."""
    model = network.module if _is_loaded(network) else network
    run = read_run(directory, read_record(directory), model)
    for report in run.layers:
        if on_layer is not None:
            on_layer(report, len(run.layers))
    return run


def _is_loaded(model: Any) -> bool:
    """Whether a model came from a file, and has a file's tensor names."""
    if isinstance(model, Chain):
        return False
    from retrain.adapters.files.load import LoadedModel

    return isinstance(model, LoadedModel)


def _with_module(given: Any, network: Any) -> Any:
    """Put a stage's network in the place of the one given, under the same file's names."""
    return replace(given, module=network) if _is_loaded(given) else network


def _counting(on_layer: OnLayer, stages: int) -> OnLayer:
    return lambda report, total: on_layer(report, total * stages)


def _record(runs: Sequence[Run], seconds: float) -> dict[str, Any]:
    """Sum up the stages: layers and accuracies from the first network to the last."""
    first, last = runs[0].record, runs[-1].record
    reports: dict[str, LayerReport] = {}
    for run in runs:
        for report in run.layers:
            before = reports.get(report.name, report).zeros_before
            reports[report.name] = replace(report, zeros_before=before)
    accuracy = {
        name: {**values, "before": first["accuracy"][name]["before"]}
        for name, values in last["accuracy"].items()
    }
    kept = ("options", "layers", "totals", "accuracy", "bounds", "theorems", "seconds")
    return {
        **last,
        "layers": [report.to_json() for report in reports.values()],
        "totals": totals(list(reports.values())),
        "accuracy": accuracy,
        "stages": [{key: run.record[key] for key in kept} for run in runs],
        "seconds": seconds,
    }
