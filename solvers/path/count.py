"""The point of a layer's path that has a wanted number of zeros.

The solution of (11) for fit weight lambda solves (4) for the epsilon that is
its own residual, with the same multiplier: its optimality conditions are the ball's, with
2 lambda (Xu - y)_Omega = nu_Omega. So the epsilon at which a layer has a wanted number of zeros is
searched for along (11), whose units are independent, and only the last point is a program (4). (A
penalty that couples the units is searched along (4) itself.) The number of zeros is not continuous
and, in rare cases, not monotone: the search keeps a bracket of log lambda and ends with the nearest
count it met. It begins with a few units, typical by the size of Omega, whose share of zeros is
nearly the layer's. From a point with a few zeros too few its smallest weights are set to zero,
epsilon is again its own residual, and that is the answer if the certificate of it holds: the count
is then met exactly, by weights as good as any the tolerance admits.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
from array_api_compat import array_namespace

from solvers.admm.solve import Factor, prepare
from solvers.arrays import like, to_numpy
from solvers.newton.layer import solve_newton
from solvers.path.path import PathPoint, Solve, norm_on_omega, point_of
from solvers.path.root import next_place
from solvers.program import (
    ConstrainedProgram,
    LayerProgram,
    Program,
    RegularisedProgram,
)
from solvers.result import SolveResult, Status, judge

_SEARCH_STEPS = 40
"""Solves of one search at most; ten to twenty are usual. Twice as many help only paths that jump
around the count."""

_NEAREST = 1e-6
"""Relative change of lambda below which counts are not told apart. A larger one ends searches
sooner, farther from the count."""

_STRIDE = math.log(4.0)
"""Longest step of log lambda while the count has not been bracketed: a factor of four. Longer ones
overshoot into radii that are dear to solve."""

_WIDEST = math.log(1e6)
"""How far, in log lambda, a search goes from where it begins: six orders of magnitude either way.
Beyond, the count is not on the path."""

_SMALL_RADIUS = 0.05
"""Radius, relative to the targets, where the search of a program with epsilon = 0 begins. Only the
number of solves depends on it."""

_SMALLEST_RADIUS = 1e-4
"""Radius, relative to the targets, below which a fit counts as exact: its lambda has no finite
place. Chosen by hand."""

_LEAST_WEIGHT = 1e-250
"""Smallest lambda, so that exponentials of places stay finite."""

_FINER = 0.3
"""Share of the tolerance that the search's solves meet, since setting small weights to zero uses up
the rest. A larger one leaves less to use."""

_FINEST = 0.1
"""The same again, for an answer that is not certified with the first."""

_SMALLEST_SHARE, _SMALLEST = 100, 8
"""How many of the smallest weights may be set to zero to meet a count: one in so many, or so many
at least. More end the search sooner and use up more of the tolerance."""

_FARTHER = 4
"""Times as many may be set once the search has come to an end beside the count: the certificate
decides."""

_FEW, _FEW_SHARE = 16, 16
"""Units of a first search, which finds the place at a fraction of the cost: so many, or one in so
many. More cost more and aim better. Chosen by hand."""


def solve_count(
    program: Program,
    zeros: int,
    *,
    tolerance: float = 1e-4,
    violation_tolerance: float | None = None,
    rows: np.ndarray | None = None,
    solve: Solve = solve_newton,
    **options: Any,
) -> PathPoint:
    """Find the radius (or fit weight) at which a layer's solution has a wanted number of zeros.

    Parameters
    ----------
    program : ConstrainedProgram or RegularisedProgram
        Its epsilon or fit weight is where the search begins.
    zeros : int
        Zeros wanted among the weights counted, those that the program's mask holds among them.
    tolerance : float
        On the gap.
    violation_tolerance : float, optional
        On the violations; the same as `tolerance` by default.
    rows : array of int, optional
        Rows of the weights whose zeros count; the penalised ones by default.
    solve : callable
        The solver. A penalty that couples the units wants `solve_admm`.
    **options : object
        Further arguments of `solve`.

    Returns
    -------
    PathPoint
        The certified solution of the program at the epsilon or fit weight found. ``zeros`` is the
        count it has: the nearest the search met, which is the wanted one unless the path jumps over
        it. ``result.history`` has the search, one row a trial: ``value`` (fit weight, or epsilon
        where that was searched), ``zeros``, ``residual``, ``gap``, ``violation``. Seconds are the
        whole search's, iterations its sum.

    Raises
    ------
    ValueError
        If `zeros` is not between the zeros that the mask holds and the number of weights counted.

    Notes
    -----
    A program with nothing to fit has one solution for all radii, which is returned.

    Examples
    --------
    >>> import numpy as np
    >>> from solvers import solve_count, trim_program
    >>> rng = np.random.default_rng(0)
    >>> X, W = rng.standard_normal((50, 10)), rng.standard_normal((10, 3))
    >>> Y = np.maximum(X @ W, 0)
    >>> program = trim_program(X, Y, epsilon=1.0, old_weight=W)
    >>> solve_count(program, 12).zeros
    12
    """
    counted = program.penalised if rows is None else np.asarray(rows)
    total = len(counted) * program.shape[2]
    held = held_zeros(program, counted)
    if not held <= zeros <= total:
        raise ValueError(f"zeros: got {zeros!r}, want a count from {held} to {total}")
    limits = (tolerance, tolerance if violation_tolerance is None else violation_tolerance)
    factor = prepare(program.inputs)
    search = _Search(counted, limits, factor, solve, options)
    size = norm_on_omega(program, program.level)
    if size == 0:
        return search.at(program, 1.0, None)
    place, slope, seconds = _first_place(program, size), None, 0.0
    few = _typical_units(program)
    if len(few) < program.shape[2] and program.penalty.separable:
        part = _some_units(program, few)
        share = (zeros - held) / max(total - held, 1)  # of the weights that are not held at zero
        wanted = held_zeros(part, counted)
        wanted += round(share * (len(counted) * len(few) - wanted))
        trials = search.run(part, wanted, place, None)
        seconds = sum(point.result.solve_seconds for _, point in trials)
        place = min(trials, key=lambda trial: abs(trial[1].zeros - wanted))[0]
        slope = _slope(trials, program.shape[2] / len(few))
    found: list[PathPoint] = []
    # A looser solution has more zeros than the path's own point: a finer one may have fewer.
    for share in (_FINER, _FINEST * _FINER, _FINEST**2 * _FINER):
        trials = search.run(program, zeros, place, slope, share)
        found += [point for _, point in trials]
        final = _finish(program, search, found, zeros)
        if final.zeros <= zeros:
            break
        place, slope = min(trials, key=lambda trial: abs(trial[1].zeros - zeros))[0], None
    result = replace(
        final.result,
        iterations=sum(point.result.iterations for point in found),
        setup_seconds=factor.seconds,
        solve_seconds=seconds + sum(point.result.solve_seconds for point in found),
        history=tuple(_row(point) for point in found),
    )
    return replace(final, result=result)


def held_zeros(program: Program, rows: np.ndarray) -> int:
    """Count the weights of some rows that the program's mask holds at zero.

    Parameters
    ----------
    program : ConstrainedProgram or RegularisedProgram
        The layer's program.
    rows : int array
        Numbers of the rows counted.

    Returns
    -------
    int
        0 without a mask.
    """
    return 0 if program.support is None else int((~to_numpy(program.support)[rows]).sum())


@dataclass(frozen=True, eq=False)
class _Search:
    """What the solves of a search share."""

    counted: np.ndarray
    limits: tuple[float, float]
    factor: Factor
    solve: Solve
    options: dict[str, Any]

    def at(self, program: Program, finer: float, warm: SolveResult | None) -> PathPoint:
        """Solve to a part of the tolerance."""
        result = self.solve(
            program,
            tolerance=finer * self.limits[0],
            violation_tolerance=self.limits[1],
            warm_start=warm,
            factor=self.factor,
            **self.options,
        )
        return point_of(program, result, self.counted)

    def run(
        self,
        program: Program,
        zeros: int,
        place: float,
        slope: float | None,
        share: float = _FINER,
    ) -> list[tuple[float, PathPoint]]:
        """Solve along the path until the count is met, or near enough for the rest to be set."""
        # Aiming a little lower, from where the rest can be set: what is between is too many. Where
        # that ends without the count, as on small layers, the count itself is aimed at.
        aims = (zeros - _slack(self.counted, program) // 2, zeros)
        first = place
        found: list[tuple[float, PathPoint]] = []
        for _ in range(_SEARCH_STEPS):
            near = min(found, key=lambda trial: abs(trial[0] - place), default=None)
            warm = None if near is None else near[1].result
            point = self.at(_along(program, place), share, warm)
            if point.result.status is Status.NUMERICAL_ERROR and found:
                break  # beyond what the data's dtype holds; what was found before stands
            found.append((place, point))
            if point.zeros == zeros or _set_smallest(self, [point], zeros, program) is not None:
                break
            following = None
            for aim in aims:
                trials = [(x, each.zeros - aim if each.zeros != aim else 1) for x, each in found]
                following = next_place(trials, stride=_STRIDE, nearest=_NEAREST, slope=slope)
                if following is not None and abs(following - first) <= _WIDEST:
                    break
                following = None
            if following is None:
                break
            place = following
        return found


def _finish(program: Program, search: _Search, found: list[PathPoint], zeros: int) -> PathPoint:
    """Choose the nearest point, set what is left to set, and see to its certificate."""
    best = min(found, key=lambda point: abs(point.zeros - zeros))
    for finer in (_FINEST, None):
        exact = None
        if best.zeros != zeros:
            # The search is over: from farther away too, the certificate tells whether it may be.
            exact = _set_smallest(search, found, zeros, program, _FARTHER)
        final = _settled(program, best, search.limits) if exact is None else exact
        if final.result.status is Status.SOLVED or finer is None:
            break
        best = search.at(best.program, finer * _FINER, best.result)
        found.append(best)
    return final


def _typical_units(program: Program) -> np.ndarray:
    """A few units at even quantiles of the size of Omega."""
    n_out = program.shape[2]
    count = min(n_out, max(_FEW, n_out // _FEW_SHARE))
    order = np.argsort(to_numpy(program.active).sum(axis=0), kind="stable")
    return np.sort(order[((np.arange(count) + 0.5) / count * n_out).astype(int)])


def _some_units(program: Program, units: np.ndarray) -> Program:
    """The program of some of the units, at the fit weight (or in their share of the ball)."""
    columns = like(units, program.inputs)
    xp = array_namespace(program.inputs)
    cut: dict[str, Any] = {
        name: None if array is None else xp.take(array, columns, axis=1)
        for name in ("active", "level", "support", "old_weight")
        for array in [getattr(program, name)]
    }
    return replace(program, **cut)


def _slope(trials: list[tuple[float, PathPoint]], factor: float) -> float | None:
    """Zeros a unit of place near the last trial, times a factor."""
    if len(trials) < 2:
        return None
    (here, point), *others = reversed(trials)
    before, other = min(others, key=lambda trial: abs(trial[0] - here))
    slope = factor * (point.zeros - other.zeros) / (here - before)
    return slope if slope > 0 else None


def _slack(counted: np.ndarray, program: Program) -> int:
    """How many zeros may be set instead of searched for."""
    return max(_SMALLEST, len(counted) * program.shape[2] // _SMALLEST_SHARE)


def _set_smallest(
    search: _Search, found: list[PathPoint], zeros: int, program: Program, farther: int = 1
) -> PathPoint | None:
    """Set the smallest weights of the nearest point with too few zeros to zero.

    None where there is no such point near enough, or the certificate of no outcome holds; nor for a
    penalty whose zeros come in groups.
    """
    slack = farther * _slack(search.counted, program) if program.penalty.separable else 0
    near = [point for point in reversed(found) if 0 < zeros - point.zeros <= slack]
    for point in sorted(near, key=lambda point: zeros - point.zeros):
        weight = to_numpy(point.result.weight).copy()
        sizes = np.abs(weight[search.counted])
        sizes[sizes == 0] = np.inf
        smallest = np.argsort(sizes, axis=None, kind="stable")[: zeros - point.zeros]
        rows, columns = np.unravel_index(smallest, sizes.shape)
        weight[search.counted[rows], columns] = 0
        result = replace(point.result, weight=like(weight, program.inputs))
        changed = point_of(point.program, result, search.counted)
        final = _settled(program, changed, search.limits)
        if final.result.status is Status.SOLVED:
            return final
    return None


def _settled(program: Program, point: PathPoint, limits: tuple[float, float]) -> PathPoint:
    """State a point found along the path as a solution of the program's own form, and judge it."""
    found, result = point.program, point.result
    if result.status is Status.NUMERICAL_ERROR:
        return replace(point, program=program)
    final: Program = found
    if isinstance(program, ConstrainedProgram) and isinstance(found, RegularisedProgram):
        final = replace(program, epsilon=point.residual)
    elif isinstance(found, ConstrainedProgram):
        final = replace(found, epsilon=max(found.epsilon, point.residual))
    certificate = final.certificate(result.weight, result.multiplier)
    certified = certificate.within(*limits)
    finite = bool(np.all(np.isfinite(certificate.objective)))
    exhausted = result.status is Status.ITERATION_LIMIT
    status = judge(certified, finite=finite, exhausted=exhausted)
    judged = replace(result, status=status, certificate=certificate, certified=certified)
    return replace(point, program=final, result=judged)


def _row(point: PathPoint) -> dict[str, float]:
    """One line of a search's history."""
    program, certificate = point.program, point.result.certificate
    value = program.epsilon if isinstance(program, ConstrainedProgram) else program.fit_weight
    return {
        "value": value,
        "zeros": point.zeros,
        "residual": point.residual,
        "gap": float(np.max(certificate.gap)),
        "violation": float(np.max(certificate.violation)),
    }


def _along(program: Program, place: float) -> Program:
    """The program searched along: its solution has more zeros the larger `place` is.

    Of (11), -log lambda is the place; of (4) with a penalty that couples the units, log epsilon.
    """
    if isinstance(program, RegularisedProgram):
        return replace(program, fit_weight=math.exp(-place))
    if program.penalty.separable:
        return _regularised(program, math.exp(-place))
    return replace(program, epsilon=math.exp(place))


def _first_place(program: Program, size: float) -> float:
    """Where the search begins: at the program's own epsilon or fit weight."""
    if isinstance(program, RegularisedProgram):
        return -math.log(program.fit_weight)
    if program.penalty.separable:
        return -math.log(_first_weight(program, size))
    exact = program.epsilon < _SMALLEST_RADIUS * size
    return math.log(_SMALL_RADIUS * size if exact else program.epsilon)


def _regularised(program: ConstrainedProgram, fit_weight: float) -> RegularisedProgram:
    """The program's data in the form (11)."""
    data = {entry.name: getattr(program, entry.name) for entry in fields(LayerProgram)}
    return RegularisedProgram(**data, fit_weight=fit_weight)


def _first_weight(program: ConstrainedProgram, size: float) -> float:
    """|W|_1 / epsilon^2, which weighs penalty and fit alike; without old weights by scale alone."""
    xp = array_namespace(program.inputs)
    # An epsilon that is nothing, or next to it, is no place to look for a number of zeros from.
    exact = program.epsilon < _SMALLEST_RADIUS * size
    epsilon = _SMALL_RADIUS * size if exact else program.epsilon
    penalty = float(xp.sum(program.old_penalty()))
    if penalty == 0:
        inputs = float(xp.sqrt(xp.sum(xp.astype(program.inputs, xp.float64) ** 2)))
        penalty = size * math.sqrt(len(program.penalised) * program.shape[2]) / (inputs or 1.0)
    return min(max(penalty / epsilon / epsilon, _LEAST_WEIGHT), 1 / _LEAST_WEIGHT)
