"""Where a model is, and its modes and torch's generators changed for a while and put back."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


def device_of(model: nn.Module) -> torch.device:
    """Return the device of the model's first parameter; the CPU when it has none."""
    first = next(model.parameters(), None)
    return torch.device("cpu") if first is None else first.device


@contextmanager
def mode(model: nn.Module, *, training: bool) -> Iterator[None]:
    """Put the model into training or evaluation mode; put each module back as it was."""
    before = {module: module.training for module in model.modules()}
    model.train(training)
    try:
        yield
    finally:
        for module, was_training in before.items():
            module.training = was_training


@contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Seed the default generators that modules draw on (initial weights, dropout); restore them.

    Those are the CPU's and, when `device` is a CUDA device, that one's.

    Raises
    ------
    ValueError
        If `device` is of another kind: its generator could not be put back.
    """
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"device: got {str(device)!r}, want 'cpu' or 'cuda'")
    on_gpu = device.type == "cuda"
    # torch.manual_seed would seed every device there is, also those that are not put back.
    with torch.random.fork_rng([device] if on_gpu else []):
        torch.default_generator.manual_seed(seed)
        if on_gpu:
            with torch.cuda.device(device):
                torch.cuda.manual_seed(seed)
        yield
