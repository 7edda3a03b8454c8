"""Where to look next for the slack at which the residual of a layer is epsilon.

The constrained form ties the units of a layer by one number s > 0, the slack: r(s), the norm of the
residuals of the units solved for s, must be epsilon (`solvers.newton.layer`). With
rho(t) = log(r(exp t) / epsilon), t = log s, this is the root of an increasing function whose slope
lies in [0, 1]: r rises with s, and the multipliers' norm r / s falls. Its values are as inexact as
the units' solutions, and it is flat at both ends.

So: a secant through the last two slacks, its slope held to [0, 1] and its step to a longest one;
where it leaves the bracket of all slacks so far, or is slow, the middle. The other two roots of
this package have other methods since their functions differ: an integer staircase
(`solvers.path.root`), and a piecewise linear function solved exactly on its piece
(`solvers.free_row`).
"""

from __future__ import annotations

import math

import numpy as np

from solvers.arrays import to_numpy
from solvers.newton.work import Points
from solvers.program import ConstrainedProgram

Trail = list[tuple[float, float]]
"""(log s, log of the residual relative to what is aimed at), for each finite slack in order."""

_USUAL_SLOPE = 0.7
"""Slope of log r over log s until two slacks tell it: a guess within [0, 1]. A larger one makes the
first step shorter; only the number of solves depends on it."""

_LONGEST, _DOUBLINGS = 3.0, 4
"""Longest step of log s (a factor of 20), and how many times it may double. Longer ones jump over
the root from where r is flat; shorter ones take more solves to get there."""

_FAR = 15.0
"""A slack e^15 times the first, 3e6 times, whose residual is still below epsilon: then s = infinity
is tried, since the ceilings alone may hold the residual within the ball."""

_LARGEST_SLACK = 1e290
"""Slacks are kept between its inverse and it, so that their squares' quotients stay finite."""

_LONGEST_LOG = 667.0
"""Logarithm of `_LARGEST_SLACK`, rounded down: bounds what is exponentiated."""

_TINY = 5e-324
"""The smallest positive float64, whose logarithm stands for that of 0."""


def log_of(value: float) -> float:
    """Return the logarithm of a number, that of the smallest positive float64 for 0.

    Parameters
    ----------
    value : float
        At least 0.

    Returns
    -------
    float
        Finite.
    """
    return math.log(max(value, _TINY))


def keep_finite(slack: float) -> float:
    """Keep a slack where its logarithm and its quotients are finite.

    Parameters
    ----------
    slack : float
        Any number but NaN.

    Returns
    -------
    float
        The nearest one within [1e-290, 1e290].
    """
    return min(max(slack, 1 / _LARGEST_SLACK), _LARGEST_SLACK)


def first_slack(program: ConstrainedProgram, points: Points) -> float:
    """Guess epsilon / |nu_Omega|; epsilon^2 where that is nothing.

    Parameters
    ----------
    program : ConstrainedProgram
        The layer's program.
    points : Points
        Of its units, with multipliers near the solution's.

    Returns
    -------
    float
        The slack to try first: 0 for epsilon = 0, else finite and positive.
    """
    if program.epsilon == 0:
        return 0.0
    active = to_numpy(program.active).T
    force = math.hypot(*(np.linalg.norm(nu[on]) for nu, on in zip(points.nu, active, strict=True)))
    return keep_finite(program.epsilon / force if force > 0 else program.epsilon * program.epsilon)


def is_plausible(trail: Trail) -> bool:
    """Tell whether the last two residuals can be those of solutions: 0 <= slope <= 1.

    Then no step shorter than the error leads to the root; a bracket that asks for one is wrong too.

    Parameters
    ----------
    trail : list of (float, float)
        Slacks and errors so far.

    Returns
    -------
    bool
        True where fewer than two are known.
    """
    if len(trail) < 2:
        return True
    (before, error_before), (here, error) = trail[-2:]
    rise, run = error - error_before, here - before
    return abs(run) > 0.5 * abs(error_before) and -1e-3 <= rise / run <= 1.001


def next_slack(trail: Trail, *, tried_infinity: bool) -> float:
    """Return the next slack: a secant through the last two, in the bracket of all.

    Parameters
    ----------
    trail : list of (float, float)
        Slacks and errors so far; at least one.
    tried_infinity : bool
        Whether s = infinity has been tried.

    Returns
    -------
    float
        Positive; infinity where the residual stays below epsilon however large the slack.
    """
    here, error = trail[-1]
    below = max((s for s, e in trail if e < 0), default=-math.inf)
    above = min((s for s, e in trail if e > 0), default=math.inf)
    following = here - error / _USUAL_SLOPE
    if len(trail) > 1 and here != trail[-2][0]:
        before, error_before = trail[-2]
        slope = (error - error_before) / (here - before)
        # Where r is flat, from far inside the ceilings to far beyond what can be fitted, steps
        # double: a few of them reach a slack at which the bound proves that there is no root.
        longest = _LONGEST * 2.0 ** min(len(trail) - 2, _DOUBLINGS)
        # r rises with s and |nu| = r / s falls: the slope lies in [0, 1].
        step = -error / min(slope, 1.0) if slope > 0 else -math.copysign(longest, error)
        following = here + min(max(step, -longest), longest)
    if not below < following < above or _slow(trail):
        following = (below + above) / 2 if math.isfinite(below + above) else here - 2 * error
    endless = following > trail[0][0] + _FAR and above == math.inf
    if endless and not tried_infinity:
        return math.inf
    return keep_finite(math.exp(min(max(following, -_LONGEST_LOG), _LONGEST_LOG)))


def _slow(trail: Trail) -> bool:
    """Tell whether the last step halved neither the bracket there was before it nor the error."""

    def width(part: Trail) -> float:
        below = max((s for s, e in part if e < 0), default=-math.inf)
        return min((s for s, e in part if e > 0), default=math.inf) - below

    *earlier, (_, error) = trail
    before = width(earlier)
    if not math.isfinite(before):
        return False
    return width(trail) > 0.5 * before and abs(error) > 0.5 * min(abs(e) for _, e in earlier)
