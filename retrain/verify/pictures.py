"""Pictures of the checks, as PNG files. matplotlib is imported when one is drawn."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from retrain.verify.recovery_statistics import statistical_dimension
from retrain.verify.statement import Row

_BLUE, _RED, _GREY, _GREEN = "#1f5a96", "#c0392b", "#7f7f7f", "#2e8b57"
_STYLE: Any = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 9,
    "legend.frameon": False,
    "legend.fontsize": 8,
}


def _figure(columns: int = 1, width: float = 4.2, height: float = 3.3, **options: Any) -> Any:
    """Make a figure without a window system, and its axes as a list."""
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with rc_context(_STYLE):
        figure = Figure(figsize=(width * columns, height), layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.subplots(1, columns, squeeze=False, **options)[0]
    return figure, list(axes)


def _save(figure: Any, path: Path) -> None:
    from matplotlib import rc_context

    with rc_context(_STYLE):
        figure.savefig(path, dpi=160, metadata={"Software": None})


def measured_against_bound(rows: Sequence[Row], path: Path) -> None:
    """Every layer's measured deviation over its bound, both axes logarithmic, colour by depth."""
    figure, (axis,) = _figure()
    points = [
        (row.bound[name], row.measured[name], int(name.removeprefix("layer ")))
        for row in rows
        for name in row.measured
        if name.startswith("layer ") and row.measured[name] > 0
    ]
    bound, measured, layer = (np.array(values) for values in zip(*points, strict=True))
    marks = axis.scatter(bound, measured, c=layer, s=16, cmap="viridis", zorder=2)
    ends = np.array([bound.min() / 2, bound.max() * 2])
    axis.plot(ends, ends, color=_RED, lw=1.2, zorder=1, label="measured = bound")
    axis.set(
        xscale="log",
        yscale="log",
        xlabel="bound on $\\|\\hat Y - Y\\|_F$ (link-normalised units)",
        ylabel="measured $\\|\\hat Y - Y\\|_F$",
    )
    bar = figure.colorbar(marks, ax=axis, ticks=range(int(layer.min()), int(layer.max()) + 1))
    bar.set_label("layer")
    axis.legend(loc="upper left", frameon=False)
    _save(figure, path)


def bound_by_depth(rows: Sequence[Row], path: Path) -> None:
    """Theorem 3.2: measured output change, and both bounds relative to it, over the depth."""
    figure, (axis,) = _figure(width=5.2)
    kinds = (("random", "o"), ("trained", "s"))
    for kind, mark in kinds:
        chosen = [row for row in rows if row.case["kind"] == kind and row.measured["spectral"]]
        depth = np.array([row.case["depth"] for row in chosen])
        for name, colour in (("Frobenius", _RED), ("spectral", _BLUE)):
            ratio = [row.bound[name] / row.measured[name] for row in chosen]
            axis.scatter(
                depth,
                ratio,
                marker=mark,
                s=20,
                color=colour,
                facecolor="none" if kind == "trained" else colour,
                label=f"{name} norms, {kind} networks",
                zorder=2,
            )
    axis.axhline(1, color=_GREY, lw=1, zorder=1)
    axis.set(
        yscale="log",
        xlabel="depth $L$ (layers)",
        ylabel="bound / measured $\\tilde\\varepsilon^L$",
    )
    axis.xaxis.get_major_locator().set_params(integer=True)
    figure.legend(loc="outside lower center", ncols=2, frameon=False, fontsize=8)
    _save(figure, path)


def recovery_intervals(rows: Sequence[Row], path: Path) -> None:
    """Theorem 3: measured rate with its Clopper-Pearson interval beside the promise."""
    figure, (axis,) = _figure(width=5.6)
    labels = []
    for index, row in enumerate(rows):
        details = row.details
        rate = details["successes"] / details["trials"]
        error = [[rate - details["lower"]], [details["upper"] - rate]]
        axis.errorbar(index, rate, yerr=error, fmt="o", color=_BLUE, ms=4, capsize=3, lw=1.2)
        axis.plot([index - 0.3, index + 0.3], [details["promised"]] * 2, color=_RED, lw=1.8)
        case = row.case
        labels.append(f"{case['n_in']}\n{case['sparsities'][0]}\n{case['mu']:g}")
    axis.plot([], [], "o-", color=_BLUE, ms=4, label="recovered, with 95 % limits")
    axis.plot([], [], color=_RED, lw=1.8, label="promised, $1 - N^{1-\\mu}$")
    axis.set_xticks(range(len(rows)), labels)
    axis.set(ylim=(0, 1.05), ylabel="probability of exact recovery")
    axis.set_xlabel("$N$ (top), $s$, $\\mu$ (bottom)")
    figure.legend(loc="outside upper center", ncols=2, frameon=False, fontsize=8)
    _save(figure, path)


def phase_transition(rows: Sequence[Row], path: Path) -> None:
    """Probability of recovery over (s, P), its 50 % contour, the theorem's line."""
    sizes = sorted({row.case["n_in"] for row in rows})
    figure, axes = _figure(len(sizes), width=3.4, height=3.9, sharey=True)
    grid = np.geomspace(0.02, 30, 240)
    for axis, n_in in zip(axes, sizes, strict=True):
        chosen = sorted(
            (row for row in rows if row.case["n_in"] == n_in), key=lambda row: row.case["sparsity"]
        )
        s = np.array([row.case["sparsity"] for row in chosen], dtype=float)
        # Every trial knows the samples it needed, so the rate at any P is a count.
        rate = np.array(
            [[np.mean(np.array(row.details["needed"]) <= p * n_in) for p in grid] for row in chosen]
        ).T
        fractions = s / n_in
        image = axis.pcolormesh(
            _edges(fractions), _edges(np.log(grid), np.exp), rate, cmap="Greys_r", vmin=0, vmax=1
        )
        half = np.array([row.measured["P at 50 %"] for row in chosen]) / n_in
        axis.plot(fractions, half, color=_BLUE, marker="o", ms=3, lw=1.5, label="50 % contour")
        fine = np.linspace(fractions[0], fractions[-1], 100)
        axis.plot(
            fine,
            [2 * statistical_dimension(value) for value in fine],
            color="#e69f00",
            ls=":",
            lw=1.8,
            label="twice the statistical dimension",
        )
        axis.plot(
            fine,
            (11 * fine * n_in + 7) * (math.log(n_in) + math.log(2)) / n_in,
            color=_RED,
            lw=1.5,
            label="theorem 3 at probability ½",
        )
        axis.set(yscale="log", ylim=(grid[0], grid[-1]), xlabel="sparsity $s/N$")
        axis.set_xlim(0, 1.03 * fractions[-1])
        axis.set_title(f"$N = {n_in}$")
    axes[0].set_ylabel("samples $P/N$")
    figure.colorbar(image, ax=axes, label="fraction of trials recovered")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False, fontsize=8)
    _save(figure, path)


def _edges(centres: np.ndarray, back: Any = np.asarray) -> np.ndarray:
    """Cell edges halfway between the centres; a single one gets a cell of its own size."""
    if len(centres) == 1:
        return back(np.array([centres[0] / 2, 1.5 * centres[0]]))
    middle = (centres[1:] + centres[:-1]) / 2
    first, last = 2 * centres[0] - middle[0], 2 * centres[-1] - middle[-1]
    return back(np.concatenate([[first], middle, [last]]))


def attraction(rows: Sequence[Row], path: Path) -> None:
    """Theorem 5.3: where the flow ends over (|w|, theta), and the certified region."""
    rows = [row for row in rows if row.case["repeat"] == 0]
    figure, axes = _figure(len(rows), width=3.9, height=3.7)
    for axis, row in zip(axes, rows, strict=True):
        details, radius = row.details, row.details["radius"]
        size, gate = np.array(details["size"]), np.array(details["gate"])
        dies = np.array(details["dies"], dtype=bool)
        axis.scatter(
            size[dies], gate[dies], s=9, color=_BLUE, label="ends at $w = 0$, $\\theta = 0$"
        )
        axis.scatter(
            size[~dies],
            gate[~dies],
            s=9,
            marker="x",
            color="#e69f00",
            lw=0.9,
            label="ends elsewhere",
        )
        angle = np.linspace(0, math.pi / 2, 400)[1:-1]
        axis.plot(
            radius * np.cos(angle),
            radius * np.sin(angle),
            color=_RED,
            lw=1.8,
            label="certified region $\\mathcal{A}_0$",
        )
        axis.set(
            xscale="log",
            yscale="log",
            xlim=(radius / 5, 1.5 * size.max()),
            ylim=(radius / 5, 1.5),
            xlabel="$\\|w\\|$ at the start",
            ylabel="$\\theta$ at the start",
        )
        axis.set_title(f"$\\log\\gamma = {row.case['log_gamma']:g}$")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False, fontsize=8)
    _save(figure, path)
