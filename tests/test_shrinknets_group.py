"""Group sparsity: the formula, the proximal step, and training to the convex optimum by it."""

import copy

import cvxpy as cp
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.optim import SGD

from retrain.trainers.loop.callbacks import Callbacks
from retrain.trainers.loop.states import seeded
from retrain.trainers.loop.supervised import fit
from retrain.trainers.shrinknets.group import (
    Group,
    group_norms,
    group_penalty,
    group_size,
    groups_of,
    proximal_step,
    shrink_groups,
)
from retrain.trainers.shrinknets.regression import Regression
from retrain.trainers.shrinknets.regression_solvers import solve_group


def network():
    with seeded(0, torch.device("cpu")):
        return nn.Sequential(
            *(nn.Conv2d(2, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16, 5)),
            *(nn.ReLU(), nn.Linear(5, 3, bias=False)),
        ).double()


def squared_error(outputs, targets):
    """Mean over the samples of |y - Ax|^2, as the regression forms have it."""
    return (outputs - targets).square().sum(1).mean()


def test_groups_are_what_would_go_with_a_neuron():
    model = network()
    columns = groups_of(model)
    assert list(columns) == ["3", "5"]
    weight = model[3].weight.detach()
    wanted = torch.stack([weight[:, 4 * j : 4 * j + 4].norm() for j in range(4)])
    torch.testing.assert_close(group_norms(columns["3"]).detach(), wanted)
    assert group_size(columns["3"]) == 20 and group_size(columns["5"]) == 3
    rows = groups_of(model, "outputs")
    assert list(rows) == ["0", "3"]
    convolution = model[0]
    wanted = torch.stack(
        [
            torch.cat([convolution.weight[i].flatten(), convolution.bias[i : i + 1]]).norm()
            for i in range(4)
        ]
    )
    torch.testing.assert_close(group_norms(rows["0"]), wanted)
    assert group_size(rows["0"]) == 2 * 9 + 1 and group_size(rows["3"]) == 17
    inputs = groups_of(model, layers=["0"])
    wanted = model[0].weight.movedim(1, 0).flatten(1).norm(dim=1)
    torch.testing.assert_close(group_norms(inputs["0"]), wanted)


def test_the_penalty_is_the_formula():
    model = network()
    wanted = sum(
        np.sqrt(size) * sum(norm.item() for norm in group_norms(groups))
        for groups, size in zip(groups_of(model).values(), (20, 3), strict=True)
    )
    assert group_penalty(groups_of(model), 0.3).item() == pytest.approx(0.3 * wanted)


@pytest.mark.parametrize("amount", [0.0, 0.7, 2.0, 100.0])
def test_the_proximal_step_against_cvxpy(amount):
    rng = np.random.default_rng(0)
    start = rng.standard_normal((3, 5)) * (0.2, 0.5, 1, 2, 0)
    new = cp.Variable((3, 5))
    cost = cp.sum_squares(new - start) / 2 + amount * cp.sum(cp.norm(new, 2, axis=0))
    cp.Problem(cp.Minimize(cost)).solve(solver="CLARABEL")
    parameter = torch.tensor(start)
    zero = shrink_groups((Group(parameter, 1),), amount)
    np.testing.assert_allclose(parameter, new.value, atol=1e-5)
    norms = np.linalg.norm(start, axis=0)
    assert zero.tolist() == (norms <= amount).tolist()
    assert (parameter[:, zero] == 0).all() and (parameter[:, ~zero] != 0).all()


entries = st.lists(st.floats(-3, 3), min_size=24, max_size=24)


@settings(deadline=None, max_examples=60)
@given(a=entries, b=entries, amount=st.floats(0, 5), axis=st.sampled_from([0, 1]))
def test_the_proximal_step_is_firmly_nonexpansive(a, b, amount, axis):
    """|prox a - prox b|^2 <= <prox a - prox b, a - b>, with a span of 2 along the axis."""
    x, y = (torch.tensor(v, dtype=torch.float64).view(4, 6) for v in (a, b))
    new = []
    for start in (x, y):
        parameter = start.clone()
        shrink_groups((Group(parameter, axis, 2),), amount)
        new.append(parameter)
    moved, before = new[0] - new[1], x - y
    assert moved.square().sum() <= (moved * before).sum() + 1e-9
    # Groups move towards zero, none past it.
    for start, after in zip((x, y), new, strict=True):
        assert (after * start >= 0).all() and (after.abs() <= start.abs() + 1e-12).all()


def test_groups_of_several_parameters_shrink_together():
    weight, bias = torch.tensor([[3.0, 0.0], [0.1, 0.1]]), torch.tensor([4.0, 0.1])
    zero = shrink_groups((Group(weight, 0), Group(bias, 0)), 1.0)
    assert zero.tolist() == [False, True]
    torch.testing.assert_close(weight, torch.tensor([[2.4, 0.0], [0.0, 0.0]]))
    torch.testing.assert_close(bias, torch.tensor([3.2, 0.0]))


def test_sgd_with_proximal_steps_finds_the_convex_optimum():
    """Full batches: proximal gradient descent on (3); its optimum is that of `solve_group`."""
    rng = np.random.default_rng(0)
    X = rng.standard_normal((50, 6))
    Y = X @ (rng.standard_normal((3, 6)) * (1, 0, 2, 0, 0.02, 0)).T
    Y += 0.1 * rng.standard_normal(Y.shape)
    problem = Regression(X, Y, "linear")
    wanted = solve_group(problem, 0.4 * np.sqrt(3), tolerance=1e-11)
    model = nn.Sequential(nn.Linear(6, 3, bias=False)).double()
    fit(
        model,
        (X, Y),
        epochs=400,
        optimizer=SGD(model.parameters(), lr=1 / problem.curvature),
        generator=torch.Generator().manual_seed(0),
        loss=squared_error,
        batch_size=50,
        callbacks=Callbacks(after_step=(proximal_step("inputs", ("0",), 0.4),)),
    )
    np.testing.assert_allclose(model[0].weight.detach(), wanted.A, atol=1e-7)
    zero = (wanted.A == 0).all(0)
    assert 0 < zero.sum() < 6 and ((model[0].weight == 0).all(0).numpy() == zero).all()


def test_strength_zero_is_the_plain_optimiser():
    x = torch.randn(30, 2, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    y = torch.arange(30) % 3
    models = [network(), network()]
    for model, calls in zip(models, ((), (proximal_step("outputs", None, 0.0),)), strict=True):
        fit(
            model,
            (x, y),
            epochs=3,
            optimizer=SGD(model.parameters(), lr=0.1, momentum=0.9),
            generator=torch.Generator().manual_seed(0),
            batch_size=8,
            callbacks=Callbacks(after_step=calls),
        )
    for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert torch.equal(a, b)
    before = copy.deepcopy(network().state_dict())
    assert not torch.equal(models[0][0].weight, before["0.weight"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"at": "between"}, "at: got 'between', want one of inputs, outputs"),
        ({"layers": ["1"]}, "layers: '0', '3', '5' have neurons .* at the inputs, not '1'"),
        ({"at": "outputs", "layers": ["5"]}, "layers: '0', '3' have neurons .* outputs, not '5'"),
        ({"layers": []}, "not no layer at all"),
    ],
)
def test_wrong_layers_are_told(options, message):
    with pytest.raises(ValueError, match=message):
        groups_of(network(), **options)
