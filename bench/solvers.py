"""Solvers of the layer programs against each other, at the same certified accuracy.

Every problem is named, seeded and sized. Every answer is judged by the float64 program itself, not
by what its solver says, and answers that miss the accuracy are printed as losses. Solvers that go
unit by unit are given a few units, from all sizes of Omega; times are per unit, set-up included.
Rounds interleave the solvers, so that a load on the machine meets all of them, and a ratio is taken
within a round.

OSQP's own tolerance says little about the certificate. It is tightened, with and without polishing,
until the certificate holds, and only the fastest run that holds is counted.

Passes are processor time for all units over that of one pair of products X U, X^T Z in float32.

Rows are JSON lines; a row that is in the file already is not run again. A change of the solvers, of
this file or of the versions makes other rows.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
from threadpoolctl import threadpool_limits

from bench.problems import (
    PROBLEMS,
    SMOKE,
    Problem,
    iid,
    in_single_precision,
    some_units,
    typical_units,
)
from solvers import (
    Certificate,
    RegularisedProgram,
    SolveResult,
    solve_admm,
    solve_cvxpy,
    solve_newton,
    solve_osqp,
)
from solvers.program import Program

Row = dict[str, Any]
_PAIRS = 5
OURS = ("admm", "admm-float32", "newton")
OSQP_LADDER = (1e-4, 3e-5, 1e-5, 3e-6, 1e-6, 1e-7, 1e-8)
PACKAGES = ("numpy", "scipy", "osqp", "cvxpy", "clarabel")
WANTED_RATIO = 20.0  # of OSQP's seconds a unit to ADMM's, on "iid"


# Solvers: each takes a program and the accuracy and gives its answer with the settings it chose.


@dataclass(frozen=True)
class Answer:
    """What a solver gave: the program it solved (a few units or all), the result, its settings."""

    program: Program
    result: SolveResult
    setup_seconds: float
    solve_seconds: float
    cpu_seconds: float
    settings: dict[str, Any]
    dtype: str = "float64"


def timed(solve: Callable[[], SolveResult]) -> tuple[SolveResult, float]:
    """Run a solve and count its processor time, which waiting for others does not change."""
    started = time.process_time()
    result = solve()
    return result, time.process_time() - started


def run_admm(program: Program, tolerance: float, units: int) -> Answer:
    """All units at once, in float64."""
    result, cpu = timed(lambda: solve_admm(program, tolerance=tolerance))
    return Answer(program, result, result.setup_seconds, result.solve_seconds, cpu, {})


def run_admm_single(program: Program, tolerance: float, units: int) -> Answer:
    """All units at once, data in float32, judged on the float64 data."""
    single = in_single_precision(program)
    result, cpu = timed(lambda: solve_admm(single, tolerance=tolerance))
    seconds = result.setup_seconds, result.solve_seconds, cpu
    return Answer(program, result, *seconds, {}, dtype="float32")


def run_newton(program: Program, tolerance: float, units: int) -> Answer:
    """All units, a few steps of ADMM and then Newton's, one unit at a time."""
    result, cpu = timed(lambda: solve_newton(program, tolerance=tolerance))
    return Answer(program, result, result.setup_seconds, result.solve_seconds, cpu, {})


def run_clarabel(program: Program, tolerance: float, units: int) -> Answer:
    """Clarabel through cvxpy, lifted; typical units, or all where a ball ties them."""
    few = program
    if isinstance(program, RegularisedProgram):
        few = some_units(program, typical_units(program, units))
    result, cpu = timed(lambda: solve_cvxpy(few, tolerance=tolerance))
    seconds = result.setup_seconds, result.solve_seconds, cpu
    return Answer(few, result, *seconds, {"form": "lifted"})


def run_osqp(program: Program, tolerance: float, units: int) -> Answer:
    """The paper's QP (14) by OSQP, typical units, each as `osqp_settings` found best."""
    assert isinstance(program, RegularisedProgram)
    chosen_units = typical_units(program, units)
    few = some_units(program, chosen_units)
    settings = [osqp_settings(program, unit, tolerance) for unit in chosen_units]
    results, cpu = [], 0.0
    for unit, chosen in zip(chosen_units, settings, strict=True):
        one = some_units(program, [unit])
        result, used = timed(partial(solve_osqp, one, tolerance=tolerance, options=chosen))
        results.append(result)
        cpu += used
    together = replace(
        results[0],
        weight=np.hstack([each.weight for each in results]),
        multiplier=np.hstack([each.multiplier for each in results]),
        iterations=max(each.iterations for each in results),
    )
    return Answer(
        few,
        together,
        sum(each.setup_seconds for each in results),
        sum(each.solve_seconds for each in results),
        cpu,
        {"by_unit": settings},
    )


@cache
def osqp_settings(program: RegularisedProgram, unit: int, tolerance: float) -> dict[str, Any]:
    """Find the loosest OSQP tolerance whose certificate holds; polished or not, what is faster."""
    one = some_units(program, [unit])
    runs: list[tuple[float, dict[str, Any]]] = []
    for polishing in (False, True):
        for eps in OSQP_LADDER:
            chosen = {"eps_abs": eps, "eps_rel": eps, "polishing": polishing}
            result, cpu = timed(partial(solve_osqp, one, tolerance=tolerance, options=chosen))
            if result.certified.all():
                runs.append((cpu, chosen))
                break
    # Nothing held: the tightest is counted, and printed as a loss.
    return min(runs, key=lambda run: run[0])[1] if runs else chosen


SOLVERS: dict[str, Callable[[Program, float, int], Answer]] = {
    "osqp": run_osqp,
    "admm": run_admm,
    "admm-float32": run_admm_single,
    "newton": run_newton,
    "clarabel": run_clarabel,
}


def can_state(solver: str, program: Program) -> bool:
    """Tell whether a solver takes this form: the ball is no quadratic program."""
    return solver != "osqp" or isinstance(program, RegularisedProgram)


# Rows.


@cache
def environment() -> Row:
    """Versions, machine and the last commit that touched what is measured."""
    repository = Path(__file__).resolve().parents[1]
    command = ["git", "-C", str(repository), "log", "-1", "--format=%h", "--"]
    try:
        answer = subprocess.run(
            [*command, "solvers", "bench/solvers.py"], capture_output=True, text=True, check=True
        )
        commit = answer.stdout.strip() or "unknown"
    except (OSError, subprocess.CalledProcessError):
        commit = "unknown"
    versions = {name: importlib.metadata.version(name) for name in PACKAGES}
    return {
        "commit": commit,
        "python": platform.python_version(),
        "machine": platform.machine(),
        "cores": os.cpu_count(),
        **versions,
    }


def key_of(row: Row) -> str:
    """What makes a row the same measurement."""
    names = ("problem", "solver", "round", "tolerance", "threads", "units", "commit", *PACKAGES)
    return json.dumps([row[name] for name in names])


def measure(
    problem: str, program: Program, solver: str, plan: Row, tolerance: float, threads: int
) -> Row:
    """Run one solver once and judge its answer."""
    with threadpool_limits(threads):
        answer = SOLVERS[solver](program, tolerance, plan["units"])
        pair = pair_seconds(program)
    certificate = judged(answer)
    certified = certificate.within(tolerance, tolerance)
    units = answer.program.shape[2]
    seconds = answer.setup_seconds + answer.solve_seconds
    return {
        **plan,
        "samples": program.shape[0],
        "inputs": program.shape[1],
        "layer_units": program.shape[2],
        "solved_units": units,
        "form": "regularised" if isinstance(program, RegularisedProgram) else "constrained",
        "status": answer.result.status.value,
        "certified": bool(np.all(certified)),
        "gap": float(np.max(certificate.gap)),
        "violation": float(np.max(certificate.violation)),
        "objective": float(np.sum(certificate.objective)),
        "zeros": float(
            np.mean(np.abs(answer.result.weight) <= 1e-6 * np.abs(answer.result.weight).max())
        ),
        "iterations": answer.result.iterations,
        "setup_seconds": answer.setup_seconds,
        "solve_seconds": answer.solve_seconds,
        "seconds_a_unit": seconds / units,
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


def judged(answer: Answer) -> Certificate:
    """The certificate from the float64 program, whatever the solver said."""
    weight = np.asarray(answer.result.weight, dtype=np.float64)
    multiplier = np.asarray(answer.result.multiplier, dtype=np.float64)
    return answer.program.certificate(weight, multiplier)


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


# Tables.


def spell(row: Row) -> str:
    """One line of the table."""
    return (
        f"  {row['solver']:13} {row['round']:>5} {row['solved_units']:>6} "
        f"{row['seconds_a_unit']:>9.4f} {row['cpu_seconds_a_unit']:>10.4f} "
        f"{row['setup_seconds']:>8.2f} {row['solve_seconds']:>8.2f} "
        f"{row['iterations']:>6} {row['passes']:>7.0f} {row['gap']:>9.1e} {row['violation']:>9.1e} "
        f"{row['zeros']:>6.1%}  {row['status'] if row['certified'] else 'NOT CERTIFIED'}"
    )


HEADER = (
    "  solver        round  units    s/unit cpu s/unit set-up s  solve s  iters  passes"
    "       gap violation  zeros"
)


def ratios(rows: list[Row], slow: str, fast: str, time_of: str = "seconds_a_unit") -> list[float]:
    """Seconds a unit of `slow` over those of `fast`, round by round, where both are certified."""
    seconds = {(row["solver"], row["round"]): row[time_of] for row in rows if row["certified"]}
    rounds = sorted({number for name, number in seconds if name == slow})
    return [
        seconds[slow, number] / seconds[fast, number]
        for number in rounds
        if (fast, number) in seconds
    ]


def losses(rows: list[Row]) -> list[str]:
    """Where ours was slower than another, or anybody missed the accuracy."""
    lines = [
        f"{row['problem']}: {row['solver']} missed {row['tolerance']:g}: gap {row['gap']:.1e}, "
        f"violation {row['violation']:.1e} (it says {row['status']})"
        for row in rows
        if not row["certified"]
    ]
    for problem in dict.fromkeys(row["problem"] for row in rows):
        mine = [row for row in rows if row["problem"] == problem]
        for ours in OURS:
            for other in ("osqp", "clarabel"):
                found = ratios(mine, other, ours)
                if found and statistics.median(found) < 1:
                    lines.append(f"{problem}: {ours} is slower than {other}")
    return lines


def report(rows: list[Row], wanted: bool) -> None:
    """Print the rows by problem, the ratios and the losses."""
    for problem in dict.fromkeys(row["problem"] for row in rows):
        mine = [row for row in rows if row["problem"] == problem]
        first = mine[0]
        print(
            f"\n{problem}: {first['form']}, {first['inputs']} inputs, {first['samples']} samples, "
            f"{first['layer_units']} units, gap and violation {first['tolerance']:g}, "
            f"{first['threads']} thread(s)"
        )
        print(HEADER)
        for row in mine:
            print(spell(row))
        for ours in OURS:
            for other in ("osqp", "clarabel"):
                found = ratios(mine, other, ours)
                if found:
                    middle = statistics.median(found)
                    cpu = ratios(mine, other, ours, "cpu_seconds_a_unit")
                    print(
                        f"  {other} / {ours}, seconds a unit: median {middle:.1f} "
                        f"({min(found):.1f} to {max(found):.1f}, {len(found)} rounds); "
                        f"of processor time {statistics.median(cpu):.1f}"
                    )
        for row in mine:
            if row["solver"] == "osqp" and row["round"] == 0:
                chosen = [
                    f"{each['eps_abs']:g}{' polished' if each['polishing'] else ''}"
                    for each in row["settings"]["by_unit"]
                ]
                print(f"  osqp's own tolerance, by unit: {', '.join(chosen)}")
    lines = losses(rows)
    print("\nlosses:" if lines else "\nlosses: none")
    for line in lines:
        print(f"  {line}")
    if wanted:
        iid_rows = [row for row in rows if row["problem"] == "iid"]
        found = ratios(iid_rows, "osqp", "admm")
        if found:
            middle = statistics.median(found)
            processor = statistics.median(ratios(iid_rows, "osqp", "admm", "cpu_seconds_a_unit"))
            verdict = "met" if min(middle, processor) >= WANTED_RATIO else "MISSED"
            print(
                f"\nper unit, ADMM in float64 on the whole of iid is {middle:.1f} times faster "
                f"than the paper's QP by OSQP, by processor time {processor:.1f} "
                f"(wanted: {WANTED_RATIO:g}; {verdict})"
            )


def warm_up(solvers: list[str]) -> None:
    """Load every library once before anything is timed."""
    program = iid(30, 8, 2)
    for solver in solvers:
        SOLVERS[solver](program, 1e-2, 1)


def main(arguments: list[str]) -> int:
    """Measure what is not in the file yet, then print the tables."""
    names = [problem.name for problem in PROBLEMS]
    parser = argparse.ArgumentParser(
        prog="python -m bench solvers",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--problems", nargs="+", choices=names, default=names, metavar="NAME")
    parser.add_argument("--solvers", nargs="+", choices=list(SOLVERS), default=list(SOLVERS))
    parser.add_argument("--rounds", type=int, default=3, help="interleaved rounds (3)")
    parser.add_argument("--units", type=int, default=3, help="units for OSQP and Clarabel (3)")
    parser.add_argument("--tolerance", type=float, default=1e-4, help="gap and violation (1e-4)")
    parser.add_argument("--threads", type=int, default=1, help="BLAS threads (1)")
    parser.add_argument("--out", type=Path, default=Path("runs/bench/solvers.jsonl"))
    parser.add_argument(
        "--smoke", action="store_true", help="tiny problems, one round, nothing kept"
    )
    options = parser.parse_args(arguments)
    problems = [problem for problem in PROBLEMS if problem.name in options.problems]
    if options.smoke:
        problems, options.rounds = list(SMOKE), 1
        with tempfile.TemporaryDirectory() as folder:
            options.out = Path(folder) / "solvers.jsonl"
            return _run(problems, options)
    return _run(problems, options)


def _run(problems: list[Problem], options: argparse.Namespace) -> int:
    """Run the plan, row by row, and report it; exit code 1 when an ADMM answer is not certified."""
    options.out.parent.mkdir(parents=True, exist_ok=True)
    done = read_rows(options.out)
    warm_up(options.solvers)
    rows: list[Row] = []
    with options.out.open("a", encoding="utf-8") as file:
        for problem in problems:
            program: Program | None = None
            for number in range(options.rounds):
                for solver in options.solvers:
                    if solver == "clarabel" and number > 0:
                        continue
                    plan = {
                        "problem": problem.name,
                        "solver": solver,
                        "round": number,
                        "tolerance": options.tolerance,
                        "threads": options.threads,
                        "units": options.units,
                        **environment(),
                    }
                    row = done.get(key_of(plan))
                    if row is None:
                        program = problem.make() if program is None else program
                        if not can_state(solver, program):
                            continue
                        row = measure(
                            problem.name, program, solver, plan, options.tolerance, options.threads
                        )
                        file.write(json.dumps(row) + "\n")
                        file.flush()
                    rows.append(row)
    report(rows, wanted=not options.smoke)
    ours = [row for row in rows if row["solver"] in OURS]
    return 0 if all(row["certified"] for row in ours) else 1
