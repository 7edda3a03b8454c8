"""The layer-gates paper's gradients and estimators, (19)-(22), (26), (27), and absorption (2).

Expectations over the gates and over batches of one sample are sums over all of them.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from retrain.verify import gated_network as net
from retrain.verify.gated_network import GatedNetwork, Problem
from retrain.verify.gates import PAPER, SMALL, Point, gate_cases, random_point
from retrain.verify.statement import Case, Level, Numbers, Statement

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
    return outputs_of(net.activations(instance.network, instance.x, gates)[-1])


def absorbed_output(instance: Closed) -> Numbers:
    """The same of the network with the closed blocks removed and their skips absorbed."""
    network = instance.network
    for index in sorted(instance.closed, reverse=True):
        network = net.drop_block(network, index)
    gates = [1] * len(network.blocks)
    return outputs_of(net.activations(network, instance.x, gates)[-1])


def outputs_of(values: np.ndarray) -> Numbers:
    """Name the first six outputs."""
    return {f"output {index}": float(value) for index, value in enumerate(values.ravel()[:6])}


def absorption_cases(level: Level) -> list[Case]:
    """Closed gates first, last, in a row, and all."""
    del level
    closed = ([0], [2], [3], [0, 1], [2, 3], [1, 3], [0, 1, 2, 3])
    return [{"gates": 4, "closed": gates} for gates in closed]


STATEMENTS = (
    Statement(
        name="gates/weight-gradients",
        paper=PAPER,
        number="(19)-(22), appendix A",
        sentence=(
            "delta-bar^L = y_i - yhat_i; all estimates of the gradients are unbiased single sample "
            "estimates."
        ),
        formula="E over gates and samples of (19)-(22) = dL/dW by central differences",
        assumptions=(*SMALL, "delta-bar^L = yhat - y"),
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
        assumptions=SMALL,
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
        assumptions=(*SMALL, "w shrunk by 1e-3, 1e-4, 1e-5", "hidden as wide as the input"),
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
        assumptions=(*SMALL, "w shrunk by 1e-3, 1e-4, 1e-5"),
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
