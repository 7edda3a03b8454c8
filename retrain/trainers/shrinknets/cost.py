"""What training a network that shrinks has cost, by the draft's model.

Seconds and operations are in every run's history (`retrain.trainers.loop.account`).
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from torch import nn
from torch.optim import Optimizer

from retrain.trainers.loop.callbacks import Epoch
from retrain.trainers.shrinknets.network import neurons_of


def input_neurons(model: nn.Module) -> int:
    """Return the sum over the layers of the neurons they take: inputs, channels, positions of both.

    The draft's cost of an epoch (section 6.2); for a linear regression, the inputs that are left.
    """
    return sum(neurons.count * neurons.span for neurons in neurons_of(model)[:-1])


@dataclass
class Costs:
    """Sums over the epochs so far; an ``after_epoch`` callback, and a part of a checkpoint.

    Attributes
    ----------
    now : int
        Input neurons at the start of the coming epoch.
    neurons : int
        Sum over the epochs of the input neurons each started with: the draft's cost.
    """

    now: int
    neurons: int = 0

    def __call__(self, epoch: Epoch, model: nn.Module, optimizer: Optimizer) -> None:
        """Add an epoch."""
        self.neurons += self.now
        self.now = input_neurons(model)

    def state_dict(self) -> dict[str, Any]:
        """Return the sums."""
        return asdict(self)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Put sums back."""
        for name in asdict(self):
            setattr(self, name, state[name])
