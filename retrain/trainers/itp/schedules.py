"""The paper's learning-rate schedules: (9) after every step, section 6.1's after every epoch."""

from __future__ import annotations

import math

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from retrain.trainers.loop.training import Setting
from solvers import checks


def time_decay(optimizer: Optimizer, decay: float) -> LambdaLR:
    """Make (9), t_k = t_0 / (1 + decay k); to be moved on after every step.

    Raises
    ------
    ValueError
        If `decay` is negative.
    """
    checks.not_negative(decay=decay)
    return LambdaLR(optimizer, lambda step: 1 / (1 + decay * step))


def sigmoid_drop(optimizer: Optimizer, setting: Setting, *, end: float = 0.1) -> LambdaLR:
    """Make the paper's schedule, a drop after three quarters of the epochs; moved on after each.

    ::

        t(k) = t_start - (t_start - t_end) e^x / (e^x + 1),   x = (k - 0.75 K) / (0.075 K)

    in the epochs k = 1, ..., K.

    Parameters
    ----------
    setting : Setting
        Its epochs are K.
    end : float
        t_end / t_start, in (0, 1].

    Raises
    ------
    ValueError
        If `end` is out of its range.

    References
    ----------
    Reiners, Klamroth, Stiglmayr (2020), section 6.1, figure 3 (0.001 to 0.0001, K = 125).
    """
    if not 0 < end <= 1:
        raise ValueError(f"end: got {end}, want above 0 and at most 1")

    epochs = max(setting.epochs, 1)

    def factor(epoch: int) -> float:
        x = (epoch + 1 - 0.75 * epochs) / (0.075 * epochs)
        return 1 - (1 - end) / (1 + math.exp(-x))

    return LambdaLR(optimizer, factor)
