"""A training under way, and what a method that prunes while it trains has to provide.

A *method* (plain training, gates, intra-training pruning, switch layers) turns a model into a
`Training`: the model as it will be trained, its optimiser, and the functions that the loop calls on
its way, in which all pruning happens. Whoever runs it (`retrain.runs.training`) knows nothing of
the method: it fits the training epoch by epoch, writes a checkpoint of everything in it after each,
and asks the method for a plain module at the end::

    training = method.start(model, setting)
    method.reshape(training, description)      # when resuming; then the states are loaded
    fit(training.model, data, ...)             # pruning is in training.callbacks
    plain = method.finish(training)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from retrain.trainers.loop.callbacks import Callbacks
from retrain.trainers.loop.supervised import Loss
from retrain.trainers.named import Named


class Stateful(Protocol):
    """Something that changes during training and can be put back: tensors, numbers, lists, dicts.

    What `state_dict` gives is written with the checkpoint and read back with torch's weights-only
    reader, so it may hold tensors, numbers, text, None, and lists and dicts of those; nothing else.
    """

    def state_dict(self) -> dict[str, Any]:
        """Return the state."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> Any:
        """Put a state back."""
        ...


@dataclass(frozen=True, eq=False)
class GeneratorState:
    """A torch generator as something `Stateful`: what a method draws its randomness from."""

    generator: torch.Generator

    def state_dict(self) -> dict[str, Any]:
        """Return the generator's state."""
        return {"state": self.generator.get_state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Put a state back."""
        self.generator.set_state(state["state"].cpu())


@dataclass
class Training:
    """A training under way: all that one more epoch needs, and all that a checkpoint holds.

    Attributes
    ----------
    model : nn.Module
        Trained, and pruned, in place. Everything in it that changes is in its ``state_dict()``.
    optimizer : Optimizer
        Steps once a batch. Its parameter groups list what is trained now, in an order that
        `Method.reshape` reproduces.
    schedule : LRScheduler, optional
        Moved on after every epoch.
    loss, penalty
        As for `retrain.trainers.loop.supervised.fit`.
    callbacks : Callbacks
        Where the method does its work.
    parts : dict of str to Stateful
        What else has state: the gates' own optimiser, moving averages, generators
        (`GeneratorState`).
    describe : callable
        Returns JSON values: what is left of the model (``Method.reshape`` cuts a fresh one to it)
        and the method's figures. In every checkpoint and every line of ``history.jsonl``.
    """

    model: nn.Module
    optimizer: Optimizer
    schedule: LRScheduler | None = None
    loss: Loss = functional.cross_entropy
    penalty: Callable[[nn.Module], Tensor] | None = None
    callbacks: Callbacks = field(default_factory=Callbacks)
    parts: dict[str, Stateful] = field(default_factory=dict)
    describe: Callable[[], dict[str, Any]] = dict


@dataclass(frozen=True)
class Choice(Named):
    """An optimiser or a schedule of a recipe, found by its name.

    Attributes
    ----------
    make : callable
        Called with what it is made for, then the options.
    """

    make: Callable[..., Any]


@dataclass(frozen=True)
class Setting:
    """What a method is told of the training it takes part in.

    Attributes
    ----------
    samples, batch_size, epochs : int
        Of the whole training set; of a step, over all processes together; in all.
    seed : int
        For generators of the method's own. torch's default generators are seeded already. The same
        in every process of a parallel run.
    device : torch.device
        Where the model is.
    optimizer, schedule : Choice
        What the recipe asks for. `make_optimizer` and `make_schedule` make it; a method with an
        optimiser of its own reads the name and the options.
    loss : callable
        Of outputs and targets, the mean over the samples.
    """

    samples: int
    batch_size: int
    epochs: int
    seed: int
    device: torch.device
    optimizer: Choice
    schedule: Choice | None = None
    loss: Loss = functional.cross_entropy

    @property
    def steps_per_epoch(self) -> int:
        """Batches of an epoch; the last may be smaller."""
        return math.ceil(self.samples / self.batch_size)

    def make_optimizer(self, parameters: Iterable[Any]) -> Optimizer:
        """Make the recipe's optimiser over parameters, or groups of them."""
        made: Optimizer = self.optimizer.make(parameters, **self.optimizer.options)
        return made

    def make_schedule(self, optimizer: Optimizer) -> LRScheduler | None:
        """Make the recipe's schedule; None where it has none."""
        if self.schedule is None:
            return None
        made: LRScheduler = self.schedule.make(optimizer, self, **self.schedule.options)
        return made


class Method(Protocol):
    """How to train, and what to prune meanwhile: a frozen dataclass of options.

    Made from a recipe's ``[method]`` table, field by field. Options are validated when it is made:
    a ValueError names the key.
    """

    def start(self, model: nn.Module, setting: Setting) -> Training:
        """Make a training of a freshly initialised model, which it may take over and change.

        Raises
        ------
        ValueError
            If the model is not one that this method can train.
        """
        ...

    def reshape(self, training: Training, description: dict[str, Any]) -> None:
        """Cut a fresh training to the shape that a checkpoint's `Training.describe` gave.

        Afterwards the states of model, optimiser and parts fit; they are loaded by the caller.

        Raises
        ------
        ValueError
            If the description is of another model.
        """
        ...

    def finish(self, training: Training) -> nn.Module:
        """Return what was trained as a plain module: layers of torch's own, nothing to sample.

        What `retrain.adapters.files.description.describe_module` can describe.
        """
        ...
