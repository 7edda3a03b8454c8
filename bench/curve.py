"""Sparsity against discrepancy: the path of a layer, from a wide ball to a narrow one.

Each point starts from the one before it (`solvers.solve_path`) and is certified. Rows are JSON
lines, one a point, with the seconds that the point took beside those of the layer from scratch. A
path whose rows are in the file already is not run again.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from threadpoolctl import threadpool_limits

from bench.problems import Problem, problem
from bench.solvers import environment
from retrain.cli.shared import FormerName
from solvers import ConstrainedProgram, PathPoint, solve_newton, solve_path

Row = dict[str, Any]
RADII = (0.5, 0.35, 0.25, 0.175, 0.125, 0.09, 0.06, 0.04, 0.025, 0.015)
PROBLEMS = ("correlated-200x2000x50-ball", "iid-200x2000x50-ball")


def main(arguments: list[str]) -> int:
    """Follow the paths that are not in the file yet, then print all; 1 when one falls short."""
    parser = argparse.ArgumentParser(
        prog="python -m bench curve",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--problems", nargs="+", default=list(PROBLEMS), metavar="NAME-ball")
    parser.add_argument("--radii", type=float, nargs="+", default=list(RADII), metavar="REL")
    parser.add_argument("--gap", type=float, default=1e-3, help="gap and violation (1e-3)")
    parser.add_argument("--tolerance", type=float, action=FormerName, now="--gap", dest="gap")
    parser.add_argument("--data", type=Path, help="directory with models/ and mnist/, for lenet")
    parser.add_argument("--out", type=Path, default=Path("runs/bench/curve.jsonl"))
    options = parser.parse_args(arguments)
    try:
        problems = [problem(name, options.data) for name in options.problems]
    except ValueError as error:
        print(f"bench curve: {error}", file=sys.stderr)
        return 2
    options.out.parent.mkdir(parents=True, exist_ok=True)
    lines = options.out.read_text(encoding="utf-8").splitlines() if options.out.exists() else []
    done = [json.loads(line) for line in lines if line.endswith("}")]
    certified = True
    for each in problems:
        plan = {
            "problem": each.name,
            "radii": options.radii,
            "tolerance": options.gap,
            **environment("newton"),
        }
        rows = [row for row in done if all(row.get(key) == plan[key] for key in plan)]
        if len(rows) < len(options.radii):
            rows = follow(each, options.radii, options.gap, plan)
            with options.out.open("a", encoding="utf-8") as file:
                file.writelines(json.dumps(row) + "\n" for row in rows)
        show(rows)
        certified = certified and all(row["certified"] for row in rows)
    return 0 if certified else 1


def follow(each: Problem, radii: list[float], tolerance: float, plan: Row) -> list[Row]:
    """One path, and the last point from scratch."""
    program = each.make().program
    if not isinstance(program, ConstrainedProgram):
        raise ValueError(f"problem: got {each.name!r}, want one with a ball to follow, NAME-ball")
    size = float(np.linalg.norm(np.where(program.active, program.level, 0)))
    with threadpool_limits(1):
        solve_path(problem("iid-8x30x2-ball").make().program, [1.0], tolerance=1e-2)  # compile
        used = time.process_time()
        points = solve_path(program, [radius * size for radius in radii], tolerance=tolerance)
        path = time.process_time() - used
        used = time.process_time()
        solve_newton(points[-1].program, tolerance=tolerance)
        alone = time.process_time() - used
    return [
        {
            **plan,
            **point_row(point),
            "radius": radius,
            "seconds": point.result.solve_seconds,
            "path_cpu_seconds": path,
            "last_alone_cpu_seconds": alone,
        }
        for radius, point in zip(radii, points, strict=True)
    ]


def point_row(point: PathPoint) -> Row:
    """A point of the curve as JSON values."""
    certificate = point.result.certificate
    return {
        "sparsity": point.sparsity,
        "zeros": point.zeros,
        "relative_residual": point.relative_residual,
        "objective": float(certificate.objective),
        "gap": float(certificate.gap),
        "violation": float(certificate.violation),
        "certified": bool(np.all(point.result.certified)),
    }


def show(rows: list[Row]) -> None:
    """Print a curve."""
    first = rows[0]
    print(f"\n{first['problem']}, gap and violation {first['tolerance']:g}")
    print("  radius  residual   zeros      gap violation  seconds")
    for row in rows:
        verdict = "" if row["certified"] else "  NOT CERTIFIED"
        print(
            f"  {row['radius']:>6.3f}  {row['relative_residual']:>8.4f}  {row['sparsity']:>6.1%} "
            f"{row['gap']:>8.1e}  {row['violation']:>8.1e} {row['seconds']:>8.2f}{verdict}"
        )
    print(
        f"  {len(rows)} points in {first['path_cpu_seconds']:.2f} s of processor time, the last "
        f"alone in {first['last_alone_cpu_seconds']:.2f} s"
    )
