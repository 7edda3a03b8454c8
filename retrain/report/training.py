"""What a training run says on the terminal: a line an epoch, a few lines at the end."""

from __future__ import annotations

from typing import Any


def epoch_line(line: dict[str, Any], total: int) -> str:
    """Say what an epoch of a training gave, from its line of the history."""
    parts = [f"loss {_number(line['loss'], '.4f')}"]
    if line["accuracy"] is not None:
        parts.append(f"accuracy {100 * line['accuracy']:.2f} %")
    if line["test_accuracy"] is not None:
        parts.append(f"test {100 * line['test_accuracy']:.2f} %")
    elif line["test_loss"] is not None:
        parts.append(f"test loss {line['test_loss']:.4f}")
    parts.append(f"{line['parameters']:,} parameters")
    if line["parameters_pruned"] > 0:
        parts[-1] += f" ({100 * line['parameters_pruned']:.1f} % pruned)"
    parts.append(f"{_operations(line['operations'])} a sample")
    if line["load"] < line["dense_load"]:
        parts.append(f"load {100 * line['load'] / line['dense_load']:.1f} % of dense")
    parts.append(f"{line['seconds']:.1f} s")
    return f"epoch {line['epoch']}/{total}: {', '.join(parts)}"


def training_summary(record: dict[str, Any]) -> list[str]:
    """Lines on a training run: accuracy, size, load, each beside the dense network's."""
    dense, final = record["cost"]["dense"], record["cost"]["final"]
    lines = []
    for name, words in (("train", "training"), ("test", "test")):
        found = record[name]
        if found is None:
            continue
        said = f"loss {_number(found['loss'], '.4f')}"
        if found["accuracy"] is not None:
            said = f"accuracy {100 * found['accuracy']:.2f} %, {said}"
        elif found.get("reason"):
            said += f"; no accuracy: {found['reason']}"
        if found.get("labels"):
            said += f"; labels: {found['labels']}"
        lines.append(f"{words} data ({found['samples']:,} samples): {said}")
    lines.append(
        f"{final['parameters']:,} of {dense['parameters']:,} parameters left (pPR "
        f"{100 * record['parameters_pruned']:.2f} %)"
    )
    weights = record["weights"]
    if weights["zeros"]:
        lines.append(
            f"{weights['zeros']:,} of the {weights['count']:,} weights left are zero "
            f"({100 * weights['zeros'] / weights['count']:.2f} %)"
        )
    lines.append(
        f"{_operations(final['forward'])} of {_operations(dense['forward'])} a sample left (fPR "
        f"{100 * record['operations_pruned']:.2f} %)"
    )
    if record["dense_load"]:
        ratio = record["load"] / record["dense_load"]
        epochs = f"{record['epochs']} epoch{'' if record['epochs'] == 1 else 's'}"
        lines.append(
            f"training load {record['load']:.3g} operations in {epochs}, "
            f"{100 * ratio:.1f} % of the dense network's; {record['seconds']:.1f} s"
        )
    if record["model"]["reason"]:
        lines.append(f"to load it, pass the architecture: {record['model']['reason']}")
    return lines


def _operations(count: float) -> str:
    """Say a number of floating-point operations."""
    for unit, size in (("Gflop", 1e9), ("Mflop", 1e6), ("kflop", 1e3)):
        if count >= size:
            return f"{count / size:.4g} {unit}"
    return f"{count:.0f} flop"


def _number(value: float | None, form: str) -> str:
    """Say a number; a loss that JSON could not hold was not finite."""
    return "not finite" if value is None else format(value, form)
