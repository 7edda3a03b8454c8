"""A block of units side by side: the proximal method of multipliers with shared products.

Every unit runs the method of `newton_unit`, whose Newton steps see only the inputs W near their
bound and the ceilings K near to being met. What looks at all inputs and all samples, the responses
XU and the duals X^T nu, is a product for the whole block, three of them a round:

    X^T nu on Omega at the centre    where the units' own problems begin,
    XU, then X^T nu                  which tell whether an input outside W or a ceiling outside K
                                     belongs in (then they join, and the round is repeated for the
                                     same centre), and otherwise measure gap and violation.

A unit within its tolerances leaves the block. The Gram matrix of the fitted samples depends on W
alone: it is kept from round to round and grows with W.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numba import njit

from solvers.newton_unit import Gram, Inner, minimise

_MARGIN = 0.15  # inputs with |c| above weight (1 - margin) join W
_NEAR = 0.1  # ceilings closer than this part of the unit's rms distance to its ceilings join K
_GROWTH = 5.0  # of sigma and tau after an outer step
_STIFFEST = 1e11  # largest tau relative to where it started
_FINEST = 1e-11  # of the optimality conditions in u, whose scale is 1
_STALLED = 8  # rounds
_CHUNK = 8192  # samples whose inputs are gathered at a time


@dataclass(frozen=True, eq=False)
class Shared:
    """What all units of a layer share, in float64.

    Attributes
    ----------
    inputs : array, shape (n_samples, n_in)
        X.
    weight, ridge : array, shape (n_in,)
        The penalty of each input; both zero for a free one.
    lengths : array, shape (n_in,)
        Norm of each input over the samples.
    """

    inputs: np.ndarray
    weight: np.ndarray
    ridge: np.ndarray
    lengths: np.ndarray


@dataclass(frozen=True, eq=False)
class Units:
    """The data of some units, each a row.

    Attributes
    ----------
    level, active : array, shape (units, n_samples)
        What to fit on Omega, the ceiling off it; Omega.
    allowed : bool array, shape (units, n_in)
        Inputs that may be nonzero.
    floor : array, shape (units,)
        A gap is relative to the objective or to this, whichever is larger.
    scale : array, shape (units,)
        What violations are relative to.
    """

    level: np.ndarray
    active: np.ndarray
    allowed: np.ndarray
    floor: np.ndarray
    scale: np.ndarray


@dataclass(eq=False)
class Points:
    """Where some units stand, each a row.

    Attributes
    ----------
    u, nu : array, shape (units, n_in), (units, n_samples)
        Weights, exactly zero off their support, and multipliers.
    sigma, tau : array, shape (units,)
        Proximal parameters to begin with.
    steps : int array, shape (units,)
        Newton steps so far.
    gap, violation, residual : array, shape (units,)
        By the units' own estimates; |(Xu - y)_Omega|.
    """

    u: np.ndarray
    nu: np.ndarray
    sigma: np.ndarray
    tau: np.ndarray
    steps: np.ndarray
    gap: np.ndarray
    violation: np.ndarray
    residual: np.ndarray

    @staticmethod
    def at(u: np.ndarray, nu: np.ndarray, sigma: np.ndarray, tau: np.ndarray) -> Points:
        """Points nothing is known of yet."""
        count, unknown = len(u), np.full(len(u), math.inf)
        steps = np.zeros(count, dtype=int)
        return Points(u, nu, sigma, tau, steps, unknown, unknown.copy(), unknown.copy())

    def take(self, rows: slice | np.ndarray) -> Points:
        """Copy some of them."""
        return Points(*(np.array(getattr(self, name)[rows]) for name in self.__annotations__))

    def put(self, rows: slice | np.ndarray, others: Points) -> None:
        """Write others over some of them; the first sigma and tau stay."""
        for name in ("u", "nu", "steps", "gap", "violation", "residual"):
            getattr(self, name)[rows] = getattr(others, name)


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
    accuracy = max(0.1 * min(tolerance, violation), _FINEST)
    now = points.take(slice(None))
    now.u[~units.allowed] = 0.0
    stiffest = now.tau * _STIFFEST
    centre_u, centre_nu = now.u.copy(), now.nu.copy()
    z, c = now.u @ shared.inputs.T, now.nu @ shared.inputs
    works = [
        Work.build(shared, units, b, now.u[b], c[b]) if work is None else work
        for b, work in enumerate(left or [None] * len(z))
    ]
    last_steps, stalled = now.steps.copy(), np.zeros(len(z), dtype=int)
    within = np.zeros(len(z), dtype=bool)
    open_ = np.flatnonzero(now.steps < max_steps)
    while len(open_):
        nu = _multipliers(z, centre_nu, units, now.tau, slack, open_)
        fitted = np.where(units.active[open_], nu, 0.0) @ shared.inputs
        for b, gradient in zip(open_.tolist(), fitted, strict=True):
            works[b].run(
                shared, units, now, b, z[b], gradient, centre_u[b], centre_nu[b], slack, accuracy,
                max_steps,
            )  # fmt: skip
        z[open_] = now.u[open_] @ shared.inputs.T
        for b in open_.tolist():
            z[b, works[b].seen] = works[b].responses
        now.nu[open_] = _multipliers(z, centre_nu, units, now.tau, slack, open_)
        c[open_] = now.nu[open_] @ shared.inputs
        settled = [
            b
            for b in open_.tolist()
            if not works[b].enlarge(shared, units, b, now.nu[b], c[b], accuracy)
            or now.steps[b] >= max_steps
        ]
        for b in settled:
            before = now.gap[b], now.violation[b]
            _measure(shared, units, now, b, z[b], c[b], slack)
            gap, missed = now.gap[b], now.violation[b]
            within[b] = gap <= tolerance and missed <= violation
            # Rounding is all that is left when the parameters are at their limits and nothing
            # moves.
            at_limit = now.tau[b] >= stiffest[b] or now.steps[b] == last_steps[b]
            better = gap < 0.9 * before[0] or missed < 0.9 * before[1]
            stalled[b] = 0 if better or not at_limit else stalled[b] + 1
            last_steps[b] = now.steps[b]
            if not within[b]:
                centre_u[b], centre_nu[b] = now.u[b], now.nu[b]
                now.sigma[b] *= _GROWTH
                now.tau[b] = min(now.tau[b] * _GROWTH, stiffest[b])
        lost = ~np.isfinite(z).all(axis=1)
        done = within | (now.steps >= max_steps) | (stalled >= _STALLED) | lost
        open_ = open_[~done[open_]]
    _clean(shared, units, now, np.flatnonzero(within), c, slack, tolerance, violation)
    return now, works


@dataclass(eq=False)
class Work:
    """A unit's working sets and Gram matrices.

    Attributes
    ----------
    inputs : int array, shape (|W|,)
    fitted : array, shape (|W|, |W|)
        X_W^T X_W over Omega.
    over : Gram
        The same over the ceilings in play.
    extra : bool array, shape (n_samples,)
        Ceilings that turned out to belong in K.
    seen, responses : array, shape (|K|,)
        The K of the last run, and its responses after it.
    """

    inputs: np.ndarray
    fitted: np.ndarray
    over: Gram
    extra: np.ndarray
    seen: np.ndarray
    responses: np.ndarray

    @property
    def size(self) -> int:
        """Bytes it takes."""
        return 16 * len(self.inputs) ** 2 + 2 * len(self.extra)

    @staticmethod
    def build(shared: Shared, units: Units, b: int, u: np.ndarray, c: np.ndarray) -> Work:
        """Begin with the inputs that are nonzero or near their bound."""
        near = (u != 0) | (shared.weight == 0) | (np.abs(c) > shared.weight * (1 - _MARGIN))
        inputs = np.flatnonzero(near & units.allowed[b])
        nothing = np.zeros(len(shared.inputs), dtype=bool)
        square = np.zeros((len(inputs), len(inputs)))
        fitted = _gram(shared.inputs, np.flatnonzero(units.active[b]), inputs, inputs)
        none = np.zeros(0, dtype=int)
        return Work(inputs, fitted, Gram(square, nothing), nothing.copy(), none, np.zeros(0))

    def run(
        self,
        shared: Shared,
        units: Units,
        now: Points,
        b: int,
        z: np.ndarray,
        gradient: np.ndarray,
        centre_u: np.ndarray,
        centre_nu: np.ndarray,
        slack: float,
        accuracy: float,
        max_steps: int,
    ) -> None:
        """Minimise the unit's F over W and K, and write the weights and the steps to `now`."""
        level, tau, sigma = units.level[b], float(now.tau[b]), float(now.sigma[b])
        distance = np.where(units.active[b], 0.0, z - level)
        width = _NEAR * math.sqrt(float(distance @ distance) / max(1, len(z)))
        near = (distance > -width) | (centre_nu + tau * distance > 0) | self.extra
        samples = np.flatnonzero((near & ~units.active[b]) | self.over.included)
        inner = Inner(
            samples,
            _gather(shared.inputs, samples, self.inputs),
            level[samples],
            centre_nu[samples],
            shared.weight[self.inputs],
            shared.ridge[self.inputs],
            centre_u[self.inputs],
            self.fitted,
            0.0 if math.isinf(slack) else tau / (1 + tau * slack),
            sigma,
            tau,
            float(units.floor[b]),
        )
        left = max_steps - int(now.steps[b])
        x, self.responses, steps = minimise(
            inner,
            self.over,
            now.u[b, self.inputs],
            z[samples],
            gradient[self.inputs],
            accuracy,
            left,
        )
        now.u[b, self.inputs] = x
        now.steps[b] += steps
        self.seen = samples

    def enlarge(
        self,
        shared: Shared,
        units: Units,
        b: int,
        nu: np.ndarray,
        c: np.ndarray,
        accuracy: float,
    ) -> bool:
        """Take in the inputs and the ceilings that the last solution wants; tell if there are."""
        pushed = ~units.active[b] & (nu > 0)
        pushed[self.seen] = False
        self.extra |= pushed
        size = np.abs(c)
        outside = units.allowed[b] & (size > shared.weight + accuracy)
        outside[self.inputs] = False
        if outside.any():
            near = units.allowed[b] & (size > shared.weight * (1 - _MARGIN))
            near[self.inputs] = False
            self._add(shared, np.flatnonzero(near), np.flatnonzero(units.active[b]))
        return bool(pushed.any() or outside.any())

    def _add(self, shared: Shared, new: np.ndarray, fitted: np.ndarray) -> None:
        """Let inputs join W: their rows of the Gram matrices beside the ones there are."""
        everything = np.concatenate([self.inputs, new])
        for name, samples in (
            ("fitted", fitted),
            ("over", np.flatnonzero(self.over.included)),
        ):
            old = self.fitted if name == "fitted" else self.over.matrix
            size = len(self.inputs)
            wider = np.zeros((len(everything), len(everything)))
            wider[:size, :size] = old
            wider[size:] = _gram(shared.inputs, samples, new, everything)
            wider[:size, size:] = wider[size:, :size].T
            if name == "fitted":
                self.fitted = wider
            else:
                self.over.matrix = wider
        self.inputs = everything


@njit(cache=True, nogil=True)
def _gather(inputs, samples, columns):  # type: ignore[no-untyped-def]
    """inputs[samples][:, columns], without the copy between."""
    out = np.empty((len(samples), len(columns)))
    for j in range(len(samples)):
        row = inputs[samples[j]]
        for i in range(len(columns)):
            out[j, i] = row[columns[i]]
    return out


def _gram(
    inputs: np.ndarray, samples: np.ndarray, left: np.ndarray, right: np.ndarray
) -> np.ndarray:
    """X_left^T X_right over some samples, a chunk of them at a time."""
    total = np.zeros((len(left), len(right)))
    for start in range(0, len(samples), _CHUNK):
        chunk = samples[start : start + _CHUNK]
        first = _gather(inputs, chunk, left)
        second = first if left is right else _gather(inputs, chunk, right)
        total += first.T @ second
    return total


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
