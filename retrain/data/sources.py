"""Data sources: samples (and labels) from files, from scikit-learn, from a function, from batches.

Every source becomes one `Data`: finite floating-point samples, first axis the sample. Torch tensors
and loaders are recognised by their methods; this module does not import torch.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from retrain.data.arrays import (
    Data,
    checked,
    first,
    gathered,
    is_array,
    is_array_or_numbers,
    named,
    normalised,
    parse_normalise,
    to_array,
)
from retrain.data.factories import ToldInOneLine, import_factory
from retrain.data.readers import existing_file, read_mnist, read_npy, read_npz

FORMS = (
    "FILE.npz, FILE.npy, mnist:DIR, mnist-test:DIR, digits, digits-test or package.module:factory"
)
"""The forms of a data source, as messages and the command line's help list them."""


def load_data(
    source: str | Path,
    *,
    limit: int | None = None,
    normalise: str | tuple[Any, Any] | None = None,
) -> Data:
    """Load a data source.

    Parameters
    ----------
    source : str or Path
        Data source, one of ``FILE.npz`` (arrays ``x`` and, if there are labels, ``y``);
        ``FILE.npy``; ``mnist:DIR`` or ``mnist-test:DIR`` (the idx files, gzipped or not, scaled to
        [0, 1], 1 x 28 x 28); ``digits`` or ``digits-test`` (scikit-learn's digits scaled to [0, 1],
        1 x 8 x 8, a fixed split of 1437 and 360); ``package.module:factory``, a callable that
        returns x or (x, y).
    limit : int, optional
        Number of samples to use, counted from the first; all of them by default.
    normalise : str or (mean, std), optional
        Replacement of x by (x - mean) / std, with one number each, or one per channel (axis 1 of
        x); as text ``MEAN,STD``, or with k channels k means, then k standard deviations.

    Returns
    -------
    Data
        Finite samples in float32 or float64, first axis the sample, and their labels if there are
        any.

    Raises
    ------
    FileNotFoundError
        If a file is not there.
    ValueError
        If the source is not understood, truncated, pickled, empty, not numeric, not finite, or if
        its labels do not match; one line that says which.

    Notes
    -----
    The samples used are held in memory at once; files are read only as far as `limit` needs where
    the format allows it.

    Examples
    --------
    >>> import retrain
    >>> data = retrain.load_data("digits", limit=10)
    >>> data.x.shape, data.y.shape
    ((10, 1, 8, 8), (10,))
    """
    if limit is not None and limit < 1:
        raise ValueError(f"limit: got {limit}, want a positive number of samples")
    mean_std = parse_normalise(normalise) if isinstance(normalise, str) else normalise
    data = _load(str(source), limit)
    return data if mean_std is None else normalised(data, *mean_std)


def as_data(data: Any, *, name: str | None = None) -> Data:
    """Make a `Data` of any object that holds samples.

    Parameters
    ----------
    data : object
        A `Data`; a source as `load_data` takes it (text or a path); an array or torch tensor; a
        pair (x, y) of those; a nested list of numbers; or an iterable of batches (a DataLoader,
        a list, a generator), each an array or tensor, or a tuple whose first two entries are x
        and y. All batches are gathered in memory.
    name : str, optional
        Name in messages and records; by default the name of the object's type.

    Returns
    -------
    Data
        Finite samples in float32 or float64, and their labels if there are any.

    Raises
    ------
    ValueError
        If the object or a batch is of an unknown type, or for the reasons of `load_data`.
    FileNotFoundError
        If a file that a text or path names does not exist.
    """
    if isinstance(data, Data):
        return data
    if isinstance(data, str | Path):
        return load_data(data)
    label = name or type(data).__name__
    if is_array(data):
        return checked(to_array(data), None, label)
    if isinstance(data, tuple) and len(data) == 2 and all(map(is_array_or_numbers, data)):
        return checked(to_array(data[0]), to_array(data[1]), label)
    if is_array_or_numbers(data):
        return checked(to_array(data), None, label)
    if isinstance(data, Mapping):
        return named(data, label)
    if not isinstance(data, Iterable):
        raise ValueError(
            f"data: got a {type(data).__name__}, want an array, a tensor, a pair (x, y), a "
            "loader or another iterable of batches"
        )
    return gathered(data, label)


def _load(source: str, limit: int | None) -> Data:
    """Read a source; a factory may return anything that `as_data` takes."""
    kind, _, rest = source.partition(":")
    known = ("mnist", "mnist-test")
    if rest and kind not in known and not source.lower().endswith((".npz", ".npy")):
        with ToldInOneLine("data", f"calling {source}()"):
            data = as_data(import_factory(source, "data")(), name=source)
        return first(data, limit)
    if source.lower().endswith(".npz"):
        arrays = read_npz(Path(source))
        if "x" not in arrays:
            return first(named(arrays, source), limit)
        return checked(arrays["x"], arrays.get("y"), source, limit)
    x, y = _read(source, limit)
    return checked(x, y, source, limit)


def _read(source: str, limit: int | None) -> tuple[np.ndarray, np.ndarray | None]:
    """Read a source's arrays as they are; with `limit`, reading the rest of a file is avoided."""
    kind, _, rest = source.partition(":")
    if source in ("digits", "digits-test"):
        return _digits(test=source == "digits-test")
    if kind in ("mnist", "mnist-test") and rest:
        return read_mnist(Path(rest), "t10k" if kind == "mnist-test" else "train", limit)
    if source.lower().endswith(".npy"):
        path = existing_file(Path(source))
        with path.open("rb") as file:
            return read_npy(file, path.stat().st_size, str(path), limit), None
    raise ValueError(f"data: got {source!r}, want {FORMS}")


def _digits(*, test: bool) -> tuple[np.ndarray, np.ndarray]:
    from sklearn.datasets import load_digits  # the import takes half a second

    digits = load_digits()
    order = np.random.default_rng(0).permutation(len(digits.target))
    chosen = order[1437:] if test else order[:1437]
    x = (digits.images[chosen, None] / 16).astype(np.float32)
    return x, digits.target[chosen].astype(np.int64)
