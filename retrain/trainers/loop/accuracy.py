"""How often a classifier is right."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from retrain.trainers.loop.batches import TrainingData, as_pair, batches
from retrain.trainers.loop.states import device_of, mode


def evaluate(model: nn.Module, data: TrainingData, *, batch_size: int = 1024) -> float:
    """Return the share of samples that `model` classifies rightly, in evaluation mode.

    Runs batch by batch on the model's device; parameters, buffers and modes stay as they are.

    Raises
    ------
    ValueError
        If `data` is empty, or its targets are not class numbers.
    FloatingPointError
        If an output is NaN.
    """
    hits = count = 0
    with mode(model, training=False), torch.no_grad():
        for inputs, targets in batches(data, batch_size, device_of(model)):
            outputs = model(inputs)
            met = correct(outputs, targets)
            if met is None:
                raise ValueError(
                    f"data: targets must be class numbers, integers in one dimension less than the "
                    f"outputs' {tuple(outputs.shape)}, not {targets.dtype} {tuple(targets.shape)}"
                )
            if outputs.isnan().any():
                raise FloatingPointError("model: an output is NaN")
            hits += met
            count += targets.numel()
    return hits / count


def assess(
    model: nn.Module, data: TrainingData, loss: Callable[[Tensor, Tensor], Tensor]
) -> tuple[float, float | None]:
    """Return the mean loss and, where targets are class numbers, the share met.

    In evaluation mode, as `evaluate`. A loss that is not finite is returned as it is.
    """
    total, hits, samples, predictions = 0.0, 0, 0, 0
    classes = True
    with mode(model, training=False), torch.no_grad():
        for inputs, targets in batches(data, _batch_size(data), device_of(model)):
            outputs = model(inputs)
            total += loss(outputs, targets).item() * len(targets)
            met = correct(outputs, targets)
            classes = classes and met is not None
            hits += met or 0
            samples += len(targets)
            predictions += targets.numel()
    return total / samples, hits / predictions if classes else None


def _batch_size(data: TrainingData) -> int:
    """Return how many samples to evaluate at once: up to 1024, of 64 MiB in all."""
    pair = as_pair(data)
    numbers = 1 if pair is None else math.prod(pair[0].shape[1:])
    return max(1, min(1024, 2**24 // max(numbers, 1)))


def correct(outputs: Tensor, targets: Tensor) -> int | None:
    """Count the targets that are their largest output's number; None when they are no numbers.

    Parameters
    ----------
    outputs : Tensor, shape (B, classes, ...)
        Logits.
    targets : Tensor, shape (B, ...)
        Class numbers; anything but integers of this shape gives None.
    """
    if targets.is_floating_point() or outputs.ndim != targets.ndim + 1:
        return None
    return int((outputs.argmax(1) == targets).sum())
