"""The layer-gates paper in time: the flow (39), its region of attraction, and Algorithm 1.

Theorem 5.3 is about the flow of one block's w = (W2, b2) and theta with the rest held; theorems 5.1
and 5.2 are almost-sure limits of the stochastic algorithm, which a run can only illustrate.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from scipy.integrate import solve_ivp

from retrain.verify import gated_network as net
from retrain.verify import pictures
from retrain.verify.gated_network import Problem
from retrain.verify.gates import PAPER, teacher_problem
from retrain.verify.statement import Case, Level, Numbers, Row, Statement

_HORIZON = 18.0  # time units; with lambda = 1 the weights shrink by e^-18 once theta is 0
_ARRIVED = 1e-6
_ACCURACY = 1e-6
_PHASES = 100


# Theorem 5.3 ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Flow:
    """The system (39) of one block, and the constants of (41).

    Attributes
    ----------
    problem, index : Problem, int
        The network and the block.
    theta : ndarray
        The other gates' probabilities; the block's own entry is not used.
    kappa, eta : float
        |C_1 - C_0| <= kappa |w| and |w^T grad C_1| <= eta |w| for |w| <= 1.
    radius : float
        Of the region A_0 in (w, theta).
    """

    problem: Problem
    index: int
    theta: np.ndarray
    kappa: float
    eta: float
    radius: float


@dataclass(frozen=True)
class Attraction:
    """A flow with its trajectories: from inside the certified region, and from everywhere."""

    flow: Flow
    inside: list[Trajectory]
    outside: list[Trajectory]


@dataclass(frozen=True)
class Trajectory:
    """Start and end of a trajectory, how Lambda rose, and the ratios of (41) on the way."""

    size: float
    gate: float
    final_size: float
    final_gate: float
    rise: float
    difference_ratio: float
    slope_ratio: float

    @property
    def dies(self) -> bool:
        """Whether it ended at w = 0, theta = 0."""
        return self.final_size <= _ARRIVED and self.final_gate == 0


def certify(problem: Problem, theta: np.ndarray, index: int) -> Flow:
    """Compute kappa, eta and the region (40) for a given network.

    With r_0 the residual at w = 0, h = (a(W1 z), 1) the block's hidden activation and Lip the
    Lipschitz constant of what follows the block (norms multiply, |a'| <= 1, all later gates on),

        |C_1 - C_0|     <= E sum_i ( |r_0| Lip |h| + Lip^2 |h|^2 |w| / 2 ) |w|
        |w^T grad C_1|  <= E sum_i ( |r_0| Lip |h| + Lip^2 |h|^2 |w| ) |w|,

    and |w| <= 1 in A_0.
    """
    network = problem.network
    lipschitz = _norm(network.W)
    for block in network.blocks[index + 1 :]:
        lipschitz *= _norm(block.W3) + _norm(block.W2) * _norm(block.W1)
    block = network.blocks[index]
    kappa = eta = 0.0
    off = theta.copy()
    off[index] = 0.0
    for gates in net.patterns(len(theta)):
        weight = net.probability(gates, off)
        if not weight:
            continue
        values = net.activations(network, problem.x, gates)
        hidden = np.tanh(values[index] @ block.W1.T + block.b1)
        size = np.sqrt(1 + np.sum(hidden**2, axis=1))
        residual = np.linalg.norm(values[-1] - problem.y, axis=1)
        linear = float(np.sum(residual * lipschitz * size))
        square = float(np.sum((lipschitz * size) ** 2))
        kappa += weight * (linear + square / 2)
        eta += weight * (linear + square)
    return Flow(problem, index, theta, kappa, eta, min(-problem.log_gamma / (kappa + eta), 1.0))


def _norm(matrix: np.ndarray) -> float:
    return float(np.linalg.norm(matrix, 2))


def integrate(flow: Flow, w: np.ndarray, gate: float, horizon: float = _HORIZON) -> Trajectory:
    """Integrate (39) as the hybrid system it is.

    Inside 0 < theta < 1 it is an ODE in (w, theta). Where theta meets 0 or 1 and would leave, h of
    (32) holds it, and w goes on alone until A(w) changes its sign. (theta = 0 leaves w' = -lambda w
    exactly.)
    """
    problem, index, decay = flow.problem, flow.index, flow.problem.decay

    def at(w: np.ndarray) -> Problem:
        return replace(problem, network=net.with_fan_out(problem.network, index, w))

    on, off = flow.theta.copy(), flow.theta.copy()
    on[index], off[index] = 1.0, 0.0
    nothing = net.expected_cost(problem, off) + problem.log_gamma

    def height(w: np.ndarray) -> float:
        return net.expected_cost(at(w), on) - nothing

    def slope(w: np.ndarray) -> np.ndarray:
        return net.fan_out_gradient(at(w), flow.theta, index)

    def inside(_: float, state: np.ndarray) -> np.ndarray:
        w, gate = state[:-1], state[-1]
        return np.append(-gate * slope(w) - decay * w, -height(w))

    def held(_: float, w: np.ndarray, gate: float) -> np.ndarray:
        return -gate * slope(w) - decay * w if gate else -decay * w

    options: dict[str, Any] = {"method": "RK45", "rtol": _ACCURACY, "atol": _ACCURACY / 1000}
    start = (float(np.linalg.norm(w)), gate)
    states, clock = [np.append(w, gate)], 0.0
    released = False  # by A(w) = 0, whose rounded sign must not decide again
    for _ in range(_PHASES):
        w, gate = states[-1][:-1], float(states[-1][-1])
        pushed_out = (gate <= 0 and height(w) >= 0) or (gate >= 1 and height(w) <= 0)
        if pushed_out and not released:
            release = _event(lambda t, w, gate: height(w), 1 if gate else -1)
            run = solve_ivp(
                held, (clock, horizon), w, events=release, args=(round(gate),), **options
            )
            states += [np.append(column, gate) for column in run.y.T[1:]]
            released = run.status == 1
        else:
            released = False
            if gate in (0.0, 1.0):
                # A step inside, so that a return to the boundary is told from the start on it.
                states[-1] = np.append(w, abs(gate - 1e-12))
            floor = _event(lambda t, state: state[-1], -1)
            ceiling = _event(lambda t, state: state[-1] - 1, 1)
            run = solve_ivp(
                inside, (clock, horizon), states[-1], events=[floor, ceiling], **options
            )
            states += list(run.y.T[1:])
            if run.status == 1:
                states[-1][-1] = round(states[-1][-1])
        clock = float(run.t[-1])
        if clock >= horizon:
            break
    else:
        raise RuntimeError(f"the flow met its boundaries {_PHASES} times by time {clock:g}")
    path = np.array(states)
    energy = np.sum(path**2, axis=1) / 2
    ratios = np.array([_ratios(height(w) + problem.log_gamma, slope(w), w) for w in path[::5, :-1]])
    return Trajectory(
        *start,
        final_size=float(np.linalg.norm(path[-1, :-1])),
        final_gate=float(path[-1, -1]),
        rise=float(np.max(np.diff(energy), initial=0.0)),
        difference_ratio=float(ratios[:, 0].max()),
        slope_ratio=float(ratios[:, 1].max()),
    )


def _event(function: Any, direction: int) -> Any:
    """Make a terminal event that fires in one direction."""

    def event(*arguments: Any) -> float:
        return float(function(*arguments))

    event.terminal = True  # type: ignore[attr-defined]  # solve_ivp reads these off the function
    event.direction = direction  # type: ignore[attr-defined]
    return event


def _ratios(difference: float, slope: np.ndarray, w: np.ndarray) -> tuple[float, float]:
    """|C_1 - C_0| / |w| and |w^T grad C_1| / |w|; 0 at w too small to divide by."""
    size = float(np.linalg.norm(w))
    if size < _ARRIVED:
        return 0.0, 0.0
    return abs(difference) / size, abs(float(w @ slope)) / size


def attraction(
    case: Case,
    rng: np.random.Generator,
    region: Callable[[Problem, np.ndarray, int], Flow] = certify,
) -> Attraction:
    """Integrate from points of the certified region, and from a grid of growing size."""
    problem = teacher_problem({**case, "decay": 1.0}, rng)
    theta = rng.uniform(0.2, 0.8, (case["gates"],))
    flow = region(problem, theta, 0)
    count = net.fan_out(problem.network, 0).size
    inside = []
    for _ in range(case["inside"]):
        direction = rng.standard_normal(count + 1)
        direction[-1] = abs(direction[-1])
        point = 0.999 * flow.radius * direction / np.linalg.norm(direction)
        inside.append(integrate(flow, point[:-1], float(point[-1])))
    outside = []
    useful = -net.fan_out_gradient(
        replace(problem, network=net.with_fan_out(problem.network, 0, np.zeros(count))), theta, 0
    )
    useful /= np.linalg.norm(useful)  # the direction in which the block helps first
    for size in np.geomspace(flow.radius / 3, case["largest"], case["sizes"]):
        for gate in np.geomspace(flow.radius / 3, 1, case["sizes"]):
            outside.append(integrate(flow, size * useful, float(gate)))
    return Attraction(flow, inside, outside)


def attraction_measured(result: Attraction) -> Numbers:
    """What theorem 5.3 and its proof claim, over the trajectories from inside A_0."""
    inside = result.inside
    return {
        "largest final |w|": max(path.final_size for path in inside),
        "largest final theta": max(path.final_gate for path in inside),
        "largest rise of Lambda": max(path.rise for path in inside) / result.flow.radius**2,
        "|C_1 - C_0| / |w|": max(path.difference_ratio for path in inside),
        "|w^T grad C_1| / |w|": max(path.slope_ratio for path in inside),
    }


def attraction_bound(result: Attraction) -> Numbers:
    """Arrival, a falling Lambda up to the integrator's tolerance, and (41)."""
    return {
        "largest final |w|": _ARRIVED,
        "largest final theta": _ARRIVED,
        "largest rise of Lambda": 1e-6,
        "|C_1 - C_0| / |w|": result.flow.kappa,
        "|w^T grad C_1| / |w|": result.flow.eta,
    }


def attraction_details(result: Attraction) -> dict[str, Any]:
    """Starts and ends for the picture."""
    everywhere = result.inside + result.outside
    return {
        "kappa": result.flow.kappa,
        "eta": result.flow.eta,
        "radius": result.flow.radius,
        "size": [path.size for path in everywhere],
        "gate": [path.gate for path in everywhere],
        "dies": [path.dies for path in everywhere],
    }


def true_region(rows: Sequence[Row]) -> dict[str, Any]:
    """The certified radius, and the size of the nearest start that does not end at 0."""
    summary = {}
    for row in rows:
        details = row.details
        sizes = np.hypot(details["size"], details["gate"])
        alive = ~np.array(details["dies"], dtype=bool)
        key = f"log gamma {row.case['log_gamma']:g}, repeat {row.case['repeat']}"
        summary[key] = {
            "certified radius": details["radius"],
            "nearest start that survives": float(sizes[alive].min()) if alive.any() else None,
        }
    return summary


def attraction_cases(level: Level) -> list[Case]:
    """Cheap and dear blocks."""
    prices, repeats, sizes, inside = (-2.0, -10.0), 1, 5, 3
    if level == "full":
        prices, repeats, sizes, inside = (-2.0, -10.0), 2, 15, 30
    return [
        {
            "gates": 2,
            "width": 2,
            "samples": 12,
            "log_gamma": price,
            "inside": inside,
            "sizes": sizes,
            "largest": 6.0,
            "repeat": index,
        }
        for price in prices
        for index in range(repeats)
    ]


# Theorems 5.1 and 5.2 ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Run:
    """What Algorithm 1 left: the problem with its last weights, the gates, and gradients."""

    problem: Problem
    theta: np.ndarray
    first_gradient: float
    last_gradient: float
    largest_weight: float


def algorithm_1(case: Case, rng: np.random.Generator) -> Run:
    """Run Algorithm 1 with (26), batches drawn with replacement, and a(n) = a / (1 + n / n_0)^0.7.

    The exponent lies in (1/2, 1]: Robbins and Monro's conditions (31). Blocks are not removed, so
    that the sequence is that of (28)-(30) to the end.
    """
    problem = teacher_problem(case, rng)
    theta, count, batch = np.full(case["gates"], 0.7), len(problem.x), case["batch"]
    first = _gradient_size(problem, theta)
    largest = 0.0
    for step in range(case["steps"]):
        rate = case["rate"] / count / (1 + step / case["settle"]) ** 0.7
        rows = rng.integers(count, size=batch)
        gates = tuple(
            int(draw < chance) for draw, chance in zip(rng.random(len(theta)), theta, strict=True)
        )
        x, y = problem.x[rows], problem.y[rows]
        gradient, _ = net.cost_gradient(problem.network, x, y, gates)
        vector = net.to_vector(problem.network)
        move = count / batch * net.to_vector(gradient) + problem.decay * vector
        slope = np.array(
            [
                count / batch * _switched(problem, x, y, gates, index) - problem.log_gamma
                for index in range(len(theta))
            ]
        )
        vector = vector - rate * move
        theta = np.clip(theta - rate * slope, 0, 1)
        largest = max(largest, float(np.abs(vector).max()))
        problem = replace(problem, network=net.from_vector(vector, problem.network))
    return Run(problem, theta, first, _gradient_size(problem, theta), largest)


def _switched(
    problem: Problem, x: np.ndarray, y: np.ndarray, gates: tuple[int, ...], index: int
) -> float:
    """Cost of the batch with one gate on, less with it off: (26)."""
    on = (*gates[:index], 1, *gates[index + 1 :])
    off = (*gates[:index], 0, *gates[index + 1 :])
    difference = net.costs(problem.network, x, y, on) - net.costs(problem.network, x, y, off)
    return float(np.sum(difference))


def _gradient_size(problem: Problem, theta: np.ndarray) -> float:
    """Norm of the projected gradient of L: zero at a stationary point of (33)."""
    weights, slope = net.gradients(problem, theta)
    outward = ((theta <= 0) & (slope > 0)) | ((theta >= 1) & (slope < 0))
    return float(np.linalg.norm(np.append(weights, np.where(outward, 0, slope))))


def algorithm_cases(level: Level) -> list[Case]:
    """Runs from several seeds, at a price between the blocks' values."""
    repeats, steps = (2, 3000) if level == "quick" else (6, 15000)
    return [
        {
            "gates": 3,
            "width": 3,
            "samples": 40,
            "batch": 20,
            "log_gamma": -4.0,
            "decay": 0.1,
            "rate": 0.05,
            "settle": 1000,
            "steps": steps,
            "repeat": index,
        }
        for index in range(repeats)
    ]


_ALGORITHM = (
    "tanh network (1), three blocks; targets from one block and noise",
    "steps a(n) = a / (1 + n / 1000)^0.7, which meet (31)",
    "an almost-sure limit: a finite run illustrates it",
)

STATEMENTS = (
    Statement(
        name="gates/theorem-5-3",
        paper=PAPER,
        number="theorem 5.3",
        sentence=(
            "{w = 0, theta = 0} is a locally asymptotically stable equilibrium of the system (39). "
            "Moreover, A_0 = {|w|^2 + theta^2 < min((-log gamma / (kappa + eta))^2, 1)} belongs to "
            "its region of attraction."
        ),
        formula=(
            "trajectories of (39) from A_0 end at 0 with Lambda falling, and (41) holds along them"
        ),
        assumptions=(
            "one block of two, the other's gate in expectation",
            "kappa and eta from Lipschitz constants, |w| <= 1",
            "integrated as a hybrid system, relative tolerance 1e-6, lambda = 1",
        ),
        cases=attraction_cases,
        sample=attraction,
        measure=attraction_measured,
        bound=attraction_bound,
        details=attraction_details,
        summarise=true_region,
        picture=pictures.attraction,
    ),
    Statement(
        name="gates/theorem-5-1",
        paper=PAPER,
        number="theorem 5.1",
        sentence="x(n) converges almost surely to a stationary set of the ODE in H.",
        formula="projected gradient of L after the run <= 0.1 of that before it; |W| bounded",
        assumptions=_ALGORITHM,
        cases=algorithm_cases,
        sample=algorithm_1,
        measure=lambda run: {
            "gradient": run.last_gradient / run.first_gradient,
            "largest weight": run.largest_weight,
        },
        bound=lambda run: {"gradient": 0.1, "largest weight": 100.0},
        almost_sure=True,
    ),
    Statement(
        name="gates/theorem-5-2",
        paper=PAPER,
        number="theorem 5.2",
        sentence=(
            "x(n) converges almost surely to a solution (local minimum) of the minimization "
            "problem "
            "(12), representing a deterministic Neural Network."
        ),
        formula="every theta at 0 or 1 after the run",
        assumptions=_ALGORITHM,
        cases=algorithm_cases,
        sample=algorithm_1,
        measure=lambda run: {
            f"gate {index + 1}": float(min(gate, 1 - gate)) for index, gate in enumerate(run.theta)
        },
        bound=lambda run: {f"gate {index + 1}": 0.0 for index in range(len(run.theta))},
        details=lambda run: {"theta": [float(gate) for gate in run.theta]},
        almost_sure=True,
    ),
)
