"""Where to look next for the root of an increasing, integer-valued, piecewise constant function.

The number of zeros of a solution against the logarithm of its radius is such a function (rarely and
slightly not monotone). It is dear to evaluate, smooth from afar and a staircase from near: regula
falsi with the Illinois weights from afar, every third step in the middle, until a step of the
staircase is between two neighbours. The next place depends on the trials alone, so that a search
that was interrupted goes on as if it had not been.
"""

from __future__ import annotations

from collections.abc import Sequence

Trial = tuple[float, int]
"""A place x, and how much the function there exceeds what is wanted."""

_OVERSHOOT = 1.3
"""Factor on a secant step towards a root that is not bracketed yet, so that it brackets. A larger
one makes wider brackets."""

_SHORTEST_STRIDE = 0.01
"""Shortest such step, as a share of the longest. A smaller one creeps where the function is
steep."""

_EDGE = 0.02
"""Share of the bracket that a step keeps away from its ends, so that the bracket always shrinks. A
larger one turns the search into bisection."""


def next_place(
    trials: Sequence[Trial], *, stride: float, nearest: float, slope: float | None = None
) -> float | None:
    """Choose the next place to try.

    Parameters
    ----------
    trials : sequence of (place, excess)
        All so far, in order; at least one.
    stride : float
        Longest step while the root has not been bracketed.
    nearest : float
        Width of a bracket below which the search is over.
    slope : float, optional
        A guess of the function's, for the first step.

    Returns
    -------
    float or None
        None when a trial met the root or the bracket is narrower than `nearest`.
    """
    place, excess = trials[-1]
    if excess == 0 or any(over == 0 for _, over in trials):
        return None
    low = max(((x, over) for x, over in trials if over < 0), default=None)
    high = min(((x, over) for x, over in trials if over > 0), default=None)
    if low is None or high is None:
        return place - _stride(trials, stride, slope) * (1 if excess > 0 else -1)
    width = high[0] - low[0]
    if width <= nearest:
        return None
    if len(trials) % 3 == 0:
        return low[0] + width / 2
    below, above = float(-low[1]), float(high[1])
    # Illinois: an end that has stayed while the other moved twice counts half, and half again.
    stayed = _run_length(trials) - 1
    if excess < 0:
        above /= 2**stayed
    else:
        below /= 2**stayed
    share = below / (below + above)
    return low[0] + width * min(max(share, _EDGE), 1 - _EDGE)


def _stride(trials: Sequence[Trial], stride: float, slope: float | None) -> float:
    """A secant step, lengthened a little so that it brackets; `stride` without a slope."""
    if len(trials) > 1:
        (before, over_before), (here, over) = trials[-2:]
        slope = None if here == before else (over - over_before) / (here - before)
    if not slope:
        return stride
    step = abs(trials[-1][1] / slope)
    return min(max(_OVERSHOOT * step, _SHORTEST_STRIDE * stride), stride)


def _run_length(trials: Sequence[Trial]) -> int:
    """How many of the last trials lie on the side of the last one."""
    side = trials[-1][1] > 0
    length = 0
    for _, over in reversed(trials):
        if (over > 0) != side:
            break
        length += 1
    return length
