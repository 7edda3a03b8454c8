"""The gradient in theta: (26) is unbiased, (27) is (26) for small weights, projection, pressure."""

import copy
import itertools

import numpy as np
import pytest
import torch
from gated_cases import small, wbaw
from networks import samples
from torch import nn
from torch.nn import functional

from retrain.trainers.gates.gradients import (
    MeanGradient,
    Pressure,
    exact_difference,
    open_gates,
    project,
)
from retrain.trainers.gates.network import gates_of
from retrain.verify import gated_network as verified


def loss_of(model, gates, pattern, x, y):
    with open_gates(gates, pattern), torch.no_grad():
        return float(functional.cross_entropy(model(x), y))


def probability(pattern, theta):
    return float(np.prod([t if p else 1 - t for p, t in zip(pattern, theta, strict=True)]))


def patterns(count):
    return list(itertools.product((True, False), repeat=count))


@pytest.mark.parametrize("norm", [False, True])
def test_the_mean_of_26_over_all_gate_patterns_is_the_exact_gradient(norm):
    x, y = samples(32, dtype=torch.float64)
    model = small(3, norm=norm).double().train()
    gates = list(gates_of(model).values())
    theta = np.array([0.3, 0.8, 0.55])

    def expected_cost(values):
        return sum(probability(p, values) * loss_of(model, gates, p, x, y) for p in patterns(3))

    mean = sum(
        probability(p, theta) * exact_difference(model, gates, p, x, y, functional.cross_entropy)
        for p in patterns(3)
    )
    for index in range(3):
        on, off = theta.copy(), theta.copy()
        on[index], off[index] = 1, 0
        # C is linear in each theta: the difference of its ends is the derivative.
        assert float(mean[index]) == pytest.approx(expected_cost(on) - expected_cost(off), rel=1e-5)


def test_26_and_27_are_those_of_the_verified_formulas():
    """The same network in numpy, whose statements `retrain verify` checks."""
    rng = np.random.default_rng(0)
    network = verified.random_network(3, 4, rng, hidden=5)
    x, y = rng.standard_normal((20, 4)), rng.standard_normal((20, 2))
    model = nn.Sequential(*(wbaw(4, 5, skip=nn.Linear(4, 4, bias=False)) for _ in range(3)))
    model.append(nn.Linear(4, 2)).double()
    with torch.no_grad():
        for module, block in zip(model, network.blocks, strict=False):
            for tensor, value in (
                (module.block[0].weight, block.W1),
                (module.block[0].bias, block.b1),
                (module.block[2].weight, block.W2),
                (module.block[2].bias, block.b2),
                (module.skip.weight, block.W3),
            ):
                tensor.copy_(torch.from_numpy(value))
        model[3].weight.copy_(torch.from_numpy(network.W))
        model[3].bias.copy_(torch.from_numpy(network.b))
    inputs, targets = torch.from_numpy(x), torch.from_numpy(y)

    def loss(outputs, wanted):
        return 0.5 * (outputs - wanted).square().sum(1).mean()

    gates = list(gates_of(model).values())
    for pattern in patterns(3):
        got = exact_difference(model, gates, pattern, inputs, targets, loss)
        xi = torch.tensor([float(p) for p in pattern], dtype=torch.float64, requires_grad=True)
        with open_gates(gates, pattern, xi):
            loss(model(inputs), targets).backward()
        _, deltas = verified.cost_gradient(network, x, y, pattern)
        before = verified.activations(network, x, pattern)
        for index, block in enumerate(network.blocks):
            ends = []
            for gate in (1, 0):
                ends.append([*pattern[:index], gate, *pattern[index + 1 :]])
            on, off = (verified.costs(network, x, y, end).mean() for end in ends)
            assert float(got[index]) == pytest.approx(on - off, rel=1e-5)
            hidden = np.tanh(before[index] @ block.W1.T + block.b1)
            estimate = np.sum(deltas[index] * (hidden @ block.W2.T + block.b2)) / len(x)
            assert float(xi.grad[index]) == pytest.approx(estimate, rel=1e-10)


def test_27_tends_to_26_as_the_last_weights_of_a_block_vanish():
    x, y = samples(32, dtype=torch.float64)
    given = small(3).double()
    gaps = []
    for factor in (1e-1, 1e-2, 1e-3):
        model = copy.deepcopy(given)
        gates = list(gates_of(model).values())
        with torch.no_grad():
            for gated in gates:
                gated.block[2].weight.mul_(factor)
                gated.block[2].bias.mul_(factor)
        for pattern in ((True, False, True), (False, True, False)):
            xi = torch.tensor([float(p) for p in pattern], dtype=torch.float64, requires_grad=True)
            with open_gates(gates, pattern, xi):
                functional.cross_entropy(model(x), y).backward()
            exact = exact_difference(model, gates, pattern, x, y, functional.cross_entropy)
            gaps.append(float((xi.grad - exact).abs().max() / exact.abs().max()))
    assert max(gaps[:2]) > 1e-3  # it is biased where they are not small
    assert gaps[2] < 0.15 * gaps[0] + 1e-9 and gaps[4] < 0.015 * gaps[0] + 1e-9


@pytest.mark.parametrize("norm", [False, True])
def test_copies_in_one_batch_are_evaluations_one_by_one(norm):
    x, y = samples(24)
    model = small(4, norm=norm).train()
    gates = list(gates_of(model).values())
    before = copy.deepcopy(model.state_dict())
    for pattern in patterns(4)[::3]:
        base = loss_of(model, gates, pattern, x, y)
        wanted = []
        for index in range(4):
            flipped = [*pattern]
            flipped[index] = not flipped[index]
            sign = 1 if pattern[index] else -1
            wanted.append(sign * (base - loss_of(model, gates, flipped, x, y)))
        model.load_state_dict(before)
        for largest in (1, 50, 4096):
            got = exact_difference(
                model, gates, pattern, x, y, functional.cross_entropy, largest_batch=largest
            )
            torch.testing.assert_close(got, torch.tensor(wanted), rtol=1e-4, atol=2e-6)
            assert all(g.switch.is_open and g.switch.pattern is None for g in gates)
    after = model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_copies_run_only_the_blocks_they_are_open_for():
    x, y = samples(10)
    model = small(3)
    gates = list(gates_of(model).values())
    rows = []
    for gated in gates:
        gated.block.register_forward_hook(lambda _, inputs, __: rows.append(len(inputs[0])))
    exact_difference(model, gates, (True, False, True), x, y, functional.cross_entropy)
    assert rows == [30, 10, 30]  # four copies of ten samples, of which 3, 1 and 3 are open


def test_projection():
    theta = torch.tensor([-0.5, 0.0, 0.3, 1.0, 7.0])
    project(theta)
    assert theta.tolist() == pytest.approx([0.0, 0.0, 0.3, 1.0, 1.0])


def test_pressure_is_constant_or_rises_and_differs_by_layer():
    names = ["stage1.block1", "stage3.block1", "stage3.block2"]
    assert Pressure(-200.0).at(0, names).tolist() == [-200.0] * 3
    rising = Pressure(-250.0, warmup=5, factors=(("stage3.*", 5.0), ("*", 1.0)))
    assert rising.at(0, names).tolist() == [0.0, 0.0, 0.0]
    assert rising.at(2, names).tolist() == pytest.approx([-100, -500, -500])
    for epoch in (5, 100):
        assert rising.at(epoch, names).tolist() == pytest.approx([-250, -1250, -1250])
    assert rising.at(0, []).shape == (0,)


def test_mean_gradient_is_zero_at_a_minimum_where_batches_differ():
    model = nn.Linear(1, 1, bias=False)
    mean = MeanGradient()
    assert mean.size(torch.tensor([0.5])) == float("inf")
    for value in (1.0, -1.0):
        model.weight.grad = torch.tensor([[value]])
        mean.add(model, torch.tensor([value]), 0.0)
    assert mean.size(torch.tensor([0.5])) == 0
    # Half of the entries are 1 on average: weight decay's part of the gradient.
    model.weight.data.fill_(2.0)
    for value in (1.0, -1.0):
        model.weight.grad = torch.tensor([[value]])
        mean.add(model, torch.tensor([0.0]), 0.5)
    assert mean.size(torch.tensor([0.5])) == pytest.approx(0.5 / 2**0.5)


@pytest.mark.parametrize(
    ("theta", "slope", "counts"), [(0, 1, 0), (0, -1, 1), (1, 1, 1), (1, -1, 0)]
)
def test_mean_gradient_at_a_bound_counts_inwards_only(theta, slope, counts):
    mean = MeanGradient()
    mean.add(nn.Identity(), torch.tensor([float(slope)]), 0.0)
    assert mean.size(torch.tensor([float(theta)])) == counts
