"""A training run as it is read back: the network, its history, its record.

Knows nothing of how the network was trained; loading one imports torch and no trainer.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import msgspec

from retrain.files import Count, Positive, parse_json, read_as
from retrain.runs.directory import HISTORY_FILE, MODEL_FILE, RUN_FILE

KIND = "training"
"""Value of ``kind`` in the `run.json` of a training run, part of the run format."""


@dataclass(frozen=True, eq=False)
class TrainedRun:
    """A training run.

    Attributes
    ----------
    model : nn.Module
        Finished network made of torch's own layers, on the CPU and in evaluation mode.
    history : list of dict
        One record per epoch, as `history.jsonl` has them: ``epoch`` (from 1), ``loss``,
        ``penalty``, ``accuracy``, ``test_loss``, ``test_accuracy``, ``learning_rate``,
        ``parameters``, ``operations``, ``parameters_pruned``, ``operations_pruned``, ``load``,
        ``dense_load``, ``seconds``, ``method`` (what the method reports of the network).
    record : dict
        JSON values of ``run.json``.
    directory : Path or None
        Run directory; None where nothing was written.
    """

    model: Any
    history: list[dict[str, Any]]
    record: dict[str, Any]
    directory: Path | None

    @property
    def test_accuracy(self) -> float | None:
        """Accuracy of the finished network in [0, 1]; None without test data or without classes."""
        value: float | None = self.record["test"]["accuracy"] if self.record["test"] else None
        return value


class _Model(msgspec.Struct, frozen=True):
    """How the network is built again."""

    description: dict[str, Any] | None
    reason: str


class _Cost(msgspec.Struct, frozen=True):
    """Size of a network."""

    parameters: Count
    forward: float


class _Costs(msgspec.Struct, frozen=True):
    dense: _Cost
    final: _Cost


class _Figures(msgspec.Struct, frozen=True):
    """What a network does on a data set."""

    samples: Positive
    loss: float | None
    accuracy: float | None
    labels: str | None = None
    reason: str | None = None


class _Weights(msgspec.Struct, frozen=True):
    count: Count
    zeros: Count


class _Record(msgspec.Struct, frozen=True):
    """The record of a finished training run."""

    state: Literal["finished"]
    kind: Literal["training"]
    identity: dict[str, Any]
    title: str
    recipe: dict[str, dict[str, Any] | str]
    method: dict[str, Any]
    model: _Model
    epochs: Count
    ended: bool
    train: _Figures | None
    test: _Figures | None
    weights: _Weights
    cost: _Costs
    parameters_pruned: float
    operations_pruned: float
    load: float
    dense_load: float
    seconds: float


class _Line(msgspec.Struct, frozen=True):
    """A line of the history."""

    epoch: Positive
    loss: float | None
    penalty: float | None
    accuracy: float | None
    test_loss: float | None
    test_accuracy: float | None
    learning_rate: float | None
    parameters: Count
    operations: float
    parameters_pruned: float
    operations_pruned: float
    load: float
    dense_load: float
    seconds: float
    method: dict[str, Any]


def load_trained(directory: Path, record: Mapping[str, Any], model: Any = None) -> TrainedRun:
    """Read a finished training run.

    Parameters
    ----------
    directory : Path
        Run directory.
    record : mapping
        JSON values of its ``run.json``.
    model : nn.Module, optional
        Architecture, where the run could not describe it; a copy is filled.

    Returns
    -------
    TrainedRun
        Network, history and record.

    Raises
    ------
    ValueError
        If a file is missing or damaged, or the architecture is needed and `model` is not given.
    """
    from retrain.adapters.files.description import load_described
    from retrain.adapters.files.load import fill
    from retrain.adapters.network.wrappers import unwrapped

    try:
        checked = read_as(_Record, record, f"run: {directory / RUN_FILE}")
    except ValueError as error:
        raise ValueError(f"{error}; repeat its command") from error
    path = directory / MODEL_FILE
    if not path.is_file():
        raise ValueError(f"run: {str(directory)!r} has no {MODEL_FILE}")
    if model is not None:
        model = unwrapped(model)
        network = fill(model, path, {name: name for name in model.state_dict()})
    elif checked.model.description is not None:
        network = load_described(checked.model.description, path)
    else:
        raise ValueError(
            f"model: the run could not describe its network ({checked.model.reason}); pass "
            "the architecture, retrain.load(DIR, model)"
        )
    return TrainedRun(network, read_history(directory, checked.epochs), dict(record), directory)


def read_history(directory: Path, epochs: int) -> list[dict[str, Any]]:
    """Read the first records of a run's history; a killed run may have written one record more.

    Parameters
    ----------
    directory : Path
        Run directory.
    epochs : int
        Number of records.

    Returns
    -------
    list of dict
        One record per epoch.

    Raises
    ------
    ValueError
        If the file has fewer records, or one is damaged or out of order.
    """
    path = directory / HISTORY_FILE
    lines = path.read_bytes().splitlines() if path.exists() else []
    if len(lines) < epochs:
        raise ValueError(f"run: {path} is damaged: want a line for each of {epochs} epochs")
    history: list[dict[str, Any]] = []
    for number, line in enumerate(lines[:epochs], start=1):
        what = f"run: {path}, line {number}"
        entry = parse_json(line, what)
        if read_as(_Line, entry, what).epoch != number:
            raise ValueError(f"run: {path} is damaged: want a line for each of {epochs} epochs")
        history.append(entry)
    return history


def history_bytes(history: list[dict[str, Any]]) -> bytes:
    """Serialise a history for `history.jsonl`: one JSON object per line.

    Parameters
    ----------
    history : list of dict
        One record per epoch.

    Returns
    -------
    bytes
        UTF-8 text.
    """
    from retrain.files import plain

    lines = (json.dumps(plain(entry), allow_nan=False) + "\n" for entry in history)
    return "".join(lines).encode()
