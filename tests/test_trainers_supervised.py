"""The shared loop: it is the plain torch loop, repeats, and others can be built on it."""

import copy
import logging
from functools import partial

import numpy as np
import pytest
import torch
from networks import dense, same, samples, weights
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional
from torch.optim import SGD, Adam
from torch.optim.lr_scheduler import StepLR
from torch.utils.data import DataLoader, TensorDataset

from retrain.trainers.loop.accuracy import evaluate
from retrain.trainers.loop.callbacks import Callbacks
from retrain.trainers.loop.states import mode
from retrain.trainers.loop.supervised import fit, train

CPU = torch.device("cpu")
OPTIMIZERS = {
    "sgd": lambda m: SGD(m.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-3),
    "adam": lambda m: Adam(m.parameters(), lr=1e-2),
}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_equals_the_plain_loop_step_for_step(optimizer):
    x, y = samples()
    given = dense(6, 8, 3)

    plain = copy.deepcopy(given)
    made = OPTIMIZERS[optimizer](plain)
    schedule = StepLR(made, step_size=1, gamma=0.5)
    generator = torch.Generator().manual_seed(3)
    wanted, losses = [], []
    for _ in range(3):
        total = 0.0
        for rows in torch.randperm(50, generator=generator).split(16):
            made.zero_grad()
            loss = functional.cross_entropy(plain(x[rows]), y[rows])
            loss.backward()
            made.step()
            wanted.append(weights(plain))
            total += loss.item() * len(rows)
        schedule.step()
        losses.append(total / 50)

    got = []
    result = train(
        given,
        (x, y),
        epochs=3,
        optimizer=OPTIMIZERS[optimizer],
        schedule=partial(StepLR, step_size=1, gamma=0.5),
        batch_size=16,
        seed=3,
        callbacks=Callbacks(after_step=(lambda step: got.append(weights(step.model)),)),
    )
    assert len(got) == len(wanted) == 12
    assert all(same(a, b) for a, b in zip(got, wanted, strict=True))
    assert [epoch.loss for epoch in result.history] == losses
    assert [epoch.number for epoch in result.history] == [0, 1, 2]
    assert all(epoch.seconds > 0 and epoch.penalty == 0 for epoch in result.history)

    bare = train(
        given,
        (x, y),
        epochs=3,
        optimizer=OPTIMIZERS[optimizer],
        schedule=partial(StepLR, step_size=1, gamma=0.5),
        batch_size=16,
        seed=3,
    )
    assert same(weights(bare.model), wanted[-1])


def test_repeats_bitwise_whatever_the_global_generators_hold():
    model = dense(6, 16, 3, dropout=0.5)
    torch.manual_seed(1)
    first = train(model, samples(), epochs=2, seed=5)
    torch.manual_seed(2)
    second = train(model, samples(), epochs=2, seed=5)
    other = train(model, samples(), epochs=2, seed=6)
    assert same(weights(first.model), weights(second.model))
    assert [e.loss for e in first.history] == [e.loss for e in second.history]
    assert not same(weights(first.model), weights(other.model))


def test_leaves_model_modes_data_and_global_state_alone():
    model = dense(6, 16, 3, dropout=0.5, norm=True)
    model[1].eval()
    before = copy.deepcopy(model.state_dict())
    x, y = samples()
    x_before = x.clone()
    torch_state = torch.get_rng_state()
    flags = torch.is_grad_enabled(), torch.are_deterministic_algorithms_enabled()
    loader = DataLoader(TensorDataset(x, y), batch_size=16, shuffle=True)
    for data in ((x, y), loader):
        result = train(model, data, epochs=2)
        assert not result.model[1].training and result.model[0].training
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert torch.equal(x, x_before)
    assert torch.equal(torch.get_rng_state(), torch_state)
    assert flags == (torch.is_grad_enabled(), torch.are_deterministic_algorithms_enabled())


def test_forms_of_data_agree():
    x, y = samples(48)
    model = dense(6, 8, 3)
    pair = train(model, (x, y), epochs=1, batch_size=16, seed=2)
    arrays = train(model, (x.numpy(), y.numpy()), epochs=1, batch_size=16, seed=2)
    rows = torch.randperm(48, generator=torch.Generator().manual_seed(2)).split(16)
    listed = train(model, [(x[r], y[r]) for r in rows], epochs=1)
    loader = DataLoader(TensorDataset(x, y), batch_sampler=[r.tolist() for r in rows])
    loaded = train(model, loader, epochs=1)
    for other in (arrays, listed, loaded):
        assert same(weights(pair.model), weights(other.model))
    # Two batches in a list are batches, not a pair of arrays.
    halves = [(x[:24], y[:24]), (x[24:], y[24:])]
    assert evaluate(pair.model, halves) == evaluate(pair.model, (x, y))


def test_a_loader_without_a_generator_repeats_too():
    loader = DataLoader(TensorDataset(*samples()), batch_size=8, shuffle=True)
    model = dense(6, 8, 3)
    runs = [train(model, loader, epochs=2, seed=seed).model for seed in (4, 4, 5)]
    assert same(weights(runs[0]), weights(runs[1]))
    assert not same(weights(runs[0]), weights(runs[2]))


def test_fit_trains_in_place_and_draws_only_from_its_generator():
    model, data = dense(6, 8, 3), samples()
    wanted = train(model, data, epochs=2, optimizer=OPTIMIZERS["adam"], seed=9).model
    state = torch.get_rng_state()
    history = fit(
        model,
        data,
        epochs=2,
        optimizer=OPTIMIZERS["adam"](model),
        generator=torch.Generator().manual_seed(9),
    )
    assert same(weights(model), weights(wanted)) and len(history) == 2
    assert torch.equal(torch.get_rng_state(), state)


def test_callbacks_come_in_order_and_see_what_they_should():
    seen = []
    model, (x, y) = dense(6, 8, 3), samples(32)

    def note(name):
        def callback(step):
            gradient = next(step.model.parameters()).grad
            seen.append((name, step.epoch, step.number, gradient is not None))
            assert len(step.inputs) == len(step.targets) == 16
            assert step.model.training and step.model is not model

        return callback

    def after_epoch(epoch, trained, optimizer):
        seen.append(("epoch", epoch.number))
        assert optimizer.param_groups[0]["lr"] == 0.1 * 0.5 ** (epoch.number + 1)
        assert evaluate(trained, (x, y)) >= 0 and trained.training

    train(
        model,
        (x, y),
        epochs=2,
        batch_size=16,
        optimizer=OPTIMIZERS["sgd"],
        schedule=partial(StepLR, step_size=1, gamma=0.5),
        callbacks=Callbacks((note("f"),), (note("b1"), note("b2")), (note("s"),), (after_epoch,)),
    )
    step = [("f", False), ("b1", True), ("b2", True), ("s", True)]
    wanted = []
    for epoch in (0, 1):
        for number in (2 * epoch, 2 * epoch + 1):
            wanted += [(name, epoch, number, has_gradient) for name, has_gradient in step]
        wanted.append(("epoch", epoch))
    assert seen == wanted


def test_an_epoch_callback_ends_the_training_and_all_are_called():
    calls = []
    result = train(
        dense(6, 8, 3),
        samples(),
        epochs=9,
        callbacks=Callbacks(
            after_epoch=(
                lambda epoch, *_: epoch.number == 1,
                lambda epoch, *_: calls.append(epoch.number),
            )
        ),
    )
    assert len(result.history) == 2 and calls == [0, 1]


def test_penalty_is_weight_decay_when_it_is_half_the_square():
    def half_square(model):
        return 0.05 * sum(parameter.square().sum() for parameter in model.parameters())

    model, data = dense(6, 8, 3).double(), samples()
    data = (data[0].double(), data[1])
    penalised = train(
        model, data, epochs=3, optimizer=lambda m: SGD(m.parameters(), lr=0.1), penalty=half_square
    )
    decayed = train(
        model, data, epochs=3, optimizer=lambda m: SGD(m.parameters(), lr=0.1, weight_decay=0.1)
    )
    for a, b in zip(weights(penalised.model), weights(decayed.model), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)
    assert penalised.history[0].penalty > 0
    assert penalised.history[0].loss == pytest.approx(decayed.history[0].loss, rel=1e-12)


def test_soft_pruning_can_be_built_from_callbacks():
    def prune(step):
        with torch.no_grad():
            for parameter in step.model.parameters():
                parameter.masked_fill_(parameter.abs() < 0.05, 0)

    result = train(
        dense(6, 16, 3),
        samples(),
        epochs=20,
        optimizer=lambda m: SGD(m.parameters(), lr=0.1),
        penalty=lambda m: 1e-2 * sum(p.abs().sum() for p in m.parameters()),
        callbacks=Callbacks(after_step=(prune,)),
    )
    flat = torch.cat([parameter.flatten() for parameter in result.model.parameters()])
    assert 0 < (flat == 0).sum() < flat.numel()
    assert flat[flat != 0].abs().min() >= 0.05


def test_gates_can_be_built_from_callbacks():
    class Gated(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.block, self.last = dense(6, 8), dense(8, 8), dense(8, 3)
            self.keep = nn.Parameter(torch.tensor(0.5))
            self.gate = 1.0

        def forward(self, x):
            z = self.first(x)
            return self.last(z + self.gate * self.block(z).relu() if self.gate else z)

    sampler = torch.Generator().manual_seed(0)
    gates, gradients = [], []

    def sample(step):
        step.model.gate = float(torch.rand((), generator=sampler) < step.model.keep)
        gates.append(step.model.gate)

    def difference(step):
        model = step.model
        loss = {}
        with torch.no_grad():
            for model.gate in (0.0, 1.0):
                loss[model.gate] = functional.cross_entropy(model(step.inputs), step.targets)
        model.keep.grad = loss[1.0] - loss[0.0]
        gradients.append(model.keep.grad.item())

    model = Gated()
    train(
        model,
        samples(),
        epochs=10,
        optimizer=lambda m: Adam(m.parameters(), lr=1e-2),
        callbacks=Callbacks(before_forward=(sample,), after_backward=(difference,)),
    )
    assert set(gates) == {0.0, 1.0} and any(gradients)
    assert model.gate == 1.0


def test_neurons_can_be_cut_out_while_training():
    """Cutting a dead neuron from model and optimiser continues as the smaller network does."""
    x, y = samples()
    x = x.double()
    big = dense(6, 5, 3).double()
    with torch.no_grad():
        big[0].weight[2] = 0
        big[0].bias[2] = 0
        big[2].weight[:, 2] = 0
    kept = torch.tensor([0, 1, 3, 4])

    def cut(model, optimizer=None):
        sizes = [(model[0].weight, 0), (model[0].bias, 0), (model[2].weight, 1)]
        for parameter, axis in sizes:
            if optimizer is not None:
                state = optimizer.state[parameter]
                for key in ("exp_avg", "exp_avg_sq"):
                    state[key] = state[key].index_select(axis, kept)
            parameter.grad = None
            parameter.data = parameter.data.index_select(axis, kept)

    small = copy.deepcopy(big)
    cut(small)

    def after_step(step):
        if step.number == 5:
            cut(step.model, step.optimizer)

    adam = OPTIMIZERS["adam"]
    options = {"epochs": 4, "optimizer": adam, "batch_size": 16}
    got = train(big, (x, y), callbacks=Callbacks(after_step=(after_step,)), **options)
    wanted = train(small, (x, y), **options)
    assert got.model[0].weight.shape == (4, 6)
    for a, b in zip(weights(got.model), weights(wanted.model), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def test_a_loss_of_the_callers_own_on_real_targets():
    x, _ = samples(64)
    y = x @ torch.arange(6.0)[:, None]
    result = train(
        dense(6, 1),
        (x, y),
        epochs=60,
        batch_size=8,
        loss=functional.mse_loss,
        optimizer=lambda m: SGD(m.parameters(), lr=0.1),
    )
    assert result.history[-1].accuracy is None
    assert result.history[-1].loss < 1e-6
    with pytest.raises(ValueError, match=r"targets must be class numbers.*float32 \(64, 1\)"):
        evaluate(result.model, (x, y))


def test_one_logit_per_position_counts_positions():
    x = torch.randn(4, 3, 5, generator=torch.Generator().manual_seed(0))
    y = x.argmax(1)
    y[0, 0] = (y[0, 0] + 1) % 3
    assert evaluate(nn.Identity(), (x, y)) == 19 / 20
    result = train(nn.Conv1d(3, 3, 1), (x, y), epochs=1)
    assert 0 <= result.history[0].accuracy <= 1


def test_evaluate_is_in_evaluation_mode_and_batched():
    model = dense(6, 16, 3, dropout=0.9, norm=True)
    x, y = samples(50)
    before = copy.deepcopy(model.state_dict())
    model[1].eval()
    sizes = []
    hook = model.register_forward_pre_hook(lambda _, inputs: sizes.append(len(inputs[0])))
    accuracy = evaluate(model, (x, y), batch_size=20)
    hook.remove()
    assert sizes == [20, 20, 10]
    assert model[0].training and not model[1].training
    with mode(model, training=False):
        assert accuracy == (model(x).argmax(1) == y).double().mean().item()
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    with pytest.raises(FloatingPointError, match="an output is NaN"):
        evaluate(model, (x * torch.nan, y))


def test_learns_the_digits():
    digits = load_digits()
    x, y = (digits.images.reshape(-1, 64) / 16).astype(np.float32), digits.target
    model = dense(64, 64, 10)
    fitted, held_out = np.split(np.random.default_rng(0).permutation(len(x)), [1400])
    result = train(model, (x[fitted], y[fitted]), epochs=30)
    assert evaluate(model, (x[held_out], y[held_out])) < 0.3
    assert evaluate(result.model, (x[held_out], y[held_out])) > 0.95
    assert result.history[-1].accuracy > 0.95
    assert result.history[-1].loss < result.history[0].loss


def test_a_non_finite_loss_is_an_error_before_the_step():
    x, y = samples(64)
    x[40] = torch.nan
    model = dense(6, 8, 3)
    seen = []
    with pytest.raises(FloatingPointError, match=r"the loss is nan at step \d \(epoch 0\)"):
        train(
            model,
            (x, y),
            epochs=1,
            batch_size=16,
            callbacks=Callbacks(before_forward=(lambda step: seen.append(step.model),)),
        )
    assert all(parameter.isfinite().all() for parameter in seen[-1].parameters())
    with pytest.raises(FloatingPointError, match="the penalty is inf at step 0"):
        train(model, samples(), epochs=1, penalty=lambda m: next(m.parameters()).sum() + torch.inf)


def test_parameters_that_overflow_in_the_last_step_are_an_error():
    def overflow(step):
        with torch.no_grad():
            step.model[0].bias.fill_(torch.inf)

    with pytest.raises(FloatingPointError, match=r"'0.bias' is not finite after epoch 0"):
        train(
            dense(6, 3),
            samples(8),
            epochs=1,
            callbacks=Callbacks(after_step=(overflow,)),
        )


@pytest.mark.parametrize(
    ("data", "options", "message"),
    [
        (samples(), {"epochs": -1}, "epochs: got -1, want a whole number >= 0"),
        (samples(), {"epochs": 1, "batch_size": 0}, "batch_size: got 0, want a whole number >= 1"),
        ((samples()[0], samples(9)[1]), {"epochs": 1}, "there are 50 inputs but 9 targets"),
        (
            samples(0),
            {"epochs": 1},
            "data: got no sample, want at least one",
        ),
        ([], {"epochs": 1}, "data: got no sample, want at least one"),
        ((pair for pair in [samples(4)]), {"epochs": 2}, "a generator is used up"),
        (samples(), {"epochs": 1, "device": "meta"}, "device: got 'meta', want 'cpu' or 'cuda'"),
    ],
)
def test_wrong_arguments_are_told(data, options, message):
    with pytest.raises(ValueError, match=message):
        train(dense(6, 3), data, **options)


def test_no_epochs_return_an_equal_copy():
    model = dense(6, 3)
    result = train(model, samples(), epochs=0)
    assert result.history == [] and result.model is not model
    assert same(weights(result.model), weights(model))


def test_epochs_are_logged_not_printed(caplog, capsys):
    with caplog.at_level(logging.INFO, logger="retrain"):
        train(dense(6, 3), samples(), epochs=2)
    assert len(caplog.records) == 2 and "loss=" in caplog.text
    assert capsys.readouterr() == ("", "")


@pytest.mark.gpu
def test_trains_on_a_gpu():
    model = dense(6, 16, 3, dropout=0.2)
    state = torch.cuda.get_rng_state()
    runs = [train(model, samples(), epochs=3, device="cuda", seed=1) for _ in range(2)]
    assert next(runs[0].model.parameters()).is_cuda
    assert not next(model.parameters()).is_cuda
    assert same(weights(runs[0].model), weights(runs[1].model))
    assert torch.equal(torch.cuda.get_rng_state(), state)
    assert 0 <= evaluate(runs[0].model, samples()) <= 1
