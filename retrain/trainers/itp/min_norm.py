"""The subproblem (15): the shortest vector in the convex hull of the objectives' gradients.

    minimise ||sum_j lambda_j g_j||^2   subject to   sum_j lambda_j = 1,  lambda >= 0

Its negative descends along every objective at once; it is zero where no direction does.
"""

from __future__ import annotations

import math

import numpy as np
from scipy.optimize import nnls


def min_norm_weights(gram: np.ndarray) -> np.ndarray:
    """Solve (15) for gradients given by their products.

    Parameters
    ----------
    gram : ndarray of float64, shape (q, q)
        Products g_i . g_j of the q >= 1 gradients; exactly symmetric.

    Returns
    -------
    ndarray, shape (q,)
        Nonnegative, summing to one. Where the solution is not unique (equal gradients, several that
        are zero) it is one of them: equal shares for two.

    Raises
    ------
    ValueError
        If `gram` is not square.
    FloatingPointError
        If an entry is not finite.

    Notes
    -----
    Two objectives have a closed form. For more: over mu >= 0,

        minimise ||G' mu||^2 + (1' mu - 1)^2

    has the solution mu = s lambda. For a direction lambda of sum one and length d the best scale is
    s = 1/(1 + d^2), with the value d^2/(1 + d^2), which rises with d. That is a nonnegative least
    squares problem, for scipy's active-set solver.

    References
    ----------
    Reiners, Klamroth, Stiglmayr (2020), (15).
    """
    gram = np.asarray(gram, dtype=np.float64)
    if gram.ndim != 2 or gram.shape[0] != gram.shape[1] or gram.size == 0:
        raise ValueError(f"gram: got {gram.shape}, want shape (q, q) with q >= 1")
    if not np.isfinite(gram).all():
        raise FloatingPointError("gram: a gradient is NaN or infinite")
    lengths = np.sqrt(np.diag(gram))
    zero = lengths == 0
    if zero.any():  # the hull contains 0 already
        return zero / zero.sum()
    if len(gram) == 1:
        return np.ones(1)
    if len(gram) == 2:
        return _two_weights(gram)
    return _face_weights(gram, lengths)


def _two_weights(gram: np.ndarray) -> np.ndarray:
    """The weight of g_2 is g_1 . (g_1 - g_2) / ||g_1 - g_2||^2, clipped to [0, 1]."""
    (first, product), (_, second) = gram.tolist()
    distance = (first - product) + (second - product)
    # ||g_1 - g_2||^2 has lost its digits when it is this small against the terms it is made of;
    # the two gradients, and all their mixtures, are then the same to rounding.
    if distance <= 4 * np.finfo(float).eps * max(first, second):
        return np.array([0.5, 0.5])
    share = min(max((first - product) / distance, 0.0), 1.0)
    return np.array([1 - share, share])


def _face_weights(gram: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Solve by nonnegative least squares, from a factor of the gradients' correlations.

    Scaling by the lengths first keeps the digits of short gradients beside long ones.
    """
    values, vectors = np.linalg.eigh(gram / np.outer(lengths, lengths))
    factor = (np.sqrt(np.maximum(values, 0))[:, None] * vectors.T) * lengths
    # In units of the shortest gradient: the shortest vector is no longer than that, so d^2 <= 1
    # stays beside the 1 that it is added to, however long the others are.
    system = np.vstack([factor / lengths.min(), np.ones(len(gram))])
    solution, _ = nnls(system, np.append(np.zeros(len(gram)), 1.0))
    return np.asarray(solution / math.fsum(solution))
