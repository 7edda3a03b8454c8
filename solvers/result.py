"""What every solver of a layer program returns: a status, a certificate, the weights."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import Any

import numpy as np

Array = Any


class Status(Enum):
    """How a solve ended. Decided by the certificate, not by what a solver says of itself."""

    SOLVED = "solved"
    INEXACT = "inexact"
    ITERATION_LIMIT = "iteration limit"
    UNREACHABLE = "unreachable"
    NUMERICAL_ERROR = "numerical error"

    @property
    def remedy(self) -> str:
        """What a person can do about it."""
        return _REMEDY[self]


_REMEDY = {
    Status.SOLVED: "nothing to do",
    Status.INEXACT: (
        "the solver stopped by itself short of the certificate asked for: "
        "ask for less (tolerance), or solve in float64"
    ),
    Status.ITERATION_LIMIT: (
        "raise max_iterations, go on from this result (warm_start), ask for less (tolerance), or "
        "use solve_newton, which also tells what cannot be reached"
    ),
    Status.UNREACHABLE: (
        "the dual bound proves that only weights of a million times the usual objective, if any, "
        "come within epsilon of the targets and under the ceilings: raise epsilon to 1 + 2 v times "
        "what it is (to 2 v |Y| if it is 0), v the ball_violation that solve_newton's certificate "
        "shows, or raise the ceilings"
    ),
    Status.NUMERICAL_ERROR: (
        "no finite point was found: start afresh (without warm_start), use another solver, or "
        "check the data's range"
    ),
}
"""What a person can do about each status, in the words of the solvers' arguments."""


@dataclass(frozen=True)
class Certificate:
    """Evidence on a pair (weights, multiplier), computed in float64 from the program's data alone.

    Every field has shape () for a program solved as a whole (constrained form) and (n_out,) for one
    that decouples (regularised form).

    Attributes
    ----------
    objective : ndarray
        Objective f of the weights.
    dual_bound : ndarray
        Lower bound D on the optimum, from the multiplier.
    gap : ndarray
        ``|f - D| / max(|f|, |D|, 1e-6 penalty(old weights))``. Means something only together with
        the violations: an infeasible point's objective may lie below the optimum.
    ball_violation : ndarray
        ``(r - epsilon)_+ / epsilon``, r the residual norm over the fitted entries; ``r / |Y|`` when
        epsilon = 0; zero in the regularised form.
    ceiling_violation : ndarray
        ``|(z - v)_+|_F / |Y|_F`` over the entries under a ceiling.
    largest_violation : ndarray
        The largest ``(z - v)_+``, in the units of the responses.
    """

    objective: np.ndarray
    dual_bound: np.ndarray
    gap: np.ndarray
    ball_violation: np.ndarray
    ceiling_violation: np.ndarray
    largest_violation: np.ndarray

    @property
    def violation(self) -> np.ndarray:
        """The larger of the two relative violations."""
        return np.maximum(self.ball_violation, self.ceiling_violation)

    def within(self, tolerance: float, violation_tolerance: float) -> np.ndarray:
        """Tell, per entry, whether gap and violations are both within tolerance (NaN is not).

        Parameters
        ----------
        tolerance : float
            Largest relative gap.
        violation_tolerance : float
            Largest relative violation.

        Returns
        -------
        bool ndarray, shape () or (n_out,)
            True where it is met.
        """
        return (self.gap <= tolerance) & (self.violation <= violation_tolerance)


@dataclass(frozen=True)
class SolveResult:
    """The outcome of a solve.

    Attributes
    ----------
    weight : array, shape (n_in, n_out)
        The weights, of the inputs' namespace, dtype and device, exactly zero where they are pruned.
    multiplier : array, shape (n_samples, n_out)
        The multiplier behind the certificate's bound.
    status : Status
        How the solve ended; ``status.remedy`` says what to do about it.
    certificate : Certificate
        Of ``weight`` as returned, after any rounding to its dtype.
    certified : ndarray of bool
        Which units (or, shape (), whether the layer) the certificate holds for.
    iterations : int
        Iterations used (the largest over units for solvers that work unit by unit).
    solver : str
        Name of the solver.
    setup_seconds, solve_seconds : float
        Wall time of what could be shared between solves, and of the solve.
    penalty_parameter : array or None
        ADMM's final penalty, for warm starts.
    history : tuple of dict
        Gap and violation at each check, for those who plot.
    """

    weight: Array
    multiplier: Array
    status: Status
    certificate: Certificate
    certified: np.ndarray
    iterations: int
    solver: str
    setup_seconds: float
    solve_seconds: float
    penalty_parameter: Array | None = None
    history: tuple[dict[str, float], ...] = field(default=())


def judge(
    certified: np.ndarray, *, finite: bool, exhausted: bool, unreachable: bool = False
) -> Status:
    """Choose the status from the certificate.

    Parameters
    ----------
    certified : ndarray of bool
        `Certificate.within` of the returned point.
    finite : bool
        Whether the returned point, and the iterate behind it, are finite.
    exhausted : bool
        Whether the solver used up its iterations (rather than stopping by itself).
    unreachable : bool
        Whether the bound proves that no weights of use meet the constraints (`solvers.reach`).

    Returns
    -------
    Status
        The first that applies: numerical error, solved, unreachable, iteration limit, inexact.
    """
    if not finite:
        return Status.NUMERICAL_ERROR
    if bool(np.all(certified)):
        return Status.SOLVED
    if unreachable:
        return Status.UNREACHABLE
    return Status.ITERATION_LIMIT if exhausted else Status.INEXACT
