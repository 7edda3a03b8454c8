"""Layer programs to measure on: named, seeded, sized."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

import numpy as np

from solvers import RegularisedProgram, trim_program
from solvers.program import Program


@dataclass(frozen=True)
class Problem:
    """A named problem: `make` builds its program from the seed that its name stands for."""

    name: str
    make: Callable[[], Program]


def layer(inputs: np.ndarray, n_out: int, fit_weight: float, rng: np.random.Generator) -> Program:
    """Make a ReLU layer whose responses come from 30 % of its weights, on inputs given.

    The rest of the weights are 3 % of their size, as in a trained layer that can be pruned.
    """
    n_in = inputs.shape[1]
    size = np.where(rng.random((n_in, n_out)) < 0.3, 1.0, 0.03) / np.sqrt(0.3 * n_in)
    weight = rng.standard_normal((n_in, n_out)) * size
    return trim_program(
        inputs, np.maximum(inputs @ weight, 0), fit_weight=fit_weight, old_weight=weight
    )


def iid(n_samples: int, n_in: int, n_out: int) -> Program:
    """Rectified Gaussian inputs, independent."""
    rng = np.random.default_rng(0)
    return layer(np.maximum(rng.standard_normal((n_samples, n_in)), 0), n_out, 0.2, rng)


def correlated(n_samples: int, n_in: int, n_out: int) -> Program:
    """Rectified Gaussian inputs that share 20 factors, with noise of half their size."""
    rng = np.random.default_rng(1)
    factors = rng.standard_normal((n_samples, 20)) @ rng.standard_normal((20, n_in)) / np.sqrt(20)
    inputs = np.maximum(factors + 0.5 * rng.standard_normal((n_samples, n_in)), 0)
    return layer(inputs, n_out, 0.3, rng)


def features(n_samples: int, n_in: int, n_out: int) -> Program:
    """Dense ReLU features of a second layer, on iid inputs."""
    rng = np.random.default_rng(2)
    first = rng.standard_normal((n_in, n_in)) * np.sqrt(2 / n_in)
    inputs = np.maximum(np.maximum(rng.standard_normal((n_samples, n_in)), 0) @ first, 0)
    return layer(inputs, n_out, 0.3, rng)


def digits(n_samples: int, n_out: int, **form: float) -> Program:
    """First layer of a small network trained on scikit-learn's digits, its bias free."""
    from sklearn.datasets import load_digits
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.neural_network import MLPClassifier

    data = load_digits()
    x = data.images.reshape(-1, 64) / 16
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # any trained layer will do
        network = MLPClassifier((n_out,), max_iter=100, random_state=0).fit(x, data.target)
    weight = np.vstack([network.coefs_[0], network.intercepts_[0]])
    inputs = np.hstack([x[:n_samples], np.ones((n_samples, 1))])
    targets = np.maximum(inputs @ weight, 0)
    if "relative_epsilon" in form:
        form = {"epsilon": form["relative_epsilon"] * float(np.linalg.norm(targets))}
    return trim_program(
        inputs,
        targets,
        epsilon=form.get("epsilon"),
        fit_weight=form.get("fit_weight"),
        free_rows=(64,),
        old_weight=weight,
    )


PROBLEMS = (
    Problem("iid", lambda: iid(2000, 784, 300)),
    Problem("correlated", lambda: correlated(2000, 784, 300)),
    Problem("features", lambda: features(2000, 784, 300)),
    Problem("digits", lambda: digits(1000, 100, fit_weight=2.0)),
    Problem("digits-ball", lambda: digits(300, 20, relative_epsilon=0.05)),
)
SMOKE = (
    Problem("iid-smoke", lambda: iid(300, 60, 40)),
    Problem("digits-ball-smoke", lambda: digits(60, 8, relative_epsilon=0.1)),
)


def some_units(program: Program, units: Iterable[int]) -> RegularisedProgram:
    """The regularised program of a few units."""
    assert isinstance(program, RegularisedProgram)
    chosen = list(units)
    return replace(
        program,
        active=program.active[:, chosen],
        level=program.level[:, chosen],
        old_weight=None if program.old_weight is None else program.old_weight[:, chosen],
    )


def typical_units(program: Program, count: int) -> list[int]:
    """Choose units at even quantiles of the size of Omega, which the cost of a QP hangs on."""
    order = np.argsort(program.active.sum(axis=0), kind="stable")
    places = (np.arange(count) + 0.5) / count * len(order)
    return [int(order[int(place)]) for place in places]


def in_single_precision(program: Program) -> Program:
    """The program with its data rounded to float32."""
    return replace(
        program,
        inputs=program.inputs.astype(np.float32),
        level=program.level.astype(np.float32),
        old_weight=None if program.old_weight is None else program.old_weight.astype(np.float32),
    )
