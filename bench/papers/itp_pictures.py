"""Pictures of the multiobjective paper's bench: figures 7, 8 and 9."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")
from matplotlib import pyplot as plt

from retrain.trainers.itp.knee import knee_by_chord, knee_by_trade_off
from retrain.trainers.itp.search import Outcome, nondominated

History = Sequence[Mapping[str, Any]]


def draw_descent(
    curves: Mapping[str, tuple[History, History]], critical: float, path: Path
) -> None:
    """Draw figures 7 and 8: accuracies of both descents, and the weight that (15) chose."""
    figure, axes = plt.subplots(
        2, len(curves), figsize=(5 * len(curves), 7), squeeze=False, layout="constrained"
    )
    for (name, (multi, weighted)), (top, bottom) in zip(curves.items(), axes.T, strict=True):
        epochs = [line["epoch"] for line in multi]
        for key, style in (("accuracy", "-"), ("test_accuracy", ":")):
            word = "training" if key == "accuracy" else "test"
            top.plot(epochs, [line[key] for line in multi], f"C0{style}", label=f"multi, {word}")
            top.plot(
                epochs, [line[key] for line in weighted], f"C1{style}", label=f"weighted, {word}"
            )
        top.set(title=name, xlabel="epoch", ylabel="accuracy")
        top.legend()
        weights = [line["method"]["weight"] for line in multi]
        bottom.plot(epochs, [weight["mean"] for weight in weights], "C0", label="mean of the epoch")
        bottom.fill_between(
            epochs,
            [weight["min"] for weight in weights],
            [weight["max"] for weight in weights],
            alpha=0.2,
            label="its smallest to largest step",
        )
        bottom.axhline(critical, color="k", ls="--", label="critical weight")
        bottom.set(xlabel="epoch", ylabel="weight of Omega in (15)", ylim=(0, None))
        bottom.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def draw_searches(found: Mapping[str, Sequence[Outcome]], path: Path) -> None:
    """Draw figure 9: each search's outcomes, those on the front, and the two knees.

    Collapsed networks, all at the loss of guessing and complexity 0, are counted and not drawn: on
    axes that hold them the others are a corner.
    """
    figure, axes = plt.subplots(
        1,
        len(found),
        figsize=(4 * len(found), 4.5),
        squeeze=False,
        sharex=True,
        sharey=True,
        layout="constrained",
    )
    for (name, outcomes), axis in zip(found.items(), axes[0], strict=True):
        trained = [outcome for outcome in outcomes if outcome.status == "trained"]
        front = nondominated(trained)
        dominated = [outcome for outcome in trained if outcome not in front]
        axis.plot(*_points(dominated), "x", color="0.6", label="dominated")
        axis.plot(*_points(front), "o-", ms=4, lw=0.8, label="nondominated")
        for knee, style, label in (
            (knee_by_trade_off(outcomes), "s", "knee by trade-off"),
            (knee_by_chord(outcomes), "D", "knee by chord"),
        ):
            if knee.outcome is not None:
                size = 15 if style == "s" else 10
                axis.plot(
                    *_points([knee.outcome]),
                    style,
                    ms=size,
                    mfc="none",
                    mec="C3",
                    mew=1.5,
                    label=f"{label}: {knee.outcome.weight:.1e}",
                )
        gone = len(outcomes) - len(trained)
        title = f"{name}\n{len(outcomes)} trainings" + (f", {gone} collapsed" if gone else "")
        axis.set(title=title, xlabel="cross entropy, training", ylim=(0, None))
        axis.legend(fontsize=8)
    axes[0, 0].set_ylabel("Omega_l1 of the dense layers")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _points(outcomes: Sequence[Outcome]) -> tuple[list[float], list[float]]:
    return [one.loss for one in outcomes], [one.complexity for one in outcomes]
