"""Test whether a network treats each sample of a batch separately, by running a few samples.

Rows of a layer belong to samples only if the layer's input for a sample does not depend on the
other samples of the batch. A graph does not show that (a transposition, a recurrent layer that
takes the first axis for time, a norm over the batch), so the same samples run in several
batches: with copies of themselves, alone, all together, in reversed order, and in a batch as
large as those of the run. Samples of the data can all be equal, or sorted, which hides mixing;
samples with small random changes cannot.

Rounding may differ from batch to batch. Its size is measured where nothing but the number of
samples differs, and samples count as mixed where the difference is far above that.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor

_SEED = 0
"""Seed of the random changes: any number, fixed so that a run repeats."""

_SHARE = 0.5
"""Size of the random changes, relative to the standard deviation of the data's entries, to the
largest of them, and to 1. Smaller changes can hide mixing; larger ones are more often invalid for
the network. Chosen by hand."""

_ALWAYS = 1e-3
"""Difference, relative to the largest entry, above which samples always count as mixed. A larger
value can take mixing for rounding, a smaller one rounding for mixing. Chosen by hand, far above
float32's rounding."""

_UNITS, _TIMES = 64, 30
"""Below `_ALWAYS`, a difference counts as rounding up to this many units in the last place of the
largest entry, plus this many times the difference that the number of samples alone has made.
Smaller numbers would take the rounding of deep networks, which amplify it, for mixing; larger ones
can hide mixing. Chosen by hand."""

_COMPANY = 32
"""Largest number of the run's samples in the largest batch. More samples cost more and show mixing
across larger batches. Chosen by hand."""

Run = Callable[[Tensor, int], dict[str, Tensor]]
"""(samples, count) -> inputs of each layer, and outputs under "", of the first `count` samples.
Raises ValueError for samples that the network cannot take."""


def variants(samples: Tensor, batch: Tensor) -> Iterator[Tensor]:
    """Yield sets of samples to probe with, the most informative first.

    Samples with random changes may be invalid for the network (numbers of tokens, arguments of a
    logarithm), so the changes become smaller; the last set has the unchanged samples alone.

    Parameters
    ----------
    samples : Tensor, shape (k, ...)
        Samples of the data.
    batch : Tensor, shape (n, ...)
        More samples, from which the size of the changes is taken.

    Yields
    ------
    Tensor, shape (m, ...)
        Set of samples; all but the last contain the unchanged samples first.
    """
    generator = torch.Generator().manual_seed(_SEED)
    noise = torch.randn(samples.shape, generator=generator, dtype=torch.float64)
    noise = noise.to(samples.device, samples.dtype)
    bounded = noise.clamp(-1, 1)
    deviation = batch.std() if batch.numel() > 1 else batch.new_zeros(())
    # Data far from zero, or far smaller than a bias, hides the effect of changes of its own size.
    sizes = [deviation, batch.abs().max(), batch.new_ones(())]
    yield torch.cat([samples, *(samples + _SHARE * size * noise for size in sizes)])
    for moved in (
        samples + _SHARE * deviation * noise,
        samples * (1 + 0.2 * bounded),
        samples + 0.2 * bounded.abs(),  # whole numbers stay themselves when they are cut off
    ):
        yield torch.cat([samples, moved])
    yield samples


class Probe:
    """The values that a network computes for some samples in several batches.

    Parameters
    ----------
    candidates : iterable of Tensor
        Sets of samples, as `variants` yields them. The first set is used that the network maps to
        finite numbers, or else the last one.
    company : Tensor, shape (n, ...)
        Samples of the data that run beside them.
    run : callable
        Function that runs samples, see `Run`.

    Attributes
    ----------
    refused : str or None
        Why the network cannot take a single sample; None where it can.

    Raises
    ------
    ValueError
        If the network cannot take the samples.
    """

    def __init__(self, candidates: Iterable[Tensor], company: Tensor, run: Run) -> None:
        sets = list(candidates)
        self.refused: str | None = None
        run(sets[-1][[0, 0]], 2)  # raises for samples that no batch can take
        together, samples = _first_finite(sets, run)
        every = list(range(len(samples)))
        # Pairs of the results of a run, and the number of the sample behind each row.
        self._alike = [(run(samples[[i, i]], 2), [i, i]) for i in every]
        try:
            self._alike += [(run(samples[[i]], 1), [i]) for i in every]
        except ValueError as error:
            self.refused = str(error)
        self._mixed = [(together, every), (run(samples.flip(0), len(every)), every[::-1])]
        if len(company) > 1:
            crowd = torch.cat([samples, company[:_COMPANY]])
            self._mixed.append((run(crowd, len(every)), every))

    def reached(self, name: str) -> bool:
        """Tell whether a layer was run every time.

        Parameters
        ----------
        name : str
            Name of the layer.

        Returns
        -------
        bool
            Whether every run has a value for it.
        """
        return all(name in got for got, _ in (*self._alike, *self._mixed))

    def one(self, name: str) -> Tensor:
        """Return the input of a layer for one sample.

        Parameters
        ----------
        name : str
            Name of the layer.

        Returns
        -------
        Tensor
            Input, in the layer's own layout.
        """
        value = self._alike[0][0][name]
        return value[: len(value) // 2]

    def separate(self, name: str, *, axes: int | None = None) -> bool:
        """Tell whether a layer's input (or, for "", the output) is one sample after the other.

        Parameters
        ----------
        name : str
            Name of the layer, or "" for the output.
        axes : int or None
            Number of axes that the input must have, the samples first; None for any number.

        Returns
        -------
        bool
            Whether no value depends on other samples of its batch, beyond rounding.
        """
        if not all(_fits(got[name], owners, axes) for got, owners in self._runs()):
            return False
        alone = {owners[0]: _rows(got[name], owners)[0] for got, owners in reversed(self._alike)}
        if len({row.shape for row in alone.values()}) > 1:
            return False
        finite = torch.stack(list(alone.values())).abs().nan_to_num(0.0, 0.0, 0.0)
        scale = float(finite.max()) if finite.numel() else 0.0
        noise, apart = (
            max(
                _apart(row, alone[owner])
                for got, owners in runs
                for row, owner in zip(_rows(got[name], owners), owners, strict=True)
            )
            for runs in (self._alike, self._mixed)
        )
        kind = finite.dtype
        units = _UNITS * torch.finfo(kind).eps if kind.is_floating_point else 0.0
        limit = min(_ALWAYS * scale, units * scale + _TIMES * noise)
        return noise <= _ALWAYS * scale and apart <= limit

    def _runs(self) -> list[tuple[dict[str, Tensor], list[int]]]:
        return [*self._alike, *self._mixed]


def _first_finite(sets: list[Tensor], run: Run) -> tuple[dict[str, Tensor], Tensor]:
    """Run the sets in turn, up to the first with finite values; otherwise return the last."""
    for samples in sets[:-1]:
        try:
            got = run(samples, len(samples))
        except ValueError:
            continue  # changed samples may be invalid; the next set is changed less
        if all(bool(value.isfinite().all()) for value in got.values()):
            return got, samples
    return run(sets[-1], len(sets[-1])), sets[-1]


def _fits(value: Tensor, owners: list[int], axes: int | None) -> bool:
    """Tell whether a tensor can hold that many samples, one after the other."""
    if axes is not None and (value.ndim != axes or len(value) != len(owners)):
        return False
    return value.ndim >= 2 and len(value) % len(owners) == 0


def _rows(value: Tensor, owners: list[int]) -> Tensor:
    return value.reshape(len(owners), -1)


def _apart(one: Tensor, other: Tensor) -> float:
    """Compute the largest difference of two samples' entries; two NaNs do not differ."""
    if one.shape != other.shape:
        return math.inf
    same = (one == other) | (one.isnan() & other.isnan())
    gap = torch.where(same, torch.zeros_like(one), (one - other).abs())
    return math.inf if bool(gap.isnan().any()) else float(gap.max()) if gap.numel() else 0.0
