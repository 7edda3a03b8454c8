"""300 random programs against the oracle: no certificate is wrong, no status better than its own.

Each has its own sizes, form, dtype, degeneracy, ceilings, bias, radius or fit weight, and sometimes
a mask. The oracle's certificate is a pair of bounds on the optimum by the program itself; a solver
that proves a bound above it, or certifies weights below it, is wrong.
"""

from dataclasses import replace

import numpy as np
import pytest
from instances import CEILINGS, KINDS, of_a_layer

from solvers import Status, solve_admm, solve_cvxpy, solve_newton

ORACLE = {"tol_gap_abs": 1e-12, "tol_gap_rel": 1e-12, "tol_feas": 1e-12}
BATCH = 20


def some_program(seed):
    rng = np.random.default_rng([seed, 4])
    form = ("constrained", "regularised")[seed % 2]
    program = of_a_layer(
        seed,
        form,
        dtype=(np.float64, np.float32)[seed // 2 % 2],
        kind=str(rng.choice(KINDS)),
        ceiling=str(rng.choice(CEILINGS)),
        bias=bool(rng.random() < 0.5),
    )
    rows = int(rng.integers(1, program.shape[0] + 1))
    units = int(rng.integers(1, program.shape[2] + 1))
    cut = {name: getattr(program, name)[:rows, :units] for name in ("active", "level")}
    spread = float(10 ** rng.uniform(-1, 1))
    value = (
        {"epsilon": program.epsilon * spread}
        if form == "constrained"
        else {"fit_weight": program.fit_weight * spread}
    )
    # In the ball a mask may leave no point at all, and so may ceilings below zero.
    if form == "regularised" and rng.random() < 0.3 and not (cut["level"] < 0).any():
        support = rng.random((program.shape[1], units)) < 0.7
        support[list(program.free_rows)] = True
        value["support"] = support
    return replace(
        program,
        inputs=program.inputs[:rows],
        old_weight=program.old_weight[:, :units],
        **cut,
        **value,
    )


@pytest.mark.parametrize("first", range(0, 300, BATCH))
def test_no_certificate_and_no_status_is_wrong(first):
    unsettled = 0
    for seed in range(first, first + BATCH):
        program = some_program(seed)
        tolerance = 1e-6 if program.inputs.dtype == np.float64 else 1e-4
        oracle = solve_cvxpy(program, options=ORACLE)
        unsettled += oracle.status is not Status.SOLVED
        if oracle.status is not Status.SOLVED:
            continue
        optimum = oracle.certificate.objective
        old = np.abs(program.old_weight[program.penalised].astype(float)).sum(0)
        floor = 1e-6 * (old if np.ndim(optimum) else old.sum())
        scale = np.maximum(np.abs(optimum), floor) + 1e-12
        for solve in (solve_newton, solve_admm):
            result = solve(program, tolerance=tolerance)
            again = program.certificate(result.weight, result.multiplier)
            within = again.within(tolerance, tolerance)
            np.testing.assert_array_equal(result.certified, within, err_msg=str(seed))
            assert (result.status is Status.SOLVED) == bool(within.all()), seed
            assert np.all(again.dual_bound <= optimum + 1e-6 * scale), (seed, result.solver)
            error = np.abs(result.certificate.objective - optimum) / scale
            assert np.all(error[within] <= 1e-3), (seed, result.solver, error)
            if solve is solve_newton:
                assert result.status is Status.SOLVED, seed
    assert unsettled <= 1


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("solve", [solve_newton, solve_admm])
@pytest.mark.parametrize("form", ["constrained", "regularised"])
def test_permuted_data_give_the_permuted_solution(solve, form, seed):
    rng = np.random.default_rng(seed)
    program = of_a_layer(seed, form, bias=True, ceiling="zero")
    n_samples, n_in, n_out = program.shape
    rows, units = rng.permutation(n_samples), rng.permutation(n_out)
    columns = np.append(rng.permutation(n_in - 1), n_in - 1)  # the bias stays where it is
    other = replace(
        program,
        inputs=program.inputs[rows][:, columns],
        active=program.active[rows][:, units],
        level=program.level[rows][:, units],
        old_weight=program.old_weight[columns][:, units],
    )
    one, two = (solve(each, tolerance=1e-8, max_iterations=50_000) for each in (program, other))
    assert one.status is two.status is Status.SOLVED
    np.testing.assert_allclose(two.weight, one.weight[columns][:, units], atol=1e-5)


def test_one_unit_alone_is_the_unit_in_its_layer():
    program = of_a_layer(11, "regularised", kind="correlated", bias=True)
    together = solve_newton(program, tolerance=1e-9)
    for m in range(program.shape[2]):
        one = {name: getattr(program, name)[:, [m]] for name in ("active", "level", "old_weight")}
        alone = solve_newton(replace(program, **one), tolerance=1e-9)
        assert alone.status is Status.SOLVED
        np.testing.assert_allclose(
            alone.certificate.objective[0], together.certificate.objective[m], rtol=2e-9
        )
