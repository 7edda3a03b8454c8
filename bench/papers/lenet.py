"""The L-OBS paper's networks: LeNet-300-100, read or trained, and LeNet-5, trained here.

The paper says that they were trained well, without dropout or regularisation, and not how.
"""

from __future__ import annotations

from collections import OrderedDict
from functools import partial
from pathlib import Path

import torch
from torch import nn
from torch.optim.lr_scheduler import CosineAnnealingLR

from bench.papers.models import relu_network
from retrain.adapters.files.load import load_model
from retrain.data.arrays import Data
from retrain.trainers.loop.batches import TrainingData
from retrain.trainers.loop.states import seeded
from retrain.trainers.loop.supervised import train

LENET_300_100 = (784, 300, 100, 10)
DENSE_EPOCHS = 10
CONVOLUTIONAL_EPOCHS = 4


def pairs(data: Data, *, flat: bool) -> TrainingData:
    """Inputs and labels as the trainers take them."""
    assert data.y is not None
    return (data.flat if flat else data.x), data.y


def lenet_300_100(path: str | Path | None, training: Data, seed: int) -> nn.Module:
    """Read LeNet-300-100 from a state dict, or train one: Adam, 10 epochs, cosine schedule."""
    if path is not None:
        return load_model(path).module
    chain = relu_network(LENET_300_100, seed)
    names = ("fc1", "relu1", "fc2", "relu2", "fc3")
    network = nn.Sequential(OrderedDict(zip(names, chain, strict=True)))
    data = pairs(training, flat=True)
    return _trained(network, data, DENSE_EPOCHS, seed)


def lenet_5(training: Data, seed: int) -> nn.Module:
    """Train LeNet-5 (20 and 50 filters of 5 x 5, 500 units; 430 500 weights): 4 such epochs."""
    with seeded(seed, torch.device("cpu")):
        network = nn.Sequential(
            OrderedDict(
                conv1=nn.Conv2d(1, 20, 5),
                relu1=nn.ReLU(),
                pool1=nn.MaxPool2d(2),
                conv2=nn.Conv2d(20, 50, 5),
                relu2=nn.ReLU(),
                pool2=nn.MaxPool2d(2),
                flatten=nn.Flatten(),
                fc1=nn.Linear(800, 500),
                relu3=nn.ReLU(),
                fc2=nn.Linear(500, 10),
            )
        )
    data = pairs(training, flat=False)
    return _trained(network, data, CONVOLUTIONAL_EPOCHS, seed)


def _trained(network: nn.Module, data: TrainingData, epochs: int, seed: int) -> nn.Module:
    schedule = partial(CosineAnnealingLR, T_max=epochs)
    trained = train(network, data, epochs=epochs, schedule=schedule, batch_size=128, seed=seed)
    return trained.model
