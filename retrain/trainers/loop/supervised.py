"""The training loop that every trainer of this package runs on.

It is the loop people write by hand (forward, loss, backward, step) with four places to hook a
plain function into, `Callbacks`. A trainer that prunes while it trains is a set of such functions:

* gates: draw a sample in ``before_forward``, set the gradient of their own parameters in
  ``after_backward``, remove a block in ``after_step``;
* soft pruning: zero small weights in ``after_step`` or ``after_epoch``; an optimiser with several
  objectives is handed the other objectives' gradients in ``after_backward``;
* switches with neuron removal: a `penalty` on the model, neurons cut in ``after_step``.

`train` leaves the caller's model, and torch's global generators, as they were. `fit` is the loop
itself: it trains in place.
"""

from __future__ import annotations

import copy
import logging
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from retrain.trainers.loop.accuracy import correct
from retrain.trainers.loop.batches import Augmentation, TrainingData, parts
from retrain.trainers.loop.callbacks import Callbacks, Epoch, Step
from retrain.trainers.loop.computation import PLAIN, Computation
from retrain.trainers.loop.distributed import joint_sums
from retrain.trainers.loop.states import device_of, mode, seeded
from solvers import checks

logger = logging.getLogger(__name__)

Model = TypeVar("Model", bound=nn.Module)
Loss = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Trained(Generic[Model]):
    """A trained copy of a model, and how the training went."""

    model: Model
    history: list[Epoch]


def adam(model: nn.Module) -> Optimizer:
    """Make torch's Adam, with torch's defaults, over all parameters."""
    return torch.optim.Adam(model.parameters())


def train(
    model: Model,
    data: TrainingData,
    *,
    epochs: int,
    optimizer: Callable[[nn.Module], Optimizer] = adam,
    schedule: Callable[[Optimizer], LRScheduler] | None = None,
    loss: Loss = functional.cross_entropy,
    penalty: Callable[[nn.Module], Tensor] | None = None,
    batch_size: int = 64,
    seed: int = 0,
    device: torch.device | str | None = None,
    callbacks: Callbacks | None = None,
) -> Trained[Model]:
    """Train a copy of `model`; the model itself is not touched.

    Parameters
    ----------
    model : nn.Module
        Maps inputs (B, ...) to logits (B, classes), or to whatever `loss` takes.
    optimizer, schedule : callable
        Make the optimiser from the copied model, ``lambda m: SGD(m.parameters(), lr=0.1)``, and
        the schedule from the optimiser.
    seed : int, optional
        Of the shuffling and, through torch's default generators, of the model's own randomness
        (dropout); those generators are put back as they were. Repeats bitwise on a CPU with the
        same number of threads; on a GPU, as far as torch's kernels do.
    device : torch.device or str, optional
        Where to train ("cpu", "cuda"), and where the returned model is; where `model` is by
        default.
    data, epochs, loss, penalty, batch_size, callbacks
        As for `fit`.

    Returns
    -------
    Trained
        The trained copy, its modules in the modes that `model`'s are in, and a record an epoch.

    Raises
    ------
    ValueError, FloatingPointError
        As for `fit`; ValueError also for a device that is neither a CPU nor CUDA.
    """
    place = device_of(model) if device is None else torch.device(device)
    with seeded(seed, place):
        trained = copy.deepcopy(model).to(place)
        made = optimizer(trained)
        history = fit(
            trained,
            data,
            epochs=epochs,
            optimizer=made,
            schedule=None if schedule is None else schedule(made),
            loss=loss,
            penalty=penalty,
            batch_size=batch_size,
            generator=torch.Generator().manual_seed(seed),
            callbacks=callbacks,
        )
    return Trained(trained, history)


def fit(
    model: nn.Module,
    data: TrainingData,
    *,
    epochs: int,
    optimizer: Optimizer,
    generator: torch.Generator,
    schedule: LRScheduler | None = None,
    loss: Loss = functional.cross_entropy,
    penalty: Callable[[nn.Module], Tensor] | None = None,
    batch_size: int = 64,
    callbacks: Callbacks | None = None,
    first_epoch: int = 0,
    first_step: int = 0,
    augmentation: Augmentation | None = None,
    computation: Computation = PLAIN,
) -> list[Epoch]:
    """Train `model` in place, where it is; each step on ``loss(model(x), y) + penalty(model)``.

    Parameters
    ----------
    model : nn.Module
        Changed in place, and so is `optimizer`. In training mode meanwhile; afterwards each of its
        modules is in the mode it was in.
    data : pair of arrays, or batches
        Two arrays with samples as rows, cut into batches of `batch_size` in an order drawn anew
        every epoch; or an iterable of (inputs, targets), passed over once an epoch, whose order
        and batch size are its own.
    epochs : int
        Passes over the data, 0 or more; those before `first_epoch` included.
    generator : torch.Generator
        On the CPU. One ``randperm`` an epoch is drawn from it when `data` is two arrays. Dropout
        and a DataLoader without a generator draw on torch's own.
    schedule : LRScheduler, optional
        Moved on after every epoch. One that moves after every step is a callback:
        ``after_step=(lambda step: schedule.step(),)``.
    loss : callable
        Of the outputs and the targets: the mean over the samples. Cross entropy by default.
    penalty : callable, optional
        Of the model: a scalar added to the loss.
    callbacks : Callbacks, optional
        Functions to call on the way.
    first_epoch, first_step : int, optional
        Where a training goes on that was interrupted after so many epochs and steps; every state
        (of the model, the optimiser, the schedule, the generators) is then the caller's to restore.

    Returns
    -------
    list of Epoch
        One record an epoch, from `first_epoch` on.

    Raises
    ------
    ValueError
        If `epochs` is negative, or `data` is empty or its two arrays differ in length.
    FloatingPointError
        If the loss or the penalty, or at the end of an epoch a parameter, is not finite. A loss is
        looked at before its step: the parameters are then those that gave it.
    """
    checks.count(0, epochs=epochs)
    calls = callbacks or Callbacks()
    place = device_of(model)
    history: list[Epoch] = []
    number = first_step
    with mode(model, training=True):
        for epoch in range(first_epoch, epochs):
            start = time.perf_counter()
            tally = _Tally()
            for batch in parts(
                data,
                batch_size,
                place,
                generator,
                part=computation.part,
                augmentation=augmentation,
            ):
                inputs, targets, share, samples = batch
                step = Step(model, optimizer, epoch, number, inputs, targets, share, samples)
                optimizer.zero_grad()
                for call in calls.before_forward:
                    call(step)
                outputs, fitted, penalised = _propagate(step, loss, penalty, computation)
                if share > 0:
                    tally.add(targets, outputs, fitted, penalised)
                computation.unscale(optimizer)
                for call in calls.after_backward:
                    call(step)
                computation.step(optimizer)
                for call in calls.after_step:
                    call(step)
                number += 1
                logger.debug("training: epoch %d of %d, step %d", epoch + 1, epochs, number)
            _check_parameters(model, epoch)
            if schedule is not None:
                schedule.step()
            tally = tally.joint(place)
            history.append(tally.record(epoch, time.perf_counter() - start, number))
            logger.info("%s", history[-1])
            answers = [call(history[-1], model, optimizer) for call in calls.after_epoch]
            if any(answers):
                break
    return history


def _propagate(
    step: Step,
    loss: Loss,
    penalty: Callable[[nn.Module], Tensor] | None,
    computation: Computation,
) -> tuple[Tensor, float, float]:
    """Run forward and backward; return the outputs, the loss and the penalty.

    A function of its own so that the graph is gone when it returns: while one is alive, autograd
    remembers the parameters' shapes, and a callback could not cut neurons out of them.
    """
    outputs = computation.forward(step.model, step.inputs)
    fitted = loss(outputs, step.targets)
    loss_value = _finite("loss", fitted, step)
    term = None if penalty is None else penalty(step.model)
    penalty_value = 0.0 if term is None else _finite("penalty", term, step)
    computation.backward(fitted, term, step.share)
    return outputs.detach(), loss_value, penalty_value


@dataclass
class _Tally:
    """Sums over the samples of an epoch."""

    samples: int = 0
    loss: float = 0.0
    penalty: float = 0.0
    predictions: int = 0
    hits: int | None = 0

    def add(self, targets: Tensor, outputs: Tensor, loss: float, penalty: float) -> None:
        met = correct(outputs, targets)
        self.samples += len(targets)
        self.loss += loss * len(targets)
        self.penalty += penalty * len(targets)
        self.predictions += targets.numel()
        self.hits = None if self.hits is None or met is None else self.hits + met

    def joint(self, device: torch.device) -> _Tally:
        """Add up the tallies of all processes."""
        known = self.hits is not None
        sums = [self.samples, self.loss, self.penalty, self.predictions, self.hits or 0]
        samples, loss, penalty, predictions, hits = joint_sums(sums, device)
        return _Tally(int(samples), loss, penalty, int(predictions), int(hits) if known else None)

    def record(self, epoch: int, seconds: float, steps: int) -> Epoch:
        accuracy = None if self.hits is None else self.hits / self.predictions
        mean, penalty = self.loss / self.samples, self.penalty / self.samples
        return Epoch(epoch, mean, penalty, accuracy, seconds, steps)


def _finite(what: str, scalar: Tensor, step: Step) -> float:
    """Return a scalar's value; on a GPU each look at one waits for it."""
    if not math.isfinite(value := scalar.item()):
        raise FloatingPointError(
            f"the {what} is {value} at step {step.number} (epoch {step.epoch}): lower the learning "
            f"rate, or look for NaN and huge values in the data"
        )
    return value


def _check_parameters(model: nn.Module, epoch: int) -> None:
    for name, parameter in model.named_parameters():
        if not bool(parameter.isfinite().all()):
            raise FloatingPointError(
                f"parameter {name!r} is not finite after epoch {epoch}: lower the learning rate"
            )
