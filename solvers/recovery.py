"""Sparse recovery from rectified Gaussian observations: program (8), its certificate, its odds.

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

**What decides.** Samples with x_p^T w* < 0 are slack at w* and, the program being convex, have no
say in whether w* is its minimiser. So recovery depends on the equations of Omega alone (basis
pursuit), and once lost or won it is monotone in the samples: `samples_needed` bisects.

References
----------
Aghasi et al., Net-Trim (2017), section 4: (8)-(10), proposition 2, theorem 3, corollary 1.
Amelunxen, Lotz, McCoy, Tropp, Living on the edge (2014), for the statistical dimension.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import joblib
import numpy as np
from scipy.optimize import linprog, minimize_scalar
from scipy.stats import binomtest, norm
from threadpoolctl import threadpool_limits

from solvers.workers import workers

# Weights that agree this well, relative to the largest, are the same: HiGHS gives some 1e-12.
_SAME = 1e-6
# Of a ceiling, relative to |x| |w|: HiGHS's own feasibility tolerance is 1e-7.
_TIGHT = 1e-9
_FEASIBLE = 1e-7
# A certificate's strict inequalities must hold by this much to be told from rounding.
_STRICT = 1e-7


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


@dataclass(frozen=True)
class RecoveryRate:
    """Outcome of a Monte Carlo.

    Attributes
    ----------
    successes, trials : int
        Trials in which (8) gave every column back, and all.
    certified : int
        Successes decided by a least-squares certificate; the others by solving and comparing.
    underdetermined : int
        Trials with fewer active samples than weights in some column: elsewhere the equations alone
        determine the weights, and |w|_1 has nothing to choose.
    lower, upper : float
        Clopper-Pearson limits of the probability, 95 %.
    """

    successes: int
    trials: int
    certified: int
    underdetermined: int
    lower: float
    upper: float


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
    """Decide whether feasible weights are the only solution of (8)."""
    return dual_certificate(inputs, response, weight) is not None


def recovers(inputs: np.ndarray, response: np.ndarray, weight: np.ndarray) -> tuple[bool, str]:
    """Decide whether (8) gives `weight` back: by certificate, else by solving and comparing.

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


def sample_size(sparsity: int, n_in: int, mu: float) -> int:
    """Theorem 3's number of samples, P = ceil((11 s + 7) mu ln N).

    Raises
    ------
    ValueError
        If ``1 <= sparsity <= n_in`` or ``mu > 1`` fails.
    """
    if not 1 <= sparsity <= n_in:
        raise ValueError(f"sparsity: want 1 to n_in = {n_in}, got {sparsity}")
    if not (mu > 1 and math.isfinite(mu)):
        raise ValueError(f"mu: want a number > 1, got {mu!r}")
    return math.ceil((11 * sparsity + 7) * mu * math.log(n_in))


def success_probability(n_in: int, mu: float) -> float:
    """Theorem 3's probability, 1 - N^(1 - mu)."""
    return 1 - n_in ** (1 - mu)


def columns_probability(sparsities: Sequence[int], n_in: int, mu: float) -> float:
    """Corollary 1's probability, with the fraction in the exponent.

    P = (11 s_max + 7) mu ln N samples are (11 s_m + 7) mu_m ln N with
    mu_m = mu (11 s_max + 7) / (11 s_m + 7), so that theorem 3 and the union bound give

        1 - sum_m N^(1 - mu (11 s_max + 7) / (11 s_m + 7)).

    (The paper prints the fraction as a factor beside N^(1 - mu).)
    """
    largest = 11 * max(sparsities) + 7
    return 1 - sum(n_in ** (1 - mu * largest / (11 * s + 7)) for s in sparsities)


def clopper_pearson(successes: int, trials: int, level: float = 0.95) -> tuple[float, float]:
    """Exact two-sided confidence limits of a binomial probability."""
    limits = binomtest(successes, trials).proportion_ci(level, method="exact")
    return float(limits.low), float(limits.high)


def sparse_weights(n_in: int, sparsity: int, rng: np.random.Generator) -> np.ndarray:
    """Draw weights with a random support of the given size and standard normal entries on it."""
    if not 1 <= sparsity <= n_in:
        raise ValueError(f"sparsity: want 1 to n_in = {n_in}, got {sparsity}")
    weight = np.zeros(n_in)
    weight[rng.choice(n_in, sparsity, replace=False)] = rng.standard_normal(sparsity)
    return weight


def monte_carlo(
    n_in: int,
    sparsities: Sequence[int],
    samples: int,
    *,
    trials: int,
    seed: np.random.SeedSequence | int,
    jobs: int = 1,
) -> RecoveryRate:
    """Estimate the probability that (8) recovers every column of W* from the same Gaussian samples.

    Parameters
    ----------
    n_in : int
        N.
    sparsities : sequence of int
        s_m of each column: one for theorem 3, several for corollary 1.
    samples : int
        P.
    trials : int
        Independent draws of inputs and weights.
    seed : SeedSequence or int
        Each trial has a child of its own, so that `jobs` changes nothing.
    jobs : int
        joblib workers, each with one linear algebra thread.
    """
    if samples < 1 or trials < 1:
        raise ValueError(f"samples, trials: want at least 1, got {samples} and {trials}")
    root = seed if isinstance(seed, np.random.SeedSequence) else np.random.SeedSequence(seed)
    outcomes = workers(jobs)(
        joblib.delayed(_trial)(n_in, tuple(sparsities), samples, child)
        for child in root.spawn(trials)
    )
    successes = sum(recovered for recovered, _, _ in outcomes)
    lower, upper = clopper_pearson(successes, trials)
    return RecoveryRate(
        successes=successes,
        trials=trials,
        certified=sum(certified for _, certified, _ in outcomes),
        underdetermined=sum(under for _, _, under in outcomes),
        lower=lower,
        upper=upper,
    )


def samples_needed(n_in: int, sparsity: int, rng: np.random.Generator) -> int:
    """Draw samples one after the other until (8) recovers a random sparse w*, and count them.

    Recovery is monotone in the samples, so the count's distribution function is the probability of
    recovery over P. Inactive samples have no say; the number of active ones is found by bisection,
    begun at the statistical dimension.
    """
    weight = sparse_weights(n_in, sparsity, rng)
    active, positions, drawn = np.zeros((0, n_in)), np.zeros(0, dtype=int), 0
    while len(active) < n_in:
        more = rng.standard_normal((2 * n_in, n_in))
        chosen = np.flatnonzero(more @ weight > 0)
        active = np.concatenate([active, more[chosen]])
        positions = np.concatenate([positions, drawn + chosen])
        drawn += len(more)
    response = active @ weight

    def enough(count: int) -> bool:
        return recovers(active[:count], response[:count], weight)[0]

    # Too few for full column rank on the support; enough for the equations alone.
    low, high = sparsity - 1, n_in
    guess = min(max(round(n_in * statistical_dimension(sparsity / n_in)), low + 1), high - 1)
    step = max(1, round(math.sqrt(n_in) / 3))
    while high - low > 1:
        if enough(guess):
            high, guess = guess, guess - step
        else:
            low, guess = guess, guess + step
        bracketed = low >= sparsity and high < n_in
        if bracketed or not low < guess < high:
            guess = (low + high) // 2
    return int(positions[high - 1]) + 1


def statistical_dimension(fraction: float) -> float:
    """Normalised statistical dimension of the l1 norm's descent cone at s = fraction N.

    ::

        psi(rho) = min over tau of  rho (1 + tau^2) + (1 - rho) E (|g| - tau)_+^2,   g ~ N(0, 1)

    About psi N Gaussian equations recover an s-sparse vector half of the time. Half of the samples
    of (8) are active, so it needs about 2 psi N.

    References
    ----------
    Amelunxen et al., Living on the edge (2014), proposition 4.5 and theorem II.
    """
    if not 0 < fraction <= 1:
        raise ValueError(f"fraction: want 0 < s/N <= 1, got {fraction!r}")

    def bound(tau: float) -> float:
        tail = 2 * ((1 + tau**2) * norm.sf(tau) - tau * norm.pdf(tau))
        return float(fraction * (1 + tau**2) + (1 - fraction) * tail)

    return float(minimize_scalar(bound, bounds=(0, 10), method="bounded").fun)


def _trial(
    n_in: int, sparsities: tuple[int, ...], samples: int, seed: np.random.SeedSequence
) -> tuple[bool, bool, bool]:
    """One draw: whether all columns came back, all by certificate, some underdetermined."""
    rng = np.random.default_rng(seed)
    with threadpool_limits(1, user_api="blas"):
        weights = [sparse_weights(n_in, s, rng) for s in sparsities]
        inputs = rng.standard_normal((samples, n_in))
        under, certified = False, True
        for weight in weights:
            response = np.maximum(inputs @ weight, 0)
            under |= int(np.count_nonzero(response)) < n_in
            recovered, decided_by = recovers(inputs, response, weight)
            certified &= decided_by == "certificate"
            if not recovered:
                return False, False, under
    return True, certified, under


def _checked(inputs: Any, response: Any) -> tuple[np.ndarray, np.ndarray]:
    """Both arrays in float64, or ValueError."""
    inputs = np.asarray(inputs, dtype=np.float64)
    response = np.asarray(response, dtype=np.float64)
    if inputs.ndim != 2 or 0 in inputs.shape:
        raise ValueError(f"inputs: want a nonempty matrix, got shape {inputs.shape}")
    if response.shape != (inputs.shape[0],):
        raise ValueError(f"response: want shape {(inputs.shape[0],)}, got {response.shape}")
    if not (np.isfinite(inputs).all() and np.isfinite(response).all()):
        raise ValueError("inputs, response: want finite numbers, got NaN or infinity")
    if response.min() < 0:
        raise ValueError(f"response: want rectified values >= 0, got {response.min():g}")
    return inputs, response


def _constraints_at(
    inputs: np.ndarray, response: np.ndarray, weight: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Rows that are equations at feasible weights, which of these are ceilings, the support."""
    weight = np.asarray(weight, dtype=np.float64)
    if weight.shape != (inputs.shape[1],):
        raise ValueError(f"weight: want shape {(inputs.shape[1],)}, got {weight.shape}")
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
