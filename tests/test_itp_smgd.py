"""With one objective SMGD, MAdam, MRMSProp are torch's optimisers; with more, as in the paper."""

import copy
import io

import numpy as np
import pytest
import torch
from networks import dense
from torch import nn

from retrain.trainers.itp.min_norm import min_norm_weights
from retrain.trainers.itp.objectives import Complexity, gradients
from retrain.trainers.itp.schedules import time_decay
from retrain.trainers.itp.smgd import SMGD, MAdam, MRMSProp

PAIRS = {
    "sgd": (lambda p, **o: SMGD(p, 0.05, **o), lambda p: torch.optim.SGD(p, 0.05)),
    "momentum": (
        lambda p, **o: SMGD(p, 0.05, 0.9, **o),
        lambda p: torch.optim.SGD(p, 0.05, momentum=0.9),
    ),
    "adam": (
        lambda p, **o: MAdam(p, 1e-2, (0.8, 0.95), 1e-7, **o),
        lambda p: torch.optim.Adam(p, 1e-2, betas=(0.8, 0.95), eps=1e-7),
    ),
    "rmsprop": (
        lambda p, **o: MRMSProp(p, 1e-2, 0.9, 1e-7, **o),
        lambda p: torch.optim.RMSprop(p, 1e-2, alpha=0.9, eps=1e-7),
    ),
}


def batch(step, dtype=torch.float32):
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(8, 6, generator=generator)
    return x.to(dtype), torch.randint(0, 3, (8,), generator=generator)


def loss_of(model, step, dtype=torch.float32):
    x, y = batch(step, dtype)
    return nn.functional.cross_entropy(model(x), y)


@pytest.mark.parametrize("decay", [0.0, 0.1])
@pytest.mark.parametrize("pair", PAIRS)
def test_one_objective_is_the_plain_optimiser_step_for_step(pair, decay):
    ours, theirs = dense(6, 9, 3), dense(6, 9, 3)
    make_ours, make_theirs = PAIRS[pair]
    optimizers = [make_ours(ours.parameters(), objectives=1), make_theirs(theirs.parameters())]
    schedules = [time_decay(optimizer, decay) for optimizer in optimizers]
    for step in range(50):
        for model, optimizer, schedule in zip((ours, theirs), optimizers, schedules, strict=True):
            optimizer.zero_grad()
            loss_of(model, step).backward()
            optimizer.step()
            schedule.step()
        for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
            assert torch.equal(a, b)
    assert optimizers[0].trade_offs == [[1.0]] * 50
    assert optimizers[0].param_groups[0]["lr"] == pytest.approx(
        make_theirs(theirs.parameters()).param_groups[0]["lr"] / (1 + 50 * decay)
    )


@pytest.mark.parametrize("pair", PAIRS)
def test_the_same_objective_twice_is_the_plain_optimiser_too(pair):
    """g_1 = g_2: whatever the shares, the step is one objective's; to rounding."""
    ours, theirs = dense(6, 9, 3, dtype=torch.float64), dense(6, 9, 3, dtype=torch.float64)
    make_ours, make_theirs = PAIRS[pair]
    optimizer, plain = make_ours(ours.parameters()), make_theirs(theirs.parameters())
    for step in range(20):
        optimizer.zero_grad()
        loss = loss_of(ours, step, torch.float64)
        optimizer.backward([loss, loss])
        optimizer.step()
        plain.zero_grad()
        loss_of(theirs, step, torch.float64).backward()
        plain.step()
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def by_hand(pair, histories, share):
    """The step of section 3.2 from each objective's gradients so far, in numpy."""
    total = 0.0
    for weight, history in zip(share, histories, strict=True):
        first, second = np.zeros_like(history[0]), np.zeros_like(history[0])
        for g in history:
            if pair == "momentum":
                first = 0.9 * first + g
            elif pair == "adam":
                first, second = 0.8 * first + 0.2 * g, 0.95 * second + 0.05 * g**2
            elif pair == "rmsprop":
                second = 0.9 * second + 0.1 * g**2
        k = len(history)
        if pair == "sgd":
            direction = 0.05 * history[-1]
        elif pair == "momentum":
            direction = 0.05 * first
        elif pair == "adam":
            direction = 1e-2 * first / (1 - 0.8**k)
            direction = direction / (np.sqrt(second / (1 - 0.95**k)) + 1e-7)
        else:
            direction = 1e-2 * history[-1] / (np.sqrt(second) + 1e-7)
        total = total + weight * direction
    return -total


@pytest.mark.parametrize("pair", PAIRS)
def test_two_objectives_mix_steps_with_moments_of_their_own(pair):
    model = dense(6, 9, 3, dtype=torch.float64)
    omega = Complexity(("0.weight", "2.weight"))
    optimizer = PAIRS[pair][0](model.parameters())
    histories = [[], []]
    for step in range(12):
        optimizer.zero_grad()
        loss_of(model, step, torch.float64).backward()
        second = gradients(omega, model, optimizer.parameters())
        optimizer.set_gradients(1, second)
        rows = [
            [p.grad for p in model.parameters()],
            [
                torch.zeros_like(p) if g is None else g
                for p, g in zip(model.parameters(), second, strict=True)
            ],
        ]
        flat = [torch.cat([g.flatten() for g in row]).numpy().copy() for row in rows]
        for history, g in zip(histories, flat, strict=True):
            history.append(g)
        before = nn.utils.parameters_to_vector(model.parameters()).detach().numpy().copy()
        optimizer.step()
        share = min_norm_weights(np.array(flat) @ np.array(flat).T)
        after = nn.utils.parameters_to_vector(model.parameters()).detach().numpy()
        np.testing.assert_allclose(
            after - before, by_hand(pair, histories, share), rtol=1e-9, atol=1e-13
        )
        np.testing.assert_allclose(optimizer.trade_offs[-1], share, atol=1e-12)
    assert len(optimizer.trade_offs) == 12
    assert any(0 < weights[1] < 1 for weights in optimizer.trade_offs)


def test_smgd_finds_a_stationary_point_of_three_quadratics():
    """(w - a_j)^2: the Pareto set is the triangle of the a_j; no step leaves it."""
    corners = torch.tensor([[0.0, 0.0], [4.0, 0.0], [0.0, 4.0]], dtype=torch.float64)
    w = nn.Parameter(torch.tensor([5.0, 6.0], dtype=torch.float64))
    optimizer = SMGD([w], 0.05, objectives=3)
    for _ in range(400):
        optimizer.zero_grad()
        optimizer.backward([(w - corner).square().sum() for corner in corners])
        optimizer.step()
    assert w.min() > -1e-6 and w.sum() < 4 + 1e-6
    share = torch.tensor(optimizer.trade_offs[-1], dtype=torch.float64)
    torch.testing.assert_close(share @ corners, w.detach(), rtol=0, atol=1e-6)


def test_every_objective_falls_along_the_direction():
    model = dense(6, 9, 3, dtype=torch.float64)
    omega = Complexity(("0.weight", "2.weight"))
    optimizer = SMGD(model.parameters(), 1e-4)
    for step in range(5):
        before = loss_of(model, 0, torch.float64).item(), omega(model).item()
        optimizer.zero_grad()
        optimizer.backward([loss_of(model, 0, torch.float64), omega(model)])
        optimizer.step()
        assert loss_of(model, 0, torch.float64).item() < before[0], step
        assert omega(model).item() < before[1]


def test_a_zero_gradient_stops_the_step():
    model = dense(6, 9, 3)
    optimizer = SMGD(model.parameters(), 0.1)
    before = copy.deepcopy(model.state_dict())
    loss_of(model, 0).backward()
    optimizer.set_gradients(1, [None] * 4)
    optimizer.step()
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert optimizer.trade_offs == [[0.0, 1.0]]


@pytest.mark.parametrize("pair", PAIRS)
def test_states_go_through_a_file_and_training_goes_on_bitwise(pair):
    def steps(model, optimizer, numbers):
        for step in numbers:
            optimizer.zero_grad()
            optimizer.backward([loss_of(model, step), Complexity(("0.weight",))(model)])
            optimizer.step()

    straight = dense(6, 9, 3)
    first = PAIRS[pair][0](straight.parameters())
    steps(straight, first, range(5))
    file = io.BytesIO()
    torch.save([straight.state_dict(), first.state_dict()], file)
    steps(straight, first, range(5, 10))

    file.seek(0)
    weights, state = torch.load(file, weights_only=True)
    resumed = dense(6, 9, 3, seed=1)
    resumed.load_state_dict(weights)
    second = PAIRS[pair][0](resumed.parameters())
    second.load_state_dict(state)
    steps(resumed, second, range(5, 10))
    for a, b in zip(straight.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a, b)
    assert first.trade_offs == second.trade_offs and len(second.trade_offs) == 10


def test_a_closure_and_groups_with_rates_of_their_own():
    model = dense(6, 9, 3)
    frozen = copy.deepcopy(model[2].state_dict())
    optimizer = SMGD(
        [{"params": model[0].parameters()}, {"params": model[2].parameters(), "lr": 1e-30}], 0.1
    )

    def closure():
        optimizer.zero_grad()
        loss = loss_of(model, 0)
        optimizer.backward([loss, Complexity(("0.weight",))(model)])
        return loss

    assert optimizer.step(closure).item() > 0
    assert all(torch.equal(value, frozen[key]) for key, value in model[2].state_dict().items())


def test_parameters_without_any_gradient_are_left_alone():
    model = dense(6, 9, 3)
    spare = nn.Parameter(torch.ones(3))
    optimizer = MAdam([*model.parameters(), spare])
    optimizer.backward([loss_of(model, 0), Complexity(("0.weight",))(model)])
    optimizer.step()
    assert torch.equal(spare, torch.ones(3)) and spare not in optimizer.state


def test_misuse_is_told():
    model = dense(6, 9, 3)
    optimizer = MAdam(model.parameters())
    loss_of(model, 0).backward()
    with pytest.raises(RuntimeError, match="objective 1: its gradient was not handed over"):
        optimizer.step()
    with pytest.raises(ValueError, match=r"1 to 1 was want \(0 is in .grad\), not 2"):
        optimizer.set_gradients(2, [])
    with pytest.raises(ValueError, match="gradients: got 1, want one for each of 4 parameters"):
        optimizer.set_gradients(1, [None])
    with pytest.raises(ValueError, match=r"gradients: got shape \(2,\), want \(9, 6\)"):
        optimizer.set_gradients(1, [torch.ones(2), None, None, None])
    with pytest.raises(ValueError, match="losses: got 1, want 2"):
        optimizer.backward([loss_of(model, 0)])
    optimizer.set_gradients(1, [torch.full_like(p, torch.nan) for p in model.parameters()])
    with pytest.raises(FloatingPointError, match="a gradient is NaN or infinite"):
        optimizer.step()
    other = SMGD(dense(6, 9, 3).parameters(), objectives=3)
    with pytest.raises(ValueError, match="state_dict: got 2, want 3 objectives"):
        other.load_state_dict(optimizer.state_dict())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: SMGD(p, -1.0), r"lr: got -1\.0, want a positive finite number"),
        (lambda p: SMGD(p, momentum=1.0), "momentum: got 1.0, want at least 0 and below 1"),
        (lambda p: SMGD(p, objectives=0), "objectives: got 0, want a whole number >= 1"),
        (lambda p: MAdam(p, betas=(0.9, 1.0)), r"betas: got 1\.0, want at least 0 and below 1"),
        (lambda p: MAdam(p, eps=0.0), r"eps: got 0\.0, want a positive finite number"),
        (lambda p: MRMSProp(p, alpha=-0.1), r"alpha: got -0\.1, want at least 0 and below 1"),
    ],
)
def test_wrong_options_are_told(make, message):
    with pytest.raises(ValueError, match=message):
        make(dense(6, 9, 3).parameters())


@pytest.mark.gpu
@pytest.mark.parametrize("pair", PAIRS)
def test_steps_on_a_gpu_as_on_the_cpu(pair):
    models = [dense(6, 9, 3).double(), dense(6, 9, 3).double().cuda()]
    for model in models:
        optimizer = PAIRS[pair][0](model.parameters())
        for step in range(5):
            x, y = batch(step, torch.float64)
            place = next(model.parameters()).device
            loss = nn.functional.cross_entropy(model(x.to(place)), y.to(place))
            optimizer.zero_grad()
            optimizer.backward([loss, Complexity(("0.weight",))(model)])
            optimizer.step()
    for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(a, b.cpu(), rtol=1e-9, atol=1e-11)
