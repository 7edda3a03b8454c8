"""One relative epsilon for a whole network, found: for a sparsity, or for a drop of accuracy.

Every trial is a Net-Trim run of its own at one relative epsilon, in ``DIR/layers/trial-1``,
``DIR/layers/trial-2``, ...; DIR holds the outcome, the trial that was chosen, with all of them in
its ``run.json``. Which epsilon comes next depends on the trials before alone, so the same command
resumes a search as it resumes a run.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from retrain.data.arrays import Data
from retrain.methods.net_trim.options import NetTrimOptions
from retrain.runs.accuracy import labels_for
from retrain.runs.directory import LAYERS, RUN_FILE, open_run, read_if_finished
from retrain.runs.identity import run_identity
from retrain.runs.outcome import Run, counting
from retrain.runs.record import check_finished
from retrain.runs.request import Request
from retrain.runs.subject import Subject
from retrain.stream.stream import LayerStream
from solvers.path.root import next_place

_log = logging.getLogger(__name__)

SMALLEST, LARGEST = 1e-4, 1.0  # relative epsilons: at 1 the first layer may as well be zero
_STRIDE = math.log(3.0)
_NEAREST = 1e-4  # relative change of epsilon below which sparsities are not told apart
_MET = 1e-4  # a sparsity this near is met
_FACTOR, _RATIO = 2.0, 1.05  # of a drop: steps of epsilon to bracket it, and when to stop


@dataclass(frozen=True)
class Goal:
    """What one relative epsilon is searched for: exactly one of the two.

    Attributes
    ----------
    first : float
        Relative epsilon to begin with.
    sparsity : float or None
        Zeros over weights of all retrained layers together.
    max_drop : float or None
        Points of held-out accuracy that may be lost; the sparsest trial within is chosen.
    max_trials : int
        Networks retrained at most.
    """

    first: float = 0.05
    sparsity: float | None = None
    max_drop: float | None = None
    max_trials: int = 12

    def __post_init__(self) -> None:
        if (self.sparsity is None) == (self.max_drop is None):
            raise ValueError("sparsity, max_drop: want exactly one of the two")
        if self.sparsity is not None and not 0 <= self.sparsity <= 1:
            raise ValueError(f"sparsity: want a number in [0, 1], got {self.sparsity!r}")
        if self.max_drop is not None and not 0 <= self.max_drop <= 100:
            raise ValueError(f"max_drop: want points from 0 to 100, got {self.max_drop!r}")
        if self.max_trials < 1:
            raise ValueError(f"max_trials: want at least 1, got {self.max_trials!r}")


@dataclass(frozen=True)
class Trial:
    """One relative epsilon and what it gave.

    Attributes
    ----------
    relative_epsilon : float
        Of every layer (parallel), of the first (cascade).
    zeros, weights : int
        Of the retrained layers.
    drop : float or None
        Points of held-out accuracy lost (after fine-tuning, where there is any); None without.
    certified : bool
        Whether every layer is.
    seconds : float
        Wall time.
    """

    relative_epsilon: float
    zeros: int
    weights: int
    drop: float | None
    certified: bool
    seconds: float

    @property
    def sparsity(self) -> float:
        """Zeros over weights."""
        return self.zeros / self.weights

    @staticmethod
    def of(record: Mapping[str, Any]) -> Trial:
        """Read a trial off its run's record."""
        held_out = record["accuracy"].get("held_out")
        drop = None
        if held_out is not None and held_out["before"] is not None:
            drop = 100 * (held_out["before"] - held_out.get("fine_tuned", held_out["after"]))
        totals = record["totals"]
        return Trial(
            record["options"]["relative_epsilon"],
            totals["zeros"],
            totals["weights"],
            drop,
            totals["certified"],
            record["seconds"],
        )


def goal_of(
    options: NetTrimOptions,
    sparsity_of: str,
    max_drop: float | None,
    max_trials: int,
) -> Goal | None:
    """What one epsilon is to be searched for; None where none is.

    Raises
    ------
    ValueError
        If what is asked for contradicts itself.
    """
    if sparsity_of not in ("layer", "network"):
        raise ValueError(f"sparsity_of: want 'layer' or 'network', got {sparsity_of!r}")
    if max_trials < 1:
        raise ValueError(f"max_trials: want at least 1, got {max_trials!r}")
    if max_drop is None and sparsity_of == "layer":
        return None
    what = "max_drop" if max_drop is not None else "sparsity_of"
    if max_drop is not None and options.sparsity is not None:
        raise ValueError("max_drop: finds the sparsity; want one of the two")
    wanted: float | None = None
    if max_drop is None:
        if not isinstance(options.sparsity, float | int):
            raise ValueError("sparsity_of: the network's wants one sparsity, a number")
        wanted = float(options.sparsity)
    if options.relative_epsilon is None:
        raise ValueError(f"{what}: searches for one relative epsilon; want no absolute one")
    if options.fit_weight is not None:
        raise ValueError(f"{what}: searches for one epsilon, which a fit_weight does not heed")
    return Goal(options.relative_epsilon, wanted, max_drop, max_trials)


OnTrial = Callable[[Trial, Goal], None]
RunAt = Callable[[float, Request], Run]
"""Retrains the network at a relative epsilon, as a request asks."""


def next_epsilon(goal: Goal, trials: Sequence[Trial]) -> float | None:
    """Choose the next relative epsilon; None when the search is over. There is one trial at least.

    For a sparsity, the root of the surplus zeros over log epsilon (see `solvers.path.root`). For a
    drop, steps by 2 until it is bracketed, then halves of the bracket until it is 5 % wide:
    accuracies are too uneven for more.
    """
    if len(trials) >= goal.max_trials:
        return None
    if goal.sparsity is not None:
        wanted = round(goal.sparsity * trials[0].weights)
        if any(abs(trial.zeros - wanted) <= _MET * trial.weights for trial in trials):
            return None
        places = [(math.log(trial.relative_epsilon), trial.zeros - wanted) for trial in trials]
        place = next_place(places, stride=_STRIDE, nearest=_NEAREST)
        following = None if place is None else math.exp(place)
    else:
        within = max((t.relative_epsilon for t in trials if _within(goal, t)), default=None)
        beyond = min((t.relative_epsilon for t in trials if not _within(goal, t)), default=None)
        if beyond is None:
            following = trials[-1].relative_epsilon * _FACTOR
        elif within is None:
            following = trials[-1].relative_epsilon / _FACTOR
        else:
            following = None if beyond / within <= _RATIO else math.sqrt(within * beyond)
    if following is None:
        return None
    following = min(max(following, SMALLEST), LARGEST)
    return None if any(trial.relative_epsilon == following for trial in trials) else following


def choose(goal: Goal, trials: Sequence[Trial]) -> int:
    """Number of the trial that is the outcome, from 0.

    The one nearest to the sparsity; or the sparsest within the drop, and if none is within, the one
    with the smallest drop.
    """
    numbers = range(len(trials))
    if goal.sparsity is not None:
        wanted = round(goal.sparsity * trials[0].weights)
        return min(numbers, key=lambda number: abs(trials[number].zeros - wanted))
    within = [number for number in numbers if _within(goal, trials[number])]
    if within:
        return max(within, key=lambda number: trials[number].zeros)
    return min(numbers, key=lambda number: _drop(trials[number]))


def search_epsilon(
    goal: Goal,
    run_at: RunAt,
    request: Request,
    stream: LayerStream,
    settings: Mapping[str, Any],
    on_trial: OnTrial | None,
) -> Run:
    """Retrain a network at one relative epsilon after another, and return the run that is chosen.

    Parameters
    ----------
    goal : Goal
        What to look for.
    run_at : callable
        Retrains the network at a relative epsilon.
    request : Request
        What is retrained, on what, judged on what, and where it is written.
    stream : LayerStream
        The dense network on the calibration data.
    settings : mapping
        The method's options as JSON values, for the directory's identity.
    on_trial : callable or None
        Called with each trial as it is done, and the goal.

    Returns
    -------
    Run
        The chosen trial's, its record with ``search`` beside the rest: the goal, what was got,
        whether it was met, and all trials.

    Raises
    ------
    ValueError
        If the directory is invalid.
    """
    started = time.perf_counter()
    target = request.out
    identity = {
        "method": "net-trim",
        "search": asdict(goal),
        "held_out": None if request.held_out is None else request.held_out.fingerprint,
        "options": settings,
        "select": [request.layers, request.skip],
        "fine_tune": request.fine_tune,
        **run_identity(stream),
        **request.subject.identity(training=request.fine_tune > 0),
    }
    with ExitStack() as stack:
        directory = None
        if target is not None:
            directory = stack.enter_context(open_run(target, identity, ()))
        trials: list[Trial] = []
        kept: tuple[int, Run] | None = None  # only the chosen one so far: networks may be large
        epsilon: float | None = min(max(goal.first, SMALLEST), LARGEST)
        while epsilon is not None:
            number = len(trials)
            record = _finished(_place(target, number), epsilon)
            if record is None:
                _log.info("search: trial %d, relative epsilon %.4g", number + 1, epsilon)
                notify = counting(request.on_layer, number + 1)
                run = run_at(epsilon, request.at(_place(target, number), notify))
                trials.append(Trial.of(run.record))
                if choose(goal, trials) == number:
                    kept = number, run
            else:
                trials.append(Trial.of(record))
            if on_trial is not None:
                on_trial(trials[-1], goal)
            epsilon = next_epsilon(goal, trials)
        number = choose(goal, trials)
        if kept is None or kept[0] != number:
            again = request.at(_place(target, number), None)
            chosen = run_at(trials[number].relative_epsilon, again)
        else:
            chosen = kept[1]
        outcome = {
            **chosen.record,
            "identity": identity,
            "search": _account(goal, trials, number),
            "seconds": time.perf_counter() - started,
        }
        if target is not None and directory is not None:
            request.subject.save(chosen.model, target)
            directory.write_record(outcome)
    return Run(chosen.model, chosen.layers, chosen.bounds, outcome, target)


def check_classes(subject: Subject, held_out: Data | None) -> None:
    """Refuse held-out data on which no accuracy can drop.

    Raises
    ------
    ValueError
    """
    wanted = "max_drop: wants held-out data (evaluate) with a class for each sample"
    if held_out is None:
        raise ValueError(wanted)
    labels = labels_for(subject.stream(held_out), held_out.y)
    if labels.classes is None:
        raise ValueError(f"{wanted}: {labels.reason}")


def _within(goal: Goal, trial: Trial) -> bool:
    assert goal.max_drop is not None
    return _drop(trial) <= goal.max_drop + 1e-9  # differences of shares are rounded


def _drop(trial: Trial) -> float:
    """Points lost; without an accuracy (outputs that are no classes) all of them."""
    return math.inf if trial.drop is None else trial.drop


def _place(target: Path | None, number: int) -> Path | None:
    return None if target is None else target / LAYERS / f"trial-{number + 1}"


def _finished(place: Path | None, epsilon: float) -> dict[str, Any] | None:
    """Record of a trial that is done; what else it depends on is in the directory's identity."""
    record = read_if_finished(place)
    if record is None or place is None:
        return None
    options = check_finished(record, f"run: {place / RUN_FILE}").record.options
    return record if options.get("relative_epsilon") == epsilon else None


def _account(goal: Goal, trials: Sequence[Trial], number: int) -> dict[str, Any]:
    """The search as JSON values."""
    chosen = trials[number]
    if goal.sparsity is None:
        asked: dict[str, Any] = {"max_drop": goal.max_drop}
        got: dict[str, Any] = {"drop": chosen.drop, "sparsity": chosen.sparsity}
        met = _within(goal, chosen)
    else:
        wanted = round(goal.sparsity * chosen.weights)
        asked = {"sparsity": goal.sparsity, "zeros": wanted}
        got = {"sparsity": chosen.sparsity, "zeros": chosen.zeros}
        met = chosen.zeros == wanted
    return {
        "asked": asked,
        "got": got,
        "met": met,
        "relative_epsilon": chosen.relative_epsilon,
        "chosen": number + 1,
        "trials": [{**asdict(trial), "sparsity": trial.sparsity} for trial in trials],
    }
