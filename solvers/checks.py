"""Checks of numbers and names that people pass, and the one way in which they say what is wrong.

Every message reads ``argument: got X, want Y``. Each function takes its values by the argument's
name, so that the message names it: ``positive(rho=rho)``. A NaN fails all of them.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any


def positive(**values: float) -> None:
    """Check that each number is above 0 and finite.

    Parameters
    ----------
    **values : float
        Numbers by the name of the argument.

    Raises
    ------
    ValueError
        If one is not.
    """
    for name, value in values.items():
        if not 0 < value < math.inf:
            raise ValueError(f"{name}: got {value!r}, want a positive finite number")


def not_negative(**values: float) -> None:
    """Check that each number is at least 0 and finite.

    Parameters
    ----------
    **values : float
        Numbers by the name of the argument.

    Raises
    ------
    ValueError
        If one is not.
    """
    for name, value in values.items():
        if not 0 <= value < math.inf:
            raise ValueError(f"{name}: got {value!r}, want a finite number >= 0")


def below_one(**values: float) -> None:
    """Check that each number is at least 0 and below 1.

    Parameters
    ----------
    **values : float
        Numbers by the name of the argument.

    Raises
    ------
    ValueError
        If one is not.
    """
    for name, value in values.items():
        if not 0 <= value < 1:
            raise ValueError(f"{name}: got {value!r}, want at least 0 and below 1")


def count(least: int, **values: Any) -> None:
    """Check that each value is a whole number and at least `least`.

    Parameters
    ----------
    least : int
        Smallest number allowed.
    **values : object
        Values by the name of the argument. True and False are not numbers here.

    Raises
    ------
    ValueError
        If one is not.
    """
    for name, value in values.items():
        whole = hasattr(value, "__index__") and not isinstance(value, bool)  # numpy's too
        if not whole or value < least:
            raise ValueError(f"{name}: got {value!r}, want a whole number >= {least}")


def one_of(among: Iterable[Any], **values: Any) -> None:
    """Check that each value is one of those known.

    Parameters
    ----------
    among : iterable
        Values allowed.
    **values : object
        Values by the name of the argument.

    Raises
    ------
    ValueError
        If one is not among them.
    """
    known = tuple(among)
    for name, value in values.items():
        if value not in known:
            raise ValueError(f"{name}: got {value!r}, want one of {', '.join(map(str, known))}")
