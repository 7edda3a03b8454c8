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
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import IO

import numpy as np
from threadpoolctl import threadpool_limits

from bench import peers
from bench.answers import can_state, solver
from bench.peers import Limits
from bench.problems import SETS, Instance, Problem, problem
from bench.solver_tables import OURS, Row, report
from retrain.cli.shared import FormerName
from solvers import RegularisedProgram
from solvers.program import Program

ROOT = Path(__file__).resolve().parents[1]
_PAIRS = 5


@cache
def environment(kind: str) -> Row:
    """What, besides the plan, makes a row: hash of the code that is measured, and versions."""
    ours = kind in ("newton", "admm")
    files = sorted((ROOT / "solvers").rglob("*.py")) if ours else [ROOT / "bench/peers.py"]
    files += [ROOT / "bench" / name for name in ("answers.py", "problems.py", "forms.py")]
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
    names = ("problem", "solver", "round", "tolerance", "violation_tolerance", "threads", "units")
    return json.dumps([row[name] for name in (*names, "code", "versions")], sort_keys=True)


def measure(instance: Instance, plan: Row) -> Row:
    """Run one solver once and judge its answer."""
    program, limits = instance.program, (plan["tolerance"], plan["violation_tolerance"])
    with threadpool_limits(plan["threads"]):
        answer = solver(plan["solver"])(program, limits, plan["units"])
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
        "certified": bool(np.all(certificate.within(*limits))),
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
    parser.add_argument(
        "--gap",
        type=parse_limits,
        nargs="+",
        default=[(1e-4, 1e-4)],
        metavar="GAP[,VIOLATION]",
        help="what certificates must meet; the violation the same as the gap by default (1e-4)",
    )
    parser.add_argument(
        "--tolerance", type=parse_limits, nargs="+", action=FormerName, now="--gap", dest="gap"
    )
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


def parse_limits(text: str) -> Limits:
    """Read GAP[,VIOLATION]."""
    numbers = [float(part) for part in text.split(",")]
    if len(numbers) > 2 or not all(0 < number < 1 for number in numbers):
        raise argparse.ArgumentTypeError(f"got {text!r}, want GAP[,VIOLATION] between 0 and 1")
    return numbers[0], numbers[-1]


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
    for gap, violation in options.gap:
        for number in range(options.rounds):
            for name in names:
                yield {
                    "solver": name,
                    "round": number,
                    "tolerance": gap,
                    "violation_tolerance": violation,
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
                solver(name)(program, (1e-6, 1e-6), 1)
    if "newton" in names:  # products in bfloat16, which small layers do without
        solver("newton")(problem("iid-100x1300x1000").make().program, (1e-2, 1e-2), 1)
