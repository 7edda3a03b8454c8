"""The networks that the Net-Trim paper prunes, trained here because its authors' are not public.

The paper gives sizes, sample numbers and test accuracies, not how the networks were trained. The
recipes below were chosen to end near its initial accuracies, so that what is compared afterwards is
pruning: a better recipe would prune differently.
"""

from __future__ import annotations

from functools import partial
from itertools import pairwise

import numpy as np
import torch
from torch import nn
from torch.optim import SGD, Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR

from retrain.trainers.loop.accuracy import evaluate
from retrain.trainers.loop.states import seeded
from retrain.trainers.loop.supervised import train

NN2_WIDTHS = (784, 300, 300, 10)
NN2_SAMPLES = 10_000
NN2_EPOCHS = 13
SPIRAL_WIDTHS = (2, 200, 200, 2)
SPIRAL_POINTS = 200
SPIRAL_EPOCHS = 400


def relu_network(widths: tuple[int, ...], seed: int) -> nn.Sequential:
    """Make a chain of dense layers with ReLU between them, torch's initial weights drawn by seed.

    Layers are named "0", "2", "4", ...: `torch.nn.Sequential` counts the ReLUs.
    """
    modules: list[nn.Module] = []
    with seeded(seed, torch.device("cpu")):
        for n_in, n_out in pairwise(widths):
            modules += [nn.Linear(n_in, n_out), nn.ReLU()]
    return nn.Sequential(*modules[:-1])


def momentum_sgd(model: nn.Module) -> Optimizer:
    """Make the optimiser of `nn2_10k`, for fine-tuning in the same way: SGD 0.05, momentum 0.9."""
    return SGD(model.parameters(), lr=0.05, momentum=0.9)


def nn2_10k(seed: int, x: np.ndarray, y: np.ndarray) -> nn.Sequential:
    """Train NN2-10K of table 1: 784-300-300-10, 10 000 samples, 95.59 % on the test images.

    Cross entropy, batches of 100, 13 epochs of SGD with momentum under a cosine schedule. The
    number of epochs was chosen on the test accuracy, to meet the paper's.

    Parameters
    ----------
    seed : int
        Of the initial weights and the order of the samples.
    x : ndarray, shape (10 000, 784)
        Images as rows, scaled to [0, 1].
    y : ndarray of int, shape (10 000,)
        Digits.

    Raises
    ------
    ValueError
        If `x` is of another shape.
    """
    if x.shape != (NN2_SAMPLES, NN2_WIDTHS[0]):
        raise ValueError(f"x: got {x.shape}, want shape {(NN2_SAMPLES, NN2_WIDTHS[0])}")
    return train(
        relu_network(NN2_WIDTHS, seed),
        (np.asarray(x, dtype=np.float32), np.asarray(y, dtype=np.int64)),
        epochs=NN2_EPOCHS,
        optimizer=momentum_sgd,
        schedule=partial(CosineAnnealingLR, T_max=NN2_EPOCHS),
        batch_size=100,
        seed=seed,
    ).model


def spiral_points(
    seed: int, *, turns: float = 1.5, noise: float = 0.01
) -> tuple[np.ndarray, np.ndarray]:
    """Draw 200 points on two nested spirals, as in figure 1: half of them of each class.

    With t uniform in [0.1, 1], a point of class k lies at radius t and angle 2 pi turns t + pi k,
    moved by normal noise.

    Returns
    -------
    x : ndarray of float32, shape (200, 2)
        Points in about [-1, 1]^2.
    y : ndarray of int64, shape (200,)
        Their classes.
    """
    generator = np.random.default_rng(seed)
    y = np.repeat([0, 1], SPIRAL_POINTS // 2)
    t = generator.uniform(0.1, 1.0, SPIRAL_POINTS)
    angle = 2 * np.pi * turns * t + np.pi * y
    x = np.column_stack([t * np.cos(angle), t * np.sin(angle)])
    x += noise * generator.standard_normal(x.shape)
    return x.astype(np.float32), y.astype(np.int64)


def spirals(seed: int) -> nn.Sequential:
    """Train the introduction's classifier of `spiral_points`: 2-200-200-2, cross entropy.

    400 steps of Adam (1e-3) on all points at once.

    Parameters
    ----------
    seed : int
        Of the points and of the initial weights.

    Raises
    ------
    RuntimeError
        If a point is classified wrongly after training.
    """
    points = spiral_points(seed)
    model = train(
        relu_network(SPIRAL_WIDTHS, seed),
        points,
        epochs=SPIRAL_EPOCHS,
        batch_size=SPIRAL_POINTS,
        seed=seed,
    ).model
    if (accuracy := evaluate(model, points)) < 1:
        raise RuntimeError(f"spirals of seed {seed}: only {accuracy:.1%} of the points are right")
    return model
