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
from solvers import checks


def cosine(
    optimizer: Optimizer, setting: Setting, *, epochs: int | None = None, minimum: float = 0.0
) -> LRScheduler:
    """Half a cosine from the learning rate to `minimum` over `epochs`; by default all there are."""
    length = max(setting.epochs, 1) if epochs is None else epochs
    checks.count(1, epochs=length)
    return CosineAnnealingLR(optimizer, length, minimum)


def step(optimizer: Optimizer, setting: Setting, *, every: int, factor: float) -> LRScheduler:
    """Multiply by `factor` every so many epochs."""
    checks.count(1, every=every)
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
    checks.not_negative(decay=decay)
    return LambdaLR(optimizer, lambda epoch: (1 + decay * epoch) ** -power)
