"""The one cutter: entries cut out of tensors, modules taken out, and the optimiser kept in step.

Who decides what goes (gates, switch layers) names *pieces*: a tensor of a module, and which of its
entries along an axis stay. Parameters are made anew, smaller, and take the places of the old ones
in the modules and in the optimiser, with what it remembers of the entries that stay. (Making the
old ones smaller would not do: autograd remembers a parameter's shape as long as anything, as
torch's wrapper for several processes, holds on to its node.)
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


@dataclass(frozen=True, eq=False)
class Piece:
    """A tensor of a module, and which of its entries along an axis stay.

    Attributes
    ----------
    module : nn.Module
        The module that holds the tensor.
    name : str
        The tensor's name in the module; one that is None there is left.
    axis : int
        The axis along which entries go.
    kept : Tensor of int64, shape (n,)
        The entries that stay, ascending.
    """

    module: nn.Module
    name: str
    axis: int
    kept: Tensor


@dataclass(frozen=True, eq=False)
class Removal:
    """What became of a model's parameters.

    Attributes
    ----------
    gone, added : list of nn.Parameter
        No longer in the model; new in it.
    changed : list of nn.Parameter
        With another value, perhaps another shape: what an optimiser remembers of them is void.
    """

    gone: list[nn.Parameter] = field(default_factory=list)
    changed: list[nn.Parameter] = field(default_factory=list)
    added: list[nn.Parameter] = field(default_factory=list)


def cut(pieces: Iterable[Piece], optimizer: Optimizer | None = None) -> None:
    """Cut tensors in place of the old ones, and bring their modules' sizes in line.

    Parameters
    ----------
    pieces : iterable of Piece
        What stays of each tensor.
    optimizer : Optimizer, optional
        Any of torch's whose state is made of tensors of the parameter's shape (momenta, averages of
        squares), of that shape reduced along axes to 1 (factored averages), and of numbers. What it
        remembers of the entries that stay is untouched.

    Raises
    ------
    ValueError
        If the optimiser's state cannot be cut. Nothing has been changed then.
    """
    pieces = list(pieces)
    states = [] if optimizer is None else list(_states(pieces, optimizer))
    for state, key, axis, entries in states:
        state[key] = state[key].index_select(axis, entries)
    for piece in pieces:
        _cut(piece, optimizer)
    for module in {piece.module for piece in pieces}:
        fit_sizes(module)


def take_out(model: nn.Module, name: str, left: Sequence[nn.Module]) -> None:
    """Put what is left of a module in its place; in a Sequential, nothing where nothing is.

    Parameters
    ----------
    model : nn.Module
        The network; it is changed.
    name : str
        The module that goes.
    left : sequence of nn.Module
        What runs in its place, one after the other.
    """
    parent, _, key = name.rpartition(".")
    holder = model.get_submodule(parent)
    if not left and type(holder) is nn.Sequential:
        del holder._modules[key]  # `del holder[i]` would rename those after it
        return
    new = left[0] if len(left) == 1 else nn.Sequential(*left)
    new.train(holder.training)
    holder._modules[key] = new


def forget(optimizer: Optimizer, removal: Removal) -> None:
    """Take removed parameters out of an optimiser, with its memory of them and of changed ones.

    Parameters
    ----------
    optimizer : torch.optim.Optimizer
        Optimiser of the network that was cut; changed.
    removal : Removal
        What was taken away, changed and added.
    """
    gone = set(removal.gone)
    for group in optimizer.param_groups:
        group["params"] = [parameter for parameter in group["params"] if parameter not in gone]
    for parameter in [*removal.gone, *removal.changed]:
        optimizer.state.pop(parameter, None)
        parameter.grad = None
    optimizer.param_groups[0]["params"].extend(removal.added)


def fit_sizes(module: nn.Module) -> None:
    """Bring the numbers that a module shows, and checks by, in line with its tensors.

    Parameters
    ----------
    module : torch.nn.Module
        Layer or norm whose tensors were cut; its numbers are changed.
    """
    weight = getattr(module, "weight", None)
    if isinstance(module, nn.Linear):
        module.out_features, module.in_features = module.weight.shape
    elif isinstance(module, CONVOLUTIONS):
        module.out_channels = module.weight.shape[0]
        module.in_channels = module.weight.shape[1] * module.groups
    elif isinstance(module, NORMS):
        known = weight if isinstance(weight, Tensor) else module.running_mean
        if known is not None:
            module.num_features = len(known)
    elif isinstance(module, nn.PReLU):
        module.num_parameters = len(module.weight)


def spread(kept: Tensor, span: int) -> Tensor:
    """Return the positions of the features of neurons that have `span` features each.

    Parameters
    ----------
    kept : Tensor, shape (neurons,), integer
        Numbers of the neurons.
    span : int
        Features of each.

    Returns
    -------
    Tensor, shape (neurons * span,), integer
        Numbers of their features, in order.
    """
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
