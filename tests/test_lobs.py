"""Second-order pruning over layer streams: the quadratic, the patterns, what is certified."""

import copy
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from networks import random_chain
from shared_data import AUTHORS, LENET, MNIST, SHARED
from torch import nn
from torch.nn import functional

import retrain
from retrain.adapters.network.stream import TorchStream
from retrain.methods.lobs.budget import shared_sparsities
from retrain.methods.lobs.method import lobs, lobs_plan
from retrain.methods.lobs.moments import stream_moments
from retrain.methods.lobs.options import LobsOptions, stage_amounts
from retrain.stream.chain import Chain, ChainStream
from retrain.stream.stream import LayerBatch, collect, layer
from solvers import Status
from solvers.obs import METHODS, hessian_of, layer_problem, per_layer, prune

WIDTHS = (12, 16, 10, 4)


def network(seed=0, *, biases=True, dtype=np.float64):
    return random_chain(*WIDTHS, seed=seed, bias=biases, dtype=dtype)[0]


def samples(seed=1, rows=200, dtype=np.float64):
    rng = np.random.default_rng(seed)
    mixed = rng.standard_normal((rows, WIDTHS[0])) @ rng.standard_normal((WIDTHS[0], WIDTHS[0]))
    return (mixed / math.sqrt(WIDTHS[0])).astype(dtype)


def stream_of(seed=0, *, biases=True, batch_size=64, dtype=np.float64):
    chain = network(seed, biases=biases, dtype=dtype)
    return ChainStream(chain, samples(dtype=dtype), batch_size=batch_size)


def run(stream, *, layers=None, **settings):
    """Prune; return reports by name."""
    results = list(lobs(stream, LobsOptions(**{"threads": 1, **settings}), layers=layers))
    return {result.report.name: result.report for result in results}


def weights_of(stream, name, group=0):
    """A layer's weights without the bias, as numpy."""
    return np.asarray(stream.weight(name, group))[: layer(stream, name).shape[0]]


# --- the quadratic -------------------------------------------------------------------------------


@pytest.mark.parametrize("calibration", ["dense", "sequential", "corrected"])
@pytest.mark.parametrize("batch_size", [7, 64, 1000])
def test_the_quadratic_is_the_sum_over_rows(calibration, batch_size):
    stream = stream_of(batch_size=batch_size)
    rng = np.random.default_rng(3)
    stream.commit("0", stream.weight("0") + 0.3 * rng.standard_normal((13, 16)))
    moments = stream_moments(stream, layer(stream, "1"), 0, calibration)
    old = stream.weight("1")
    batch = collect(stream, "1")
    inputs = batch.dense_inputs if calibration == "dense" else batch.inputs
    target = batch.responses if calibration == "corrected" else inputs @ old
    for change in (np.zeros_like(old), rng.standard_normal(old.shape)):
        wanted = ((inputs @ (old + change) - target) ** 2).sum() / 200
        assert moments.error(change) == pytest.approx(wanted, rel=1e-10, abs=1e-10)
        assert abs(moments.error(change) - wanted) <= moments.rounding(change)
    assert moments.rows == 200


@pytest.mark.parametrize("method", ["one-shot", "greedy", "swaps", "sweep", "large"])
def test_streamed_equals_whole(method):
    stream = stream_of()
    batch = collect(stream, "1")
    hessian = hessian_of([batch.dense_inputs])
    problem = layer_problem(stream.weight("1"), hessian, free_rows=[-1])
    wanted = prune(problem, per_layer(0.6), method)
    report = run(stream, layers=["1"], method=method, sparsity=0.6)["1"]
    np.testing.assert_allclose(stream.weight("1"), wanted.weight, rtol=1e-7, atol=1e-9)
    assert report.details.layer_error == pytest.approx(wanted.error, rel=1e-8)
    moved = batch.dense_inputs @ (stream.weight("1") - stream.weight("1", dense=True))
    assert report.details.layer_error == pytest.approx((moved**2).sum() / 200, rel=1e-10)
    assert report.details.relative_layer_error == pytest.approx(
        (moved**2).sum() / (batch.responses**2).sum(), rel=1e-9
    )
    assert report.details.damping == wanted.damping


def test_errors_of_the_report():
    stream = stream_of()
    report = run(stream, sparsity=0.5, calibration="sequential")["1"]
    batch = collect(stream, "1")
    new = np.maximum(batch.inputs @ stream.weight("1"), 0)
    target = np.maximum(batch.responses, 0)
    assert report.error == pytest.approx(np.linalg.norm(new - target), rel=1e-9)
    assert report.relative_error == pytest.approx(report.error / np.linalg.norm(target), rel=1e-9)
    assert report.rows == report.total_rows == 200
    quantiles = list(report.details.sensitivities[0]["quantiles"].values())
    assert quantiles == sorted(quantiles)


def test_sequential_sees_the_pruned_network_and_dense_does_not():
    dense, sequential = stream_of(), stream_of()
    run(dense, sparsity=0.7, method="greedy")
    run(sequential, sparsity=0.7, method="greedy", calibration="sequential")
    np.testing.assert_array_equal(dense.weight("0"), sequential.weight("0"))
    assert not np.array_equal(dense.weight("1"), sequential.weight("1"))
    alone = stream_of()
    run(alone, sparsity=0.7, method="greedy", layers=["1"])
    np.testing.assert_array_equal(alone.weight("1"), dense.weight("1"))


def test_corrected_meets_the_normal_equations_of_the_dense_response():
    """On its support, X_hat^T (X_hat What - X W) = 0: what the other two do not minimise."""
    stream = stream_of()
    run(stream, sparsity=0.6, method="greedy", calibration="corrected", damping=1e-9)
    for name in ("0", "1", "2"):
        batch = collect(stream, name)
        new = stream.weight(name)
        gradient = batch.inputs.T @ (batch.inputs @ new - batch.responses)
        scale = np.abs(batch.inputs.T @ batch.responses).max()
        assert np.abs(gradient[new != 0]).max() < 1e-5 * scale
    sequential = stream_of()
    run(sequential, sparsity=0.6, method="greedy", calibration="sequential", damping=1e-9)

    def missed(stream):
        pairs = zip(stream.outputs(dense=False), stream.outputs(dense=True), strict=True)
        return sum(float(((now - then) ** 2).sum()) for now, then in pairs)

    assert missed(stream) < missed(sequential)


# --- counts and patterns -------------------------------------------------------------------------


@pytest.mark.parametrize("sparsity", [0.0, 0.005, 0.333, 0.5, 0.93, 1.0])
@pytest.mark.parametrize("method", [name for name in METHODS if name not in ("best", "inputs")])
def test_exact_counts(method, sparsity):
    stream = stream_of()
    for report in run(stream, method=method, sparsity=sparsity).values():
        wanted = math.floor(sparsity * report.weights + 0.5)
        assert report.zeros == wanted == np.sum(weights_of(stream, report.name) == 0)
        assert report.certified
        assert report.status is Status.SOLVED


@pytest.mark.parametrize("method", ["auto", "best", "one-shot"])
@pytest.mark.parametrize("pattern", ["unit", "2:4", "4:8", "3:5"])
def test_patterns(method, pattern):
    stream = stream_of()
    sparsity = 0.6 if pattern == "unit" else None
    reports = run(stream, method=method, pattern=pattern, sparsity=sparsity)
    for name, report in reports.items():
        zero = weights_of(stream, name) == 0
        if pattern == "unit":
            assert np.all(zero.sum(axis=0) == math.floor(0.6 * len(zero) + 0.5))
        else:
            keep, group = map(int, pattern.split(":"))
            for start in range(0, len(zero), group):
                part = zero[start : start + group]
                assert np.all((~part).sum(axis=0) == min(keep, len(part)))
        assert report.certified


@pytest.mark.parametrize("method", ["auto", "one-shot", "large"])
def test_whole_inputs(method):
    stream = stream_of()
    reports = run(stream, method=method, pattern="inputs", sparsity=0.5)
    for name, report in reports.items():
        zero = weights_of(stream, name) == 0
        assert np.all(zero.all(axis=1) == zero.any(axis=1))
        assert zero.all(axis=1).sum() == math.floor(0.5 * len(zero) + 0.5)
        assert report.certified


def test_ratios_by_layer():
    stream = stream_of()
    reports = run(stream, method="one-shot", sparsity={"1": 0.5, "[02]": 0.25})
    assert [reports[name].sparsity for name in ("0", "1", "2")] == [0.25, 0.5, 0.25]
    with pytest.raises(ValueError, match="sparsity: none given for layer '2', only for 0, 1"):
        run(stream_of(), sparsity={"0": 0.5, "1": 0.5})
    untouched = stream_of()
    with pytest.raises(ValueError, match="none given"):
        run(untouched, sparsity={"0": 0.5, "1": 0.5})
    assert untouched.chain is untouched.dense


@pytest.mark.parametrize("calibration", ["dense", "sequential", "corrected"])
@pytest.mark.parametrize("method", ["auto", "one-shot", "large", "sweep"])
def test_sparsity_zero_writes_nothing(method, calibration):
    stream = stream_of(dtype=np.float32)
    before = [weight.tobytes() for weight in stream.dense.weights]
    sparsity = {"0": 0.0, "1": 0.5, "2": 0.0}
    reports = run(stream, method=method, sparsity=sparsity, calibration=calibration)
    assert stream.weight("0").tobytes() == before[0]
    assert stream.weight("2").tobytes() == before[2]
    assert reports["0"].details.rms_error < 1e-6
    assert reports["0"].relative_error < 1e-6
    assert all(report.certified for report in reports.values())


@pytest.mark.parametrize("method", ["auto", "greedy", "one-shot"])
def test_tolerance(method):
    previous = -1
    for tolerance in (0.0, 0.05, 0.2, 0.8):
        stream = stream_of()
        report = run(stream, method=method, tolerance=tolerance, layers=["0"])["0"]
        assert report.certified
        assert report.details.rms_error <= tolerance * (1 + 1e-6)
        assert report.zeros >= previous
        previous = report.zeros
    assert previous > 60
    if method == "one-shot":  # not one weight more would have done
        more = stream_of()
        run(more, method="one-shot", sparsity=(previous + 1) / 192, layers=["0"])
        change = collect(more, "0").dense_inputs @ (more.weight("0") - more.dense.weights[0])
        assert (change**2).sum() / 200 > 0.8**2


def test_methods_in_order_of_quality():
    errors = {}
    for method in ("one-shot", "greedy", "swaps"):
        reports = run(stream_of(), method=method, sparsity=0.7)
        errors[method] = sum(report.details.layer_error for report in reports.values())
    assert errors["swaps"] <= errors["greedy"] < errors["one-shot"]


# --- biases, zeros, dead inputs ------------------------------------------------------------------


@pytest.mark.parametrize("method", ["auto", "one-shot", "large", "sweep"])
def test_biases(method):
    updated, kept = stream_of(), stream_of()
    first = run(updated, method=method, sparsity=0.8, bias="update")
    second = run(kept, method=method, sparsity=0.8, bias="keep")
    for name in ("0", "1", "2"):
        assert np.array_equal(kept.weight(name)[-1], kept.dense.weights[int(name)][-1])
        assert np.all(updated.weight(name)[-1] != updated.dense.weights[int(name)][-1])
        assert first[name].zeros == second[name].zeros
        if method == "auto":
            assert first[name].details.layer_error < second[name].details.layer_error
    assert first["0"].details.bias == "updated"
    assert second["0"].details.bias == "kept"
    bare = run(stream_of(biases=False), method=method, sparsity=0.8)
    assert bare["0"].details.bias == "none"
    assert bare["0"].zeros == first["0"].zeros


def test_everything_pruned_leaves_the_best_bias():
    """With no weight left the bias alone is fitted: to the mean response."""
    stream = stream_of()
    run(stream, sparsity=1.0, method="greedy", layers=["0"])
    mean = collect(stream, "0").responses.mean(axis=0)
    np.testing.assert_allclose(stream.weight("0")[-1], mean, rtol=1e-6)


def test_zeros_stay_or_are_free():
    stream = stream_of()
    run(stream, sparsity=0.5)
    pruned = stream.chain
    again = ChainStream(pruned, samples())
    reports = run(again, sparsity=0.8)
    assert all(report.zeros_before == report.weights // 2 for report in reports.values())
    for name in ("0", "1", "2"):
        old, new = pruned.weights[int(name)][:-1], weights_of(again, name)
        assert np.all(new[old == 0] == 0)
        assert np.sum(new == 0) == math.floor(0.8 * new.size + 0.5)
    less = ChainStream(pruned, samples())
    run(less, sparsity=0.2)  # more are gone already: nothing to do
    assert [w.tobytes() for w in less.chain.weights] == [w.tobytes() for w in pruned.weights]
    free = ChainStream(pruned, samples())
    run(free, sparsity=0.2, zeros="free")
    for name in ("0", "1", "2"):
        new = weights_of(free, name)
        assert np.sum(new == 0) >= math.floor(0.2 * new.size + 0.5)
    with pytest.raises(ValueError, match=r"layer '0': zeros: .* let zeros become free"):
        run(ChainStream(pruned, samples()), pattern="inputs", sparsity=0.5)


def test_dead_inputs():
    inputs = samples()
    inputs[:, [2, 5]] = 0
    stream = ChainStream(network(), inputs)
    report = run(stream, sparsity=0.5, method="greedy", layers=["0"])["0"]
    assert report.details.dead_inputs == [2]
    assert np.all(weights_of(stream, "0")[[2, 5]] == 0)  # they cost nothing and go first


def test_a_singular_hessian_is_said_of_its_layer():
    inputs = samples()
    inputs[:, 1] = inputs[:, 0]
    with pytest.raises(ValueError, match=r"layer '0': hessian: .* raise the damping"):
        run(ChainStream(network(), inputs), sparsity=0.5, damping=0.0)
    few = ChainStream(network(), samples(rows=3))
    assert all(report.certified for report in run(few, sparsity=0.5).values())


# --- torch: dense, convolutions, groups, types ---------------------------------------------------


def convolutional(seed=0, *, groups=1, bias=True, **options):
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(4, 6, 3, groups=groups, bias=bias, **options),
        nn.ReLU(),
        nn.Flatten(),
        nn.LazyLinear(5),
    )


def images(seed=2, count=30, channels=4, size=8):
    return np.random.default_rng(seed).standard_normal((count, channels, size, size))


def ready(model, x, dtype=torch.float64):
    model = model.to(dtype)
    with torch.no_grad():
        model(torch.tensor(x, dtype=dtype))
    return model


def test_torch_equals_chain():
    chain = network()
    modules = []
    for weight in chain.weights:
        linear = nn.Linear(weight.shape[0] - 1, weight.shape[1], dtype=torch.float64)
        with torch.no_grad():
            linear.weight.copy_(torch.tensor(weight[:-1].T.copy()))
            linear.bias.copy_(torch.tensor(weight[-1]))
        modules += [linear, nn.ReLU()]
    stream, arrays = TorchStream(nn.Sequential(*modules[:-1]), samples()), stream_of()
    for calibration in ("dense", "corrected"):
        run(stream, sparsity=0.7, calibration=calibration)
        run(arrays, sparsity=0.7, calibration=calibration)
        for index, name in enumerate(("0", "2", "4")):
            ours = stream.weight(name).numpy()
            np.testing.assert_allclose(ours, arrays.weight(str(index)), rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize(
    "options",
    [{}, {"stride": 2, "padding": 1}, {"dilation": 2}, {"padding": 2, "bias": False}],
    ids=str,
)
@pytest.mark.parametrize("method", ["one-shot", "auto"])
def test_a_convolution_is_a_dense_layer_on_its_patches(options, method):
    x = images()
    model = ready(convolutional(**options), x)
    stream = TorchStream(model, x)
    report = run(stream, method=method, sparsity=0.7, layers=["0"])["0"]
    given = {key: value for key, value in options.items() if key != "bias"}
    patches = functional.unfold(torch.tensor(x), 3, **given).transpose(1, 2).reshape(-1, 36)
    conv = model[0]
    dense = nn.Linear(36, 6, bias=conv.bias is not None, dtype=torch.float64)
    with torch.no_grad():
        dense.weight.copy_(conv.weight.reshape(6, 36))
        if conv.bias is not None:
            dense.bias.copy_(conv.bias)
    flat = TorchStream(nn.Sequential(dense, nn.ReLU(), nn.Linear(6, 2).double()), patches)
    other = run(flat, method=method, sparsity=0.7, layers=["0"])["0"]
    np.testing.assert_allclose(stream.weight("0"), flat.weight("0"), rtol=1e-7, atol=1e-9)
    assert report.zeros == other.zeros == math.floor(0.7 * 216 + 0.5)
    assert report.rows == len(patches)
    assert report.details.layer_error == pytest.approx(other.details.layer_error, rel=1e-9)
    assert report.certified


@pytest.mark.parametrize("method", ["one-shot", "auto"])
def test_groups_are_programs_of_their_own_under_one_count(method):
    x = images()
    model = ready(convolutional(groups=2), x)
    stream = TorchStream(model, x)
    report = run(stream, method=method, sparsity=0.435, layers=["0"])["0"]
    counts = [int((weights_of(stream, "0", group) == 0).sum()) for group in range(2)]
    assert sum(counts) == math.floor(0.435 * 108 + 0.5) == 47
    assert counts == [23, 24]
    assert report.zeros == 47
    assert len(report.details.sensitivities) == 2
    for group in range(2):
        alone = nn.Conv2d(2, 3, 3).double()
        with torch.no_grad():
            alone.weight.copy_(model[0].weight[3 * group : 3 * group + 3])
            alone.bias.copy_(model[0].bias[3 * group : 3 * group + 3])
        part = x[:, 2 * group : 2 * group + 2]
        single = TorchStream(
            ready(nn.Sequential(alone, nn.Flatten(), nn.LazyLinear(2)), part), part
        )
        run(single, method=method, sparsity=counts[group] / 54, layers=["0"])
        np.testing.assert_allclose(
            stream.weight("0", group), single.weight("0"), rtol=1e-7, atol=1e-9
        )


def test_groups_share_a_tolerance():
    x = images()
    stream = TorchStream(ready(convolutional(groups=2), x), x)
    report = run(stream, tolerance=0.3, layers=["0"])["0"]
    assert 0 < report.details.rms_error <= 0.3
    assert report.zeros > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_certified_as_saved_in_narrow_types(dtype):
    x = images().astype(np.float32)
    model = ready(convolutional(padding=1), x, torch.float32).to(dtype)
    stream = TorchStream(model, x)
    reports = run(stream, method="greedy", sparsity=0.6)
    for name, report in reports.items():
        assert report.certified
        assert report.zeros == math.floor(0.6 * report.weights + 0.5)
        saved = dict(stream.model.named_parameters())[f"{name}.weight"]
        assert saved.dtype == dtype
        assert int((saved == 0).sum()) == report.zeros


# --- certification, order, resuming --------------------------------------------------------------


class Wandering(ChainStream):
    """A stream whose rows change from one pass to the next."""

    passes = 0

    def batches(self, name, group=0, *, rows=None):
        self.passes += 1
        for batch in super().batches(name, group, rows=rows):
            scaled = batch.dense_inputs * (1 + 1e-4 * self.passes)
            yield LayerBatch(scaled, scaled, batch.responses, batch.rows)


def test_not_certified_when_rows_and_hessian_disagree():
    report = run(Wandering(network(), samples()), sparsity=0.5, layers=["0"])["0"]
    assert not report.certified
    assert report.status is Status.INEXACT
    assert report.dense_units == 0
    assert report.zeros == 96


def test_not_certified_when_the_saved_weights_miss_the_tolerance():
    """A refitted weight is a minimum: rounding it to bfloat16 can only raise the error."""
    x = images().astype(np.float32)
    model = ready(convolutional(padding=1), x, torch.float32).to(torch.bfloat16)
    wide = TorchStream(copy.deepcopy(model).float(), x)
    report = run(wide, tolerance=0.05, damping=1e-9, layers=["0"])["0"]
    assert report.certified
    reached = report.details.rms_error * (1 + 1e-5)
    narrow = run(TorchStream(model, x), tolerance=reached, damping=1e-9, layers=["0"])["0"]
    assert narrow.zeros == report.zeros > 0
    assert narrow.details.rms_error > 1.0001 * reached
    assert not narrow.certified
    assert narrow.status is Status.INEXACT


@pytest.mark.parametrize("fault", ["one too many", "not zero"])
def test_not_certified_when_a_method_miscounts(fault, monkeypatch):
    """A threshold with <= takes one weight more; a mask that is not applied leaves one."""

    def faulty(problem, pattern, method, *, threads):
        result = prune(problem, pattern, method, threads=threads)
        weight, kept = result.weight.copy(), result.kept.copy()
        if fault == "one too many":
            spot = tuple(np.argwhere(kept[:-1])[0])
            kept[spot], weight[spot] = False, 0.0
        else:
            weight[tuple(np.argwhere(~kept)[0])] = 1e-3
        return replace(result, weight=weight, kept=kept)

    monkeypatch.setattr("retrain.methods.lobs.method.prune", faulty)
    report = run(stream_of(), sparsity=0.5, layers=["0"])["0"]
    assert report.zeros == (97 if fault == "one too many" else 95)
    assert not report.certified


def test_resumed_equals_uninterrupted():
    for calibration in ("dense", "sequential", "corrected"):
        options = LobsOptions(sparsity=0.6, calibration=calibration, threads=1)
        whole = stream_of()
        results = {r.report.name: r for r in lobs(whole, options)}
        resumed = stream_of()
        finished = {name: results[name].weights for name in ("0", "1")}
        rest = [r.report.name for r in lobs(resumed, options, finished=finished)]
        assert rest == ["2"]
        for mine, theirs in zip(resumed.chain.weights, whole.chain.weights, strict=True):
            assert mine.tobytes() == theirs.tobytes()


def test_jobs_change_nothing():
    one, two = stream_of(), stream_of()
    run(one, sparsity=0.6, jobs=1)
    reports = run(two, sparsity=0.6, jobs=2)
    assert set(reports) == {"0", "1", "2"}
    for mine, theirs in zip(one.chain.weights, two.chain.weights, strict=True):
        assert mine.tobytes() == theirs.tobytes()


def test_layers_that_cannot_be_pruned_are_refused():
    with pytest.raises(ValueError, match="no layer is called 'x'"):
        run(stream_of(), sparsity=0.5, layers=["x"])


def test_memory_is_a_limit_that_refuses():
    with pytest.raises(ValueError, match=r"memory: layer '0' with 12 inputs takes about .* GiB"):
        run(stream_of(), sparsity=0.5, memory=1e3)


def test_auto_chooses_by_width():
    stream = ChainStream(Chain((np.ones((2049, 2)),)), np.ones((1, 2049)))
    wide, narrow = stream.layers[0], stream_of().layers[0]
    assert LobsOptions(sparsity=0.5).method_for(wide) == "large"
    assert LobsOptions(sparsity=0.5).method_for(narrow) == "swaps"
    assert LobsOptions(tolerance=0.5).method_for(narrow) == "greedy"
    assert LobsOptions(sparsity=0.5, pattern="inputs").method_for(narrow) == "inputs"


def test_the_plan_has_the_counts():
    stream = stream_of()
    plan = {s.name: n for s, n, _ in lobs_plan(stream, LobsOptions(sparsity=0.93), ["0", "2"])}
    assert plan == {"0": math.floor(0.93 * 192 + 0.5), "2": math.floor(0.93 * 40 + 0.5)}
    plan = {s.name: n for s, n, _ in lobs_plan(stream, LobsOptions(pattern="2:4"), ["0"])}
    assert plan == {"0": 96}
    plan = {s.name: n for s, n, _ in lobs_plan(stream, LobsOptions(tolerance=1.0), ["0"])}
    assert plan == {"0": None}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "sparsity, tolerance: want exactly one of the two"),
        ({"sparsity": 0.5, "tolerance": 1}, "sparsity, tolerance: want exactly one of the two"),
        ({"sparsity": 1.01}, r"sparsity: got 1.01, want a number in \[0, 1\]"),
        ({"sparsity": math.nan}, r"sparsity: got nan, want a number in \[0, 1\]"),
        ({"sparsity": {"a": -0.1}}, r"sparsity: got -0.1, want a number in \[0, 1\]"),
        ({"sparsity": {}}, "sparsity: got a mapping without layers"),
        ({"tolerance": -1}, "tolerance: got -1, want a finite number >= 0"),
        ({"tolerance": math.inf}, "tolerance: got inf, want a finite number >= 0"),
        ({"sparsity": 0.5, "method": "x"}, "method: got 'x', want one of auto, one-shot, .*"),
        (
            {"tolerance": 1, "method": "swaps"},
            r"method \(with a tolerance\): got 'swaps', want one of auto, greedy,",
        ),
        ({"tolerance": 1, "pattern": "unit"}, "pattern: got 'unit', want 'layer' with a tolerance"),
        ({"sparsity": 0.5, "pattern": "x"}, "pattern: got 'x', want layer, unit, inputs or N:M"),
        ({"sparsity": 0.5, "pattern": "2:4"}, "the pattern 2:4 fixes the sparsity; want none"),
        ({"pattern": "5:4"}, "want whole 0 <= N <= M"),
        (
            {"sparsity": 0.5, "pattern": "inputs", "method": "greedy"},
            "pattern: got 'inputs', want one of layer, unit, n:m for greedy",
        ),
        ({"sparsity": 0.5, "damping": -1.0}, "damping: got -1.0, want a finite fraction >= 0"),
        ({"sparsity": 0.5, "damping": 0.1, "method": "best"}, "damping: the method 'best' has its"),
        (
            {"sparsity": 0.5, "calibration": "x"},
            "calibration: got 'x', want one of dense, sequential, corrected",
        ),
        ({"sparsity": 0.5, "bias": "x"}, "bias: got 'x', want one of update, keep"),
        ({"sparsity": 0.5, "zeros": "x"}, "zeros: got 'x', want one of stay, free"),
        ({"sparsity": 0.5, "memory": 0}, "memory: got 0, want a positive finite number"),
        ({"sparsity": 0.5, "jobs": 0}, "jobs: got 0, want a whole number >= 1"),
        (
            {"sparsity": 0.5, "jobs": 2, "calibration": "sequential"},
            "jobs: sequential calibration takes layers one by one",
        ),
        ({"sparsity": 0.5, "threads": 0}, "threads: got 0, want a whole number >= 1"),
    ],
)
def test_unfit_options(settings, message):
    with pytest.raises(ValueError, match=message):
        LobsOptions(**settings)


def test_damping_is_the_callers_where_given():
    errors = []
    for damping in (1e-6, 1e-1):
        for method in ("one-shot", "greedy", "swaps", "sweep", "large"):
            report = run(stream_of(), method=method, sparsity=0.7, damping=damping)["0"]
            assert report.details.damping == damping
            assert report.certified
            errors.append(report.details.layer_error)
        report = run(stream_of(), pattern="inputs", sparsity=0.7, damping=damping)["0"]
        assert report.details.damping == damping
    assert errors[0] != errors[5]


# --- stages --------------------------------------------------------------------------------------


def test_stages_keep_the_same_share_each():
    first, second, third = stage_amounts(0.992, 3)
    assert (1 - first, 1 - second) == pytest.approx((0.2, 0.04))
    assert third == 0.992
    assert stage_amounts({"a": 0.75}, 2) == [{"a": 0.5}, {"a": 0.75}]
    assert stage_amounts([0.5, 0.9], None) == [0.5, 0.9]
    assert stage_amounts(0.5, None) == [0.5]
    with pytest.raises(ValueError, match="stages: 3 wanted, but there are sparsities for 2"):
        stage_amounts([0.5, 0.9], 3)
    with pytest.raises(ValueError, match="stages: got 0, want a whole number >= 1"):
        stage_amounts(0.5, 0)


# --- the authors' own files ----------------------------------------------------------------------


@pytest.mark.shared_data(AUTHORS, LENET, *MNIST)
def test_our_streamed_hessians_are_the_authors():
    """Theirs: (1/n) sum x x^T over all 60 000 images, the bias last, float32 sums."""
    from retrain.adapters.files.load import load_model
    from retrain.data.arrays import Data
    from retrain.data.sources import load_data

    model = load_model(SHARED / LENET).module
    data = load_data(f"mnist:{SHARED}/data/mnist", normalise="0.1307,0.3081")
    stream = TorchStream(model, Data(data.x, None, data.name))
    theirs = np.load(SHARED / AUTHORS)
    for name, close in (("fc1", 1e-4), ("fc2", 1e-5), ("fc3", 1e-5)):
        ours = stream_moments(stream, layer(stream, name), 0, "dense").hessian.numpy()
        apart = np.linalg.norm(ours - theirs[f"hessian/{name}"]) / np.linalg.norm(ours)
        assert apart < close


# --- one sparsity for the network -----------------------------------------------------------------


def wide_network():
    """Two layers alike, the second with inputs that hardly matter."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Linear(12, 20), torch.nn.ReLU(), torch.nn.Linear(20, 20), torch.nn.Linear(20, 4)
    ).double()
    with torch.no_grad():
        model[2].weight[:, 5:] *= 1e-4
    return model, np.random.default_rng(0).normal(size=(150, 12))


def test_a_networks_zeros_are_shared_by_what_they_cost():
    model, x = wide_network()
    shared = retrain.lobs(model, x, sparsity=0.5, sparsity_of="network")
    alike = retrain.lobs(model, x, sparsity=0.5)
    total = sum(report.weights for report in shared.layers)
    zeros = sum(report.zeros for report in shared.layers)
    assert zeros == total // 2 == sum(report.zeros for report in alike.layers)
    middle = next(report for report in shared.layers if report.name == "2")
    assert middle.sparsity > 0.7 > shared.layers[0].sparsity
    assert shared.measured < 0.7 * alike.measured
    again = retrain.lobs(model, x, sparsity=shared.record["options"]["sparsity"])
    for name, value in shared.model.state_dict().items():
        assert torch.equal(value, again.model.state_dict()[name])


def test_shares_hold_for_scaled_layers_and_for_layers_left_out():
    model, x = wide_network()
    names = ["0", "2", "3"]
    plain = shared_sparsities(TorchStream(model, x), names, 0.5, LobsOptions(sparsity=0.5))
    with torch.no_grad():  # the same function: ReLU is homogeneous
        model[0].weight *= 64
        model[0].bias *= 64
        model[2].weight /= 64
    scaled = shared_sparsities(TorchStream(model, x), names, 0.5, LobsOptions(sparsity=0.5))
    assert scaled == plain
    some = retrain.lobs(model, x, sparsity=0.5, sparsity_of="network", skip="0")
    assert [report.name for report in some.layers] == ["2", "3"]
    assert sum(r.zeros for r in some.layers) == sum(r.weights for r in some.layers) // 2


@pytest.mark.parametrize(
    "options",
    [{"tolerance": 1.0}, {"sparsity": {"0": 0.5}}, {"sparsity": [0.2, 0.5]},
     {"sparsity": 0.5, "pattern": "unit"}],
)  # fmt: skip
def test_a_networks_sparsity_is_one_number(options):
    model, x = wide_network()
    with pytest.raises(ValueError, match="sparsity_of: the network's wants one sparsity"):
        retrain.lobs(model, x, sparsity_of="network", **options)
    with pytest.raises(ValueError, match="sparsity_of: got 'unit', want one of layer, network"):
        retrain.lobs(model, x, sparsity=0.5, sparsity_of="unit")
