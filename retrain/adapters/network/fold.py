"""A batch norm behind a layer, folded into the layer's program and unfolded from its solution.

In evaluation mode a batch norm is z -> s z + t for each channel, s = γ / sqrt(variance + ε) and
t = β - s mean. A layer z = Wᵀ x + b that only it reads is then one layer with the weights and bias

    W' = W s,    b' = s b + t,

whose response is what the next activation meets: behind it a layer's program has the ReLU's form
(Net-Trim), and its error is in the units of what the network goes on with. So both methods solve
and minimise on the folded weights: Net-Trim's l1 norm counts each unit times |s|, and second-order
errors are those behind the norm.

A solution is unfolded as W = W' / s. The change of the bias goes to the layer's own bias; to the
norm's β where the layer has none; to its running mean where there is no β either. Entries that the
solution leaves as they were keep their bytes. A channel whose s is zero, or too small to divide by,
keeps its dense weights; its program has the raw response.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from retrain.adapters.network.capture import Captured, arguments_of, name_of, readers

_TINY = 1e-6
"""Scale, relative to the layer's largest, below which a channel is not folded: dividing by it would
amplify rounding to the size of the weights. A larger number leaves more channels as they are.
Chosen by hand, the square root of float64's digits beyond float32's."""

_ROUNDS = 20
"""Times that a weight is unfolded and folded again until it stays; two or three are usual."""


@dataclass(frozen=True, eq=False)
class Fold:
    """A batch norm that is the only reader of a layer's response.

    Attributes
    ----------
    norm : fx.Node
        Its call.
    end : fx.Node
        Node with its output: the call itself, or the part of its values that is the output.
    bias : str or None
        Name of its β.
    mean : str
        Name of its running mean.
    """

    norm: fx.Node
    end: fx.Node
    bias: str | None
    mean: str

    @property
    def nodes(self) -> tuple[fx.Node, ...]:
        """The norm's nodes in order."""
        return (self.norm,) if self.end is self.norm else (self.norm, self.end)


def find_fold(call: fx.Node, channel_axis: int, captured: Captured) -> Fold | None:
    """Find the batch norm that can be folded into a layer.

    Parameters
    ----------
    call : fx.Node
        The layer's only call.
    channel_axis : int
        Axis of its response that holds the output channels.
    captured : Captured
        Network.

    Returns
    -------
    Fold or None
        None where another operation reads the response, or the norm is used elsewhere, or its
        statistics are the batch's own.
    """
    users = readers(call)
    if len(users) != 1 or name_of(users[0]) != "batch_norm":
        return None
    norm = users[0]
    arguments = arguments_of(norm)
    if arguments.get("training") or channel_axis % call.meta["val"].ndim != 1:
        return None
    names: dict[str, str | None] = {}
    for key in ("weight", "bias", "running_mean", "running_var"):
        node = arguments[key]
        names[key] = captured.tensors.get(node) if isinstance(node, fx.Node) else None
        if node is not None and (names[key] is None or set(node.users) != {norm}):
            return None
    mean = names["running_mean"]
    if mean is None or names["running_var"] is None:
        return None
    end = norm
    if not isinstance(norm.meta["val"], Tensor):
        parts = list(norm.users)
        if len(parts) != 1 or parts[0].args[1] != 0:
            return None
        end = parts[0]
    return Fold(norm, end, names["bias"], mean)


def batch_norm_scale(node: fx.Node, value: Callable[[fx.Node], Any]) -> Tensor:
    """Compute γ / sqrt(running variance + ε) per channel.

    Parameters
    ----------
    node : fx.Node
        Call of a batch norm with running statistics.
    value : callable
        From a node that depends on no input to its value.

    Returns
    -------
    Tensor of float64, shape (channels,)
        Factors, with their signs.
    """
    arguments = arguments_of(node)
    variance = value(arguments["running_var"]).detach().to(torch.float64)
    scale = 1 / torch.sqrt(variance + arguments["eps"])
    if arguments["weight"] is not None:
        scale = scale * value(arguments["weight"]).detach().to(torch.float64)
    return scale


def batch_norm_shift(node: fx.Node, value: Callable[[fx.Node], Any]) -> Tensor:
    """Compute what a batch norm adds to each channel after scaling it: β - μ γ / σ.

    Parameters
    ----------
    node : fx.Node
        Call of a batch norm with running statistics.
    value : callable
        From a node that depends on no input to its value.

    Returns
    -------
    Tensor of float64, shape (channels,)
        Shifts.
    """
    arguments = arguments_of(node)
    mean = value(arguments["running_mean"]).detach().to(torch.float64)
    shift = -mean * batch_norm_scale(node, value)
    if arguments["bias"] is not None:
        shift = shift + value(arguments["bias"]).detach().to(torch.float64)
    return shift


@dataclass(frozen=True, eq=False)
class Scaling:
    """A fold with the numbers of one network.

    Attributes
    ----------
    scale, shift : Tensor of float64, shape (channels,)
        s and t; 1 and 0 for channels that are not folded.
    centre : Tensor of float64, shape (channels,)
        -s mean, the part of t beside β.
    tiny : Tensor of bool, shape (channels,)
        Channels that are not folded.
    """

    scale: Tensor
    shift: Tensor
    centre: Tensor
    tiny: Tensor

    def part(self, here: slice) -> Scaling:
        """Return the numbers of some channels.

        Parameters
        ----------
        here : slice
            Numbers of the channels.

        Returns
        -------
        Scaling
            Their numbers.
        """
        return Scaling(self.scale[here], self.shift[here], self.centre[here], self.tiny[here])


def scaling(fold: Fold, captured: Captured, tensors: Mapping[str, Tensor]) -> Scaling:
    """Compute a fold's scale and shift with one network's tensors.

    Parameters
    ----------
    fold : Fold
        Batch norm.
    captured : Captured
        Network.
    tensors : mapping from str to Tensor
        Its parameters and buffers.

    Returns
    -------
    Scaling
        Numbers.
    """

    def value(node: fx.Node) -> Tensor:
        return tensors[captured.tensors[node]]

    scale, shift = batch_norm_scale(fold.norm, value), batch_norm_shift(fold.norm, value)
    size = scale.abs()
    tiny = ~(size > _TINY * size.max()) | ~torch.isfinite(shift)
    return Scaling(
        torch.where(tiny, torch.ones_like(scale), scale),
        torch.where(tiny, torch.zeros_like(shift), shift),
        -value(arguments_of(fold.norm)["running_mean"]).double() * scale,
        tiny,
    )


def settled(
    wanted: Tensor,
    dense: Tensor,
    unfold: Callable[[Tensor], Tensor],
    fold: Callable[[Tensor], Tensor],
) -> Tensor:
    """Unfold entries so that reading them folded, and writing that again, gives the same bytes.

    Both directions round, so an entry may come back changed. Unfolding what is read until it stays
    makes a run that resumes from its layer files end with the same network.

    Parameters
    ----------
    wanted : Tensor
        Folded entries.
    dense : Tensor
        Entries of the dense network, not folded.
    unfold, fold : callable
        From folded entries to those that are stored, in their type, and back.

    Returns
    -------
    Tensor
        Entries to store; those of the dense network where `wanted` is as they are read.
    """
    same = wanted == fold(dense)
    found = unfold(wanted)
    for _ in range(_ROUNDS):
        again = fold(found)
        if torch.equal(again, wanted):
            break
        wanted = again
        found = unfold(wanted)
    return torch.where(same, dense, found)
