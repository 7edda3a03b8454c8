"""Small networks and samples that many tests use, the same numbers for the same seed."""

from itertools import pairwise

import numpy as np
import torch
from torch import nn

from retrain.stream.chain import Chain
from retrain.trainers.loop.states import seeded

CPU = torch.device("cpu")


def dense(*widths, seed=0, dropout=0.0, norm=False, dtype=torch.float32):
    """Return a ReLU network of dense layers, as torch initialises them from the seed.

    Batch normalisation and dropout, where wanted, follow each layer but the last.
    """
    modules = []
    with seeded(seed, CPU):
        for n_in, n_out in pairwise(widths):
            modules += [nn.Linear(n_in, n_out)]
            modules += [nn.BatchNorm1d(n_out)] if norm else []
            modules += [nn.ReLU()] + ([nn.Dropout(dropout)] if dropout else [])
    last = max(i for i, module in enumerate(modules) if isinstance(module, nn.Linear))
    return nn.Sequential(*modules[: last + 1]).to(dtype)


def weights(model):
    """Copy all parameters."""
    return [parameter.detach().clone() for parameter in model.parameters()]


def same(a, b):
    """Tell whether two lists of tensors are equal to the last bit."""
    return len(a) == len(b) and all(torch.equal(p, q) for p, q in zip(a, b, strict=True))


def samples(count=50, shape=(6,), classes=3, seed=0, dtype=torch.float32):
    """Return normal inputs and random labels, as tensors."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, *shape, generator=generator).to(dtype)
    return x, torch.randint(classes, (count,), generator=generator)


def rows(count, *shape, seed=0):
    """Return normal inputs in float32, as an array."""
    return np.random.default_rng(seed).normal(size=(count, *shape)).astype(np.float32)


def random_chain(*widths, seed=0, samples=0, bias=True, follows=(), dtype=np.float64):
    """Return a network of weight matrices, and samples drawn after them.

    `seed` may be a generator, to go on drawing from.
    """
    rng = np.random.default_rng(seed)
    matrices = tuple(
        (rng.standard_normal((a + bias, b)) / np.sqrt(a)).astype(dtype) for a, b in pairwise(widths)
    )
    inputs = rng.standard_normal((samples, widths[0])).astype(dtype)
    return Chain(matrices, (bias,) * len(matrices), follows), inputs
