import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from solvers.obs import (
    add_rows,
    dead_inputs,
    decoupled,
    hessian_of,
    inverse_cholesky,
    inverse_recursion,
    mean_diagonal,
    mean_hessian,
)


def test_core_imports_neither_torch_nor_retrain():
    code = "import sys, solvers.obs; print([m for m in ('torch', 'retrain') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@given(st.lists(st.integers(0, 9), min_size=1, max_size=6), st.integers(0, 99))
@settings(max_examples=30, deadline=None)
def test_streamed_equals_whole(sizes, seed):
    inputs = np.random.default_rng(seed).standard_normal((sum(sizes) + 1, 5))
    cuts = np.cumsum(sizes)
    streamed = hessian_of(np.split(inputs, cuts))
    np.testing.assert_allclose(streamed, inputs.T @ inputs / len(inputs), rtol=1e-12, atol=1e-14)


def test_accumulates_in_float64_and_functionally():
    # 1 + 1e-5 squared loses its tail in float32
    batch = np.full((3, 2), 1.00001, dtype=np.float32)
    first = add_rows(None, batch)
    before = first.total.copy()
    second = add_rows(first, batch)
    assert second.total.dtype == np.float64 and second.count == 6
    np.testing.assert_array_equal(first.total, before)
    np.testing.assert_allclose(mean_hessian(second), np.float64(batch[0, 0]) ** 2, rtol=1e-15)


def test_torch_batches_give_the_same_hessian():
    inputs = np.random.default_rng(0).standard_normal((20, 4)).astype(np.float32)
    ours = hessian_of([torch.from_numpy(inputs[:9]), torch.from_numpy(inputs[9:])])
    assert isinstance(ours, torch.Tensor) and ours.dtype == torch.float64
    np.testing.assert_allclose(ours.numpy(), hessian_of([inputs]), rtol=1e-13)


@pytest.mark.parametrize(
    ("batches", "message"),
    [
        ([], "no rows"),
        ([np.zeros((0, 3))], "no rows"),
        ([np.zeros(3)], r"got \(3,\), want shape \(rows, n_in\)"),
        ([np.zeros((2, 3)), np.zeros((2, 4))], "got 4, want 3 columns as before"),
        ([np.array([[1.0, np.nan]])], "not finite"),
        ([np.array([[1.0, np.inf]])], "not finite"),
    ],
)
@pytest.mark.filterwarnings("ignore:invalid value encountered in matmul")
def test_malformed_batches(batches, message):
    with pytest.raises(ValueError, match=message):
        hessian_of(batches)


def test_overflowing_squares_are_refused():
    with np.errstate(over="ignore"), pytest.raises(ValueError, match="overflow"):
        hessian_of([np.full((2, 2), 1e200)])


def test_dead_inputs_are_cut_out_before_the_damping():
    inputs = np.random.default_rng(1).standard_normal((30, 4))
    inputs[:, 2] = 0.0
    hessian = hessian_of([inputs])
    np.testing.assert_array_equal(dead_inputs(hessian), [False, False, True, False])
    live = [0, 1, 3]
    mean = np.diagonal(hessian)[live].mean()
    assert mean_diagonal(hessian) == pytest.approx(mean)
    working = decoupled(hessian, 0.01)
    np.testing.assert_allclose(
        working[np.ix_(live, live)], hessian[np.ix_(live, live)] + 0.01 * mean * np.eye(3)
    )
    np.testing.assert_allclose(working[2], [0, 0, mean, 0])
    # the live block of the inverse is the inverse of the live block
    np.testing.assert_allclose(
        inverse_cholesky(working)[np.ix_(live, live)],
        np.linalg.inv(working[np.ix_(live, live)]),
        rtol=1e-9,
    )


def test_all_inputs_dead():
    np.testing.assert_array_equal(decoupled(np.zeros((3, 3)), 0.1), np.eye(3))


@pytest.mark.parametrize("damping", [-1e-3, np.nan, np.inf])
def test_bad_damping(damping):
    with pytest.raises(
        ValueError, match=r"damping: got .*, want a fraction >= 0 of the mean diagonal"
    ):
        decoupled(np.eye(2), damping)


@pytest.mark.parametrize("samples", [5, 200])
@pytest.mark.parametrize("damping", [1e-4, 1e-1])
def test_recursion_agrees_with_cholesky(samples, damping):
    inputs = np.random.default_rng(samples).standard_normal((samples, 12))
    inputs[:, 3] = inputs[:, 4]
    hessian = hessian_of([inputs])
    by_cholesky = inverse_cholesky(decoupled(hessian, damping))
    alpha = damping * mean_diagonal(hessian)
    by_recursion = inverse_recursion([inputs[:3], inputs[3:]], samples, alpha)
    np.testing.assert_allclose(by_recursion, by_cholesky, rtol=1e-7, atol=1e-9 / damping)
    np.testing.assert_allclose(by_recursion @ (hessian + alpha * np.eye(12)), np.eye(12), atol=1e-8)


@pytest.mark.parametrize(
    ("count", "alpha", "message"),
    [
        (4, 0.0, r"alpha: got 0\.0, want a positive finite number"),
        (4, np.nan, "alpha: got nan, want a positive finite number"),
        (5, 1.0, "5 rows announced, 4 came"),
    ],
)
def test_recursion_refuses(count, alpha, message):
    with pytest.raises(ValueError, match=message):
        inverse_recursion([np.ones((4, 2))], count, alpha)
    with pytest.raises(ValueError, match="not finite"):
        inverse_recursion([np.full((4, 2), np.nan)], 4, 1.0)


@pytest.mark.parametrize(
    "hessian",
    [
        np.ones((3, 3)),  # rank one: LAPACK may or may not notice
        np.diag([1.0, -1.0, 1.0]),
        np.outer([1e-6, 1.0, 1e6], [1e-6, 1.0, 1e6]),
        np.zeros((2, 2)),
    ],
)
def test_a_singular_hessian_is_never_replaced(hessian):
    with pytest.raises(ValueError, match=r"hessian: (not positive definite|singular).*damping"):
        inverse_cholesky(hessian)


def test_bad_scaling_is_not_singularity():
    scale = np.array([1e-9, 1.0, 1e9])
    matrix = np.array([[2.0, 1, 0], [1, 2, 1], [0, 1, 2]])
    inverse = inverse_cholesky(matrix * np.outer(scale, scale))
    np.testing.assert_allclose(inverse * np.outer(scale, scale), np.linalg.inv(matrix), rtol=1e-12)


def test_rank_deficiency_is_told_whether_or_not_lapack_got_through():
    through = 0
    for seed in range(40):
        inputs = np.random.default_rng(seed).standard_normal((4, 6))
        hessian = inputs.T @ inputs / 4
        try:
            np.linalg.cholesky(hessian)
            through += 1
        except np.linalg.LinAlgError:
            pass
        with pytest.raises(ValueError, match="raise the damping"):
            inverse_cholesky(hessian)
    assert through  # rounding did leave a positive pivot now and then
