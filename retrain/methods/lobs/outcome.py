"""The outcome of a layer: the claims on the saved weights checked, and the report."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from array_api_compat import array_namespace

from retrain.methods.lobs.moments import RowErrors, row_errors
from retrain.methods.lobs.options import LobsOptions
from retrain.methods.lobs.problem import Group, Task
from retrain.stream.details import LobsDetails
from retrain.stream.layer_report import LayerReport, LayerResult
from retrain.stream.stream import Array, LayerSpec, LayerStream
from solvers.arrays import like, to_numpy
from solvers.obs import (
    Pruned,
    dead_inputs,
)
from solvers.result import Status

_log = logging.getLogger(__name__)


_AGREEMENT = 1e-9
"""Relative difference between the error from the Hessian and the error from the rows up to which
they agree, beside `Moments.rounding`. A larger value accepts disagreements that show a defect; a
smaller one refuses sound layers for the rounding of long sums. Chosen by hand."""

_STORED = 1e-5
"""Relative excess of a squared error over its squared tolerance that is accepted, since rounding
the weights to float32 can add it. A smaller value refuses layers pruned right up to the tolerance.
Chosen by hand."""


@dataclass(frozen=True)
class Checked:
    """Check of one group's weights as they were saved.

    Attributes
    ----------
    rows : RowErrors
        Errors measured row by row.
    quadratic : float
        E(D) computed from the Hessian.
    agrees : bool
        Whether the two errors agree within rounding.
    exact : bool
        Whether exactly the weights meant to be removed are zero, and as many as the pattern asks
        for.
    removed : int
        Number of weights removed.
    """

    rows: RowErrors
    quadratic: float
    agrees: bool
    exact: bool
    removed: int


def finish(
    stream: LayerStream, task: Task, results: Sequence[Pruned | None], options: LobsOptions
) -> LayerResult:
    """Commit a layer's weights, check them as they were saved, and report.

    Parameters
    ----------
    stream : LayerStream
        Network and calibration data; the weights are committed to it.
    task : Task
        Programs of the layer.
    results : sequence of (Pruned or None)
        Result per group; None for a group in which nothing was to be removed.
    options : LobsOptions
        Options of the method.

    Returns
    -------
    LayerResult
        Weights as the stream holds them, and the report; ``certified`` is False where a check
        failed.
    """
    started = time.perf_counter()
    _log.info("checking: layer %s, row by row", task.spec.name)
    spec = task.spec
    for number, (group, result) in enumerate(zip(task.groups, results, strict=True)):
        if result is not None:
            new = to_numpy(group.old).copy()
            new[: result.weight.shape[0]] = to_numpy(result.weight)
            stream.commit(spec.name, like(new, group.old), number)
    checks = [
        _check_group(stream, spec, number, group, result, options)
        for number, (group, result) in enumerate(zip(task.groups, results, strict=True))
    ]
    task = replace(task, seconds=task.seconds + time.perf_counter() - started)
    weights = [stream.weight(spec.name, group) for group in range(spec.groups)]
    return LayerResult(weights, _report(task, results, weights, checks, options))


def _check_group(
    stream: LayerStream,
    spec: LayerSpec,
    number: int,
    group: Group,
    result: Pruned | None,
    options: LobsOptions,
) -> Checked:
    """Recompute a group's error from rows and count its zeros, from the weights as saved."""
    saved = stream.weight(spec.name, number)
    xp = array_namespace(saved)
    change = xp.astype(saved, xp.float64) - xp.astype(group.old, xp.float64)
    quadratic = group.moments.error(change)
    measured = row_errors(stream, spec, number, options.calibration, group.old, saved)
    apart = abs(quadratic - measured.error)
    agrees = apart <= _AGREEMENT * measured.error + group.moments.rounding(change)
    values = to_numpy(saved)[: spec.shape[0]]
    if result is None:
        return Checked(measured, quadratic, agrees, True, group.wanted)
    gone = ~to_numpy(result.kept)[: spec.shape[0]]
    removed = int(gone.sum())
    exact = removed == (removed if group.pattern is None else group.wanted)
    return Checked(measured, quadratic, agrees, exact and not np.any(values[gone]), removed)


def _report(
    task: Task,
    results: Sequence[Pruned | None],
    weights: Sequence[Array],
    checks: Sequence[Checked],
    options: LobsOptions,
) -> LayerReport:
    """Sum up a layer; groups add their squared errors, and certify together."""
    spec = task.spec
    error = sum(check.rows.error for check in checks)
    energy = sum(check.rows.energy for check in checks)
    activated = math.hypot(*(check.rows.activated for check in checks))
    target = math.hypot(*(check.rows.target for check in checks))
    tolerance = options.tolerance_for(spec.name)
    within = tolerance is None or error <= tolerance**2 * (1 + _STORED)
    certified = within and all(check.agrees and check.exact for check in checks)
    solved = [result for result in results if result is not None]
    said = dict.fromkeys(result.note or "done" for result in solved)
    details = LobsDetails(
        method=options.method_for(spec),
        pattern=options.pattern,
        calibration=options.calibration,
        bias=("updated" if options.bias == "update" else "kept") if spec.bias else "none",
        damping=solved[0].damping if solved else options.damping,
        sparsity=options.sparsity_for(spec.name),
        tolerance=tolerance,
        removed=sum(check.removed for check in checks),
        dead_inputs=[int(dead_inputs(to_numpy(g.problem.hessian)).sum()) for g in task.groups],
        layer_error=error,
        layer_error_from_hessian=sum(check.quadratic for check in checks),
        rms_error=math.sqrt(error),
        energy=energy,
        relative_layer_error=error / energy if energy > 0 else None,
        method_status="; ".join(said) or "nothing to remove",
        sensitivities=[group.sensitivities for group in task.groups],
    )
    return LayerReport(
        name=spec.name,
        kind=spec.kind,
        shape=spec.shape,
        follows=spec.follows,
        method="lobs",
        weights=spec.size,
        zeros_before=sum(int((to_numpy(g.old)[: spec.shape[0]] == 0).sum()) for g in task.groups),
        zeros=sum(int((to_numpy(weight)[: spec.shape[0]] == 0).sum()) for weight in weights),
        rows=checks[0].rows.rows,
        total_rows=checks[0].rows.rows,
        status=Status.SOLVED if certified else Status.INEXACT,
        certified=certified,
        dense_units=0,
        error=activated,
        relative_error=activated / target if target > 0 else 0.0,
        seconds=task.seconds,
        details=details,
    )
