"""`retrain train`: train by a recipe, pruning meanwhile."""

from __future__ import annotations

import argparse
import os
import sys
import tomllib
from typing import Any

from retrain.cli.shared import DONE, Progress


def add_command(commands: Any) -> None:
    """Add `retrain train` to the parser."""
    parser = commands.add_parser(
        "train",
        help="train by a recipe, and prune meanwhile (gates, itp, shrinknets)",
        description="Train a network by a recipe, removing what its method finds of no use on the "
        "way, and save what is left as a plain network. The same command resumes a run that was "
        "interrupted, to the same result. Under torchrun, several processes share every batch: "
        "torchrun --nproc-per-node 2 -m retrain train RECIPE --out DIR.",
    )
    parser.add_argument(
        "recipe", nargs="?", metavar="RECIPE", help="a .toml file, or a name that --list shows"
    )
    parser.add_argument("--list", action="store_true", help="list the built-in recipes, and stop")
    parser.add_argument("--out", metavar="DIR", help="run directory, new or to resume")
    parser.add_argument(
        "--data", metavar="SRC", help="training data, instead of the recipe's: as of retrain trim"
    )
    parser.add_argument("--evaluate", metavar="SRC", help="test data, instead of the recipe's")
    parser.add_argument(
        "--limit", type=int, metavar="N", help="use the first N samples of the training data"
    )
    parser.add_argument("--epochs", type=int, metavar="N", help="instead of the recipe's")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        dest="changes",
        metavar="TABLE.KEY=VALUE",
        help="replace any entry of the recipe, such as optimizer.lr=0.01; may be repeated",
    )
    parser.add_argument(
        "--export", action="store_true", help="write an exported program, model.pt2, too"
    )
    common = parser.add_argument_group("all commands")
    common.add_argument("--seed", type=int, metavar="N", help="default: the recipe's")
    common.add_argument("--threads", type=int, metavar="N", help="linear algebra threads")
    common.add_argument(
        "--device", metavar="D", help="cpu, cuda, cuda:1, ...; default: the recipe's"
    )
    common.add_argument("--json", action="store_true", help="print the run's record as JSON")
    common.add_argument("--quiet", action="store_true", help="print nothing but errors")
    parser.set_defaults(run=_run)


def _run(options: argparse.Namespace) -> int:
    """Train."""
    if options.list:
        from retrain.trainers.recipes.recipe import built_in

        for name, title in built_in().items():
            print(f"{name}: {title}" if title else name)
        return DONE
    for name in ("recipe", "out"):
        if getattr(options, name) is None:
            raise ValueError(f"{'--' if name == 'out' else ''}{name}: is missing; retrain train -h")
    changes = _changes(options)
    from retrain.methods.amounts import check_parallel

    check_parallel(1, options.threads, 0 if options.seed is None else options.seed)
    from retrain.runs.training import train

    first = os.environ.get("RANK", "0") == "0"
    progress = _Epochs(options)
    with progress:
        from retrain.runs.training import train

        run = train(
            options.recipe,
            out=options.out,
            changes=changes,
            export=options.export,
            on_epoch=progress.note,
        )
    if not first:
        return DONE
    if options.json:
        from retrain.files import json_bytes

        sys.stdout.write(json_bytes(run.record).decode())
    elif not options.quiet:
        from retrain.report.terminal import output
        from retrain.report.training import training_summary

        console = output()
        for line in training_summary(run.record):
            console.print(line, markup=False)
        console.print(f"written to {run.directory}", markup=False)
    return DONE


class _Epochs(Progress):
    """Epochs as they finish, where a command of layers has layers."""

    def note(self, line: dict[str, Any], total: int) -> None:
        """Note a finished epoch, one of `total`: a line of the history."""
        from retrain.report.training import epoch_line

        if self.status is not None:
            self.status.spoken()
        if self.live:
            self.bar.console.print(epoch_line(line, total), markup=False, highlight=False)
            self.bar.update(self.task, total=total, completed=line["epoch"])
        elif not self.silent:
            print(epoch_line(line, total), file=sys.stderr, flush=True)


def _changes(options: argparse.Namespace) -> dict[str, Any]:
    """Return what the options change in the recipe."""
    changes: dict[str, Any] = {}
    for text in options.changes:
        name, equals, value = text.partition("=")
        if not equals:
            raise ValueError(f"--set: got {text!r}, want TABLE.KEY=VALUE")
        changes[name.strip()] = _value(value.strip())
    given = {
        "data.train": options.data,
        "data.test": options.evaluate,
        "data.limit": options.limit,
        "training.epochs": options.epochs,
        "training.seed": options.seed,
        "training.device": options.device,
    }
    return {**changes, **{name: value for name, value in given.items() if value is not None}}


def _value(text: str) -> Any:
    """Read a value as TOML has them; what is none is text."""
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text
