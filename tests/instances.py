"""Layer programs to test with: some made around a chosen optimum, some as a layer gives them."""

from collections.abc import Iterator

import numpy as np

from solvers import (
    L1,
    ConstrainedProgram,
    ElasticNet,
    Group,
    RegularisedProgram,
    trim_program,
)

KINDS = ("plain", "dead", "inactive", "wide", "one", "correlated")
CEILINGS = ("none", "zero", "negative", "positive")


def subgradient(penalty, weight, rng):
    """A random element of the penalty's subdifferential, strictly inside where there is room."""
    if isinstance(penalty, Group):
        norms = np.linalg.norm(weight, axis=1, keepdims=True)
        free = rng.standard_normal(weight.shape)
        free *= rng.random((len(weight), 1)) * 0.9 / np.linalg.norm(free, axis=1, keepdims=True)
        return penalty.weight * np.where(norms > 0, weight / np.where(norms > 0, norms, 1), free)
    free = rng.uniform(-0.9, 0.9, weight.shape)
    ridge = penalty.ridge if isinstance(penalty, ElasticNet) else 0.0
    return np.where(weight != 0, np.sign(weight) + ridge * weight, free)


def with_optimum(
    seed, form, *, penalty=None, bias=False, mask=False, shape=(40, 12, 4), dtype=np.float64
):
    """A program made around a chosen primal-dual pair: (program, weight, multiplier, optimum).

    Weights U, multiplier Nu and a subgradient S of the penalty at U are chosen first. The inputs
    are then moved by the smallest matrix that gives X^T Nu = -S, and the level is what makes the
    rest of the optimality conditions hold. The optimum is penalty(U), in the regularised form plus
    |nu_Omega|^2 / (4 fit_weight) for each unit.
    """
    rng = np.random.default_rng(seed)
    n_samples, n_in, n_out = shape
    penalty = L1() if penalty is None else penalty
    inputs = rng.standard_normal((n_samples, n_in))
    weight = rng.standard_normal((n_in, n_out)) * (rng.random((n_in, n_out)) < 0.4)
    if isinstance(penalty, Group):
        weight *= rng.random((n_in, 1)) < 0.6
    active = rng.random((n_samples, n_out)) < 0.5
    active[0] = True
    nu = rng.standard_normal((n_samples, n_out))
    nu = np.where(active, nu, np.maximum(nu, 0))
    dead = 1
    inputs[:, dead], weight[dead] = 0, 0
    support = rng.random((n_in, n_out)) < 0.8 if mask else None
    free_rows = (n_in - 1,) if bias else ()
    if bias:
        inputs[:, -1] = 1
        weight[-1] = rng.standard_normal(n_out)
        if mask:
            support[-1] = True
        nu -= np.where(active, nu.sum(0) / active.sum(0), 0)
    if mask:
        weight *= support
    kept = slice(0, n_in - 1) if bias else slice(0, n_in)
    slope = np.zeros((n_in, n_out))
    slope[kept] = subgradient(penalty, weight[kept], rng)
    if mask:
        slope = np.where(support, slope, -(inputs.T @ nu))
    slope[dead] = 0
    inputs += nu @ np.linalg.solve(nu.T @ nu, -slope.T - nu.T @ inputs)
    inputs[:, dead] = 0
    if bias:
        inputs[:, -1] = 1
    response = inputs @ weight
    slack = np.where(nu > 0, 0.0, rng.random(nu.shape))
    fitted = np.where(active, nu, 0)
    size = np.linalg.norm(fitted)
    common = {
        "inputs": inputs.astype(dtype),
        "active": active,
        "penalty": penalty,
        "free_rows": free_rows,
        "support": support,
        "old_weight": weight.astype(dtype),
    }
    value = penalty.value(weight[kept])
    if form == "constrained":
        epsilon = 0.7
        level = np.where(active, response - epsilon * fitted / size, response + slack)
        program = ConstrainedProgram(level=level.astype(dtype), epsilon=epsilon, **common)
        return program, weight, nu, np.sum(value)
    fit_weight = 3.0
    level = np.where(active, response - nu / (2 * fit_weight), response + slack)
    program = RegularisedProgram(level=level.astype(dtype), fit_weight=fit_weight, **common)
    return program, weight, nu, value + (fitted**2).sum(0) / (4 * fit_weight)


def of_a_layer(
    seed, form, *, dtype=np.float64, kind="plain", ceiling="zero", bias=False, **options
):
    """A program as a ReLU layer gives it, degenerate in the way that `kind` says.

    `ceiling` "none" is a layer without activation; "negative" ones are the old weights' own
    responses, as the cascade has them; "positive" ones lie above.
    """
    rng = np.random.default_rng(seed)
    sizes = {"wide": (12, 30, 4), "one": (1, 6, 3)}
    n_samples, n_in, n_out = sizes.get(kind, (40, 12, 4))
    inputs = np.maximum(rng.standard_normal((n_samples, n_in)), 0)
    if kind == "correlated":
        inputs += 2 * rng.random((n_samples, 1))
    if kind == "dead":
        inputs[:, [1, 3]] = 0
    weight = rng.standard_normal((n_in, n_out)) * (rng.random((n_in, n_out)) < 0.7)
    if bias:
        inputs[:, -1] = 1
    if kind == "inactive":
        weight[:, 1] = -np.abs(weight[:, 1])
    response = inputs @ weight
    targets = response if ceiling == "none" else np.maximum(response, 0)
    ceilings = {
        "negative": response + 1e-6 * np.abs(response),
        "positive": np.maximum(response, 0) + 0.1 * rng.random(response.shape),
    }.get(ceiling)
    scale = {"epsilon": 0.1 * float(np.linalg.norm(targets)) or 0.1}
    if form == "regularised":
        scale = {"fit_weight": 2.0}
    return trim_program(
        inputs.astype(dtype),
        targets.astype(dtype),
        activation="linear" if ceiling == "none" else "relu",
        ceilings=None if ceilings is None else ceilings.astype(dtype),
        free_rows=(n_in - 1,) if bias else (),
        old_weight=weight.astype(dtype),
        **scale,
        **options,
    )


def matrix() -> Iterator[tuple[str, str, str, str, str, bool]]:
    """Both forms, both dtypes, every kind, every ceiling, bias free or not: 192 instances."""
    for form in ("constrained", "regularised"):
        for dtype in ("float64", "float32"):
            for kind in KINDS:
                for ceiling in CEILINGS:
                    for bias in (False, True):
                        yield form, dtype, kind, ceiling, bias
