"""The bench of ShrinkNets on made-up data: it resumes, picks the right fits, draws its pictures."""

import importlib
import json
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture
def bench(monkeypatch):
    # `bench` is not installed: it is importable from the repository's root alone.
    monkeypatch.syspath_prepend(ROOT)
    module = importlib.import_module("bench.papers.shrinknets")
    runs = importlib.import_module("bench.papers.shrinknets_runs")
    runs.task.cache_clear()
    monkeypatch.setattr(module, "GRADIENTS", {"oes97": 60, "gas-drift": 60})
    few = {key: values[::6] for key, values in module.STRENGTHS.items()}
    monkeypatch.setattr(module, "STRENGTHS", few)
    monkeypatch.setattr(module, "INERTIAS", (0.9, 0.99, None))
    brief = {name: {**entries, "epochs": 3} for name, entries in module.SETTINGS.items()}
    monkeypatch.setattr(module, "SETTINGS", brief)
    return module


@pytest.fixture
def folder(tmp_path):
    """Files as the data sets have them, a few rows each."""
    rng = np.random.default_rng(0)
    for name in ("regression", "gas-drift"):
        (tmp_path / name).mkdir()
    X = rng.standard_normal((60, 8))
    np.savez(tmp_path / "regression" / "oes97.npz", X=X, Y=X[:, :4] + 1)
    gas = (X[:, 0] > 0).astype(np.uint8) + 2 * (X[:, 1] > 0) + (X[:, 2] > 1)
    path = tmp_path / "gas-drift" / "gas_drift_batches_1-6_8_9.npz"
    np.savez(path, X=X.astype(np.float32), gas=gas)
    return tmp_path


def test_it_runs_draws_and_resumes_without_measuring(bench, folder, capsys, monkeypatch):
    arguments = ["--data", str(folder), "--out", str(folder / "out"), "--splits", "2"]
    arguments += ["--repetitions", "2", "--only", "figure-1", "figure-2"]
    assert bench.main(arguments) == 0
    first = capsys.readouterr().out
    assert "2 repetitions" in first and "2 random splits" in first
    for name in ("figure_1.png", "figure_2.png"):
        assert (folder / "out" / name).stat().st_size > 10_000
    rows = (folder / "out" / "rows.jsonl").read_text()
    for measured in ("trained_regression", "solved_regression"):
        monkeypatch.setattr(bench, measured, lambda *_: pytest.fail("measured again"))
    assert bench.main(arguments) == 0
    assert capsys.readouterr().out == first
    assert (folder / "out" / "rows.jsonl").read_text() == rows


def test_data_are_split_and_standardised(bench, folder):
    runs = importlib.import_module("bench.papers.shrinknets_runs")
    for name, targets in (("oes97", 4), ("gas-drift", 6)):
        data = runs.task(folder, name, 0)
        assert len(data.fitted.X) == 42 and len(data.held_out.X) == 18
        assert data.inputs == 8 and data.fitted.Y.shape == (42, targets)
        np.testing.assert_allclose(data.fitted.X[:, :8].mean(0), 0, atol=1e-6)
        np.testing.assert_allclose(data.fitted.X[:, :8].std(0), 1, atol=1e-6)
    assert (data.fitted.X[:, 8] == 1).all() and data.fitted.free == 1
    other = runs.task(folder, "gas-drift", 1)
    assert not np.array_equal(other.fitted.Y, data.fitted.Y)


def test_the_least_loss_among_fits_that_are_as_sparse(bench):
    def point(method, seed, sparsity, loss):
        return {"plan": {"method": method, "seed": seed}, "sparsity": sparsity, "loss": loss}

    points = [
        *(point("a", 0, 0.5, 0.3), point("a", 0, 0.7, 0.2), point("a", 0, 0.4, 0.1)),
        *(point("a", 1, 0.9, 0.6), point("b", 0, 0.9, 0.05)),
    ]
    assert bench.at_sparsity(points, "a", 0.5, "loss") == [0.2, 0.6]
    assert bench.at_sparsity(points, "a", 0.4, "loss") == [0.1, 0.6]
    assert bench.at_sparsity(points, "a", 0.8, "loss") == [0.6]
    assert bench.at_sparsity(points, "c", 0.1, "loss") == []


def test_a_torn_line_is_measured_anew(bench, tmp_path):
    runs = importlib.import_module("bench.papers.shrinknets_runs")
    path = tmp_path / "rows.jsonl"
    rows = runs.Rows(path)
    assert rows.get({"x": 1}, lambda plan: {"y": plan["x"] + 1})["y"] == 2
    with path.open("a") as file:
        file.write('{"plan": {"x": 2}, "y"')
    rows = runs.Rows(path)
    assert rows.get({"x": 1}, lambda plan: pytest.fail("known"))["y"] == 2
    assert rows.get({"x": 2}, lambda plan: {"y": 5})["y"] == 5
    again = runs.Rows(path)
    assert len(again.known) == 2
    assert json.loads(path.read_text().splitlines()[-1])["y"] == 5
