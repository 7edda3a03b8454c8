"""Net-Trim over a layer stream: Algorithm 1 (parallel) and Algorithm 2 (cascade).

For each layer, TRIM(X, Y, V, epsilon) of `solvers.trim_program` with

    parallel:  X = Y^(l-1) (dense),      V = 0,                  epsilon_l = epsilon_r |Y^(l)|_F
    cascade:   X = Yhat^(l-1) (current), V = W_l^T Yhat^(l-1),   epsilon_1 = epsilon_r |Y^(1)|_F,
               epsilon_l^2 = inflation * |(W_l^T Yhat^(l-1) - Y^(l)) on Omega|_F^2        (7)

where Y^(l) is always the given network's. The first layer of a cascade is the parallel program. An
absolute epsilon takes the place of epsilon_r |Y|_F. The last layer, without activation, has every
entry fitted and no ceiling.

Not in the paper: biases (a free row), weights that are zero in the dense network (held at zero by a
mask; the dense weights meet it, so they stay feasible), grouped layers (each group is a program of
its own with its share of the ball), and the regularised form's default weight, lambda =
|W_l|_1 / epsilon_l^2. With it the residual r of the optimum obeys

    lambda r^2 <= |W_l|_1 - |What_l|_1 + lambda r_old^2,    so   r^2 <= epsilon_l^2 + r_old^2,

r_old the old weights' residual, zero in the parallel scheme: the optimum cannot miss the targets by
more than the constrained form allows.

With a sparsity, epsilon_l is not given but found: the one at which the layer's solution has the
zeros wanted (`solvers.solve_count`).
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import joblib
import numpy as np
from array_api_compat import array_namespace, device
from threadpoolctl import threadpool_limits

from retrain.methods.layers import chosen, commit
from retrain.methods.net_trim.options import Chosen, NetTrimOptions
from retrain.stream.chain import activate
from retrain.stream.layer_report import LayerReport, LayerResult
from retrain.stream.stream import Array, LayerSpec, LayerStream, changed, collect, sample_rows
from solvers import SolveResult, Status, solve_admm, solve_count, solve_newton, trim_program
from solvers.arrays import like, norm, on_host, to_numpy
from solvers.newton.layer import BLOCK
from solvers.path.count import held_zeros
from solvers.program import ConstrainedProgram, Program, RegularisedProgram
from solvers.result import judge
from solvers.workers import workers

_SLAB = 8192  # samples whose responses are held in float64 at a time

_log = logging.getLogger(__name__)


def net_trim(
    stream: LayerStream,
    options: NetTrimOptions,
    *,
    layers: Sequence[str] | None = None,
    finished: Mapping[str, Sequence[Array]] | None = None,
) -> Iterator[LayerResult]:
    """Retrain a network's layers, yielding each as it is done.

    A layer is committed to the stream before it is yielded, cast to the network's dtype, so that
    the next layer of a cascade sees exactly what a caller saves.

    Parameters
    ----------
    stream : LayerStream
        The network and the calibration data.
    options : NetTrimOptions
        What to do.
    layers : sequence of str, optional
        Names of the layers to retrain; all that can be, by default.
    finished : mapping from str to sequence of array, optional
        Weights (one a group) of layers done by an earlier run. They are committed in their turn and
        not yielded again.

    Yields
    ------
    LayerResult
        In execution order for the cascade, in order of completion for the parallel scheme.

    Raises
    ------
    ValueError
        If a named layer does not exist or cannot be retrained.

    References
    ----------
    Aghasi et al., Net-Trim (2017), Algorithms 1 and 2.
    """
    specs = chosen(stream, layers)
    done = dict(finished or {})
    scales = _link_scales(stream) if options.link_normalised else {}
    if options.scheme == "parallel":
        open_specs = [spec for spec in specs if spec.name not in done]
        for name, weights in done.items():
            commit(stream, name, weights)
        tasks = (_task(stream, spec, options, scales, upstream=False) for spec in open_specs)
        for answer in _solve_all(tasks, options):
            yield _finish(stream, answer, options)
        return
    upstream = False
    for spec in specs:
        if spec.name in done:
            commit(stream, spec.name, done[spec.name])
        else:
            task = _task(stream, spec, options, scales, upstream=upstream)
            _log.info("solving: layer %s (%d of %d)", spec.name, specs.index(spec) + 1, len(specs))
            with threadpool_limits(options.threads_per_job):
                answer = _solve(task, options)
            yield _finish(stream, answer, options)
        upstream = upstream or changed(stream, spec)


@dataclass(frozen=True, eq=False)
class _Task:
    """One layer's programs, one a group; travels to a worker and back."""

    spec: LayerSpec
    programs: tuple[Program, ...]
    epsilons: tuple[float, ...]
    total_rows: int
    seconds: float


@dataclass(frozen=True, eq=False)
class _Answer:
    """A task with its results."""

    task: _Task
    results: tuple[SolveResult, ...]


def _link_scales(stream: LayerStream) -> dict[str, float]:
    """Product of |W_j|_1 over the layers up to each one."""
    product, scales = 1.0, {}
    for spec in stream.layers:
        if spec.reason is not None or spec.groups != 1:
            raise ValueError(
                f"link_normalised: wants a chain of dense layers; {spec.name!r} is not one"
            )
        weight = to_numpy(stream.weight(spec.name, dense=True)).astype(np.float64)
        product *= float(np.abs(weight[: spec.shape[0]]).sum())
        scales[spec.name] = product
    return scales


def rows_within(spec: LayerSpec, memory: float, itemsize: int, solver: Chosen) -> int:
    """How many rows of a layer a solve can hold in `memory` bytes.

    A row takes its inputs three times (current, dense, one float64 slab) and, by ADMM, some sixteen
    arrays of the responses' size, twice that where it goes on from float32 in float64. Newton takes
    twelve, the inputs in float64, and for each block of units at work sixteen arrays and the inputs
    of the ceilings in play. Two blocks are counted, one a thread, so that the rows and with them
    the results do not depend on the number of threads.
    """
    return max(1, int(memory / _bytes_per_row(spec, itemsize, solver)))


def _bytes_per_row(spec: LayerSpec, itemsize: int, solver: Chosen) -> int:
    n_in, n_out = spec.shape[0] + 1, spec.shape[1]
    if solver == "newton":
        block = 8 * (16 * min(BLOCK, n_out) + n_in)
        return itemsize * (3 * n_in + 12 * n_out) + 8 * n_in + 2 * block
    return itemsize * (3 * n_in + 16 * n_out)


def oversized(stream: LayerStream, spec: LayerSpec, options: NetTrimOptions) -> str | None:
    """Say why not a single row of a layer fits into `memory`, and the way out; None if one does."""
    weight = stream.weight(spec.name)
    solver, _ = options.solver_on(str(device(weight)))
    needed = _bytes_per_row(spec, weight.itemsize, solver)
    if needed <= options.memory:
        return None
    return (
        f"memory: a row of layer {spec.name!r} takes {needed:,} bytes, more than the "
        f"{options.memory / 2**30:.2g} GiB allowed; raise it (--memory), or leave the layer out "
        f"(--skip {spec.name})"
    )


def _task(
    stream: LayerStream,
    spec: LayerSpec,
    options: NetTrimOptions,
    scales: Mapping[str, float],
    *,
    upstream: bool,
) -> _Task:
    """State a layer's programs. `upstream`: whether a layer before it has changed (cascade)."""
    started = time.perf_counter()
    _log.info("activations: layer %s", spec.name)
    total = stream.count(spec.name)
    weight = stream.weight(spec.name)
    itemsize = to_numpy(weight[:1, :1]).itemsize
    solver, _ = options.solver_on(str(device(weight)))
    rows = sample_rows(total, rows_within(spec, options.memory, itemsize, solver), options.seed)
    programs, epsilons = [], []
    for group in range(spec.groups):
        epsilon, program = _program(stream, spec, group, rows, options, scales, upstream=upstream)
        epsilons.append(epsilon)
        programs.append(program)
    seconds = time.perf_counter() - started
    return _Task(spec, tuple(programs), tuple(epsilons), total, seconds)


def _program(
    stream: LayerStream,
    spec: LayerSpec,
    group: int,
    rows: np.ndarray | None,
    options: NetTrimOptions,
    scales: Mapping[str, float],
    *,
    upstream: bool,
) -> tuple[float, Program]:
    """One group's TRIM(X, Y, V, epsilon), with its epsilon."""
    batch = collect(stream, spec.name, group, rows=rows)
    inputs = on_host(batch.inputs if upstream else batch.dense_inputs)
    targets = on_host(activate(spec.follows, batch.responses))
    old_weight = on_host(stream.weight(spec.name, group, dense=True))
    ceilings = None
    if upstream:
        response = inputs @ old_weight
        if spec.follows == "relu":
            ceilings = response
        old_error = _norm_on(targets, response - targets, spec)
        epsilon = math.sqrt(options.inflation) * old_error
    elif options.relative_epsilon is not None:
        epsilon = options.relative_epsilon * _norm_on(targets, targets, spec)
    else:
        assert options.epsilon is not None
        # The groups share the layer's ball.
        epsilon = options.epsilon * scales.get(spec.name, 1.0) / math.sqrt(spec.groups)
    form: dict[str, float] = {"epsilon": epsilon}
    if options.form == "regularised":
        form = {"fit_weight": _fit_weight(options, old_weight, epsilon, spec)}
    program = trim_program(
        inputs,
        targets,
        activation=spec.follows,
        ceilings=ceilings,
        penalty=options.penalty,
        free_rows=(spec.shape[0],) if spec.bias and not options.penalise_bias else (),
        support=_support(spec, old_weight) if options.zeros == "stay" else None,
        old_weight=old_weight,
        **form,
    )
    return epsilon, program


def _support(spec: LayerSpec, old_weight: Array) -> Array | None:
    """Where weights may be nonzero: where the dense ones are, and in the bias; None: everywhere."""
    xp = array_namespace(old_weight)
    support = old_weight != 0
    if spec.bias:
        support[-1, :] = True
    return None if bool(xp.all(support)) else support


def _fit_weight(
    options: NetTrimOptions, old_weight: Array, epsilon: float, spec: LayerSpec
) -> float:
    """Weight lambda of (11): the given one, or |W_l|_1 / epsilon_l^2 (see the module)."""
    if options.fit_weight is not None:
        return options.fit_weight
    size = float(np.abs(to_numpy(old_weight)[: spec.shape[0]].astype(np.float64)).sum())
    if not (size > 0 and epsilon > 0):
        raise ValueError(
            f"fit_weight: no default for layer {spec.name!r}, whose |W|_1 is {size:.3g} and "
            f"epsilon {epsilon:.3g}; give one"
        )
    return size / epsilon**2


@dataclass(frozen=True)
class _Errors:
    """What saved weights do on a program's data; Frobenius norms in float64.

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

    def plus(self, other: _Errors) -> _Errors:
        """Join two sets of entries."""
        pairs = {name: (value, getattr(other, name)) for name, value in asdict(self).items()}
        return _Errors(**{name: math.hypot(*pair) for name, pair in pairs.items()})


def _errors(program: Program, weight: Array) -> _Errors:
    """Measure weights on a program's data, in slabs of samples."""
    xp = array_namespace(program.inputs)
    wide = xp.astype(weight, xp.float64)
    total = _Errors()
    for start in range(0, program.shape[0], _SLAB):
        part = slice(start, start + _SLAB)
        response = xp.astype(program.inputs[part, :], xp.float64) @ wide
        level = xp.astype(program.level[part, :], xp.float64)
        fitted = program.active[part, :]
        nothing = xp.zeros_like(response)
        residual = xp.where(fitted, response - level, nothing)
        above = xp.where(fitted, nothing, xp.maximum(response, nothing))
        over = xp.where(fitted, nothing, xp.maximum(response - level, nothing))
        total = total.plus(
            _Errors(
                error=math.hypot(norm(residual), norm(above)),
                residual=norm(residual),
                over=norm(over),
                target=norm(xp.where(fitted, level, nothing)),
                ceiling=norm(xp.where(fitted, nothing, xp.maximum(level, nothing))),
            )
        )
    return total


def _norm_on(targets: Array, values: Array, spec: LayerSpec) -> float:
    """Frobenius norm of `values` over the fitted entries, in float64."""
    xp = array_namespace(values)
    return norm(values if spec.follows == "linear" else xp.where(targets > 0, values, 0 * values))


def _solve(task: _Task, options: NetTrimOptions) -> _Answer:
    """Solve a layer's programs, or search for those whose solutions have the zeros wanted."""
    solve: Callable[..., SolveResult] = solve_admm
    if _chosen(task, options)[0] == "newton":
        solve = partial(solve_newton, threads=options.threads_per_job)
    limits = {
        "tolerance": options.tolerance,
        "violation_tolerance": options.violation_tolerance,
        "max_iterations": options.max_iterations,
    }
    if options.sparsity is None:
        return _Answer(task, tuple(solve(program, **limits) for program in task.programs))
    prunable = np.arange(task.spec.shape[0])
    points = [
        solve_count(
            program, max(zeros, held_zeros(program, prunable)), rows=prunable, solve=solve, **limits
        )
        for program, zeros in zip(task.programs, options.zeros_for(task.spec), strict=True)
    ]
    programs = tuple(point.program for point in points)
    epsilons = tuple(
        program.epsilon if isinstance(program, ConstrainedProgram) else point.residual
        for program, point in zip(programs, points, strict=True)
    )
    return _Answer(
        replace(task, programs=programs, epsilons=epsilons),
        tuple(point.result for point in points),
    )


def _chosen(task: _Task, options: NetTrimOptions) -> tuple[Chosen, str]:
    """The solver of a layer's programs, and why it."""
    return options.solver_on(str(device(task.programs[0].inputs)))


def _worker(task: _Task, options: NetTrimOptions) -> _Answer:
    """Solve in a joblib worker, which gets its share of the threads."""
    with threadpool_limits(options.threads_per_job):
        return _solve(task, options)


def _solve_all(tasks: Iterable[_Task], options: NetTrimOptions) -> Iterator[_Answer]:
    """Solve independent layers with joblib, yielding each as it is done.

    Tasks are stated one by one as workers take them, so that no more than `jobs` layers'
    activations are held. The backend is whatever ``joblib.parallel_config`` says.
    """
    pool = workers(options.jobs, pre_dispatch=options.jobs, return_as="generator_unordered")
    yield from pool(joblib.delayed(_worker)(task, options) for task in tasks)


def _finish(stream: LayerStream, answer: _Answer, options: NetTrimOptions) -> LayerResult:
    """Commit a layer's weights, or keep the dense ones where they are not certified; report."""
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


_SEVERITY = (
    Status.SOLVED,
    Status.INEXACT,
    Status.ITERATION_LIMIT,
    Status.UNREACHABLE,
    Status.NUMERICAL_ERROR,
)


def _report(
    stream: LayerStream,
    task: _Task,
    results: Sequence[SolveResult],
    dense_units: int,
    options: NetTrimOptions,
) -> LayerReport:
    """Sum up a layer; certificates of groups and units count with their worst."""
    spec = task.spec
    errors, zeros, zeros_before = _Errors(), 0, 0
    for group, program in enumerate(task.programs):
        saved = like(to_numpy(stream.weight(spec.name, group)), program.inputs)
        errors = errors.plus(_errors(program, saved))
        prunable = slice(0, spec.shape[0])
        zeros += int((to_numpy(saved)[prunable] == 0).sum())
        old = to_numpy(stream.weight(spec.name, group, dense=True))
        zeros_before += int((old[prunable] == 0).sum())
    certificates = [result.certificate for result in results]

    def worst(name: str) -> float:
        return float(max(np.max(getattr(certificate, name)) for certificate in certificates))

    size = errors.target
    details: dict[str, Any] = {
        "scheme": options.scheme,
        "form": options.form,
        "penalty": options.penalty.name,
        "epsilon": math.hypot(*task.epsilons),
        "relative_epsilon": math.hypot(*task.epsilons) / size if size > 0 else None,
        "objective": float(sum(np.sum(certificate.objective) for certificate in certificates)),
        "dual_bound": float(sum(np.sum(certificate.dual_bound) for certificate in certificates)),
        "gap": worst("gap"),
        "ball_violation": worst("ball_violation"),
        "ceiling_violation": worst("ceiling_violation"),
        "largest_violation": worst("largest_violation"),
        "residual": errors.residual,
        "over": errors.over,
        "ceiling_norm": errors.ceiling,
        "target_norm": size,
        "tolerance": options.tolerance,
        "violation_tolerance": options.violation_tolerance,
        "solver": results[0].solver,
        "solver_because": _chosen(task, options)[1],
        "iterations": max(result.iterations for result in results),
        "setup_seconds": sum(result.setup_seconds for result in results),
        "solve_seconds": sum(result.solve_seconds for result in results),
    }
    if options.form == "regularised":
        details["fit_weight"] = [
            program.fit_weight
            for program in task.programs
            if isinstance(program, RegularisedProgram)
        ]
    if options.sparsity is not None:
        asked = sum(options.zeros_for(spec))
        details |= {
            "asked_zeros": asked,
            "asked_sparsity": asked / spec.size,
            "trials": sum(len(result.history) for result in results),
        }
    status = max((result.status for result in results), key=_SEVERITY.index)
    solving = details["setup_seconds"] + details["solve_seconds"]
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
        status=status.value,
        certified=all(bool(np.all(result.certified)) for result in results),
        dense_units=dense_units,
        error=errors.error,
        relative_error=errors.error / size if size > 0 else 0.0,
        seconds=task.seconds + solving,
        details=details,
    )
