"""What the commands share: exit codes, arguments, progress, the last words."""

from __future__ import annotations

import _thread
import argparse
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from retrain.cli.status import Status

if TYPE_CHECKING:
    from retrain.adapters.files.load import LoadedModel
    from retrain.runs.epsilon_search import Goal, Trial
    from retrain.runs.outcome import Run
    from retrain.stream.layer_report import LayerReport

DONE, NOT_CERTIFIED, BAD_INPUT, INTERRUPTED = 0, 1, 2, 130


class FormerName(argparse.Action):
    """An option under the name that it had before: still read, with a warning that names the new.

    Parameters
    ----------
    now : str
        The option as it is called now.
    """

    def __init__(self, *arguments: Any, now: str, **options: Any) -> None:
        super().__init__(*arguments, **{**options, "help": argparse.SUPPRESS})
        self.now = now

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option: str | None = None,
    ) -> None:
        """Keep the value and warn."""
        print(f"{parser.prog}: warning: {option} is now called {self.now}", file=sys.stderr)
        setattr(namespace, self.dest, values)


def add_model(parser: argparse.ArgumentParser) -> None:
    """Add the arguments that name a saved network."""
    parser.add_argument(
        "model",
        metavar="MODEL",
        help=".safetensors, a .pt or .pth state dict, the directory of a finished run, or (with "
        "--trust) a .pt2 exported program",
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
        help="load a .pt2 file, which can run code of whoever made it; import the factory that a "
        "run names",
    )
    parser.add_argument(
        "--key",
        metavar="NAME",
        help="which mapping of tensors of a checkpoint to take, where it has several",
    )


def add_common(parser: argparse.ArgumentParser) -> None:
    """Add the options of all commands."""
    common = parser.add_argument_group("all commands")
    common.add_argument("--seed", type=int, metavar="N", help="default 0")
    common.add_argument(
        "--threads",
        type=int,
        metavar="N",
        help="linear algebra threads of each job; default: cores / jobs",
    )
    common.add_argument("--device", metavar="D", help="cpu, cuda, cuda:1, ...; default cpu")
    common.add_argument("--json", action="store_true", help="print the run's record as JSON")
    common.add_argument("--quiet", action="store_true", help="print nothing but errors")


def add_run(parser: argparse.ArgumentParser) -> None:
    """Add the options of all commands that retrain."""
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
        metavar="N",
        help="layers at a time (parallel scheme, dense calibration); default 1",
    )
    run.add_argument(
        "--memory",
        type=float,
        metavar="GIB",
        help="a layer's solve; beyond it Net-Trim samples rows, L-OBS leaves the layer as it is; "
        "default 4",
    )
    run.add_argument(
        "--fine-tune",
        type=int,
        default=0,
        metavar="EPOCHS",
        help="train after pruning, zeros kept at zero; wants labels",
    )
    run.add_argument("--dry-run", action="store_true", help="say what would be done, and stop")
    add_common(parser)


def load(options: argparse.Namespace) -> Any:
    """Load the network that the options name."""
    from retrain.adapters.files.load import load_model

    if not options.model:
        raise ValueError("model: got '', want a file or the directory of a finished run")
    from retrain.runs.directory import RUN_FILE

    folder = Path(options.model)
    if folder.is_dir() and not (folder / RUN_FILE).exists():
        from retrain.adapters.files.hugging_face import load_directory

        if (folder / "config.json").is_file():
            return load_directory(folder)
    if folder.is_dir():
        return _load_run(options)
    return load_model(
        options.model,
        arch=options.arch,
        activation=options.activation,
        trust=options.trust,
        key=options.key,
    )


def _load_run(options: argparse.Namespace) -> LoadedModel:
    """Load the network of a finished run; what was trained on normalised data says so."""
    from torch import nn

    from retrain.adapters.files.load import LoadedModel, made_module
    from retrain.api.load import load as load_run

    path = Path(options.model)
    if options.key is not None:
        raise ValueError(f"key: got {options.key!r}, but {options.model!r} is a run; leave it")
    given_arch = None if options.arch == "auto" else made_module(options.arch)
    run = load_run(path, given_arch, trust=options.trust)
    if not isinstance(run.model, nn.Module):
        raise ValueError(f"model: {options.model!r} is a run on a chain of arrays, want a module")
    note = f"read from the run {options.model}"
    recipe = run.record.get("recipe")
    normalise = recipe["data"].get("normalise") if isinstance(recipe, dict) else None
    if normalise and not vars(options).get("normalise"):
        note += f", which trained with --normalise {normalise}"
    return LoadedModel(
        run.model.eval(), {name: name for name in run.model.state_dict()}, path, note
    )


def read_data(options: argparse.Namespace) -> tuple[Any, Any]:
    """Load the calibration data and the held-out data, if any."""
    data = _source(options, options.data, options.limit)
    if options.evaluate is None:
        return data, None
    return data, _source(options, options.evaluate, None)


def _source(options: argparse.Namespace, source: str, limit: int | None) -> Any:
    """Load a data source; a text is cut into tokens by the network's own tokenizer."""
    from retrain.data.sources import load_data

    kind, _, file = source.partition(":")
    if kind != "text":
        return load_data(source, limit=limit, normalise=options.normalise)
    from retrain.adapters.files.hugging_face import text_data

    if not Path(options.model).is_dir():
        raise ValueError("data: text:FILE wants a Hugging Face directory as the model")
    return text_data(file, options.model, limit=limit)


def what_is_asked(options: argparse.Namespace, held_out: Any, progress: Progress) -> dict[str, Any]:
    """Return the arguments that `retrain.net_trim` and `retrain.lobs` share, by name."""
    return {
        "out": options.out,
        "evaluate": held_out,
        "layers": options.layers,
        "skip": options.skip,
        "fine_tune": options.fine_tune,
        "device": options.device,
        "on_layer": progress.done,
    }


def given(options: argparse.Namespace, *names: str, **fields: str) -> dict[str, Any]:
    """Return the options that were given, so that all others keep the library's own defaults.

    `names` are options that are called as the library's arguments are; `fields` has the option's
    name by the argument's.
    """
    pairs = {**{name: name for name in names}, **fields}
    values = {field: getattr(options, name) for field, name in pairs.items()}
    return {field: value for field, value in values.items() if value is not None}


def by_layer(argument: str, text: str) -> float | dict[str, float]:
    """Parse a number, or NAME=NUMBER,...: layer names or shell patterns."""
    try:
        if "=" not in text:
            return float(text)
        pairs = [part.rpartition("=") for part in text.split(",")]
        named = {name.strip(): float(number) for name, _, number in pairs}
    except ValueError as error:
        raise ValueError(
            f"{argument}: got {text!r}, want a number, or NAME=NUMBER,NAME=NUMBER"
        ) from error
    if "" in named or len(named) < len(pairs):
        raise ValueError(f"{argument}: a name is missing or given twice in {text!r}")
    return named


def conclude(run: Run, options: argparse.Namespace, note: str) -> int:
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
        for line in summary(run.record, run.layers, run.bounds):
            console.print(line, markup=False)
        console.print(f"written to {run.directory}", markup=False)
    met = (
        run.record.get("search", {}).get("met", True) or "sparsity" in run.record["search"]["asked"]
    )
    return DONE if run.certified and met and not run.defects else NOT_CERTIFIED


class Progress:
    """Layers as they finish: a bar on a terminal, plain lines otherwise, both on stderr."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.silent = options.quiet or options.json
        self.live = sys.stderr.isatty() and not self.silent
        self.bar: Any = None
        self.task: Any = None
        self.status: Status | None = None

    def __enter__(self) -> Progress:
        if self.live:
            from rich import progress
            from rich.console import Console

            self.bar = progress.Progress(
                "{task.description}",
                progress.BarColumn(),
                progress.MofNCompleteColumn(),
                progress.TimeElapsedColumn(),
                console=Console(stderr=True),
                transient=True,
            )
            self.bar.start()
            self.task = self.bar.add_task("layers", total=None)
        if not self.silent:
            self.status = Status(self._phase, live=self.live)
            self.status.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        if self.status is not None:
            self.status.__exit__()
        if self.bar is not None:
            self.bar.stop()

    def done(self, report: LayerReport, total: int) -> None:
        """Note a finished layer, one of `total`."""
        from retrain.report.terminal import verdict

        self.say(
            f"{report.name}: {100 * report.sparsity:.1f} % zeros, {verdict(report)}, "
            f"{report.seconds:.1f} s"
        )
        if self.live:
            self.bar.update(self.task, total=total, advance=1)

    def tried(self, trial: Trial, goal: Goal) -> None:
        """Note a finished trial of a search for one epsilon."""
        from retrain.report.terminal import trial_line

        self.say(f"tried {trial_line(asdict(trial))}")

    def _phase(self, line: str) -> None:
        """Show what is being done: beside the bar, or as a line of its own."""
        if self.live:
            self.bar.update(self.task, description=line)
        else:
            print(line, file=sys.stderr, flush=True)

    def say(self, line: str) -> None:
        """Show a line that stays."""
        if self.status is not None:
            self.status.spoken()
        if self.live:
            self.bar.console.print(line, markup=False, highlight=False)
        elif not self.silent:
            print(line, file=sys.stderr, flush=True)


@contextmanager
def interrupts_kept_from_workers(jobs: int) -> Iterator[None]:
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
