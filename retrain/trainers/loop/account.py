"""What a network costs: parameters, floating-point operations, and the load of training it.

Operations are counted by torch's own counter on one sample: multiplications and additions of
matrix products and convolutions, two for each multiply-add; what is done entry by entry
(activations, normalisation) is left out, as in (43) of the layer-gates paper, whose sum

    sum over layers of  nu^l n^l n^{l+1},    nu^l = 1 (dense),  d_F^2 d_W d_H (convolution),

counts multiply-adds: half of ours.

References
----------
Guenter and Sideris, "Concurrent training and layer pruning of deep neural networks", section 6:
(43); pPR and fPR, the shares of the starting network's parameters and operations that were pruned.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from retrain.trainers.loop.callbacks import Step
from retrain.trainers.loop.states import device_of, mode, seeded


@dataclass(frozen=True)
class Cost:
    """What a network costs.

    Attributes
    ----------
    parameters : int
        Entries of all parameters.
    forward : int
        Floating-point operations of one sample's forward pass.
    training : int
        Of one sample's forward and backward pass.
    """

    parameters: int
    forward: int
    training: int


def cost(model: nn.Module, sample: Tensor) -> Cost:
    """Count what a network costs as it is now, in evaluation mode.

    Parameters
    ----------
    model : nn.Module
        Not changed; its gradients stay too.
    sample : Tensor, shape (1, ...)
        One input, on the model's device.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    # Modules that draw in evaluation mode too shall not move the generators of the training.
    with mode(model, training=False), seeded(0, device_of(model)):
        with FlopCounterMode(display=False) as forward, torch.no_grad():
            model(sample)
        with FlopCounterMode(display=False) as both, torch.enable_grad():
            outputs = model(sample)
            if trained and outputs.requires_grad:
                torch.autograd.grad(outputs.sum(), trained, allow_unused=True)
    parameters = sum(p.numel() for p in model.parameters())
    return Cost(parameters, forward.get_total_flops(), both.get_total_flops())


class Account:
    """The load of a training so far, beside the load of the network that it started from.

    Load is samples times operations of a forward and backward pass through all that is left of the
    network: the bound (43) where blocks are skipped at random, and without what a method computes
    besides. A callback, `step`, adds up; the network is counted anew when its parameters change.
    """

    def __init__(
        self, dense: Cost, sample: Tensor, measure: Callable[[nn.Module, Tensor], Cost] = cost
    ) -> None:
        self.dense = dense
        self.load = 0
        self.dense_load = 0
        self._sample = sample
        self._measure = measure
        self._shapes: list[torch.Size] | None = None
        self._current = dense

    def current(self, model: nn.Module) -> Cost:
        """Return what the network costs now."""
        shapes = [parameter.shape for parameter in model.parameters()]
        if shapes != self._shapes:
            self._current = self._measure(model, self._sample)
            self._shapes = shapes
        return self._current

    def step(self, step: Step) -> None:
        """Add a step's load, with the network that its forward pass had."""
        self.load += step.samples * self.current(step.model).training
        self.dense_load += step.samples * self.dense.training

    def figures(self, model: nn.Module) -> dict[str, Any]:
        """Return the account so far as JSON values.

        ``parameters`` and ``operations`` (of a sample's forward pass) of the network as it is;
        ``parameters_pruned`` and ``operations_pruned``, the paper's pPR and fPR; ``load`` and
        ``dense_load`` so far, in operations.
        """
        now = self.current(model)
        return {
            "parameters": now.parameters,
            "operations": now.forward,
            "parameters_pruned": _pruned(now.parameters, self.dense.parameters),
            "operations_pruned": _pruned(now.forward, self.dense.forward),
            "load": self.load,
            "dense_load": self.dense_load,
        }

    def state_dict(self) -> dict[str, Any]:
        """Return the loads so far."""
        return {"load": self.load, "dense_load": self.dense_load}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Put loads back."""
        self.load, self.dense_load = state["load"], state["dense_load"]


def _pruned(now: int, before: int) -> float:
    return 1 - now / before if before else 0.0
