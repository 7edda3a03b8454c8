"""One unit of a layer program by semismooth Newton on its regularised augmented Lagrangian.

With s = 1 / (2 fit_weight), the slack of the fit (0: fitted exactly), a unit of (11) is

    minimise  phi(u) + |(Xu - y)_Omega|^2 / (2 s)     subject to  Xu <= v off Omega,

phi(u) = sum_i weight_i |u_i| + ridge_i u_i^2 / 2. The proximal method of multipliers, with centres
(u_k, nu_k) and parameters sigma, tau, takes the saddle point of

    phi(u) + <nu, Xu> - g*(nu) + |u - u_k|^2 / (2 sigma) - |nu - nu_k|^2 / (2 tau),

g*(nu) = <nu, level> + s |nu_Omega|^2 / 2 for nu >= 0 off Omega. The maximum over nu is explicit,

    on Omega   nu = (nu_k + tau (Xu - y)) / (1 + tau s)      with slope  D = tau / (1 + tau s),
    off Omega  nu = (nu_k + tau (Xu - v))_+                  with slope  tau where nu > 0,

and leaves F(u) = phi(u) + (convex, once differentiable, piecewise quadratic), strongly convex, with
smooth gradient X^T nu(u) + (u - u_k) / sigma and a generalised Hessian. It is minimised here over
inputs W, those near their bound, with the ceilings K, those near to being met; `newton_block`
chooses both and looks at all inputs and all samples before a solution counts as one. On Omega F is
a quadratic, so that its samples are needed once, for their Gram matrix G = X_W^T X_W over Omega:
from a reference x0 on,

    X_W^T nu on Omega  =  its value at x0 + D G (x - x0).

**Step.** Over the inputs that are nonzero or whose |gradient| exceeds their weight (S), signs
theta, solve the |S| x |S| system

    (D G + tau X_K^T X_K [nu > 0] + ridge + I / sigma)_S d = -(gradient + weight theta + ridge u)_S.

*Descent.* An input that is zero takes the sign against its gradient; if d_i disagrees, it leaves S
and the system is solved again. Then F'(u; d) = -d^T H d < 0. Inputs that d would take through zero
are stopped at zero, all at once, if that is still a direction of descent (it lies in the orthant of
theta, where F has no kink); else d itself is followed through its kinks. Either way the step is
exact: the derivative along it increases and is linear between breakpoints. F decreases strictly,
there are finitely many (theta, D), and near the solution, where they no longer change, a step is
Newton's and lands on it.

**Cost.** A step costs |S|^3/3 for the system, 4 |K| |W| for products, and 2 |W|^2 for each ceiling
that came into play or left it, whose Gram matrix is kept and updated.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numba import njit
from scipy.linalg.lapack import dpotrf, dpotrs, dtrtrs

_CONDITION = 1e-11
"""Least that is added to the diagonal of the Hessian, relative to its mean, so that the system can
be solved in float64. A larger one slows the last steps."""

_ROUNDING = 1e-13
"""Change of the step's length, relative to the piece it lies on, below which it is found. A larger
one ends the line search sooner; a smaller one is below float64's rounding."""

_SMALLEST_GAIN, _IDLE = 1e-16, 3
"""Steps that gain less of the objective than the first and do not improve the optimality conditions
are rounding; after so many of them in a row, the second, an inner problem is as good as it gets.
More wait longer."""

_SHORT, _LONG, _DAMP, _FIRST_DAMPING = 0.1, 0.5, 10.0, 1e-5
"""Levenberg-Marquardt damping of a Newton step: a step cut below the first is followed by damping
ten times larger, one above the second by ten times less, from the first damping given, relative to
the Hessian's diagonal. Textbook values, not tuned."""

_ROOT_STEPS = 80
"""Steps for the root on one piece at most: Newton with bisection takes a few. Twice as many change
nothing."""

_LIGHT = 1e-2
"""Share of the slope's change below which a kink does not stop a step. A larger one jumps over more
kinks, whose weights then have to come back. Tuned on the layers of the bench."""


@dataclass(eq=False)
class Gram:
    """Gram matrix over W of the ceilings in play, brought up to date as they come and go.

    Attributes
    ----------
    matrix : array, shape (|W|, |W|)
    included : bool array, shape (n_samples,)
        The ceilings in it.
    """

    matrix: np.ndarray
    included: np.ndarray

    def update(self, samples: np.ndarray, rows: np.ndarray, pushing: np.ndarray) -> None:
        """Make it that of the pushing ones among `samples`, whose inputs are `rows`.

        Parameters
        ----------
        samples : int array
            Numbers of the ceilings in play.
        rows : array, shape (len(samples), |W|)
            Their inputs.
        pushing : bool array, shape (len(samples),)
            Which of them push.
        """
        included = self.included[samples]
        changed = pushing != included
        if not changed.any():
            return
        if 2 * np.count_nonzero(changed) > np.count_nonzero(pushing):
            x = rows[pushing]
            self.matrix = x.T @ x
        else:
            for some, sign in ((changed & pushing, 1.0), (changed & included, -1.0)):
                if some.any():
                    x = rows[some]
                    self.matrix = self.matrix + sign * (x.T @ x)
        self.included[samples] = pushing


@dataclass(frozen=True, eq=False)
class Inner:
    """F of one unit over W and K, for one centre.

    Attributes
    ----------
    samples : int array, shape (|K|,)
        The ceilings K.
    rows : array, shape (|K|, |W|)
        Their inputs.
    level, centre_nu : array, shape (|K|,)
        v and nu_k there.
    weight, ridge, box, centre_u : array, shape (|W|,)
        The penalty of each input, zero for a free one, what its dual is measured by, and u_k.
    fitted : array, shape (|W|, |W|)
        G.
    slope : float
        D.
    sigma, tau : float
        Proximal parameters.
    floor : float
        Objectives below this are as good as zero.
    """

    samples: np.ndarray
    rows: np.ndarray
    level: np.ndarray
    centre_nu: np.ndarray
    weight: np.ndarray
    ridge: np.ndarray
    box: np.ndarray
    centre_u: np.ndarray
    fitted: np.ndarray
    slope: float
    sigma: float
    tau: float
    floor: float


def minimise(
    inner: Inner,
    over: Gram,
    x: np.ndarray,
    z: np.ndarray,
    fitted_gradient: np.ndarray,
    accuracy: float,
    max_steps: int,
) -> tuple[np.ndarray, np.ndarray, int]:
    """Minimise F over W from x, to `accuracy` of the boxes in the optimality conditions.

    Parameters
    ----------
    inner : Inner
        The function F on the working set.
    accuracy : float
        How near 0 the optimality conditions must be, relative to the boxes.
    max_steps : int
        Newton steps at most.
    over : Gram
        Of the ceilings in play; it is brought up to date.
    x, z : array, shape (|W|,), (|K|,)
        Where to begin, and the responses there.
    fitted_gradient : array, shape (|W|,)
        X_W^T nu on Omega there.

    Returns
    -------
    x, z : array, shape (|W|,), (|K|,)
        z as the steps have moved it: close to v, where nu magnifies by tau what is between them,
        it is more accurate than X x, which has the rounding of all of x.
    steps : int
        Newton steps taken.
    """
    weight, ridge, sigma, tau = inner.weight, inner.ridge, inner.sigma, inner.tau
    steps, damping, least, idle = 0, 0.0, math.inf, 0
    while True:
        nu = np.maximum(inner.centre_nu + tau * (z - inner.level), 0.0)
        gradient = fitted_gradient + nu @ inner.rows
        gradient += (x - inner.centre_u) / sigma + ridge * x
        theta = np.where(x != 0, np.sign(x), -np.sign(gradient))
        free = (x != 0) | (weight == 0)
        moving = free | (np.abs(gradient) > weight)
        force = np.where(moving, gradient + weight * theta, 0.0)
        largest = float(np.max(np.abs(force) / inner.box, initial=0.0))
        lost = not math.isfinite(largest)
        if largest <= accuracy or steps >= max_steps or idle > _IDLE or lost:
            return x, z, steps
        steps += 1
        over.update(inner.samples, inner.rows, nu > 0)
        direction = _direction(inner, over.matrix, force, theta, moving, free, damping)
        x, dz, dg, t = _search(inner, x, z, fitted_gradient, direction, force, theta)
        z, fitted_gradient = z + dz, fitted_gradient + dg
        size = max(float(weight @ np.abs(x)), inner.floor)
        resolved = -float(force @ direction) > _SMALLEST_GAIN * size
        idle = 0 if resolved or largest < 0.9 * least else idle + 1
        least = min(least, largest)
        damping = _damped(damping, t)


def _damped(damping: float, t: float) -> float:
    """Damp the next step more after one that a breakpoint cut short, less after a long one."""
    if t < _SHORT:
        return max(_DAMP * damping, _FIRST_DAMPING)
    if t > _LONG:
        return damping / _DAMP if damping > _FIRST_DAMPING else 0.0
    return damping


def _direction(
    inner: Inner,
    over: np.ndarray,
    force: np.ndarray,
    theta: np.ndarray,
    moving: np.ndarray,
    free: np.ndarray,
    damping: float,
) -> np.ndarray:
    """Newton's direction over W, zero outside S; S loses the zeros that it moves the wrong way."""
    diagonal = inner.slope * np.diagonal(inner.fitted) + inner.tau * np.diagonal(over)
    mean = float(diagonal[moving].mean())
    extra = inner.ridge + max(1 / inner.sigma, (_CONDITION + damping) * mean)
    direction = np.zeros(len(force))
    # The zeros that may leave come last: what is eliminated before them serves any subset of them.
    first, last = np.flatnonzero(free), np.flatnonzero(moving & ~free)
    order = np.concatenate([first, last])
    hessian = np.empty((len(order), len(order)))
    _fill_upper(inner.slope, inner.fitted, inner.tau, over, extra, order, hessian)
    factor = _factorise(hessian)
    n = len(first)
    top, across, corner = factor[:n, :n], factor[n:, :n], factor[n:, n:]
    half = dtrtrs(top, -force[first], lower=1)[0] if n else np.zeros(0)
    left, right = corner @ corner.T, -force[last] - across @ half
    kept = np.arange(len(last))
    while len(kept):
        d = dpotrs(_factorise(left[kept[:, None], kept]), right[kept], lower=1)[0]
        wrong = d * theta[last[kept]] <= 0
        if not wrong.any():
            direction[last[kept]] = d
            half = half - d @ across[kept]
            break
        kept = kept[~wrong]
    if n:
        direction[first] = dtrtrs(top, half, lower=1, trans=1)[0]
    if n or len(kept):
        return direction
    # Everything that is nonzero is stationary: one violator alone moves the right way.
    worst = int(np.argmax(np.abs(force)))
    direction[worst] = -force[worst] / (diagonal[worst] + extra[worst])
    return direction


@njit(cache=True, nogil=True)
def _fill_upper(slope, fitted, tau, over, extra, order, out):  # type: ignore[no-untyped-def]
    """The Hessian over some inputs, in their order: its upper triangle."""
    for k in range(len(order)):
        i = order[k]
        for m in range(k, len(order)):
            j = order[m]
            out[k, m] = slope * fitted[i, j] + tau * over[i, j]
        out[k, k] += extra[i]


def _factorise(matrix: np.ndarray) -> np.ndarray:
    """Lower Cholesky factor, from the upper triangle; NaN gives NaN.

    Where rounding spoils it, that of the matrix with a larger diagonal.
    """
    shift = 0.0
    mean = float(np.trace(matrix)) / max(1, len(matrix))
    if not math.isfinite(mean):
        return np.full_like(matrix, math.nan)
    while True:
        shifted = matrix + shift * np.eye(len(matrix)) if shift else matrix
        factor, info = dpotrf(shifted.T, lower=1, clean=1)  # the transpose is in LAPACK's order
        if info == 0:
            return factor
        shift = max(100 * shift, 1e-13 * mean)


def _search(
    inner: Inner,
    x: np.ndarray,
    z: np.ndarray,
    fitted_gradient: np.ndarray,
    direction: np.ndarray,
    force: np.ndarray,
    theta: np.ndarray,
) -> tuple[np.ndarray, np.ndarray, np.ndarray, float]:
    """Exact step along the direction cut at zeros, or along the direction through its kinks.

    Returns the new x, the changes of z and of the gradient on Omega, and the step's length.
    """
    weight = inner.weight
    target = x + direction
    crossing = (x != 0) & (weight > 0) & (target * theta < 0)
    # A kink that changes the slope by next to nothing is no reason to stop at it.
    light = 2 * weight * np.abs(direction) < -_LIGHT * float(force @ direction)
    cut = np.where(crossing & ~light, -x, direction)
    follow = cut if float(force @ cut) <= 0.1 * float(force @ direction) else direction
    kinks = np.flatnonzero(crossing if follow is direction else crossing & light)
    times = -x[kinks] / direction[kinks]
    order = np.argsort(times, kind="stable")
    kinks, times = kinks[order], times[order]
    jumps = np.cumsum(2 * weight[kinks] * np.abs(direction[kinks]))
    dz = inner.rows @ follow
    dg = inner.slope * (inner.fitted @ follow)
    # The slope of everything but the ceilings: linear in t, with a jump at each kink.
    smooth = fitted_gradient + inner.ridge * x + (x - inner.centre_u) / inner.sigma
    at_zero = float((smooth + weight * theta) @ follow)
    curvature = float(((inner.ridge + 1 / inner.sigma) * follow + dg) @ follow)
    t, landed = exact_step(
        z, dz, inner.centre_nu, inner.level, inner.tau, at_zero, curvature, times, jumps
    )
    new = x + t * follow
    if follow is cut and t == 1.0:
        new[crossing & ~light] = 0.0
    if landed >= 0:
        new[kinks[landed]] = 0.0
    return new, t * dz, t * dg, t


@njit(cache=True, nogil=True)
def ceiling_slope(z, dz, centre, level, tau, t):  # type: ignore[no-untyped-def]
    """<nu(z + t dz), dz> over ceilings and its derivative in t.

    Parameters
    ----------
    z, dz : ndarray, shape (|K|,)
        Responses and their change along the direction.
    centre : ndarray, shape (|K|,)
        Multipliers at the proximal centre.
    level : ndarray, shape (|K|,)
        Ceilings.
    tau : float
        Weight of the proximal term.
    t : float
        Step.

    Returns
    -------
    float
        The slope.
    float
        Its derivative.
    """
    slope, curvature = 0.0, 0.0
    for j in range(len(z)):
        pushed = centre[j] + tau * (z[j] + t * dz[j] - level[j])
        if pushed > 0:
            slope += pushed * dz[j]
            curvature += tau * dz[j] * dz[j]
    return slope, curvature


@njit(cache=True, nogil=True)
def exact_step(  # type: ignore[no-untyped-def]
    z, dz, centre, level, tau, at_zero, curvature, times, jumps
):
    """Smallest t in [0, 1] where the slope of F along the direction turns nonnegative, else 1.

    `times` are the kinks, in order, `jumps` the slope's jumps up to and with each. Returns t, and
    the number of the kink it lies on or -1.

    Parameters
    ----------
    z, dz : ndarray, shape (|K|,)
        Responses and their change along the direction.
    centre : ndarray, shape (|K|,)
        Multipliers at the proximal centre.
    level : ndarray, shape (|K|,)
        Ceilings.
    tau : float
        Weight of the proximal term.
    at_zero, curvature : float
        Slope at 0, without the ceilings and the kinks, and its derivative.
    times, jumps : ndarray, shape (kinks,)
        As above.

    Returns
    -------
    float
        The step.
    int
        Number of the kink, or -1.
    """
    low, high = 0, len(times)  # the first kink behind which the slope is >= 0
    while low < high:
        middle = (low + high) // 2
        t = times[middle]
        slope = ceiling_slope(z, dz, centre, level, tau, t)[0]
        if slope + at_zero + t * curvature + jumps[middle] >= 0:
            high = middle
        else:
            low = middle + 1
    jump = jumps[low - 1] if low > 0 else 0.0
    left = times[low - 1] if low > 0 else 0.0
    right = times[low] if low < len(times) else 1.0
    slope, _ = ceiling_slope(z, dz, centre, level, tau, right)
    if slope + at_zero + right * curvature + jump <= 0:
        return right, (low if low < len(times) else -1)
    # The root lies inside (left, right), where the slope is continuous and piecewise linear.
    t = right
    for _ in range(_ROOT_STEPS):
        slope, bend = ceiling_slope(z, dz, centre, level, tau, t)
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
