"""The knee of a Pareto front: where giving up a little of one objective no longer buys much."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from retrain.trainers.itp.search import Outcome, nondominated, normalised

BEND = 10.0
"""By how many degrees the front must bend at the knee; a right angle is the most there can be."""
DISTANCE = 0.05
"""How far below the chord the knee must lie; the most there can be is 1/sqrt(2)."""


@dataclass(frozen=True)
class Knee:
    """A knee, or the reason why there is none.

    Attributes
    ----------
    outcome : Outcome or None
    value : float
        Of the criterion, at the best point: the bend in degrees, or the distance to the chord; NaN
        where it has none.
    reason : str
        Why there is no knee; empty when there is one.
    """

    outcome: Outcome | None
    value: float
    reason: str = ""


def knee_by_trade_off(outcomes: Sequence[Outcome], *, bend: float = BEND) -> Knee:
    """Find the outcome at which the trade-off changes most.

    A point's two trade-offs are the mean slopes of the front to its left and to its right, from the
    point to the front's ends, in units of the front's extent. The knee has the largest angle
    between the two slopes; on a straight front it is zero everywhere. (Slopes to the next
    neighbours would compare the noise of single trainings.)

    Parameters
    ----------
    outcomes : sequence of Outcome
        Dominated, collapsed and diverged ones are left out first: a network without weights is
        nobody's choice, and its loss would be the scale of all others'.
    bend : float
        The least angle that makes a knee, in degrees.
    """
    front = _candidates(outcomes)
    if len(front) < 3:
        return _too_few(front)
    loss, complexity = normalised(front)[1:-1].T  # the ends are (1, 0) and (0, 1)
    left, right = np.arctan2(1 - loss, complexity), np.arctan2(loss, 1 - complexity)
    angles = np.degrees(left - right)
    best = int(angles.argmax())
    value = float(angles[best])
    if value < bend:
        return Knee(None, value, f"no knee: the front bends by less than {bend:g} degrees anywhere")
    return Knee(front[1 + best], value)


def knee_by_chord(outcomes: Sequence[Outcome], *, distance: float = DISTANCE) -> Knee:
    """Find the outcome farthest below the straight line between the front's ends.

    Parameters
    ----------
    outcomes : sequence of Outcome
        Dominated, collapsed and diverged ones are left out first.
    distance : float
        The least distance that makes a knee, in units of the front's extent.

    References
    ----------
    Das, "On characterizing the knee of the Pareto curve", Structural Optimization 18 (1999).
    """
    front = _candidates(outcomes)
    if len(front) < 3:
        return _too_few(front)
    # The ends are (1, 0) and (0, 1): the chord is x + y = 1.
    below = (1 - normalised(front).sum(axis=1)) / np.sqrt(2)
    best = int(below.argmax())
    value = float(below[best])
    if value < distance:
        return Knee(None, value, f"no knee: no point lies {distance:g} below the chord")
    return Knee(front[best], value)


def _candidates(outcomes: Sequence[Outcome]) -> list[Outcome]:
    return nondominated([outcome for outcome in outcomes if outcome.status == "trained"])


def _too_few(front: Sequence[Outcome]) -> Knee:
    return Knee(
        None,
        float("nan"),
        f"no knee: got {len(front)} trained networks on the front, want 3 or more",
    )
