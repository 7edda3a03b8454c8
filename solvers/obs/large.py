"""Large layers: ADMM on the whole matrix finds a support, refit and swaps make the most of it.

    minimise   tr (What - W)^T H (What - W) / 2     over   What = D,  D in the pattern

    What <- (H + rho I)^-1 (H W - V + rho D)        one eigendecomposition serves every rho
    D    <- projection of What + V / rho            the largest squares that the pattern admits
    V    <- V + rho (What - D)

The set is not convex: rho grows until the support stands still. It grows fast while the support
moves much and slowly when it hardly does. Nothing ADMM returns is used but the support: D's weights
are refitted exactly, so what comes back is feasible whenever the iteration is stopped.

H is scaled to unit diagonal, H_ij / sqrt(H_ii H_jj), and W with it, so that a square in the
projection is what the weight contributes to the layer's output by itself.
"""

from __future__ import annotations

from typing import Any, Literal

from array_api_compat import array_namespace

from solvers import checks
from solvers.obs.hessian import dead_inputs, decoupled
from solvers.obs.pattern import Pattern, kept_by
from solvers.obs.problem import LayerProblem, Pruned, finish
from solvers.obs.refit import REFIT_DAMPING, refit
from solvers.obs.swaps import SEARCH_DAMPING, improve

Array = Any

ADMM_DAMPING = 1e-3
"""Fraction of the mean diagonal added to the Hessian. Twice as much moves the weights less and fits
less well; less makes ADMM slower on inputs that depend on each other. Chosen by hand."""

CHECK_EVERY = 3
"""Iterations between looks at how far the support moved. Twice as many let rho grow more slowly.
The paper's value."""

TIMES = ((0.1, 3.0), (0.005, 2.0), (0.0, 1.0))
"""(share of the support that moved, factor): rho grows by 1 + pace times the factor of the first
line whose share is exceeded, so that it grows fast while much moves. The paper's rule; larger
factors end sooner, at a worse support."""


def admm_support(
    problem: LayerProblem,
    pattern: Pattern,
    *,
    damping: float = ADMM_DAMPING,
    rho: float = 0.01,
    pace: float = 0.05,
    max_iterations: int = 300,
    dtype: Literal["float32", "float64"] = "float32",
) -> Pruned:
    """Find a support for a layer by ADMM with an l0 projection.

    Parameters
    ----------
    problem : LayerProblem
        The layer; numpy or torch arrays, and the iterations run where those are.
    pattern : Pattern
        Any.
    damping : float, optional
        Fraction of the mean diagonal.
    rho : float, optional
        First penalty, relative to the unit diagonal of the scaled Hessian.
    pace : float, optional
        How fast rho grows: by 1 + pace, 1 + 2 pace or 1 + 3 pace every third iteration. Halving it
        doubles the iterations and buys a better support; 0.1 and rho = 0.1 are those of ALPS.
    max_iterations : int, optional
        Iterations at most.
    dtype : {"float32", "float64"}, optional
        Precision of the iterations. The eigendecomposition is in float64.

    Returns
    -------
    Pruned
        The weights are the projected iterate D: feasible, not refitted. `note` is empty when
        the support stood still between two checks, or says that it was still moving. `history`:
        the share of the support that moved, and rho, at every check.

    Raises
    ------
    ValueError
        If the dtype is not one of the two, or rho or pace is not positive.

    Notes
    -----
    Two (n_in, n_in) x (n_in, n_out) products an iteration, one sort of the matrix, and five
    matrices of its size.

    References
    ----------
    Meng, Behdin, Wang, Mazumder (NeurIPS 2024), ALPS: the splitting and the growth of rho.
    """
    checks.one_of(("float32", "float64"), dtype=dtype)
    checks.positive(rho=rho, pace=pace)
    xp = array_namespace(problem.weight)
    working = getattr(xp, dtype)
    hessian = decoupled(problem.hessian, damping)
    root = xp.sqrt(xp.linalg.diagonal(hessian))
    values, vectors = xp.linalg.eigh(hessian / (root[:, None] * root[None, :]))
    values = xp.astype(xp.where(values > 0, values, xp.zeros_like(values)), working)[:, None]
    vectors = xp.astype(vectors, working)
    old = xp.astype(problem.weight, xp.float64)
    old = xp.where(dead_inputs(problem.hessian)[:, None], xp.zeros_like(old), old)
    scaled = root[:, None] * old
    # float32 has the range of 1e-38 to 1e38 only; the projection does not see a common factor
    size = float(xp.max(xp.abs(scaled)))
    size = size if size > 0 else 1.0
    scaled = xp.astype(scaled / size, working)
    target = vectors @ (values * (vectors.T @ scaled))

    def project(point: Array) -> tuple[Array, Array]:
        support = kept_by(point * point, pattern, problem.allowed, problem.prunable)
        return support, xp.where(support, point, xp.zeros_like(point))

    support, split = project(scaled)
    checked = support
    multiplier = xp.zeros_like(scaled)
    moved_by: list[float] = []
    penalties: list[float] = []
    note = f"support still moving after {max_iterations} iterations; raise max_iterations"
    for iteration in range(1, max_iterations + 1):
        right = target - multiplier + rho * split
        point = vectors @ ((vectors.T @ right) / (values + rho))
        support, split = project(point + multiplier / rho)
        multiplier = multiplier + rho * (point - split)
        if iteration % CHECK_EVERY:
            continue
        differing = int(xp.sum(xp.astype(support != checked, xp.int64)))
        moved = differing / max(1, int(xp.sum(xp.astype(support, xp.int64))))
        moved_by.append(moved)
        penalties.append(rho)
        if moved == 0:
            note = ""
            break
        checked = support
        rho *= 1.0 + pace * next(times for share, times in TIMES if moved >= share)
    weight = xp.astype(split, xp.float64) * size / root[:, None]
    # what ADMM has no say in stays as it was: dead inputs, and units that lose nothing
    given = xp.astype(problem.weight, xp.float64)
    intact = xp.all(support | (given == 0), axis=0)[None, :]
    weight = xp.where(dead_inputs(problem.hessian)[:, None] | intact, given, weight)
    return finish(
        problem,
        weight,
        support,
        method="admm",
        damping=damping,
        note=note,
        history={"moved": moved_by, "rho": penalties},
    )


def prune_large(
    problem: LayerProblem,
    pattern: Pattern,
    *,
    damping: float = ADMM_DAMPING,
    search_damping: float = SEARCH_DAMPING,
    refit_damping: float = REFIT_DAMPING,
    rho: float = 0.01,
    pace: float = 0.05,
    max_iterations: int = 300,
    max_swaps: int = 10,
    max_rounds: int = 0,
    dtype: Literal["float32", "float64"] = "float32",
    threads: int = 1,
) -> Pruned:
    """Prune a large layer: ADMM for the support, exact refit, a bounded number of swaps.

    Parameters
    ----------
    problem : LayerProblem
        The layer.
    pattern : Pattern
        Any; whole inputs are not swapped.
    damping, search_damping, refit_damping : float, optional
        Fractions of the mean diagonal: of the ADMM, of the swaps, of the final weights.
    rho, pace, max_iterations : optional
        Of the ADMM, see `admm_support`.
    max_swaps, max_rounds : int, optional
        Limits of the local search, see `swaps.improve`; 0 swaps for refit alone.
    dtype : {"float32", "float64"}, optional
        Precision of the ADMM's iterations.
    threads : int, optional
        Threads over the units, for refit and swaps.

    Returns
    -------
    Pruned
        `note` joins what ADMM and the search say; empty when both ended by themselves.

    Raises
    ------
    ValueError
        If an option is out of its range, or H on a support singular to working precision.
    """
    found = admm_support(
        problem,
        pattern,
        damping=damping,
        rho=rho,
        pace=pace,
        max_iterations=max_iterations,
        dtype=dtype,
    )
    if max_swaps == 0 or pattern.kind == "inputs":
        final = refit(problem, found.kept, damping=refit_damping, threads=threads)
    else:
        final = improve(
            problem,
            found.kept,
            pattern,
            damping=search_damping,
            refit_damping=refit_damping,
            max_swaps=max_swaps,
            max_rounds=max_rounds,
            threads=threads,
        )
    said = [note for note in (found.note, final.note) if note]
    return finish(
        problem,
        final.weight,
        final.kept,
        method="large",
        damping=damping,
        note="; ".join(said),
        history={**found.history, **final.history},
    )
