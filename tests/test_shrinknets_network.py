"""Switches in and out of networks: nothing changes when they come, go, or take a dead neuron."""

import copy
from collections import OrderedDict

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

from retrain.trainers.itp.architectures import lenet_5, vgg_like
from retrain.trainers.loop.masked import weights_of
from retrain.trainers.loop.states import mode, seeded
from retrain.trainers.shrinknets.cutting import cut_neurons
from retrain.trainers.shrinknets.fold import fold
from retrain.trainers.shrinknets.network import neurons_of, with_switches
from retrain.trainers.shrinknets.removal import remove_dead
from retrain.trainers.shrinknets.switches import (
    InputSwitch,
    Switch,
    regularised_penalty,
    switch_penalty,
    switches_of,
)


def dense():
    return nn.Sequential(nn.Linear(6, 9), nn.ReLU(), nn.Linear(9, 7), nn.Tanh(), nn.Linear(7, 3))


def dense_norm():
    return nn.Sequential(
        nn.Flatten(),
        *(nn.Linear(6, 9, bias=False), nn.BatchNorm1d(9), nn.LeakyReLU(0.2), nn.Dropout(0.3)),
        *(nn.Linear(9, 7), nn.BatchNorm1d(7, affine=False), nn.PReLU(7)),
        nn.Linear(7, 3),
    )


def convolutional():
    return nn.Sequential(
        *(nn.Conv2d(2, 5, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(5, 4, 3), nn.GELU(), nn.Flatten()),
        *(nn.Linear(16, 6), nn.ReLU(), nn.Linear(6, 3)),
    )


def convolutional_norm():
    """Nested, named, a normalisation also behind the flatten."""
    features = OrderedDict(
        conv1=nn.Conv2d(2, 5, 3, bias=False),
        norm1=nn.BatchNorm2d(5),
        relu1=nn.ReLU(),
        conv2=nn.Conv2d(5, 4, 3, padding=1, stride=2),
        norm2=nn.BatchNorm2d(4),
        relu2=nn.PReLU(),
        pool=nn.AvgPool2d(2, stride=1),
    )
    head = OrderedDict(flat=nn.Flatten(), fc1=nn.Linear(16, 6), relu=nn.ReLU(), fc2=nn.Linear(6, 3))
    return nn.Sequential(OrderedDict(features=nn.Sequential(features), head=nn.Sequential(head)))


def norm_behind_flatten():
    return nn.Sequential(
        nn.Conv1d(2, 5, 3), nn.ReLU(), nn.Flatten(), nn.BatchNorm1d(10), nn.Linear(10, 3)
    )


NETWORKS = {
    "dense": (dense, (6,)),
    "dense_norm": (dense_norm, (6,)),
    "convolutional": (convolutional, (2, 8, 8)),
    "convolutional_norm": (convolutional_norm, (2, 8, 8)),
    "norm_behind_flatten": (norm_behind_flatten, (2, 4)),
    "lenet_5": (lenet_5, (1, 28, 28)),
    "vgg_like": (vgg_like, (3, 32, 32)),
}
CASES = [(name, at) for name in NETWORKS for at in ("inputs", "outputs")]
for refused in ("norm_behind_flatten", "vgg_like"):  # below
    CASES.remove((refused, "outputs"))


def build(name):
    """Make the network, with normalisations that have seen data, and inputs for it."""
    make, shape = NETWORKS[name]
    with seeded(0, torch.device("cpu")):
        model = make()
        x = torch.randn(16, *shape)
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.running_mean.normal_()
                module.running_var.uniform_(0.5, 2)
                if module.affine:
                    module.weight.data.normal_()
                    module.bias.data.normal_()
    return model, x


def outputs(model, x, training=False):
    """Outputs of a copy, in either mode, dropout switched off."""
    model = copy.deepcopy(model)
    with mode(model, training=training), torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        return model(x)


def scatter(model, seed=0):
    """Give every switch a value of its own, of either sign."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for switch in switches_of(model).values():
            switch.beta.copy_(torch.randn(switch.size, generator=generator))
    return model


def close(a, b):
    """To 1e-5 of the largest output, or of 1: these are float32, up to eight layers of them."""
    scale = max(1.0, float(b.abs().max()))
    torch.testing.assert_close(a, b, rtol=0, atol=1e-5 * scale)


@pytest.mark.parametrize(("name", "at"), CASES)
def test_new_switches_change_nothing(name, at):
    model, x = build(name)
    before = copy.deepcopy(model.state_dict())
    switched = with_switches(model, at)
    assert torch.equal(outputs(switched, x), outputs(model, x))
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert len(switches_of(switched)) == len(neurons_of(model)) - 2
    close(outputs(fold(switched), x), outputs(model, x))


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize(("name", "at"), CASES)
def test_removing_neurons_whose_switch_is_zero_leaves_the_outputs(name, at, training):
    model, x = build(name)
    switched = scatter(with_switches(model, at))
    dead = {}
    for key, switch in switches_of(switched).items():
        dead[key] = torch.zeros(switch.size, dtype=torch.bool)
        dead[key][[0, 2, switch.size - 1]] = True
        switch.beta.data[dead[key]] = 0
    wanted = outputs(switched, x, training)
    assert not torch.allclose(wanted, outputs(model, x, training), atol=0.1)
    assert remove_dead(switched, dead) == []
    close(outputs(switched, x, training), wanted)
    for neurons in neurons_of(switched)[1:-1]:
        (switch,) = neurons.switches.values()
        assert switch.size == neurons.count == len(switch.mean_sign)
        whole = next(n for n in neurons_of(model) if n.source == neurons.source)
        assert neurons.count == whole.count - 3 and neurons.span == whole.span
    # What modules say of themselves is what they hold: a fresh one takes their tensors.
    for module in switched.modules():
        if isinstance(module, nn.Linear):
            fresh = nn.Linear(module.in_features, module.out_features, module.bias is not None)
            fresh.load_state_dict(module.state_dict())
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            type(module)(module.num_features, affine=module.affine).load_state_dict(
                module.state_dict()
            )


@pytest.mark.parametrize(("name", "at"), CASES)
def test_removing_a_neuron_that_is_alive_does_change_the_outputs(name, at):
    """The check above can fail."""
    model, x = build(name)
    switched = scatter(with_switches(model, at))
    wanted = outputs(switched, x)
    key, switch = next(iter(switches_of(switched).items()))
    remove_dead(switched, {key: torch.arange(switch.size) == 1})
    assert not torch.allclose(outputs(switched, x), wanted, atol=1e-4)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize(("name", "at"), CASES)
def test_folding_gives_the_same_outputs_from_torchs_own_layers(name, at, training):
    model, x = build(name)
    switched = scatter(with_switches(model, at), seed=1)
    before = copy.deepcopy(switched.state_dict())
    folded = fold(switched)
    # Behind a layer a fold is ahead of a normalisation only where that was asked for.
    close(outputs(folded, x, training), outputs(switched, x, training))
    assert not switches_of(folded)
    added = {key.rpartition(".")[0] for key in set(folded.state_dict()) - set(model.state_dict())}
    assert all(isinstance(model.get_submodule(name), nn.BatchNorm1d) for name in added)
    assert set(model.state_dict()) <= set(folded.state_dict())
    assert [type(m) for m in folded.modules()] == [type(m) for m in model.modules()]
    assert all(torch.equal(before[key], value) for key, value in switched.state_dict().items())
    assert not any(parameter.grad_fn for parameter in folded.parameters())


@pytest.mark.parametrize("name", ["dense", "dense_norm", "convolutional"])
def test_inputs_of_the_network_can_go_and_come_back_as_zeros(name):
    model, x = build(name)
    first = neurons_of(model)[0].target
    switched = scatter(with_switches(model, layers=[first]))
    ((key, switch),) = switches_of(switched).items()
    assert isinstance(switch, InputSwitch) and switch.total == x.shape[1]
    dead = torch.zeros(switch.size, dtype=torch.bool)
    dead[1] = True
    switch.beta.data[dead] = 0
    wanted = outputs(switched, x)
    remove_dead(switched, {key: dead})
    close(outputs(switched, x), wanted)
    assert switched.get_submodule(first).weight.shape[1] == x.shape[1] - 1
    if switch.size > 2:
        dead = torch.zeros(switch.size, dtype=torch.bool)
        dead[2] = True  # the fourth input by now
        switch.beta.data[dead] = 0
        wanted = outputs(switched, x)
        remove_dead(switched, {key: dead})
        close(outputs(switched, x), wanted)
        assert switch.kept.tolist() == [0, 2, 4, 5]
    folded = fold(switched)
    close(outputs(folded, x), wanted)
    weight = folded.get_submodule(first).weight
    assert weight.shape == model.get_submodule(first).weight.shape
    assert (weight[:, 1] == 0).all() and (weight[:, 0] != 0).all()


def test_switches_only_where_they_are_asked_for():
    model, _ = build("convolutional_norm")
    switched = with_switches(model, layers=["head.fc2", "features.conv2"])
    assert list(switches_of(switched)) == ["features.switch_conv2", "head.switch_fc2"]
    switched = with_switches(model, "outputs", ["features.conv1"])
    names = [name for name, _ in switched.features.named_children()]
    assert names[:3] == ["conv1", "norm1", "switch_conv1"]
    # A flatten's switch is one a channel, over all its positions.
    switch = with_switches(model).head.switch_fc1
    assert (switch.size, switch.span) == (4, 4)


def test_three_dimensional_inputs_of_dense_layers():
    with seeded(0, torch.device("cpu")):
        model, x = dense(), torch.randn(4, 5, 6)
    switched = scatter(with_switches(model))
    switched.switch_2.beta.data[3] = 0
    wanted = outputs(switched, x)
    remove_dead(switched, {"switch_2": torch.arange(9) == 3})
    close(outputs(switched, x), wanted)
    close(outputs(fold(switched), x), wanted)


def test_dtype_and_device_follow_the_model():
    switched = with_switches(dense().double())
    assert switched.switch_2.beta.dtype == torch.float64
    assert outputs(switched, torch.ones(2, 6, dtype=torch.float64)).dtype == torch.float64


@pytest.mark.gpu
def test_cutting_and_folding_on_a_gpu():
    model, x = build("convolutional_norm")
    switched = scatter(with_switches(model.cuda()))
    switch = switched.head.switch_fc1
    switch.beta.data[1] = 0
    wanted = outputs(switched, x.cuda())
    remove_dead(switched, {"head.switch_fc1": switch.beta == 0})
    torch.testing.assert_close(outputs(fold(switched), x.cuda()), wanted, rtol=1e-3, atol=1e-3)


def test_penalties_are_the_formulas():
    switched = scatter(with_switches(dense()))
    betas = torch.cat([switch.beta.detach() for switch in switches_of(switched).values()])
    weights = torch.cat([w.detach().flatten() for w in weights_of(switched).values()])
    assert len(betas) == 16 and len(weights) == 54 + 63 + 21
    one = 0.3 * betas.abs().sum()
    torch.testing.assert_close(switch_penalty(switched, 0.3).detach(), one)
    for power in (1, 2):
        got = regularised_penalty(switched, 0.3, 0.2, power).detach()
        torch.testing.assert_close(got, one + 0.2 * (weights.abs() ** power).sum())
    got = regularised_penalty(switched, 0.3, 0.0, 2)
    torch.testing.assert_close(got.detach(), one)
    got.backward()
    assert torch.equal(switched.switch_2.beta.grad, 0.3 * switched.switch_2.beta.detach().sign())


def shared():
    layer = nn.Linear(4, 4)
    return nn.Sequential(layer, nn.ReLU(), layer)


@pytest.mark.parametrize(
    ("make", "options", "message"),
    [
        (
            lambda: nn.Linear(2, 2),
            {},
            "model: got Linear, want a Sequential with a dense or convolutional layer",
        ),
        (
            lambda: nn.Sequential(nn.ReLU()),
            {},
            "model: got Sequential, want a Sequential with a dense or convolutional",
        ),
        (lambda: nn.Sequential(nn.Linear(2, 2)), {}, "no layer has neurons that may go"),
        (shared, {}, "a module is used twice"),
        (
            lambda: nn.Sequential(nn.Conv2d(4, 4, 1, groups=2), nn.Conv2d(4, 2, 1)),
            {},
            "model: layer '0' has 2 groups, want 1, since a channel of a group",
        ),
        (
            lambda: nn.Sequential(
                parametrizations.weight_norm(nn.Linear(2, 3)), nn.ReLU(), nn.Linear(3, 2)
            ),
            {},
            "layer '0' is parametrised",
        ),
        (
            lambda: nn.Sequential(nn.Linear(2, 3), nn.LayerNorm(3), nn.Linear(3, 2)),
            {},
            "the neurons of layer '0' cannot have switches: '1', a LayerNorm, is not",
        ),
        (
            lambda: nn.Sequential(nn.Linear(2, 4), nn.MaxPool1d(2), nn.Linear(2, 2)),
            {},
            "layer '0' gives 4 neurons, but layer '2' takes 2 features, without a flatten",
        ),
        (
            lambda: nn.Sequential(nn.Linear(2, 4), nn.MaxPool1d(1), nn.Linear(4, 2)),
            {},
            "'1', a MaxPool1d, is not known to treat each neuron by itself",
        ),
        (
            lambda: nn.Sequential(nn.Conv2d(2, 4, 1), nn.Flatten(2), nn.Linear(4, 2)),
            {},
            "'1', a Flatten, is not known to treat each neuron by itself",
        ),
        (
            lambda: nn.Sequential(nn.Linear(2, 3), nn.Sigmoid(), nn.Linear(3, 2)),
            {"at": "outputs"},
            "'1', a Sigmoid behind them, makes something else than 0 of 0",
        ),
        (
            norm_behind_flatten,
            {"at": "outputs"},
            "'3', a BatchNorm1d behind them, makes something else than 0 of 0",
        ),
        (vgg_like, {"at": "outputs"}, "'norm1', a BatchNorm2d behind them, makes something else"),
        (dense, {"at": "outputs", "layers": ["4"]}, "the outputs of the last layer, '4', cannot"),
        (dense, {"layers": ["1"]}, "the model has no layer '1'; it has '0', '2', '4'"),
        (dense, {"at": "outputs", "layers": [None]}, "the model has no layer None"),
        (dense, {"at": "middle"}, "at: got 'middle', want one of inputs, outputs"),
        (lambda: with_switches(dense()), {}, "the neurons of layer '0' have switches already"),
        (
            lambda: nn.Sequential(
                OrderedDict(a=nn.Linear(2, 2), switch_b=nn.ReLU(), b=nn.Linear(2, 2))
            ),
            {},
            "module 'switch_b' has the name of a switch",
        ),
    ],
)
def test_networks_that_cannot_have_switches_are_told(make, options, message):
    with pytest.raises(ValueError, match=message):
        with_switches(make(), **options)


def test_a_sigmoid_ahead_of_the_switches_is_fine():
    model = nn.Sequential(nn.Linear(2, 3), nn.Sigmoid(), nn.Linear(3, 2))
    switched = scatter(with_switches(model))
    close(outputs(fold(switched), torch.ones(1, 2)), outputs(switched, torch.ones(1, 2)))


def test_wrong_sizes_powers_and_cuts_are_told():
    with pytest.raises(ValueError, match="size: got 0, want a whole number >= 1"):
        Switch(0)
    with pytest.raises(ValueError, match="model: it has no switches"):
        switch_penalty(dense(), 1)
    with pytest.raises(ValueError, match="power: got 3, want one of 1, 2"):
        regularised_penalty(with_switches(dense()), 1, 1, 3)
    inputs, inner, *_ = neurons_of(dense())
    with pytest.raises(ValueError, match="kept: want at least one of the neurons of layer '0'"):
        cut_neurons(inner, torch.tensor([], dtype=torch.int64))
    with pytest.raises(ValueError, match="the inputs of '0' have no switches, so none of them"):
        cut_neurons(inputs, torch.arange(2))
