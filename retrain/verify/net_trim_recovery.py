"""Net-Trim's statements on sparse recovery: proposition 2, theorem 3, corollary 1, the transition.

`solvers.recovery` solves and decides; here are the odds. Theorem 3 promises recovery from
P = (11 s + 7) mu ln N Gaussian samples; how many are needed in fact is measured by
``net-trim/phase-transition``, whose summary holds the constant that the transition suggests.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from retrain.verify import pictures
from retrain.verify.net_trim import PAPER
from retrain.verify.recovery_statistics import (
    RecoveryRate,
    columns_probability,
    monte_carlo,
    sample_size,
    samples_needed,
    sparse_weights,
    statistical_dimension,
    success_probability,
)
from retrain.verify.statement import Case, Level, Numbers, Row, Statement
from solvers.recovery import dual_certificate, recover

_BOOTSTRAP = 2000
_SPARSE = 0.1  # the fraction s/N up to which the theorem's form, linear in s, is near the truth


# Proposition 2 ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Instance:
    """Samples, response, the weights that made it, and whether another solution is built in."""

    inputs: np.ndarray
    response: np.ndarray
    weight: np.ndarray
    other: np.ndarray | None


def instance(case: Case, rng: np.random.Generator) -> Instance:
    """A Gaussian instance, or one of three that were made to have a second solution.

    "twin": two equal columns, one in the support; "dependent": two equal columns, both in it, so
    that only the rank condition fails; "slack": a response of zero, where w* = 0 is the only
    solution and every ceiling is tight at it.
    """
    n_in, samples = case["n_in"], case["samples"]
    inputs = rng.standard_normal((samples, n_in))
    weight = sparse_weights(n_in, case["sparsity"], rng)
    first = int(np.flatnonzero(weight)[0])
    other = None
    if case["kind"] in ("twin", "dependent"):
        second = int(np.flatnonzero(weight == 0)[0])
        inputs[:, second] = inputs[:, first]
        if case["kind"] == "dependent":
            weight[second] = weight[first] / 2
        other = weight.copy()
        other[[first, second]] = 0, weight[first] + weight[second]
    if case["kind"] == "slack":
        weight[:] = 0
    if case["kind"] == "tight":
        # Samples orthogonal to w*: their ceilings hold with equality at it.
        half = inputs[: samples // 4]
        half -= np.outer(half @ weight, weight) / (weight @ weight)
    response = inputs @ weight
    response[np.abs(response) < 1e-12] = 0
    return Instance(inputs, np.maximum(response, 0), weight, other)


def uniqueness_errors(case: Instance) -> Numbers:
    """How far certificate and solution contradict each other.

    "certified, not recovered": the distance of (8)'s solution from w* where a certificate was
    found. "uncertified, recovered": 1 where no certificate was found and yet no other weights are
    as short: neither the second solution that is built in, nor the one that HiGHS finds.
    "certified, not unique": 1 where a certificate was found for an instance with a second solution.
    """
    certificate = dual_certificate(case.inputs, case.response, case.weight)
    found = recover(case.inputs, case.response).weight
    size = max(float(np.abs(case.weight).max()), 1.0)
    distance = float(np.abs(found - case.weight).max()) / size
    unique = case.other is None and distance < 1e-6
    return {
        "certified, not recovered": distance if certificate is not None else 0.0,
        "uncertified, recovered": float(certificate is None and unique),
        "certified, not unique": float(certificate is not None and case.other is not None),
    }


def uniqueness_details(case: Instance) -> dict[str, Any]:
    """How the certificate was found, and its margin."""
    certificate = dual_certificate(case.inputs, case.response, case.weight)
    if certificate is None:
        return {"found_by": None}
    return {"found_by": certificate.found_by, "margin": certificate.margin}


def uniqueness_cases(level: Level) -> list[Case]:
    """Sample counts around the transition, and the instances made for it."""
    n_in, sparsity = 40, 4
    repeats = 2 if level == "quick" else 20
    cases = [
        {
            "n_in": n_in,
            "sparsity": sparsity,
            "samples": samples,
            "kind": "gaussian",
            "repeat": index,
        }
        for samples in (12, 20, 30, 40, 60, 100)
        for index in range(repeats)
    ]
    return cases + [
        {"n_in": n_in, "sparsity": sparsity, "samples": 60, "kind": kind, "repeat": index}
        for kind in ("twin", "dependent", "tight", "slack")
        for index in range(repeats)
    ]


def count_certificates(rows: Sequence[Row]) -> dict[str, Any]:
    """Count the instances by what certified them."""
    found = [row.details["found_by"] for row in rows]
    return {
        "by least squares": found.count("least squares"),
        "by linear program": found.count("linear program"),
        "without a certificate": found.count(None),
    }


# Theorem 3 and corollary 1 ----------------------------------------------------------------------


@dataclass(frozen=True)
class Promise:
    """What corollary 1 speaks of: columns, N and mu. Theorem 3 is the case of one column."""

    sparsities: tuple[int, ...]
    n_in: int
    mu: float


@dataclass(frozen=True)
class Trials(Promise):
    """A Monte Carlo of it."""

    rate: RecoveryRate


def trials(case: Case, rng: np.random.Generator) -> Trials:
    """Run the trials of one (N, s, mu) with P from the theorem, times `fewer` if it is there."""
    sparsities = tuple(case["sparsities"])
    samples = sample_size(max(sparsities), case["n_in"], case["mu"])
    seed = np.random.SeedSequence(int(rng.integers(2**63)))
    rate = monte_carlo(
        case["n_in"],
        sparsities,
        max(1, math.ceil(samples * case.get("fewer", 1.0))),
        trials=case["trials"],
        seed=seed,
    )
    return Trials(sparsities, case["n_in"], case["mu"], rate)


def upper_limit(run: Trials) -> Numbers:
    """Upper Clopper-Pearson limit of the probability of recovery."""
    return {"upper limit": run.rate.upper}


def trial_details(run: Trials) -> dict[str, Any]:
    """Counts, limits, and the promised probability."""
    rate = run.rate
    return {
        "samples": sample_size(max(run.sparsities), run.n_in, run.mu),
        "successes": rate.successes,
        "trials": rate.trials,
        "lower": rate.lower,
        "upper": rate.upper,
        "by_certificate": rate.certified,
        "underdetermined": rate.underdetermined,
        "promised": promised_columns(run),
    }


def theorem_3_cases(level: Level) -> list[Case]:
    """The six asked for, and wider layers, where the equations alone don't determine w*."""
    count = 400 if level == "full" else 60
    cases = [(200, s, mu) for s in (2, 5, 10) for mu in (1.5, 2.0)]
    cases += [(20, 1, 1.05), (50, 2, 1.2)]
    if level == "full":
        cases += [(1000, s, 1.05) for s in (2, 5, 10)]
    return [{"n_in": n_in, "sparsities": [s], "mu": mu, "trials": count} for n_in, s, mu in cases]


def corollary_cases(level: Level) -> list[Case]:
    """Columns of equal and of very different sparsity; mu just above 1 + log_N M, and 0.5 above."""
    count = 300 if level == "full" else 30
    columns: list[list[int]] = [[3] * 4, [1, 1, 2, 8], [1] * 9 + [10]]
    cases: list[Case] = []
    for n_in in (60, 200) if level == "full" else (60,):
        for sparsities in columns:
            for above in (0.02, 0.5):
                mu = 1 + math.log(len(sparsities)) / math.log(n_in) + above
                cases.append(
                    {"n_in": n_in, "sparsities": sparsities, "mu": round(mu, 4), "trials": count}
                )
    return cases


def promised_columns(promise: Promise) -> float:
    """1 - sum_m N^(1 - mu (11 s_max + 7) / (11 s_m + 7)): corollary 1, corrected."""
    return columns_probability(promise.sparsities, promise.n_in, promise.mu)


def union_bound(promise: Promise) -> float:
    """Theorem 3 for each column at the mu_m that makes the given P its own, and the union bound."""
    log_n = math.log(promise.n_in)
    samples = (11 * max(promise.sparsities) + 7) * promise.mu * log_n
    own = [samples / ((11 * s + 7) * log_n) for s in promise.sparsities]
    return 1 - sum(1 - success_probability(promise.n_in, mu) for mu in own)


def printed_corollary(promise: Promise) -> float:
    """1 - sum_m N^(1 - mu) (11 s_max + 7) / (11 s_m + 7), as printed."""
    largest = 11 * max(promise.sparsities) + 7
    factors = sum(largest / (11 * s + 7) for s in promise.sparsities)
    return 1 - promise.n_in ** (1 - promise.mu) * factors


# The phase transition ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Transition:
    """Numbers of samples that (8) needed, one a trial."""

    n_in: int
    sparsity: int
    needed: np.ndarray


def transition(case: Case, rng: np.random.Generator) -> Transition:
    """Draw samples until w* is recovered, `trials` times."""
    children = np.random.SeedSequence(int(rng.integers(2**63))).spawn(case["trials"])
    needed = [
        samples_needed(case["n_in"], case["sparsity"], np.random.default_rng(child))
        for child in children
    ]
    return Transition(case["n_in"], case["sparsity"], np.array(needed))


def median_needed(run: Transition) -> Numbers:
    """Samples with which half of the trials recover."""
    return {"P at 50 %": float(np.median(run.needed))}


def promised_at_half(run: Transition) -> Numbers:
    """Theorem 3's P at the mu that promises one half: (11 s + 7) (ln N + ln 2)."""
    return {"P at 50 %": (11 * run.sparsity + 7) * (math.log(run.n_in) + math.log(2))}


def transition_cases(level: Level) -> list[Case]:
    """N = 100, 200, 400 and s/N up to 0.3."""
    fractions: tuple[float, ...] = (0.02, 0.1, 0.3)
    sizes: tuple[int, ...] = (100, 200)
    count = 8
    if level == "full":
        fractions = (0.01, 0.02, 0.03, 0.05, 0.07, 0.1, 0.13, 0.16, 0.2, 0.25, 0.3)
        sizes, count = (100, 200, 400), 60
    return [
        {"n_in": n_in, "sparsity": max(1, round(fraction * n_in)), "trials": count}
        for n_in in sizes
        for fraction in fractions
    ]


def fitted_constant(rows: Sequence[Row]) -> dict[str, Any]:
    """Fit P at 50 % = (c s + d) ln N by least squares, with a bootstrap interval over the trials.

    Once over all cases and once over s/N up to 0.1, where a form linear in s is closer to the truth
    (the statistical dimension, beside, is concave in s).
    """
    rng = np.random.default_rng(0)

    def fit(chosen: Sequence[Row]) -> dict[str, Any]:
        s = np.array([row.case["sparsity"] for row in chosen], dtype=float)
        log_n = np.log([row.case["n_in"] for row in chosen])
        design = np.stack([s * log_n, log_n], axis=1)
        needed = [np.array(row.details["needed"]) for row in chosen]

        def solve(medians: np.ndarray) -> np.ndarray:
            # Relative residuals: the medians span two decades.
            weights = 1 / medians
            return np.linalg.lstsq(design * weights[:, None], np.ones(len(s)), rcond=None)[0]

        best = solve(np.array([np.median(values) for values in needed]))
        drawn = np.array(
            [
                solve(np.array([np.median(rng.choice(v, len(v))) for v in needed]))
                for _ in range(_BOOTSTRAP)
            ]
        )
        low, high = np.percentile(drawn, [2.5, 97.5], axis=0)
        return {
            "cases": len(chosen),
            "c": float(best[0]),
            "c interval": [float(low[0]), float(high[0])],
            "d": float(best[1]),
            "d interval": [float(low[1]), float(high[1])],
        }

    sparse = [row for row in rows if row.case["sparsity"] <= _SPARSE * row.case["n_in"]]
    ratios = [
        row.measured["P at 50 %"]
        / (2 * row.case["n_in"] * statistical_dimension(row.case["sparsity"] / row.case["n_in"]))
        for row in rows
    ]
    loose = [row.bound["P at 50 %"] / row.measured["P at 50 %"] for row in rows]
    return {
        "form": "P at 50 % = (c s + d) ln N, relative least squares, 95 % bootstrap interval",
        "the theorem's": {"c": 11, "d": 7},
        "all s/N": fit(rows),
        "s/N <= 0.1": fit(sparse),
        "theorem over measured": [min(loose), max(loose)],
        "measured over 2 N statistical dimension": [min(ratios), max(ratios)],
    }


_RECOVERY = (
    "inputs i.i.d. standard normal",
    "w* with a uniformly random support and standard normal entries on it",
)

STATEMENTS = (
    Statement(
        name="net-trim/proposition-2",
        paper=PAPER,
        number="proposition 2",
        sentence=(
            "If there exists a vector Lambda in the range of Xtilde^T with entries "
            "satisfying (10), "
            "and Xtilde restricted to the supports is full column rank, then the pair (w*, s*) is "
            "the unique solution to (9)."
        ),
        formula=(
            "certificate (least squares, else a linear program) found <=> (8) has w* as its only "
            "solution"
        ),
        assumptions=(
            "Gaussian instances around the transition",
            "instances with a second solution: twin columns, a dependent support",
            "instances with ceilings tight at w*, and w* = 0",
            "a solution agrees within 1e-6 of the largest weight",
        ),
        cases=uniqueness_cases,
        sample=instance,
        measure=uniqueness_errors,
        bound=lambda case: dict.fromkeys(
            ("certified, not recovered", "uncertified, recovered", "certified, not unique"), 1e-6
        ),
        details=uniqueness_details,
        summarise=count_certificates,
    ),
    Statement(
        name="net-trim/theorem-3",
        paper=PAPER,
        number="theorem 3",
        sentence=(
            "Given P = (11 s + 7) mu log N observations of the type y = max(X^T w*, 0), with "
            "probability exceeding 1 - N^(1 - mu) the vector w* can be learned exactly through (8)."
        ),
        formula=(
            "upper Clopper-Pearson limit (95 %) of the probability of recovery >= 1 - N^(1 - mu), "
            "P = ceil((11 s + 7) mu ln N)"
        ),
        assumptions=(*_RECOVERY, "recovery decided by certificate, else by comparison"),
        cases=theorem_3_cases,
        sample=trials,
        measure=upper_limit,
        bound=lambda run: {"upper limit": success_probability(run.n_in, run.mu)},
        relation=">=",
        details=trial_details,
        picture=pictures.recovery_intervals,
    ),
    Statement(
        name="net-trim/corollary-1",
        paper=PAPER,
        number="corollary 1",
        sentence=(
            "If mu > 1 + log_N M and P = (11 s_max + 7) mu log N, for eps = 0, W* can be "
            "accurately "
            "learned through (4) with probability exceeding "
            "1 - sum_m N^(1-mu) (11 s_max + 7) / (11 s_m + 7)."
        ),
        formula=(
            "upper Clopper-Pearson limit (95 %) of the probability that all columns are recovered "
            ">= p = 1 - sum_m N^(1 - mu (11 s_max + 7) / (11 s_m + 7)), and p > 0"
        ),
        assumptions=(*_RECOVERY, "one X for all columns", "mu 0.02 and 0.5 above 1 + log_N M"),
        cases=corollary_cases,
        sample=trials,
        measure=lambda run: {**upper_limit(run), "p": promised_columns(run)},
        bound=lambda run: {"upper limit": promised_columns(run), "p": 0.0},
        relation=">=",
        details=trial_details,
    ),
    Statement(
        name="net-trim/corollary-1-fraction",
        paper=PAPER,
        number="corollary 1",
        sentence="... with probability exceeding 1 - sum_m N^(1-mu) (11 s_max + 7) / (11 s_m + 7).",
        formula=(
            "1 - sum_m N^(1 - mu_m), mu_m = P / ((11 s_m + 7) ln N), the union bound over "
            "theorem 3, "
            "= 1 - sum_m N^(1 - mu (11 s_max + 7) / (11 s_m + 7))"
        ),
        assumptions=("P not rounded up", "mu 0.02 and 0.5 above 1 + log_N M"),
        cases=lambda level: [
            {key: value for key, value in case.items() if key != "trials"}
            for case in corollary_cases("full")
        ],
        sample=lambda case, rng: Promise(tuple(case["sparsities"]), case["n_in"], case["mu"]),
        measure=lambda promise: {"p": union_bound(promise)},
        bound=lambda promise: {"p": promised_columns(promise)},
        relation="==",
        slack=1e-12,
        printed=lambda promise: {"p": printed_corollary(promise)},
        erratum=(
            "the fraction belongs in the exponent; as a factor, as printed, it gives no more "
            "than the "
            "union bound without it, and less than 0 on instances that fulfil the premise"
        ),
        details=lambda promise: {"printed": printed_corollary(promise)},
        summarise=lambda rows: {
            "printed p at or below 0": sum(row.details["printed"] <= 0 for row in rows),
            "of": len(rows),
        },
    ),
    Statement(
        name="net-trim/phase-transition",
        paper=PAPER,
        number="theorem 3, how loose",
        sentence=(
            "Given P = (11 s + 7) mu log N observations ... the vector w* can be learned exactly "
            "through (8)."
        ),
        formula="samples with which half of the trials recover <= (11 s + 7) (ln N + ln 2)",
        assumptions=(*_RECOVERY, "recovery is monotone in the samples, so each trial is bisected"),
        cases=transition_cases,
        sample=transition,
        measure=median_needed,
        bound=promised_at_half,
        details=lambda run: {"needed": [int(value) for value in run.needed]},
        summarise=fitted_constant,
        picture=pictures.phase_transition,
    ),
)
