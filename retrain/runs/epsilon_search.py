"""The search for one relative epsilon for a whole network: by its sparsity or its accuracy.

Every trial is a Net-Trim run of its own at one relative epsilon, in ``DIR/layers/trial-1``,
``DIR/layers/trial-2``, ...; DIR holds the chosen trial's outcome, and its ``run.json`` lists all
trials. The next epsilon depends only on the trials before it, so the same command resumes a search
as it resumes a run.
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
from solvers import checks
from solvers.path.root import next_place

_log = logging.getLogger(__name__)

SMALLEST, LARGEST = 1e-4, 1.0
"""Range of the relative epsilons that a search tries. The largest is derived: at 1 a layer of zeros
is feasible, so more cannot prune more. The smallest is chosen by hand: below it next to nothing is
pruned; a smaller value makes a hopeless search longer."""

_STRIDE = math.log(3.0)
"""Longest step of log epsilon while a sparsity is not bracketed. A longer step brackets with fewer
trials but leaves a wider bracket to narrow. Chosen by hand."""

_NEAREST = 1e-4
"""Width of the bracket in log epsilon below which the search for a sparsity ends. A smaller value
spends trials on changes of single weights; a larger one misses the sparsity by more. Chosen by
hand."""

_MET = 1e-4
"""Share of the weights by which the zeros may miss the count wanted for the search to end. A
smaller value costs more trials; a larger one gives a less exact sparsity. Chosen by hand."""

_FACTOR, _RATIO = 2.0, 1.05
"""Of a search for a drop: the factor between relative epsilons until the drop is bracketed, and the
ratio of the bracket's ends at which the search ends. A larger factor brackets with fewer trials and
leaves a wider bracket. A smaller ratio costs more trials, and accuracies are too uneven to gain
from it; a larger one prunes less than possible. Chosen by hand."""


@dataclass(frozen=True)
class Goal:
    """Aim of a search for one relative epsilon: a sparsity or a drop, exactly one of the two.

    Attributes
    ----------
    first : float
        Relative epsilon of the first trial.
    sparsity : float or None
        Zeros over weights in [0, 1], of all retrained layers together.
    max_drop : float or None
        Held-out accuracy that may be lost, in percentage points; the sparsest trial within it is
        chosen.
    max_trials : int
        Largest number of networks retrained.

    Raises
    ------
    ValueError
        If a value is out of range, or both or neither of the aims are given.
    """

    first: float = 0.05
    sparsity: float | None = None
    max_drop: float | None = None
    max_trials: int = 12

    def __post_init__(self) -> None:
        if (self.sparsity is None) == (self.max_drop is None):
            raise ValueError("sparsity, max_drop: want exactly one of the two")
        if self.sparsity is not None and not 0 <= self.sparsity <= 1:
            raise ValueError(f"sparsity: got {self.sparsity!r}, want a number in [0, 1]")
        if self.max_drop is not None and not 0 <= self.max_drop <= 100:
            raise ValueError(f"max_drop: got {self.max_drop!r}, want points from 0 to 100")
        checks.count(1, max_trials=self.max_trials)


@dataclass(frozen=True)
class Trial:
    """One relative epsilon and its outcome.

    Attributes
    ----------
    relative_epsilon : float
        Relative epsilon of every layer (parallel scheme) or of the first layer (cascade).
    zeros, weights : int
        Zeros and prunable weights of all retrained layers.
    drop : float or None
        Held-out accuracy lost, in percentage points, after fine-tuning where there is any; None
        where there is no accuracy.
    certified : bool
        Whether every layer is certified.
    seconds : float
        Wall time of the trial.
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
        """Read a trial from the record of its run.

        Parameters
        ----------
        record : mapping
            JSON values of the trial's ``run.json``.

        Returns
        -------
        Trial
            Epsilon, zeros, drop, certification and seconds of that run.
        """
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
    """Determine the aim of the search that the options ask for.

    Parameters
    ----------
    options : NetTrimOptions
        Options of the run.
    sparsity_of : {"layer", "network"}
        Whether the sparsity is that of each layer or of the whole network.
    max_drop : float or None
        Held-out accuracy that may be lost, in percentage points.
    max_trials : int
        Largest number of networks retrained.

    Returns
    -------
    Goal or None
        Aim of the search; None where the options need no search.

    Raises
    ------
    ValueError
        If the options contradict each other.
    """
    if sparsity_of not in ("layer", "network"):
        raise ValueError(f"sparsity_of: got {sparsity_of!r}, want 'layer' or 'network'")
    checks.count(1, max_trials=max_trials)
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
"""Receives each trial as soon as it is done, and the goal."""

RunAt = Callable[[float, Request], Run]
"""Retrains the network at a relative epsilon, as a request asks."""


def next_epsilon(goal: Goal, trials: Sequence[Trial]) -> float | None:
    """Choose the next relative epsilon.

    For a sparsity: the root of the surplus of zeros as a function of log epsilon
    (`solvers.path.root`). For a drop: steps by a factor of 2 until the limit is bracketed, then
    bisection on the logarithm until the bracket is 5 % wide; accuracies are too uneven for a finer
    one.

    Parameters
    ----------
    goal : Goal
        Aim of the search.
    trials : sequence of Trial
        Trials so far, at least one, in their order.

    Returns
    -------
    float or None
        Next relative epsilon, within [`SMALLEST`, `LARGEST`]; None when the search is over.
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
    """Choose the trial that is the outcome of the search.

    For a sparsity, the trial nearest to it. For a drop, the sparsest trial within it; if there is
    none, the trial with the smallest drop.

    Parameters
    ----------
    goal : Goal
        Aim of the search.
    trials : sequence of Trial
        All trials, at least one.

    Returns
    -------
    int
        Index of the trial, from 0.
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
        Aim of the search.
    run_at : callable
        Function that retrains the network at a relative epsilon, as a request asks.
    request : Request
        Network, data, held-out data and run directory.
    stream : LayerStream
        Dense network on the calibration data.
    settings : mapping
        Options of the method as JSON values, for the directory's identity.
    on_trial : callable or None
        Function called with each trial as soon as it is done, and with the goal.

    Returns
    -------
    Run
        Run of the chosen trial; its record has ``search`` too: the goal, what was reached, whether
        the goal was met, and all trials.

    Raises
    ------
    ValueError
        If the directory is invalid.

    Notes
    -----
    Cost: up to ``goal.max_trials`` runs, and one more of the chosen trial where its network is no
    longer in memory (with a run directory, the layers of that run are read rather than solved).
    Memory: one trial's network besides the dense one.
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
        kept: tuple[int, Run] | None = None  # the best trial so far only: networks may be large
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
    """Refuse held-out data that gives no accuracy, for a search that limits a drop of accuracy.

    Parameters
    ----------
    subject : Subject
        Network.
    held_out : Data or None
        Held-out data.

    Raises
    ------
    ValueError
        If there is no held-out data, or its labels are not classes.
    """
    wanted = "max_drop: wants held-out data (evaluate) with a class for each sample"
    if held_out is None:
        raise ValueError(wanted)
    labels = labels_for(subject.stream(held_out), held_out.y)
    if labels.classes is None:
        raise ValueError(f"{wanted}: {labels.reason}")


def _within(goal: Goal, trial: Trial) -> bool:
    assert goal.max_drop is not None
    # 1e-9 percentage points cover the rounding of a difference of two shares.
    return _drop(trial) <= goal.max_drop + 1e-9


def _drop(trial: Trial) -> float:
    """Percentage points lost; infinity where there is no accuracy (outputs are not classes)."""
    return math.inf if trial.drop is None else trial.drop


def _place(target: Path | None, number: int) -> Path | None:
    return None if target is None else target / LAYERS / f"trial-{number + 1}"


def _finished(place: Path | None, epsilon: float) -> dict[str, Any] | None:
    """Read the record of a finished trial; the directory's identity covers what else matters."""
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
