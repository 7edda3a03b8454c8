"""Which solver is the default: both on the same programs, the share certified and then the time.

The programs are the solver bench's families in sizes that both solve in seconds, each in both
forms, with each penalty that the form admits, in float32 and float64, as they are and with columns
over eight orders of magnitude (the old weights divided accordingly). Limits are those that
`retrain trim` has by default: gap 1e-2, violation 1e-3, 5000 iterations. Whether an answer is
certified is computed by the program, in float64. One BLAS thread; the best of the rounds counts.

Rows are JSON lines; a row that is in the file already, by the same code, is not run again.
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from threadpoolctl import threadpool_limits

from bench.problems import in_single_precision, problem
from bench.solvers import environment
from solvers import L1, ElasticNet, Group, Penalty, SolveResult, solve_admm, solve_newton
from solvers.program import ConstrainedProgram, Program

LIMITS: dict[str, Any] = {"tolerance": 1e-2, "violation_tolerance": 1e-3, "max_iterations": 5000}
PROBLEMS = (
    "iid-128x500x24",
    "correlated-100x600x20",
    "relu2-100x500x20",
    "known-64x400x20",
    "digits-65x300x20",
    "iid-64x200x100",
)
SOLVERS = {"newton": solve_newton, "admm": solve_admm}

Row = dict[str, Any]


def penalties(program: Program) -> dict[str, Penalty]:
    """The penalties that a form admits, the ridge such that both its terms count."""
    weight = np.asarray(program.old_weight)
    mean = float(np.abs(weight).mean()) or 1.0
    found: dict[str, Penalty] = {"l1": L1(), "elastic net": ElasticNet(0.3 / mean)}
    if isinstance(program, ConstrainedProgram):
        found["group"] = Group()
    return found


def with_columns(program: Program, decades: float = 8.0) -> Program:
    """The program with columns of many sizes, and its old weights divided by them."""
    rng = np.random.default_rng(12)
    sizes = 10 ** rng.uniform(-decades / 2, decades / 2, program.shape[1])
    sizes[list(program.free_rows)] = 1.0
    old = None if program.old_weight is None else program.old_weight / sizes[:, None]
    return replace(program, inputs=program.inputs * sizes, old_weight=old)


def cases(names: tuple[str, ...]) -> Iterator[tuple[Row, Program, str]]:
    """All programs, what each is, and the solvers' names that can solve it."""
    for name in names:
        for ball in ("", "-ball"):
            given = problem(name + ball).make().program
            for columns in ("alike", "8 decades"):
                data = given if columns == "alike" else with_columns(given)
                for penalty, value in penalties(given).items():
                    stated = replace(data, penalty=value)
                    for dtype in ("float32", "float64"):
                        cast = in_single_precision(stated) if dtype == "float32" else stated
                        form = "constrained" if ball else "regularised"
                        for solver in SOLVERS if value.separable else ("admm",):
                            yield (
                                {
                                    "problem": name,
                                    "form": form,
                                    "columns": columns,
                                    "penalty": penalty,
                                    "dtype": dtype,
                                    "solver": solver,
                                },
                                cast,
                                solver,
                            )


def measure(program: Program, solver: str, rounds: int) -> Row:
    """Solve, and have the program judge."""
    seconds = math.inf
    for _ in range(rounds):
        started = time.perf_counter()
        result: SolveResult = SOLVERS[solver](program, **LIMITS)
        seconds = min(seconds, time.perf_counter() - started)
    certificate = program.certificate(result.weight, result.multiplier)
    within = certificate.within(LIMITS["tolerance"], LIMITS["violation_tolerance"])
    return {
        "certified": bool(np.all(within)),
        "status": result.status.value,
        "iterations": result.iterations,
        "seconds": seconds,
    }


def table(rows: list[Row]) -> str:
    """Share certified by each solver, and the ratio of times where both certify."""
    lines = [
        "form         penalty      columns    dtype    programs  newton  admm  newton / admm time"
    ]
    groups: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        for last in (str(row["dtype"]), ""):
            key: tuple[str, ...] = (row["form"], row["penalty"], row["columns"], last)
            if not last:
                key = ("all", "", row["columns"], "")
            groups.setdefault(key, []).append(row)
    for key in sorted(groups):
        by = {
            name: {_problem(row): row for row in groups[key] if row["solver"] == name}
            for name in SOLVERS
        }
        counts = [
            f"{sum(row['certified'] for row in found.values())}" if found else "-"
            for found in by.values()
        ]
        both = [
            math.log(by["newton"][name]["seconds"] / row["seconds"])
            for name, row in by["admm"].items()
            if name in by["newton"] and row["certified"] and by["newton"][name]["certified"]
        ]
        ratio = f"{math.exp(sum(both) / len(both)):.2f}" if both else "-"
        form, penalty, columns, dtype = key
        lines.append(
            f"{form:12} {penalty:12} {columns:10} {dtype:8} {len(by['admm']):8}  {counts[0]:>6}  "
            f"{counts[1]:>4}  {ratio:>18}"
        )
    return "\n".join(lines)


def main(arguments: list[str]) -> int:
    """Measure both solvers and print the table."""
    parser = argparse.ArgumentParser(
        prog="python -m bench campaigns.default_solver", description=__doc__
    )
    parser.add_argument("--problems", nargs="+", default=list(PROBLEMS), metavar="NAME")
    parser.add_argument("--rounds", type=int, default=2, metavar="N", help="default 2")
    parser.add_argument(
        "--out", type=Path, default=Path(tempfile.gettempdir()) / "retrain-default-solver.jsonl"
    )
    options = parser.parse_args(arguments)
    code = environment("newton")["code"]
    done: dict[str, Row] = {}
    if options.out.exists():
        for line in options.out.read_text(encoding="utf-8").splitlines():
            try:
                row = json.loads(line)
            except json.JSONDecodeError:
                continue  # a last line that a kill has cut off
            done[_key(row)] = row
    options.out.parent.mkdir(parents=True, exist_ok=True)
    rows = []
    with options.out.open("a", encoding="utf-8") as file, threadpool_limits(1):
        warm = problem("iid-8x30x2").make().program
        for solve in SOLVERS.values():
            solve(warm, **LIMITS)
        for plan, program, solver in cases(tuple(options.problems)):
            plan["code"] = code
            found = done.get(_key(plan))
            if found is None:
                found = {**plan, **measure(program, solver, options.rounds)}
                file.write(json.dumps(found) + "\n")
                file.flush()
            rows.append(found)
    print(table(rows))
    return 0


def _problem(row: Row) -> tuple[str, ...]:
    return tuple(row[name] for name in ("problem", "form", "columns", "penalty", "dtype"))


def _key(row: Row) -> str:
    return json.dumps([*_problem(row), row["solver"], row["code"]])
