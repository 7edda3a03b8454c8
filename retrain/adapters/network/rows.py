"""A layer's input and response as rows, whatever its kind, in pieces of bounded memory."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor, nn

from retrain.adapters.network.kinds import known_kind
from retrain.stream.stream import LayerSpec

BLOCK = 1 << 24
"""Approximate largest number of entries in the input rows of one piece of a batch: 64 MiB in
float32. Larger pieces take more memory and save nothing; smaller ones cost one unfolding call each.
Chosen by hand."""


def by_sample(module: nn.Module, values: Tensor, samples: int) -> Tensor:
    """Give a layer's values (rows, or any number of axes) the samples as first axis.

    Parameters
    ----------
    module : nn.Module
        Layer.
    values : Tensor
        Rows, or values with any number of axes.
    samples : int
        Number of samples.

    Returns
    -------
    Tensor, shape (samples, ...)
        The same values.
    """
    return known_kind(module).by_sample(values, samples)


def input_rows(module: nn.Module, values: Tensor, group: int) -> Tensor:
    """Lay a layer's input out as rows, with the column of ones if the layer has a bias.

    Parameters
    ----------
    module : nn.Module
        Layer.
    values : Tensor, shape (samples, ...)
        Input of the layer.
    group : int
        Index of the group, from 0.

    Returns
    -------
    Tensor, shape (rows, n_in [+ 1])
        Rows.
    """
    rows = known_kind(module).input_rows(module, values, group)
    if module.bias is None:
        return rows
    return torch.cat([rows, rows.new_ones(len(rows), 1)], dim=1)


def response_rows(module: nn.Module, values: Tensor, group: int) -> Tensor:
    """Lay one group of a layer's output out as rows.

    Parameters
    ----------
    module : nn.Module
        Layer.
    values : Tensor, shape (samples, ...)
        Response of the layer.
    group : int
        Index of the group, from 0.

    Returns
    -------
    Tensor, shape (rows, n_out)
        Rows.
    """
    return known_kind(module).response_rows(module, values, group)


def pieces(chosen: np.ndarray, positions: int, spec: LayerSpec) -> Iterator[np.ndarray]:
    """Cut row numbers between samples, so that the patches of a piece stay within `BLOCK` entries.

    Parameters
    ----------
    chosen : ndarray of int, shape (rows,)
        Sorted row numbers of one batch, at least one.
    positions : int
        Number of rows per sample.
    spec : LayerSpec
        Layer.

    Yields
    ------
    ndarray of int
        Sorted row numbers of one piece.
    """
    samples = max(1, BLOCK // (positions * (spec.shape[0] + 1)))
    first = int(chosen[0]) // positions
    last = int(chosen[-1]) // positions
    cuts = np.arange(first, last + 1, samples)[1:] * positions
    yield from (piece for piece in np.split(chosen, np.searchsorted(chosen, cuts)) if piece.size)
