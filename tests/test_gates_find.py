"""Finding the residual blocks of networks as people write them."""

import copy

import pytest
import torch
from networks import samples
from torch import nn
from torch.nn import functional

from retrain.adapters.files.description import describe_module
from retrain.trainers.gates.find import gate_network
from retrain.trainers.gates.gradients import open_gates
from retrain.trainers.gates.network import gates_of, ungate


class BasicBlock(nn.Module):
    """As in torchvision."""

    def __init__(self, n_in, n_out, stride=1):
        super().__init__()
        self.conv1 = nn.Conv2d(n_in, n_out, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(n_out)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(n_out, n_out, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(n_out)
        self.downsample = None
        if n_in != n_out:
            self.downsample = nn.Sequential(
                nn.Conv2d(n_in, n_out, 1, stride, bias=False), nn.BatchNorm2d(n_out)
            )

    def forward(self, x):
        identity = x
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        if self.downsample is not None:
            identity = self.downsample(x)
        out += identity
        return self.relu(out)


class PaddedBlock(BasicBlock):
    """With functions, and shortcuts that pad."""

    def __init__(self, n_in, n_out, stride=1):
        super().__init__(n_in, n_out, stride)
        self.extra, self.stride = (n_out - n_in) // 2, stride

    def forward(self, x):
        out = functional.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        if self.extra:
            x = functional.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.extra, self.extra))
        return functional.relu(torch.add(out, x))


class ResNet(nn.Module):
    def __init__(self, block):
        super().__init__()
        self.conv1, self.bn1, self.relu = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()
        self.layer1 = nn.Sequential(block(4, 4), block(4, 4))
        self.layer2 = nn.Sequential(block(4, 8, 2), block(8, 8))
        self.avgpool = nn.AdaptiveAvgPool2d((1, 1))
        self.fc = nn.Linear(8, 5)

    def forward(self, x):
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.avgpool(self.layer2(self.layer1(x)))
        return self.fc(torch.flatten(x, 1))


class ViewResNet(ResNet):
    def forward(self, x):
        x = self.layer2(self.layer1(functional.relu(self.bn1(self.conv1(x)))))
        out = functional.adaptive_avg_pool2d(x, 1)
        return self.fc(out.view(out.size(0), -1))


class Transformer(nn.Module):
    """Pre-norm: two sums a block, one inside the attention's own."""

    def __init__(self):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(6), nn.LayerNorm(6)
        self.mix = nn.Linear(6, 6)
        self.mlp = nn.Sequential(nn.Linear(6, 12), nn.GELU(), nn.Linear(12, 6))
        self.head = nn.Linear(6, 3)

    def forward(self, x):
        x = x + self.mix(self.norm1(x))
        x = x + self.mlp(self.norm2(x))
        return self.head(x) + 1


IMAGES = torch.randn(2, 3, 12, 12, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("network", [ResNet, ViewResNet])
def test_a_resnet_becomes_a_sequential_of_gated_blocks(network):
    model = network(BasicBlock).eval()
    before = copy.deepcopy(model.state_dict())
    wanted = model(IMAGES)
    gated = gate_network(model)
    assert torch.equal(gated(IMAGES), wanted)
    gates = list(gates_of(gated).values())
    assert len(gates) == 4 and all(isinstance(g.after, nn.ReLU) for g in gates)
    assert [type(g.skip) for g in gates] == [nn.Identity, nn.Identity, nn.Sequential, nn.Identity]
    assert all(
        [type(m) for m in g.block]
        == [nn.Conv2d, nn.BatchNorm2d, nn.ReLU, nn.Conv2d, nn.BatchNorm2d]
        for g in gates
    )
    assert isinstance(gated, nn.Sequential)
    # A copy: neither tensors nor modes are shared.
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert not {id(p) for p in model.parameters()} & {id(p) for p in gated.parameters()}
    assert not gated.training and gate_network(model.train()).training
    plain = ungate(gated)
    assert torch.equal(plain(IMAGES), wanted)
    assert describe_module(plain)["kind"] == "Sequential"


def test_a_closed_gate_skips_the_block_that_was_found():
    model = ResNet(BasicBlock).eval()
    gated = gate_network(model)
    gates = list(gates_of(gated).values())
    with open_gates(gates, [True, False, True, True]):
        got = gated(IMAGES)
    model.layer1[1] = nn.Identity()
    torch.testing.assert_close(got, model(IMAGES))


def test_skips_that_pad_by_functions_are_found():
    model = ResNet(PaddedBlock).eval()
    gated = gate_network(model)
    gates = list(gates_of(gated).values())
    assert len(gates) == 4 and isinstance(gates[2].skip, torch.fx.GraphModule)
    assert torch.equal(gated(IMAGES), model(IMAGES))
    with open_gates(gates, [False] * 4):
        assert gated(IMAGES).shape == (2, 5)


def test_sums_one_after_the_other_are_each_a_block():
    model = Transformer()
    x, _ = samples(5)
    gated = gate_network(model)
    gates = list(gates_of(gated).values())
    assert len(gates) == 2 and torch.equal(gated(x), model(x))
    with open_gates(gates, [False, False]):
        torch.testing.assert_close(gated(x), model.head(x) + 1)


class Leaky(nn.Module):
    """Not residual: what is inside the way is used after the sum too."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x):
        inner = self.a(x)
        return (x + self.b(inner)) * inner


class Twofold(nn.Module):
    """Not residual: two layers on either way."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x):
        return self.a(self.b(x)) + self.b(self.a(x).relu())


class Branchy(nn.Module):
    def forward(self, x):
        return x if x.sum() > 0 else -x


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (nn.Sequential(nn.Linear(6, 6), nn.ReLU()), "Sequential has no residual block"),
        (Leaky(), "Leaky has no residual block"),
        (Twofold(), "Twofold has no residual block"),
        (Branchy(), "Branchy cannot be traced"),
    ],
)
def test_what_has_no_residual_block_is_an_error(model, message):
    with pytest.raises(ValueError, match=message):
        gate_network(model)
