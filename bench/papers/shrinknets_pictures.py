"""The pictures of `papers.shrinknets`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import matplotlib
import numpy as np

matplotlib.use("Agg")
from matplotlib import pyplot as plt

Row = dict[str, Any]
COLOURS = ("tab:orange", "tab:red", "tab:blue", "tab:green")
MARKERS = ("s", "D", "o", "^")


def draw_tradeoff(found: dict[str, list[Row]], methods: Sequence[str], path: Path) -> None:
    """Draw figure 1: a column a data set, fitted samples above, held-out ones below."""
    figure, axes = plt.subplots(2, len(found), figsize=(5 * len(found), 7.5), squeeze=False)
    for column, (name, points) in enumerate(found.items()):
        for row, value in enumerate(("loss", "held_out")):
            place = axes[row, column]
            for method, colour, marker in zip(methods, COLOURS, MARKERS, strict=True):
                mine = [point for point in points if point["plan"]["method"] == method]
                place.plot(
                    [100 * point["sparsity"] for point in mine],
                    [point[value] for point in mine],
                    linestyle="none",
                    marker=marker,
                    markersize=4,
                    color=colour,
                    alpha=0.35,
                )
                sparsity, loss = _means(mine, value)
                place.plot(sparsity, loss, color=colour, label=method)
            place.set_title(f"{name}: {'samples fitted' if row == 0 else 'held out'}")
            place.set_xlabel("sparsity, % of the columns")
            place.set_ylabel("normalised loss")
            place.set_ylim(bottom=0, top=1.05 if row == 0 else None)
            place.grid(alpha=0.3)
    axes[0, 0].legend()
    _save(figure, path)


def _means(points: list[Row], value: str) -> tuple[list[float], list[float]]:
    """Average over the splits, strength by strength."""
    strengths = sorted({point["plan"]["strength"] for point in points})
    groups = [[p for p in points if p["plan"]["strength"] == s] for s in strengths]
    sparsity = [100 * fmean(p["sparsity"] for p in group) for group in groups]
    return sparsity, [fmean(p[value] for p in group) for group in groups]


def draw_inertia(found: dict[str, dict[str, list[Row]]], path: Path) -> None:
    """Draw figure 2: a row a data set, loss and cost against the inertia, one deviation around."""
    figure, axes = plt.subplots(len(found), 2, figsize=(10, 3.6 * len(found)), squeeze=False)
    for row, (name, points) in enumerate(found.items()):
        labels = [label for label in points if label != "none"]
        # On an axis of patience, 1 / (1 - gamma), the inertias are evenly apart.
        patience = [1 / (1 - float(label)) for label in labels]
        for column, value in enumerate(("loss", "cost")):
            place = axes[row, column]
            means, deviations = _spread([points[label] for label in labels], value)
            place.fill_between(patience, means - deviations, means + deviations, alpha=0.3)
            place.plot(patience, means, marker="o", label="with removal")
            if "none" in points:
                (mean,), (deviation,) = _spread([points["none"]], value)
                place.axhline(mean, color="black", linestyle="--", label="without removal")
                place.axhspan(mean - deviation, mean + deviation, color="black", alpha=0.1)
            place.set_xscale("log")
            place.set_xticks(patience, labels)
            place.minorticks_off()
            place.set_xlabel("gamma (axis: 1 / (1 - gamma))")
            strength = points[labels[0]][0]["plan"]["strength"]
            what = "loss, samples fitted" if value == "loss" else "cost, share of no removal"
            place.set_title(f"{name}, lambda = {strength:g}: {what}")
            place.grid(alpha=0.3)
    axes[0, 0].legend()
    _save(figure, path)


def _spread(groups: list[list[Row]], value: str) -> tuple[np.ndarray, np.ndarray]:
    means = [fmean(point[value] for point in group) for group in groups]
    deviations = [
        stdev(point[value] for point in group) if len(group) > 1 else 0.0 for group in groups
    ]
    return np.array(means), np.array(deviations)


def draw_sizes(found: list[list[Row]], largest: tuple[int, ...], path: Path) -> None:
    """Draw the trajectory in the space of sizes, and the accuracy along it."""
    figure, (plane, curve) = plt.subplots(1, 2, figsize=(11, 4.8))
    strengths = [points[0]["plan"]["strength"] for points in found]
    colours = plt.get_cmap("viridis")(np.linspace(0, 0.9, len(found)))
    centres = [(fmean(p["first"] for p in ps), fmean(p["second"] for p in ps)) for ps in found]
    plane.plot(*zip(*centres, strict=True), color="grey", zorder=1)
    for points, colour, strength in zip(found, colours, strengths, strict=True):
        plane.scatter(
            [p["first"] for p in points],
            [p["second"] for p in points],
            color=colour,
            label=f"{strength:.2g}",
            zorder=2,
        )
    plane.legend(title="lambda", fontsize="small")
    plane.set_xlim(0, 1.05 * largest[0])
    plane.set_ylim(0, 1.05 * largest[1])
    plane.set_xlabel("neurons of the first hidden layer")
    plane.set_ylabel("neurons of the second hidden layer")
    plane.set_title("final sizes as lambda falls")
    plane.grid(alpha=0.3)
    curve.errorbar(
        [sum(centre) for centre in centres],
        [fmean(p["percent"] for p in points) for points in found],
        [stdev([p["percent"] for p in points]) if len(points) > 1 else 0.0 for points in found],
        marker="o",
        capsize=3,
    )
    curve.set_xlabel("hidden neurons left")
    curve.set_ylabel("test accuracy, %")
    curve.set_title("accuracy along the trajectory")
    curve.grid(alpha=0.3)
    _save(figure, path)


def _save(figure: Any, path: Path) -> None:
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)
    print(f"\npicture: {path}")
