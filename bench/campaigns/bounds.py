"""Random networks against the promise that a bound on the outputs' deviation is never below it.

Each case draws a network (chains, residual sums, two heads, convolutions of every kind, batch norm,
layers that go nowhere, hidden scales from 1e-24 to 1e24, hidden units that cancel, zero targets), a
type, and a way to change its weights: Net-Trim, L-OBS, or weights set to zero at random. The
deviation is then recomputed in long double from the saved weights. Rows are JSON lines, one per
case; a case whose row is in the file is not run again.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from collections.abc import Iterable
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import torch
from threadpoolctl import threadpool_limits

import retrain
from bench.campaigns.networks import Net, draw, exactly
from retrain.adapters.network.stream import TorchStream
from retrain.bounds.outputs import OutputBound, output_bound

Row = dict[str, Any]
# Long double has a roundoff of its own, which a bound on exact arithmetic need not cover.
_LONG = float(np.finfo(np.longdouble).eps)


def main(arguments: list[str]) -> int:
    """Run the cases that are not in the file yet, print the table; 1 when a bound is too low."""
    parser = argparse.ArgumentParser(
        prog="python -m bench campaigns.bounds",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--cases", type=int, default=2000, help="networks to draw (2000)")
    parser.add_argument("--seed", type=int, default=0, help="number of the first case (0)")
    parser.add_argument("--out", type=Path, default=Path("runs/bench/bounds.jsonl"))
    options = parser.parse_args(arguments)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    lines = options.out.read_text(encoding="utf-8").splitlines() if options.out.exists() else []
    rows = {row["seed"]: row for row in map(json.loads, (x for x in lines if x.endswith("}")))}
    wanted = range(options.seed, options.seed + options.cases)
    with options.out.open("a", encoding="utf-8") as file:
        for seed in wanted:
            if seed not in rows:
                rows[seed] = case(seed)
                file.write(json.dumps(rows[seed]) + "\n")
                file.flush()
    found = [rows[seed] for seed in wanted]
    print("\n".join(table(found)))
    return 1 if any(row["violations"] for row in found) else 0


def case(seed: int) -> Row:
    """Run one case; its row says what was drawn, what was measured and what is too low."""
    rng = np.random.default_rng([seed, 1])
    torch.manual_seed(seed)
    net, x, traits = draw(rng)
    dtype = torch.float32 if rng.random() < 0.6 else torch.float64
    net = net.to(dtype)
    with threadpool_limits(1):
        new, bound, how = _change(rng, net, x)
    row: Row = {"seed": seed, "traits": traits, "dtype": str(dtype), "how": how}
    if bound is None:
        return {**row, "violations": []}
    with np.errstate(over="ignore", invalid="ignore"):
        moved = exactly(new, x) - exactly(net, x)
    exact = float(np.sqrt((moved * moved).sum()))
    violations = []
    if bound.defect is not None:
        violations.append(bound.defect)
    for name, value in (("direct", bound.direct), ("sum", bound.bound)):
        if value is not None and not value >= exact * (1 - 64 * _LONG):
            violations.append(f"{name} {value:.6g} below the exact deviation {exact:.6g}")
    return {
        **row,
        "exact": exact,
        "measured": bound.measured,
        "sum": bound.bound,
        "direct": bound.direct,
        "rounding": bound.rounding,
        "reason": bound.reason,
        "direct_reason": bound.direct_reason,
        "violations": violations,
    }


def _change(
    rng: np.random.Generator, net: Net, x: np.ndarray
) -> tuple[Any, OutputBound | None, str]:
    """Retrain a network in one of the ways; None for a bound where it was refused."""
    way = rng.choice(["cascade", "parallel", "lobs", "random"], p=[0.4, 0.2, 0.15, 0.25])
    names = [spec.name for spec in TorchStream(net, x).layers if spec.reason is None]
    picked = {"all": names, "first": names[:1], "last": names[-1:], "one": [rng.choice(names)]}
    which = str(rng.choice(["all", "first", "last", "one"], p=[0.7, 0.1, 0.1, 0.1]))
    layers = [str(name) for name in picked[which]]
    how = f"{way}, {which}"
    if way == "random":
        stream = TorchStream(net, x)
        for name in layers:
            spec = next(spec for spec in stream.layers if spec.name == name)
            for group in range(spec.groups):
                weight = stream.weight(name, group)
                kept = torch.as_tensor(rng.random(weight.shape) < 0.7)
                stream.commit(name, weight * kept, group)
        return deepcopy(stream.model), output_bound(stream), how
    try:
        if way == "lobs":
            run = retrain.lobs(net, x, sparsity=0.4, layers=layers, method="one-shot")
        else:
            epsilon = float(rng.choice([0.0, 0.02, 0.1, 0.4]))
            form = "regularised" if epsilon > 0 and rng.random() < 0.15 else "constrained"
            how += f", epsilon {epsilon:g}, {form}"
            run = retrain.net_trim(
                net,
                x,
                layers=layers,
                scheme=way,
                form=form,
                relative_epsilon=epsilon,
                inflation=float(rng.choice([1.0, 1.1, 2.0])),
                accept_inexact=bool(rng.random() < 0.3),
                max_iterations=1000,
            )
    except ValueError as error:
        return net, None, f"{how}: refused, {str(error)[:120]}"
    return run.model, run.bounds["calibration"], how


def table(rows: Iterable[Row]) -> list[str]:
    """Sum up the rows: how many bounds there are, how near they come, what is too low."""
    rows = list(rows)
    lines = [f"{'way':24} {'cases':>6} {'sum':>6} {'direct':>7} {'violated':>9} {'nearest':>8}"]
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(row["how"].partition(",")[0] + ", " + row["dtype"][6:], []).append(row)
    for name, members in [*sorted(groups.items()), ("all", rows)]:
        ratios = [ratio for ratio in map(_nearest, members) if ratio is not None]
        lines.append(
            f"{name:24} {len(members):6} {sum(r.get('sum') is not None for r in members):6} "
            f"{sum(r.get('direct') is not None for r in members):7} "
            f"{sum(bool(r['violations']) for r in members):9} {min(ratios, default=0):8.4f}"
        )
    reasons = Counter(
        row["reason"].partition(":")[0] if ":" in row["reason"] else row["reason"]
        for row in rows
        if row.get("reason")
    )
    lines += [f"no sum: {count} x {reason}" for reason, count in reasons.most_common(8)]
    lines += [f"case {row['seed']}: {row['violations']}" for row in rows if row["violations"]]
    return lines


def _nearest(row: Row) -> float | None:
    """The best bound over the exact deviation, where that is not rounding alone."""
    bounds = [row[name] for name in ("sum", "direct") if row.get(name) is not None]
    if not bounds or not row["exact"] > 2 * row["rounding"]:
        return None
    return min(bounds) / row["exact"]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
