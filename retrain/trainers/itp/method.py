"""Intra-training pruning as a method of the trainers: options in, a training out."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal, cast, get_args

import torch
from torch import nn
from torch.optim import Optimizer

from retrain.trainers.itp.objectives import (
    Complexity,
    Objective,
    dense_weights,
    gradients,
    other_weights,
    weighted_sum,
)
from retrain.trainers.itp.schedules import time_decay
from retrain.trainers.itp.smgd import SMGD, MAdam, MRMSProp, MultiGradient
from retrain.trainers.itp.soft_pruning import HardPruning, SoftPruning
from retrain.trainers.loop.callbacks import Callbacks, Epoch, Step
from retrain.trainers.loop.training import Setting, Stateful, Training
from solvers import checks

logger = logging.getLogger(__name__)

Pruning = Literal["batch", "epoch", "end"]
Zeros = Literal["soft", "hard"]
Descent = Literal["weighted", "multi-gradient"]

MULTI_GRADIENT: dict[str, tuple[type[MultiGradient], tuple[str, ...]]] = {
    "sgd": (SMGD, ("lr", "momentum")),
    "adam": (MAdam, ("lr", "betas", "eps")),
    "rmsprop": (MRMSProp, ("lr", "alpha", "eps")),
}
"""The several-objective form of an optimiser, and the options that it takes."""


@dataclass(frozen=True)
class Itp:
    """Train a loss and the complexity of dense layers at once; prune small weights meanwhile.

    The objectives are E, the loss with a fixed l2 term on the weights of the other layers, and
    Omega, the complexity of the chosen dense layers. Weighted descent is on (2), E + trade_off
    Omega, with the recipe's optimiser; multi-gradient descent on both, with its form for several
    objectives (`smgd`).

    Attributes
    ----------
    trade_off : float or None
        lambda >= 0 of (2), for weighted descent; lambda / (1 + lambda) is the weight of (7).
    threshold : float
        tau; weights below it are pruned.
    pruning : {"batch", "epoch", "end"}
        After every batch, after every epoch, or only after the training. In each case there is one
        pruning before the training and one after it.
    zeros : {"soft", "hard"}
        Whether pruned weights may come back.
    descent : {"weighted", "multi-gradient"}
        How the two objectives are brought together.
    power : float
        p of the complexity: 1 is the paper's; 2 is half the sum of squares.
    layers : tuple of str
        Shell patterns of the dense layers' names.
    l2 : float
        The fixed coefficient on the other weights.
    decay : float
        Of (9), on every step: t_0 / (1 + decay k). Not beside a schedule.
    """

    trade_off: float | None = None
    threshold: float = 1e-3
    pruning: Pruning = "batch"
    zeros: Zeros = "soft"
    descent: Descent = "weighted"
    power: float = 1.0
    layers: tuple[str, ...] = ("*",)
    l2: float = 1e-4
    decay: float = 0.0

    def __post_init__(self) -> None:
        for key, kind in (("pruning", Pruning), ("zeros", Zeros), ("descent", Descent)):
            checks.one_of(get_args(kind), **{key: getattr(self, key)})
        checks.not_negative(threshold=self.threshold, l2=self.l2, decay=self.decay)
        if self.descent == "weighted":
            if self.trade_off is None or not 0 <= self.trade_off < float("inf"):
                raise ValueError(
                    f"trade_off: got {self.trade_off}, want a finite number, 0 or more, for "
                    f"weighted descent"
                )
        elif self.trade_off is not None:
            raise ValueError(
                "trade_off: multi-gradient descent chooses its own at every step; leave it out"
            )
        if isinstance(self.layers, str) or not self.layers:
            raise ValueError(f"layers: got {self.layers!r}, want a list of patterns")
        Complexity((), self.power)

    def start(self, model: nn.Module, setting: Setting) -> Training:
        """Prune the fresh model, and make its training.

        Raises
        ------
        ValueError
            If the model has no such layers, the optimiser no form for several objectives, or there
            is both a decay and a schedule.
        """
        names = dense_weights(model, self.layers)
        complexity = Complexity(names, self.power)
        other = (self.l2, Complexity(other_weights(model, names), 2.0))
        pruning = (HardPruning if self.zeros == "hard" else SoftPruning)(
            model, names, self.threshold
        )
        pruning.prune()
        if collapsed(pruning):
            logger.warning(
                "threshold: %g prunes every weight of %s before the training; the network is "
                "constant, and may stay so",
                self.threshold,
                ", ".join(names),
            )
        calls = _callbacks(pruning, self.pruning)
        if self.descent == "weighted":
            optimizer = setting.make_optimizer(model.parameters())
        else:
            several = _multi_gradient(model, setting)
            hand_over = _hand_over(complexity, several)
            calls = replace(calls, after_backward=(*calls.after_backward, hand_over))
            optimizer = several
        # With several objectives the complexity is one of them, and no part of the loss.
        penalty = weighted_sum([(self.trade_off or 0.0, complexity), other])
        parts: dict[str, Stateful] = {"pruning": pruning}
        schedule = setting.make_schedule(optimizer)
        if self.decay > 0:
            if schedule is not None:
                raise ValueError("decay: want there is a [schedule] too; only one of them")
            decay = time_decay(optimizer, self.decay)
            parts["decay"] = decay
            calls = replace(calls, after_step=(*calls.after_step, lambda step: decay.step()))

        def describe() -> dict[str, Any]:
            return {
                **_description(model, pruning, complexity),
                **_weights_of_epoch(optimizer, setting.steps_per_epoch),
            }

        return Training(model, optimizer, schedule, setting.loss, penalty, calls, parts, describe)

    def reshape(self, training: Training, description: dict[str, Any]) -> None:
        """Leave the training as it is: weights become zero, nothing is cut out."""

    def finish(self, training: Training) -> nn.Module:
        """Prune a last time, and return the model."""
        pruning = cast("SoftPruning", training.parts["pruning"])
        pruning.prune()
        if collapsed(pruning):
            logger.warning("collapsed: every weight of %s is zero", ", ".join(pruning.weights))
        return training.model


def collapsed(pruning: SoftPruning) -> bool:
    """Tell whether all prunable weights are zero."""
    return not any(bool(weight.detach().any()) for weight in pruning.weights.values())


def _callbacks(pruning: SoftPruning, when: Pruning) -> Callbacks:
    """Where `pruning` acts during training."""

    def after_step(step: Step) -> None:
        pruning.prune()

    def after_epoch(epoch: Epoch, model: nn.Module, optimizer: Optimizer) -> None:
        pruning.prune()

    calls = Callbacks(
        after_step=(after_step,) if when == "batch" else (),
        after_epoch=(after_epoch,) if when == "epoch" else (),
    )
    if not isinstance(pruning, HardPruning):
        return calls

    def hold(step: Step) -> None:
        pruning.hold()

    return replace(calls, after_backward=(hold,), after_step=(hold, *calls.after_step))


def _hand_over(complexity: Objective, optimizer: MultiGradient) -> Callable[[Step], None]:
    """Return the callback that gives the optimiser the second objective's gradient."""

    def hand_over(step: Step) -> None:
        found = gradients(complexity, step.model, optimizer.parameters())
        optimizer.set_gradients(1, found)

    return hand_over


def _multi_gradient(model: nn.Module, setting: Setting) -> MultiGradient:
    """Make the recipe's optimiser in its form for two objectives."""
    name, options = setting.optimizer.name, setting.optimizer.options
    if name not in MULTI_GRADIENT:
        raise ValueError(
            f"optimizer: multi-gradient descent has {', '.join(MULTI_GRADIENT)}, not {name!r}"
        )
    kind, allowed = MULTI_GRADIENT[name]
    for key in options:
        if key not in allowed:
            raise ValueError(f"optimizer: {kind.__name__} takes {', '.join(allowed)}, not {key!r}")
    return kind(model.parameters(), **options, objectives=2)


def _description(model: nn.Module, pruning: SoftPruning, complexity: Objective) -> dict[str, Any]:
    """What is left of the chosen layers, and their complexity."""
    counts = pruning.counts()
    with torch.no_grad():
        omega = float(complexity(model))
    return {
        "layers": counts,
        "nonzero": sum(count["nonzero"] for count in counts.values()),
        "size": sum(count["size"] for count in counts.values()),
        "complexity": omega,
        "collapsed": collapsed(pruning),
    }


def _weights_of_epoch(optimizer: Optimizer, steps: int) -> dict[str, Any]:
    """Mean, smallest and largest weight that (15) gave to Omega in the last epoch."""
    if not isinstance(optimizer, MultiGradient) or not optimizer.trade_offs:
        return {}
    weights = [weights[1] for weights in optimizer.trade_offs[-steps:]]
    return {
        "weight": {
            "mean": sum(weights) / len(weights),
            "min": min(weights),
            "max": max(weights),
        }
    }
