"""Pictures of the multiobjective paper's bench: figures 7, 8 and 9."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")
from matplotlib import pyplot as plt

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
