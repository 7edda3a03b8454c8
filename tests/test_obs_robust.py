"""Every method on what breaks pruning code: exact count and finite weights, or a clear error."""

import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from obs_cases import correlated

from solvers.obs import (
    METHODS,
    layer_error,
    layer_problem,
    n_of_m,
    per_layer,
    per_unit,
    prune,
    whole_inputs,
)


def normal(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape)


def dead_and_constant():
    inputs = normal(0, 30, 9)
    inputs[:, [0, 4]] = 0.0
    inputs[:, [2, 3, 8]] = -0.4242
    return inputs


CASES = {
    "plain": (normal(1, 40, 8), normal(2, 8, 3)),
    "fewer samples than inputs": (normal(3, 3, 8), normal(4, 8, 3)),
    "one sample": (normal(5, 1, 8), normal(6, 8, 3)),
    "dead and constant inputs": (dead_and_constant(), normal(7, 9, 4)),
    "equal inputs": (np.repeat(normal(8, 20, 1), 8, axis=1), normal(9, 8, 3)),
    "all inputs dead": (np.zeros((5, 8)), normal(10, 8, 2)),
    "zero weights": (normal(11, 20, 8), np.zeros((8, 2))),
    "equal weights": (normal(12, 20, 8), np.ones((8, 2))),
    "one unit": (normal(13, 20, 8), normal(14, 8, 1)),
    "one input": (normal(15, 20, 1), normal(16, 1, 5)),
    "one weight": (normal(17, 20, 1), normal(18, 1, 1)),
    "inputs of 1e-12": (1e-12 * normal(19, 30, 8), normal(20, 8, 3)),
    "inputs of 1e12": (1e12 * normal(21, 30, 8), normal(22, 8, 3)),
    "weights of 1e-12": (normal(23, 30, 8), 1e-12 * normal(24, 8, 3)),
    "weights of 1e12": (normal(25, 30, 8), 1e12 * normal(26, 8, 3)),
    "inputs from 1e-6 to 1e6": (
        normal(27, 60, 8) * 10.0 ** np.linspace(-6, 6, 8),
        normal(28, 8, 3),
    ),
    "float32": (normal(29, 30, 8), normal(30, 8, 3).astype(np.float32)),
}
PATTERNS = [per_layer(s) for s in (0.0, 0.3, 0.5, 1.0)] + [
    per_unit(0.5), n_of_m(2, 4), n_of_m(0, 2), whole_inputs(0.0), whole_inputs(0.5),
    whole_inputs(1.0),
]  # fmt: skip


def count(pattern, shape):
    if pattern.kind == "layer":
        return pattern.removed(shape[0] * shape[1])
    if pattern.kind == "n:m":
        lengths = [min(pattern.group, shape[0] - a) for a in range(0, shape[0], pattern.group)]
        return shape[1] * sum(n - min(n, pattern.keep) for n in lengths)
    return shape[1] * pattern.removed(shape[0])


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("method", METHODS)
def test_exact_count_and_finite_weights(case, method):
    inputs, weight = CASES[case]
    problem = layer_problem(weight, inputs.T @ inputs / len(inputs))
    for pattern in PATTERNS:
        if pattern.kind not in METHODS[method].patterns:
            continue
        with warnings.catch_warnings(), np.errstate(all="warn", under="ignore"):
            warnings.simplefilter("error")
            result = prune(problem, pattern, method)
        assert result.removed == count(pattern, weight.shape) == (~result.kept).sum()
        assert np.all(np.isfinite(result.weight)) and result.weight.dtype == weight.dtype
        assert not np.any(result.weight[~result.kept])
        # measured on what is returned, with the inputs themselves
        change = inputs @ (result.weight.astype(float) - weight)
        scale = np.sum((inputs @ weight) ** 2) / len(inputs)
        assert result.error == pytest.approx(
            np.sum(change**2) / len(inputs), abs=1e-9 * scale + 1e-300
        )
        if result.removed == 0:
            np.testing.assert_array_equal(result.weight, weight)
        if result.removed == weight.size:
            assert not result.weight.any()
        # no method is worse than removing everything, save those that never refit
        if method not in ("one-shot", "sweep"):
            assert result.relative_error <= 1 + 1e-6


@pytest.mark.parametrize("method", METHODS)
def test_weights_that_carry_nothing_cost_nothing(method):
    """Half of the inputs dead: half of the weights go, and the output does not move."""
    inputs = normal(0, 40, 8)
    inputs[:, ::2] = 0.0
    problem = layer_problem(normal(1, 8, 3), inputs.T @ inputs / 40)
    pattern = whole_inputs(0.5) if method == "inputs" else per_layer(0.5)
    result = prune(problem, pattern, method)
    assert result.relative_error < 1e-12
    assert not np.any(result.kept[::2])
    np.testing.assert_allclose(result.weight[1::2], problem.weight[1::2])


@pytest.mark.parametrize("method", ["greedy", "swaps", "large", "best"])
def test_constant_inputs_merge(method):
    """Four equal inputs do the work of one: three go without any loss."""
    inputs = normal(2, 50, 7)
    inputs[:, 3:] = -0.4242
    problem = layer_problem(normal(3, 7, 2), inputs.T @ inputs / 50)
    result = prune(problem, per_unit(3 / 7), method)
    assert result.relative_error < 1e-6
    np.testing.assert_array_equal(result.kept[3:].sum(axis=0), [1, 1])


@given(
    st.sampled_from([m for m in METHODS if m != "inputs"]),
    st.integers(-30, 30),
    st.integers(-30, 30),
    st.integers(0, 10**6),
)
@settings(max_examples=40, deadline=None)
def test_scaling_inputs_and_weights_scales_the_result(method, a, b, seed):
    inputs, weight = correlated(seed)
    hessian = inputs.T @ inputs / len(inputs)
    plain = prune(layer_problem(weight, hessian), per_layer(0.6), method)
    scaled = prune(layer_problem(weight * 2.0**b, hessian * 4.0**a), per_layer(0.6), method)
    np.testing.assert_array_equal(scaled.kept, plain.kept)
    np.testing.assert_allclose(scaled.weight, plain.weight * 2.0**b, rtol=1e-6, atol=0)
    assert scaled.relative_error == pytest.approx(plain.relative_error, rel=1e-9)


@pytest.mark.parametrize("method", [m for m in METHODS if m != "inputs"])
def test_units_come_in_any_order(method):
    inputs, weight = correlated(3, n_out=5)
    hessian = inputs.T @ inputs / len(inputs)
    order = [3, 1, 4, 0, 2]
    pattern = per_unit(0.5)
    plain = prune(layer_problem(weight, hessian), pattern, method)
    permuted = prune(layer_problem(weight[:, order], hessian), pattern, method)
    if method == "best":  # its random restarts belong to a unit's place
        assert permuted.error == pytest.approx(plain.error, rel=0.05)
    else:
        np.testing.assert_array_equal(permuted.kept, plain.kept[:, order])


@pytest.mark.parametrize("method", METHODS)
def test_torch_arrays_come_back_as_torch_arrays(method):
    inputs, weight = correlated(4)
    hessian = inputs.T @ inputs / len(inputs)
    pattern = whole_inputs(0.5) if method == "inputs" else per_layer(0.5)
    ours = prune(layer_problem(weight, hessian), pattern, method)
    given_ = torch.from_numpy(weight), torch.from_numpy(hessian)
    theirs = prune(layer_problem(*given_), pattern, method)
    assert isinstance(theirs.weight, torch.Tensor) and theirs.weight.dtype == torch.float64
    np.testing.assert_array_equal(theirs.kept.numpy(), ours.kept)
    np.testing.assert_allclose(theirs.weight.numpy(), ours.weight, rtol=1e-6, atol=1e-9)
    np.testing.assert_array_equal(given_[0].numpy(), weight)  # left as it was


@pytest.mark.parametrize("method", [m for m in METHODS if m != "inputs"])
def test_zeros_that_stay(method):
    inputs, weight = correlated(5, n_in=12, n_out=4)
    weight[np.random.default_rng(0).random(weight.shape) < 0.4] = 0.0
    problem = layer_problem(weight, inputs.T @ inputs / len(inputs), allowed=weight != 0)
    for pattern in (per_layer(0.6), per_unit(0.0), n_of_m(2, 4)):
        result = prune(problem, pattern, method)
        assert not np.any(result.weight[weight == 0])


def test_unknown_methods_and_patterns_are_refused_by_name():
    problem = layer_problem(np.ones((4, 2)), np.eye(4))
    with pytest.raises(ValueError, match=r"method: got 'magic', want one of one-shot, .*"):
        prune(problem, per_layer(0.5), "magic")
    for name, method in METHODS.items():
        for pattern in (per_layer(0.5), per_unit(0.5), n_of_m(2, 4), whole_inputs(0.5)):
            if pattern.kind not in method.patterns:
                with pytest.raises(ValueError, match=f"{name} does not support '{pattern.kind}'"):
                    prune(problem, pattern, name)


@pytest.mark.parametrize(
    ("weight", "hessian", "options", "message"),
    [
        (np.ones(3), np.eye(3), {}, r"weight: got \(3,\), want shape \(n_in, n_out\), no 0"),
        (np.ones((3, 0)), np.eye(3), {}, r"weight: got \(3, 0\), want shape \(n_in, n_out\), no 0"),
        (np.ones((3, 2)), np.eye(4), {}, r"hessian: got \(4, 4\), want shape \(3, 3\)"),
        (np.full((3, 2), np.nan), np.eye(3), {}, "weight: has entries that are not finite"),
        (np.full((3, 2), np.inf), np.eye(3), {}, "weight: has entries that are not finite"),
        (np.ones((3, 2)), np.full((3, 3), np.nan), {}, "hessian: has entries that are not finite"),
        (np.ones((3, 2)), np.triu(np.ones((3, 3))), {}, "hessian: is not symmetric"),
        (np.ones((3, 2)), -np.eye(3), {}, "hessian: has a negative diagonal"),
        (np.ones((2, 2)), np.array([[0.0, 1], [1, 1]]), {}, "hessian: a zero on the diagonal"),
        (np.ones((3, 2)), np.eye(3), {"free_rows": [3]}, "free_rows: row 3 of a weight with 3"),
        (np.ones((3, 2)), np.eye(3), {"free_rows": [9]}, "free_rows: row 9 of a weight with 3"),
        (np.ones((3, 2)), np.eye(3), {"free_rows": [-4]}, "free_rows: row -4 of a weight with 3"),
        (np.ones((3, 2)), np.eye(3), {"allowed": np.ones((3, 2))}, "allowed: got float64"),
        (
            np.ones((3, 2)), np.eye(3),
            {"allowed": np.zeros((3, 2), dtype=bool), "free_rows": [0]},
            "allowed: forbids a weight of a free row",
        ),
    ],
)  # fmt: skip
def test_malformed_problems(weight, hessian, options, message):
    with pytest.raises(ValueError, match=message):
        layer_problem(weight, hessian, **options)


def test_layer_error_has_no_half():
    inputs, weight = correlated(6)
    other = weight + normal(7, 8, 3)
    direct = np.sum((inputs @ (other - weight)) ** 2) / len(inputs)
    assert layer_error(inputs.T @ inputs / len(inputs), weight, other) == pytest.approx(direct)
