"""A penalty that is not even: the bound takes the conjugate where the Lagrangian has it."""

from dataclasses import dataclass

import cvxpy as cp
import numpy as np
import pytest

import retrain
from solvers import solve_admm, solve_newton, trim_program


@dataclass(frozen=True)
class Lopsided:
    """``sum max(u, -below u)``; its conjugate is the indicator of -below <= c <= 1."""

    below: float
    name = "lopsided"
    separable = True

    def value(self, weight):
        return np.maximum(weight, -self.below * weight).sum(axis=0)

    def prox(self, weight, step):
        return np.maximum(weight - step, 0) + np.minimum(weight + self.below * step, 0)

    def in_unit(self, unit):
        return self

    def conjugate(self, dual):
        return 0 * dual.sum(axis=0)

    def shrink_units(self, dual):
        return 1 / np.maximum(self._size(dual), 1)

    def scale_dual(self, dual, linear, quadratic):
        size = np.maximum(self._size(dual), 1e-300)
        free = np.where(quadratic > 0, linear / np.maximum(2 * quadratic, 1e-300), np.inf)
        return np.where(linear > 0, np.minimum(free, 1 / size), 0.0)

    def _size(self, dual):
        return np.maximum(dual, -dual / self.below).max(axis=0)


@pytest.fixture
def case():
    rng = np.random.default_rng(0)
    inputs = np.maximum(rng.standard_normal((80, 12)), 0)
    return inputs, inputs @ rng.standard_normal((12, 4))


@pytest.mark.parametrize("below", [0.2, 1.0, 8.0])
@pytest.mark.parametrize("form", ["constrained", "regularised"])
def test_the_bound_is_below_the_optimum_and_meets_it(case, below, form):
    inputs, targets = case
    epsilon = 0.2 * float(np.linalg.norm(targets))
    options = {"epsilon": epsilon} if form == "constrained" else {"fit_weight": 0.5}
    program = trim_program(inputs, targets, penalty=Lopsided(below), activation="linear", **options)
    weight = cp.Variable((12, 4))
    penalty = cp.sum(cp.maximum(weight, -below * weight))
    if form == "constrained":
        ball = [cp.norm(inputs @ weight - targets, "fro") <= epsilon]
        optimum = cp.Problem(cp.Minimize(penalty), ball).solve(solver=cp.CLARABEL)
    else:
        fit = cp.sum_squares(inputs @ weight - targets)
        optimum = cp.Problem(cp.Minimize(penalty + 0.5 * fit)).solve(solver=cp.CLARABEL)
    result = solve_admm(program, tolerance=1e-5)
    assert result.certified.all()
    bound = np.sum(result.certificate.dual_bound)
    assert bound <= optimum * (1 + 1e-6)
    assert bound == pytest.approx(optimum, rel=1e-4)


def test_newton_says_which_penalties_it_knows(case):
    program = trim_program(*case, epsilon=1.0, penalty=Lopsided(2.0))
    with pytest.raises(ValueError, match="written for l1 and elastic net, not for the lopsided"):
        solve_newton(program)


def test_the_default_solver_knows_it_too(case):
    inputs, _ = case
    rng = np.random.default_rng(1)
    chain = retrain.Chain((rng.standard_normal((12, 6)), rng.standard_normal((6, 3))))
    run = retrain.net_trim(chain, inputs, penalty=Lopsided(2.0))
    assert run.certified
