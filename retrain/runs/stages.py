"""Pruning in stages: each a run of its own on the network that the stage before it left."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, replace
from typing import Any

from retrain.bounds.l_obs import second_order_bounds
from retrain.methods.amounts import Amount, layers_named
from retrain.methods.lobs import method
from retrain.methods.lobs.options import LobsOptions, check_stages, stage_amounts
from retrain.runs.directory import LAYERS, RUN_FILE, open_run, read_if_finished
from retrain.runs.drive import LayerMethod, drive
from retrain.runs.identity import run_identity
from retrain.runs.outcome import Run, counting, read_run, totals
from retrain.runs.prepare import prepare
from retrain.runs.record import check_finished
from retrain.runs.request import Request
from retrain.stream.chain import Chain
from retrain.stream.layer_report import LayerReport
from retrain.stream.stream import LayerStream


def plan_stages(
    options: LobsOptions | None,
    sparsity: Amount | Sequence[Amount] | None,
    tolerance: Amount | Sequence[Amount] | None,
    stages: int | None,
    settings: Mapping[str, Any],
) -> list[LobsOptions]:
    """Return the options of every stage.

    Parameters
    ----------
    options : LobsOptions or None
        Options that all stages share.
    sparsity : float, mapping, or a sequence of those, or None
        Fraction of weights to remove, one entry per stage or the last stage's.
    tolerance : float, mapping, or a sequence of those, or None
        Largest root mean squared error of a layer's response, one entry per stage or one for all.
    stages : int or None
        Number of stages; by default as many as there are entries.
    settings : mapping
        Fields of `LobsOptions` that replace those of `options`.

    Returns
    -------
    list of LobsOptions
        Options of each stage, in their order.

    Raises
    ------
    ValueError
        If an option is unknown or invalid, or an N:M pattern is to have several stages.
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


def lobs_method(options: LobsOptions) -> LayerMethod:
    """Make the L-OBS method with its options, in the form that `drive` takes.

    Parameters
    ----------
    options : LobsOptions
        Options of the method.

    Returns
    -------
    LayerMethod
        Method bound to the options.
    """
    return LayerMethod(
        name="lobs",
        settings=_settings(options),
        layers=layers_named(options.sparsity if options.tolerance is None else options.tolerance),
        steps=lambda stream, names, finished: method.lobs(
            stream, options, layers=names, finished=finished
        ),
        oversized=lambda _, spec: method.oversized(spec, options),
        theorems=lambda stream, passage: second_order_bounds(stream, passage).to_json(),
    )


def run_stages(plan: Sequence[LobsOptions], model: Any, request: Request) -> Run:
    """Run several stages, each on the network that the one before it left.

    Parameters
    ----------
    plan : sequence of LobsOptions
        Options of each stage.
    model : torch.nn.Module, Chain or LoadedModel
        Dense network.
    request : Request
        Request for the whole run.

    Returns
    -------
    Run
        Layers and accuracies from the dense network to the last stage's; bounds of the last stage.

    Raises
    ------
    ValueError
        If an option of any stage is invalid for this network; nothing has been pruned then.
    OSError
        If the run directory cannot be written.
    """
    started = time.perf_counter()
    with ExitStack() as stack:
        stream = _check(plan, request)
        directory = None
        if request.out is not None:
            identity = {
                "method": "lobs",
                "stages": [asdict(entry) for entry in plan],
                "fine_tune": request.fine_tune,
                "select": [request.layers, request.skip],
                "held_out": None if request.held_out is None else request.held_out.fingerprint,
                **run_identity(stream),
                **request.subject.identity(training=request.fine_tune > 0),
            }
            directory = stack.enter_context(open_run(request.out, identity, ()))
        runs: list[Run] = []
        network = model
        for number, options in enumerate(plan):
            place = None
            if request.out is not None:
                place = request.out / LAYERS / f"stage-{number + 1}"
            asked = request.of(network, place, counting(request.on_layer, len(plan)))
            run = _finished(asked, network, options)
            runs.append(drive(lobs_method(options), asked) if run is None else run)
            network = _with_module(model, runs[-1].model)
        record = _record(runs, time.perf_counter() - started)
        if directory is not None:
            record["identity"] = identity
            request.of(network, None, None).subject.save(runs[-1].model, directory.path)
            directory.write_record(record)
    reports = tuple(LayerReport.from_json(entry) for entry in record["layers"])
    return Run(runs[-1].model, reports, runs[-1].bounds, record, request.out)


def _check(plan: Sequence[LobsOptions], request: Request) -> LayerStream:
    """Refuse any stage's options before the first stage; return the dense network's stream."""
    for options in plan:
        chosen = lobs_method(options)
        prepared = prepare(request.choosing(chosen.layers), chosen.oversized)
        list(method.lobs_plan(prepared.stream, options, prepared.names))
    stream: LayerStream = prepared.stream
    return stream


def _settings(options: LobsOptions) -> dict[str, Any]:
    return {**asdict(options), "threads": options.threads_per_job}


def _finished(asked: Request, network: Any, options: LobsOptions) -> Run | None:
    """Read back a stage that is done, reporting its layers; None where it is not done.

    The network, the data and the options tell whether the directory holds this stage; everything
    else that the stage depends on is in the identity of the directory above.
    """
    record = read_if_finished(asked.out)
    if record is None or asked.out is None:
        return None
    identity = check_finished(record, f"run: {asked.out / RUN_FILE}").record.identity
    settings = json.loads(json.dumps(_settings(options)))
    stream = asked.subject.stream(asked.data)
    if (
        identity.get("network and data") != stream.fingerprint
        or identity.get("options") != settings
    ):
        return None
    run = read_run(asked.out, record, network.module if _is_loaded(network) else network)
    for report in run.layers:
        if asked.on_layer is not None:
            asked.on_layer(report, len(run.layers))
    return run


def _is_loaded(model: Any) -> bool:
    """Whether a model came from a file, and has a file's tensor names."""
    if isinstance(model, Chain):
        return False
    from retrain.adapters.files.load import LoadedModel

    return isinstance(model, LoadedModel)


def _with_module(given: Any, network: Any) -> Any:
    """Replace the network of a loaded model by a stage's network, under the same file's names."""
    return replace(given, module=network) if _is_loaded(given) else network


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
