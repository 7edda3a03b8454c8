"""The kinds of layers that can be retrained: one table, one entry per kind.

Everything that the package knows of a kind is in its entry: how its input and its response are laid
out as rows, its weight matrix, its norm as a map, and its description for people. To add a kind,
add an entry; no other file names one.

The weights of every kind are a tensor whose first axis is the output channel, divided into equal
groups; a group's weight matrix is (n_in, n_out), the transpose of its part, flattened.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from retrain.adapters.network import patches
from retrain.stream.stream import Norm
from solvers.arrays import norm as frobenius


@dataclass(frozen=True)
class Kind:
    """One kind of layer that can be retrained.

    Attributes
    ----------
    name : str
        Name in reports: ``"linear"``.
    shape : callable
        (module) -> (n_in, n_out) of one group's weight matrix, without the bias row.
    groups : callable
        (module) -> number of weight matrices.
    by_sample : callable
        (values, samples) -> the same values with the samples as first axis.
    input_rows : callable
        (module, values, group) -> rows (rows, n_in) of the layer's input.
    response_rows : callable
        (module, values, group) -> rows (rows, n_out) of the layer's response.
    norm : callable
        (module, norm, scale) -> a bound on its norm as a map, bias aside, each output channel
        multiplied by its entry of `scale`, where that is not None.
    magnitude : callable
        (module) -> a factor F with |sum_i |x_i| |w_i||_F <= F |X|_F over all entries of a response.
    channel_axis : callable
        (number of axes of a response) -> the axis that holds its output channels.
    detail : callable
        (module) -> kernel, stride and so on in words, or an empty text.
    unfit : callable
        (module) -> reason why it cannot be retrained, or None.
    misfit : callable
        (module, shape of an input) -> the input that it needs instead, or None where the input
        fits.
    input_axes : int or None
        Number of axes of an input, the samples first; None where the samples' rows may be laid out
        along any number of axes.
    """

    name: str
    shape: Callable[[Any], tuple[int, int]]
    groups: Callable[[Any], int]
    by_sample: Callable[[Tensor, int], Tensor]
    input_rows: Callable[[Any, Tensor, int], Tensor]
    response_rows: Callable[[Any, Tensor, int], Tensor]
    norm: Callable[[Any, Norm, Tensor | None], float]
    magnitude: Callable[[Any], float]
    channel_axis: Callable[[int], int]
    detail: Callable[[Any], str]
    unfit: Callable[[Any], str | None]
    misfit: Callable[[Any, torch.Size], str | None]
    input_axes: int | None


def _linear_misfit(module: nn.Linear, got: torch.Size) -> str | None:
    if got[-1] == module.in_features:
        return None
    return f"{module.in_features} inputs and got {got[-1]}"


def _conv2d_shape(module: nn.Conv2d) -> tuple[int, int]:
    size = math.prod(module.kernel_size)
    return module.in_channels // module.groups * size, module.out_channels // module.groups


def _conv2d_magnitude(module: nn.Conv2d) -> float:
    # Padding by other values than zeros repeats each entry at most 2 p + 1 times.
    left, right, top, bottom = patches.padding(module)
    repeats = 1 if module.padding_mode == "zeros" else (1 + left + right) * (1 + top + bottom)
    return patches.operator_norm(module, "frobenius") * math.sqrt(repeats)


def _conv2d_detail(module: nn.Conv2d) -> str:
    return (
        f"{module.in_channels}→{module.out_channels} channels, "
        f"kernel {module.kernel_size[0]}x{module.kernel_size[1]}, stride {module.stride}, "
        f"padding {module.padding}, dilation {module.dilation}, groups {module.groups}"
    )


def _conv2d_unfit(module: nn.Conv2d) -> str | None:
    if module.padding_mode == "zeros":
        return None
    return f"it pads with {module.padding_mode!r}, not with zeros"


def _conv2d_misfit(module: nn.Conv2d, got: torch.Size) -> str | None:
    if len(got) == 4 and got[1] == module.in_channels:
        return None
    return f"images of {module.in_channels} channels and got shape {tuple(got[1:])}"


def _last_axis(module: nn.Module, values: Tensor, group: int) -> Tensor:
    return values.reshape(-1, values.shape[-1])


KINDS: dict[type[nn.Module], Kind] = {
    nn.Linear: Kind(
        name="linear",
        shape=lambda module: (module.in_features, module.out_features),
        groups=lambda module: 1,
        by_sample=lambda values, samples: values.reshape(samples, -1, values.shape[-1]),
        input_rows=_last_axis,
        response_rows=_last_axis,
        norm=patches.operator_norm,
        magnitude=lambda module: frobenius(module.weight.detach()),
        channel_axis=lambda dimensions: dimensions - 1,
        detail=lambda module: "",
        unfit=lambda module: None,
        misfit=_linear_misfit,
        input_axes=None,
    ),
    nn.Conv2d: Kind(
        name="conv2d",
        shape=_conv2d_shape,
        groups=lambda module: module.groups,
        by_sample=lambda values, samples: values,
        input_rows=patches.patches,
        response_rows=patches.responses,
        norm=patches.operator_norm,
        magnitude=_conv2d_magnitude,
        channel_axis=lambda dimensions: 1,
        detail=_conv2d_detail,
        unfit=_conv2d_unfit,
        misfit=_conv2d_misfit,
        input_axes=4,
    ),
}
"""Kinds by exact class: a subclass may compute something else."""


def kind_of(module: nn.Module) -> Kind | None:
    """Return a module's kind.

    Parameters
    ----------
    module : nn.Module
        Module.

    Returns
    -------
    Kind or None
        Kind; None where the module cannot be retrained.
    """
    return KINDS.get(type(module))


def known_kind(module: nn.Module) -> Kind:
    """Return the kind of a module that is known to have one.

    Parameters
    ----------
    module : nn.Module
        Module of a class in `KINDS`.

    Returns
    -------
    Kind
        Kind.
    """
    return KINDS[type(module)]


def matrix(module: nn.Module, group: int) -> Tensor:
    """Return one group's weights without the bias; `write` puts them back.

    Parameters
    ----------
    module : nn.Module
        Layer.
    group : int
        Index of the group, from 0.

    Returns
    -------
    Tensor, shape (n_in, n_out)
        Weights, sharing memory with the module where the layout allows it.
    """
    return _part(module, group).flatten(1).T


def bias_of(module: nn.Module, group: int) -> Tensor:
    """View one group's part of the bias.

    Parameters
    ----------
    module : nn.Module
        Layer with a bias.
    group : int
        Index of the group, from 0.

    Returns
    -------
    Tensor, shape (n_out,)
        View of the bias.
    """
    bias = cast("Tensor", module.bias)
    width = len(bias) // known_kind(module).groups(module)
    return bias[group * width : (group + 1) * width]


def write(module: nn.Module, group: int, weight: Tensor) -> None:
    """Write a weight matrix into the module's tensors.

    Parameters
    ----------
    module : nn.Module
        Layer; its tensors are changed.
    group : int
        Index of the group, from 0.
    weight : Tensor, shape (n_in [+ 1], n_out)
        Weights, with the bias last if the layer has one.
    """
    n_in = len(weight) - (module.bias is not None)
    part = _part(module, group)
    with torch.no_grad():
        part.copy_(weight[:n_in].T.reshape(part.shape))
        if module.bias is not None:
            bias_of(module, group).copy_(weight[-1])


def _part(module: nn.Module, group: int) -> Tensor:
    """View one group's part of the weight tensor, in any memory format."""
    weight = cast("Tensor", module.weight)
    width = len(weight) // known_kind(module).groups(module)
    return weight[group * width : (group + 1) * width]
