"""The Net-Trim paper's table 1, first column (NN2-10K), and its introduction's nested spirals.

    python -m bench papers.net_trim --data mnist:DIR --test mnist-test:DIR

Each network is trained three times (seeds), trimmed by the cascade at a low and at a high
discrepancy, and compared with HPTD, which truncates as many weights of smallest magnitude; both
with and without fine-tuning on the same samples. The paper does not give its epsilons; ours are
chosen to land near its two discrepancies.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
from torch import nn
from torch.optim import SGD

import retrain
from bench.papers.models import nn2_10k, spiral_points, spirals
from retrain.data.sources import load_data
from retrain.trainers.hptd import truncate
from retrain.trainers.loop.accuracy import evaluate
from retrain.trainers.loop.masked import fine_tune

FINE_TUNING_EPOCHS = 5
LEVELS = {"low discrepancy, table 1(a)": 0.037, "high discrepancy, table 1(b)": 0.095}
"""Relative epsilon of the first layer; later layers follow (7) with inflation 1.1."""

ROWS = (
    "initial accuracy",
    "pruned",
    "discrepancy",
    "Net-Trim",
    "HPTD",
    "Net-Trim + fine-tuning",
    "HPTD + fine-tuning",
)
PAPER = {
    "low discrepancy, table 1(a)": (95.59, 40.86, 1.98, 95.47, 9.3, 95.85, 93.56),
    "high discrepancy, table 1(b)": (95.59, 75.87, 4.95, 94.92, 8.97, 95.89, 95.61),
}
SPIRAL_EPSILON = 0.015


def table_column(
    model: nn.Module, training: Any, test: Any, epsilon: float, seed: int
) -> tuple[dict[str, float], Any]:
    """Fill one column of the table for one trained network; also return the run."""
    tune = partial(
        fine_tune,
        data=training,
        epochs=FINE_TUNING_EPOCHS,
        optimizer=lambda net: SGD(net.parameters(), lr=0.01, momentum=0.9),
        batch_size=100,
        seed=seed,
    )
    run = retrain.net_trim(model, training, relative_epsilon=epsilon)
    truncated = truncate(model, run.record["totals"]["zeros"])
    values = (
        evaluate(model, test),
        run.record["totals"]["sparsity"],
        run.bounds["calibration"].relative,
        evaluate(run.model, test),
        evaluate(truncated, test),
        evaluate(tune(run.model).model, test),
        evaluate(tune(truncated).model, test),
    )
    return {row: 100 * value for row, value in zip(ROWS, values, strict=True)}, run


def table_1(data: str, test: str, seeds: Sequence[int]) -> None:
    """Print table 1's first column, both panels, the paper's figures beside ours."""
    source, held_out = load_data(data, limit=10_000), load_data(test)
    training = (source.flat.astype(np.float32), np.asarray(source.y))
    testing = (held_out.flat.astype(np.float32), np.asarray(held_out.y))
    models = {seed: nn2_10k(seed, *training) for seed in seeds}
    for level, epsilon in LEVELS.items():
        columns, seconds, certified = [], [], []
        for seed, model in models.items():
            started = time.perf_counter()
            column, run = table_column(model, training, testing, epsilon, seed)
            columns.append(column)
            seconds.append(time.perf_counter() - started)
            certified.append(run.certified)
        print(f"\nNN2-10K, {level}: relative epsilon {epsilon}, seeds {list(seeds)}")
        print(f"every layer certified: {all(certified)}; {np.mean(seconds):.0f} s a network\n")
        print(f"| {'%':<24} | {'paper':>6} | {'ours':>6} | {'by seed':<23} |")
        print(f"| {'-' * 24} | {'-' * 6} | {'-' * 6} | {'-' * 23} |")
        for row, paper in zip(ROWS, PAPER[level], strict=True):
            values = [column[row] for column in columns]
            each = ", ".join(f"{value:.2f}" for value in values)
            print(f"| {row:<24} | {paper:6.2f} | {np.mean(values):6.2f} | {each:<23} |")


def nested_spirals(seeds: Sequence[int]) -> None:
    """Print how many links of the 2-200-200-2 spirals classifier Net-Trim prunes."""
    print("\nnested spirals, 2-200-200-2, 200 points; the paper: more than 93 % of the links\n")
    print("| seed | pruned % | points right % | outputs moved % | bound / measured | certified |")
    print("| ---- | -------- | -------------- | --------------- | ---------------- | --------- |")
    for seed in seeds:
        points = spiral_points(seed)
        model = spirals(seed)
        run = retrain.net_trim(model, points, relative_epsilon=SPIRAL_EPSILON)
        bound = run.bounds["calibration"]
        print(
            f"| {seed:4} | {100 * run.record['totals']['sparsity']:8.2f} "
            f"| {100 * evaluate(run.model, points):14.1f} | {100 * bound.relative:15.2f} "
            f"| {bound.ratio or float('nan'):16.2f} | {run.certified!s:>9} |"
        )


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the bench."""
    parser = argparse.ArgumentParser(prog="python -m bench papers.net_trim", description=__doc__)
    parser.add_argument("--data", help="MNIST, as mnist:DIR; without it, the spirals only")
    parser.add_argument("--test", help="its test images, as mnist-test:DIR")
    parser.add_argument("--seeds", type=int, default=3, help="networks to train; default 3")
    options = parser.parse_args(arguments)
    if (options.data is None) != (options.test is None):
        parser.error("--data and --test go together")
    seeds = range(options.seeds)
    nested_spirals(seeds)
    if options.data is not None:
        table_1(options.data, options.test, seeds)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
