"""The multiobjective paper on MNIST: table 2(a) to (c), figures 7 and 8, the four searches of 9.

    python -m bench papers.itp --data mnist:DIR --test mnist-test:DIR --out DIR
                               [--part PART] [--epochs E] [--full-epochs E] [--seeds S]

Every training is a run directory under --out; what is finished is read, what was killed goes on.
The paper trains for 30 epochs and searches with fewer. Batches are of 32, Keras' default. The
critical row of table 2 is trained from several seeds, with the constant rate that the paper's text
gives for MNIST and with the schedule that its code has there. The whole table, in fewer epochs, is
trained with the schedule, so that its networks have come to rest at the end of them, and from one
seed; not from 0, where lambda = 0.003 makes every weight zero within 300 steps (1 and 2 do not).
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from bench.papers import itp_pictures as pictures
from bench.papers.itp_rows import (
    FAST,
    HEAD,
    NAMES,
    TABLE_SEED,
    Bench,
    Row,
    Setting,
    critical,
    print_row,
    table,
    table_row,
)
from bench.papers.itp_table import CRITICAL, TABLES, TRADE_OFFS
from retrain.data.sources import load_data
from retrain.runs.knee_search import Strategy, trainer
from retrain.trainers.itp.knee import knee_by_chord, knee_by_trade_off
from retrain.trainers.itp.objectives import (
    convex_weight,
    trade_off_of,
)
from retrain.trainers.itp.search import (
    Outcome,
    Train,
    bisection,
    dichotomic,
    nondominated,
    stochastic_dichotomic,
)
from retrain.trainers.recipes.recipe import read_recipe

PARTS = ("critical", "table", "smgd", "search", "knee")
INTERVAL = (1e-5, 0.01)
"""Of weights. Figure 9(a) goes to 0.1, but from seed 0 networks collapse before the upper end."""
FINE = 1e-5
"""A closeness of the critical weight's own size; the paper's 0.001 is three times that weight."""


def smgd(bench: Bench, epochs: int, full_epochs: int) -> None:
    """Figures 7 and 8: multi-gradient descent against the weighted sum at the critical lambda.

    Adam's weighted run is the critical one; its first epochs are as if there were no more.
    """
    weighted_adam = {"training.epochs": full_epochs, **FAST}
    sgd = {
        "optimizer.name": "sgd",
        "optimizer.lr": 0.01,
        "optimizer.momentum": 0.9,
        "method.decay": 0.01 / 30,
        "training.epochs": epochs,
    }
    pairs: dict[str, tuple[tuple[str, dict[str, Any]], tuple[str, dict[str, Any]]]] = {
        "MAdam": (
            (f"madam-{epochs}", {"training.epochs": epochs}),
            (f"batch-{CRITICAL:g}-{full_epochs}-constant-seed0", weighted_adam),
        ),
        "SMGD": ((f"smgd-{epochs}", sgd), (f"sgd-{epochs}", sgd)),
    }
    critical_weight = convex_weight(CRITICAL)
    curves = {}
    for name, (multi, weighted) in pairs.items():
        history = bench.train(multi[0], "itp-mnist-madam", multi[1]).history
        other = bench.train(weighted[0], "itp-mnist", weighted[1]).history[:epochs]
        curves[name] = (history, other)
        _print_descent(name, history, other, critical_weight)
        path = bench.out / "figures-7-8.png"
        pictures.draw_descent(curves, critical_weight, path)
        print(f"picture: {path}", flush=True)


def _print_descent(
    name: str,
    multi: Sequence[Mapping[str, Any]],
    weighted: Sequence[Mapping[str, Any]],
    critical_weight: float,
) -> None:
    """Compare two histories of the same length; accuracies are means of the last three epochs."""
    print(f"\n{name}, {len(multi)} epochs (the paper: 30), against weights fixed at lambda*")
    figures = []
    for label, history in ((name, multi), ("weighted", weighted)):
        last = history[-3:]
        train, test = (
            sum(line[key] for line in last) / len(last) for key in ("accuracy", "test_accuracy")
        )
        said = history[-1]["method"]
        figures.append((train, test, said["complexity"]))
        print(
            f"  {label:9} training {train:.4f}  test {test:.4f}  Omega_l1 "
            f"{said['complexity']:8.1f}  zero {1 - said['nonzero'] / said['size']:.1%}"
        )
    weights = [line["method"]["weight"] for line in multi]
    means = [weight["mean"] for weight in weights]
    below = sum(mean < critical_weight for mean in means)
    print(
        f"  weight of Omega in (15): epochs' means {min(means):.2e} to {max(means):.2e}, largest "
        f"of a step {max(weight['max'] for weight in weights):.2e}; critical {critical_weight:.2e}"
    )
    (train, test, size), (weighted_train, weighted_test, weighted_size) = figures
    for claim, holds in (
        (f"weight below the critical one: {below} of {len(means)} epochs", below == len(means)),
        ("training accuracy higher", train > weighted_train),
        ("test accuracy higher", test > weighted_test),
        (f"Omega_l1 {size / weighted_size:.1f} times the weighted one", size > weighted_size),
        ("training further from test", train - test > weighted_train - weighted_test),
    ):
        print(f"  {claim}: {'holds' if holds else 'FAILS'}")


def search(bench: Bench, epochs: int, budget: int, jobs: int) -> None:
    """Figure 9: four searches, the adaptive ones on an equal budget, with both criteria's knees."""
    rows = {
        trade_off: table_row(bench, "batch", trade_off, Setting(epochs))
        for trade_off in TRADE_OFFS[1 : len(TABLES["batch"])]
    }
    found = {f"list of {len(rows)}": [_outcome(weight, row) for weight, row in rows.items()]}
    train = _trainer(bench, epochs, jobs)
    print(f"\nsearches in {INTERVAL}, {budget} trainings of {epochs} epochs each", flush=True)
    for name, strategy in _searches(budget).items():
        found[name] = strategy(train)
        _print_search(name, found[name])
        path = bench.out / "figure-9.png"
        pictures.draw_searches(found, path)
        print(f"picture: {path}", flush=True)
    _print_search(*next(iter(found.items())))


def knee(bench: Bench, epochs: int, full_epochs: int, budget: int) -> None:
    """Train fully at the knees that bisection found."""
    found = _searches(budget)["bisection"](_trainer(bench, epochs, 1))
    print(f"\nat the knees of bisection, {full_epochs} epochs\n{HEAD}")
    knees = {"by trade-off": knee_by_trade_off(found), "by chord": knee_by_chord(found)}
    for label, one in knees.items():
        if one.outcome is None:
            print(f"  {label}: {one.reason}")
            continue
        trade_off = trade_off_of(one.outcome.weight)
        row = table_row(bench, "batch", trade_off, Setting(full_epochs))
        print_row(trade_off, row, f"knee {label}")


def _trainer(bench: Bench, epochs: int, jobs: int) -> Train:
    recipe = read_recipe("itp-mnist", {"training.epochs": epochs, **FAST})
    return trainer(recipe, bench.out / "trials", jobs=jobs, data=bench.data, test=bench.test)


def _searches(budget: int) -> dict[str, Strategy]:
    """The adaptive searches of figure 9, and algorithm 3 with a finer closeness."""
    options: dict[str, Any] = {"interval": INTERVAL, "levels": budget, "budget": budget}
    draws = np.random.default_rng(0), np.random.default_rng(0)
    return {
        "dichotomic": partial(dichotomic, **options),
        "bisection": partial(bisection, **options),
        "stochastic dichotomic": partial(stochastic_dichotomic, rng=draws[0], **options),
        f"stochastic, closeness {FINE:g}": partial(
            stochastic_dichotomic, rng=draws[1], closeness=FINE, **options
        ),
    }


def _outcome(trade_off: float, row: Row) -> Outcome:
    weight = convex_weight(trade_off)
    if row.status.startswith("diverged"):
        return Outcome(weight, float("nan"), float("nan"), "diverged")
    status: Literal["trained", "collapsed"] = "collapsed" if not any(row.nonzero) else "trained"
    return Outcome(weight, row.train_loss, row.complexity, status)


def _print_search(name: str, outcomes: Sequence[Outcome]) -> None:
    front = nondominated(outcomes)
    trained = sum(outcome.status == "trained" for outcome in outcomes)
    near = sum(0.3 * CRITICAL <= outcome.weight <= 3 * CRITICAL for outcome in outcomes)
    print(
        f"{name}: {len(outcomes)} trainings, {trained} not collapsed, {len(front)} nondominated, "
        f"{near} within a factor of 3 of the critical weight"
    )
    for outcome in outcomes:
        on = "" if outcome in front else "  dominated"
        print(
            f"    weight {outcome.weight:.3e}  E {outcome.loss:.4f}  Omega_l1 "
            f"{outcome.complexity:8.1f}  {outcome.status}{on}"
        )
    for label, knee in (
        ("by trade-off", knee_by_trade_off(outcomes)),
        ("by chord", knee_by_chord(outcomes)),
    ):
        told = f"weight {knee.outcome.weight:.3e}" if knee.outcome else knee.reason
        print(f"  knee {label}: {told} ({knee.value:.3f})", flush=True)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the parts asked for."""
    parser = argparse.ArgumentParser(prog="python -m bench papers.itp", description=__doc__)
    parser.add_argument("--data", required=True)
    parser.add_argument("--test", required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--part", choices=PARTS, action="append", help="default: all")
    parser.add_argument("--epochs", type=int, default=10, help="of table 2")
    parser.add_argument("--search-epochs", type=int, default=3, help="of a search's trainings")
    parser.add_argument("--full-epochs", type=int, default=30, help="of the critical row, at knees")
    parser.add_argument("--descent-epochs", type=int, default=10, help="of figures 7 and 8")
    parser.add_argument("--seeds", type=int, default=3, help="of the critical row")
    parser.add_argument("--budget", type=int, default=10, help="trainings of a search")
    parser.add_argument("--pruning", choices=tuple(NAMES), action="append", help="default: all")
    parser.add_argument("--jobs", type=int, default=1, help="trainings of a search at once")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    bench = Bench(load_data(options.data), load_data(options.test), options.out)
    for part in options.part or PARTS:
        if part == "critical":
            critical(bench, options.full_epochs, options.pruning or tuple(NAMES), options.seeds)
        elif part == "table":
            table(
                bench,
                Setting(options.epochs, "drop", TABLE_SEED),
                options.pruning or tuple(NAMES),
            )
        elif part == "smgd":
            smgd(bench, options.descent_epochs, options.full_epochs)
        elif part == "search":
            search(bench, options.search_epochs, options.budget, options.jobs)
        else:
            knee(bench, options.search_epochs, options.full_epochs, options.budget)
    return 0
