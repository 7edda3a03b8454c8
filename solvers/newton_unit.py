"""One unit of a layer program by semismooth Newton on its regularised augmented Lagrangian.

With s = 1 / (2 fit_weight), the slack of the fit (0: fitted exactly), a unit of (11) is

    minimise  phi(u) + |(Xu - y)_Omega|^2 / (2 s)     subject to  Xu <= v off Omega,

phi(u) = sum_i weight_i |u_i| + ridge_i u_i^2 / 2. The proximal method of multipliers, with centres
(u_k, nu_k) and parameters sigma, tau, takes the saddle point of

    phi(u) + <nu, Xu> - g*(nu) + |u - u_k|^2 / (2 sigma) - |nu - nu_k|^2 / (2 tau),

g*(nu) = <nu, level> + s |nu_Omega|^2 / 2 for nu >= 0 off Omega. The maximum over nu is explicit,

    on Omega   nu = (nu_k + tau (Xu - y)) / (1 + tau s)      with slope  D = tau / (1 + tau s),
    off Omega  nu = (nu_k + tau (Xu - v))_+                  with slope  D = tau where nu > 0,

and leaves F(u) = phi(u) + (convex, once differentiable, piecewise quadratic), strongly convex, with
smooth gradient X^T nu(u) + (u - u_k) / sigma and generalised Hessian X^T D X + I / sigma. It is
minimised over the inputs that are nonzero or whose |gradient| exceeds their weight (S), signs
theta: a step solves the |S| x |S| system

    (X_S^T D X_S + ridge + I / sigma) d = -(gradient + weight theta + ridge u)_S.

*Descent.* An input that is zero takes the sign against its gradient; if d_i disagrees, it leaves S
and the system is solved again. Then F'(u; d) = -d^T H d < 0. Inputs that d would take through zero
are stopped at zero, all at once, if that is still a direction of descent (it lies in the orthant of
theta, where F has no kink); else d itself is followed through its kinks. Either way the step is
exact: the derivative along it increases and is linear between breakpoints. F decreases strictly,
there are finitely many (theta, D), and near the solution, where they no longer change, a step is
Newton's and lands on it.

**Cost.** A step costs |S|^3/3 for the system, 4 P |S| for products, and 2 |S|^2 for each sample
whose ceiling came into play or left it: the Gram matrices of fitted and of active samples are kept
and updated. Both are over a set W of inputs, those near their bound; all inputs are looked at
before an inner solution counts as one.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
from numba import njit
from scipy.linalg import LinAlgError, cho_factor, cho_solve

_MARGIN = 0.15  # inputs with |c| above weight (1 - margin) join W
_GROWTH = 5.0  # of sigma and tau after an outer step
_CONDITION = 1e-11  # smallest 1/sigma relative to the mean of the Hessian's diagonal
_STIFFEST = 1e11  # largest tau relative to where it started
_ROUNDING = 1e-13
_FINEST = 1e-11  # of the optimality conditions in u, whose scale is 1
# Steps that gain less of the objective than this and do not improve the optimality conditions
# are rounding; after so many of them in a row an inner problem is as good as it gets.
_SMALLEST_GAIN, _IDLE = 1e-16, 3
_SHORT, _LONG, _DAMP, _FIRST_DAMPING = 0.1, 0.5, 10.0, 1e-5
_ROOT_STEPS = 80


@dataclass(frozen=True, eq=False)
class Unit:
    """One unit's data in float64, and what its solution is measured by.

    Attributes
    ----------
    rows : array, shape (n_in, n_samples)
        X^T, shared by all units.
    level : array, shape (n_samples,)
        What to fit on Omega, the ceiling off it.
    active : bool array, shape (n_samples,)
        Omega.
    weight, ridge : array, shape (n_in,)
        The penalty of each input; both zero for a free one.
    allowed : bool array, shape (n_in,)
        Inputs that may be nonzero.
    sizes : array, shape (n_in,)
        Norm of each input over the samples.
    objective_floor : float
        The gap is relative to the objective or to this, whichever is larger.
    response_scale : float
        What violations are relative to.
    """

    rows: np.ndarray
    level: np.ndarray
    active: np.ndarray
    weight: np.ndarray
    ridge: np.ndarray
    allowed: np.ndarray
    sizes: np.ndarray
    objective_floor: float
    response_scale: float


@dataclass(frozen=True, eq=False)
class Point:
    """Where a unit stands: weights, multiplier, parameters, and the last measure of it.

    Attributes
    ----------
    u, nu : array, shape (n_in,), (n_samples,)
        Weights, exactly zero off their support, and multiplier.
    sigma, tau : float
        Proximal parameters to go on with.
    steps : int
        Newton steps so far.
    gap, violation : float
        By the unit's own estimate.
    residual : float
        |(Xu - y)_Omega|.
    """

    u: np.ndarray
    nu: np.ndarray
    sigma: float
    tau: float
    steps: int = 0
    gap: float = math.inf
    violation: float = math.inf
    residual: float = math.inf


def solve_unit(
    unit: Unit, point: Point, slack: float, tolerance: float, violation: float, max_steps: int
) -> Point:
    """Go on from a point until the unit's own estimates are within tolerance.

    Parameters
    ----------
    slack : float
        s = 1 / (2 fit_weight); 0 fits Omega exactly, infinity not at all.
    tolerance, violation : float
        On the gap and on the violation.
    max_steps : int
        Limit on ``point.steps``.

    Returns
    -------
    Point
        ``steps == max_steps`` or a gap or violation above what was asked tells of a failure.
    """
    stiffest = point.tau * _STIFFEST
    point = replace(point, u=np.where(unit.allowed, point.u, 0.0))
    work = _Working.build(unit, point.u, unit.rows @ point.nu)
    stalled = 0
    while point.steps < max_steps:
        accuracy = max(0.1 * min(tolerance, violation), _FINEST)
        before = point
        point, work, z, c = _inner(unit, work, point, slack, accuracy, max_steps)
        point = _measure(unit, point, z, c, slack)
        if point.gap <= tolerance and point.violation <= violation:
            return _cleaned(unit, point, z, c, slack, tolerance, violation)
        # Rounding is all that is left when the parameters are at their limits and nothing moves.
        at_limit = before.tau >= stiffest or point.steps == before.steps
        better = point.gap < 0.9 * before.gap or point.violation < 0.9 * before.violation
        stalled = 0 if better or not at_limit else stalled + 1
        if stalled >= 8:
            break
        point = replace(point, sigma=point.sigma * _GROWTH, tau=min(point.tau * _GROWTH, stiffest))
    return point


def _cleaned(
    unit: Unit,
    point: Point,
    z: np.ndarray,
    c: np.ndarray,
    slack: float,
    tolerance: float,
    violation: float,
) -> Point:
    """Set to zero the weights whose responses are within the tolerance, if the estimates allow it.

    Where the multiplier is not unique, the proximal one may touch a bound that another does not,
    and then its weight is as small as the last step was.
    """
    response = np.abs(point.u) * unit.sizes
    for part in (10 * tolerance, tolerance):
        small = (point.u != 0) & (response <= part * unit.response_scale) & (unit.weight > 0)
        if not small.any():
            return point
        without = z - point.u[small] @ unit.rows[small]
        cut = replace(point, u=np.where(small, 0.0, point.u))
        cleaned = _measure(unit, cut, without, c, slack)
        if cleaned.gap <= tolerance and cleaned.violation <= violation:
            return cleaned
    return point


@dataclass(eq=False)
class _Working:
    """The inputs W at work, their samples, and the Gram matrices over them."""

    inputs: np.ndarray
    rows: np.ndarray
    fitted: np.ndarray
    over: np.ndarray
    included: np.ndarray

    @staticmethod
    def build(unit: Unit, u: np.ndarray, c: np.ndarray) -> _Working:
        near = (u != 0) | (unit.weight == 0) | (np.abs(c) > unit.weight * (1 - _MARGIN))
        inputs = np.flatnonzero(near & unit.allowed)
        rows = np.ascontiguousarray(unit.rows[inputs])
        on_omega = rows[:, unit.active]
        nothing = np.zeros(len(unit.level), dtype=bool)
        square = np.zeros((len(inputs), len(inputs)))
        return _Working(inputs, rows, on_omega @ on_omega.T, square, nothing)

    def update(self, pushing: np.ndarray) -> None:
        """Bring the Gram matrix of the samples at their ceiling up to date."""
        added, gone = pushing & ~self.included, self.included & ~pushing
        if 2 * np.count_nonzero(added | gone) > np.count_nonzero(pushing):
            x = self.rows[:, pushing]
            self.over = x @ x.T
        else:
            for changed, sign in ((added, 1.0), (gone, -1.0)):
                if changed.any():
                    x = self.rows[:, changed]
                    self.over = self.over + sign * (x @ x.T)
        self.included = pushing.copy()


def _inner(
    unit: Unit, work: _Working, point: Point, slack: float, accuracy: float, max_steps: int
) -> tuple[Point, _Working, np.ndarray, np.ndarray]:
    """Minimise F for the centre `point`, to `accuracy` in the optimality conditions of u.

    Returns the new point, W, Xu and X^T nu.
    """
    sigma, tau, steps, damping = point.sigma, point.tau, point.steps, 0.0
    centre_u, centre_nu, u = point.u, point.nu, point.u.copy()
    while True:
        weight, ridge = unit.weight[work.inputs], unit.ridge[work.inputs]
        x, x_centre = u[work.inputs], centre_u[work.inputs]
        z = x @ work.rows
        least, idle = math.inf, 0
        while True:
            nu = _multiplier(z, centre_nu, unit.level, unit.active, tau, slack)
            gradient = work.rows @ nu + (x - x_centre) / sigma + ridge * x
            theta = np.where(x != 0, np.sign(x), -np.sign(gradient))
            free = (x != 0) | (weight == 0)
            moving = free | (np.abs(gradient) > weight)
            force = np.where(moving, gradient + weight * theta, 0.0)
            if np.max(np.abs(force), initial=0.0) <= accuracy or steps >= max_steps:
                break
            steps += 1
            work.update(~unit.active & (nu > 0))
            direction = _direction(
                work, force, theta, moving, free, ridge, sigma, tau, slack, damping
            )
            new, dz, t = _search(
                unit, work, x, x_centre, z, centre_nu, direction, force, theta, weight, ridge,
                sigma, tau, slack,
            )  # fmt: skip
            size = max(float(weight @ np.abs(x)), unit.objective_floor)
            resolved = -float(force @ direction) > _SMALLEST_GAIN * size
            largest = float(np.max(np.abs(force)))
            idle = 0 if resolved or largest < 0.9 * least else idle + 1
            least = min(least, largest)
            x, z = new, z + dz
            damping = _damped(damping, t)
            if idle > _IDLE:
                break  # rounding is all that is left
        u[work.inputs] = x
        c = unit.rows @ nu
        outside = unit.allowed & (np.abs(c) > unit.weight + accuracy)
        outside[work.inputs] = False
        if not outside.any() or steps >= max_steps:
            return replace(point, u=u, nu=nu, steps=steps), work, z, c
        work = _Working.build(unit, np.where(np.isin(np.arange(len(u)), work.inputs), 1.0, u), c)


def _damped(damping: float, t: float) -> float:
    """Damp the next step more after one that a breakpoint cut short, less after a long one."""
    if t < _SHORT:
        return max(_DAMP * damping, _FIRST_DAMPING)
    if t > _LONG:
        return damping / _DAMP if damping > _FIRST_DAMPING else 0.0
    return damping


def _multiplier(
    z: np.ndarray,
    centre: np.ndarray,
    level: np.ndarray,
    active: np.ndarray,
    tau: float,
    slack: float,
) -> np.ndarray:
    """nu(u) of the module's docstring, from z = Xu."""
    pushed = centre + tau * (z - level)
    return np.where(active, pushed / (1 + tau * slack), np.maximum(pushed, 0.0))


def _direction(
    work: _Working,
    force: np.ndarray,
    theta: np.ndarray,
    moving: np.ndarray,
    free: np.ndarray,
    ridge: np.ndarray,
    sigma: float,
    tau: float,
    slack: float,
    damping: float,
) -> np.ndarray:
    """Newton's direction over W, zero outside S; S loses the zeros that it moves the wrong way."""
    chosen = np.flatnonzero(moving)
    on_omega = tau / (1 + tau * slack)
    hessian = on_omega * work.fitted[np.ix_(chosen, chosen)]
    hessian += tau * work.over[np.ix_(chosen, chosen)]
    mean = float(np.trace(hessian)) / len(chosen)
    hessian[np.diag_indices_from(hessian)] += ridge[chosen] + max(
        1 / sigma, (_CONDITION + damping) * mean
    )
    direction = np.zeros(len(force))
    kept = np.arange(len(chosen))
    while len(kept):
        ids = chosen[kept]
        d = _solve_positive(hessian[np.ix_(kept, kept)], -force[ids])
        wrong = ~free[ids] & (d * theta[ids] <= 0)
        if not wrong.any():
            direction[ids] = d
            return direction
        kept = kept[~wrong]
    # Everything that is nonzero is stationary: one violator alone moves the right way.
    worst = int(np.argmax(np.abs(force)))
    place = int(np.flatnonzero(chosen == worst)[0])
    direction[worst] = -force[worst] / hessian[place, place]
    return direction


def _solve_positive(matrix: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Solve a positive definite system; where rounding spoils it, with a larger diagonal."""
    shift = 0.0
    mean = float(np.trace(matrix)) / len(matrix)
    while True:
        try:
            factor = cho_factor(matrix + shift * np.eye(len(matrix)) if shift else matrix)
            return cho_solve(factor, right)
        except LinAlgError:
            shift = max(100 * shift, 1e-13 * mean)


def _search(
    unit: Unit,
    work: _Working,
    x: np.ndarray,
    x_centre: np.ndarray,
    z: np.ndarray,
    centre_nu: np.ndarray,
    direction: np.ndarray,
    force: np.ndarray,
    theta: np.ndarray,
    weight: np.ndarray,
    ridge: np.ndarray,
    sigma: float,
    tau: float,
    slack: float,
) -> tuple[np.ndarray, np.ndarray, float]:
    """Exact step along the direction cut at zeros, or along the direction through its kinks."""
    target = x + direction
    crossing = (x != 0) & (weight > 0) & (target * theta < 0)
    cut = np.where(crossing, -x, direction)
    slope = float(force @ cut)
    follow = cut if slope <= 0.1 * float(force @ direction) else direction
    kinks = np.flatnonzero(crossing) if follow is direction else np.zeros(0, dtype=int)
    times = -x[kinks] / direction[kinks]
    order = np.argsort(times, kind="stable")
    kinks, times = kinks[order], times[order]
    jumps = np.cumsum(2 * weight[kinks] * np.abs(direction[kinks]))
    dz = follow @ work.rows
    # The slope of everything but the samples: linear in t, with a jump at each kink.
    at_zero = float((weight * theta + ridge * x + (x - x_centre) / sigma) @ follow)
    curvature = float(((ridge + 1 / sigma) * follow * follow).sum())
    t, landed = _exact_step(
        z, dz, centre_nu, unit.level, unit.active, tau, slack, at_zero, curvature, times, jumps
    )
    new = x + t * follow
    if follow is cut and t == 1.0:
        new[crossing] = 0.0
    if landed >= 0:
        new[kinks[landed]] = 0.0
    return new, t * dz, t


@njit(cache=True, nogil=True)
def _sample_slope(z, dz, centre, level, active, tau, slack, t):  # type: ignore[no-untyped-def]
    """<nu(z + t dz), dz> and its derivative in t."""
    slope, curvature = 0.0, 0.0
    share = 1 / (1 + tau * slack)
    for j in range(len(z)):
        pushed = centre[j] + tau * (z[j] + t * dz[j] - level[j])
        if active[j]:
            slope += share * pushed * dz[j]
            curvature += share * tau * dz[j] * dz[j]
        elif pushed > 0:
            slope += pushed * dz[j]
            curvature += tau * dz[j] * dz[j]
    return slope, curvature


@njit(cache=True, nogil=True)
def _exact_step(  # type: ignore[no-untyped-def]
    z, dz, centre, level, active, tau, slack, at_zero, curvature, times, jumps
):
    """Smallest t in [0, 1] where the slope of F along the direction turns nonnegative, else 1.

    `times` are the kinks, in order, `jumps` the slope's jumps up to and with each. Returns t, and
    the number of the kink it lies on or -1.
    """
    low, high = 0, len(times)  # the first kink behind which the slope is >= 0
    while low < high:
        middle = (low + high) // 2
        t = times[middle]
        slope = _sample_slope(z, dz, centre, level, active, tau, slack, t)[0]
        if slope + at_zero + t * curvature + jumps[middle] >= 0:
            high = middle
        else:
            low = middle + 1
    jump = jumps[low - 1] if low > 0 else 0.0
    left = times[low - 1] if low > 0 else 0.0
    right = times[low] if low < len(times) else 1.0
    slope, _ = _sample_slope(z, dz, centre, level, active, tau, slack, right)
    if slope + at_zero + right * curvature + jump <= 0:
        return right, (low if low < len(times) else -1)
    # The root lies inside (left, right), where the slope is continuous and piecewise linear.
    t = right
    for _ in range(_ROOT_STEPS):
        slope, bend = _sample_slope(z, dz, centre, level, active, tau, slack, t)
        slope += at_zero + t * curvature + jump
        bend += curvature
        if slope > 0:
            right = t
        else:
            left = t
        following = t - slope / bend if bend > 0 else 0.5 * (left + right)
        if not left < following < right:
            following = 0.5 * (left + right)
        if abs(following - t) <= _ROUNDING * right:
            break
        t = following
    return t, -1


def _measure(unit: Unit, point: Point, z: np.ndarray, c: np.ndarray, slack: float) -> Point:
    """Estimate gap and violation. The program's certificate, not this, judges the result."""
    residual = np.where(unit.active, z - unit.level, 0.0)
    over = np.where(unit.active, 0.0, np.maximum(z - unit.level, 0.0))
    penalty = float(unit.weight @ np.abs(point.u) + 0.5 * unit.ridge @ point.u**2)
    c = np.where(unit.allowed, c, 0.0)
    fitted = point.nu[unit.active]
    linear, square = -float(point.nu @ unit.level), float(fitted @ fitted)
    excess = np.maximum(np.abs(c) - unit.weight, 0.0)
    ridged = unit.ridge > 0
    scale = 1.0
    if not ridged.any():
        boxed = unit.weight > 0
        scale = 1 / max(1.0, float(np.max(np.abs(c[boxed]) / unit.weight[boxed], initial=0.0)))
    bound = scale * linear
    if math.isfinite(slack):
        bound -= 0.5 * slack * scale**2 * square
    if ridged.any():
        bound -= float(np.sum(excess[ridged] ** 2 / (2 * unit.ridge[ridged])))
    objective, missed = penalty, float(np.linalg.norm(over))
    if slack == 0:
        missed = math.hypot(missed, float(np.linalg.norm(residual)))
    elif math.isfinite(slack):
        objective += float(residual @ residual) / (2 * slack)
    size = max(abs(objective), abs(bound), unit.objective_floor)
    gap = abs(objective - bound) / size if size > 0 else 0.0
    return replace(
        point,
        gap=gap,
        violation=missed / unit.response_scale,
        residual=float(np.linalg.norm(residual)),
    )
