"""Pruning fc1 of LeNet-300-100 alone: the L-OBS paper's figures 2, 3 and 5.

Nothing is retrained; the other two layers stay as they are.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from retrain.stream.stream import LayerStream
from solvers.arrays import to_numpy
from solvers.obs import (
    LayerProblem,
    RemovalPath,
    Sensitivities,
    allocate_to_loss,
    hessian_of,
    kept_by,
    layer_error,
    layer_problem,
    pattern_support,
    per_layer,
    prune_one_shot,
    prune_to_tolerance,
    refit,
    removal_path,
    sensitivities,
)

RATIOS = (
    *(0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.85),
    *(0.9, 0.92, 0.94, 0.95, 0.96, 0.97, 0.98, 0.99, 0.995),
)
TOLERANCES = (0.1, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0)
PRESERVED = 0.005
"""Accuracy that may be lost for it to count as preserved: the paper doesn't say how much."""


@dataclass(frozen=True, eq=False)
class FirstLayer:
    """fc1 on the training images, and what of it several criteria share.

    Attributes
    ----------
    problem : LayerProblem
        Weights with the bias last and free, Hessian over all images.
    mean : ndarray, shape (784,)
        Mean of each input.
    known : Sensitivities
        The paper's.
    path : RemovalPath
        The exact one.
    """

    problem: LayerProblem
    mean: np.ndarray
    known: Sensitivities
    path: RemovalPath


def first_layer(stream: LayerStream, threads: int) -> FirstLayer:
    """Prepare the stream's first layer."""
    name = stream.layers[0].name
    hessian = to_numpy(hessian_of(batch.dense_inputs for batch in stream.batches(name)))
    weight = to_numpy(stream.weight(name, dense=True)).astype(np.float64)
    problem = layer_problem(weight, hessian, free_rows=[-1])
    path = removal_path(problem, threads=threads)
    return FirstLayer(problem, hessian[:-1, -1], sensitivities(problem), path)


def criteria(
    layer: FirstLayer, seed: int, threads: int
) -> dict[str, Callable[[float], np.ndarray]]:
    """Ways to prune the layer to a ratio: figure 2's four, and ours."""
    problem = layer.problem
    weight, allowed = to_numpy(problem.weight), to_numpy(problem.allowed)
    order = np.random.default_rng(seed).random(weight.shape)
    apoz = np.abs(weight)
    apoz[:-1] *= np.abs(layer.mean)[:, None]

    def masked(score: np.ndarray) -> Callable[[float], np.ndarray]:
        return lambda ratio: np.where(
            kept_by(score, per_layer(ratio), allowed, problem.prunable), weight, 0.0
        )

    def one_shot(ratio: float) -> np.ndarray:
        return prune_one_shot(problem, per_layer(ratio), given=layer.known).weight

    def exact(ratio: float) -> np.ndarray:
        kept = pattern_support(problem, layer.path, per_layer(ratio))
        return refit(problem, kept, threads=threads).weight

    return {
        "random": masked(order),
        "magnitude": masked(np.abs(weight)),
        "ApoZW": masked(apoz),
        "L-OBS": one_shot,
        "ours": exact,
    }


@dataclass(frozen=True)
class Point:
    """One pruned fc1."""

    accuracy: float
    rms_error: float


def curves(
    layer: FirstLayer, accuracy: Callable[[np.ndarray], float], seed: int, threads: int
) -> dict[str, list[Point]]:
    """Prune to every ratio by every criterion; `accuracy` is of the network with that fc1."""
    old, hessian = to_numpy(layer.problem.weight), to_numpy(layer.problem.hessian)
    found: dict[str, list[Point]] = {}
    for name, prune in criteria(layer, seed, threads).items():
        found[name] = []
        for ratio in RATIOS:
            new = prune(ratio)
            found[name].append(Point(accuracy(new), layer_error(hessian, old, new) ** 0.5))
    return found


def print_curves(found: dict[str, list[Point]], dense: float) -> None:
    """Print figure 2, and where each criterion stops preserving the accuracy."""
    print(f"\nfigure 2: test accuracy in % when fc1 alone is pruned; dense {100 * dense:.2f}\n")
    _table(found, lambda point: f"{100 * point.accuracy:.2f}")
    print(f"\nlargest ratio with at most {100 * PRESERVED:g} points lost:")
    for name, points in found.items():
        fine = [r for r, p in zip(RATIOS, points, strict=True) if p.accuracy >= dense - PRESERVED]
        print(f"  {name:10} {100 * max(fine, default=0):.1f} %")
    print("the paper: random below 30 %, L-OBS 96 %")
    print("\nroot mean squared error of fc1's response at the same ratios\n")
    _table(found, lambda point: f"{point.rms_error:.3g}")


def _table(found: dict[str, list[Point]], show: Callable[[Point], str]) -> None:
    print("| ratio |" + "".join(f" {name:>9} |" for name in found))
    print("| ----- |" + " --------- |" * len(found))
    for index, ratio in enumerate(RATIOS):
        cells = "".join(f" {show(points[index]):>9} |" for points in found.values())
        print(f"| {ratio:<5g} |{cells}")


def print_sensitivities(layer: FirstLayer) -> None:
    """Print figure 3: how the paper's sensitivities are spread."""
    values = layer.known.saliency[layer.problem.prunable]
    print("\nfigure 3: sensitivities L_q of fc1 (damping 1e-4)\n")
    print(f"below 0.001: {100 * np.mean(values < 1e-3):.1f} %   (the paper: about 92 %)")
    for quantile in (0.1, 0.25, 0.5, 0.75, 0.9, 0.95, 0.99, 1.0):
        print(f"  {100 * quantile:5.1f} % are at most {np.quantile(values, quantile):.3g}")
    edges = np.array([0, 1e-8, 1e-7, 1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, np.inf])
    counts = np.histogram(values, edges)[0]
    for low, high, count in zip(edges[:-1], edges[1:], counts, strict=True):
        print(f"  {low:7.0e} to {high:7.0e}: {count:7d}  {'#' * round(100 * count / values.size)}")


def print_tolerances(layer: FirstLayer) -> None:
    """Print figure 5: how much goes within a tolerance on the root mean squared error."""
    size = layer.problem.size
    energy = layer_error(
        to_numpy(layer.problem.hessian), 0 * layer.problem.weight, layer.problem.weight
    )
    print("\nfigure 5: tolerance on the root mean squared error of fc1's response, and pruned %")
    print(f"(the response's own root mean square is {energy**0.5:.3g})\n")
    print("| tolerance | L-OBS  | ours   |")
    print("| --------- | ------ | ------ |")
    for tolerance in TOLERANCES:
        one_shot = prune_to_tolerance(layer.problem, tolerance).removed / size
        exact = allocate_to_loss(layer.path, tolerance**2).removed.sum() / size
        print(f"| {tolerance:<9g} | {100 * one_shot:6.2f} | {100 * exact:6.2f} |")
