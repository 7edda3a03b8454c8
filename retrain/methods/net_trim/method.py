"""Net-Trim over a layer stream: Algorithm 1 (parallel) and Algorithm 2 (cascade).

For each layer, TRIM(X, Y, V, epsilon) of `solvers.trim_program` with

    parallel:  X = Y^(l-1) (dense),      V = 0,                  epsilon_l = epsilon_r |Y^(l)|_F
    cascade:   X = Yhat^(l-1) (current), V = W_l^T Yhat^(l-1),   epsilon_1 = epsilon_r |Y^(1)|_F,
               epsilon_l^2 = inflation * |(W_l^T Yhat^(l-1) - Y^(l)) on Omega|_F^2        (7)

where Y^(l) is always the dense network's. The first layer of a cascade is the parallel program. An
absolute epsilon takes the place of epsilon_r |Y|_F. The last layer, without activation, has every
entry fitted and no ceiling.

Not in the paper: biases (a free row), weights that are zero in the dense network (held at zero by a
mask; the dense weights meet it, so they stay feasible), grouped layers (each group is a program of
its own with its share of the ball), and the regularised form's default weight, lambda =
|W_l|_1 / epsilon_l^2. With it the residual r of the optimum obeys

    lambda r^2 <= |W_l|_1 - |What_l|_1 + lambda r_old^2,    so   r^2 <= epsilon_l^2 + r_old^2,

r_old the dense weights' residual, zero in the parallel scheme: the optimum cannot miss the targets
by more than the constrained form allows.

With a sparsity, epsilon_l is not given but searched for: the radius at which the layer's solution
has the number of zeros asked for (`solvers.solve_count`).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial

import numpy as np
from threadpoolctl import threadpool_limits

from retrain.methods.layers import chosen, commit
from retrain.methods.net_trim.options import NetTrimOptions
from retrain.methods.net_trim.outcome import Answer, finish
from retrain.methods.net_trim.task import Task, chosen_solver, link_scales, task_of
from retrain.methods.pool import solve_layers
from retrain.stream.layer_report import LayerResult
from retrain.stream.stream import Array, LayerStream, changed
from solvers import SolveResult, solve_admm, solve_count, solve_newton
from solvers.path.count import held_zeros
from solvers.program import ConstrainedProgram

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
        Network and calibration data; the new weights are committed to it.
    options : NetTrimOptions
        Options of the method.
    layers : sequence of str, optional
        Names of the layers to retrain; by default all that can be.
    finished : mapping from str to sequence of array, optional
        Weights (one matrix per group) of layers that an earlier run finished. They are committed
        when their turn comes and not yielded again.

    Yields
    ------
    LayerResult
        Weights and report per layer: in execution order for the cascade, in order of completion for
        the parallel scheme. Layers that were not certified keep their dense weights.

    Raises
    ------
    ValueError
        If a named layer does not exist or cannot be retrained.

    Notes
    -----
    Memory: the activations of one layer (cascade) or of ``options.jobs`` layers (parallel), each
    within ``options.memory`` bytes.

    References
    ----------
    Aghasi et al., Net-Trim (2017), Algorithms 1 and 2.
    """
    specs = chosen(stream, layers)
    done = dict(finished or {})
    scales = link_scales(stream) if options.link_normalised else {}
    if options.scheme == "parallel":
        open_specs = [spec for spec in specs if spec.name not in done]
        for name, weights in done.items():
            commit(stream, name, weights)
        tasks = (task_of(stream, spec, options, scales, upstream=False) for spec in open_specs)
        for answer in solve_layers(
            _solve, tasks, options, jobs=options.jobs, threads=options.threads_per_job
        ):
            yield finish(stream, answer, options)
        return
    upstream = False
    for spec in specs:
        if spec.name in done:
            commit(stream, spec.name, done[spec.name])
        else:
            task = task_of(stream, spec, options, scales, upstream=upstream)
            _log.info("solving: layer %s (%d of %d)", spec.name, specs.index(spec) + 1, len(specs))
            with threadpool_limits(options.threads_per_job):
                answer = _solve(task, options)
            yield finish(stream, answer, options)
        upstream = upstream or changed(stream, spec)


def _solve(task: Task, options: NetTrimOptions) -> Answer:
    """Solve a layer's programs, or search for those whose solutions have the zeros wanted."""
    solve: Callable[..., SolveResult] = solve_admm
    if chosen_solver(task, options)[0] == "newton":
        solve = partial(solve_newton, threads=options.threads_per_job)
    limits = {
        "tolerance": options.tolerance,
        "violation_tolerance": options.violation_tolerance,
        "max_iterations": options.max_iterations,
    }
    if options.sparsity is None:
        return Answer(task, tuple(solve(program, **limits) for program in task.programs))
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
    return Answer(
        replace(task, programs=programs, epsilons=epsilons),
        tuple(point.result for point in points),
    )
