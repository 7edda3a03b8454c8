"""The multiobjective paper on MNIST: table 2(a) to (c), figures 7 and 8, the four searches of 9.

    python -m bench papers.itp --data mnist:DIR --test mnist-test:DIR --out DIR
                               [--part PART] [--epochs E] [--search-epochs E] [--full-epochs E]

Every training is a run directory under --out; what is finished is read, what was killed goes on.
The paper trains for 30 epochs and searches with fewer. Batches are of 32, Keras' default.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bench.papers import itp_pictures as pictures
from bench.papers.itp_table import CRITICAL, TABLES, TRADE_OFFS, Printed
from retrain.data import Data, load_data
from retrain.trained import TrainedRun
from retrain.trainers.itp.objectives import Complexity, convex_weight, dense_weights
from retrain.trainers.recipe import read_recipe
from retrain.training_run import run_training

PARTS = ("critical", "table", "smgd", "search")
NAMES = {"batch": "batchwise (c)", "epoch": "epochwise (b)", "end": "after training (a)"}
FAST = {"optimizer.fused": True}


@dataclass(frozen=True)
class Row:
    """What one training came to; `status` says why the other figures are NaN, if they are."""

    status: str
    train_loss: float = float("nan")
    test_loss: float = float("nan")
    complexity: float = float("nan")
    nonzero: tuple[int, ...] = ()
    size: int = 0
    train_accuracy: float = float("nan")
    test_accuracy: float = float("nan")

    @property
    def zero(self) -> float:
        """Share of the dense weights that are zero."""
        return 1 - sum(self.nonzero) / self.size if self.size else float("nan")


@dataclass(frozen=True)
class Bench:
    """Where the data are, and where runs go."""

    data: Data
    test: Data
    out: Path

    def train(self, name: str, recipe: str, changes: Mapping[str, Any]) -> TrainedRun:
        """Train, resume or read a run."""
        return run_training(
            read_recipe(recipe, changes), self.out / "runs" / name, data=self.data, test=self.test
        )

    def row(self, name: str, recipe: str, changes: Mapping[str, Any]) -> Row:
        """Train, and measure the finished network; a training that diverges is a row too."""
        try:
            run = self.train(name, recipe, changes)
        except FloatingPointError as error:
            return Row(f"diverged: {error}")
        return measured(run)


def measured(run: TrainedRun) -> Row:
    """Count what is left of a finished network, after its last pruning."""
    names = dense_weights(run.model)
    weights = [run.model.get_parameter(name).detach() for name in names]
    nonzero = tuple(int(weight.count_nonzero()) for weight in weights)
    train, test = run.record["train"], run.record["test"]
    with torch.no_grad():
        complexity = float(Complexity(names)(run.model))
    return Row(
        "trained" if any(nonzero) else "collapsed",
        train["loss"],
        test["loss"],
        complexity,
        nonzero,
        sum(weight.numel() for weight in weights),
        train["accuracy"],
        test["accuracy"],
    )


def table_row(bench: Bench, pruning: str, trade_off: float, epochs: int) -> Row:
    """One training of table 2."""
    changes = {
        "method.trade_off": trade_off,
        "method.pruning": pruning,
        "training.epochs": epochs,
        **FAST,
    }
    return bench.row(f"{pruning}-{trade_off:g}-{epochs}", "itp-mnist", changes)


def critical(bench: Bench, epochs: int) -> None:
    """The critical row of the three tables, and the ordering it shows."""
    print(f"\nlambda = {CRITICAL:g}, {epochs} epochs (the paper: 30)")
    print(_HEAD)
    rows = {}
    for pruning in ("batch", "epoch", "end"):
        rows[pruning] = table_row(bench, pruning, CRITICAL, epochs)
        _print_row(CRITICAL, rows[pruning], NAMES[pruning])
        _print_printed(CRITICAL, TABLES[pruning][TRADE_OFFS.index(CRITICAL)])
    zero = {pruning: row.zero for pruning, row in rows.items()}
    ordered = zero["batch"] > zero["epoch"] > zero["end"]
    met = zero["batch"] >= 0.95 and rows["batch"].test_accuracy >= 0.98
    print(f"batchwise >= 95 % zero at >= 98 %: {'met' if met else 'NOT met'}")
    print(f"batchwise > epochwise > after training, in zeros: {'holds' if ordered else 'FAILS'}")


def table(bench: Bench, epochs: int, only: Sequence[str]) -> None:
    """All trade-offs of table 2, the paper's figures under ours; then the ordering of the three."""
    found: dict[tuple[str, float], Row] = {}
    for pruning in only:
        print(f"\n{NAMES[pruning]}, {epochs} epochs (the paper: 30)")
        print(_HEAD)
        for index, trade_off in enumerate(TRADE_OFFS[: len(TABLES[pruning])]):
            row = found[pruning, trade_off] = table_row(bench, pruning, trade_off, epochs)
            _print_row(trade_off, row)
            _print_printed(trade_off, TABLES[pruning][index])
    for better, worse in (("batch", "epoch"), ("epoch", "end"), ("batch", "end")):
        pairs = [
            (found[better, trade_off], found[worse, trade_off])
            for trade_off in TRADE_OFFS
            if (better, trade_off) in found and (worse, trade_off) in found
        ]
        both = [pair for pair in pairs if all(row.status == "trained" for row in pair)]
        wins = sum(sum(first.nonzero) < sum(second.nonzero) for first, second in both)
        print(f"{better} leaves fewer weights than {worse}: {wins} of {len(both)} trade-offs")


def smgd(bench: Bench, epochs: int) -> None:
    """Figures 7 and 8: multi-gradient descent against the weighted sum at the critical lambda."""
    critical_weight = convex_weight(CRITICAL)
    print(f"\nmulti-gradient descent, {epochs} epochs (the paper: 30); lambda* = {CRITICAL:g}")
    pairs: dict[str, dict[str, Any]] = {
        "MAdam / Adam": FAST,
        "SMGD / SGD": {
            "optimizer.name": "sgd",
            "optimizer.lr": 0.01,
            "optimizer.momentum": 0.9,
            "method.decay": 0.01 / 30,
        },
    }
    curves = {}
    for name, changes in pairs.items():
        label = name.partition(" ")[0].lower()
        common = {**changes, "training.epochs": epochs}
        multi = bench.train(
            f"{label}-{epochs}",
            "itp-mnist-madam",
            {key: value for key, value in common.items() if key not in FAST},
        )
        weighted = bench.train(f"{label}-weighted-{epochs}", "itp-mnist", common)
        rows = measured(multi), measured(weighted)
        weights = [line["method"]["weight"] for line in multi.history]
        print(f"{name}\n{_HEAD}")
        _print_row(float("nan"), rows[0], "multi-gradient")
        _print_row(CRITICAL, rows[1], "weighted")
        shares = [weight["mean"] for weight in weights]
        print(
            f"  weight of Omega: means of the epochs {min(shares):.2e} to {max(shares):.2e}, "
            f"largest of a step {max(weight['max'] for weight in weights):.2e}; critical "
            f"{critical_weight:.2e}"
        )
        for told, holds in (
            ("its mean stays below the critical one in every epoch", max(shares) < critical_weight),
            ("accuracy above the weighted run's", rows[0].test_accuracy > rows[1].test_accuracy),
            ("Omega far above the weighted run's", rows[0].complexity > 2 * rows[1].complexity),
            (
                "training further above test accuracy",
                rows[0].train_accuracy - rows[0].test_accuracy
                > rows[1].train_accuracy - rows[1].test_accuracy,
            ),
        ):
            print(f"  {told}: {'holds' if holds else 'FAILS'}")
        curves[name] = (multi.history, weighted.history)
    path = bench.out / "figures-7-8.png"
    pictures.draw_descent(curves, critical_weight, path)
    print(f"picture: {path}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the parts asked for."""
    parser = argparse.ArgumentParser(prog="python -m bench papers.itp", description=__doc__)
    parser.add_argument("--data", required=True)
    parser.add_argument("--test", required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--part", choices=PARTS, action="append", help="default: all")
    parser.add_argument("--epochs", type=int, default=6, help="of table 2 and figures 7, 8")
    parser.add_argument("--full-epochs", type=int, default=30, help="of the critical row")
    parser.add_argument("--search-epochs", type=int, default=3)
    parser.add_argument("--pruning", choices=tuple(NAMES), action="append", help="default: all")
    parser.add_argument("--jobs", type=int, default=1, help="trainings of a search at once")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    bench = Bench(load_data(options.data), load_data(options.test), options.out)
    for part in options.part or PARTS:
        if part == "critical":
            critical(bench, options.full_epochs)
        elif part == "table":
            table(bench, options.epochs, options.pruning or tuple(NAMES))
        elif part == "smgd":
            smgd(bench, options.epochs)
    return 0


_HEAD = (
    f"{'lambda':>8}  {'E train':>7} {'E test':>7} {'Omega_l1':>9}  "
    f"{'w1':>6} {'w2':>6} {'w3':>4}  {'zero':>6}  {'train':>6} {'test':>6}"
)


def _print_row(trade_off: float, row: Row, note: str = "") -> None:
    if row.status.startswith("diverged"):
        print(f"{trade_off:8g}  {row.status}", flush=True)
        return
    first, second, third = row.nonzero
    note = note if row.status == "trained" else f"{note} {row.status}".strip()
    print(
        f"{trade_off:8g}  {row.train_loss:7.3f} {row.test_loss:7.3f} {row.complexity:9.1f}  "
        f"{first:6} {second:6} {third:4}  {row.zero:6.1%}  {row.train_accuracy:6.3f} "
        f"{row.test_accuracy:6.3f}  {note}",
        flush=True,
    )


def _print_printed(trade_off: float, row: Printed) -> None:
    first, second, third = row.nonzero
    accuracy = "      " if row.test_accuracy is None else f"{row.test_accuracy:6.3f}"
    print(
        f"{'':8}  {row.train_loss:7.3f} {row.test_loss:7.3f} {row.complexity:9.1f}  "
        f"{first:6} {second:6} {third:4}  {row.zero:6.1%}  {'':6} {accuracy}  (paper)",
        flush=True,
    )
