"""The gates of a training: keep probabilities, their sampling, their steps, and what is left.

All of algorithm 1 that is not the training loop's own. theta is one flat vector on the CPU, drawn
from and stepped once a mini-batch, alike in every process of a parallel run.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from retrain.compact.cut import forget
from retrain.trainers.gates.absorb import remove_block
from retrain.trainers.gates.block import Gated
from retrain.trainers.gates.gradients import clear_gates, project, set_gates
from retrain.trainers.gates.network import gates_of


class Gating:
    """Gates being learnt; ``Stateful``: what changes but the blocks that are left.

    Parameters
    ----------
    model : nn.Module
        With gated blocks; blocks are removed from it in place.
    theta : float
        Where the keep probabilities start.
    generator : torch.Generator
        On the CPU; draws one vector a mini-batch. Seeded alike in all processes.

    Attributes
    ----------
    names : list of str
        Of the gates being learnt, in the model's order.
    theta : nn.Parameter, shape (len(names),)
        Their keep probabilities.
    optimizer : Optimizer
        Theta's.
    kept, removed : list of str
        Gates open for good, and blocks pruned, in the order in which that happened.
    pattern : list of bool
        The mini-batch's sample.
    xi : Tensor, shape (len(names),), on the model's device
        The same, to differentiate by.
    steps : int
        Steps begun.
    rounded : int, optional
        The epoch after which theta was rounded and the network became deterministic.
    """

    def __init__(self, model: nn.Module, theta: float, generator: torch.Generator) -> None:
        self.model = model
        self.generator = generator
        self.gates: dict[str, Gated] = gates_of(model)
        self.names = list(self.gates)
        self.theta = nn.Parameter(torch.full((len(self.names),), theta))
        self.optimizer: Optimizer = torch.optim.SGD([self.theta], lr=0.0)
        self.kept: list[str] = []
        self.removed: list[str] = []
        self.pattern: list[bool] = []
        self.xi: Tensor | None = None
        self.steps = 0
        self.rounded: int | None = None
        self._weights = {name: list(g.block.parameters()) for name, g in self.gates.items()}

    @property
    def learnt(self) -> list[Gated]:
        """The gates being learnt."""
        return [self.gates[name] for name in self.names]

    def sample(self, device: torch.device, *, differentiable: bool) -> None:
        """Draw one gate a block for the whole mini-batch, and set them."""
        drawn = torch.rand(len(self.names), generator=self.generator) < self.theta.detach()
        self.pattern = drawn.tolist()
        self.xi = drawn.to(device, torch.float32).requires_grad_() if differentiable else None
        set_gates(self.learnt, self.pattern, self.xi)

    def decay_closed(self) -> None:
        """Give closed blocks' weights the gradient 0, which (20), (21) say, instead of none.

        An optimiser passes over parameters without a gradient; these have weight decay to come.
        """
        for name, is_open in zip(self.names, self.pattern, strict=True):
            if not is_open:
                for weight in self._weights[name]:
                    if weight.grad is None:
                        weight.grad = torch.zeros_like(weight)

    def step(self, difference: Tensor, log_gamma: Tensor, samples: int) -> None:
        """Step theta along (24) and project it, (29), (30).

        Parameters
        ----------
        difference : Tensor, shape (len(names),)
            C_1 - C_0 over N: of the mini-batch's mean loss, over all processes.
        log_gamma : Tensor, shape (len(names),)
            The hyper-prior's pressure.
        samples : int
            N.

        Raises
        ------
        FloatingPointError
            If a keep probability is not finite afterwards.
        """
        gradient = difference.cpu().float().mul_(samples).sub_(log_gamma)
        self.theta.grad = gradient
        self.optimizer.step()
        with torch.no_grad():
            project(self.theta)
        if not bool(self.theta.isfinite().all()):
            bad = int((~self.theta.isfinite()).nonzero()[0])
            raise FloatingPointError(
                f"theta of {self.names[bad]!r} is {self.theta[bad].item()} after step "
                f"{self.steps}; its gradient was {gradient[bad].item()}: lower the learning rates"
            )

    def prune(self, optimizer: Optimizer, tolerance: float) -> None:
        """Remove blocks whose theta is at most `tolerance` from model and optimisers (step 4)."""
        dead = self.theta.detach() <= tolerance
        if bool(dead.any()):
            self.remove([n for n, d in zip(self.names, dead.tolist(), strict=True) if d], optimizer)

    def fix(self, at_least: float) -> None:
        """Keep for good the gates whose theta is at least this."""
        sure = self.theta.detach() >= at_least
        if bool(sure.any()):
            self.keep([n for n, s in zip(self.names, sure.tolist(), strict=True) if s])

    def round(self, optimizer: Optimizer, below: float, epoch: int) -> None:
        """Make the network deterministic: theta below `below` becomes 0, all others 1."""
        theta = dict(zip(self.names, self.theta.tolist(), strict=True))
        self.remove([name for name, value in theta.items() if value < below], optimizer)
        self.keep(list(self.names))
        self.rounded = epoch

    def remove(self, names: list[str], optimizer: Optimizer) -> None:
        """Remove blocks, last first, so that a skip that is passed on is passed on once."""
        self._drop(names)
        for name in reversed(names):
            forget(optimizer, remove_block(self.model, name))
            self.removed.append(name)
            del self.gates[name], self._weights[name]

    def keep(self, names: list[str]) -> None:
        """Leave gates open for good: plain residual blocks."""
        clear_gates([self.gates[name] for name in names])
        self._drop(names)
        self.kept += names

    def _drop(self, names: list[str]) -> None:
        """Cut entries out of theta and out of what its optimiser remembers."""
        left = torch.tensor([name not in names for name in self.names], dtype=torch.bool)
        size = len(self.names)
        memory = self.optimizer.state.get(self.theta, {})
        for key, entry in memory.items():
            if isinstance(entry, Tensor) and entry.shape == (size,):
                memory[key] = entry[left]
        self.theta.grad = None
        self.theta.data = self.theta.data[left]
        self.names = [name for name in self.names if name not in names]

    def describe(self) -> dict[str, Any]:
        """Return what is left, as JSON values."""
        theta = dict(zip(self.names, self.theta.tolist(), strict=True))
        return {
            "theta": theta,
            "kept": list(self.kept),
            "removed": list(self.removed),
            "rounded": self.rounded,
        }

    def state_dict(self) -> dict[str, Any]:
        """Return theta, its optimiser's and the sampler's state."""
        return {
            "theta": self.theta.detach().clone(),
            "optimizer": self.optimizer.state_dict(),
            "generator": self.generator.get_state(),
            "steps": self.steps,
            "rounded": self.rounded,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Put a state back; the blocks left must be those of then."""
        self.theta.data = state["theta"].to(self.theta.data)
        self.optimizer.load_state_dict(state["optimizer"])
        self.generator.set_state(state["generator"].cpu())
        self.steps, self.rounded = state["steps"], state["rounded"]
