"""Tables, verdicts and the picture of ``python -m bench solvers``, from its rows."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bench.peers import TIME_LIMIT

Row = dict[str, Any]

OURS = ("newton", "admm", "admm:float32")
BEST = "newton"  # ours that the verdicts are about
RIVALS = ("osqp", "clarabel", "scs", "piqp")
SHIFT = 0.01  # seconds, of the geometric means
WANTED = {
    ("iid", "0.0001"): 100.0,
    ("correlated", "0.0001"): 30.0,
    ("relu2", "0.0001"): 60.0,
    ("iid", "1e-06"): 30.0,
    ("correlated", "1e-06"): 15.0,
    ("relu2", "1e-06"): 30.0,
    ("iid-784x2000x1", "0.0001"): 1.0,
    ("correlated-784x2000x1", "0.0001"): 1.0,
    ("relu2-784x2000x1", "0.0001"): 1.0,
}
"""How many times faster than the fastest rival, a unit, ours is meant to be."""
PASSES = {(f"lenet-fc{number}-ball", "0.001 (violation 0.0001)"): 300 for number in (1, 2, 3)}
"""How many passes, at most, a layer is meant to take."""

HEADER = (
    f"  {'solver':17} {'units':>5} {'cpu s/unit':>10} {'s/unit':>9} {'iters':>7} {'passes':>8} "
    f"{'gap':>8} {'violation':>9} {'zeros':>6}  verdict"
)


def report(rows: Sequence[Row], picture: Path | None) -> None:
    """Print the rows by problem and accuracy, the means, exponents, verdicts and losses."""
    groups = dict.fromkeys((row["problem"], asked(row)) for row in rows)
    for name, tolerance in groups:
        mine = [row for row in rows if (row["problem"], asked(row)) == (name, tolerance)]
        first = mine[0]
        print(
            f"\n{name}: {first['form']}, {first['inputs']} inputs, {first['samples']} samples, "
            f"{first['layer_units']} units, certified to {tolerance}, "
            f"{first['threads']} thread(s)"
        )
        print(HEADER)
        for row in mine:
            print(spell(row))
    for lines in (means(rows), exponents(rows), verdicts(rows), passes(rows)):
        if lines:
            print("\n" + "\n".join(lines))
    found = losses(rows)
    print("\nlosses:" if found else "\nlosses: none")
    for line in found:
        print(f"  {line}")
    if picture is not None and profile(rows, picture):
        print(f"\nperformance profile: {picture}")


def spell(row: Row) -> str:
    """One line of the table."""
    form = row["settings"].get("form")
    name = row["solver"] if form is None or ":" in row["solver"] else f"{row['solver']}:{form}"
    verdict = "certified" if row["certified"] else f"NOT CERTIFIED (it says {row['status']})"
    error = "" if row["error"] is None else f", error {row['error']:+.1e}"
    return (
        f"  {name:17} {row['solved_units']:>5} {row['cpu_seconds_a_unit']:>10.5f} "
        f"{row['seconds_a_unit']:>9.5f} {row['iterations']:>7} {row['passes']:>8.0f} "
        f"{_number(row['gap'])} {_number(row['violation']):>9} {row['zeros']:>6.1%}  "
        f"{verdict}{error}"
    )


def asked(row: Row) -> str:
    """Spell the gap and the violation that were asked for, as one where they are the same."""
    gap, violation = row["tolerance"], row["violation_tolerance"]
    return f"{gap:g}" if gap == violation else f"{gap:g} (violation {violation:g})"


def scores(rows: Sequence[Row]) -> dict[tuple[str, str, str], float]:
    """Processor seconds a unit by (solver, problem, accuracy): median of the rounds.

    A failure is the time limit, or what it took if that was more.
    """
    kept: dict[tuple[str, str, str], list[float]] = {}
    for row in rows:
        seconds = row["cpu_seconds_a_unit"]
        score = seconds if row["certified"] else max(seconds, TIME_LIMIT)
        kept.setdefault((row["solver"], row["problem"], asked(row)), []).append(score)
    return {key: statistics.median(values) for key, values in kept.items()}


def means(rows: Sequence[Row]) -> list[str]:
    """Shifted geometric means of the seconds, and success rates, on problems all have tried."""
    lines = []
    for tolerance in dict.fromkeys(asked(row) for row in rows):
        here = [row for row in rows if asked(row) == tolerance]
        found = scores(here)
        names = list(dict.fromkeys(row["solver"] for row in here))
        problems = [
            each
            for each in dict.fromkeys(row["problem"] for row in here)
            if all((name, each, tolerance) in found for name in names)
        ]
        if len(names) < 2 or not problems:
            continue
        lines.append(
            f"at {tolerance}, on the {len(problems)} problem(s) that all have tried "
            f"(shifted geometric mean, {SHIFT:g} s; a failure counts {TIME_LIMIT:g} s):"
        )
        means_of = {
            name: shifted_mean([found[name, each, tolerance] for each in problems])
            for name in names
        }
        for name in sorted(names, key=means_of.__getitem__):
            tried = [row for row in here if row["solver"] == name]
            rate = sum(row["certified"] for row in tried) / len(tried)
            lines.append(
                f"  {name:17} {means_of[name]:>10.5f} s a unit, {rate:>4.0%} of "
                f"{len(tried)} certified"
            )
    return lines


def shifted_mean(values: Sequence[float]) -> float:
    """exp(mean(log(t + shift))) - shift."""
    logs = [math.log(value + SHIFT) for value in values]
    return math.exp(sum(logs) / len(logs)) - SHIFT


def exponents(rows: Sequence[Row]) -> list[str]:
    """Measured exponents of the layer's cost in N, P and M beside those of the cost of ADMM.

    That is M (4 N P + 2 n^2) flops an iteration, n = min(N, P), and once 2 N P n + 10 n^3 for the
    factor, at the number of iterations of the middle problem: what a growing number of iterations
    adds is in the measured one alone.
    """
    lines = []
    for axis, field in (("N", "inputs"), ("P", "samples"), ("M", "layer_units")):
        for solver, tolerance in dict.fromkeys((row["solver"], asked(row)) for row in rows):
            if solver not in OURS:
                continue
            mine = [
                row
                for row in rows
                if (row["solver"], asked(row)) == (solver, tolerance) and row["certified"]
            ]
            for line in _series(mine, field):
                middle = sorted(line, key=lambda row: row[field])[len(line) // 2]
                size = [row[field] for row in line]
                cost = [row["cpu_seconds_a_unit"] * row["layer_units"] for row in line]
                flops = [_flops(row, 100) for row in line]
                lines.append(
                    f"cost in {axis} by {solver} at {tolerance} ({min(size)} to {max(size)}, "
                    f"around {middle['problem']}): exponent {slope(size, cost):.2f}, of ADMM's "
                    f"flops at 100 iterations {slope(size, flops):.2f}, of the iterations "
                    f"{slope(size, [max(row['iterations'], 1) for row in line]):+.2f}"
                )
    return lines


def slope(sizes: Sequence[float], values: Sequence[float]) -> float:
    """Least-squares slope of log values over log sizes."""
    return float(np.polyfit(np.log(sizes), np.log(values), 1)[0])


def passes(rows: Sequence[Row]) -> list[str]:
    """Passes that layers took, beside what is wanted."""
    lines = []
    for row in rows:
        most = PASSES.get((row["problem"], asked(row)))
        if most is None or row["solver"] != BEST:
            continue
        verdict = "met" if row["certified"] and row["passes"] <= most else "MISSED"
        lines.append(
            f"{row['problem']} at {asked(row)}: {BEST} took {row['passes']:.0f} passes "
            f"(want {most} at most: {verdict})"
        )
    return lines


def verdicts(rows: Sequence[Row]) -> list[str]:
    """Ratios of the fastest rival's seconds a unit to ours, beside what is wanted."""
    found = scores(rows)
    certified = {(row["solver"], row["problem"], asked(row)) for row in rows if row["certified"]}
    lines = []
    for name, tolerance in dict.fromkeys((row["problem"], asked(row)) for row in rows):
        here = [(rival, name, tolerance) for rival in RIVALS]
        rivals = {key[0]: found[key] for key in here if key in certified}
        ours = (BEST, name, tolerance)
        if not rivals or ours not in certified:
            continue
        fastest = min(rivals, key=rivals.__getitem__)
        ratio = rivals[fastest] / found[ours]
        wanted = WANTED.get((name, tolerance))
        verdict = ""
        if wanted is not None:
            verdict = f" (want {wanted:g}: {'met' if ratio >= wanted else 'MISSED'})"
        lines.append(
            f"{name} at {tolerance}: {BEST} is {ratio:.1f} times as fast a unit as the fastest "
            f"rival, {fastest}{verdict}"
        )
    return lines


def losses(rows: Sequence[Row]) -> list[str]:
    """Where anybody missed the accuracy, and where all of ours were slower than another."""
    lines = [
        f"{row['problem']}: {row['solver']} missed {row['tolerance']:g}: gap {_number(row['gap'])},"
        f" violation {_number(row['violation'])} (it says {row['status']})"
        for row in rows
        if not row["certified"]
    ]
    found = scores(rows)
    for name, tolerance in dict.fromkeys((row["problem"], asked(row)) for row in rows):
        here = {key[0]: score for key, score in found.items() if key[1:] == (name, tolerance)}
        ours = [here[solver] for solver in OURS if solver in here]
        if not ours:
            continue
        for solver, seconds in here.items():
            if solver not in OURS and seconds < min(ours):
                lines.append(
                    f"{name} at {tolerance}: {solver} is {min(ours) / seconds:.1f} times as fast "
                    "as the fastest of ours"
                )
    return lines


def profile(rows: Sequence[Row], path: Path) -> bool:
    """Draw the performance profile (Dolan and More) on the problems that all have tried.

    False where there is nothing to compare.
    """
    found = scores(rows)
    certified = {(row["solver"], row["problem"], asked(row)) for row in rows if row["certified"]}
    names = list(dict.fromkeys(row["solver"] for row in rows))
    every = dict.fromkeys((row["problem"], asked(row)) for row in rows)
    cases = [case for case in every if all((name, *case) in found for name in names)]
    best = {
        case: min((found[n, *case] for n in names if (n, *case) in certified), default=math.inf)
        for case in cases
    }
    cases = [case for case in cases if math.isfinite(best[case])]
    if len(names) < 2 or not cases:
        return False
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.5, 4.5), layout="constrained")
    axes = figure.subplots()
    ratios = {
        name: sorted(
            found[name, *case] / best[case] for case in cases if (name, *case) in certified
        )
        for name in names
    }
    right = 2 * max((max(values) for values in ratios.values() if values), default=1.0)
    styles = ("-", "--", "-.", ":")
    for number, name in enumerate(names):
        shares = np.arange(1, len(ratios[name]) + 1) / len(cases)
        axes.step(
            [1, *ratios[name], right],
            [0, *shares, shares[-1] if len(shares) else 0],
            where="post",
            label=name,
            linestyle=styles[number // 10 % len(styles)],
            linewidth=2.2 if name in OURS else 1.3,
        )
    axes.set_xscale("log")
    axes.set_xlim(0.97, right)
    axes.set_ylim(0, 1.03)
    axes.set_xlabel("processor time a unit, over the fastest solver's")
    axes.set_ylabel("share of the problems certified")
    axes.set_title(f"{len(cases)} problems, certificates recomputed")
    axes.grid(visible=True, alpha=0.3)
    axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False)
    figure.savefig(path, dpi=150)
    return True


def _series(rows: Sequence[Row], field: str) -> list[list[Row]]:
    """Rows of one solver that differ in one size alone, three sizes at least."""
    others = [name for name in ("inputs", "samples", "layer_units") if name != field]
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        family = row["problem"].partition("-")[0]
        groups.setdefault((family, row["form"], *(row[name] for name in others)), []).append(row)
    return [each for each in groups.values() if len({row[field] for row in each}) >= 3]


def _flops(row: Row, iterations: int) -> float:
    """Cost of ADMM on a layer."""
    n_in, n_samples, n_out = row["inputs"], row["samples"], row["layer_units"]
    order = min(n_in, n_samples)
    step = n_out * (4 * n_in * n_samples + 2 * order**2)
    return float(2 * n_in * n_samples * order + 10 * order**3 + iterations * step)


def _number(value: float | None) -> str:
    return "     nan" if value is None else f"{value:>8.1e}"
