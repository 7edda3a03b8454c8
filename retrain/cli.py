"""The command line: `retrain layers`, `retrain trim`, `retrain lobs`, `retrain demo`.

Imports what a command needs when it is called, so that help answers at once. Exit codes: 0 done, 1
done but something is not certified, 2 bad usage or input; 130 after Ctrl-C.
"""

from __future__ import annotations

import _thread
import argparse
import errno
import json
import logging
import os
import signal
import sys
import threading
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import BrokenExecutor
from contextlib import contextmanager
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
    logging.basicConfig(format="%(message)s", level=logging.ERROR)
    if not sys.warnoptions:  # python -W ... shows them
        warnings.simplefilter("ignore")
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
    except (ValueError, OSError, FloatingPointError, MemoryError, BrokenExecutor) as error:
        print(f"retrain: error: {one_line(error)}", file=sys.stderr)
        return BAD_INPUT


def one_line(error: BaseException) -> str:
    """Say an error in one line; of an OSError the system's words and the file."""
    if isinstance(error, OSError) and error.strerror:
        where = f": {error.filename}" if error.filename else ""
        full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        after = "; finished layers are kept, and the same command resumes" if full else ""
        return f"{error.strerror}{where}{after}"
    if isinstance(error, MemoryError):
        return f"out of memory ({error}); use a smaller --memory, --jobs or --limit"
    if isinstance(error, BrokenExecutor):
        return "a worker ended before its time (out of memory?); the same command resumes"
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
    _add_lobs(commands)
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
    from retrain.report.terminal import layer_list, output

    console = output()
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
    from retrain.methods.net_trim_options import NetTrimOptions

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
    with _Progress(options) as progress, _interrupts_kept_from_workers(options.jobs):
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


# --- retrain lobs --------------------------------------------------------------------


def _add_lobs(commands: Any) -> None:
    parser = commands.add_parser(
        "lobs",
        help="prune a saved network by second-order information (L-OBS and its relatives)",
        description="L-OBS: remove, layer by layer, the weights whose removal changes the layer's "
        "response least, and let the others make up for them; theorem 3.2's bound on the outputs "
        "comes with it. The same command resumes a run that was interrupted.",
    )
    _add_model(parser)
    _add_run(parser)
    lobs = parser.add_argument_group("L-OBS")
    lobs.add_argument(
        "--method",
        default="auto",
        metavar="M",
        help="one-shot (the paper's), sweep, greedy, swaps, large, best, inputs, or auto: swaps, "
        "large beyond 2048 inputs; default auto",
    )
    lobs.add_argument(
        "--pattern",
        default="layer",
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
    amount.add_argument(
        "--tolerance",
        metavar="T",
        help="remove while the root mean squared error of a layer's response is at most T; or by "
        "layer, fc1=0.5,fc2=0.1",
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
        default="dense",
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
    parser.set_defaults(run=run_lobs)


def run_lobs(options: argparse.Namespace) -> int:
    """Prune by second-order information."""
    from retrain.second_order import lobs, plan_stages

    sparsity = [_by_layer("--sparsity", text) for text in options.sparsity or []]
    tolerance = None
    if options.tolerance is not None:
        tolerance = _by_layer("--tolerance", options.tolerance)
    amounts: dict[str, Any] = {
        "sparsity": sparsity[0] if len(sparsity) == 1 else sparsity or None,
        "tolerance": tolerance,
        "stages": options.stages,
    }
    settings = {
        "method": options.method,
        "pattern": options.pattern,
        "damping": options.damping,
        "calibration": options.calibration,
        "bias": "keep" if options.keep_bias else "update",
        "zeros": "free" if options.free_zeros else "stay",
        "memory": options.memory * 2**30,
        "seed": options.seed,
        "jobs": options.jobs,
        "threads": options.threads,
    }
    plan = plan_stages(None, settings=settings, **amounts)
    loaded = _load(options)
    data, held_out = _data(options)
    if options.dry_run:
        return _dry_run_lobs(options, loaded, data, plan)
    with _Progress(options) as progress:
        run = lobs(
            loaded,
            data,
            out=options.out,
            evaluate=held_out,
            layers=options.layers,
            skip=options.skip,
            fine_tune=options.fine_tune,
            device=options.device,
            on_layer=progress.done,
            **amounts,
            **settings,
        )
    return _conclude(run, options, loaded.note)


def _by_layer(argument: str, text: str) -> float | dict[str, float]:
    """Parse a number, or NAME=NUMBER,...: layer names or shell patterns."""
    try:
        if "=" not in text:
            return float(text)
        pairs = [part.rpartition("=") for part in text.split(",")]
        named = {name.strip(): float(number) for name, _, number in pairs}
    except ValueError as error:
        raise ValueError(
            f"{argument}: want a number, or NAME=NUMBER,NAME=NUMBER, got {text!r}"
        ) from error
    if "" in named or len(named) < len(pairs):
        raise ValueError(f"{argument}: a name is missing or given twice in {text!r}")
    return named


def _dry_run_lobs(options: argparse.Namespace, loaded: Any, data: Any, plan: Any) -> int:
    """Say what would be pruned, how, in how much memory."""
    from retrain.api import select
    from retrain.methods.lobs import lobs_plan
    from retrain.second_order import layers_of
    from retrain.subject import subject_of

    stream = subject_of(loaded, options.device).stream(data)
    for number, stage in enumerate(plan, start=1):
        chosen = options.layers if options.layers is not None else layers_of(stage)
        names = select(stream.layers, chosen, options.skip)
        for spec, removed, size in lobs_plan(stream, stage, names):
            amount = "to a tolerance" if removed is None else f"{removed:,} of {spec.size:,} to go"
            place = f"stage {number}, " if len(plan) > 1 else ""
            print(
                f"{place}{spec.name}: {spec.shape[0]} x {spec.shape[1]}, {amount}, by "
                f"{stage.method_for(spec)} on {stream.count(spec.name):,} rows, about "
                f"{size / 2**30:.2f} GiB"
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

    return demo(
        options.out,
        seed=options.seed,
        threads=options.threads,
        device=options.device,
        quiet=options.quiet,
        as_json=options.json,
    )


@contextmanager
def _interrupts_kept_from_workers(jobs: int) -> Iterator[None]:
    """Let Ctrl-C reach this process only, which then ends its workers.

    A terminal sends SIGINT to every process of the job, and each worker would print a traceback.
    They inherit that the signal is blocked; a thread waits for it in the main one's stead.
    """
    if jobs == 1 or not hasattr(signal, "pthread_sigmask"):
        yield
        return
    over = threading.Event()

    def listen() -> None:
        while not over.is_set():
            if signal.sigtimedwait({signal.SIGINT}, 0.1) is not None:
                _thread.interrupt_main()

    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    listener = threading.Thread(target=listen, daemon=True)
    listener.start()
    try:
        yield
    finally:
        over.set()
        listener.join()
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})


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
        "--jobs",
        type=int,
        default=1,
        metavar="N",
        help="layers at a time (parallel scheme, dense calibration)",
    )
    run.add_argument(
        "--memory",
        type=float,
        default=4.0,
        metavar="GIB",
        help="a layer's solve; beyond it Net-Trim samples rows, L-OBS refuses; default 4",
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
        from retrain.report.terminal import output, run_table, summary

        console = output()
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
