"""The ShrinkNets draft's figures 1 and 2, and the sizes of a two-layer network as lambda falls.

    python -m bench papers.shrinknets --data DIR --out runs/bench/shrinknets

DIR holds regression/oes97.npz, gas-drift/*.npz and mnist/ (idx files). Rows are kept in OUT and not
measured again; pictures are written beside them.

Figure 1 sets three fits against each other, each with the same number of gradients over all
samples: group sparsity (6) by accelerated proximal gradients, ShrinkNet (7) by majorising its
penalty, and ShrinkNet trained as it is meant, by switches, Adam and the removal of dead inputs.
Group sparsity is convex; its minimum, which takes more gradients, is shown too. Figure 2 trains in
small batches with several inertias gamma, many times over, and without removal. The draft gives
neither lambda_2 nor its training settings; ours are printed.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from statistics import fmean, stdev

import numpy as np
import torch

from bench.papers.shrinknets_pictures import draw_inertia, draw_sizes, draw_tradeoff
from bench.papers.shrinknets_runs import (
    WIDTHS,
    Row,
    Rows,
    solved_regression,
    task,
    trained_network,
    trained_regression,
)

GROUP, PROXIMAL, TRAINED = "group sparsity", "ShrinkNet, proximal", "ShrinkNet, trained"
CONVERGED = "group, converged"
METHODS = (GROUP, CONVERGED, PROXIMAL, TRAINED)
GRADIENTS = {"oes97": 2000, "gas-drift": 1000}
STRENGTHS = {
    ("oes97", GROUP): np.geomspace(0.003, 8, 24),
    ("oes97", PROXIMAL): np.geomspace(0.01, 3, 24),
    ("oes97", TRAINED): np.geomspace(0.01, 3, 12),
    ("gas-drift", GROUP): np.geomspace(0.0005, 0.3, 16),
    ("gas-drift", PROXIMAL): np.geomspace(0.003, 0.4, 16),
    ("gas-drift", TRAINED): np.array([2e-4, 6e-4, 1.5e-3, *np.geomspace(0.003, 0.4, 12)[:10]]),
}
STRENGTHS |= {(name, CONVERGED): STRENGTHS[name, GROUP] for name in GRADIENTS}
PATIENCE = 6000
"""Gradients for group sparsity to converge with, on no other method's budget."""
LEVELS = (0.3, 0.5, 0.7, 0.8, 0.9, 0.95)
SECOND = 0.1
"""lambda_2 over lambda. Of the two only one product matters (`regularised_penalty`)."""

INERTIAS = (0.5, 0.8, 0.9, 0.95, 0.99, 0.995, 0.999, None)
SETTINGS = {
    "oes97": {"strength": 0.1, "epochs": 200, "batch_size": 32, "lr": 0.01},
    "gas-drift": {"strength": 0.05, "epochs": 50, "batch_size": 256, "lr": 0.01},
}
TRAJECTORY = np.geomspace(0.2, 0.002, 10)


# Figure 1 --------------------------------------------------------------------------------------


def figure_1(rows: Rows, folder: Path, names: Sequence[str], splits: int) -> None:
    """Print and draw loss against sparsity."""
    print(f"\nfigure 1: normalised loss against sparsity, {splits} random splits a point")
    found = {name: tradeoff(rows, folder, name, splits) for name in names}
    for name, points in found.items():
        print_tradeoff(name, points)
    draw_tradeoff(found, METHODS, rows.path.with_name("figure_1.png"))


def tradeoff(rows: Rows, folder: Path, name: str, splits: int) -> list[Row]:
    """Fit by every method at every strength."""
    points = []
    for seed in range(splits):
        data = task(folder, name, seed)
        for method in METHODS:
            for strength in STRENGTHS[name, method]:
                plan = {
                    "figure": 1,
                    "task": name,
                    "method": method,
                    "strength": round(float(strength), 6),
                    "weight_strength": round(float(SECOND * strength), 7),
                    "gradients": PATIENCE if method == CONVERGED else GRADIENTS[name],
                    "seed": seed,
                }
                if method == TRAINED:
                    # All samples a step: an epoch is a gradient.
                    plan |= {"batch_size": len(data.fitted.X), "epochs": GRADIENTS[name]}
                    plan |= {"lr": 0.01, "inertia": 0.99}
                measure = trained_regression if method == TRAINED else solved_regression
                points.append(rows.get(plan, partial(measure, data)))
    return points


def at_sparsity(points: list[Row], method: str, level: float, column: str) -> list[float]:
    """Return, of each split, the loss of the fit with the least loss among those as sparse."""
    best = []
    for seed in sorted({point["plan"]["seed"] for point in points}):
        fits = [
            point
            for point in points
            if (point["plan"]["method"], point["plan"]["seed"]) == (method, seed)
            and point["sparsity"] >= level
        ]
        if fits:
            best.append(min(fits, key=lambda fit: fit["loss"])[column])
    return best


def print_tradeoff(name: str, points: list[Row]) -> None:
    """Print the losses at given sparsities, and who wins there."""
    spent = {
        method: sum(p["cpu_seconds"] for p in points if p["plan"]["method"] == method)
        for method in METHODS
    }
    print(f"\n{name}: {GRADIENTS[name]} gradients a fit, lambda_2 = {SECOND:g} lambda")
    for method, budget in ((GROUP, GRADIENTS[name]), (CONVERGED, PATIENCE)):
        solved = [p for p in points if p["plan"]["method"] == method]
        converged = sum(p["converged"] for p in solved)
        print(f"{method}: within {budget} gradients {converged} of {len(solved)} fits to 1e-6")
    for column, title in (("loss", "on the samples fitted"), ("held_out", "on those held out")):
        print(f"\nloss {title}, of the best fit that is as sparse: mean over the splits\n")
        print("| sparsity |" + "".join(f" {method:>19} |" for method in METHODS) + " least  |")
        print("| -------- |" + " ------------------- |" * len(METHODS) + " ------ |")
        for level in LEVELS:
            means = [
                fmean(values) if (values := at_sparsity(points, method, level, column)) else np.nan
                for method in METHODS
            ]
            cells = "".join(f" {mean:>19.4f} |" for mean in means)
            least = METHODS[int(np.nanargmin(means))] if not np.all(np.isnan(means)) else "none"
            print(f"| {level:<8g} |{cells} {least} |")
    print("\nprocessor seconds:", ", ".join(f"{m} {s:.0f}" for m, s in spent.items()))


# Figure 2 --------------------------------------------------------------------------------------


def figure_2(rows: Rows, folder: Path, names: Sequence[str], repetitions: int) -> None:
    """Print and draw the effect of the inertia on loss and cost."""
    print(f"\nfigure 2: neuron removal, {repetitions} repetitions, mean and standard deviation")
    found = {name: inertias(rows, folder, name, repetitions) for name in names}
    for name, points in found.items():
        print_inertia(name, points)
    draw_inertia(found, rows.path.with_name("figure_2.png"))


def inertias(rows: Rows, folder: Path, name: str, repetitions: int) -> dict[str, list[Row]]:
    """Train with every inertia and without removal, one split, a seed a repetition."""
    data = task(folder, name, 0)
    found: dict[str, list[Row]] = {}
    for inertia in INERTIAS:
        label = "none" if inertia is None else f"{inertia:g}"
        for seed in range(repetitions):
            plan = {
                "figure": 2,
                "task": name,
                **SETTINGS[name],
                "weight_strength": SECOND * float(SETTINGS[name]["strength"]),
                "inertia": inertia,
                "seed": seed,
            }
            row = rows.get(plan, partial(trained_regression, data))
            found.setdefault(label, []).append(row)
    return found


def print_inertia(name: str, found: dict[str, list[Row]]) -> None:
    """Print a row an inertia."""
    print(f"\n{name}: {SETTINGS[name]}, lambda_2 = {SECOND:g} lambda, Adam, cosine schedule\n")
    print("| gamma | loss             | held out         | inputs left   | cost             |")
    print("| ----- | ---------------- | ---------------- | ------------- | ---------------- |")
    for label, points in found.items():
        cells = [_spread(points, c, 4) for c in ("loss", "held_out")]
        cells += [_spread(points, "left", 1), _spread(points, "cost", 4)]
        print(f"| {label:<5} | {cells[0]:16} | {cells[1]:16} | {cells[2]:13} | {cells[3]:16} |")
    seconds = sum(point["cpu_seconds"] for points in found.values() for point in points)
    print(
        "cost: input neurons summed over the epochs, as a share of training without removal; "
        f"{seconds:.0f} processor seconds"
    )


def _spread(points: list[Row], column: str, digits: int) -> str:
    values = [point[column] for point in points]
    deviation = stdev(values) if len(values) > 1 else float("nan")
    return f"{fmean(values):.{digits}f} ± {deviation:.{digits}f}"


# Sizes -----------------------------------------------------------------------------------------


def sizes(rows: Rows, folder: Path, repetitions: int) -> None:
    """Print and draw the final sizes of two hidden layers as lambda falls."""
    name = "-".join(map(str, WIDTHS))
    print(f"\nsizes of {name} on 10 000 MNIST images as lambda falls, {repetitions} repetitions\n")
    print("| lambda  | first layer  | second layer | test accuracy %  | cost            |")
    print("| ------- | ------------ | ------------ | ---------------- | --------------- |")
    found = []
    for strength in TRAJECTORY:
        points = []
        for seed in range(repetitions):
            plan = {
                "figure": "sizes",
                "strength": round(float(strength), 6),
                "weight_strength": 1e-5,
                "epochs": 15,
                "batch_size": 64,
                "lr": 0.003,
                "inertia": 0.99,
                "limit": 10_000,
                "seed": seed,
            }
            row = dict(rows.get(plan, partial(trained_network, folder)))
            row |= {"first": row["sizes"][0], "second": row["sizes"][1]}
            points.append({**row, "percent": 100 * row["test_accuracy"]})
        found.append(points)
        print(
            f"| {strength:<7.4f} | {_spread(points, 'first', 1):12} "
            f"| {_spread(points, 'second', 1):12} | {_spread(points, 'percent', 2):16} "
            f"| {_spread(points, 'cost', 3):15} |"
        )
    draw_sizes(found, WIDTHS[1:3], rows.path.with_name("sizes.png"))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the bench."""
    parser = argparse.ArgumentParser(
        prog="python -m bench papers.shrinknets",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--data", type=Path, required=True, help="folder of the data sets")
    parser.add_argument("--out", type=Path, default=Path("runs/bench/shrinknets"))
    parser.add_argument(
        "--only", nargs="+", choices=("figure-1", "figure-2", "sizes"), help="default: all"
    )
    parser.add_argument("--tasks", nargs="+", choices=list(SETTINGS), default=list(SETTINGS))
    parser.add_argument("--splits", type=int, default=3, help="of figure 1 (3)")
    parser.add_argument("--repetitions", type=int, default=30, help="of figure 2 (30)")
    parser.add_argument("--size-repetitions", type=int, default=3, help="of the sizes (3)")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    rows = Rows(options.out / "rows.jsonl")
    only = options.only or ("figure-1", "figure-2", "sizes")
    if "figure-1" in only:
        figure_1(rows, options.data, options.tasks, options.splits)
    if "figure-2" in only:
        figure_2(rows, options.data, options.tasks, options.repetitions)
    if "sizes" in only:
        sizes(rows, options.data, options.size_repetitions)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
