"""A layer's programs: rows, epsilon, support and fit weight of each group."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from array_api_compat import array_namespace, device

from retrain.methods.net_trim.options import Chosen, NetTrimOptions
from retrain.stream.chain import activate
from retrain.stream.stream import Array, LayerSpec, LayerStream, collect, sample_rows
from solvers import trim_program
from solvers.arrays import norm, on_host, to_numpy
from solvers.newton.layer import BLOCK
from solvers.program import Program

_log = logging.getLogger(__name__)


SLAB = 8192
"""Number of samples whose responses are held in float64 at the same time. Larger slabs take more
memory and fewer calls; results differ in the last bits only. Chosen by hand."""


@dataclass(frozen=True, eq=False)
class Task:
    """One layer's programs, one per group; sent to a worker and back.

    Attributes
    ----------
    spec : LayerSpec
        Layer.
    programs : tuple of Program
        Program of each group.
    epsilons : tuple of float
        Radius of each group, in the unit of the targets' Frobenius norm.
    total_rows : int
        Number of rows that the layer has on the data.
    seconds : float
        Wall time of stating the programs.
    """

    spec: LayerSpec
    programs: tuple[Program, ...]
    epsilons: tuple[float, ...]
    total_rows: int
    seconds: float


def link_scales(stream: LayerStream) -> dict[str, float]:
    """Compute the product of |W_j|_1 over the layers up to each one.

    Parameters
    ----------
    stream : LayerStream
        Chain of dense layers.

    Returns
    -------
    dict from str to float
        Product by layer name.

    Raises
    ------
    ValueError
        If the network is not a chain of dense layers.

    References
    ----------
    Aghasi et al., Net-Trim (2017), section 2 (link normalisation).
    """
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
    """Compute the number of rows of a layer that a solve can hold in memory.

    A row takes its inputs three times (current, dense, one float64 slab). ADMM adds about sixteen
    arrays of the responses' size, twice that where it continues from float32 in float64. Newton
    adds twelve, the inputs in float64, and, for each block of units in work, sixteen arrays and the
    inputs of the active ceilings. Two blocks are counted, rather than one per thread, so that the
    rows and with them the results do not depend on the number of threads.

    Parameters
    ----------
    spec : LayerSpec
        Layer.
    memory : float
        Memory in bytes.
    itemsize : int
        Bytes per number of the layer's arrays.
    solver : {"admm", "newton"}
        Solver.

    Returns
    -------
    int
        Number of rows, at least 1.
    """
    return max(1, int(memory / _bytes_per_row(spec, itemsize, solver)))


def _bytes_per_row(spec: LayerSpec, itemsize: int, solver: Chosen) -> int:
    n_in, n_out = spec.shape[0] + 1, spec.shape[1]
    if solver == "newton":
        block = 8 * (16 * min(BLOCK, n_out) + n_in)
        return itemsize * (3 * n_in + 12 * n_out) + 8 * n_in + 2 * block
    return itemsize * (3 * n_in + 16 * n_out)


def oversized(stream: LayerStream, spec: LayerSpec, options: NetTrimOptions) -> str | None:
    """Say why not even one row of a layer fits into ``options.memory``.

    Parameters
    ----------
    stream : LayerStream
        Network.
    spec : LayerSpec
        Layer.
    options : NetTrimOptions
        Options of the method.

    Returns
    -------
    str or None
        Reason with the remedy; None where at least one row fits.
    """
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


def task_of(
    stream: LayerStream,
    spec: LayerSpec,
    options: NetTrimOptions,
    scales: Mapping[str, float],
    *,
    upstream: bool,
) -> Task:
    """State a layer's programs.

    Parameters
    ----------
    stream : LayerStream
        Network and calibration data.
    spec : LayerSpec
        Layer.
    options : NetTrimOptions
        Options of the method.
    scales : mapping from str to float
        Factors of the absolute epsilon by layer name (`link_scales`); 1 where a layer has no entry.
    upstream : bool
        Whether an earlier layer has changed (cascade).

    Returns
    -------
    Task
        Programs of the layer.

    Raises
    ------
    ValueError
        If the layer has no rows, or the default fit weight is not available.

    References
    ----------
    Aghasi et al., Net-Trim (2017), Algorithms 1 and 2, eq. (7).
    """
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
    return Task(spec, tuple(programs), tuple(epsilons), total, seconds)


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
    """State one group's TRIM(X, Y, V, epsilon), with its epsilon."""
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
    """Mark where weights may be nonzero: where dense ones are, and the bias; None: everywhere."""
    xp = array_namespace(old_weight)
    support = old_weight != 0
    if spec.bias:
        support[-1, :] = True
    return None if bool(xp.all(support)) else support


def _fit_weight(
    options: NetTrimOptions, old_weight: Array, epsilon: float, spec: LayerSpec
) -> float:
    """Return lambda of (11): the given value, or |W_l|_1 / epsilon_l^2 (see the module)."""
    if options.fit_weight is not None:
        return options.fit_weight
    size = float(np.abs(to_numpy(old_weight)[: spec.shape[0]].astype(np.float64)).sum())
    if not (size > 0 and epsilon > 0):
        raise ValueError(
            f"fit_weight: no default for layer {spec.name!r}, whose |W|_1 is {size:.3g} and "
            f"epsilon {epsilon:.3g}; give one"
        )
    return size / epsilon**2


def _norm_on(targets: Array, values: Array, spec: LayerSpec) -> float:
    """Compute the Frobenius norm of `values` over the fitted entries, in float64."""
    xp = array_namespace(values)
    return norm(values if spec.follows == "linear" else xp.where(targets > 0, values, 0 * values))


def chosen_solver(task: Task, options: NetTrimOptions) -> tuple[Chosen, str]:
    """Return the solver for a layer's programs.

    Parameters
    ----------
    task : Task
        Programs of the layer.
    options : NetTrimOptions
        Options of the method.

    Returns
    -------
    solver : {"admm", "newton"}
        Solver to use.
    reason : str
        Why it was chosen.
    """
    return options.solver_on(str(device(task.programs[0].inputs)))
