"""The complete methods by name, with one signature; every other option keeps its default."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from solvers import checks
from solvers.arrays import to_numpy
from solvers.obs.greedy import pattern_support, prune_greedy, removal_path
from solvers.obs.large import admm_support, prune_large
from solvers.obs.one_shot import prune_one_shot
from solvers.obs.pattern import Kind, Pattern, require
from solvers.obs.problem import LayerProblem, Pruned, finish
from solvers.obs.structured import prune_inputs
from solvers.obs.swaps import improve
from solvers.obs.sweep import prune_sweep

UNSTRUCTURED: tuple[Kind, ...] = ("layer", "unit", "n:m")
"""Kinds of patterns whose zeros are single weights."""


@dataclass(frozen=True)
class Method:
    """A complete method.

    Attributes
    ----------
    run : callable
        ``run(problem, pattern, threads) -> Pruned``.
    patterns : tuple of str
        The kinds of pattern it supports.
    about : str
        One line for a user who chooses.
    """

    run: Callable[[LayerProblem, Pattern, int], Pruned]
    patterns: tuple[Kind, ...]
    about: str


def prune(problem: LayerProblem, pattern: Pattern, method: str, *, threads: int = 1) -> Pruned:
    """Prune a layer by a method of `METHODS`.

    Parameters
    ----------
    problem : LayerProblem
        The layer: weights, Hessian, mask, prunable inputs.
    pattern : Pattern
        Where zeros are counted, and how many.
    method : str
        Key of `METHODS`.
    threads : int, optional
        Threads over the units; results do not depend on them.

    Returns
    -------
    Pruned
        New weights, their support and layer error.

    Raises
    ------
    ValueError
        If there is no such method, it does not support the pattern, or it raises.
    """
    checks.one_of(METHODS, method=method)
    require(pattern, METHODS[method].patterns, method)
    return METHODS[method].run(problem, pattern, threads)


def prune_swaps(
    problem: LayerProblem, pattern: Pattern, *, kicks: int = 0, seed: int = 0, threads: int = 1
) -> Pruned:
    """Prune along the exact greedy path, then search locally; see `greedy.py`, `swaps.py`.

    Parameters
    ----------
    problem : LayerProblem
        The layer: weights, Hessian, mask, prunable inputs.
    pattern : Pattern
        Where zeros are counted, and how many.
    kicks : int, optional
        How often each unit's best support is perturbed and searched again.
    seed : int, optional
        Seed of the kicks.
    threads : int, optional
        Threads over the units; results do not depend on them.

    Returns
    -------
    Pruned
        New weights, their support and layer error.
    """
    path = removal_path(problem, pattern=pattern, threads=threads)
    kept = pattern_support(problem, path, pattern)
    return improve(problem, kept, pattern, kicks=kicks, seed=seed, threads=threads)


def prune_best(
    problem: LayerProblem,
    pattern: Pattern,
    *,
    kicks: int = 0,
    pace: float = 0.02,
    seed: int = 0,
    threads: int = 1,
) -> Pruned:
    """Search locally from two supports, the exact path's and a slow ADMM's; return the better.

    Where the pattern leaves the units independent (``unit``, ``n:m``) the better one of each unit
    is taken, otherwise the better layer.

    Parameters
    ----------
    problem : LayerProblem
        The layer.
    pattern : Pattern
        ``layer``, ``unit`` or ``n:m``.
    kicks, seed : int, optional
        See `swaps.improve`.
    pace : float, optional
        See `large.admm_support`.
    threads : int, optional
        Threads over the units.

    Returns
    -------
    Pruned
        `history` holds both errors.

    Raises
    ------
    ValueError
        If the pattern is not supported, or a Hessian is singular to working precision.
    """
    require(pattern, UNSTRUCTURED, "prune_best")
    first = prune_swaps(problem, pattern, kicks=kicks, seed=seed, threads=threads)
    found = admm_support(problem, pattern, pace=pace, max_iterations=600)
    second = improve(problem, found.kept, pattern, kicks=kicks, seed=seed, threads=threads)
    if pattern.kind == "layer":
        better = first if first.error <= second.error else second
        weight, kept = to_numpy(better.weight), to_numpy(better.kept)
    else:
        hessian, old = to_numpy(problem.hessian), to_numpy(problem.weight).astype(np.float64)
        changes = [to_numpy(p.weight).astype(np.float64) - old for p in (first, second)]
        losses = [np.einsum("ij,ij->j", d, hessian @ d) for d in changes]
        wins = losses[0] <= losses[1]
        weight = np.where(wins, to_numpy(first.weight), to_numpy(second.weight))
        kept = np.where(wins, to_numpy(first.kept), to_numpy(second.kept))
    said = dict.fromkeys(p.note for p in (found, first, second) if p.note)
    return finish(
        problem,
        weight,
        kept,
        method="best",
        damping=first.damping,
        note="; ".join(said),
        history={"error": [first.error, second.error]},
    )


METHODS: dict[str, Method] = {
    "one-shot": Method(
        lambda problem, pattern, threads: prune_one_shot(problem, pattern),
        ("layer", "unit", "n:m", "inputs"),
        "the paper's L-OBS: one inverse, sorted sensitivities",
    ),
    "sweep": Method(
        lambda problem, pattern, threads: prune_sweep(problem, pattern),
        UNSTRUCTURED,
        "one blocked sweep over the inputs: fast, the baseline",
    ),
    "greedy": Method(
        lambda problem, pattern, threads: prune_greedy(problem, pattern, threads=threads),
        UNSTRUCTURED,
        "exact OBS, one weight after the other, refitted",
    ),
    "swaps": Method(
        lambda problem, pattern, threads: prune_swaps(problem, pattern, threads=threads),
        UNSTRUCTURED,
        "greedy, then exchanges of kept for removed weights",
    ),
    "large": Method(
        lambda problem, pattern, threads: prune_large(problem, pattern, threads=threads),
        ("layer", "unit", "n:m", "inputs"),
        "ADMM on the whole matrix, refit, a few swaps: for thousands of inputs",
    ),
    "best": Method(
        lambda problem, pattern, threads: prune_best(problem, pattern, kicks=20, threads=threads),
        UNSTRUCTURED,
        "swaps from two starts with random restarts: the least error, the most time",
    ),
    "inputs": Method(
        lambda problem, pattern, threads: prune_inputs(problem, pattern, threads=threads),
        ("inputs",),
        "exact OBS for whole inputs",
    ),
}
"""Methods by name: how they run, the kinds of patterns that they support, and what they are in a
few words. A method is added by one entry."""
