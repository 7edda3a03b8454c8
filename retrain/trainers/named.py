"""A name and its options, as a recipe gives an optimiser, a schedule, a model or a method."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Named:
    """A name, and the options that came with it.

    Attributes
    ----------
    name : str
        Name in a table of what is known, or ``package.module:factory``.
    options : dict
        Options by name, as plain values.
    """

    name: str
    options: dict[str, Any]
