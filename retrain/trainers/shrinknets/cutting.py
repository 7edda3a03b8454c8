"""Neurons cut out of a network: out of the layers on both sides, what lies between, the optimiser.

A neuron that goes takes with it its row of the layer that gives it and that layer's bias, its
entries of batch normalisations, PReLUs and switches on the way, and its columns of the layer that
takes it: one of a dense layer, a filter's slice of a convolution, all its positions behind a
flatten. The parameters are made anew, smaller, and take the places of the old ones in the modules
and in the optimiser, with what it remembers of the neurons that stay. (Making the old ones smaller
would not do: autograd remembers a parameter's shape as long as anything, as torch's wrapper for
several processes, holds on to its node.)
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from retrain.trainers.shrinknets.network import NORMS, Neurons
from retrain.trainers.shrinknets.switches import InputSwitch, Switch


@dataclass(frozen=True, eq=False)
class Piece:
    """A tensor of a module, and which of its entries along an axis stay."""

    module: nn.Module
    name: str
    axis: int
    kept: Tensor


def cut_neurons(neurons: Neurons, kept: Tensor, optimizer: Optimizer | None = None) -> None:
    """Cut, in place, all neurons but `kept` out of their network.

    Parameters
    ----------
    neurons : Neurons
        Of the network as it is now; it is out of date afterwards.
    kept : Tensor of int64, shape (n,)
        The neurons that stay, ascending, at least one.
    optimizer : Optimizer, optional
        Any of torch's whose state is made of tensors of the parameter's shape (momenta, averages of
        squares), of that shape reduced along axes to 1 (factored averages), and of numbers. What it
        remembers of the neurons that stay is untouched.

    Raises
    ------
    ValueError
        If nothing would stay, the network's inputs have no switches that could select among them,
        or the optimiser's state cannot be cut. Nothing has been changed then.
    """
    if len(kept) == 0:
        raise ValueError(f"kept: at least one of {neurons.name} was wanted")
    pieces = list(_pieces(neurons, kept))
    states = [] if optimizer is None else list(_states(pieces, optimizer))
    for state, key, axis, entries in states:
        state[key] = state[key].index_select(axis, entries)
    for piece in pieces:
        _cut(piece, optimizer)
    _set_sizes(neurons, len(kept))


def _pieces(neurons: Neurons, kept: Tensor) -> Iterator[Piece]:
    """Yield what there is of the neurons, in every module that knows them."""
    inputs = next((s for s in neurons.switches.values() if isinstance(s, InputSwitch)), None)
    if neurons.giver is not None:
        yield Piece(neurons.giver, "weight", 0, kept)
        yield Piece(neurons.giver, "bias", 0, kept)
    elif inputs is None:
        raise ValueError(f"neurons: {neurons.name} have no switches, so none of them can go")
    else:
        yield Piece(inputs, "kept", 0, kept)
    for module in neurons.between.values():
        if isinstance(module, Switch):
            yield Piece(module, "beta", 0, kept)
            yield Piece(module, "mean_sign", 0, kept)
        elif isinstance(module, NORMS) and neurons.giver is not None:
            entries = spread(kept, module.num_features // neurons.count)
            for name in ("weight", "bias", "running_mean", "running_var"):
                yield Piece(module, name, 0, entries)
        elif isinstance(module, nn.PReLU) and neurons.giver is not None and len(module.weight) > 1:
            yield Piece(module, "weight", 0, spread(kept, len(module.weight) // neurons.count))
    assert neurons.taker is not None
    yield Piece(neurons.taker, "weight", 1, spread(kept, neurons.span))


def spread(kept: Tensor, span: int) -> Tensor:
    """Return the positions of the features of neurons that have `span` features each."""
    offsets = torch.arange(span, device=kept.device)
    return (kept[:, None] * span + offsets).flatten()


def _cut(piece: Piece, optimizer: Optimizer | None) -> None:
    tensor = getattr(piece.module, piece.name)
    if tensor is None:
        return
    smaller = tensor.detach().index_select(piece.axis, piece.kept)
    if isinstance(tensor, nn.Parameter):
        made = nn.Parameter(smaller, tensor.requires_grad)
        if tensor.grad is not None:
            made.grad = tensor.grad.index_select(piece.axis, piece.kept)
        if optimizer is not None:
            _replace(optimizer, tensor, made)
        smaller = made
    setattr(piece.module, piece.name, smaller)


def _replace(optimizer: Optimizer, old: nn.Parameter, new: nn.Parameter) -> None:
    """Put a parameter in another's place, in the same group, with its state."""
    for group in optimizer.param_groups:
        group["params"] = [new if parameter is old else parameter for parameter in group["params"]]
    if old in optimizer.state:
        optimizer.state[new] = optimizer.state.pop(old)


def _states(
    pieces: list[Piece], optimizer: Optimizer
) -> Iterator[tuple[dict[str, Tensor], str, int, Tensor]]:
    """Yield which tensors of the optimiser's state are to be cut, where and to what."""
    for piece in pieces:
        parameter = getattr(piece.module, piece.name)
        # Not `optimizer.state[parameter]`, which would make an entry where there is none.
        for key, value in optimizer.state.get(parameter, {}).items():
            if not isinstance(value, Tensor) or value.ndim == 0:
                continue
            same = value.ndim == parameter.ndim and all(
                mine in (1, wanted)
                for mine, wanted in zip(value.shape, parameter.shape, strict=True)
            )
            if not same:
                raise ValueError(
                    f"optimizer: {type(optimizer).__name__} keeps {key!r} of shape "
                    f"{tuple(value.shape)} for a parameter of shape {tuple(parameter.shape)}, of "
                    f"which no neurons can be cut"
                )
            if value.shape[piece.axis] == parameter.shape[piece.axis]:
                yield optimizer.state[parameter], key, piece.axis, piece.kept


def _set_sizes(neurons: Neurons, count: int) -> None:
    """Bring the numbers that modules show, and check by, in line with their tensors."""
    if isinstance(neurons.giver, nn.Linear):
        neurons.giver.out_features = count
    elif neurons.giver is not None:
        neurons.giver.out_channels = count
    if isinstance(neurons.taker, nn.Linear):
        neurons.taker.in_features = count * neurons.span
    elif neurons.taker is not None:
        neurons.taker.in_channels = count
    for module in neurons.between.values():
        if neurons.giver is None:
            continue
        if isinstance(module, NORMS):
            module.num_features = module.num_features // neurons.count * count
        elif isinstance(module, nn.PReLU) and module.num_parameters > 1:
            module.num_parameters = module.num_parameters // neurons.count * count
