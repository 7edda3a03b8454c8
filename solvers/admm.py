"""ADMM for all units of a layer at once, in graph form, with one factorisation a layer.

Both programs read: minimise f(u) + g(z) subject to z = Xu, with f the penalty (and the mask) and g
the fit and the ceilings, all units side by side. With the metric |u|^2 + tau |z|^2 and the scaled
multipliers p, q an iteration is

    w = prox of f / rho at u - p                 the sparse weights
    v = prox of g / (rho tau) at z - q           the responses, in the ball and under the ceilings
    (a, c) = alpha (w, v) + (1 - alpha) (u, z) + (p, q)                     over-relaxation
    (u, z) = projection of (a, c) onto {z = Xu}
    (p, q) = (a, c) - (u, z)

rho cancels from the projection, so it may differ by unit and change for free; only tau is in the
factor. The projection is, with the eigenvectors of the smaller Gram matrix computed once,

    tall X:  u = (I + tau X^T X)^-1 (a + tau X^T c),     z = Xu
    wide X:  e = (I + tau X X^T)^-1 (c - Xa),            z = c - e,   u = a + tau X^T e

(the second by the push-through identity). p = -tau X^T q holds after each projection, so that
nu = -rho tau q, which the prox of g keeps a subgradient, has X^T nu = rho p: the multiplier whose
bound the certificate takes.

**Stopping** is on the certificate of the sparse weights w, rounded to the data's dtype: gap and
violations as the program itself computes them, in float64. Residuals only steer rho.

**Scale.** tau = 5 N / |X|_F^2 and rho = rms input sqrt(N) / rms response make the iterates of
(aX, bY) those of (X, Y), scaled.

**Penalty.** After 20, 50, 95, ... iterations (by count, never by clock, so that results repeat) rho
is multiplied by the root of

    (|(w, v) - (u, z)| / |(w, v)|)  /  (|change of (u, z)| / |(p, q)|),

clipped to [0.1, 10]: relative residuals, since the textbook's absolute ones run away on these
programs. In the constrained form the ball ties the units and they share one rho; in the regularised
form each has its own.

References
----------
Parikh, Boyd, Block splitting for distributed optimization (2014), section on graph form.
Boyd et al., Distributed optimization and statistical learning via ADMM (2011), section 3.4.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from array_api_compat import array_namespace, device

from solvers.program import (
    ConstrainedProgram,
    LayerProgram,
    Program,
    RegularisedProgram,
    like,
)
from solvers.result import Certificate, SolveResult, judge

Array = Any

RELAXATION = 1.6
_METRIC = 5.0
_FIRST_CHECK = 50
_FIRST_ADAPTATION = 20
_WIDEN = 1.5
_LARGEST_FACTOR = 10.0
_DEADBAND = 1.3
# Of the distance from the tolerances, at most this share may be left after two checks.
_PROGRESS = 0.8


@dataclass(frozen=True, eq=False)
class Factor:
    """What all solves on the same inputs share: eigenvectors of the smaller Gram matrix.

    Attributes
    ----------
    vectors : array, shape (r, r), float64
        Eigenvectors of X^T X when X is tall, of X X^T when it is wide; r = min(P, N).
    values : array, shape (r,), float64
        The eigenvalues.
    squared_norm : float
        |X|_F^2.
    seconds : float
        Wall time it took.
    """

    vectors: Array
    values: Array
    squared_norm: float
    seconds: float


def prepare(inputs: Array) -> Factor:
    """Factorise the inputs once for any number of solves.

    Parameters
    ----------
    inputs : array, shape (n_samples, n_in)
        X.

    Returns
    -------
    Factor
        Cost: one product X^T X (or X X^T) and one symmetric eigenproblem of size min(P, N), in
        float64.
    """
    started = time.perf_counter()
    xp = array_namespace(inputs)
    wide = xp.astype(inputs, xp.float64)
    gram = wide.T @ wide if inputs.shape[0] >= inputs.shape[1] else wide @ wide.T
    values, vectors = xp.linalg.eigh(gram)
    values = xp.maximum(values, xp.zeros_like(values))
    return Factor(vectors, values, float(xp.sum(values)), time.perf_counter() - started)


def metric(program: LayerProgram, factor: Factor) -> float:
    """The tau of |u|^2 + tau |z|^2: the weight of responses beside weights."""
    squared_norm = factor.squared_norm if factor.squared_norm > 0 else 1.0
    return _METRIC * program.shape[1] / squared_norm


@dataclass(frozen=True, eq=False)
class _Splitting:
    """A program's data in the working dtype, with the metric and its inverse."""

    program: Program
    inputs: Array
    level: Array
    tau: float
    inverse: Array
    penalised: Array | None

    @staticmethod
    def build(program: Program, factor: Factor, dtype: Any) -> _Splitting:
        xp = array_namespace(program.inputs)
        tau = metric(program, factor)
        inverse = (factor.vectors / (1 + tau * factor.values)) @ factor.vectors.T
        penalised = None
        if program.free_rows:
            mask = np.ones((program.shape[1], 1), dtype=bool)
            mask[list(program.free_rows)] = False
            penalised = like(mask, program.inputs)
        return _Splitting(
            program,
            xp.astype(program.inputs, dtype, copy=False),
            xp.astype(program.level, dtype, copy=False),
            tau,
            xp.astype(inverse, dtype, copy=False),
            penalised,
        )

    def project(self, a: Array, c: Array) -> tuple[Array, Array]:
        """Project onto the graph {z = Xu} in the metric |u|^2 + tau |z|^2."""
        n_samples, n_in = self.inputs.shape
        if n_samples >= n_in:
            u = self.inverse @ (a + self.tau * (self.inputs.T @ c))
            return u, self.inputs @ u
        e = self.inverse @ (c - self.inputs @ a)
        return a + self.tau * (self.inputs.T @ e), c - e

    def prox_penalty(self, t: Array, rho: Array) -> Array:
        """Prox of f / rho: the penalty on the penalised rows, the mask everywhere."""
        xp = array_namespace(t)
        if self.program.support is not None:
            # Before the shrinkage: an entry held at zero must not count in its group's norm.
            t = xp.where(self.program.support, t, xp.zeros_like(t))
        if self.penalised is None:
            return self.program.penalty.prox(t, 1 / rho)
        shrunk = self.program.penalty.prox(xp.where(self.penalised, t, xp.zeros_like(t)), 1 / rho)
        return xp.where(self.penalised, shrunk, t)

    def prox_response(self, t: Array, rho: Array) -> Array:
        """Prox of g / (rho tau): the ball or the fit on Omega, the ceilings off it."""
        xp = array_namespace(t)
        under = xp.minimum(t, self.level)
        if isinstance(self.program, ConstrainedProgram):
            residual = xp.where(self.program.active, t - self.level, xp.zeros_like(t))
            size = _norm(residual)
            shrink = min(1.0, self.program.epsilon / size) if size > 0 else 1.0
            return xp.where(self.program.active, self.level + shrink * residual, under)
        weight = 2 * self.program.fit_weight / (rho * self.tau)
        return xp.where(self.program.active, (t + weight * self.level) / (1 + weight), under)


@dataclass(frozen=True, eq=False)
class _State:
    """Iterates (u, z), scaled multipliers (p, q), the proximal points (w, v), the penalty rho."""

    u: Array
    z: Array
    p: Array
    q: Array
    w: Array
    v: Array
    rho: Array

    def astype(self, dtype: Any) -> _State:
        xp = array_namespace(self.u)
        names = ("u", "z", "p", "q", "w", "v", "rho")
        return _State(**{name: xp.astype(getattr(self, name), dtype) for name in names})


def solve_admm(
    program: Program,
    *,
    tolerance: float = 1e-4,
    violation_tolerance: float | None = None,
    max_iterations: int = 5000,
    warm_start: SolveResult | None = None,
    factor: Factor | None = None,
) -> SolveResult:
    """Solve a layer program for all units at once by graph-form ADMM.

    ::

        minimise  penalty(U) [+ fit_weight |(XU - y)_Omega|^2]
        subject to  [|(XU - y)_Omega|_F <= epsilon,]  XU <= v off Omega

    Parameters
    ----------
    program : ConstrainedProgram or RegularisedProgram
        Numpy or torch arrays, float32 or float64, on any device. Float32 data is iterated on in
        float32 until two checks in a row gain little, then in float64.
    tolerance : float
        On the gap.
    violation_tolerance : float, optional
        On the violations; the same as `tolerance` by default.
    max_iterations : int
        Limit on the iterations.
    warm_start : SolveResult, optional
        A result for the same inputs and shapes (another epsilon, fit weight or level); the old
        weights otherwise, zero without any.
    factor : Factor, optional
        `prepare(program.inputs)`, when several solves share the inputs.

    Returns
    -------
    SolveResult
        Weights exactly zero where they are pruned. On failure the last point, with a status that
        says so; this function does not raise for want of convergence.

    Raises
    ------
    ValueError
        If a tolerance or the iteration limit is not positive, or a warm start or a factor does not
        fit.

    Notes
    -----
    An iteration costs ``M (4 N P + 2 min(N, P)^2)`` flops, a check of the certificate one float64
    pair of products. Memory: about ten arrays (n_samples, n_out) in the working dtype.
    Unlike the paper, which solves (14) unit by unit, all units advance together, and the
    constrained form, which the paper leaves out, is solved by the same iteration.

    References
    ----------
    Aghasi et al., Net-Trim (2017), equations (4), (6), (11).
    """
    violation_tolerance = tolerance if violation_tolerance is None else violation_tolerance
    for name, value in (("tolerance", tolerance), ("violation_tolerance", violation_tolerance)):
        if not value > 0:
            raise ValueError(f"{name}: want a positive number, got {value!r}")
    if max_iterations < 1:
        raise ValueError(f"max_iterations: want at least 1, got {max_iterations!r}")
    xp = array_namespace(program.inputs)
    order = min(program.inputs.shape)
    if factor is not None and factor.values.shape[0] != order:
        raise ValueError(
            f"factor: want that of inputs {tuple(program.inputs.shape)}, of order {order}, "
            f"got one of order {factor.values.shape[0]}"
        )
    reused = factor is not None
    factor = prepare(program.inputs) if factor is None else factor
    started = time.perf_counter()

    dtype = program.inputs.dtype
    splitting = _Splitting.build(program, factor, dtype)
    state = _start(splitting, factor, warm_start)
    best = _Best(program)
    history: list[dict[str, float]] = []
    width, adapt_at, check_at = float(_FIRST_ADAPTATION), _FIRST_ADAPTATION, _FIRST_CHECK
    iteration, diverged = 0, False
    while iteration < max_iterations:
        iteration += 1
        previous, state = state, _step(splitting, state)
        if iteration == adapt_at:
            primal, dual = _residuals(splitting, previous, state)
            diverged = not math.isfinite(float(xp.max(primal)))
            if diverged:
                break
            state = _balance(state, primal, dual)
            width *= _WIDEN
            adapt_at += int(width)
        if iteration in (check_at, max_iterations):
            certified = best.offer(splitting, state, tolerance, violation_tolerance)
            history.append(best.row(iteration))
            if bool(np.all(certified)):
                break
            if dtype != xp.float64 and _stalled(history, tolerance, violation_tolerance):
                dtype = xp.float64
                splitting = _Splitting.build(program, factor, dtype)
                state = state.astype(dtype)
            check_at += max(25, min(iteration // 4, 250))

    if not history:
        best.offer(splitting, state, tolerance, violation_tolerance)
    certificate = best.certificate
    certified = certificate.within(tolerance, violation_tolerance)
    finite = not diverged and bool(np.all(np.isfinite(certificate.objective)))
    return SolveResult(
        weight=best.weight,
        multiplier=best.multiplier,
        status=judge(certified, finite=finite, exhausted=iteration >= max_iterations),
        certificate=certificate,
        certified=certified,
        iterations=iteration,
        solver="admm",
        setup_seconds=0.0 if reused else factor.seconds,
        solve_seconds=time.perf_counter() - started,
        penalty_parameter=state.rho,
        history=tuple(history),
    )


def _stalled(
    history: Sequence[dict[str, float]], tolerance: float, violation_tolerance: float
) -> bool:
    """Tell whether two checks in a row gained little: float32 has then given what it can."""
    distances = [
        max(row["gap"] / tolerance, row["violation"] / violation_tolerance) for row in history[-3:]
    ]
    return len(distances) == 3 and distances[2] > _PROGRESS * distances[0]


def _norm(array: Array) -> float:
    """Frobenius norm, safe from overflow in float32 squares."""
    xp = array_namespace(array)
    return float(xp.linalg.vector_norm(xp.astype(array, xp.float64, copy=False)))


def _step(splitting: _Splitting, state: _State) -> _State:
    """One iteration, as in the module's docstring."""
    w = splitting.prox_penalty(state.u - state.p, state.rho)
    v = splitting.prox_response(state.z - state.q, state.rho)
    a = RELAXATION * w + (1 - RELAXATION) * state.u + state.p
    c = RELAXATION * v + (1 - RELAXATION) * state.z + state.q
    u, z = splitting.project(a, c)
    return _State(u, z, a - u, c - z, w, v, state.rho)


def _start(splitting: _Splitting, factor: Factor, warm_start: SolveResult | None) -> _State:
    """First point: the warm start's, or the old weights, which are feasible."""
    program = splitting.program
    xp = array_namespace(splitting.inputs)
    n_samples, n_in, n_out = program.shape
    dtype = splitting.inputs.dtype
    shared = isinstance(program, ConstrainedProgram)
    rms_input = math.sqrt(factor.squared_norm / (n_samples * n_in)) or 1.0
    rms_response = _norm(splitting.level) / math.sqrt(n_samples * n_out)
    rho0 = rms_input * math.sqrt(n_in) / rms_response if rms_response > 0 else 1.0
    rho = xp.full((() if shared else (n_out,)), rho0, dtype=dtype, device=device(splitting.inputs))
    if warm_start is not None:
        for name, array, want in (
            ("weights", warm_start.weight, (n_in, n_out)),
            ("a multiplier", warm_start.multiplier, (n_samples, n_out)),
        ):
            if tuple(array.shape) != want:
                raise ValueError(
                    f"warm_start: want {name} of shape {want}, got {tuple(array.shape)}"
                )
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
    return _State(u, z, p, q, u, z, rho)


def _residuals(splitting: _Splitting, previous: _State, state: _State) -> tuple[Array, Array]:
    """Relative primal and dual residuals: scalars where rho is shared, by unit where it is not."""
    xp = array_namespace(state.u)

    def size(du: Array, dz: Array) -> Array:
        axis = None if state.rho.ndim == 0 else 0
        squares = xp.sum(du * du, axis=axis, dtype=xp.float64) + splitting.tau * xp.sum(
            dz * dz, axis=axis, dtype=xp.float64
        )
        return xp.sqrt(squares)

    def relative(residual: Array, scale: Array) -> Array:
        return residual / xp.where(scale > 0, scale, xp.ones_like(scale))

    # w and v were computed from the previous (u, z), so that is the point to compare them with.
    primal = relative(size(state.w - state.u, state.v - state.z), size(state.w, state.v))
    dual = relative(size(state.u - previous.u, state.z - previous.z), size(state.p, state.q))
    return primal, dual


def _balance(state: _State, primal: Array, dual: Array) -> _State:
    """Change rho so that the two relative residuals shrink together."""
    xp = array_namespace(primal)
    measurable = (primal > 0) & (dual > 0)
    ratio = xp.where(measurable, primal, xp.ones_like(primal)) / xp.where(
        measurable, dual, xp.ones_like(dual)
    )
    factor = xp.clip(xp.sqrt(ratio), 1 / _LARGEST_FACTOR, _LARGEST_FACTOR)
    small = (factor < _DEADBAND) & (factor > 1 / _DEADBAND)
    factor = xp.astype(xp.where(small, xp.ones_like(factor), factor), state.rho.dtype)
    return replace(state, rho=state.rho * factor, p=state.p / factor, q=state.q / factor)


class _Best:
    """The best evidence so far: a bound never gets worse, and a certified unit is left alone.

    A lower bound holds whatever the weights are, so the best multiplier of all checks is kept. In
    the regularised form both are kept unit by unit.
    """

    def __init__(self, program: Program) -> None:
        self.program = program
        self.weight: Array = None
        self.multiplier: Array = None
        self.certificate: Certificate
        self._bound: np.ndarray

    def offer(
        self, splitting: _Splitting, state: _State, tolerance: float, violation_tolerance: float
    ) -> np.ndarray:
        """Judge the current point, keep what is better, and tell which units are certified."""
        program = self.program
        xp = array_namespace(program.inputs)
        weight = xp.astype(state.w, program.inputs.dtype)
        for multiplier in _multipliers(splitting, state, weight):
            bound = program.dual_bound(multiplier)
            if self.multiplier is None:
                self.multiplier, self._bound = multiplier, bound
            else:
                better = bound > self._bound
                self.multiplier = _choose(better, multiplier, self.multiplier)
                self._bound = np.where(better, bound, self._bound)
        if self.weight is None or state.rho.ndim == 0:
            self.weight = weight
        else:
            done = self.certificate.within(tolerance, violation_tolerance)
            self.weight = _choose(done, self.weight, weight)
        self.certificate = program.certificate_beside(self.weight, self._bound)
        return self.certificate.within(tolerance, violation_tolerance)

    def row(self, iteration: int) -> dict[str, float]:
        """One line of the history: the worst unit's gap and violation."""
        return {
            "iteration": iteration,
            "gap": float(np.max(self.certificate.gap)),
            "violation": float(np.max(self.certificate.violation)),
        }


def _choose(mask: np.ndarray, first: Array, second: Array) -> Array:
    """Take columns of `first` where the mask holds, of `second` elsewhere."""
    xp = array_namespace(first)
    return xp.where(like(np.asarray(mask), first), first, second)


def _multipliers(splitting: _Splitting, state: _State, weight: Array) -> list[Array]:
    """Candidates for the certificate's bound.

    ADMM's own and, in the regularised form, the same with the fit's exact gradient on Omega.
    """
    xp = array_namespace(state.q)
    own = -(state.rho * splitting.tau) * state.q
    program: LayerProgram = splitting.program
    if not isinstance(program, RegularisedProgram):
        return [own]
    gradient = (
        2
        * program.fit_weight
        * (splitting.inputs @ xp.astype(weight, state.q.dtype) - splitting.level)
    )
    return [own, xp.where(program.active, gradient, own)]
