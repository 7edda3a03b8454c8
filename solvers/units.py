"""Units solved apart from each other, several at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from threadpoolctl import threadpool_limits

from solvers import checks

T = TypeVar("T")


def map_units(function: Callable[[int], T], units: Iterable[int], threads: int) -> list[T]:
    """Apply a function to every unit, on several threads, each with one BLAS thread.

    The order of the results, and every bit of them, is independent of the number of threads.

    Parameters
    ----------
    function : callable
        From a unit's number to its result.
    units : iterable of int
        Numbers of the units.
    threads : int
        Threads to use, at least 1.

    Returns
    -------
    list
        A result for each unit, in their order.

    Raises
    ------
    ValueError
        If `threads` is not positive.
    """
    checks.count(1, threads=threads)
    # two BLAS threads under many small factorisations are slower than one, by far
    with threadpool_limits(1, user_api="blas"):
        if threads == 1:
            return [function(unit) for unit in units]
        with ThreadPoolExecutor(threads) as pool:
            return list(pool.map(function, units))
