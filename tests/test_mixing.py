"""Networks that mix samples are found on any data; networks that do not are never called so."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

import retrain
from retrain.adapters.network.capture import CaptureError
from retrain.adapters.network.hooked import HookedStream
from retrain.adapters.network.open import open_network
from retrain.adapters.network.stream import TorchStream
from retrain.bounds.outputs import output_bound


class Between(nn.Module):
    """Two layers with an operation between them."""

    def __init__(self, operation, width=6):
        super().__init__()
        self.a, self.b, self.operation = nn.Linear(width, width), nn.Linear(width, 3), operation

    def forward(self, x):
        return self.b(self.operation(self.a(x)))


class After(nn.Module):
    """A layer, and an operation after it."""

    def __init__(self, operation, width=6):
        super().__init__()
        self.a, self.operation = nn.Linear(width, width), operation

    def forward(self, x):
        return self.operation(self.a(x))


class Recurrent(nn.Module):
    def __init__(self, kind, batch_first):
        super().__init__()
        self.cell, self.b = kind(6, 5, batch_first=batch_first), nn.Linear(5, 3)
        self.batch_first = batch_first

    def forward(self, x):
        return self.b(self.cell(x[:, None])[0][:, 0])


def attention(x):
    return functional.scaled_dot_product_attention(x, x, x)


def nearest(x):
    return torch.cdist(x, x) @ x


MIXING = {
    "mean": lambda x: x - x.mean(0),
    "weak mean": lambda x: x + 1e-4 * x.mean(0),
    "maximum": lambda x: x / (1 + x.abs().amax()),
    "softmax over the batch": lambda x: x.softmax(0),
    "sort": lambda x: x.sort(0).values,
    "sum": lambda x: x + 0.1 * x.sum(0, keepdim=True),
    "norm of the batch": lambda x: x / x.norm(),
    "cumulative": lambda x: x.cumsum(0),
    "roll": lambda x: x.roll(1, 0),
    "flip": lambda x: x.flip(0),
    "attention": attention,
    "distances": nearest,
    "batch size": lambda x: x * x.shape[0],
    "batch norm": nn.BatchNorm1d(6, track_running_stats=False),
    "first sample": lambda x: x + x[:1],
    "last sample": lambda x: x + x[-1:],
}
rng = np.random.default_rng(0)
ONE = rng.normal(size=(1, 6)).astype(np.float32)
DATA = {
    "random": rng.normal(size=(40, 6)).astype(np.float32),
    "all equal": np.repeat(ONE, 40, axis=0),
    "zeros": np.zeros((40, 6), np.float32),
    "first and last equal": np.concatenate([ONE, rng.normal(size=(38, 6)), ONE]).astype(np.float32),
    "sorted": np.sort(rng.normal(size=(40, 6)), axis=0).astype(np.float32),
    "one sample": ONE,
    "constant columns": np.repeat(rng.normal(size=(40, 1)), 6, 1).astype(np.float32) * 0 + ONE,
    "large": 1e6 + rng.normal(size=(40, 6)).astype(np.float32),
    "small": 1e-6 * rng.normal(size=(40, 6)).astype(np.float32),
}


def stream(model, x):
    torch.manual_seed(0)
    return TorchStream(model, x)


@pytest.mark.parametrize("name", sorted(set(MIXING) - {"batch size"}))
def test_mixing_is_found(name):
    for found in (stream(kind(MIXING[name]), DATA["random"]) for kind in (Between, After)):
        assert all(spec.reason is None for spec in found.layers if spec.name in "ab")
        assert found.mixes == "an output depends on the other samples of its batch"
        assert found.gain("a").value is None and found.gain("a").reason
        assert found.output_layer() == (None, found.mixes)


@pytest.mark.parametrize("data", DATA)
@pytest.mark.parametrize("name", MIXING)
def test_where_it_cannot_be_seen_the_bound_holds_for_the_batches_that_ran(name, data):
    """On samples that are all equal, or a single one, nothing shows it."""
    if data == "one sample" and name == "batch norm":
        with pytest.raises(ValueError, match="data: the network cannot take these samples"):
            stream(Between(MIXING[name]), DATA[data])
        return
    found = stream(Between(MIXING[name]), DATA[data])
    found.commit("a", 0.9 * found.weight("a"))
    bound = output_bound(found)
    assert bound.bound is None or bound.bound >= bound.measured


@pytest.mark.parametrize("kind", [nn.RNN, nn.GRU, nn.LSTM])
def test_recurrent_layers_that_take_samples_for_time(kind):
    torch.manual_seed(0)
    with pytest.raises(CaptureError, match="fails on 4 samples"):
        stream(Recurrent(kind, batch_first=False), DATA["random"])
    found = open_network(Recurrent(kind, batch_first=False), DATA["random"])
    assert isinstance(found, HookedStream) and [spec.name for spec in found.layers] == ["b"]
    assert stream(Recurrent(kind, batch_first=True), DATA["random"]).mixes is None


class Images(nn.Module):
    def __init__(self, norm):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 3)
        self.norm, self.c = norm, nn.Linear(16, 3)

    def forward(self, x):
        x = torch.relu(self.norm(self.a(x)))
        return self.c(torch.relu(self.b(x)).flatten(1))


@pytest.mark.parametrize(
    ("norm", "mixes"),
    [
        (nn.BatchNorm2d(8, track_running_stats=False), True),
        (nn.BatchNorm2d(8), False),
        (nn.InstanceNorm2d(8), False),
        (nn.GroupNorm(2, 8), False),
    ],
)
def test_norms_of_images(norm, mixes):
    found = stream(Images(norm), rng.normal(size=(10, 3, 6, 6)).astype(np.float32))
    assert (found.mixes is not None) == mixes


OWN = {
    "mean of a sample": lambda x: x - x.mean(1, keepdim=True),
    "softmax": lambda x: x.softmax(1),
    "sort": lambda x: x.sort(1).values,
    "layer norm": nn.LayerNorm(6),
    "batch norm": nn.BatchNorm1d(6),
    "tokens": lambda x: attention(x[:, :, None] * torch.ones(4))[:, :, 0],
    "logarithm of positives": lambda x: (x.exp() + 1).log(),
    "large": lambda x: 1e6 * x,
}


@pytest.mark.parametrize("data", DATA)
@pytest.mark.parametrize("name", OWN)
def test_what_does_not_mix_is_never_called_so(name, data):
    for seed in range(2):
        torch.manual_seed(seed)
        for model in (Between(OWN[name]), After(OWN[name])):
            found = stream(model, DATA[data])
            assert found.mixes is None


@pytest.mark.parametrize("depth", [40])
@pytest.mark.parametrize("seed", range(3))
def test_rounding_that_a_deep_network_amplifies_is_no_mixing(depth, seed):
    torch.manual_seed(seed)
    layers = [nn.Linear(32, 32) for _ in range(depth)]
    with torch.no_grad():
        for layer in layers:
            layer.weight *= 3.5
    model = nn.Sequential(*[m for layer in layers for m in (layer, nn.Tanh())], nn.Linear(32, 4))
    found = TorchStream(model, rng.normal(size=(300, 32)).astype(np.float32))
    assert found.mixes is None
    assert all(s.reason is None for s in found.layers)


class Tokens(nn.Module):
    """Takes whole numbers of a vocabulary, which samples moved at random are not."""

    def __init__(self, mixing):
        super().__init__()
        self.words, self.a, self.mixing = nn.Embedding(11, 6), nn.Linear(6, 4), mixing

    def forward(self, x):
        embedded = self.words(x.long())
        return self.a(embedded - embedded.mean(0) if self.mixing else embedded)


class Root(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x):
        return self.b(torch.relu(self.a(x.sqrt().log())))


def test_networks_that_take_no_moved_samples():
    tokens = rng.integers(0, 11, size=(30, 5)).astype(np.float32)
    for mixing in (False, True):
        found = stream(Tokens(mixing), tokens)
        assert (found.mixes is not None) == mixing
    root = stream(Root(), 0.1 + rng.random((30, 6)).astype(np.float32))
    assert root.mixes is None


def test_a_run_of_a_mixing_network_has_no_bounds_and_says_why():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(6, 8), nn.ReLU(), nn.BatchNorm1d(8, track_running_stats=False), nn.Linear(8, 3)
    )
    for verb, options in ((retrain.net_trim, {}), (retrain.lobs, {"sparsity": 0.3})):
        run = verb(model, DATA["random"], evaluate=DATA["sorted"], **options)
        assert [report.name for report in run.layers] == ["0", "3"]
        for bound in run.bounds.values():
            assert bound.best is None
            assert "by the batch's own statistics" in bound.reason
            assert bound.measured > 0


def test_rounding_beside_cancelling_units_is_no_mixing():
    """Outputs that are left of hidden values a million times larger, in float32."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 40), nn.ReLU(), nn.Linear(40, 2))
    with torch.no_grad():
        model[0].weight[20:] = model[0].weight[:20] * (1 + 1e-6)
        model[0].bias[20:] = model[0].bias[:20]
        model[2].weight[:, :20] = 1e6 * torch.rand(2, 20)
        model[2].weight[:, 20:] = -model[2].weight[:, :20]
    assert TorchStream(model, DATA["random"]).mixes is None
