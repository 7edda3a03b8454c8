"""L-OBS's statements: the layer error, the update, theorems 5.1 and 3.2.

The networks are random ones and, up to depth 6, small classifiers that scikit-learn trains on its
digits; they are pruned by the package's own L-OBS. The paper's Y, n samples as columns, is our
responses with samples as rows; Theta is a layer's weights. Biases are kept as they are.
"""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from retrain.bounds.outputs import l_obs_bound
from retrain.stream.chain import Chain, activate, forward, response, spectral_norm
from retrain.verify import pictures
from retrain.verify.net_trim import random_chain
from retrain.verify.statement import Case, Level, Numbers, Row, Statement
from solvers.obs import hessian_of, layer_problem, per_layer, prune_one_shot

PAPER = "Dong, Chen, Pan: Learning to Prune DNNs via Layer-wise OBS (2017), supplement"


# One layer --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Layer:
    """Inputs of a layer, its weights, and the weights pruned."""

    inputs: np.ndarray
    weight: np.ndarray
    new_weight: np.ndarray
    hessian: np.ndarray


def pruned_layer(case: Case, rng: np.random.Generator) -> Layer:
    """Prune one layer by the paper's one-shot method."""
    mixing = rng.standard_normal((case["n_in"], case["n_in"])) / math.sqrt(case["n_in"])
    inputs = rng.standard_normal((case["samples"], case["n_in"])) @ mixing
    if case["rectified"]:
        inputs = np.maximum(inputs, 0)
    weight = rng.standard_normal((case["n_in"], case["n_out"]))
    hessian = hessian_of([inputs])
    pruned = prune_one_shot(layer_problem(weight, hessian), per_layer(case["sparsity"]))
    return Layer(inputs, weight, np.asarray(pruned.weight), hessian)


def layer_cases(level: Level) -> list[Case]:
    """Sparsities, with inputs of both signs and rectified."""
    sparsities = (0.1, 0.5) if level == "quick" else (0.01, 0.1, 0.3, 0.5, 0.7, 0.9)
    return [
        {"samples": 80, "n_in": 12, "n_out": 5, "rectified": rectified, "sparsity": sparsity}
        for sparsity in sparsities
        for rectified in (False, True)
    ]


def mean_squared_change(layer: Layer) -> Numbers:
    """E = (1/n) |X (What - W)|_F^2, from the responses."""
    change = layer.inputs @ layer.new_weight - layer.inputs @ layer.weight
    return {"E": float(np.sum(change**2)) / len(layer.inputs)}


def quadratic_form(layer: Layer) -> Numbers:
    """Sum over the units of dw^T H dw, H = (1/n) X^T X."""
    change = layer.new_weight - layer.weight
    return {"E": float(np.sum(change * (layer.hessian @ change)))}


def half_quadratic_form(layer: Layer) -> Numbers:
    """The paper's (1/2) dTheta^T H dTheta."""
    return {"E": quadratic_form(layer)["E"] / 2}


@dataclass(frozen=True)
class Removal:
    """A unit's weights, its Hessian, and the weight to remove."""

    weight: np.ndarray
    hessian: np.ndarray
    index: int


def removal(case: Case, rng: np.random.Generator) -> Removal:
    """A random unit; the Hessian of correlated inputs."""
    n_in = case["n_in"]
    inputs = rng.standard_normal((3 * n_in, n_in)) @ rng.standard_normal((n_in, n_in))
    return Removal(rng.standard_normal((n_in,)), hessian_of([inputs]), int(rng.integers(n_in)))


def obs_update(unit: Removal) -> np.ndarray:
    """The update dw = -(w_q / [H^-1]_qq) H^-1 e_q."""
    column = np.linalg.solve(unit.hessian, np.eye(len(unit.weight))[unit.index])
    return -unit.weight[unit.index] / column[unit.index] * column


def update_errors(unit: Removal, rule: Callable[[Removal], np.ndarray] = obs_update) -> Numbers:
    """KKT of min (1/2) d^T H d, e_q^T d + w_q = 0, and the optimum found twice more."""
    import cvxpy as cp

    update = rule(unit)
    size = float(np.linalg.norm(unit.hessian, 2) * np.linalg.norm(update))
    gradient = unit.hessian @ update
    value = float(update @ gradient) / 2
    inverse = np.linalg.inv(unit.hessian)[unit.index, unit.index]
    variable = cp.Variable(len(unit.weight))
    problem = cp.Problem(
        cp.Minimize(cp.quad_form(variable, cp.psd_wrap(unit.hessian)) / 2),
        [variable[unit.index] == -unit.weight[unit.index]],
    )
    problem.solve(solver="CLARABEL")
    return {
        "stationarity": float(np.abs(np.delete(gradient, unit.index)).max()) / size,
        "feasibility": abs(update[unit.index] + unit.weight[unit.index]),
        "optimum by cvxpy": abs(float(problem.value) - value) / value,
        "L_q": abs(unit.weight[unit.index] ** 2 / (2 * inverse) - value) / value,
    }


def update_bounds(unit: Removal) -> Numbers:
    """Rounding, and Clarabel's accuracy."""
    del unit
    return {
        "stationarity": 1e-10,
        "feasibility": 1e-12,
        "optimum by cvxpy": 1e-6,
        "L_q": 1e-9,
    }


# Networks ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Network:
    """A network, the same pruned layer by layer on the dense inputs, and the data."""

    dense: Chain
    new: Chain
    inputs: np.ndarray


@functools.cache
def trained_chain(depth: int, seed: int) -> tuple[Chain, np.ndarray]:
    """Train a classifier of the digits, and return it with 400 of their images."""
    from sklearn.datasets import load_digits
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.neural_network import MLPClassifier

    images, labels = load_digits(return_X_y=True)
    images = images / 16
    model = MLPClassifier((32,) * (depth - 1), random_state=seed, max_iter=40)
    with warnings.catch_warnings():
        # Forty epochs fit the digits well enough; convergence is not what is checked.
        warnings.simplefilter("ignore", ConvergenceWarning)
        model.fit(images, labels)
    layers = zip(model.coefs_, model.intercepts_, strict=True)
    weights = tuple(np.vstack([rows, bias]) for rows, bias in layers)
    return Chain(weights, (True,) * depth), images[:400]


def pruned_network(case: Case, rng: np.random.Generator) -> Network:
    """Prune every layer by one-shot L-OBS, its Hessian from the dense network's inputs."""
    if case["kind"] == "trained":
        chain, inputs = trained_chain(case["depth"], int(rng.integers(2**31)))
    else:
        chain = random_chain([case["width"]] * (case["depth"] + 1), rng, bias=False, last="linear")
        # He's scale keeps the responses' size from layer to layer.
        chain = replace(chain, weights=tuple(weight * math.sqrt(2) for weight in chain.weights))
        inputs = np.maximum(rng.standard_normal((case["samples"], case["width"])), 0)
    outcomes, new = [inputs, *forward(chain, inputs)], []
    for index, weight in enumerate(chain.weights):
        rows = weight[:-1] if chain.biases[index] else weight
        problem = layer_problem(rows, hessian_of([outcomes[index]]))
        pruned = np.asarray(prune_one_shot(problem, per_layer(case["sparsity"])).weight)
        new.append(np.vstack([pruned, weight[-1:]]) if chain.biases[index] else pruned)
    return Network(chain, replace(chain, weights=tuple(new)), inputs)


def network_cases(level: Level) -> list[Case]:
    """Random networks of depths 2 to 20, trained ones of depths 2 to 6."""
    random: Sequence[int] = (2, 5, 10, 20) if level == "quick" else range(2, 21)
    trained = (2, 4) if level == "quick" else (2, 3, 4, 5, 6)
    sparsities = (0.2,) if level == "quick" else (0.1, 0.3, 0.6)
    return [
        *(
            {"kind": "random", "depth": depth, "width": 20, "samples": 200, "sparsity": sparsity}
            for depth in random
            for sparsity in sparsities
        ),
        *(
            {"kind": "trained", "depth": depth, "sparsity": sparsity}
            for depth in trained
            for sparsity in sparsities
        ),
    ]


def layer_errors(network: Network) -> np.ndarray:
    """sqrt(dE^l) = |Yhat^l - Y^l|_F / sqrt n of every layer on its dense inputs."""
    outcomes = [network.inputs, *forward(network.dense, network.inputs)]
    errors = []
    for index, follows in enumerate(network.dense.follows):
        pruned = activate(follows, response(network.new, index, outcomes[index]))
        errors.append(np.linalg.norm(pruned - outcomes[index + 1]))
    return np.array(errors) / math.sqrt(len(network.inputs))


def accumulated_errors(network: Network) -> np.ndarray:
    """|Ytilde^l - Y^l|_F / sqrt n of every layer of the pruned network."""
    pairs = zip(
        forward(network.new, network.inputs), forward(network.dense, network.inputs), strict=True
    )
    errors = [np.linalg.norm(new - old) for new, old in pairs]
    return np.array(errors) / math.sqrt(len(network.inputs))


def norms(network: Network, kind: str) -> list[float]:
    """Spectral or Frobenius norms of the pruned weights, bias rows left out."""
    rows = [
        weight[:-1] if bias else weight
        for weight, bias in zip(network.new.weights, network.new.biases, strict=True)
    ]
    if kind == "spectral":
        return [spectral_norm(weight) for weight in rows]
    return [float(np.linalg.norm(weight)) for weight in rows]


def output_error(network: Network) -> Numbers:
    """The accumulated error of the output, to be held against both bounds."""
    return dict.fromkeys(("Frobenius", "spectral"), float(accumulated_errors(network)[-1]))


def theorem_3_2(network: Network) -> Numbers:
    """Theorem 3.2 with the paper's Frobenius norms, and with spectral ones."""
    errors = list(layer_errors(network))
    return {
        "Frobenius": l_obs_bound(errors, norms(network, "frobenius")),
        "spectral": l_obs_bound(errors, norms(network, "spectral")),
    }


def looseness(rows: Sequence[Row]) -> dict[str, Any]:
    """Bound over measured, by norm and depth, of the networks whose output is not dead."""
    summary: dict[str, Any] = {"dead outputs": sum(not row.measured["spectral"] for row in rows)}
    rows = [row for row in rows if row.measured["spectral"]]
    for name in ("Frobenius", "spectral"):
        by_depth: dict[str, list[float]] = {}
        for row in rows:
            ratio = row.bound[name] / row.measured[name]
            by_depth.setdefault(f"{row.case['kind']} {row.case['depth']}", []).append(ratio)
        summary[name] = {key: float(np.median(values)) for key, values in by_depth.items()}
    return summary


def layer_steps(network: Network) -> Numbers:
    """|Ytilde^(l+1) - Yhat^(l+1)|_F of every layer but the first."""
    dense = forward(network.dense, network.inputs)
    pruned = forward(network.new, network.inputs)
    numbers = {}
    for index in range(1, len(dense)):
        own = activate(network.dense.follows[index], response(network.new, index, dense[index - 1]))
        numbers[f"layer {index + 1}"] = float(np.linalg.norm(pruned[index] - own))
    return numbers


def theorem_5_1(network: Network) -> Numbers:
    """The bound sqrt n |Thetahat^(l+1)|_F epsilon^l."""
    scale = math.sqrt(len(network.inputs))
    errors, sizes = accumulated_errors(network), norms(network, "frobenius")
    return {
        f"layer {index + 1}": scale * sizes[index] * float(errors[index - 1])
        for index in range(1, len(sizes))
    }


# Errata -----------------------------------------------------------------------------------------


def uneven_network(case: Case, rng: np.random.Generator) -> Network:
    """A network of which the first layer is pruned, and every odd one after it is small."""
    network = pruned_network({**case, "kind": "random"}, rng)
    small = [index >= 2 and index % 2 == 0 for index in range(len(network.dense))]

    def scaled(weights: Sequence[np.ndarray]) -> tuple[np.ndarray, ...]:
        pairs = zip(weights, small, strict=True)
        return tuple(weight * (0.001 if tiny else 1.0) for weight, tiny in pairs)

    dense = replace(network.dense, weights=scaled(network.dense.weights))
    new = scaled((network.new.weights[0], *network.dense.weights[1:]))
    return Network(dense, replace(dense, weights=new), network.inputs)


def hidden_errors(network: Network) -> Numbers:
    """The accumulated errors of the layers 2 to L - 1."""
    errors = accumulated_errors(network)
    return {f"layer {index + 1}": float(errors[index]) for index in range(1, len(errors) - 1)}


def hidden_bounds(network: Network) -> Numbers:
    """(10): sum_{h<l} (prod_{k=h+1..l} |Thetahat_k|_F) sqrt dE^h + sqrt dE^l."""
    errors, sizes = list(layer_errors(network)), norms(network, "frobenius")
    return {
        f"layer {index + 1}": l_obs_bound(errors[: index + 1], sizes[: index + 1])
        for index in range(1, len(errors) - 1)
    }


def hidden_as_printed(network: Network) -> Numbers:
    """The last display: the product's factors are |Thetahat^(k+1)|, k = h+1 .. l+1."""
    errors, sizes = list(layer_errors(network)), norms(network, "frobenius")
    shifted = [*sizes[1:], math.nan]
    return {
        f"layer {index + 1}": l_obs_bound(errors[: index + 1], shifted[: index + 1])
        for index in range(1, len(errors) - 1)
    }


def without_transpose(network: Network) -> Numbers:
    """The proof's |What (Y - Ytilde)|_F, columns as samples, for square layers."""
    return _steps_by(network, lambda weight: weight)


def with_transpose(network: Network) -> Numbers:
    """|What^T (Y - Ytilde)|_F."""
    return _steps_by(network, lambda weight: weight.T)


def _steps_by(network: Network, factor: Any) -> Numbers:
    dense = forward(network.dense, network.inputs)
    pruned = forward(network.new, network.inputs)
    return {
        f"layer {index + 1}": float(
            np.linalg.norm(
                factor(network.new.weights[index]) @ (dense[index - 1] - pruned[index - 1]).T
            )
        )
        for index in range(1, len(dense))
    }


def lopsided_network(case: Case, rng: np.random.Generator) -> Network:
    """Weights near rank one, u v^T with v far from u: What and What^T act very differently."""
    network = pruned_network({**case, "kind": "random"}, rng)
    width = case["width"]
    left = np.abs(rng.standard_normal(width))
    right = np.where(np.arange(width) % 2 == 0, 1.0, -1.0)
    low_rank = np.outer(left, right) / width

    def tilted(chain: Chain) -> Chain:
        return replace(chain, weights=tuple(low_rank + 0.05 * weight for weight in chain.weights))

    return Network(tilted(network.dense), tilted(network.new), network.inputs)


_ERRATA_CASES = [
    {"depth": 6, "width": 15, "samples": 100, "sparsity": 0.3, "repeat": index}
    for index in range(3)
]

STATEMENTS = (
    Statement(
        name="l-obs/layer-error",
        paper=PAPER,
        number="layer error (main paper), used in (10)",
        sentence="dE = (1/2) dTheta^T H dTheta for the change of the layer's response.",
        formula="(1/n) |X (What - W)|_F^2 = sum over units of dw^T H dw, H = (1/n) X^T X",
        assumptions=("H not damped", "weights of a layer pruned by one-shot L-OBS"),
        cases=layer_cases,
        sample=pruned_layer,
        measure=mean_squared_change,
        bound=quadratic_form,
        relation="==",
        slack=1e-10,
        printed=half_quadratic_form,
        erratum="no factor 1/2: with E = (1/n) |.|^2 and H = (1/n) sum x x^T the change is d^T H d",
    ),
    Statement(
        name="l-obs/update",
        paper=PAPER,
        number="update and sensitivity (main paper)",
        sentence="L_q = (1/2) w_q^2 / [H^-1]_qq, dw = -(w_q / [H^-1]_qq) H^-1 e_q.",
        formula="KKT of min (1/2) d^T H d subject to e_q^T d + w_q = 0; L_q is its value",
        assumptions=("H positive definite",),
        cases=lambda level: [
            {"n_in": n_in, "repeat": index}
            for n_in in (3, 10, 30)
            for index in range(2 if level == "quick" else 20)
        ],
        sample=removal,
        measure=update_errors,
        bound=update_bounds,
    ),
    Statement(
        name="l-obs/theorem-5-1",
        paper=PAPER,
        number="theorem 5.1, (11)",
        sentence=(
            "The difference between its accumulated pruned output and layer-wise pruned output is "
            "bounded by |Ytilde^(l+1) - Yhat^(l+1)|_F <= sqrt(n) |Thetahat^(l+1)|_F eps^l."
        ),
        formula="|Ytilde^(l+1) - Yhat^(l+1)|_F <= sqrt(n) |Thetahat^(l+1)|_F eps^l for every l",
        assumptions=("ReLU, the last layer linear", "pruned by one-shot L-OBS"),
        cases=network_cases,
        sample=pruned_network,
        measure=layer_steps,
        bound=theorem_5_1,
        slack=1e-12,
    ),
    Statement(
        name="l-obs/theorem-3-2",
        paper=PAPER,
        number="theorem 3.2, (10)",
        sentence=(
            "eps^L <= sum_{h=1..L-1} (prod_{k=h+1..L} |Thetahat_k|_F sqrt(dE^h)) + sqrt(dE^L)."
        ),
        formula="the same, and with spectral norms in place of Frobenius norms",
        assumptions=("ReLU, the last layer linear", "pruned by one-shot L-OBS", "depths 2 to 20"),
        cases=network_cases,
        sample=pruned_network,
        measure=output_error,
        bound=theorem_3_2,
        slack=1e-12,
        summarise=looseness,
        picture=pictures.bound_by_depth,
    ),
    Statement(
        name="l-obs/theorem-3-2-indices",
        paper=PAPER,
        number="the display before 'Finally'",
        sentence=(
            "eps^(l+1) <= sum_{h=1..l} (prod_{k=h+1..l+1} |Thetahat^(k+1)|_F sqrt(dE^h)) + "
            "sqrt(dE^(l+1))."
        ),
        formula=(
            "eps^(l+1) <= sum_{h<=l} (prod_{k=h+1..l+1} |Thetahat^k|_F) sqrt(dE^h) + sqrt(dE^(l+1))"
        ),
        assumptions=(
            "layers 2 to L - 1",
            "layer 1 pruned; layers 3, 5, ... a thousandth of the size",
        ),
        cases=lambda level: _ERRATA_CASES,
        sample=uneven_network,
        measure=hidden_errors,
        bound=hidden_bounds,
        slack=1e-12,
        printed=hidden_as_printed,
        erratum="the factors are |Thetahat^k|, not |Thetahat^(k+1)|",
    ),
    Statement(
        name="l-obs/theorem-5-1-transpose",
        paper=PAPER,
        number="proof of theorem 5.1",
        sentence="|Ytilde^(l+1) - Yhat^(l+1)|_F <= |What_(l+1) (Y^l - Ytilde^l)|_F.",
        formula="|Ytilde^(l+1) - Yhat^(l+1)|_F <= |What_(l+1)^T (Y^l - Ytilde^l)|_F",
        assumptions=("square layers near rank one", "samples are columns, as in the paper"),
        cases=lambda level: _ERRATA_CASES,
        sample=lopsided_network,
        measure=layer_steps,
        bound=with_transpose,
        slack=1e-12,
        printed=without_transpose,
        erratum="What wants a transpose",
    ),
)
