"""A torch module as a stream: rows against hand computation, commits, convolutions, errors."""

import copy

import numpy as np
import pytest
import torch
from networks import dense
from torch import nn
from torch.nn import functional

from retrain.adapters.files.load import load_model
from retrain.adapters.files.plain import is_plain
from retrain.adapters.files.save import save_model
from retrain.adapters.network.capture import CaptureError
from retrain.adapters.network.hooked import HookedStream
from retrain.adapters.network.open import open_network
from retrain.adapters.network.stream import TorchStream
from retrain.data.arrays import Data
from retrain.stream.stream import LayerSpec, collect


def relu_net(dtype=torch.float32, seed=0):
    torch.manual_seed(seed)
    layers = [nn.Linear(6, 5), nn.ReLU(), nn.Dropout(0.5), nn.Linear(5, 4, bias=False)]
    return nn.Sequential(*layers, nn.ReLU(), nn.Linear(4, 3)).to(dtype)


def samples(*shape, seed=0, dtype=np.float32):
    return np.random.default_rng(seed).normal(size=shape).astype(dtype)


def with_ones(rows):
    return torch.cat([rows, torch.ones(len(rows), 1, dtype=rows.dtype)], dim=1)


def torch_equal(a, b):
    return all(
        torch.equal(getattr(a, name), getattr(b, name))
        for name in ("inputs", "dense_inputs", "responses")
    ) and np.array_equal(a.rows, b.rows)


def test_rows_are_those_of_a_computation_by_hand():
    model, x = relu_net(), samples(23, 6)
    stream = TorchStream(model, x, batch_size=5)
    inputs = torch.tensor(x)
    for name in ("0", "3", "5"):
        layer = model[int(name)]
        batch = collect(stream, name)
        expected = with_ones(inputs) if layer.bias is not None else inputs
        torch.testing.assert_close(batch.dense_inputs, expected)
        torch.testing.assert_close(batch.inputs, expected)
        torch.testing.assert_close(batch.responses, layer(inputs).detach())
        torch.testing.assert_close(expected @ stream.weight(name), batch.responses)
        assert np.array_equal(batch.rows, np.arange(23)) and batch.rows.dtype == np.int64
        assert stream.count(name) == 23
        inputs = torch.relu(layer(inputs)).detach()
    model.eval()
    torch.testing.assert_close(torch.cat(list(stream.outputs(dense=True))), model(torch.tensor(x)))


def test_batches_repeat_to_the_last_bit_and_slices_are_slices():
    stream = TorchStream(relu_net(), samples(50, 6), batch_size=16)
    stream.commit("0", 0.5 * stream.weight("0"))
    whole = collect(stream, "3")
    assert torch_equal(collect(stream, "3"), whole)
    rows = np.array([0, 1, 15, 16, 40, 49])
    part = collect(stream, "3", rows=rows)
    for name in ("inputs", "dense_inputs", "responses"):
        assert torch.equal(getattr(part, name), getattr(whole, name)[rows])
    assert np.array_equal(part.rows, rows)
    assert [len(batch.rows) for batch in stream.batches("3", rows=rows)] == [3, 1, 1, 1]
    with pytest.raises(ValueError, match="no rows"):
        collect(stream, "3", rows=np.array([], dtype=int))


def test_commit_reaches_later_inputs_and_no_dense_ones():
    model, x = relu_net(), samples(12, 6)
    before = copy.deepcopy(model.state_dict())
    stream = TorchStream(model, x)
    old = collect(stream, "5")
    new = torch.randn(7, 5)
    stream.commit("0", new.numpy())  # numpy is taken too
    assert torch.equal(stream.weight("0"), new)
    assert torch.equal(stream.weight("0", dense=True)[:-1], before["0.weight"].T)
    after = collect(stream, "5")
    assert torch.equal(after.dense_inputs, old.dense_inputs)
    assert torch.equal(after.responses, old.responses)
    hidden = torch.relu(torch.relu(with_ones(torch.tensor(x)) @ new) @ before["3.weight"].T)
    torch.testing.assert_close(after.inputs, with_ones(hidden))
    own = collect(stream, "0")  # a layer's own inputs come before its weights
    assert torch.equal(own.inputs, own.dense_inputs)
    expected = hidden @ before["5.weight"].T + before["5.bias"]
    torch.testing.assert_close(torch.cat(list(stream.outputs(dense=False))), expected)
    assert torch.equal(stream.model[0].weight, new[:-1].T) and not stream.model.training
    assert all(torch.equal(model.state_dict()[key], value) for key, value in before.items())
    assert model.training


def test_weights_handed_out_are_copies():
    stream = TorchStream(relu_net(), samples(3, 6))
    for name in ("0", "3"):  # with a bias and without
        stream.weight(name).zero_()
        assert stream.weight(name).abs().sum() > 0


@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16])
def test_half_types_are_computed_in_float32_and_saved_as_they_were(half):
    model = relu_net(half)
    stream = TorchStream(model, samples(9, 6))
    assert stream.weight("0").dtype == torch.float32
    assert torch.equal(stream.weight("0")[:-1], model[0].weight.float().T)
    new = torch.full((7, 5), 1 / 3)
    stream.commit("0", new)
    assert stream.model[0].weight.dtype == half
    assert torch.equal(stream.weight("0"), new.to(half).float())  # as it was cast
    later = collect(stream, "3")
    assert later.inputs.dtype == torch.float32
    received = collect(stream, "0").inputs
    torch.testing.assert_close(later.inputs, torch.relu(received @ new.to(half).float()))
    if half == torch.float16:
        with pytest.raises(ValueError, match=r"NaN or infinity in torch\.float16"):
            stream.commit("0", torch.full((7, 5), 1e6))


def test_float64_stays():
    stream = TorchStream(relu_net(torch.float64), samples(4, 6))
    batch = collect(stream, "5")
    assert batch.inputs.dtype == batch.responses.dtype == torch.float64


def test_images_go_flat_into_a_dense_network_only():
    x = samples(5, 1, 2, 3)
    stream = TorchStream(relu_net(), Data(x, None, "images"))
    assert torch.equal(collect(stream, "0").inputs[:, :-1], torch.tensor(x).flatten(1))
    model = nn.Sequential(nn.Linear(3, 2), nn.Flatten(), nn.Linear(4, 2))
    tokens = TorchStream(model, x)
    assert TorchStream(relu_net(), x).shaped(x).shape == (5, 6)
    assert TorchStream(model, x).shaped(x).shape == x.shape
    assert tokens.count("0") == 10 and tokens.count("2") == 5  # rows of width 3 stay as they are


def test_tokens_have_a_row_each():
    model = dense(4, 3, 2)
    x = samples(7, 5, 4)
    stream = TorchStream(model, x, batch_size=3)
    assert stream.count("2") == 35
    batch = collect(stream, "2", rows=np.array([0, 4, 5, 34]))
    hidden = torch.relu(model[0](torch.tensor(x))).reshape(35, 3).detach()
    torch.testing.assert_close(batch.inputs[:, :-1], hidden[[0, 4, 5, 34]])


def test_tokens_merged_with_samples():
    class Merged(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(4, 3)

        def forward(self, x):
            return self.a(x.reshape(-1, 4)).reshape(-1, 5, 3)

    x = samples(7, 5, 4)
    stream = TorchStream(Merged(), x, batch_size=3)
    assert stream.count("a") == 35
    rows = np.array([3, 16, 17, 34])
    expected = torch.tensor(x).reshape(35, 4)[rows]
    assert torch.equal(collect(stream, "a", rows=rows).inputs[:, :-1], expected)


def test_a_network_that_mixes_samples_has_no_bound():
    class Centred(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x):
            z = self.a(x)
            return self.b(z - z.mean(0))

    stream = TorchStream(Centred(), samples(6, 4))
    assert all(spec.reason is None for spec in stream.layers)
    assert "other samples of its batch" in stream.mixes
    assert stream.gain("a").value is None and stream.gain("a").reason


def test_in_place_modules_spoil_nothing():
    model = nn.Sequential(
        nn.ReLU(inplace=True), nn.Linear(3, 3), nn.ReLU(inplace=True), nn.Linear(3, 2)
    )
    x = samples(8, 3)
    kept = x.copy()
    stream = TorchStream(model, x)
    batch = collect(stream, "1")
    assert np.array_equal(x, kept) and torch_equal(collect(stream, "1"), batch)
    assert (batch.responses < 0).any()  # the response before the ReLU that overwrites it
    assert torch.equal(batch.inputs[:, :-1], torch.relu(torch.tensor(x)))


CONVOLUTIONS = [
    {"kernel_size": 3},
    {"kernel_size": (2, 3), "stride": (2, 1), "padding": (1, 2)},
    {"kernel_size": 3, "padding": "same", "dilation": 2},
    {"kernel_size": (2, 4), "padding": "same"},
    {"kernel_size": 3, "padding": "valid", "stride": 2},
    {"kernel_size": 3, "padding": "valid"},
    {"kernel_size": 3, "groups": 2, "padding": 1, "bias": False},
    {"kernel_size": 1, "groups": 4},
    {"kernel_size": (3, 1), "stride": 3, "dilation": (1, 2), "groups": 2},
]


def padding(conv):
    """Pixels before the first row and column; "same" adds the odd one at the end."""
    if conv.padding == "valid":
        return 0, 0
    if conv.padding == "same":
        return [d * (k - 1) // 2 for d, k in zip(conv.dilation, conv.kernel_size, strict=True)]
    return conv.padding


def as_dense(conv, height, width):
    """The convolution as one matrix on the flattened image, entry by entry from the definition.

    Z[o, r, c] = sum K[o, i, a, b] X[i, r·s + a·d − top, c·s + b·d − left].
    """
    top, left = padding(conv)
    image = torch.zeros(1, conv.in_channels, height, width)
    _, c_out, rows, columns = conv(image).shape
    matrix = np.zeros((c_out, rows, columns, conv.in_channels, height, width))
    kernel = conv.weight.detach().numpy()
    per_in, per_out = conv.in_channels // conv.groups, c_out // conv.groups
    for o, r, c in np.ndindex(c_out, rows, columns):
        for i, a, b in np.ndindex(kernel.shape[1:]):
            y = r * conv.stride[0] + a * conv.dilation[0] - top
            x = c * conv.stride[1] + b * conv.dilation[1] - left
            if 0 <= y < height and 0 <= x < width:
                matrix[o, r, c, (o // per_out) * per_in + i, y, x] += kernel[o, i, a, b]
    return matrix.reshape(c_out * rows * columns, -1)


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@pytest.mark.parametrize("options", CONVOLUTIONS)
def test_a_convolution_is_a_dense_layer_over_patches(options):
    torch.manual_seed(1)
    conv = nn.Conv2d(4, 8, **options)
    x = samples(5, 4, 6, 7, seed=2)
    stream = TorchStream(nn.Sequential(conv, nn.ReLU(), nn.Flatten()), x, batch_size=2)
    (spec,) = stream.layers
    kernel = conv.kernel_size[0] * conv.kernel_size[1]
    assert spec == LayerSpec(
        "0", "conv2d", (4 // conv.groups * kernel, 8 // conv.groups), conv.bias is not None,
        "relu", conv.groups,
    )  # fmt: skip
    dense = torch.tensor(as_dense(conv, 6, 7), dtype=torch.float32)
    images = torch.tensor(x).flatten(1) @ dense.T
    response = conv(torch.tensor(x)).detach()
    _, _, height, width = response.shape
    bias = 0 if conv.bias is None else conv.bias.detach()[:, None, None]
    torch.testing.assert_close(
        images.reshape(response.shape) + bias, response, atol=1e-5, rtol=1e-5
    )
    assert stream.count("0") == 5 * height * width
    for group in range(conv.groups):
        batch = collect(stream, "0", group)
        mine = response.chunk(conv.groups, dim=1)[group]
        rows = mine.permute(0, 2, 3, 1).reshape(-1, spec.shape[1])
        torch.testing.assert_close(batch.responses, rows)
        torch.testing.assert_close(
            batch.dense_inputs @ stream.weight("0", group), rows, atol=1e-5, rtol=1e-5
        )
        some = np.array([0, 3, height * width, 5 * height * width - 1])
        part = collect(stream, "0", group, rows=some)
        assert torch.equal(part.inputs, batch.inputs[some]) and np.array_equal(part.rows, some)
        assert torch.equal(part.responses, batch.responses[some])


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_commit_to_a_grouped_convolution(memory_format):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(4, 6, 3, groups=2), nn.ReLU(), nn.Conv2d(6, 2, 2))
    model = model.to(memory_format=memory_format)
    x = samples(3, 4, 6, 6)
    stream = TorchStream(model, x)
    new = torch.randn(19, 3)
    kept = stream.weight("0", 0)
    stream.commit("0", new, 1)
    assert torch.equal(stream.weight("0", 1), new) and torch.equal(stream.weight("0", 0), kept)
    kernel = model[0].weight.detach().clone()
    kernel[3:] = new[:-1].T.reshape(3, 2, 3, 3)
    bias = torch.cat([model[0].bias[:3].detach(), new[-1]])
    hidden = torch.relu(functional.conv2d(torch.tensor(x), kernel, bias, groups=2))
    later = collect(stream, "2")
    expected = functional.unfold(hidden, 2).transpose(1, 2).reshape(-1, 24)
    torch.testing.assert_close(later.inputs[:, :-1], expected)
    assert not torch.allclose(later.inputs, later.dense_inputs)


def test_convolution_rows_come_in_bounded_pieces(monkeypatch):
    monkeypatch.setattr("retrain.adapters.network.stream.BLOCK", 2 * 16 * 10)
    stream = TorchStream(nn.Sequential(nn.Conv2d(1, 2, 3)), samples(7, 1, 6, 6), batch_size=5)
    pieces = list(stream.batches("0"))
    assert [len(piece.rows) for piece in pieces] == [32, 32, 16, 32]  # 16 rows a sample
    assert np.array_equal(np.concatenate([piece.rows for piece in pieces]), np.arange(112))
    rows = np.array([0, 31, 32, 80, 111])
    parts = list(stream.batches("0", rows=rows))
    assert [list(part.rows) for part in parts] == [[0, 31], [32], [80, 111]]
    whole = torch.cat([piece.inputs for piece in pieces])
    assert torch.equal(torch.cat([part.inputs for part in parts]), whole[rows])


def test_fingerprint_covers_weights_data_and_layers():
    x = samples(4, 6)
    prints = [TorchStream(relu_net(), x).fingerprint for _ in range(2)]
    assert prints[0] == prints[1]
    changed = relu_net()
    with torch.no_grad():
        changed[3].weight[0, 0] += 1e-7
    prints.append(TorchStream(changed, x).fingerprint)
    prints.append(TorchStream(relu_net(torch.float64), x).fingerprint)
    prints.append(TorchStream(relu_net(), x + np.float32(1e-6)).fingerprint)
    other = relu_net()
    other[1] = nn.Tanh()
    prints.append(TorchStream(other, x).fingerprint)
    assert len(set(prints)) == 5
    stream = TorchStream(relu_net(), x)
    stream.commit("0", torch.zeros(7, 5))
    assert stream.fingerprint == prints[0]  # of the given network


def test_a_convolution_of_the_whole_image_equals_the_dense_layer():
    """Same rows, same weights, same responses: a kernel as large as the image is a dense layer."""
    torch.manual_seed(3)
    conv = nn.Conv2d(2, 5, (3, 4))
    dense = nn.Linear(24, 5)
    dense.load_state_dict({"weight": conv.weight.flatten(1), "bias": conv.bias})
    x = samples(9, 2, 3, 4)
    a, b = TorchStream(nn.Sequential(conv), x), TorchStream(nn.Sequential(dense), x)
    assert torch.equal(a.weight("0"), b.weight("0"))
    assert torch.equal(collect(a, "0").inputs, collect(b, "0").inputs)
    torch.testing.assert_close(collect(a, "0").responses, collect(b, "0").responses)


def test_residual_network_is_streamed_and_what_cannot_be_is_left():
    class Residual(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(2, 2, 3, padding=1)
            self.norm = nn.BatchNorm2d(2)
            self.head = nn.Linear(2, 3)

        def forward(self, x):
            x = torch.relu(self.norm(self.conv(x)) + x)
            return self.head(x.mean((2, 3)))

    stream = TorchStream(Residual(), samples(4, 2, 5, 5))
    assert [spec.reason for spec in stream.layers] == [
        None, "BatchNorm2d layers are not retrained", None,
    ]  # fmt: skip
    stream.commit("conv", torch.zeros(19, 2))
    later = collect(stream, "head")
    mean = torch.relu(torch.tensor(samples(4, 2, 5, 5))).mean((2, 3))
    torch.testing.assert_close(later.inputs[:, :-1], mean)


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda s: s.weight("no"), "name: no layer is called 'no'"),
        (lambda s: s.batches("1"), "name: layer '1' cannot be retrained: BatchNorm1d"),
        (lambda s: s.commit("1", torch.zeros(2, 2)), "cannot be retrained"),
        (lambda s: s.count("1"), "cannot be retrained"),
        (lambda s: s.weight("0", 1), "group: got 1, layer '0' has 1"),
        (lambda s: s.weight("0", -1), "group: got -1"),
        (lambda s: s.commit("0", torch.zeros(4, 4)), r"weight: got shape \(4, 4\).*\(5, 4\)"),
        (lambda s: s.commit("0", np.full((5, 4), np.nan)), "got NaN or infinity in torch.float32"),
        (lambda s: s.commit("0", np.full((5, 4), 1e300)), "got NaN or infinity in torch.float32"),
        (lambda s: s.batches("0", rows=np.array([2, 1])), "rows: want different row numbers"),
        (lambda s: s.batches("0", rows=np.array([1, 1])), "rows: want different row numbers"),
        (lambda s: s.batches("0", rows=np.array([[0]])), "rows: want different row numbers"),
        (lambda s: s.batches("0", rows=np.array([0.5])), "rows: want different row numbers"),
        (lambda s: s.batches("0", rows=np.array([3, 6])), "rows: got 3 to 6, layer '0' has 6"),
        (lambda s: s.batches("0", rows=np.array([-1])), "rows: got -1 to -1"),
        (lambda s: s.gain("no"), "no layer is called"),
    ],
)
def test_errors_of_use(call, text):
    stream = TorchStream(nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)), samples(6, 4))
    with pytest.raises(ValueError, match=text):
        call(stream)


def poisoned(value, buffer=False):
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    with torch.no_grad():
        (model[1].running_var if buffer else model[0].weight).view(-1)[0] = value
    return model


@pytest.mark.parametrize(
    ("model", "x", "text"),
    [
        (relu_net(), samples(3, 7), "data: layer '0' wants 6 inputs and got 7; .* shape \\(7,\\)"),
        (relu_net(), samples(3, 1, 5, 5), "data: layer '0' wants 6 inputs and got 5"),
        (nn.Sequential(nn.Conv2d(3, 2, 2)), samples(3, 1, 5, 5), "wants images of 3 channels"),
        (nn.Sequential(nn.Conv2d(3, 2, 2)), samples(3, 20), "wants images of 3 channels"),
        (nn.Sequential(nn.Conv2d(1, 2, 9)), samples(3, 1, 5, 5), r"samples of shape \(1, 5, 5\): "),
        (nn.Sequential(nn.Flatten(2), nn.Linear(4, 1)), samples(3, 4), r"shape \(4,\): Dimension"),
        (nn.Sequential(nn.Linear(4, 2), nn.Flatten(0)), samples(3, 4), "first axis is the sample"),
        (poisoned(float("nan")), samples(3, 4), "model: '0.weight' has NaN or infinite entries"),
        (poisoned(float("inf")), samples(3, 4), "model: '0.weight' has NaN or infinite entries"),
        (poisoned(float("nan"), True), samples(3, 4), "model: '1.running_var' has NaN entries"),
        (nn.Sequential(nn.ReLU()), samples(3, 4), "model: Sequential has no weights"),
        (relu_net(), samples(0, 6), "data: .* is empty"),
        (relu_net(), samples(2, 6) * np.nan, "data: .* NaN or infinite samples"),
        (3, samples(2, 6), "model: got a int"),
    ],
)
def test_errors_at_the_start(model, x, text):
    with pytest.raises(ValueError, match=text) as caught:
        TorchStream(model, x)
    assert "\n" not in str(caught.value)


def test_batch_size_must_be_positive():
    with pytest.raises(ValueError, match="batch_size: got 0"):
        TorchStream(relu_net(), samples(2, 6), batch_size=0)


def test_a_network_that_cannot_be_captured_is_read_through_hooks():
    class Branch(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(4, 2)

        def forward(self, x):
            return self.a(x) if x.sum() > 0 else self.a(-x)

    with pytest.raises(CaptureError, match="data-dependent"):
        TorchStream(Branch(), samples(5, 4))
    stream = open_network(Branch(), samples(5, 4))
    assert isinstance(stream, HookedStream) and stream.layers[0].reason is None
    assert torch.cat(list(stream.outputs(dense=True))).shape == (5, 2)
    assert stream.gain("a").value is None and "data-dependent" in stream.gain("a").reason


def test_one_sample_alone():
    stream = TorchStream(relu_net(), samples(1, 6))
    assert stream.count("5") == 1 and len(collect(stream, "5").rows) == 1


def test_gradients_stay_on_for_who_reads_outputs():
    stream = TorchStream(relu_net(), samples(4, 6), batch_size=2)
    for output in stream.outputs(dense=True):
        assert torch.is_grad_enabled() and not output.requires_grad
    for batch in stream.batches("3"):
        assert torch.is_grad_enabled() and not batch.inputs.requires_grad


@pytest.mark.gpu
def test_on_a_gpu():
    x = samples(9, 6)
    here, there = TorchStream(relu_net(), x), TorchStream(relu_net(), x, device="cuda")
    there.commit("0", there.weight("0") * 0.5)
    here.commit("0", here.weight("0") * 0.5)
    a, b = collect(here, "5"), collect(there, "5")
    assert b.inputs.is_cuda and there.fingerprint == here.fingerprint
    torch.testing.assert_close(a.inputs, b.inputs.cpu(), atol=1e-5, rtol=1e-5)
    assert abs(here.gain("0").value / there.gain("0").value - 1) < 1e-6


class Plain(nn.Module):
    """Two dense layers, with what a forward function does around them."""

    def __init__(self, forward):
        super().__init__()
        self.a, self.b = nn.Linear(6, 5), nn.Linear(5, 2)
        self.apply_to = forward

    def forward(self, x):
        return self.apply_to(self, x)


def plainly(model, x):
    stream = TorchStream(model, x)
    return is_plain(stream.captured, stream.layers, stream.dense_model)


@pytest.mark.parametrize(
    ("forward", "plain"),
    [
        (lambda n, x: n.b(torch.relu(n.a(x))), True),
        (lambda n, x: n.b(n.a(x.view(-1, 6)).relu()), True),
        (lambda n, x: n.b(n.a(x.view(x.size(0), -1)).relu()), True),
        (lambda n, x: n.b(n.a(torch.flatten(x, 1)).relu()), True),
        (lambda n, x: n.b(functional.dropout(n.a(x), training=False).relu()), True),
        (lambda n, x: n.b(torch.relu(n.a(torch.relu(x)))), False),
        (lambda n, x: torch.relu(n.b(torch.relu(n.a(x)))), False),
        (lambda n, x: n.b(torch.tanh(n.a(x))), False),
        (lambda n, x: n.b(n.a(x)), False),
        (lambda n, x: n.b(torch.relu(n.a(2 * x))), False),
        (lambda n, x: n.b(torch.relu(n.a(x))) + 1, False),
        (lambda n, x: n.b(torch.relu(n.a(x)) + n.a.in_features), False),
        (lambda n, x: n.b(torch.relu(n.a(x.flip(1)))), False),
    ],
)
def test_plain_networks_are_those_that_their_tensors_give_back(tmp_path, forward, plain):
    x = samples(5, 6)
    stream = TorchStream(Plain(forward), x)
    assert is_plain(stream.captured, stream.layers, stream.dense_model) is plain
    save_model(stream.model, tmp_path / "m.safetensors")
    again = load_model(tmp_path / "m.safetensors").module(torch.tensor(x))
    same = torch.allclose(again, next(stream.outputs(dense=True)), atol=1e-6)
    assert same or not plain


def test_a_plain_chain_needs_a_telling_order_and_no_other_tensors():
    torch.manual_seed(0)
    chain = [nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6)]
    x = samples(5, 6)
    assert plainly(nn.Sequential(*chain), x)
    named = nn.Sequential()
    for name, module in zip(("last", "relu", "first"), chain, strict=True):
        named.add_module(name, module)
    assert not plainly(named, x)  # both orders fit
    assert not plainly(nn.Sequential(*chain, nn.BatchNorm1d(6)), x)
