"""The layer-gates paper's statements on its hyper-prior, its optima and its estimators.

Checked on small networks (1) with tanh, where expectations over the gates are sums over all
patterns. What happens in time, theorems 5.1 to 5.3, is in `gates_dynamics`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
from scipy.optimize import minimize

from retrain.verify import gated_network as net
from retrain.verify.gated_network import Problem
from retrain.verify.statement import Case, Level, Numbers, Statement

PAPER = "Guenter, Sideris: Concurrent Training and Layer Pruning of DNNs (2024)"


# The objective over the gates -------------------------------------------------------------------


@dataclass(frozen=True)
class Point:
    """A problem, gate probabilities, one of the gates, and the generator's further draws."""

    problem: Problem
    theta: np.ndarray
    index: int
    starts: np.ndarray


def random_problem(case: Case, rng: np.random.Generator) -> Problem:
    """A random network with random targets."""
    width = case.get("width", 3)
    network = net.random_network(case["gates"], width, rng)
    x = rng.standard_normal((case["samples"], width))
    y = rng.standard_normal((case["samples"], 2))
    return Problem(network, x, y, case.get("log_gamma", -1.0), 0.1)


def random_point(case: Case, rng: np.random.Generator) -> Point:
    """A random problem and gate probabilities."""
    problem = random_problem(case, rng)
    theta = rng.uniform(0.05, 0.95, (case["gates"],))
    starts = rng.uniform(0, 1, (case.get("starts", 3), case["gates"]))
    return Point(problem, theta, int(rng.integers(case["gates"])), starts)


def vertex_values(problem: Problem) -> np.ndarray:
    """L at every vertex of the box, shape (2, ..., 2)."""
    count = len(problem.network.blocks)
    decay = 0.5 * problem.decay * float(np.sum(net.to_vector(problem.network) ** 2))
    values = [
        float(np.sum(net.costs(problem.network, problem.x, problem.y, gates)))
        + decay
        - sum(gates) * problem.log_gamma
        for gates in net.patterns(count)
    ]
    return np.array(values).reshape((2,) * count)


def relaxed(values: np.ndarray, theta: np.ndarray) -> tuple[float, np.ndarray]:
    """L(theta) = E over the gates of the vertex values, and its gradient."""
    gradient = np.zeros(len(theta))
    for index in range(len(theta)):
        rest = np.moveaxis(values, index, 0)
        for value in np.delete(theta, index):
            rest = (1 - value) * rest[:, 0] + value * rest[:, 1]
        gradient[index] = rest[1] - rest[0]
        total = (1 - theta[index]) * rest[0] + theta[index] * rest[1]
    return float(total), gradient


def nothing(theta: np.ndarray) -> tuple[float, np.ndarray]:
    """Add nothing to L: the flattening hyper-prior's term is in it already."""
    return 0.0, np.zeros_like(theta)


def box_minimum(
    point: Point, extra: Callable[[np.ndarray], tuple[float, np.ndarray]] = nothing
) -> Numbers:
    """How far below all vertices a bounded minimiser gets inside the box, and along each axis.

    "below the vertices": the least vertex value minus the least that L-BFGS-B finds from random
    starts. "bend": the largest second difference along an axis of the box, over L's range; L(theta)
    here is evaluated network by network. `extra` is another hyper-prior's term in theta, with its
    gradient.
    """
    values = vertex_values(point.problem)

    def value(theta: np.ndarray) -> tuple[float, np.ndarray]:
        own, more = relaxed(values, theta), extra(theta)
        return own[0] + more[0], own[1] + more[1]

    lowest = min(
        float(
            minimize(
                value,
                start,
                jac=True,
                method="L-BFGS-B",
                bounds=[(0, 1)] * len(start),
            ).fun
        )
        for start in point.starts
    )
    bend = 0.0
    for index in range(min(len(point.theta), 3)):
        line = []
        for place in (0.1, 0.5, 0.9):
            theta = point.theta.copy()
            theta[index] = place
            line.append(net.objective(point.problem, theta) + extra(theta)[0])
        bend = max(bend, abs(line[0] - 2 * line[1] + line[2]))
    spread = float(values.max() - values.min())
    return {
        "below the vertices": (float(values.min()) - lowest) / spread,
        "bend": bend / spread,
    }


def objective_12(point: Point) -> Numbers:
    """L(W, Theta) as (12) has it, C(W, Theta) being E[-log p]."""
    return {"L": net.objective(point.problem, point.theta)}


def _objective_13(point: Point, sign: float) -> Numbers:
    problem = point.problem
    likelihood = sum(
        net.probability(gates, point.theta)
        * -float(np.sum(net.costs(problem.network, problem.x, problem.y, gates)))
        for gates in net.patterns(len(point.theta))
    )
    decay = 0.5 * problem.decay * float(np.sum(net.to_vector(problem.network) ** 2))
    return {"L": sign * likelihood + decay - float(np.sum(point.theta)) * problem.log_gamma}


def objective_13(point: Point) -> Numbers:
    """(13) with the minus: -sum_I g_I log p + decay - |Theta|_1 log gamma."""
    return _objective_13(point, -1.0)


def objective_13_printed(point: Point) -> Numbers:
    """(13) as printed, with a plus."""
    return _objective_13(point, 1.0)


# Optimality -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Optimum:
    """A trained problem, its gates and, for O1, a step for differences of gradients."""

    problem: Problem
    theta: np.ndarray


def teacher_problem(case: Case, rng: np.random.Generator) -> Problem:
    """Targets from a network with one block; the trained network has more."""
    width = case.get("width", 3)
    teacher = net.random_network(1, width, rng)
    big = replace(teacher.blocks[0], W1=1.5 * teacher.blocks[0].W1, W2=2 * teacher.blocks[0].W2)
    x = rng.standard_normal((case["samples"], width))
    y = net.activations(replace(teacher, blocks=(big,)), x, (1,))[-1]
    y = y + 0.05 * rng.standard_normal(y.shape)
    return Problem(
        net.random_network(case["gates"], width, rng), x, y, case["log_gamma"], case["decay"]
    )


def minimise_weights(problem: Problem, theta: np.ndarray, iterations: int) -> Problem:
    """Minimise L over W at fixed gates, by BFGS."""

    def value(vector: np.ndarray) -> tuple[float, np.ndarray]:
        moved = replace(problem, network=net.from_vector(vector, problem.network))
        return net.objective(moved, theta), net.gradients(moved, theta)[0]

    found = minimize(
        value,
        net.to_vector(problem.network),
        jac=True,
        method="BFGS",
        options={"maxiter": iterations, "gtol": 1e-8},
    )
    return replace(problem, network=net.from_vector(found.x, problem.network))


def train(problem: Problem, theta: np.ndarray, iterations: int = 1500) -> Optimum:
    """Minimise L over W and Theta in the box by L-BFGS-B, then over W at the gates it chose."""
    size = net.to_vector(problem.network).size

    def value(vector: np.ndarray) -> tuple[float, np.ndarray]:
        moved = replace(problem, network=net.from_vector(vector[:size], problem.network))
        slope = net.gradients(moved, vector[size:])
        return net.objective(moved, vector[size:]), np.concatenate(slope)

    found = minimize(
        value,
        np.concatenate([net.to_vector(problem.network), theta]),
        jac=True,
        method="L-BFGS-B",
        bounds=[(None, None)] * size + [(0, 1)] * len(theta),
        options={"maxiter": iterations, "maxfun": 2 * iterations, "ftol": 1e-15, "gtol": 1e-7},
    )
    trained = replace(problem, network=net.from_vector(found.x[:size], problem.network))
    gates = found.x[size:]
    return Optimum(minimise_weights(trained, gates, 2 * iterations), gates)


def trained(case: Case, rng: np.random.Generator) -> Optimum:
    """A trained network that may have kept some blocks and lost others."""
    return train(teacher_problem(case, rng), np.full(case["gates"], 0.7))


def optimality(optimum: Optimum) -> Numbers:
    """Numbers that the three cases of section 3.2 say must be at most their bounds."""
    problem, numbers = optimum.problem, {}
    rounded = np.round(optimum.theta)
    for index, gate in enumerate(rounded):
        label = f"gate {index + 1}"
        numbers[f"{label}: theta from 0 or 1"] = abs(float(optimum.theta[index]) - gate)
        w = net.fan_out(problem.network, index)
        on, off = net.gated_costs(problem, rounded, index)
        if gate == 0:
            numbers[f"{label} off: |w|"] = float(np.linalg.norm(w))
            numbers[f"{label} off: |A(w) + log gamma|"] = abs(on - off)
            continue
        gradient = net.fan_out_gradient(problem, rounded, index) + problem.decay * w
        numbers[f"{label} on: O1, minus the least eigenvalue"] = -float(
            np.linalg.eigvalsh(curvature(problem, rounded, index)).min()
        )
        numbers[f"{label} on: O2, C_1 - C_0"] = on - off
        numbers[f"{label} on: O3, |gradient|"] = float(np.linalg.norm(gradient))
    return numbers


def optimality_bounds(optimum: Optimum) -> Numbers:
    """Zero, up to what the training leaves; log gamma for O2."""
    limits = {
        "theta": 1e-9,
        "|w|": 1e-4,
        "|A(w)": 1e-3,
        "O1": 1e-6,
        "O2": optimum.problem.log_gamma,
        "O3": 1e-4,
    }
    return {
        name: next(limit for key, limit in limits.items() if f": {key}" in name)
        for name in optimality(optimum)
    }


def curvature(problem: Problem, theta: np.ndarray, index: int) -> np.ndarray:
    """Hessian of C_1 in w, plus lambda I, by central differences of the gradient."""
    w, step = net.fan_out(problem.network, index), 1e-5
    columns = []
    for unit in np.eye(len(w)):
        sides = [
            net.fan_out_gradient(
                replace(problem, network=net.with_fan_out(problem.network, index, w + move * unit)),
                theta,
                index,
            )
            for move in (step, -step)
        ]
        columns.append((sides[0] - sides[1]) / (2 * step))
    hessian = np.array(columns)
    return (hessian + hessian.T) / 2 + problem.decay * np.eye(len(w))


@dataclass(frozen=True)
class Interior:
    """A stationary point of (14) with 0 < theta < 1."""

    hessian: np.ndarray
    slope: np.ndarray


def interior_point(case: Case, rng: np.random.Generator) -> Interior:
    """Minimise theta C_1(w) + decay at a theta inside; then log gamma = C_1 - C_0 makes A = 0."""
    problem = teacher_problem(case, rng)
    theta = rng.uniform(0.2, 0.9, (case["gates"],))
    index = int(rng.integers(case["gates"]))
    gate = theta[index]

    def value(w: np.ndarray) -> tuple[float, np.ndarray]:
        moved = replace(problem, network=net.with_fan_out(problem.network, index, w))
        cost = net.gated_costs(moved, theta, index)[0]
        gradient = net.fan_out_gradient(moved, theta, index)
        decay = problem.decay
        return gate * cost + decay * float(w @ w) / 2, gate * gradient + decay * w

    start = net.fan_out(problem.network, index)
    found = minimize(value, start, jac=True, method="BFGS", options={"gtol": 1e-8})
    at = replace(problem, network=net.with_fan_out(problem.network, index, found.x))
    slope = net.fan_out_gradient(at, theta, index)
    second = gate * (curvature(at, theta, index) - problem.decay * np.eye(len(slope)))
    second += problem.decay * np.eye(len(slope))
    hessian = np.block([[second, slope[:, None]], [slope[None, :], np.zeros((1, 1))]])
    return Interior(hessian, slope)


def least_eigenvalue(point: Interior) -> Numbers:
    """The Hessian's least eigenvalue in (w, theta)."""
    return {"eigenvalue": float(np.linalg.eigvalsh(point.hessian).min())}


def minor_eigenvalue(point: Interior) -> Numbers:
    """The negative one of the 2 x 2 minor with the largest slope, which bounds it from above."""
    index = int(np.argmax(np.abs(point.slope)))
    diagonal, slope = point.hessian[index, index], point.slope[index]
    return {"eigenvalue": (diagonal - math.hypot(diagonal, 2 * slope)) / 2}


def gate_cases(level: Level) -> list[Case]:
    """Numbers of gates for sums over all patterns and samples."""
    counts = (1, 3) if level == "quick" else (1, 2, 3, 4, 5)
    repeats = 2 if level == "quick" else 5
    return [
        {"gates": count, "samples": 5, "repeat": index}
        for count in counts
        for index in range(repeats)
    ]


def box_cases(level: Level) -> list[Case]:
    """Up to 12 gates, where the box has 4 096 vertices."""
    counts = (1, 4, 8) if level == "quick" else (1, 2, 4, 6, 8, 10, 12)
    return [{"gates": count, "samples": 5, "starts": 5} for count in counts]


def training_cases(level: Level) -> list[Case]:
    """From a price that no block is worth to one that all are."""
    prices = (-0.2, -5.0) if level == "quick" else (-0.05, -0.2, -1.0, -5.0, -20.0)
    repeats = 1 if level == "quick" else 3
    return [
        {"gates": 3, "samples": 20, "log_gamma": price, "decay": 0.05, "repeat": index}
        for price in prices
        for index in range(repeats)
    ]


SMALL = ("network (1) with tanh", "regression with unit variance (3)")

STATEMENTS = (
    Statement(
        name="gates/equation-13",
        paper=PAPER,
        number="(13)",
        sentence=(
            "L(W, Theta) = sum_I g_I(Theta) log p(Y | X, W, Xi = I) + (lambda/2) W^T W - "
            "|Theta|_1 log gamma."
        ),
        formula="(12) = -sum_I g_I log p + (lambda/2) W^T W - |Theta|_1 log gamma",
        assumptions=SMALL,
        cases=gate_cases,
        sample=random_point,
        measure=objective_12,
        bound=objective_13,
        relation="==",
        slack=1e-12,
        printed=objective_13_printed,
        erratum="a minus is missing before log p",
    ),
    Statement(
        name="gates/theorem-3-1",
        paper=PAPER,
        number="theorem 3.1",
        sentence=(
            "The minimal values of (12) with respect to Theta are achieved at the extreme values "
            "theta^l = 0, 1 and the resulting optimal network is deterministic."
        ),
        formula=(
            "no point of the box below the least of its 2^(L-1) vertices; second differences of L "
            "along an axis vanish"
        ),
        assumptions=(*SMALL, "up to 8 gates (quick) or 12 (full), L-BFGS-B from random starts"),
        cases=box_cases,
        sample=random_point,
        measure=box_minimum,
        bound=lambda point: {"below the vertices": 1e-10, "bend": 1e-10},
    ),
    Statement(
        name="gates/case-1",
        paper=PAPER,
        number="section 3.2, case 1",
        sentence="Case 1: 0 < theta* < 1 does not produce any local minima.",
        formula=(
            "least eigenvalue of the Hessian in (w, theta) <= negative eigenvalue of the 2 x "
            "2 minor"
        ),
        assumptions=(*SMALL, "a stationary point of (14), log gamma chosen so that A(w) = 0"),
        cases=training_cases,
        sample=interior_point,
        measure=least_eigenvalue,
        bound=minor_eigenvalue,
        slack=1e-6,
    ),
    Statement(
        name="gates/optimality",
        paper=PAPER,
        number="section 3.2, cases 2 and 3, O1-O3",
        sentence=(
            "theta* = 0: w* = 0. theta* = 1: O1) Hessian of C_1 + lambda I >= 0, O2) C_1 - C_0 <= "
            "log gamma, O3) grad C_1 + lambda w = 0."
        ),
        formula="each of these at a minimum found by L-BFGS-B over (W, Theta)",
        assumptions=(*SMALL, "all patterns of 3 gates summed", "trained to gradients of 1e-6"),
        cases=training_cases,
        sample=trained,
        measure=optimality,
        bound=optimality_bounds,
        summarise=lambda rows: {
            "gates on": sum(name.endswith("C_1 - C_0") for row in rows for name in row.measured),
            "gates off": sum(name.endswith("|w|") for row in rows for name in row.measured),
        },
    ),
)
