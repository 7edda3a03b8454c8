"""Second-order pruning beside its peers: methods x layers x sparsities, errors and seconds.

    python -m bench.obs --peers PEERS.json --data DIR

DIR holds ``models/lobs_LeNet300100_pretrain.pth`` and ``mnist/train-images-idx3-ubyte.gz``. The
problems: LeNet-300-100's weights without biases, the first 10 000 training images, dense inputs;
the error is ||X(What - W)||^2 / ||XW||^2, recomputed from the inputs, not read off a method.
``--synthetic 2048`` runs one wide layer with correlated inputs instead: sweep against large.
"""

from __future__ import annotations

import argparse
import gzip
import json
import resource
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np

from solvers.obs import (
    LayerProblem,
    Pattern,
    Pruned,
    add_rows,
    hessian_of,
    improve,
    kept_by,
    layer_problem,
    mean_hessian,
    n_of_m,
    pattern_support,
    per_layer,
    prune_best,
    prune_large,
    prune_one_shot,
    prune_sweep,
    refit,
    removal_path,
)

LAYERS = ("fc1", "fc2", "fc3")
AMOUNTS = ("0.5", "0.8", "0.9", "0.95", "2:4")


class Row(NamedTuple):
    """One measurement."""

    layer: str
    amount: str
    method: str
    error: float
    removed: int
    wall: float
    cpu: float
    note: str


def lenet_layers(data: Path) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Load (inputs, weight) of each layer."""
    import torch

    state = torch.load(
        data / "models/lobs_LeNet300100_pretrain.pth", weights_only=True, map_location="cpu"
    )
    with gzip.open(data / "mnist/train-images-idx3-ubyte.gz") as file:
        pixels = np.frombuffer(file.read(16 + 784 * 10_000), np.uint8, offset=16)
    inputs = (pixels.reshape(-1, 784) / 255 - 0.1307) / 0.3081
    layers = {}
    for name in LAYERS:
        weight = state[f"{name}.weight"].double().numpy().T
        layers[name] = (inputs, weight)
        inputs = np.maximum(inputs @ weight + state[f"{name}.bias"].double().numpy(), 0)
    return layers


def pattern_of(amount: str) -> Pattern:
    return n_of_m(2, 4) if amount == "2:4" else per_layer(float(amount))


def timed(run: Callable[[], Pruned]) -> tuple[Pruned, float, float]:
    wall, cpu = time.perf_counter(), time.process_time()
    result = run()
    return result, time.perf_counter() - wall, time.process_time() - cpu


def magnitude(problem: LayerProblem, pattern: Pattern, norm: np.ndarray | float) -> np.ndarray:
    score = np.abs(problem.weight) * norm
    return kept_by(score, pattern, problem.allowed, problem.prunable)


def measure(
    inputs: np.ndarray, weight: np.ndarray, name: str, amounts: Sequence[str], threads: int
) -> list[Row]:
    """Run all methods on one layer."""
    problem = layer_problem(weight, hessian_of([inputs]))
    energy = float(np.sum((inputs @ weight) ** 2))
    rows: list[Row] = []

    def record(amount: str, method: str, result: Pruned, wall: float, cpu: float) -> None:
        change = inputs @ (result.weight - weight)
        error = float(np.sum(change**2)) / energy
        rows.append(Row(name, amount, method, error, result.removed, wall, cpu, result.note))
        print(format_row(rows[-1]), flush=True)

    start, cpu = time.perf_counter(), time.process_time()
    path = removal_path(problem, threads=threads)
    print(
        f"{name}: exact path, all sparsities: {time.perf_counter() - start:.2f} s, "
        f"{time.process_time() - cpu:.2f} s of CPU",
        flush=True,
    )
    norm = np.linalg.norm(inputs, axis=0)[:, None]
    for amount in amounts:
        pattern = pattern_of(amount)
        for method, scale in (("magnitude + refit", 1.0), ("|w| ||x|| + refit", norm)):
            kept = magnitude(problem, pattern, scale)
            record(amount, method, *timed(partial(refit, problem, kept, threads=threads)))
        record(amount, "one-shot (paper)", *timed(partial(prune_one_shot, problem, pattern)))
        record(amount, "sweep", *timed(partial(prune_sweep, problem, pattern)))

        start, cpu = time.perf_counter(), time.process_time()
        if pattern.kind == "n:m":
            own = removal_path(problem, pattern=pattern, threads=threads)
        else:
            own = path
        kept = pattern_support(problem, own, pattern)
        result = refit(problem, kept, threads=threads)
        wall, spent = time.perf_counter() - start, time.process_time() - cpu
        record(amount, "path + refit", result, wall, spent)
        record(
            amount,
            "path + swaps",
            *timed(partial(improve, problem, kept, pattern, threads=threads)),
        )
        record(amount, "large", *timed(partial(prune_large, problem, pattern, threads=threads)))
        record(amount, "best", *timed(partial(prune_best, problem, pattern, threads=threads)))
    return rows


def format_row(row: Row) -> str:
    note = f"  ({row.note})" if row.note else ""
    return (
        f"{row.layer}  {row.amount:>5}  {row.method:<18} {row.error:.4e}  {row.removed:>7} removed"
        f"  {row.wall:7.2f} s {row.cpu:7.2f} s CPU{note}"
    )


def compare(rows: Sequence[Row], peers: dict[str, dict[str, dict[str, list[float]]]]) -> bool:
    """Print our best beside the best peer; return whether no row loses."""
    print("\nlayer amount  our best  by                 best peer  by         ratio   to ALPS")
    won = True
    for name in dict.fromkeys(row.layer for row in rows):
        for amount in dict.fromkeys(row.amount for row in rows if row.layer == name):
            ours = min(
                (r for r in rows if (r.layer, r.amount) == (name, amount)), key=lambda r: r.error
            )
            theirs = peers[name][amount]
            by = min(theirs, key=lambda peer: theirs[peer][0])
            ratio = ours.error / theirs[by][0]
            alps = ours.error / theirs["alps"][0]
            won &= ratio <= 1
            print(
                f"{name}   {amount:>5}  {ours.error:.3e} {ours.method:<18} {theirs[by][0]:.3e}  "
                f"{by:<9} {ratio:6.3f}  {alps:7.3f}"
            )
            everyone = ", ".join(f"{peer} {error:.3e}" for peer, (error, _) in theirs.items())
            print(f"               peers: {everyone}")
    return won


def synthetic(size: int, sparsity: float, seed: int, threads: int) -> bool:
    """Run sweep and large on a wide layer whose inputs are correlated and rectified."""
    rng = np.random.default_rng(seed)
    mix = rng.standard_normal((size, size)) / np.sqrt(np.arange(1, size + 1))[:, None]
    state = None
    for _ in range(4):
        batch = np.maximum(rng.standard_normal((size, size)) @ mix, 0)
        state = add_rows(state, batch)
    weight = rng.standard_normal((size, size)) / np.sqrt(size)
    problem = layer_problem(weight, mean_hessian(state))
    pattern = per_layer(sparsity)
    results: dict[str, Pruned] = {}
    for name, run in (
        ("sweep", partial(prune_sweep, problem, pattern)),
        ("large", partial(prune_large, problem, pattern, threads=threads)),
    ):
        results[name], wall, cpu = timed(run)
        one = results[name]
        row = Row(f"{size}", f"{sparsity}", name, one.relative_error, one.removed, wall, cpu,
                  one.note)  # fmt: skip
        print(format_row(row), flush=True)
    gain = 1 - results["large"].error / results["sweep"].error
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"large is {gain:.1%} below the sweep; peak memory {peak:.2f} GiB")
    return gain >= 0.3


def main(argv: Sequence[str] | None = None) -> int:
    """Run the bench; exit code 1 when a peer is better anywhere."""
    parser = argparse.ArgumentParser(prog="bench obs", description=__doc__.split("\n", 1)[0])
    parser.add_argument("--peers", type=Path, help="PEERS.json: layer -> amount -> peer")
    parser.add_argument("--data", type=Path, help="directory with models/ and mnist/")
    parser.add_argument("--layers", nargs="+", choices=LAYERS, default=["fc3", "fc2", "fc1"])
    parser.add_argument("--amounts", nargs="+", choices=AMOUNTS, default=list(AMOUNTS))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--synthetic", type=int, metavar="SIZE", help="one SIZE x SIZE layer")
    parser.add_argument("--sparsity", type=float, default=0.7, help="of the synthetic layer")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="write the rows here")
    options = parser.parse_args(argv)
    warm_up()
    if options.synthetic is not None:
        return 0 if synthetic(options.synthetic, options.sparsity, options.seed,
                              options.threads) else 1  # fmt: skip
    if options.data is None:
        parser.error("--data is needed, or --synthetic SIZE")
    loaded = lenet_layers(options.data)
    rows = [
        row
        for name in options.layers
        for row in measure(*loaded[name], name, options.amounts, options.threads)
    ]
    if options.json is not None:
        options.json.write_text(json.dumps([row._asdict() for row in rows], indent=1))
    if options.peers is None:
        return 0
    return 0 if compare(rows, json.loads(options.peers.read_text())) else 1


def warm_up() -> None:
    """Compile the kernels, so that no measurement contains that."""
    problem = layer_problem(np.random.default_rng(0).standard_normal((8, 3)), np.eye(8))
    for pattern in (per_layer(0.5), n_of_m(2, 4)):
        prune_best(problem, pattern, kicks=1)
        prune_one_shot(problem, pattern)


if __name__ == "__main__":
    raise SystemExit(main())
