"""Group sparsity, the ShrinkNets draft's baseline: equations (3) and (4), and its proximal step.

A group is all that would go with a neuron: on the side of the inputs the column of A that takes it
(all its positions behind a flatten), on the side of the outputs the row of A that gives it and its
entry of b.

    Omega = lambda sum_j sqrt(#theta_j) |theta_j|_2                                        (3)

Where all groups are of one size, as the columns of one layer are, sqrt(#theta_j) may be put into
lambda: (4).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import get_args

import torch
from torch import Tensor, nn

from retrain.trainers.loop.callbacks import Step
from retrain.trainers.shrinknets.network import Neurons, Side, neurons_of
from solvers import checks


@dataclass(frozen=True, eq=False)
class Group:
    """One parameter's part of the groups of a layer.

    Attributes
    ----------
    parameter : Tensor
        A weight or a bias.
    axis : int
        Along which the groups lie.
    span : int
        Entries along the axis that belong to one group, one behind the other.
    """

    parameter: Tensor
    axis: int
    span: int = 1

    def as_rows(self) -> Tensor:
        """Return the entries with a group a row."""
        moved = self.parameter.movedim(self.axis, 0)
        return moved.reshape(moved.shape[0] // self.span, -1)


Groups = tuple[Group, ...]
"""The groups of one layer: parts of the same group have the same number."""


def groups_of(
    model: nn.Module, at: Side = "inputs", layers: Iterable[str] | None = None
) -> dict[str, Groups]:
    """Return the groups of each layer, by the layer's name.

    Parameters
    ----------
    model : nn.Sequential
        As for `neurons_of`; without switches.
    at : {"inputs", "outputs"}
        Columns, or rows with their biases.
    layers : iterable of str, optional
        As for `with_switches`.

    Raises
    ------
    ValueError
        As for `neurons_of`; if a name is not a layer's, or the outputs of the last layer are named.
    """
    checks.one_of(get_args(Side), at=at)
    groups = neurons_of(model)
    found = {}
    for neurons in groups:
        name = neurons.target if at == "inputs" else neurons.source
        if name is not None and neurons.target is not None:
            found[name] = _columns(neurons) if at == "inputs" else _rows(neurons)
    inner = [n.target if at == "inputs" else n.source for n in groups[1:-1]]
    chosen = inner if layers is None else list(dict.fromkeys(layers))
    unknown = [name for name in chosen if name not in found]
    if unknown or not chosen:
        raise ValueError(
            f"layers: {', '.join(map(repr, found)) or 'none'} have neurons that may go at the "
            f"{at}, not {', '.join(map(repr, unknown)) or 'no layer at all'}"
        )
    return {name: found[name] for name in chosen if name is not None}


def _columns(neurons: Neurons) -> Groups:
    assert neurons.taker is not None
    return (Group(neurons.taker.weight, 1, neurons.span),)


def _rows(neurons: Neurons) -> Groups:
    assert neurons.giver is not None
    bias = () if neurons.giver.bias is None else (Group(neurons.giver.bias, 0),)
    return (Group(neurons.giver.weight, 0), *bias)


def group_norms(groups: Groups) -> Tensor:
    """Return |theta_j|_2 of each group of a layer."""
    squares = [group.as_rows().square().sum(1) for group in groups]
    return torch.stack(squares).sum(0).sqrt()


def group_size(groups: Groups) -> int:
    """Return #theta_j, the entries of each group of a layer."""
    return sum(group.as_rows().shape[1] for group in groups)


def group_penalty(layers: dict[str, Groups], strength: float) -> Tensor:
    """Return (3) over the groups of several layers."""
    terms = [math.sqrt(group_size(g)) * group_norms(g).sum() for g in layers.values()]
    return strength * torch.stack(terms).sum()


def shrink_groups(groups: Groups, amount: float | Tensor) -> Tensor:
    """Shrink the groups of a layer, in place: the proximal step of ``amount |theta_j|_2``.

    ``theta_j <- max(0, 1 - amount / |theta_j|_2) theta_j``: groups no longer than `amount` become
    exactly zero.

    Returns
    -------
    Tensor of bool
        Which groups are zero now.
    """
    with torch.no_grad():
        norms = group_norms(groups)
        scale = (1 - amount / norms).clamp(min=0).where(norms > 0, 0.0)
        for group in groups:
            wide = scale.repeat_interleave(group.span)
            shape = [1] * group.parameter.ndim
            shape[group.axis] = -1
            group.parameter.mul_(wide.view(shape))
        return scale == 0


def proximal_step(
    at: Side, layers: Iterable[str] | None, strength: float
) -> Callable[[Step], None]:
    """Make the callback for after each step: the proximal step of (3).

    The amount is the learning rate of the parameter's group in the optimiser times `strength` times
    sqrt(#theta_j). With plain SGD that is proximal gradient descent on the loss plus (3); with an
    optimiser that rescales its gradient (Adam) the loss and the penalty are weighed differently
    from neuron to neuron, and only the zeros are as exact.
    """
    chosen = None if layers is None else tuple(layers)

    def shrink(step: Step) -> None:
        rates = {
            id(parameter): group["lr"]
            for group in step.optimizer.param_groups
            for parameter in group["params"]
        }
        for groups in groups_of(step.model, at, chosen).values():
            rate = rates[id(groups[0].parameter)]
            shrink_groups(groups, rate * strength * math.sqrt(group_size(groups)))

    return shrink
