"""Numbers by layer: one for all, or one for each name or shell pattern."""

from __future__ import annotations

import math
from collections.abc import Mapping
from fnmatch import fnmatchcase

MOST_THREADS = 4096
"""More threads or workers than any machine has cores; beyond, their libraries end in odd ways."""

Amount = float | Mapping[str, float]
"""One number for all layers, or numbers by layer name or shell pattern."""


def amount_for(amount: Amount, name: str, argument: str) -> float:
    """Look up a layer's number: by its name, or by the first shell pattern that matches it.

    Raises
    ------
    ValueError
        If there is none.
    """
    if not isinstance(amount, Mapping):
        return float(amount)
    if name in amount:
        return float(amount[name])
    for pattern, value in amount.items():
        if fnmatchcase(name, pattern):
            return float(value)
    raise ValueError(f"{argument}: none given for layer {name!r}, only for {', '.join(amount)}")


def check_amount(argument: str, amount: Amount | None, largest: float) -> None:
    """Check one number, or a mapping's.

    Raises
    ------
    ValueError
        If one is not in [0, largest], or there is none.
    """
    if amount is None:
        return
    values = amount.values() if isinstance(amount, Mapping) else [amount]
    if not values:
        raise ValueError(f"{argument}: got a mapping without layers")
    for value in values:
        if not (0 <= value <= largest and value < math.inf):
            limit = "in [0, 1]" if largest == 1 else ">= 0"
            raise ValueError(f"{argument}: want a number {limit}, got {value!r}")


def check_parallel(jobs: int, threads: int | None, seed: int) -> None:
    """Check a run's jobs, its threads (None: by the machine's cores) and its seed.

    Raises
    ------
    ValueError
        If one is out of range.
    """
    for name, value in (("jobs", jobs), ("threads", threads)):
        if value is not None and value < 1:
            raise ValueError(f"{name}: want at least 1, got {value!r}")
        if value is not None and value > MOST_THREADS:
            raise ValueError(f"{name}: want at most {MOST_THREADS}, got {value!r}")
    if seed < 0:
        raise ValueError(f"seed: want a number >= 0, got {seed!r}")
    if seed >= 2**63:  # torch takes none beyond
        raise ValueError(f"seed: want a number below 2^63, got {seed!r}")


def layers_named(amount: Amount | None) -> list[str] | None:
    """Layers that an amount names, as shell patterns; None when it names none."""
    return list(amount) if isinstance(amount, Mapping) else None
