"""Run by torchrun in test_shrinknets_joint: networks that shrink, trained by two processes."""

import sys
from pathlib import Path

import torch
from torch import nn

import retrain
from retrain.trainers.loop.distributed import processes


def network():
    return nn.Sequential(
        *(nn.Conv2d(1, 12, 3), nn.BatchNorm2d(12), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten()),
        *(nn.Linear(108, 20), nn.ReLU(), nn.Linear(20, 10)),
    )


RECIPE = {
    "data": {"train": "digits", "test": "digits-test"},
    "model": {"factory": "shrinknets_joint:network"},
    "training": {"epochs": 5, "batch_size": 48, "seed": 1},
    "optimizer": {"name": "adam", "lr": 0.01},
    "method": {"name": "shrinknets", "strength": 0.05, "inertia": 0.95},
}


def main(folder):
    """Train in two processes, joined beforehand."""
    with processes(torch.device("cpu")):
        retrain.train(RECIPE, out=Path(folder))


if __name__ == "__main__":
    main(sys.argv[1])
