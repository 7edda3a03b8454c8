"""The gated block, its removal and absorption: a gate at 0 is the network without the block."""

import copy

import pytest
import torch
from gated_cases import CPU, small, wbaw
from networks import samples, weights
from torch import nn
from torch.optim import Adam

from retrain.adapters.files.description import build_module, describe_module
from retrain.compact.cut import forget
from retrain.trainers.gates.absorb import remove_block
from retrain.trainers.gates.architectures import (
    BASIC_BLOCKS,
    deep_lenet,
    dense_network,
    resnet50,
    resnet_cifar,
    vgg16,
)
from retrain.trainers.gates.block import Gated, dense, padded, pointwise, stacked
from retrain.trainers.gates.gradients import open_gates
from retrain.trainers.gates.network import gate, gates_of, ungate
from retrain.trainers.loop.states import seeded


def size(model):
    return sum(parameter.numel() for parameter in model.parameters())


def randomised(model, seed=0):
    """Give the batch norms statistics and scales of their own, and evaluate with them."""
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            for tensor in (module.running_mean, module.weight.data, module.bias.data):
                tensor.add_(0.3 * torch.randn(tensor.shape, generator=generator))
            module.running_var.uniform_(0.5, 2, generator=generator)
    return model.eval()


def closed_output(model, names, x):
    gates = gates_of(model)
    with open_gates(list(gates.values()), [name not in names for name in gates]), torch.no_grad():
        return model(x)


def assert_removal_keeps_outputs(model, names, x):
    wanted = closed_output(model, names, x)
    open_before = model(x)
    for name in reversed(names):
        remove_block(model, name)
    with torch.no_grad():
        got = model(x)
    scale = wanted.abs().max()
    assert (got - wanted).abs().max() <= 1e-5 * scale
    assert (open_before - wanted).abs().max() > 1e-3 * scale  # the gates mattered
    assert not set(names) & set(gates_of(model))


IMAGES = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(1))
DIGITS = torch.randn(3, 1, 28, 28, generator=torch.Generator().manual_seed(2))

NETWORKS = {
    "dense 10": (lambda: dense_network(4, width=20), DIGITS),
    "convolutions": (lambda: deep_lenet(8), DIGITS),
    "vgg with stacked skips": (lambda: vgg16(width=8), IMAGES),
    **{
        f"{kind}, {skip} skips": (
            lambda kind=kind, skip=skip: resnet_cifar(14, width=4, kind=kind, skip=skip),
            IMAGES,
        )
        for kind in BASIC_BLOCKS
        for skip in ("padded", "pointwise")
    },
    "bottlenecks": (lambda: resnet50(10, width=4), IMAGES),
    "ours, dense, W3": (
        lambda: nn.Sequential(nn.Flatten(), nn.Linear(784, 6), *small(4, linear_skips=True)),
        DIGITS,
    ),
}


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("which", ["first", "last", "two in a row", "all"])
def test_removing_blocks_gives_the_outputs_of_closed_gates(name, which):
    make, x = NETWORKS[name]
    with seeded(0, CPU):
        model = randomised(make())
    names = list(gates_of(model))
    chosen = {
        "first": names[:1],
        "last": names[-1:],
        "two in a row": names[1:3],
        "all": names,
    }[which]
    assert_removal_keeps_outputs(model, chosen, x)


def test_linear_skips_are_absorbed_and_identity_skips_leave_nothing():
    model = small(4, linear_skips=True)
    for name in ("3", "1", "0"):
        remove_block(model, name)
    assert [type(m) for m in model] == [Gated, nn.Linear]
    assert size(model) == size(small(1, linear_skips=True))
    remove_block(model, "2")
    assert [type(m) for m in model] == [nn.Linear] and model[0].weight.shape == (3, 6)

    network = dense_network(5)
    for name in ("layer2", "layer5"):
        remove_block(network, name)
    # The ReLU after the block goes too: what comes into it is not negative.
    assert list(dict(network.named_children())) == [
        "flatten",
        "layer1",
        "relu1",
        "layer3",
        "layer4",
        "output",
    ]


def test_an_identity_takes_the_weights_of_the_block_before():
    with seeded(0, CPU):
        narrow = Gated(nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4)), dense(6, 4))
        model = nn.Sequential(narrow, wbaw(4), nn.Linear(4, 3))
    x, _ = samples(48)
    given = copy.deepcopy(model)
    skip = model[0].skip
    removal = remove_block(model, "0")
    assert model[0].skip is skip and model[0].block[0].in_features == 6
    assert removal.changed == [model[0].block[0].weight] and not removal.added
    torch.testing.assert_close(model(x), closed_output(given, ["0"], x), rtol=1e-5, atol=1e-6)


def test_biases_of_a_skip_go_where_they_belong():
    x, _ = samples(48)
    for bias in (True, False):
        with seeded(0, CPU):
            model = nn.Sequential(wbaw(skip=nn.Linear(6, 6)), nn.Linear(6, 3, bias=bias))
        given = copy.deepcopy(model)
        removal = remove_block(model, "0")
        torch.testing.assert_close(model(x), closed_output(given, ["0"], x), rtol=1e-5, atol=1e-6)
        assert removal.added == ([] if bias else [model[0].bias])
        assert any(p is model[0].bias for p in removal.changed) == bias


def test_a_biased_skip_before_zero_padding_stays():
    with seeded(0, CPU):
        model = nn.Sequential(
            Gated(nn.Conv2d(3, 3, 3, padding=1), nn.Conv2d(3, 3, 1)), nn.Conv2d(3, 2, 3, padding=1)
        )
    given = copy.deepcopy(model)
    removal = remove_block(model, "0")
    assert isinstance(model[0], nn.Conv2d) and model[0].kernel_size == (1, 1)
    assert not removal.changed
    torch.testing.assert_close(model(IMAGES), closed_output(given, ["0"], IMAGES))


def test_outside_a_sequential_a_plain_module_takes_the_place():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second, self.last = wbaw(), wbaw(skip=dense(6, 6)), nn.Linear(6, 3)

        def forward(self, z):
            return self.last(self.second(self.first(z)))

    with seeded(0, CPU):
        model = Net()
    x, _ = samples(48)
    wanted = closed_output(model, ["first", "second"], x)
    remove_block(model, "first")
    remove_block(model, "second")
    assert type(model.second) is nn.Linear
    torch.testing.assert_close(model(x), wanted, rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match="name: 'first' is no gated block of the model"):
        remove_block(model, "first")


def test_the_optimiser_forgets_what_is_removed():
    model = small(3, linear_skips=True)
    x, _ = samples(48)
    optimizer = Adam(model.parameters())
    model(x).square().sum().backward()
    optimizer.step()
    before = {id(p) for p in optimizer.state}
    removal = remove_block(model, "1")
    forget(optimizer, removal)
    left = optimizer.param_groups[0]["params"]
    assert {id(p) for p in left} == {id(p) for p in model.parameters()}
    assert len(removal.gone) == 5 and len(removal.changed) == 2
    assert set(optimizer.state) == set(left) - set(removal.changed)
    assert {id(p) for p in optimizer.state} < before
    model(x).square().sum().backward()
    optimizer.step()
    assert set(optimizer.state) == set(left)


def test_a_closed_gate_runs_nothing_and_leaves_batch_norm_alone():
    model = small(2, norm=True).train()
    runs = []
    for gated in gates_of(model).values():
        gated.block.register_forward_hook(lambda *_: runs.append(torch.is_grad_enabled()))
    before = copy.deepcopy(model.state_dict())
    gates = list(gates_of(model).values())
    x, _ = samples(48)
    with open_gates(gates, [False, False]):
        model(x).sum().backward()
    assert runs == [] and all(p.grad is None for g in gates for p in g.block.parameters())
    # (27) wants a closed block's output: forward only, and without a trace.
    xi = torch.zeros(2, requires_grad=True)
    with open_gates(gates, [False, False], xi):
        model(x).sum().backward()
    assert runs == [False, False] and xi.grad.abs().min() > 0
    assert all(p.grad is None for g in gates for p in g.block.parameters())
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert all(g.block[1].track_running_stats for g in gates)


def test_skips():
    x = torch.randn(2, 4, 6, 6, generator=torch.Generator().manual_seed(0))
    assert torch.equal(stacked()(x), torch.cat([x, x], 1))
    got = padded(4, 7, 2)(x)
    assert got.shape == (2, 7, 3, 3) and torch.equal(got[:, 1:5], x[:, :, ::2, ::2])
    assert not got[:, 0].any() and not got[:, 5:].any()
    assert torch.equal(padded(4, 4)(x), x)
    with pytest.raises(ValueError, match="out_channels: got 3, want 4 or more"):
        padded(4, 3)
    assert pointwise(4, 5, 2).bias is None and dense(4, 5).bias is None


def test_shapes_that_cannot_be_skipped_are_errors():
    x, _ = samples(12)
    wide = gate(nn.Linear(6, 8))
    with (
        open_gates([wide], [True], torch.ones(1)),
        pytest.raises(ValueError, match=r"the block gives \(12, 8\), but its skip gives \(12, 6\)"),
    ):
        wide(x)
    # What addition would broadcast is refused too.
    single = gate(nn.Linear(6, 1))
    with open_gates([single], [False], torch.zeros(1)), pytest.raises(ValueError, match="skip"):
        single(x)
    single.switch.pattern = (True, False)
    with pytest.raises(ValueError, match="skip"):
        single(x)


def test_gate_refuses_what_it_cannot_gate():
    with pytest.raises(ValueError, match="ReLU has no weights to prune"):
        gate(nn.ReLU())
    with pytest.raises(ValueError, match="Sequential is gated already"):
        gate(small())


@pytest.mark.parametrize(
    ("model", "parameters"),
    [
        (lambda: dense_network(10), 170_410),
        (lambda: dense_network(20), 271_410),
        (lambda: dense_network(50), 574_410),
        (lambda: dense_network(2), 89_610),
        (lambda: deep_lenet(40), 183_544),
        (lambda: deep_lenet(10), 73_714),
    ],
)
def test_the_papers_parameter_counts(model, parameters):
    assert size(model()) == parameters


def test_the_large_networks_have_the_papers_sizes():
    with torch.device("meta"):
        resnet56, resnet110 = resnet_cifar(56), resnet_cifar(110)
        counts = {name: size(m) for name, m in (("vgg", vgg16()), ("50", resnet50()))}
    assert len(gates_of(resnet56)) == 27 and len(gates_of(resnet110)) == 54
    assert 14.9e6 < counts["vgg"] < 15.1e6  # 'around 15 million'
    assert 25.4e6 < counts["50"] < 25.7e6  # 'around 25.6 million'
    assert len(gates_of(dense_network(10))) == 9 and len(gates_of(deep_lenet(10))) == 8


def test_many_dense_blocks_do_not_drown_what_comes_into_them():
    x = torch.rand(64, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    with seeded(0, CPU), torch.no_grad():
        network = dense_network(50)
        first, last = network[:3](x), network[:-1](x)
    assert 0.8 < last.norm() / first.norm() < 2  # 800 with torch's own weights


def test_architectures_refuse_impossible_sizes():
    with pytest.raises(ValueError, match="layers: got 1: the first is not gated, want 2 or more"):
        dense_network(1)
    with pytest.raises(ValueError, match="layers: got 7, want an even number, 4 or more"):
        deep_lenet(7)
    with pytest.raises(ValueError, match=r"depth: got 57, want 6 n \+ 2 with n at least 1"):
        resnet_cifar(57)
    with pytest.raises(ValueError, match="kind: got 'v3', want one of wbaw, resnet, resnet-v2"):
        resnet_cifar(8, kind="v3")
    with pytest.raises(ValueError, match="skip: got 'none', want one of padded, pointwise"):
        resnet_cifar(8, skip="none")


@pytest.mark.parametrize("name", NETWORKS)
def test_ungated_networks_are_plain_and_describable(name):
    make, x = NETWORKS[name]
    with seeded(0, CPU):
        model = randomised(make())
    with torch.no_grad():
        wanted = model(x)
    plain = ungate(model)
    assert not gates_of(plain) and len(weights(plain)) > 0
    with torch.no_grad():
        assert torch.equal(plain(x), wanted)
    rebuilt = build_module(describe_module(plain))
    rebuilt.load_state_dict(plain.state_dict(), assign=True)
    with torch.no_grad():
        assert torch.equal(rebuilt.eval()(x), wanted)
