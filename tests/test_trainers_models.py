"""The networks of the papers' experiments come out as the papers describe them."""

import importlib
from pathlib import Path

import numpy as np
import pytest
import torch
from shared_data import MNIST, SHARED

from retrain.data.sources import load_data
from retrain.trainers.loop.accuracy import evaluate

ROOT = Path(__file__).parents[1]
FOLDER = SHARED / "data" / "mnist"


@pytest.fixture
def models(monkeypatch):
    # `bench` is not installed: it is importable from the repository's root alone.
    monkeypatch.syspath_prepend(ROOT)
    return importlib.import_module("bench.papers.models")


def test_spirals_are_nested_and_learned(models):
    for seed in range(3):
        x, y = models.spiral_points(seed)
        assert x.shape == (200, 2) and x.dtype == np.float32
        assert np.bincount(y).tolist() == [100, 100]
        model = models.spirals(seed)
        assert [tuple(p.shape) for p in model.parameters()][::2] == [(200, 2), (200, 200), (2, 200)]
        assert evaluate(model, (x, y)) == 1
        # No line separates nested spirals: the best linear fit is far from right.
        linear = (
            np.column_stack([x, np.ones(200)])
            @ np.linalg.lstsq(np.column_stack([x, np.ones(200)]), 2.0 * y - 1, rcond=None)[0]
        )
        assert np.mean((linear > 0) == y) < 0.8
    assert not np.array_equal(models.spiral_points(0)[0], models.spiral_points(1)[0])


def test_networks_differ_by_seed_alone(models):
    def first(seed):
        return models.relu_network((4, 3, 2), seed)[0].weight

    torch.manual_seed(0)
    once = first(1)
    torch.manual_seed(1)
    assert torch.equal(once, first(1)) and not torch.equal(once, first(2))


def test_other_data_than_the_papers_are_refused(models):
    with pytest.raises(ValueError, match=r"x: got \(9, 784\), want shape \(10000, 784\)"):
        models.nn2_10k(0, np.zeros((9, 784)), np.zeros(9, int))


@pytest.mark.shared_data(*MNIST)
def test_nn2_10k_starts_where_the_paper_does(models):
    data = load_data(f"mnist:{FOLDER}", limit=10_000)
    held_out = load_data(f"mnist-test:{FOLDER}")
    assert data.y is not None and held_out.y is not None
    accuracy = evaluate(models.nn2_10k(0, data.flat, data.y), (held_out.flat, held_out.y))
    assert accuracy == pytest.approx(0.9559, abs=0.004)  # one seed, other thread counts
