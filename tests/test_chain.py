"""The paper's network as arrays: forward pass, link normalisation, the stream over it."""

import warnings
from itertools import pairwise

import numpy as np
import pytest
import torch
from sklearn.neural_network import MLPClassifier, MLPRegressor

import retrain
from retrain.stream.chain import (
    Chain,
    ChainStream,
    forward,
    link_denormalise,
    link_normalise,
    response,
)
from retrain.stream.estimator import chain_of
from retrain.stream.stream import changed, collect, layer, sample_rows


def make_chain(seed=0, widths=(6, 8, 7, 3), bias=True, dtype=np.float64, follows=()):
    rng = np.random.default_rng(seed)
    weights = tuple(rng.standard_normal((a + bias, b)).astype(dtype) for a, b in pairwise(widths))
    return Chain(weights, (bias,) * len(weights), follows)


def make_inputs(seed=1, samples=50, width=6, dtype=np.float64):
    return np.random.default_rng(seed).standard_normal((samples, width)).astype(dtype)


def test_forward_is_equation_1():
    chain, x = make_chain(follows=("relu", "relu", "relu")), make_inputs()
    y = x
    for weight, outcome in zip(chain.weights, forward(chain, x), strict=True):
        y = np.maximum(y @ weight[:-1] + weight[-1], 0)
        np.testing.assert_array_equal(outcome, y)


def test_the_last_layer_has_no_activation_by_default():
    chain = make_chain()
    assert chain.follows == ("relu", "relu", "linear")
    assert (forward(chain, make_inputs())[-1] < 0).any()


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("follows", [(), ("relu",) * 3])
def test_link_normalisation_scales_every_outcome(bias, follows):
    chain, x = make_chain(bias=bias, follows=follows), make_inputs()
    normalised, scales = link_normalise(chain)
    products = np.cumprod(scales)
    for index, (before, after) in enumerate(
        zip(forward(chain, x), forward(normalised, x), strict=True)
    ):
        rows = normalised.weights[index][: chain.shape(index)[0]]
        assert np.abs(rows).sum() == pytest.approx(1)
        np.testing.assert_allclose(after * products[index], before, rtol=1e-12, atol=1e-12)
    back = link_denormalise(normalised, scales)
    for old, new in zip(chain.weights, back.weights, strict=True):
        np.testing.assert_allclose(new, old, rtol=1e-12)


def test_dividing_a_bias_by_its_own_layer_alone_is_wrong():
    """The slip in the paper's section 2, made on purpose: the outcomes are no longer scaled."""
    chain, x = make_chain(), make_inputs()
    scales = [np.abs(weight[:-1]).sum() for weight in chain.weights]
    slipped = Chain(tuple(w / s for w, s in zip(chain.weights, scales, strict=True)), chain.biases)
    wrong = forward(slipped, x)[-1] * np.prod(scales)
    assert not np.allclose(wrong, forward(chain, x)[-1], rtol=1e-3)


def test_stream_rows_are_what_the_layers_receive():
    chain, x = make_chain(), make_inputs()
    stream = ChainStream(chain, x, batch_size=7)
    batch = collect(stream, "1")
    hidden = forward(chain, x)[0]
    np.testing.assert_allclose(batch.inputs[:, :-1], hidden, rtol=1e-13)
    np.testing.assert_array_equal(batch.inputs[:, -1], 1)
    np.testing.assert_allclose(batch.responses, response(chain, 1, hidden), rtol=1e-13)
    np.testing.assert_allclose(batch.responses, batch.dense_inputs @ stream.weight("1"), rtol=1e-12)
    np.testing.assert_array_equal(batch.rows, np.arange(50))


def test_commit_changes_later_inputs_and_nothing_else():
    chain, x = make_chain(), make_inputs()
    stream = ChainStream(chain, x)
    before = collect(stream, "1")
    stream.commit("0", np.zeros_like(chain.weights[0]))
    after = collect(stream, "1")
    assert (after.inputs[:, :-1] == 0).all()
    np.testing.assert_array_equal(after.dense_inputs, before.dense_inputs)
    np.testing.assert_array_equal(after.responses, before.responses)
    assert stream.weight("0", dense=True) is chain.weights[0]
    assert changed(stream, layer(stream, "0"))
    assert not changed(stream, layer(stream, "1"))


def test_sampled_rows_are_slices_of_all_rows():
    stream = ChainStream(make_chain(), make_inputs(), batch_size=8)
    rows = sample_rows(50, 13, seed=3)
    whole, part = collect(stream, "2"), collect(stream, "2", rows=rows)
    np.testing.assert_array_equal(part.rows, rows)
    np.testing.assert_allclose(part.inputs, whole.inputs[rows], rtol=1e-12)
    assert sample_rows(50, 50, seed=3) is None


@pytest.mark.parametrize(("count", "limit"), [(50, 49), (50, 13), (2, 1), (10_000, 5_000)])
def test_sampled_rows_are_different_ones_in_order(count, limit):
    """A row drawn twice would stand for one that the certificate then says it covers."""
    for seed in range(5):
        rows = sample_rows(count, limit, seed)
        assert rows.shape == (limit,)
        assert (np.diff(rows) > 0).all()
        assert rows[0] >= 0 and rows[-1] < count
        np.testing.assert_array_equal(rows, sample_rows(count, limit, seed))


def test_torch_chain_equals_numpy_chain():
    chain, x = make_chain(), make_inputs()
    twin = Chain(tuple(torch.from_numpy(w) for w in chain.weights), chain.biases)
    ours = np.concatenate(list(ChainStream(chain, x).outputs(dense=True)))
    theirs = torch.cat(list(ChainStream(twin, torch.from_numpy(x)).outputs(dense=True)))
    np.testing.assert_allclose(theirs.numpy(), ours, rtol=1e-12)


def test_fingerprint_follows_weights_and_data():
    chain, x = make_chain(), make_inputs()
    first = ChainStream(chain, x).fingerprint
    assert ChainStream(chain, x).fingerprint == first
    assert ChainStream(make_chain(seed=5), x).fingerprint != first
    assert ChainStream(chain, x + 1).fingerprint != first


@pytest.mark.parametrize(
    ("weights", "words"),
    [
        ((), "at least one layer"),
        ((np.ones((2, 3)), np.ones((4, 1))), "takes 4 inputs, but layer 0 gives 3"),
        ((np.full((2, 2), np.nan),), "NaN or infinite"),
        ((np.ones((2, 2), int),), "float32 or 64"),
        ((np.ones(3),), "want a matrix"),
    ],
)
def test_malformed_chains(weights, words):
    with pytest.raises(ValueError, match=words):
        Chain(weights)


def test_malformed_data_and_names():
    chain = make_chain()
    with pytest.raises(ValueError, match=r"data: got shape \(3, 5\), want \(n_samples, 6\)"):
        ChainStream(chain, np.ones((3, 5)))
    with pytest.raises(ValueError, match="data: has NaN"):
        ChainStream(chain, np.full((3, 6), np.inf))
    with pytest.raises(ValueError, match="no layer is called '9'"):
        ChainStream(chain, make_inputs()).weight("9")
    with pytest.raises(ValueError, match=r"weight: got \(2, 2\), want \(7, 8\)"):
        ChainStream(chain, make_inputs()).commit("0", np.ones((2, 2)))
    with pytest.raises(ValueError, match="all zero"):
        link_normalise(Chain((np.zeros((2, 2)),)))


@pytest.mark.parametrize("kind", [MLPClassifier, MLPRegressor])
def test_a_perceptron_of_scikit_learn_is_a_chain(kind):
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(80, 6)), rng.integers(0, 3, 80)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # five iterations do not converge
        estimator = kind(hidden_layer_sizes=(8, 5), max_iter=5, random_state=0).fit(x, y)
    run = retrain.net_trim(estimator, (x, y), relative_epsilon=0.1)
    outputs = forward(chain_of(estimator), x)[-1]
    if kind is MLPRegressor:
        np.testing.assert_allclose(outputs[:, 0], estimator.predict(x), rtol=1e-6, atol=1e-9)
    else:
        np.testing.assert_array_equal(outputs.argmax(1), estimator.predict(x))
        share = run.record["accuracy"]["calibration"]["before"]
        assert share == pytest.approx(estimator.score(x, y))
    assert len(run.layers) == 3 and run.measured <= run.bound
    assert all(weight.shape == (n + 1, m) for weight, (n, m) in zip(
        run.model.weights, ((6, 8), (8, 5), (5, outputs.shape[1])), strict=True
    ))  # fmt: skip


def test_what_is_no_chain_of_an_estimator():
    assert chain_of(object()) is None
    with pytest.raises(ValueError, match="is not fitted"):
        chain_of(MLPClassifier())
    fitted = MLPRegressor(activation="tanh", max_iter=1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fitted.fit(np.eye(4), np.arange(4))
    with pytest.raises(ValueError, match="got the activation 'tanh', want relu or identity"):
        chain_of(fitted)
