"""What a network costs, against counts by hand and (43) of the layer-gates paper."""

import pytest
import torch
from torch import nn

from retrain.adapters.files.blocks import Sum
from retrain.trainers.loop.account import Account, Cost, cost
from retrain.trainers.loop.callbacks import Step


def load_43(layers):
    """(43) with nu = 1: dense (n_in, n_out), or convolution (n_in, n_out, d_F, d_W, d_H)."""
    return sum(
        n_in * n_out * (rest[0] ** 2 * rest[1] * rest[2] if rest else 1)
        for n_in, n_out, *rest in layers
    )


def residual(depth, width=20):
    blocks = [Sum(nn.Sequential(nn.Linear(width, width), nn.ReLU()), nn.Identity())
              for _ in range(depth)]  # fmt: skip
    return nn.Sequential(nn.Flatten(), nn.Linear(49, width), *blocks, nn.Linear(width, 10))


def test_dense_layers_by_hand():
    found = cost(residual(2), torch.zeros(1, 1, 7, 7))
    assert found.parameters == 49 * 20 + 20 + 2 * (400 + 20) + 200 + 10
    assert found.forward == 2 * load_43([(49, 20), (20, 20), (20, 20), (20, 10)])
    # Backward: as much for the weights, and for all inputs but the first.
    assert found.training == 3 * found.forward - 2 * 49 * 20


def test_convolutions_by_hand():
    model = nn.Sequential(
        nn.Conv2d(3, 6, 5),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.Conv2d(6, 8, 3, stride=2, padding=1),
        nn.Flatten(),
        nn.Linear(8 * 25, 10),
    )
    found = cost(model, torch.zeros(1, 3, 14, 14))
    assert found.forward == 2 * load_43([(3, 6, 5, 10, 10), (6, 8, 3, 5, 5), (200, 10)])
    assert found.parameters == 3 * 6 * 25 + 6 + 12 + 6 * 8 * 9 + 8 + 2000 + 10


def test_counting_leaves_no_trace():
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout(0.5))
    model.train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state = torch.get_rng_state()
    cost(model, torch.ones(1, 4))
    assert model.training
    assert model[1].training
    assert all(parameter.grad is None for parameter in model.parameters())
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_a_model_without_anything_to_train():
    model = residual(1)
    model.requires_grad_(False)
    found = cost(model, torch.zeros(1, 49))
    assert found.training == found.forward > 0


def test_load_adds_up_and_falls_when_a_block_leaves():
    model, sample = residual(3), torch.zeros(1, 49)
    dense = cost(model, sample)
    counted = []

    def measure(network, one):
        counted.append(network)
        return cost(network, one)

    account = Account(dense, sample, measure)
    step = Step(model, None, 0, 0, sample, sample, samples=64)
    account.step(step)
    account.step(step)
    assert (account.load, account.dense_load) == (128 * dense.training, 128 * dense.training)
    assert account.figures(model)["parameters_pruned"] == 0
    model.pop(2)
    account.step(step)
    assert len(counted) == 2, "the network was counted at every step"
    smaller = cost(residual(2), sample)
    assert account.load == 128 * dense.training + 64 * smaller.training
    assert account.dense_load == 192 * dense.training
    figures = account.figures(model)
    assert figures["parameters_pruned"] == pytest.approx(420 / dense.parameters)  # pPR
    assert figures["operations_pruned"] == pytest.approx(800 / dense.forward)  # fPR
    again = Account(dense, sample)
    again.load_state_dict(account.state_dict())
    assert again.figures(model) == figures


def test_nothing_of_nothing_is_pruned():
    account = Account(Cost(0, 0, 0), torch.zeros(1, 2), lambda model, sample: Cost(0, 0, 0))
    assert account.figures(nn.Identity())["parameters_pruned"] == 0
