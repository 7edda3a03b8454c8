"""Training data in the forms people have it in, batch by batch."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np
import torch
from torch import Tensor

Array = Tensor | np.ndarray
TrainingData = tuple[Array, Array] | Iterable[tuple[Tensor, Tensor]]
"""Inputs and targets as two arrays, or batches of them: a DataLoader, a list of pairs."""


def batches(
    data: TrainingData,
    batch_size: int,
    device: torch.device,
    generator: torch.Generator | None = None,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield (inputs, targets) on `device`; batches without a sample are left out.

    Parameters
    ----------
    data : pair of arrays, or iterable of pairs
        Two arrays with samples as rows are cut into batches of `batch_size`, the last one smaller
        where it must be. Anything else yields batches of its own, in its own order.
    batch_size : int
        For two arrays.
    device : torch.device
        Where each batch is moved to.
    generator : torch.Generator, optional
        Draws the order of the rows of two arrays (one ``randperm``); as they come by default.

    Raises
    ------
    ValueError
        If there is no sample, or two arrays differ in length, or `batch_size` is below 1.
    """
    pair = _as_pair(data)
    source = data if pair is None else _cut(*pair, batch_size, generator)
    count = 0
    for inputs, targets in source:
        if len(targets) > 0:
            count += len(targets)
            yield inputs.to(device), targets.to(device)
    if count == 0:
        raise ValueError(
            "data: there is no sample; wanted at least one, and an iterable that can be "
            "passed over again (a generator is used up after one pass)"
        )


def _as_pair(data: TrainingData) -> tuple[Tensor, Tensor] | None:
    """Return data given as two arrays as two tensors, sharing memory; None when it is batches."""
    if not (isinstance(data, tuple | list) and len(data) == 2):
        return None
    inputs, targets = data
    if not (isinstance(inputs, Array) and isinstance(targets, Array)):
        return None
    if len(inputs) != len(targets):
        raise ValueError(f"data: there are {len(inputs)} inputs but {len(targets)} targets")
    return torch.as_tensor(inputs), torch.as_tensor(targets)


def _cut(
    inputs: Tensor, targets: Tensor, batch_size: int, generator: torch.Generator | None
) -> Iterator[tuple[Tensor, Tensor]]:
    if batch_size < 1:
        raise ValueError(f"batch_size: 1 or more were wanted, not {batch_size}")
    count = len(inputs)
    order = torch.arange(count) if generator is None else torch.randperm(count, generator=generator)
    for rows in order.split(batch_size):
        yield inputs[rows.to(inputs.device)], targets[rows.to(targets.device)]
