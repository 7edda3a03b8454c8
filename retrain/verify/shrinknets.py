"""The ShrinkNets draft's propositions A.1 to A.4, for multi-target linear regression.

As in the paper: A (n, p), switches beta (p,), y (n,) and x (p,) a sample; here samples are columns
of X and Y. The switches multiply the columns of A.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np
from scipy.optimize import minimize, minimize_scalar

from retrain.verify.statement import Case, Level, Numbers, Statement

PAPER = "Learning Network Size while Training with ShrinkNets (draft)"


@dataclass(frozen=True)
class Regression:
    """Data, the weight of the penalty, and starting points for what is not convex."""

    X: np.ndarray
    Y: np.ndarray
    trade_off: float
    starts: np.ndarray


def regression(case: Case, rng: np.random.Generator) -> Regression:
    """Targets from a matrix of which half the columns are zero, and noise."""
    n, p, samples = case["n"], case["p"], case["samples"]
    truth = rng.standard_normal((n, p)) * (np.arange(p) < p / 2)
    X = rng.standard_normal((p, samples))
    Y = truth @ X + 0.1 * rng.standard_normal((n, samples))
    return Regression(X, Y, case["trade_off"], rng.standard_normal((case["starts"], n + 1, p)))


def residual(problem: Regression, A: np.ndarray) -> float:
    """|Y - A X|_F^2."""
    return float(np.sum((problem.Y - A @ problem.X) ** 2))


def regression_cases(level: Level) -> list[Case]:
    """From little shrinkage to nearly all columns gone."""
    values = (1.0, 20.0) if level == "quick" else (0.1, 1.0, 5.0, 20.0, 60.0)
    starts = 3 if level == "quick" else 10
    return [
        {"n": 3, "p": 6, "samples": 30, "trade_off": value, "starts": starts} for value in values
    ]


# A.1 --------------------------------------------------------------------------------------------


def group_optimum(problem: Regression) -> tuple[float, np.ndarray]:
    """Solve (6), |Y - AX|^2 + lambda sum_j |A_j|_2, by cvxpy."""
    import cvxpy as cp

    A = cp.Variable((problem.Y.shape[0], problem.X.shape[0]))
    fit = cp.sum_squares(problem.Y - A @ problem.X)
    task = cp.Problem(cp.Minimize(fit + problem.trade_off * cp.sum(cp.norm(A, 2, axis=0))))
    task.solve(solver="CLARABEL")
    return float(task.value), np.asarray(A.value)


def shrink_value(problem: Regression, A: np.ndarray, beta: np.ndarray) -> float:
    """Objective of (5)."""
    return residual(problem, A * beta) + problem.trade_off * float(np.abs(beta).sum())


def split(A: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A = A' diag(beta) with unit columns: beta_j = |A_j|_2; a zero column takes any unit one."""
    beta = np.linalg.norm(A, axis=0)
    unit = np.zeros_like(A)
    unit[0] = 1.0
    return np.where(beta > 0, A / np.where(beta > 0, beta, 1.0), unit), beta


def descend(problem: Regression, start: np.ndarray) -> float:
    """Minimise (5) under |A_j|_2 = 1 from a random start, and return its value.

    The columns are normalised as they go in, and |beta| is sqrt(beta^2 + mu^2) with mu shrinking.
    """
    n = problem.Y.shape[0]

    def value(vector: np.ndarray, mu: float) -> tuple[float, np.ndarray]:
        parts = vector.reshape(n + 1, -1)
        raw, beta = parts[:n], parts[n]
        norms = np.linalg.norm(raw, axis=0)
        A = raw / norms
        error = (A * beta) @ problem.X - problem.Y
        size = np.sqrt(beta**2 + mu**2)
        slope = 2 * error @ problem.X.T
        in_A = slope * beta
        in_raw = (in_A - A * np.sum(A * in_A, axis=0)) / norms
        in_beta = np.sum(slope * A, axis=0) + problem.trade_off * beta / size
        objective = float(np.sum(error**2)) + problem.trade_off * float(size.sum())
        return objective, np.vstack([in_raw, in_beta]).ravel()

    vector = start.ravel()
    options = {"maxiter": 3000, "maxfun": 6000, "ftol": 1e-15, "gtol": 1e-9}
    for mu in (1e-1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6):
        found = minimize(value, vector, args=(mu,), jac=True, method="L-BFGS-B", options=options)
        vector = found.x
    parts = vector.reshape(n + 1, -1)
    return shrink_value(problem, parts[:n] / np.linalg.norm(parts[:n], axis=0), parts[n])


def shrink_minimum(problem: Regression) -> Numbers:
    """(5) under |A_j|_2 = 1: at the group optimum's split, and the least of several descents."""
    return {
        "at the split of the group optimum": shrink_value(
            problem, *split(group_optimum(problem)[1])
        ),
        "by descent": min(descend(problem, start) for start in problem.starts),
    }


# A.2 --------------------------------------------------------------------------------------------


def scalar_loss(a: float, beta: float, x: float) -> float:
    """(y - a beta x)^2 with y = 1."""
    return (1 - a * beta * x) ** 2


def printed_points(x: float) -> Numbers:
    """The loss at the paper's points (0, 2), (2, 0) and their midpoint."""
    return {
        "f(0, 2)": scalar_loss(0, 2, x),
        "f(2, 0)": scalar_loss(2, 0, x),
        "f(1, 1)": scalar_loss(1, 1, x),
    }


def hyperbola_gap(x: float) -> Numbers:
    """The midpoint's loss less the mean of the ends', on the hyperbola a beta x = 1."""
    ends = [(2 / x, 0.5), (0.5 / x, 2.0)]
    middle = scalar_loss((ends[0][0] + ends[1][0]) / 2, 1.25, x)
    return {"above the chord": middle - sum(scalar_loss(a, b, x) for a, b in ends) / 2}


# A.3 --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Unattained:
    """A regression, and a pair (A, beta) to improve upon."""

    problem: Regression
    A: np.ndarray
    beta: np.ndarray


def unattained(case: Case, rng: np.random.Generator) -> Unattained:
    """A regression and a random pair; "uncorrelated" makes Y orthogonal to X."""
    problem = regression(case, rng)
    if case["uncorrelated"]:
        basis = np.linalg.qr(problem.X.T)[0]
        problem = Regression(
            problem.X, problem.Y - problem.Y @ basis @ basis.T, problem.trade_off, problem.starts
        )
    n, p = case["n"], case["p"]
    return Unattained(problem, rng.standard_normal((n, p)), rng.standard_normal((p,)))


def infimum_approached(instance: Unattained) -> Numbers:
    """(5) along (A / t, t beta): at the given pair it falls, at the plain fit to |Y - AX|^2."""
    problem = instance.problem
    plain = problem.Y @ np.linalg.pinv(problem.X)
    ones = np.ones(problem.X.shape[0])
    here = shrink_value(problem, instance.A, instance.beta)
    halved = shrink_value(problem, 2 * instance.A, instance.beta / 2)
    limit = shrink_value(problem, plain * 1e9, ones / 1e9)
    return {
        "halving beta, over before": halved / here,
        "along the plain fit": limit / residual(problem, plain),
        "plain fit over beta = 0": residual(problem, plain) / float(np.sum(problem.Y**2)),
    }


def infimum_bound(instance: Unattained) -> Numbers:
    """Lower than before; the plain fit's residual; and less than at beta = 0, the premise."""
    del instance
    return {
        "halving beta, over before": 1 - 1e-9,
        "along the plain fit": 1 + 1e-6,
        "plain fit over beta = 0": 1 - 1e-6,
    }


def better_than_zero(instance: Unattained) -> Numbers:
    """1 where descents from random starts get below the value |Y|^2 at beta = 0, else 0."""
    problem, n = instance.problem, instance.problem.Y.shape[0]

    def value(vector: np.ndarray) -> tuple[float, np.ndarray]:
        parts = vector.reshape(n + 1, -1)
        A, beta = parts[:n], parts[n]
        error = (A * beta) @ problem.X - problem.Y
        slope = 2 * error @ problem.X.T
        in_beta = np.sum(slope * A, axis=0) + problem.trade_off * np.sign(beta)
        objective = float(np.sum(error**2)) + problem.trade_off * float(np.abs(beta).sum())
        return objective, np.vstack([slope * beta, in_beta]).ravel()

    reached = min(
        float(minimize(value, start.ravel(), jac=True, method="L-BFGS-B").fun)
        for start in problem.starts
    )
    zero = float(np.sum(problem.Y**2))
    return {"better than beta = 0": float(reached < zero * (1 - 1e-9))}


# A.4 --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Separable:
    """Targets c_j of a regression with orthonormal inputs and one output: p scalar problems.

    Problem j: minimise (c - a beta)^2 + lambda |beta| + lambda_2 a^2.
    """

    targets: np.ndarray
    trade_off: float
    second: float


def separable(case: Case, rng: np.random.Generator) -> Separable:
    """Random targets, some of them too small to pay for a switch."""
    targets = rng.uniform(0.5, 3.0, case["p"]) * rng.choice([-1, 1], case["p"])
    targets[: case["small"]] *= 0.05
    return Separable(targets, case["trade_off"], case["second"])


def scalar_value(problem: Separable, target: float, a: float, beta: float) -> float:
    """The objective of one scalar problem."""
    return (target - a * beta) ** 2 + problem.trade_off * abs(beta) + problem.second * a**2


def switch_pays(problem: Separable, target: float) -> bool:
    """Whether the global minimum of one scalar problem has a nonzero switch.

    For a product m = a beta != 0, lambda |m| / |a| + lambda_2 a^2 is least at
    |a|^3 = lambda |m| / (2 lambda_2); what is left is a search in one variable m, between 0 and c.
    """

    def split_product(m: float) -> tuple[float, float]:
        a = (problem.trade_off * abs(m) / (2 * problem.second)) ** (1 / 3)
        return a, m / a

    def cost(m: float) -> float:
        return scalar_value(problem, target, *split_product(m))

    grid = np.linspace(0, target, 400)[1:]
    near = grid[int(np.argmin([cost(float(m)) for m in grid]))]
    step = abs(target) / 400
    found = minimize_scalar(cost, bounds=(near - step, near + step), method="bounded")
    return bool(found.fun < scalar_value(problem, target, 0, 0))


def count_minima(problem: Separable) -> Numbers:
    """Count the distinct global minima that descents find, in every orthant of the switches.

    In an orthant |beta| is linear, so L-BFGS-B with bounds applies. Points that agree to 0.01 are
    one; those whose value is above the least by more than 1e-6 are no global minima.
    """
    p = len(problem.targets)
    found: list[tuple[float, tuple[float, ...]]] = []
    for orthant in itertools.product((1.0, -1.0), repeat=p):
        signs = np.array(orthant)

        def value(vector: np.ndarray, signs: np.ndarray = signs) -> tuple[float, np.ndarray]:
            a, beta = vector[:p], vector[p:]
            error = a * beta - problem.targets
            total = error @ error + problem.trade_off * signs @ beta + problem.second * a @ a
            in_a = 2 * error * beta + 2 * problem.second * a
            in_beta = 2 * error * a + problem.trade_off * signs
            return float(total), np.concatenate([in_a, in_beta])

        bounds = [(None, None)] * p + [(0, None) if sign > 0 else (None, 0) for sign in signs]
        for side in (1.0, -1.0):
            # On the side where a beta has the targets' signs, and on the other.
            start = np.concatenate([side * signs * np.sign(problem.targets), signs])
            options = {"ftol": 1e-15, "gtol": 1e-10, "maxiter": 2000}
            end = minimize(
                value, start, jac=True, method="L-BFGS-B", bounds=bounds, options=options
            )
            found.append((float(end.fun), tuple(np.round(end.x, 2) + 0.0)))
    least = min(value for value, _ in found)
    return {"minima": float(len({point for value, point in found if value <= least + 1e-6}))}


def nonzero_switches(problem: Separable) -> Numbers:
    """2^k, k the number of switches that are not zero at a minimum."""
    switched = sum(switch_pays(problem, float(target)) for target in problem.targets)
    return {"minima": 2.0**switched}


STATEMENTS = (
    Statement(
        name="shrinknets/proposition-a1",
        paper=PAPER,
        number="proposition A.1",
        sentence=(
            "min_A |y - Ax|^2 + lambda sum_j |A_j|_2 = min_(A', beta) |y - A' diag(beta) x|^2 + "
            "lambda |beta|_1 subject to |A'_j|_2 = 1."
        ),
        formula="optimum of (6) by cvxpy = (5) at its split = the least (5) that descents find",
        assumptions=("multi-target regression", "smoothed descents from random starts"),
        cases=regression_cases,
        sample=regression,
        measure=shrink_minimum,
        bound=lambda problem: dict.fromkeys(
            ("at the split of the group optimum", "by descent"), group_optimum(problem)[0]
        ),
        relation="==",
        slack=1e-4,
    ),
    Statement(
        name="shrinknets/proposition-a1-switch",
        paper=PAPER,
        number="proof of A.1",
        sentence="We define beta such that beta_j = |A_j|_2^2, and A' = A diag(beta)^-1.",
        formula="|A'_j|_2 = 1 with beta_j = |A_j|_2; a zero column has beta_j = 0, any unit column",
        assumptions=("random A with a zero column",),
        cases=regression_cases,
        sample=lambda case, rng: (
            rng.standard_normal((case["n"], case["p"])) * (np.arange(case["p"]) > 0)
        ),
        measure=lambda A: dict.fromkeys((f"column {j}" for j in range(1, A.shape[1])), 1.0),
        bound=lambda A: {
            f"column {j}": float(np.linalg.norm(split(A)[0][:, j])) for j in range(1, A.shape[1])
        },
        relation="==",
        slack=1e-12,
        printed=lambda A: {f"column {j}": float(1 / np.linalg.norm(A[:, j])) for j in range(1, 3)},
        erratum="beta_j = |A_j|_2, not its square",
    ),
    Statement(
        name="shrinknets/proposition-a2-counterexample",
        paper=PAPER,
        number="proof of A.2",
        sentence=(
            "We have f(s_1) = f(s_2) = 0 at (0, 2) and (2, 0). However f(1, 1) = x > 0, "
            "which breaks "
            "the convexity property."
        ),
        formula="f(0, 2) = f(2, 0) = 1 and f(1, 1) = (1 - x)^2, below 1 for 0 < x < 2",
        assumptions=("y = 1",),
        cases=lambda level: [{"x": x} for x in (0.5, 1.0, 1.5)],
        sample=lambda case, rng: case["x"],
        measure=printed_points,
        bound=lambda x: {"f(0, 2)": 1.0, "f(2, 0)": 1.0, "f(1, 1)": (1 - x) ** 2},
        relation="==",
        slack=1e-12,
        printed=lambda x: {"f(0, 2)": 0.0, "f(2, 0)": 0.0, "f(1, 1)": x},
        erratum="the counterexample is none: the midpoint is lower than both ends",
    ),
    Statement(
        name="shrinknets/proposition-a2",
        paper=PAPER,
        number="proposition A.2",
        sentence="|y - A diag(beta) x|^2 is not convex in A and beta.",
        formula="f((s_1 + s_2) / 2) > (f(s_1) + f(s_2)) / 2 on a beta x = y: (2, 1/2), (1/2, 2)",
        assumptions=("y = 1, x > 0",),
        cases=lambda level: [{"x": x} for x in (0.3, 1.0, 3.0)],
        sample=lambda case, rng: case["x"],
        measure=hyperbola_gap,
        bound=lambda x: {"above the chord": 0.1},
        relation=">=",
    ),
    Statement(
        name="shrinknets/proposition-a3",
        paper=PAPER,
        number="proposition A.3",
        sentence="min |y - A diag(beta) x|^2 + lambda |beta|_1 has no solution if lambda > 0.",
        formula=(
            "(2A, beta/2) is better than (A, beta); the infimum is the plain fit's |y - "
            "Ax|^2, which "
            "is below beta = 0"
        ),
        assumptions=("y correlated with x: the premise the paper lacks",),
        cases=lambda level: [{**case, "uncorrelated": False} for case in regression_cases(level)],
        sample=unattained,
        measure=infimum_approached,
        bound=infimum_bound,
    ),
    Statement(
        name="shrinknets/proposition-a3-premise",
        paper=PAPER,
        number="proposition A.3",
        sentence="min |y - A diag(beta) x|^2 + lambda |beta|_1 has no solution if lambda > 0.",
        formula="y uncorrelated with x: nothing is below the value |y|^2 at beta = 0, a solution",
        assumptions=("Y X^T = 0", "descents from random starts"),
        cases=lambda level: [{**case, "uncorrelated": True} for case in regression_cases(level)],
        sample=unattained,
        measure=better_than_zero,
        bound=lambda instance: {"better than beta = 0": 0.0},
        relation="==",
        printed=lambda instance: {"better than beta = 0": 1.0},
        erratum="beta = 0 is a minimum when y is uncorrelated with x",
    ),
    Statement(
        name="shrinknets/proposition-a4",
        paper=PAPER,
        number="proposition A.4",
        sentence="... has at least 2^k global minimum where k = sum_i #beta_i.",
        formula="2^k distinct global minima, k the number of nonzero switches",
        assumptions=(
            "orthonormal inputs, one output, p = 2, so that the scalar problems can be "
            "solved globally",
            "minima counted by descents in every orthant of the switches",
        ),
        cases=lambda level: [
            {"p": p, "small": small, "trade_off": 0.3, "second": 0.1}
            for p in ((2, 4) if level == "quick" else (2, 3, 4, 5, 6))
            for small in (0, 1, p)
        ],
        sample=separable,
        measure=count_minima,
        bound=nonzero_switches,
        relation="==",
        printed=lambda problem: {"minima": 2.0 ** len(problem.targets)},
        erratum="a switch that is zero has no sign to flip: k counts the nonzero ones",
    ),
)
