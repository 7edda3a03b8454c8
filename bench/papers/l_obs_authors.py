"""Our Hessians, rankings, masks and weights beside the L-OBS authors' own, for LeNet-300-100.

What their file holds, found by comparing:

* Hessians of (inputs + bias) squared, (1/n) sum x x^T over all 60 000 training images, no 1/2, no
  damping, the column of ones last; accumulated in float32, which shows on fc1 alone, where
  hundreds of pixels have the same constant background.
* Rankings of weights *and biases*, numbered input by input (row-major over (inputs + bias) x
  units), by w^2 / [H^-1]_qq with a pseudo-inverse. On fc1, whose Hessian has rank 713 of 785, that
  of a matrix with negative eigenvalues from rounding: the bottom of the ranking is rounding too,
  and comes nearer the smaller our damping is. On fc2 and fc3 it is ours.
* Masks that remove the first k of the ranking, biases too, and weights updated one removal after
  the other. k is one more than asked for; on fc3 one more than the next lower multiple of 50. Some
  masks of biases are not in the file: a removed bias is one that is zero among the pruned weights,
  as it is where the mask is there.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from retrain.stream.stream import LayerStream
from solvers.arrays import to_numpy
from solvers.obs import (
    hessian_of,
    layer_problem,
    per_layer_count,
    prune_one_shot,
    sensitivities,
)

DAMPINGS = (1e-8, 1e-7, 1e-6, 1e-4)
KEPT = (50, 20, 10, 5)


def compare(stream: LayerStream, file: str | Path) -> None:
    """Print the comparison, layer by layer."""
    with np.load(file) as theirs:
        for spec in stream.layers:
            hessian = to_numpy(hessian_of(b.dense_inputs for b in stream.batches(spec.name)))
            weight = to_numpy(stream.weight(spec.name)).astype(np.float64)
            _compare_hessians(spec.name, hessian, theirs[f"hessian/{spec.name}"])
            _compare_rankings(spec.name, hessian, weight, theirs[f"sensitivity/{spec.name}"])
            _compare_masks(spec.name, hessian, weight, theirs)


def _compare_hessians(name: str, ours: np.ndarray, theirs: np.ndarray) -> None:
    apart = np.linalg.norm(ours - theirs) / np.linalg.norm(ours)
    rank = np.linalg.matrix_rank(ours, hermitian=True)
    least = np.linalg.eigvalsh(theirs.astype(np.float64))[0]
    print(
        f"\n{name}: Hessians differ by {apart:.1e} of their norm; rank {rank} of {len(ours)}, "
        f"least eigenvalue of theirs {least:.1e}"
    )


def _compare_rankings(
    name: str, hessian: np.ndarray, weight: np.ndarray, theirs: np.ndarray
) -> None:
    ten = theirs.size // 10
    places = np.empty(theirs.size)
    places[theirs] = np.arange(theirs.size)
    for damping in DAMPINGS:
        known = sensitivities(layer_problem(weight, hessian), damping=damping)
        ranking = np.argsort(known.saliency, axis=None, kind="stable")
        ours = np.empty(ranking.size)
        ours[ranking] = np.arange(ranking.size)
        bottom = np.intersect1d(ranking[:ten], theirs[:ten]).size / ten
        top = np.intersect1d(ranking[-ten:], theirs[-ten:]).size / ten
        print(
            f"{name}: ranking, damping {damping:g}: rank correlation "
            f"{np.corrcoef(ours, places)[0, 1]:.4f}, "
            f"bottom decile {100 * bottom:.1f} % shared, top {100 * top:.1f} %"
        )


def _compare_masks(name: str, hessian: np.ndarray, weight: np.ndarray, theirs: np.ndarray) -> None:
    problem = layer_problem(weight, hessian)  # biases may go, as with them
    known = sensitivities(problem, damping=1e-7)
    for kept in KEPT:
        mask = theirs[f"mask/CR_{kept}/{name}.weight"].T
        biases = theirs[f"pruned_weight/CR_{kept}/{name}.bias"] != 0
        removed = int((~mask).sum() + (~biases).sum())
        ours = prune_one_shot(problem, per_layer_count(removed), given=known)
        both = ours.kept[:-1] & mask
        either = ours.kept[:-1] | mask
        values = theirs[f"pruned_weight/CR_{kept}/{name}.weight"].T
        apart = np.abs(ours.weight[:-1] - values)[both] / np.abs(values[both]).mean()
        asked = weight.size * (100 - kept) // 100
        print(
            f"{name}: {kept:2} % kept: they removed {removed} ({asked} asked for), of which "
            f"{(~biases).sum()} of {biases.size} biases; "
            f"masks agree on {100 * np.mean(ours.kept[:-1] == mask):.3f} % of the weights, "
            f"kept in common {100 * both.sum() / either.sum():.2f} % of those either keeps; "
            f"weights there differ by {np.median(apart):.1e} (median, of their mean size)"
        )
