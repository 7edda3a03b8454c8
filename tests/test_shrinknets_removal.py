"""When a neuron goes, and that what the optimiser remembers goes with it, and only that."""

import copy
import logging
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import dense
from torch import nn
from torch.optim import (
    LBFGS,
    SGD,
    Adadelta,
    Adafactor,
    Adagrad,
    Adam,
    Adamax,
    AdamW,
    NAdam,
    RMSprop,
    Rprop,
)

from retrain.compact.cut import spread
from retrain.trainers.loop.callbacks import Callbacks, Step
from retrain.trainers.loop.states import seeded
from retrain.trainers.loop.supervised import fit
from retrain.trainers.shrinknets.cutting import cut_neurons
from retrain.trainers.shrinknets.network import neurons_of, with_switches
from retrain.trainers.shrinknets.removal import (
    SignVariance,
    follow_signs,
    remove_dead,
    remover,
    sign_variance,
)
from retrain.trainers.shrinknets.switches import Switch, switch_penalty, switches_of

OPTIMIZERS = {
    "sgd": lambda p: SGD(p, lr=0.1),
    "momentum": lambda p: SGD(p, lr=0.05, momentum=0.9, nesterov=True, weight_decay=0.01),
    "adam": lambda p: Adam(p, lr=0.01, amsgrad=True),
    "adamw": lambda p: AdamW(p, lr=0.01, weight_decay=0.1),
    "rmsprop": lambda p: RMSprop(p, lr=0.01, momentum=0.9, centered=True),
    "adagrad": lambda p: Adagrad(p, lr=0.05),
    "adadelta": lambda p: Adadelta(p),
    "adamax": lambda p: Adamax(p),
    "nadam": lambda p: NAdam(p),
    "rprop": lambda p: Rprop(p),
}


def network():
    """A convolution with batch normalisation, a flatten, two dense layers; in double precision."""
    with seeded(0, torch.device("cpu")):
        plain = nn.Sequential(
            *(nn.Conv2d(1, 5, 3), nn.BatchNorm2d(5), nn.ReLU(), nn.Flatten()),
            *(nn.Linear(20, 6), nn.ReLU(), nn.Linear(6, 3)),
        )
    return with_switches(plain).double()


def samples(count=40):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(count, 1, 4, 4, generator=generator, dtype=torch.float64)
    return x, torch.randint(3, (count,), generator=generator)


def run(model, optimizer, epochs, first=0):
    """Some epochs, each with its own order, so that a later one can be run alone."""
    for epoch in range(first, first + epochs):
        fit(
            model,
            samples(),
            epochs=1,
            optimizer=optimizer,
            generator=torch.Generator().manual_seed(epoch),
            penalty=lambda m: switch_penalty(m, 0.01),
            batch_size=16,
        )


# By hand, apart from `cutting`: which entries of each tensor stay when the channels and units do.
CHANNELS, UNITS = [0, 2, 3], [1, 2, 5]
POSITIONS = [4 * c + i for c in CHANNELS for i in range(4)]
BY_HAND = {
    "0.weight": (CHANNELS, slice(None)),
    "0.bias": (CHANNELS,),
    "1.weight": (CHANNELS,),
    "1.bias": (CHANNELS,),
    "1.running_mean": (CHANNELS,),
    "1.running_var": (CHANNELS,),
    "switch_4.beta": (CHANNELS,),
    "switch_4.mean_sign": (CHANNELS,),
    "4.weight": (UNITS, POSITIONS),
    "4.bias": (UNITS,),
    "switch_6.beta": (UNITS,),
    "switch_6.mean_sign": (UNITS,),
    "6.weight": (slice(None), UNITS),
}


def by_hand(name, tensor):
    index = BY_HAND.get(name)
    if index is None or tensor.ndim == 0:
        return tensor.clone()
    if len(index) == 1:
        return tensor[index[0]]
    rows, columns = index
    return tensor[rows][:, columns].contiguous()


def small_network():
    """Make the smaller network from its sizes alone, without cutting anything."""
    plain = nn.Sequential(
        *(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.Flatten()),
        *(nn.Linear(12, 3), nn.ReLU(), nn.Linear(3, 3)),
    )
    return with_switches(plain).double()


def gone(size, kept):
    mask = torch.ones(size, dtype=torch.bool)
    mask[kept] = False
    return mask


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_after_removal_all_goes_on_as_for_the_smaller_network(optimizer):
    big = network()
    stepping = OPTIMIZERS[optimizer](big.parameters())
    run(big, stepping, 2)
    stepping.load_state_dict(stepping.state_dict())  # makes NAdam's float32 number double, in both
    # The smaller network, from that point, by hand.
    small = small_network()
    small.load_state_dict({name: by_hand(name, t) for name, t in big.state_dict().items()})
    alone = OPTIMIZERS[optimizer](small.parameters())
    names = [name for name, _ in big.named_parameters()]
    state = copy.deepcopy(stepping.state_dict())
    for number, entries in state["state"].items():
        for key, value in entries.items():
            if isinstance(value, torch.Tensor):
                entries[key] = by_hand(names[number], value)
    alone.load_state_dict(state)
    remove_dead(big, {"switch_4": gone(5, CHANNELS), "switch_6": gone(6, UNITS)}, stepping)
    ours = stepping.param_groups[0]["params"]
    assert all(a is b for a, b in zip(ours, big.parameters(), strict=True))
    assert set(stepping.state) <= set(ours)

    def same():
        for (name, a), b in zip(big.state_dict().items(), small.state_dict().values(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14, msg=name)
        ours, theirs = stepping.state_dict(), alone.state_dict()
        assert ours["state"].keys() == theirs["state"].keys()
        for number in ours["state"]:
            torch.testing.assert_close(
                ours["state"][number],
                theirs["state"][number],
                rtol=1e-12,
                atol=1e-14,
            )

    same()
    run(big, stepping, 3, first=2)
    run(small, alone, 3, first=2)
    same()
    # Gradients are of the new shapes, and forget the neurons that went.
    assert all(p.grad is None or p.grad.shape == p.shape for p in big.parameters())


def test_a_dead_neuron_that_stays_changes_nothing_for_the_others():
    """Training big with dead neurons, then cutting, is cutting, then training: SGD momentum."""
    dead, cut = network(), network()
    for model in (dead, cut):
        with torch.no_grad():  # no way in and no way out: no gradient either
            model[0].weight[1] = model[0].bias[1] = 0
            model[1].bias[1] = 0
            model.switch_4.beta[1] = 0
            model.get_submodule("4").weight[:, 4:8] = 0
    optimizers = [OPTIMIZERS["momentum"](model.parameters()) for model in (dead, cut)]
    remove_dead(cut, {"switch_4": gone(5, [0, 2, 3, 4])}, optimizers[1])
    run(dead, optimizers[0], 2)
    run(cut, optimizers[1], 2)
    remove_dead(dead, {"switch_4": gone(5, [0, 2, 3, 4])}, optimizers[0])
    for a, b in zip(dead.state_dict().values(), cut.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(optimizers[0].state_dict(), optimizers[1].state_dict())


def test_factored_states_are_cut_where_they_are_as_long_as_the_parameter():
    big = network()
    stepping = Adafactor(big.parameters())
    run(big, stepping, 1)
    weight = big.get_submodule("4").weight
    before = {key: value.clone() for key, value in stepping.state[weight].items()}
    assert before["row_var"].shape == (6, 1) and before["col_var"].shape == (1, 20)
    remove_dead(big, {"switch_4": gone(5, CHANNELS), "switch_6": gone(6, UNITS)}, stepping)
    after = stepping.state[big.get_submodule("4").weight]
    assert torch.equal(after["row_var"], before["row_var"][UNITS])
    assert torch.equal(after["col_var"], before["col_var"][:, POSITIONS])
    run(big, stepping, 1, first=1)


def test_a_state_that_cannot_be_cut_is_told_and_nothing_is_changed():
    model = dense(3, 4, 2)
    stepping = LBFGS(model.parameters(), max_iter=2)

    def closure():
        stepping.zero_grad()
        value = model(torch.ones(1, 3)).square().sum()
        value.backward()
        return value

    stepping.step(closure)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=r"LBFGS keeps 'd' of shape .* no neurons can be cut"):
        cut_neurons(neurons_of(model)[1], torch.tensor([0, 2]), stepping)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


def test_an_optimiser_without_state_gets_none():
    model = network()
    stepping = OPTIMIZERS["adam"](model.parameters())
    remove_dead(model, {"switch_6": gone(6, UNITS)}, stepping)
    assert len(stepping.state) == 0
    run(model, stepping, 1)


def test_spread():
    assert spread(torch.tensor([0, 2]), 3).tolist() == [0, 1, 2, 6, 7, 8]
    assert spread(torch.tensor([1, 4]), 1).tolist() == [1, 4]


# The rule --------------------------------------------------------------------------------------


signs = st.lists(st.sampled_from([-1.0, 1.0]), min_size=1, max_size=60)


@settings(deadline=None, max_examples=100)
@given(first=st.sampled_from([-1.0, 1.0]), later=signs, inertia=st.floats(0, 0.999))
def test_one_average_is_the_two_of_the_rule(first, later, inertia):
    """The moving mean and variance as `removal` states them, and E s^2 - m^2 by direct sums."""
    switch = Switch(1).double()
    switch.mean_sign.fill_(first)
    mean, variance = first, 0.0
    weights = [1.0]
    for sign in later:
        switch.beta.data.fill_(0.3 * sign)
        follow_signs(switch, inertia)
        variance = inertia * (variance + (1 - inertia) * (sign - mean) ** 2)
        mean = inertia * mean + (1 - inertia) * sign
        weights = [w * inertia for w in weights] + [1 - inertia]
    values = [first, *later]
    direct = sum(w * v for w, v in zip(weights, values, strict=True))
    spread_out = sum(w * (v - direct) ** 2 for w, v in zip(weights, values, strict=True))
    assert switch.mean_sign.item() == pytest.approx(mean, abs=1e-12) == direct
    assert sign_variance(switch).item() == pytest.approx(variance, abs=1e-10)
    assert sign_variance(switch).item() == pytest.approx(spread_out, abs=1e-10)


def steps_until_dead(pattern, rule, limit=2000):
    """How many steps a switch lives whose signs follow a pattern; None: it survives."""
    model = with_switches(nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 1)))
    stepping = SGD(model.parameters(), lr=0.0)
    callback = remover(rule, lambda name: None)
    switch = model.switch_2
    for number in range(limit):
        with torch.no_grad():
            switch.beta.copy_(torch.tensor([1.0, 0.1 * pattern(number)]))
        callback(Step(model, stepping, 0, number, torch.ones(1, 2), torch.ones(1)))
        if switch.size == 1:
            return number + 1
    return None


def flipping(number):
    return (-1) ** (number + 1)


def test_flipping_switches_die_and_steady_ones_live():
    rule = SignVariance()
    assert steps_until_dead(lambda n: 1.0, rule) is None
    # Flipping, the mean falls as gamma^t: below sqrt(1/2) after 34 or 35 steps at 0.99.
    assert steps_until_dead(flipping, rule) in (34, 35)
    # One flip in ten: the mean goes to 0.8, whose variance 0.36 is below 0.5.
    assert steps_until_dead(lambda n: -1.0 if n % 10 == 5 else 1.0, rule) is None
    # A switch at exactly 0 is neither: as good as flipping.
    assert steps_until_dead(lambda n: 0.0, rule) == 35
    # The one crossing that the docstring owns up to: from 16 steps on.
    assert steps_until_dead(lambda n: -1.0, rule) == 16


def test_inertia_is_patience_and_so_is_the_threshold():
    lives = [steps_until_dead(flipping, SignVariance(g)) for g in (0.3, 0.5, 0.9, 0.99, 0.999)]
    assert all(a <= b for a, b in pairwise(lives)) and lives[2] < lives[3] < lives[4]
    # Without memory the mean is the last sign, and nothing varies: (1 - g) / (1 + g) > sqrt(1/2).
    assert steps_until_dead(flipping, SignVariance(0.1)) is None
    lives = [steps_until_dead(flipping, SignVariance(0.99, t)) for t in (0.1, 0.5, 0.9)]
    assert lives[0] < lives[1] < lives[2]


def test_training_with_a_penalty_removes_what_has_no_use():
    """Two of six units get all the signal; at a strong penalty the others die by the rule."""
    with seeded(0, torch.device("cpu")):
        model = with_switches(nn.Sequential(nn.Linear(4, 12), nn.ReLU(), nn.Linear(12, 1)))
        x = torch.randn(256, 4)
    y = x[:, :1].relu()
    stepping = Adam(model.parameters(), lr=0.01)
    sizes = []
    fit(
        model,
        (x, y),
        epochs=60,
        optimizer=stepping,
        generator=torch.Generator().manual_seed(0),
        loss=nn.functional.mse_loss,
        penalty=lambda m: switch_penalty(m, 0.02),
        batch_size=32,
        callbacks=Callbacks(
            after_step=(remover(SignVariance(), lambda name: None),),
            after_epoch=(lambda *_: sizes.append(model.switch_2.size),),
        ),
    )
    assert sizes[0] == 12 and 1 <= sizes[-1] < 6
    assert all(a >= b for a, b in pairwise(sizes))
    assert nn.functional.mse_loss(model(x), y) < 0.05


def test_a_layer_whose_neurons_are_all_dead_keeps_its_largest(caplog):
    model = network()
    with torch.no_grad():
        model.switch_4.beta.copy_(torch.tensor([1.0, -3.0, 2.0, 0.0, 1.0]))
    told = []
    with caplog.at_level(logging.WARNING, logger="retrain"):
        callback = remover(SignVariance(), told.append)
        model.switch_4.mean_sign.zero_()
        callback(Step(model, SGD(model.parameters(), lr=0.1), 0, 0, *samples(2)))
    assert told == ["switch_4"]
    assert "all 5 neurons of switch_4 are dead: the one with the largest" in caplog.text
    assert model.switch_4.beta.tolist() == [-3.0] and model.switch_4.mean_sign.tolist() == [-1.0]
    assert model[0].weight.shape[0] == 1 and model.switch_6.size == 6
    run(model, SGD(model.parameters(), lr=0.1), 1)
    assert remove_dead(model, {"switch_4": torch.tensor([True])}) == ["switch_4"]
    assert model.switch_4.size == 1


def test_a_switch_that_is_not_finite_is_told():
    model = network()
    model.switch_6.beta.data[2] = torch.nan
    callback = remover(SignVariance(), lambda name: None)
    with pytest.raises(FloatingPointError, match=r"'switch_6' has a switch that is not finite at"):
        callback(Step(model, SGD(model.parameters(), lr=0.1), 3, 17, *samples(2)))
    assert switches_of(model)["switch_6"].size == 6


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"inertia": 1.0}, r"inertia: got 1\.0, want at least 0 and below 1"),
        ({"inertia": -0.1}, "inertia"),
        ({"inertia": float("nan")}, "inertia"),
        ({"threshold": 0.0}, r"threshold: got 0.0, want a number in \(0, 1\)"),
        ({"threshold": 1.0}, "threshold"),
    ],
)
def test_wrong_rules_are_told(options, message):
    with pytest.raises(ValueError, match=message):
        SignVariance(**options)
