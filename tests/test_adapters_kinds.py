"""One entry of the table of kinds makes a kind of layer known everywhere."""

import dataclasses

import pytest
import torch
from networks import rows
from torch import nn

import retrain
from retrain.adapters.network import gain
from retrain.adapters.network.sites import OPERATIONS, Operation
from retrain.adapters.network.stream import TorchStream
from retrain.bounds.outputs import output_bound


def rows_of(x, weight, arguments, group):
    """Windows of a Conv1d without padding, dilation and groups: (n * positions, c_in * k)."""
    size = weight.shape[2]
    windows = x.unfold(2, size, arguments["stride"][0])
    return windows.permute(0, 2, 1, 3).reshape(-1, weight.shape[1] * size)


TOY = Operation(
    kind="conv1d",
    input="input",
    weight="weight",
    bias="bias",
    groups=lambda arguments, weight: 1,
    matrix=lambda weight, arguments, group: weight.flatten(1).T,
    unmatrix=lambda matrix, weight, arguments, group: matrix.T.reshape(weight.shape),
    part=lambda weight, arguments, group: weight,
    rows=rows_of,
    responses=lambda y, arguments, group: y.transpose(1, 2).reshape(-1, y.shape[1]),
    unfit=lambda arguments, weight: None if arguments["groups"] == 1 else "it has groups",
    channel_axis=1,
    kernel=lambda weight, arguments, group: weight,
    covers=lambda arguments, weight: -(-weight.shape[2] // arguments["stride"][0]),
)


@pytest.fixture
def case(monkeypatch):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv1d(2, 4, 3), nn.ReLU(), nn.Conv1d(4, 3, 2, stride=2), nn.Flatten(), nn.Linear(15, 3)
    )
    x = rows(30, 2, 12)
    return model, x


def test_a_kind_that_is_not_in_the_table_is_left(case, monkeypatch):
    monkeypatch.delitem(OPERATIONS, "conv1d")
    assert [spec.reason for spec in TorchStream(*case).layers][:2] == [
        "Conv1d layers are not retrained",
        "Conv1d layers are not retrained",
    ]


@pytest.mark.parametrize("verb", ["net_trim", "lobs"])
def test_one_entry_makes_a_kind_known_everywhere(case, monkeypatch, verb):
    monkeypatch.setitem(OPERATIONS, "conv1d", TOY)
    model, x = case
    options = {"relative_epsilon": 0.2} if verb == "net_trim" else {"sparsity": 0.5}
    run = getattr(retrain, verb)(model, x, evaluate=x, **options)
    assert [(report.kind, report.name) for report in run.layers[:2]] == [
        ("conv1d", "0"),
        ("conv1d", "2"),
    ]
    assert all(report.zeros > 0 for report in run.layers)
    with torch.no_grad():
        moved = (run.model(torch.tensor(x)) - model(torch.tensor(x))).norm().item()
    assert run.measured == pytest.approx(moved, rel=1e-4)
    assert run.bound is not None and run.bound >= run.measured


def test_its_rows_times_its_matrix_are_its_response(case, monkeypatch):
    monkeypatch.setitem(OPERATIONS, "conv1d", TOY)
    stream = TorchStream(*case)
    for batch in stream.batches("2"):
        response = batch.inputs @ stream.weight("2")
        torch.testing.assert_close(response, batch.responses, rtol=1e-4, atol=1e-5)


def test_a_norm_that_is_too_small_is_noticed(case, monkeypatch):
    small = dataclasses.replace(TOY, covers=lambda *_: 1e-12)
    monkeypatch.setitem(OPERATIONS, "conv1d", small)
    stream = TorchStream(*case)
    stream.commit("0", 0 * stream.weight("0"))
    assert output_bound(stream).defect is not None


def test_one_row_makes_an_operation_known(monkeypatch):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.last = nn.Linear(4, 5), nn.Linear(5, 2)

        def forward(self, x):
            return self.last(torch.arctan(self.first(x)))

    torch.manual_seed(0)
    x = rows(20, 4, seed=1)
    assert TorchStream(Net(), x).gain("first").reason == "arctan has no known factor"
    monkeypatch.setitem(gain.RULES, "arctan", 1.0)
    stream = TorchStream(Net(), x)
    assert stream.gain("first").value == pytest.approx(
        torch.linalg.matrix_norm(stream.weight("last")[:5].double(), 2).item(), rel=1e-6
    )
