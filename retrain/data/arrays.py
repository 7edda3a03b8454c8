"""Samples in memory: finite floating-point arrays, first axis the sample."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, cast

import numpy as np


@dataclass(frozen=True, eq=False)
class Data:
    """Samples of a network's input, with labels or targets where there are some.

    Attributes
    ----------
    x : ndarray, shape (n_samples, ...)
        Samples: finite, float32 or float64. Images are (n_samples, channels, height, width).
    y : ndarray or None, shape (n_samples, ...)
        Integer labels or real targets.
    name : str
        Source of the samples, for messages and records.
    inputs : tuple of (str or None, ndarray)
        For a network with several inputs, or inputs by name: all of them, positional ones (None)
        first; `x` is then the first, as numbers. Empty for a network that takes `x` alone.
    raw : ndarray or None
        `x` as it was given, where it was of whole numbers (token ids); a network that looks them up
        takes these.
    """

    x: np.ndarray
    y: np.ndarray | None
    name: str
    inputs: tuple[tuple[str | None, np.ndarray], ...] = ()
    raw: np.ndarray | None = None

    def __len__(self) -> int:
        return int(self.x.shape[0])

    @property
    def integers(self) -> bool:
        """Whether an input is of whole numbers, which a network may look up."""
        arrays = [self.raw] if not self.inputs else [values for _, values in self.inputs]
        return any(values is not None and values.dtype.kind in "iu" for values in arrays)

    @property
    def mask(self) -> np.ndarray | None:
        """``attention_mask``, shape (n_samples, positions): False where a position is padding."""
        found = dict(self.inputs).get("attention_mask")
        return found != 0 if found is not None and found.ndim == 2 else None

    def arguments(self, *, integers: bool) -> tuple[tuple[str | None, np.ndarray], ...]:
        """Return the network's arguments.

        Parameters
        ----------
        integers : bool
            Whether whole numbers stay whole; otherwise they become float32.

        Returns
        -------
        tuple of (str or None, ndarray)
            Positional ones, named None, first.
        """
        if not self.inputs:
            return ((None, self.raw if integers and self.raw is not None else self.x),)
        return tuple(
            (name, values if integers or values.dtype.kind == "f" else values.astype(np.float32))
            for name, values in self.inputs
        )

    @property
    def flat(self) -> np.ndarray:
        """The samples as rows, shape (n_samples, n_features): what a dense first layer takes."""
        return self.x.reshape(len(self), -1)

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of dtypes, shapes and bytes of samples and labels; the name is left out."""
        digest = hashlib.sha256()
        for array in (self.x, self.y, *self._others()):
            if array is None:
                digest.update(b"none;")
                continue
            digest.update(f"{array.dtype.newbyteorder('<').str}{array.shape};".encode())
            little = array.astype(array.dtype.newbyteorder("<"), copy=False)
            digest.update(np.ascontiguousarray(little).data)
        return digest.hexdigest()

    def _others(self) -> list[np.ndarray]:
        """What a fingerprint covers beside samples and labels, names included."""
        names = [np.array([ord(c) for c in f"{name};"]) for name, _ in self.inputs]
        raw = [] if self.raw is None else [self.raw]
        return [*names, *(values for _, values in self.inputs), *raw]


def parse_normalise(text: str) -> tuple[Any, Any]:
    """Read ``MEAN,STD``: two numbers, or k means followed by k standard deviations.

    Parameters
    ----------
    text : str
        ``MEAN,STD``.

    Returns
    -------
    mean, std : float or tuple of float
        One number each, or one per channel.

    Raises
    ------
    ValueError
        If it is not an even number of numbers.
    """
    try:
        numbers = [float(part) for part in text.split(",")]
    except ValueError:
        numbers = []
    if not numbers or len(numbers) % 2:
        raise ValueError(f"normalise: got {text!r}, want MEAN,STD or k means and then k STDs")
    half = len(numbers) // 2
    if half == 1:
        return numbers[0], numbers[1]
    return tuple(numbers[:half]), tuple(numbers[half:])


def is_array(value: Any) -> bool:
    """Tell whether a value is an array or a tensor of any library.

    Parameters
    ----------
    value : object
        Any value.

    Returns
    -------
    bool
        Whether it has a shape and a dtype.
    """
    return hasattr(value, "shape") and hasattr(value, "dtype")


def is_array_or_numbers(value: Any) -> bool:
    """Tell whether a value is an array, a tensor or a nested list of plain numbers.

    A list of arrays is not: it is a list of batches.

    Parameters
    ----------
    value : object
        Any value.

    Returns
    -------
    bool
        Whether `to_array` takes it.
    """
    if is_array(value):
        return True
    if not isinstance(value, list | tuple) or not value:
        return False
    return all(isinstance(v, int | float | np.generic) or _nested_numbers(v) for v in value)


def _nested_numbers(value: Any) -> bool:
    return isinstance(value, list) and is_array_or_numbers(value) and not is_array(value)


def to_array(value: Any) -> np.ndarray:
    """Turn an array, a torch tensor (any device, half types too) or nested lists into numpy.

    Parameters
    ----------
    value : array, tensor or nested list of numbers
        Values; a tensor may be on any device, bfloat16 becomes float32.

    Returns
    -------
    ndarray
        The values; they share memory where they can.

    Raises
    ------
    ValueError
        If nested lists have different lengths.
    """
    if hasattr(value, "detach") and hasattr(value, "cpu"):
        value = value.detach().cpu()
        if str(value.dtype) == "torch.bfloat16":  # numpy has no such type
            value = value.float()
        return cast("np.ndarray", value.numpy())
    try:
        return np.asarray(value)
    except ValueError as error:
        raise ValueError(f"data: the rows are not of one length ({error})") from error


def gathered(batches: Iterable[Any], name: str) -> Data:
    """Concatenate batches, each x or (x, y, ...), into one `Data`.

    Parameters
    ----------
    batches : iterable
        Batches: arrays, or tuples whose first two entries are x and y.
    name : str
        Name in messages and records.

    Returns
    -------
    Data
        All samples, in memory.

    Raises
    ------
    ValueError
        If a batch is not understood, the batches' shapes differ, only some have labels, or there is
        no sample.
    """
    xs: list[np.ndarray] = []
    ys: list[np.ndarray] = []
    dicts: list[Mapping[Any, Any]] = []
    tuples: list[tuple[np.ndarray, ...]] = []
    for batch in batches:
        if isinstance(batch, Mapping) and batch and all(map(is_array_or_numbers, batch.values())):
            dicts.append({key: to_array(value) for key, value in batch.items()})
            continue
        parts = batch if isinstance(batch, list | tuple) else (batch,)
        if parts and isinstance(parts[0], list | tuple) and all(map(is_array, parts[0])):
            tuples.append(tuple(map(to_array, parts[0])))
            if len(parts) > 1:
                ys.append(to_array(parts[1]))
            continue
        if not parts or not all(is_array_or_numbers(part) for part in parts[:2]):
            raise ValueError(
                f"data: got a batch of type {type(batch).__name__}, want x or (x, y) of arrays"
            )
        xs.append(to_array(parts[0]))
        if len(parts) > 1:
            ys.append(to_array(parts[1]))
    if (bool(dicts) + bool(tuples) + bool(xs)) > 1:
        raise ValueError("data: the batches are of different kinds")
    if dicts:
        keys = list(dicts[0])
        if any(list(batch) != keys for batch in dicts):
            raise ValueError("data: the batches have different keys")
        return named({key: _joined([b[key] for b in dicts], str(key)) for key in keys}, name)
    if tuples:
        columns = zip(*tuples, strict=True)
        inputs = tuple((None, _joined(list(c), f"input {i}")) for i, c in enumerate(columns))
        return several(inputs, np.concatenate(ys) if ys else None, name)
    if not xs:
        raise ValueError("data: there is no sample")
    if len({x.shape[1:] for x in xs}) > 1:
        raise ValueError(f"data: batches of different shapes {sorted({x.shape[1:] for x in xs})}")
    if ys and len(ys) != len(xs):
        raise ValueError(f"data: {len(ys)} of {len(xs)} batches have labels")
    return checked(np.concatenate(xs), np.concatenate(ys) if ys else None, name)


def _joined(arrays: list[np.ndarray], what: str) -> np.ndarray:
    """Concatenate an input's batches."""
    if len({array.shape[1:] for array in arrays}) > 1:
        shapes = sorted({array.shape[1:] for array in arrays})
        raise ValueError(f"data: {what}: batches of different shapes {shapes}; pad them alike")
    return np.concatenate(arrays)


def checked(x: np.ndarray, y: np.ndarray | None, name: str, limit: int | None = None) -> Data:
    """Check samples and labels, and return the first `limit` of them.

    Parameters
    ----------
    x : ndarray, shape (n_samples, ...)
        Samples, of at least two axes. Integers and half types become float32.
    y : ndarray or None, shape (n_samples, ...)
        Labels or targets.
    name : str
        Name in messages and records.
    limit : int, optional
        Number of samples to return; all of them by default.

    Returns
    -------
    Data
        Finite samples in float32 or float64, and their labels.

    Raises
    ------
    ValueError
        If the samples or labels are empty, not numeric, not finite, or not of one length.
    """
    if x.dtype.kind not in "fiub":
        raise ValueError(f"data: {name!r} has samples of dtype {x.dtype}, want real numbers")
    if x.ndim < 2:
        raise ValueError(f"data: {name!r} has shape {x.shape}, want (samples, features, ...)")
    if x.size == 0:
        raise ValueError(f"data: {name!r} is empty: shape {x.shape}")
    if y is not None:
        if y.dtype.kind not in "fiub":
            raise ValueError(f"data: {name!r} has labels of dtype {y.dtype}, want numbers")
        if y.ndim == 0 or len(y) != len(x):
            got = len(y) if y.ndim else "a single number"
            raise ValueError(f"data: {name!r} has {len(x)} samples but labels for {got}")
        y = y[:limit]
        if not np.isfinite(y).all():
            raise ValueError(f"data: {name!r} has NaN or infinite labels")
    x = x[:limit]
    whole = x.dtype.kind in "iu" and x.dtype.itemsize >= 4
    raw = x.astype(np.int64, copy=False) if whole else None
    dtype = np.float64 if x.dtype.kind == "f" and x.dtype.itemsize >= 8 else np.float32
    x = x.astype(dtype, copy=False)  # in the native byte order too
    if not np.isfinite(x).all():
        raise ValueError(f"data: {name!r} has NaN or infinite samples")
    return Data(x, y, name, raw=raw)


def first(data: Data, count: int | None) -> Data:
    """Return the first samples.

    Parameters
    ----------
    data : Data
        Samples.
    count : int or None
        Number of samples; all of them where it is None.

    Returns
    -------
    Data
        With all inputs and labels cut alike.
    """
    if count is None:
        return data
    return replace(
        data,
        x=data.x[:count],
        y=None if data.y is None else data.y[:count],
        inputs=tuple((name, values[:count]) for name, values in data.inputs),
        raw=None if data.raw is None else data.raw[:count],
    )


LABELS = ("labels", "label", "y", "targets", "target")
"""Names under which a mapping of arrays holds labels."""


def named(arrays: Mapping[Any, Any], name: str) -> Data:
    """Check a mapping of arrays: a network's inputs by argument, labels beside them.

    Parameters
    ----------
    arrays : mapping from str to array
        Inputs by the name of the network's argument, as a tokenizer returns them; `LABELS` names
        what is not an input. Whole numbers stay whole.
    name : str
        Name in messages and records.

    Returns
    -------
    Data
        Samples with `inputs`.

    Raises
    ------
    ValueError
        If there is no input, or an array is empty, not numeric, not finite, or of another length.
    """
    labels = next((key for key in LABELS if key in arrays), None)
    for key, value in arrays.items():
        if not is_array_or_numbers(value):
            raise ValueError(f"data: {name}[{key!r}]: got a {type(value).__name__}, want an array")
    values = {str(key): to_array(value) for key, value in arrays.items() if key != labels}
    if not values:
        raise ValueError(f"data: got a mapping without inputs ({', '.join(map(str, arrays))})")
    y = None if labels is None else to_array(arrays[labels])
    return several(tuple(values.items()), y, name)


def several(
    inputs: tuple[tuple[str | None, np.ndarray], ...], y: np.ndarray | None, name: str
) -> Data:
    """Check a network's several inputs.

    Parameters
    ----------
    inputs : tuple of (str or None, ndarray)
        Positional inputs, named None, first.
    y : ndarray or None
        Labels.
    name : str
        Name in messages and records.

    Returns
    -------
    Data
        Samples with `inputs`.

    Raises
    ------
    ValueError
        If an array is empty, not numeric, not finite, or of another length than the first.
    """
    found = []
    for key, values in inputs:
        label = name if key is None else f"{name}[{key!r}]"
        count = len(values) if values.ndim else 0
        if count != len(inputs[0][1]):
            raise ValueError(
                f"data: {label!r}: got {count} samples, want {len(inputs[0][1])} as in the others"
            )
        flat = values if values.ndim > 1 else values[:, None]
        one = checked(flat, None, label)
        kept = one.raw if one.raw is not None else one.x
        if values.dtype.kind in "ub" or (values.dtype.kind == "i" and one.raw is None):
            kept = flat.astype(np.int64)  # a mask of bytes or booleans
        found.append((key, kept.reshape(values.shape)))
    leading = checked(found[0][1].reshape(len(found[0][1]), -1), y, name)
    return Data(leading.x, leading.y, name, inputs=tuple(found))


def normalised(data: Data, mean: Any, std: Any) -> Data:
    """Return (x - mean) / std, per channel (axis 1) where there are several.

    Parameters
    ----------
    data : Data
        Samples.
    mean, std : float or sequence of float
        One number for all entries, or one per channel.

    Returns
    -------
    Data
        Normalised samples with the same labels.

    Raises
    ------
    ValueError
        If the numbers do not fit the channels, are not finite, or a standard deviation is not
        positive in the samples' dtype.
    """
    x = data.x
    shift, scale = (np.atleast_1d(np.asarray(v, dtype=np.float64)) for v in (mean, std))
    if shift.shape != scale.shape or shift.ndim != 1 or len(shift) not in (1, x.shape[1]):
        raise ValueError(
            f"normalise: got {shift.size} means and {scale.size} STDs, want one of each, or "
            f"{x.shape[1]} (one a channel, axis 1 of shape {x.shape})"
        )
    if not (np.isfinite(shift).all() and np.isfinite(scale).all() and (scale > 0).all()):
        raise ValueError(f"normalise: got {mean}, {std}, want finite means and positive STDs")
    by_channel = (1, -1) + (1,) * (x.ndim - 2)
    shift, scale = (v.reshape(by_channel).astype(x.dtype) for v in (shift, scale))
    if not scale.all():
        raise ValueError(f"normalise: the STD {std} is zero in {x.dtype}")
    return replace(data, x=(x - shift) / scale, raw=None)
