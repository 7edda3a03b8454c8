"""What a run says on the terminal: a table of layers and a few lines that a person can act on."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from retrain.bounds.outputs import NO_DIRECT, OutputBound
from retrain.stream.details import LobsDetails, NetTrimDetails
from retrain.stream.layer_report import LayerReport
from solvers.result import Status

_REMEDIES = {
    Status.INEXACT: "ask for less (--gap, --violation), or save the network in float64",
    Status.ITERATION_LIMIT: (
        "raise --max-iterations, ask for less (--gap, --violation), or use --solver newton"
    ),
    Status.UNREACHABLE: (
        "no weights of use keep the responses so close: raise --relative-epsilon or --epsilon, or "
        "save the network in float64"
    ),
    Status.NUMERICAL_ERROR: "use another --solver, or check the range of the data",
}
"""What a person at the command line can do, where `Status.remedy` speaks of arguments."""


_Kind = TypeVar("_Kind", NetTrimDetails, LobsDetails)


class _Output(Console):
    """Standard output whose reader may go away: rich would end with the code of a bad run."""

    def on_broken_pipe(self) -> None:
        raise BrokenPipeError


def output() -> Console:
    """Open standard output: as wide as the terminal, 120 columns where there is none."""
    return _Output(width=None if sys.stdout.isatty() else 120, highlight=False)


def layer_list(layers: Iterable[Any]) -> Table:
    """Table of what can be retrained, for `retrain layers`.

    `layers` are `retrain.adapters.network.open.FoundLayer`.
    """
    table = Table(box=SIMPLE_HEAD)
    for title in ("layer", "kind", "inputs x units", "numbers", "meets next", "retrain?"):
        table.add_column(title, justify="right" if title == "numbers" else "left")
    for found in layers:
        spec = found.spec
        shape = f"{spec.shape[0]} x {spec.shape[1]}" if spec.shape[0] else ""
        groups = f" x {spec.groups}" if spec.groups > 1 else ""
        answer = "yes" if spec.reason is None else f"no: {spec.reason}"
        kind = f"{spec.kind} {found.detail}".strip()
        table.add_row(spec.name, kind, shape + groups, f"{found.parameters:,}", found.meets, answer)
    return table


def run_table(reports: Sequence[LayerReport]) -> Table:
    """Table of a run's layers, one row each, with the columns of its method."""
    columns = _COLUMNS.get(type(reports[0].details), _COMMON) if reports else _COMMON
    # Close together, and only words wrap: numbers must be whole on 80 columns.
    table = Table(box=SIMPLE_HEAD, padding=0, pad_edge=False)
    for title in columns:
        words = title in ("layer", "method", "certificate")
        left = words or title == "shape"
        table.add_column(
            title, justify="left" if left else "right", no_wrap=not words, overflow="fold"
        )
    for report in reports:
        table.add_row(*(entry(report) for entry in columns.values()))
    return table


def _shape(report: LayerReport) -> str:
    groups = report.weights // (report.shape[0] * report.shape[1])
    return f"{report.shape[0]} x {report.shape[1]}" + (f" x {groups}" if groups > 1 else "")


def _violation(details: NetTrimDetails) -> str:
    worst = [v for v in (details.ball_violation, details.ceiling_violation) if math.isfinite(v)]
    return _number(max(worst, default=None), ".1e")


def _method(details: LobsDetails) -> str:
    return details.method + ("" if details.pattern == "layer" else f", {details.pattern}")


_Column = Callable[[LayerReport], str]


def _of(kind: type[_Kind], entry: Callable[[_Kind], str]) -> _Column:
    """Return a column of a method's own figures; empty in a row of another method."""
    return lambda report: entry(report.details) if isinstance(report.details, kind) else ""


_FIRST: dict[str, _Column] = {"layer": lambda report: report.name, "shape": _shape}
_LAST: dict[str, _Column] = {
    "seconds": lambda report: f"{report.seconds:.1f}",
    "certificate": lambda report: verdict(report),
}
_COMMON: dict[str, _Column] = {
    **_FIRST,
    "zeros": lambda report: f"{100 * report.sparsity:.1f} %",
    "error": lambda report: f"{report.relative_error:.4f}",
    **_LAST,
}
"""Columns for a method that has none of its own in `_COLUMNS`."""

_COLUMNS: dict[type, dict[str, _Column]] = {
    NetTrimDetails: {
        **_FIRST,
        "zeros": _COMMON["zeros"],
        "error": _COMMON["error"],
        "epsilon": _of(NetTrimDetails, lambda of: _number(of.relative_epsilon, ".4f")),
        "gap": _of(NetTrimDetails, lambda of: _number(of.gap, ".1e")),
        "violation": _of(NetTrimDetails, _violation),
        **_LAST,
    },
    LobsDetails: {
        **_FIRST,
        "method": _of(LobsDetails, _method),
        "kept": lambda report: f"{report.weights - report.zeros:,} of {report.weights:,}",
        "zeros": lambda report: f"{100 * report.sparsity:.2f} %",
        "rms error": _of(LobsDetails, lambda of: _number(of.rms_error, ".4g")),
        "relative": _of(LobsDetails, lambda of: _number(_root(of.relative_layer_error), ".4f")),
        "activated": _COMMON["error"],
        **_LAST,
    },
}


def _root(value: float | None) -> float | None:
    return None if value is None else math.sqrt(value)


def verdict(report: LayerReport) -> str:
    """Say in a few words what a layer's certificate is worth."""
    if report.certified:
        return "certified"
    if report.dense_units == 0:
        return f"not certified ({report.status.value}), used as it is"
    some = f"dense weights kept in {report.dense_units} of {report.all_units} units"
    kept = "dense weights kept" if report.dense_units == report.all_units else some
    return f"not certified ({report.status.value}), {kept}"


def summary(
    record: dict[str, Any], reports: Sequence[LayerReport], bounds: dict[str, OutputBound]
) -> list[str]:
    """Lines on the whole run: sparsity, accuracy, how far the outputs moved and can have moved."""
    totals = record["totals"]
    before = totals["zeros_before"] / totals["weights"]
    lines = [
        f"{totals['zeros']:,} of {totals['weights']:,} weights are zero "
        f"({100 * totals['sparsity']:.1f} %; {100 * before:.1f} % before)"
    ]
    lines += asked_lines(record, reports)
    for name, accuracy in record["accuracy"].items():
        if accuracy.get("labels"):
            lines.append(f"labels of {_data(name)}: {accuracy['labels']}")
        if accuracy["before"] is None or accuracy["after"] is None:
            if accuracy.get("reason"):
                lines.append(f"no accuracy on {_data(name)}: {accuracy['reason']}")
            continue
        line = (
            f"accuracy on {_data(name)}: {100 * accuracy['before']:.2f} % before, "
            f"{100 * accuracy['after']:.2f} % after"
        )
        if accuracy.get("fine_tuned") is not None:
            line += f", {100 * accuracy['fine_tuned']:.2f} % fine-tuned"
        lines.append(line)
        perplexity = accuracy.get("perplexity")
        if perplexity is not None:
            before, after = (_number(perplexity[when], ".4g") for when in ("before", "after"))
            lines.append(f"perplexity on {_data(name)}: {before} before, {after} after")
    for name, bound in bounds.items():
        lines.append(f"outputs on {_data(name)} ({bound.rows:,} rows): {bound_line(bound)}")
    for name, theorems in record.get("theorems", {}).items():
        lines.append(f"theorem 3.2 on {_data(name)}: {theorem_line(theorems)}")
    for number, stage in enumerate(record.get("stages", []), start=1):
        lines.append(f"stage {number}: {stage_line(stage)}")
    for entry in record["left"]:
        lines.append(f"left as it was: {entry['name']} ({entry['kind']}): {entry['reason']}")
    for report in reports:
        if report.rows < report.total_rows:
            lines.append(
                f"{report.name}: certified on a seeded sample of {report.rows:,} of "
                f"{report.total_rows:,} rows (--memory)"
            )
    statuses = {report.status for report in reports if not report.certified}
    for status in sorted(statuses, key=lambda status: status.value):
        lines.append(f"not certified: {status.value}; {_REMEDIES.get(status, status.remedy)}")
    return lines


def asked_lines(record: dict[str, Any], reports: Sequence[LayerReport]) -> list[str]:
    """Say what sparsity or drop was asked for, and what was got."""
    lines = []
    for report in reports:
        details = report.details
        if not isinstance(details, NetTrimDetails) or details.asked_zeros is None:
            continue
        asked, share = details.asked_zeros, 100 * (details.asked_sparsity or 0.0)
        if report.zeros == asked:
            outcome = "met exactly"
        elif report.dense_units:
            outcome = f"got {report.zeros:,}: dense weights were kept"
        elif report.zeros_before > asked and record["options"].get("zeros") == "stay":
            there = f"{report.zeros_before:,} are zero in the dense network and stay"
            outcome = f"got {report.zeros:,}: {there} (--free-zeros lets them go)"
        else:
            outcome = f"got {report.zeros:,}, the nearest that was found"
        lines.append(
            f"{report.name}: asked for {asked:,} zeros ({share:.2f} %): {outcome}, at relative "
            f"epsilon {_number(details.relative_epsilon, '.4f')}"
        )
    search = record.get("search")
    if search is not None:
        lines.append(search_line(search))
        lines += [f"tried {trial_line(trial)}" for trial in search["trials"]]
    return lines


def search_line(search: dict[str, Any]) -> str:
    """Say what one relative epsilon was searched for, and what was found."""
    asked, got = search["asked"], search["got"]
    found = f"relative epsilon {search['relative_epsilon']:.4g} (trial {search['chosen']})"
    if "sparsity" in asked:
        outcome = "met exactly" if search["met"] else "the nearest that was found"
        return (
            f"asked for {asked['zeros']:,} zeros ({100 * asked['sparsity']:.2f} %), got "
            f"{got['zeros']:,} ({100 * got['sparsity']:.2f} %), {outcome}: {found}"
        )
    drop = "no accuracy" if got["drop"] is None else f"a drop of {got['drop']:.2f} points"
    outcome = "" if search["met"] else ", which is NOT within it; no trial is"
    return (
        f"asked for a drop of at most {asked['max_drop']:g} points on held-out data, got {drop} "
        f"at {100 * got['sparsity']:.2f} % zeros{outcome}: {found}"
    )


def trial_line(trial: dict[str, Any]) -> str:
    """Say what one trial gave."""
    drop = "" if trial["drop"] is None else f", held-out accuracy {0 - trial['drop']:+.2f} points"
    kept = "" if trial["certified"] else ", not all layers certified"
    share = 100 * trial["zeros"] / trial["weights"]
    return (
        f"relative epsilon {trial['relative_epsilon']:.4g}: {share:.2f} % zeros{drop}{kept}, "
        f"{trial['seconds']:.1f} s"
    )


def bound_line(bound: OutputBound) -> str:
    """Say how far outputs moved and, with proof, can have moved."""
    moved = f"moved by {bound.measured:.4g} ({100 * bound.relative:.2f} % of their norm)"
    if bound.defect is not None:
        return f"{moved}; DEFECT: {bound.defect}"
    if bound.best is None:
        return f"{moved}; no bound: {bound.reason}"
    parts = []
    if bound.direct is not None:
        parts.append(f"{bound.direct:.4g} directly")
    if bound.bound is not None:
        parts.append(f"{bound.bound:.4g} as a sum over layers")
    ratio = bound.ratio
    tightness = "" if ratio is None else f"; best bound / measured = {ratio:.2f}"
    if bound.bound is None:
        tightness += f"; no sum over layers: {bound.reason}"
    if bound.direct is None and bound.direct_reason not in (None, NO_DIRECT.reason):
        tightness += f"; no direct bound: {bound.direct_reason}"
    return f"{moved}, proven at most {', '.join(parts)}{tightness}"


def theorem_line(theorems: dict[str, Any]) -> str:
    """Say what theorem 3.2 of L-OBS gives, root mean squared over the samples as in the paper."""
    scale = 1 / math.sqrt(theorems["rows"])
    if theorems["measured"] is None:
        return "the accumulated error is not finite"
    measured = f"accumulated error {scale * theorems['measured']:.4g}"
    if theorems.get("defect") is not None:
        return f"{measured}; DEFECT: {theorems['defect']}"
    if theorems["frobenius"] is None:
        return f"{measured}; no bound: {theorems['reason']}"
    return (
        f"{measured}, at most {scale * theorems['spectral']:.4g} (spectral norms), "
        f"{scale * theorems['frobenius']:.4g} (Frobenius norms, as in the paper)"
    )


def stage_line(stage: dict[str, Any]) -> str:
    """Sum up one stage of an iterative run."""
    parts = [f"{100 * (1 - stage['totals']['sparsity']):.2f} % kept"]
    for name, accuracy in stage["accuracy"].items():
        if accuracy["after"] is None:
            continue
        words = f"{_data(name)} {100 * accuracy['after']:.2f} %"
        if accuracy.get("fine_tuned") is not None:
            words += f", {100 * accuracy['fine_tuned']:.2f} % fine-tuned"
        parts.append(words)
    return "; ".join(parts)


def _data(name: str) -> str:
    return {"calibration": "the calibration data", "held_out": "held-out data"}.get(name, name)


def _number(value: float | None, form: str) -> str:
    return "" if value is None or math.isnan(value) else format(value, form)
