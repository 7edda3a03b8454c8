"""Architectures as JSON: what is described is built again, and nothing else is."""

import json

import pytest
import torch
from torch import nn

from retrain.adapters.files.blocks import PadChannels, StackChannels, Sum
from retrain.adapters.files.description import build_module, describe_module, load_described
from retrain.adapters.files.save import save_model


def residual(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, padding="same", bias=False),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        Sum(nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.Tanh()), nn.Identity()),
        Sum(nn.Conv2d(4, 8, 3, stride=2, padding=1), PadChannels(2, 2, stride=2)),
        Sum(nn.Conv2d(8, 16, 1), StackChannels(2)),
        nn.MaxPool2d(2),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Dropout(0.3),
        nn.LayerNorm(16),
        nn.Linear(16, 5),
    )


def test_what_is_described_and_saved_is_loaded_to_the_same_outputs(tmp_path):
    model = residual().eval()
    save_model(model, tmp_path / "m.safetensors")
    description = json.loads(json.dumps(describe_module(model)))
    again = load_described(description, tmp_path / "m.safetensors")
    x = torch.randn(2, 3, 8, 8)
    assert torch.equal(again(x), model(x))
    assert list(again.state_dict()) == list(model.state_dict())
    assert describe_module(again) == description
    assert not again.training


def test_the_skips_by_hand():
    x = torch.arange(2 * 3 * 4 * 4, dtype=torch.float32).reshape(2, 3, 4, 4)
    padded = PadChannels(1, 2, stride=2)(x)
    assert padded.shape == (2, 6, 2, 2)
    assert torch.equal(padded[:, 1:4], x[:, :, ::2, ::2])
    assert not padded[:, [0, 4, 5]].any()
    assert torch.equal(StackChannels(3)(x), torch.cat([x, x, x], 1))
    assert torch.equal(
        PadChannels(0, 1)(x[:, :, 0, 0]), torch.nn.functional.pad(x[:, :, 0, 0], (0, 1))
    )
    assert torch.equal(Sum(nn.Identity(), nn.ReLU(), nn.Identity())(x), 3 * x)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: PadChannels(-1, 0), r"before: got -1, want a whole number >= 0"),
        (lambda: PadChannels(0, 0, 0), r"stride: got 0, want a whole number >= 1"),
        (lambda: StackChannels(True), r"copies: got True, want a whole number >= 1"),
        (lambda: Sum(), r"branches: want at least one"),
    ],
)
def test_blocks_refuse(make, message):
    with pytest.raises(ValueError, match=message):
        make()


class Own(nn.Linear):
    """A subclass may compute anything."""


def hooked():
    model = nn.Sequential(nn.Linear(2, 2))
    model[0].register_forward_hook(lambda *_: None)
    return model


def twice():
    layer = nn.Linear(2, 2)
    return nn.Sequential(layer, layer)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: nn.Sequential(nn.ReLU(), Own(2, 2)), r"1 \(Own\) cannot be described"),
        (hooked, r"0 \(Linear\) has hooks"),
        (twice, r"1 \(Linear\) stands in two places, also as 0"),
    ],
)
def test_what_cannot_be_described_is_named(make, message):
    with pytest.raises(ValueError, match=message):
        describe_module(make())


LINEAR = {"in_features": 2, "out_features": 3, "bias": True}


@pytest.mark.parametrize(
    ("description", "message"),
    [
        ([], r"description: model: got \[\], want an object with a kind"),
        ({"kind": "system"}, r"no such kind 'system'"),
        ({"kind": "Linear", "arguments": {}}, r"Linear wants the arguments in_features"),
        ({"kind": "Linear", "arguments": {**LINEAR, "x": 1}}, r"Linear wants the arguments"),
        (
            {"kind": "Linear", "arguments": {**LINEAR, "bias": {}}},
            r"description: model\.bias: got \{\}, want a number, a word or a list",
        ),
        ({"kind": "Linear", "arguments": {**LINEAR, "in_features": "2"}}, r"cannot be made"),
        ({"kind": "Linear", "arguments": LINEAR, "code": "x"}, r"unknown key 'code'"),
        ({"kind": "Sequential"}, r"a Sequential wants modules"),
        ({"kind": "Sequential", "modules": {"a.b": {"kind": "ReLU"}}}, r"has a dot"),
        ({"kind": "Sum", "modules": {"1": {"kind": "ReLU"}}}, r"are called 0, 1"),
    ],
)
def test_a_damaged_description_is_refused(description, message):
    with pytest.raises(ValueError, match=message):
        build_module(description)


def test_a_description_without_end_is_refused():
    deep = {"kind": "ReLU"}
    for _ in range(100):
        deep = {"kind": "Sequential", "modules": {"0": deep}}
    with pytest.raises(ValueError, match="more than 32 levels"):
        build_module(deep)


def test_a_huge_layer_takes_no_memory_until_the_file_has_it(tmp_path):
    huge = {"in_features": 10**9, "out_features": 10**6, "bias": False}
    save_model(nn.Sequential(nn.Linear(2, 2, bias=False)), tmp_path / "m.safetensors")
    description = {"kind": "Sequential", "modules": {"0": {"kind": "Linear", "arguments": huge}}}
    with pytest.raises(ValueError, match=r"'0.weight' has shape \(2, 2\) in the file"):
        load_described(description, tmp_path / "m.safetensors")
