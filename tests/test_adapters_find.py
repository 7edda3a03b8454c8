"""What is found in a torch module: order, what follows, and why some layers must stay."""

import pytest
import torch
from torch import nn
from torch.nn import functional

from retrain.adapters.network.open import layer_table


class Net(nn.Module):
    """Wrap a forward function of (net, x) and some modules."""

    def __init__(self, forward, **modules):
        super().__init__()
        for name, module in modules.items():
            self.add_module(name, module)
        self.apply_to = forward

    def forward(self, x):
        return self.apply_to(self, x)


def specs(model):
    return {found.spec.name: found.spec for found in layer_table(model)}


def linear(n_in=4, n_out=4, **options):
    return nn.Linear(n_in, n_out, **options)


def test_nested_modules_in_execution_order():
    inner = nn.Sequential(linear(5, 3, bias=False), nn.Dropout(0.3), nn.Identity(), nn.ReLU())
    model = Net(lambda net, x: net.head(net.body(x)), head=linear(3, 2), body=inner)
    table = layer_table(model)
    assert [(f.spec.name, f.spec.shape, f.spec.bias, f.spec.follows) for f in table] == [
        ("body.0", (5, 3), False, "relu"),
        ("head", (3, 2), True, "linear"),
    ]
    assert all(f.spec.reason is None and f.spec.kind == "linear" for f in table)
    assert [f.parameters for f in table] == [15, 8]
    assert [f.meets for f in table] == ["relu", "output"]
    assert table[0].spec.size == 15


@pytest.mark.parametrize(
    ("after", "meets"),
    [
        (lambda z: functional.relu(z), "relu"),
        (lambda z: functional.relu(z, inplace=True), "relu"),
        (lambda z: torch.relu(z), "relu"),
        (lambda z: z.relu(), "relu"),
        (lambda z: torch.relu(functional.dropout(z, training=False)), "relu"),
        (lambda z: torch.flatten(z, 1).relu(), "relu"),
        (lambda z: z.view(z.size(0), -1).relu(), "relu"),
        (lambda z: z.view(z.shape[0], -1).relu(), "relu"),
        (lambda z: functional.dropout(z, 0.5, False).relu(), "relu"),
        (lambda z: torch.dropout(z, 0.5, False).relu(), "relu"),
        (lambda z: torch.dropout(z, 0.0, True).relu(), "relu"),
        (lambda z: functional.dropout(z, p=0).relu(), "relu"),
        (lambda z: functional.max_pool1d(z[:, None], 2)[:, 0], "getitem"),
        (lambda z: functional.max_pool1d(z.unsqueeze(1), 2).squeeze(1).relu(), "relu"),
        (lambda z: functional.avg_pool1d(z.unsqueeze(1), 2).squeeze(1).relu(), "avg_pool1d"),
        (lambda z: functional.adaptive_avg_pool1d(z.unsqueeze(1), 2).relu(), "adaptive_avg_pool1d"),
        (lambda z: z.unsqueeze(1).mean(1).relu(), "mean"),
        (lambda z: torch.relu(-z), "neg"),
        (lambda z: z + torch.relu(z), "several operations"),
        (lambda z: torch.tanh(z), "tanh"),
        (lambda z: functional.relu6(z), "relu6"),
        (lambda z: functional.leaky_relu(z), "leaky_relu"),
        (lambda z: 2 * z, "mul"),
        (lambda z: z, "output"),
    ],
)
def test_what_follows(after, meets):
    found = layer_table(Net(lambda net, x: after(net.a(x)), a=linear()))[0]
    assert found.spec.reason is None
    if meets == "getitem":
        assert found.spec.follows == "linear"
        return
    assert found.meets == meets
    assert found.spec.follows == ("relu" if meets == "relu" else "linear")


IMAGES = {
    "avg_pool": lambda z: functional.avg_pool2d(z, 2),
    "avg_pool module": nn.AvgPool2d(2),
    "adaptive_avg_pool": lambda z: functional.adaptive_avg_pool2d(z, 2),
    "adaptive_avg_pool module": nn.AdaptiveAvgPool2d(1),
    "mean": lambda z: torch.mean(z, dim=(2, 3)),
    "max_pool": lambda z: functional.max_pool2d(z, 2),
    "max_pool module": nn.MaxPool2d(3, 1),
    "flatten": lambda z: torch.flatten(z, 1),
    "permute": lambda z: z.permute(0, 2, 3, 1),
    "reshape": lambda z: torch.reshape(z, (z.size(0), -1)),
    "clone": lambda z: z.clone(),
    "identity": nn.Identity(),
    "dropout": nn.Dropout(0.5),
    "batch_norm": nn.BatchNorm2d(3),
    "negate": lambda z: -z,
    "shift": lambda z: z + 1,
    "scale": lambda z: -2 * z,
    "tanh": torch.tanh,
    "hardtanh": nn.Hardtanh(),
    "softmax": nn.Softmax(1),
    "softplus": nn.Softplus(),
    "log_softmax": lambda z: functional.log_softmax(z, dim=1),
    "select": lambda z: z[:, :2],
    "pad with 1": lambda z: functional.pad(z, (1, 1), value=1.0),
    "cat": lambda z: torch.cat([z, -z], 1),
}


@pytest.mark.parametrize("name", IMAGES)
def test_a_relu_is_seen_only_across_what_commutes_with_it(name):
    """Otherwise the layer would be fitted to what the network never computes."""
    between = IMAGES[name]
    modules = {"between": between} if isinstance(between, nn.Module) else {}
    model = Net(
        lambda net, x: torch.relu((net.between if modules else between)(net.a(x))),
        a=nn.Conv2d(2, 3, 3),
        **modules,
    ).eval()
    found = layer_table(model)[0]
    with torch.no_grad():
        z = torch.randn(4, 3, 6, 6, generator=torch.Generator().manual_seed(0))
        commutes = torch.equal(between(torch.relu(z)), torch.relu(between(z)))
    assert found.spec.follows == "linear" or commutes
    # Not so wary that it would find no ReLU: those that pick or move entries are seen through.
    if "pool" in name or name in ("flatten", "permute", "reshape", "clone", "identity", "dropout"):
        assert (found.spec.follows == "relu") == commutes == ("avg" not in name)


def test_convolutions():
    model = nn.Sequential(
        nn.Conv2d(4, 6, (3, 5), groups=2), nn.MaxPool2d(2), nn.ReLU(), nn.Flatten(), linear(6, 2)
    )
    conv = layer_table(model, torch.zeros(2, 4, 4, 6))[0]
    assert (conv.spec.kind, conv.spec.shape, conv.spec.groups) == ("conv2d", (30, 3), 2)
    assert conv.spec.size == 180 == model[0].weight.numel()
    assert conv.spec.follows == "relu" and conv.spec.reason is None
    assert "4→6 channels, kernel 3x5" in conv.detail


def tied():
    a, b = linear(), linear()
    b.weight = a.weight
    return nn.Sequential(a, b)


def twice(module):
    return Net(lambda net, x: net.a(torch.relu(net.a(x))), a=module)


def hooked():
    a = linear()
    a.register_forward_pre_hook(lambda module, args: None)
    return nn.Sequential(a)


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.attend = nn.MultiheadAttention(4, 2, batch_first=True)

    def forward(self, x):
        return self.attend(x, x, x)[0]


class Own(nn.Linear):
    def forward(self, x):
        return super().forward(x) * 2


class Root(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(4))
        self.a = linear()

    def forward(self, x):
        return self.a(x * self.scale)


class TwoInputs(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = linear()

    def forward(self, x, mask):
        return self.a(x) * mask


@pytest.mark.parametrize(
    ("model", "name", "reason"),
    [
        (nn.Sequential(linear(), nn.BatchNorm1d(4)), "1", "BatchNorm1d layers are not retrained"),
        (nn.Sequential(nn.Embedding(5, 4), linear()), "0", "an embedding: its rows are looked up"),
        (tied(), "0", "used with different biases"),
        (Root(), "(root)", "Root uses its weights otherwise than as a matrix"),
        (Net(lambda n, x: n.a(x), a=linear(), b=linear()), "b", "does not reach it"),
        (
            Net(lambda n, x: functional.linear(n.a(x), n.a.weight), a=linear()),
            "a",
            "used with different biases",
        ),
        (
            Net(lambda n, x: functional.dropout(n.a(x)), a=linear()),
            "a",
            "random in evaluation mode",
        ),
        (
            nn.Sequential(linear(), nn.utils.parametrizations.weight_norm(linear())),
            "1",
            "its weight is parametrised",
        ),
    ],
)
def test_reasons(model, name, reason):
    spec = specs(model)[name]
    assert spec.reason is not None
    with pytest.raises(AssertionError, match=reason):
        raise AssertionError(spec.reason)


@pytest.mark.parametrize(
    ("model", "name"),
    [
        (nn.Sequential(nn.ConvTranspose2d(1, 2, 3)), "0"),
        (nn.Sequential(nn.Conv1d(1, 2, 3)), "0"),
        (nn.Sequential(nn.Conv3d(1, 2, 3)), "0"),
        (nn.Sequential(nn.Conv2d(1, 2, 3, padding=1, padding_mode="circular")), "0"),
        (nn.Sequential(Own(4, 4)), "0"),
        (Attention(), "attend.out_proj"),
        (nn.Sequential(nn.TransformerEncoderLayer(4, 2, batch_first=True)), "0.linear1"),
        (twice(linear()), "a"),
        (hooked(), "0"),
        (Net(lambda n, x: n.a(input=x), a=linear()), "a"),
        (Net(lambda n, x: n.a(x)[0], a=nn.LSTM(4, 3)), "a.weight_ih_l0"),
        (Net(lambda n, x: n.a(x) if x.sum() > 0 else n.a(-x), a=linear()), "a"),
    ],
)
def test_what_is_retrained(model, name):
    assert specs(model)[name].reason is None


def test_a_network_of_several_inputs_needs_data():
    with pytest.raises(ValueError, match=r"inputs are not known .*give some samples \(--data\)"):
        layer_table(TwoInputs())


@pytest.mark.parametrize(
    "forward",
    [
        lambda n, x: functional.dropout(n.a(x)),
        lambda n, x: functional.dropout(n.a(x), 0.5, True),
        lambda n, x: torch.dropout(n.a(x), 0.5, True),
        lambda n, x: torch.dropout(n.a(x), 0.5, train=True),
    ],
)
def test_a_network_that_draws_in_evaluation_mode_is_left(forward):
    reason = specs(Net(forward, a=linear()))["a"].reason
    assert "random in evaluation mode" in reason


@pytest.mark.parametrize(
    ("module", "shape"),
    [
        (nn.BatchNorm1d(4), (4, 1)),
        (nn.Bilinear(4, 4, 3), (16, 3)),
    ],
)
def test_shapes_are_those_of_the_largest_weight(module, shape):
    """Also of what is not retrained: the table shows where the network's weights are."""
    model = Net(lambda n, x: n.b(n.a(x)), a=linear(), b=linear(), c=module)
    assert specs(model)["c"].shape == shape


def test_a_reason_concerns_its_own_layer_only():
    found = specs(nn.Sequential(linear(), nn.BatchNorm1d(4), nn.ReLU(), linear()))
    assert [spec.reason is None for spec in found.values()] == [True, False, True]
    assert found["0"].follows == "relu"  # behind the folded norm
    assert specs(Root())["a"].reason is None


def test_default_arguments_are_kept():
    class Optional(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = linear(), linear()

        def forward(self, x, mask=None, depth=1):
            x = torch.relu(self.a(x))
            return x * mask if mask is not None else self.b(x)

    assert all(spec.reason is None for spec in specs(Optional()).values())


def test_the_module_is_left_alone():
    model = nn.Sequential(linear(), nn.Dropout(), nn.ReLU(), linear())
    model.train()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    layer_table(model)
    assert model.training and model[1].training
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize(
    ("model", "text"),
    [
        (3, "got a int, want a torch module"),
        (nn.Sequential(nn.ReLU()), "has no weights"),
        (linear(), "wrap it in torch.nn.Sequential"),
        (nn.Sequential(linear(device="meta")), "'0.weight' has no values yet"),
        (nn.Sequential(linear(), nn.LazyLinear(3)), "'1.weight' has no values yet"),
        (nn.Sequential(linear(dtype=torch.complex64)), "'0.weight' is of complex numbers"),
    ],
)
def test_errors(model, text):
    with pytest.raises(ValueError, match=f"model: .*{text}"):
        layer_table(model)


def test_a_module_that_cannot_be_copied():
    model = nn.Sequential(linear())
    model.extra = torch.ones(2, requires_grad=True) * 2
    with pytest.raises(ValueError, match="model: Sequential cannot be copied: Only Tensors"):
        layer_table(model)
