"""The command line: `retrain layers`, `retrain trim`, `retrain demo`.

Imports what a command needs when it is called, so that help answers at once. Exit codes: 0 done, 1
done but something is not certified, 2 bad usage or input; 130 after Ctrl-C.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, NoReturn

if TYPE_CHECKING:
    from retrain.api import Run
    from retrain.layer_report import LayerReport

DONE, NOT_CERTIFIED, BAD_INPUT, INTERRUPTED = 0, 1, 2, 130


class _Parser(argparse.ArgumentParser):
    """A parser whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(BAD_INPUT, f"{self.prog}: error: {message} (see {self.prog} --help)\n")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return its exit code."""
    parser = build_parser()
    options = parser.parse_args(arguments)
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    if getattr(options, "threads", None):
        # Before numpy and torch start their pools.
        for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
            os.environ[name] = str(options.threads)
    try:
        return options.run(options)
    except KeyboardInterrupt:
        print("retrain: interrupted; the same command resumes", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        # The reader of our output went away; what was to be written to disk is written.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return DONE
    except (ValueError, OSError, FloatingPointError) as error:
        print(f"retrain: error: {one_line(error)}", file=sys.stderr)
        return BAD_INPUT


def one_line(error: BaseException) -> str:
    """Say an error in one line; of an OSError the system's words and the file."""
    if isinstance(error, OSError) and error.strerror:
        where = f": {error.filename}" if error.filename else ""
        return f"{error.strerror}{where}"
    return " ".join(str(error).split())


def build_parser() -> argparse.ArgumentParser:
    """Build the parser of all commands."""
    parser = _Parser(
        prog="retrain",
        description="Convex and second-order retraining of trained networks, with certificates.",
    )
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    _add_layers(commands)
    _add_trim(commands)
    _add_demo(commands)
    return parser


# --- retrain layers ------------------------------------------------------------------


def _add_layers(commands: Any) -> None:
    parser = commands.add_parser(
        "layers",
        help="list what can be retrained",
        description="List a saved network's layers: name, kind, shape, what follows, and whether "
        "they can be retrained.",
    )
    _add_model(parser)
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(run=run_layers)


def run_layers(options: argparse.Namespace) -> int:
    """List a model's layers."""
    from retrain.adapters.find import layer_table

    loaded = _load(options)
    layers = layer_table(loaded.module)
    if options.json:
        entries = [{**asdict(found.spec), "meets": found.meets} for found in layers]
        print(json.dumps({"note": loaded.note, "layers": entries}, indent=1))
        return DONE
    from rich.console import Console

    from retrain.report.terminal import layer_list

    console = Console(width=None if sys.stdout.isatty() else 120, highlight=False)
    if loaded.note:
        console.print(loaded.note, markup=False)
    console.print(layer_list(layers))
    return DONE


# --- retrain trim --------------------------------------------------------------------


def _add_trim(commands: Any) -> None:
    parser = commands.add_parser(
        "trim",
        help="retrain a saved network layer by layer with Net-Trim",
        description="Net-Trim: find, layer by layer, the sparsest weights (in l1) that keep each "
        "layer's responses, and prove how far the outputs can have moved. The same command "
        "resumes a run that was interrupted.",
    )
    _add_model(parser)
    _add_run(parser)
    trim = parser.add_argument_group("Net-Trim")
    trim.add_argument(
        "--scheme",
        choices=("cascade", "parallel"),
        default="cascade",
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
    trim.add_argument(
        "--inflation",
        type=float,
        default=1.1,
        metavar="G",
        help="cascade: by how much later layers may add, >= 1, gamma of (7); default 1.1",
    )
    trim.add_argument(
        "--form",
        choices=("constrained", "regularised"),
        default="constrained",
        help="programs (4)/(6), or (11), whose units are certified one by one",
    )
    trim.add_argument(
        "--fit-weight",
        type=float,
        metavar="W",
        help="lambda of (11); default |W|_1 / epsilon^2 for each layer",
    )
    trim.add_argument(
        "--penalty",
        default="l1",
        metavar="P",
        help="l1, elastic:RIDGE, or group[:WEIGHT] (whole inputs; constrained form); default l1",
    )
    trim.add_argument(
        "--penalise-bias", action="store_true", help="put biases under the penalty too"
    )
    trim.add_argument(
        "--link-normalised",
        action="store_true",
        help="read --epsilon as the paper's, on the link-normalised network",
    )
    trim.add_argument(
        "--tolerance",
        default="1e-2,1e-3",
        metavar="GAP[,VIOLATION]",
        help="what a certificate must meet; default 1e-2,1e-3",
    )
    trim.add_argument(
        "--max-iterations", type=int, default=5000, metavar="N", help="a layer; default 5000"
    )
    trim.add_argument(
        "--accept-inexact",
        action="store_true",
        help="use weights that fall short of their certificate instead of keeping the dense ones",
    )
    parser.set_defaults(run=run_trim)


def run_trim(options: argparse.Namespace) -> int:
    """Retrain with Net-Trim."""
    from retrain.methods.net_trim import NetTrimOptions

    gap, violation = _tolerances(options.tolerance)
    relative = options.relative_epsilon
    settings = NetTrimOptions(
        scheme=options.scheme,
        epsilon=options.epsilon,
        relative_epsilon=0.05 if relative is None and options.epsilon is None else relative,
        inflation=options.inflation,
        form=options.form,
        fit_weight=options.fit_weight,
        penalty=_penalty(options.penalty),
        penalise_bias=options.penalise_bias,
        link_normalised=options.link_normalised,
        tolerance=gap,
        violation_tolerance=violation,
        max_iterations=options.max_iterations,
        accept_inexact=options.accept_inexact,
        memory=options.memory * 2**30,
        seed=options.seed,
        jobs=options.jobs,
        threads=options.threads,
    )
    from retrain.api import net_trim, select
    from retrain.subject import subject_of

    loaded = _load(options)
    data, held_out = _data(options)
    if options.dry_run:
        stream = subject_of(loaded, options.device).stream(data)
        return _dry_run(stream, select(stream.layers, options.layers, options.skip), settings)
    with _Progress(options) as progress:
        run = net_trim(
            loaded,
            data,
            out=options.out,
            evaluate=held_out,
            layers=options.layers,
            skip=options.skip,
            fine_tune=options.fine_tune,
            device=options.device,
            on_layer=progress.done,
            options=settings,
        )
    return _conclude(run, options, loaded.note)


def _tolerances(text: str) -> tuple[float, float]:
    """Parse GAP[,VIOLATION]."""
    parts = text.split(",")
    try:
        values = [float(part) for part in parts]
    except ValueError:
        values = []
    if len(values) not in (1, 2):
        raise ValueError(f"--tolerance: want GAP or GAP,VIOLATION, got {text!r}")
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
    raise ValueError(f"--penalty: want l1, elastic:RIDGE or group[:WEIGHT], got {text!r}")


def _dry_run(stream: Any, names: list[str], settings: Any) -> int:
    """Say what would be retrained, on how many rows."""
    from retrain.methods.net_trim import rows_within
    from retrain.stream import layer

    for name in names:
        spec = layer(stream, name)
        total = stream.count(name)
        itemsize = stream.weight(name).itemsize
        rows = min(total, rows_within(spec, settings.memory, itemsize))
        size = rows * settings.memory / rows_within(spec, settings.memory, itemsize)
        print(
            f"{name}: {spec.shape[0]} x {spec.shape[1]}, {rows:,} of {total:,} rows, about "
            f"{size / 2**30:.2f} GiB, then {spec.follows}"
        )
    return DONE


# --- retrain demo --------------------------------------------------------------------


def _add_demo(commands: Any) -> None:
    parser = commands.add_parser(
        "demo",
        help="train a small network on embedded digits, prune it both ways, report",
        description="Train a 64-128-64-10 ReLU network on scikit-learn's digits, save it, retrain "
        "it with both schemes of Net-Trim, and compare.",
    )
    parser.add_argument(
        "--out", default="runs/demo", metavar="DIR", help="where to write; default runs/demo"
    )
    _add_common(parser)
    parser.set_defaults(run=run_demo)


def run_demo(options: argparse.Namespace) -> int:
    """Train, prune both ways, compare."""
    from retrain.demo import demo

    return demo(options.out, seed=options.seed, quiet=options.quiet, as_json=options.json)


# --- shared --------------------------------------------------------------------------


def _add_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "model",
        metavar="MODEL",
        help=".safetensors, a .pt or .pth state dict, or (with --trust) a .pt2 exported program",
    )
    parser.add_argument(
        "--arch",
        default="auto",
        metavar="ARCH",
        help="auto: a chain of dense layers, read off the shapes; or package.module:factory",
    )
    parser.add_argument(
        "--activation",
        default="relu",
        metavar="A",
        help="what --arch auto assumes between the layers; default relu",
    )
    parser.add_argument(
        "--trust",
        action="store_true",
        help="load a .pt2 file, which can run code of whoever made it",
    )


def _add_common(parser: argparse.ArgumentParser) -> None:
    common = parser.add_argument_group("all commands")
    common.add_argument("--seed", type=int, default=0, metavar="N", help="default 0")
    common.add_argument(
        "--threads",
        type=int,
        metavar="N",
        help="linear algebra threads of each job; default: cores / jobs",
    )
    common.add_argument("--device", metavar="D", help="cpu, cuda, cuda:1, ...; default cpu")
    common.add_argument("--json", action="store_true", help="print the run's record as JSON")
    common.add_argument("--quiet", action="store_true", help="print nothing but errors")


def _add_run(parser: argparse.ArgumentParser) -> None:
    data = parser.add_argument_group("data")
    data.add_argument(
        "--data",
        required=True,
        metavar="SRC",
        help="calibration data: FILE.npz (x, optionally y), FILE.npy, mnist:DIR, mnist-test:DIR, "
        "digits, digits-test, or package.module:factory",
    )
    data.add_argument("--limit", type=int, metavar="N", help="use the first N samples of --data")
    data.add_argument(
        "--normalise", metavar="MEAN,STD", help="(x - MEAN) / STD, for all data of this command"
    )
    data.add_argument("--evaluate", metavar="SRC", help="held-out data, for accuracy and bounds")
    run = parser.add_argument_group("run")
    run.add_argument("--out", required=True, metavar="DIR", help="run directory, new or to resume")
    run.add_argument(
        "--layers", metavar="PATTERN", help="shell patterns of layer names, comma-separated"
    )
    run.add_argument("--skip", metavar="PATTERN", help="layers to leave out")
    run.add_argument(
        "--jobs", type=int, default=1, metavar="N", help="layers at a time (parallel scheme)"
    )
    run.add_argument(
        "--memory",
        type=float,
        default=4.0,
        metavar="GIB",
        help="a layer's solve; beyond it rows are sampled; default 4",
    )
    run.add_argument(
        "--fine-tune",
        type=int,
        default=0,
        metavar="EPOCHS",
        help="train after pruning, zeros kept at zero; wants labels",
    )
    run.add_argument("--dry-run", action="store_true", help="say what would be done, and stop")
    _add_common(parser)


def _load(options: argparse.Namespace) -> Any:
    from retrain.adapters.load import load_model

    return load_model(
        options.model, arch=options.arch, activation=options.activation, trust=options.trust
    )


def _data(options: argparse.Namespace) -> tuple[Any, Any]:
    from retrain.data import load_data

    data = load_data(options.data, limit=options.limit, normalise=options.normalise)
    if options.evaluate is None:
        return data, None
    return data, load_data(options.evaluate, normalise=options.normalise)


def _conclude(run: Run, options: argparse.Namespace, note: str) -> int:
    """Print what a run found; return the exit code."""
    if options.json:
        from retrain.files import json_bytes

        sys.stdout.write(json_bytes(run.record).decode())
    elif not options.quiet:
        from rich.console import Console

        from retrain.report.terminal import run_table, summary

        console = Console(width=None if sys.stdout.isatty() else 120, highlight=False)
        if note:
            console.print(note, markup=False)
        console.print(run_table(run.layers))
        for line in summary(run.record, run.bounds):
            console.print(line, markup=False)
        console.print(f"written to {run.directory}", markup=False)
    return DONE if run.certified else NOT_CERTIFIED


class _Progress:
    """Layers as they finish: a bar on a terminal, plain lines otherwise, both on stderr."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.silent = options.quiet or options.json
        self.live = sys.stderr.isatty() and not self.silent
        self.bar: Any = None
        self.task: Any = None

    def __enter__(self) -> _Progress:
        if self.live:
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeElapsedColumn

            self.bar = Progress(
                "{task.description}",
                BarColumn(),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                console=Console(stderr=True),
                transient=True,
            )
            self.bar.start()
            self.task = self.bar.add_task("layers", total=None)
        return self

    def __exit__(self, *_: object) -> None:
        if self.bar is not None:
            self.bar.stop()

    def done(self, report: LayerReport, total: int) -> None:
        """Note a finished layer, one of `total`."""
        from retrain.report.terminal import verdict

        line = (
            f"{report.name}: {100 * report.sparsity:.1f} % zeros, {verdict(report)}, "
            f"{report.seconds:.1f} s"
        )
        if self.live:
            self.bar.console.print(line, markup=False, highlight=False)
            self.bar.update(self.task, total=total, advance=1)
        elif not self.silent:
            print(line, file=sys.stderr, flush=True)
