"""`retrain.lobs`: second-order pruning of a network, in one stage or in several.

The paper's iterative version prunes, retrains lightly, prunes again, retrains again. Each stage is
a run of its own on the network that the stage before it left, in ``DIR/layers/stage-1``,
``DIR/layers/stage-2``, ..., and is resumed as one; DIR holds the outcome.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

from retrain.api.net_trim import OnLayer, Run, drive, load, totals
from retrain.bounds.l_obs import second_order_bounds
from retrain.bounds.outputs import NO_DIRECT
from retrain.data.sources import Data, as_data
from retrain.methods.amounts import Amount, layers_named
from retrain.methods.lobs import method
from retrain.methods.lobs.options import LobsOptions, check_stages, stage_amounts
from retrain.runs.directory import LAYERS, RUN_FILE, check_out, open_run, read_record
from retrain.runs.identity import run_identity
from retrain.runs.prepare import prepare
from retrain.runs.record import check_finished
from retrain.runs.subject import apart_from_caller, subject_of
from retrain.stream.chain import Chain
from retrain.stream.layer_report import LayerReport, LayerResult
from retrain.stream.stream import LayerSpec, LayerStream


@apart_from_caller()
def lobs(
    model: Any,
    data: Any,
    *,
    sparsity: Amount | Sequence[Amount] | None = None,
    tolerance: Amount | Sequence[Amount] | None = None,
    stages: int | None = None,
    out: str | Path | None = None,
    evaluate: Any = None,
    layers: str | Sequence[str] | None = None,
    skip: str | Sequence[str] | None = None,
    fine_tune: int = 0,
    device: str | None = None,
    on_layer: OnLayer | None = None,
    options: LobsOptions | None = None,
    **settings: Any,
) -> Run:
    """Prune a network layer by layer by second-order information (L-OBS and its relatives).

    Parameters
    ----------
    model : torch.nn.Module, Chain or LoadedModel
        The trained network. It is not changed. Wrappers (DataParallel, DistributedDataParallel,
        torch.compile) are taken off: the run's model and its names are those of the plain module.
    data : array, tensor, DataLoader, Data, or anything that yields batches
        Calibration inputs, all of which are used; (inputs, labels) pairs give accuracies too, and
        allow fine-tuning.
    sparsity : number, mapping, or a sequence of those
        Fraction of each layer's weights to remove, one for all or by layer name (or shell pattern):
        then only those layers are pruned, unless `layers` says more. A sequence has one a stage.
        None for an N:M pattern, and with a tolerance.
    tolerance : number, mapping, or a sequence of those
        Instead: the root of the mean squared error of each layer's response, in its own units. One
        number serves every stage.
    stages : int, optional
        How often to prune; by default once, or as often as there are sparsities. A single sparsity
        is the last stage's, and earlier stages go a part of the way (`stage_amounts`).
    out : path, optional
        Run directory: written as the run goes, resumed by the same call.
    evaluate : like `data`, optional
        Held-out data for accuracies and bounds.
    layers, skip : str or sequence of str, optional
        Shell patterns of layer names to prune, and to leave out.
    fine_tune : int, optional
        Epochs of training after every stage, zeros kept at zero. Wants labels and a torch module.
    device : str, optional
        Where torch computes; by default where the module is.
    on_layer : callable, optional
        Called with each LayerReport as its layer is done, and the number of layers of all stages.
    options : LobsOptions, optional
        What to do; `settings` are its fields, given one by one or to replace some: ``method``,
        ``pattern``, ``calibration``, ``damping``, ``bias``, ``zeros``, ...

    Returns
    -------
    Run
        Of several stages, the layers count from the network given, and the bounds are the last
        stage's: from the network that it was given to what it made of it, before fine-tuning.
        ``record["stages"]`` has every stage's.

    Raises
    ------
    ValueError
        If the model, the data, an option or the run directory is unfit; the message names it.
    OSError
        If the run directory cannot be written. Finished layers are kept, and the call resumes.
    """
    check_out(out)
    plan = plan_stages(options, sparsity, tolerance, stages, settings)
    calibration = as_data(data)
    held_out = None if evaluate is None else as_data(evaluate)

    def stage(network: Any, number: int, directory: Path | None, notify: OnLayer | None) -> Run:
        return _stage(
            network,
            calibration,
            plan[number],
            held_out=held_out,
            layers=layers,
            skip=skip,
            fine_tune=fine_tune,
            device=device,
            out=directory,
            on_layer=notify,
        )

    target = None if out is None else Path(out)
    if len(plan) == 1:
        return stage(model, 0, target, on_layer)
    started = time.perf_counter()
    with ExitStack() as stack:
        for entry in plan:  # a later stage's options are as early to refuse as the first one's
            chosen = layers_of(entry) if layers is None else layers
            prepared = prepare(
                subject_of(model, device),
                calibration,
                held_out,
                layers=chosen,
                skip=skip,
                oversized=partial(_oversized, entry),
                fine_tune=fine_tune,
                out=target,
            )
            list(method.lobs_plan(prepared.stream, entry, prepared.names))
        if target is not None:
            subject = subject_of(model, device)
            identity = {
                "method": "lobs",
                "stages": [asdict(entry) for entry in plan],
                "fine_tune": fine_tune,
                "select": [layers, skip],
                "held_out": None if held_out is None else held_out.fingerprint,
                **run_identity(subject.stream(calibration)),
                **subject.identity(training=fine_tune > 0),
            }
            directory = stack.enter_context(open_run(target, identity, ()))
        runs: list[Run] = []
        network = model
        for number in range(len(plan)):
            place = None if target is None else target / LAYERS / f"stage-{number + 1}"
            notify = None if on_layer is None else _counting(on_layer, len(plan))
            stream = subject_of(network, device).stream(calibration)
            if place is not None and _is_finished(place, stream, plan[number]):
                runs.append(_read_back(place, network, notify))
            else:
                runs.append(stage(network, number, place, notify))
            network = _with_module(model, runs[-1].model)
        record = _record(runs, time.perf_counter() - started)
        if target is not None:
            record["identity"] = identity
            subject_of(network, device).save(runs[-1].model, target)
            directory.write_record(record)
    reports = tuple(LayerReport.from_json(entry) for entry in record["layers"])
    return Run(runs[-1].model, reports, runs[-1].bounds, record, target)


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
    run = load(directory, network.module if _is_loaded(network) else network)
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
