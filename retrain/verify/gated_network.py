"""The gated residual network (1) of the layer-gates paper, its cost and its gradients, in numpy.

    z^1 = x,   z^(l+1) = xi^l (W2 a(W1 z^l + b1) + b2) + W3 z^l,   yhat = W z^L + b      l < L

with a = tanh (theorem 5.1 wants a smooth a with a(0) = 0, |a'| <= 1), samples as rows, and weight
matrices as the paper has them, (n_out, n_in). Regression: -log p(y|x) = |y - yhat|^2 / 2 + const.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

Gates = tuple[int, ...]


@dataclass(frozen=True)
class Block:
    """One gated block: the nonlinear path W1, b1, W2, b2 and the skip W3."""

    W1: np.ndarray
    b1: np.ndarray
    W2: np.ndarray
    b2: np.ndarray
    W3: np.ndarray


@dataclass(frozen=True)
class GatedNetwork:
    """L - 1 blocks and the output layer W, b."""

    blocks: tuple[Block, ...]
    W: np.ndarray
    b: np.ndarray


@dataclass(frozen=True)
class Problem:
    """A network, its data, and the hyper-parameters of (12)."""

    network: GatedNetwork
    x: np.ndarray
    y: np.ndarray
    log_gamma: float
    decay: float


def random_network(
    blocks: int, width: int, rng: np.random.Generator, *, hidden: int | None = None, out: int = 2
) -> GatedNetwork:
    """Draw a network with Gaussian weights of size 1 / sqrt(width) and skips near the identity."""
    hidden = width if hidden is None else hidden

    def draw(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape) / math.sqrt(shape[-1])

    return GatedNetwork(
        tuple(
            Block(
                draw(hidden, width),
                0.3 * rng.standard_normal(hidden),
                draw(width, hidden),
                0.3 * rng.standard_normal(width),
                np.eye(width) + 0.2 * draw(width, width),
            )
            for _ in range(blocks)
        ),
        draw(out, width),
        0.3 * rng.standard_normal(out),
    )


def to_vector(network: GatedNetwork) -> np.ndarray:
    """All weights in a row."""
    return np.concatenate([part.ravel() for part in _parts(network)])


def from_vector(values: np.ndarray, like: GatedNetwork) -> GatedNetwork:
    """Invert `to_vector` for a network of the same shapes."""
    parts, start = [], 0
    for part in _parts(like):
        parts.append(values[start : start + part.size].reshape(part.shape))
        start += part.size
    blocks = tuple(Block(*parts[5 * i : 5 * i + 5]) for i in range(len(like.blocks)))
    return GatedNetwork(blocks, parts[-2], parts[-1])


def _parts(network: GatedNetwork) -> list[np.ndarray]:
    parts = []
    for block in network.blocks:
        parts += [block.W1, block.b1, block.W2, block.b2, block.W3]
    return [*parts, network.W, network.b]


def fan_out(network: GatedNetwork, index: int) -> np.ndarray:
    """Return w of a block: W2 and b2, which the paper absorbs into it, in a row."""
    block = network.blocks[index]
    return np.concatenate([block.W2.ravel(), block.b2])


def with_fan_out(network: GatedNetwork, index: int, w: np.ndarray) -> GatedNetwork:
    """Replace w of a block."""
    block = network.blocks[index]
    new = replace(block, W2=w[: block.W2.size].reshape(block.W2.shape), b2=w[block.W2.size :])
    blocks = [*network.blocks[:index], new, *network.blocks[index + 1 :]]
    return replace(network, blocks=tuple(blocks))


def activations(network: GatedNetwork, x: np.ndarray, gates: Sequence[int]) -> list[np.ndarray]:
    """Compute z^1, ..., z^L and yhat."""
    values = [x]
    for block, gate in zip(network.blocks, gates, strict=True):
        z = values[-1]
        path = np.tanh(z @ block.W1.T + block.b1) @ block.W2.T + block.b2
        values.append(gate * path + z @ block.W3.T)
    return [*values, values[-1] @ network.W.T + network.b]


def costs(network: GatedNetwork, x: np.ndarray, y: np.ndarray, gates: Sequence[int]) -> np.ndarray:
    """-log p(y_i | x_i, W, gates) of each sample, shape (n_samples,)."""
    difference = activations(network, x, gates)[-1] - y
    return 0.5 * np.sum(difference**2, axis=1) + 0.5 * y.shape[1] * math.log(2 * math.pi)


def patterns(count: int) -> Iterator[Gates]:
    """All 0/1 patterns of so many gates."""
    return itertools.product((0, 1), repeat=count)


def probability(gates: Gates, theta: np.ndarray) -> float:
    """g_I(theta), the probability of a pattern."""
    return float(np.prod(np.where(gates, theta, 1 - theta)))


def expected_cost(problem: Problem, theta: np.ndarray) -> float:
    """C(W, theta) of (11), by enumeration."""
    return sum(
        weight * float(np.sum(costs(problem.network, problem.x, problem.y, gates)))
        for gates in patterns(len(theta))
        if (weight := probability(gates, theta))
    )


def objective(problem: Problem, theta: np.ndarray) -> float:
    """L(W, theta) of (12)."""
    decay = 0.5 * problem.decay * float(np.sum(to_vector(problem.network) ** 2))
    return expected_cost(problem, theta) + decay - float(np.sum(theta)) * problem.log_gamma


def cost_gradient(
    network: GatedNetwork, x: np.ndarray, y: np.ndarray, gates: Sequence[int], *, sign: float = 1.0
) -> tuple[GatedNetwork, list[np.ndarray]]:
    """Backpropagate the sum of the costs: (19)-(22) without decay and N/B.

    Parameters
    ----------
    sign : float
        1 for the output's delta yhat - y; -1 gives what the paper prints, y - yhat.

    Returns
    -------
    gradient : GatedNetwork
        Of every weight.
    deltas : list of ndarray, shape (n_samples, width)
        delta-bar of each block: the gradient with respect to its path's output.
    """
    values = activations(network, x, gates)
    output = sign * (values[-1] - y)
    delta = output @ network.W
    blocks, deltas = [], []
    for block, gate, z in zip(
        reversed(network.blocks), reversed(gates), reversed(values[:-2]), strict=True
    ):
        hidden = np.tanh(z @ block.W1.T + block.b1)
        inner = gate * (delta @ block.W2) * (1 - hidden**2)
        blocks.append(
            Block(
                inner.T @ z,
                inner.sum(0),
                gate * delta.T @ hidden,
                gate * delta.sum(0),
                delta.T @ z,
            )
        )
        deltas.append(delta)
        delta = inner @ block.W1 + delta @ block.W3
    gradient = GatedNetwork(tuple(reversed(blocks)), output.T @ values[-2], output.sum(0))
    return gradient, list(reversed(deltas))


def gradients(problem: Problem, theta: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Gradient of L(W, theta): in W as a vector, and in theta, by enumeration."""
    total = problem.decay * to_vector(problem.network)
    slope = np.full(len(theta), -problem.log_gamma)
    for gates in patterns(len(theta)):
        cost = float(np.sum(costs(problem.network, problem.x, problem.y, gates)))
        weight = probability(gates, theta)
        if weight:
            gradient, _ = cost_gradient(problem.network, problem.x, problem.y, gates)
            total = total + weight * to_vector(gradient)
        for index in range(len(theta)):
            others = np.delete(np.array(gates), index)
            share = probability(tuple(others), np.delete(theta, index))
            slope[index] += share * cost * (1 if gates[index] else -1)
    return total, slope


def gated_costs(problem: Problem, theta: np.ndarray, index: int) -> tuple[float, float]:
    """C_1^l and C_0^l: the expected cost with gate l on and off."""
    on, off = theta.copy(), theta.copy()
    on[index], off[index] = 1.0, 0.0
    return expected_cost(problem, on), expected_cost(problem, off)


def fan_out_gradient(problem: Problem, theta: np.ndarray, index: int) -> np.ndarray:
    """Gradient of C_1^l in w = (W2, b2) of block l."""
    on = theta.copy()
    on[index] = 1.0
    total = np.zeros(fan_out(problem.network, index).size)
    for gates in patterns(len(theta)):
        weight = probability(gates, on)
        if weight:
            gradient, _ = cost_gradient(problem.network, problem.x, problem.y, gates)
            total += weight * fan_out(gradient, index)
    return total


def drop_block(network: GatedNetwork, index: int) -> GatedNetwork:
    """Remove a block whose gate is 0 and absorb its skip, as after (2).

    The next block takes W1 <- W1 W3 and W3 <- W3 W3 of the dropped one; after the last block the
    output layer takes W <- W W3.
    """
    skip = network.blocks[index].W3
    kept = [block for position, block in enumerate(network.blocks) if position != index]
    if index == len(network.blocks) - 1:
        return GatedNetwork(tuple(kept), network.W @ skip, network.b)
    following = kept[index]
    kept[index] = replace(following, W1=following.W1 @ skip, W3=following.W3 @ skip)
    return replace(network, blocks=tuple(kept))
