"""A small saved network and its data, for tests of commands and run directories."""

from itertools import pairwise

import numpy as np
import torch
from safetensors.torch import save_file
from torch import nn

WIDTHS = (16, 12, 8, 6)


def network(widths=WIDTHS, seed=0):
    """Return a ReLU network with seeded weights."""
    generator = torch.Generator().manual_seed(seed)
    layers = []
    for width, following in pairwise(widths):
        linear = nn.Linear(width, following)
        with torch.no_grad():
            for tensor in linear.parameters():
                tensor.copy_(torch.randn(tensor.shape, generator=generator) / width**0.5)
        layers += [linear, nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def samples(rows=60, width=WIDTHS[0], classes=WIDTHS[-1], seed=0):
    """Return inputs and labels."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(rows, width)).astype(np.float32)
    return x, rng.integers(0, classes, rows)


def save_case(folder, widths=WIDTHS, rows=60):
    """Save net.safetensors, net.pth, data.npz and test.npz."""
    state = network(widths).state_dict()
    save_file(state, folder / "net.safetensors")
    torch.save(state, folder / "net.pth")
    for name, seed in (("data", 0), ("test", 1)):
        x, y = samples(rows, widths[0], widths[-1], seed)
        np.savez(folder / f"{name}.npz", x=x, y=y)
