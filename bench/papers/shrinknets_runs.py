"""The runs behind `papers.shrinknets`: data, one fit by each method, rows that are kept.

Linear regressions are on standardised inputs and targets, the loss being the mean over the samples
of the squared error summed over the targets; logistic ones on standardised inputs, with a bias.
Three samples of ten are held out.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from retrain.data.sources import load_data
from retrain.trainers.loop.accuracy import evaluate
from retrain.trainers.loop.states import seeded
from retrain.trainers.loop.supervised import Loss, fit
from retrain.trainers.loop.training import Choice, Setting, Training
from retrain.trainers.recipes.schedules import cosine
from retrain.trainers.shrinknets.cost import Costs
from retrain.trainers.shrinknets.method import ShrinkNets
from retrain.trainers.shrinknets.regression import Kind, Regression, column_sparsity
from retrain.trainers.shrinknets.regression_solvers import solve_group, solve_shrink

Row = dict[str, Any]
HELD_OUT = 0.3
CPU = torch.device("cpu")


@dataclass(frozen=True, eq=False)
class Task:
    """A regression to fit and its held-out samples; the last column of a logistic one is ones."""

    fitted: Regression
    held_out: Regression

    @property
    def inputs(self) -> int:
        """Columns that may go."""
        return self.fitted.X.shape[1] - self.fitted.free


FILES = {
    "oes97": "regression/oes97.npz",
    "gas-drift": "gas-drift/gas_drift_batches_1-6_8_9.npz",
}


@cache
def task(folder: Path, name: str, seed: int) -> Task:
    """Read a data set and split it at random."""
    with np.load(folder / FILES[name], allow_pickle=False) as data:
        X = data["X"].astype(np.float64)
        Y = np.eye(6)[data["gas"]] if name == "gas-drift" else data["Y"].astype(np.float64)
    kind: Kind = "logistic" if name == "gas-drift" else "linear"
    order = np.random.default_rng(seed).permutation(len(X))
    held_out, fitted = np.split(order, [round(HELD_OUT * len(X))])
    X = (X - X[fitted].mean(0)) / X[fitted].std(0)
    if kind == "linear":
        Y = (Y - Y[fitted].mean(0)) / Y[fitted].std(0)
    else:
        X = np.column_stack([X, np.ones(len(X))])
    free = int(kind == "logistic")
    return Task(*(Regression(X[rows], Y[rows], kind, free) for rows in (fitted, held_out)))


def squared_error(outputs: Tensor, targets: Tensor) -> Tensor:
    """Mean over the samples of |y - Ax|^2."""
    return (outputs - targets).square().sum(1).mean()


def start(
    method: ShrinkNets, model: nn.Module, loss: Loss, samples: int, plan: Row
) -> tuple[Training, Costs]:
    """Begin a training with Adam under a cosine schedule."""
    setting = Setting(
        samples,
        plan["batch_size"],
        plan["epochs"],
        plan["seed"],
        CPU,
        Choice("adam", {"lr": plan["lr"]}, torch.optim.Adam),
        Choice("cosine", {}, cosine),
        loss,
    )
    training = method.start(model, setting)
    costs = training.parts["costs"]
    assert isinstance(costs, Costs)
    return training, costs


def run(training: Training, data: Any, plan: Row) -> None:
    """Train to the end."""
    fit(
        training.model,
        data,
        epochs=plan["epochs"],
        optimizer=training.optimizer,
        generator=torch.Generator().manual_seed(plan["seed"]),
        schedule=training.schedule,
        loss=training.loss,
        penalty=training.penalty,
        batch_size=plan["batch_size"],
        callbacks=training.callbacks,
    )


def method_of(plan: Row, layers: tuple[str, ...] | None = None) -> ShrinkNets:
    """Make the method of a plan; without an inertia, nothing is removed."""
    options = {"strength": plan["strength"], "weight_strength": plan["weight_strength"]}
    if plan["inertia"] is None:
        return ShrinkNets(**options, layers=layers, removal="never")
    return ShrinkNets(**options, layers=layers, inertia=plan["inertia"])


def trained_regression(data: Task, plan: Row) -> Row:
    """Fit a regression by switches on its inputs, Adam, and removal while training."""
    free = data.fitted.free
    classes = data.fitted.Y.shape[1]
    with seeded(plan["seed"], CPU):
        model = nn.Sequential(nn.Linear(data.inputs, classes, bias=free == 1))
    x = torch.from_numpy(data.fitted.X[:, : data.inputs]).float()
    loss: Loss = squared_error
    y = torch.from_numpy(data.fitted.Y).float()
    if data.fitted.kind == "logistic":
        loss, y = functional.cross_entropy, y.argmax(1)
    method = method_of(plan, layers=("0",))
    training, costs = start(method, model, loss, len(x), plan)
    run(training, (x, y), plan)
    plain = method.finish(training)[0]  # type: ignore[index]
    A = plain.weight.detach().double().numpy()
    if free:
        A = np.column_stack([A, plain.bias.detach().double().numpy()])
    return {
        **figures(data, A),
        "left": training.describe()["neurons"]["switch_0"],
        "cost": costs.neurons / (plan["epochs"] * data.inputs),
        "survivors": training.describe()["survivors"],
    }


def figures(data: Task, A: np.ndarray) -> Row:
    """Return the losses and the sparsity of a fit."""
    return {
        "loss": data.fitted.normalised(A),
        "held_out": data.held_out.normalised(A),
        "sparsity": column_sparsity(A[:, : data.inputs]),
    }


def solved_regression(data: Task, plan: Row) -> Row:
    """Fit a regression by the proximal method of the plan, within its gradients."""
    options = {"gradients": plan["gradients"], "tolerance": 1e-6}
    if plan["method"].startswith("group"):
        found = solve_group(data.fitted, plan["strength"], **options)
    else:
        found = solve_shrink(data.fitted, plan["strength"], plan["weight_strength"], **options)
    return {
        **figures(data, found.A),
        "objective": found.objective,
        "gradients_taken": found.gradients,
        "converged": found.converged,
    }


WIDTHS = (784, 100, 100, 10)


def trained_network(folder: Path, plan: Row) -> Row:
    """Train the two-layer network of the size-trajectory experiment."""
    training_data, test = images(folder, plan["limit"])
    with seeded(plan["seed"], CPU):
        a, b, c, d = WIDTHS
        model = nn.Sequential(
            *(nn.Linear(a, b), nn.ReLU(), nn.Linear(b, c), nn.ReLU(), nn.Linear(c, d))
        )
    method = method_of(plan)
    training, costs = start(method, model, functional.cross_entropy, len(training_data[0]), plan)
    run(training, training_data, plan)
    plain = method.finish(training)
    left = training.describe()
    return {
        "sizes": [left["neurons"]["switch_2"], left["neurons"]["switch_4"]],
        "survivors": left["survivors"],
        "test_accuracy": evaluate(plain, test),
        "training_accuracy": evaluate(plain, training_data),
        "cost": costs.neurons / (plan["epochs"] * sum(WIDTHS[:-1])),
    }


@cache
def images(folder: Path, limit: int) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Read MNIST, flat: the first `limit` training images, all test images."""
    pairs = []
    for source, count in (("mnist", limit), ("mnist-test", None)):
        data = load_data(f"{source}:{folder / 'mnist'}", limit=count)
        assert data.y is not None
        pairs.append(
            (torch.from_numpy(data.flat).float(), torch.from_numpy(data.y.astype(np.int64)))
        )
    return pairs[0], pairs[1]


class Rows:
    """Results by what was planned, kept in a file a line each, so that a bench resumes."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.known: dict[str, Row] = {}
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists():
            for line in path.read_text(encoding="utf-8").splitlines():
                try:
                    row = json.loads(line)
                except json.JSONDecodeError:
                    continue  # a killed bench's last line; it is measured anew
                self.known[_key(row["plan"])] = row

    def get(self, plan: Row, measure: Callable[[Row], Row]) -> Row:
        """Return the plan's row, measured now where there is none; with processor seconds."""
        key = _key(plan)
        if key not in self.known:
            started = time.process_time()
            row = {**measure(plan), "cpu_seconds": time.process_time() - started, "plan": plan}
            with self.path.open("a", encoding="utf-8") as file:
                file.write("\n" * self._torn() + json.dumps(row) + "\n")
            self.known[key] = row
        return self.known[key]

    def _torn(self) -> bool:
        """Whether the file ends in the middle of a line."""
        data = self.path.read_bytes() if self.path.exists() else b""
        return bool(data) and not data.endswith(b"\n")


def _key(plan: Row) -> str:
    return json.dumps(plan, sort_keys=True)
