"""What a run says on the terminal: a table of layers and a few lines that a person can act on."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

from retrain.bounds import OutputBound
from retrain.layer_report import LayerReport
from solvers.result import Status


def layer_list(layers: Iterable[Any]) -> Table:
    """Table of what can be retrained, for `retrain layers`.

    `layers` are `retrain.adapters.find.FoundLayer`.
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
    """Table of a run's layers, one row each."""
    table = Table(box=SIMPLE_HEAD)
    table.add_column("layer")
    table.add_column("shape")
    for title in ("zeros", "error", "epsilon", "gap", "violation"):
        table.add_column(title, justify="right")
    table.add_column("certificate")
    table.add_column("seconds", justify="right")
    for report in reports:
        details = report.details
        violation = max(
            details.get("ball_violation") or 0.0, details.get("ceiling_violation") or 0.0
        )
        table.add_row(
            report.name,
            f"{report.shape[0]} x {report.shape[1]}",
            f"{100 * report.sparsity:.1f} %",
            f"{report.relative_error:.4f}",
            _number(details.get("relative_epsilon"), ".4f"),
            _number(details.get("gap"), ".1e"),
            f"{violation:.1e}",
            verdict(report),
            f"{report.seconds:.1f}",
        )
    return table


def verdict(report: LayerReport) -> str:
    """Say in a few words what a layer's certificate is worth."""
    if report.certified:
        return "certified"
    if report.dense_units == 0:
        return f"not certified ({report.status}), used as it is"
    some = f"dense weights kept in {report.dense_units} of {report.all_units} units"
    kept = "dense weights kept" if report.dense_units == report.all_units else some
    return f"not certified ({report.status}), {kept}"


def summary(record: dict[str, Any], bounds: dict[str, OutputBound]) -> list[str]:
    """Lines on the whole run: sparsity, accuracy, how far the outputs moved and can have moved."""
    totals = record["totals"]
    before = totals["zeros_before"] / totals["weights"]
    lines = [
        f"{totals['zeros']:,} of {totals['weights']:,} weights are zero "
        f"({100 * totals['sparsity']:.1f} %; {100 * before:.1f} % before)"
    ]
    for name, accuracy in record["accuracy"].items():
        if accuracy["before"] is None:
            continue
        line = (
            f"accuracy on {_data(name)}: {100 * accuracy['before']:.2f} % before, "
            f"{100 * accuracy['after']:.2f} % after"
        )
        if accuracy.get("fine_tuned") is not None:
            line += f", {100 * accuracy['fine_tuned']:.2f} % fine-tuned"
        lines.append(line)
    for name, bound in bounds.items():
        lines.append(f"outputs on {_data(name)} ({bound.rows:,} rows): {bound_line(bound)}")
    for entry in record["left"]:
        lines.append(f"left as it was: {entry['name']} ({entry['kind']}): {entry['reason']}")
    for entry in record["layers"]:
        if entry["rows"] < entry["total_rows"]:
            lines.append(
                f"{entry['name']}: certified on a seeded sample of {entry['rows']:,} of "
                f"{entry['total_rows']:,} rows (--memory)"
            )
    if not totals["certified"]:
        remedies = {entry["status"] for entry in record["layers"] if not entry["certified"]}
        for status in sorted(remedies):
            lines.append(f"not certified: {status}; {Status(status).remedy}")
    return lines


def bound_line(bound: OutputBound) -> str:
    """Say how far outputs moved and, with proof, can have moved."""
    moved = f"moved by {bound.measured:.4g} ({100 * bound.relative:.2f} % of their norm)"
    if bound.best is None:
        return f"{moved}; no bound: {bound.reason}"
    parts = []
    if bound.direct is not None:
        parts.append(f"{bound.direct:.4g} directly")
    if bound.bound is not None:
        parts.append(f"{bound.bound:.4g} as a sum over layers")
    ratio = bound.ratio
    tightness = "" if ratio is None else f"; best bound / measured = {ratio:.2f}"
    return f"{moved}, proven at most {', '.join(parts)}{tightness}"


def _data(name: str) -> str:
    return {"calibration": "the calibration data", "held_out": "held-out data"}.get(name, name)


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)
