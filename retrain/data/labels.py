"""Class numbers from the labels that a data set has, or the reason why there are none.

Labels with only one possible meaning are converted, and the conversion is recorded: numbers with a
decimal point, a column, one-hot rows, true and false. Others are rejected with a reason of one
line that says what to do; a missing accuracy always has its reason beside it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

_LARGEST = 2**31
"""Class numbers must be below this in magnitude. Any limit far above the number of outputs and
below 2^53, up to which float64 represents whole numbers exactly, would do. Chosen by hand."""


@dataclass(frozen=True, eq=False)
class Labels:
    """How labels were read.

    Attributes
    ----------
    classes : ndarray of int64, shape (n_samples,), or None
        Class number of each sample, from 0.
    note : str
        Conversion that was made; empty if there was none.
    reason : str
        Why there are no class numbers; empty if there are.
    """

    classes: np.ndarray | None
    note: str = ""
    reason: str = ""


def class_numbers(y: np.ndarray | None) -> Labels:
    """Read class numbers from labels, without regard to a network.

    Parameters
    ----------
    y : ndarray or None, shape (n_samples, ...)
        Finite numbers, or true and false.

    Returns
    -------
    Labels
        Class numbers, or the reason why there are none.
    """
    if y is None:
        return Labels(None, reason="the data has no labels")
    if y.ndim > 1 and math.prod(y.shape[1:]) == 1:
        found = class_numbers(y.reshape(len(y)))
        note = f"a column of shape {y.shape}" + (f", {found.note}" if found.note else "")
        return Labels(found.classes, "" if found.classes is None else note, found.reason)
    if y.ndim == 1:
        return _numbers(y)
    if y.ndim == 2:
        if ((y == 0) | (y == 1)).all() and (np.count_nonzero(y, axis=1) == 1).all():
            return Labels(y.argmax(axis=1).astype(np.int64), f"one-hot rows of {y.shape[1]}")
        what = "are no one-hot rows (exactly one 1 in each)"
    else:
        what = "are neither one number for each sample nor one-hot rows"
    said = f"the labels, {y.dtype} of shape {y.shape}, {what}"
    return Labels(None, reason=f"{said}; they are taken for targets, not for classes")


def class_labels(y: np.ndarray | None, outputs: tuple[int, ...]) -> Labels:
    """Read class numbers for a network.

    Parameters
    ----------
    y : ndarray or None, shape (n_samples, ...)
        Finite numbers, or true and false.
    outputs : tuple of int
        Shape of the network's output for one sample.

    Returns
    -------
    Labels
        Class numbers, or the reason why there are none.
    """
    found = class_numbers(y)
    if y is None or found.classes is None:
        return found
    if len(outputs) != 1 or outputs[0] < 2:
        said = f"the network's outputs, of shape {outputs} per sample, are not one for each class"
        return Labels(None, reason=said)
    if y.ndim == 2 and y.shape[1] > 1 and y.shape[1] != outputs[0]:
        what = f"the labels are one-hot rows of {y.shape[1]}, and the network has {outputs[0]}"
        return Labels(None, reason=f"{what} outputs")
    unfit = unfit_range(found.classes, outputs[0])
    return Labels(None, reason=unfit) if unfit else found


def unfit_range(classes: np.ndarray, outputs: int) -> str:
    """Say why class numbers do not fit the number of a network's outputs.

    Parameters
    ----------
    classes : ndarray of int64, shape (n_samples,)
        Class numbers.
    outputs : int
        Number of outputs.

    Returns
    -------
    str
        Reason; empty where they fit.
    """
    low, high = int(classes.min()), int(classes.max())
    if low >= 0 and high < outputs:
        return ""
    said = f"the labels are {low} to {high}; {outputs} outputs want labels from 0 to {outputs - 1}"
    if low >= 1 and high == outputs:
        said += ": they begin at 1; subtract 1 from them"
    return said


def _numbers(y: np.ndarray) -> Labels:
    """Read one number for each sample."""
    if y.dtype.kind == "b":
        return Labels(y.astype(np.int64), "true and false as classes 1 and 0")
    if y.dtype.kind == "f" and (y != np.floor(y)).any():
        said = f"the labels, {y.dtype}, are not whole numbers"
        return Labels(None, reason=f"{said}; they are taken for targets, not for classes")
    if (np.abs(y.astype(np.float64)) >= _LARGEST).any():
        return Labels(None, reason="the labels are too large for class numbers")
    note = f"{y.dtype} read as whole numbers" if y.dtype.kind == "f" else ""
    return Labels(y.astype(np.int64), note)
