"""ADMM against known optima and against the oracle; equivalences, statuses, error texts."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from instances import matrix, of_a_layer, with_optimum
from kkt import assert_kkt

from bench.problems import in_single_precision, relu2
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
from solvers.admm.solve import stalled
from solvers.admm.splitting import Splitting
from solvers.scaling import Scaling

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
ORACLE = {"tol_gap_abs": 1e-12, "tol_gap_rel": 1e-12, "tol_feas": 1e-12}


def scale_of(program, objective):
    """max(f*, 1e-6 |w_old|_1), by unit or for the layer."""
    old = np.abs(np.asarray(program.old_weight, dtype=float)[program.penalised]).sum(0)
    return np.maximum(objective, 1e-6 * (old if np.ndim(objective) else old.sum()))


@pytest.mark.parametrize(
    ("seed", "instance"),
    list(enumerate(matrix())),
    ids=["-".join(map(str, each)) for each in matrix()],
)
def test_admm_agrees_with_the_oracle(seed, instance):
    form, dtype, kind, ceiling, bias = instance
    program = of_a_layer(
        seed, form, dtype=np.dtype(dtype).type, kind=kind, ceiling=ceiling, bias=bias
    )
    oracle = solve_cvxpy(program, options=ORACLE)
    assert oracle.status is Status.SOLVED
    result = solve_admm(program, tolerance=1e-5, violation_tolerance=2e-6, max_iterations=20_000)
    assert result.status is Status.SOLVED
    assert result.weight.dtype == program.inputs.dtype
    optimum = oracle.certificate.objective
    scale = scale_of(program, optimum)
    # An objective lies below the optimum by what violations are worth, the more so the steeper nu.
    assert np.all(np.abs(result.certificate.objective - optimum) <= 1e-4 * scale)
    assert np.all(result.certificate.dual_bound <= optimum + 1e-6 * scale)
    assert np.all(oracle.certificate.dual_bound <= optimum + 1e-6 * scale)


@pytest.mark.parametrize(("form", "penalty", "bias", "mask"), CASES)
def test_admm_finds_a_known_optimum(form, penalty, bias, mask):
    program, weight, _, optimum = with_optimum(
        3, form, penalty=PENALTIES[penalty], bias=bias, mask=mask
    )
    program = replace(program, old_weight=None)  # which were the solution
    result = solve_admm(program, tolerance=1e-5, max_iterations=20_000)
    assert result.status is Status.SOLVED
    assert_kkt(program, result.weight, result.multiplier, 1e-3)
    np.testing.assert_allclose(result.certificate.objective, optimum, rtol=1e-4)
    if mask:
        assert np.all(result.weight[~program.support] == 0)
    # Zeros are exact, also where the objective is not.
    zeros = weight[program.penalised] == 0
    assert np.mean(result.weight[program.penalised][zeros] == 0) > 0.3


@pytest.mark.parametrize("penalty", [ElasticNet(0.2), Group()], ids=["elastic", "group"])
@pytest.mark.parametrize("bias", [False, True])
def test_other_penalties_agree_with_the_oracle_on_layers(penalty, bias):
    for seed in range(3):
        for form in FORMS if penalty.separable else FORMS[:1]:
            program = of_a_layer(seed, form, ceiling="negative", bias=bias, penalty=penalty)
            oracle = solve_cvxpy(program, options=ORACLE)
            result = solve_admm(program, tolerance=1e-5, max_iterations=20_000)
            assert (oracle.status, result.status) == (Status.SOLVED, Status.SOLVED)
            scale = scale_of(program, oracle.certificate.objective)
            error = np.abs(result.certificate.objective - oracle.certificate.objective)
            assert np.all(error <= 1e-4 * scale)
            if isinstance(penalty, Group):
                rows = result.weight[program.penalised]
                assert np.all((rows == 0).all(1) | (rows != 0).all(1))


def test_group_prunes_the_inputs_that_the_oracle_prunes():
    rng = np.random.default_rng(0)
    inputs = np.maximum(rng.standard_normal((60, 10)), 0)
    targets = np.maximum(inputs[:, :5] @ rng.standard_normal((5, 5)), 0)
    program = trim_program(
        inputs, targets, epsilon=0.5 * float(np.linalg.norm(targets)), penalty=Group()
    )
    result, oracle = solve_admm(program, tolerance=1e-6), solve_cvxpy(program, options=ORACLE)
    assert result.status is Status.SOLVED
    pruned = (result.weight == 0).all(1)
    np.testing.assert_array_equal(pruned, np.linalg.norm(oracle.weight, axis=1) < 1e-6)
    assert 2 <= pruned.sum() <= 8


def test_the_support_holds_weights_at_zero():
    for form in FORMS:
        program = of_a_layer(4, form, bias=True)
        kept = np.random.default_rng(1).random((12, 4)) < 0.7
        kept[-1] = True
        # A ball wide enough for the weights that are left.
        wide = 0.8 * float(np.linalg.norm(np.where(program.active, program.level, 0)))
        masked = (
            replace(program, support=kept, epsilon=wide)
            if form == FORMS[0]
            else replace(program, support=kept)
        )
        result = solve_admm(masked, max_iterations=20_000)
        oracle = solve_cvxpy(masked, options=ORACLE)
        assert (result.status, oracle.status) == (Status.SOLVED, Status.SOLVED)
        assert np.all(result.weight[~kept] == 0)
        scale = scale_of(program, oracle.certificate.objective)
        error = np.abs(result.certificate.objective - oracle.certificate.objective)
        assert np.all(error <= 2e-4 * scale)
        free = solve_admm(program)
        if form == "regularised":
            assert np.all(result.certificate.objective > free.certificate.dual_bound)


@pytest.mark.parametrize("shape", [(20, 6), (6, 20), (9, 9)])
def test_the_projection_is_the_nearest_point_of_the_graph(shape):
    rng = np.random.default_rng(2)
    inputs = rng.standard_normal(shape)
    program = trim_program(inputs, rng.random((shape[0], 3)), epsilon=0.1)
    factor = prepare(inputs)
    splitting = Splitting.build(Scaling.of(program, factor.sizes), factor, np.float64)
    inputs = splitting.inputs
    a, c = rng.standard_normal((shape[1], 3)), rng.standard_normal((shape[0], 3))
    u, z = splitting.project(a, c)
    root = np.sqrt(splitting.tau)
    stacked = np.vstack([np.eye(shape[1]), root * inputs])
    best = np.linalg.lstsq(stacked, np.vstack([a, root * c]), rcond=None)[0]
    np.testing.assert_allclose(u, best, atol=1e-10)
    np.testing.assert_allclose(z, inputs @ best, atol=1e-9)


def scaled(program, a, b):
    """The program of (aX, bY): its solution is b/a times the solution."""
    change = (
        {"epsilon": program.epsilon * b}
        if hasattr(program, "epsilon")
        else {"fit_weight": program.fit_weight / (a * b)}
    )
    return replace(
        program,
        inputs=(a * program.inputs).astype(program.inputs.dtype),
        level=(b * program.level).astype(program.inputs.dtype),
        old_weight=(program.old_weight * (b / a)).astype(program.inputs.dtype),
        **change,
    )


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [np.float64, np.float32])
@pytest.mark.parametrize(("a", "b"), [(2.0**-20, 1.0), (1.0, 2.0**24), (2.0**7, 2.0**-13)])
def test_scaled_data_give_the_scaled_solution(form, dtype, a, b):
    program = of_a_layer(5, form, dtype=dtype, bias=True)
    if a != b:
        # A free row's samples scale with the rest.
        assert program.free_rows
    before, after = solve_admm(program), solve_admm(scaled(program, a, b))
    assert before.status is after.status is Status.SOLVED
    assert before.iterations == after.iterations
    tolerance = 1e-9 if dtype == np.float64 else 1e-3
    np.testing.assert_allclose(after.weight * (a / b), before.weight, atol=tolerance)
    np.testing.assert_allclose(
        after.certificate.objective * (a / b), before.certificate.objective, rtol=tolerance
    )


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("a", [1e-5, 300.0])
def test_odd_scales_change_rounding_only(form, a):
    program = of_a_layer(6, form)
    before, after = solve_admm(program), solve_admm(scaled(program, a, 0.7))
    assert before.iterations == after.iterations
    np.testing.assert_allclose(after.weight * (a / 0.7), before.weight, atol=1e-9)


@pytest.mark.parametrize("form", FORMS)
def test_the_order_of_units_inputs_and_samples_does_not_matter(form):
    program = of_a_layer(7, form, bias=True)
    n_samples, n_in, n_out = program.shape
    rng = np.random.default_rng(3)
    rows, ins, outs = (rng.permutation(n) for n in (n_samples, n_in, n_out))
    moved = replace(
        program,
        inputs=program.inputs[rows][:, ins],
        active=program.active[rows][:, outs],
        level=program.level[rows][:, outs],
        old_weight=program.old_weight[ins][:, outs],
        free_rows=(int(np.flatnonzero(ins == n_in - 1)[0]),),
    )
    before, after = solve_admm(program), solve_admm(moved)
    assert before.iterations == after.iterations
    np.testing.assert_allclose(after.weight, before.weight[ins][:, outs], atol=1e-9)
    np.testing.assert_allclose(after.multiplier, before.multiplier[rows][:, outs], atol=1e-8)


def test_a_unit_of_the_regularised_form_does_not_feel_the_others():
    program = of_a_layer(8, "regularised", bias=True)
    together = solve_admm(program, tolerance=1e-6)
    for unit in range(4):
        alone = solve_admm(
            replace(
                program,
                active=program.active[:, [unit]],
                level=program.level[:, [unit]],
                old_weight=program.old_weight[:, [unit]],
            ),
            tolerance=1e-6,
        )
        np.testing.assert_allclose(
            alone.certificate.objective[0], together.certificate.objective[unit], rtol=2e-6
        )


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [np.float64, np.float32])
def test_two_runs_give_the_same_bytes(form, dtype):
    first, second = (solve_admm(of_a_layer(9, form, dtype=dtype)) for _ in range(2))
    assert first.weight.tobytes() == second.weight.tobytes()
    assert first.multiplier.tobytes() == second.multiplier.tobytes()
    assert first.history == second.history


def as_torch(program):
    names = ("inputs", "active", "level", "support", "old_weight")
    values = {name: getattr(program, name) for name in names}
    return replace(
        program,
        **{name: None if value is None else torch.asarray(value) for name, value in values.items()},
    )


@pytest.mark.parametrize(("form", "penalty", "bias", "mask"), CASES)
def test_torch_arrays_give_the_same_solution(form, penalty, bias, mask):
    program, *_ = with_optimum(10, form, penalty=PENALTIES[penalty], bias=bias, mask=mask)
    ours, theirs = (solve_admm(each, tolerance=1e-3) for each in (program, as_torch(program)))
    assert torch.is_tensor(theirs.weight)
    assert torch.is_tensor(theirs.multiplier)
    assert theirs.iterations == ours.iterations
    assert theirs.status is ours.status is Status.SOLVED
    np.testing.assert_allclose(theirs.weight.numpy(), ours.weight, atol=1e-8)
    np.testing.assert_allclose(theirs.certificate.objective, ours.certificate.objective, rtol=1e-8)


@pytest.mark.parametrize("form", FORMS)
def test_single_precision_tensors_are_certified(form):
    program = as_torch(of_a_layer(11, form, dtype=np.float32, bias=True))
    result = solve_admm(program)
    assert result.status is Status.SOLVED
    assert result.weight.dtype == torch.float32
    again = solve_admm(program, warm_start=result)
    assert again.status is Status.SOLVED
    assert again.iterations <= result.iterations


@pytest.mark.parametrize("form", FORMS)
def test_the_layout_in_memory_does_not_matter(form):
    program = of_a_layer(12, form)
    strided = replace(
        program,
        inputs=np.asfortranarray(program.inputs),
        level=np.repeat(program.level, 2, axis=1)[:, ::2],
        old_weight=program.old_weight.T.copy().T,
    )
    one, other = solve_admm(program), solve_admm(strided)
    np.testing.assert_allclose(one.weight, other.weight, atol=1e-10)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [np.float64, np.float32])
def test_the_certificate_is_of_the_weights_returned(form, dtype):
    program = of_a_layer(13, form, dtype=dtype, kind="correlated", bias=True)
    result = solve_admm(program, tolerance=1e-4)
    assert result.weight.dtype == dtype
    again = program.certificate(result.weight, result.multiplier)
    for name in ("objective", "dual_bound", "gap", "ball_violation", "ceiling_violation"):
        np.testing.assert_array_equal(getattr(again, name), getattr(result.certificate, name))
    np.testing.assert_array_equal(result.certified, again.within(1e-4, 1e-4))
    assert result.certificate.gap.shape == (() if form == "constrained" else (4,))
    assert result.solve_seconds > 0


@pytest.mark.parametrize("form", FORMS)
def test_single_precision_reaches_what_rounding_allows(form):
    # Iterated in float32 alone, the gap stalls above this.
    program = of_a_layer(14, form, dtype=np.float32)
    result = solve_admm(program, tolerance=1e-6, violation_tolerance=1e-6, max_iterations=20_000)
    assert result.status is Status.SOLVED
    assert result.weight.dtype == np.float32


@pytest.mark.parametrize("form", FORMS)
def test_a_warm_start_saves_iterations(form):
    program = of_a_layer(15, form, kind="correlated", bias=True)
    first = solve_admm(program, tolerance=1e-5, max_iterations=20_000)
    again = solve_admm(program, tolerance=1e-5, warm_start=first)
    assert again.status is Status.SOLVED
    assert again.iterations == {"constrained": 75, "regularised": 50}[form] < first.iterations / 10
    near = (
        replace(program, epsilon=program.epsilon * 1.02)
        if form == "constrained"
        else replace(program, fit_weight=program.fit_weight * 0.98)
    )
    cold = solve_admm(near, tolerance=1e-5, max_iterations=20_000)
    warm = solve_admm(near, tolerance=1e-5, max_iterations=20_000, warm_start=first)
    assert warm.status is cold.status is Status.SOLVED
    assert warm.iterations < cold.iterations
    np.testing.assert_allclose(warm.certificate.objective, cold.certificate.objective, rtol=3e-5)


def test_a_warm_start_may_come_from_the_other_form():
    constrained = of_a_layer(16, "constrained")
    result = solve_admm(constrained)
    other = of_a_layer(16, "regularised")
    assert solve_admm(other, warm_start=result).status is Status.SOLVED
    assert solve_admm(constrained, warm_start=solve_cvxpy(constrained)).iterations <= 100


@pytest.mark.parametrize("kind", ["plain", "wide"])
def test_a_shared_factor_gives_the_same_bytes(kind):
    for form in FORMS:
        program = of_a_layer(17, form, kind=kind)
        factor = prepare(program.inputs)
        own, shared = solve_admm(program), solve_admm(program, factor=factor)
        assert own.weight.tobytes() == shared.weight.tobytes()
        assert own.setup_seconds > 0
        assert shared.setup_seconds == 0
        inputs = factor.sizes.divide(program.inputs)
        assert factor.squared_norm == pytest.approx(np.sum(inputs**2))
        assert factor.gram.shape == (min(program.inputs.shape),) * 2


@pytest.mark.parametrize("form", FORMS)
def test_too_few_iterations_are_told_and_the_remedy_works(form):
    program = of_a_layer(18, form)
    result = solve_admm(program, max_iterations=3)
    assert result.status is Status.ITERATION_LIMIT
    assert result.iterations == 3
    assert result.weight.shape == (12, 4)
    assert not np.all(result.certified)
    assert result.status.remedy == (
        "raise max_iterations, go on from this result (warm_start), ask for less (tolerance), or "
        "use solve_newton, which also tells what cannot be reached"
    )
    assert solve_newton(program).status is Status.SOLVED
    assert solve_admm(program, max_iterations=5000).status is Status.SOLVED
    assert solve_admm(program, warm_start=result).status is Status.SOLVED
    assert solve_admm(program, max_iterations=300, tolerance=0.9).status is Status.SOLVED


@pytest.mark.parametrize("seed", [19, 20, 21])
def test_a_certified_unit_is_left_alone(seed):
    """What a unit has at the check that certifies it, it has at the end, whatever others take."""
    program = of_a_layer(seed, "regularised", kind="correlated")
    limits = {"tolerance": 1e-5, "violation_tolerance": 1e-5}
    whole = solve_admm(program, **limits, max_iterations=20_000)
    assert whole.status is Status.SOLVED
    left = 0
    for row in whole.history[:-1]:
        cut = solve_admm(program, **limits, max_iterations=row["iteration"])
        done = cut.certified
        assert cut.weight[:, done].tobytes() == whole.weight[:, done].tobytes()
        left += done.sum()
    assert left > 0, "no unit was certified before the last"


def test_units_are_certified_one_by_one():
    program = of_a_layer(19, "regularised")
    for limit in range(50, 1500, 25):
        result = solve_admm(program, tolerance=1e-6, max_iterations=limit)
        if 0 < result.certified.sum() < 4:
            break
    assert result.status is Status.ITERATION_LIMIT
    optimum = solve_cvxpy(program, options=ORACLE).certificate.objective
    np.testing.assert_allclose(
        result.certificate.objective[result.certified], optimum[result.certified], rtol=3e-6
    )


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("what", ["Y", "XY"])
def test_squares_beyond_float32_are_no_obstacle(form, what):
    program = of_a_layer(20, form, dtype=np.float32)
    big = scaled(program, 1e30 if "X" in what else 1.0, 1e30 if "Y" in what else 1.0)
    assert solve_admm(big).status is Status.SOLVED


def test_solved_has_nothing_to_remedy():
    result = solve_admm(of_a_layer(21, "constrained"))
    assert result.status is Status.SOLVED
    assert result.status.remedy == "nothing to do"
    assert result.solver == "admm"
    assert result.history[-1]["gap"] <= 1e-4
    assert [row["iteration"] for row in result.history] == sorted(
        row["iteration"] for row in result.history
    )


def test_degenerate_layers_are_solved():
    inputs = np.maximum(np.random.default_rng(22).standard_normal((15, 4)), 0)
    nothing = np.zeros((15, 2))
    for form in ({"epsilon": 0.1}, {"fit_weight": 1.0}):
        result = solve_admm(trim_program(inputs, nothing, **form))
        assert result.status is Status.SOLVED
        assert np.all(result.weight == 0)
        targets = np.ones((15, 2))
        dead = trim_program(np.zeros((15, 4)), targets, **dict.fromkeys(form, 10.0))
        result = solve_admm(dead)
        assert result.status is Status.SOLVED
        assert np.all(result.weight == 0)
    exact = trim_program(
        inputs[:3], inputs[:3] @ np.ones((4, 2)), epsilon=0.0, old_weight=np.ones((4, 2))
    )
    result = solve_admm(exact, max_iterations=20_000)
    assert result.status is Status.SOLVED
    assert result.certificate.ball_violation <= 1e-4


def test_malformed_arguments_are_refused():
    program = of_a_layer(23, "constrained")
    with pytest.raises(ValueError, match="tolerance: got 0, want a positive finite number"):
        solve_admm(program, tolerance=0)
    with pytest.raises(ValueError, match="tolerance: got nan, want a positive finite number"):
        solve_admm(program, tolerance=float("nan"))
    with pytest.raises(
        ValueError, match="violation_tolerance: got -1, want a positive finite number"
    ):
        solve_admm(program, violation_tolerance=-1)
    with pytest.raises(ValueError, match="max_iterations: got 0, want a whole number >= 1"):
        solve_admm(program, max_iterations=0)
    other = solve_admm(of_a_layer(23, "constrained", kind="wide"))
    with pytest.raises(
        ValueError, match=r"warm_start: got \(30, 4\), want weights of shape \(12, 4\)"
    ):
        solve_admm(program, warm_start=other)
    short = replace(other, weight=np.zeros((12, 4)), multiplier=np.zeros((7, 4)))
    with pytest.raises(
        ValueError, match=r"warm_start: got \(7, 4\), want a multiplier of shape \(40, 4\)"
    ):
        solve_admm(program, warm_start=short)
    with pytest.raises(ValueError, match=r"factor: want that of inputs \(40, 12\), .* order 4"):
        solve_admm(program, factor=prepare(np.ones((4, 5))))


def test_float32_data_is_certified_beyond_what_float32_iterates_reach(monkeypatch):
    """Where float32 iterates stop gaining, float64 takes over; without that they never arrive."""
    program = in_single_precision(relu2(120, 400, 10, ball=False).program)
    limits = {"tolerance": 1e-6, "max_iterations": 4000}
    assert solve_admm(program, **limits).status is Status.SOLVED
    monkeypatch.setattr("solvers.admm.solve.stalled", lambda *_: False)
    assert solve_admm(program, **limits).status is Status.ITERATION_LIMIT


@pytest.mark.parametrize(
    ("gaps", "violations", "given"),
    [
        ((1.0, 0.9), (1.0, 0.9), False),  # too few
        ((1.0, 0.9, 0.85), (1.0, 1.0, 1.0), True),
        ((1.0, 0.9, 0.7), (1.0, 2.0, 3.0), False),  # the gap falls
        ((1.0, 1.0, 1.0), (1.0, 3.0, 0.5), False),  # a new low of the violation
        ((1.0, 1.0, 1.0, 1.0), (1.0, 0.5, 2.0, 0.45), True),
        ((0.1, 0.05, 0.01), (1.0, 1.0, 1.0), True),  # the gap is within its tolerance
    ],
)
def test_float32_has_given_what_it_can(gaps, violations, given):
    history = [
        {"gap": gap, "violation": violation}
        for gap, violation in zip(gaps, violations, strict=True)
    ]
    assert stalled(history, 0.2, 0.2) is given
