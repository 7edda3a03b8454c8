"""Section 6.1: multi-target linear and multi-class logistic regression, by proximal methods.

With a loss l, the mean over the samples of ``|y - A x|_2^2`` or of the cross entropy of ``A x``:

    group sparsity (6):    min_A        l(A) + lambda sum_j |A_j|_2
    ShrinkNet (5), (8):    min_A,beta   l(A diag(beta)) + lambda |beta|_1 + lambda_2 |A|_p^p

A_j is column j, all that leads away from input j. Group sparsity is convex: accelerated proximal
gradient descent finds its minimum. ShrinkNet is not. At the best split of C = A diag(beta) its
penalty is a concave function of the columns' norms (`equivalent_penalty`); its tangents are
weighted group sparsities, which are solved one after the other. That only ever descends, and what
it finds depends on where it starts. These are references that the switch layers, trained by any
optimiser, can be held against.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, get_args

import numpy as np
from scipy.special import log_softmax, softmax

Kind = Literal["linear", "logistic"]
NEGLIGIBLE = 1e-3
"""Section 6.1: a column is gone when all its weights are below this in absolute value."""


@dataclass(frozen=True, eq=False)
class Regression:
    """Data of a regression, and its loss.

    Attributes
    ----------
    X : ndarray, shape (m, p)
        Samples as rows.
    Y : ndarray, shape (m, n)
        Targets; for "logistic" the shares of the classes, rows that sum to 1 (one-hot labels).
    kind : {"linear", "logistic"}
        The loss.
    free : int, optional
        How many of the last columns of X are not penalised and have no switch: 1 for a column of
        ones that carries the bias.
    """

    X: np.ndarray
    Y: np.ndarray
    kind: Kind
    free: int = 0

    def __post_init__(self) -> None:
        if self.kind not in get_args(Kind):
            raise ValueError(
                f"kind: one of {', '.join(get_args(Kind))} was wanted, not {self.kind!r}"
            )
        if self.X.ndim != 2 or self.Y.ndim != 2 or len(self.X) != len(self.Y) or not self.X.size:
            raise ValueError(
                f"X, Y: matrices of as many rows were wanted, not {self.X.shape} and {self.Y.shape}"
            )
        if not (np.isfinite(self.X).all() and np.isfinite(self.Y).all()):
            raise ValueError("X, Y: finite numbers were wanted")
        if not 0 <= self.free < self.X.shape[1]:
            raise ValueError(
                f"free: 0 to {self.X.shape[1] - 1} columns of X were wanted, not {self.free}"
            )

    def loss(self, A: np.ndarray) -> float:
        """Return the mean over the samples, A of shape (n, p)."""
        scores = self.X @ A.T
        if self.kind == "linear":
            return float(np.sum((self.Y - scores) ** 2) / len(self.X))
        return float(-np.sum(self.Y * log_softmax(scores, axis=1)) / len(self.X))

    def normalised(self, A: np.ndarray) -> float:
        """Return the loss over that of the best constant prediction: 1 when nothing is learned.

        In [0, 1] for every fit that is better than a constant on its own data. The draft says that
        its losses are normalised to [0, 1], and not how.
        """
        return self.loss(A) / self._constant_loss

    def gradient(self, A: np.ndarray) -> np.ndarray:
        """Return the derivative of the loss, shape (n, p)."""
        if self.kind == "linear":
            second, cross = self._moments
            return 2 * (A @ second - cross)
        return (softmax(self.X @ A.T, axis=1) - self.Y).T @ self.X / len(self.X)

    @cached_property
    def curvature(self) -> float:
        """Lipschitz constant of the gradient.

        The Hessian of the squared error is 2 S, with S = X^T X / m; that of the cross entropy is
        at most S / 2, since diag(p) - p p^T has no eigenvalue above 1/2.
        """
        largest = float(np.linalg.norm(self.X, 2) ** 2 / len(self.X))
        return 2 * largest if self.kind == "linear" else largest / 2

    @cached_property
    def _moments(self) -> tuple[np.ndarray, np.ndarray]:
        return self.X.T @ self.X / len(self.X), self.Y.T @ self.X / len(self.X)

    @cached_property
    def _constant_loss(self) -> float:
        mean = self.Y.mean(0)
        if self.kind == "linear":
            return float(np.sum((self.Y - mean) ** 2) / len(self.Y))
        return float(-np.sum(mean[mean > 0] * np.log(mean[mean > 0])))

    @property
    def penalised(self) -> slice:
        """Columns with a penalty and a switch."""
        return slice(0, self.X.shape[1] - self.free)


@dataclass(frozen=True, eq=False)
class Fit:
    """What a solver found.

    Attributes
    ----------
    A : ndarray, shape (n, p)
        The regression's matrix; for ShrinkNet A diag(beta), the switches folded in.
    objective : float
        Loss and penalty.
    gradients : int
        How many gradients of the loss were taken.
    converged : bool
        Whether a step changed less than the tolerance before the gradients ran out.
    beta : ndarray or None, shape (p,)
        The switches; 1 for free columns.
    """

    A: np.ndarray
    objective: float
    gradients: int
    converged: bool
    beta: np.ndarray | None = None


def column_sparsity(A: np.ndarray, negligible: float = NEGLIGIBLE) -> float:
    """Return the share of columns all of whose weights are below `negligible` (section 6.1)."""
    return float(np.mean(np.all(np.abs(A) < negligible, axis=0)))


def group_objective(problem: Regression, A: np.ndarray, strength: float) -> float:
    """Return the value of (6)."""
    norms = np.linalg.norm(A[:, problem.penalised], axis=0)
    return problem.loss(A) + strength * float(norms.sum())


def solve_group(
    problem: Regression,
    strength: float,
    *,
    gradients: int = 10_000,
    tolerance: float = 1e-8,
    start: np.ndarray | None = None,
) -> Fit:
    """Minimise (6) by accelerated proximal gradient descent, restarted when momentum goes uphill.

        minimise_A  l(A) + lambda sum_j |A_j|_2

    Parameters
    ----------
    problem : Regression
        Gives l; free columns are not penalised.
    strength : float
        lambda, at least 0, with sqrt(n) inside it as in (4).
    gradients : int
        At most so many gradients of the loss.
    tolerance : float
        Stop when a step moves A by less than this times max(1, |A|_F).
    start : ndarray, shape (n, p), optional
        Zeros by default.

    Returns
    -------
    Fit
        ``converged`` is False where the gradients ran out first.

    References
    ----------
    The draft's (6); Beck and Teboulle, FISTA (2009); O'Donoghue and Candes,
    adaptive restart (2015).
    """
    _check(strength=strength)
    A, count, moved = _descend(
        problem,
        _start(problem, start),
        lambda values, step: _shrink_columns(values, step * strength, problem.penalised),
        gradients,
        tolerance,
    )
    return Fit(A, group_objective(problem, A, strength), count, moved < tolerance)


def _descend(
    problem: Regression,
    A: np.ndarray,
    prox: Callable[[np.ndarray, float], np.ndarray],
    gradients: int,
    tolerance: float,
) -> tuple[np.ndarray, int, float]:
    """Descend by accelerated proximal steps, restarted when momentum goes uphill.

    `prox` takes a matrix and a step size. Returns A, how many gradients were taken, and how far
    the last step went.
    """
    ahead, momentum, step = A, 1.0, 1 / problem.curvature
    count, moved = 0, math.inf
    while count < gradients and moved >= tolerance:
        count += 1
        new = prox(ahead - step * problem.gradient(ahead), step)
        if np.sum((ahead - new) * (new - A)) > 0:
            momentum = 1.0
        following = (1 + math.sqrt(1 + 4 * momentum**2)) / 2
        ahead = new + (momentum - 1) / following * (new - A)
        moved, A, momentum = _moved(A, new), new, following
    return A, count, moved


def shrink_objective(
    problem: Regression,
    A: np.ndarray,
    beta: np.ndarray,
    strength: float,
    weight_strength: float,
    power: int,
) -> float:
    """Return the value of (7): loss, (1), and the second term of (8)."""
    columns = problem.penalised
    penalty = strength * float(np.abs(beta[columns]).sum())
    penalty += weight_strength * float(np.sum(np.abs(A[:, columns]) ** power))
    return problem.loss(A * beta) + penalty


def solve_shrink(
    problem: Regression,
    strength: float,
    weight_strength: float,
    *,
    power: int = 2,
    gradients: int = 10_000,
    tolerance: float = 1e-8,
    start: np.ndarray | None = None,
) -> Fit:
    """Descend on (7) by majorising its penalty, and minimising that, in turn.

        minimise_A,beta  l(A diag(beta)) + lambda |beta|_1 + lambda_2 |A|_p^p
        = minimise_C     l(C) + sum_j phi(|C_j|_p),       phi by `equivalent_penalty`

    phi is concave, so it lies below its tangent at the present norms c_j: what is minimised next is
    ``l(C) + sum_j phi'(c_j) |C_j|_p``, by accelerated proximal steps. A column that is zero has an
    infinite slope there, and stays zero.

    Parameters
    ----------
    problem : Regression
        Gives l; free columns are not penalised and keep beta_j = 1.
    strength, weight_strength : float
        lambda and lambda_2. Both above 0, or there is no minimum (proposition A.3).
    power : {1, 2}
        p.
    gradients, tolerance
        As for `solve_group`; the tolerance is on C from tangent to tangent.
    start : ndarray, shape (n, p), optional
        C to begin with. By default the minimum with all switches at 1, which for p = 2 is a ridge
        regression, sought with a quarter of the gradients.

    Returns
    -------
    Fit
        A local minimum, or where the gradients ran out. The objective never rises.

    References
    ----------
    The draft's (7) and (8). Majorising a concave penalty by its tangents: Zou and Li (2008);
    reweighted l1, Candes, Wakin and Boyd (2008).
    """
    _check(strength=strength, weight_strength=weight_strength)
    if strength == 0 or weight_strength == 0:
        raise ValueError(
            f"strength, weight_strength: above 0 were wanted, not {strength} and "
            f"{weight_strength}: without one of them there is no minimum"
        )
    if power not in (1, 2):
        raise ValueError(f"power: 1 or 2 was wanted, not {power!r}")
    columns = problem.penalised
    count, moved = 0, math.inf
    C = _start(problem, start)
    if start is None:
        with_all = _prox_weights(weight_strength, power, columns)
        C, count, _ = _descend(problem, C, with_all, gradients // 4, tolerance)

    def value(C: np.ndarray) -> float:
        norms = _norms(C[:, columns], power)
        penalty = equivalent_penalty(norms, strength, weight_strength, power)
        return problem.loss(C) + float(np.sum(penalty))

    best, inner = value(C), _INNER
    while count < gradients and moved >= tolerance:
        slopes = _slopes(_norms(C[:, columns], power), strength, weight_strength, power)
        prox = _prox_tangent(slopes, power, columns)
        new, taken, _ = _descend(problem, C, prox, min(inner, gradients - count), tolerance / 10)
        count += taken
        reached = value(new)
        if reached > best and inner > 1:
            inner = 1  # momentum overshot; a step without it cannot
            continue
        moved, C, best, inner = _moved(C, new), new, reached, _INNER
    A, beta = C.copy(), np.ones(C.shape[1])
    A[:, columns], beta[columns] = split_columns(C[:, columns], strength, weight_strength, power)
    objective = shrink_objective(problem, A, beta, strength, weight_strength, power)
    return Fit(C, objective, count, moved < tolerance, beta)


_INNER = 25
"""Gradients on one tangent."""


def _norms(C: np.ndarray, power: int) -> np.ndarray:
    return np.linalg.norm(C, ord=power, axis=0)


def _slopes(norms: np.ndarray, strength: float, weight_strength: float, power: int) -> np.ndarray:
    """Return phi' at the norms; infinite at 0."""
    safe = np.where(norms > 0, norms, 1.0)
    share = 1 / 2 if power == 1 else 2 / 3  # phi is a multiple of the norm to this power
    slopes = share * equivalent_penalty(safe, strength, weight_strength, power) / safe
    return np.where(norms > 0, slopes, np.inf)


Prox = Callable[[np.ndarray, float], np.ndarray]


def _prox_tangent(slopes: np.ndarray, power: int, columns: slice) -> Prox:
    """The proximal step of ``sum_j slope_j |C_j|_p``."""

    def prox(values: np.ndarray, step: float) -> np.ndarray:
        if power == 2:
            return _shrink_columns(values, step * slopes, columns)
        shrunk = values.copy()
        shrunk[:, columns] = _shrink(values[:, columns], step * slopes)
        return shrunk

    return prox


def _prox_weights(weight_strength: float, power: int, columns: slice) -> Prox:
    """The proximal step of ``lambda_2 |C|_p^p``."""

    def prox(values: np.ndarray, step: float) -> np.ndarray:
        shrunk = values.copy()
        if power == 2:
            shrunk[:, columns] /= 1 + 2 * step * weight_strength
        else:
            shrunk[:, columns] = _shrink(values[:, columns], step * weight_strength)
        return shrunk

    return prox


def _shrink(values: np.ndarray, amount: np.ndarray | float) -> np.ndarray:
    return np.sign(values) * np.maximum(np.abs(values) - amount, 0.0)


def equivalent_penalty(
    norm: np.ndarray, strength: float, weight_strength: float, power: int
) -> np.ndarray:
    """Return what (8) comes to for a column C_j = A_j beta_j, split at its best.

        p = 2:  min_b lambda b + lambda_2 |C_j|_2^2 / b^2
                = (3/2) lambda^(2/3) (2 lambda_2)^(1/3) |C_j|_2^(2/3)
        p = 1:  min_b lambda b + lambda_2 |C_j|_1 / b = 2 sqrt(lambda lambda_2 |C_j|_1)

    Parameters
    ----------
    norm : ndarray
        |C_j|_2 for p = 2, |C_j|_1 for p = 1.

    Notes
    -----
    The derivative in b is zero at b^3 = 2 lambda_2 |C_j|_2^2 / lambda, and at b^2 = lambda_2
    |C_j|_1 / lambda. Both penalties are concave in the norm with an infinite slope at 0: a column
    that has become zero is a local minimum whatever lambda, and a large one is hardly shrunk.
    """
    if power == 1:
        return 2 * np.sqrt(strength * weight_strength * norm)
    scale = 1.5 * strength ** (2 / 3) * (2 * weight_strength) ** (1 / 3)
    return scale * norm ** (2 / 3)


def split_columns(
    C: np.ndarray, strength: float, weight_strength: float, power: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return A and beta >= 0 with A diag(beta) = C and the least penalty, `equivalent_penalty`."""
    if power == 1:
        beta = np.sqrt(weight_strength / strength * np.abs(C).sum(0))
    else:
        beta = np.cbrt(2 * weight_strength / strength * np.sum(C**2, axis=0))
    return C / np.where(beta > 0, beta, 1.0), beta


def _shrink_columns(A: np.ndarray, amount: np.ndarray | float, columns: slice) -> np.ndarray:
    """Return A with columns shrunk by `amount`, those no longer than it exactly zero."""
    shrunk = A.copy()
    norms = np.linalg.norm(A[:, columns], axis=0)
    scale = np.maximum(1 - amount / np.where(norms > 0, norms, 1.0), 0.0)
    shrunk[:, columns] *= np.where(norms > 0, scale, 0.0)
    return shrunk


def _start(problem: Regression, start: np.ndarray | None) -> np.ndarray:
    shape = (problem.Y.shape[1], problem.X.shape[1])
    if start is None:
        return np.zeros(shape)
    if start.shape != shape:
        raise ValueError(f"start: shape {shape} was wanted, not {start.shape}")
    return start.astype(float)


def _moved(before: np.ndarray, after: np.ndarray) -> float:
    return float(np.linalg.norm(after - before) / max(1.0, float(np.linalg.norm(after))))


def _check(**values: float) -> None:
    for name, value in values.items():
        if not (value >= 0 and math.isfinite(value)):
            raise ValueError(f"{name}: a finite number of at least 0 was wanted, not {value!r}")
