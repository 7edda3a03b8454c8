"""The layer-gates paper's statements on its hyper-prior, its optima and its estimators.

Checked on small networks (1) with tanh, where expectations over the gates are sums over all
patterns. What happens in time, theorems 5.1 to 5.3, is in `gates_dynamics`.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
from scipy.integrate import quad
from scipy.optimize import minimize, minimize_scalar

from retrain.verify import gated_network as net
from retrain.verify.gated_network import GatedNetwork, Problem
from retrain.verify.statement import Case, Level, Numbers, Statement

PAPER = "Guenter, Sideris: Concurrent Training and Layer Pruning of DNNs (2024)"


# The hyper-prior --------------------------------------------------------------------------------


def hyper_prior(pi: float, gamma: float) -> float:
    """p(pi | gamma) of section 2.2."""
    return (gamma - 1) / math.log(gamma) / (1 + (gamma - 1) * (1 - pi))


def prior_cases(level: Level) -> list[Case]:
    """Values of gamma over many decades."""
    gammas = [0.9, 0.1, 1e-4] if level == "quick" else [0.999, 0.9, 0.5, 0.1, 1e-2, 1e-4, 1e-8]
    return [{"gamma": gamma} for gamma in gammas]


def prior_mass(gamma: float) -> Numbers:
    """The integral of p(pi | gamma) over [0, 1]; the density is steep near pi = 0."""
    edges = [0.0, *(gamma * 10.0**k for k in range(-1, 9) if gamma * 10.0**k < 1), 1.0]
    total = sum(
        quad(hyper_prior, low, high, args=(gamma,), epsabs=1e-13)[0]
        for low, high in itertools.pairwise(edges)
    )
    return {"mass": total}


def negative_log_posterior(pi: float, theta: float, gamma: float) -> float:
    """J(pi): KL(Bernoulli(theta) | Bernoulli(pi)) - log p(pi | gamma), without its constant."""
    kl = theta * math.log(theta / pi) + (1 - theta) * math.log((1 - theta) / (1 - pi))
    return kl + math.log(1 + (gamma - 1) * (1 - pi))


@dataclass(frozen=True)
class Prior:
    """A pair (theta, gamma)."""

    theta: float
    gamma: float


def pair(case: Case, rng: np.random.Generator) -> Prior:
    """A random theta for the case's gamma."""
    return Prior(float(rng.uniform(0.02, 0.98)), case["gamma"])


def best_prior(prior: Prior) -> tuple[float, float]:
    """Minimise J over pi numerically: in the logit, where both ends are far away."""

    def value(logit: float) -> float:
        pi = 1 / (1 + math.exp(-logit))
        return negative_log_posterior(pi, prior.theta, prior.gamma)

    found = minimize_scalar(value, bounds=(-30, 30), method="bounded", options={"xatol": 1e-12})
    return 1 / (1 + math.exp(-found.x)), float(found.fun)


def minimiser(prior: Prior) -> Numbers:
    """The numerical argmin and, around it, the curvature's sign."""
    return {"pi": best_prior(prior)[0]}


def equation_8(prior: Prior) -> Numbers:
    """The closed form gamma theta / (1 + theta (gamma - 1))."""
    return {"pi": prior.gamma * prior.theta / (1 + prior.theta * (prior.gamma - 1))}


def minimum_and_slope(prior: Prior) -> Numbers:
    """J at its minimum, and its slope in theta by a central difference."""
    step = 1e-3
    up = best_prior(replace(prior, theta=prior.theta + step))[1]
    down = best_prior(replace(prior, theta=prior.theta - step))[1]
    return {"J": best_prior(prior)[1], "slope": (up - down) / (2 * step)}


def equation_9(prior: Prior) -> Numbers:
    """The closed form log gamma - theta log gamma, and its constant slope -log gamma."""
    log_gamma = math.log(prior.gamma)
    return {"J": (1 - prior.theta) * log_gamma, "slope": -log_gamma}


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
    """Minimise L over W at fixed gates, by L-BFGS."""

    def value(vector: np.ndarray) -> tuple[float, np.ndarray]:
        moved = replace(problem, network=net.from_vector(vector, problem.network))
        return net.objective(moved, theta), net.gradients(moved, theta)[0]

    found = minimize(
        value,
        net.to_vector(problem.network),
        jac=True,
        method="L-BFGS-B",
        options={"maxiter": iterations, "maxfun": 2 * iterations, "ftol": 1e-16, "gtol": 1e-9},
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


# Gradients and estimators -----------------------------------------------------------------------


def weight_gradient(point: Point) -> Numbers:
    """dL/dW of some random weights, by central differences of L."""
    problem, vector = point.problem, net.to_vector(point.problem.network)
    step, numbers = 1e-5, {}
    for entry in _entries(vector):
        sides = []
        for move in (step, -step):
            moved = vector.copy()
            moved[entry] += move
            at = replace(problem, network=net.from_vector(moved, problem.network))
            sides.append(net.objective(at, point.theta))
        numbers[f"weight {entry}"] = (sides[0] - sides[1]) / (2 * step)
    return numbers


def expected_estimate(point: Point, sign: float = 1.0) -> Numbers:
    """E of the estimates (19)-(22) over the gates and over batches of one sample, N/B = N."""
    problem, count = point.problem, len(point.problem.x)
    total = np.zeros_like(net.to_vector(problem.network))
    for gates in net.patterns(len(point.theta)):
        share = net.probability(gates, point.theta)
        for i in range(count):
            gradient, _ = net.cost_gradient(
                problem.network, problem.x[i : i + 1], problem.y[i : i + 1], gates, sign=sign
            )
            total += share / count * count * net.to_vector(gradient)
    vector = net.to_vector(problem.network)
    total += problem.decay * vector
    return {f"weight {entry}": float(total[entry]) for entry in _entries(vector)}


def _entries(vector: np.ndarray) -> list[int]:
    """Every seventh weight: some of every matrix."""
    return list(range(0, vector.size, 7))


def cost_difference(point: Point) -> Numbers:
    """C_1 - C_0 of the gate."""
    on, off = net.gated_costs(point.problem, point.theta, point.index)
    return {"C_1 - C_0": on - off}


def expected_difference(point: Point) -> Numbers:
    """E of (26) over all patterns of the gates and all batches of one sample."""
    problem, index = point.problem, point.index
    count, total = len(problem.x), 0.0
    for gates in net.patterns(len(point.theta)):
        share = net.probability(gates, point.theta)
        for i in range(count):
            x, y = problem.x[i : i + 1], problem.y[i : i + 1]
            on = (*gates[:index], 1, *gates[index + 1 :])
            off = (*gates[:index], 0, *gates[index + 1 :])
            estimate = count * float(
                np.sum(net.costs(problem.network, x, y, on))
                - np.sum(net.costs(problem.network, x, y, off))
            )
            total += share / count * estimate
    return {"C_1 - C_0": total}


_SHRINK = (1e-3, 1e-4, 1e-5)


def _shrunk(point: Point, factor: float) -> Problem:
    """The problem with the gated block's W2 and b2 shrunk."""
    network = point.problem.network
    small = net.with_fan_out(network, point.index, factor * net.fan_out(network, point.index))
    return replace(point.problem, network=small)


def difference_at_small_weights(point: Point) -> Numbers:
    """(C_1 - C_0) / factor, w shrunk by the factor."""
    numbers = {}
    for factor in _SHRINK:
        on, off = net.gated_costs(_shrunk(point, factor), point.theta, point.index)
        numbers[f"w x {factor:g}"] = (on - off) / factor
    return numbers


def straight_through(point: Point, *, hidden: bool = True, flipped: bool = False) -> Numbers:
    """E of (27) / factor over all patterns, w shrunk by the factor.

    `hidden`: the factor after W2 is a(W1 z + b1), otherwise z, as printed. `flipped`: the display
    before (27), whose Delta xi = -1 turns the sign where the gate is on.
    """
    numbers = {}
    for factor in _SHRINK:
        problem, total = _shrunk(point, factor), 0.0
        block = problem.network.blocks[point.index]
        for gates in net.patterns(len(point.theta)):
            share = net.probability(gates, point.theta)
            z = net.activations(problem.network, problem.x, gates)[point.index]
            _, deltas = net.cost_gradient(problem.network, problem.x, problem.y, gates)
            after = np.tanh(z @ block.W1.T + block.b1) if hidden else z
            estimate = float(np.sum(deltas[point.index] * (after @ block.W2.T + block.b2)))
            if flipped and gates[point.index]:
                estimate = -estimate
            total += share * estimate
        numbers[f"w x {factor:g}"] = total / factor
    return numbers


# Absorption -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Closed:
    """A network, some inputs, and the blocks whose gates are 0."""

    network: GatedNetwork
    x: np.ndarray
    closed: tuple[int, ...]


def closed_network(case: Case, rng: np.random.Generator) -> Closed:
    """A random network with the case's gates closed."""
    network = net.random_network(case["gates"], 4, rng, hidden=6)
    return Closed(network, rng.standard_normal((20, 4)), tuple(case["closed"]))


def gated_output(instance: Closed) -> Numbers:
    """Some outputs of the gated network."""
    gates = [0 if index in instance.closed else 1 for index in range(len(instance.network.blocks))]
    return _outputs(net.activations(instance.network, instance.x, gates)[-1])


def absorbed_output(instance: Closed) -> Numbers:
    """The same of the network with the closed blocks removed and their skips absorbed."""
    network = instance.network
    for index in sorted(instance.closed, reverse=True):
        network = net.drop_block(network, index)
    gates = [1] * len(network.blocks)
    return _outputs(net.activations(network, instance.x, gates)[-1])


def _outputs(values: np.ndarray) -> Numbers:
    return {f"output {index}": float(value) for index, value in enumerate(values.ravel()[:6])}


def absorption_cases(level: Level) -> list[Case]:
    """Closed gates first, last, in a row, and all."""
    del level
    closed = ([0], [2], [3], [0, 1], [2, 3], [1, 3], [0, 1, 2, 3])
    return [{"gates": 4, "closed": gates} for gates in closed]


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


_SMALL = ("network (1) with tanh", "regression with unit variance (3)")

STATEMENTS = (
    Statement(
        name="gates/hyper-prior",
        paper=PAPER,
        number="section 2.2",
        sentence=(
            "p(pi | gamma) = (gamma - 1) / log gamma / (1 + (gamma - 1)(1 - pi)), 0 < gamma < 1."
        ),
        formula="integral of p(pi | gamma) over 0 <= pi <= 1 is 1",
        assumptions=("adaptive quadrature over pieces",),
        cases=prior_cases,
        sample=lambda case, rng: case["gamma"],
        measure=prior_mass,
        bound=lambda gamma: {"mass": 1.0},
        relation="==",
        slack=1e-9,
    ),
    Statement(
        name="gates/equation-8",
        paper=PAPER,
        number="(8)",
        sentence="pi* = arg min J(pi) = gamma theta / (1 + theta (gamma - 1)).",
        formula="numerical argmin of J = gamma theta / (1 + theta (gamma - 1))",
        assumptions=("0 < theta < 1",),
        cases=prior_cases,
        sample=pair,
        measure=minimiser,
        bound=equation_8,
        relation="==",
        slack=1e-5,
    ),
    Statement(
        name="gates/equation-9",
        paper=PAPER,
        number="(9) and the display after it",
        sentence=(
            "J(pi*(theta)) = log gamma - theta log gamma ... the flattening hyper-prior "
            "results in a "
            "constant term in the gradient of the cost function with respect to Theta."
        ),
        formula="min J = (1 - theta) log gamma, d min J / d theta = -log gamma",
        assumptions=("0 < theta < 1", "central differences of the numerical minimum"),
        cases=prior_cases,
        sample=pair,
        measure=minimum_and_slope,
        bound=equation_9,
        relation="==",
        slack=1e-6,
    ),
    Statement(
        name="gates/equation-13",
        paper=PAPER,
        number="(13)",
        sentence=(
            "L(W, Theta) = sum_I g_I(Theta) log p(Y | X, W, Xi = I) + (lambda/2) W^T W - "
            "|Theta|_1 log gamma."
        ),
        formula="(12) = -sum_I g_I log p + (lambda/2) W^T W - |Theta|_1 log gamma",
        assumptions=_SMALL,
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
        assumptions=(*_SMALL, "up to 8 gates (quick) or 12 (full), L-BFGS-B from random starts"),
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
        assumptions=(*_SMALL, "a stationary point of (14), log gamma chosen so that A(w) = 0"),
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
        assumptions=(*_SMALL, "all patterns of 3 gates summed", "trained to gradients of 1e-6"),
        cases=training_cases,
        sample=trained,
        measure=optimality,
        bound=optimality_bounds,
        summarise=lambda rows: {
            "gates on": sum(name.endswith("C_1 - C_0") for row in rows for name in row.measured),
            "gates off": sum(name.endswith("|w|") for row in rows for name in row.measured),
        },
    ),
    Statement(
        name="gates/weight-gradients",
        paper=PAPER,
        number="(19)-(22), appendix A",
        sentence=(
            "delta-bar^L = y_i - yhat_i; all estimates of the gradients are unbiased single sample "
            "estimates."
        ),
        formula="E over gates and samples of (19)-(22) = dL/dW by central differences",
        assumptions=(*_SMALL, "delta-bar^L = yhat - y"),
        cases=gate_cases,
        sample=random_point,
        measure=weight_gradient,
        bound=expected_estimate,
        relation="==",
        slack=1e-6,
        floor=1e-2,
        printed=lambda point: expected_estimate(point, sign=-1.0),
        erratum="the output's delta is yhat - y",
    ),
    Statement(
        name="gates/equation-26",
        paper=PAPER,
        number="(26)",
        sentence=(
            "This unbiased estimator ... C_1 - C_0 ~ N/B sum_i log(p(.., xi=0) / p(.., xi=1))."
        ),
        formula="E of (26) over all gates and all batches of one sample = C_1 - C_0",
        assumptions=_SMALL,
        cases=gate_cases,
        sample=random_point,
        measure=expected_difference,
        bound=cost_difference,
        relation="==",
        slack=1e-10,
    ),
    Statement(
        name="gates/equation-27",
        paper=PAPER,
        number="(27)",
        sentence=(
            "C_1 - C_0 ~ N/B sum_i delta-bar_i W2 z_i. It is biased ..., for W2 -> 0 this "
            "estimator "
            "is asymptotically unbiased."
        ),
        formula="E of N/B sum_i delta-bar_i (W2 a(W1 z_i)) -> C_1 - C_0, relative, as w -> 0",
        assumptions=(*_SMALL, "w shrunk by 1e-3, 1e-4, 1e-5", "hidden as wide as the input"),
        cases=gate_cases,
        sample=random_point,
        measure=difference_at_small_weights,
        bound=straight_through,
        relation="==",
        slack=2e-2,
        floor=0.1,
        printed=lambda point: straight_through(point, hidden=False),
        erratum=(
            "the factor after W2 is the hidden activation a(W1 z), needed with the gate off too"
        ),
    ),
    Statement(
        name="gates/equation-27-sign",
        paper=PAPER,
        number="the display before (27)",
        sentence="C_1 - C_0 ~ Delta xi dC/dxi, where for xi = 0, Delta xi = 1 and for xi = 1, -1.",
        formula="E of dC/dxi -> C_1 - C_0, relative, as w -> 0, whether the gate is on or off",
        assumptions=(*_SMALL, "w shrunk by 1e-3, 1e-4, 1e-5"),
        cases=gate_cases,
        sample=random_point,
        measure=difference_at_small_weights,
        bound=straight_through,
        relation="==",
        slack=2e-2,
        floor=0.1,
        printed=lambda point: straight_through(point, flipped=True),
        erratum=(
            "with Delta xi = -1 the gate that is on estimates C_0 - C_1; (27) itself has no sign"
        ),
    ),
    Statement(
        name="gates/absorption",
        paper=PAPER,
        number="(2)",
        sentence=(
            "By replacing W1 <- W1 W3 and W3 <- W3 W3, layer l - 1 is eliminated from the network."
        ),
        formula="output of the gated network with gates at 0 = output of the smaller network",
        assumptions=("the last block's skip goes into the output layer, W <- W W3",),
        cases=absorption_cases,
        sample=closed_network,
        measure=gated_output,
        bound=absorbed_output,
        relation="==",
        slack=1e-12,
        floor=1.0,
    ),
)
