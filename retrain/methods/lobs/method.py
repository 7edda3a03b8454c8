"""Second-order pruning over a layer stream: the paper's L-OBS and its exact relatives.

Each layer, in execution order:

    H = (1/n) sum x x^T           streamed over all rows (`moments.py`, with the three calibrations)
    What = prune(W, H, pattern)   a method of `solvers.obs.METHODS`; biases updated, never pruned
    E(What - W)                   from H, and a second time from the rows

`one-shot` is the paper's; the default, `auto`, is `swaps` (the exact greedy path, then exchanges of
kept for removed weights), `large` for layers of more than 2048 inputs, and `inputs` for the pattern
of that name.

A layer is *certified* when the claims on the saved weights, after any rounding to the network's own
dtype, have been confirmed by an independent computation: exactly as many weights as the pattern
says are zero; the error computed from H equals the one measured row by row, within the rounding
that the sizes involved explain; and with a tolerance, that error is within it. The certificate says
nothing about optimality: unlike Net-Trim's programs this one is combinatorial. Weights of a layer
that is not certified are used all the same.

Zeros of the dense network stay zero by default and count as removed, so that a pruned network can
be pruned again. A grouped layer has one program per group; the layer's count, or the square of its
tolerance, is shared evenly among them.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import numpy as np
from threadpoolctl import threadpool_limits

from retrain.methods.layers import chosen, commit
from retrain.methods.lobs.options import TO_TOLERANCE, LobsOptions, bytes_needed
from retrain.methods.lobs.outcome import finish
from retrain.methods.lobs.problem import Group, Task, patterns_of, state_layer
from retrain.methods.pool import solve_layers
from retrain.stream.layer_report import LayerResult
from retrain.stream.stream import Array, LayerSpec, LayerStream
from solvers.arrays import to_numpy
from solvers.obs import (
    LayerProblem,
    Pattern,
    Pruned,
    improve,
    layer_count,
    pattern_support,
    prune,
    prune_greedy,
    prune_inputs,
    prune_large,
    prune_one_shot,
    prune_sweep,
    removal_path,
)

_log = logging.getLogger(__name__)


def lobs(
    stream: LayerStream,
    options: LobsOptions,
    *,
    layers: Sequence[str] | None = None,
    finished: Mapping[str, Sequence[Array]] | None = None,
) -> Iterator[LayerResult]:
    """Prune a network's layers by second-order information, yielding each as it is done.

    A layer is committed to the stream before it is yielded, cast to the network's own type, so
    that sequential calibration sees exactly what a caller saves. A layer in which nothing is to be
    removed stays as it is, bit for bit.

    Parameters
    ----------
    stream : LayerStream
        Network and calibration data; the new weights are committed to it.
    options : LobsOptions
        Options of the method.
    layers : sequence of str, optional
        Names of the layers to prune; by default all that can be retrained.
    finished : mapping from str to sequence of array, optional
        Weights (one matrix per group) of layers that an earlier run finished. They are committed
        and not yielded again.

    Yields
    ------
    LayerResult
        Weights and report per layer: in execution order, or in order of completion with several
        jobs.

    Raises
    ------
    ValueError
        If a named layer does not exist, cannot be retrained, has no number in a mapping, would take
        more than `memory`, or if its Hessian is singular to working precision.

    Notes
    -----
    Cost per layer: two passes of the data up to the layer, and the solve (`retrain.lobs` has the
    figures). Memory: `bytes_needed` for each of ``options.jobs`` layers.

    References
    ----------
    Dong, Chen, Pan, Learning to Prune Deep Neural Networks via Layer-wise Optimal Brain Surgeon
    (NIPS 2017).
    """
    specs = chosen(stream, layers)
    for spec in specs:
        _check(spec, options)
    done = dict(finished or {})
    if options.jobs > 1:
        for name, weights in done.items():
            commit(stream, name, weights)
        tasks = (state_layer(stream, spec, options) for spec in specs if spec.name not in done)
        for task, results in solve_layers(
            solve_layer, tasks, options, jobs=options.jobs, threads=options.threads_per_job
        ):
            yield finish(stream, task, results, options)
        return
    for spec in specs:
        if spec.name in done:
            commit(stream, spec.name, done[spec.name])
            continue
        with threadpool_limits(options.threads_per_job):
            task = state_layer(stream, spec, options)
            result = finish(stream, *solve_layer(task, options), options)
        yield result  # outside the limit: the caller's code keeps the caller's threads


def lobs_plan(
    stream: LayerStream, options: LobsOptions, layers: Sequence[str]
) -> Iterator[tuple[LayerSpec, int | None, float]]:
    """Describe what `lobs` would do, without looking at the data.

    Parameters
    ----------
    stream : LayerStream
        Network.
    options : LobsOptions
        Options of the method.
    layers : sequence of str
        Names of the layers to prune.

    Yields
    ------
    tuple of (LayerSpec, int or None, float)
        Layer, number of weights to remove (None with a tolerance; existing zeros are not counted),
        and memory in bytes.

    Raises
    ------
    ValueError
        If a layer does not exist, cannot be retrained, or has no number in a mapping. Layers that
        need more than ``options.memory`` are part of the plan.
    """
    for spec in chosen(stream, layers):
        options.sparsity_for(spec.name)
        options.tolerance_for(spec.name)
        everything = np.ones(spec.shape, dtype=bool)
        counts = [
            None
            if pattern is None
            else layer_count(pattern, everything, np.ones(spec.shape[0], dtype=bool))
            for pattern in patterns_of(spec, options)
        ]
        known = [count for count in counts if count is not None]
        yield spec, sum(known) if known else None, bytes_needed(spec, options)


def _check(spec: LayerSpec, options: LobsOptions) -> None:
    """Refuse what would fail later, before any layer is touched."""
    options.sparsity_for(spec.name)
    options.tolerance_for(spec.name)
    reason = oversized(spec, options)
    if reason is not None:
        raise ValueError(reason)


def oversized(spec: LayerSpec, options: LobsOptions) -> str | None:
    """Say why a layer's solve does not fit into ``options.memory``.

    Parameters
    ----------
    spec : LayerSpec
        Layer.
    options : LobsOptions
        Options of the method.

    Returns
    -------
    str or None
        Reason with the remedy; None where the layer fits.
    """
    needed = bytes_needed(spec, options)
    if needed <= options.memory:
        return None
    return (
        f"memory: layer {spec.name!r} with {spec.shape[0]} inputs takes about "
        f"{needed / 2**30:.2g} GiB, more than the {options.memory / 2**30:.2g} GiB allowed; raise "
        f"it (--memory), or leave the layer out (--skip {spec.name})"
    )


# --- solving ---------------------------------------------------------------------------------


def solve_layer(task: Task, options: LobsOptions) -> tuple[Task, tuple[Pruned | None, ...]]:
    """Solve a layer's programs; None for a group in which nothing is to be removed.

    Parameters
    ----------
    task : Task
        Programs of the layer.
    options : LobsOptions
        Options of the method.

    Returns
    -------
    Task
        With the seconds that it took.
    tuple
        A result for each group.
    """
    started = time.perf_counter()
    _log.info("solving: layer %s", task.spec.name)
    try:
        results = tuple(_solve_group(task.spec, group, options) for group in task.groups)
    except ValueError as error:
        raise ValueError(f"layer {task.spec.name!r}: {error}") from error
    return replace(task, seconds=task.seconds + time.perf_counter() - started), results


def _solve_group(spec: LayerSpec, group: Group, options: LobsOptions) -> Pruned | None:
    method, threads = options.method_for(spec), options.threads_per_job
    damped = {} if options.damping is None else {"damping": options.damping}
    if group.pattern is None:
        tolerance = options.tolerance_for(spec.name)
        assert tolerance is not None
        # The groups share the layer's mean squared error.
        tolerance /= math.sqrt(spec.groups)
        if method == "greedy":
            damped["threads"] = threads
        return TO_TOLERANCE[method](group.problem, tolerance, **damped)
    prunable = to_numpy(group.old)[: spec.shape[0]]
    if group.wanted == int((prunable == 0).sum()) and _stays(group, options):
        return None
    if not damped:
        return prune(group.problem, group.pattern, method, threads=threads)
    return _prune_damped(group.problem, group.pattern, method, damped["damping"], threads)


def _stays(group: Group, options: LobsOptions) -> bool:
    """Tell whether the existing zeros already are the zeros asked for."""
    return options.zeros == "stay" or group.wanted == 0


def _prune_damped(
    problem: LayerProblem, pattern: Pattern, method: str, damping: float, threads: int
) -> Pruned:
    """Run a method with the caller's damping instead of the method's default."""
    if method == "one-shot":
        return prune_one_shot(problem, pattern, damping=damping)
    if method == "sweep":
        return prune_sweep(problem, pattern, damping=damping)
    if method == "swaps":
        path = removal_path(problem, pattern=pattern, damping=damping, threads=threads)
        found = improve(problem, pattern_support(problem, path, pattern), pattern, threads=threads)
        return replace(found, damping=damping)
    threaded = {"greedy": prune_greedy, "large": prune_large, "inputs": prune_inputs}
    return threaded[method](problem, pattern, damping=damping, threads=threads)
