"""The layer-gates paper's table 2: layers pruned while training, on MNIST.

    python -m bench papers.gates --data mnist:DIR --test mnist-test:DIR --rows dense-10 dense-20 \
        --seeds 3 --out RUNS

Each training is a run directory in RUNS, by the built-in recipe of its row; a row that was
interrupted goes on, a finished one is read. Load is what (43) counts, over the whole training and
against the dense network's; seconds are processor seconds of an epoch, its test included, at the
start and at the end of the 50 epochs that prune.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from retrain.files import write_whole
from retrain.runs.trained import TrainedRun
from retrain.runs.training import train

FINE_TUNING = 10


@dataclass(frozen=True)
class PaperRow:
    """Table 2, means and standard deviations over ten runs, in per cent."""

    layers: str
    accuracy: str
    pruned: str


PAPER = {
    "dense-10": PaperRow("2 ± 0", "98.27 ± 0.13", "47.42 ± 0"),
    "dense-20": PaperRow("2 ± 0", "98.22 ± 0.07", "66.98 ± 0"),
    "dense-50": PaperRow("2.17 ± 0.40", "98.25 ± 0.13", "84.11 ± 0.72"),
    "conv-10": PaperRow("2.20 ± 0.42", "99.23 ± 0.06", "32.62 ± 3.68"),
    "conv-20": PaperRow("2.70 ± 0.82", "99.23 ± 0.07", "52.59 ± 4.13"),
    "conv-40": PaperRow("3.00 ± 0.67", "99.32 ± 0.07", "71.34 ± 2.32"),
}
UNGATED = {"dense": 1, "conv": 2}
"""Hidden layers that have no gate: the first, and where the filters become 16."""


@dataclass(frozen=True)
class Result:
    """One training.

    Attributes
    ----------
    layers : int
        Left, of those that the row counts (dense layers, or convolutions).
    accuracy, pruned, operations_pruned : float
        On the test set; pPR; fPR. In per cent.
    load : float
        The dense network's cumulative training load over this one's.
    seconds : tuple of float
        Processor seconds an epoch: the mean of the first three, and of the last three that prune.
    left : list of str
        Names of the blocks kept.
    blocks : list of int
        Blocks left after each epoch.
    """

    layers: int
    accuracy: float
    pruned: float
    operations_pruned: float
    load: float
    seconds: tuple[float, float]
    left: list[str]
    blocks: list[int]


def train_row(row: str, seed: int, epochs: int, options: argparse.Namespace) -> Result:
    """Train, or go on training, one network of a row."""
    name = f"{row}-seed-{seed}-epochs-{epochs}"
    clock = _Clock(options.out / f"{name}.seconds.json")
    changes: dict[str, Any] = {
        "data.train": options.data,
        "data.test": options.test,
        "training.seed": seed,
        "training.epochs": epochs + FINE_TUNING,
        **dict(options.set),
    }
    run = train(
        f"gates-mnist-{row}",
        out=options.out / name,
        changes=changes,
        on_epoch=clock.note,
    )
    return result_of(run, row, epochs, clock.seconds)


def result_of(run: TrainedRun, row: str, epochs: int, seconds: dict[int, float]) -> Result:
    """Read what table 2 reports off a finished run."""
    last = run.history[-1]
    left = last["method"]["kept"]
    each = [seconds.get(epoch, float("nan")) for epoch in range(1, epochs + 1)]
    return Result(
        layers=len(left) + UNGATED[row.partition("-")[0]],
        accuracy=100 * (run.test_accuracy or float("nan")),
        pruned=100 * last["parameters_pruned"],
        operations_pruned=100 * last["operations_pruned"],
        load=last["dense_load"] / last["load"],
        seconds=(float(np.nanmean(each[:3])), float(np.nanmean(each[-3:]))),
        left=left,
        blocks=[_blocks(line["method"]) for line in run.history],
    )


def _blocks(method: dict[str, Any]) -> int:
    return len(method["kept"]) + len(method["theta"])


class _Clock:
    """Processor seconds an epoch, in a file beside the run; those of epochs done before stay."""

    def __init__(self, path: Path) -> None:
        self.path = path
        held = json.loads(path.read_text()) if path.exists() else {}
        self.seconds: dict[int, float] = {int(key): value for key, value in held.items()}
        self.before = time.process_time()

    def note(self, line: dict[str, Any], epochs: int) -> None:
        """Take the time since the epoch before."""
        now = time.process_time()
        if line["epoch"] not in self.seconds:
            self.seconds[line["epoch"]] = now - self.before
            self.path.parent.mkdir(parents=True, exist_ok=True)
            write_whole(self.path, json.dumps(self.seconds).encode())
        self.before = now


def print_row(row: str, results: Sequence[Result]) -> None:
    """Print a row of the table, the paper's figures above ours, and how its trainings went."""
    paper = PAPER[row]
    print(f"\n{row}, {len(results)} of ten initialisations\n")
    print(
        "|       | layers left    | test accuracy % | pPR %         | fPR %  | load, dense : ours |"
    )
    print(
        "| ----- | -------------- | --------------- | ------------- | ------ | ------------------ |"
    )
    print(
        f"| paper | {paper.layers:14} | {paper.accuracy:15} | {paper.pruned:13} |        |"
        + " " * 20
        + "|"
    )
    cells = [
        _spread([float(r.layers) for r in results]),
        _spread([r.accuracy for r in results]),
        _spread([r.pruned for r in results]),
    ]
    fpr = np.mean([r.operations_pruned for r in results])
    load = np.mean([r.load for r in results])
    print(f"| ours  | {cells[0]:14} | {cells[1]:15} | {cells[2]:13} | {fpr:6.2f} | {load:18.2f} |")
    for seed, result in enumerate(results):
        marks = [5, 10, 15, 20, 25, 30, 40, 50]
        course = ", ".join(str(result.blocks[m - 1]) for m in marks if m <= len(result.blocks))
        print(
            f"seed {seed}: {', '.join(result.left) or 'no block'} left; {result.accuracy:.2f} %; "
            f"blocks after 5, 10, 15, 20, 25, 30, 40, 50 epochs {course}; processor seconds an "
            f"epoch {result.seconds[0]:.1f}, then {result.seconds[1]:.1f}"
        )


def _spread(values: Sequence[float]) -> str:
    spread = np.std(values, ddof=1) if len(values) > 1 else 0.0
    return f"{np.mean(values):.2f} ± {spread:.2f}"


def add_set(parser: argparse.ArgumentParser, recipe: str) -> None:
    """Add --set, which replaces entries of a recipe."""
    parser.add_argument(
        "--set",
        nargs="*",
        type=_setting,
        default=[],
        metavar="TABLE.KEY=JSON",
        help=f"entries of {recipe} to replace: training.device='\"cuda\"'",
    )


def _setting(text: str) -> tuple[str, Any]:
    name, _, value = text.partition("=")
    return name, json.loads(value)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the bench."""
    parser = argparse.ArgumentParser(prog="python -m bench papers.gates", description=__doc__)
    parser.add_argument("--data", required=True, help="MNIST, as mnist:DIR")
    parser.add_argument("--test", required=True, help="its test images, as mnist-test:DIR")
    parser.add_argument("--rows", nargs="+", choices=PAPER, default=["dense-10"])
    parser.add_argument("--seeds", type=int, default=3, help="initialisations; default 3")
    parser.add_argument("--epochs", type=int, default=50, help="that prune; 10 more fine-tune")
    parser.add_argument("--out", type=Path, required=True, help="where the run directories go")
    add_set(parser, "the recipe")
    options = parser.parse_args(arguments)
    for row in options.rows:
        results = [train_row(row, seed, options.epochs, options) for seed in range(options.seeds)]
        print_row(row, results)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
