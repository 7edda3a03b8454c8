"""`retrain trim`: Net-Trim."""

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
    """Add `retrain trim` to the parser."""
    parser = commands.add_parser(
        "trim",
        help="retrain a saved network layer by layer with Net-Trim",
        description="Net-Trim: find, layer by layer, the sparsest weights (in l1) that keep each "
        "layer's responses, and prove how far the outputs can have moved. The same command "
        "resumes a run that was interrupted.",
    )
    add_model(parser)
    add_run(parser)
    trim = parser.add_argument_group("Net-Trim")
    trim.add_argument(
        "--scheme",
        choices=("cascade", "parallel"),
        help="cascade: each layer sees the retrained ones before it (Algorithm 2); parallel: each "
        "on its own (Algorithm 1); default cascade",
    )
    radius = trim.add_mutually_exclusive_group()
    radius.add_argument(
        "--relative-epsilon",
        type=float,
        metavar="REL",
        help="how far a layer's responses may move, relative to their norm; of the first layer in "
        "a cascade; default 0.05",
    )
    radius.add_argument("--epsilon", type=float, metavar="ABS", help="the same, absolute")
    radius.add_argument(
        "--sparsity",
        metavar="S",
        help="fraction of the weights to make zero, 0.9, or by layer, fc1=0.9,fc2=0.8: finds the "
        "epsilon that gives it",
    )
    trim.add_argument(
        "--sparsity-of",
        choices=("layer", "network"),
        help="what has --sparsity: each layer, with an epsilon of its own, or the layers together, "
        "with one relative epsilon; default layer",
    )
    trim.add_argument(
        "--max-drop",
        type=float,
        metavar="POINTS",
        help="find the one relative epsilon that prunes most while accuracy on --evaluate drops by "
        "at most so many percentage points; begins at --relative-epsilon",
    )
    trim.add_argument(
        "--max-trials",
        type=int,
        metavar="N",
        help="networks that a search for one epsilon retrains at most; default 12",
    )
    trim.add_argument(
        "--inflation",
        type=float,
        metavar="G",
        help="cascade: by how much later layers may add, >= 1, gamma of (7); default 1.1",
    )
    trim.add_argument(
        "--form",
        choices=("constrained", "regularised"),
        help="programs (4)/(6), or (11), whose units are certified one by one; default constrained",
    )
    trim.add_argument(
        "--fit-weight",
        type=float,
        metavar="W",
        help="lambda of (11); default |W|_1 / epsilon^2 for each layer",
    )
    trim.add_argument(
        "--penalty",
        metavar="P",
        help="l1, elastic:RIDGE, or group[:WEIGHT] (whole inputs; constrained form); default l1",
    )
    trim.add_argument(
        "--penalise-bias", action="store_true", help="put biases under the penalty too"
    )
    trim.add_argument(
        "--free-zeros", action="store_true", help="let weights that are zero become something else"
    )
    trim.add_argument(
        "--link-normalised",
        action="store_true",
        help="read --epsilon as the paper's, on the link-normalised network",
    )
    trim.add_argument(
        "--solver",
        choices=("auto", "admm", "newton"),
        help="default auto: newton, but admm where the penalty couples the units (group) or the "
        "arrays are on another device than the processor",
    )
    trim.add_argument(
        "--gap",
        type=float,
        metavar="G",
        help="relative duality gap that a certificate must meet; default 1e-2",
    )
    trim.add_argument(
        "--violation",
        type=float,
        metavar="V",
        help="relative violation of the constraints that a certificate may have; default 1e-3",
    )
    trim.add_argument(
        "--tolerance",
        action=FormerName,
        now="--gap and --violation",
        metavar="GAP[,VIOLATION]",
    )
    trim.add_argument("--max-iterations", type=int, metavar="N", help="a layer; default 5000")
    trim.add_argument(
        "--accept-inexact",
        action="store_true",
        help="use weights that fall short of their certificate instead of keeping the dense ones",
    )
    parser.set_defaults(run=_run)


def _run(options: argparse.Namespace) -> int:
    """Retrain with Net-Trim."""
    from retrain.methods.amounts import layers_named
    from retrain.methods.net_trim.options import NetTrimOptions

    asked = given(
        options,
        "scheme",
        "epsilon",
        "relative_epsilon",
        "inflation",
        "form",
        "fit_weight",
        "solver",
        "max_iterations",
        "seed",
        "jobs",
        "threads",
        tolerance="gap",
        violation_tolerance="violation",
    )
    if options.tolerance is not None:
        asked["tolerance"], asked["violation_tolerance"] = _tolerances(options.tolerance)
    if options.epsilon is not None:
        asked["relative_epsilon"] = None
    if options.memory is not None:
        asked["memory"] = options.memory * 2**30
    if options.penalty is not None:
        asked["penalty"] = _penalty(options.penalty)
    settings = NetTrimOptions(
        **asked,
        sparsity=None if options.sparsity is None else by_layer("--sparsity", options.sparsity),
        penalise_bias=options.penalise_bias,
        zeros="free" if options.free_zeros else "stay",
        link_normalised=options.link_normalised,
        accept_inexact=options.accept_inexact,
    )
    from retrain.api.net_trim import net_trim
    from retrain.runs.prepare import select
    from retrain.runs.subject import subject_of

    with Progress(options) as progress:
        loaded = load(options)
        data, held_out = read_data(options)
        if options.dry_run:
            stream = subject_of(loaded, options.device).stream(data)
            chosen = layers_named(settings.sparsity) if options.layers is None else options.layers
            return _dry_run(stream, select(stream.layers, chosen, options.skip), settings)
        with interrupts_kept_from_workers(settings.jobs):
            run = net_trim(
                loaded,
                data,
                **given(options, "sparsity_of", "max_drop", "max_trials"),
                **what_is_asked(options, held_out, progress),
                on_trial=progress.tried,
                options=settings,
            )
    return conclude(run, options, loaded.note)


def _tolerances(text: str) -> tuple[float, float]:
    """Parse GAP[,VIOLATION], as --tolerance had it."""
    parts = text.split(",")
    try:
        values = [float(part) for part in parts]
    except ValueError:
        values = []
    if len(values) not in (1, 2):
        raise ValueError(f"--tolerance: got {text!r}, want GAP or GAP,VIOLATION")
    return values[0], values[-1]


def _penalty(text: str) -> Any:
    """Parse l1, elastic:RIDGE, group[:WEIGHT]."""
    from solvers import L1, ElasticNet, Group

    name, _, number = text.partition(":")
    try:
        if name == "l1" and not number:
            return L1()
        if name == "elastic":
            return ElasticNet(float(number))
        if name == "group":
            return Group(float(number)) if number else Group()
    except ValueError as error:
        raise ValueError(f"--penalty: {text!r}: {error}") from error
    raise ValueError(f"--penalty: got {text!r}, want l1, elastic:RIDGE or group[:WEIGHT]")


def _dry_run(stream: Any, names: list[str], settings: Any) -> int:
    """Say what would be retrained, on how many rows."""
    from array_api_compat import device

    from retrain.methods.net_trim.task import rows_within
    from retrain.stream.stream import layer

    for name in names:
        spec = layer(stream, name)
        total = stream.count(name)
        itemsize = stream.weight(name).itemsize
        solver, _ = settings.solver_on(str(device(stream.weight(name))))
        most = rows_within(spec, settings.memory, itemsize, solver)
        rows = min(total, most)
        size = rows * settings.memory / most
        print(
            f"{name}: {spec.shape[0]} x {spec.shape[1]}, {rows:,} of {total:,} rows, about "
            f"{size / 2**30:.2f} GiB, then {spec.follows}"
        )
    return DONE
