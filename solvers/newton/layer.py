"""A finish that certifies: a few steps of ADMM for all units, then Newton's method unit by unit.

ADMM brings every unit near its solution at the price of products; what it does slowly, the last
digits, correlated inputs and exact fits, `solvers.newton.unit` does in a handful of small systems.
The regularised form (11) decouples, so that is all. In the constrained form (4), (6) the ball ties
the units together by one number: with s = 1 / (2 lambda), its multiplier condition is that

    r(s) = |(X U(s) - Y)_Omega|_F = epsilon,       U(s) the solution of (11) for s,

where r increases in s, from the best fit at s = 0 (epsilon = 0 is solved there, by units, at
once) to the ceilings' own solution at s = infinity, which is the answer if its r is within epsilon.
On Omega nu = residual / s, so s = epsilon / |nu_Omega|_F at the solution. This, from the last
multiplier, is the first guess and, since |nu_Omega| changes little, the next one; then two
residuals allow a secant of log r over log s, kept in its bracket. Units go on from where they were.

Every result is judged by the program's own certificate. Units (or the layer) that miss it are gone
on with more tightly; what is still not certified then is returned as such.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from array_api_compat import array_namespace

from solvers import checks
from solvers.admm.bfloat16 import half_walk
from solvers.admm.solve import check_factor, check_limits
from solvers.admm.splitting import (
    Factor,
    Progress,
    Splitting,
    State,
    advance,
    metric,
    prepare,
    start,
)
from solvers.arrays import like, to_numpy
from solvers.newton.block import solve_block
from solvers.newton.slack import Trail, first_slack, is_plausible, keep_finite, log_of, next_slack
from solvers.newton.work import Points, Shared, Units, Work, holds_single
from solvers.penalties import L1, ElasticNet
from solvers.program import ConstrainedProgram, Program, RegularisedProgram
from solvers.reach import far
from solvers.result import Certificate, SolveResult, judge
from solvers.scaling import Scaling
from solvers.units import map_units

Array = Any

BALL_STEPS, UNIT_STEPS, UNEVEN_STEPS, WARM_STEPS = 80, 170, 600, 10
"""Steps of ADMM, in float32, before Newton's: from scratch, where one rho serves the whole layer,
and where each unit has its own and may be done by then; where the columns' sizes differ, so that
Newton's steps are many; and from a warm start. Twice as many cost products and save Newton steps:
tuned for the least total time on the layers of the bench."""

_UNEVEN_EMPHASIS = 3.0
"""Emphasis on ADMM's primal residual where columns differ in size: the gap is repaired afterwards
(`solvers.repair`), violations are not. Twice as large leaves a larger gap to repair. Chosen by
hand."""

_METRIC, _RELAXATION = 4.0, 1.8
"""ADMM's metric and over-relaxation for these first steps, as `solvers.admm.splitting` has them for
whole solves; tuned for steps from afar, where they serve better than those."""

_OWN_SHARE = 0.5
"""Share of the tolerances that a unit's own estimates must meet, since the certificate of all adds
them up. A larger one is more often not enough, a smaller one takes more steps."""

_TIGHTER, _FINEST_SHARE = 0.1, 1e-5
"""Factor by which that share shrinks where it was not enough, and the smallest share. A factor
nearer 1 takes more rounds; below the smallest share rounding rules."""

_REFINEMENTS = 5
"""How often the share may shrink for one layer. More spend time on what float64 cannot give. Chosen
by hand."""

_ROOT_STEPS = 60
"""Slacks tried at most; the root is found in under ten. Twice as many change nothing but how long a
hopeless search takes."""

_INSIDE = 0.25
"""Where to aim inside the ball, as a share of the room that the gap's tolerance leaves. Nearer 0
risks a violation, nearer 1 a gap."""

_LEAST_ROOM, _MOST_ROOM = 1e-14, 0.04
"""Bounds of that room, relative to epsilon: rounding, and 4 %, beyond which the result would be
needlessly dense. Chosen by hand."""

BLOCK = 32
"""Units whose products are taken together. Twice as many use the processor's caches better or
worse, by machine, and leave fewer blocks for threads. Measured."""

_KEPT = 2**28
"""Bytes of the units' Gram matrices that stay from one slack to the next. Twice as many save time
on large layers and take that memory. A convention."""

_PROXIMAL = 30.0
"""First sigma and tau, relative to what ADMM balanced. Larger ones make the first inner problems
harder and the outer steps fewer. Tuned on the layers of the bench."""


def solve_newton(
    program: Program,
    *,
    tolerance: float = 1e-6,
    violation_tolerance: float | None = None,
    max_iterations: int = 2000,
    warm_start: SolveResult | None = None,
    factor: Factor | None = None,
    threads: int = 1,
) -> SolveResult:
    """Solve a layer program to a certificate by semismooth Newton, unit by unit.

    ::

        minimise  penalty(U) [+ fit_weight |(XU - y)_Omega|^2]
        subject to  [|(XU - y)_Omega|_F <= epsilon,]  XU <= v off Omega

    Parameters
    ----------
    program : ConstrainedProgram or RegularisedProgram
        With the l1 penalty or the elastic net. Newton's steps are float64 on the CPU, whatever the
        data's dtype and device.
    tolerance : float
        On the gap.
    violation_tolerance : float, optional
        On the violations; the same as `tolerance` by default.
    max_iterations : int
        Limit on the Newton steps of a unit, over all it is solved for.
    warm_start : SolveResult, optional
        A result for the same inputs and shapes (another epsilon, fit weight or level), of any
        solver. Newton starts from it without ADMM.
    factor : Factor, optional
        `prepare(program.inputs)`, when several solves share the inputs.
    threads : int
        Units solved at a time, each with one BLAS thread. It changes no bit of the result.

    Returns
    -------
    SolveResult
        `iterations` counts the Newton steps of the unit that took the most. The weights are in the
        data's dtype, and float32 weights may miss a violation below 1e-6 for that alone.

    Raises
    ------
    ValueError
        For the group penalty, which couples the units; if a tolerance, the limit or `threads` is
        not positive, or a warm start or a factor does not fit.

    Notes
    -----
    Memory: ADMM's ten arrays (n_samples, n_out) in float32, of which Newton's multiplier in float64
    takes the place, X in float32 and float64, X^T X, and for each thread some sixteen arrays
    (n_samples, 32) and the inputs of the ceilings in play; a quarter of a GiB of Gram matrices at
    most.

    References
    ----------
    Aghasi et al., Net-Trim (2017), equations (4), (6), (11). Rockafellar, Augmented Lagrangians and
    applications of the proximal point algorithm (1976). Li, Sun, Toh, A highly efficient semismooth
    Newton augmented Lagrangian method for solving lasso problems (2018).

    Examples
    --------
    >>> import numpy as np
    >>> from solvers import solve_newton, trim_program
    >>> rng = np.random.default_rng(0)
    >>> X, W = rng.standard_normal((50, 10)), rng.standard_normal((10, 3))
    >>> Y = np.maximum(X @ W, 0)
    >>> program = trim_program(X, Y, epsilon=0.1 * np.linalg.norm(Y), old_weight=W)
    >>> result = solve_newton(program, tolerance=1e-8)
    >>> result.status.value, bool(result.certificate.gap <= 1e-8)
    ('solved', True)
    """
    violation_tolerance = tolerance if violation_tolerance is None else violation_tolerance
    if program.penalty.separable and not isinstance(program.penalty, L1 | ElasticNet):
        raise ValueError(
            f"penalty: Newton's method is written for l1 and elastic net, not for the "
            f"{program.penalty.name} penalty; use solve_admm"
        )
    if not program.penalty.separable:
        raise ValueError(
            f"penalty: the {program.penalty.name} penalty couples the units, which Newton's method "
            "solves one by one; use solve_admm"
        )
    checks.count(1, threads=threads)
    limits = (tolerance, violation_tolerance)
    check_limits(tolerance, violation_tolerance, max_iterations)
    check_factor(program, factor)
    reused = factor is not None
    factor = prepare(program.inputs) if factor is None else factor
    started = time.perf_counter()
    scaling = Scaling.of(program, factor.sizes)
    single = columns_hold_single(scaling.program)
    warm_start = scaling.warm_start(warm_start)
    near = _near(scaling, max_iterations, warm_start, factor, single=single)
    rho = scaling.penalty_parameter_back(near.rho)
    finish = _Finish.build(
        program, scaling, near, factor, limits, max_iterations, threads, single=single
    )
    del near  # three arrays of the responses' size
    if isinstance(scaling.program, ConstrainedProgram):
        _solve_ball(scaling.program, finish)
    else:
        _solve_units(scaling.program, finish)
    weight, multiplier, certificate = finish.judged()
    certified = certificate.within(tolerance, violation_tolerance)
    steps = int(finish.points.steps.max())
    finite = bool(np.isfinite(finish.points.u).all() and np.isfinite(finish.points.nu).all())
    return SolveResult(
        weight=weight,
        multiplier=multiplier,
        status=judge(
            certified,
            finite=finite,
            exhausted=steps >= max_iterations,
            unreachable=bool(np.any((certificate.dual_bound > finish.far) & ~certified)),
        ),
        certificate=certificate,
        certified=certified,
        iterations=steps,
        solver="newton",
        setup_seconds=0.0 if reused else factor.seconds,
        solve_seconds=time.perf_counter() - started,
        penalty_parameter=rho,
        history=tuple(finish.history),
    )


def _near(
    scaling: Scaling,
    max_iterations: int,
    warm_start: SolveResult | None,
    factor: Factor,
    *,
    single: bool,
) -> State:
    """A point near the solution, from a few steps of ADMM for all units.

    In single precision where the data's range allows (`single`), which is enough for a start. Where
    even so an iterate is not finite, the start is where ADMM began.
    """
    program = scaling.program
    xp = array_namespace(program.inputs)
    dtype = xp.float32 if single else program.inputs.dtype
    tau = metric(program, factor, _METRIC)
    uneven = scaling.weights is not None
    emphasis = _UNEVEN_EMPHASIS if uneven else 1.0
    splitting = Splitting.build(scaling, factor, dtype, tau, _RELAXATION, emphasis)
    first = BALL_STEPS if isinstance(program, ConstrainedProgram) else UNIT_STEPS
    first = UNEVEN_STEPS if uneven else first
    steps = min(max_iterations, first if warm_start is None else WARM_STEPS)
    progress = Progress(start(splitting, factor, warm_start))
    progress = advance(splitting, progress, steps - 1, half_walk(splitting))
    progress = advance(splitting, progress, steps)  # a full step, so that q belongs to z
    return progress.state if progress.finite else start(splitting, factor, warm_start)


def columns_hold_single(program: Program) -> bool:
    """Tell whether float32 holds the squares of the data.

    Parameters
    ----------
    program : ConstrainedProgram or RegularisedProgram
        The layer's program.

    Returns
    -------
    bool
        Whether no square of them vanishes or overflows there.
    """
    xp = array_namespace(program.inputs)
    return all(holds_single(float(xp.max(xp.abs(a)))) for a in (program.inputs, program.level))


@dataclass(eq=False)
class _Finish:
    """Runs the units, a block of them at a time, and has the program judge them.

    `given` is the caller's program, `scaling` the same in the units of everything else here.
    """

    given: Program
    scaling: Scaling
    shared: Shared
    floor: np.ndarray
    scale: np.ndarray
    points: Points
    limits: tuple[float, float]
    max_steps: int
    threads: int
    history: list[dict[str, float]]
    far: np.ndarray
    verdict: tuple[Array, Array, Certificate] | None = None
    works: dict[int, Work] = field(default_factory=dict)

    @staticmethod
    def build(
        given: Program,
        scaling: Scaling,
        near: State,
        factor: Factor,
        limits: tuple[float, float],
        max_steps: int,
        threads: int,
        *,
        single: bool,
    ) -> _Finish:
        """State what the units share in float64, and the points they start from."""
        program = scaling.program
        _, n_in, n_out = program.shape
        inputs = to_numpy(program.inputs)
        weight = np.ones(n_in) if scaling.weights is None else scaling.weights.copy()
        weight[list(program.free_rows)] = 0.0
        ridge = program.penalty.ridge if isinstance(program.penalty, ElasticNet) else 0.0
        gram = to_numpy(factor.gram) if len(inputs) >= n_in else None
        shared = Shared.of(inputs, weight, ridge * weight**2, gram, single=single)
        rho = np.broadcast_to(to_numpy(near.rho).astype(np.float64), (n_out,))
        tau = rho * metric(program, factor, _METRIC)
        u = np.ascontiguousarray(to_numpy(near.w).T, dtype=np.float64)
        nu = np.ascontiguousarray(to_numpy(near.q).T, dtype=np.float64)
        nu *= -tau[:, None]
        if scaling.weights is not None:
            nu = np.ascontiguousarray(to_numpy(scaling.into_boxes(nu.T)).T)
        sizes = program.fitted_norms()
        if isinstance(given, ConstrainedProgram):
            # One certificate for all: what a unit may miss is its share of the whole.
            sizes = np.full(n_out, np.linalg.norm(sizes) / math.sqrt(n_out))
            floor = np.full(n_out, float((np.abs(u) @ weight).sum()) / n_out)
        else:
            old = scaling.objective * to_numpy(given.penalty_floor())
            floor = 1e-6 * np.broadcast_to(old, (n_out,))
        sizes = np.where(sizes > 0, sizes, program.scale_floor())
        points = Points.at(u, nu, _PROXIMAL / rho, _PROXIMAL * tau)
        return _Finish(
            given, scaling, shared, floor, sizes, points, limits, max_steps, threads, [], far(given)
        )

    def run(self, slack: float, share: float, units: np.ndarray | None = None) -> None:
        """Solve all units, or those named, to a share of the tolerances."""
        self.verdict = None
        tolerance, violation = (share * limit for limit in self.limits)

        def solve(number: int) -> tuple[Points, list[Work]]:
            block = blocks[number]
            limits = slack, tolerance, violation, self.max_steps
            works = [self.works.pop(m, None) for m in block.tolist()]
            return solve_block(
                self.shared, self._units(block), self.points.take(block), *limits, works
            )

        chosen = np.arange(len(self.points.u)) if units is None else units
        # Blocks whatever the number of threads: products over other units round differently.
        blocks = np.array_split(chosen, math.ceil(len(chosen) / min(BLOCK, -(-len(chosen) // 4))))
        found = map_units(solve, range(len(blocks)), self.threads)
        for block, (points, _) in zip(blocks, found, strict=True):
            self.points.put(block, points)
        left = _KEPT
        for block, (_, works) in zip(blocks, found, strict=True):
            for m, work in zip(block.tolist(), works, strict=True):
                left -= work.size
                if left > 0:
                    self.works[m] = work

    def _units(self, block: np.ndarray) -> Units:
        """The data of some units."""
        program = self.scaling.program
        support = program.support

        def rows(array: Array, dtype: type) -> np.ndarray:
            return np.ascontiguousarray(to_numpy(array)[:, block].T, dtype=dtype)

        return Units(
            rows(program.level, np.float64),
            rows(program.active, np.bool_),
            np.ones((len(block), program.shape[1]), bool)
            if support is None
            else rows(support, np.bool_),
            self.floor[block],
            self.scale[block],
        )

    def rounded(self) -> bool:
        """Tell whether float32 alone keeps points from their certificate: finer ones are vain."""
        inputs = self.given.inputs
        if inputs.dtype != array_namespace(inputs).float32:
            return False
        sizes = self.scaling.sizes.columns / self.scaling.response
        exact = like(np.ascontiguousarray((self.points.u / sizes).T), inputs)
        certificate = self.given.certificate(exact, self.judged()[1])
        return bool(certificate.within(*self.limits).all())

    def judged(self) -> tuple[Array, Array, Certificate]:
        """Weights in the data's dtype, multipliers and the program's certificate of the two."""
        if self.verdict is not None:
            return self.verdict
        scaling = self.scaling
        weight = scaling.weight_back(like(np.ascontiguousarray(self.points.u.T), self.given.inputs))
        multiplier = scaling.multiplier_back(like(self.points.nu.T, self.given.inputs))
        certificate = self.given.certificate(weight, multiplier)
        gap, violation = self.limits
        lacking = (certificate.violation <= violation) & ~(certificate.gap <= gap)
        if scaling.weights is not None and lacking.any():
            repaired = scaling.into_boxes(like(self.points.nu.T, self.given.inputs))
            repaired = scaling.multiplier_back(repaired)
            better = self.given.dual_bound(repaired) > certificate.dual_bound
            xp = array_namespace(self.given.inputs)
            multiplier = xp.where(like(np.asarray(better), repaired), repaired, multiplier)
            certificate = self.given.certificate(weight, multiplier)
        self.history.append(
            {
                "iteration": int(self.points.steps.max()),
                "gap": float(np.max(certificate.gap)),
                "violation": float(np.max(certificate.violation)),
            }
        )
        self.verdict = weight, multiplier, certificate
        return self.verdict


def _solve_units(program: RegularisedProgram, finish: _Finish) -> None:
    """Solve the units that are not certified, more tightly each time, until all that can be are."""
    share, least = _OWN_SHARE, 0.5 * _TIGHTER * _OWN_SHARE
    for _ in range(_REFINEMENTS):
        certificate = finish.judged()[2]
        done = certificate.within(*finish.limits) | (certificate.dual_bound > finish.far)
        # What rounding to float32 adds may still fit beside a smaller error of the unit's own.
        if done.all() or (share < least and finish.rounded()):
            break
        finish.run(1 / (2 * program.fit_weight), share, np.flatnonzero(~done))
        share *= _TIGHTER


def _solve_ball(program: ConstrainedProgram, finish: _Finish) -> None:
    """Find the slack s at which the units' residuals add up to epsilon."""
    share, epsilon = _OWN_SHARE, program.epsilon
    aim, room = epsilon, _MOST_ROOM
    slack, refined = first_slack(program, finish.points), 0
    trail: Trail = []  # (log s, log(r / aim)) of finite slacks so far
    if finish.scaling.weights is not None and finish.judged()[2].within(*finish.limits).all():
        return
    for _ in range(_ROOT_STEPS):
        finish.run(slack, share)
        certificate = finish.judged()[2]
        if certificate.within(*finish.limits).all() or refined == _REFINEMENTS:
            break
        residual = float(np.linalg.norm(finish.points.residual))
        if not math.isfinite(residual):
            break
        if bool(certificate.dual_bound > finish.far):
            if epsilon == 0:
                _fit_best(finish, residual)
            break
        if aim == epsilon > 0 and slack < math.inf:
            room = _room(finish, slack, epsilon)
            aim = epsilon * math.exp(-_INSIDE * room)
        error = log_of(residual) - log_of(aim) if epsilon > 0 else 0.0
        settled = epsilon == 0 or (slack == math.inf and residual <= epsilon)
        if settled or abs(error) <= share * min(finish.limits[1], room):
            if finish.rounded():
                break
            share *= _TIGHTER  # the units, and through their sum s, are not accurate enough yet
            refined += 1
        if not settled:
            if slack < math.inf:
                trail.append((math.log(slack), error))
            if not is_plausible(trail):
                # Where the objective is flat, residuals are less accurate than gaps are.
                share = max(_TIGHTER * share, _FINEST_SHARE)
                trail = trail[-1:]
            before, slack = slack, next_slack(trail, tried_infinity=slack == math.inf)
            if slack == before:
                break


def _fit_best(finish: _Finish, residual: float) -> None:
    """Where an exact fit is out of reach, find the best one, beside the multiplier that proves it.

    At a slack s the bound is the penalty plus r^2 / s: beyond `far`, penalties weigh nothing.
    """
    proof = finish.points.nu.copy()
    beyond = float(finish.far) * finish.scaling.objective
    finish.run(keep_finite(residual * residual / beyond), _OWN_SHARE)
    finish.points.nu = proof
    finish.verdict = None


def _room(finish: _Finish, slack: float, epsilon: float) -> float:
    """How far inside the ball, relative to epsilon, the tolerance on the gap lets a residual be.

    Any residual beyond epsilon is a violation. One that is delta epsilon short of it adds
    delta epsilon |nu_Omega| to the gap, with |nu_Omega| = epsilon / s.
    """
    objective = float(np.sum(np.abs(finish.points.u) @ finish.shared.weight))
    room = finish.limits[0] * objective * slack / epsilon / epsilon
    return min(max(room, _LEAST_ROOM), _MOST_ROOM)
