"""The multiobjective paper's statements: the common descent direction (15), and (2) against (7).

For q gradients g_1, ..., g_q the weights of (15) are those of the shortest vector in their convex
hull. For two there is a closed form; for three and more, each face of the hull gives a small linear
system, and the shortest of the admissible solutions is the answer.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.optimize import linprog, minimize

from retrain.verify.statement import Case, Level, Numbers, Statement

PAPER = "Reiners, Klamroth, Stiglmayr: Pruning Weights in a Multiobjective Learning Approach (2020)"


def two_weights(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Closed form of (15) for q = 2: g_1 . (g_1 - g_2) / |g_1 - g_2|^2, clipped, weighs g_2."""
    difference = first - second
    square = float(difference @ difference)
    share = 0.5 if square == 0 else min(max(float(first @ difference) / square, 0.0), 1.0)
    return np.array([1 - share, share])


def shortest_weights(gradients: np.ndarray) -> np.ndarray:
    """Weights of (15) for any few gradients (q, n): the best admissible face of the hull."""
    gram = gradients @ gradients.T
    best, shortest = np.zeros(len(gram)), np.inf
    for count in range(1, len(gram) + 1):
        for chosen in itertools.combinations(range(len(gram)), count):
            part = gram[np.ix_(chosen, chosen)]
            # Least |G^T l|^2 with sum l = 1: part l = t 1, bordered; lstsq where it is singular.
            system = np.block(
                [[part, np.ones((count, 1))], [np.ones((1, count)), np.zeros((1, 1))]]
            )
            right = np.append(np.zeros(count), 1.0)
            weights = np.linalg.lstsq(system, right, rcond=None)[0][:count]
            if weights.min() < -1e-12 or abs(weights.sum() - 1) > 1e-9:
                continue
            length = float(weights @ part @ weights)
            if length < shortest:
                shortest = length
                best = np.zeros(len(gram))
                best[list(chosen)] = weights
    return best


def draw_gradients(case: Case, rng: np.random.Generator) -> np.ndarray:
    """Gradients (q, n), generic or degenerate as `kind` says."""
    gradients = rng.standard_normal((case["q"], case["n"]))
    if case["kind"] == "scaled":
        gradients[1] *= 100.0
    elif case["kind"] == "equal":
        gradients[:] = gradients[0]
    elif case["kind"] == "zero":
        gradients[0] = 0
    elif case["kind"] == "opposed":
        gradients[1] = -0.3 * gradients[0]
    elif case["kind"] == "hull":  # 0 is a convex combination of all of them
        shares = rng.dirichlet(np.ones(case["q"]))
        gradients[-1] = -(shares[:-1] @ gradients[:-1]) / shares[-1]
    return gradients


def gradient_cases(level: Level, sizes: tuple[int, ...] = (2, 3)) -> list[Case]:
    """Two and three gradients, generic and degenerate."""
    repeats = 3 if level == "quick" else 30
    return [
        {"q": q, "n": n, "kind": kind, "repeat": index}
        for q in sizes
        for n in (2, 10)
        for kind in ("generic", "scaled", "equal", "zero", "opposed", "hull")
        for index in range(repeats if kind in ("generic", "scaled", "hull") else 1)
    ]


def closed_form_length(gradients: np.ndarray) -> Numbers:
    """The length that the closed form (q = 2) or the faces (q > 2) reach, over the longest."""
    weights = two_weights(*gradients) if len(gradients) == 2 else shortest_weights(gradients)
    return {"|g|": float(np.linalg.norm(weights @ gradients)) / longest(gradients)}


def solver_length(gradients: np.ndarray) -> Numbers:
    """The length that cvxpy's QP solver reaches on (15)."""
    import cvxpy as cp

    weights = cp.Variable(len(gradients), nonneg=True)
    unit = gradients / longest(gradients)
    problem = cp.Problem(cp.Minimize(cp.sum_squares(weights @ unit)), [cp.sum(weights) == 1])
    problem.solve(solver="CLARABEL")
    return {"|g|": float(np.linalg.norm(np.asarray(weights.value) @ unit))}


def longest(gradients: np.ndarray) -> float:
    """Return the largest norm of the objectives' gradients, the rows."""
    return float(np.linalg.norm(gradients, axis=1).max())


def _direction(gradients: np.ndarray) -> np.ndarray:
    return shortest_weights(gradients) @ gradients


def inner_products(gradients: np.ndarray) -> Numbers:
    """Products g . g_j of every objective, over the longest gradient's square."""
    g, scale = _direction(gradients), longest(gradients) ** 2
    return {f"objective {j + 1}": float(g @ row) / scale for j, row in enumerate(gradients)}


def squared_length(gradients: np.ndarray) -> Numbers:
    """|g|^2, to the same scale: g . g_j >= |g|^2, so -g descends along every objective."""
    g, scale = _direction(gradients), longest(gradients) ** 2
    return {f"objective {j + 1}": float(g @ g) / scale for j in range(len(gradients))}


def no_common_descent(gradients: np.ndarray) -> Numbers:
    """1 where no d has g_j . d < 0 for all j (a linear program), else 0."""
    count, n = gradients.shape
    unit = gradients / longest(gradients)
    # Maximise t subject to g_j . d + t <= 0 and |d|_inf <= 1.
    answer = linprog(
        np.append(np.zeros(n), -1.0),
        A_ub=np.hstack([unit, np.ones((count, 1))]),
        b_ub=np.zeros(count),
        bounds=[(-1, 1)] * n + [(None, None)],
        method="highs",
    )
    if answer.status != 0:
        raise RuntimeError(f"HiGHS did not solve the descent program: {answer.message}")
    return {"stationary": float(-answer.fun <= 1e-9)}


def zero_direction(gradients: np.ndarray) -> Numbers:
    """1 where the shortest vector of (15) is 0, else 0."""
    g = _direction(gradients)
    return {"stationary": float(np.linalg.norm(g) <= 1e-7 * longest(gradients))}


# (2) and (7) ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Regularised:
    """A logistic regression with l1, its lambda, and weights to compare the objectives at."""

    x: np.ndarray
    labels: np.ndarray
    trade_off: float
    points: np.ndarray


def regularised(case: Case, rng: np.random.Generator) -> Regularised:
    """Labels from a sparse linear rule with noise."""
    x = rng.standard_normal((40, 6))
    score = x[:, 0] - 2 * x[:, 1] + 0.5 * rng.standard_normal(40)
    return Regularised(x, (score > 0).astype(float), case["lambda"], rng.standard_normal((3, 6)))


def cross_entropy(problem: Regularised, w: np.ndarray) -> float:
    """E of (1) for both classes, in nats."""
    score = problem.x @ w
    return float(np.mean(np.logaddexp(0, score) - problem.labels * score))


def weighted_minimum(problem: Regularised, loss: float, size: float) -> np.ndarray:
    """Minimise loss E + size |w|_1, by halves w = u - v >= 0 and L-BFGS-B."""
    n = problem.x.shape[1]

    def value(halves: np.ndarray) -> tuple[float, np.ndarray]:
        w = halves[:n] - halves[n:]
        probability = 1 / (1 + np.exp(-problem.x @ w))
        slope = loss * problem.x.T @ (probability - problem.labels) / len(problem.x)
        objective = loss * cross_entropy(problem, w) + size * halves.sum()
        return objective, np.concatenate([slope, -slope]) + size

    found = minimize(
        value,
        np.zeros(2 * n),
        jac=True,
        method="L-BFGS-B",
        bounds=[(0, None)] * (2 * n),
        options={"ftol": 1e-16, "gtol": 1e-10, "maxiter": 10_000, "maxfun": 100_000},
    )
    return np.asarray(found.x[:n] - found.x[n:])


def by_equation_2(problem: Regularised) -> Numbers:
    """The minimiser of (2), E + lambda |w|_1, and (2) / (1 + lambda) at some points."""
    minimiser = weighted_minimum(problem, 1.0, problem.trade_off)
    values = [
        (cross_entropy(problem, w) + problem.trade_off * np.abs(w).sum()) / (1 + problem.trade_off)
        for w in problem.points
    ]
    return _named(minimiser, values)


def by_equation_7(problem: Regularised) -> Numbers:
    """The same by (7) with the trade-off lambda / (1 + lambda)."""
    share = problem.trade_off / (1 + problem.trade_off)
    minimiser = weighted_minimum(problem, 1 - share, share)
    values = [
        (1 - share) * cross_entropy(problem, w) + share * np.abs(w).sum() for w in problem.points
    ]
    return _named(minimiser, values)


def _named(minimiser: np.ndarray, values: list[Any]) -> Numbers:
    numbers = {f"w* {index}": float(value) for index, value in enumerate(minimiser)}
    return {**numbers, **{f"J {index}": float(value) for index, value in enumerate(values)}}


# (12) -------------------------------------------------------------------------------------------


def rmsprop(gradients: np.ndarray, epsilon: float) -> np.ndarray:
    """Steps of (11), (12) over a sequence of gradients (steps, n); epsilon beside the root."""
    moving, weights, beta, rate = (
        np.zeros(gradients.shape[1]),
        np.zeros(gradients.shape[1]),
        0.9,
        0.1,
    )
    for gradient in gradients:
        moving = beta * moving + (1 - beta) * gradient**2
        with np.errstate(invalid="ignore", divide="ignore"):
            weights = weights - rate * gradient / (np.sqrt(moving) + epsilon)
    return weights


def dead_gradients(case: Case, rng: np.random.Generator) -> np.ndarray:
    """Gradients of which the first weight's are all zero, as behind a dead input."""
    gradients = rng.standard_normal((case["steps"], 3))
    gradients[:, 0] = 0
    return gradients


_DIRECTION = ("q = 2 and 3", "generic, badly scaled, equal, zero, opposed gradients, 0 in the hull")

STATEMENTS = (
    Statement(
        name="itp/equation-15",
        paper=PAPER,
        number="(15)",
        sentence="lambda^k = arg min |sum_j lambda_j g_j|^2 over the simplex.",
        formula=(
            "length of the closed form (q = 2: g_1 . (g_1 - g_2) / |g_1 - g_2|^2 clipped; q = 3: "
            "faces) = that of a QP solver"
        ),
        assumptions=_DIRECTION,
        cases=gradient_cases,
        sample=draw_gradients,
        measure=closed_form_length,
        bound=solver_length,
        relation="==",
        slack=1e-4,
        floor=1.0,
    ),
    Statement(
        name="itp/common-descent",
        paper=PAPER,
        number="section 3.2",
        sentence=(
            "The idea is to iteratively move into directions that are steepest common descent "
            "directions, and hence descent directions for all objective functions."
        ),
        formula="g . g_j >= |g|^2 for every j, g the shortest vector of (15)",
        assumptions=_DIRECTION,
        cases=gradient_cases,
        sample=draw_gradients,
        measure=inner_products,
        bound=squared_length,
        relation=">=",
        slack=1e-9,
        floor=1.0,
    ),
    Statement(
        name="itp/pareto-stationarity",
        paper=PAPER,
        number="section 3.2",
        sentence=(
            "The algorithm terminates with a stationary point (a local Pareto optimal "
            "solution) when "
            "no such direction exists."
        ),
        formula="no d with g_j . d < 0 for all j (a linear program) <=> the shortest vector is 0",
        assumptions=_DIRECTION,
        cases=gradient_cases,
        sample=draw_gradients,
        measure=no_common_descent,
        bound=zero_direction,
        relation="==",
    ),
    Statement(
        name="itp/equivalence-2-7",
        paper=PAPER,
        number="(2) and (7)",
        sentence=(
            "Minimizing (2) with a fixed lambda > 0 is equivalent to minimizing the weighted sum "
            "scalarization (7) with weighting parameter lambda / (1 + lambda)."
        ),
        formula="same minimiser, and (7) = (2) / (1 + lambda) everywhere",
        assumptions=("logistic regression with l1: convex, a single minimiser",),
        cases=lambda level: [
            {"lambda": trade_off}
            for trade_off in (
                (0.01, 0.1) if level == "quick" else (0.003, 0.01, 0.03, 0.1, 0.3, 3.0)
            )
        ],
        sample=regularised,
        measure=by_equation_2,
        bound=by_equation_7,
        relation="==",
        slack=1e-5,
        floor=1.0,
    ),
    Statement(
        name="itp/equation-12",
        paper=PAPER,
        number="(12)",
        sentence="w_n <- w_n - t g_n / sqrt(mov(g_n^2)).",
        formula="with an epsilon beside the root, a weight whose gradients are 0 stays",
        assumptions=("epsilon = 1e-8 outside the root, as in torch",),
        cases=lambda level: [{"steps": steps} for steps in (1, 10)],
        sample=dead_gradients,
        measure=lambda gradients: {"dead weight": 0.0},
        bound=lambda gradients: {"dead weight": float(rmsprop(gradients, 1e-8)[0])},
        relation="==",
        printed=lambda gradients: {"dead weight": float(rmsprop(gradients, 0.0)[0])},
        erratum="without an epsilon a zero gradient gives 0 / 0",
    ),
)
