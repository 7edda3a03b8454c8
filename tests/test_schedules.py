"""Learning rates, epoch by epoch, and the dense architecture."""

import math

import pytest
import torch
from torch import nn
from torch.optim import SGD

from retrain.trainers.loop.training import Choice, Setting
from retrain.trainers.recipes import schedules
from retrain.trainers.recipes.architectures import dense
from retrain.trainers.recipes.recipe import OPTIMIZERS, SCHEDULES, imported

RATE = 0.8


def rates(name, **options):
    """The learning rate of each epoch."""
    optimizers = Choice("sgd", {"lr": RATE}, imported(OPTIMIZERS["sgd"]))
    chosen = Choice(name, options, imported(SCHEDULES[name]))
    setting = Setting(100, 32, 6, 0, torch.device("cpu"), optimizers, chosen)
    optimizer = setting.make_optimizer([nn.Parameter(torch.zeros(2))])
    schedule = setting.make_schedule(optimizer)
    found = []
    for _ in range(6):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return found


def test_the_rates_by_hand():
    wanted = {
        "cosine": [RATE * (1 + math.cos(math.pi * k / 6)) / 2 for k in range(6)],
        "step": [RATE * 0.5 ** (k // 2) for k in range(6)],
        "multistep": [RATE * 0.1 ** ((k >= 2) + (k >= 3)) for k in range(6)],
        "exponential": [RATE * 0.9**k for k in range(6)],
        "inverse": [RATE / (1 + 0.5 * k) ** 0.6 for k in range(6)],
    }
    options = {
        "cosine": {},
        "step": {"every": 2, "factor": 0.5},
        "multistep": {"epochs": [2, 3], "factor": 0.1},
        "exponential": {"factor": 0.9},
        "inverse": {"decay": 0.5, "power": 0.6},
    }
    for name, values in wanted.items():
        assert rates(name, **options[name]) == pytest.approx(values), name
    assert min(rates("cosine", epochs=3, minimum=0.2)) == pytest.approx(0.2)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("cosine", {"epochs": 0}, "epochs: got 0, want a whole number >= 1"),
        ("step", {"every": 0, "factor": 1.0}, "every: got 0, want a whole number >= 1"),
        ("inverse", {"decay": -1.0}, r"decay: got -1\.0, want a finite number >= 0"),
    ],
)
def test_refusals(name, options, message):
    with pytest.raises(ValueError, match=message):
        rates(name, **options)


def test_no_schedule():
    setting = Setting(1, 1, 1, 0, torch.device("cpu"), Choice("sgd", {}, SGD))
    assert setting.make_schedule(SGD([nn.Parameter(torch.zeros(1))])) is None
    assert Setting(65, 32, 1, 0, torch.device("cpu"), setting.optimizer).steps_per_epoch == 3
    assert set(SCHEDULES) >= {"cosine", "step", "multistep", "exponential", "inverse"}
    assert schedules.cosine is imported(SCHEDULES["cosine"])


def test_the_dense_architecture():
    kinds = [type(module).__name__ for module in dense(widths=[4, 3, 2], dropout=0.1)]
    assert kinds == ["Flatten", "Linear", "ReLU", "Dropout", "Linear"]
    assert dense(widths=(4, 2))(torch.zeros(5, 2, 2)).shape == (5, 2)
    for widths in ([4], [4, 0], [4, 2.0], [4, True]):
        with pytest.raises(
            ValueError, match=r"widths: got .*, want two or more whole numbers above 0"
        ):
            dense(widths=widths)
