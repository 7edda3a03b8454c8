"""The paper's QP by OSQP: the program it states, its answers, its refusals."""

import numpy as np
import pytest
from instances import of_a_layer, with_optimum
from kkt import assert_kkt

from solvers import ElasticNet, Status, solve_admm, solve_cvxpy, solve_osqp, trim_program
from solvers.qp import program_14

EXACT = {"eps_abs": 1e-9, "eps_rel": 1e-9}
CONIC = {"tol_gap_abs": 1e-12, "tol_gap_rel": 1e-12, "tol_feas": 1e-12}


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("mask", [False, True])
@pytest.mark.parametrize("penalty", [None, ElasticNet(0.5)], ids=["l1", "elastic"])
def test_osqp_finds_a_known_optimum(bias, mask, penalty):
    program, _, _, optimum = with_optimum(1, "regularised", penalty=penalty, bias=bias, mask=mask)
    result = solve_osqp(program, tolerance=1e-6, options=EXACT)
    assert result.status is Status.SOLVED
    assert result.solver == "osqp"
    assert_kkt(program, result.weight, result.multiplier, 1e-5)
    np.testing.assert_allclose(result.certificate.objective, optimum, rtol=1e-6)
    if mask:
        assert np.all(result.weight[~program.support] == 0)


def test_the_doubled_program_has_the_objective_of_the_unit():
    program, _, _, _ = with_optimum(2, "regularised", penalty=ElasticNet(0.3), bias=True)
    rng = np.random.default_rng(0)
    plus, minus = np.abs(rng.standard_normal((2, 12)))
    weight = np.zeros((12, 4))
    constant = program.objective(weight)  # |y_Omega|^2, which (14) leaves out
    for unit in range(4):
        active = program.active[:, unit]
        quadratic, linear, matrix, upper = program_14(
            program, program.inputs, program.level[:, unit], active, np.arange(12)
        )
        full = (quadratic + quadratic.T).toarray() - np.diag(quadratic.diagonal())
        # Only one half of each pair is nonzero, as at a solution.
        x = np.where(rng.random(12) < 0.5, [plus, 0 * plus], [0 * minus, minus]).ravel()
        weight[:, unit] = x[:12] - x[12:]
        value = x @ full @ x / 2 + linear @ x + constant[unit]
        assert value == pytest.approx(program.objective(weight)[unit], rel=1e-12)
        ceilings = int((~active).sum())
        np.testing.assert_allclose(
            (matrix @ x)[:ceilings], (program.inputs @ weight[:, unit])[~active], atol=1e-12
        )
        np.testing.assert_array_equal(upper[:ceilings], program.level[~active, unit])
        assert np.all(np.isinf(upper[ceilings:]))


@pytest.mark.parametrize("kind", ["plain", "dead", "inactive", "wide", "one"])
@pytest.mark.parametrize("dtype", [np.float64, np.float32])
def test_the_three_solvers_agree(kind, dtype):
    program = of_a_layer(3, "regularised", kind=kind, dtype=dtype)
    answers = [
        solve_osqp(program, tolerance=1e-5, options=EXACT),
        solve_admm(program, tolerance=1e-5, max_iterations=20_000),
        solve_cvxpy(program, tolerance=1e-5, options=CONIC),
    ]
    for one in answers:
        assert one.status is Status.SOLVED
        assert one.weight.dtype == dtype
        for other in answers:
            assert np.all(
                one.certificate.dual_bound <= other.certificate.objective * (1 + 3e-5) + 1e-7
            )


def test_a_unit_without_weights_is_certified():
    inputs = np.maximum(np.random.default_rng(4).standard_normal((20, 5)), 0)
    kept = np.ones((5, 2), bool)
    kept[:, 1] = False
    program = trim_program(inputs, inputs[:, :2] + 0.1, fit_weight=1.0, support=kept)
    result = solve_osqp(program, options=EXACT)
    assert result.status is Status.SOLVED
    assert np.all(result.weight[:, 1] == 0)
    assert result.certificate.objective[1] == pytest.approx(np.sum((inputs[:, 1] + 0.1) ** 2))


def test_loose_settings_are_inexact_and_the_remedy_works():
    program = of_a_layer(5, "regularised")
    loose = {"eps_abs": 1e-2, "eps_rel": 1e-2, "polishing": False}
    result = solve_osqp(program, tolerance=1e-7, options=loose)
    assert result.status is Status.INEXACT
    assert result.status.remedy == (
        "the solver stopped by itself short of the certificate asked for: "
        "ask for less (tolerance), or solve in float64"
    )
    less = max(np.max(result.certificate.gap), np.max(result.certificate.violation))
    assert solve_osqp(program, tolerance=1.01 * less, options=loose).status is Status.SOLVED


def test_too_few_iterations_are_told():
    result = solve_osqp(of_a_layer(6, "regularised"), max_iterations=2)
    assert result.status is Status.ITERATION_LIMIT
    assert result.iterations == 2


def test_the_constrained_form_is_refused():
    with pytest.raises(ValueError, match=r"program: the paper's QP \(14\) is the regularised form"):
        solve_osqp(of_a_layer(7, "constrained"))
