"""Batch norms folded into layers: rows, responses, writing back, whole runs."""

import copy

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import nn

import retrain
from retrain.adapters.network.fold import settled
from retrain.adapters.network.open import layer_table
from retrain.adapters.network.stream import TorchStream
from retrain.stream.stream import collect


def normal(norm, seed=0):
    """Statistics and factors as training leaves them: of both signs, far from 0 and 1."""
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        norm.running_mean.copy_(torch.randn(norm.num_features, generator=draw))
        norm.running_var.copy_(torch.rand(norm.num_features, generator=draw) + 0.05)
        if norm.affine:
            norm.weight.copy_(torch.randn(norm.num_features, generator=draw))
            norm.bias.copy_(torch.randn(norm.num_features, generator=draw))
    return norm


def images(kind=nn.Conv2d, *, bias=True, affine=True, groups=1, inplace=False):
    torch.manual_seed(1)
    more = {"output_padding": 1, "stride": 2} if kind is nn.ConvTranspose2d else {}
    first = kind(2 * groups, 6, 3, bias=bias, groups=groups, padding=1, **more)
    return nn.Sequential(
        first,
        normal(nn.BatchNorm2d(6, affine=affine)),
        nn.ReLU(inplace=inplace),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(6, 3),
    ).eval()


def dense(*, bias=True, affine=True, dtype=torch.float32):
    torch.manual_seed(1)
    norm = normal(nn.BatchNorm1d(7, affine=affine))
    net = nn.Sequential(nn.Linear(5, 7, bias=bias), norm, nn.ReLU(), nn.Linear(7, 3))
    return net.eval().to(dtype)


def numbers(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


CASES = {
    "convolution": (lambda: images(), (9, 2, 6, 6)),
    "without a bias": (lambda: images(bias=False), (9, 2, 6, 6)),
    "not affine": (lambda: images(bias=False, affine=False), (9, 2, 6, 6)),
    "groups": (lambda: images(groups=2), (9, 4, 6, 6)),
    "in place": (lambda: images(bias=False, inplace=True), (9, 2, 6, 6)),
    "transposed": (lambda: images(nn.ConvTranspose2d), (9, 2, 6, 6)),
    "dense": (lambda: dense(), (30, 5)),
    "dense without a bias": (lambda: dense(bias=False), (30, 5)),
    "double": (lambda: dense(dtype=torch.float64), (30, 5)),
    "half": (lambda: dense(bias=False, dtype=torch.bfloat16), (30, 5)),
}


@pytest.fixture(params=CASES)
def case(request):
    factory, shape = CASES[request.param]
    return factory(), numbers(*shape)


def test_rows_times_the_folded_weight_are_what_the_relu_meets(case):
    model, x = case
    stream = TorchStream(model, x)
    spec = stream.layers[0]
    assert spec.follows == "relu" and spec.bias and spec.reason is None
    dtype = stream.weight("0").dtype
    with torch.no_grad():
        behind = copy.deepcopy(model).to(dtype)[:2](torch.tensor(x, dtype=dtype))
    tolerance = 1e-4 if dtype == torch.float32 else 1e-12
    for group in range(spec.groups):
        batch = collect(stream, "0", group)
        units = behind.movedim(1, -1).reshape(-1, 6 if behind.ndim > 2 else 7)
        units = units[:, group * spec.shape[1] : (group + 1) * spec.shape[1]]
        torch.testing.assert_close(batch.responses, units, atol=tolerance, rtol=tolerance)
        made = batch.inputs @ stream.weight("0", group)
        torch.testing.assert_close(made, units, atol=tolerance, rtol=tolerance)


def test_what_is_written_is_what_the_network_computes(case):
    model, x = case
    stream = TorchStream(model, x)
    half = next(model.parameters()).dtype == torch.bfloat16
    tolerance = 0.05 if half else 1e-4
    rows = collect(stream, "0").inputs
    for group in range(stream.layers[0].groups):
        new = stream.weight("0", group)
        generator = torch.Generator().manual_seed(group)
        new += 0.3 * torch.randn(new.shape, generator=generator).to(new.dtype)
        new[:-1][torch.rand(new[:-1].shape, generator=generator) < 0.5] = 0
        stream.commit("0", new, group)
        saved = stream.weight("0", group)
        torch.testing.assert_close(saved, new, atol=tolerance, rtol=tolerance)
        assert torch.equal(saved[:-1] == 0, new[:-1] == 0)
        again = TorchStream(model, x)  # a run that resumes writes what it reads
        again.commit("0", saved, group)
        assert torch.equal(again.weight("0", group), saved)
    if stream.layers[0].groups == 1:
        behind = stream.model[:2](torch.tensor(x).to(next(model.parameters()).dtype))
        units = behind.detach().movedim(1, -1).reshape(len(rows), -1).to(rows.dtype)
        torch.testing.assert_close(rows @ saved, units, atol=20 * tolerance, rtol=tolerance)
    weights = stream.model[0].weight
    assert 0.3 < (weights == 0).float().mean() < 0.7


def test_what_stays_keeps_its_bytes(case):
    model, x = case
    stream = TorchStream(model, x)
    before = copy.deepcopy(stream.model.state_dict())
    for group in range(stream.layers[0].groups):
        stream.commit("0", stream.weight("0", group), group)
    after = stream.model.state_dict()
    assert all(torch.equal(before[name], value) for name, value in after.items())
    new = stream.weight("0")
    new[0] = 0
    stream.commit("0", new)
    changed = (stream.model[0].weight != before["0.weight"]).flatten(1).sum()
    assert changed == stream.layers[0].shape[1]  # one entry of each unit of the first group


def test_channels_without_a_scale_keep_their_weights():
    model = images(bias=False)
    with torch.no_grad():
        model[1].weight[2], model[1].weight[4] = 0, 1e-12
    stream = TorchStream(model, numbers(9, 2, 6, 6))
    before = copy.deepcopy(stream.model.state_dict())
    batch = collect(stream, "0")
    torch.testing.assert_close(
        batch.inputs @ stream.weight("0"), batch.responses, atol=1e-4, rtol=1e-4
    )
    stream.commit("0", 0 * stream.weight("0"))
    kept = stream.model[0].weight.flatten(1).abs().sum(1) != 0
    assert kept.tolist() == [False, False, True, False, True, False]
    for name in ("0.weight", "1.bias"):
        for channel in (2, 4):
            assert torch.equal(stream.model.state_dict()[name][channel], before[name][channel])


def test_a_norm_is_folded_only_where_nothing_else_reads_it():
    class Net(nn.Module):
        def __init__(self, tail):
            super().__init__()
            self.a, self.b, self.norm = nn.Linear(5, 7), nn.Linear(7, 7), normal(nn.BatchNorm1d(7))
            self.last, self.tail = nn.Linear(7, 2), tail

        def forward(self, x):
            return self.last(torch.relu(self.tail(self, self.a(x))))

    tails = {
        "read twice": lambda net, z: net.norm(z) + z,
        "used twice": lambda net, z: net.norm(net.b(torch.relu(net.norm(z)))),
        "behind a ReLU": lambda net, z: net.norm(torch.relu(z)),
        "own statistics": lambda net, z: nn.functional.batch_norm(z, None, None, training=True),
    }
    for name, tail in tails.items():
        stream = TorchStream(Net(tail).eval(), numbers(20, 5))
        assert all(site.fold is None for site in stream.sites.values()), name
    table = layer_table(Net(lambda net, z: net.norm(z)).eval(), numbers(20, 5))
    assert (table[0].meets, table[0].detail) == ("relu", "BatchNorm1d (norm) folded in")


@pytest.mark.parametrize("verb", ["net_trim", "lobs"])
def test_runs(case, verb, tmp_path):
    model, x = case
    options = {"relative_epsilon": 0.1} if verb == "net_trim" else {"sparsity": 0.5}
    run = getattr(retrain, verb)(model, x, out=tmp_path / "run", evaluate=x, **options)
    assert run.bound is not None and run.measured <= run.bound
    assert run.defects == []
    for report in run.layers:
        weights = run.model.get_submodule(report.name).weight
        assert report.zeros == int((weights == 0).sum())
        if weights.dtype != torch.bfloat16:  # whose rounding may exceed the tolerances
            assert report.certified is not False
    again = retrain.load(tmp_path / "run", model)
    written = load_file(tmp_path / "run" / "model.safetensors")
    assert all(torch.equal(again.model.state_dict()[key], value) for key, value in written.items())

    def stop(report, total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        getattr(retrain, verb)(model, x, out=tmp_path / "cut", evaluate=x, on_layer=stop, **options)
    getattr(retrain, verb)(model, x, out=tmp_path / "cut", evaluate=x, **options)
    cut = load_file(tmp_path / "cut" / "model.safetensors")
    assert all(torch.equal(cut[key], value) for key, value in written.items())


def test_sparsity_zero_writes_the_same_bytes(case):
    model, x = case
    run = retrain.lobs(model, x, sparsity=0.0)
    for name, value in model.state_dict().items():
        assert torch.equal(run.model.state_dict()[name], value)


def test_the_folded_form_prunes_more_than_the_linear_one():
    """Behind a ReLU only the positive responses are to be met."""
    model, x = images(bias=False), numbers(200, 2, 6, 6)
    run = retrain.net_trim(model, x, relative_epsilon=0.2, layers="0")
    assert run.layers[0].follows == "relu" and run.certified

    class Hidden(nn.Module):
        """The same network, its ReLU where no layer meets it."""

        def __init__(self):
            super().__init__()
            self.net = copy.deepcopy(model)

        def forward(self, x):
            z = self.net[1](self.net[0](x))
            return self.net[3:](torch.maximum(z, torch.zeros_like(z)))

    linear = retrain.net_trim(Hidden(), x, relative_epsilon=0.2, layers="net.0")
    assert linear.layers[0].follows == "linear"
    assert run.layers[0].zeros > linear.layers[0].zeros


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 2**32 - 1), st.floats(-8, 8), st.sampled_from(["float32", "bfloat16"]))
def test_unfolding_settles(seed, size, name):
    """What is read folded, written and read again stays: in resumed runs too."""
    draw = torch.Generator().manual_seed(seed)
    kind = getattr(torch, name)
    scale = torch.randn(6, generator=draw).double() * 10.0**size
    shift = torch.randn(6, generator=draw).double()
    dense = torch.randn(4, 6, generator=draw).to(kind)

    def unfold(x):
        return ((x.double() - shift) / scale).to(kind)

    def fold(w):
        return (w.double() * scale + shift).float()

    wanted = torch.randn(4, 6, generator=draw) * 10.0**size
    wanted[0] = fold(dense)[0]
    stored = settled(wanted, dense, unfold, fold)
    assert torch.equal(stored[0], dense[0])
    assert torch.equal(settled(fold(stored), dense, unfold, fold), stored)
