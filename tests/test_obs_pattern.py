import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from solvers.obs import (
    kept_by,
    layer_count,
    n_of_m,
    parse_pattern,
    per_layer,
    per_layer_count,
    per_unit,
    whole_inputs,
)


def everything(shape):
    return np.ones(shape, dtype=bool), np.ones(shape[0], dtype=bool)


@pytest.mark.parametrize(
    ("sparsity", "size", "removed"),
    [
        (0.0, 10, 0),
        (1.0, 10, 10),
        (0.5, 5, 3),  # half up
        (0.145, 100, 15),  # 14.499999999999998 in floating point
        (0.93, 235200, 218736),
        (0.01, 10, 0),
    ],
)
def test_counts(sparsity, size, removed):
    assert per_layer(sparsity).removed(size) == removed


@pytest.mark.parametrize("sparsity", [0.0, 0.01, 0.3, 0.5, 0.99, 1.0])
@pytest.mark.parametrize(
    "score", [np.zeros((7, 5)), np.ones((7, 5)), np.arange(35.0).reshape(7, 5)]
)
def test_exact_count_even_where_all_scores_are_equal(score, sparsity):
    pattern = per_layer(sparsity)
    kept = kept_by(score, pattern, *everything(score.shape))
    assert (~kept).sum() == pattern.removed(35)
    assert np.all(
        (~kept_by(score, per_unit(sparsity), *everything(score.shape))).sum(0)
        == per_unit(sparsity).removed(7)
    )


def test_ties_keep_the_earlier():
    kept = kept_by(np.ones((2, 3)), per_layer_count(2), *everything((2, 3)))
    np.testing.assert_array_equal(kept, [[True, True, True], [True, False, False]])


def test_keeps_the_largest():
    score = np.array([[3.0, 0.5], [2.0, 5.0], [4.0, 0.0]])
    kept = kept_by(score, per_layer(0.5), *everything((3, 2)))
    np.testing.assert_array_equal(kept, [[True, False], [False, True], [True, False]])
    kept = kept_by(score, whole_inputs(1 / 3), *everything((3, 2)))
    np.testing.assert_array_equal(kept, [[False, False], [True, True], [True, True]])


@pytest.mark.parametrize(("keep", "group"), [(2, 4), (4, 8), (1, 4), (0, 3), (3, 3), (1, 1)])
@pytest.mark.parametrize("rows", [1, 3, 8, 13, 16])
def test_groups_hold_exactly_n(keep, group, rows):
    score = np.random.default_rng(rows).random((rows, 3))
    kept = kept_by(score, n_of_m(keep, group), *everything(score.shape))
    for first in range(0, rows, group):
        part = kept[first : first + group]
        assert np.all(part.sum(axis=0) == min(keep, len(part)))
        best = np.sort(score[first : first + group], axis=0)[::-1][: min(keep, len(part))]
        np.testing.assert_allclose(
            np.where(part, score[first : first + group], 0).sum(0), best.sum(0)
        )


def test_four_of_eight_is_not_two_of_four():
    score = np.array([8.0, 7, 6, 5, 4, 3, 2, 1])[:, None]
    kept = kept_by(score, n_of_m(4, 8), *everything((8, 1)))
    np.testing.assert_array_equal(kept[:, 0], [True] * 4 + [False] * 4)


def test_free_rows_are_kept_and_not_counted():
    prunable = np.array([True, False, True, True, True])
    allowed = np.ones((5, 2), dtype=bool)
    score = np.zeros((5, 2))
    for pattern, gone in [
        (per_layer(1.0), 8),
        (per_layer(0.5), 4),
        (n_of_m(1, 2), 4),
        (whole_inputs(0.5), 4),
        (per_unit(0.25), 2),
    ]:
        kept = kept_by(score, pattern, allowed, prunable)
        assert kept[1].all()
        assert (~kept).sum() == gone == layer_count(pattern, allowed, prunable)


@given(st.integers(0, 10**6), st.sampled_from(["layer", "unit", "inputs"]), st.floats(0, 1))
@settings(max_examples=60, deadline=None)
def test_a_mask_counts_towards_the_sparsity(seed, kind, sparsity):
    rng = np.random.default_rng(seed)
    score, allowed = rng.random((6, 4)), rng.random((6, 4)) < 0.7
    prunable = np.ones(6, dtype=bool)
    pattern = parse_pattern(kind, sparsity)
    kept = kept_by(score, pattern, allowed, prunable)
    assert not np.any(kept & ~allowed)
    if kind == "layer":
        assert (~kept).sum() == max(pattern.removed(24), (~allowed).sum())
    if kind == "unit":
        np.testing.assert_array_equal(
            (~kept).sum(0), np.maximum(pattern.removed(6), (~allowed).sum(0))
        )
    if kind == "inputs":
        gone = ~kept.any(axis=1)
        assert gone.sum() == max(pattern.removed(6), (~allowed.any(axis=1)).sum())


@given(st.integers(0, 10**6))
@settings(max_examples=25, deadline=None)
def test_torch_agrees_with_numpy(seed):
    rng = np.random.default_rng(seed)
    score = rng.integers(0, 4, (10, 3)).astype(np.float64)  # many ties
    allowed, prunable = rng.random((10, 3)) < 0.8, rng.random(10) < 0.8
    allowed[~prunable] = True
    for pattern in (per_layer(0.6), per_unit(0.4), n_of_m(2, 4), whole_inputs(0.5)):
        ours = kept_by(score, pattern, allowed, prunable)
        theirs = kept_by(torch.from_numpy(score), pattern, torch.from_numpy(allowed), prunable)
        np.testing.assert_array_equal(ours, theirs.numpy())


def test_parse():
    assert parse_pattern("layer", 0.3) == per_layer(0.3)
    assert parse_pattern("unit", 0.3) == per_unit(0.3)
    assert parse_pattern("inputs", 0.3) == whole_inputs(0.3)
    assert parse_pattern("4:8") == n_of_m(4, 8)
    assert [str(p) for p in (n_of_m(2, 4), per_layer(0.5), per_layer_count(7))] == [
        "2:4", "layer 0.5", "layer 7 removed"]  # fmt: skip


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: per_layer(1.5), r"sparsity: got 1.5, want a fraction in \[0, 1\]"),
        (lambda: per_unit(-0.1), r"sparsity: got -0\.1, want a fraction in \[0, 1\]"),
        (lambda: whole_inputs(float("nan")), r"sparsity: got nan, want a fraction in \[0, 1\]"),
        (lambda: per_layer_count(-1), "count: got -1, want a whole number of weights >= 0"),
        (lambda: per_layer_count(1.5), r"count: got 1\.5, want a whole number of weights >= 0"),
        (lambda: per_layer_count(7).removed(6), "count: 7 of 6 weights"),
        (lambda: n_of_m(5, 4), "n_of_m: got 5:4, want whole 0 <= N <= M, M >= 1"),
        (lambda: n_of_m(0, 0), "n_of_m"),
        (lambda: n_of_m(2, 4).removed(8), "2:4 has a count for each group"),
        (
            lambda: parse_pattern("rows", 0.5),
            "pattern: got 'rows', want layer, unit, inputs or N:M",
        ),
        (lambda: parse_pattern("2:x"), "pattern: got '2:x', want layer, unit, inputs or N:M"),
        (lambda: parse_pattern("layer"), "sparsity: the pattern 'layer' needs one"),
        (lambda: parse_pattern("2:4", 0.5), "sparsity: 2:4 fixes it; got 0.5 as well"),
    ],
)
def test_refusals(make, message):
    with pytest.raises(ValueError, match=message):
        make()
