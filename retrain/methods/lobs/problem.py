"""One layer's programs: the quadratic, the weights that may be nonzero, and how many to remove."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import numpy as np
from array_api_compat import array_namespace, device

from retrain.methods.lobs.moments import Moments, best_dense, stream_moments
from retrain.methods.lobs.options import LobsOptions
from retrain.stream.stream import Array, LayerSpec, LayerStream
from solvers.arrays import on_host, to_numpy
from solvers.obs import (
    LayerProblem,
    Pattern,
    layer_count,
    layer_problem,
    parse_pattern,
    per_layer,
    per_layer_count,
    sensitivities,
)
from solvers.obs.greedy import PATH_DAMPING

_log = logging.getLogger(__name__)

QUANTILES = (0.0, 0.1, 0.25, 0.5, 0.75, 0.9, 0.99, 1.0)
"""Quantiles of the sensitivities in a layer's report; a convention, used for display only."""

SMALL_SENSITIVITY = 1e-3
"""Sensitivity below which a weight is counted as insensitive in a layer's report, in the unit of
L_q. From the paper (figure 3); used for display only."""


@dataclass(frozen=True, eq=False)
class Group:
    """One group's program.

    Attributes
    ----------
    moments : Moments
        Quadratic of the group.
    old : array, shape (n_in [+ 1], n_out)
        Weight before pruning.
    problem : LayerProblem
        Program as the solvers take it.
    pattern : Pattern or None
        Pattern to prune to; None with a tolerance.
    wanted : int
        Number of zeros that the pattern asks for, zeros that must stay included; -1 with a
        tolerance.
    sensitivities : dict
        Summary of the sensitivities L_q before pruning, as JSON values.
    """

    moments: Moments
    old: Array
    problem: LayerProblem
    pattern: Pattern | None
    wanted: int
    sensitivities: dict[str, Any]


@dataclass(frozen=True, eq=False)
class Task:
    """One layer's programs, one per group; sent to a worker and back.

    Attributes
    ----------
    spec : LayerSpec
        Layer.
    groups : tuple of Group
        Program of each group.
    seconds : float
        Wall time spent on the layer so far.
    """

    spec: LayerSpec
    groups: tuple[Group, ...]
    seconds: float


def state_layer(stream: LayerStream, spec: LayerSpec, options: LobsOptions) -> Task:
    """Accumulate a layer's Hessians and state its programs.

    Parameters
    ----------
    stream : LayerStream
        Network and calibration data.
    spec : LayerSpec
        Layer.
    options : LobsOptions
        Options of the method.

    Returns
    -------
    Task
        Programs of the layer.

    Raises
    ------
    ValueError
        If the Hessian is singular to working precision, or the pattern does not fit the layer's
        zeros.
    """
    started = time.perf_counter()
    groups = tuple(
        _state_group(stream, spec, group, pattern, options)
        for group, pattern in enumerate(patterns_of(spec, options))
    )
    return Task(spec, groups, time.perf_counter() - started)


def _state_group(
    stream: LayerStream, spec: LayerSpec, group: int, pattern: Pattern | None, options: LobsOptions
) -> Group:
    _log.info("moments: layer %s", spec.name)
    moments = stream_moments(stream, spec, group, options.calibration)
    old = stream.weight(spec.name, group)
    rows = spec.shape[0] + int(spec.bias and options.bias == "update")
    part = replace(
        moments,
        hessian=moments.hessian[:rows, :rows],
        gradient=None if moments.gradient is None else moments.gradient[:rows, :],
    )
    damping = PATH_DAMPING if options.damping is None else options.damping
    try:
        allowed = _allowed(spec, old[:rows, :], options)
        problem = layer_problem(
            on_host(best_dense(old[:rows, :], part, damping)),
            on_host(part.hessian),
            allowed=on_host(allowed),
            free_rows=range(spec.shape[0], rows),
        )
        summary = _sensitivities(problem, damping)
    except ValueError as error:
        raise ValueError(f"layer {spec.name!r}: {error}") from error
    wanted = -1
    if pattern is not None:
        wanted = layer_count(pattern, to_numpy(problem.allowed), problem.prunable)
    return Group(moments, old, problem, pattern, wanted, summary)


def _allowed(spec: LayerSpec, weight: Array, options: LobsOptions) -> Array:
    """Mark where a weight may be nonzero: everywhere, or where it is now; and in the bias."""
    xp = array_namespace(weight)
    allowed = xp.ones(tuple(weight.shape), dtype=xp.bool, device=device(weight))
    if options.zeros == "free":
        return allowed
    zero = weight[: spec.shape[0], :] == 0
    if options.pattern == "inputs" and bool(xp.any(xp.any(zero, axis=1) & ~xp.all(zero, axis=1))):
        raise ValueError(
            "zeros: an input is zero for some units only, and whole inputs need whole rows; let "
            "zeros become free (zeros='free', --free-zeros)"
        )
    allowed[: spec.shape[0], :] = ~zero
    return allowed


def _sensitivities(problem: LayerProblem, damping: float) -> dict[str, Any]:
    """Summarise the paper's L_q before anything is removed."""
    values = sensitivities(problem, damping=damping).saliency[problem.prunable]
    quantiles = np.quantile(values, QUANTILES)
    return {
        "damping": damping,
        "quantiles": {f"{q:g}": float(v) for q, v in zip(QUANTILES, quantiles, strict=True)},
        "below_0.001": float(np.mean(values < SMALL_SENSITIVITY)),
    }


def patterns_of(spec: LayerSpec, options: LobsOptions) -> list[Pattern | None]:
    """Return the pattern of each group of a layer; the layer's count is divided evenly and exactly.

    Parameters
    ----------
    spec : LayerSpec
        Layer.
    options : LobsOptions
        Options of the method.

    Returns
    -------
    list of (Pattern or None)
        Pattern per group; None with a tolerance.
    """
    if options.tolerance is not None:
        return [None] * spec.groups
    sparsity = options.sparsity_for(spec.name)
    if options.pattern != "layer" or sparsity is None:
        return [parse_pattern(options.pattern, sparsity)] * spec.groups
    count = per_layer(sparsity).removed(spec.size)
    edges = [count * group // spec.groups for group in range(spec.groups + 1)]
    return [per_layer_count(stop - start) for start, stop in pairwise(edges)]
