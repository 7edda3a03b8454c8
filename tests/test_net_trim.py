"""Net-Trim over a layer stream: Algorithms 1 and 2 as the paper has them, and what a run needs."""

import math

import joblib
import numpy as np
import pytest
import torch
from networks import random_chain, rows
from torch import nn

from retrain.adapters.network.stream import TorchStream
from retrain.bounds.outputs import discrepancy
from retrain.methods.net_trim.method import net_trim
from retrain.methods.net_trim.options import NetTrimOptions
from retrain.methods.net_trim.task import rows_within
from retrain.stream.chain import Chain, ChainStream, activate, forward
from retrain.stream.stream import collect
from solvers import L1, ElasticNet, Group, Status, solve_cvxpy, trim_program

TIGHT = {"tolerance": 1e-6, "violation_tolerance": 1e-7, "max_iterations": 20_000}


def make(seed=0, widths=(8, 12, 10, 4), samples=60, bias=True, dtype=np.float64):
    return ChainStream(*random_chain(*widths, seed=seed, samples=samples, bias=bias, dtype=dtype))


def inputs_of(stream):
    """The samples that the network is given."""
    first = stream.layers[0]
    return collect(stream, first.name).inputs[:, : first.shape[0]]


def run(stream, **options):
    options = {**TIGHT, **options}
    return {r.report.name: r for r in net_trim(stream, NetTrimOptions(**options))}


def test_parallel_solves_program_5_of_every_layer():
    """Algorithm 1 line 7, against cvxpy: TRIM(Y^(l-1), Y^(l), 0, epsilon) on dense activations."""
    stream = make()
    results = run(stream, scheme="parallel", relative_epsilon=0.2)
    for spec in stream.layers:
        batch = collect(stream, spec.name)
        targets = activate(spec.follows, batch.responses)
        program = trim_program(
            batch.dense_inputs,
            targets,
            epsilon=0.2 * float(np.linalg.norm(targets)),
            activation=spec.follows,
            free_rows=(spec.shape[0],),
        )
        oracle = solve_cvxpy(program)
        details = results[spec.name].report.details
        assert details.epsilon == pytest.approx(program.epsilon)
        assert details.objective == pytest.approx(float(oracle.certificate.objective), rel=1e-4)


def test_cascade_solves_program_6_on_the_retrained_inputs():
    """Algorithm 2 lines 6 to 8: epsilon of (7), ceilings W^T Yhat, the new layer's own inputs."""
    stream = make()
    results = run(stream, relative_epsilon=0.2, inflation=1.3)
    new = stream.chain
    for index, spec in enumerate(stream.layers[1:], start=1):
        inputs = forward(new, inputs_of(stream))[index - 1]
        inputs = np.hstack([inputs, np.ones((len(inputs), 1))])
        targets = forward(stream.dense, inputs_of(stream))[index]
        old = inputs @ stream.dense.weights[index]
        fitted = targets > 0 if spec.follows == "relu" else np.ones_like(targets, bool)
        epsilon = math.sqrt(1.3 * ((old - targets)[fitted] ** 2).sum())
        program = trim_program(
            inputs,
            targets,
            epsilon=epsilon,
            activation=spec.follows,
            ceilings=old if spec.follows == "relu" else None,
            free_rows=(spec.shape[0],),
        )
        report = results[spec.name].report
        assert report.details.epsilon == pytest.approx(epsilon, rel=1e-9)
        oracle = float(solve_cvxpy(program).certificate.objective)
        assert report.details.objective == pytest.approx(oracle, rel=1e-4)


def test_a_cascade_of_one_layer_is_the_parallel_scheme():
    first, second = make(widths=(8, 5)), make(widths=(8, 5))
    one = run(first, relative_epsilon=0.1)["0"]
    two = run(second, scheme="parallel", relative_epsilon=0.1)["0"]
    np.testing.assert_array_equal(one.weights[0], two.weights[0])


def test_the_old_weights_are_always_feasible_in_a_cascade():
    """Inflation 1 leaves no slack beyond the old weights' own error: still solved, in float32."""
    stream = make(dtype=np.float32)
    results = run(stream, relative_epsilon=0.1, inflation=1.0, tolerance=1e-2,
                  violation_tolerance=1e-3)  # fmt: skip
    assert all(result.report.certified for result in results.values())


def test_larger_radius_prunes_more_and_costs_no_more_l1():
    zeros, sizes = [], []
    for epsilon in (0.01, 0.1, 0.4):
        stream = make()
        results = run(stream, scheme="parallel", relative_epsilon=epsilon)
        zeros.append(sum(result.report.zeros for result in results.values()))
        sizes.append(sum(result.report.details.objective for result in results.values()))
    assert zeros == sorted(zeros) and zeros[0] < zeros[-1]
    assert sizes == sorted(sizes, reverse=True)


@pytest.mark.parametrize("scheme", ["parallel", "cascade"])
def test_regularised_default_weight_keeps_the_residual_within_epsilon(scheme):
    """r^2 <= epsilon^2 + r_old^2 at the optimum, and r_old is 0 for a first or parallel layer."""
    stream = make()
    results = run(stream, form="regularised", scheme=scheme, relative_epsilon=0.1)
    first = results["0"].report
    assert first.certified
    assert first.error <= first.details.epsilon * (1 + 1e-6)
    weight = np.abs(stream.dense.weights[0][:-1]).sum()
    assert first.details.fit_weight == [pytest.approx(weight / first.details.epsilon**2)]


def test_absolute_epsilon_and_its_link_normalised_reading():
    plain = run(make(), scheme="parallel", epsilon=0.5, relative_epsilon=None)
    assert [plain[name].report.details.epsilon for name in "012"] == [0.5] * 3
    stream = make()
    linked = run(
        stream, scheme="parallel", epsilon=1e-4, relative_epsilon=None, link_normalised=True
    )
    scales = np.cumprod([np.abs(w[:-1]).sum() for w in stream.dense.weights])
    for name, scale in zip("012", scales, strict=True):
        assert linked[name].report.details.epsilon == pytest.approx(1e-4 * scale)


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_the_groups_of_a_layer_share_its_epsilon(groups):
    """sqrt(groups (epsilon / sqrt(groups))^2): together they move as far as one layer may."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(4, 8, 3, groups=groups), nn.ReLU(), nn.Flatten())
    x = rows(20, 4, 5, 5)
    stream = TorchStream(model, x)
    options = {"scheme": "parallel", "relative_epsilon": None}
    report = run(stream, epsilon=3.0, tolerance=1e-3, violation_tolerance=1e-5, **options)["0"]
    report = report.report
    assert report.certified
    assert report.details.epsilon == pytest.approx(3.0)
    moved = discrepancy(stream, "0")
    # All of it is used: a smaller ball would leave weights that could have gone.
    assert 0.95 * 3.0 <= moved <= 3.0 * (1 + 1e-4)


def test_penalties_and_a_penalised_bias():
    group = run(make(), scheme="parallel", relative_epsilon=0.3, penalty=Group())
    assert all(result.report.certified for result in group.values())
    assert any((np.abs(r.weights[0][:-1]).sum(axis=1) == 0).any() for r in group.values())
    elastic = run(make(), scheme="parallel", relative_epsilon=0.3, penalty=ElasticNet(0.5))
    assert all(result.report.certified for result in elastic.values())
    stream = make()
    results = run(stream, scheme="parallel", relative_epsilon=0.3, penalise_bias=True)
    objective = np.abs(results["0"].weights[0]).sum()
    assert results["0"].report.details.objective == pytest.approx(objective)


@pytest.mark.parametrize("backend", ["loky", "threading"])
def test_jobs_change_nothing_and_the_backend_can_be_chosen(backend):
    one = run(make(), scheme="parallel", relative_epsilon=0.1, threads=1)
    with joblib.parallel_config(backend=backend):
        two = run(make(), scheme="parallel", relative_epsilon=0.1, threads=1, jobs=2)
    assert one.keys() == two.keys()
    for name in one:
        np.testing.assert_array_equal(one[name].weights[0], two[name].weights[0])


def test_layers_that_are_not_certified_keep_their_dense_weights():
    stream = make()
    results = run(stream, relative_epsilon=0.1, max_iterations=1)
    for name, result in results.items():
        report = result.report
        assert (report.certified, report.status) == (False, Status.ITERATION_LIMIT)
        assert report.dense_units == report.shape[1]
        np.testing.assert_array_equal(result.weights[0], stream.weight(name, dense=True))


def test_newton_certifies_what_admm_does_and_more():
    admm = run(make(), relative_epsilon=0.1)
    newton = run(make(), relative_epsilon=0.1, solver="newton", tolerance=1e-8)
    for name, result in newton.items():
        report = result.report
        assert report.certified
        assert report.details.solver == "newton"
        assert report.details.gap <= 1e-8
        if name == "0":  # later layers of the two cascades have different inputs
            objective = admm[name].report.details.objective
            assert report.details.objective == pytest.approx(objective, rel=1e-5)
    with pytest.raises(ValueError, match="solver: got 'fast', want 'auto', 'admm' or 'newton'"):
        NetTrimOptions(solver="fast")
    with pytest.raises(ValueError, match=r"solver: newton solves the units one by one, .* group"):
        NetTrimOptions(solver="newton", penalty=Group())


def test_accept_inexact_uses_what_there_is():
    stream = make()
    results = run(stream, relative_epsilon=0.1, max_iterations=1, accept_inexact=True)
    report = results["0"].report
    assert (report.certified, report.dense_units) == (False, 0)
    assert (results["0"].weights[0] != stream.weight("0", dense=True)).any()


def test_regularised_units_fail_one_by_one():
    """The unit that stops the others in a run cut short keeps its old weights alone."""
    for limit in range(50, 2000, 25):
        stream = make()
        report = run(
            stream,
            form="regularised",
            scheme="parallel",
            relative_epsilon=0.1,
            max_iterations=limit,
            solver="admm",
        )["0"].report
        if 0 < report.dense_units < report.all_units:
            break
    else:
        pytest.fail("no iteration limit split the units")
    dense = stream.weight("0", dense=True)
    same = (stream.weight("0") == dense).all(axis=0)
    assert same.sum() == report.dense_units
    assert not report.certified


def test_finished_layers_are_committed_and_not_solved_again():
    stream = make()
    results = run(stream, relative_epsilon=0.1)
    again = make()
    finished = {name: results[name].weights for name in ("0", "1")}
    rest = list(net_trim(again, NetTrimOptions(**TIGHT, relative_epsilon=0.1), finished=finished))
    assert [result.report.name for result in rest] == ["2"]
    np.testing.assert_array_equal(rest[0].weights[0], results["2"].weights[0])
    np.testing.assert_array_equal(again.chain.weights[0], stream.chain.weights[0])


def test_only_the_named_layers_change_and_the_first_of_them_is_a_first_layer():
    stream = make()
    options = NetTrimOptions(**TIGHT, relative_epsilon=0.1)
    (result,) = net_trim(stream, options, layers=["1"])
    assert result.report.details.relative_epsilon == pytest.approx(0.1)
    for name in "02":
        np.testing.assert_array_equal(stream.weight(name), stream.weight(name, dense=True))
    with pytest.raises(ValueError, match="no layer is called 'x'"):
        list(net_trim(stream, options, layers=["x"]))


def test_memory_samples_rows_by_seed_and_says_so():
    stream = make(samples=400)
    spec = stream.layers[0]
    memory = 8 * (3 * 9 + 16 * 12) * 100
    assert rows_within(spec, memory, 8, "admm") == 100
    reports = [
        run(make(samples=400), relative_epsilon=0.1, memory=memory, seed=s, solver="admm")
        for s in (0, 0, 1)
    ]
    first = reports[0]["0"].report
    assert (first.rows, first.total_rows) == (100, 400)
    same, other = reports[1]["0"].weights[0], reports[2]["0"].weights[0]
    np.testing.assert_array_equal(reports[0]["0"].weights[0], same)
    assert (same != other).any()


def test_counts_are_of_what_is_saved():
    stream = make()
    for result in run(stream, relative_epsilon=0.2).values():
        report = result.report
        assert report.zeros == (result.weights[0][:-1] == 0).sum()
        assert report.weights == report.shape[0] * report.shape[1]
        assert report.sparsity == report.zeros / report.weights


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"scheme": "serial"}, "scheme: got 'serial', want 'cascade' or 'parallel'"),
        ({"form": "free"}, "form: got 'free', want 'constrained' or 'regularised'"),
        ({"epsilon": 1.0}, "exactly one of the two"),
        ({"relative_epsilon": None}, "exactly one of the two"),
        ({"relative_epsilon": -0.1}, "relative_epsilon: got -0.1, want a finite number >= 0"),
        (
            {"relative_epsilon": None, "epsilon": math.nan},
            "epsilon: got nan, want a finite number >= 0",
        ),
        ({"inflation": 0.99}, "inflation: got 0.99, want a finite number >= 1"),
        ({"fit_weight": 1.0}, "belongs to the regularised form"),
        (
            {"form": "regularised", "fit_weight": 0.0},
            r"fit_weight: got 0\.0, want a positive finite number",
        ),
        ({"form": "regularised", "relative_epsilon": 0.0}, "want one in the regularised form"),
        ({"form": "regularised", "penalty": Group()}, "group penalty couples the units"),
        ({"link_normalised": True}, "gives an absolute epsilon its meaning"),
        ({"tolerance": 0.0}, r"tolerance: got 0\.0, want a positive finite number"),
        ({"memory": math.inf}, "memory: got inf, want a positive finite number"),
        ({"jobs": 0}, "jobs: got 0, want a whole number >= 1"),
        ({"threads": 0}, "threads: got 0, want a whole number >= 1"),
    ],
)
def test_bad_options_are_named(options, words):
    with pytest.raises(ValueError, match=words):
        NetTrimOptions(**options)


# --- zeros that the dense network has -------------------------------------------------------------


def sparse(seed=0, share=0.4, **options):
    """A network with zeros: scattered, a whole unit, a whole input; and a bias of zero."""
    stream = make(seed, **options)
    rng = np.random.default_rng(seed)
    weights = [weight.copy() for weight in stream.dense.weights]
    for weight in weights:
        n_in = len(weight) - 1
        weight[:n_in][rng.random((n_in, weight.shape[1])) < share] = 0
        weight[:n_in, 0] = 0
        weight[1] = 0
        weight[-1, 1] = 0
    return ChainStream(Chain(tuple(weights), (True,) * len(weights)), inputs_of(stream))


def regrown(stream):
    """Entries, biases not counted, that were zero and are not."""
    return [
        int(((stream.weight(spec.name)[:-1] != 0) & (stream.weight(spec.name, dense=True)[:-1] == 0)
             ).sum())
        for spec in stream.layers
    ]  # fmt: skip


@pytest.mark.parametrize("scheme", ["cascade", "parallel"])
@pytest.mark.parametrize("form", ["constrained", "regularised"])
@pytest.mark.parametrize(
    "options",
    [
        {"solver": "admm"},
        {"solver": "newton"},
        {"solver": "newton", "penalty": ElasticNet(0.1)},
        {"solver": "admm", "dtype": np.float32},
        {"solver": "newton", "penalise_bias": True},
        {"solver": "newton", "sparsity": 0.75},
    ],
)
@pytest.mark.parametrize("seed", [0, 1])
def test_zeros_of_the_dense_network_stay(scheme, form, options, seed):
    options = dict(options)
    stream = sparse(seed, dtype=options.pop("dtype", np.float64))
    limits = {"tolerance": 1e-2, "violation_tolerance": 1e-3}
    results = run(stream, scheme=scheme, form=form, relative_epsilon=0.2, **options, **limits)
    assert all(result.report.certified for result in results.values())
    assert regrown(stream) == [0, 0, 0]
    for result in results.values():
        assert result.report.zeros > result.report.zeros_before > 0


def test_zeros_may_stay_under_a_penalty_that_couples_the_units():
    stream = sparse()
    results = run(stream, relative_epsilon=0.3, penalty=Group(), tolerance=1e-2)
    assert all(result.report.certified for result in results.values())
    assert regrown(stream) == [0, 0, 0]


def test_zeros_come_back_only_where_they_may():
    """The check can fail: without the mask the same programs bring zeros back."""
    stream = sparse()
    run(stream, relative_epsilon=0.2, zeros="free")
    assert sum(regrown(stream)) > 0
    with pytest.raises(ValueError, match="zeros: got 'maybe', want 'stay' or 'free'"):
        NetTrimOptions(zeros="maybe")


def test_a_bias_of_zero_is_no_weight_and_may_move():
    stream = sparse()
    results = run(stream, relative_epsilon=0.2)
    assert any(result.weights[0][-1, 1] != 0 for result in results.values())


def test_held_zeros_are_the_optimum_of_the_program_with_a_mask():
    stream = sparse()
    results = run(stream, scheme="parallel", relative_epsilon=0.2)
    for spec in stream.layers:
        batch = collect(stream, spec.name)
        targets = activate(spec.follows, batch.responses)
        old = stream.weight(spec.name, dense=True)
        support = old != 0
        support[-1] = True
        oracle = solve_cvxpy(
            trim_program(
                batch.dense_inputs,
                targets,
                epsilon=0.2 * float(np.linalg.norm(targets)),
                activation=spec.follows,
                free_rows=(spec.shape[0],),
                support=support,
                old_weight=old,
            )
        )
        objective = results[spec.name].report.details.objective
        assert objective == pytest.approx(float(oracle.certificate.objective), rel=1e-4)


def test_inflation_1_is_feasible_with_held_zeros():
    """The old weights have the zeros, so they meet every program of a cascade."""
    stream = sparse(dtype=np.float32)
    limits = {"tolerance": 1e-2, "violation_tolerance": 1e-3}
    results = run(stream, relative_epsilon=0.1, inflation=1.0, **limits)
    assert all(result.report.certified for result in results.values())
    assert regrown(stream) == [0, 0, 0]


def test_fewer_zeros_than_there_are_cannot_be_had():
    """The nearest count is the dense network's own; `zeros="free"` admits the one asked for."""
    limits = {"tolerance": 1e-2, "violation_tolerance": 1e-3}
    stream = sparse(share=0.6)
    held = run(stream, sparsity=0.3, solver="newton", **limits)["0"].report
    assert held.details.asked_zeros < held.zeros_before <= held.zeros
    assert regrown(stream) == [0, 0, 0]
    free = run(sparse(share=0.6), sparsity=0.3, solver="newton", zeros="free", **limits)["0"].report
    assert free.zeros < held.zeros_before


@pytest.mark.parametrize(
    ("options", "device", "solver", "because"),
    [
        ({}, "cpu", "newton", "auto: the penalty is separable and the layer's arrays are on the C"),
        ({"penalty": ElasticNet(0.1)}, "cpu", "newton", "auto: the penalty is separable"),
        ({"penalty": Group()}, "cpu", "admm", "auto: the group penalty couples the units"),
        ({}, "cuda:0", "admm", "auto: the layer's arrays are on cuda:0"),
        ({"solver": "admm"}, "cpu", "admm", "asked for"),
        ({"solver": "newton"}, "cuda:0", "newton", "asked for"),
    ],
)
def test_the_solver_is_chosen_by_rule(options, device, solver, because):
    chosen, reason = NetTrimOptions(**options).solver_on(device)
    assert chosen == solver
    assert reason.startswith(because)


@pytest.mark.parametrize(("penalty", "solver"), [(L1(), "newton"), (Group(0.5), "admm")])
def test_the_report_says_which_solver_and_why(penalty, solver):
    reports = run(make(), relative_epsilon=0.2, penalty=penalty)
    for result in reports.values():
        assert result.report.details.solver == solver
        assert result.report.details.solver_because.startswith("auto: ")
        assert result.report.certified
