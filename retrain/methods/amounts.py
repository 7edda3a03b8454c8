"""Numbers per layer: one for all layers, or one for each name or shell pattern."""

from __future__ import annotations

import math
from collections.abc import Mapping
from fnmatch import fnmatchcase

from solvers import checks

MOST_THREADS = 4096
"""Largest number of threads or workers accepted. More than any machine has cores; far beyond it the
thread libraries fail in unclear ways. Chosen by hand."""

Amount = float | Mapping[str, float]
"""One number for all layers, or numbers by layer name or shell pattern."""


def amount_for(amount: Amount, name: str, argument: str) -> float:
    """Look up a layer's number: by its name, or by the first shell pattern that matches it.

    Parameters
    ----------
    amount : float or mapping from str to float
        One number for all layers, or numbers by layer name or shell pattern.
    name : str
        Name of the layer.
    argument : str
        Name of the argument in the error message.

    Returns
    -------
    float
        Number for this layer.

    Raises
    ------
    ValueError
        If the mapping has no entry for the layer.
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
    """Check one number, or each number of a mapping.

    Parameters
    ----------
    argument : str
        Name of the argument in the error message.
    amount : float, mapping from str to float, or None
        Numbers to check; None passes.
    largest : float
        Largest number allowed; infinity for no limit.

    Raises
    ------
    ValueError
        If a number is not finite or not in [0, largest], or a mapping is empty.
    """
    if amount is None:
        return
    values = amount.values() if isinstance(amount, Mapping) else [amount]
    if not values:
        raise ValueError(f"{argument}: got a mapping without layers")
    for value in values:
        if not (0 <= value <= largest and value < math.inf):
            want = "a number in [0, 1]" if largest == 1 else "a finite number >= 0"
            raise ValueError(f"{argument}: got {value!r}, want {want}")


def check_parallel(jobs: int, threads: int | None, seed: int) -> None:
    """Check the number of jobs and of threads, and the seed, of a run.

    Parameters
    ----------
    jobs : int
        Number of layers solved at the same time.
    threads : int or None
        Number of threads per job; None for the machine's cores divided by `jobs`.
    seed : int
        Seed of random choices.

    Raises
    ------
    ValueError
        If one is out of range.
    """
    for name, value in (("jobs", jobs), ("threads", 1 if threads is None else threads)):
        checks.count(1, **{name: value})
        if value > MOST_THREADS:
            raise ValueError(f"{name}: got {value!r}, want at most {MOST_THREADS}")
    checks.count(0, seed=seed)
    if seed >= 2**63:  # torch accepts no larger seed
        raise ValueError(f"seed: got {seed!r}, want a number below 2^63")


def layers_named(amount: Amount | None) -> list[str] | None:
    """Layers that an amount names, as shell patterns; None when it names none.

    Parameters
    ----------
    amount : float, mapping from str to float, or None
        Numbers per layer.

    Returns
    -------
    list of str or None
        Shell patterns of the layers that the mapping names; None where it is not a mapping.
    """
    return list(amount) if isinstance(amount, Mapping) else None
