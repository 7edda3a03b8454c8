"""Layer programs to measure on: named, seeded, sized.

A name is FAMILY, or FAMILY-NxPxM (inputs, samples, units), with ``-ball`` for the constrained form:
``correlated``, ``iid-256x1000x64-ball``. Without sizes it is 784 x 2000 x 300.

- iid, correlated, relu2: a ReLU layer on independent inputs, on inputs that share 20 factors, and
  on dense ReLU features of a layer before it.
- known: around a chosen primal-dual pair, so that the optimum is known; inputs share factors.
- digits: first layer of a small network trained on scikit-learn's digits, its bias free.
- lenet-fc1, -fc2, -fc3: layers of LeNet-300-100 on MNIST, where the data is there.
"""

from __future__ import annotations

import gzip
import math
import re
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from solvers import ConstrainedProgram, RegularisedProgram, trim_program
from solvers.program import Program

SIZES = (784, 2000, 300)
_RELATIVE_EPSILON = 0.05
_FACTORS = 20
_CORRELATED_NOISE = 0.5


@dataclass(frozen=True, eq=False)
class Instance:
    """A program, and by unit (or for the layer) its optimum where that is known."""

    program: Program
    optimum: np.ndarray | None = None


@dataclass(frozen=True)
class Problem:
    """A named problem: `make` builds its program from the seed that its name stands for."""

    name: str
    make: Callable[[], Instance]


def layer(
    inputs: np.ndarray, n_out: int, fit_weight: float, rng: np.random.Generator, *, ball: bool
) -> Instance:
    """Make a ReLU layer whose responses come from 30 % of its weights, on inputs given.

    The rest of the weights are 3 % of their size, as in a trained layer that can be pruned. The
    weight of the fit is `fit_weight` for 2000 samples, and goes with their number.
    """
    n_samples, n_in = inputs.shape
    size = np.where(rng.random((n_in, n_out)) < 0.3, 1.0, 0.03) / np.sqrt(0.3 * n_in)
    weight = rng.standard_normal((n_in, n_out)) * size
    targets = np.maximum(inputs @ weight, 0)
    form = {"fit_weight": fit_weight * 2000 / n_samples}
    if ball:
        form = {"epsilon": _RELATIVE_EPSILON * float(np.linalg.norm(targets))}
    return Instance(trim_program(inputs, targets, old_weight=weight, **form))


def iid(n_in: int, n_samples: int, n_out: int, *, ball: bool) -> Instance:
    """Rectified Gaussian inputs, independent."""
    rng = np.random.default_rng(0)
    inputs = np.maximum(rng.standard_normal((n_samples, n_in)), 0)
    return layer(inputs, n_out, 0.2, rng, ball=ball)


def correlated(n_in: int, n_samples: int, n_out: int, *, ball: bool) -> Instance:
    """Rectified Gaussian inputs that share 20 factors, with noise of half their size."""
    rng = np.random.default_rng(1)
    return layer(np.maximum(_mixed(rng, n_samples, n_in), 0), n_out, 0.3, rng, ball=ball)


def relu2(n_in: int, n_samples: int, n_out: int, *, ball: bool) -> Instance:
    """Dense ReLU features of a second layer, on iid inputs."""
    rng = np.random.default_rng(2)
    first = rng.standard_normal((n_in, n_in)) * np.sqrt(2 / n_in)
    inputs = np.maximum(np.maximum(rng.standard_normal((n_samples, n_in)), 0) @ first, 0)
    return layer(inputs, n_out, 0.3, rng, ball=ball)


def known(n_in: int, n_samples: int, n_out: int, *, ball: bool) -> Instance:
    """A program around a chosen optimum, on inputs that share 20 factors.

    Weights U and a multiplier nu are chosen; the inputs are moved by the smallest matrix that gives
    X^T nu = -S, S a subgradient of the penalty at U, and the level is what makes the rest of the
    optimality conditions hold. The optimum is |U|_1, in the regularised form plus
    |nu_Omega|^2 / (4 lambda) for each unit.
    """
    if n_out > n_samples // 4:
        raise ValueError(f"known: got {n_out} units, want at most a quarter of the samples")
    rng = np.random.default_rng(3)
    inputs = _mixed(rng, n_samples, n_in)
    weight = rng.standard_normal((n_in, n_out)) * (rng.random((n_in, n_out)) < 0.2)
    active = rng.random((n_samples, n_out)) < 0.5
    nu = rng.standard_normal((n_samples, n_out)) / math.sqrt(n_samples)
    nu = np.where(active, nu, np.maximum(nu, 0))
    slope = np.where(weight != 0, np.sign(weight), rng.uniform(-0.9, 0.9, weight.shape))
    inputs += nu @ np.linalg.solve(nu.T @ nu, -slope.T - nu.T @ inputs)
    response = inputs @ weight
    above = response + np.where(nu > 0, 0.0, rng.random(nu.shape))
    fitted = np.where(active, nu, 0.0)
    penalties = np.abs(weight).sum(axis=0)
    data: dict[str, Any] = {"inputs": inputs, "active": active, "old_weight": weight}
    if ball:
        epsilon = _RELATIVE_EPSILON * float(np.linalg.norm(response[active]))
        level = np.where(active, response - epsilon * fitted / np.linalg.norm(fitted), above)
        program: Program = ConstrainedProgram(level=level, epsilon=epsilon, **data)
        return Instance(program, np.asarray(penalties.sum()))
    fit_weight = float(np.linalg.norm(fitted) / (0.1 * np.linalg.norm(response[active])))
    level = np.where(active, response - nu / (2 * fit_weight), above)
    program = RegularisedProgram(level=level, fit_weight=fit_weight, **data)
    return Instance(program, penalties + (fitted**2).sum(axis=0) / (4 * fit_weight))


def digits(n_in: int, n_samples: int, n_out: int, *, ball: bool) -> Instance:
    """First layer of a small network trained on scikit-learn's digits, its bias free."""
    from sklearn.datasets import load_digits
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.neural_network import MLPClassifier

    if n_in != 65:
        raise ValueError(f"digits: has 64 inputs and a bias, 65, got {n_in}")
    data = load_digits()
    x = data.images.reshape(-1, 64) / 16
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # any trained layer will do
        network = MLPClassifier((n_out,), max_iter=100, random_state=0).fit(x, data.target)
    weight = np.vstack([network.coefs_[0], network.intercepts_[0]])
    inputs = np.hstack([x[:n_samples], np.ones((n_samples, 1))])
    targets = np.maximum(inputs @ weight, 0)
    form: dict[str, Any] = {"fit_weight": 2.0}
    if ball:
        form = {"epsilon": _RELATIVE_EPSILON * float(np.linalg.norm(targets))}
    return Instance(trim_program(inputs, targets, free_rows=(64,), old_weight=weight, **form))


def lenet(data: Path, number: int, n_samples: int, *, ball: bool) -> Instance:
    """A layer of LeNet-300-100, its bias free, on the first images of MNIST, in float32.

    The weight of the fit is |W|_1 / epsilon^2, which Net-Trim takes by default.
    """
    import torch

    path = data / "models/lobs_LeNet300100_pretrain.pth"
    state = torch.load(path, map_location="cpu", weights_only=True)
    with gzip.open(data / "mnist/train-images-idx3-ubyte.gz") as file:
        pixels = np.frombuffer(file.read(), np.uint8, offset=16).reshape(-1, 784)[:n_samples]
    x = (pixels.astype(np.float32) / 255 - np.float32(0.1307)) / np.float32(0.3081)
    names = sorted({key.rpartition(".")[0] for key in state})
    for index, name in enumerate(names, start=1):
        weight = np.vstack(
            [state[f"{name}.weight"].numpy().T, state[f"{name}.bias"].numpy()[None]]
        ).astype(np.float32)
        inputs = np.hstack([x, np.ones((len(x), 1), np.float32)])
        response = inputs @ weight
        if index == number:
            break
        x = np.maximum(response, 0)
    last = number == len(names)
    targets = response if last else np.maximum(response, 0)
    epsilon = _RELATIVE_EPSILON * float(np.linalg.norm(targets))
    form: dict[str, Any] = {"epsilon": epsilon}
    if not ball:
        form = {"fit_weight": float(np.abs(weight[:-1]).sum()) / epsilon**2}
    return Instance(
        trim_program(
            inputs,
            targets,
            activation="linear" if last else "relu",
            free_rows=(weight.shape[0] - 1,),
            old_weight=weight,
            **form,
        )
    )


FAMILIES = {"iid": iid, "correlated": correlated, "relu2": relu2, "known": known, "digits": digits}
_NAME = re.compile(r"(?P<family>[a-z0-9]+?)(-(?P<sizes>\d+x\d+x\d+))?(?P<ball>-ball)?")
_LENET = re.compile(r"lenet-fc(?P<number>[123])(-(?P<samples>\d+))?(?P<ball>-ball)?")


def problem(name: str, data: Path | None = None) -> Problem:
    """Find a problem by its name.

    Raises
    ------
    ValueError
        If there is none of that name, or it wants data that is not there.
    """
    found = _LENET.fullmatch(name)
    if found:
        if data is None:
            raise ValueError(f"{name}: wants --data DIR with models/ and mnist/")
        number, samples = int(found["number"]), int(found["samples"] or 10_000)
        return Problem(name, partial(lenet, data, number, samples, ball=found["ball"] is not None))
    found = _NAME.fullmatch(name)
    if found is None or found["family"] not in FAMILIES:
        known_names = ", ".join((*FAMILIES, "lenet-fc1, lenet-fc2, lenet-fc3"))
        raise ValueError(f"problem: want FAMILY[-NxPxM][-ball] of {known_names}; got {name!r}")
    sizes = SIZES if found["family"] != "digits" else (65, 1000, 100)
    if found["sizes"]:
        n_in, n_samples, n_out = (int(size) for size in found["sizes"].split("x"))
        sizes = (n_in, n_samples, n_out)
    ball = found["ball"] is not None
    return Problem(name, partial(FAMILIES[found["family"]], *sizes, ball=ball))


SETS: dict[str, tuple[str, ...]] = {
    "main": ("iid", "correlated", "relu2"),
    "alone": tuple(f"{family}-784x2000x1" for family in ("iid", "correlated", "relu2")),
    "known": ("known-64x200x1", "known-256x2000x50", "known-784x4000x100", "known-64x400x20-ball"),
    "sizes": (
        "iid-64x200x1000",
        "correlated-256x1000x1",
        "relu2-256x1000x1000",
        "correlated-300x10000x100",
        "iid-2048x6000x20",
        "correlated-128x60000x30",
    ),
    "balls": ("digits-65x300x20-ball", "iid-64x400x10-ball", "correlated-100x1000x10-ball"),
    "digits": ("digits", "digits-65x300x20-ball"),
    "lenet": ("lenet-fc1-ball", "lenet-fc2-ball", "lenet-fc3-ball"),
    "scaling-N": tuple(f"correlated-{n}x4000x40" for n in (64, 128, 256, 512, 1024, 2048)),
    "scaling-P": tuple(f"correlated-200x{p}x40" for p in (500, 1000, 4000, 16000, 60000)),
    "scaling-M": tuple(f"correlated-200x1000x{m}" for m in (1, 4, 16, 64, 256, 1000)),
    "smoke": ("iid-60x300x40", "known-30x200x10", "digits-65x60x8-ball"),
}


def some_units(program: Program, units: Iterable[int]) -> RegularisedProgram:
    """The regularised program of a few units, in float64."""
    assert isinstance(program, RegularisedProgram)
    chosen = list(units)
    old = program.old_weight
    return replace(
        program,
        inputs=program.inputs.astype(np.float64),
        active=program.active[:, chosen],
        level=program.level[:, chosen].astype(np.float64),
        old_weight=None if old is None else old[:, chosen].astype(np.float64),
    )


def typical_units(program: Program, count: int) -> list[int]:
    """Choose units at even quantiles of the size of Omega, which the cost of a QP hangs on."""
    order = np.argsort(program.active.sum(axis=0), kind="stable")
    count = min(count, len(order))
    places = (np.arange(count) + 0.5) / count * len(order)
    return [int(order[int(place)]) for place in places]


def in_single_precision(program: Program) -> Program:
    """The program with its data rounded to float32."""
    old = program.old_weight
    return replace(
        program,
        inputs=program.inputs.astype(np.float32),
        level=program.level.astype(np.float32),
        old_weight=None if old is None else old.astype(np.float32),
    )


def _mixed(rng: np.random.Generator, n_samples: int, n_in: int) -> np.ndarray:
    """Gaussian inputs that share 20 factors, with noise of half their size."""
    factors = rng.standard_normal((n_samples, _FACTORS))
    factors = factors @ rng.standard_normal((_FACTORS, n_in)) / np.sqrt(_FACTORS)
    return factors + _CORRELATED_NOISE * rng.standard_normal((n_samples, n_in))
