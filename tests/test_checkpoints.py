"""Checkpoints hold everything, refuse what does not fit, and never take part of it."""

import copy
import re

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim import SGD, Adam
from torch.optim.lr_scheduler import StepLR

from retrain.trainers.loop.checkpoints import (
    Checkpoint,
    read_checkpoint,
    restore,
    states_of,
    write_checkpoint,
)
from retrain.trainers.loop.training import GeneratorState, Training


class Average:
    """A part with a state."""

    def __init__(self):
        self.value = torch.zeros(2)

    def state_dict(self):
        return {"value": self.value}

    def load_state_dict(self, state):
        self.value = state["value"]


def training(width=4, *, optimizer=Adam, schedule=True, parts=("average",)):
    torch.manual_seed(width)
    model = nn.Sequential(nn.Linear(3, width), nn.BatchNorm1d(width), nn.Linear(width, 2))
    made = optimizer(model.parameters(), lr=0.1)
    return Training(
        model,
        made,
        StepLR(made, 1, 0.5) if schedule else None,
        parts={name: Average() for name in parts},
    )


def step(under_way, seed):
    x = torch.randn(8, 3, generator=torch.Generator().manual_seed(seed))
    under_way.optimizer.zero_grad()
    under_way.model(x).square().sum().backward()
    under_way.optimizer.step()
    under_way.schedule.step()
    for part in under_way.parts.values():
        part.value = part.value + 1


def flat(value):
    """Tensors and numbers of nested states, in order."""
    if isinstance(value, dict):
        return [entry for key in value for entry in flat(value[key])]
    if isinstance(value, list | tuple):
        return [entry for item in value for entry in flat(item)]
    return [value]


def same(one, two):
    return all(
        torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b
        for a, b in zip(flat(one), flat(two), strict=True)
    )


def test_what_is_written_is_read_and_goes_on_the_same(tmp_path):
    first, sampler = training(), GeneratorState(torch.Generator().manual_seed(3))
    for seed in range(3):
        step(first, seed)
    torch.rand(5, generator=sampler.generator)
    states = copy.deepcopy(states_of(first, {"sampler": sampler}))
    path = tmp_path / "checkpoint.pt"
    write_checkpoint(path, Checkpoint(3, 24, False, {"blocks": [1, 2], "x": None}, states))
    found = read_checkpoint(path)
    assert (found.epochs, found.steps, found.ended) == (3, 24, False)
    assert found.description == {"blocks": [1, 2], "x": None}
    second, other = training(), GeneratorState(torch.Generator())
    restore(second, {"sampler": other}, found.states)
    assert same(states_of(second, {"sampler": other}), states)
    for under_way in (first, second):
        step(under_way, 9)
    assert same(states_of(first, {}), states_of(second, {}))
    assert torch.equal(
        torch.rand(4, generator=sampler.generator), torch.rand(4, generator=other.generator)
    )


def test_there_is_none(tmp_path):
    assert read_checkpoint(tmp_path / "checkpoint.pt") is None


OTHERS = [
    (training(5), r"'0.weight': got torch.float32 of shape \(4, 3\), want .*\(5, 3\)"),
    (training(schedule=False), r"schedule: one has a schedule"),
    (training(parts=()), r"parts: want none; it has average"),
    (training(parts=("average", "b")), r"parts: want average, b; it has average"),
]


@pytest.mark.parametrize(("other", "message"), OTHERS)
def test_what_does_not_fit_is_refused_and_changes_nothing(other, message):
    given = training()
    step(given, 0)
    before = copy.deepcopy(states_of(other, {}))
    with pytest.raises(ValueError, match=message):
        restore(other, {}, states_of(given, {}))
    assert same(states_of(other, {}), before)


def test_other_tensors_and_other_moments_are_refused():
    given = training()
    step(given, 0)
    states = states_of(given, {})
    del states["model"]["0.bias"]
    states["model"]["extra"] = torch.zeros(1)
    with pytest.raises(ValueError, match=r"it lacks '0.bias' and has 'extra' besides"):
        restore(training(), {}, states)
    states = states_of(given, {})
    states["optimizer"]["state"][0]["exp_avg"] = torch.zeros(7)
    with pytest.raises(ValueError, match=r"exp_avg of parameter 0 has shape \(7,\), the parameter"):
        restore(training(), {}, states)
    states = states_of(given, {})
    states["optimizer"]["state"][0]["exp_avg"] = torch.zeros(2, 4, 3)  # one for each objective
    restore(training(), {}, states)
    states["optimizer"]["param_groups"][0]["params"].pop()
    with pytest.raises(ValueError, match=r"groups of \[5\] parameters, want \[6\]"):
        restore(training(), {}, states)
    with pytest.raises(ValueError, match=r"does not fit \(KeyError: 'optimizer'\)"):
        restore(training(), {}, {"model": given.model.state_dict()})


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (np.float64(1), r"states.x is a float64; want tensors"),
        ([1, {2, object()}], r"states.x.1.\d is a object"),
        ({(1, 2): 3}, r"states.x: a key is a tuple"),
        (SGD, r"states.x is a type"),
    ],
)
def test_what_would_not_be_read_back_is_not_written(tmp_path, value, message):
    path = tmp_path / "checkpoint.pt"
    write_checkpoint(path, Checkpoint(1, 1, False, {}, {}))
    kept = path.read_bytes()
    with pytest.raises(ValueError, match=message):
        write_checkpoint(path, Checkpoint(2, 2, False, {}, {"x": value}))
    assert path.read_bytes() == kept


class Evil:
    def __reduce__(self):
        return (print, ("code that ran",))


@pytest.mark.parametrize(
    "content",
    [
        {"format": 2, "epochs": 1},
        {"format": 1, "epochs": 1},
        {"format": 1, "epochs": -1, "steps": 0, "ended": False, "description": {}, "states": {}},
        [1, 2],
        {"format": 1, "epochs": Evil()},
    ],
)
def test_a_file_of_another_kind_is_refused_and_runs_nothing(tmp_path, content, capsys):
    path = tmp_path / "checkpoint.pt"
    torch.save(content, path)
    with pytest.raises(ValueError, match=re.escape(f"{path} is damaged (")):
        read_checkpoint(path)
    assert capsys.readouterr().out == ""


def test_every_byte_that_is_altered_is_noticed_or_harmless(tmp_path):
    """Flip each of a sample of bytes: refused, or read back the same (padding, names' case)."""
    under_way = training()
    step(under_way, 0)
    path = tmp_path / "checkpoint.pt"
    wanted = Checkpoint(1, 8, False, {"a": 1}, copy.deepcopy(states_of(under_way, {})))
    write_checkpoint(path, wanted)
    whole = path.read_bytes()
    refused = 0
    for place in range(0, len(whole), 97):
        altered = bytearray(whole)
        altered[place] ^= 0x55
        path.write_bytes(altered)
        try:
            found = read_checkpoint(path)
        except ValueError as error:
            assert "is damaged" in str(error)
            refused += 1
        else:
            assert same(found.states, wanted.states)
            assert found.description == wanted.description
    assert refused > 50
