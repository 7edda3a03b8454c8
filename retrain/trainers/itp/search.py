"""Which trade-offs to train: a list, dichotomic search, its stochastic form, bisection (section 5).

A search is a function of `train`, which takes weights of the complexity in (7) and gives back what
training with each of them came to. All but the list work level by level: the outcomes so far that
no other dominates are sorted by complexity, and each pair of neighbours may propose a new weight.
Only what is new is trained.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Literal

import numpy as np

from solvers import checks

CLOSENESS = 1e-3
"""Of algorithm 3, line 12: how near to a trained weight a new one may not be."""
_SAME = 1e-9


@dataclass(frozen=True)
class Outcome:
    """What training with one weight came to.

    Attributes
    ----------
    weight : float
        Of the complexity in (7).
    loss, complexity : float
        The two objectives on the training data, after the last pruning; NaN when diverged.
    status : {"trained", "collapsed", "diverged"}
        Collapsed: every prunable weight is zero. Diverged: a loss or a weight was not finite.
    """

    weight: float
    loss: float
    complexity: float
    status: Literal["trained", "collapsed", "diverged"] = "trained"


Train = Callable[[Sequence[float]], list[Outcome]]
Propose = Callable[[Sequence[Outcome]], list[float]]
"""Proposes new weights, given all outcomes so far."""


def nondominated(outcomes: Sequence[Outcome]) -> list[Outcome]:
    """Return the outcomes that no other dominates, by rising complexity.

    Diverged ones are left out; of equal ones it is that of the smallest weight. Along the result
    the loss falls strictly.
    """
    finite = [
        outcome
        for outcome in outcomes
        if math.isfinite(outcome.loss) and math.isfinite(outcome.complexity)
    ]
    front: list[Outcome] = []
    for outcome in sorted(finite, key=lambda one: (one.complexity, one.loss, one.weight)):
        if not front or outcome.loss < front[-1].loss:
            front.append(outcome)
    return front


def fixed_list(train: Train, weights: Sequence[float]) -> list[Outcome]:
    """Train with each of the weights given: figure 9(a)."""
    for weight in weights:
        checks.below_one(weight=weight)
    return train(list(weights))


def dichotomic(
    train: Train, interval: tuple[float, float], *, levels: int, budget: int
) -> list[Outcome]:
    """Search between neighbours with the weight for which both are equally good: figure 9(b).

    Parameters
    ----------
    train : callable
        Trains with some weights, and gives an outcome each, in their order.
    interval : pair of float
        The first two weights, 0 <= lambda_1 < lambda_2 < 1.
    levels : int
        How deep, the first two weights included; 1 or more.
    budget : int
        How many trainings at most, 2 or more.

    Returns
    -------
    list of Outcome
        All of them, in the order of training.

    Raises
    ------
    ValueError
        If an argument is out of its range.

    References
    ----------
    Aneja and Nair, "Bicriteria transportation problem", Management Science 25 (1979).
    """
    return _by_levels(train, interval, levels, budget, _new_slopes)


def stochastic_dichotomic(
    train: Train,
    interval: tuple[float, float],
    *,
    levels: int,
    budget: int,
    rng: np.random.Generator,
    closeness: float = CLOSENESS,
) -> list[Outcome]:
    """Search by algorithm 3: near a trained weight, draw a weight around it instead: figure 9(d).

    Parameters
    ----------
    rng : numpy.random.Generator
        Draws the weights.
    closeness : float
        How near counts as near.
    train, interval, levels, budget
        As for `dichotomic`.
    """
    propose = partial(_slopes_or_draws, interval=interval, rng=rng, closeness=closeness)
    return _by_levels(train, interval, levels, budget, propose)


def bisection(
    train: Train, interval: tuple[float, float], *, levels: int, budget: int
) -> list[Outcome]:
    """Search by halving intervals of weights: figure 9(c).

    The paper picks intervals 'by comparing trade-offs', and does not say how. Here the neighbours
    whose outcomes span the largest box come first (the part of the plane where the front between
    them may lie, in units of the front): where only one objective changes there is no knee.

    Parameters
    ----------
    train, interval, levels, budget
        As for `dichotomic`.
    """
    return _by_levels(train, interval, levels, budget, _midpoints)


def normalised(front: Sequence[Outcome]) -> np.ndarray:
    """Return (loss, complexity) of a front as rows, each scaled to [0, 1]; constant ones are 0."""
    points = np.array([(outcome.loss, outcome.complexity) for outcome in front])
    low, high = points.min(axis=0), points.max(axis=0)
    return np.asarray((points - low) / np.where(high > low, high - low, 1.0))


def equal_slope(first: Outcome, second: Outcome) -> float:
    """Return the weight for which two outcomes have the same weighted sum (7); line 11."""
    loss = second.loss - first.loss
    complexity = second.complexity - first.complexity
    return -loss / (complexity - loss)


def _by_levels(
    train: Train, interval: tuple[float, float], levels: int, budget: int, propose: Propose
) -> list[Outcome]:
    low, high = interval
    checks.below_one(low=low, high=high)
    if not low < high:
        raise ValueError(f"interval: got {low}, {high}, want lambda_1 < lambda_2")
    checks.count(1, levels=levels)
    if budget < 2:
        raise ValueError(f"budget: got {budget}, want 2 trainings or more")
    outcomes = train([low, high])
    for _ in range(levels - 1):
        proposed = propose(outcomes)[: budget - len(outcomes)]
        if not proposed:
            break
        outcomes = outcomes + train(proposed)
    return outcomes


def _new_slopes(outcomes: Sequence[Outcome]) -> list[float]:
    tried, proposed = _weights(outcomes), list[float]()
    for first, second in pairwise(nondominated(outcomes)):
        weight = equal_slope(first, second)
        if not _near(weight, [*tried, *proposed], _SAME):
            proposed.append(weight)
    return proposed


def _slopes_or_draws(
    outcomes: Sequence[Outcome],
    *,
    interval: tuple[float, float],
    rng: np.random.Generator,
    closeness: float,
) -> list[float]:
    """Lines 9 to 15 of algorithm 3."""
    tried, proposed = _weights(outcomes), list[float]()
    for first, second in pairwise(nondominated(outcomes)):
        weight = equal_slope(first, second)
        near = _near(weight, [*tried, *proposed], closeness)
        if near:
            # The paper takes any of those that are near; this is the nearest.
            nearest = min(near, key=lambda known: abs(known - weight))
            low, high = max(0.9 * nearest, interval[0]), min(1.1 * nearest, interval[1])
            if not low < high:  # lambda_1 = 0, or a weight outside the interval: nothing to draw
                continue
            weight = float(rng.uniform(low, high))
        proposed.append(weight)
    return proposed


def _midpoints(outcomes: Sequence[Outcome]) -> list[float]:
    # Collapsed networks are all the same but for their biases: the smallest weight that collapses
    # stands for them, so that halving goes on between it and the networks that did not.
    collapsed = [outcome for outcome in outcomes if outcome.status == "collapsed"]
    bound = min(collapsed, key=lambda outcome: outcome.weight, default=None)
    front = nondominated([one for one in outcomes if one not in collapsed or one is bound])
    if len(front) < 2:
        return []
    boxes = np.abs(np.diff(normalised(front), axis=0)).prod(axis=1)
    tried, proposed = _weights(outcomes), list[float]()
    for index in np.argsort(-boxes, kind="stable"):
        low, high = sorted((front[index].weight, front[index + 1].weight))
        # Weights between the two were tried when what they gave is dominated; each part is halved.
        inside = sorted(weight for weight in tried if low <= weight <= high)
        for left, right in pairwise(inside):
            weight = (left + right) / 2
            if not _near(weight, [*tried, *proposed], _SAME):
                proposed.append(weight)
    return proposed


def _weights(outcomes: Sequence[Outcome]) -> list[float]:
    return [outcome.weight for outcome in outcomes]


def _near(weight: float, known: Sequence[float], closeness: float) -> list[float]:
    return [other for other in known if abs(other - weight) <= closeness]
