"""What solvers answer, each on what it is given: ours a layer, the peers a few of its units."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from bench import peers
from bench.peers import Limits
from bench.problems import in_single_precision, some_units, typical_units
from bench.solver_tables import OURS
from solvers import (
    Certificate,
    RegularisedProgram,
    SolveResult,
    solve_admm,
    solve_cvxpy,
    solve_newton,
)
from solvers.program import Program

LARGEST_BALL = 20_000


@dataclass(frozen=True)
class Answer:
    """What a solver gave: the program it solved (a few units or all), its settings and times."""

    program: Program
    units: int
    certificate: Certificate
    zeros: float
    iterations: int
    status: str
    setup_seconds: float
    seconds: float
    cpu_seconds: float
    settings: dict[str, Any]
    dtype: str = "float64"


def run_ours(
    solve: Callable[..., SolveResult], single: bool, program: Program, limits: Limits, units: int
) -> Answer:
    """All units at once, judged on the data as it is, whatever dtype was solved in."""
    given = in_single_precision(program) if single else program
    started, used = time.perf_counter(), time.process_time()
    gap, violation = limits
    result = solve(given, tolerance=gap, violation_tolerance=violation)
    seconds, cpu = time.perf_counter() - started, time.process_time() - used
    return Answer(
        program,
        program.shape[2],
        program.certificate(
            np.asarray(result.weight, program.inputs.dtype), np.asarray(result.multiplier, float)
        ),
        float(np.mean(result.weight == 0)),
        result.iterations,
        result.status.value,
        result.setup_seconds,
        seconds,
        cpu,
        {},
        str(given.inputs.dtype),
    )


def run_cvxpy(program: Program, limits: Limits, units: int) -> Answer:
    """Clarabel through cvxpy; typical units, or all where a ball ties them."""
    few = _few(program, units)
    used = time.process_time()
    result = solve_cvxpy(few, tolerance=min(limits))
    return Answer(
        few,
        few.shape[2],
        result.certificate,
        _nearly_zero(result.weight),
        result.iterations,
        result.status.value,
        result.setup_seconds,
        result.setup_seconds + result.solve_seconds,
        time.process_time() - used,
        {},
    )


_ENOUGH: dict[tuple[str, int, Limits], float] = {}
"""What a peer's own accuracy had to be for a unit, so that later rounds begin there."""


def run_peer(name: str, form: str, program: Program, limits: Limits, units: int) -> Answer:
    """A general solver on typical units, one by one, or on the layer where a ball ties them."""
    regularised = isinstance(program, RegularisedProgram)
    form = form if regularised else "lifted"
    chosen = typical_units(program, units) if regularised else [-1]
    parts, found = [], []
    for unit in chosen:
        part = some_units(program, [unit]) if regularised else program
        key = (f"{name}:{form}:{id(program)}", unit, limits)
        attempt = peers.solve_unit(name, part, limits, form, _ENOUGH.get(key))
        if attempt.certified:
            _ENOUGH[key] = attempt.accuracy
        parts.append(part)
        found.append(attempt)
    together = _few(program, units)
    fields = Certificate.__dataclass_fields__
    certificate = found[0].certificate
    if regularised:
        certificate = Certificate(
            **{n: np.hstack([getattr(each.certificate, n) for each in found]) for n in fields}
        )
    return Answer(
        together,
        together.shape[2],
        certificate,
        _nearly_zero(np.hstack([each.weight for each in found])),
        max(each.iterations for each in found),
        ", ".join(sorted({each.status for each in found})),
        0.0,
        sum(each.seconds for each in found),
        sum(each.cpu_seconds for each in found),
        {"form": form, "accuracies": [each.accuracy for each in found]},
    )


def solver(name: str) -> Callable[[Program, Limits, int], Answer]:
    """Look a solver up: ours, cvxpy, a peer, or PEER:FORM."""
    ours = {"newton": solve_newton, "admm": solve_admm}
    kind, _, detail = name.partition(":")
    if kind in ours and detail in ("", "float32"):
        return partial(run_ours, ours[kind], detail == "float32")
    if name == "cvxpy":
        return run_cvxpy
    if kind in peers.PEERS and (not detail or detail in peers.PEERS[kind].forms):
        return partial(run_peer, kind, detail or peers.PEERS[kind].forms[0])
    known = (*OURS, "cvxpy", *peers.PEERS)
    raise ValueError(f"solver: want one of {', '.join(known)}, or PEER:FORM; got {name!r}")


def can_state(name: str, program: Program) -> bool:
    """Tell whether a solver takes this form: the ball is no quadratic program, and ties all units.

    A layer of more than `LARGEST_BALL` responses is beyond the general solvers.
    """
    kind, _, form = name.partition(":")
    if kind in ("newton", "admm") or isinstance(program, RegularisedProgram):
        return True
    if program.level.size > LARGEST_BALL:
        return False
    return kind == "cvxpy" or (peers.PEERS[kind].ball and form in ("", "lifted"))


def _few(program: Program, units: int) -> Program:
    """Typical units of a regularised program; the whole constrained one."""
    if isinstance(program, RegularisedProgram):
        return some_units(program, typical_units(program, units))
    return program


def _nearly_zero(weight: np.ndarray) -> float:
    """Share of weights that a solver without exact zeros means to be zero."""
    return float(np.mean(np.abs(weight) <= 1e-6 * np.abs(weight).max()))
