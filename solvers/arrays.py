"""Arrays to numpy and back: what every solver does at its edges."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from array_api_compat import array_namespace, device, is_torch_array

Array = Any


def to_numpy(array: Array) -> np.ndarray:
    """Return `array` as a numpy array, sharing memory where it can.

    Parameters
    ----------
    array : array
        Of numpy or torch, on any device.

    Returns
    -------
    ndarray
        On the CPU.
    """
    if is_torch_array(array):
        return array.detach().cpu().numpy()
    return np.asarray(array)


def on_host(array: Array) -> Array:
    """Take arrays on the CPU as numpy: workers need no torch, and memory is shared, not copied.

    Parameters
    ----------
    array : array
        Of numpy or torch, on any device.

    Returns
    -------
    array
        numpy's where it was on the CPU, else unchanged.
    """
    return to_numpy(array) if str(device(array)) == "cpu" else array


def like(values: np.ndarray, reference: Array) -> Array:
    """Return the numpy array `values` in the namespace, on the device, of `reference`.

    Parameters
    ----------
    values : ndarray
        What to convert.
    reference : array
        Array whose kind and device are taken.

    Returns
    -------
    array
        With the dtype of `values`.
    """
    return array_namespace(reference).asarray(values, device=device(reference))


_SMALLEST, _LARGEST = 1e-140, 1e140
"""Norms between these can be squared in float64 without vanishing or overflowing; others are
computed from scaled entries. Derived from float64's range, with room for the number of entries:
other powers in between change nothing but which path is taken."""


def norm(array: Array) -> float:
    """Return the Frobenius norm, in float64 whatever the array's dtype.

    Entries are cast before they are squared: in float32 the squares of entries below 1e-23 vanish
    and those above 1e19 overflow. Where float64 cannot hold the squares, entries are scaled.

    Parameters
    ----------
    array : array
        Of numpy or torch, on any device.

    Returns
    -------
    float
        0 for an empty array.
    """
    if 0 in array.shape:
        return 0.0
    xp = array_namespace(array)
    wide = xp.astype(array, xp.float64, copy=False)
    size = float(xp.linalg.vector_norm(wide))
    if _SMALLEST <= size <= _LARGEST:
        return size
    largest = float(xp.max(xp.abs(wide)))
    if largest == 0 or not math.isfinite(largest):
        return largest
    return largest * float(xp.linalg.vector_norm(wide / largest))
