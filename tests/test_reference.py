"""The oracle: known optima, its multiplier's sign, statuses, refusals."""

from dataclasses import dataclass

import cvxpy as cp
import numpy as np
import pytest
import torch
from instances import of_a_layer, with_optimum
from kkt import assert_kkt

from solvers import (
    L1,
    ConstrainedProgram,
    ElasticNet,
    Group,
    Status,
    solve_cvxpy,
    trim_program,
)

PENALTIES = {"l1": L1(), "elastic": ElasticNet(0.5), "group": Group(0.7)}
CASES = [
    (form, name, bias, mask)
    for form in ("constrained", "regularised")
    for name in PENALTIES
    for bias in (False, True)
    for mask in (False, True)
    if (form, name) != ("regularised", "group")
]
EXACT = {"tol_gap_abs": 1e-12, "tol_gap_rel": 1e-12, "tol_feas": 1e-12}


@pytest.mark.parametrize(("form", "penalty", "bias", "mask"), CASES)
def test_clarabel_finds_a_known_optimum(form, penalty, bias, mask):
    program, _, _, optimum = with_optimum(1, form, penalty=PENALTIES[penalty], bias=bias, mask=mask)
    result = solve_cvxpy(program, options=EXACT)
    assert result.status is Status.SOLVED
    assert result.solver == "cvxpy/clarabel"
    assert_kkt(program, result.weight, result.multiplier, 1e-6)
    np.testing.assert_allclose(result.certificate.objective, optimum, rtol=1e-7)


@pytest.mark.parametrize("form", ["constrained", "regularised"])
def test_scs_is_a_second_opinion(form):
    program, _, _, optimum = with_optimum(2, form, bias=True)
    result = solve_cvxpy(
        program, tolerance=1e-4, solver="SCS", options={"eps": 1e-8, "max_iters": 100_000}
    )
    assert result.status is Status.SOLVED
    assert result.solver == "cvxpy/scs"
    np.testing.assert_allclose(result.certificate.objective, optimum, rtol=1e-4)


def test_an_exact_fit_is_stated_as_equations():
    rng = np.random.default_rng(3)
    inputs, weight = rng.standard_normal((4, 9)), rng.standard_normal((9, 2))
    program = trim_program(inputs, inputs @ weight, epsilon=0.0, activation="linear")
    result = solve_cvxpy(program, options=EXACT)
    assert result.status is Status.SOLVED
    assert result.certificate.objective <= np.abs(weight).sum()
    # A vertex: as many weights as equations.
    assert np.sum(np.abs(result.weight) > 1e-7) <= 8


def test_a_layer_without_fitted_entries_is_zero():
    program = trim_program(
        np.ones((5, 3)), np.zeros((5, 2)), epsilon=1.0, old_weight=np.ones((3, 2))
    )
    result = solve_cvxpy(program, tolerance=1e-5)
    assert result.status is Status.SOLVED
    np.testing.assert_allclose(result.weight, 0, atol=1e-8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_tensors_come_back_as_tensors(dtype):
    inputs = torch.rand(12, 5, dtype=dtype, generator=torch.Generator().manual_seed(0))
    program = trim_program(inputs, inputs[:, :2], epsilon=0.1)
    result = solve_cvxpy(program)
    assert torch.is_tensor(result.weight)
    assert result.weight.dtype == dtype
    assert torch.is_tensor(result.multiplier)
    assert result.status is Status.SOLVED


def test_a_program_without_solution_is_a_numerical_error():
    program = trim_program(np.zeros((4, 3)), np.ones((4, 2)), epsilon=0.1)
    result = solve_cvxpy(program)
    assert result.status is Status.NUMERICAL_ERROR
    assert np.all(np.isnan(result.weight))
    assert not result.certified


def test_a_solver_that_claims_too_much_is_found_out():
    loose = {"tol_gap_abs": 0.1, "tol_gap_rel": 0.1, "tol_feas": 0.1}
    result = solve_cvxpy(of_a_layer(4, "constrained"), tolerance=1e-6, options=loose)
    assert result.status is Status.INEXACT


def test_too_few_iterations_are_told():
    result = solve_cvxpy(
        of_a_layer(5, "constrained"),
        solver="SCS",
        options={"max_iters": 2},
        tolerance=1e-6,
    )
    assert result.status in (Status.ITERATION_LIMIT, Status.INEXACT)
    assert not result.certified


def test_what_cannot_be_solved_is_refused():
    program = of_a_layer(6, "constrained")
    with pytest.raises(ValueError, match=r"solver: got 'GUESS', want one of .*CLARABEL.*"):
        solve_cvxpy(program, solver="GUESS")
    assert "OSQP" in cp.installed_solvers()
    with pytest.raises(ValueError, match="solver: OSQP cannot solve this program"):
        solve_cvxpy(program, solver="OSQP")


def test_a_penalty_without_cvxpy_form_is_refused():
    @dataclass(frozen=True)
    class Other(L1):
        name = "other"

    class Stranger:
        separable = True

        def __repr__(self):
            return "Stranger()"

    inputs = np.ones((3, 2))
    arguments = {"inputs": inputs, "active": inputs > 0, "level": inputs, "epsilon": 0.1}
    assert solve_cvxpy(ConstrainedProgram(**arguments, penalty=Other())).certificate is not None
    with pytest.raises(ValueError, match=r"penalty: no cvxpy form of Stranger\(\)"):
        solve_cvxpy(ConstrainedProgram(**arguments, penalty=Stranger()))
