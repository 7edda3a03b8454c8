"""The Net-Trim paper's largest dense network, NN3-60K: time, memory and certificates by layer.

    python -m bench papers.net_trim_60k --data mnist:DIR --test mnist-test:DIR --out RUN

784-300-1000-300-10 on all 60 000 training images, retrained by the cascade with every image in
every layer's program. The network is trained here (the paper's is not public) and kept in the run
directory beside the layers, so that the same command goes on where an earlier one stopped; seconds
of layers that were done before are those of that run, memory is this process's.
"""

from __future__ import annotations

import argparse
import logging
import resource
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
from threadpoolctl import threadpool_limits
from torch import nn
from torch.optim.lr_scheduler import CosineAnnealingLR

import retrain
from bench.papers.models import momentum_sgd, relu_network
from retrain.data.arrays import Data
from retrain.data.sources import load_data
from retrain.stream.details import NetTrimDetails, details_of
from retrain.stream.layer_report import LayerReport
from retrain.trainers.loop.accuracy import evaluate
from retrain.trainers.loop.supervised import train

WIDTHS = (784, 300, 1000, 300, 10)
EPOCHS = 5
WANTED_SECONDS, WANTED_MEMORY, WANTED_GAP = 1200.0, 6 * 2**30, 1e-2


def trained(path: Path, data: Data) -> nn.Module:
    """Read the network that an earlier run trained, or train it: momentum SGD, 5 epochs."""
    network = relu_network(WIDTHS, seed=0)
    if path.exists():
        network.load_state_dict(torch.load(path, weights_only=True))
        return network
    assert data.y is not None
    samples = (np.asarray(data.flat, dtype=np.float32), data.y)
    made = train(
        network,
        samples,
        epochs=EPOCHS,
        optimizer=momentum_sgd,
        schedule=partial(CosineAnnealingLR, T_max=EPOCHS),
        batch_size=100,
        seed=0,
    ).model
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(made.state_dict(), path)
    return made


def peak_memory() -> int:
    """Most bytes that this process has held."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def tell(report: LayerReport, total: int) -> None:
    """Print a layer as it is done."""
    details = details_of(report.details, NetTrimDetails)
    violation = max(details.ball_violation, details.ceiling_violation)
    print(
        f"  {report.name:3} {report.shape[0]:5} x {report.shape[1]:<5} {report.rows:6} rows "
        f"{report.seconds:7.0f} s  gap {details.gap:.1e}  violation {violation:.1e}  "
        f"zeros {report.sparsity:6.1%}  {report.status.value}  "
        f"{peak_memory() / 2**30:.1f} GiB",
        flush=True,
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the bench; 0 when time, memory and certificates are as wanted."""
    parser = argparse.ArgumentParser(
        prog="python -m bench papers.net_trim_60k", description=__doc__.partition("\n")[0]
    )
    parser.add_argument("--data", required=True, help="MNIST, as mnist:DIR")
    parser.add_argument("--test", required=True, help="its test images, as mnist-test:DIR")
    parser.add_argument("--out", type=Path, required=True, help="run directory, gone on with")
    parser.add_argument("--limit", type=int, help="first so many images only")
    parser.add_argument("--relative-epsilon", type=float, default=0.05)
    parser.add_argument("--solver", choices=("newton", "admm"), default="newton")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="  %(message)s")
    torch.set_num_threads(options.threads)
    data, test = load_data(options.data, limit=options.limit), load_data(options.test)
    started, used = time.perf_counter(), time.process_time()
    network = trained(options.out.with_suffix(".network.pt"), data)
    testing = (test.flat.astype(np.float32), np.asarray(test.y))
    before = evaluate(network, testing)
    print(f"network: {before:.2%} of the test images, {time.perf_counter() - started:.0f} s")
    started, used = time.perf_counter(), time.process_time()
    with threadpool_limits(options.threads):
        run = retrain.net_trim(
            network,
            np.asarray(data.flat, dtype=np.float32),
            out=options.out,
            relative_epsilon=options.relative_epsilon,
            solver=options.solver,
            tolerance=WANTED_GAP,
            threads=options.threads,
            memory=WANTED_MEMORY,
            on_layer=tell,
        )
    wall, used = time.perf_counter() - started, time.process_time() - used
    layers = sum(report.seconds for report in run.layers)
    memory = peak_memory()
    print(
        f"{layers:.0f} s in the layers, {wall:.0f} s for this command, {used:.0f} s of processor, "
        f"{memory / 2**30:.1f} GiB at most; all certified: {run.certified}"
    )
    after, moved = evaluate(run.model, testing), run.bounds["calibration"].relative
    print(
        f"zeros {run.record['totals']['sparsity']:.1%}, test images {before:.2%} -> {after:.2%}, "
        f"outputs moved {moved:.2%}"
    )
    rows = all(report.rows == report.total_rows for report in run.layers)
    met = run.certified and rows and layers <= WANTED_SECONDS and memory <= WANTED_MEMORY
    print("as wanted" if met else "NOT as wanted: see above")
    return 0 if met else 1


if __name__ == "__main__":
    raise SystemExit(main())
