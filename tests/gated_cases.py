"""Small gated networks and data for the tests of the gates."""

import torch
from torch import nn
from torch.nn import functional

from retrain.trainers.gates.block import Gated, dense
from retrain.trainers.loop.states import seeded
from retrain.trainers.loop.training import Choice, Setting

CPU = torch.device("cpu")


def wbaw(width=6, hidden=8, *, skip=None, norm=False, activation=nn.Tanh):
    """W-(B)-a-W with a skip."""
    middle = [nn.BatchNorm1d(hidden)] if norm else []
    first = nn.Linear(width, hidden, bias=not norm)  # one before batch norm does nothing
    block = nn.Sequential(first, *middle, activation(), nn.Linear(hidden, width))
    return Gated(block, skip)


def small(blocks=3, *, width=6, classes=3, seed=0, norm=False, linear_skips=False):
    """(1): so many blocks and an output layer."""
    with seeded(seed, CPU):
        layers = [
            wbaw(width, norm=norm, skip=dense(width, width) if linear_skips else None)
            for _ in range(blocks)
        ]
        return nn.Sequential(*layers, nn.Linear(width, classes))


def setting(count=48, *, batch_size=16, epochs=3, seed=0, optimizer=None, schedule=None):
    chosen = optimizer or Choice("sgd", {"lr": 0.1}, torch.optim.SGD)
    return Setting(count, batch_size, epochs, seed, CPU, chosen, schedule, functional.cross_entropy)
