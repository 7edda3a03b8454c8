"""`retrain lobs`: L-OBS and its relatives."""

from __future__ import annotations

import argparse
from typing import Any

from retrain.cli.shared import (
    DONE,
    FormerName,
    Progress,
    add_model,
    add_run,
    by_layer,
    conclude,
    given,
    interrupts_kept_from_workers,
    load,
    read_data,
    what_is_asked,
)


def add_command(commands: Any) -> None:
    """Add `retrain lobs` to the parser."""
    parser = commands.add_parser(
        "lobs",
        help="prune a saved network by second-order information (L-OBS and its relatives)",
        description="L-OBS: remove, layer by layer, the weights whose removal changes the layer's "
        "response least, and let the others make up for them; theorem 3.2's bound on the outputs "
        "comes with it. The same command resumes a run that was interrupted.",
    )
    add_model(parser)
    add_run(parser)
    lobs = parser.add_argument_group("L-OBS")
    lobs.add_argument(
        "--method",
        metavar="M",
        help="one-shot (the paper's), sweep, greedy, swaps, large, best, inputs, or auto: swaps, "
        "large beyond 2048 inputs; default auto",
    )
    lobs.add_argument(
        "--pattern",
        metavar="P",
        help="where the count holds: layer, unit, inputs (whole ones), or N:M such as 2:4; "
        "default layer",
    )
    amount = lobs.add_mutually_exclusive_group()
    amount.add_argument(
        "--sparsity",
        action="append",
        metavar="S",
        help="fraction of a layer's weights to remove, 0.93, or by layer, fc1=0.93,fc2=0.8; given "
        "more than once: one for each stage",
    )
    lobs.add_argument(
        "--sparsity-of",
        choices=("layer", "network"),
        help="what has --sparsity: each layer, or the layers together, which share the zeros by "
        "their measured losses; default layer",
    )
    amount.add_argument(
        "--layer-error",
        metavar="E",
        help="remove while the root mean squared error of a layer's response is at most E, in its "
        "own units; or by layer, fc1=0.5,fc2=0.1",
    )
    amount.add_argument(
        "--tolerance", action=FormerName, now="--layer-error", dest="layer_error", metavar="E"
    )
    lobs.add_argument(
        "--stages",
        type=int,
        metavar="N",
        help="prune N times, with --fine-tune after each; a single --sparsity is the last one's",
    )
    lobs.add_argument(
        "--calibration",
        choices=("dense", "sequential", "corrected"),
        help="dense: each layer on the given network's activations; sequential: on the pruned "
        "network's, like the old layer there; corrected: on those, like the given network; "
        "default dense",
    )
    lobs.add_argument(
        "--damping",
        type=float,
        metavar="D",
        help="fraction of the Hessian's mean diagonal; default: each method's own",
    )
    lobs.add_argument(
        "--keep-bias", action="store_true", help="leave biases as they are instead of updating them"
    )
    lobs.add_argument(
        "--free-zeros", action="store_true", help="let weights that are zero become something else"
    )
    parser.set_defaults(run=_run)


def _run(options: argparse.Namespace) -> int:
    """Prune by second-order information."""
    from retrain.api.lobs import lobs
    from retrain.runs.stages import plan_stages

    sparsity = [by_layer("--sparsity", text) for text in options.sparsity or []]
    tolerance = None
    if options.layer_error is not None:
        tolerance = by_layer("--layer-error", options.layer_error)
    amounts: dict[str, Any] = {
        "sparsity": sparsity[0] if len(sparsity) == 1 else sparsity or None,
        "tolerance": tolerance,
        "stages": options.stages,
    }
    settings: dict[str, Any] = {
        **given(options, "method", "pattern", "damping", "calibration", "seed", "jobs", "threads"),
        "bias": "keep" if options.keep_bias else "update",
        "zeros": "free" if options.free_zeros else "stay",
    }
    if options.memory is not None:
        settings["memory"] = options.memory * 2**30
    plan = plan_stages(None, settings=settings, **amounts)
    with Progress(options) as progress:
        loaded = load(options)
        data, held_out = read_data(options)
        if options.dry_run:
            return _dry_run_lobs(options, loaded, data, plan)
        with interrupts_kept_from_workers(plan[-1].jobs):
            run = lobs(
                loaded,
                data,
                **what_is_asked(options, held_out, progress),
                **amounts,
                **given(options, "sparsity_of"),
                **settings,
            )
    return conclude(run, options, loaded.note)


def _dry_run_lobs(options: argparse.Namespace, loaded: Any, data: Any, plan: Any) -> int:
    """Say what would be pruned, how, in how much memory."""
    from retrain.methods.lobs.method import lobs_plan, oversized
    from retrain.runs.prepare import select
    from retrain.runs.stages import lobs_method
    from retrain.runs.subject import subject_of

    stream = subject_of(loaded, options.device).stream(data)
    for number, stage in enumerate(plan, start=1):
        chosen = options.layers if options.layers is not None else lobs_method(stage).layers
        names = select(stream.layers, chosen, options.skip)
        for spec, removed, size in lobs_plan(stream, stage, names):
            reason = oversized(spec, stage)
            if reason is not None:
                print(f"{spec.name}: left as it is: {reason}")
                continue
            amount = "to a tolerance" if removed is None else f"{removed:,} of {spec.size:,} to go"
            place = f"stage {number}, " if len(plan) > 1 else ""
            print(
                f"{place}{spec.name}: {spec.shape[0]} x {spec.shape[1]}, {amount}, by "
                f"{stage.method_for(spec)} on {stream.count(spec.name):,} rows, about "
                f"{size / 2**30:.2f} GiB"
            )
    return DONE
