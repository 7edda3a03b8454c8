"""Where Net-Trim's section 2 and theorem 1 need correcting: indices, biases, the premise."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from retrain.bounds.outputs import check_link_normalised, output_bound, theorem_1
from retrain.methods.net_trim.method import net_trim
from retrain.stream.chain import Chain, ChainStream, forward, link_normalise
from retrain.stream.details import NetTrimDetails, details_of
from retrain.verify.net_trim import PAPER, THEOREM_1, Retrained, options, output, random_chain
from retrain.verify.statement import Case, Numbers, Statement
from solvers import ElasticNet, Penalty, solve_cvxpy, trim_program


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
        settings = options(
            "parallel",
            epsilon=radius * float(np.linalg.norm(outcome)),
            relative_epsilon=None,
            penalise_bias=case["penalise_bias"],
            zeros="free",  # the paper's program; held at zero, the weights cannot grow beyond 1
        )
        (result,) = net_trim(stream, settings, layers=[name])
        epsilons.append(details_of(result.report.details, NetTrimDetails).epsilon)
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


STATEMENTS = (
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
        sentence=THEOREM_1,
        formula="|Yhat - Y|_F <= sum_j e_j prod_{k>j} |What_k|_2, where sum_j eps_j fails",
        assumptions=("a bias under the penalty, so that |What_2|_1 > 1",),
        cases=lambda level: [
            {"samples": samples, "radius": radius, "penalise_bias": True}
            for samples in (20, 60)
            for radius in ((0.04,) if level == "quick" else (0.01, 0.02, 0.04))
        ],
        sample=premise_broken,
        measure=output,
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
