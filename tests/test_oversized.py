"""A layer that does not fit into memory is left with its reason, and the others are pruned."""

import json

import numpy as np
import pytest
import torch
from command import command
from networks import dense

import retrain

GIB = 2**30


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    folder = tmp_path_factory.mktemp("oversized")
    model = dense(12, 300, 8, 4)
    rng = np.random.default_rng(0)
    x = rng.normal(size=(100, 12)).astype(np.float32)
    torch.save(model.state_dict(), folder / "net.pth")
    np.savez(folder / "data.npz", x=x, y=rng.integers(0, 4, 100))
    return folder, model, x


MEMORY = 2e6  # bytes: of 300 inputs not enough, of 12 and 8 plenty


def solved(report, total):
    raise AssertionError("a layer was solved")


@pytest.mark.parametrize("stages", [1, 2])
def test_the_layer_is_left_and_the_others_are_pruned(case, stages, tmp_path):
    _, model, x = case
    run = retrain.lobs(model, x, sparsity=0.5, memory=MEMORY, stages=stages, out=tmp_path)
    assert [report.name for report in run.layers] == ["0", "4"]
    assert all(report.sparsity == 0.5 for report in run.layers)  # a share of its own each
    (left,) = run.record["left"]
    assert left["name"] == "2"
    assert "memory: layer '2' with 300 inputs takes about" in left["reason"]
    assert "--memory" in left["reason"] and "--skip 2" in left["reason"]
    assert torch.equal(run.model[2].weight, model[2].weight)
    assert json.loads((tmp_path / "run.json").read_text())["left"] == [left]


def test_by_name_or_with_all_of_them_it_is_refused_before_the_first_solve(case, tmp_path):
    _, model, x = case
    common = {"out": tmp_path / "out", "on_layer": solved}
    for options in (
        {"sparsity": 0.5, "memory": 1.0},
        {"sparsity": 0.5, "memory": MEMORY, "layers": "0,2"},
        {"sparsity": {"0": 0.5, "2": 0.5}, "memory": MEMORY},
        {"sparsity": [{"0": 0.5}, {"2": 0.5}], "memory": MEMORY},
    ):
        with pytest.raises(ValueError, match=r"memory: layer '[02]' .*raise it \(--memory\)"):
            retrain.lobs(model, x, **options, **common)
        assert not (tmp_path / "out").exists()
    pattern = retrain.lobs(model, x, sparsity=0.5, memory=MEMORY, layers="[02]")
    assert [report.name for report in pattern.layers] == ["0"]


def test_net_trim_samples_rows_as_long_as_one_fits(case):
    _, model, x = case
    row = 4 * (3 * 13 + 16 * 300)
    assert len(retrain.net_trim(model, x, memory=row, solver="admm").layers) == 3
    run = retrain.net_trim(model, x, memory=row - 1, solver="admm")
    assert [report.name for report in run.layers] == ["2", "4"]
    assert "a row of layer '0'" in run.record["left"][0]["reason"]


def test_the_command_says_which_and_why(case, tmp_path):
    folder = case[0]
    arguments = ("lobs", "net.pth", "--data", "data.npz", "--sparsity", 0.5, "--out", tmp_path)
    arguments += ("--memory", MEMORY / GIB)
    answer = command(folder, *arguments)
    assert answer.code == 0
    flat = " ".join(answer.out.split())
    assert "left as it was: 2 (linear): memory: layer '2' with 300 inputs" in flat
    planned = command(folder, *arguments, "--dry-run")
    assert "2: left as it is: memory: layer '2'" in planned.out
