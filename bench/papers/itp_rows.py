"""Table 2 of the multiobjective paper: its trainings, the critical row over seeds, the whole."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench.papers.itp_table import CRITICAL, TABLES, TRADE_OFFS, Printed
from retrain.data.arrays import Data
from retrain.runs.trained import TrainedRun
from retrain.runs.training import run_training
from retrain.trainers.itp.objectives import Complexity, dense_weights
from retrain.trainers.recipes.recipe import read_recipe

NAMES = {"batch": "batchwise (c)", "epoch": "epochwise (b)", "end": "after training (a)"}
SCHEDULES: dict[str, dict[str, Any]] = {
    "constant": {},
    "drop": {"schedule.name": "drop", "schedule.end": 0.1},
}
PAIRS = (("batch", "epoch"), ("epoch", "end"), ("batch", "end"))
"""The paper's ordering: the first prunes more."""
TABLE_SEED = 1
FAST = {"optimizer.fused": True}
HEAD = (
    f"{'lambda':>8}  {'E train':>7} {'E test':>7} {'Omega_l1':>9}  "
    f"{'w1':>6} {'w2':>6} {'w3':>4}  {'zero':>6}  {'train':>6} {'test':>6}"
)


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


@dataclass(frozen=True)
class Setting:
    """What all trainings of a table share."""

    epochs: int
    schedule: str = "constant"
    seed: int = 0


def table_row(bench: Bench, pruning: str, trade_off: float, setting: Setting) -> Row:
    """One training of table 2."""
    epochs, schedule, seed = setting.epochs, setting.schedule, setting.seed
    changes = {
        "method.trade_off": trade_off,
        "method.pruning": pruning,
        "training.epochs": epochs,
        "training.seed": seed,
        **FAST,
        **SCHEDULES[schedule],
    }
    name = f"{pruning}-{trade_off:g}-{epochs}-{schedule}-seed{seed}"
    return bench.row(name, "itp-mnist", changes)


def critical(bench: Bench, epochs: int, only: Sequence[str], seeds: int) -> None:
    """The critical row of the three tables over seeds, and the ordering it shows."""
    for schedule in SCHEDULES:
        print(f"\nlambda = {CRITICAL:g}, {epochs} epochs (the paper: 30), rate: {schedule}\n{HEAD}")
        found: dict[str, list[Row]] = {}
        for pruning in only:
            found[pruning] = []
            for seed in range(seeds):
                row = table_row(bench, pruning, CRITICAL, Setting(epochs, schedule, seed))
                found[pruning].append(row)
                print_row(CRITICAL, row, f"{NAMES[pruning]}, seed {seed}")
            _print_printed(CRITICAL, TABLES[pruning][TRADE_OFFS.index(CRITICAL)])
        zeros = {pruning: np.array([row.zero for row in rows]) for pruning, rows in found.items()}
        for pruning, rows in found.items():
            accuracies = [row.test_accuracy for row in rows]
            print(f"{NAMES[pruning]}: zero {_spread(zeros[pruning])}, test {_spread(accuracies)}")
        if "batch" in found:
            met = all(row.zero >= 0.95 and row.test_accuracy >= 0.98 for row in found["batch"])
            print(f"batchwise: >= 95 % zero at >= 98 %, every seed: {'met' if met else 'NOT met'}")
        for better, worse in PAIRS:
            if better in zeros and worse in zeros:
                more = zeros[better] - zeros[worse]
                verdict = (
                    "holds"
                    if more.min() > 0
                    else "reversed"
                    if more.max() < 0
                    else "within the seeds"
                )
                print(f"{better} prunes more than {worse}: by {_spread(more)}: {verdict}")


def _spread(values: Sequence[float] | np.ndarray) -> str:
    return f"{np.mean(values):.2%} +- {np.std(values):.2%}"


def table(bench: Bench, setting: Setting, only: Sequence[str]) -> None:
    """All trade-offs of table 2, the paper's figures under ours; then the ordering of the three."""
    found: dict[tuple[str, float], Row] = {}
    for pruning in only:
        print(f"\n{NAMES[pruning]}, {setting} (the paper: 30 epochs)\n{HEAD}")
        for trade_off, printed in zip(TRADE_OFFS, TABLES[pruning], strict=False):
            row = found[pruning, trade_off] = table_row(bench, pruning, trade_off, setting)
            print_row(trade_off, row)
            _print_printed(trade_off, printed)
    for better, worse in PAIRS:
        ours = [
            (sum(found[better, trade_off].nonzero), sum(found[worse, trade_off].nonzero))
            for trade_off in TRADE_OFFS
            if (better, trade_off) in found and (worse, trade_off) in found
        ]
        pairs = zip(TABLES[better], TABLES[worse], strict=False)
        paper = [(sum(first.nonzero), sum(second.nonzero)) for first, second in pairs]
        print(f"{better} leaves fewer weights than {worse}: {wins(ours)}; the paper: {wins(paper)}")


def wins(pairs: Sequence[tuple[int, int]]) -> str:
    """How often the first is smaller, where neither network has collapsed."""
    both = [pair for pair in pairs if all(pair)]
    return f"{sum(first < second for first, second in both)} of {len(both)}"


def print_row(trade_off: float, row: Row, note: str = "") -> None:
    if not row.nonzero:
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
