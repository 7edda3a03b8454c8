"""Multipliers moved into the boxes of their inputs, where columns differ by orders of magnitude.

The certificate wants |c_i| <= w_i for c = X^T nu, in a solver's units (`solvers.scaling`), with
weights w_i over orders of magnitude, while nu is as large as the largest of them in use. ADMM's nu
is soon accurate beside its own size, and stays far from the small boxes for long; scaling it into
them all leaves nothing of the bound. The nearest multiplier inside them is nearly as good as nu:

    minimise |v - nu|^2   subject to   |X^T v| <= w,   v >= 0 off Omega.

It is found closely enough unit by unit: the inputs beyond their boxes join a set B, whose duals
are put on the nearest end of the box by the smallest change of the entries that may move (those on
Omega and those above 0), after which entries off Omega are clipped at 0; and again, until none is
beyond. A free input has the box 0. The outcome is a candidate: the program's own bound judges it.
"""

from __future__ import annotations

import numpy as np
from scipy.linalg.lapack import dposv

_ROUNDS = 25
"""Projections at most; a few are usual. More spend longer on programs whose repair fails."""

_BEYOND = 1e-3
"""How far beyond its box an input's dual must be to be repaired. The certificate's scale does the
rest; a larger one leaves more to it, and with it a larger gap."""

_REGULAR = 1e-12
"""Fraction of the mean diagonal added to the repaired inputs' Gram matrix, since inputs may depend
on each other. A larger one repairs less."""


def into_boxes(
    inputs: np.ndarray,
    box: np.ndarray,
    active: np.ndarray,
    nu: np.ndarray,
    support: np.ndarray | None = None,
) -> np.ndarray:
    """Move multipliers into the boxes |X^T nu| <= box.

    Parameters
    ----------
    inputs : array, shape (n_samples, n_in), float64
        X.
    box : array, shape (n_in,) or (n_in, n_out)
        Largest magnitude of each input's dual; 0 for a free one.
    active : bool array, shape (n_samples, n_out)
        Omega.
    nu : array, shape (n_samples, n_out)
        Multipliers.
    support : bool array, shape (n_in, n_out), optional
        Weights that may be nonzero; the others have no box.

    Returns
    -------
    array, shape (n_samples, n_out), float64
    """
    out = np.where(active, nu, np.maximum(nu, 0.0)).astype(np.float64)
    boxes = np.broadcast_to(box.T, (nu.shape[1], len(box)))
    for unit in range(nu.shape[1]):
        allowed = np.ones(len(box), bool) if support is None else support[:, unit]
        out[:, unit] = _one_unit(inputs, boxes[unit], active[:, unit], out[:, unit], allowed)
    return out


def _one_unit(
    inputs: np.ndarray, box: np.ndarray, active: np.ndarray, nu: np.ndarray, allowed: np.ndarray
) -> np.ndarray:
    """Do the same for one unit."""
    held = allowed & (box == 0)
    for _ in range(_ROUNDS):
        dual = inputs.T @ nu
        beyond = allowed & (np.abs(dual) > box * (1 + _BEYOND)) & (box > 0)
        if not beyond.any():
            break
        held |= beyond
        moving = active | (nu > 0)
        columns = inputs[np.ix_(moving, held)]
        excess = dual[held] - np.clip(dual[held], -box[held], box[held])
        gram = columns.T @ columns
        mean = float(np.trace(gram)) / len(gram)
        if mean == 0 or not np.isfinite(mean):
            break
        gram[np.diag_indices_from(gram)] += _REGULAR * mean
        _, change, info = dposv(gram, excess)
        if info != 0:
            break  # too dependent: what has been reached is judged
        nu = nu.copy()
        nu[moving] -= columns @ change
        nu = np.where(active, nu, np.maximum(nu, 0.0))
    return nu
