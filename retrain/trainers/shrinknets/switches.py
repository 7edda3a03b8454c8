"""Switch layers, and the penalties on them: equations (1) and (8) of the ShrinkNets draft.

A layer with switches on its inputs computes ``A diag(beta) x + b``; with switches on its outputs,
``diag(beta) (A x + b)``.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from retrain.trainers.loop.masked import weights_of
from solvers import checks

POWERS = (1, 2)


class Switch(nn.Module):
    """Multiply each neuron by its switch beta.

    Parameters
    ----------
    size : int
        Neurons, at least 1.
    span : int, optional
        Features a neuron has here, one behind the other: the positions of a channel after a
        flatten, 1 elsewhere.
    axis : int, optional
        Of the features: 1 for channels, -1 (the default) for what a dense layer takes and gives.

    Attributes
    ----------
    beta : nn.Parameter, shape (size,)
        The switches; ones at first, so that the network is what it was without them.
    mean_sign : Tensor, shape (size,)
        Moving average of the sign of beta, kept by `retrain.trainers.shrinknets.removal`.
    """

    beta: nn.Parameter
    mean_sign: Tensor

    def __init__(self, size: int, *, span: int = 1, axis: int = -1) -> None:
        super().__init__()
        checks.count(1, size=size, span=span)
        self.span = span
        self.axis = axis
        self.beta = nn.Parameter(torch.ones(size))
        self.register_buffer("mean_sign", torch.ones(size))

    @property
    def size(self) -> int:
        """Neurons that are left."""
        return len(self.beta)

    def forward(self, x: Tensor) -> Tensor:
        """Multiply the features of neuron j by beta_j."""
        beta = self.beta if self.span == 1 else self.beta.repeat_interleave(self.span)
        shape = [1] * x.ndim
        shape[self.axis] = -1
        return x * beta.view(shape)

    def extra_repr(self) -> str:
        """Say how many neurons there are, and what a neuron is."""
        return f"{self.size}, span={self.span}, axis={self.axis}"


class InputSwitch(Switch):
    """Switches on the network's own inputs, which no layer before gives; it selects those left.

    Attributes
    ----------
    kept : Tensor, shape (size,), int64
        Which of the inputs are left, in order.
    total : int
        How many inputs the network is given.
    """

    kept: Tensor

    def __init__(self, size: int, *, axis: int = -1) -> None:
        super().__init__(size, axis=axis)
        self.total = size
        self.register_buffer("kept", torch.arange(size))

    def forward(self, x: Tensor) -> Tensor:
        """Take the inputs that are left and multiply each by its switch."""
        if self.size < self.total:
            x = x.index_select(self.axis, self.kept)
        return super().forward(x)


def switches_of(model: nn.Module) -> dict[str, Switch]:
    """Return the model's switch layers by name, in the model's order."""
    return {name: module for name, module in model.named_modules() if isinstance(module, Switch)}


def switch_penalty(model: nn.Module, strength: float) -> Tensor:
    """Return (1), ``strength |beta|_1`` over all switches of the model.

    Raises
    ------
    ValueError
        If the model has no switch.
    """
    return strength * _sum(switch.beta.abs().sum() for switch in switches_of(model).values())


def regularised_penalty(
    model: nn.Module, strength: float, weight_strength: float, power: int
) -> Tensor:
    """Return (8), ``strength |beta|_1 + weight_strength |theta|_p^p``.

    Parameters
    ----------
    strength, weight_strength : float
        The paper's lambda and lambda_2, both at least 0. With lambda_2 = 0 the switches can be
        made as small as one likes at no loss, the weights growing (proposition A.3).
    power : {1, 2}
        p.

    Notes
    -----
    theta are the weights of dense and convolutional layers; biases and normalisations are not
    scaled by a switch and stay free. At a minimum the penalty of one dense layer's column C_j =
    beta_j A_j depends on that product alone: ``min_b lambda b + lambda_2 |C_j|^p / b^p`` is

        p = 2:  (3/2) lambda^(2/3) (2 lambda_2)^(1/3) |C_j|_2^(2/3)
        p = 1:  2 sqrt(lambda lambda_2 |C_j|_1),

    a concave penalty on the column, where group sparsity has |C_j|_2: large columns are shrunk
    less. Of lambda and lambda_2 only one product matters.

    Raises
    ------
    ValueError
        If the model has no switch, or `power` is not 1 or 2.
    """
    checks.one_of(POWERS, power=power)
    penalty = switch_penalty(model, strength)
    if weight_strength == 0:
        return penalty
    weights = weights_of(model).values()
    theta = (weight.abs().sum() if power == 1 else weight.square().sum() for weight in weights)
    return penalty + weight_strength * _sum(theta)


def _sum(terms: Iterator[Tensor]) -> Tensor:
    found = list(terms)
    if not found:
        raise ValueError("model: it has no switches; with_switches puts them in")
    return torch.stack(found).sum()
