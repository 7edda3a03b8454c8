"""Training data in the forms people have it in, batch by batch."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from solvers import checks

Array = Tensor | np.ndarray


class Rows(ABC):
    """Inputs that are read when they are wanted; in the stead of an array.

    Attributes
    ----------
    shape : tuple of int
        (samples, ...), as an array's.
    """

    shape: tuple[int, ...]

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def __getitem__(self, rows: Tensor | slice) -> Tensor: ...

    @abstractmethod
    def each(self, wanted: Iterable[Tensor]) -> Iterator[Tensor]:
        """Yield the inputs of each of several lists of rows."""
        ...


TrainingData = tuple[Array | Rows, Array] | Iterable[tuple[Tensor, Tensor]]
"""Inputs and targets as two arrays, or batches of them: a DataLoader, a list of pairs."""


@dataclass(frozen=True)
class Part:
    """One process's part of every batch, of several that train together.

    Attributes
    ----------
    rank, processes : int
        Which, from 0, of how many.
    """

    rank: int = 0
    processes: int = 1

    def of(self, count: int) -> slice:
        """Return this part of `count` samples: a row of them, as long as the others' or one less.

        A part that would be empty is the first sample, for a process must take part in the step;
        `share` tells it from others.
        """
        start = self.rank * count // self.processes
        stop = (self.rank + 1) * count // self.processes
        return slice(start, stop) if stop > start else slice(0, 1)

    def share(self, count: int) -> float:
        """Return the part's share of `count` samples; 0 where it is empty."""
        start = self.rank * count // self.processes
        return ((self.rank + 1) * count // self.processes - start) / count


WHOLE = Part()


class Batch(NamedTuple):
    """Samples of a step: this process's part, its share of the whole, the whole's size."""

    inputs: Tensor
    targets: Tensor
    share: float
    samples: int


@dataclass(frozen=True)
class Augmentation:
    """A random change of the inputs, drawn anew for every batch, sample by sample.

    Attributes
    ----------
    draw : callable
        Of a number of samples and a generator: a tensor with a row for each.
    apply : callable
        Of inputs and their rows: the changed inputs.
    """

    draw: Callable[[int, torch.Generator], Tensor]
    apply: Callable[[Tensor, Tensor], Tensor]


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
    for batch in parts(data, batch_size, device, generator):
        yield batch.inputs, batch.targets


def parts(
    data: TrainingData,
    batch_size: int,
    device: torch.device,
    generator: torch.Generator | None = None,
    *,
    part: Part = WHOLE,
    augmentation: Augmentation | None = None,
) -> Iterator[Batch]:
    """Yield one process's part of each batch that `batches` yields.

    Parameters
    ----------
    data, batch_size, device, generator
        As for `batches`; the same in every process.
    part : Part, optional
        Which part; the whole by default.
    augmentation : Augmentation, optional
        Drawn from `generator`, after the order of the rows, for the whole batch in every process.

    Raises
    ------
    ValueError
        As for `batches`; or if there is an augmentation and no generator.
    """
    if augmentation is not None and generator is None:
        raise ValueError("generator: an augmentation wants one")
    pair = as_pair(data)
    source = _split(data, part) if pair is None else _cut(*pair, batch_size, generator, part)
    count = 0
    for batch in source:
        count += batch.samples
        inputs = batch.inputs.to(device)
        if augmentation is not None and generator is not None:
            drawn = augmentation.draw(batch.samples, generator)[part.of(batch.samples)]
            inputs = augmentation.apply(inputs, drawn.to(device))
        yield batch._replace(inputs=inputs, targets=batch.targets.to(device))
    if count == 0:
        raise ValueError(
            "data: got no sample, want at least one, and an iterable that can be "
            "passed over again (a generator is used up after one pass)"
        )


def as_pair(data: TrainingData) -> tuple[Tensor | Rows, Tensor] | None:
    """Return data given as two arrays as two tensors, sharing memory; None when it is batches."""
    if not (isinstance(data, tuple | list) and len(data) == 2):
        return None
    inputs, targets = data
    if not (isinstance(inputs, Array | Rows) and isinstance(targets, Array)):
        return None
    if len(inputs) != len(targets):
        raise ValueError(f"data: there are {len(inputs)} inputs but {len(targets)} targets")
    return inputs if isinstance(inputs, Rows) else torch.as_tensor(inputs), torch.as_tensor(targets)


def _cut(
    inputs: Tensor | Rows,
    targets: Tensor,
    batch_size: int,
    generator: torch.Generator | None,
    part: Part,
) -> Iterator[Batch]:
    checks.count(1, batch_size=batch_size)
    count = len(inputs)
    order = torch.arange(count) if generator is None else torch.randperm(count, generator=generator)
    whole = [rows for rows in order.split(batch_size) if len(rows) > 0]
    own = [rows[part.of(len(rows))] for rows in whole]
    if isinstance(inputs, Rows):
        chosen = inputs.each(own)
    else:
        tensor = inputs
        chosen = (tensor[rows.to(tensor.device)] for rows in own)
    for rows, mine, found in zip(whole, own, chosen, strict=True):
        share = part.share(len(rows))
        yield Batch(found, targets[mine.to(targets.device)], share, len(rows))


def _split(data: Iterable[Any], part: Part) -> Iterator[Batch]:
    for inputs, targets in data:
        count = len(targets)
        if count > 0:
            own = part.of(count)
            yield Batch(inputs[own], targets[own], part.share(count), count)
