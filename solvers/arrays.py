"""Arrays to numpy and back: what every solver does at its edges."""

from __future__ import annotations

from typing import Any

import numpy as np
from array_api_compat import array_namespace, device, is_torch_array

Array = Any


def to_numpy(array: Array) -> np.ndarray:
    """Return `array` as a numpy array, sharing memory where it can."""
    if is_torch_array(array):
        return array.detach().cpu().numpy()
    return np.asarray(array)


def on_host(array: Array) -> Array:
    """Take arrays on the CPU as numpy: workers need no torch, and memory is shared, not copied."""
    return to_numpy(array) if str(device(array)) == "cpu" else array


def like(values: np.ndarray, reference: Array) -> Array:
    """Return the numpy array `values` in the namespace, on the device, of `reference`."""
    return array_namespace(reference).asarray(values, device=device(reference))
