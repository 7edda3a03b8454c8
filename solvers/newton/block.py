"""A block of units side by side: the proximal method of multipliers with shared products.

Every unit runs the method of `newton_unit`, whose Newton steps see only the inputs W near their
bound and the ceilings K near to being met. What looks at all inputs and all samples, the responses
XU and the duals X^T nu, is a product for the whole block, three of them a round:

    X^T nu on Omega at the centre    where the units' own problems begin,
    XU, then X^T nu                  which tell whether an input outside W or a ceiling outside K
                                     belongs in (then they join, and the round is repeated for the
                                     same centre), and otherwise measure gap and violation.

They are in float32, which takes half the time, until a unit's gap and violation are as small as
that can tell, or no longer fall; from there on in float64. In float64 they begin where rounding XU
alone moves the duals by more than that (`noise`), as it does for inputs far from zero mean.

A unit within its tolerances leaves the block. A round that takes many Newton steps has met ceilings
too stiff for the point it began at: each step is cut short by the next of them. It is begun again
for the same centre, from where it came to, with a smaller tau.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numba import njit

from solvers.newton.work import Points, Shared, Turn, Units, Work, precision_for

_GROWTH = 5.0
"""Factor of sigma and tau after an outer step. A larger one takes fewer outer steps, each with
harder inner problems. Tuned on the layers of the bench."""

_STIFFEST = 1e11
"""Largest tau relative to its first value: beyond it z - v has no digits left in float64. A larger
one gains nothing."""

_LOOSEST = 1e30
"""Largest sigma relative to its first value; 1 / sigma counts for nothing long before. It keeps the
number finite."""

_FINEST = 1e-11
"""Accuracy of the optimality conditions in u, relative to their boxes, that float64 can give. A
smaller one would be asked for in vain, a larger one ends short of tight tolerances."""

_INNER = 0.1
"""Share of the smaller tolerance to which the inner problem is solved. Twice as much takes fewer
Newton steps a round, and more rounds. Tuned on the layers of the bench."""

_SOME = 1000
"""Samples on which rounding is measured. More cost more and tell the same: it is a root mean
square."""

_COARSE = 3e-5
"""Gap and violation that products in float32 are good for. Asked for less, float64 takes over.
Twice as large changes to float64 earlier. Measured."""

_STALLED = 8
"""Rounds without a better gap or violation, sigma and tau at their limits, after which a unit is
given up. Twice as many spend longer on what float64 cannot give. Chosen by hand."""

_PATIENCE = 40
"""Newton steps after which one round of a unit is cut off, since it zigzags. Twice as many spend
longer on rounds that another sigma would shorten. Chosen by hand."""


def solve_block(
    shared: Shared,
    units: Units,
    points: Points,
    slack: float,
    tolerance: float,
    violation: float,
    max_steps: int,
    left: list[Work | None] | None = None,
) -> tuple[Points, list[Work]]:
    """Go on from points until every unit's own estimates are within tolerance.

    Parameters
    ----------
    shared : Shared
        Inputs and penalty, the same for all units.
    units : Units
        Data of these units.
    points : Points
        Where they stand; not changed.
    slack : float
        s = 1 / (2 fit_weight); 0 fits Omega exactly, infinity not at all.
    tolerance, violation : float
        On the gap and on the violation.
    max_steps : int
        Limit on ``points.steps``.
    left : list of Work or None, optional
        What an earlier call has left of each unit, or None where it is gone. It is used up.

    Returns
    -------
    points : Points
        ``steps == max_steps`` or a gap or violation above what was asked tells of a failure.
    works : list of Work
        For a call with another slack.
    """
    accuracy = max(_INNER * min(tolerance, violation), _FINEST)
    block = _begin(shared, units, points, slack, accuracy, left)
    now = block.now
    open_ = np.flatnonzero(now.steps < max_steps)
    while len(open_):
        _newton_steps(block, open_, max_steps)
        for b in _settled(block, open_, max_steps):
            _judge(block, b, tolerance, violation)
            _advance(block, b)
        lost = ~np.isfinite(block.z).all(axis=1)
        done = block.within | (now.steps >= max_steps) | (block.stalled >= _STALLED) | lost
        open_ = open_[~done[open_]]
    within = np.flatnonzero(block.within)
    _clean(shared, units, now, within, block.c, slack, tolerance, violation)
    return now, block.works


@dataclass(eq=False)
class _Block:
    """A block under way; a row of each array is a unit.

    Attributes
    ----------
    shared, units, slack, accuracy
        The problem, and the accuracy of the optimality conditions in u.
    now : Points
        Where the units are.
    works : list of Work
        Their working sets.
    z, c : array
        Responses XU and duals X^T nu at `now`.
    centre_u, centre_nu : array
        Centres of the proximal terms.
    stiffest, loosest : array
        Largest tau and sigma.
    fine : bool array
        Whose products are in float64.
    zigzag : bool array
        Whose last round was cut off after `_PATIENCE` steps.
    within : bool array
        Whose gap and violation are within tolerance.
    stalled : int array
        Rounds without progress.
    last_steps : int array
        Newton steps at the last judgement.
    """

    shared: Shared
    units: Units
    slack: float
    accuracy: float
    now: Points
    works: list[Work]
    z: np.ndarray
    c: np.ndarray
    centre_u: np.ndarray
    centre_nu: np.ndarray
    stiffest: np.ndarray
    loosest: np.ndarray
    fine: np.ndarray
    zigzag: np.ndarray
    within: np.ndarray
    stalled: np.ndarray
    last_steps: np.ndarray


def _begin(
    shared: Shared,
    units: Units,
    points: Points,
    slack: float,
    accuracy: float,
    left: list[Work | None] | None,
) -> _Block:
    """Make the products at the given points, and the working sets."""
    now = points.take(slice(None))
    now.u[~units.allowed] = 0.0
    count = len(now.u)
    precision = precision_for(shared, slack, accuracy)
    fine = np.full(count, precision is np.float64)
    z = _responses(shared, now.u, fine)
    rough = 2 * max(accuracy, _INNER * _COARSE)
    if not fine.all() and noise(shared, units, 0, now.u[0], z[0], slack) > rough:
        fine[:] = True
        z = _responses(shared, now.u, fine)
    c = _duals(shared, now.nu, fine)
    works = []
    for b, work in enumerate(left or [None] * count):
        if work is None:
            work = Work.build(shared, units, b, now.u[b], c[b], precision)
        elif precision is np.float64:
            work.refine(shared, units, b)
        works.append(work)
    return _Block(
        shared=shared,
        units=units,
        slack=slack,
        accuracy=accuracy,
        now=now,
        works=works,
        z=z,
        c=c,
        centre_u=now.u.copy(),
        centre_nu=now.nu.copy(),
        stiffest=now.tau * _STIFFEST,
        loosest=now.sigma * _LOOSEST,
        fine=fine,
        zigzag=np.zeros(count, dtype=bool),
        within=np.zeros(count, dtype=bool),
        stalled=np.zeros(count, dtype=int),
        last_steps=now.steps.copy(),
    )


def _newton_steps(block: _Block, open_: np.ndarray, max_steps: int) -> None:
    """Minimise each open unit's F about its centre, then make the block's products anew."""
    shared, units, now = block.shared, block.units, block.now
    nu = _multipliers(block.z, block.centre_nu, units, now.tau, block.slack, open_)
    fitted = _duals(shared, np.where(units.active[open_], nu, 0.0), block.fine[open_])
    for b, gradient in zip(open_.tolist(), fitted, strict=True):
        limit = now.steps[b] + _PATIENCE
        turn = Turn(
            z=block.z[b],
            gradient=gradient,
            centre_u=block.centre_u[b],
            centre_nu=block.centre_nu[b],
            slack=block.slack,
            accuracy=block.accuracy,
            max_steps=min(max_steps, limit),
        )
        block.works[b].run(shared, units, now, b, turn)
        block.zigzag[b] = now.steps[b] == limit < max_steps
    block.z[open_] = _responses(shared, now.u[open_], block.fine[open_])
    for b in open_.tolist():
        block.z[b, block.works[b].seen] = block.works[b].responses
    now.nu[open_] = _multipliers(block.z, block.centre_nu, units, now.tau, block.slack, open_)
    block.c[open_] = _duals(shared, now.nu[open_], block.fine[open_])


def _settled(block: _Block, open_: np.ndarray, max_steps: int) -> list[int]:
    """The open units whose working sets need nothing more, or whose steps are used up."""
    now = block.now
    return [
        b
        for b in open_.tolist()
        if not block.works[b].enlarge(
            block.shared, block.units, b, now.nu[b], block.c[b], block.accuracy
        )
        or now.steps[b] >= max_steps
    ]


def _judge(block: _Block, b: int, tolerance: float, violation: float) -> None:
    """Measure a unit's gap and violation; go over to float64 where float32 can tell no more."""
    now = block.now
    before = now.gap[b], now.violation[b]
    _measure(block.shared, block.units, now, b, block.z[b], block.c[b], block.slack)
    gap, missed = now.gap[b], now.violation[b]
    block.within[b] = gap <= tolerance and missed <= violation
    # Where the parameters are at their limits and nothing moves, only rounding is left.
    at_limit = now.tau[b] >= block.stiffest[b] or now.steps[b] == block.last_steps[b]
    better = bool(gap < 0.9 * before[0] or missed < 0.9 * before[1])
    block.stalled[b] = 0 if better or not at_limit else block.stalled[b] + 1
    vain = block.zigzag[b] or not better or max(gap, missed) <= _COARSE
    if not block.within[b] and not block.fine[b] and vain:
        block.fine[b], block.stalled[b] = True, 0
        block.z[b] = block.shared.inputs @ now.u[b]  # the steps that led here began in float32
    elif not block.within[b] and not better and block.works[b].refine(block.shared, block.units, b):
        block.stalled[b] = 0
    block.last_steps[b] = now.steps[b]


def _advance(block: _Block, b: int) -> None:
    """Move a unit's centre and tighten its parameters; after a zigzag loosen tau instead."""
    now = block.now
    if block.zigzag[b]:
        now.tau[b] /= _GROWTH**2
    elif not block.within[b]:
        block.centre_u[b], block.centre_nu[b] = now.u[b], now.nu[b]
        now.sigma[b] = min(now.sigma[b] * _GROWTH, block.loosest[b])
        now.tau[b] = min(now.tau[b] * _GROWTH, block.stiffest[b])


def _responses(shared: Shared, u: np.ndarray, fine: np.ndarray) -> np.ndarray:
    """Xu of some units, in float64 for the fine ones."""
    return _apart(lambda rows, inputs: rows @ inputs.T, shared, u, fine)


def _duals(shared: Shared, nu: np.ndarray, fine: np.ndarray) -> np.ndarray:
    """X^T nu of some units, in float64 for the fine ones."""
    return _apart(lambda rows, inputs: rows @ inputs, shared, nu, fine)


def noise(
    shared: Shared, units: Units, b: int, u: np.ndarray, z: np.ndarray, slack: float
) -> float:
    """How far the rounding of a unit's z moves X^T nu on Omega, where nu = (z - y) / s, by box.

    From some samples alone: sums of roundings grow with the root of their number.

    Parameters
    ----------
    shared : Shared
        Inputs and penalty, the same for all units.
    units : Units
        Data of a block of units.
    b : int
        Number of the unit in the block.
    u : ndarray, shape (n_in,)
        The unit's weights.
    z : ndarray, shape (n_samples,)
        Its responses, as the steps have moved them.
    slack : float
        s, above 0.

    Returns
    -------
    float
        In units of each input's box.
    """
    part = slice(0, _SOME)
    inputs = shared.inputs[part]
    rounding = np.where(units.active[b, part], z[part] - inputs @ u, 0.0)
    growth = math.sqrt(len(z) / len(inputs))
    return growth * float((np.abs(rounding @ inputs) / shared.box).max(initial=0.0)) / slack


def _apart(
    product: Callable[[np.ndarray, np.ndarray], np.ndarray],
    shared: Shared,
    rows: np.ndarray,
    fine: np.ndarray,
) -> np.ndarray:
    """Products of the fine rows in float64 and of the others in float32."""
    if fine.all() or shared.single is None:
        return product(rows, shared.inputs)
    coarse = product(rows.astype(np.float32), shared.single).astype(np.float64)
    if fine.any():
        coarse[fine] = product(rows[fine], shared.inputs)
    return coarse


def _multipliers(
    z: np.ndarray,
    centre: np.ndarray,
    units: Units,
    tau: np.ndarray,
    slack: float,
    rows: np.ndarray,
) -> np.ndarray:
    """nu(u) of `newton_unit`, from z = Xu, for some units."""
    out = np.empty((len(rows), z.shape[1]))
    for k, b in enumerate(rows):
        _multiplier(z[b], centre[b], units.level[b], units.active[b], tau[b], slack, out[k])
    return out


@njit(cache=True, nogil=True)
def _multiplier(z, centre, level, active, tau, slack, out):  # type: ignore[no-untyped-def]
    for j in range(len(z)):
        pushed = centre[j] + tau * (z[j] - level[j])
        out[j] = pushed / (1 + tau * slack) if active[j] else max(pushed, 0.0)


def _measure(
    shared: Shared,
    units: Units,
    points: Points,
    b: int,
    z: np.ndarray,
    c: np.ndarray,
    slack: float,
) -> None:
    """Estimate gap and violation. The program's certificate, not this, judges the result."""
    linear, square, residual, over = _sums(z, points.nu[b], units.level[b], units.active[b])
    u, weight, ridge = points.u[b], shared.weight, shared.ridge
    objective = float(weight @ np.abs(u) + 0.5 * ridge @ u**2)
    size = np.abs(np.where(units.allowed[b], c, 0.0))
    scale = 1.0
    if not ridge.any():
        boxed = weight > 0
        scale = 1 / max(1.0, float(np.max(size[boxed] / weight[boxed], initial=0.0)))
    bound = scale * linear
    if math.isfinite(slack):
        bound -= 0.5 * slack * scale**2 * square
    if ridge.any():
        excess = np.maximum(size - weight, 0.0)[ridge > 0]
        bound -= float(np.sum(excess**2 / (2 * ridge[ridge > 0])))
    missed = math.sqrt(over)
    if slack == 0:
        missed = math.hypot(missed, math.sqrt(residual))
    elif math.isfinite(slack):
        objective += residual / (2 * slack)
    larger = max(abs(objective), abs(bound), float(units.floor[b]))
    points.gap[b] = abs(objective - bound) / larger if larger > 0 else 0.0
    points.violation[b] = missed / units.scale[b]
    points.residual[b] = math.sqrt(residual)


@njit(cache=True, nogil=True, fastmath={"reassoc", "contract"})
def _sums(z, nu, level, active):  # type: ignore[no-untyped-def]
    """-<nu, level>, |nu_Omega|^2, the squared residual on Omega and over the ceilings."""
    linear, square, residual, over = 0.0, 0.0, 0.0, 0.0
    for j in range(len(z)):
        difference = z[j] - level[j]
        on = 1.0 if active[j] else 0.0
        above = max(difference, 0.0)
        linear -= nu[j] * level[j]
        square += on * nu[j] * nu[j]
        residual += on * difference * difference
        over += (1.0 - on) * above * above
    return linear, square, residual, over


def _clean(
    shared: Shared,
    units: Units,
    points: Points,
    rows: np.ndarray,
    c: np.ndarray,
    slack: float,
    tolerance: float,
    violation: float,
) -> None:
    """Set to zero the weights whose responses are within the tolerance, if the estimates allow it.

    Where the multiplier is not unique, the proximal one may touch a bound that another does not,
    and then its weight is as small as the last step was.
    """
    for part in (10 * tolerance, tolerance):
        response = np.abs(points.u[rows]) * shared.lengths
        small = (response <= part * units.scale[rows, None]) & (points.u[rows] != 0)
        small &= shared.weight > 0
        some = small.any(axis=1)
        rows, small = rows[some], small[some]
        if not len(rows):
            return
        cut = points.take(rows)
        cut.u[small] = 0.0
        z = cut.u @ shared.inputs.T
        some_units = Units(*(getattr(units, name)[rows] for name in Units.__annotations__))
        failed = []
        for k in range(len(rows)):
            _measure(shared, some_units, cut, k, z[k], c[rows[k]], slack)
            if not (cut.gap[k] <= tolerance and cut.violation[k] <= violation):
                failed.append(k)
        kept = np.setdiff1d(np.arange(len(rows)), failed)
        points.put(rows[kept], cut.take(kept))
        rows = rows[failed]
