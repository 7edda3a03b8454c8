"""Learning-rate schedules by name, each moved on after every epoch."""

from __future__ import annotations

from torch.optim import Optimizer
from torch.optim.lr_scheduler import (
    CosineAnnealingLR,
    ExponentialLR,
    LambdaLR,
    LRScheduler,
    MultiStepLR,
    StepLR,
)

from retrain.trainers.loop.training import Setting


def cosine(
    optimizer: Optimizer, setting: Setting, *, epochs: int | None = None, minimum: float = 0.0
) -> LRScheduler:
    """Half a cosine from the learning rate to `minimum` over `epochs`; by default all there are."""
    length = max(setting.epochs, 1) if epochs is None else epochs
    if length < 1:
        raise ValueError(f"epochs: got {length}, want 1 or more")
    return CosineAnnealingLR(optimizer, length, minimum)


def step(optimizer: Optimizer, setting: Setting, *, every: int, factor: float) -> LRScheduler:
    """Multiply by `factor` every so many epochs."""
    if every < 1:
        raise ValueError(f"every: got {every}, want 1 or more epochs")
    return StepLR(optimizer, every, factor)


def multistep(
    optimizer: Optimizer, setting: Setting, *, epochs: list[int], factor: float
) -> LRScheduler:
    """Multiply by `factor` after each of the `epochs`."""
    return MultiStepLR(optimizer, list(epochs), factor)


def exponential(optimizer: Optimizer, setting: Setting, *, factor: float) -> LRScheduler:
    """Multiply by `factor` after every epoch."""
    return ExponentialLR(optimizer, factor)


def inverse(
    optimizer: Optimizer, setting: Setting, *, decay: float, power: float = 1.0
) -> LRScheduler:
    """Divide by (1 + decay * epoch)^power: with 1/2 < power <= 1, steps of Robbins and Monro."""
    if decay < 0:
        raise ValueError(f"decay: got {decay}, want a number >= 0")
    return LambdaLR(optimizer, lambda epoch: (1 + decay * epoch) ** -power)
