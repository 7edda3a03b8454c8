"""A training run as it is read back: the network, its history, its record.

Knows nothing of how the network was trained; loading one imports torch and no trainer.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from retrain.run import HISTORY_FILE, MODEL_FILE

KIND = "training"


@dataclass(frozen=True, eq=False)
class TrainedRun:
    """A training run.

    Attributes
    ----------
    model : nn.Module
        The finished network, plain: layers of torch's own. On the CPU, in evaluation mode.
    history : list of dict
        A record an epoch, as `history.jsonl` has them: ``epoch`` (from 1), ``loss``, ``penalty``,
        ``accuracy``, ``test_loss``, ``test_accuracy``, ``learning_rate``, ``parameters``,
        ``operations``, ``parameters_pruned``, ``operations_pruned``, ``load``, ``dense_load``,
        ``seconds``, ``method`` (what the method says of the network).
    record : dict
        All that ``run.json`` holds.
    directory : Path or None
        Where the run was written, if anywhere.
    """

    model: Any
    history: list[dict[str, Any]]
    record: dict[str, Any]
    directory: Path | None

    @property
    def test_accuracy(self) -> float | None:
        """Of the finished network; None without test data, or where targets are no classes."""
        value: float | None = self.record["test"]["accuracy"] if self.record["test"] else None
        return value


def load_trained(directory: Path, record: Mapping[str, Any], model: Any = None) -> TrainedRun:
    """Read a finished training run.

    Parameters
    ----------
    directory : Path
    record : mapping
        Its run.json.
    model : nn.Module, optional
        The architecture, where the run could not describe it; a copy is filled.

    Raises
    ------
    ValueError
        If a file is missing or damaged, or the architecture is wanted.
    """
    from retrain.adapters.description import load_described
    from retrain.adapters.load import fill

    path = directory / MODEL_FILE
    if not path.is_file():
        raise ValueError(f"run: {str(directory)!r} has no {MODEL_FILE}")
    described = record["model"]["description"]
    if model is not None:
        network = fill(model, path, {name: name for name in model.state_dict()})
    elif described is not None:
        network = load_described(described, path)
    else:
        raise ValueError(
            f"model: the run could not describe its network ({record['model']['reason']}); pass "
            "the architecture, retrain.load(DIR, model)"
        )
    return TrainedRun(network, read_history(directory, record["epochs"]), dict(record), directory)


def read_history(directory: Path, epochs: int) -> list[dict[str, Any]]:
    """Read the first `epochs` records of a run's history; a killed run may have written one more.

    Raises
    ------
    ValueError
        If they are not there.
    """
    path = directory / HISTORY_FILE
    try:
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        history = [json.loads(line) for line in lines[:epochs]]
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"run: {path} is damaged ({error})") from error
    numbers = [entry.get("epoch") if isinstance(entry, dict) else None for entry in history]
    if numbers != list(range(1, epochs + 1)):
        raise ValueError(f"run: {path} is damaged: want a line for each of {epochs} epochs")
    return history


def history_bytes(history: list[dict[str, Any]]) -> bytes:
    """Return a history as `history.jsonl` holds it: a JSON object a line."""
    from retrain.files import plain

    lines = (json.dumps(plain(entry), allow_nan=False) + "\n" for entry in history)
    return "".join(lines).encode()
