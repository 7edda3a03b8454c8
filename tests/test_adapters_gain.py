"""Lipschitz factors: exact where they should be, and never below what perturbations show."""

import math

import numpy as np
import pytest
import torch
from networks import dense
from torch import nn
from torch.nn import functional

from retrain.adapters.network.norms import cover, frobenius_norm, spectral_norm
from retrain.adapters.network.sites import OPERATIONS, operator_norm
from retrain.adapters.network.stream import TorchStream


class After(nn.Module):
    """A first layer `a`, and a tail that a perturbation of its output goes through."""

    def __init__(self, first, tail, **modules):
        super().__init__()
        self.a = first
        self.tail = tail
        for name, module in modules.items():
            self.add_module(name, module)

    def forward(self, x):
        return (
            self.tail(self, self.a(x))
            if not isinstance(self.tail, nn.Module)
            else self.tail(self.a(x))
        )


def stretch(model, tail, shape, seed=0):
    """The largest ratio ||tail(z + d) − tail(z)|| / ||d|| found by sampling and by power iteration.

    With v the ratio's direction, d ← Jᵀ J d climbs to the Jacobian's largest singular vector.
    """
    generator = torch.Generator().manual_seed(seed)
    model = model.double().eval()
    best = 0.0
    for scale in (1e-3, 1.0, 30.0):
        z = scale * torch.randn(1, *shape, generator=generator, dtype=torch.float64)
        d = torch.randn(z.shape, generator=generator, dtype=torch.float64)
        for _ in range(12):
            d = d / d.norm()
            _, forward = torch.autograd.functional.jvp(tail, z, d)
            best = max(best, float(forward.norm()))
            _, d = torch.autograd.functional.vjp(tail, z, forward)
            if d.norm() == 0:
                break
        far = torch.randn(z.shape, generator=generator, dtype=torch.float64)
        with torch.no_grad():
            best = max(best, float((tail(z + far) - tail(z)).norm() / far.norm()))
    return best


def gain_of(tail, shape, **modules):
    """The gain from a layer that gives `shape`, and the stretch that is measured."""
    torch.manual_seed(0)
    first = nn.Conv2d(shape[0], shape[0], 1) if len(shape) == 3 else nn.Linear(shape[0], shape[0])
    model = After(first, tail, **modules).eval()
    x = np.random.default_rng(0).normal(size=(2, *shape))
    stream = TorchStream(model, x)
    value = stream.gain("a")
    if value.value is None:
        return value, None
    run = model.tail if isinstance(tail, nn.Module) else lambda z: tail(model, z)
    return value, stretch(model, run, shape)


IMAGE = (3, 8, 7)
TIGHT = {
    "dense": (nn.Linear(6, 4), (6,)),
    "max pool": (nn.MaxPool2d(2), IMAGE),
    "average pool": (nn.AvgPool2d((2, 3)), IMAGE),
    "average pool 1d": (nn.Sequential(nn.Flatten(2), nn.AvgPool1d(4)), IMAGE),
    "whole average": (nn.AdaptiveAvgPool2d(1), IMAGE),
    "adaptive average": (nn.AdaptiveAvgPool2d((4, 1)), IMAGE),
    "mean": (lambda net, z: z.mean((2, 3)), IMAGE),
    "mean of one axis": (lambda net, z: torch.mean(z, dim=-1, keepdim=True), IMAGE),
    "divisor": (lambda net, z: functional.avg_pool2d(z, 2, divisor_override=3), IMAGE),
    "batch norm": (nn.BatchNorm2d(3), IMAGE),
    "1 x 1 convolution": (nn.Conv2d(3, 5, 1), IMAGE),
    "stride as kernel": (nn.Conv2d(3, 5, 2, stride=2), (3, 8, 8)),
    "groups": (nn.Conv2d(4, 6, 2, stride=2, groups=2), (4, 8, 8)),
    "leaky": (nn.LeakyReLU(-3.0), (6,)),
    "elu": (lambda net, z: functional.elu(z, 2.5), (6,)),
    "scaled": (lambda net, z: 2 * (z / 4) * 3, (6,)),
    "sum with itself": (lambda net, z: z + z, (6,)),
    "difference": (lambda net, z: -z - 3 + z.neg(), (6,)),
    "kernel from the shape": (lambda net, z: functional.avg_pool2d(z, z.size()[2:]), IMAGE),
    "stride from the shape": (
        lambda net, z: functional.max_pool2d(z, 2, stride=z.size(3) - 5),
        IMAGE,
    ),
    "every second pixel, padded": (
        lambda net, z: functional.pad(z[:, :, ::2, ::2], (0, 0, 0, 0, 1, 1)),
        IMAGE,
    ),
    "one channel": (lambda net, z: z[:, 1, None], IMAGE),
    "moved": (lambda net, z: z.permute(0, 2, 3, 1).flatten(1).unsqueeze(-1).clone(), IMAGE),
    "size": (lambda net, z: z.view(z.shape[0], -1).view(z.size(0), -1), IMAGE),
}


@pytest.mark.parametrize("case", TIGHT)
def test_factors_that_are_exact(case):
    tail, shape = TIGHT[case]
    gain, measured = gain_of(tail, shape)
    assert gain.reason is None
    assert measured <= gain.value * (1 + 1e-9)
    if case == "difference":  # −z − z cancels nothing: 2
        assert gain.value == 2
    assert measured >= 0.9 * gain.value


def uneven():
    """A layer and a batch norm whose scales undo each other: far from the product of norms."""
    torch.manual_seed(4)
    linear, norm = nn.Linear(6, 6), nn.BatchNorm1d(6).eval()
    scales = 10.0 ** torch.linspace(-3, 3, 6)
    with torch.no_grad():
        linear.weight /= scales[:, None]
        norm.weight.copy_(scales)
    return linear, norm


def test_a_layer_and_its_batch_norm_are_one_map():
    gain, measured = gain_of(nn.Sequential(*uneven()), (6,))
    assert measured <= gain.value <= 1.05 * measured


def test_a_layer_that_others_read_too_is_not_one_map_with_its_batch_norm():
    both = lambda net, z: torch.cat([net.norm(net.inner(z)), net.inner(z)], 1)  # noqa: E731
    beside = lambda net, z: (lambda h: net.norm(h) + 5 * h)(net.inner(z))  # noqa: E731
    for tail in (both, beside):
        linear, norm = uneven()
        gain, measured = gain_of(tail, (6,), inner=linear, norm=norm)
        if gain.value is not None:
            assert measured <= gain.value
    assert gain.value is not None


@pytest.mark.parametrize(
    "options",
    [{}, {"padding": 1}, {"stride": 2}, {"dilation": 2}, {"groups": 2}, {"kernel_size": (2, 5)}],
    ids=str,
)
def test_a_convolution_is_bounded_by_its_frequencies(options):
    """Between the norm of its matrix on an image and what the covering of patches gives."""
    torch.manual_seed(3)
    conv = nn.Conv2d(4, 6, **{"kernel_size": 3, **options}, bias=False).double()
    pixels = torch.eye(4 * 12 * 11, dtype=torch.float64).reshape(-1, 4, 12, 11)
    with torch.no_grad():
        exact = float(torch.linalg.matrix_norm(conv(pixels).flatten(1), 2))
    kernels = conv.weight.detach().chunk(conv.groups)
    how, weight = OPERATIONS["conv2d"], conv.weight.detach()
    arguments = {"stride": conv.stride, "dilation": conv.dilation, "groups": conv.groups}
    times = math.sqrt(math.prod(map(cover, conv.kernel_size, conv.stride, conv.dilation)))
    covered = times * max(spectral_norm(kernel.flatten(1)) for kernel in kernels)
    bound = operator_norm(how, weight, arguments, "spectral")
    assert exact <= bound <= covered
    if conv.stride == (1, 1):
        assert bound <= 1.3 * exact
        assert bound < 0.9 * covered
    largest = times * max(frobenius_norm(kernel.flatten(1)) for kernel in kernels)
    assert operator_norm(how, weight, arguments, "frobenius") == pytest.approx(largest, rel=1e-12)


# Largest slopes, and how far above the sampled ones the factor may lie.
SLOPES = {
    "relu": (nn.ReLU(), 1.0),
    "identity": (nn.Identity(), 1.0),
    "tanh": (nn.Tanh(), 1.0),
    "sigmoid": (nn.Sigmoid(), 0.25),
    "gelu": (nn.GELU(), 1.1290),
    "gelu by tanh": (nn.GELU("tanh"), 1.1290),
    "silu": (nn.SiLU(), 1.0999),
    "softplus": (nn.Softplus(), 1.0),
    "softsign": (nn.Softsign(), 1.0),
    "relu6": (nn.ReLU6(), 1.0),
    "hardtanh": (nn.Hardtanh(), 1.0),
    "logsigmoid": (nn.LogSigmoid(), 1.0),
    "elu of 2.5": (nn.ELU(2.5), 2.5),
    "elu of 0.5": (nn.ELU(0.5), 1.0),
    "elu of -2": (nn.ELU(-2.0), 2.0),
    "leaky of 0.01": (nn.LeakyReLU(), 1.0),
    "leaky of 0.5": (nn.LeakyReLU(0.5), 1.0),
    "leaky of -3": (nn.LeakyReLU(-3.0), 3.0),
    "prelu of 0.25": (nn.PReLU(), 1.0),
    "prelu of 4": (nn.PReLU(init=4.0), 4.0),
}


@pytest.mark.parametrize("name", SLOPES)
def test_elementwise_factors_are_the_largest_slope(name):
    module, slope = SLOPES[name]
    z = torch.cat([torch.linspace(-30, 30, 60_001), torch.linspace(-1e-3, 1e-3, 999)]).double()
    z.requires_grad_()
    (grad,) = torch.autograd.grad(module.double()(z).sum(), z)
    measured = float(grad.abs().max())
    gain, _ = gain_of(module.float(), (6,))
    assert measured == pytest.approx(slope, rel=2e-3)
    assert measured * (1 - 1e-9) <= gain.value <= slope * 1.002


BOUNDS = {
    "dense of a ReLU": (nn.Sequential(nn.ReLU(), nn.Linear(6, 1)), (6,)),
    "deep": (
        nn.Sequential(nn.ReLU(), nn.Linear(6, 9), nn.Dropout(), nn.ReLU(), nn.Linear(9, 4)), (6,),
    ),
    "convolutions": (
        nn.Sequential(
            nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 4, 3, stride=2, padding="valid"),
            nn.ReLU(), nn.Flatten(), nn.Linear(36, 5),
        ), IMAGE,
    ),
    "dilated": (nn.Conv2d(3, 4, 3, padding="same", dilation=2), IMAGE),
    "dilated and strided": (nn.Conv2d(3, 4, 3, stride=2, dilation=2), IMAGE),
    "grouped": (nn.Conv2d(4, 4, 3, groups=2, padding=1), (4, 6, 6)),
    "overlapping max pool": (nn.MaxPool2d(3, stride=2, padding=1), IMAGE),
    "dilated max pool": (lambda net, z: functional.max_pool2d(z, 2, 1, 0, 2), IMAGE),
    "overlapping average pool": (nn.AvgPool2d(3, stride=1, padding=1), IMAGE),
    "cut average pool": (nn.AvgPool2d(3, 2, 1, count_include_pad=False), IMAGE),
    "ceil average pool": (nn.AvgPool2d(3, ceil_mode=True), IMAGE),
    "residual": (lambda net, z: torch.relu(net.b(torch.relu(z)) + z), (6,), nn.Linear(6, 6)),
    "residual in place": (lambda net, z: torch.relu_(net.b(z).__iadd__(z)), (6,), nn.Linear(6, 6)),
    "repeats entries": (lambda net, z: z.unsqueeze(1) + z.unsqueeze(2), (6,)),
    "adds a mean": (lambda net, z: z - z.mean(1, keepdim=True), (6,)),
    "two paths": (lambda net, z: torch.cat([net.b(z), z.tanh()], 1), (6,), nn.Linear(6, 6)),
    "tanh": (nn.Tanh(), (6,)),
    "sigmoid": (nn.Sigmoid(), (6,)),
    "gelu": (nn.GELU(), (6,)),
    "gelu by tanh": (nn.GELU("tanh"), (6,)),
    "silu": (nn.SiLU(), (6,)),
    "softplus": (nn.Softplus(3.0), (6,)),
    "softsign": (nn.Softsign(), (6,)),
    "relu6": (nn.ReLU6(), (6,)),
    "hardtanh": (nn.Hardtanh(), (6,)),
    "logsigmoid": (nn.LogSigmoid(), (6,)),
    "softmax": (nn.Softmax(1), (6,)),
    "log softmax": (lambda net, z: functional.log_softmax(z, dim=1), (6,)),
    "log softmax of the last axis": (nn.LogSoftmax(dim=-1), (6,)),
}  # fmt: skip


@pytest.mark.parametrize("case", BOUNDS)
def test_factors_that_bound(case):
    tail, shape, *more = BOUNDS[case]
    torch.manual_seed(5)
    gain, measured = gain_of(tail, shape, **({"b": more[0]} if more else {}))
    assert gain.reason is None
    assert 0 < measured <= gain.value * (1 + 1e-9)
    assert gain.value < 60 * measured  # a bound, and not a silly one


def test_sigmoid_and_its_like_are_met_at_zero():
    for module, value in ((nn.Sigmoid(), 0.25), (nn.Tanh(), 1.0), (nn.GELU(), 1.13)):
        points = torch.linspace(-5, 5, 100_001, dtype=torch.float64)
        slope = ((module(points[1:]) - module(points[:-1])) / points.diff()).abs().max()
        assert 0.99 * value < slope <= value * (1 + 1e-9)


REASONS = {
    "layer norm": (nn.LayerNorm(6), "LayerNorm (tail) has no known factor"),
    "product": (lambda net, z: z * z.tanh(), "a product of two activations"),
    "quotient": (lambda net, z: z.tanh() / z, "a quotient by an activation"),
    "reciprocal": (lambda net, z: 1 / z, "reciprocal has no known factor"),
    "unknown": (lambda net, z: torch.exp(z), "exp has no known factor"),
    "own statistics": (nn.BatchNorm1d(6, track_running_stats=False), "by the batch's own"),
    "over samples": (lambda net, z: z - z.mean(0, keepdim=True), "mean over the samples"),
    "repeats samples": (
        lambda net, z: z[:1] + z, "repeats its operand over the samples",
    ),
    "indexed": (lambda net, z: z[:, [0, 0]], "index has no known factor"),
    "uneven": (
        lambda net, z: functional.adaptive_avg_pool1d(z, 4),
        "adaptive_avg_pool1d has windows of unequal size",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REASONS)
def test_no_factor(case):
    tail, text = REASONS[case]
    gain, _ = gain_of(tail, (6,))
    assert gain.value is None and text in gain.reason


def put(z):
    h = torch.tanh(z)
    h.add_(z)
    return h


def shared(z):
    h = torch.tanh(z)
    seen = h.view(-1, 6)
    h += z
    return seen + h


def scaled(z):
    h = torch.tanh(z)
    seen = h.view(-1, 6)
    h *= 10
    return seen


# What works in place, and the same without.
IN_PLACE = {
    "sum": (put, lambda z: torch.tanh(z) + z, 2.0),
    "seen elsewhere": (shared, lambda z: 2 * (torch.tanh(z) + z), 4.0),
    "scaled": (scaled, lambda z: 10 * torch.tanh(z), 10.0),
}


@pytest.mark.parametrize("case", IN_PLACE)
def test_what_is_written_in_place_reaches_all_who_see_it(case):
    inside, plain, value = IN_PLACE[case]
    torch.manual_seed(0)
    stream = TorchStream(After(nn.Linear(6, 6), lambda net, z: inside(z)), np.eye(6))
    assert stream.gain("a").value == value
    measured = stretch(nn.Identity(), plain, (6,))
    assert 0.9 * value <= measured <= value * (1 + 1e-9)


def test_padding_that_repeats_pixels_counts_how_often():
    for mode in ("reflect", "replicate", "circular"):
        pad = lambda net, z, mode=mode: functional.pad(z, (1, 2, 0, 1), mode)  # noqa: E731
        gain, measured = gain_of(pad, IMAGE)
        assert measured <= gain.value <= 2.5 * measured
        conv = nn.Conv2d(3, 3, 3, padding=1, padding_mode=mode)
        gain, measured = gain_of(conv, IMAGE)
        assert measured <= gain.value <= 5 * measured


def test_an_output_that_overflows_has_none():
    tail = nn.Sequential(*(nn.Linear(6, 6) for _ in range(12)))
    for layer in tail:
        nn.init.constant_(layer.weight, 1e30)
    gain, _ = gain_of(tail, (6,))
    assert gain.value is None and "overflows" in gain.reason


def test_unreached_layers_have_none_and_repeated_ones_all_their_calls():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = (nn.Linear(3, 3) for _ in range(3))

        def forward(self, x):
            return self.a(self.b(self.b(x)))

    stream = TorchStream(Odd(), np.ones((2, 3)))
    assert stream.gain("a").value == 1
    # Two calls: sqrt(|A|^2 + (|A| |B|)^2).
    a, b = (spectral_norm(stream.weight(name)[:-1]) for name in "ab")
    assert stream.gain("b").value == pytest.approx(math.hypot(a, a * b), rel=1e-9)
    assert "not a layer that the forward pass runs" in stream.gain("c").reason


def test_a_chain_is_the_product_of_the_later_norms_as_they_are_now():
    model = dense(7, 6, 5, 4, dtype=torch.float64)
    stream = TorchStream(model, np.random.default_rng(0).normal(size=(30, 7)))
    second, third = (model[i].weight.detach() for i in (2, 4))
    for norm, order in (("spectral", 2), ("frobenius", "fro")):
        expected = [torch.linalg.matrix_norm(w, order).item() for w in (second, third)]
        gains = [stream.gain(name, norm=norm).value for name in ("0", "2", "4")]
        np.testing.assert_allclose(gains, [math.prod(expected), expected[1], 1], rtol=1e-12)
        assert gains[0] >= math.prod(expected)  # rounded up
    stream.commit("4", 3 * stream.weight("4"))
    np.testing.assert_allclose(stream.gain("2").value, 3 * spectral_norm(third), rtol=1e-12)
    np.testing.assert_allclose(
        stream.gain("2", norm="frobenius").value, 3 * frobenius_norm(third), rtol=1e-12
    )


@pytest.mark.parametrize("seed", range(5))
def test_the_bound_of_a_pruned_chain_holds(seed):
    """sum_j e_j gain_j >= ||outputs − dense outputs||, e_j measured on the dense inputs."""
    rng = np.random.default_rng(seed)
    stream = TorchStream(dense(7, 6, 5, 4, dtype=torch.float64), rng.normal(size=(40, 7)))
    for name in ("0", "2", "4"):
        weight = stream.weight(name)
        weight[:-1][torch.tensor(rng.random(weight[:-1].shape) < 0.4)] = 0
        stream.commit(name, weight)
    bound = 0.0
    for spec in stream.layers:
        for batch in stream.batches(spec.name):
            now, then = batch.dense_inputs @ stream.weight(spec.name), batch.responses
            if spec.follows == "relu":
                now, then = torch.relu(now), torch.relu(then)
            bound += float((now - then).norm()) * stream.gain(spec.name).value
    moved = torch.cat(list(stream.outputs(dense=False))) - torch.cat(
        list(stream.outputs(dense=True))
    )
    assert 0 < float(moved.norm()) <= bound


def test_cover_counts_windows():
    for kernel in range(1, 6):
        for stride in range(1, 7):
            for dilation in range(1, 5):
                hits = np.zeros(400, int)
                for o in range(60):
                    hits[o * stride + dilation * np.arange(kernel)] += 1
                assert hits[100:200].max(initial=0) <= cover(kernel, stride, dilation)
                assert hits.max() == cover(kernel, stride, dilation)


def test_norms_are_rounded_up():
    rng = np.random.default_rng(0)
    for shape in ((1, 1), (5, 3), (40, 70)):
        left = np.linalg.qr(rng.normal(size=(shape[0], min(shape))))[0]
        right = np.linalg.qr(rng.normal(size=(shape[1], min(shape))))[0]
        values = np.linspace(3, 1, min(shape))
        matrix = torch.tensor(left * values @ right.T)
        assert 3 <= spectral_norm(matrix) < 3 * (1 + 1e-12)
        exact = math.sqrt(math.fsum(float(v) ** 2 for v in matrix.flatten()))
        assert exact <= frobenius_norm(matrix) < exact * (1 + 1e-11)
    assert spectral_norm(torch.zeros(0, 3)) == 0
