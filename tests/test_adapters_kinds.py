"""One entry of the table of kinds makes a kind of layer known everywhere."""

import dataclasses

import pytest
import torch
from networks import rows
from torch import nn
from torch.nn import functional

import retrain
from retrain.adapters.network import gain
from retrain.adapters.network.kinds import KINDS, Kind
from retrain.adapters.network.stream import TorchStream
from retrain.bounds.outputs import output_bound


def rows_of(module, values, group):
    """Patches of a Conv1d without padding, dilation and groups: (n * positions, c_in * k)."""
    windows = values.unfold(2, module.kernel_size[0], module.stride[0])
    return windows.permute(0, 2, 1, 3).reshape(-1, module.in_channels * module.kernel_size[0])


def frobenius(module, norm, scale):
    """|W|_F times the root of the most windows over one entry."""
    weight = module.weight.double()
    if scale is not None:
        weight = weight * scale[:, None, None]
    cover = -(-module.kernel_size[0] // module.stride[0])
    return float(weight.norm()) * cover**0.5


TOY = Kind(
    name="conv1d",
    shape=lambda module: (module.in_channels * module.kernel_size[0], module.out_channels),
    groups=lambda module: 1,
    by_sample=lambda values, samples: values,
    input_rows=rows_of,
    response_rows=lambda module, values, group: values.transpose(1, 2).reshape(
        -1, module.out_channels
    ),
    norm=frobenius,
    magnitude=lambda module: frobenius(module, "frobenius", None),
    channel_axis=lambda dimensions: 1,
    detail=lambda module: f"kernel {module.kernel_size[0]}",
    unfit=lambda module: None if module.groups == 1 else "it has groups",
    misfit=lambda module, got: None,
    input_axes=3,
)


@pytest.fixture
def case(monkeypatch):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv1d(2, 4, 3), nn.ReLU(), nn.Conv1d(4, 3, 2, stride=2), nn.Flatten(), nn.Linear(15, 3)
    )
    x = rows(30, 2, 12)
    return model, x


def test_a_kind_that_is_not_in_the_table_is_left(case):
    assert [spec.reason for spec in TorchStream(*case).layers][:2] == [
        "Conv1d layers are not retrained",
        "Conv1d layers are not retrained",
    ]


@pytest.mark.parametrize("verb", ["net_trim", "lobs"])
def test_one_entry_makes_a_kind_known_everywhere(case, monkeypatch, verb):
    monkeypatch.setitem(KINDS, nn.Conv1d, TOY)
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
    monkeypatch.setitem(KINDS, nn.Conv1d, TOY)
    stream = TorchStream(*case)
    for batch in stream.batches("2"):
        response = batch.inputs @ stream.weight("2")
        torch.testing.assert_close(response, batch.responses, rtol=1e-4, atol=1e-5)


def test_a_norm_that_is_too_small_is_noticed(case, monkeypatch):
    small = dataclasses.replace(TOY, norm=lambda *_: 1e-6)
    monkeypatch.setitem(KINDS, nn.Conv1d, small)
    stream = TorchStream(*case)
    stream.commit("0", 0 * stream.weight("0"))
    assert output_bound(stream).defect is not None


def test_one_row_makes_an_operation_known(monkeypatch):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.last = nn.Linear(4, 5), nn.Linear(5, 2)

        def forward(self, x):
            return self.last(functional.softshrink(self.first(x)))

    torch.manual_seed(0)
    x = rows(20, 4, seed=1)
    stream = TorchStream(Net(), x)
    assert stream.gain("first").reason == "softshrink has no known factor"
    from retrain.adapters.network import operations

    monkeypatch.setitem(operations.FUNCTIONS, functional.softshrink, "softshrink")
    monkeypatch.setitem(gain.RULES, "softshrink", 1.0)
    stream = TorchStream(Net(), x)
    assert stream.gain("first").value == pytest.approx(
        torch.linalg.matrix_norm(stream.weight("last")[:5].double(), 2).item(), rel=1e-6
    )
