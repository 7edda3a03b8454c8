"""Algorithm 1 as a method: plain training with open gates, pruning, rounding, resuming."""

import copy
from dataclasses import replace

import pytest
import torch
from gated_cases import CPU, setting, small
from networks import same, samples, weights
from torch import nn
from torch.nn import functional
from torch.optim import SGD, Adam, AdamW

from retrain.adapters.files.description import describe_module
from retrain.trainers.gates.gating import Gating
from retrain.trainers.gates.method import Gates, gating_of
from retrain.trainers.gates.network import gates_of, ungate
from retrain.trainers.loop.callbacks import Callbacks
from retrain.trainers.loop.supervised import fit
from retrain.trainers.loop.training import Choice

OPTIMIZERS = {
    "sgd": Choice("sgd", {"lr": 0.1, "momentum": 0.9}, SGD),
    "adam": Choice("adam", {"lr": 1e-2}, Adam),
}


def run(method, model, data, chosen, *, until=None, after_epoch=(), seed=7):
    """Start and fit; return the training and a weight list a step."""
    training = method.start(model, chosen)
    return training, resume(training, data, chosen, until=until, after_epoch=after_epoch, seed=seed)


def resume(training, data, chosen, *, until=None, first=0, after_epoch=(), sampler=None, seed=7):
    steps = []
    calls = training.callbacks
    fit(
        training.model,
        data,
        epochs=chosen.epochs if until is None else until,
        optimizer=training.optimizer,
        generator=sampler or torch.Generator().manual_seed(seed),
        schedule=training.schedule,
        loss=training.loss,
        penalty=training.penalty,
        batch_size=chosen.batch_size,
        callbacks=replace(
            calls,
            after_step=(*calls.after_step, lambda step: steps.append(weights(step.model))),
            after_epoch=(*calls.after_epoch, *after_epoch),
        ),
        first_epoch=first,
        first_step=first * chosen.steps_per_epoch,
    )
    return steps


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("estimator", ["first-order", "exact"])
@pytest.mark.parametrize("norm", [False, True])
def test_gates_at_1_without_pressure_are_plain_training_step_for_step(optimizer, estimator, norm):
    data = samples(48)
    given = small(3, norm=norm)
    chosen = setting(optimizer=OPTIMIZERS[optimizer])

    plain = ungate(copy.deepcopy(given))
    wanted = []
    fit(
        plain,
        data,
        epochs=3,
        optimizer=chosen.make_optimizer(plain.parameters()),
        generator=torch.Generator().manual_seed(7),
        batch_size=16,
        callbacks=Callbacks(after_step=(lambda step: wanted.append(weights(step.model)),)),
    )
    # theta learns, too slowly to leave 1 far enough for a gate to close in these steps
    method = Gates(log_gamma=0.0, decay=0.0, theta=1.0, estimator=estimator, theta_rate=1e-9)
    model = copy.deepcopy(given)
    training, got = run(method, model, data, chosen)
    assert len(got) == len(wanted) == 9
    assert all(same(a, b) for a, b in zip(got, wanted, strict=True))
    state, other = model.state_dict(), plain.state_dict()
    assert all(torch.equal(a, b) for a, b in zip(state.values(), other.values(), strict=True))
    finished = method.finish(training)
    assert describe_module(finished) == describe_module(plain)

    kept = Gates(log_gamma=-1e9, decay=0.0, theta=1.0, keep_at=1.0)
    training, got = run(kept, copy.deepcopy(given), data, chosen)
    assert all(same(a, b) for a, b in zip(got, wanted, strict=True))
    assert training.describe()["kept"] == ["0", "1", "2"]


def test_a_block_whose_theta_is_0_is_as_if_it_were_not_there():
    """Closed from the start, in step with the network without it; then it is removed."""
    data = samples(48)
    given = small(3)
    without = copy.deepcopy(given)
    del without[1]
    kept = Gates(log_gamma=0.0, decay=0.0, theta=1.0, keep_at=1.0)
    chosen = setting(optimizer=OPTIMIZERS["adam"])
    _, wanted = run(kept, without, data, chosen)

    training = kept.start(given, chosen)
    gating = gating_of(training)
    gating.kept.remove("1")
    gating.names = ["1"]
    gating.theta.data = torch.zeros(1)
    got = resume(training, data, chosen)
    assert gating.removed == ["1"] and list(dict(given.named_children())) == [
        "0",
        "2",
        "3",
    ]
    assert all(same(a, b) for a, b in zip(got, wanted, strict=True))


def test_pressure_prunes_while_training_and_what_is_left_is_plain():
    data = samples(48)
    model = small(4)
    chosen = setting(epochs=40, optimizer=OPTIMIZERS["adam"])
    counts = []
    method = Gates(
        log_gamma=-1e4, theta=0.5, theta_rate=1e-2, fine_tune_epochs=5, fine_tune_rate=1e-3
    )

    def look(epoch, trained, optimizer):
        listed = [p for group in optimizer.param_groups for p in group["params"]]
        assert {id(p) for p in listed} == {id(p) for p in trained.parameters()}
        assert {id(p) for p in optimizer.state} <= {id(p) for p in listed}
        counts.append((len(gates_of(trained)), optimizer.param_groups[0]["lr"]))

    training, _ = run(method, model, data, chosen, after_epoch=(look,))
    description = training.describe()
    assert sorted(description["removed"]) == ["0", "1", "2", "3"] and not description["theta"]
    assert counts[0] == (4, 1e-2) and counts[33] == (0, 1e-2) and counts[-1] == (0, 1e-3)
    assert description["rounded"] == 34 and len(counts) == 40
    finished = method.finish(training)
    assert [type(layer) for layer in finished] == [nn.Linear]


def test_useful_blocks_are_kept():
    """A block worth more than log gamma stays: condition O2."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(256, 6, generator=generator)
    y = (x[:, 0] * x[:, 1] > 0).long()  # no linear map tells
    model = small(3, classes=2)
    chosen = setting(256, batch_size=64, epochs=120, optimizer=OPTIMIZERS["adam"])
    method = Gates(log_gamma=-20.0, decay=0.1, theta_rate=5e-3, warmup=60, fine_tune_epochs=10)
    training, _ = run(method, model, (x, y), chosen)
    left = training.describe()["kept"]
    assert 1 <= len(left) < 3
    finished = method.finish(training)
    assert (finished(x).argmax(1) == y).float().mean() > 0.95


def test_closed_blocks_decay():
    """(20), (21): with the gate at 0 the gradient is lambda W, not nothing."""
    data = samples(16)
    model = small(2)
    chosen = setting(16, epochs=1, optimizer=Choice("sgd", {"lr": 0.5}, SGD))
    method = Gates(log_gamma=-1.0, decay=1.6, theta_rate=1e-9, tolerance=0.0)
    training = method.start(model, chosen)
    gating_of(training).theta.data = torch.tensor([1e-6, 1.0])
    before = [p.detach().clone() for p in model[0].block.parameters()]
    resume(training, data, chosen)
    assert gating_of(training).names == [] and len(gates_of(model)) == 1  # rounded in the end
    fresh = small(2)
    training = method.start(fresh, replace(chosen, epochs=2))
    gating_of(training).theta.data = torch.tensor([1e-6, 1.0])
    resume(training, data, chosen, until=1)
    for old, new in zip(before, fresh[0].block.parameters(), strict=True):
        torch.testing.assert_close(new, old * (1 - 0.5 * 1.6 / 16), rtol=1e-6, atol=0)


def test_decay_is_half_the_square_whoever_applies_it():
    data = samples(48)

    class OtherAdam(Adam):
        """Not known to decay as (10) says: gets a penalty."""

    results = []
    for kind in (Adam, OtherAdam):
        model = small(2).double()
        chosen = setting(optimizer=Choice("", {"lr": 1e-2}, kind))
        method = Gates(log_gamma=0.0, decay=5.0, theta=1.0, keep_at=1.0)
        training, _ = run(method, model, (data[0].double(), data[1]), chosen)
        assert (training.penalty is None) == (kind is Adam)
        results.append(weights(model))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def test_adamw_gets_a_penalty_too():
    training = Gates(log_gamma=-1.0).start(small(), setting(optimizer=Choice("", {}, AdamW)))
    assert training.penalty is not None
    total = sum(float(p.detach().square().sum()) for p in training.model.parameters())
    assert training.penalty(training.model).item() == pytest.approx(total / 96, rel=1e-5)


def test_log_gamma_and_decay_scale_with_the_samples():
    """Half of the samples, each twice: the same as all of them with twice the pressure."""
    given = small(3)
    thetas = []
    for method in (Gates(log_gamma=-8.0, scaled_from=24), Gates(log_gamma=-16.0, decay=2.0)):
        training, _ = run(method, copy.deepcopy(given), samples(48), setting(), until=2)
        thetas.append((gating_of(training).theta.detach(), weights(training.model)))
    assert torch.equal(thetas[0][0], thetas[1][0]) and same(thetas[0][1], thetas[1][1])


def test_robbins_monro_steps_move_weights_and_theta_alike():
    data = samples(16)
    model = small(2)
    method = Gates(
        log_gamma=-3.0,
        decay=0.5,
        theta_optimizer="sgd",
        theta_rate=1e-3,
        power=0.75,
        offset=2.0,
        estimator="exact",
        round_below=0.0,
    )
    chosen = setting(16, epochs=4, optimizer=Choice("sgd", {"lr": 1.0}, SGD))
    rates = []

    def look(*_):
        rates.append(
            (
                gating_of(training).optimizer.param_groups[0]["lr"],
                training.optimizer.param_groups[0]["lr"],
            )
        )

    training = method.start(model, chosen)
    resume(training, data, chosen, until=3, after_epoch=(look,))
    sizes = [1e-3 * (1 + n / 2) ** -0.75 for n in range(3)]
    assert [a for a, _ in rates] == pytest.approx(sizes)
    assert [b for _, b in rates] == pytest.approx([16 * size for size in sizes])


def test_the_convergence_test_rounds_early():
    data = samples(48)
    chosen = setting(epochs=30)
    done = []
    method = Gates(log_gamma=-1.0, converged=1e6, fine_tune_epochs=3)
    training, _ = run(method, small(2), data, chosen, after_epoch=(lambda e, *_: done.append(e),))
    assert training.describe()["rounded"] == 0 and len(done) == 4
    never = Gates(log_gamma=-1.0, converged=1e-12, fine_tune_epochs=3)
    training, _ = run(never, small(2), data, setting(epochs=5))
    assert training.describe()["rounded"] == 1


@pytest.mark.parametrize("estimator", ["first-order", "exact"])
@pytest.mark.parametrize("linear_skips", [False, True])
def test_resuming_is_the_uninterrupted_run(estimator, linear_skips):
    data = samples(48)
    chosen = setting(epochs=30, optimizer=OPTIMIZERS["adam"])
    method = Gates(
        log_gamma=-300.0,
        theta=0.6,
        theta_rate=1e-2,
        estimator=estimator,
        fine_tune_epochs=4,
        fine_tune_rate=1e-3,
    )

    def fresh():
        return small(4, norm=True, linear_skips=linear_skips)

    sampler = torch.Generator().manual_seed(7)
    whole, counts = method.start(fresh(), chosen), []
    saved = {}

    def save(epoch, model, optimizer):
        counts.append(len(gates_of(model)))
        saved[epoch.number + 1] = copy.deepcopy(
            (
                whole.describe(),
                model.state_dict(),
                optimizer.state_dict(),
                {name: part.state_dict() for name, part in whole.parts.items()},
                sampler.get_state(),
            )
        )

    wanted = resume(whole, data, chosen, after_epoch=(save,), sampler=sampler)
    assert counts[0] == 4 and counts[-1] < 4
    middle = next(n for n, count in enumerate(counts, 1) if count < 4)
    for epoch in (1, middle, 28):
        description, model, optimizer, parts, order = saved[epoch]
        again = method.start(fresh(), chosen)
        method.reshape(again, description)
        again.model.load_state_dict(model)
        again.optimizer.load_state_dict(optimizer)
        for name, state in parts.items():
            again.parts[name].load_state_dict(state)
        generator = torch.Generator()
        generator.set_state(order)
        got = resume(again, data, chosen, first=epoch, sampler=generator)
        assert all(same(a, b) for a, b in zip(got, wanted[3 * epoch :], strict=True))
        assert again.describe() == whole.describe()
        finished = method.finish(again), method.finish(copy.deepcopy(whole))
        assert same(*map(weights, finished))


def test_gates_are_alike_whatever_is_drawn_besides():
    """The sampler is a generator of its own, seeded by the setting."""
    drawn = []
    for seed in (3, 3, 4):
        torch.manual_seed(len(drawn))
        training = Gates(log_gamma=-1.0, theta=0.5).start(small(3), setting(seed=seed))
        gating = gating_of(training)
        row = []
        for _ in range(20):
            gating.sample(CPU, differentiable=False)
            row.append(gating.pattern)
        drawn.append(row)
    assert drawn[0] == drawn[1] != drawn[2]


def test_theta_that_is_not_finite_is_an_error_that_names_the_block():
    gating = Gating(small(2), 0.5, torch.Generator())
    gating.optimizer = SGD([gating.theta], lr=1.0)
    with pytest.raises(FloatingPointError, match="theta of '1' is nan after step 0; its gradient"):
        gating.step(torch.tensor([0.0, torch.nan]), torch.zeros(2), 10)


def test_a_sgd_step_of_theta_is_24_projected():
    gating = Gating(small(3), 0.5, torch.Generator())
    gating.optimizer = SGD([gating.theta], lr=0.01)
    gating.step(torch.tensor([0.1, -0.3, 5.0]), torch.tensor([-2.0, -2.0, -2.0]), 100)
    # 0.5 - 0.01 (100 difference + 2), into [0, 1]
    assert gating.theta.tolist() == pytest.approx([0.38, 0.78, 0.0])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"log_gamma": 1.0}, "log_gamma: got 1.0, want 0 or less"),
        ({"log_gamma": float("nan")}, "log_gamma: got nan, want 0 or less"),
        ({"decay": -1.0}, r"decay: got -1\.0, want a finite number >= 0"),
        ({"theta": 0.0}, "theta: got 0.0, want a probability above 0"),
        ({"theta": 1.5}, r"theta: got 1\.5, want a probability above 0"),
        ({"theta_rate": 0.0}, r"theta_rate: got 0\.0, want a positive finite number"),
        ({"tolerance": 1.0}, r"tolerance: got 1\.0, want at least 0 and below 1"),
        ({"round_below": 1.1}, r"round_below: got 1\.1, want 0 to 1"),
        ({"warmup": -1}, "warmup: got -1, want a whole number >= 0"),
        ({"fine_tune_epochs": 1.5}, r"fine_tune_epochs: got 1\.5, want a whole number >= 0"),
        ({"scaled_from": 0}, "scaled_from: got 0, want a whole number >= 1"),
        ({"keep_at": 0.0}, r"keep_at: got 0\.0, want a positive finite number"),
        ({"factors": {"a*": -5.0}}, r"factors\.a\*: got -5\.0, want a positive finite number"),
        ({"estimator": "taylor"}, "estimator: got 'taylor', want one of first-order, exact"),
        ({"theta_optimizer": "lion"}, "theta_optimizer: got 'lion', want one of adam, sgd"),
        (
            {"power": 0.5, "theta_optimizer": "sgd"},
            r"power: got 0\.5, want 0, or above 1/2 and up to 1, by \(31\)",
        ),
        (
            {"power": 1.0},
            r"theta_optimizer: got 'adam', want 'sgd' with Robbins-Monro steps \(power",
        ),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        Gates(**{"log_gamma": -1.0, **options})


def test_a_start_that_cannot_be_is_refused():
    chosen = setting()
    plain = nn.Sequential(nn.Linear(6, 3))
    cases = [
        (Gates(-1.0), plain, chosen, "model: Sequential has no gated block"),
        (
            Gates(-1.0, fine_tune_epochs=3),
            small(),
            chosen,
            "fine_tune_epochs: got 3, want fewer than the training's 3 epochs",
        ),
        (Gates(-1.0, factors={"x*": 5.0}), small(), chosen, r"factors: 'x\*' matches no gate"),
        (
            Gates(-1.0, fine_tune_rate=0.1),
            small(),
            replace(chosen, schedule=Choice("step", {}, lambda *_: None)),
            "fine_tune_rate: cannot be set beside a schedule",
        ),
        (
            Gates(-1.0, power=1.0, theta_optimizer="sgd"),
            small(),
            setting(optimizer=OPTIMIZERS["sgd"]),
            "power: Robbins-Monro steps want SGD without momentum",
        ),
        (
            Gates(-1.0),
            small(),
            setting(optimizer=Choice("sgd", {"lr": 1.0, "weight_decay": 0.1}, SGD)),
            "optimizer: a weight_decay of 0.1 was asked for",
        ),
    ]
    for method, model, wanted, message in cases:
        with pytest.raises(ValueError, match=message):
            method.start(model, wanted)


def test_a_description_of_another_model_is_refused():
    method = Gates(log_gamma=-1.0)
    for description, message in (
        ({"removed": ["9"], "kept": [], "theta": {}}, "the model has no gated block '9'"),
        ({"removed": ["0"], "kept": [], "theta": {"1": 0.5}}, "the gates left are"),
    ):
        training = method.start(small(3), setting())
        with pytest.raises(ValueError, match=message):
            method.reshape(training, {"rounded": None, **description})


def test_the_scale_of_a_loss_that_was_scaled_is_taken_out():
    """float16's factor, or a part's share of a batch, is not in theta's gradient."""
    data = samples(16)
    slopes = []
    for factor in (1.0, 1024.0):
        training = Gates(log_gamma=-1.0, theta=0.5).start(small(3), setting(16))
        gating = gating_of(training)
        gating.sample(CPU, differentiable=True)
        (factor * training.loss(training.model(data[0]), data[1])).backward()
        gating.step = lambda difference, *_: slopes.append(difference)
        training.callbacks.after_backward[0](_step(training, data))
    assert torch.equal(*slopes) and slopes[0].abs().max() > 0


def test_a_step_that_overflows_under_a_scaler_is_passed_over():
    data = samples(16)
    training = Gates(log_gamma=-1.0, theta=0.5).start(small(3), setting(16))
    gating = gating_of(training)
    for factor, moves in ((65536.0, False), (1.0, True)):
        gating.sample(CPU, differentiable=True)
        (factor * training.loss(training.model(data[0]), data[1])).backward()
        if not moves:
            gating.xi.grad[1] = torch.inf
        before = gating.theta.detach().clone()
        training.callbacks.after_backward[0](_step(training, data))
        assert torch.equal(before, gating.theta) != moves


def _step(training, data):
    from retrain.trainers.loop.callbacks import Step

    return Step(training.model, training.optimizer, 0, 0, *data)


@pytest.mark.gpu
def test_gates_train_on_a_gpu_as_on_the_cpu():
    x, y = samples(48)
    chosen = replace(setting(), device=torch.device("cuda"))
    results = []
    for device in ("cpu", "cuda"):
        training = Gates(log_gamma=-20.0, theta=0.6, theta_rate=1e-2).start(
            small(3).to(device), chosen
        )
        resume(training, (x, y), chosen, until=2)
        results.append((training.describe()["theta"], gating_of(training).pattern))
    assert results[0][0] == pytest.approx(results[1][0], abs=1e-3)
    assert results[0][1] == results[1][1]


def test_the_functional_loss_is_left_alone():
    training = Gates(log_gamma=-1.0).start(small(), setting())
    x, y = samples(48)
    with torch.no_grad():
        assert float(training.loss(training.model(x), y)) == float(
            functional.cross_entropy(training.model(x), y)
        )
