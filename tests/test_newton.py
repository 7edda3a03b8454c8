"""Newton against known optima, the oracle and ADMM; exact fits, degenerate units, error texts."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from instances import matrix, of_a_layer, with_optimum
from kkt import assert_kkt

from solvers import (
    L1,
    ElasticNet,
    Group,
    Status,
    prepare,
    solve_admm,
    solve_cvxpy,
    solve_newton,
    trim_program,
)
from solvers.newton import block as newton_block
from solvers.newton.block import noise, solve_block
from solvers.newton.layer import columns_hold_single
from solvers.newton.unit import ceiling_slope, exact_step
from solvers.newton.work import Points, Shared, Units, fitted_matrix, precision_for

FORMS = ("constrained", "regularised")
ORACLE = {"tol_gap_abs": 1e-12, "tol_gap_rel": 1e-12, "tol_feas": 1e-12}


@pytest.mark.parametrize(
    ("seed", "instance"),
    list(enumerate(matrix())),
    ids=["-".join(map(str, each)) for each in matrix()],
)
def test_every_instance_is_certified(seed, instance):
    form, dtype, kind, ceiling, bias = instance
    program = of_a_layer(
        seed, form, dtype=np.dtype(dtype).type, kind=kind, ceiling=ceiling, bias=bias
    )
    tolerance = 1e-8 if dtype == "float64" else 1e-6
    result = solve_newton(program, tolerance=tolerance)
    assert result.status is Status.SOLVED
    assert result.weight.dtype == program.inputs.dtype
    again = program.certificate(result.weight, result.multiplier)
    assert np.all(again.within(tolerance, tolerance))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("penalty", [L1(), ElasticNet(0.5)], ids=["l1", "elastic"])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("mask", [False, True])
def test_a_known_optimum_is_found_with_its_zeros(form, penalty, bias, mask):
    program, weight, _, optimum = with_optimum(3, form, penalty=penalty, bias=bias, mask=mask)
    program = replace(program, old_weight=None)  # which were the solution
    result = solve_newton(program, tolerance=1e-9)
    assert result.status is Status.SOLVED
    np.testing.assert_allclose(result.certificate.objective, optimum, rtol=2e-9)
    np.testing.assert_allclose(result.weight, weight, atol=1e-8)
    # More ceilings are met than there are weights, so the multiplier, and with it which zeros are
    # strict, is not unique; nearly all are exact all the same.
    assert np.mean(result.weight[weight == 0] == 0) > 0.8
    assert_kkt(program, result.weight, result.multiplier, 1e-6)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", ["plain", "inactive", "wide", "correlated"])
def test_it_agrees_with_the_oracle(form, kind):
    for seed, ceiling in enumerate(("none", "zero", "negative", "positive")):
        program = of_a_layer(seed, form, kind=kind, ceiling=ceiling, bias=True)
        oracle = solve_cvxpy(program, options=ORACLE).certificate.objective
        result = solve_newton(program, tolerance=1e-8)
        old = np.abs(program.old_weight[:-1]).sum(0)
        floor = 1e-6 * (old if np.ndim(oracle) else old.sum())
        scale = np.maximum(np.abs(oracle), floor)
        assert np.all(np.abs(result.certificate.objective - oracle) <= 1e-5 * scale)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10_000), st.sampled_from(FORMS), st.booleans(), st.integers(2, 40))
def test_its_bound_never_passes_admm_objective(seed, form, bias, n_samples):
    program = of_a_layer(seed, form, bias=bias)
    program = replace(
        program,
        **{name: getattr(program, name)[:n_samples] for name in ("inputs", "active", "level")},
    )
    ours = solve_newton(program, tolerance=1e-7)
    theirs = solve_admm(program, tolerance=1e-3, violation_tolerance=1e-5, max_iterations=4000)
    assert ours.status is Status.SOLVED
    scale = np.maximum(np.abs(ours.certificate.objective), 1e-3)
    assert np.all(theirs.certificate.dual_bound <= ours.certificate.objective + 1e-6 * scale)


def test_an_exact_fit_recovers_sparse_weights():
    rng = np.random.default_rng(0)
    inputs = rng.standard_normal((60, 40))
    weight = rng.standard_normal((40, 3)) * (rng.random((40, 3)) < 0.1)
    program = trim_program(inputs, inputs @ weight, epsilon=0.0, activation="linear")
    result = solve_newton(program, tolerance=1e-9)
    assert result.status is Status.SOLVED
    np.testing.assert_allclose(result.weight, weight, atol=1e-8)
    # Fewer samples than weights: equation (8) of the paper, from the ReLU's own data.
    program = trim_program(inputs[:30], np.maximum(inputs[:30] @ weight, 0), epsilon=0.0)
    result = solve_newton(program, tolerance=1e-7)
    assert result.status is Status.SOLVED
    assert result.certificate.objective <= np.abs(weight).sum() * (1 + 1e-7)


def test_a_ball_that_does_not_bind():
    inputs = np.random.default_rng(1).random((20, 5)) + 0.1
    targets = np.ones((20, 2))
    program = trim_program(inputs, targets, epsilon=100.0)
    result = solve_newton(program, tolerance=1e-8)
    assert result.status is Status.SOLVED
    assert np.all(result.weight == 0)
    # Ceilings below zero ask for weights where the ball asks for none.
    active = np.zeros((20, 2), bool)
    active[:10] = True
    below = replace(program, active=active, level=np.where(active, 0.1, -1.0), epsilon=1000.0)
    result, oracle = solve_newton(below, tolerance=1e-8), solve_cvxpy(below, options=ORACLE)
    assert result.status is Status.SOLVED
    np.testing.assert_allclose(
        result.certificate.objective, oracle.certificate.objective, rtol=1e-6
    )
    assert result.certificate.objective > 0


def test_degenerate_layers_are_solved():
    inputs = np.maximum(np.random.default_rng(22).standard_normal((15, 4)), 0)
    for form in ({"epsilon": 10.0}, {"fit_weight": 1.0}):
        for x, y in ((inputs, np.zeros((15, 2))), (np.zeros((15, 4)), np.ones((15, 2)))):
            result = solve_newton(trim_program(x, y, **form))
            assert result.status is Status.SOLVED
            assert np.all(result.weight == 0)
    nothing = np.zeros((4, 2), bool)
    program = trim_program(inputs, np.ones((15, 2)), fit_weight=1.0, support=nothing)
    result = solve_newton(program, tolerance=1e-8)
    assert result.status is Status.SOLVED
    assert np.all(result.weight == 0)


def test_an_impossible_fit_is_not_called_solved():
    inputs = np.ones((3, 2))
    targets = np.array([[1.0], [2.0], [3.0]])
    result = solve_newton(trim_program(inputs, targets, epsilon=0.0), max_iterations=200)
    assert result.status is not Status.SOLVED
    assert not result.certified


@pytest.mark.parametrize("form", FORMS)
def test_threads_and_repetition_change_no_bit(form):
    program = of_a_layer(9, form, kind="correlated", bias=True)
    first = solve_newton(program, threads=1)
    for threads in (1, 2):
        again = solve_newton(program, threads=threads)
        assert again.weight.tobytes() == first.weight.tobytes()
        assert again.multiplier.tobytes() == first.multiplier.tobytes()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("a", "b"), [(2.0**-20, 1.0), (1.0, 2.0**24), (2.0**7, 2.0**-13)])
def test_scaled_data_give_the_scaled_solution(form, a, b):
    program = of_a_layer(5, form, bias=True)
    change = (
        {"epsilon": program.epsilon * b}
        if form == "constrained"
        else {"fit_weight": program.fit_weight / (a * b)}
    )
    other = replace(
        program,
        inputs=a * program.inputs,
        level=b * program.level,
        old_weight=program.old_weight * (b / a),
        **change,
    )
    one, two = (solve_newton(each, tolerance=1e-9) for each in (program, other))
    assert one.status is two.status is Status.SOLVED
    np.testing.assert_allclose(two.weight * (a / b), one.weight, atol=1e-7)


@pytest.mark.parametrize("form", FORMS)
def test_torch_arrays_and_warm_starts(form):
    program = of_a_layer(10, form, kind="correlated", bias=True)
    names = ("inputs", "active", "level", "old_weight")
    tensors = replace(program, **{name: torch.asarray(getattr(program, name)) for name in names})
    ours, theirs = (solve_newton(each, tolerance=1e-8) for each in (program, tensors))
    assert torch.is_tensor(theirs.weight)
    assert theirs.status is Status.SOLVED
    np.testing.assert_allclose(theirs.weight.numpy(), ours.weight, atol=1e-6)
    factor = prepare(program.inputs)
    near = (
        replace(program, epsilon=program.epsilon * 1.02)
        if form == "constrained"
        else replace(program, fit_weight=program.fit_weight * 0.98)
    )
    warm = solve_newton(near, tolerance=1e-8, warm_start=ours, factor=factor)
    cold = solve_newton(near, tolerance=1e-8, factor=factor)
    assert warm.status is cold.status is Status.SOLVED
    assert warm.setup_seconds == 0
    np.testing.assert_allclose(warm.certificate.objective, cold.certificate.objective, rtol=1e-7)


@pytest.mark.parametrize("factor", [1e-4, 1e4])
def test_a_warm_start_with_a_penalty_far_off_is_survived(factor):
    program = of_a_layer(3, "regularised", kind="correlated", bias=True)
    first = solve_newton(replace(program, fit_weight=0.5), tolerance=1e-7)
    far = replace(first, penalty_parameter=factor * first.penalty_parameter)
    result = solve_newton(replace(program, fit_weight=1.0), tolerance=1e-7, warm_start=far)
    assert result.status is Status.SOLVED
    assert result.iterations < 500


def test_it_certifies_where_admm_stops_short():
    program = of_a_layer(15, "constrained", kind="correlated", bias=True)
    admm = solve_admm(program, tolerance=1e-9, max_iterations=1000)
    newton = solve_newton(program, tolerance=1e-9)
    assert admm.status is Status.ITERATION_LIMIT
    assert newton.status is Status.SOLVED
    assert newton.iterations < 200
    assert newton.solver == "newton"
    assert newton.history[-1]["gap"] <= 1e-9


def test_too_few_steps_are_told():
    program = of_a_layer(18, "regularised", kind="correlated")
    result = solve_newton(program, tolerance=1e-9, max_iterations=2)
    assert result.status is Status.ITERATION_LIMIT
    assert not result.certified.all()
    assert solve_newton(program, tolerance=1e-9, warm_start=result).status is Status.SOLVED


def test_malformed_arguments_are_refused():
    program = of_a_layer(23, "constrained")
    with pytest.raises(ValueError, match="penalty: the group penalty couples the units, which New"):
        solve_newton(replace(program, penalty=Group()))
    with pytest.raises(ValueError, match="threads: got 0, want a whole number >= 1"):
        solve_newton(program, threads=0)
    with pytest.raises(ValueError, match="tolerance: got 0, want a positive finite number"):
        solve_newton(program, tolerance=0)
    with pytest.raises(ValueError, match="max_iterations: got 0, want a whole number >= 1"):
        solve_newton(program, max_iterations=0)
    with pytest.raises(ValueError, match=r"factor: want that of inputs \(40, 12\)"):
        solve_newton(program, factor=prepare(np.ones((4, 5))))


def test_one_unit_by_itself():
    rng = np.random.default_rng(4)
    inputs = rng.standard_normal((30, 8))
    targets = rng.standard_normal((30, 1))
    program = trim_program(inputs, targets, fit_weight=2.0, activation="linear")
    shared = Shared.of(inputs, np.ones(8), np.zeros(8))
    everything = np.ones((1, 30), bool), np.ones((1, 8), bool)
    units = Units(targets.T.copy(), *everything, np.zeros(1), np.ones(1))
    first = Points.at(np.zeros((1, 8)), np.zeros((1, 30)), np.ones(1), np.ones(1))
    found, _ = solve_block(shared, units, first, 0.25, 1e-10, 1e-10, 100)
    assert max(found.gap[0], found.violation[0]) <= 1e-10
    assert first.steps[0] == 0
    optimum = solve_cvxpy(program, options=ORACLE)
    np.testing.assert_allclose(found.u[0], optimum.weight[:, 0], atol=1e-6)


def block(seed, n_samples=60, n_in=12, share=0.7):
    """Three units of a layer, most of whose samples are fitted, and where they start."""
    rng = np.random.default_rng(seed)
    inputs = rng.standard_normal((n_samples, n_in))
    level = rng.standard_normal((3, n_samples))
    active = rng.random((3, n_samples)) < share
    shared = Shared.of(inputs, np.ones(n_in), np.zeros(n_in), inputs.T @ inputs)
    level = np.where(active, level, np.abs(level))
    units = Units(level, active, np.ones((3, n_in), bool), np.zeros(3), np.ones(3))
    zeros = np.zeros((3, n_in)), np.zeros((3, n_samples))
    return shared, units, Points.at(*zeros, np.ones(3), np.ones(3))


@pytest.mark.parametrize("share", [0.2, 0.8, 1.0])
def test_the_matrix_over_omega_is_its_own_or_the_rest_s(share):
    shared, units, _ = block(1, share=share)
    some = np.array([0, 3, 4, 9])
    for active in units.active:
        want = shared.inputs[active].T @ shared.inputs[active]
        for precision, error in ((np.float32, 1e-5), (np.float64, 1e-13)):
            for each in (shared, replace(shared, gram=None)):
                found = fitted_matrix(each, active, some, np.arange(12), precision)
                assert np.abs(found - want[some]).max() <= error * np.abs(want).max()


def test_matrices_in_float32_do_for_what_float32_can_resolve():
    shared, units, points = block(2)
    limits = 1e-6, 1e-6, 200
    found, works = solve_block(shared, units, points, 0.25, *limits)
    assert [work.precision for work in works] == [np.float32] * 3
    assert max(found.gap.max(), found.violation.max()) <= 1e-6
    finer, works = solve_block(shared, units, found, 0.25, 1e-11, 1e-11, 200, works)
    assert [work.precision for work in works] == [np.float64] * 3
    assert max(finer.gap.max(), finer.violation.max()) <= 1e-11
    for b, work in enumerate(works):
        x = shared.inputs[np.ix_(units.active[b], work.inputs)]
        np.testing.assert_allclose(work.fitted, x.T @ x, atol=1e-12 * np.abs(work.fitted).max())


def test_float32_is_for_what_it_can_resolve():
    shared, *_ = block(3)
    assert precision_for(shared, 0.25, 1e-6) is np.float32
    assert precision_for(shared, 0.0, 1e-6) is np.float64
    assert precision_for(shared, 0.25, 1e-12) is np.float64
    assert precision_for(replace(shared, single=None), 0.25, 1e-6) is np.float64


@pytest.mark.parametrize("factor", [1e-100, 1e100])
def test_data_beyond_float32_are_left_in_float64(factor):
    program = of_a_layer(3, "regularised")
    assert columns_hold_single(program)
    for name in ("inputs", "level"):
        assert not columns_hold_single(replace(program, **{name: factor * getattr(program, name)}))


def test_rounded_products_do_not_decide_a_fine_solution():
    """Products far worse than float32's serve as long as they tell; then those in float64 do."""
    shared, units, points = block(4)
    noise = 1e-5 * np.random.default_rng(5).standard_normal(shared.inputs.shape)
    noisy = replace(shared, single=(shared.inputs + noise).astype(np.float32))
    want, _ = solve_block(shared, units, points, 0.25, 1e-9, 1e-9, 200)
    found, _ = solve_block(noisy, units, points, 0.25, 1e-7, 1e-7, 200)
    assert max(found.gap.max(), found.violation.max()) <= 1e-7
    np.testing.assert_allclose(found.u, want.u, atol=1e-5)
    rough, _ = solve_block(noisy, units, points, 0.25, 1e-3, 1e-3, 200)
    assert 1e-9 < np.abs(rough.u - want.u).max() < 1e-2


def test_products_too_rough_to_begin_with_are_not_used(monkeypatch):
    shared, units, points = block(4)
    u = np.random.default_rng(6).standard_normal(12)
    z = shared.inputs @ u + np.where(np.arange(60) == 7, 0.01, 0.0)
    want = 0.01 * np.abs(shared.inputs[7]).max() / 0.25 if units.active[0, 7] else 0.0
    assert noise(shared, units, 0, u, z, 0.25) == pytest.approx(want, abs=1e-12)
    noisy = replace(shared, single=(1.1 * shared.inputs).astype(np.float32))
    found, _ = solve_block(noisy, units, replace(points, u=points.u + u), 0.25, 1e-4, 1e-4, 200)
    monkeypatch.setattr(newton_block, "noise", lambda *_: np.inf)
    fine, _ = solve_block(shared, units, replace(points, u=points.u + u), 0.25, 1e-4, 1e-4, 200)
    assert found.u.tobytes() == fine.u.tobytes()


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 100_000))
def test_the_exact_step_is_the_minimum_along_the_direction(seed):
    rng = np.random.default_rng(seed)
    n, kinks = 12, int(rng.integers(0, 4))
    z, dz, centre, level = rng.standard_normal((4, n))
    tau = 2.0
    times = np.sort(rng.random(kinks))
    jumps = np.cumsum(rng.random(kinks))
    curvature = 0.1
    at_zero = -abs(rng.standard_normal()) - ceiling_slope(z, dz, centre, level, tau, 0.0)[0]
    t, kink = exact_step(z, dz, centre, level, tau, at_zero, curvature, times, jumps)

    def slope(t, passed):
        smooth = ceiling_slope(z, dz, centre, level, tau, t)[0]
        return smooth + at_zero + t * curvature + (jumps[passed - 1] if passed else 0.0)

    passed = int(np.sum(times < t))
    assert slope(t, passed) <= 1e-9
    if kink >= 0:
        assert t == times[kink]
        assert slope(t, kink + 1) >= 0
    elif t < 1:
        assert abs(slope(t, passed)) <= 1e-9
