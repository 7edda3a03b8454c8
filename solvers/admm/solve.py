"""ADMM for all units of a layer at once, with one factorisation a layer.

The iteration, its scale and its penalty are those of `solvers.admm.splitting`, its steps those of
`solvers.admm.increments`.
What a constraint leaves of the primal residual is a violation, and the gap is quicker to close, so
rho is made larger: it balances the dual residual with three times the primal one in the constrained
form, where over-relaxation is by 1.8, and with twice it in units of the regularised form that have
a ceiling. (Units with none have no violation to reduce, and crawl when rho is too large.) Against
1.6 and equal residuals it takes 20 to 60 % fewer iterations to 1e-4, most in the constrained form.

**Anderson acceleration** of these steps was tried and left out: type II on t = (u - p, z - q), all
that a step depends on, 5 to 20 steps on record, every 1 to 10 steps, safeguarded by the
residual of the step that follows. With one combination a unit in the regularised form it took 0 to
25 % fewer iterations to 1e-6 before rho was raised, 4 to 8 % in the mean after it, hardly any to
1e-4, and no less processor time. Where the slow steps are, active samples and weights still
change. It also upsets rho, unless the twenty steps before each change of it are plain, as a step
from an extrapolated point is large in what dies out soon. In the constrained form combinations by
unit are not safe, since the ball ties the units, and one for all gained nothing.

**Stopping** is on the certificate of the sparse weights w, rounded to the data's dtype: gap and
violations as the program itself computes them, in float64. Residuals only steer rho.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from array_api_compat import array_namespace, device

from solvers import checks
from solvers.admm.increments import walk_by_increments
from solvers.admm.splitting import Factor, Progress, Splitting, State, advance, prepare, start
from solvers.arrays import like
from solvers.program import (
    LayerProgram,
    Program,
    RegularisedProgram,
)
from solvers.reach import far
from solvers.result import Certificate, SolveResult, judge
from solvers.scaling import Scaling

Array = Any

_log = logging.getLogger(__name__)

_FIRST_CHECK = 50
"""Iteration of the first certificate; later ones come at growing distances. Twice as late saves
float64 products on hard layers and costs up to 50 iterations on easy ones. Chosen by hand."""

RELAXATION_BALL = 1.8
"""Over-relaxation of the constrained form; convergence is proven below 2. Tuned on the layers of
the bench: 1.6 takes more iterations, 2 would not converge."""

EMPHASIS_BALL, EMPHASIS_CEILING = 3.0, 2.0
"""Factor on the primal residual when rho is balanced, in the ball and with ceilings. Larger values
favour small violations over a small gap. Tuned on the layers of the bench."""

_PROGRESS = 0.8
"""Share of the lowest gap or violation so far that a check must reach to count as progress. A
larger share leaves float32 later; a smaller one leaves it while it still helps. Chosen by hand."""


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

    Examples
    --------
    >>> import numpy as np
    >>> from solvers import solve_admm, trim_program
    >>> rng = np.random.default_rng(0)
    >>> X, W = rng.standard_normal((50, 10)), rng.standard_normal((10, 3))
    >>> Y = np.maximum(X @ W, 0)
    >>> program = trim_program(X, Y, epsilon=0.1 * np.linalg.norm(Y), old_weight=W)
    >>> result = solve_admm(program)
    >>> result.status.value, bool(result.certificate.gap <= 1e-4)
    ('solved', True)
    """
    violation_tolerance = tolerance if violation_tolerance is None else violation_tolerance
    check_limits(tolerance, violation_tolerance, max_iterations)
    check_factor(program, factor)
    xp = array_namespace(program.inputs)
    reused = factor is not None
    factor = prepare(program.inputs) if factor is None else factor
    started = time.perf_counter()

    dtype = program.inputs.dtype
    scaling = Scaling.of(program, factor.sizes)
    splitting = splitting_of(scaling, factor, dtype)
    progress = Progress(start(splitting, factor, scaling.warm_start(warm_start)))
    best = _Best(program, scaling)
    history: list[dict[str, float]] = []
    check_at = _FIRST_CHECK
    while progress.iteration < max_iterations:
        target = min(check_at, max_iterations)
        progress = advance(splitting, progress, target, walk_by_increments)
        if not progress.finite:
            break
        certified = best.offer(splitting, progress.state, tolerance, violation_tolerance)
        history.append(best.row(progress.iteration))
        _log.debug("solving: ADMM, %d of at most %d iterations", progress.iteration, max_iterations)
        if bool(np.all(certified | best.unreachable)):
            break
        if dtype != xp.float64 and stalled(history, tolerance, violation_tolerance):
            dtype = xp.float64
            splitting = splitting_of(scaling, factor, dtype)
            progress = replace(progress, state=progress.state.astype(dtype))
        check_at += max(25, min(progress.iteration // 4, 250))

    if not history:
        best.offer(splitting, progress.state, tolerance, violation_tolerance)
    certificate = best.certificate
    certified = certificate.within(tolerance, violation_tolerance)
    finite = progress.finite and bool(np.all(np.isfinite(certificate.objective)))
    return SolveResult(
        weight=best.weight,
        multiplier=best.multiplier,
        status=judge(
            certified,
            finite=finite,
            exhausted=progress.iteration >= max_iterations,
            unreachable=bool(np.any(best.unreachable & ~certified)),
        ),
        certificate=certificate,
        certified=certified,
        iterations=progress.iteration,
        solver="admm",
        setup_seconds=0.0 if reused else factor.seconds,
        solve_seconds=time.perf_counter() - started,
        penalty_parameter=scaling.penalty_parameter_back(progress.state.rho),
        history=tuple(history),
    )


def splitting_of(scaling: Scaling, factor: Factor, dtype: Any) -> Splitting:
    """Build the splitting, with the relaxation and the emphasis of the module's docstring.

    Parameters
    ----------
    scaling : Scaling
        The program in a solver's units.
    factor : Factor
        Factorisation of the inputs (`prepare`).
    dtype : dtype
        float32 or float64 of the arrays' namespace.

    Returns
    -------
    Splitting
        What the iterations need.
    """
    program = scaling.program
    xp = array_namespace(program.inputs)
    if not isinstance(program, RegularisedProgram):
        tuning = {"relaxation": RELAXATION_BALL, "emphasis": EMPHASIS_BALL}
        return Splitting.build(scaling, factor, dtype, **tuning)
    ceilings = xp.any(~program.active, axis=0)
    one = xp.ones(ceilings.shape, dtype=xp.float64, device=device(program.inputs))
    emphasis = xp.where(ceilings, EMPHASIS_CEILING * one, one)
    return Splitting.build(scaling, factor, dtype, emphasis=emphasis)


def check_limits(tolerance: float, violation_tolerance: float, max_iterations: int) -> None:
    """Raise ValueError for limits that no solve can meet.

    Parameters
    ----------
    tolerance, violation_tolerance : float
        Largest relative gap and violation of a certified result.
    max_iterations : int
        Iterations at most.

    Raises
    ------
    ValueError
        If a tolerance is not positive and finite, or no iteration is allowed.
    """
    checks.positive(tolerance=tolerance, violation_tolerance=violation_tolerance)
    checks.count(1, max_iterations=max_iterations)


def check_factor(program: Program, factor: Factor | None) -> None:
    """Raise ValueError for a factor of other inputs, as far as its order tells.

    Parameters
    ----------
    program : ConstrainedProgram or RegularisedProgram
        The layer's program.
    factor : Factor or None
        What the caller passed; None passes.

    Raises
    ------
    ValueError
        If its order is not that of the program's inputs.
    """
    order = min(program.inputs.shape)
    if factor is not None and factor.gram.shape[0] != order:
        raise ValueError(
            f"factor: want that of inputs {tuple(program.inputs.shape)}, of order {order}, "
            f"got one of order {factor.gram.shape[0]}"
        )


def stalled(
    history: Sequence[dict[str, float]], tolerance: float, violation_tolerance: float
) -> bool:
    """Tell whether two checks in a row brought no new low: float32 has then given what it can.

    Neither of the gap nor of the violation, as far as each is above its tolerance: a violation goes
    up and down on its way, while the gap falls.

    Parameters
    ----------
    history : sequence of dict
        Gap and violation of each check, in order.
    tolerance, violation_tolerance : float
        What is asked for.

    Returns
    -------
    bool
        False before three checks.
    """
    for name, limit in (("gap", tolerance), ("violation", violation_tolerance)):
        values = [max(row[name], limit) for row in history]
        if len(values) < 3 or min(values[-2:]) <= _PROGRESS * min(values[:-2]):
            return False
    return True


class _Best:
    """The best evidence so far: a bound never gets worse, and a certified unit is left alone.

    A lower bound holds whatever the weights are, so the best multiplier of all checks is kept. In
    the regularised form both are kept unit by unit.
    """

    def __init__(self, program: Program, scaling: Scaling) -> None:
        self.program = program
        self.scaling = scaling
        self.far = far(program)
        self.weight: Array = None
        self.multiplier: Array = None
        self.certificate: Certificate
        self._bound: np.ndarray

    def offer(
        self, splitting: Splitting, state: State, tolerance: float, violation_tolerance: float
    ) -> np.ndarray:
        """Judge the current point, keep what is better, and tell which units are certified."""
        program = self.program
        weight = self.scaling.weight_back(state.w)
        candidates = _multipliers(splitting, state)
        for multiplier in candidates:
            self._propose(self.scaling.multiplier_back(multiplier))
        if self.weight is None or state.rho.ndim == 0:
            self.weight = weight
        else:
            done = self.certificate.within(tolerance, violation_tolerance)
            self.weight = _choose(done, self.weight, weight)
        self.certificate = program.certificate_beside(self.weight, self._bound)
        near = self.certificate.violation <= violation_tolerance
        far_off = near & ~(self.certificate.gap <= tolerance)
        if self.scaling.weights is not None and bool(np.any(far_off)):
            # All that is missing is a bound: small boxes are what ADMM's multipliers meet last.
            repaired = self.scaling.into_boxes(candidates[-1])
            self._propose(self.scaling.multiplier_back(repaired))
            self.certificate = program.certificate_beside(self.weight, self._bound)
        return self.certificate.within(tolerance, violation_tolerance)

    def _propose(self, multiplier: Array) -> None:
        """Keep a multiplier, where its bound is better than the best so far."""
        bound = self.program.dual_bound(multiplier)
        if self.multiplier is None:
            self.multiplier, self._bound = multiplier, bound
            return
        better = bound > self._bound
        self.multiplier = _choose(better, multiplier, self.multiplier)
        self._bound = np.where(better, bound, self._bound)

    @property
    def unreachable(self) -> np.ndarray:
        """Tell which units (shape (): whether the layer) have a bound no weights of use have."""
        return np.asarray(self._bound > self.far)

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


def _multipliers(splitting: Splitting, state: State) -> list[Array]:
    """Candidates for the certificate's bound, in the solver's units.

    ADMM's own and, in the regularised form, the same with the fit's exact gradient on Omega.
    """
    xp = array_namespace(state.q)
    own = -(state.rho * splitting.tau) * state.q
    program: LayerProgram = splitting.program
    if not isinstance(program, RegularisedProgram):
        return [own]
    # What is returned, as the program's dtype rounds it.
    weight = xp.astype(xp.astype(state.w, program.inputs.dtype), state.q.dtype)
    gradient = 2 * program.fit_weight * (splitting.inputs @ weight - splitting.level)
    return [own, xp.where(program.active, gradient, own)]
