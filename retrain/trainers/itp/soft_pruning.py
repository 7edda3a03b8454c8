"""Pruning while training: small weights are set to zero, and may come back (section 4)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from solvers import checks


class SoftPruning:
    """Sets weights below a threshold to zero, and counts what that did.

    A weight is pruned when |w| < threshold. It stays in training: once a step has carried it to the
    threshold again, it is back. Biases are not pruned.

    Parameters
    ----------
    model : nn.Module
        Pruned in place by `prune`.
    names : iterable of str
        Parameters to prune.
    threshold : float
        tau >= 0. At 0 nothing is pruned.

    Raises
    ------
    ValueError
        If the threshold is negative or not finite.
    """

    def __init__(self, model: nn.Module, names: Iterable[str], threshold: float) -> None:
        checks.not_negative(threshold=threshold)
        self.threshold = threshold
        self.weights = {name: model.get_parameter(name) for name in names}
        # Where the last pruning left a zero; counts of what came and went since the start, kept on
        # the weights' device so that counting does not wait for it.
        self.zero = {name: weight.detach() == 0 for name, weight in self.weights.items()}
        self.pruned = {name: _nothing(weight) for name, weight in self.weights.items()}
        self.returned = {name: _nothing(weight) for name, weight in self.weights.items()}

    @torch.no_grad()
    def prune(self) -> None:
        """Set the small weights to zero."""
        for name, weight in self.weights.items():
            before = self.zero[name]
            weight.copy_(self._kept(weight, before))
            zero = weight == 0
            stayed = (zero & before).count_nonzero()
            self.pruned[name] += zero.count_nonzero() - stayed
            self.returned[name] += before.count_nonzero() - stayed
            self.zero[name] = zero

    def _kept(self, weight: Tensor, before: Tensor) -> Tensor:
        """Return the weights after pruning, given where the last one left zeros."""
        # hardshrink zeroes |w| <= bound: with the largest number below the threshold as bound,
        # those are the |w| < threshold. On a CPU it is several times faster than a masked fill.
        threshold = torch.tensor(self.threshold, dtype=weight.dtype)
        bound = torch.nextafter(threshold, torch.zeros_like(threshold)).item()
        return functional.hardshrink(weight, bound)

    def counts(self) -> dict[str, dict[str, int]]:
        """Count, for each parameter, weights and nonzero ones, and prunings and returns so far."""
        return {
            name: {
                "size": weight.numel(),
                "nonzero": int(weight.detach().count_nonzero()),
                "pruned": int(self.pruned[name]),
                "returned": int(self.returned[name]),
            }
            for name, weight in self.weights.items()
        }

    def state_dict(self) -> dict[str, Any]:
        """Return the zeros of the last pruning and the counts."""
        return {"zero": self.zero, "pruned": self.pruned, "returned": self.returned}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Put a state back."""
        for name, weight in self.weights.items():
            self.zero[name] = state["zero"][name].to(weight.device)
            self.pruned[name] = state["pruned"][name].to(weight.device)
            self.returned[name] = state["returned"][name].to(weight.device)


class HardPruning(SoftPruning):
    """The variant in which a pruned weight is zero for good.

    `hold` keeps it there between two prunings, and its gradient out of what the optimiser sees.
    """

    def _kept(self, weight: Tensor, before: Tensor) -> Tensor:
        return super()._kept(weight, before).masked_fill_(before, 0)

    @torch.no_grad()
    def hold(self) -> None:
        """Set the weights pruned so far to zero, and their gradients."""
        for name, weight in self.weights.items():
            weight.masked_fill_(self.zero[name], 0)
            if weight.grad is not None:
                weight.grad.masked_fill_(self.zero[name], 0)


def _nothing(weight: Tensor) -> Tensor:
    return torch.zeros((), dtype=torch.int64, device=weight.device)
