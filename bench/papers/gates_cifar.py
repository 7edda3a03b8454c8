"""Gates on CIFAR-10, reduced for two cores: a W-B-a-W ResNet20 beside its own dense baseline.

    python -m bench papers.gates_cifar --images cifar10_jpeg_bytes.npz --seeds 3 --out RUNS

The images are JPEG bytes (arrays jpeg_train, offsets_train, y_train, and so for test), lossy, so
that accuracies compare with the baseline here and not with the paper's. By the built-in recipes
gates-cifar10-small and gates-cifar10-small-dense; runs that were interrupted go on. On all 10 000
test images an accuracy is known to half a point, and so is a pair's difference; a training's luck
is as large: take several seeds.
"""

from __future__ import annotations

import argparse
import io
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
from PIL import Image

from bench.papers.gates import add_set
from retrain.runs.trained import TrainedRun
from retrain.runs.training import train
from retrain.trainers.loop.accuracy import evaluate

MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
RECIPES = {"dense": "gates-cifar10-small-dense", "gated": "gates-cifar10-small"}
PAPER = "ResNet56, all images: 94.26 dense; 93.66, fPR 38.73 (log gamma -250); 92.64, 62.89 (-800)"


def images(path: Path, part: str, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Decode the first `count` images of a part to (count, 3, 32, 32), normalised by channel."""
    with np.load(path) as file:
        data, offsets = file[f"jpeg_{part}"], file[f"offsets_{part}"]
        labels = file[f"y_{part}"][:count].astype(np.int64)
    pixels = [
        np.asarray(Image.open(io.BytesIO(data[start:stop].tobytes())).convert("RGB"))
        for start, stop in pairwise(offsets[: count + 1])
    ]
    x = np.stack(pixels).transpose(0, 3, 1, 2).astype(np.float32) / 255
    mean, std = (np.array(v, np.float32)[:, None, None] for v in (MEAN, STD))
    return (x - mean) / std, labels


@dataclass(frozen=True)
class Network:
    """A finished training, and its accuracy on all test images, in per cent."""

    run: TrainedRun
    accuracy: float


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the bench."""
    parser = argparse.ArgumentParser(prog="python -m bench papers.gates_cifar", description=__doc__)
    parser.add_argument("--images", type=Path, required=True, help="the npz of JPEG bytes")
    parser.add_argument("--out", type=Path, required=True, help="where the run directories go")
    parser.add_argument("--train", type=int, default=3200, help="images to train on")
    parser.add_argument("--test", type=int, default=10_000, help="images to test the finished on")
    parser.add_argument("--watch", type=int, default=2000, help="of those, to test on every epoch")
    parser.add_argument("--seeds", type=int, default=1, help="initialisations")
    add_set(parser, "the gated recipe")
    options = parser.parse_args(arguments)
    data = images(options.images, "train", options.train)
    test = images(options.images, "test", options.test)
    watched = (test[0][: options.watch], test[1][: options.watch])
    print(f"{options.train} images to train on, {options.test} to test on; the paper: {PAPER}\n")
    print(
        "| network | seed | accuracy % | blocks | pPR %  | fPR %  | load, dense : ours | s/epoch |"
    )
    print(
        "| ------- | ---- | ---------- | ------ | ------ | ------ | ------------------ | ------- |"
    )
    gaps = []
    for seed in range(options.seeds):
        pair = []
        for name, changes in (("dense", {}), ("gated", dict(options.set))):
            recipe = RECIPES[name]
            run = train(
                recipe,
                out=options.out / f"{recipe}-{options.train}-seed-{seed}",
                data=data,
                test=watched,
                changes={"training.seed": seed, **changes},
            )
            network = Network(run, 100 * evaluate(run.model, test))
            print(_row(name, seed, network), flush=True)
            pair.append(network)
        gaps.append(pair[1].accuracy - pair[0].accuracy)
    spread = f" ± {np.std(gaps, ddof=1):.2f}" if len(gaps) > 1 else ""
    print(f"\ngated less dense, mean of {len(gaps)}: {np.mean(gaps):+.2f}{spread} points")
    return 0


def _row(name: str, seed: int, network: Network) -> str:
    history = network.run.history
    last, seconds = history[-1], [line["seconds"] for line in history]
    first, final = np.median(seconds[:5]), np.median(seconds[-5:])
    return (
        f"| {name:7} | {seed:4} | {network.accuracy:10.2f} | {len(last['method']['kept']):6} "
        f"| {100 * last['parameters_pruned']:6.2f} | {100 * last['operations_pruned']:6.2f} "
        f"| {last['dense_load'] / last['load']:18.2f} | {first:.1f} {final:.1f} |"
    )


if __name__ == "__main__":
    raise SystemExit(main())
