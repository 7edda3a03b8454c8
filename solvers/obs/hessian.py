"""The layer Hessian H = (1/n) sum x x^T, streamed, and its inverse in two ways.

Dead inputs (zero on the diagonal) make H singular and say nothing about their weights: they are cut
out first, by `decoupled`, so that neither the damping nor an inverse depends on them. The damping
is a stated fraction of the mean diagonal of the live inputs.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import scipy.linalg
from array_api_compat import array_namespace
from array_api_compat import device as device_of
from numba import njit

from solvers import checks

Array = Any


@dataclass(frozen=True)
class HessianSum:
    """A running sum of x x^T, updated functionally.

    Attributes
    ----------
    total : array of float64, shape (n_in, n_in)
        Sum over the rows seen.
    count : int
        Number of rows seen.
    """

    total: Array
    count: int


def add_rows(state: HessianSum | None, inputs: Array) -> HessianSum:
    """Add a batch of rows to a running sum; `None` starts one.

    Parameters
    ----------
    state : HessianSum or None
        What came before.
    inputs : array, shape (rows, n_in)
        numpy or torch; cast to float64 before the product. A bias is a last column of ones.

    Returns
    -------
    HessianSum

    Raises
    ------
    ValueError
        If the batch has another width than those before it, or an entry that is not finite.
    """
    xp = array_namespace(inputs)
    if inputs.ndim != 2:
        raise ValueError(f"inputs: got {tuple(inputs.shape)}, want shape (rows, n_in)")
    if state is not None and inputs.shape[1] != state.total.shape[0]:
        raise ValueError(
            f"inputs: got {inputs.shape[1]}, want {state.total.shape[0]} columns as before"
        )
    rows = xp.astype(inputs, xp.float64)
    product = rows.T @ rows
    if not bool(xp.all(xp.isfinite(product))):
        raise ValueError("inputs: has entries that are not finite, or whose squares overflow")
    if state is None:
        return HessianSum(product, int(rows.shape[0]))
    return HessianSum(state.total + product, state.count + int(rows.shape[0]))


def hessian_of(batches: Iterable[Array]) -> Array:
    """Stream H = (1/n) sum x x^T over batches of any sizes.

    Parameters
    ----------
    batches : iterable of array, shape (rows, n_in)
        Inputs of the layer, all rows together.

    Returns
    -------
    array, shape (n_in, n_in), float64
        H.

    Raises
    ------
    ValueError
        If there is no row at all, or a batch is malformed (see `add_rows`).
    """
    state: HessianSum | None = None
    for batch in batches:
        state = add_rows(state, batch)
    return mean_hessian(state)


def mean_hessian(state: HessianSum | None) -> Array:
    """Divide a running sum by its count.

    Parameters
    ----------
    state : HessianSum or None
        Running sum (`add_rows`).

    Returns
    -------
    array, shape (n_in, n_in), float64
        H.

    Raises
    ------
    ValueError
        If no row was seen.
    """
    if state is None or state.count == 0:
        raise ValueError("inputs: no rows; a Hessian needs at least one")
    return state.total / state.count


def dead_inputs(hessian: Array) -> Array:
    """Mark the inputs that were zero in every row, (n_in,) bool.

    Parameters
    ----------
    hessian : array, shape (n_in, n_in), float64
        H, the mean of x x^T over the rows.

    Returns
    -------
    bool array, shape (n_in,)
        True for a dead input.
    """
    return array_namespace(hessian).linalg.diagonal(hessian) == 0


def decoupled(hessian: Array, damping: float) -> Array:
    """Cut out the dead inputs and damp the rest.

    Live inputs: H + damping * m * I, m the mean diagonal of the live inputs. Dead ones: m on the
    diagonal and zeros beside it, so that a factorisation exists and their weights meet no other.
    A Hessian without live inputs becomes the identity.

    Parameters
    ----------
    hessian : array of float64, shape (n_in, n_in)
        Undamped.
    damping : float
        Fraction of the mean diagonal, >= 0.

    Returns
    -------
    array of float64, shape (n_in, n_in)

    Raises
    ------
    ValueError
        If the damping is negative or not finite.
    """
    if not 0.0 <= damping < float("inf"):
        raise ValueError(f"damping: got {damping!r}, want a fraction >= 0 of the mean diagonal")
    xp = array_namespace(hessian)
    diagonal = xp.linalg.diagonal(hessian)
    dead = diagonal == 0
    mean = mean_diagonal(hessian)
    extra = xp.where(dead, mean, damping * mean * xp.ones_like(diagonal))
    identity = xp.eye(hessian.shape[0], dtype=hessian.dtype, device=device_of(hessian))
    return hessian + extra[:, None] * identity


def mean_diagonal(hessian: Array) -> float:
    """Average the diagonal over the live inputs; 1 when all are dead.

    Parameters
    ----------
    hessian : array, shape (n_in, n_in), float64
        H, the mean of x x^T over the rows.

    Returns
    -------
    float
        Above 0.
    """
    xp = array_namespace(hessian)
    diagonal = xp.linalg.diagonal(hessian)
    live = int(xp.sum(xp.astype(diagonal != 0, xp.int64)))
    return float(xp.sum(diagonal)) / live if live else 1.0


def cholesky(matrix: np.ndarray, remedy: str = "raise the damping") -> np.ndarray:
    """Factor a symmetric positive definite matrix, or say that it is not.

    Parameters
    ----------
    matrix : ndarray, shape (n, n), float64
        Symmetric.
    remedy : str, optional
        End of the message: what a person can do.

    Returns
    -------
    ndarray of float64
        The lower factor L, zeros above the diagonal.

    Raises
    ------
    ValueError
        If the matrix is singular to working precision: a pivot that has lost all its digits,
        L_ii^2 <= n eps A_ii, counts as zero, whether or not LAPACK got through. Nothing stands in.
    """
    try:
        factor = scipy.linalg.cholesky(matrix, lower=True, check_finite=False)
    except scipy.linalg.LinAlgError as error:
        raise ValueError(f"hessian: not positive definite ({error}); {remedy}") from error
    floor = matrix.shape[0] * np.finfo(np.float64).eps * np.diagonal(matrix)
    if np.any(np.diagonal(factor) ** 2 <= floor):
        raise ValueError(f"hessian: singular to working precision; {remedy}")
    return factor


def inverse_cholesky(hessian: np.ndarray) -> np.ndarray:
    """Invert a positive definite Hessian by Cholesky.

    Parameters
    ----------
    hessian : ndarray, shape (n, n), float64
        Symmetric and positive definite.

    Returns
    -------
    ndarray, shape (n, n), float64
        H^-1, exactly symmetric.

    Raises
    ------
    ValueError
        If it is singular to working precision (see `cholesky`).
    """
    factor = cholesky(hessian)
    inverse = scipy.linalg.cho_solve((factor, True), np.eye(hessian.shape[0]), check_finite=False)
    return 0.5 * (inverse + inverse.T)


def inverse_recursion(batches: Iterable[np.ndarray], count: int, alpha: float) -> np.ndarray:
    """Invert alpha I + (1/n) sum x x^T by one rank-one step a row, as the paper does.

    Parameters
    ----------
    batches : iterable of ndarray, shape (rows, n_in)
        All n rows.
    count : int
        n, known beforehand: every step divides by it.
    alpha : float
        Start from the inverse of alpha I; `damping` * mean diagonal makes it agree with
        ``inverse_cholesky(decoupled(hessian, damping))`` where no input is dead.

    Returns
    -------
    ndarray of float64, shape (n_in, n_in)

    Raises
    ------
    ValueError
        If alpha is not positive, a number is not finite or the rows are not `count` many.

    Notes
    -----
    n n_in^2 multiplications, against (n + n_in) n_in^2 in blocked products for Cholesky: slower,
    and it loses digits for small alpha. It is here because the paper has it.

    References
    ----------
    Dong, Chen, Pan (NIPS 2017), the recursion for the inverse of the layer Hessian:
    P <- P - P x x^T P / (n + x^T P x).
    """
    checks.positive(alpha=alpha)
    inverse: np.ndarray | None = None
    seen = 0
    for batch in batches:
        rows = np.ascontiguousarray(batch, dtype=np.float64)
        if not np.all(np.isfinite(rows)):
            raise ValueError("inputs: has entries that are not finite")
        if inverse is None:
            inverse = np.eye(rows.shape[1]) / alpha
        _rank_one_steps(inverse, rows, float(count))
        seen += rows.shape[0]
    if inverse is None or seen != count:
        raise ValueError(f"count: {count} rows announced, {seen} came")
    return inverse


@njit(cache=True, nogil=True)
def _rank_one_steps(P: np.ndarray, X: np.ndarray, n: float) -> None:  # pragma: no cover
    """Apply Sherman-Morrison for every row of X to P, in place."""
    for row in range(X.shape[0]):
        x = X[row]
        Px = P @ x
        scale = 1.0 / (n + x @ Px)
        for i in range(P.shape[0]):
            f = Px[i] * scale
            for j in range(P.shape[1]):
                P[i, j] -= f * Px[j]
