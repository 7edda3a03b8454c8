"""The theorems' bounds as numbers, against what networks really do."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from networks import dense, random_chain, rows
from torch import nn

import retrain
from retrain.adapters.network.stream import TorchStream
from retrain.bounds.outputs import (
    NO_DIRECT,
    Direct,
    cascade_bound,
    check_link_normalised,
    discrepancy,
    l_obs_bound,
    output_bound,
    theorem_1,
    theorem_2,
)
from retrain.methods.net_trim.method import net_trim
from retrain.methods.net_trim.options import NetTrimOptions
from retrain.methods.net_trim.task import rows_within
from retrain.stream.chain import Chain, ChainStream, forward, link_normalise

TIGHT = {"tolerance": 1e-4, "violation_tolerance": 1e-6, "max_iterations": 20_000}


def drawn(seed, widths=(10, 14, 12, 5), follows=(), bias=False):
    return random_chain(*widths, seed=seed, samples=80, bias=bias, follows=follows)


def trimmed(chain, inputs, **options):
    stream = ChainStream(chain, inputs)
    reports = [result.report for result in net_trim(stream, NetTrimOptions(**TIGHT, **options))]
    assert all(report.certified for report in reports)
    return stream, sorted(reports, key=lambda report: report.name)


@pytest.mark.parametrize("follows", [(), ("relu",) * 3])
@pytest.mark.parametrize("seed", range(3))
def test_theorem_1_on_link_normalised_networks(seed, follows):
    chain, inputs = drawn(seed, follows=follows)
    normalised, _ = link_normalise(chain)
    dense = forward(normalised, inputs)
    epsilons = [0.1 * np.linalg.norm(outcome) for outcome in dense]
    stream, _ = trimmed(normalised, inputs, scheme="parallel", relative_epsilon=0.1)
    assert check_link_normalised(stream.chain) == []
    bounds = theorem_1(epsilons)
    for new, old, bound in zip(forward(stream.chain, inputs), dense, bounds, strict=True):
        assert np.linalg.norm(new - old) <= bound * (1 + 1e-5)
    assert theorem_1([0.3] * 4)[-1] == pytest.approx(4 * 0.3)


@pytest.mark.parametrize("follows", [(), ("relu",) * 3])
@pytest.mark.parametrize("seed", range(3))
def test_theorem_2_on_cascades(seed, follows):
    chain, inputs = drawn(seed, follows=follows)
    normalised, _ = link_normalise(chain)
    dense = forward(normalised, inputs)
    epsilon = 0.1 * np.linalg.norm(dense[0])
    stream, reports = trimmed(normalised, inputs, epsilon=epsilon, relative_epsilon=None)
    assert reports[0].details.epsilon == pytest.approx(epsilon)
    bounds = theorem_2(epsilon, [1.1] * 2)
    for new, old, bound in zip(forward(stream.chain, inputs), dense, bounds, strict=True):
        assert np.linalg.norm(new - old) <= bound * (1 + 1e-5)
    assert theorem_2(2.0, [1.5] * 3)[-1] == pytest.approx(1.5**1.5 * 2.0)
    np.testing.assert_array_equal(theorem_2(2.0, [1.0, 1.0]), [2.0, 2.0, 2.0])


def test_the_premise_of_theorem_1_can_fail_and_is_checked():
    """Inputs x and x/2 carry the same information: a heavy ridge spreads (1, 0) over both."""
    heavy = Chain((np.array([[0.8], [0.4]]),))
    assert check_link_normalised(heavy) == ["layer 0: |W|_1 = 1.2"]


def test_theorem_2_wants_inflations_of_at_least_one():
    with pytest.raises(ValueError, match=r"inflations: got 0\.9, want every rate >= 1"):
        theorem_2(1.0, [1.1, 0.9])


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("seed", range(4))
def test_output_bound_holds_for_any_weights(seed, bias):
    """The sum over layers needs no certificate: it holds for weights from anywhere."""
    chain, inputs = drawn(seed, bias=bias)
    stream = ChainStream(chain, inputs, batch_size=33)
    rng = np.random.default_rng(seed)
    for spec in stream.layers:
        weight = stream.weight(spec.name)
        stream.commit(spec.name, weight * (rng.random(weight.shape) < 0.6))
    bound = output_bound(stream)
    change = forward(stream.chain, inputs)[-1] - forward(chain, inputs)[-1]
    assert bound.measured == pytest.approx(np.linalg.norm(change))
    assert bound.bound >= bound.measured
    frobenius = output_bound(stream, norm="frobenius")
    assert frobenius.bound >= bound.bound


def test_output_bound_is_exact_where_nothing_can_be_lost():
    """One changed layer, the last: the bound is the measured deviation."""
    chain, inputs = drawn(0)
    stream = ChainStream(chain, inputs)
    stream.commit("2", 0.5 * stream.weight("2"))
    bound = output_bound(stream)
    assert bound.ratio == pytest.approx(1, rel=1e-6)
    assert bound.discrepancies == {"2": pytest.approx(discrepancy(stream, "2"))}


def test_a_bound_without_a_layer_would_be_broken():
    """The bound must be able to fail: leaving out the largest term breaks it on some network."""
    broken = 0
    for seed in range(10):
        chain, inputs = drawn(seed)
        stream = ChainStream(chain, inputs)
        stream.commit("2", 0.2 * stream.weight("2"))
        stream.commit("0", 0.99 * stream.weight("0"))
        bound = output_bound(stream)
        short = bound.bound - bound.discrepancies["2"] * bound.gains["2"]
        broken += short < bound.measured
    assert broken > 0


def test_unchanged_network_has_bound_zero():
    chain, inputs = drawn(0)
    bound = output_bound(ChainStream(chain, inputs))
    assert (bound.bound, bound.measured, bound.ratio) == (0, 0, 1)


@pytest.mark.parametrize("follows", [(), ("relu",) * 3])
@pytest.mark.parametrize("seed", range(3))
def test_direct_cascade_bound_is_tighter_and_holds(seed, follows):
    chain, inputs = drawn(seed, follows=follows, bias=True)
    stream, reports = trimmed(chain, inputs, relative_epsilon=0.1, inflation=1.3)
    bound = output_bound(stream, direct=cascade_bound(stream, reports))
    assert bound.measured <= bound.direct <= bound.bound
    assert bound.best == bound.direct


@pytest.mark.parametrize("seed", range(8))
def test_bounds_hold_in_float32_too(seed):
    """The direct bound is all but equal to what is measured, so float32's rounding shows."""
    chain, inputs = drawn(seed, bias=True)
    chain = Chain(tuple(weight.astype(np.float32) for weight in chain.weights), chain.biases)
    stream = ChainStream(chain, inputs.astype(np.float32))
    options = NetTrimOptions(relative_epsilon=0.1, tolerance=1e-3, violation_tolerance=1e-6)
    reports = [result.report for result in net_trim(stream, options)]
    bound = output_bound(stream, direct=cascade_bound(stream, reports))
    assert bound.direct is not None
    assert bound.measured <= bound.direct
    assert 0 < bound.rounding < 1e-4 * bound.measured


def test_direct_bound_needs_a_certified_constrained_cascade_of_the_last_layer():
    chain, inputs = drawn(0)
    stream, reports = trimmed(chain, inputs, scheme="parallel", relative_epsilon=0.1)
    assert cascade_bound(stream, reports) == NO_DIRECT
    for form in ("regularised", "another"):
        stream, reports = trimmed(chain, inputs, relative_epsilon=0.1)
        reports[-1] = replace(reports[-1], details=replace(reports[-1].details, form=form))
        assert cascade_bound(stream, reports) == NO_DIRECT
    stream, reports = trimmed(chain, inputs, relative_epsilon=0.1)
    assert cascade_bound(stream, reports).value is not None
    found = cascade_bound(stream, reports[:-1])
    assert found.value is None and "2, whose response is the output" in found.reason


@pytest.mark.parametrize("follows", [(), ("relu",) * 3])
def test_a_cascade_on_sampled_rows_has_no_direct_bound(follows):
    """Its last program holds on the rows it was given, the outputs are measured on all."""
    chain, inputs = drawn(0, follows=follows, bias=True)
    options = {"relative_epsilon": 0.1, "tolerance": 1e-3, "violation_tolerance": 1e-5}
    options["solver"] = "admm"
    whole = retrain.net_trim(chain, inputs, **options)
    assert whole.bounds["calibration"].direct is not None
    last = ChainStream(chain, inputs).layers[-1]
    memory = 60.5 * 1e9 / rows_within(last, 1e9, 8, "admm")
    part = retrain.net_trim(chain, inputs, memory=memory, **options)
    last = part.layers[-1]
    assert last.certified
    assert last.rows < last.total_rows == len(inputs)
    assert part.bounds["calibration"].direct is None
    assert part.bound is not None


class Squared(nn.Module):
    """A network whose output is its first layer's times itself: without a finite factor."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 5), nn.Linear(5, 5)

    def forward(self, x):
        x = self.a(x)
        return self.b(x) * x


def test_without_a_factor_the_bound_has_the_layers_reason():
    torch.manual_seed(0)
    x = rows(30, 4)
    run = retrain.net_trim(Squared(), x, relative_epsilon=0.1, layers=["a"])
    bound = run.bounds["calibration"]
    assert bound.bound is None
    assert bound.reason.startswith("a: ")


def test_a_bound_that_overflows_has_its_reason_and_so_has_the_direct_one():
    chain, inputs = drawn(0)
    stream = ChainStream(chain, inputs)
    stream.commit("2", 0.5 * stream.weight("2"))
    passage = stream.passage()
    exact = output_bound(stream, passage=passage, direct=Direct(1e3, None))
    assert (exact.reason, exact.direct_reason) == (None, None)
    assert exact.direct >= 1e3
    assert exact.relative == pytest.approx(passage.measured / passage.size)
    assert 0 < exact.relative < 1
    lost = output_bound(
        stream, passage=replace(passage, measured=math.inf), direct=Direct(1e3, None)
    )
    assert (lost.bound, lost.direct) == (None, None)
    assert "overflow" in lost.reason
    assert "overflow" in lost.direct_reason
    named = output_bound(stream, passage=passage, direct=Direct(None, "of its own"))
    assert (named.direct, named.direct_reason) == (None, "of its own")
    unmoved = output_bound(stream, passage=replace(passage, size=0.0), direct=Direct(1e3, None))
    assert unmoved.relative == 0


@pytest.mark.parametrize(
    ("ending", "direct"),
    [
        (nn.Identity(), True),
        (nn.ReLU(), True),
        (nn.Tanh(), True),
        (nn.Sigmoid(), True),
        (nn.Softmax(1), True),
        (nn.Flatten(), True),
        (nn.Dropout(0.5), True),
        (nn.GELU(), False),  # its slope reaches 1.13
        (nn.SiLU(), False),
        (nn.ELU(3.0), False),
        (nn.LeakyReLU(-2.0), False),
        (nn.BatchNorm1d(5), False),
    ],
    ids=lambda value: type(value).__name__,
)
def test_the_direct_bound_holds_through_slopes_of_at_most_one(ending, direct):
    model = nn.Sequential(*dense(6, 8, 5), ending).eval()
    x = rows(60, 6)
    run = retrain.net_trim(model, x, relative_epsilon=0.1, tolerance=1e-3)
    bound = run.bounds["calibration"]
    assert run.certified
    assert (bound.direct is not None) == direct
    if direct:
        assert bound.measured <= bound.direct
        assert bound.direct_reason is None
    else:
        assert type(ending).__name__ in bound.direct_reason


def test_a_cascade_on_as_many_sampled_rows_as_samples_has_no_direct_bound():
    """Tokens are more rows than samples: as many as samples are still not all."""
    model = dense(6, 8, 5)
    tokens = rows(30, 4, 6)
    stream = TorchStream(model, tokens)
    last = stream.layers[-1]
    memory = 30.5 * 1e9 / rows_within(last, 1e9, 4, "admm")
    run = retrain.net_trim(model, tokens, memory=memory, layers=[last.name], solver="admm")
    (report,) = run.layers
    assert report.certified
    assert (report.rows, report.total_rows) == (30, 120)
    assert run.bounds["calibration"].direct is None


@pytest.mark.parametrize("seed", range(3))
def test_l_obs_bound_is_theorem_3_2(seed):
    chain, inputs = drawn(seed)
    stream = ChainStream(chain, inputs)
    rng = np.random.default_rng(seed)
    for spec in stream.layers:
        weight = stream.weight(spec.name)
        stream.commit(spec.name, weight * (rng.random(weight.shape) < 0.7))
    root = np.sqrt(len(inputs))
    errors = []
    for index in range(3):
        received = inputs if index == 0 else forward(chain, inputs)[index - 1]
        change = received @ (stream.chain.weights[index] - chain.weights[index])
        errors.append(np.linalg.norm(change) / root)
    frobenius = [np.linalg.norm(weight) for weight in stream.chain.weights]
    spectral = [np.linalg.norm(weight, 2) for weight in stream.chain.weights]
    by_hand = errors[0] * frobenius[1] * frobenius[2] + errors[1] * frobenius[2] + errors[2]
    assert l_obs_bound(errors, frobenius) == pytest.approx(by_hand)
    measured = output_bound(stream).measured / root
    assert measured <= l_obs_bound(errors, spectral) <= l_obs_bound(errors, frobenius)
    with pytest.raises(ValueError, match="norms: got 2, want 3, one a layer"):
        l_obs_bound(errors, frobenius[1:])


def test_a_bias_is_not_counted_in_the_premise_of_theorem_1():
    heavy = Chain((np.array([[0.8], [0.4], [0.3], [7.0]]),), biases=(True,))
    assert check_link_normalised(heavy) == ["layer 0: |W|_1 = 1.5"]


def test_the_relative_deviation_of_small_outputs():
    stream = ChainStream(Chain((np.full((2, 1), 1e-3),)), np.ones((3, 2)))
    stream.commit("0", np.full((2, 1), 0.5e-3))
    assert output_bound(stream).relative == pytest.approx(0.5)
