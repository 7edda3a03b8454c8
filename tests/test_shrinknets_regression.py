"""Regression forms against closed forms, a second solver, and what the penalties come to."""

from itertools import pairwise

import cvxpy as cp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize_scalar

from retrain.trainers.shrinknets.regression import (
    Regression,
    column_sparsity,
    equivalent_penalty,
    group_objective,
    shrink_objective,
    split_columns,
)
from retrain.trainers.shrinknets.regression_solvers import solve_group, solve_shrink
from retrain.verify.shrinknets import Regression as Verified
from retrain.verify.shrinknets import group_optimum, shrink_value


def linear(seed=0, samples=40, p=7, n=3):
    rng = np.random.default_rng(seed)
    truth = rng.standard_normal((n, p)) * (np.arange(p) < p / 2)
    X = rng.standard_normal((samples, p))
    return Regression(X, X @ truth.T + 0.1 * rng.standard_normal((samples, n)), "linear")


def logistic(seed=0, samples=60, p=5, classes=3):
    rng = np.random.default_rng(seed)
    X = np.column_stack([rng.standard_normal((samples, p)), np.ones(samples)])
    scores = X @ rng.standard_normal((classes, p + 1)).T * (1.5, 1, 0.5)
    labels = (scores + rng.gumbel(size=scores.shape)).argmax(1)
    return Regression(X, np.eye(classes)[labels], "logistic", free=1)


def orthonormal(seed=0, samples=30, p=6, n=3):
    """X^T X = m I: the columns decouple, and the plain fit is C = Y^T X / m."""
    rng = np.random.default_rng(seed)
    X = np.sqrt(samples) * np.linalg.qr(rng.standard_normal((samples, p)))[0]
    sizes = rng.uniform(0.2, 3, p)
    Y = X @ (rng.standard_normal((n, p)) * sizes).T + 0.1 * rng.standard_normal((samples, n))
    return Regression(X, Y, "linear")


@pytest.mark.parametrize("problem", [linear(), logistic()], ids=["linear", "logistic"])
def test_gradient_and_curvature(problem):
    rng = np.random.default_rng(1)
    shape = (problem.Y.shape[1], problem.X.shape[1])
    A, D = rng.standard_normal(shape), rng.standard_normal(shape)
    slope = (problem.loss(A + 1e-6 * D) - problem.loss(A - 1e-6 * D)) / 2e-6
    assert slope == pytest.approx(np.sum(problem.gradient(A) * D), rel=1e-6)
    for scale in (0.01, 1, 10):
        moved = np.linalg.norm(problem.gradient(A + scale * D) - problem.gradient(A))
        assert moved <= problem.curvature * np.linalg.norm(scale * D) * (1 + 1e-12)
    # The bound is reached by the squared error along the leading direction.
    if problem.kind == "linear":
        top = np.outer(np.eye(3)[0], np.linalg.svd(problem.X)[2][0])
        moved = problem.gradient(A + top) - problem.gradient(A)
        assert np.linalg.norm(moved) == pytest.approx(problem.curvature)


@pytest.mark.parametrize("strength", [0.0, 0.05, 0.5, 3.0, 1e3])
def test_group_sparsity_is_the_convex_optimum_linear(strength):
    problem = linear()
    fit = solve_group(problem, strength, tolerance=1e-10)
    m = len(problem.X)
    value, _ = group_optimum(Verified(problem.X.T, problem.Y.T, strength * m, np.zeros((0, 0, 0))))
    assert fit.converged
    assert fit.objective == pytest.approx(value / m, rel=1e-7)
    assert fit.objective == pytest.approx(group_objective(problem, fit.A, strength))
    if strength == 1e3:
        assert not fit.A.any()
    if strength == 3.0:
        assert 0 < column_sparsity(fit.A) < 1
        assert (np.abs(fit.A).max(0) == 0).sum() == 7 * column_sparsity(fit.A)


@pytest.mark.parametrize("strength", [0.02, 0.1])
def test_group_sparsity_is_the_convex_optimum_logistic(strength):
    problem = logistic()
    A = cp.Variable((3, 6))
    scores = problem.X @ A.T
    fitted = cp.sum(cp.log_sum_exp(scores, axis=1)) - cp.sum(cp.multiply(problem.Y, scores))
    penalty = strength * cp.sum(cp.norm(A[:, :5], 2, axis=0))
    task = cp.Problem(cp.Minimize(fitted / len(problem.X) + penalty))
    task.solve(solver="CLARABEL")
    fit = solve_group(problem, strength, tolerance=1e-10, gradients=20_000)
    assert fit.objective == pytest.approx(task.value, rel=1e-6)
    assert fit.A[:, 5].any()


def test_group_sparsity_closed_form_on_orthonormal_inputs():
    problem = orthonormal()
    plain = problem.Y.T @ problem.X / len(problem.X)
    norms = np.linalg.norm(plain, axis=0)
    strength = float(2 * np.sort(norms)[2] + 1e-3)  # three columns go
    wanted = plain * np.maximum(1 - strength / 2 / norms, 0)
    fit = solve_group(problem, strength, tolerance=1e-12)
    np.testing.assert_allclose(fit.A, wanted, atol=1e-9)
    assert (fit.A == 0).all(0).sum() == 3


norms = st.floats(1e-3, 10)
strengths = st.floats(1e-3, 10)


@settings(deadline=None, max_examples=60)
@given(norm=norms, strength=strengths, second=strengths, power=st.sampled_from([1, 2]))
def test_the_penalty_of_a_split_column_is_the_least_there_is(norm, strength, second, power):
    def cost(log_b):
        b = np.exp(log_b)
        return strength * b + second * norm**power / b**power

    least = minimize_scalar(cost, bounds=(-12, 12), method="bounded", options={"xatol": 1e-10}).fun
    wanted = equivalent_penalty(np.array(norm), strength, second, power)
    assert wanted == pytest.approx(least, rel=1e-7)
    column = np.array([[norm * 0.6], [norm * -0.8]]) if power == 2 else np.array([[norm], [0.0]])
    A, beta = split_columns(column, strength, second, power)
    np.testing.assert_allclose(A * beta, column)
    paid = strength * beta.sum() + second * np.sum(np.abs(A) ** power)
    assert paid == pytest.approx(wanted, rel=1e-9)


@pytest.mark.parametrize("power", [1, 2])
@pytest.mark.parametrize("problem", [linear(), logistic()], ids=["linear", "logistic"])
def test_shrinknet_never_rises_and_ends_where_it_cannot_fall(problem, power):
    values = [
        solve_shrink(
            problem, 0.1, 0.05, power=power, gradients=count, start=solve_group(problem, 0).A
        ).objective
        for count in (25, 50, 100, 200, 400)  # whole tangents
    ]
    assert all(later <= earlier + 1e-12 for earlier, later in pairwise(values))
    fit = solve_shrink(problem, 0.1, 0.05, power=power, gradients=40_000, tolerance=1e-11)
    assert fit.converged and fit.objective <= values[-1] + 1e-9
    # Stationary: for columns that are left, the gradient balances the equivalent penalty's slope.
    C = fit.A[:, problem.penalised]
    gradient = problem.gradient(fit.A)
    for j in np.flatnonzero(np.abs(C).max(0) > 0):
        size = np.linalg.norm(C[:, j]) if power == 2 else np.abs(C[:, j]).sum()
        h = 1e-6 * size
        up, down = (equivalent_penalty(np.array(size + d), 0.1, 0.05, power) for d in (h, -h))
        slope = (up - down) / (2 * h)
        if power == 2:
            np.testing.assert_allclose(gradient[:, j], -slope * C[:, j] / size, atol=2e-5)
        else:
            alive = C[:, j] != 0
            np.testing.assert_allclose(gradient[alive, j], -slope * np.sign(C[alive, j]), atol=2e-5)
    # The switches are balanced against the weights, so that the folded value is all there is.
    balanced = split_columns(C, 0.1, 0.05, power)[1]
    np.testing.assert_allclose(np.abs(fit.beta[problem.penalised]), balanced, atol=1e-4)
    if problem.free:
        np.testing.assert_allclose(gradient[:, -1], 0, atol=1e-5)
        assert fit.beta[-1] == 1


def test_shrinknet_closed_form_on_orthonormal_inputs():
    """Each column is its plain fit, shortened: the scalar problem solved by a fine search."""
    problem = orthonormal(seed=2)
    strength, second = 0.3, 0.1
    plain = problem.Y.T @ problem.X / len(problem.X)
    fit = solve_shrink(problem, strength, second, gradients=40_000, tolerance=1e-12, start=plain)
    alive = 0
    for j, size in enumerate(np.linalg.norm(plain, axis=0)):

        def cost(s, size=size):
            return (s - size) ** 2 + equivalent_penalty(s, strength, second, 2)

        grid = np.linspace(0, size, 200_001)
        values = cost(grid)
        # The descent comes from the plain fit's side: the nearest local minimum from above.
        falls = np.flatnonzero(values[:-1] > values[1:])
        nearest = grid[falls[-1] + 1] if len(falls) else 0.0
        got = np.linalg.norm(fit.A[:, j])
        assert got == pytest.approx(nearest, abs=2e-4)
        alive += got > 0
        if got > 0:
            np.testing.assert_allclose(fit.A[:, j] / got, plain[:, j] / size, atol=1e-6)
    assert alive > 0


def test_objectives_are_the_verified_ones():
    problem = linear()
    rng = np.random.default_rng(0)
    A, beta = rng.standard_normal((3, 7)), rng.standard_normal(7)
    m = len(problem.X)
    verified = Verified(problem.X.T, problem.Y.T, 0.3 * m, np.zeros((0, 0, 0)))
    assert shrink_objective(problem, A, beta, 0.3, 0, 2) == pytest.approx(
        shrink_value(verified, A, beta) / m
    )
    extra = shrink_objective(problem, A, beta, 0.3, 0.2, 1) - shrink_objective(
        problem, A, beta, 0.3, 0, 1
    )
    assert extra == pytest.approx(0.2 * np.abs(A).sum())


def test_shrinknet_fits_closer_than_group_sparsity_where_columns_are_few():
    """Not a theorem: large columns are shrunk less. Here half the columns are noise."""
    problem = linear(samples=200, p=10)
    group = [solve_group(problem, s) for s in np.geomspace(0.05, 5, 12)]
    shrink = [solve_shrink(problem, s, s / 10, gradients=4000) for s in np.geomspace(0.01, 5, 12)]
    wanted = 0.5

    def best(fits):
        return min(problem.loss(f.A) for f in fits if column_sparsity(f.A) >= wanted)

    assert best(shrink) < best(group)


def test_normalised_loss_and_sparsity():
    for problem in (linear(), logistic()):
        nothing = np.zeros((problem.Y.shape[1], problem.X.shape[1]))
        if problem.free:
            nothing[:, -1] = np.log(problem.Y.mean(0))
            assert problem.normalised(nothing) == pytest.approx(1)
        else:
            centred = Regression(problem.X, problem.Y - problem.Y.mean(0), "linear")
            assert centred.normalised(nothing) == pytest.approx(1)
        assert 0 < problem.normalised(solve_group(problem, 0).A) < 1
    A = np.array([[1e-3, 9e-4, 0, 1], [0, -9e-4, 0, 0]])
    assert column_sparsity(A) == 0.5


def test_gradients_run_out_and_it_is_told():
    problem = linear()
    fit = solve_group(problem, 0.1, gradients=3)
    assert fit.gradients == 3 and not fit.converged
    fit = solve_shrink(problem, 0.1, 0.1, gradients=21)
    assert fit.gradients <= 21 and not fit.converged


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda p: solve_group(p, -1),
            "strength: got -1, want a finite number >= 0",
        ),
        (
            lambda p: solve_group(p, float("nan")),
            "strength: got nan, want a finite number >= 0",
        ),
        (lambda p: solve_group(p, 1, start=np.zeros(3)), r"start: got \(3,\), want shape \(3, 7\)"),
        (
            lambda p: solve_shrink(p, 0, 1),
            "strength, weight_strength: got 0 and 1, want more than 0: without one",
        ),
        (lambda p: solve_shrink(p, 1, 1, power=3), "power: got 3, want one of 1, 2"),
        (
            lambda p: Regression(p.X, p.Y[:5], "linear"),
            r"X, Y: got \(40, 7\) and \(5, 3\), want matrices of as many rows",
        ),
        (lambda p: Regression(p.X * np.nan, p.Y, "linear"), "X, Y: want finite numbers"),
        (
            lambda p: Regression(p.X, p.Y, "cubic"),
            "kind: got 'cubic', want one of linear, logistic",
        ),
        (
            lambda p: Regression(p.X, p.Y, "linear", 7),
            "free: got 7, want 0 to 6 columns of X",
        ),
    ],
)
def test_wrong_arguments_are_told(call, message):
    with pytest.raises(ValueError, match=message):
        call(linear())
