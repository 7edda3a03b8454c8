"""Programs judge from their own data: known optima, bounds below every optimum, error texts."""

from dataclasses import replace

import cvxpy as cp
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from instances import of_a_layer, with_optimum
from kkt import assert_kkt, kkt_errors

from solvers import (
    L1,
    ConstrainedProgram,
    ElasticNet,
    Group,
    RegularisedProgram,
    solve_admm,
    solve_newton,
    trim_program,
)
from solvers.free_row import orthogonalise, orthogonalise_arrays

FORMS = ("constrained", "regularised")
PENALTIES = {"l1": L1(), "elastic": ElasticNet(0.5), "group": Group(0.7)}
CASES = [
    (form, name, bias, mask)
    for form in FORMS
    for name in PENALTIES
    for bias in (False, True)
    for mask in (False, True)
    if (form, name) != ("regularised", "group")
]


PROJECTIONS = (orthogonalise, orthogonalise_arrays)


def arrays(rng, *shape):
    return rng.standard_normal(shape)


@pytest.mark.parametrize(("form", "penalty", "bias", "mask"), CASES)
def test_a_known_optimum_has_no_gap(form, penalty, bias, mask):
    program, weight, multiplier, optimum = with_optimum(
        1, form, penalty=PENALTIES[penalty], bias=bias, mask=mask
    )
    assert_kkt(program, weight, multiplier, 1e-11)
    certificate = program.certificate(weight, multiplier)
    np.testing.assert_allclose(certificate.objective, optimum, rtol=1e-12)
    np.testing.assert_allclose(certificate.dual_bound, optimum, rtol=1e-11)
    assert np.max(certificate.gap) < 1e-11
    assert np.max(certificate.violation) < 1e-11
    shape = () if form == "constrained" else (program.shape[2],)
    for name in (
        "objective",
        "dual_bound",
        "gap",
        "ball_violation",
        "ceiling_violation",
        "largest_violation",
    ):
        assert getattr(certificate, name).shape == shape, name


@pytest.mark.parametrize(("form", "penalty", "bias", "mask"), CASES)
def test_a_pair_that_is_off_is_told(form, penalty, bias, mask):
    program, weight, multiplier, _ = with_optimum(
        2, form, penalty=PENALTIES[penalty], bias=bias, mask=mask
    )
    rng = np.random.default_rng(0)
    other = program.certificate(weight, multiplier + arrays(rng, *multiplier.shape))
    assert np.min(other.gap) > 1e-3
    moved = weight + 0.1 * arrays(rng, *weight.shape) * (
        True if program.support is None else program.support
    )
    off = program.certificate(moved, multiplier)
    assert np.all((off.gap > 1e-3) | (off.violation > 1e-3))
    with pytest.raises(AssertionError, match="optimality conditions off"):
        assert_kkt(program, moved, multiplier, 1e-3)


def difficult_multipliers(program, multiplier, rng):
    """Multipliers to try to break the bound with."""
    n_samples, _, n_out = program.shape
    X = np.asarray(program.inputs, dtype=float)
    noise = arrays(rng, n_samples, n_out)
    yield noise
    yield np.abs(noise)
    yield -np.abs(noise)
    yield np.where(program.active, noise, 0)
    yield 1e6 * noise
    yield 1e-6 * noise
    yield 1e200 * noise  # squares overflow: no number is no bound, a number must be one
    yield 1e-200 * noise
    for size in (1e-8, 1e-3, 0.3):
        yield multiplier + size * noise
    for scale in (0.0, 0.5, 3.0):
        yield scale * multiplier
    # Along a free row's own samples, where almost all of nu is projected away.
    column = X[:, [program.free_rows[0] if program.free_rows else 0]]
    for size in (1.0, 1e8, 1e12, 1e15):
        yield size * column + noise
        yield size * column + multiplier
        yield size * column * np.ones(n_out)
    # Orthogonal to the inputs to rounding, so that no box limits the scale.
    basis = np.linalg.qr(X)[0]
    for _ in range(2):
        noise = noise - basis @ (basis.T @ noise)
    yield noise


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize(("form", "penalty", "bias", "mask"), CASES)
def test_no_bound_exceeds_the_optimum(form, penalty, bias, mask):
    for seed in range(8):
        program, _, multiplier, optimum = with_optimum(
            seed, form, penalty=PENALTIES[penalty], bias=bias, mask=mask, shape=(25, 7, 3)
        )
        rng = np.random.default_rng(seed)
        for nu in difficult_multipliers(program, multiplier, rng):
            bound = program.dual_bound(nu)
            assert not np.any(bound > optimum * (1 + 1e-9)), (bound - optimum) / optimum


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_a_row_of_any_sign_without_penalty_gives_valid_bounds():
    rng = np.random.default_rng(3)
    worst = -np.inf
    for trial in range(60):
        n_samples, n_in = int(rng.integers(1, 40)), int(rng.integers(2, 12))
        X = np.maximum(arrays(rng, n_samples, n_in), 0)
        X[:, -1] = arrays(rng, n_samples) + trial % 4
        weight = arrays(rng, n_in, 3)
        form = {"epsilon": 0.1} if trial % 2 else {"fit_weight": 1.0}
        kind = ConstrainedProgram if trial % 2 else RegularisedProgram
        program = kind(
            inputs=X,
            active=rng.random((n_samples, 3)) < 0.3,
            level=X @ weight,
            free_rows=(n_in - 1,),
            **form,
        )
        above = program.objective(weight)  # feasible, so at least the optimum
        for nu in difficult_multipliers(program, np.zeros((n_samples, 3)), rng):
            worst = max(worst, np.nanmax(program.dual_bound(nu) / above, initial=-np.inf))
    assert worst <= 1 + 1e-9


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_an_inactive_layer_with_a_bias_has_the_bound_zero():
    # A bias low enough is free of charge, so any bound above 0 would be wrong.
    rng = np.random.default_rng(4)
    X = np.hstack([np.maximum(arrays(rng, 30, 6), 0), np.ones((30, 1))])
    for form in ({"epsilon": 0.1}, {"fit_weight": 1.0}):
        program = trim_program(
            X, np.zeros((30, 4)), ceilings=-rng.random((30, 4)), free_rows=(6,), **form
        )
        for nu in difficult_multipliers(program, np.zeros((30, 4)), rng):
            assert not np.any(program.dual_bound(nu) > 0)


def bound_without_the_projection(program, nu):
    """The regularised form's bound as if a free row needed no care: its c is just left out."""
    active, level = program.active, program.level
    nu = np.where(active, nu, np.maximum(nu, 0))
    c = (program.inputs.T @ nu)[program.penalised]
    linear = -(nu * level).sum(0)
    quadratic = (np.where(active, nu, 0) ** 2).sum(0) / (4 * program.fit_weight)
    scale = np.clip(linear / (2 * quadratic), 0, 1 / np.abs(c).max(0))
    return scale * linear - scale**2 * quadratic


def test_leaving_a_free_row_out_gives_no_bound():
    exceeded = 0
    for seed in range(10):
        program, _, _, optimum = with_optimum(seed, "regularised", bias=True)
        gradient = -2 * program.fit_weight * np.where(program.active, program.level, 0)
        exceeded += bool(np.any(bound_without_the_projection(program, gradient) > 1.01 * optimum))
        assert np.all(program.dual_bound(gradient) <= optimum)
    assert exceeded > 0


@pytest.mark.parametrize("project", PROJECTIONS)
def test_the_free_row_projection_solves_its_program(project):
    rng = np.random.default_rng(5)
    for trial in range(12):
        n = 15
        x = np.ones((n, 1)) if trial % 3 == 0 else arrays(rng, n, 1)
        if trial % 3 == 2:
            x[::4] = 0
        nu, active = arrays(rng, n, 3), rng.random((n, 3)) < (0.0, 0.4, 1.0)[trial % 3]
        found = project(nu, x, active)
        point = cp.Variable(nu.shape)
        constraints = [x.T @ point == 0]
        if (~active).any():
            constraints.append(point[~active] >= 0)
        problem = cp.Problem(cp.Minimize(cp.sum_squares(point - nu)), constraints)
        problem.solve(solver="CLARABEL", tol_gap_abs=1e-13, tol_gap_rel=1e-13, tol_feas=1e-13)
        np.testing.assert_allclose(found, point.value, atol=1e-6)
        assert np.abs(x.T @ found).max() < 1e-13 * n
        assert np.all(found[~active] >= 0)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10_000), st.sampled_from([1e-12, 1e-3, 1.0, 1e6, 1e12]), st.booleans())
@pytest.mark.parametrize("project", PROJECTIONS)
def test_the_free_row_projection_is_orthogonal_at_any_scale(project, seed, scale, spread):
    rng = np.random.default_rng(seed)
    n = int(rng.integers(1, 40))
    x = arrays(rng, n, 1) * (10.0 ** rng.integers(-3, 3, (n, 1)) if spread else 1)
    nu = scale * arrays(rng, n, 2) + arrays(rng, 1, 2) * 1e3 * x
    active = rng.random((n, 2)) < rng.random()
    found = project(nu, x, active)
    size = np.linalg.norm(x) * np.linalg.norm(found, axis=0)
    assert np.all(np.abs(x.T @ found) <= 1e-12 * size)
    assert np.all(found[~active] >= 0)


@pytest.mark.parametrize("project", PROJECTIONS)
def test_the_free_row_projection_survives_multipliers_of_all_sizes(project):
    # Breakpoints in geometric progression, the worst case for steps from piece to piece.
    nu = (2.0 ** -np.arange(300))[:, None]
    for active in (np.zeros((300, 1), bool), np.arange(300)[:, None] == 299):
        found = project(nu, np.ones((300, 1)), active)
        assert abs(found.sum()) <= 1e-13 * np.linalg.norm(found)
        assert np.all(found[~active] >= 0)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10_000), st.booleans())
def test_both_free_row_projections_agree(seed, ones):
    rng = np.random.default_rng(seed)
    n = int(rng.integers(1, 60))
    x = np.ones((n, 1)) if ones else arrays(rng, n, 1)
    nu, active = arrays(rng, n, 3), rng.random((n, 3)) < rng.random()
    loop, xp = (project(nu, x, active) for project in PROJECTIONS)
    np.testing.assert_allclose(loop, xp, atol=1e-12 * np.abs(nu).max())
    tensors = (torch.asarray(array) for array in (nu, x, active))
    assert orthogonalise(*tensors).numpy().tobytes() == loop.tobytes()


@pytest.mark.parametrize("project", PROJECTIONS)
def test_the_free_row_projection_leaves_no_cycle(project):
    """Newton's steps from the two ends of this bracket lead to each other."""
    x = np.array([[-1.94007929], [1.98850835], [-1.22867178]])
    nu = np.array([[-0.37639185], [0.77843249], [-1.17707517]])
    found = project(nu, x, np.zeros((3, 1), dtype=bool))
    np.testing.assert_allclose(found[:, 0], [0.196263, 0.191483, 0], atol=1e-6)


def test_violations_and_gap_are_as_defined():
    inputs = np.eye(3)
    active = np.array([[True, True], [False, True], [False, False]])
    level = np.array([[3.0, 4.0], [1.0, 12.0], [-1.0, 0.5]])
    weight = np.array([[3.0, 4.0], [2.0, 10.0], [1.0, 0.0]])
    nothing = np.zeros((3, 2))
    old = np.full((3, 2), 1e9)
    program = ConstrainedProgram(
        inputs=inputs, active=active, level=level, epsilon=0.5, old_weight=old
    )
    certificate = program.certificate(weight, nothing)
    assert certificate.objective == 20
    assert certificate.ball_violation == pytest.approx((2 - 0.5) / 0.5)
    assert certificate.ceiling_violation == pytest.approx(np.sqrt(1 + 4) / 13)
    assert certificate.largest_violation == 2
    assert certificate.violation == certificate.ball_violation
    assert certificate.gap == pytest.approx(20 / (1e-6 * 6e9))
    exact = replace(program, epsilon=0.0).certificate(weight, nothing)
    assert exact.ball_violation == pytest.approx(2 / 13)
    regularised = RegularisedProgram(inputs=inputs, active=active, level=level, fit_weight=2.0)
    certificate = regularised.certificate(weight, nothing)
    np.testing.assert_allclose(certificate.objective, [6, 14 + 2 * 4])
    np.testing.assert_allclose(certificate.ceiling_violation, [np.sqrt(5) / 3, 0])
    np.testing.assert_allclose(certificate.largest_violation, [2, 0])
    np.testing.assert_array_equal(certificate.ball_violation, 0)
    np.testing.assert_array_equal(certificate.gap, 1)


def test_without_fitted_entries_the_ceilings_set_the_scale():
    inputs, level = np.eye(2), np.array([[3.0, -1.0], [4.0, -1.0]])
    active = np.zeros((2, 2), bool)
    weight = np.array([[4.0, -1.0], [4.0, -1.0]])
    scale = np.linalg.norm(level)
    constrained = ConstrainedProgram(inputs=inputs, active=active, level=level, epsilon=0.0)
    certificate = constrained.certificate(weight, np.zeros((2, 2)))
    assert certificate.ceiling_violation == pytest.approx(1 / scale)
    assert certificate.ball_violation == 0
    regularised = RegularisedProgram(inputs=inputs, active=active, level=level, fit_weight=1.0)
    certificate = regularised.certificate(weight, np.zeros((2, 2)))
    np.testing.assert_allclose(certificate.ceiling_violation, [np.sqrt(2) / scale, 0])


def test_an_infeasible_point_is_told_by_the_pair():
    # Weights below the optimum's objective, even below the bound: only the violation gives it away.
    program, weight, multiplier, optimum = with_optimum(6, "constrained")
    certificate = program.certificate(0.999 * weight, multiplier)
    assert certificate.objective < optimum
    assert certificate.gap < 2e-3
    assert certificate.violation > 1e-4


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("form", FORMS)
def test_what_is_not_a_number_is_not_certified(form):
    program, weight, multiplier, _ = with_optimum(6, form)
    for broken in (np.nan, np.inf):
        certificate = program.certificate(np.full_like(weight, broken), multiplier)
        assert not np.any(certificate.within(1e9, 1e9))
        certificate = program.certificate(weight, np.full_like(multiplier, broken))
        assert not np.any(certificate.within(1e-3, 1e-3))


def assert_judged(form, shape, **options):
    """Assert that a program of this size knows its optimum, and how far other weights are off."""
    program, weight, multiplier, optimum = with_optimum(7, form, shape=shape, **options)
    certificate = program.certificate(weight, multiplier)
    np.testing.assert_allclose(certificate.objective, optimum, rtol=1e-11)
    np.testing.assert_allclose(certificate.dual_bound, optimum, rtol=1e-11)
    off = program.inputs @ (1.5 * weight) - program.level
    active, axis = program.active, None if form == "constrained" else 0
    over = np.linalg.norm(np.where(active, 0, np.maximum(off, 0)), axis=axis)
    over = over / np.linalg.norm(np.where(active, program.level, 0), axis=axis)
    certificate = program.certificate(1.5 * weight, multiplier)
    np.testing.assert_allclose(certificate.ceiling_violation, over, rtol=1e-11)
    if form == "constrained":
        ball = np.linalg.norm(off[active]) / program.epsilon - 1
        np.testing.assert_allclose(certificate.ball_violation, ball, rtol=1e-11)


@pytest.mark.parametrize(("form", "penalty", "bias", "mask"), CASES[::3])
def test_blocks_change_nothing(form, penalty, bias, mask):
    """Samples beyond the 8192 whose inputs are cast at a time, and units beyond a block's 32 MB."""
    assert_judged(form, (8200, 12, 500), penalty=PENALTIES[penalty], bias=bias, mask=mask)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("rows", [8191, 8192, 8193, 16384])
def test_two_parts_of_the_samples_are_two_parts(form, rows):
    assert_judged(form, (rows, 12, 4))


def test_an_activation_is_known_by_what_it_says():
    """Also where the text was read from a file, and is another object."""
    inputs, targets = np.ones((2, 2)), -np.ones((2, 1))
    said = "".join(["lin", "ear"])
    assert trim_program(inputs, targets, epsilon=0.1, activation=said).active.all()


@pytest.mark.parametrize(("form", "penalty", "bias", "mask"), CASES)
def test_torch_arrays_give_the_same_certificate(form, penalty, bias, mask):
    program, weight, multiplier, _ = with_optimum(
        8, form, penalty=PENALTIES[penalty], bias=bias, mask=mask
    )
    multiplier = multiplier + 0.1
    twin = replace(
        program,
        **{
            name: None if getattr(program, name) is None else torch.asarray(getattr(program, name))
            for name in ("inputs", "active", "level", "support", "old_weight")
        },
    )
    ours = program.certificate(weight, multiplier)
    theirs = twin.certificate(torch.asarray(weight), torch.asarray(multiplier))
    assert not torch.is_tensor(theirs.gap)
    np.testing.assert_allclose(theirs.objective, ours.objective, rtol=1e-13)
    np.testing.assert_allclose(theirs.dual_bound, ours.dual_bound, rtol=1e-11)
    np.testing.assert_allclose(theirs.violation, ours.violation, atol=1e-13)


@pytest.mark.parametrize("form", FORMS)
def test_single_precision_data_are_judged_in_double(form):
    program, weight, multiplier, _ = with_optimum(9, form, bias=True, dtype=np.float32)
    exact = replace(
        program,
        inputs=program.inputs.astype(float),
        level=program.level.astype(float),
        old_weight=program.old_weight.astype(float),
    )
    one, other = (each.certificate(weight, multiplier) for each in (program, exact))
    np.testing.assert_array_equal(one.objective, other.objective)
    np.testing.assert_array_equal(one.dual_bound, other.dual_bound)
    assert one.gap.dtype == np.float64


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("a", "b"), [(1e-6, 1.0), (1.0, 1e8), (3e5, 7e-4)])
def test_scaled_data_scale_the_certificate(form, a, b):
    program, weight, multiplier, _ = with_optimum(10, form, bias=True)
    multiplier = multiplier + 0.05
    change = (
        {"epsilon": program.epsilon * b}
        if form == "constrained"
        else {"fit_weight": program.fit_weight / (a * b)}
    )
    scaled = replace(
        program,
        inputs=a * program.inputs,
        level=b * program.level,
        old_weight=program.old_weight * b / a,
        **change,
    )
    before = program.certificate(weight, multiplier)
    after = scaled.certificate(weight * b / a, multiplier / a)
    np.testing.assert_allclose(after.objective, before.objective * b / a, rtol=1e-11)
    np.testing.assert_allclose(after.dual_bound, before.dual_bound * b / a, rtol=1e-10)
    np.testing.assert_allclose(after.ceiling_violation, before.ceiling_violation, atol=1e-12)


def test_a_layer_becomes_the_papers_program():
    rng = np.random.default_rng(11)
    inputs, targets = arrays(rng, 5, 3), np.maximum(arrays(rng, 5, 2), 0)
    program = trim_program(inputs, targets, epsilon=0.5)
    np.testing.assert_array_equal(program.active, targets > 0)
    np.testing.assert_array_equal(program.level, targets)
    assert (program.epsilon, program.shape, program.penalty) == (0.5, (5, 3, 2), L1())
    ceilings = arrays(rng, 5, 2)
    program = trim_program(inputs, targets, fit_weight=2.0, ceilings=ceilings, free_rows=(2,))
    np.testing.assert_array_equal(program.level, np.where(targets > 0, targets, ceilings))
    assert program.penalised.tolist() == [0, 1]
    signed = arrays(rng, 5, 2)
    program = trim_program(inputs, signed, epsilon=0.5, activation="linear")
    assert program.active.all()
    np.testing.assert_array_equal(program.level, signed)
    # The old weights are feasible in every form, which is what makes the layer programs solvable.
    for form in FORMS:
        program = of_a_layer(0, form, ceiling="negative", bias=True)
        certificate = program.certificate(program.old_weight, np.zeros(program.level.shape))
        assert np.max(certificate.violation) == 0


def program_arguments(**changes):
    rng = np.random.default_rng(12)
    return {
        "inputs": arrays(rng, 6, 3),
        "active": np.ones((6, 2), bool),
        "level": arrays(rng, 6, 2),
        "epsilon": 0.1,
    } | changes


WITH_NAN = np.array([[1.0, np.nan, 2.0]] * 6)
WITH_INF = np.array([[1.0, np.inf]] * 6)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"inputs": np.ones(3)}, r"inputs: got shape \(3,\), want a nonempty matrix"),
        ({"inputs": np.ones((0, 3))}, r"inputs: got shape \(0, 3\), want a nonempty matrix"),
        ({"level": np.ones((6, 0))}, r"level: got shape \(6, 0\), want a nonempty matrix"),
        ({"active": np.ones(6, bool)}, r"active: got shape \(6,\), want a nonempty matrix"),
        ({"inputs": np.ones((6, 3), int)}, "inputs: got int64, want float32 or float64"),
        (
            {"level": np.ones((6, 2), np.float32)},
            "level: got float32, want the inputs' dtype float64",
        ),
        ({"active": np.ones((6, 2))}, "active: got float64, want bool"),
        ({"level": np.ones((5, 2))}, "level: got 5, want 6 rows, one a sample"),
        ({"active": np.ones((6, 3), bool)}, r"active: got \(6, 3\), want shape \(6, 2\)"),
        ({"inputs": WITH_NAN}, "inputs: got NaN or infinity, want finite numbers"),
        ({"level": WITH_INF}, "level: got NaN or infinity, want finite numbers"),
        ({"inputs": np.full((6, 3), 1e200)}, "inputs: want a largest magnitude from .* got 1e"),
        ({"level": np.full((6, 2), 1e-200)}, "level: want a largest magnitude from .* got 1e-200"),
        (
            {"free_rows": (0, 1)},
            r"free_rows: got \(0, 1\), want at most one row number from 0 to 2",
        ),
        ({"free_rows": (3,)}, r"free_rows: got \(3,\), want at most one row number from 0 to 2"),
        ({"free_rows": (-1,)}, r"free_rows: got \(-1,\), want at most one row number from 0 to 2"),
        (
            {"inputs": np.ones((6, 1)), "free_rows": (0,)},
            "inputs: want at least one column under the penalty",
        ),
        ({"support": np.ones((2, 2), bool)}, r"support: got \(2, 2\), want shape \(3, 2\)"),
        ({"support": np.ones((3, 2))}, "support: got float64, want bool"),
        ({"old_weight": np.ones((3, 3))}, r"old_weight: got \(3, 3\), want shape \(3, 2\)"),
        (
            {"old_weight": np.full((3, 2), np.nan)},
            "old_weight: got NaN or infinity, want finite numbers",
        ),
        ({"epsilon": -0.1}, r"epsilon: got -0.1, want a finite number >= 0"),
        ({"epsilon": np.nan}, "epsilon: got nan, want a finite number >= 0"),
        ({"epsilon": np.inf}, "epsilon: got inf, want a finite number >= 0"),
    ],
)
def test_malformed_programs_are_refused(changes, message):
    ConstrainedProgram(**program_arguments())
    with pytest.raises(ValueError, match=message):
        ConstrainedProgram(**program_arguments(**changes))


@pytest.mark.parametrize("value", [0.0, -1.0, np.nan, np.inf])
def test_the_fit_weight_is_positive(value):
    arguments = program_arguments()
    del arguments["epsilon"]
    with pytest.raises(ValueError, match=f"fit_weight: got {value}, want a positive finite number"):
        RegularisedProgram(**arguments, fit_weight=value)
    with pytest.raises(ValueError, match="penalty: the group penalty couples the units"):
        RegularisedProgram(**arguments, fit_weight=1.0, penalty=Group())


def test_pairs_of_the_wrong_shape_are_refused():
    for form in FORMS:
        program, weight, multiplier, _ = with_optimum(13, form)
        with pytest.raises(ValueError, match=r"weight: got \(4, 12\), want shape \(12, 4\)"):
            program.objective(weight.T)
        with pytest.raises(ValueError, match=r"weight: got \(12, 3\), want shape \(12, 4\)"):
            program.certificate(weight[:, :3], multiplier)
        with pytest.raises(ValueError, match=r"multiplier: got \(12, 4\), want shape \(40, 4\)"):
            program.dual_bound(weight)


def test_trim_program_wants_one_form_and_a_known_activation():
    inputs, targets = np.ones((2, 2)), np.ones((2, 1))
    for both in ({}, {"epsilon": 0.1, "fit_weight": 1.0}):
        with pytest.raises(ValueError, match="epsilon, fit_weight: want exactly one of the two"):
            trim_program(inputs, targets, **both)
    with pytest.raises(ValueError, match="activation: got 'tanh', want 'relu' or 'linear'"):
        trim_program(inputs, targets, epsilon=0.1, activation="tanh")
    with pytest.raises(ValueError, match="ceilings: a layer without activation has none"):
        trim_program(inputs, targets, epsilon=0.1, activation="linear", ceilings=targets)


def test_the_optimality_conditions_can_fail_one_by_one():
    program, weight, multiplier, _ = with_optimum(14, "constrained", bias=True, mask=True)
    active, support = program.active, program.support

    def failing(**changes):
        pair = {"weight": weight, "multiplier": multiplier} | changes
        errors = kkt_errors(program, **pair)
        return {name for name, error in errors.items() if error > 1e-6}

    assert failing() == set()
    assert "mask" in failing(weight=weight + 0.1 * ~support)
    assert "ceiling" in failing(weight=weight + 0.1 * (np.arange(12)[:, None] == 11))
    assert "sign" in failing(multiplier=multiplier - 5.0 * ~active)
    assert "ball" in failing(weight=1.1 * weight)
    assert "domain" in failing(multiplier=2 * multiplier)
    assert "ball slackness" in failing(multiplier=multiplier * np.where(active, -1, 1))
    assert {"free row", "stationarity"} <= failing(multiplier=multiplier + 0.1 * active)


@pytest.mark.parametrize("solve", [solve_admm, solve_newton])
def test_a_unit_of_zeros_whose_bias_fits_it_is_certified(solve):
    """Its optimum is zero, and 1e-20 against a bound of 0 is rounding, not a gap of 1."""
    rng = np.random.default_rng(0)
    inputs = rng.standard_normal((30, 5))
    inputs[:, -1] = 1
    weight = rng.standard_normal((5, 3))
    weight[:-1, 1] = 0
    program = trim_program(
        inputs,
        inputs @ weight,
        activation="linear",
        fit_weight=3.0,
        free_rows=(4,),
        support=np.vstack([weight[:-1] != 0, np.ones((1, 3), bool)]),
        old_weight=weight,
    )
    result = solve(program, tolerance=1e-4)
    assert result.certified.all()
    assert np.all(result.weight[:-1, 1] == 0)
