"""Statistics of recovery from rectified Gaussian observations: rates, sizes, the transition.

**What decides.** Samples with x_p^T w* < 0 are slack at w* and, the program being convex, have no
say in whether w* is its minimiser. So recovery depends on the equations of Omega alone (basis
pursuit), and once lost or won it is monotone in the samples: `samples_needed` bisects.

References
----------
Aghasi et al., Net-Trim (2017), section 4: theorem 3, corollary 1.
Amelunxen, Lotz, McCoy, Tropp, Living on the edge (2014), for the statistical dimension.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import joblib
import numpy as np
from scipy.optimize import minimize_scalar
from scipy.stats import binomtest, norm
from threadpoolctl import threadpool_limits

from solvers.recovery import recovers
from solvers.workers import workers


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


def sample_size(sparsity: int, n_in: int, mu: float) -> int:
    """Theorem 3's number of samples, P = ceil((11 s + 7) mu ln N).

    Raises
    ------
    ValueError
        If ``1 <= sparsity <= n_in`` or ``mu > 1`` fails.
    """
    if not 1 <= sparsity <= n_in:
        raise ValueError(f"sparsity: got {sparsity}, want 1 to n_in = {n_in}")
    if not (mu > 1 and math.isfinite(mu)):
        raise ValueError(f"mu: got {mu!r}, want a number > 1")
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
        raise ValueError(f"sparsity: got {sparsity}, want 1 to n_in = {n_in}")
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
        raise ValueError(f"samples, trials: got {samples} and {trials}, want at least 1")
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
        raise ValueError(f"fraction: got {fraction!r}, want 0 < s/N <= 1")

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
