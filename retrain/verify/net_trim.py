"""Net-Trim's statements on layers and networks: proposition 1, theorems 1 and 2, feasibility.

The networks are random and link-normalised (section 2). Algorithms 1 and 2 are written out here
over cvxpy, which solves to high accuracy; some cases run the package's own Net-Trim instead.
Statements on sparse recovery are in `net_trim_recovery`.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from retrain.bounds import check_link_normalised, output_bound, theorem_1, theorem_2
from retrain.chain import Chain, ChainStream, forward, link_normalise, response
from retrain.methods.net_trim import NetTrimOptions, net_trim
from retrain.verify import pictures
from retrain.verify.statement import Case, Level, Numbers, Statement
from solvers import ElasticNet, Penalty, solve_admm, solve_cvxpy, solve_osqp, trim_program
from solvers.program import RegularisedProgram

PAPER = "Aghasi, Abdi, Nguyen, Romberg: Net-Trim (2017)"
# The solvers meet ball and ceilings to 1e-5, relative to the radius and to the targets.
_VIOLATION = 1e-5
_SLACK = 1e-4


@dataclass(frozen=True)
class Retrained:
    """A link-normalised network, the same retrained, and what the theorems take from the run."""

    dense: Chain
    new: Chain
    inputs: np.ndarray
    epsilons: tuple[float, ...]
    inflation: float


def random_chain(
    widths: Sequence[int], rng: np.random.Generator, *, bias: bool, last: str = "relu"
) -> Chain:
    """Draw a network with Gaussian weights, a third of them small, and Gaussian biases."""
    weights = []
    for n_in, n_out in itertools.pairwise(widths):
        weight = rng.standard_normal((n_in + bias, n_out)) / math.sqrt(n_in)
        weight[:n_in] *= np.where(rng.random((n_in, n_out)) < 1 / 3, 0.05, 1.0)
        weights.append(weight)
    follows: tuple[Any, ...] = ("relu",) * (len(weights) - 1) + (last,)
    return Chain(tuple(weights), (bias,) * len(weights), follows)


def solve_parallel(chain: Chain, inputs: np.ndarray, radii: Sequence[float]) -> Retrained:
    """Algorithm 1: solve (5) for every layer, by cvxpy."""
    upstream, new = inputs, []
    for index, radius in enumerate(radii):
        new.append(_trim(chain, index, upstream, forward(chain, inputs)[index], None, radius))
        upstream = forward(chain, inputs)[index]
    return Retrained(chain, replace(chain, weights=tuple(new)), inputs, tuple(radii), 1.0)


def solve_cascade(chain: Chain, inputs: np.ndarray, radius: float, inflation: float) -> Retrained:
    """Algorithm 2: solve (4) for the first layer, then (6) with (7), by cvxpy."""
    retrained, radii = chain, [radius]
    for index, targets in enumerate(forward(chain, inputs)):
        upstream, ceilings = inputs, None
        if index:
            upstream = forward(retrained, inputs)[index - 1]
            old = response(chain, index, upstream)
            active = np.full(targets.shape, True)
            if chain.follows[index] == "relu":
                active, ceilings = targets > 0, old
            radii.append(math.sqrt(inflation) * float(np.linalg.norm((old - targets)[active])))
        weight = _trim(chain, index, upstream, targets, ceilings, radii[-1])
        weights = [*retrained.weights[:index], weight, *retrained.weights[index + 1 :]]
        retrained = replace(retrained, weights=tuple(weights))
    return Retrained(chain, retrained, inputs, tuple(radii), inflation)


def _trim(
    chain: Chain,
    index: int,
    upstream: np.ndarray,
    targets: np.ndarray,
    ceilings: np.ndarray | None,
    radius: float,
) -> np.ndarray:
    """TRIM(X, Y, V, epsilon) of the paper.

    Raises
    ------
    RuntimeError
        If the answer is not certified: the theorems speak of solutions.
    """
    bias = chain.biases[index]
    # Responses shrink from layer to layer and Clarabel's tolerances are absolute: the program of
    # (X / a, Y / b), of which a bias column has its own a, has the solution a W / b.
    b = float(np.sqrt(np.mean(targets**2))) or 1.0
    a = np.full((upstream.shape[1] + bias, 1), float(np.sqrt(np.mean(upstream**2))) or 1.0)
    if bias:
        upstream = np.concatenate([upstream, np.ones((len(upstream), 1))], axis=1)
        a[-1] = 1.0
    program = trim_program(
        upstream / a.T,
        targets / b,
        epsilon=radius / b,
        activation=chain.follows[index],
        ceilings=None if ceilings is None else ceilings / b,
        free_rows=(upstream.shape[1] - 1,) if bias else (),
        old_weight=chain.weights[index] * a / b,
    )
    result = solve_cvxpy(program, tolerance=1e-2, violation_tolerance=_VIOLATION)
    if not result.certified.all():
        raise RuntimeError(f"layer {index} was not solved: {result.status.value}")
    return np.asarray(result.weight) * b / a


def package_run(chain: Chain, inputs: np.ndarray, options: NetTrimOptions) -> Retrained:
    """Retrain by the package's own Net-Trim and ADMM.

    Raises
    ------
    RuntimeError
        If a layer is not certified.
    """
    stream = ChainStream(chain, inputs)
    reports = {result.report.name: result.report for result in net_trim(stream, options)}
    for report in reports.values():
        if not report.certified:
            raise RuntimeError(f"layer {report.name} was not solved: {report.status}")
    epsilons = tuple(float(reports[str(index)].details["epsilon"]) for index in range(len(chain)))
    return Retrained(chain, stream.chain, inputs, epsilons, options.inflation)


def _options(scheme: Any, **settings: Any) -> NetTrimOptions:
    return NetTrimOptions(
        scheme=scheme,
        tolerance=2e-2,
        violation_tolerance=_VIOLATION,
        max_iterations=20_000,
        **settings,
    )


def network_cases(level: Level) -> list[Case]:
    """Depths 2 to 4 (quick) or 6 (full), with and without biases."""
    quick = [
        {"depth": 2, "width": 12, "samples": 60, "bias": False, "radius": 0.1, "solver": "admm"},
        {"depth": 3, "width": 15, "samples": 80, "bias": True, "radius": 0.05, "solver": "cvxpy"},
        {"depth": 4, "width": 10, "samples": 60, "bias": False, "radius": 0.2, "solver": "cvxpy"},
    ]
    if level == "quick":
        return quick
    return quick + [
        {
            "depth": depth,
            "width": width,
            "samples": 4 * width,
            "bias": bias,
            "radius": radius,
            "solver": "cvxpy",
        }
        for depth, width in ((2, 30), (3, 25), (5, 20), (6, 15))
        for bias in (False, True)
        for radius in (0.02, 0.1, 0.3)
    ]


def _network(case: Case, rng: np.random.Generator, last: str) -> tuple[Chain, np.ndarray]:
    widths = [case["width"]] * (case["depth"] + 1)
    chain = random_chain(widths, rng, bias=case["bias"], last=last)
    inputs = np.maximum(rng.standard_normal((case["samples"], case["width"])), 0)
    return link_normalise(chain)[0], inputs


def parallel(case: Case, rng: np.random.Generator) -> Retrained:
    """Algorithm 1 with the radii epsilon_l = radius |Y^(l)|_F."""
    chain, inputs = _network(case, rng, case.get("last", "relu"))
    if case["solver"] == "admm":
        return package_run(chain, inputs, _options("parallel", relative_epsilon=case["radius"]))
    sizes = [float(np.linalg.norm(outcome)) for outcome in forward(chain, inputs)]
    return solve_parallel(chain, inputs, [case["radius"] * size for size in sizes])


def parallel_equal(case: Case, rng: np.random.Generator) -> Retrained:
    """Algorithm 1 with one radius for all layers, between what the first and the last can bear."""
    chain, inputs = _network(case, rng, "relu")
    outcomes = forward(chain, inputs)
    first, last = float(np.linalg.norm(outcomes[0])), float(np.linalg.norm(outcomes[-1]))
    # Not below what a solver can resolve in the first layer, where responses are the largest.
    radius = max(case["radius"] * math.sqrt(first * last), 0.01 * first)
    if case["solver"] == "admm":
        settings = _options("parallel", epsilon=radius, relative_epsilon=None)
        return package_run(chain, inputs, settings)
    return solve_parallel(chain, inputs, [radius] * len(chain))


def cascade(case: Case, rng: np.random.Generator) -> Retrained:
    """Algorithm 2."""
    chain, inputs = _network(case, rng, case.get("last", "relu"))
    inflation = case.get("inflation", 1.1)
    if case["solver"] == "admm":
        settings = _options("cascade", relative_epsilon=case["radius"], inflation=inflation)
        return package_run(chain, inputs, settings)
    radius = case["radius"] * float(np.linalg.norm(forward(chain, inputs)[0]))
    return solve_cascade(chain, inputs, radius, inflation)


def deviations(run: Retrained) -> list[float]:
    """|Yhat^(l) - Y^(l)|_F of every layer."""
    pairs = zip(forward(run.new, run.inputs), forward(run.dense, run.inputs), strict=True)
    return [float(np.linalg.norm(new - old)) for new, old in pairs]


def measured_layers(run: Retrained) -> Numbers:
    """Every layer's deviation, and every layer's |What|_1, the premise of theorem 1's proof."""
    numbers = {f"layer {index + 1}": value for index, value in enumerate(deviations(run))}
    return {**numbers, **link_norms(run.new)}


def link_norms(chain: Chain) -> Numbers:
    """Entry-wise |W_l|_1 without bias rows."""
    return {
        f"|W_{index + 1}|_1": float(np.abs(weight[:-1] if bias else weight).sum())
        for index, (weight, bias) in enumerate(zip(chain.weights, chain.biases, strict=True))
    }


def _per_layer(run: Retrained, values: np.ndarray) -> Numbers:
    numbers = {f"layer {index + 1}": float(value) for index, value in enumerate(values)}
    return {**numbers, **dict.fromkeys(link_norms(run.new), 1.0)}


def bound_theorem_1(run: Retrained) -> Numbers:
    """Sum of the epsilon_j up to the layer."""
    return _per_layer(run, theorem_1(run.epsilons))


def bound_theorem_2(run: Retrained) -> Numbers:
    """epsilon_1 times the root of the product of the inflations up to the layer."""
    inflations = [run.inflation] * (len(run.dense) - 1)
    return _per_layer(run, theorem_2(run.epsilons[0], inflations))


def _output(run: Retrained) -> Numbers:
    return {"output": deviations(run)[-1]}


def _last(case: Case) -> Case:
    return {**case, "last": "linear"}


# Proposition 1 ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class OneLayer:
    """A ReLU layer, its targets and its new weights."""

    inputs: np.ndarray
    targets: np.ndarray
    new_weight: np.ndarray
    epsilon: float


def one_layer(case: Case, rng: np.random.Generator) -> OneLayer:
    """Solve (4) for one random layer; the radius is relative to |Y|_F."""
    inputs = rng.standard_normal((case["samples"], case["n_in"]))
    if case["rectified"]:
        inputs = np.maximum(inputs, 0)
    weight = rng.standard_normal((case["n_in"], case["n_out"]))
    targets = np.maximum(inputs @ weight, 0)
    epsilon = case["radius"] * float(np.linalg.norm(targets))
    program = trim_program(inputs, targets, epsilon=epsilon, old_weight=weight)
    if case["solver"] == "cvxpy":
        result = solve_cvxpy(program, violation_tolerance=_VIOLATION)
    else:
        result = solve_admm(
            program, tolerance=1e-2, violation_tolerance=_VIOLATION, max_iterations=100_000
        )
    if not result.certified.all():
        raise RuntimeError(f"(4) was not solved: {result.status.value}")
    return OneLayer(inputs, targets, result.weight, epsilon)


def layer_cases(level: Level) -> list[Case]:
    """Shapes, inputs of both signs and rectified, radii, and two solvers."""
    shapes = ((60, 15, 8), (20, 30, 5), (100, 10, 3))
    radii = (0.02, 0.2) if level == "quick" else (0.01, 0.05, 0.2, 0.5, 0.9)
    return [
        {
            "samples": samples,
            "n_in": n_in,
            "n_out": n_out,
            "rectified": rectified,
            "radius": radius,
            "solver": solver,
        }
        for samples, n_in, n_out in shapes
        for rectified in (False, True)
        for radius in radii
        for solver in ("admm", "cvxpy")
    ]


def layer_deviation(layer: OneLayer) -> Numbers:
    """|max(X What, 0) - Y|_F."""
    difference = np.maximum(layer.inputs @ layer.new_weight, 0) - layer.targets
    return {"deviation": float(np.linalg.norm(difference))}


# Feasibility of the cascade's programs ----------------------------------------------------------


@dataclass(frozen=True)
class CascadeLayer:
    """Data of (6) for the last layer: retrained inputs, targets, old weights, gamma = 1."""

    inputs: np.ndarray
    targets: np.ndarray
    old_weight: np.ndarray
    epsilon: float


def cascade_layer(case: Case, rng: np.random.Generator) -> CascadeLayer:
    """The last layer after the others have been retrained by the cascade."""
    run = cascade(case, rng)
    last = len(run.dense) - 1
    upstream = forward(run.new, run.inputs)[last - 1]
    targets = forward(run.dense, run.inputs)[last]
    dtype = np.dtype(case["dtype"])
    inputs, targets = upstream.astype(dtype), targets.astype(dtype)
    if run.dense.biases[last]:
        inputs = np.concatenate([inputs, np.ones((len(inputs), 1), dtype)], axis=1)
    old = run.dense.weights[last].astype(dtype)
    residual = np.where(targets > 0, inputs @ old - targets, 0)
    return CascadeLayer(inputs, targets, old, float(np.linalg.norm(residual)))


def old_weights_violation(layer: CascadeLayer) -> Numbers:
    """Violations of (6) by the old weights, as the program itself measures them."""
    program = trim_program(
        layer.inputs,
        layer.targets,
        epsilon=layer.epsilon,
        ceilings=layer.inputs @ layer.old_weight,
    )
    certificate = program.certificate(layer.old_weight, np.zeros_like(layer.targets))
    return {
        "ball": float(certificate.ball_violation),
        "ceilings": float(certificate.ceiling_violation),
    }


def rounding(layer: CascadeLayer) -> Numbers:
    """2e-7 in float32; 1e-12 in float64."""
    limit = 2e-7 if layer.inputs.dtype == np.float32 else 1e-12
    return {"ball": limit, "ceilings": limit}


def merged_layer(case: Case, rng: np.random.Generator) -> CascadeLayer:
    """A second layer that tells its samples apart by a unit that the first layer's retraining lost.

    h = x with x_1 from 1 to 2 and x_2 either 0 or 0.1; y = max(h_1 - 30 h_2, 0). Program (4) for
    the first layer drops the small h_2, and what remains of it cannot be zero for one half of the
    samples and fit the other, while the old weights still fit.
    """
    count = case["samples"]
    marked = np.arange(count) % 2 == 1
    inputs = np.stack([1 + rng.random(count), 0.1 * marked], axis=1)
    chain = Chain((np.eye(2), np.array([[1.0], [-30.0]])), follows=("relu", "relu"))
    chain = link_normalise(chain)[0]
    hidden, targets = forward(chain, inputs)
    radius = case["radius"] * float(np.linalg.norm(hidden[:, 1]))
    new = _trim(chain, 0, inputs, hidden, None, radius)
    upstream = np.maximum(inputs @ new, 0)
    old = chain.weights[1]
    residual = np.where(targets > 0, upstream @ old - targets, 0)
    return CascadeLayer(upstream, targets, old, float(np.linalg.norm(residual)))


def smallest_residual(layer: CascadeLayer) -> Numbers:
    """The least |XU - Y| on Omega under zero ceilings, V = 0: more than epsilon is infeasible."""
    import cvxpy as cp

    active = layer.targets[:, 0] > 0
    weight = cp.Variable(layer.inputs.shape[1])
    scale = float(np.linalg.norm(layer.targets))
    fitted, target = layer.inputs[active] / scale, layer.targets[active, 0] / scale
    problem = cp.Problem(
        cp.Minimize(cp.norm(fitted @ weight - target)),
        [layer.inputs[~active] / scale @ weight <= 0],
    )
    problem.solve(solver="CLARABEL")
    return {"least residual": scale * float(problem.value)}


def cascade_cases(level: Level) -> list[Case]:
    """Cascades of both precisions."""
    chosen = [case for case in network_cases(level) if case["radius"] >= 0.1]
    return [{**case, "dtype": dtype} for case in chosen for dtype in ("float64", "float32")]


# Section 2 and the premise of theorem 1 ---------------------------------------------------------


@dataclass(frozen=True)
class Normalised:
    """A network with biases, its normalisers, and its input."""

    chain: Chain
    scales: np.ndarray
    inputs: np.ndarray


def normalised(case: Case, rng: np.random.Generator) -> Normalised:
    """A random network with its weights' norms |W_l|_1."""
    chain = random_chain([case["width"]] * (case["depth"] + 1), rng, bias=True)
    inputs = rng.standard_normal((case["samples"], case["width"]))
    return Normalised(chain, link_normalise(chain)[1], inputs)


def normalised_outcomes(network: Normalised) -> Numbers:
    """|Y'^(l)|_F of the normalised network."""
    outcomes = forward(link_normalise(network.chain)[0], network.inputs)
    return {f"layer {i + 1}": float(np.linalg.norm(y)) for i, y in enumerate(outcomes)}


def divided_outcomes(network: Normalised) -> Numbers:
    """|Y^(l)|_F / (s_1 ... s_l)."""
    outcomes, products = forward(network.chain, network.inputs), np.cumprod(network.scales)
    return {
        f"layer {i + 1}": float(np.linalg.norm(y)) / products[i] for i, y in enumerate(outcomes)
    }


def divided_as_printed(network: Normalised) -> Numbers:
    """|Y^(l+1)|_F / (s_0 ... s_l) with s_0 = 1, as there is no layer 0."""
    outcomes = forward(network.chain, network.inputs)
    products = np.cumprod([1.0, *network.scales])
    return {
        f"layer {i + 1}": float(np.linalg.norm(y)) / products[i] for i, y in enumerate(outcomes)
    }


def bias_outcomes(network: Normalised) -> Numbers:
    """As `divided_outcomes`, of layers rebuilt with b'_l = b_l / (s_1 ... s_l)."""
    return _with_bias_scales(network, np.cumprod(network.scales))


def bias_as_weights(network: Normalised) -> Numbers:
    """The same with the bias divided like its layer's weights, b_l / s_l."""
    return _with_bias_scales(network, network.scales)


def _with_bias_scales(network: Normalised, divisors: np.ndarray) -> Numbers:
    values, numbers = network.inputs, {}
    for index, weight in enumerate(network.chain.weights):
        rows, bias = weight[:-1] / network.scales[index], weight[-1] / divisors[index]
        values = np.maximum(values @ rows + bias, 0)
        numbers[f"layer {index + 1}"] = float(np.linalg.norm(values))
    return numbers


def premise_broken(case: Case, rng: np.random.Generator) -> Retrained:
    """A network whose retrained layer has |What|_1 > 1, because its bias is under the penalty.

    y = h_1 + 3 with a hidden unit h_2 = 2 everywhere: a weight of 1.5 on h_2 gives the bias's 3 at
    half the price, and amplifies the error of layer 1 in h_2. There the error is, since the small
    input behind h_2 makes it cheap.
    """
    samples = case["samples"]
    inputs = np.stack([40 * (1 + rng.random(samples)), np.full(samples, 4.0)], axis=1)
    first = np.array([[0.5, 0.0], [0.0, 0.5], [0.0, 0.0]])
    second = np.array([[1.0], [0.0], [3.0]])
    chain = Chain((first, second), (True, True), ("relu", "relu"))
    stream = ChainStream(chain, inputs)
    epsilons = []
    for name, radius in (("0", case["radius"]), ("1", 1e-3)):
        outcome = forward(chain, inputs)[int(name)]
        options = _options(
            "parallel",
            epsilon=radius * float(np.linalg.norm(outcome)),
            relative_epsilon=None,
            penalise_bias=case["penalise_bias"],
        )
        (result,) = net_trim(stream, options, layers=[name])
        if not result.report.certified:
            raise RuntimeError(f"layer {name} was not solved: {result.report.status}")
        epsilons.append(float(result.report.details["epsilon"]))
    return Retrained(chain, stream.chain, inputs, tuple(epsilons), 1.0)


def spectral_bound(run: Retrained) -> Numbers:
    """The package's bound, sum of e_j prod_{k>j} |What_k|_2, which needs no premise."""
    stream = ChainStream(run.dense, run.inputs)
    for index, weight in enumerate(run.new.weights):
        stream.commit(str(index), weight)
    bound = output_bound(stream).bound
    assert bound is not None
    return {"output": bound}


def _sum_of_radii(run: Retrained) -> Numbers:
    return {"output": float(theorem_1(run.epsilons)[-1])}


def elastic_weight(case: Case, rng: np.random.Generator) -> np.ndarray:
    """PAPERS' instance: inputs x and x / 2, W = (1, 0), a heavy ridge: What = (0.8, 0.4)."""
    x = np.abs(rng.standard_normal(case["samples"]))
    inputs = np.stack([x, x / 2], axis=1)
    penalty: Penalty = ElasticNet(case["ridge"])
    program = trim_program(
        inputs,
        x[:, None],
        epsilon=1e-6 * float(np.linalg.norm(x)),
        penalty=penalty,
        old_weight=np.array([[1.0], [0.0]]),
    )
    return solve_cvxpy(program).weight


def elastic_norms(weight: np.ndarray) -> Numbers:
    """|What|_F: what the conclusion of theorem 1 really needs below 1."""
    return {"|What|": float(np.linalg.norm(weight))}


# The paper's QP ---------------------------------------------------------------------------------


def regularised_layer(case: Case, rng: np.random.Generator) -> RegularisedProgram:
    """A random layer's program (11)."""
    inputs = np.maximum(rng.standard_normal((case["samples"], case["n_in"])), 0)
    weight = rng.standard_normal((case["n_in"], 3))
    program = trim_program(
        inputs, np.maximum(inputs @ weight, 0), fit_weight=case["fit_weight"], old_weight=weight
    )
    assert isinstance(program, RegularisedProgram)
    return program


def objective_of_14(program: RegularisedProgram) -> Numbers:
    """Objective of (11) at OSQP's solutions of (14)."""
    result = solve_osqp(program, tolerance=1e-7, max_iterations=200_000)
    objective = program.objective(result.weight)
    return {f"unit {unit}": float(value) for unit, value in enumerate(objective)}


def objective_of_11(program: RegularisedProgram) -> Numbers:
    """Objective of (11), solved as written by cvxpy."""
    objective = program.objective(solve_cvxpy(program).weight)
    return {f"unit {unit}": float(value) for unit, value in enumerate(objective)}


def qp_cases(level: Level) -> list[Case]:
    """Fit weights over four decades."""
    weights = (0.1, 10.0) if level == "quick" else (0.01, 0.1, 1.0, 10.0, 100.0)
    return [{"samples": 50, "n_in": 12, "fit_weight": weight} for weight in weights]


_NETWORK = (
    "link-normalised network, |W_l|_1 = 1",
    "programs solved and certified: gap 2e-2, violations 1e-5",
    "biases, where there are any, free of penalty",
)
_THEOREM_1 = (
    "Form the retrained network by solving the convex programs (5), with eps = eps_l at each "
    "layer. "
    "Then |Yhat^(l) - Y^(l)|_F <= sum_{j<=l} eps_j."
)
_THEOREM_2 = (
    "Form the retrained network by solving (5) for the first layer and (6) for the subsequent "
    "layers with eps_l as in (7). Then |Yhat^(l) - Y^(l)|_F <= eps_1 (prod_{j=2..l} gamma_j)^(1/2)."
)

_theorem_1 = Statement(
    name="net-trim/theorem-1",
    paper=PAPER,
    number="theorem 1",
    sentence=_THEOREM_1,
    formula="|Yhat^(l) - Y^(l)|_F <= eps_1 + ... + eps_l for every l, and |What_l|_1 <= 1",
    assumptions=_NETWORK,
    cases=network_cases,
    sample=parallel,
    measure=measured_layers,
    bound=bound_theorem_1,
    slack=_SLACK,
    picture=pictures.measured_against_bound,
)
_theorem_2 = Statement(
    name="net-trim/theorem-2",
    paper=PAPER,
    number="theorem 2",
    sentence=_THEOREM_2,
    formula="|Yhat^(l) - Y^(l)|_F <= eps_1 sqrt(gamma_2 ... gamma_l) for every l, |What_l|_1 <= 1",
    assumptions=(*_NETWORK, "inflations 1.1, 1.5"),
    cases=lambda level: [
        {**case, "inflation": rate} for case in network_cases(level) for rate in (1.1, 1.5)
    ],
    sample=cascade,
    measure=measured_layers,
    bound=bound_theorem_2,
    slack=_SLACK,
    picture=pictures.measured_against_bound,
)

STATEMENTS = (
    Statement(
        name="net-trim/proposition-1",
        paper=PAPER,
        number="proposition 1",
        sentence=(
            "Let What be the solution to (4). For Yhat = max(What^T X, 0) being the "
            "retrained layer "
            "response, |Yhat - Y|_F <= eps."
        ),
        formula="|max(X What, 0) - Y|_F <= eps",
        assumptions=("V = 0", "(4) solved by two solvers, violations within 1e-5"),
        cases=layer_cases,
        sample=one_layer,
        measure=layer_deviation,
        bound=lambda layer: {"deviation": layer.epsilon},
        slack=_SLACK,
    ),
    _theorem_1,
    Statement(
        name="net-trim/theorem-1-corollary",
        paper=PAPER,
        number="after theorem 1",
        sentence=(
            "When all the layers are retrained with a fixed parameter eps, a corollary of the "
            "theorem above would bound the overall discrepancy as L eps."
        ),
        formula="|Yhat^(L) - Y^(L)|_F <= L eps",
        assumptions=_NETWORK,
        cases=network_cases,
        sample=parallel_equal,
        measure=_output,
        bound=lambda run: {"output": len(run.dense) * run.epsilons[0]},
        slack=_SLACK,
    ),
    replace(
        _theorem_1,
        name="net-trim/theorem-1-linear",
        number="theorem 1, last layer without activation",
        sentence=(
            "Theorems 1 and 2 identically apply to the practical networks that follow (1) for the "
            "first L - 1 layers and skip an activation at the last layer."
        ),
        cases=lambda level: [_last(case) for case in network_cases(level)],
        picture=None,
    ),
    _theorem_2,
    Statement(
        name="net-trim/theorem-2-corollary",
        paper=PAPER,
        number="after theorem 2",
        sentence=(
            "In such case, a corollary of Theorem 2 bounds the network overall discrepancy as "
            "|Yhat^(L) - Y^(L)|_F <= gamma^((L-1)/2) eps."
        ),
        formula="|Yhat^(L) - Y^(L)|_F <= gamma^((L-1)/2) eps_1",
        assumptions=_NETWORK,
        cases=lambda level: [{**case, "inflation": 1.2} for case in network_cases(level)],
        sample=cascade,
        measure=_output,
        bound=lambda run: {"output": run.inflation ** ((len(run.dense) - 1) / 2) * run.epsilons[0]},
        slack=_SLACK,
    ),
    replace(
        _theorem_2,
        name="net-trim/theorem-2-linear",
        number="theorem 2, last layer without activation",
        sentence=(
            "Theorems 1 and 2 identically apply to the practical networks that follow (1) for the "
            "first L - 1 layers and skip an activation at the last layer."
        ),
        cases=lambda level: [_last(case) for case in network_cases(level)],
        picture=None,
    ),
    Statement(
        name="net-trim/cascade-feasible",
        paper=PAPER,
        number="(6), (7)",
        sentence=(
            "Such program is not necessarily feasible and needs to be sufficiently slacked to "
            "warrant feasibility: (6) with eps_l as in (7)."
        ),
        formula="the old weights break no constraint of (6), (7) at gamma = 1 beyond rounding",
        assumptions=(
            "retrained inputs of a cascade, float64 and float32",
            "rounding allowed: 1e-12 in float64, 2e-7 in float32, relative as in the certificate",
        ),
        cases=cascade_cases,
        sample=cascade_layer,
        measure=old_weights_violation,
        bound=rounding,
    ),
    Statement(
        name="net-trim/cascade-unslacked",
        paper=PAPER,
        number="before (6)",
        sentence=(
            "One would ideally seek to address (5) with the modified constraint U in "
            "C_eps(Yhat^(l-1), Y^(l), 0). However, such program is not necessarily feasible."
        ),
        formula=(
            "an instance with min |(Yhat U - Y)_Omega|_F under Yhat U <= 0 off Omega above eps of "
            "(7), gamma = 1"
        ),
        assumptions=("built so that retraining the first layer merges samples",),
        cases=lambda level: [
            {"samples": samples, "radius": radius}
            for samples in (20, 60)
            for radius in ((1.5,) if level == "quick" else (1.2, 1.5, 3.0))
        ],
        sample=merged_layer,
        measure=smallest_residual,
        bound=lambda layer: {"least residual": layer.epsilon},
        relation=">=",
        slack=-1e-3,
    ),
    Statement(
        name="net-trim/equation-14",
        paper=PAPER,
        number="(12)-(14)",
        sentence=(
            "The convex program (13) [(12) is meant] is now cast as the standard quadratic program "
            "(14)."
        ),
        formula="optimum of (14) by OSQP = optimum of (11) by Clarabel",
        assumptions=("both solved to 1e-6",),
        cases=qp_cases,
        sample=regularised_layer,
        measure=objective_of_14,
        bound=objective_of_11,
        relation="==",
        slack=1e-5,
    ),
    Statement(
        name="net-trim/section-2-indices",
        paper=PAPER,
        number="section 2",
        sentence=(
            "Any network can be converted to its link-normalized version by replacing W_l with "
            "W_l / |W_l|_1, and Y^(l+1) with Y^(l+1) / prod_{j=0..l} |W_j|_1."
        ),
        formula="|Y'^(l)| = |Y^(l)| / (s_1 ... s_l), s_l = |W_l|_1",
        assumptions=("biases divided by s_1 ... s_l",),
        cases=lambda level: [
            {"depth": depth, "width": 8, "samples": 30}
            for depth in ((2, 4) if level == "quick" else (2, 3, 4, 6, 8))
        ],
        sample=normalised,
        measure=normalised_outcomes,
        bound=divided_outcomes,
        relation="==",
        slack=1e-10,
        printed=divided_as_printed,
        erratum="the product runs from 1 to l + 1: there is no W_0, and layer l + 1 counts",
    ),
    Statement(
        name="net-trim/link-normalised-bias",
        paper=PAPER,
        number="section 2, with biases",
        sentence="Such presentation is with no loss of generality.",
        formula="with b'_l = b_l / (s_1 ... s_l), |Y'^(l)| = |Y^(l)| / (s_1 ... s_l)",
        assumptions=("biases, which the paper does not have",),
        cases=lambda level: [
            {"depth": depth, "width": 8, "samples": 30}
            for depth in ((2, 4) if level == "quick" else (2, 3, 4, 6, 8))
        ],
        sample=normalised,
        measure=divided_outcomes,
        bound=bias_outcomes,
        relation="==",
        slack=1e-10,
        printed=bias_as_weights,
        erratum="dividing a bias like the weights of its layer, by s_l alone, is not enough",
    ),
    Statement(
        name="net-trim/theorem-1-premise",
        paper=PAPER,
        number="theorem 1",
        sentence=_THEOREM_1,
        formula="|Yhat - Y|_F <= sum_j e_j prod_{k>j} |What_k|_2, where sum_j eps_j fails",
        assumptions=("a bias under the penalty, so that |What_2|_1 > 1",),
        cases=lambda level: [
            {"samples": samples, "radius": radius, "penalise_bias": True}
            for samples in (20, 60)
            for radius in ((0.04,) if level == "quick" else (0.01, 0.02, 0.04))
        ],
        sample=premise_broken,
        measure=_output,
        bound=spectral_bound,
        slack=1e-9,
        printed=_sum_of_radii,
        erratum=(
            "the proof needs |What_l|_1 <= 1, which a penalised bias breaks, and with it the sum"
        ),
        details=lambda run: {"premise": check_link_normalised(run.new)},
    ),
    Statement(
        name="net-trim/theorem-1-elastic-net",
        paper=PAPER,
        number="theorem 1",
        sentence="The idea can be generalized to retraining schemes with ridge or elastic net type "
        "regularizers.",
        formula="|What|_F <= 1 for the elastic net, while |What|_1 <= 1 fails",
        assumptions=("inputs x and x / 2, W = (1, 0), eps -> 0, heavy ridge: What = (.8, .4)",),
        cases=lambda level: [{"samples": 20, "ridge": ridge} for ridge in (1e2, 1e4)],
        sample=elastic_weight,
        measure=lambda weight: {**elastic_norms(weight), "|What|_1": float(np.abs(weight).sum())},
        bound=lambda weight: {"|What|": 1.0, "|What|_1": math.sqrt(2.0)},
        slack=1e-6,
        printed=lambda weight: {"|What|_1": 1.0},
        erratum=(
            "an elastic net may leave |What|_1 > 1; the conclusion survives, since W is "
            "feasible and "
            "|What|_1 + (k/2) |What|_F^2 <= 1 + k/2 rules out |What|_F > 1"
        ),
    ),
)
