"""Run by torchrun in test_gates_runs: gated networks trained by two processes, and recipes."""

import sys
from pathlib import Path

import torch
from gated_cases import small
from torch import nn

import retrain
from retrain.trainers.loop.distributed import processes

STEEP = {"name": "gates", "log_gamma": -250.0, "theta": 0.6, "theta_rate": 0.01}


def network(norm=False, linear_skips=False):
    body = small(4, width=10, classes=10, norm=norm, linear_skips=linear_skips)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 10), *body)


def recipe(epochs=8, estimator="first-order", **model):
    """Digits; the pressure is such that some blocks go and some stay, or with linear skips none."""
    return {
        "data": {"train": "digits", "test": "digits-test"},
        "model": {"factory": "gated_joint:network", **model},
        "training": {"epochs": epochs, "batch_size": 32, "seed": 1},
        "optimizer": {"name": "adam", "lr": 0.003},
        "method": {
            **STEEP,
            "estimator": estimator,
            "fine_tune_epochs": 2,
            "fine_tune_rate": 0.001,
        },
    }


RECIPES = {
    "first order": recipe(),
    "exact": recipe(5, "exact"),
    "batch norm": recipe(norm=True),
    "linear skips": recipe(linear_skips=True),
}


def main(folder):
    """Train every recipe; the processes are joined once, which several trainings want."""
    with processes(torch.device("cpu")):
        for name, tables in RECIPES.items():
            retrain.train(tables, out=Path(folder) / name)


if __name__ == "__main__":
    main(sys.argv[1])
