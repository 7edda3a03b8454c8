"""Training without pruning: the baseline of every method, and what it is with no pressure."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from retrain.trainers.gates.network import ungate
from retrain.trainers.loop.training import Setting, Training


@dataclass(frozen=True)
class Plain:
    """Train the model as it is."""

    def start(self, model: nn.Module, setting: Setting) -> Training:
        """Make the training: the recipe's optimiser over all parameters."""
        optimizer = setting.make_optimizer(model.parameters())
        return Training(model, optimizer, setting.make_schedule(optimizer), setting.loss)

    def reshape(self, training: Training, description: dict[str, Any]) -> None:
        """Leave the training as it is: nothing is ever removed."""

    def finish(self, training: Training) -> nn.Module:
        """Return the model; gated blocks, which are residual ones where nothing prunes, as such."""
        return ungate(training.model)
