"""The outcome of a layer: weights as they are saved, their certificate, and the report."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace

import numpy as np
from array_api_compat import array_namespace

from retrain.methods.net_trim.options import NetTrimOptions
from retrain.methods.net_trim.task import SLAB, Task, chosen_solver
from retrain.stream.details import NetTrimDetails
from retrain.stream.layer_report import LayerReport, LayerResult
from retrain.stream.stream import Array, LayerSpec, LayerStream
from solvers import SolveResult, Status
from solvers.arrays import like, norm, to_numpy
from solvers.program import Program, RegularisedProgram
from solvers.result import judge


@dataclass(frozen=True, eq=False)
class Answer:
    """A task with its results.

    Attributes
    ----------
    task : Task
        Programs of the layer.
    results : tuple of SolveResult
        Result per group.
    """

    task: Task
    results: tuple[SolveResult, ...]


@dataclass(frozen=True)
class Errors:
    """Errors of saved weights on a program's data; Frobenius norms in float64.

    Attributes
    ----------
    error : float
        |activated response - target|: off Omega the target is 0, the activated response max(z, 0).
    residual : float
        |z - y| on Omega.
    over : float
        |max(z - v, 0)| off Omega.
    target : float
        |y| on Omega.
    ceiling : float
        |max(v, 0)| off Omega.
    """

    error: float = 0.0
    residual: float = 0.0
    over: float = 0.0
    target: float = 0.0
    ceiling: float = 0.0

    def plus(self, other: Errors) -> Errors:
        """Combine the errors on two disjoint sets of entries.

        Parameters
        ----------
        other : Errors
            Errors on other entries.

        Returns
        -------
        Errors
            Root of the sum of squares of each.
        """
        pairs = {name: (value, getattr(other, name)) for name, value in asdict(self).items()}
        return Errors(**{name: math.hypot(*pair) for name, pair in pairs.items()})


def errors_of(program: Program, weight: Array) -> Errors:
    """Measure weights on a program's data, in slabs of samples.

    Parameters
    ----------
    program : Program
        Program with the data.
    weight : array, shape (n_in [+ 1], n_out)
        Weights to measure.

    Returns
    -------
    Errors
        Norms over all rows of the program.
    """
    xp = array_namespace(program.inputs)
    wide = xp.astype(weight, xp.float64)
    total = Errors()
    for start in range(0, program.shape[0], SLAB):
        part = slice(start, start + SLAB)
        response = xp.astype(program.inputs[part, :], xp.float64) @ wide
        level = xp.astype(program.level[part, :], xp.float64)
        fitted = program.active[part, :]
        nothing = xp.zeros_like(response)
        residual = xp.where(fitted, response - level, nothing)
        above = xp.where(fitted, nothing, xp.maximum(response, nothing))
        over = xp.where(fitted, nothing, xp.maximum(response - level, nothing))
        total = total.plus(
            Errors(
                error=math.hypot(norm(residual), norm(above)),
                residual=norm(residual),
                over=norm(over),
                target=norm(xp.where(fitted, level, nothing)),
                ceiling=norm(xp.where(fitted, nothing, xp.maximum(level, nothing))),
            )
        )
    return total


def finish(stream: LayerStream, answer: Answer, options: NetTrimOptions) -> LayerResult:
    """Commit a layer's weights, or keep the dense ones where they are not certified, and report.

    Parameters
    ----------
    stream : LayerStream
        Network; the weights are committed to it.
    answer : Answer
        Programs and results of the layer.
    options : NetTrimOptions
        Options of the method.

    Returns
    -------
    LayerResult
        Weights as the stream holds them, and the report.
    """
    spec, limits = answer.task.spec, (options.tolerance, options.violation_tolerance)
    results = tuple(
        _as_saved(stream, spec, group, program, result, limits)
        for group, (program, result) in enumerate(
            zip(answer.task.programs, answer.results, strict=True)
        )
    )
    dense_units = 0
    for group, result in enumerate(results):
        if options.accept_inexact and result.status is not Status.NUMERICAL_ERROR:
            continue
        keep = np.broadcast_to(result.certified, (spec.shape[1],)).copy()
        if not keep.all():
            dense = stream.weight(spec.name, group, dense=True)
            xp = array_namespace(dense)
            stream.commit(
                spec.name,
                xp.where(like(keep, dense), stream.weight(spec.name, group), dense),
                group,
            )
            dense_units += int((~keep).sum())
    weights = [stream.weight(spec.name, group) for group in range(spec.groups)]
    return LayerResult(weights, _report(stream, answer.task, results, dense_units, options))


def _as_saved(
    stream: LayerStream,
    spec: LayerSpec,
    group: int,
    program: Program,
    result: SolveResult,
    limits: tuple[float, float],
) -> SolveResult:
    """Commit a group's weights; where the network's dtype rounds them, certify what it holds."""
    reference = stream.weight(spec.name, group)
    if result.status is Status.NUMERICAL_ERROR:
        return result
    stream.commit(spec.name, like(to_numpy(result.weight), reference), group)
    saved = like(to_numpy(stream.weight(spec.name, group)), program.inputs)
    if bool(array_namespace(saved).all(saved == result.weight)):
        return result
    certificate = program.certificate(saved, result.multiplier)
    certified = certificate.within(*limits)
    exhausted = result.status is Status.ITERATION_LIMIT
    unreachable = result.status is Status.UNREACHABLE
    status = judge(certified, finite=True, exhausted=exhausted, unreachable=unreachable)
    return replace(
        result, weight=saved, certificate=certificate, certified=certified, status=status
    )


# Statuses from the best to the worst; a layer's report has the worst of its groups.
_SEVERITY = (
    Status.SOLVED,
    Status.INEXACT,
    Status.ITERATION_LIMIT,
    Status.UNREACHABLE,
    Status.NUMERICAL_ERROR,
)


def _report(
    stream: LayerStream,
    task: Task,
    results: Sequence[SolveResult],
    dense_units: int,
    options: NetTrimOptions,
) -> LayerReport:
    """Sum up a layer; certificates of groups and units count with their worst."""
    spec = task.spec
    errors, zeros, zeros_before = Errors(), 0, 0
    for group, program in enumerate(task.programs):
        saved = like(to_numpy(stream.weight(spec.name, group)), program.inputs)
        errors = errors.plus(errors_of(program, saved))
        prunable = slice(0, spec.shape[0])
        zeros += int((to_numpy(saved)[prunable] == 0).sum())
        old = to_numpy(stream.weight(spec.name, group, dense=True))
        zeros_before += int((old[prunable] == 0).sum())
    certificates = [result.certificate for result in results]

    def worst(name: str) -> float:
        return float(max(np.max(getattr(certificate, name)) for certificate in certificates))

    size = errors.target
    regularised = [p.fit_weight for p in task.programs if isinstance(p, RegularisedProgram)]
    asked = None if options.sparsity is None else sum(options.zeros_for(spec))
    setup = sum(result.setup_seconds for result in results)
    solve = sum(result.solve_seconds for result in results)
    details = NetTrimDetails(
        scheme=options.scheme,
        form=options.form,
        penalty=options.penalty.name,
        epsilon=math.hypot(*task.epsilons),
        relative_epsilon=math.hypot(*task.epsilons) / size if size > 0 else None,
        objective=float(sum(np.sum(certificate.objective) for certificate in certificates)),
        dual_bound=float(sum(np.sum(certificate.dual_bound) for certificate in certificates)),
        gap=worst("gap"),
        ball_violation=worst("ball_violation"),
        ceiling_violation=worst("ceiling_violation"),
        largest_violation=worst("largest_violation"),
        residual=errors.residual,
        over=errors.over,
        ceiling_norm=errors.ceiling,
        target_norm=size,
        tolerance=options.tolerance,
        violation_tolerance=options.violation_tolerance,
        solver=results[0].solver,
        solver_because=chosen_solver(task, options)[1],
        iterations=max(result.iterations for result in results),
        setup_seconds=setup,
        solve_seconds=solve,
        fit_weight=regularised if options.form == "regularised" else None,
        asked_zeros=asked,
        asked_sparsity=None if asked is None else asked / spec.size,
        trials=None if asked is None else sum(len(result.history) for result in results),
    )
    status = max((result.status for result in results), key=_SEVERITY.index)
    return LayerReport(
        name=spec.name,
        kind=spec.kind,
        shape=spec.shape,
        follows=spec.follows,
        method="net-trim",
        weights=spec.size,
        zeros_before=zeros_before,
        zeros=zeros,
        rows=task.programs[0].shape[0],
        total_rows=task.total_rows,
        status=status,
        certified=all(bool(np.all(result.certified)) for result in results),
        dense_units=dense_units,
        error=errors.error,
        relative_error=errors.error / size if size > 0 else 0.0,
        seconds=task.seconds + setup + solve,
        details=details,
    )
