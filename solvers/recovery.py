"""Sparse recovery from rectified Gaussian observations: program (8) and its certificate.

One unit, epsilon = 0. From y = max(X w*, 0) the weights are to be found again by

    minimise    |w|_1
    subject to  x_p^T w = y_p    on Omega = {y_p > 0}                                        (8)
                x_p^T w <= 0     off Omega

a linear program, solved exactly by HiGHS. With the house's multiplier nu (nu >= 0 off Omega, and
c = X^T nu in minus the subdifferential of |w|_1) proposition 2 reads: feasible weights w are the
only solution if some nu has

    c_i = -sign w_i  on the support,          |c_i| < 1  off it,
    nu_p = 0  where x_p^T w < 0,              nu_p > 0   off Omega where x_p^T w = 0,

and the rows that are equations at w (Omega, and those with x_p^T w = 0) have full column rank on
the support. (The paper's Lambda is -c and nu off Omega.) For a linear program the converse holds
too, by strict complementarity: no such nu, no uniqueness.

References
----------
Aghasi et al., Net-Trim (2017), section 4: (8)-(10), proposition 2.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.optimize import linprog

_SAME = 1e-6
"""Weights that agree this well, relative to the largest, are the same: HiGHS gives some 1e-12. A
smaller value takes its rounding for a failure to recover."""

_TIGHT = 1e-9
"""Distance from a ceiling, relative to |x| |w|, below which it is tight: rounding of one inner
product. A larger one counts more rows as equations."""

_FEASIBLE = 1e-7
"""Violation, relative to the response, that HiGHS's answers may have: its own feasibility
tolerance."""

_STRICT = 1e-7
"""By how much a certificate's strict inequalities must hold, to be told from rounding. A larger one
calls fewer solutions unique."""


@dataclass(frozen=True, eq=False)
class Recovered:
    """The solution of (8) and its multiplier.

    Attributes
    ----------
    weight : ndarray of float64, shape (n_in,)
        A minimiser (a vertex of the solution set where there are several).
    multiplier : ndarray of float64, shape (n_samples,)
        nu, as `solvers.ConstrainedProgram` with epsilon = 0 takes it.
    rounds : int
        Linear programs solved; ceilings are added as they are found violated.
    """

    weight: np.ndarray
    multiplier: np.ndarray
    rounds: int


@dataclass(frozen=True, eq=False)
class DualCertificate:
    """Proof that given weights are the only solution of (8).

    Attributes
    ----------
    multiplier : ndarray of float64, shape (n_samples,)
        nu.
    margin : float
        By how much the strict inequalities hold: the smaller of 1 - max |c_i| off the support and
        the smallest nu_p that must be positive.
    found_by : {"least squares", "linear program"}
        What built it.
    """

    multiplier: np.ndarray
    margin: float
    found_by: str


def recover(inputs: np.ndarray, response: np.ndarray) -> Recovered:
    """Solve program (8) exactly for one unit.

    Parameters
    ----------
    inputs : ndarray, shape (n_samples, n_in)
        X.
    response : ndarray, shape (n_samples,)
        y >= 0.

    Returns
    -------
    Recovered

    Raises
    ------
    ValueError
        If an argument is malformed, or no weights give this response.
    RuntimeError
        If HiGHS stops without an answer.

    Notes
    -----
    HiGHS's dual simplex without presolve, which only costs time on dense data: basis pursuit on the
    equations first, then again with the ceilings its solution breaks. With 400 weights and 180
    equations 0.04 s (0.5 s for the program with all its rows at once).
    """
    inputs, response = _checked(inputs, response)
    active = response > 0
    scale_x = float(np.sqrt(np.mean(inputs**2))) or 1.0
    scale_y = float(response.max()) or 1.0
    x, y = inputs / scale_x, response / scale_y
    off = np.flatnonzero(~active)
    ceilings = np.zeros(0, dtype=int)
    norms = np.linalg.norm(x[off], axis=1)
    rounds = 0
    while True:
        rounds += 1
        weight, on_active, on_ceilings = _basis_pursuit(x[active], y[active], x[ceilings])
        over = x[off] @ weight > _FEASIBLE * np.maximum(1.0, norms * np.linalg.norm(weight))
        added = np.setdiff1d(off[over], ceilings)
        if not len(added):
            break
        ceilings = np.concatenate([ceilings, added])
    # HiGHS prices a constraint by how the optimum moves with its right side: lambda = -nu.
    multiplier = np.zeros(len(y))
    multiplier[active], multiplier[ceilings] = -on_active, np.maximum(-on_ceilings, 0)
    return Recovered(weight * scale_y / scale_x, multiplier / scale_x, rounds)


def dual_certificate(
    inputs: np.ndarray, response: np.ndarray, weight: np.ndarray
) -> DualCertificate | None:
    """Build the certificate of proposition 2, or find that there is none.

    Least squares first: the shortest nu on the equations that meets c = -sign w on the support.
    Where its |c| reaches 1 off the support, or a nu that must be positive is not, a linear program
    maximises the margin.

    Parameters
    ----------
    inputs : ndarray, shape (n_samples, n_in)
        X.
    response : ndarray, shape (n_samples,)
        y.
    weight : ndarray, shape (n_in,)
        Feasible for (8).

    Returns
    -------
    DualCertificate or None
        None: the weights are not the only solution of (8), or none at all.

    Raises
    ------
    ValueError
        If an argument is malformed or the weights are not feasible.
    RuntimeError
        If HiGHS stops without an answer.

    References
    ----------
    Aghasi et al., Net-Trim (2017), proposition 2.
    """
    inputs, response = _checked(inputs, response)
    tight, signed, support = _constraints_at(inputs, response, weight)
    if not _full_column_rank(inputs[tight][:, support]):
        return None
    signs = np.sign(weight[support])
    multiplier = np.zeros(len(response))
    multiplier[tight] = _least_squares(inputs[tight], support, signs)
    margin = certificate_margin(inputs, response, weight, multiplier)
    if margin > _STRICT:
        return DualCertificate(multiplier, margin, "least squares")
    best = _largest_margin(inputs[tight], signed, support, signs)
    if best is None:
        return None
    multiplier[tight] = best
    margin = certificate_margin(inputs, response, weight, multiplier)
    return DualCertificate(multiplier, margin, "linear program") if margin > _STRICT else None


def certificate_margin(
    inputs: np.ndarray, response: np.ndarray, weight: np.ndarray, multiplier: np.ndarray
) -> float:
    """Check the conditions of proposition 2 on a multiplier, apart from what built it.

    Parameters
    ----------
    inputs : array, shape (n_samples, n_in)
        The samples.
    response : array, shape (n_samples,)
        Rectified observations max(inputs @ weight, 0).
    weight : array, shape (n_in,)
        Weights that satisfy the program's constraints.
    multiplier : array, shape (n_samples,)
        Multiplier to check.

    Returns
    -------
    float
        The margin (see `DualCertificate`); -inf where an equality, the sign or the rank fails.
    """
    inputs, response = _checked(inputs, response)
    tight, signed, support = _constraints_at(inputs, response, weight)
    dual = inputs.T @ multiplier
    slack = np.setdiff1d(np.arange(len(response)), tight)
    equal = np.abs(dual[support] + np.sign(weight[support])).max(initial=0.0)
    if equal > _STRICT or multiplier[slack].any():
        return -math.inf
    if not _full_column_rank(inputs[tight][:, support]):
        return -math.inf
    inside = 1 - np.abs(np.delete(dual, support)).max(initial=0.0)
    return float(min(inside, multiplier[tight][signed].min(initial=math.inf)))


def is_unique(inputs: np.ndarray, response: np.ndarray, weight: np.ndarray) -> bool:
    """Decide whether feasible weights are the only solution of (8).

    Parameters
    ----------
    inputs : array, shape (n_samples, n_in)
        The samples.
    response : array, shape (n_samples,)
        Rectified observations max(inputs @ weight, 0).
    weight : array, shape (n_in,)
        Weights that satisfy the program's constraints.

    Returns
    -------
    bool
        Whether a dual certificate was found.
    """
    return dual_certificate(inputs, response, weight) is not None


def recovers(inputs: np.ndarray, response: np.ndarray, weight: np.ndarray) -> tuple[bool, str]:
    """Decide whether (8) gives `weight` back: by certificate, else by solving and comparing.

    Parameters
    ----------
    inputs : array, shape (n_samples, n_in)
        The samples.
    response : array, shape (n_samples,)
        Rectified observations max(inputs @ weight, 0).
    weight : array, shape (n_in,)
        Weights that satisfy the program's constraints.

    Returns
    -------
    recovered : bool
    decided_by : {"certificate", "comparison"}

    Notes
    -----
    The certificate is the least-squares one, which is cheap. Where it misses, basis pursuit on the
    equations at `weight` decides: the slack rows have no say (see the module), and with all rows
    the program is several times dearer.
    """
    inputs, response = _checked(inputs, response)
    tight, signed, support = _constraints_at(inputs, response, weight)
    if len(tight) < len(support):
        return False, "certificate"  # the equations cannot have full column rank on the support
    multiplier = np.zeros(len(response))
    multiplier[tight] = _least_squares(inputs[tight], support, np.sign(weight[support]))
    if certificate_margin(inputs, response, weight, multiplier) > _STRICT:
        return True, "certificate"
    if signed.any():
        found = recover(inputs, response).weight
    else:
        found = _basis_pursuit(inputs[tight], response[tight], inputs[:0])[0]
    size = float(np.abs(weight).max(initial=0.0))
    return bool(np.abs(found - weight).max() <= _SAME * size), "comparison"


def _checked(inputs: Any, response: Any) -> tuple[np.ndarray, np.ndarray]:
    """Both arrays in float64, or ValueError."""
    inputs = np.asarray(inputs, dtype=np.float64)
    response = np.asarray(response, dtype=np.float64)
    if inputs.ndim != 2 or 0 in inputs.shape:
        raise ValueError(f"inputs: got shape {inputs.shape}, want a nonempty matrix")
    if response.shape != (inputs.shape[0],):
        raise ValueError(f"response: got {response.shape}, want shape {(inputs.shape[0],)}")
    if not (np.isfinite(inputs).all() and np.isfinite(response).all()):
        raise ValueError("inputs, response: got NaN or infinity, want finite numbers")
    if response.min() < 0:
        raise ValueError(f"response: got {response.min():g}, want rectified values >= 0")
    return inputs, response


def _constraints_at(
    inputs: np.ndarray, response: np.ndarray, weight: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Rows that are equations at feasible weights, which of these are ceilings, the support."""
    weight = np.asarray(weight, dtype=np.float64)
    if weight.shape != (inputs.shape[1],):
        raise ValueError(f"weight: got {weight.shape}, want shape {(inputs.shape[1],)}")
    active = response > 0
    gap = inputs @ weight - response
    size = np.linalg.norm(inputs, axis=1) * np.linalg.norm(weight) + np.abs(response)
    wrong = np.where(active, np.abs(gap), np.maximum(gap, 0)) > _FEASIBLE * size
    if wrong.any():
        raise ValueError(f"weight: not feasible, {int(wrong.sum())} constraints of (8) are broken")
    tight = np.flatnonzero(active | (np.abs(gap) <= _TIGHT * size))
    return tight, ~active[tight], np.flatnonzero(weight)


def _full_column_rank(matrix: np.ndarray) -> bool:
    """Tell, by the smallest singular value, whether the columns are independent."""
    rows, columns = matrix.shape
    if columns == 0:
        return True
    if rows < columns:
        return False
    values = np.linalg.svd(matrix, compute_uv=False)
    return bool(values[-1] > max(matrix.shape) * np.finfo(np.float64).eps * values[0])


def _least_squares(rows: np.ndarray, support: np.ndarray, signs: np.ndarray) -> np.ndarray:
    """Find the shortest nu with rows^T nu = -signs on the support, as nearly as can be."""
    if not len(rows):
        return np.zeros(0)
    return np.linalg.lstsq(rows[:, support].T, -signs, rcond=None)[0]


def _largest_margin(
    rows: np.ndarray, signed: np.ndarray, support: np.ndarray, signs: np.ndarray
) -> np.ndarray | None:
    """Maximise the margin t: |c_i| <= 1 - t off the support, nu_p >= t on ceilings, t <= 1."""
    others = np.delete(rows, support, axis=1).T
    one = np.ones((len(others), 1))
    floors = -np.eye(len(rows))[signed]
    upper = np.vstack(
        [
            np.hstack([others, one]),
            np.hstack([-others, one]),
            np.hstack([floors, np.ones((len(floors), 1))]),
        ]
    )
    limit = np.concatenate([np.ones(2 * len(others)), np.zeros(len(floors))])
    answer = linprog(
        np.concatenate([np.zeros(len(rows)), [-1.0]]),
        A_ub=upper,
        b_ub=limit,
        A_eq=np.hstack([rows[:, support].T, np.zeros((len(support), 1))]) if len(support) else None,
        b_eq=-signs if len(support) else None,
        bounds=[(None, None)] * len(rows) + [(None, 1.0)],
        method="highs-ds",
    )
    if answer.status == 2:  # infeasible: no nu meets the signs
        return None
    if answer.status != 0:
        raise RuntimeError(f"HiGHS found no certificate and no reason: {answer.message}")
    return _onto_signs(answer.x[:-1], rows[:, support], signs)


def _onto_signs(nu: np.ndarray, rows: np.ndarray, signs: np.ndarray) -> np.ndarray:
    """Correct the solver's rounding: move nu as little as possible to rows^T nu = -signs."""
    if not rows.size:
        return nu
    return nu + np.linalg.lstsq(rows.T, -signs - rows.T @ nu, rcond=None)[0]


def _basis_pursuit(
    rows: np.ndarray, values: np.ndarray, ceilings: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Minimise |w|_1 subject to rows w = values, ceilings w <= 0, by halves w = w+ - w-."""
    n_in = rows.shape[1]
    answer = linprog(
        np.ones(2 * n_in),
        A_eq=np.hstack([rows, -rows]) if len(rows) else None,
        b_eq=values if len(rows) else None,
        A_ub=np.hstack([ceilings, -ceilings]) if len(ceilings) else None,
        b_ub=np.zeros(len(ceilings)) if len(ceilings) else None,
        bounds=(0, None),
        method="highs-ds",
        options={"presolve": False},
    )
    if answer.status == 2:
        raise ValueError("response: no weights give it; (8) is infeasible")
    if answer.status != 0:
        raise RuntimeError(f"HiGHS did not solve (8): {answer.message}")
    return answer.x[:n_in] - answer.x[n_in:], answer.eqlin.marginals, answer.ineqlin.marginals
