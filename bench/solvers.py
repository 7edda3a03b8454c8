"""Solvers of the layer programs against each other, at the same certified accuracy.

Every problem is named, seeded and sized (`bench.problems`). Every answer is judged by the program
itself, in float64, not by what its solver says, and answers that miss the accuracy are printed as
losses. The general solvers (Clarabel, SCS, OSQP; PIQP and ProxQP where they are installed) are
called by their own interfaces, one unit at a time, on the form each is fastest with (``--forms``
compares), and are given a few units, from all sizes of Omega. A solver's own tolerance says little
about the certificate, so it is tightened until the certificate holds, and only the run that holds
is counted.

Times are processor time a unit, set-up included. Passes are processor time for all units over that
of one pair of products X U, X^T Z in float32. BLAS has one thread unless told otherwise.

Rows are JSON lines; a row that is in the file already is not run again. A change of what is
measured, of this bench or of the versions makes other rows.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.metadata
import json
import os
import platform
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import IO, Any

import numpy as np
from threadpoolctl import threadpool_limits

from bench import peers
from bench.problems import (
    SETS,
    Instance,
    Problem,
    in_single_precision,
    problem,
    some_units,
    typical_units,
)
from bench.solver_tables import OURS, Row, report
from solvers import (
    Certificate,
    RegularisedProgram,
    SolveResult,
    solve_admm,
    solve_cvxpy,
    solve_newton,
)
from solvers.program import Program

ROOT = Path(__file__).resolve().parents[1]
_PAIRS = 5
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
    solve: Callable[..., SolveResult], single: bool, program: Program, tolerance: float, units: int
) -> Answer:
    """All units at once, judged on the data as it is, whatever dtype was solved in."""
    given = in_single_precision(program) if single else program
    started, used = time.perf_counter(), time.process_time()
    result = solve(given, tolerance=tolerance)
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


def run_cvxpy(program: Program, tolerance: float, units: int) -> Answer:
    """Clarabel through cvxpy; typical units, or all where a ball ties them."""
    few = _few(program, units)
    used = time.process_time()
    result = solve_cvxpy(few, tolerance=tolerance)
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


_ENOUGH: dict[tuple[str, int, float], float] = {}
"""What a peer's own accuracy had to be for a unit, so that later rounds begin there."""


def run_peer(name: str, form: str, program: Program, tolerance: float, units: int) -> Answer:
    """A general solver on typical units, one by one, or on the layer where a ball ties them."""
    regularised = isinstance(program, RegularisedProgram)
    form = form if regularised else "lifted"
    chosen = typical_units(program, units) if regularised else [-1]
    parts, found = [], []
    for unit in chosen:
        part = some_units(program, [unit]) if regularised else program
        key = (f"{name}:{form}:{id(program)}", unit, tolerance)
        attempt = peers.solve_unit(name, part, tolerance, form, _ENOUGH.get(key))
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


def solver(name: str) -> Callable[[Program, float, int], Answer]:
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


# Rows.


@cache
def environment(kind: str) -> Row:
    """What, besides the plan, makes a row: hash of the code that is measured, and versions."""
    ours = kind in ("newton", "admm")
    files = sorted((ROOT / "solvers").glob("*.py")) if ours else [ROOT / "bench/peers.py"]
    files += [ROOT / "bench" / name for name in ("problems.py", "forms.py")]
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()[:12]
    packages = ["numpy", "scipy"]
    if ours:
        packages.append("numba")
    if kind in peers.PEERS:
        packages.append(peers.PEERS[kind].package)
    if kind == "cvxpy":
        packages += ["cvxpy", "clarabel"]
    return {
        "code": digest,
        "versions": {name: importlib.metadata.version(name) for name in packages},
        "python": platform.python_version(),
        "machine": platform.machine(),
        "cores": os.cpu_count(),
    }


def key_of(row: Row) -> str:
    """What makes a row the same measurement."""
    names = ("problem", "solver", "round", "tolerance", "threads", "units", "code", "versions")
    return json.dumps([row[name] for name in names], sort_keys=True)


def measure(instance: Instance, plan: Row) -> Row:
    """Run one solver once and judge its answer."""
    program, tolerance = instance.program, plan["tolerance"]
    with threadpool_limits(plan["threads"]):
        answer = solver(plan["solver"])(program, tolerance, plan["units"])
        pair = pair_seconds(program)
    certificate, units = answer.certificate, answer.units
    objective = float(np.sum(certificate.objective))
    optimum = None
    if instance.optimum is not None and units == program.shape[2]:
        optimum = float(np.sum(instance.optimum))
    return {
        **plan,
        "samples": program.shape[0],
        "inputs": program.shape[1],
        "layer_units": program.shape[2],
        "solved_units": units,
        "form": "regularised" if isinstance(program, RegularisedProgram) else "constrained",
        "status": answer.status,
        "certified": bool(np.all(certificate.within(tolerance, tolerance))),
        "gap": _finite(np.max(certificate.gap)),
        "violation": _finite(np.max(certificate.violation)),
        "objective": _finite(objective),
        "error": None if optimum is None else _finite((objective - optimum) / optimum),
        "zeros": answer.zeros,
        "iterations": answer.iterations,
        "setup_seconds": answer.setup_seconds,
        "seconds_a_unit": answer.seconds / units,
        "cpu_seconds_a_unit": answer.cpu_seconds / units,
        "pair_seconds": pair,
        "passes": answer.cpu_seconds / units * program.shape[2] / pair,
        "dtype": answer.dtype,
        "settings": answer.settings,
        "when": time.strftime("%Y-%m-%dT%H:%M:%S"),
    }


def pair_seconds(program: Program) -> float:
    """Processor time of one pair X U, X^T Z in float32, all units: the machine's limit."""
    inputs = np.asarray(program.inputs, dtype=np.float32)
    weight = np.ones((program.shape[1], program.shape[2]), dtype=np.float32)
    times = []
    for _ in range(_PAIRS):
        started = time.process_time()
        response = inputs @ weight
        inputs.T @ response  # the result is of no interest
        times.append(time.process_time() - started)
    return min(times)


def read_rows(path: Path) -> dict[str, Row]:
    """Rows of an earlier run by key; a last line cut off by a kill is left out."""
    rows: dict[str, Row] = {}
    if path.exists():
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                row = json.loads(line)
            except json.JSONDecodeError:
                continue
            rows[key_of(row)] = row
    return rows


def _few(program: Program, units: int) -> Program:
    """Typical units of a regularised program; the whole constrained one."""
    if isinstance(program, RegularisedProgram):
        return some_units(program, typical_units(program, units))
    return program


def _nearly_zero(weight: np.ndarray) -> float:
    """Share of weights that a solver without exact zeros means to be zero."""
    return float(np.mean(np.abs(weight) <= 1e-6 * np.abs(weight).max()))


def _finite(value: float) -> float | None:
    """A number that JSON can hold."""
    return float(value) if np.isfinite(value) else None


# The command.


def main(arguments: list[str]) -> int:
    """Measure what is not in the file yet, then print the tables; 1 when ours is not certified."""
    parser = argparse.ArgumentParser(
        prog="python -m bench solvers",
        description=__doc__,
        epilog="sets: " + "; ".join(f"{name}: {', '.join(SETS[name])}" for name in SETS),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--set", nargs="+", choices=list(SETS), metavar="SET", help="default main")
    parser.add_argument("--problems", nargs="+", metavar="NAME", help="instead of sets")
    parser.add_argument("--solvers", nargs="+", metavar="NAME", help="NAME or PEER:FORM")
    parser.add_argument("--forms", action="store_true", help="every peer on every form it takes")
    parser.add_argument("--rounds", type=int, default=1, help="interleaved rounds (1)")
    parser.add_argument("--units", type=int, default=3, help="units for the peers (3)")
    parser.add_argument("--tolerance", type=float, nargs="+", default=[1e-4], help="(1e-4)")
    parser.add_argument("--threads", type=int, default=1, help="BLAS threads (1)")
    parser.add_argument("--data", type=Path, help="directory with models/ and mnist/, for lenet")
    parser.add_argument("--out", type=Path, default=Path("runs/bench/solvers.jsonl"))
    parser.add_argument("--smoke", action="store_true", help="tiny problems, nothing kept")
    options = parser.parse_args(arguments)
    sets = ["smoke"] if options.smoke else options.set or ["main"]
    names = options.problems or [name for each in sets for name in SETS[each]]
    try:
        problems = [problem(name, options.data) for name in names]
        for name in options.solvers or []:
            solver(name)
    except ValueError as error:
        print(f"bench solvers: {error}", file=sys.stderr)
        return 2
    if options.smoke:
        with tempfile.TemporaryDirectory() as folder:
            options.out = Path(folder) / "solvers.jsonl"
            return _run(problems, options)
    return _run(problems, options)


def _chosen(options: argparse.Namespace) -> list[str]:
    """Names of the solvers to run, without the peers that are not there."""
    names: list[str] = options.solvers or [*OURS, "cvxpy", *peers.PEERS]
    if options.forms:
        names = [f"{name}:{form}" for name in peers.PEERS for form in peers.PEERS[name].forms]
    for name in peers.absent():
        print(f"absent: {name} (package {peers.PEERS[name].package} cannot be imported)")
    return [name for name in names if name.partition(":")[0] not in peers.absent()]


def _plans(options: argparse.Namespace, names: list[str]) -> Iterator[Row]:
    """What to measure of a problem, rounds interleaved."""
    for tolerance in options.tolerance:
        for number in range(options.rounds):
            for name in names:
                yield {
                    "solver": name,
                    "round": number,
                    "tolerance": tolerance,
                    "threads": options.threads,
                    "units": options.units,
                    **environment(name.partition(":")[0]),
                }


def _run(problems: list[Problem], options: argparse.Namespace) -> int:
    """Run the plan, row by row, and report it."""
    options.out.parent.mkdir(parents=True, exist_ok=True)
    done = read_rows(options.out)
    names = _chosen(options)
    warm_up(names)
    rows: list[Row] = []
    with options.out.open("a+", encoding="utf-8") as file:
        _end_line(file)
        for each in problems:
            instance: Instance | None = None
            for plan in _plans(options, names):
                plan = {"problem": each.name, **plan}
                row = done.get(key_of(plan))
                if row is None:
                    instance = each.make() if instance is None else instance
                    if not can_state(plan["solver"], instance.program):
                        continue
                    row = measure(instance, plan)
                    file.write(json.dumps(row) + "\n")
                    file.flush()
                rows.append(row)
    picture = None if options.smoke else options.out.with_suffix(".png")
    report(rows, picture)
    return 0 if all(row["certified"] for row in rows if row["solver"] in OURS) else 1


def _end_line(file: IO[str]) -> None:
    """End a last line that a kill has cut off, so that the next row has its own."""
    if file.tell() > 0:
        file.seek(file.tell() - 1)
        if file.read(1) != "\n":
            file.write("\n")


def warm_up(names: list[str]) -> None:
    """Load every library, and compile, before anything is timed."""
    for small in ("iid-8x30x2", "iid-8x30x2-ball"):
        program = problem(small).make().program
        for name in names:
            if can_state(name, program):
                solver(name)(program, 1e-6, 1)
    if "newton" in names:  # products in bfloat16, which small layers do without
        solver("newton")(problem("iid-100x1300x1000").make().program, 1e-2, 1)
