"""The objectives of (6): a loss of the data, and the complexity of chosen weights."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn

from retrain.trainers.loop.masked import weights_of
from solvers import checks

Objective = Callable[[nn.Module], Tensor]
"""Something to be small that depends on the weights alone."""


@dataclass(frozen=True)
class Complexity:
    """The size of some weights: l2 (3), l1 (4), or lp.

    ::

        p = 2:  1/2 sum w^2        otherwise:  sum |w|^p

    The gradient at w = 0 is 0, one of the subgradients for p <= 1; so is torch's for p = 1.

    Attributes
    ----------
    names : tuple of str
        Qualified names of parameters.
    power : float
        p > 0.
    """

    names: tuple[str, ...]
    power: float = 1.0

    def __post_init__(self) -> None:
        checks.positive(power=self.power)

    def __call__(self, model: nn.Module) -> Tensor:
        """Return the complexity of `model`, a scalar with a gradient."""
        terms = [self._term(model.get_parameter(name)) for name in self.names]
        return torch.stack(terms).sum() if terms else torch.zeros(())

    def _term(self, weight: Tensor) -> Tensor:
        if self.power == 1:
            return weight.abs().sum()
        if self.power == 2:
            return weight.square().sum() / 2
        # Entries at zero are left out: |w|^p has an infinite slope there for p < 1, and autograd
        # would make 0 * inf of it.
        return weight[weight != 0].abs().pow(self.power).sum()


def weighted_sum(terms: Sequence[tuple[float, Objective]]) -> Objective | None:
    """Return the function sum_j weight_j objective_j; terms of weight 0 are never evaluated.

    None when nothing is left, for loops that add a penalty only where there is one.
    """
    active = [(weight, objective) for weight, objective in terms if weight != 0]
    if not active:
        return None

    def total(model: nn.Module) -> Tensor:
        return torch.stack([weight * objective(model) for weight, objective in active]).sum()

    return total


def gradients(
    objective: Objective, model: nn.Module, parameters: Iterable[Tensor]
) -> list[Tensor | None]:
    """Return the objective's gradient by parameters; None where it does not depend on one."""
    value = objective(model)
    chosen = list(parameters)
    if not value.requires_grad:
        return [None] * len(chosen)
    return list(torch.autograd.grad(value, chosen, allow_unused=True))


def convex_weight(trade_off: float) -> float:
    """Return the weight of the complexity in (7) that is as `trade_off` in (2): l / (1 + l)."""
    checks.not_negative(trade_off=trade_off)
    return trade_off / (1 + trade_off)


def trade_off_of(weight: float) -> float:
    """Return the trade-off of (2) that is as the convex weight of (7): l / (1 - l)."""
    checks.below_one(weight=weight)
    return weight / (1 - weight)


def dense_weights(model: nn.Module, patterns: Sequence[str] = ("*",)) -> tuple[str, ...]:
    """Name the weights of the dense layers whose names match a pattern, in the model's order.

    Parameters
    ----------
    patterns : sequence of str
        Shell patterns of layer names (``"layer*"``).

    Raises
    ------
    ValueError
        If a pattern matches no dense layer, or there is none.
    """
    layers = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    for pattern in patterns:
        if not any(fnmatchcase(layer, pattern) for layer in layers):
            raise ValueError(
                f"layers: {pattern!r} matches no dense layer; the model has "
                f"{', '.join(layers) or 'none'}"
            )
    return tuple(
        f"{layer}.weight".lstrip(".")
        for layer in layers
        if any(fnmatchcase(layer, pattern) for pattern in patterns)
    )


def other_weights(model: nn.Module, names: Iterable[str]) -> tuple[str, ...]:
    """Name the weights that are not among `names`: no biases, no normalisation scales."""
    taken = set(names)
    return tuple(name for name in weights_of(model) if name not in taken)
