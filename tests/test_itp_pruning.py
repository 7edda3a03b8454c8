"""Soft and hard pruning, when and how often; the method that puts it and objectives together."""

import logging
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import dense
from torch import nn

from retrain.trainers.itp.method import Itp
from retrain.trainers.itp.smgd import SMGD, MAdam, MRMSProp
from retrain.trainers.itp.soft_pruning import HardPruning, SoftPruning
from retrain.trainers.loop.supervised import fit, train
from retrain.trainers.loop.training import Choice, Setting

ADAM = Choice("adam", {"lr": 1e-2}, torch.optim.Adam)
SGD = Choice("sgd", {"lr": 0.1}, torch.optim.SGD)
NAMES = ("0.weight", "2.weight")


def samples(count=48):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(count, 6, generator=generator)
    return x, (x @ torch.randn(6, 3, generator=generator)).argmax(1)


def setting(optimizer=ADAM, epochs=4, **changes):
    return replace(Setting(48, 16, epochs, 0, torch.device("cpu"), optimizer), **changes)


def run(method, optimizer=ADAM, epochs=4, model=None, after=(), **changes):
    """Train as a recipe's run does, and return the training."""
    training = method.start(model or dense(6, 9, 3), setting(optimizer, epochs, **changes))
    calls = replace(training.callbacks, after_step=(*training.callbacks.after_step, *after))
    fit(
        training.model,
        samples(),
        epochs=epochs,
        optimizer=training.optimizer,
        generator=torch.Generator().manual_seed(0),
        schedule=training.schedule,
        loss=training.loss,
        penalty=training.penalty,
        batch_size=16,
        callbacks=calls,
    )
    return training


def flat(model):
    return torch.cat([model.get_parameter(name).detach().flatten() for name in NAMES])


def parameters(model):
    return nn.utils.parameters_to_vector(model.parameters()).detach()


entries = st.lists(st.sampled_from([0.0, -0.0, 0.1, -0.1, 0.2, -0.3]), min_size=6, max_size=6)


@settings(deadline=None, max_examples=100)
@given(values=st.lists(entries, min_size=1, max_size=5), hard=st.booleans())
def test_counts_against_brute_force(values, hard):
    """Weights are set anew before every pruning; |w| < 0.2 goes, and what was zero may be back."""
    model = nn.Sequential(nn.Linear(3, 2))
    with torch.no_grad():
        model[0].weight.fill_(1)
    pruning = (HardPruning if hard else SoftPruning)(model, ["0.weight"], 0.2)
    zero, pruned, returned = [False] * 6, 0, 0
    for row in values:
        with torch.no_grad():
            model[0].weight.copy_(torch.tensor(row).view(2, 3))
        pruning.prune()
        now = [abs(v) < 0.2 or (hard and z) for v, z in zip(row, zero, strict=True)]
        wanted = [0.0 if z else v for v, z in zip(row, now, strict=True)]
        pruned += sum(n and not z for n, z in zip(now, zero, strict=True))
        returned += sum(z and not n for n, z in zip(now, zero, strict=True))
        zero = now
        torch.testing.assert_close(model[0].weight.flatten(), torch.tensor(wanted))
    counts = pruning.counts()["0.weight"]
    assert counts == {"size": 6, "nonzero": 6 - sum(zero), "pruned": pruned, "returned": returned}
    assert not hard or returned == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_weight_at_the_threshold_stays_and_the_next_smaller_goes(dtype):
    model = nn.Linear(3, 1).to(dtype)
    edge = torch.tensor(1e-3, dtype=dtype)
    below = torch.nextafter(edge, torch.zeros((), dtype=dtype))
    with torch.no_grad():
        model.weight.copy_(torch.stack([edge, below, -edge]))
    SoftPruning(model, ["weight"], 1e-3).prune()
    assert model.weight.flatten().tolist() == [edge.item(), 0, -edge.item()]


def test_a_threshold_of_zero_prunes_nothing_and_biases_are_never_pruned():
    model = dense(6, 9, 3)
    before = parameters(model)
    pruning = SoftPruning(model, NAMES, 0.0)
    pruning.prune()
    assert torch.equal(parameters(model), before)
    bias = model[0].bias.detach().clone()
    SoftPruning(model, NAMES, 1e9).prune()
    assert not flat(model).any() and torch.equal(model[0].bias, bias) and bias.any()


def test_no_pressure_is_plain_training_bitwise():
    """Trade-off, threshold and l2 at zero: the shared loop with the recipe's optimiser."""
    plain = train(
        dense(6, 9, 3),
        samples(),
        epochs=4,
        optimizer=lambda m: torch.optim.Adam(m.parameters(), lr=1e-2),
        batch_size=16,
        seed=0,
    ).model
    for pruning in ("batch", "epoch", "end"):
        training = run(Itp(0.0, threshold=0.0, l2=0.0, pruning=pruning))
        assert torch.equal(parameters(training.model), parameters(plain))


def test_a_weighted_step_is_on_equation_2():
    """One SGD step by hand: E + lambda |w|_1 on the chosen layer, 1/2 l2 w^2 on the other."""
    model, (x, y) = dense(6, 9, 3), samples(16)
    wanted = dense(6, 9, 3)
    loss = nn.functional.cross_entropy(wanted(x), y)
    first, last = wanted[0].weight, wanted[2].weight
    (loss + 0.01 * last.abs().sum() + 0.05 * first.square().sum()).backward()
    with torch.no_grad():
        for parameter in wanted.parameters():
            parameter -= 0.1 * parameter.grad
    method = Itp(0.01, threshold=0.0, l2=0.1, layers=("2",))
    training = method.start(model, setting(SGD))
    fit(
        training.model,
        [(x, y)],
        epochs=1,
        optimizer=training.optimizer,
        generator=torch.Generator(),
        penalty=training.penalty,
        callbacks=training.callbacks,
    )
    torch.testing.assert_close(parameters(training.model), parameters(wanted))


@pytest.mark.parametrize(("pruning", "prunings"), [("batch", 12), ("epoch", 4), ("end", 0)])
def test_pruning_before_during_and_at_the_end(pruning, prunings, monkeypatch):
    times = []
    original = SoftPruning.prune

    def counted(self):
        times.append(None)
        original(self)

    monkeypatch.setattr(SoftPruning, "prune", counted)
    method = Itp(1e-3, threshold=0.05, pruning=pruning)
    training = method.start(dense(6, 9, 3), setting())
    assert len(times) == 1
    before = flat(training.model)
    assert (before == 0).any() and before[before != 0].abs().min() >= 0.05
    training = run(method)
    assert len(times) == 2 + prunings
    after = flat(training.model)
    small = (after != 0) & (after.abs() < 0.05)
    assert bool(small.any()) == (pruning == "end")
    method.finish(training)
    after = flat(training.model)
    assert after[after != 0].abs().min() >= 0.05 and (after == 0).any()


def test_weights_come_back_when_soft_and_stay_zero_when_hard():
    soft, zeros = Itp(1e-3, threshold=0.02, pruning="epoch"), []
    training = run(soft, epochs=8)
    layers = training.describe()["layers"]
    assert sum(layer["returned"] for layer in layers.values()) > 0
    for layer in layers.values():
        gone = layer["pruned"] - layer["returned"]
        assert layer["nonzero"] == layer["size"] - gone

    def watch(step):
        now = flat(step.model) == 0
        assert not zeros or bool(now[zeros[-1]].all())
        zeros.append(now)

    for pruning in ("batch", "epoch", "end"):
        zeros.clear()
        hard = run(replace(soft, zeros="hard", pruning=pruning), epochs=8, after=(watch,))
        layers = hard.describe()["layers"]
        assert all(layer["returned"] == 0 for layer in layers.values())
        assert sum(layer["pruned"] for layer in layers.values()) > 0


def test_more_frequent_pruning_and_larger_trade_offs_leave_fewer_weights():
    left = {
        pruning: run(Itp(3e-3, threshold=0.02, pruning=pruning), epochs=20).describe()["nonzero"]
        for pruning in ("batch", "end")
    }
    assert left["batch"] < left["end"]
    weak, strong = (run(Itp(t, threshold=0.02), epochs=20).describe() for t in (1e-4, 3e-2))
    assert strong["nonzero"] < weak["nonzero"] and strong["complexity"] < weak["complexity"]


@pytest.mark.parametrize(
    ("optimizer", "kind"),
    [
        (Choice("sgd", {"lr": 0.1, "momentum": 0.9}, torch.optim.SGD), SMGD),
        (Choice("adam", {"lr": 1e-2, "betas": (0.9, 0.99)}, torch.optim.Adam), MAdam),
        (Choice("rmsprop", {"lr": 1e-2, "alpha": 0.9}, torch.optim.RMSprop), MRMSProp),
    ],
)
def test_multi_gradient_descent_by_the_recipes_optimiser(optimizer, kind):
    training = run(Itp(descent="multi-gradient"), optimizer, epochs=6)
    assert type(training.optimizer) is kind
    assert len(training.optimizer.trade_offs) == 18
    last = [weights[1] for weights in training.optimizer.trade_offs[-3:]]
    told = training.describe()["weight"]
    assert told == {"mean": pytest.approx(sum(last) / 3), "min": min(last), "max": max(last)}
    assert all(sum(weights) == pytest.approx(1) for weights in training.optimizer.trade_offs)
    x, y = samples()
    before, after = (nn.functional.cross_entropy(m(x), y) for m in (dense(6, 9, 3), training.model))
    assert after < 0.8 * before


def test_multi_gradient_descent_of_a_hard_pruned_network_keeps_its_zeros():
    method = Itp(descent="multi-gradient", zeros="hard", threshold=0.1)
    training = run(method)
    counts = training.describe()
    assert counts["nonzero"] < counts["size"]
    assert all(layer["returned"] == 0 for layer in counts["layers"].values())


def test_decay_moves_the_rate_after_every_step():
    training = run(Itp(0.0, decay=0.1))
    assert training.optimizer.param_groups[0]["lr"] == pytest.approx(1e-2 / (1 + 0.1 * 12))
    step = Choice("step", {"every": 1, "factor": 0.5}, _halved)
    with pytest.raises(
        ValueError, match=r"decay: want there is a \[schedule\] too; only one of them"
    ):
        Itp(0.0, decay=0.1).start(dense(6, 9, 3), setting(schedule=step))


def _halved(optimizer, setting, every, factor):
    return torch.optim.lr_scheduler.StepLR(optimizer, every, factor)


@pytest.mark.parametrize("descent", ["weighted", "multi-gradient"])
def test_a_threshold_that_prunes_everything_is_named_and_survived(descent, caplog):
    method = Itp(None if descent == "multi-gradient" else 0.1, threshold=5.0, descent=descent)
    with caplog.at_level(logging.WARNING, logger="retrain"):
        training = run(method)
        assert "5 prunes every weight of 0.weight, 2.weight before the training" in caplog.text
        model = method.finish(training)
    assert "collapsed: every weight of 0.weight, 2.weight is zero" in caplog.text
    told = training.describe()
    assert told["collapsed"] and told["nonzero"] == 0 and told["complexity"] == 0
    assert model is training.model and bool(parameters(model).isfinite().all())


def test_a_trade_off_that_collapses_the_network_is_survived():
    training = run(Itp(100.0, threshold=0.05), epochs=60)
    assert training.describe()["collapsed"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "trade_off: got None, want a finite number, 0 or more, for weighted"),
        (
            {"trade_off": -1.0},
            r"trade_off: got -1\.0, want a finite number, 0 or more, for weighted",
        ),
        ({"trade_off": 1.0, "descent": "multi-gradient"}, "trade_off: multi-gradient descent ch"),
        (
            {"trade_off": 1.0, "threshold": -1.0},
            r"threshold: got -1\.0, want a finite number >= 0",
        ),
        ({"trade_off": 1.0, "l2": float("inf")}, "l2: got inf, want a finite number >= 0"),
        ({"trade_off": 1.0, "decay": -0.1}, r"decay: got -0\.1, want a finite number >= 0"),
        (
            {"trade_off": 1.0, "pruning": "never"},
            "pruning: got 'never', want one of batch, epoch, end",
        ),
        ({"trade_off": 1.0, "zeros": "firm"}, "zeros: got 'firm', want one of soft, hard"),
        (
            {"trade_off": 1.0, "descent": "up"},
            "descent: got 'up', want one of weighted, multi-gradient",
        ),
        ({"trade_off": 1.0, "layers": ()}, r"layers: got \(\), want a list of patterns"),
        ({"trade_off": 1.0, "power": -1.0}, r"power: got -1\.0, want a positive finite number"),
    ],
)
def test_wrong_options_are_told(options, message):
    with pytest.raises(ValueError, match=message):
        Itp(**options)


def test_wrong_models_and_optimisers_are_told():
    with pytest.raises(ValueError, match="layers: 'fc' matches no dense layer"):
        Itp(0.1, layers=("fc",)).start(dense(6, 9, 3), setting())
    method = Itp(descent="multi-gradient")
    with pytest.raises(ValueError, match="multi-gradient descent has sgd, adam, rmsprop, not 'ad"):
        method.start(dense(6, 9, 3), setting(Choice("adamw", {}, torch.optim.AdamW)))
    with pytest.raises(ValueError, match="MAdam takes lr, betas, eps, not 'amsgrad'"):
        method.start(dense(6, 9, 3), setting(Choice("adam", {"amsgrad": True}, torch.optim.Adam)))
    with pytest.raises(ValueError, match="threshold: got nan, want a finite number >= 0"):
        SoftPruning(dense(6, 9, 3), NAMES, float("nan"))


@pytest.mark.gpu
@pytest.mark.parametrize("descent", ["weighted", "multi-gradient"])
def test_trains_on_a_gpu(descent):
    method = Itp(None if descent == "multi-gradient" else 1e-3, threshold=0.02, descent=descent)
    training = run(method, model=dense(6, 9, 3).cuda(), device=torch.device("cuda"))
    told = training.describe()
    assert 0 < told["nonzero"] < told["size"]
