"""Section 6.1: multi-target linear and multi-class logistic regression, losses and penalties.

With a loss l, the mean over the samples of ``|y - A x|_2^2`` or of the cross entropy of ``A x``:

    group sparsity (6):    min_A        l(A) + lambda sum_j |A_j|_2
    ShrinkNet (5), (8):    min_A,beta   l(A diag(beta)) + lambda |beta|_1 + lambda_2 |A|_p^p

A_j is column j, all that leads away from input j. At the best split of C = A diag(beta) ShrinkNet's
penalty is a concave function of the columns' norms, `equivalent_penalty`, where group sparsity has
the norms themselves: it shrinks large columns less. `regression_solvers` solves both.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Literal, get_args

import numpy as np
from scipy.special import log_softmax, softmax

from solvers import checks

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
        checks.one_of(get_args(Kind), kind=self.kind)
        if self.X.ndim != 2 or self.Y.ndim != 2 or len(self.X) != len(self.Y) or not self.X.size:
            raise ValueError(
                f"X, Y: got {self.X.shape} and {self.Y.shape}, want matrices of as many rows"
            )
        if not (np.isfinite(self.X).all() and np.isfinite(self.Y).all()):
            raise ValueError("X, Y: want finite numbers")
        if not 0 <= self.free < self.X.shape[1]:
            raise ValueError(f"free: got {self.free}, want 0 to {self.X.shape[1] - 1} columns of X")

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


def column_sparsity(A: np.ndarray, negligible: float = NEGLIGIBLE) -> float:
    """Return the share of columns all of whose weights are below `negligible` (section 6.1)."""
    return float(np.mean(np.all(np.abs(A) < negligible, axis=0)))


def group_objective(problem: Regression, A: np.ndarray, strength: float) -> float:
    """Return the value of (6)."""
    norms = np.linalg.norm(A[:, problem.penalised], axis=0)
    return problem.loss(A) + strength * float(norms.sum())


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
