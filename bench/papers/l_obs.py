"""The L-OBS paper on MNIST: tables 3 and 4, figures 2, 3 and 5, and the authors' own files.

    python -m bench papers.l_obs --data mnist:DIR --test mnist-test:DIR [--model LENET.pth]
                                 [--authors FILE.npz] [--only PART] [--method METHOD]

LeNet-300-100 is read from --model (784-300-100-10, inputs (x - 0.1307) / 0.3081) or trained here;
LeNet-5 is trained here. All 60 000 training images give the Hessians of LeNet-300-100; LeNet-5's,
whose convolutions have 64 and 576 rows an image, come from the first 10 000.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import joblib
import numpy as np
import torch
from torch import nn

import retrain
from bench.papers import l_obs_curves as curves
from bench.papers.l_obs_authors import compare
from bench.papers.lenet import lenet_5, lenet_300_100, pairs
from retrain.adapters.network.stream import TorchStream
from retrain.data.arrays import Data
from retrain.data.sources import load_data
from retrain.trainers.hptd import truncate
from retrain.trainers.loop.accuracy import evaluate
from retrain.trainers.loop.masked import fine_tune

PARTS = ("authors", "curves", "table3", "table4")
NORMALISE = "0.1307,0.3081"
LENET_5_ROWS = 10_000
METHODS = ("magnitude", "one-shot", "greedy", "auto")
LIGHT_EPOCHS = 2
"""Of Adam with torch's defaults, on all training images, after each stage."""


@dataclass(frozen=True)
class Stages:
    """A two-stage table of the paper: kept fractions by layer, and the totals it gives."""

    title: str
    kept: tuple[Mapping[str, float], Mapping[str, float]]
    totals: tuple[float, float]


TABLE_3 = Stages(
    "table 3: LeNet-300-100",
    ({"fc1": 0.07, "fc2": 0.2, "fc3": 0.7}, {"fc1": 0.01, "fc2": 0.04, "fc3": 0.54}),
    (8.7, 1.5),
)
TABLE_4 = Stages(
    "table 4: LeNet-5",
    (
        {"conv1": 0.6, "conv2": 0.6, "fc1": 0.06, "fc2": 0.3},
        {"conv1": 0.2, "conv2": 0.01, "fc1": 0.009, "fc2": 0.08},
    ),
    (9.5, 0.9),
)


def table(
    stages: Stages,
    methods: Sequence[str],
    model: nn.Module,
    training: Data,
    test: Data,
    rows: int,
    *,
    flat: bool,
) -> None:
    """Print a two-stage table: accuracies before and after light retraining, by method."""
    examples, held_out = pairs(training, flat=flat), pairs(test, flat=flat)
    calibration = Data(training.x[:rows], None, training.name)
    print(
        f"\n{stages.title}; {len(calibration):,} images for the Hessians, "
        f"{LIGHT_EPOCHS} epochs on {len(training):,} after each stage; "
        f"dense {100 * evaluate(model, held_out):.2f} %"
    )
    print("the paper keeps " + " %, then ".join(map(str, stages.totals)) + " % in these layers\n")
    print(
        "| method    | kept % | pruned % | retrained % | accumulated | 3.2 spectral | 3.2 paper |"
    )
    print(
        "| --------- | ------ | -------- | ----------- | ----------- | ------------ | --------- |"
    )
    for method in methods:
        network = model
        for kept in stages.kept:
            started = time.perf_counter()
            pruned, bounds = _pruned(network, calibration, kept, method)
            after = evaluate(pruned, held_out)
            pruning = time.perf_counter() - started
            network = fine_tune(pruned, examples, epochs=LIGHT_EPOCHS).model
            print(
                f"| {method:<9} | {100 * _density(pruned):6.2f} | {100 * after:8.2f} "
                f"| {100 * evaluate(network, held_out):11.2f} | {bounds} | {pruning:.0f} s",
                flush=True,
            )
    for method in methods:
        if method == "magnitude":
            continue
        pruned, bounds = _pruned(model, calibration, stages.kept[1], method)
        after = evaluate(pruned, held_out)
        print(
            f"| {method:<9} | {100 * _density(pruned):6.2f} | {100 * after:8.2f} "
            f"| {'(one stage)':>11} | {bounds} |",
            flush=True,
        )


def _pruned(
    network: nn.Module, calibration: Data, kept: Mapping[str, float], method: str
) -> tuple[nn.Module, str]:
    """Prune a network; return it and theorem 3.2's numbers, root mean squared over the images."""
    if method == "magnitude":
        sizes = {name: network.get_submodule(name).get_parameter("weight").numel() for name in kept}
        counts = {f"{name}.weight": round((1 - kept[name]) * size) for name, size in sizes.items()}
        return truncate(network, counts), f"{'':11} | {'':12} | {'':9}"
    sparsity = {name: 1 - fraction for name, fraction in kept.items()}
    run = retrain.lobs(network, calibration, sparsity=sparsity, method=method)
    if not run.certified:
        raise RuntimeError(f"{method}: a layer is not certified")
    theorem = run.record["theorems"]["calibration"]
    scale = 1 / np.sqrt(theorem["rows"])
    numbers = [scale * theorem[key] for key in ("measured", "spectral", "frobenius")]
    return run.model, "{:11.3g} | {:12.3g} | {:9.3g}".format(*numbers)


def _density(network: nn.Module) -> float:
    weights = [p.detach() for p in network.parameters() if p.ndim > 1]
    return sum(int((w != 0).sum()) for w in weights) / sum(w.numel() for w in weights)


def figures(model: nn.Module, training: Data, test: Data, seed: int) -> None:
    """Print figures 2, 3 and 5 on fc1."""
    threads = joblib.cpu_count()
    stream = TorchStream(model, Data(training.x, None, training.name))
    layer = curves.first_layer(stream, threads)
    trial = TorchStream(model, Data(test.x, None, test.name))
    name = stream.layers[0].name
    assert test.y is not None

    def accuracy(labels: np.ndarray, weight: np.ndarray) -> float:
        trial.commit(name, torch.tensor(weight))
        outputs = torch.cat(list(trial.outputs(dense=False)))
        return float((outputs.argmax(dim=1).numpy() == labels).mean())

    measure = partial(accuracy, test.y)
    dense = measure(stream.weight(name).double().numpy())
    curves.print_curves(curves.curves(layer, measure, seed, threads), dense)
    curves.print_sensitivities(layer)
    curves.print_tolerances(layer)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the bench."""
    parser = argparse.ArgumentParser(prog="python -m bench papers.l_obs", description=__doc__)
    parser.add_argument("--data", required=True, help="MNIST, as mnist:DIR")
    parser.add_argument("--test", required=True, help="its test images, as mnist-test:DIR")
    parser.add_argument("--model", help="LeNet-300-100's state dict; trained here without one")
    parser.add_argument("--authors", help="the authors' Hessians, rankings and masks, for --model")
    parser.add_argument("--only", choices=PARTS, action="append", help="parts; default all")
    parser.add_argument("--method", choices=METHODS, action="append", help="rows; default all")
    parser.add_argument("--limit", type=int, help="training images; default all")
    parser.add_argument("--seed", type=int, default=0, help="default 0")
    options = parser.parse_args(arguments)
    parts: Any = options.only or PARTS
    methods: Any = options.method or METHODS
    training = load_data(options.data, limit=options.limit, normalise=NORMALISE)
    test = load_data(options.test, normalise=NORMALISE)
    dense = lenet_300_100(options.model, training, options.seed)
    if options.authors is not None and "authors" in parts:
        compare(TorchStream(dense, Data(training.x, None, training.name)), options.authors)
    if "curves" in parts:
        figures(dense, training, test, options.seed)
    if "table3" in parts:
        table(TABLE_3, methods, dense, training, test, len(training), flat=True)
    if "table4" in parts:
        network = lenet_5(training, options.seed)
        table(TABLE_4, methods, network, training, test, LENET_5_ROWS, flat=False)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
