"""Checkpoints: all of a training after an epoch, in one file, written whole, read without code.

The file is torch's own format (``torch.load(FILE, weights_only=True)`` reads it). It appears by one
rename, so that there is always the one before or the new one; its records' checksums are looked at
before anything of it is used, and names and shapes before anything of a training is changed.
"""

from __future__ import annotations

import io
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from retrain.files import READ_ERRORS, Count, first_line, read_as, write_whole
from retrain.trainers.loop.training import Stateful, Training

FORMAT = 1
_PLAIN = (bool, int, float, str, type(None))


@dataclass(frozen=True)
class Checkpoint:
    """A training after some epochs.

    Attributes
    ----------
    epochs, steps : int
        Done so far.
    ended : bool
        Whether a callback has ended the training.
    description : dict
        What `Training.describe` said of the model; `Method.reshape` wants it.
    states : dict
        Of the model, the optimiser, the schedule, the parts, the generators.
    """

    epochs: Count
    steps: Count
    ended: bool
    description: dict[str, Any]
    states: dict[str, Any]


def states_of(training: Training, others: Mapping[str, Stateful]) -> dict[str, Any]:
    """Return all states of a training, and of what else is named."""
    schedule = training.schedule
    return {
        "model": training.model.state_dict(),
        "optimizer": training.optimizer.state_dict(),
        "schedule": None if schedule is None else schedule.state_dict(),
        "parts": {name: part.state_dict() for name, part in training.parts.items()},
        "others": {name: other.state_dict() for name, other in others.items()},
    }


def restore(training: Training, others: Mapping[str, Stateful], states: Mapping[str, Any]) -> None:
    """Put states back into a training that has been reshaped, and into what else is named.

    Raises
    ------
    ValueError
        If names, shapes or types do not fit; then nothing of the model has been changed.
    """
    try:
        _check_model(training.model.state_dict(), states["model"])
        _check_optimizer(training.optimizer, states["optimizer"])
        for name, wanted in (("parts", training.parts), ("others", others)):
            _check_same(states[name], wanted, name)
        if (training.schedule is None) != (states["schedule"] is None):
            raise ValueError("checkpoint: schedule: one has a schedule, the other has none")
        _check_kinds(states_of(training, others), states, "")
        training.model.load_state_dict(states["model"])
        training.optimizer.load_state_dict(states["optimizer"])
        if training.schedule is not None:
            training.schedule.load_state_dict(states["schedule"])
        for name, part in training.parts.items():
            part.load_state_dict(states["parts"][name])
        for name, other in others.items():
            other.load_state_dict(states["others"][name])
    except READ_ERRORS as error:
        if isinstance(error, ValueError) and str(error).startswith("checkpoint: "):
            raise  # one of the checks above
        text = first_line(error)
        raise ValueError(f"checkpoint: does not fit ({type(error).__name__}: {text})") from error


def write_checkpoint(path: Path, checkpoint: Checkpoint) -> None:
    """Write a checkpoint, whole; one that is there is replaced in one step.

    Raises
    ------
    ValueError
        If a state holds something that is not read back without running code.
    OSError
        If the file cannot be written; the one that was there stays.
    """
    entries = entries_of(checkpoint)
    _check_plain(entries, "")
    buffer = io.BytesIO()
    torch.save({"format": FORMAT, **entries}, buffer)
    write_whole(path, buffer.getvalue())


def read_checkpoint(path: Path) -> Checkpoint | None:
    """Read a checkpoint; None if there is none.

    Raises
    ------
    ValueError
        If the file is truncated, altered, or no checkpoint; the message says what to do.
    """
    if not path.exists():
        return None
    try:
        with zipfile.ZipFile(path) as archive:
            broken = archive.testzip()
        if broken is not None:
            raise ValueError(f"checksum of {broken} differs")
        entries = torch.load(path, map_location="cpu", weights_only=True)
        if not isinstance(entries, dict) or entries.pop("format", None) != FORMAT:
            raise ValueError(f"it is no checkpoint of format {FORMAT}")
        return read_as(Checkpoint, entries, "its entries")
    except READ_ERRORS as error:
        raise ValueError(
            f"checkpoint: {path} is damaged ({first_line(error)}); delete it, and the same command "
            "starts the training anew"
        ) from error


def entries_of(checkpoint: Checkpoint) -> dict[str, Any]:
    """Return a checkpoint's fields: what is written, and sent to other processes."""
    return {entry.name: getattr(checkpoint, entry.name) for entry in fields(checkpoint)}


def _check_same(saved: Any, wanted: Mapping[str, Any], name: str) -> None:
    if not isinstance(saved, Mapping) or set(saved) != set(wanted):
        raise ValueError(
            f"checkpoint: {name}: want {', '.join(sorted(wanted)) or 'none'}; it has "
            f"{', '.join(sorted(saved)) or 'none'}"
        )


def _check_model(own: Mapping[str, Tensor], saved: Mapping[str, Tensor]) -> None:
    lacking = sorted(set(own) - set(saved))
    beside = sorted(set(saved) - set(own))
    if lacking or beside:
        said = [f"lacks {lacking[0]!r}"] if lacking else []
        said += [f"has {beside[0]!r} besides"] if beside else []
        raise ValueError(f"checkpoint: its model does not fit: it {' and '.join(said)}")
    for name, tensor in own.items():
        other = saved[name]
        if not isinstance(tensor, Tensor):
            continue
        if other.shape != tensor.shape or other.dtype != tensor.dtype:
            raise ValueError(
                f"checkpoint: {name!r}: got {other.dtype} of shape {tuple(other.shape)}, want the "
                f"model's {tensor.dtype} of shape {tuple(tensor.shape)}"
            )


def _check_optimizer(optimizer: Optimizer, saved: Mapping[str, Any]) -> None:
    """Compare what torch's load_state_dict does not: shapes of moments with their parameters'."""
    groups = optimizer.param_groups
    sizes = [len(group["params"]) for group in groups]
    saved_sizes = [len(group["params"]) for group in saved["param_groups"]]
    if sizes != saved_sizes:
        raise ValueError(
            f"checkpoint: its optimiser has groups of {saved_sizes} parameters, want {sizes}"
        )
    numbered = [number for group in saved["param_groups"] for number in group["params"]]
    parameters = [parameter for group in groups for parameter in group["params"]]
    for number, parameter in zip(numbered, parameters, strict=True):
        for key, value in saved["state"].get(number, {}).items():
            real = value.is_floating_point() if isinstance(value, Tensor) else True
            if not real or not isinstance(value, Tensor | float | int | None):
                raise ValueError(f"checkpoint: {key} of parameter {number} is not made of numbers")
            if not isinstance(value, Tensor) or value.numel() == 1:
                continue
            # An optimiser of several objectives stacks their moments in front.
            if value.shape[value.ndim - parameter.ndim :] != parameter.shape:
                raise ValueError(
                    f"checkpoint: {key} of parameter {number} has shape {tuple(value.shape)}, the "
                    f"parameter {tuple(parameter.shape)}"
                )


def _check_kinds(own: Any, saved: Any, where: str) -> None:
    """Refuse a state where another kind of value stands than in the training's own states.

    Only what both have is compared: a part may have more to say after some epochs than before.
    """
    if isinstance(own, Mapping):
        if not isinstance(saved, Mapping):
            raise ValueError(f"checkpoint: {where} is a {type(saved).__name__}, want a mapping")
        for key in own.keys() & saved.keys():
            _check_kinds(own[key], saved[key], f"{where}.{key}" if where else str(key))
    elif isinstance(own, list) and isinstance(saved, list):
        for number, (mine, theirs) in enumerate(zip(own, saved, strict=False)):
            _check_kinds(mine, theirs, f"{where}.{number}")
    elif own is not None and _kind(saved) != _kind(own):
        raise ValueError(
            f"checkpoint: {where} is a {type(saved).__name__}, want a {type(own).__name__}"
        )


def _kind(value: Any) -> type:
    """Return a value's type, the same one for whole numbers and others."""
    return float if type(value) is int else Tensor if isinstance(value, Tensor) else type(value)


def _check_plain(value: Any, where: str) -> None:
    """Refuse what torch's weights-only reader would not read back."""
    if isinstance(value, Mapping):
        for key, entry in value.items():
            if not isinstance(key, str | int):
                raise ValueError(f"checkpoint: {where}: a key is a {type(key).__name__}")
            _check_plain(entry, f"{where}.{key}" if where else str(key))
    elif isinstance(value, list | tuple | set):
        for number, entry in enumerate(value):
            _check_plain(entry, f"{where}.{number}")
    elif not isinstance(value, Tensor) and type(value) not in _PLAIN:  # numpy's float is a float
        raise ValueError(
            f"checkpoint: {where} is a {type(value).__name__}; want tensors, numbers, text, and "
            "lists and dicts of them"
        )
