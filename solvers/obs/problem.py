"""One layer to prune and what came of it: arrays in, arrays out.

The program all methods of this room solve, each in its way, is

    minimise   (1/n) ||X (What - W)||_F^2 = trace((What - W)^T H (What - W))
    over       What zero outside a support that the pattern admits,

with H = (1/n) X^T X. (The paper writes 1/2 d^T H d for the same change; the true mean squared
change of the layer's output has no 1/2, so ours has none.) Units, the columns of W, share H and
are coupled by the pattern only.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from array_api_compat import array_namespace
from array_api_compat import device as device_of

from solvers.arrays import to_numpy
from solvers.result import Status

Array = Any


@dataclass(frozen=True)
class LayerProblem:
    """A layer to prune, checked. Make one with `layer_problem`.

    Attributes
    ----------
    weight : array, shape (n_in, n_out)
        W as given: any real dtype, numpy or torch.
    hessian : array of float64, shape (n_in, n_in)
        H = (1/n) X^T X, undamped.
    allowed : bool array, shape (n_in, n_out)
        False where a weight must become or stay zero; True on free rows.
    prunable : bool ndarray, shape (n_in,)
        False on free rows: updated, never removed, never counted.
    """

    weight: Array
    hessian: Array
    allowed: Array
    prunable: np.ndarray

    @property
    def size(self) -> int:
        """Number of weights that may be removed."""
        return int(self.prunable.sum()) * int(self.weight.shape[1])


@dataclass(frozen=True)
class Pruned:
    """A pruned layer.

    Attributes
    ----------
    weight : array, shape (n_in, n_out)
        Namespace and dtype of the weight given.
    kept : bool array, shape (n_in, n_out)
        The support. Free rows are kept.
    error : float
        (1/n) ||X (What - W)||_F^2 of the weight returned, with the undamped Hessian.
    relative_error : float
        `error` / ((1/n) ||X W||_F^2); 0 when both are 0, inf when only the latter is.
    removed : int
        Number of prunable weights outside the support.
    method : str
        Which function made it.
    damping : float
        Fraction of the mean diagonal the method worked with.
    note : str
        What the method says of an early stop, and what to do about it; empty where it ended by
        itself.
    history : dict of str to sequence
        What the method recorded on its way.
    """

    weight: Array
    kept: Array
    error: float
    relative_error: float
    removed: int
    method: str
    damping: float
    note: str = ""
    history: dict[str, Sequence[float]] = field(default_factory=dict)

    @property
    def status(self) -> Status:
        """`Status.SOLVED` where the method ended by itself, else `Status.ITERATION_LIMIT`."""
        return Status.ITERATION_LIMIT if self.note else Status.SOLVED


def layer_problem(
    weight: Array,
    hessian: Array,
    *,
    allowed: Array | None = None,
    free_rows: Iterable[int] = (),
) -> LayerProblem:
    """Check a layer's arrays and put them into one value.

    Parameters
    ----------
    weight : array, shape (n_in, n_out)
        W. With a bias its row belongs to it and is named in `free_rows`; to leave the bias as it
        is, leave its row (and the Hessian's last row and column) out.
    hessian : array, shape (n_in, n_in)
        H = (1/n) X^T X, symmetric; see `hessian.py`. Cast to float64.
    allowed : bool array, shape (n_in, n_out), optional
        A mask to respect: False where a weight must be zero. All True by default. `weight != 0`
        makes zeros stay.
    free_rows : iterable of int, optional
        Rows that are updated and never removed (the bias). Negative numbers count from the end.

    Returns
    -------
    LayerProblem

    Raises
    ------
    ValueError
        If a shape does not fit, a number is not finite, the Hessian is not symmetric, has a
        negative diagonal or a zero diagonal with entries beside it, or the mask forbids a free row.
    """
    xp = array_namespace(weight, hessian)
    if weight.ndim != 2 or 0 in weight.shape:
        raise ValueError(f"weight: got {tuple(weight.shape)}, want shape (n_in, n_out), no 0")
    n_in = int(weight.shape[0])
    if tuple(hessian.shape) != (n_in, n_in):
        raise ValueError(f"hessian: got {tuple(hessian.shape)}, want shape {(n_in, n_in)}")
    hessian = xp.astype(hessian, xp.float64)
    for name, value in (("weight", weight), ("hessian", hessian)):
        if not bool(xp.all(xp.isfinite(value))):
            raise ValueError(f"{name}: has entries that are not finite")
    diagonal = xp.linalg.diagonal(hessian)
    if bool(xp.any(diagonal < 0)):
        raise ValueError("hessian: has a negative diagonal; want (1/n) X^T X")
    scale = float(xp.max(xp.abs(hessian)))
    if float(xp.max(xp.abs(hessian - hessian.T))) > 1e-6 * scale:
        raise ValueError("hessian: is not symmetric; want (1/n) X^T X")
    hessian = 0.5 * (hessian + hessian.T)
    if bool(xp.any(hessian[diagonal == 0, :] != 0)):
        raise ValueError("hessian: a zero on the diagonal has entries beside it; not (1/n) X^T X")

    prunable = np.ones(n_in, dtype=bool)
    for row in free_rows:
        if not -n_in <= row < n_in:
            raise ValueError(f"free_rows: row {row} of a weight with {n_in} rows")
        prunable[row] = False
    if allowed is None:
        allowed = xp.ones(weight.shape, dtype=xp.bool, device=device_of(weight))
    if tuple(allowed.shape) != tuple(weight.shape) or allowed.dtype != xp.bool:
        raise ValueError(
            f"allowed: got {allowed.dtype} {tuple(allowed.shape)}, want bool {tuple(weight.shape)}"
        )
    if not bool(np.all(to_numpy(allowed)[~prunable])):
        raise ValueError("allowed: forbids a weight of a free row")
    return LayerProblem(weight, hessian, allowed, prunable)


def in_numpy(problem: LayerProblem) -> LayerProblem:
    """Copy a problem to numpy, the weight in float64; for the methods that work unit by unit.

    Parameters
    ----------
    problem : LayerProblem
        The layer: weights, Hessian, mask, prunable inputs.

    Returns
    -------
    LayerProblem
        On the CPU.
    """
    return LayerProblem(
        to_numpy(problem.weight).astype(np.float64),
        to_numpy(problem.hessian),
        to_numpy(problem.allowed),
        problem.prunable,
    )


def layer_error(hessian: Array, old: Array, new: Array) -> float:
    """Compute (1/n) ||X (new - old)||_F^2 = trace(D^T H D) in float64.

    Parameters
    ----------
    hessian : array, shape (n_in, n_in), float64
        H, the mean of x x^T over the rows.
    old, new : array, shape (n_in, n_out)
        Weights before and after.

    Returns
    -------
    float
        Mean over the rows of the squared change of the responses; at least 0.
    """
    xp = array_namespace(hessian)
    change = xp.astype(new, xp.float64) - xp.astype(old, xp.float64)
    return max(0.0, float(xp.sum(change * (hessian @ change))))


def finish(
    problem: LayerProblem,
    weight: Array,
    kept: Array,
    *,
    method: str,
    damping: float,
    note: str = "",
    history: dict[str, Sequence[float]] | None = None,
) -> Pruned:
    """Cast a solution back to the caller's namespace and dtype and measure what is returned.

    Parameters
    ----------
    problem : LayerProblem
        The layer: weights, Hessian, mask, prunable inputs.
    weight : array, shape (n_in, n_out)
        New weights; what is not kept becomes 0.
    kept : bool array, shape (n_in, n_out)
        Support: True where a weight stays.
    method : str
        Name of the method that made them.
    damping : float
        Fraction of the mean diagonal that is added to the Hessian's diagonal.
    note : str, optional
        What it says of an early stop.
    history : dict, optional
        Figures of its course by name.

    Returns
    -------
    Pruned
        Weights as returned, and their layer error.
    """
    given = problem.weight
    xp = array_namespace(given)
    where = device_of(given)
    new = xp.astype(xp.asarray(weight, device=where), given.dtype)
    support = xp.asarray(kept, device=where)
    new = xp.where(support, new, xp.zeros_like(new))
    error = layer_error(problem.hessian, given, new)
    energy = layer_error(problem.hessian, xp.zeros_like(given), given)
    relative = error / energy if energy > 0 else (0.0 if error == 0 else float("inf"))
    removed = int((~to_numpy(support))[problem.prunable].sum())
    return Pruned(new, support, error, relative, removed, method, damping, note, history or {})
