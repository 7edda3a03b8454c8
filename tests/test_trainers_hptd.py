"""Truncation: exactly as many weights as asked, the smallest, ties by position."""

import copy

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from retrain.trainers.hptd import truncate
from retrain.trainers.loop.masked import fine_tune

SIZES = {"0.weight": 12, "1.weight": 8}


def network(values):
    """Make 3-4-2 without ReLU, its weights filled with `values` in the model's order."""
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor(values[:12], dtype=torch.float32).view(4, 3))
        model[1].weight.copy_(torch.tensor(values[12:], dtype=torch.float32).view(2, 4))
    return model


def flat(model):
    return torch.cat([model[0].weight.flatten(), model[1].weight.flatten()]).tolist()


def smallest_zeroed(values, count):
    """Zero the first `count` in order of (magnitude, position), by hand."""
    order = sorted(range(len(values)), key=lambda i: (abs(values[i]), i))[:count]
    return [0.0 if i in order else float(value) for i, value in enumerate(values)]


entries = st.lists(st.integers(-3, 3), min_size=20, max_size=20)  # few values: many ties, zeros


@settings(deadline=None, max_examples=100)
@given(values=entries, count=st.integers(0, 20))
def test_global_count_against_brute_force(values, count):
    model = network(values)
    biases = [model[0].bias.clone(), model[1].bias.clone()]
    before = copy.deepcopy(model.state_dict())
    truncated = truncate(model, count)
    assert flat(truncated) == smallest_zeroed(values, count)
    assert flat(truncated).count(0.0) == max(count, values.count(0))
    assert torch.equal(truncated[0].bias, biases[0]) and torch.equal(truncated[1].bias, biases[1])
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


@settings(deadline=None, max_examples=50)
@given(values=entries, first=st.integers(0, 12), second=st.integers(0, 8))
def test_counts_by_layer_against_brute_force(values, first, second):
    wanted = smallest_zeroed(values[:12], first) + smallest_zeroed(values[12:], second)
    model = network(values)
    assert flat(truncate(model, {"1.weight": second, "0.weight": first})) == wanted
    only = truncate(model, {"1.weight": second})
    assert flat(only) == [float(v) for v in values[:12]] + wanted[12:]
    assert flat(truncate(model, second, names=["1.weight"])) == flat(only)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_count_is_exact_on_distinct_and_on_equal_weights(dtype):
    generator = torch.Generator().manual_seed(0)
    for values in (torch.rand(20, generator=generator) + 0.1, torch.ones(20)):
        model = network(values.tolist()).to(dtype)
        for count in range(21):
            zero = np.array(flat(truncate(model, count))) == 0
            assert zero.sum() == count
            if (values == 1).all():
                assert zero[:count].all()


def test_all_and_none():
    model = network(list(range(1, 21)))
    assert flat(truncate(model, 0)) == flat(model)
    assert not any(flat(truncate(model, 20)))
    assert truncate(model, 0) is not model


def test_truncated_weights_stay_away_through_training():
    model = network([(-1) ** k * (k + 1) / 10 for k in range(20)])
    truncated = truncate(model, 9)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(64, 3, generator=generator)
    tuned = fine_tune(truncated, (x, (x[:, 0] > 0).long()), epochs=5).model
    assert [v == 0 for v in flat(tuned)] == [v == 0 for v in flat(truncated)]
    assert flat(tuned) != flat(truncated)


@pytest.mark.parametrize(
    ("count", "names", "message"),
    [
        (21, None, "count: got 21, want 0 to 20 of the weights of 0.weight, 1.weight"),
        (-1, None, r"count: got -1, want 0 to 20 of the weights of 0\.weight, 1\.weight"),
        (9, ["1.weight"], "count: got 9, want 0 to 8 of the weights of 1.weight"),
        ({"1.weight": 9}, None, "count: got 9, want 0 to 8 of the weights of 1.weight"),
        ({"fc": 1}, None, "names: the model has no parameter 'fc'"),
        ({"1.weight": 1}, ["1.weight"], "a mapping as count names the parameters already"),
    ],
)
def test_wrong_counts_are_told(count, names, message):
    with pytest.raises(ValueError, match=message):
        truncate(network(list(range(20))), count, names=names)


def test_weights_that_are_not_finite_are_told():
    with pytest.raises(ValueError, match=r"weight '1\.weight' is not finite"):
        truncate(network([1.0] * 19 + [float("nan")]), 3)
