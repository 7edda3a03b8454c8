"""Layers of either kind as rows and a weight matrix: dense layers, and convolutions by patches."""

from __future__ import annotations

from collections.abc import Iterator
from typing import cast

import numpy as np
import torch
from torch import Tensor, nn

from retrain.adapters.network import patches
from retrain.stream.stream import LayerSpec

BLOCK = 1 << 24
"""A batch is cut into pieces of at most about this many entries of its input rows."""


def by_sample(module: nn.Module, values: Tensor, samples: int) -> Tensor:
    """Give a dense layer's values (rows, or any number of axes) the samples as first axis."""
    if isinstance(module, nn.Conv2d):
        return values
    return values.reshape(samples, -1, values.shape[-1])


def matrix(module: nn.Module, group: int) -> Tensor:
    """Return one group's weights as (n_in, n_out), without the bias; `write` puts them back."""
    if isinstance(module, nn.Conv2d):
        return patches.kernel_matrix(module, group)
    return cast("Tensor", module.weight).T


def bias_of(module: nn.Module, group: int) -> Tensor:
    """View one group's part of the bias."""
    bias = cast("Tensor", module.bias)
    width = len(bias) // getattr(module, "groups", 1)
    return bias[group * width : (group + 1) * width]


def write(module: nn.Module, group: int, weight: Tensor) -> None:
    """Write a weight matrix (the bias last, if the layer has one) into the module's tensors."""
    n_in = len(weight) - (module.bias is not None)
    target = cast("Tensor", module.weight)
    width = weight.shape[1]
    part = target[group * width : (group + 1) * width]  # a view in any memory format
    with torch.no_grad():
        part.copy_(weight[:n_in].T.reshape(part.shape))
        if module.bias is not None:
            bias_of(module, group).copy_(weight[-1])


def input_rows(module: nn.Module, values: Tensor, group: int) -> Tensor:
    """Lay a layer's input out as rows, with the column of ones if it has a bias."""
    if isinstance(module, nn.Conv2d):
        rows = patches.patches(module, values, group)
    else:
        rows = values.reshape(-1, values.shape[-1])
    if module.bias is None:
        return rows
    return torch.cat([rows, rows.new_ones(len(rows), 1)], dim=1)


def response_rows(module: nn.Module, values: Tensor, group: int) -> Tensor:
    """Lay one group of a layer's output out as rows."""
    if isinstance(module, nn.Conv2d):
        return patches.responses(module, values, group)
    return values.reshape(-1, values.shape[-1])


def pieces(chosen: np.ndarray, positions: int, spec: LayerSpec) -> Iterator[np.ndarray]:
    """Cut row numbers between samples, so that a piece's patches stay within a block."""
    samples = max(1, BLOCK // (positions * (spec.shape[0] + 1)))
    first = int(chosen[0]) // positions
    last = int(chosen[-1]) // positions
    cuts = np.arange(first, last + 1, samples)[1:] * positions
    yield from (piece for piece in np.split(chosen, np.searchsorted(chosen, cuts)) if piece.size)
