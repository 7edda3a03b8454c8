"""Net-Trim's statements on networks: theorems 1 and 2, their corollaries, a linear last layer.

The networks are random and link-normalised (section 2). Algorithms 1 and 2 are written out here
over cvxpy, which solves to high accuracy; some cases run the package's own Net-Trim instead.
Beside it: `net_trim_programs` (one layer), `net_trim_errata`, `net_trim_recovery`.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from retrain.bounds.outputs import theorem_1, theorem_2
from retrain.methods.net_trim.method import net_trim
from retrain.methods.net_trim.options import NetTrimOptions
from retrain.stream.chain import Chain, ChainStream, forward, link_normalise, response
from retrain.stream.details import NetTrimDetails, details_of
from retrain.verify import pictures
from retrain.verify.statement import Case, Level, Numbers, Row, Statement
from solvers import solve_cvxpy, trim_program

PAPER = "Aghasi, Abdi, Nguyen, Romberg: Net-Trim (2017)"
# The solvers meet ball and ceilings to 1e-5, relative to the radius and to the targets.
VIOLATION = 1e-5
SLACK = 1e-4


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
        new.append(trim(chain, index, upstream, forward(chain, inputs)[index], None, radius))
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
        weight = trim(chain, index, upstream, targets, ceilings, radii[-1])
        weights = [*retrained.weights[:index], weight, *retrained.weights[index + 1 :]]
        retrained = replace(retrained, weights=tuple(weights))
    return Retrained(chain, retrained, inputs, tuple(radii), inflation)


def trim(
    chain: Chain,
    index: int,
    upstream: np.ndarray,
    targets: np.ndarray,
    ceilings: np.ndarray | None,
    radius: float,
) -> np.ndarray:
    """TRIM(X, Y, V, epsilon) of the paper.

    An answer that is not certified is not used: the old weights stay, which are feasible, so that
    the theorems still apply. `dense_layers` counts these.
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
    result = solve_cvxpy(program, tolerance=1e-2, violation_tolerance=VIOLATION)
    return np.asarray(result.weight) * b / a if result.certified.all() else chain.weights[index]


def package_run(chain: Chain, inputs: np.ndarray, options: NetTrimOptions) -> Retrained:
    """Retrain by the package's own Net-Trim and ADMM, which keeps uncertified layers dense too."""
    stream = ChainStream(chain, inputs)
    reports = {result.report.name: result.report for result in net_trim(stream, options)}
    epsilons = tuple(
        details_of(reports[str(index)].details, NetTrimDetails).epsilon
        for index in range(len(chain))
    )
    return Retrained(chain, stream.chain, inputs, epsilons, options.inflation)


def dense_layers(run: Retrained) -> dict[str, int]:
    """Count the layers, and those that kept their old weights for want of a certificate."""
    pairs = zip(run.new.weights, run.dense.weights, strict=True)
    return {
        "layers": len(run.dense),
        "kept dense": sum(np.array_equal(new, old) for new, old in pairs),
    }


def count_layers(rows: Sequence[Row]) -> dict[str, int]:
    """Sum these over the cases."""
    return {name: sum(row.details[name] for row in rows) for name in ("layers", "kept dense")}


def options(scheme: Any, **settings: Any) -> NetTrimOptions:
    """Settings of the package's Net-Trim, tight enough for the theorems."""
    return NetTrimOptions(
        scheme=scheme,
        tolerance=2e-2,
        violation_tolerance=VIOLATION,
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
        return package_run(chain, inputs, options("parallel", relative_epsilon=case["radius"]))
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
        settings = options("parallel", epsilon=radius, relative_epsilon=None)
        return package_run(chain, inputs, settings)
    return solve_parallel(chain, inputs, [radius] * len(chain))


def cascade(case: Case, rng: np.random.Generator) -> Retrained:
    """Algorithm 2."""
    chain, inputs = _network(case, rng, case.get("last", "relu"))
    inflation = case.get("inflation", 1.1)
    if case["solver"] == "admm":
        settings = options("cascade", relative_epsilon=case["radius"], inflation=inflation)
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


def output(run: Retrained) -> Numbers:
    """The deviation of the last layer alone."""
    return {"output": deviations(run)[-1]}


def _last(case: Case) -> Case:
    return {**case, "last": "linear"}


_NETWORK = (
    "link-normalised network, |W_l|_1 = 1",
    "programs certified: gap 2e-2, violations 1e-5; a layer that is not keeps its old weights",
    "biases, where there are any, free of penalty",
)
THEOREM_1 = (
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
    sentence=THEOREM_1,
    formula="|Yhat^(l) - Y^(l)|_F <= eps_1 + ... + eps_l for every l, and |What_l|_1 <= 1",
    assumptions=_NETWORK,
    cases=network_cases,
    sample=parallel,
    measure=measured_layers,
    bound=bound_theorem_1,
    slack=SLACK,
    details=dense_layers,
    summarise=count_layers,
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
    slack=SLACK,
    details=dense_layers,
    summarise=count_layers,
    picture=pictures.measured_against_bound,
)

STATEMENTS = (
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
        measure=output,
        bound=lambda run: {"output": len(run.dense) * run.epsilons[0]},
        slack=SLACK,
        details=dense_layers,
        summarise=count_layers,
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
        measure=output,
        bound=lambda run: {"output": run.inflation ** ((len(run.dense) - 1) / 2) * run.epsilons[0]},
        slack=SLACK,
        details=dense_layers,
        summarise=count_layers,
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
)
