"""Two processes that cut neurons while they train: both cut the same, and as one would."""

from pathlib import Path

import pytest
import shrinknets_joint
import torch
from torchrun import torchrun

import retrain

HERE = Path(__file__).parent


def test_two_processes_train_as_one(tmp_path):
    torchrun(HERE / "shrinknets_joint.py", tmp_path / "joint", folder=HERE, seconds=200)
    alone = retrain.train(shrinknets_joint.RECIPE)
    together = retrain.load(tmp_path / "joint")
    # Sums in another order: the last bits differ, and what comes of them grows.
    assert together.history[0]["loss"] == pytest.approx(alone.history[0]["loss"], rel=1e-4)
    sizes = [
        [sum(line["method"]["neurons"].values()) for line in run.history]
        for run in (alone, together)
    ]
    assert sizes[0][-1] < 32 and sizes[1][-1] < 32
    assert all(abs(a - b) <= 2 for a, b in zip(*sizes, strict=True))
    assert together.test_accuracy == pytest.approx(alone.test_accuracy, abs=0.03)
    assert together.model(torch.rand(2, 1, 8, 8)).isfinite().all()
