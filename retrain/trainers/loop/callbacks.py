"""What a training loop tells the functions it calls on its way, and what it asks of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor, nn
from torch.optim import Optimizer


@dataclass(frozen=True)
class Epoch:
    """What one pass over the data gave.

    Attributes
    ----------
    number : int
        From 0.
    loss, penalty : float
        Means over the samples, each taken with the weights of its own step.
    accuracy : float or None
        Share of targets met, likewise and in training mode; None where targets are not class
        numbers.
    seconds : float
        Wall time of the steps and their callbacks; those after the epoch are not counted.
    steps : int
        Since the start of training, this epoch's included.
    """

    number: int
    loss: float
    penalty: float
    accuracy: float | None
    seconds: float
    steps: int = 0


@dataclass(frozen=True)
class Step:
    """What a callback sees of one step; it may change `model` and `optimizer` in place.

    Attributes
    ----------
    model, optimizer
        Those being trained.
    epoch, number : int
        The epoch, and the step since the start of training; both from 0.
    inputs, targets : Tensor
        The batch, on the model's device; in a parallel run, this process's part of it.
    share : float
        The part's share of the batch: 1 unless processes share it. A mean over the whole batch is
        the sum over the processes of ``share`` times the mean over the part
        (`retrain.trainers.loop.distributed.joint_mean`). 0 where there are fewer samples than
        processes and this one has but a stand-in.
    samples : int
        Of the whole batch, over all processes.
    """

    model: nn.Module
    optimizer: Optimizer
    epoch: int
    number: int
    inputs: Tensor
    targets: Tensor
    share: float = 1.0
    samples: int = 0


StepCallback = Callable[[Step], None]
EpochCallback = Callable[[Epoch, nn.Module, Optimizer], bool | None]


@dataclass(frozen=True)
class Callbacks:
    """Functions called during training, each group in the order given.

    Attributes
    ----------
    before_forward, after_backward, after_step : tuple of functions of a `Step`
        Before the forward pass; with the gradients there, before the optimiser; after it.
    after_epoch : tuple of functions of an `Epoch`, the model and the optimiser
        After the schedule has moved on. One that returns True ends the training.
    """

    before_forward: tuple[StepCallback, ...] = ()
    after_backward: tuple[StepCallback, ...] = ()
    after_step: tuple[StepCallback, ...] = ()
    after_epoch: tuple[EpochCallback, ...] = ()
