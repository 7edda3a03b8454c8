"""The iteration of ADMM in graph form, for all units of a layer at once.

Both programs read: minimise f(u) + g(z) subject to z = Xu, with f the penalty (and the mask) and g
the fit and the ceilings, all units side by side. With the metric |u|^2 + tau |z|^2 and the scaled
multipliers p, q an iteration is

    w = prox of f / rho at u - p                 the sparse weights
    v = prox of g / (rho tau) at z - q           the responses, in the ball and under the ceilings
    (a, c) = alpha (w, v) + (1 - alpha) (u, z) + (p, q)                     over-relaxation
    (u, z) = projection of (a, c) onto {z = Xu}
    (p, q) = (a, c) - (u, z)

rho cancels from the projection, so it may differ by unit and change for free; only tau is in the
factor. The projection is, with the inverse computed once,

    tall X:  u = (I + tau X^T X)^-1 (a + tau X^T c),     z = Xu
    wide X:  e = (I + tau X X^T)^-1 (c - Xa),            z = c - e,   u = a + tau X^T e

(the second by the push-through identity). p = -tau X^T q holds after each projection, so that
nu = -rho tau q, which the prox of g keeps a subgradient, has X^T nu = rho p: the multiplier whose
bound the certificate takes.

**Scale.** tau = 5 N / |X|_F^2 and rho = rms input sqrt(N) / rms response make the iterates of
(aX, bY) those of (X, Y), scaled.

**Penalty.** After 20, 50, 95, ... iterations (by count, never by clock, so that results repeat) rho
is multiplied by the root of

    (|(w, v) - (u, z)| / |(w, v)|)  /  (|change of (u, z)| / |(p, q)|),

clipped to [0.1, 10]: relative residuals, since the textbook's absolute ones run away on these
programs. An `emphasis` above 1 multiplies the first of them: it asks for a larger rho, and so for
smaller violations beside the gap. In the constrained form the ball ties the units and they share
one rho; in the regularised form each has its own.

References
----------
Parikh, Boyd, Block splitting for distributed optimization (2014), section on graph form.
Boyd et al., Distributed optimization and statistical learning via ADMM (2011), section 3.4.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from array_api_compat import array_namespace, device, is_numpy_array
from numba import njit

from solvers.arrays import like, norm, to_numpy
from solvers.program import ConstrainedProgram, LayerProgram, Program
from solvers.result import SolveResult
from solvers.scaling import Scaling, Sizes

Array = Any
Walk = Callable[["Splitting", "State", int], "State"]

RELAXATION, METRIC = 1.6, 5.0
"""Over-relaxation (below 2, where convergence is proven), and the weight of responses beside
weights in the metric (`metric`). Twice the second moves the responses less in each iteration. Tuned
on the layers of the bench."""

_FIRST_ADAPTATION = 20
"""Iterations before rho first changes. Earlier, the residuals still tell of the starting point;
twice as late, a bad first rho costs more iterations. Chosen by hand."""

_WIDEN = 1.5
"""Factor by which the distance between changes of rho grows: ADMM converges once rho stays. A
larger one fixes rho sooner. Chosen by hand."""

_LARGEST_FACTOR = 10.0
"""Largest change of rho at a time. Twice as much follows bad starts faster and overshoots more.
Chosen by hand."""

_DEADBAND = 1.3
"""Changes of rho by less than this factor are left out, since each rescales the multipliers. A
larger one leaves rho less well balanced. Chosen by hand."""

_ROUNDING = 16
"""Residuals below so many units of rounding tell nothing. Twice as many let rho rest sooner. Chosen
by hand, above the rounding seen."""

_SMALL = 1e-3
"""Size, relative to the targets, below which a unit's iterates are measured by the targets instead.
Twice as large: units that are nearly zero count as converged sooner. Chosen by hand."""


@dataclass(frozen=True, eq=False)
class Factor:
    """What all solves on the same inputs share: the smaller Gram matrix and the inputs' sizes.

    Attributes
    ----------
    gram : array, shape (r, r), float64
        X^T X when X is tall, X X^T when it is wide, of the inputs in a solver's units
        (`solvers.scaling`); r = min(P, N).
    squared_norm : float
        |X|_F^2 of the same.
    sizes : Sizes
        The units.
    seconds : float
        Wall time it took.
    """

    gram: Array
    squared_norm: float
    sizes: Sizes
    seconds: float


def prepare(inputs: Array) -> Factor:
    """Prepare the inputs once for any number of solves.

    Parameters
    ----------
    inputs : array, shape (n_samples, n_in)
        X.

    Returns
    -------
    Factor
        For the solvers' argument of that name.

    Notes
    -----
    Costs one product X^T X (or X X^T) in float64. A solve inverts I + tau times it.

    Examples
    --------
    >>> import numpy as np
    >>> from solvers import prepare, solve_admm, trim_program
    >>> rng = np.random.default_rng(0)
    >>> X, W = rng.standard_normal((50, 10)), rng.standard_normal((10, 3))
    >>> Y = np.maximum(X @ W, 0)
    >>> factor = prepare(X)
    >>> for size in (1.0, 2.0):
    ...     program = trim_program(X, Y, epsilon=size, old_weight=W)
    ...     print(solve_admm(program, factor=factor).status.value)
    solved
    solved
    """
    started = time.perf_counter()
    xp = array_namespace(inputs)
    wide = xp.astype(inputs, xp.float64)
    squares = xp.sum(wide * wide, axis=0) / inputs.shape[0]
    sizes = Sizes.of(to_numpy(xp.sqrt(squares)))
    wide = sizes.divide(wide)
    gram = wide.T @ wide if inputs.shape[0] >= inputs.shape[1] else wide @ wide.T
    return Factor(gram, float(xp.linalg.trace(gram)), sizes, time.perf_counter() - started)


def metric(program: LayerProgram, factor: Factor, size: float = METRIC) -> float:
    """The tau of |u|^2 + tau |z|^2, `size` N / |X|_F^2: the weight of responses beside weights.

    Parameters
    ----------
    program : LayerProgram
        The layer's program; its number of inputs counts.
    factor : Factor
        Factorisation of the inputs (`prepare`).
    size : float, optional
        Larger values move the responses less, and the weights more, in each iteration.

    Returns
    -------
    float
        tau, above 0.
    """
    squared_norm = factor.squared_norm if factor.squared_norm > 0 else 1.0
    return size * program.shape[1] / squared_norm


@dataclass(frozen=True, eq=False)
class Splitting:
    """A program's data in the working dtype, with the metric, its inverse and what steers steps.

    The program is in a solver's units (`solvers.scaling`), where `weights`, shape (n_in, 1), are
    the penalty's; None if all are 1.
    """

    program: Program
    inputs: Array
    level: Array
    tau: float
    inverse: Array
    penalised: Array | None
    relaxation: float
    emphasis: float | Array = 1.0
    weights: Array | None = None

    @staticmethod
    def build(
        scaling: Scaling,
        factor: Factor,
        dtype: Any,
        tau: float | None = None,
        relaxation: float = RELAXATION,
        emphasis: float | Array = 1.0,
    ) -> Splitting:
        """Cast a program in a solver's units to the dtype to iterate in.

        Parameters
        ----------
        scaling : Scaling
            The program, and the same in a solver's units.
        factor : Factor
            Factorisation of the inputs (`prepare`).
        dtype : dtype
            float32 or float64 of the arrays' namespace.
        tau : float, optional
            Weight of responses beside weights; `metric` by default.
        relaxation : float, optional
            Over-relaxation, between 1 and 2.
        emphasis : float or array, shape (n_out,), optional
            Factor on the primal residual when rho is balanced.

        Returns
        -------
        Splitting
            What the iterations need.
        """
        program = scaling.program
        xp = array_namespace(program.inputs)
        tau = metric(program, factor) if tau is None else tau
        order = factor.gram.shape[0]
        one = xp.eye(order, dtype=xp.float64, device=device(program.inputs))
        inverse = xp.linalg.inv(one + tau * factor.gram)
        penalised = None
        if program.free_rows:
            mask = np.ones((program.shape[1], 1), dtype=bool)
            mask[list(program.free_rows)] = False
            penalised = like(mask, program.inputs)
        weights = scaling.weights
        if weights is not None:
            weights = xp.astype(like(weights, program.inputs)[:, None], dtype)
        return Splitting(
            program,
            xp.astype(program.inputs, dtype, copy=False),
            xp.astype(program.level, dtype, copy=False),
            tau,
            xp.astype(inverse, dtype, copy=False),
            penalised,
            relaxation,
            emphasis,
            weights,
        )

    def project(self, a: Array, c: Array) -> tuple[Array, Array]:
        """Project onto the graph {z = Xu} in the metric |u|^2 + tau |z|^2.

        Parameters
        ----------
        a : array, shape (n_in, n_out)
            Point to project, weights.
        c : array, shape (n_samples, n_out)
            Point to project, responses.

        Returns
        -------
        array, shape (n_in, n_out)
            u of the nearest point of the graph.
        array, shape (n_samples, n_out)
            z = Xu there.
        """
        n_samples, n_in = self.inputs.shape
        if n_samples >= n_in:
            u = self.inverse @ (a + self.tau * (self.inputs.T @ c))
            return u, self.inputs @ u
        e = self.inverse @ (c - self.inputs @ a)
        return a + self.tau * (self.inputs.T @ e), c - e

    def prox_penalty(self, t: Array, rho: Array) -> Array:
        """Prox of f / rho: the penalty on the penalised rows, the mask everywhere.

        Parameters
        ----------
        t : array, shape (n_in, n_out)
            Where the prox is taken.
        rho : array, shape () or (n_out,)
            Penalty parameter, shared or by unit.

        Returns
        -------
        array, shape (n_in, n_out)
            Weights, exactly 0 where the penalty or the mask says so.
        """
        xp = array_namespace(t)
        if self.program.support is not None:
            # Before the shrinkage: an entry held at zero must not count in its group's norm.
            t = xp.where(self.program.support, t, xp.zeros_like(t))
        if self.penalised is None:
            return self._shrunk(t, rho)
        shrunk = self._shrunk(xp.where(self.penalised, t, xp.zeros_like(t)), rho)
        return xp.where(self.penalised, shrunk, t)

    def _shrunk(self, t: Array, rho: Array) -> Array:
        """Minimise penalty(w u) + rho |u - t|^2 / 2, by the penalty's own prox at w t."""
        penalty, weights = self.program.penalty, self.weights
        if weights is None:
            return penalty.prox(t, 1 / rho)
        return penalty.prox(weights * t, weights * weights / rho) / weights

    def shrinkage(self, z: Array, q: Array, rho: Array) -> Array:
        """What the prox of g / (rho tau) at z - q leaves of the distance to the targets.

        In the ball, min(1, epsilon / |(z - q - y)_Omega|); for the fit, 1 / (1 + weight) with
        weight = 2 fit_weight / (rho tau), unit by unit.

        Parameters
        ----------
        z : array, shape (n_samples, n_out)
            Responses.
        q : array, shape (n_samples, n_out)
            Scaled multipliers.
        rho : array, shape () or (n_out,)
            Penalty parameter, shared or by unit.

        Returns
        -------
        array, shape () or (n_out,)
            Factor from 0 to 1.
        """
        xp = array_namespace(z)
        if isinstance(self.program, ConstrainedProgram):
            if is_numpy_array(z):
                size = math.sqrt(_residual_square(z, q, self.level, self.program.active))
            else:
                t = z - q - self.level
                size = norm(xp.where(self.program.active, t, xp.zeros_like(t)))
            left = min(1.0, self.program.epsilon / size) if size > 0 else 1.0
            return xp.full((z.shape[1],), left, dtype=z.dtype, device=device(z))
        return 1 / (1 + 2 * self.program.fit_weight / (rho * self.tau))

    def prox_response(self, z: Array, q: Array, rho: Array) -> Array:
        """Prox of g / (rho tau) at z - q: the ball or the fit on Omega, the ceilings off it.

        Parameters
        ----------
        z : array, shape (n_samples, n_out)
            Responses.
        q : array, shape (n_samples, n_out)
            Scaled multipliers.
        rho : array, shape () or (n_out,)
            Penalty parameter, shared or by unit.

        Returns
        -------
        array, shape (n_samples, n_out)
            Responses that the constraints allow.
        """
        xp = array_namespace(z)
        t = z - q
        fitted = self.level + self.shrinkage(z, q, rho) * (t - self.level)
        return xp.where(self.program.active, fitted, xp.minimum(t, self.level))


@dataclass(frozen=True, eq=False)
class State:
    """Iterates (u, z), scaled multipliers (p, q), the sparse weights w, the penalty rho."""

    u: Array
    z: Array
    p: Array
    q: Array
    w: Array
    rho: Array

    def astype(self, dtype: Any) -> State:
        """Go on in another dtype.

        Parameters
        ----------
        dtype : dtype
            float32 or float64 of the arrays' namespace.

        Returns
        -------
        State
            The same point.
        """
        xp = array_namespace(self.u)
        names = ("u", "z", "p", "q", "w", "rho")
        return State(**{name: xp.astype(getattr(self, name), dtype) for name in names})


@dataclass(frozen=True, eq=False)
class Progress:
    """A state on its way: when rho changes next, and how long after the last change."""

    state: State
    iteration: int = 0
    change_at: int = _FIRST_ADAPTATION
    width: float = float(_FIRST_ADAPTATION)
    finite: bool = True


def advance(
    splitting: Splitting, progress: Progress, target: int, walk: Walk | None = None
) -> Progress:
    """Iterate up to the iteration `target`, changing rho on the way where it is due.

    The arrays of the state are overwritten. Ends early, with `finite` False, where the residuals
    are not finite.

    Parameters
    ----------
    splitting : Splitting
        The program as ADMM iterates on it: scaled data and the factorisation.
    progress : Progress
        Where the iteration stands.
    target : int
        Iteration to stop at.
    walk : callable, optional
        Takes iterations between changes of rho; `plain_walk` by default.

    Returns
    -------
    Progress
        At the iteration `target`, or earlier where it is not finite.
    """
    walk = plain_walk if walk is None else walk
    while progress.iteration < target:
        state, at = progress.state, progress.change_at
        if at > target:
            state = walk(splitting, state, target - progress.iteration)
            return replace(progress, state=state, iteration=target)
        state = walk(splitting, state, at - 1 - progress.iteration)
        u, z = state.u, state.z
        state, v = step(splitting, state)
        primal, dual = residuals(splitting, (u, z), state, v)
        xp = array_namespace(primal)
        if not math.isfinite(float(xp.max(primal))):
            return replace(progress, state=state, iteration=at, finite=False)
        width = progress.width * _WIDEN
        balanced = balance(state, splitting.emphasis * primal, dual)
        progress = Progress(balanced, at, at + int(width), width)
    return progress


def step(splitting: Splitting, state: State) -> tuple[State, Array]:
    """One iteration, as in the module's docstring; also returns v.

    Parameters
    ----------
    splitting : Splitting
        The program as ADMM iterates on it: scaled data and the factorisation.
    state : State
        Iterates u, z, the scaled multipliers p, q, the last w, and rho.

    Returns
    -------
    State
        After one iteration.
    array, shape (n_samples, n_out)
        v, the responses that the constraints allow.
    """
    alpha = splitting.relaxation
    w = splitting.prox_penalty(state.u - state.p, state.rho)
    v = splitting.prox_response(state.z, state.q, state.rho)
    a = alpha * w + (1 - alpha) * state.u + state.p
    c = alpha * v + (1 - alpha) * state.z + state.q
    u, z = splitting.project(a, c)
    return State(u, z, a - u, c - z, w, state.rho), v


def plain_walk(splitting: Splitting, state: State, count: int) -> State:
    """Take `count` iterations; for tall numpy arrays in place, each array passed over twice.

    Parameters
    ----------
    splitting : Splitting
        The program as ADMM iterates on it: scaled data and the factorisation.
    state : State
        Iterates u, z, the scaled multipliers p, q, the last w, and rho.
    count : int
        Iterations to take.

    Returns
    -------
    State
        After `count` iterations.
    """
    inputs = splitting.inputs
    if not is_numpy_array(inputs) or inputs.shape[0] < inputs.shape[1]:
        for _ in range(count):
            state, _ = step(splitting, state)
        return state
    u, z, p, q, w, rho = state.u, state.z, state.p, state.q, state.w, state.rho
    alpha = splitting.relaxation
    for _ in range(count):
        w = splitting.prox_penalty(u - p, rho)
        relax(splitting, z, q, rho)
        q += z  # q is c now
        a = alpha * w + (1 - alpha) * u + p
        u = splitting.inverse @ (a + splitting.tau * (inputs.T @ q))
        np.matmul(inputs, u, out=z)
        q -= z
        p = a - u
    return State(u, z, p, q, w, rho)


def relax(splitting: Splitting, z: np.ndarray, q: np.ndarray, rho: np.ndarray) -> None:
    """Overwrite q by c - z = alpha (v - z) + q, on numpy arrays in one pass.

    Parameters
    ----------
    splitting : Splitting
        The program as ADMM iterates on it: scaled data and the factorisation.
    z : ndarray, shape (n_samples, n_out)
        Responses.
    q : ndarray, shape (n_samples, n_out)
        Scaled multipliers; overwritten.
    rho : ndarray, shape () or (n_out,)
        Penalty parameter, shared or by unit.
    """
    alpha = z.dtype.type(splitting.relaxation)
    shrinkage = np.broadcast_to(splitting.shrinkage(z, q, rho), (z.shape[1],))
    _relax(z, q, splitting.level, splitting.program.active, shrinkage, alpha)


@njit(cache=True, nogil=True, fastmath={"reassoc", "contract"})
def _residual_square(z, q, level, active):  # type: ignore[no-untyped-def]
    """|(z - q - level)_Omega|^2, summed in float64."""
    total = 0.0
    for j in range(z.shape[0]):
        for m in range(z.shape[1]):
            difference = np.float64(z[j, m] - q[j, m] - level[j, m])
            total += difference * difference if active[j, m] else 0.0
    return total


@njit(cache=True, nogil=True)
def _relax(z, q, level, active, shrinkage, alpha):  # type: ignore[no-untyped-def]
    """Do what `relax` says."""
    for j in range(z.shape[0]):
        for m in range(z.shape[1]):
            y = level[j, m]
            t = z[j, m] - q[j, m]
            v = y + shrinkage[m] * (t - y) if active[j, m] else min(t, y)
            q[j, m] += alpha * (v - z[j, m])


def start(splitting: Splitting, factor: Factor, warm_start: SolveResult | None) -> State:
    """First point: the warm start's, in a solver's units, or the old weights', often feasible.

    Parameters
    ----------
    splitting : Splitting
        The program as ADMM iterates on it: scaled data and the factorisation.
    factor : Factor
        Factorisation of the inputs (`prepare`).
    warm_start : SolveResult or None
        Result to go on from, in the units of the splitting.

    Returns
    -------
    State
        First point.
    """
    program = splitting.program
    xp = array_namespace(splitting.inputs)
    n_samples, n_in, n_out = program.shape
    dtype = splitting.inputs.dtype
    shared = isinstance(program, ConstrainedProgram)
    rms_input = math.sqrt(factor.squared_norm / (n_samples * n_in)) or 1.0
    rms_response = norm(splitting.level) / math.sqrt(n_samples * n_out)
    rho0 = rms_input * math.sqrt(n_in) / rms_response if rms_response > 0 else 1.0
    rho0 *= _mean_weight(splitting)
    rho = xp.full((() if shared else (n_out,)), rho0, dtype=dtype, device=device(splitting.inputs))
    if warm_start is not None:
        if (
            warm_start.penalty_parameter is not None
            and warm_start.penalty_parameter.shape == rho.shape
        ):
            rho = xp.astype(warm_start.penalty_parameter, dtype)
        u = xp.astype(warm_start.weight, dtype)
        q = xp.astype(warm_start.multiplier, dtype) / (-rho * splitting.tau)
        p = -splitting.tau * (splitting.inputs.T @ q)
    else:
        old = program.old_weight
        shape = (n_in, n_out)
        u = (
            xp.zeros(shape, dtype=dtype, device=device(splitting.inputs))
            if old is None
            else xp.astype(old, dtype)
        )
        p = xp.zeros_like(u)
        q = xp.zeros_like(splitting.level)
    z = splitting.inputs @ u
    return State(u, z, p, q, u, rho)


def _mean_weight(splitting: Splitting) -> float:
    """Mean weight of the penalty, where the old weights are; 1 where the penalty has none."""
    program, weights = splitting.program, splitting.weights
    if weights is None:
        return 1.0
    xp = array_namespace(weights)
    old = (
        xp.ones_like(splitting.inputs[:1, :].T)
        if program.old_weight is None
        else program.old_weight
    )
    size = xp.abs(xp.astype(old, xp.float64))
    if splitting.penalised is not None:
        size = xp.where(splitting.penalised, size, xp.zeros_like(size))
    total = float(xp.sum(size))
    return float(xp.sum(weights * size)) / total if total > 0 else 1.0


def residuals(
    splitting: Splitting, previous: tuple[Array, Array], state: State, v: Array
) -> tuple[Array, Array]:
    """Relative primal and dual residuals: scalars where rho is shared, by unit where it is not.

    `previous` is (u, z) before the last step, v what that step made.

    Parameters
    ----------
    splitting : Splitting
        The program as ADMM iterates on it: scaled data and the factorisation.
    previous : pair of arrays
        u and z before the last step.
    state : State
        Iterates u, z, the scaled multipliers p, q, the last w, and rho.
    v : array, shape (n_samples, n_out)
        What the last step made of the responses.

    Returns
    -------
    array, shape () or (n_out,)
        Primal residual.
    array, shape () or (n_out,)
        Dual residual.
    """
    xp = array_namespace(state.u)

    def size(du: Array, dz: Array) -> Array:
        axis = None if state.rho.ndim == 0 else 0
        squares = xp.sum(du * du, axis=axis, dtype=xp.float64) + splitting.tau * xp.sum(
            dz * dz, axis=axis, dtype=xp.float64
        )
        return xp.sqrt(squares)

    def relative(residual: Array, scale: Array) -> Array:
        return residual / xp.where(scale > 0, scale, xp.ones_like(scale))

    # Units whose solution is zero, or all but, have no size of their own to be measured by.
    small = _SMALL * math.sqrt(splitting.tau / state.z.shape[-1]) * norm(splitting.level)
    iterates = size(state.w, v)
    primal = relative(
        size(state.w - state.u, v - state.z), xp.maximum(iterates, small * xp.ones_like(iterates))
    )
    u, z = previous
    dual = relative(size(state.u - u, state.z - z), size(state.p, state.q))
    return primal, dual


def balance(state: State, primal: Array, dual: Array) -> State:
    """Change rho so that the two relative residuals shrink together.

    A primal residual that is rounding tells nothing: a unit that is done keeps its rho. A dual one
    beside a primal one that is not (constraints that cannot be met leave such) counts as rounding.

    Parameters
    ----------
    state : State
        Iterates u, z, the scaled multipliers p, q, the last w, and rho.
    primal, dual : array, shape () or (n_out,)
        Relative residuals, as `residuals` gives them.

    Returns
    -------
    State
        The same point, with another rho and multipliers scaled to it.
    """
    xp = array_namespace(primal)
    rounding = _ROUNDING * xp.finfo(state.rho.dtype).eps
    measurable = primal > rounding
    ratio = xp.where(measurable, primal, xp.ones_like(primal)) / xp.where(
        measurable, xp.maximum(dual, rounding * xp.ones_like(dual)), xp.ones_like(dual)
    )
    factor = xp.clip(xp.sqrt(ratio), 1 / _LARGEST_FACTOR, _LARGEST_FACTOR)
    small = (factor < _DEADBAND) & (factor > 1 / _DEADBAND)
    factor = xp.astype(xp.where(small, xp.ones_like(factor), factor), state.rho.dtype)
    return replace(state, rho=state.rho * factor, p=state.p / factor, q=state.q / factor)
