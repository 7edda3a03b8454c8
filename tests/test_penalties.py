"""Penalties: prox, conjugate and the best scale of a multiplier, against their definitions."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy.optimize import minimize_scalar

from solvers import L1, ElasticNet, Group

PENALTIES = [L1(), ElasticNet(0.3), ElasticNet(40.0), Group(), Group(2.5)]
NAMES = [repr(each) for each in PENALTIES]
every_penalty = pytest.mark.parametrize("penalty", PENALTIES, ids=NAMES)
numbers = st.floats(-100, 100, allow_subnormal=False)
matrices = hnp.arrays(float, (5, 3), elements=numbers)
steps = st.floats(1e-3, 1e3)


def conjugate_prox(penalty, dual, step):
    """Prox of step times the conjugate, from its own definition."""
    if isinstance(penalty, L1):
        return np.clip(dual, -1, 1)
    if isinstance(penalty, ElasticNet):
        over = np.sign(dual) * np.maximum(np.abs(dual) - 1, 0)
        return np.clip(dual, -1, 1) + over * penalty.ridge / (penalty.ridge + step)
    norms = np.linalg.norm(dual, axis=1, keepdims=True)
    return dual * np.minimum(1, penalty.weight / np.where(norms > 0, norms, 1))


def in_domain(penalty, dual):
    """Scale a dual into the conjugate's domain."""
    if isinstance(penalty, L1):
        return dual / np.maximum(np.abs(dual).max(0), 1)
    if isinstance(penalty, Group):
        return dual / max(1, np.linalg.norm(dual, axis=1).max() / penalty.weight)
    return dual


@every_penalty
@settings(max_examples=100, deadline=None)
@given(first=matrices, second=matrices, step=steps)
def test_prox_is_firmly_nonexpansive(penalty, first, second, step):
    moved = penalty.prox(first, step) - penalty.prox(second, step)
    size = 1 + np.abs(first).max() ** 2 + np.abs(second).max() ** 2
    assert np.sum(moved**2) <= np.sum(moved * (first - second)) + 1e-12 * size


@every_penalty
@settings(max_examples=100, deadline=None)
@given(point=matrices, step=steps)
def test_moreaus_identity(penalty, point, step):
    primal = penalty.prox(point, step)
    dual = conjugate_prox(penalty, point / step, 1 / step)
    np.testing.assert_allclose(primal + step * dual, point, atol=1e-10 * (1 + np.abs(point).max()))


@every_penalty
@settings(max_examples=100, deadline=None)
@given(weight=matrices, dual=matrices)
def test_fenchel_and_young(penalty, weight, dual):
    dual = in_domain(penalty, dual)
    total = np.sum(penalty.value(weight)) + np.sum(penalty.conjugate(dual))
    product = np.sum(weight * dual)
    assert total >= product - 1e-9 * (1 + abs(product))


@every_penalty
def test_fenchel_and_young_is_tight_at_a_subgradient(penalty):
    rng = np.random.default_rng(0)
    point = 3 * rng.standard_normal((8, 4))
    for step in (0.1, 1.0, 7.0):
        weight = penalty.prox(point, step)
        dual = (point - weight) / step  # a subgradient at the prox
        total = np.sum(penalty.value(weight)) + np.sum(penalty.conjugate(dual))
        assert total == pytest.approx(np.sum(weight * dual), rel=1e-12, abs=1e-12)


@every_penalty
def test_prox_minimises_its_objective(penalty):
    rng = np.random.default_rng(1)
    point = rng.standard_normal((6, 3))
    step = 0.4

    def objective(weight):
        return np.sum(penalty.value(weight)) + np.sum((weight - point) ** 2) / (2 * step)

    best = penalty.prox(point, step)
    for size in (1e-6, 1e-3, 0.1, 1.0):
        for _ in range(50):
            assert objective(best + size * rng.standard_normal(point.shape)) >= objective(best)


@pytest.mark.parametrize("penalty", [L1(), ElasticNet(0.3)], ids=["l1", "elastic"])
def test_each_unit_may_have_its_own_step(penalty):
    point = np.random.default_rng(2).standard_normal((6, 3))
    step = np.array([0.1, 1.0, 3.0])
    together = penalty.prox(point, step)
    for unit in range(3):
        alone = penalty.prox(point[:, [unit]], step[unit])
        np.testing.assert_array_equal(together[:, [unit]], alone)


def test_prox_gives_exact_zeros():
    point = np.random.default_rng(3).standard_normal((40, 5)).astype(np.float32)
    for penalty in (L1(), ElasticNet(0.7)):
        result = penalty.prox(point, np.float32(0.5))
        np.testing.assert_array_equal(result == 0, np.abs(point) <= 0.5)
        assert result.dtype == np.float32
    rows = Group(1.0).prox(point, np.float32(2.0))
    short = np.linalg.norm(point, axis=1) <= 2
    np.testing.assert_array_equal((rows == 0).all(1), short)
    assert short.any()
    assert not short.all()


def best_value(penalty, dual, linear, quadratic):
    """The largest s linear - s^2 quadratic - conjugate(s dual), by golden section over s."""
    if isinstance(penalty, L1):
        limit = 1 / np.abs(dual).max()
    elif isinstance(penalty, Group):
        limit = penalty.weight / np.linalg.norm(dual, axis=1).max()
    else:
        limit = 1e4

    def loss(scale):
        value = scale * linear - scale**2 * quadratic
        if isinstance(penalty, ElasticNet):
            over = np.maximum(scale * np.abs(dual) - 1, 0)
            value -= np.sum(over**2) / (2 * penalty.ridge)
        return -value

    inside = minimize_scalar(loss, bounds=(0, limit), method="bounded", options={"xatol": 1e-10})
    return -min(inside.fun, loss(0.0), loss(limit))


@pytest.mark.parametrize("seed", range(6))
@every_penalty
def test_scale_dual_is_the_best_scale(penalty, seed):
    rng = np.random.default_rng(seed)
    dual = rng.standard_normal((7, 1)) if penalty.separable else rng.standard_normal((7, 3))
    for linear in (-1.0, 0.3, 5.0):
        for quadratic in (0.0, 0.2, 3.0):
            shape = (1,) if penalty.separable else ()
            a, b = np.full(shape, linear), np.full(shape, quadratic)
            scale = penalty.scale_dual(dual, a, b)
            assert scale.shape == shape
            value = np.sum(scale * a - scale**2 * b - penalty.conjugate(scale * dual))
            best = best_value(penalty, dual, linear, quadratic)
            assert value == pytest.approx(best, rel=1e-6, abs=1e-9)
            if not isinstance(penalty, ElasticNet):
                scaled = scale * dual
                size = np.abs(scaled).max() if isinstance(penalty, L1) else None
                size = (
                    np.linalg.norm(scaled, axis=1).max() / penalty.weight if size is None else size
                )
                assert size <= 1 + 1e-15


@every_penalty
def test_scale_dual_without_a_limit_is_finite(penalty):
    dual = np.zeros((4, 2))
    shape = (2,) if penalty.separable else ()
    for linear in (-1.0, 0.0, 2.0):
        scale = penalty.scale_dual(dual, np.full(shape, linear), np.zeros(shape))
        assert np.all(np.isfinite(scale))
        assert np.all((scale > 0) == (linear > 0))


def test_shrink_units_brings_each_unit_into_its_box():
    dual = np.array([[0.5, -4.0], [0.2, 1.0]])
    np.testing.assert_array_equal(L1().shrink_units(dual), [1.0, 0.25])
    np.testing.assert_array_equal(ElasticNet(1.0).shrink_units(dual), 1.0)
    np.testing.assert_array_equal(Group(1.0).shrink_units(dual), 1.0)


def test_values_by_hand():
    weight = np.array([[3.0, -4.0], [0.0, 2.0]])
    np.testing.assert_allclose(L1().value(weight), [3, 6])
    np.testing.assert_allclose(ElasticNet(0.5).value(weight), [3 + 9 / 4, 6 + 20 / 4])
    assert Group(2.0).value(weight) == pytest.approx(2 * (5 + 2))
    assert [each.separable for each in (L1(), ElasticNet(1.0), Group())] == [True, True, False]
    assert [each.name for each in (L1(), ElasticNet(1.0), Group())] == [
        "l1",
        "elastic net",
        "group",
    ]


@every_penalty
def test_torch_arrays_give_the_same(penalty):
    rng = np.random.default_rng(4)
    point = rng.standard_normal((6, 3))
    tensor = torch.asarray(point)
    shape = (3,) if penalty.separable else ()
    linear, quadratic = np.full(shape, 0.7), np.full(shape, 0.1)
    pairs = [
        (penalty.value(tensor), penalty.value(point)),
        (penalty.prox(tensor, torch.asarray(0.3, dtype=torch.float64)), penalty.prox(point, 0.3)),
        (penalty.conjugate(tensor), penalty.conjugate(point)),
        (penalty.shrink_units(tensor), penalty.shrink_units(point)),
        (
            penalty.scale_dual(tensor, torch.asarray(linear), torch.asarray(quadratic)),
            penalty.scale_dual(point, linear, quadratic),
        ),
    ]
    for ours, theirs in pairs:
        assert torch.is_tensor(ours)
        np.testing.assert_allclose(ours.numpy(), theirs, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("value", [0.0, -2.0, np.nan, np.inf])
def test_weights_of_penalties_are_positive(value):
    with pytest.raises(ValueError, match=f"ridge: got {value}, want a positive finite number"):
        ElasticNet(value)
    with pytest.raises(ValueError, match=f"weight: got {value}, want a positive finite number"):
        Group(value)


def test_the_best_scale_of_flat_bounds():
    """D(s) = 1e-20 s - 0.5e-20 s^2 has its maximum at 1, though all its slopes are tiny."""
    tiny = np.array([1e-20])
    found = ElasticNet(1.0).scale_dual(np.zeros((3, 1)), tiny, tiny / 2)
    np.testing.assert_allclose(found, 1.0, rtol=1e-9)
