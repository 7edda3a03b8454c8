"""Objectives as values, the paper's schedules, and the networks of table 1."""

import copy
from itertools import pairwise

import pytest
import torch
from networks import dense
from torch import nn

from retrain.trainers.itp.architectures import lenet_5, vgg_like
from retrain.trainers.itp.objectives import (
    Complexity,
    convex_weight,
    dense_weights,
    gradients,
    other_weights,
    trade_off_of,
    weighted_sum,
)
from retrain.trainers.itp.schedules import sigmoid_drop, time_decay
from retrain.trainers.loop.training import Choice, Setting

NAMES = ("0.weight", "2.weight")


def network(seed=0):
    return dense(3, 4, 2, seed=seed, dtype=torch.float64)


def with_zeros(model):
    with torch.no_grad():
        model[0].weight[0] = 0
    return model


@pytest.mark.parametrize("power", [0.5, 1.0, 1.5, 2.0, 3.0])
def test_complexity_is_the_sum_of_powers_and_flat_at_zero(power):
    model = with_zeros(network())
    omega = Complexity(NAMES, power)
    flat = torch.cat([model.get_parameter(name).flatten() for name in NAMES]).detach()
    wanted = (flat.abs() ** power).sum() / (2 if power == 2 else 1)
    torch.testing.assert_close(omega(model), wanted)
    first, bias, *_ = gradients(omega, model, model.parameters())
    assert bias is None
    assert torch.equal(first[0], torch.zeros(3, dtype=torch.float64))
    w = model[0].weight.detach()[1:]
    slope = w if power == 2 else power * w.abs() ** (power - 1) * w.sign()
    torch.testing.assert_close(first[1:], slope)


def test_weighted_sums_leave_out_what_has_no_weight():
    model = network()
    first, second = Complexity(NAMES[:1]), Complexity(NAMES[1:], 2.0)
    total = weighted_sum([(0.5, first), (0.0, lambda model: 1 / 0), (3.0, second)])
    torch.testing.assert_close(total(model), 0.5 * first(model) + 3 * second(model))
    assert weighted_sum([(0.0, first)]) is None and weighted_sum([]) is None


def test_objectives_without_weights_are_zero_and_have_no_gradient():
    model = network()
    assert Complexity(())(model).item() == 0
    assert gradients(Complexity(()), model, model.parameters()) == [None] * 4


@pytest.mark.parametrize("trade_off", [0.0, 3e-4, 0.5, 7.0])
def test_weights_of_7_and_trade_offs_of_2_are_inverse(trade_off):
    weight = convex_weight(trade_off)
    assert trade_off_of(weight) == pytest.approx(trade_off, rel=1e-12)
    assert weight / (1 - weight) == pytest.approx(trade_off, rel=1e-12)


def test_layers_are_chosen_by_name_and_the_others_told():
    model = lenet_5()
    dense = dense_weights(model)
    assert dense == ("layer1.weight", "layer2.weight", "layer3.weight")
    assert dense_weights(model, ("layer[13]",)) == ("layer1.weight", "layer3.weight")
    assert other_weights(model, dense) == ("conv1.weight", "conv2.weight")
    assert other_weights(model, dense[:1])[2:] == ("layer2.weight", "layer3.weight")
    assert dense_weights(nn.Linear(2, 2)) == ("weight",)
    with pytest.raises(ValueError, match="'fc' matches no dense layer; the model has layer1"):
        dense_weights(model, ("fc",))
    with pytest.raises(ValueError, match="'\\*' matches no dense layer; the model has none"):
        dense_weights(nn.ReLU())


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Complexity((), 0.0), r"power: got 0\.0, want a positive finite number"),
        (lambda: convex_weight(-1), "trade_off: got -1, want a finite number >= 0"),
        (lambda: trade_off_of(1.0), "weight: got 1.0, want at least 0 and below 1"),
    ],
)
def test_wrong_arguments_are_told(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def counts(model):
    return {
        name: sum(p.numel() for p in module.parameters())
        for name, module in model.named_children()
        if any(True for _ in module.parameters())
    }


def test_lenet_5_is_that_of_table_1():
    model = lenet_5()
    wanted = {"conv1": 60, "conv2": 880, "layer1": 48120, "layer2": 10164, "layer3": 850}
    assert counts(model) == wanted
    assert sum(wanted.values()) == 60_074
    shapes, x = {}, torch.zeros(2, 1, 28, 28)
    for name, module in model.named_children():
        x = module(x)
        shapes[name] = tuple(x.shape[1:])
    assert shapes["conv1"] == (6, 26, 26) and shapes["pool1"] == (6, 13, 13)
    assert shapes["conv2"] == (16, 11, 11) and shapes["pool2"] == (16, 5, 5)
    assert shapes["flatten"] == (400,) and shapes["layer3"] == (10,)


def test_vgg_like_is_that_of_table_1():
    model = vgg_like()
    found = counts(model)
    assert [found[f"conv{i}"] for i in range(1, 7)] == [896, 9248, 18496, 36928, 73856, 147584]
    assert found["denselayer"] == 20_490
    assert sum(found.values()) == 308_394
    moving = sum(b.numel() for n, b in model.named_buffers() if "running" in n)
    assert moving == 896 and moving + 308_394 == 309_290
    shapes, x = {}, torch.zeros(2, 3, 32, 32)
    for name, module in model.named_children():
        x = module(x)
        shapes[name] = tuple(x.shape[1:])
    assert shapes["conv2"] == (32, 32, 32) and shapes["conv4"] == (64, 16, 16)
    assert shapes["conv6"] == (128, 8, 8) and shapes["flatten"] == (2048,)
    with pytest.raises(ValueError, match=r"dropout: got \(0\.1,\), want three shares"):
        vgg_like(dropout=(0.1,))


def test_initial_weights_are_keras():
    torch.manual_seed(0)
    model = lenet_5()
    limit = (6 / (400 + 120)) ** 0.5
    assert 0.99 * limit < model.layer1.weight.abs().max() <= limit
    assert all(not module.bias.any() for module in model if hasattr(module, "bias"))
    again = copy.deepcopy(model.state_dict())
    torch.manual_seed(0)
    assert all(torch.equal(again[k], v) for k, v in lenet_5().state_dict().items())


def optimizer_at(rate):
    return torch.optim.SGD([nn.Parameter(torch.zeros(1))], rate)


def rates(optimizer, schedule, count):
    found = []
    for _ in range(count):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return found


def test_time_decay_is_equation_9():
    optimizer = optimizer_at(0.5)
    found = rates(optimizer, time_decay(optimizer, 0.01), 20)
    assert found == pytest.approx([0.5 / (1 + 0.01 * k) for k in range(20)], rel=1e-12)
    with pytest.raises(ValueError, match="decay: got -1, want a finite number >= 0"):
        time_decay(optimizer, -1)


def setting(epochs):
    adam = Choice("adam", {}, torch.optim.Adam)
    return Setting(10, 5, epochs, 0, torch.device("cpu"), adam)


def test_the_papers_schedule_drops_after_three_quarters():
    optimizer = optimizer_at(0.001)
    found = rates(optimizer, sigmoid_drop(optimizer, setting(125), end=0.1), 125)
    assert found[0] == pytest.approx(0.001, rel=1e-3)
    assert found[-1] == pytest.approx(0.0001 + 0.0009 / (1 + 2.718281828 ** (10 / 3)), rel=1e-6)
    assert all(a > b for a, b in pairwise(found))
    middle = 0.75 * 125  # at 93.75 epochs: half way down
    assert found[92] > 0.00055 > found[93] and middle == 93.75
    with pytest.raises(ValueError, match="end: got 0, want above 0 and at most 1"):
        sigmoid_drop(optimizer, setting(3), end=0)
