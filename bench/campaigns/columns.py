"""Columns over eight orders of magnitude: networks retrained by default options, certified or not.

Each case is a random network of two layers and its calibration rows, in two versions that compute
the same function: as drawn, and with the inputs' columns multiplied by sizes from 1e-4 to 1e4 and
the first layer's weights divided by them. Both are retrained by `retrain.net_trim` with the options
given, by default none, one after the other, in one process. The promise: every layer of both is
certified, and the scaled versions take at most three times the time of the others, all in all.

Rows are JSON lines, one a case; a case that is in the file already, by the same code, is not run
again. The table and the exit code (1: the promise is broken) are of all cases asked for.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from threadpoolctl import threadpool_limits

import retrain
from bench.solvers import environment
from retrain import Chain
from retrain.stream.details import NetTrimDetails, details_of

DECADES = 8.0
MOST = 3.0  # times the normalised networks' time
KINDS = ("gaussian", "rectified", "correlated")
DTYPES = ("float32", "float64")

Row = dict[str, Any]


def network(seed: int, decades: float = DECADES) -> tuple[Row, list[tuple[Chain, np.ndarray]]]:
    """Draw a case: what it is, and its two versions, as drawn and with columns of many sizes."""
    rng = np.random.default_rng([seed, 12])
    n_samples = int(rng.integers(150, 900))
    widths = [int(rng.integers(low, high)) for low, high in ((10, 100), (8, 60), (2, 12))]
    kind, dtype = str(rng.choice(KINDS)), str(rng.choice(DTYPES))
    inputs = rng.standard_normal((n_samples, widths[0]))
    if kind == "rectified":
        inputs = np.maximum(inputs, 0)
    if kind == "correlated":
        factors = rng.standard_normal((n_samples, 3)) @ rng.standard_normal((3, widths[0]))
        inputs = 0.5 * inputs + factors
    weights = []
    for n_in, n_out in pairwise(widths):
        size = np.where(rng.random((n_in + 1, n_out)) < 0.3, 1.0, 0.03) / np.sqrt(0.3 * n_in)
        weights.append(size * rng.standard_normal((n_in + 1, n_out)))
    sizes = 10 ** rng.uniform(-decades / 2, decades / 2, widths[0])
    sizes[[0, -1]] = 10 ** (-decades / 2), 10 ** (decades / 2)
    versions = []
    for each in (np.ones(widths[0]), sizes):
        first = np.vstack([weights[0][:-1] / each[:, None], weights[0][-1:]])
        arrays = [array.astype(dtype) for array in (inputs * each, first, weights[1])]
        versions.append((Chain(tuple(arrays[1:]), biases=(True, True)), arrays[0]))
    what = {"kind": kind, "dtype": dtype, "samples": n_samples, "widths": widths}
    return what, versions


def measure(seed: int, settings: dict[str, Any], decades: float = DECADES) -> Row:
    """Retrain both versions of a case."""
    what, versions = network(seed, decades)
    row: Row = {"seed": seed, "decades": decades, "settings": settings, **what}
    for name, (chain, inputs) in zip(("plain", "scaled"), versions, strict=True):
        started = time.perf_counter()
        run = retrain.net_trim(chain, inputs, threads=1, **settings)
        found = [details_of(layer.details, NetTrimDetails) for layer in run.layers]
        row[name] = {
            "seconds": time.perf_counter() - started,
            "certified": run.certified,
            "statuses": [layer.status.value for layer in run.layers],
            "solvers": [details.solver for details in found],
            "iterations": [details.iterations for details in found],
            "sparsity": [layer.sparsity for layer in run.layers],
        }
    return row


def table(rows: list[Row]) -> str:
    """Sum up by kind of inputs and dtype."""
    lines = ["inputs       dtype    cases  certified plain  scaled  scaled / plain time"]
    for kind in KINDS:
        for dtype in DTYPES:
            part = [row for row in rows if row["kind"] == kind and row["dtype"] == dtype]
            if part:
                lines.append(f"{kind:12} {dtype:8} {_summed(part)}")
    lines.append(f"{'all':12} {'':8} {_summed(rows)}")
    return "\n".join(lines)


def kept(rows: list[Row]) -> bool:
    """Tell whether the promise is kept."""
    certified = all(row[name]["certified"] for row in rows for name in ("plain", "scaled"))
    return certified and _ratio(rows) <= MOST


def main(arguments: list[str]) -> int:
    """Run the campaign; exit code 1 when a layer is not certified, or the time is exceeded."""
    parser = argparse.ArgumentParser(prog="python -m bench campaigns.columns", description=__doc__)
    parser.add_argument("--cases", type=int, default=200, metavar="N", help="default 200")
    parser.add_argument("--first", type=int, default=0, metavar="SEED", help="default 0")
    parser.add_argument("--solver", default=None, help="default: net_trim's own")
    parser.add_argument("--decades", type=float, default=DECADES, help="default 8")
    parser.add_argument(
        "--out", type=Path, default=Path(tempfile.gettempdir()) / "retrain-columns.jsonl"
    )
    options = parser.parse_args(arguments)
    settings = {} if options.solver is None else {"solver": options.solver}
    code = environment("newton")["code"]
    done = {_key(row): row for row in _read(options.out)}
    options.out.parent.mkdir(parents=True, exist_ok=True)
    rows = []
    with options.out.open("a", encoding="utf-8") as file, threadpool_limits(1):
        measure(10_000, settings)  # compiles
        for seed in range(options.first, options.first + options.cases):
            wanted = {"seed": seed, "decades": options.decades, "settings": settings, "code": code}
            row = done.get(_key(wanted))
            if row is None:
                row = {**measure(seed, settings, options.decades), "code": code}
                file.write(json.dumps(row) + "\n")
                file.flush()
            rows.append(row)
            for name in ("plain", "scaled"):
                if not row[name]["certified"]:
                    print(f"seed {seed}: {name} not certified: {row[name]['statuses']}")
    print(table(rows))
    return 0 if kept(rows) else 1


def _summed(rows: list[Row]) -> str:
    plain, scaled = (sum(row[name]["certified"] for row in rows) for name in ("plain", "scaled"))
    return f"{len(rows):5}  {plain:15}  {scaled:6}  {_ratio(rows):19.2f}"


def _ratio(rows: list[Row]) -> float:
    scaled, plain = (sum(row[name]["seconds"] for row in rows) for name in ("scaled", "plain"))
    return float(scaled / plain)


def _key(row: Row) -> str:
    return json.dumps([row[name] for name in ("seed", "decades", "settings", "code")])


def _read(path: Path) -> list[Row]:
    """Rows of an earlier run; a last line cut off by a kill is left out."""
    rows: list[Row] = []
    if path.exists():
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError:
                continue
    return rows
