"""The layer-gates paper's flattening hyper-prior: section 2.2 and (8), (9)."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, replace

import numpy as np
from scipy.integrate import quad
from scipy.optimize import minimize_scalar

from retrain.verify.gates import PAPER
from retrain.verify.statement import Case, Level, Numbers, Statement


def hyper_prior(pi: float, gamma: float) -> float:
    """p(pi | gamma) of section 2.2."""
    return (gamma - 1) / math.log(gamma) / (1 + (gamma - 1) * (1 - pi))


def prior_cases(level: Level) -> list[Case]:
    """Values of gamma over many decades."""
    gammas = [0.9, 0.1, 1e-4] if level == "quick" else [0.999, 0.9, 0.5, 0.1, 1e-2, 1e-4, 1e-8]
    return [{"gamma": gamma} for gamma in gammas]


def prior_mass(gamma: float) -> Numbers:
    """The integral of p(pi | gamma) over [0, 1]; the density is steep near pi = 0."""
    edges = [0.0, *(gamma * 10.0**k for k in range(-1, 9) if gamma * 10.0**k < 1), 1.0]
    total = sum(
        quad(hyper_prior, low, high, args=(gamma,), epsabs=1e-13)[0]
        for low, high in itertools.pairwise(edges)
    )
    return {"mass": total}


def negative_log_posterior(pi: float, theta: float, gamma: float) -> float:
    """J(pi): KL(Bernoulli(theta) | Bernoulli(pi)) - log p(pi | gamma), without its constant."""
    kl = theta * math.log(theta / pi) + (1 - theta) * math.log((1 - theta) / (1 - pi))
    return kl + math.log(1 + (gamma - 1) * (1 - pi))


@dataclass(frozen=True)
class Prior:
    """A pair (theta, gamma)."""

    theta: float
    gamma: float


def pair(case: Case, rng: np.random.Generator) -> Prior:
    """A random theta for the case's gamma."""
    return Prior(float(rng.uniform(0.02, 0.98)), case["gamma"])


def best_prior(prior: Prior) -> tuple[float, float]:
    """Minimise J over pi numerically: in the logit, where both ends are far away."""

    def value(logit: float) -> float:
        pi = 1 / (1 + math.exp(-logit))
        return negative_log_posterior(pi, prior.theta, prior.gamma)

    found = minimize_scalar(value, bounds=(-30, 30), method="bounded", options={"xatol": 1e-12})
    return 1 / (1 + math.exp(-found.x)), float(found.fun)


def minimiser(prior: Prior) -> Numbers:
    """The numerical argmin and, around it, the curvature's sign."""
    return {"pi": best_prior(prior)[0]}


def equation_8(prior: Prior) -> Numbers:
    """The closed form gamma theta / (1 + theta (gamma - 1))."""
    return {"pi": prior.gamma * prior.theta / (1 + prior.theta * (prior.gamma - 1))}


def minimum_and_slope(prior: Prior) -> Numbers:
    """J at its minimum, and its slope in theta by a central difference."""
    step = 1e-3
    up = best_prior(replace(prior, theta=prior.theta + step))[1]
    down = best_prior(replace(prior, theta=prior.theta - step))[1]
    return {"J": best_prior(prior)[1], "slope": (up - down) / (2 * step)}


def equation_9(prior: Prior) -> Numbers:
    """The closed form log gamma - theta log gamma, and its constant slope -log gamma."""
    log_gamma = math.log(prior.gamma)
    return {"J": (1 - prior.theta) * log_gamma, "slope": -log_gamma}


STATEMENTS = (
    Statement(
        name="gates/hyper-prior",
        paper=PAPER,
        number="section 2.2",
        sentence=(
            "p(pi | gamma) = (gamma - 1) / log gamma / (1 + (gamma - 1)(1 - pi)), 0 < gamma < 1."
        ),
        formula="integral of p(pi | gamma) over 0 <= pi <= 1 is 1",
        assumptions=("adaptive quadrature over pieces",),
        cases=prior_cases,
        sample=lambda case, rng: case["gamma"],
        measure=prior_mass,
        bound=lambda gamma: {"mass": 1.0},
        relation="==",
        slack=1e-9,
    ),
    Statement(
        name="gates/equation-8",
        paper=PAPER,
        number="(8)",
        sentence="pi* = arg min J(pi) = gamma theta / (1 + theta (gamma - 1)).",
        formula="numerical argmin of J = gamma theta / (1 + theta (gamma - 1))",
        assumptions=("0 < theta < 1",),
        cases=prior_cases,
        sample=pair,
        measure=minimiser,
        bound=equation_8,
        relation="==",
        slack=1e-5,
    ),
    Statement(
        name="gates/equation-9",
        paper=PAPER,
        number="(9) and the display after it",
        sentence=(
            "J(pi*(theta)) = log gamma - theta log gamma ... the flattening hyper-prior "
            "results in a "
            "constant term in the gradient of the cost function with respect to Theta."
        ),
        formula="min J = (1 - theta) log gamma, d min J / d theta = -log gamma",
        assumptions=("0 < theta < 1", "central differences of the numerical minimum"),
        cases=prior_cases,
        sample=pair,
        measure=minimum_and_slope,
        bound=equation_9,
        relation="==",
        slack=1e-6,
    ),
)
