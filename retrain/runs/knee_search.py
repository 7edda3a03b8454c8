"""Searching for the knee with real trainings: a run directory for each, then full runs at the knee.

    OUT/
      trials/WEIGHT/        a training with few epochs for each weight that the search tried
      knees/WEIGHT/         a training with all epochs at each knee
      search.json           outcomes of the trainings, and the knees

Every training resumes. A search that was killed and is called again reads the finished trainings,
resumes the unfinished ones, and therefore proposes the same weights and finds the same knees.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import joblib
import torch

from retrain.files import write_json
from retrain.runs.trained import TrainedRun
from retrain.runs.training import run_training
from retrain.trainers.itp.knee import Knee, knee_by_chord, knee_by_trade_off
from retrain.trainers.itp.method import Itp
from retrain.trainers.itp.objectives import Complexity, dense_weights, trade_off_of
from retrain.trainers.itp.search import Outcome, Train
from retrain.trainers.recipes.recipe import Recipe
from solvers.workers import workers

Strategy = Callable[[Train], list[Outcome]]
"""A search of `retrain.trainers.itp.search` with all but its first argument given."""


@dataclass(frozen=True, eq=False)
class KneeSearch:
    """Outcome of a knee search.

    Attributes
    ----------
    outcomes : list of Outcome
        Outcomes of all trainings, in their order.
    by_trade_off, by_chord : Knee
        Knees by the two criteria, each with its reason where there is none.
    runs : dict of float to TrainedRun
        Full trainings by the weight of the knee; a knee whose training diverges has no entry.
    """

    outcomes: list[Outcome]
    by_trade_off: Knee
    by_chord: Knee
    runs: dict[float, TrainedRun]


def search_knee(
    recipe: Recipe,
    out: str | Path,
    strategy: Strategy,
    *,
    epochs: int,
    jobs: int = 1,
    threads: int = 1,
    data: Any = None,
    test: Any = None,
) -> KneeSearch:
    """Search for the knee with short trainings, then train with all epochs at the knee.

    Parameters
    ----------
    recipe : Recipe
        Recipe of weighted intra-training pruning. Its trade-off is replaced.
    out : str or Path
        Directory of the search.
    strategy : callable
        Search over the weights: ``partial(bisection, interval=(1e-5, 0.1), levels=6, budget=20)``.
    epochs : int
        Number of epochs of each trial.
    jobs : int, optional
        Number of trainings at the same time, each in a process of its own.
    threads : int, optional
        Number of torch threads in each training. Part of the runs' identity, since it changes the
        last bits.
    data, test : array, tensor, pair (x, y), DataLoader or Data, optional
        Data to train and to test on, as for `retrain.runs.training.train`.

    Returns
    -------
    KneeSearch
        Outcomes of the trials, knees, and full trainings.

    Raises
    ------
    ValueError
        If the recipe is of another method, or an argument or a run directory is invalid.

    Notes
    -----
    A training that diverges or ends without weights is an outcome, not an error.
    """
    folder = Path(out)
    train = trainer(
        recipe.changed({"training.epochs": epochs}),
        folder / "trials",
        jobs=jobs,
        threads=threads,
        data=data,
        test=test,
    )
    outcomes = strategy(train)
    knees = knee_by_trade_off(outcomes), knee_by_chord(outcomes)
    _write(folder, outcomes, *knees)
    runs = {}
    for knee in knees:
        if knee.outcome is None or knee.outcome.weight in runs:
            continue
        run = _trial(recipe, folder / "knees", knee.outcome.weight, threads, data, test)
        if run is not None:
            runs[knee.outcome.weight] = run
    return KneeSearch(outcomes, *knees, runs)


def trainer(
    recipe: Recipe,
    folder: Path,
    *,
    jobs: int = 1,
    threads: int = 1,
    data: Any = None,
    test: Any = None,
) -> Train:
    """Make the function that a search trains with; it uses one run directory per weight.

    Parameters
    ----------
    recipe : Recipe
        Recipe of weighted intra-training pruning, with the epochs of a trial.
    folder : Path
        Directory that holds the run directories.
    jobs : int, optional
        Number of trainings at the same time, each in a process of its own.
    threads : int, optional
        Number of torch threads in each training.
    data, test : array, tensor, pair (x, y), DataLoader or Data, optional
        Data to train and to test on, as for `retrain.runs.training.train`.

    Returns
    -------
    callable
        (weights) -> list of Outcome, one per weight, in their order.

    Raises
    ------
    ValueError
        If the recipe is not one of weighted intra-training pruning, or a count is below 1.
    """
    method = recipe.make_method()
    if not isinstance(method, Itp) or method.descent != "weighted":
        raise ValueError("recipe: [method]: want weighted intra-training pruning")
    for name, count in (("jobs", jobs), ("threads", threads)):
        if count < 1:
            raise ValueError(f"{name}: got {count}, want 1 or more")

    def train(weights: Sequence[float]) -> list[Outcome]:
        tasks = (
            joblib.delayed(_outcome)(recipe, method, folder, weight, threads, data, test)
            for weight in weights
        )
        return list(workers(min(jobs, max(len(weights), 1)))(tasks))

    return train


def _outcome(
    recipe: Recipe, method: Itp, folder: Path, weight: float, threads: int, data: Any, test: Any
) -> Outcome:
    run = _trial(recipe, folder, weight, threads, data, test)
    if run is None:
        return Outcome(weight, float("nan"), float("nan"), "diverged")
    names = dense_weights(run.model, method.layers)
    with torch.no_grad():
        complexity = float(Complexity(names, method.power)(run.model))
    return Outcome(
        weight, run.record["train"]["loss"], complexity, "trained" if complexity else "collapsed"
    )


def _trial(
    recipe: Recipe, folder: Path, weight: float, threads: int, data: Any, test: Any
) -> TrainedRun | None:
    """Train with one weight; None when that diverges."""
    changed = recipe.changed({"method.trade_off": trade_off_of(weight)})
    with _threads(threads):
        try:
            # repr is unique for each weight and the same in every process.
            return run_training(changed, folder / repr(float(weight)), data=data, test=test)
        except FloatingPointError:
            return None


@contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _write(folder: Path, outcomes: list[Outcome], by_trade_off: Knee, by_chord: Knee) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    record = {
        "outcomes": [asdict(outcome) for outcome in outcomes],
        "by_trade_off": asdict(by_trade_off),
        "by_chord": asdict(by_chord),
    }
    write_json(folder / "search.json", record)
