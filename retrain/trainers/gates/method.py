"""Algorithm 1 as a method of the trainers: train the weights and the gates, prune meanwhile."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any, Literal, cast, get_args

import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, Optimizer

from retrain.trainers.gates.gating import Gating
from retrain.trainers.gates.gradients import (
    MeanGradient,
    Pressure,
    clear_gates,
    exact_difference,
)
from retrain.trainers.gates.network import gates_of, ungate
from retrain.trainers.loop.callbacks import Callbacks, Epoch, Step
from retrain.trainers.loop.distributed import joint_mean
from retrain.trainers.loop.training import Setting, Training
from solvers import checks

Estimator = Literal["first-order", "exact"]
ThetaOptimizer = Literal["adam", "sgd"]


@dataclass(frozen=True)
class Gates:
    """Learn which blocks to keep while training, and remove the others as soon as that is clear.

        min  C(W, theta) + decay/2 |W|^2 - sum_l theta^l log gamma^l,   0 <= theta <= 1      (12)

    with C the cost summed over the N samples. One gate sample a mini-batch; the closed blocks are
    skipped. The network's optimiser is the recipe's; the decay is part of this method.

    Parameters
    ----------
    log_gamma : float
        Below 0, the less the more is pruned: what a block must be worth (condition O2). 0: nothing.
    decay : float
        lambda of (10), over all parameters.
    scaled_from : int, optional
        The number of samples that `log_gamma` and `decay` are meant for; they are scaled to those
        there are. By default they are taken as they are.
    warmup : int
        log gamma rises linearly from 0, over so many epochs; 0: it is constant.
    factors : dict of str to float
        log gamma times that for gates whose names match, as {"stage3.*" = 5}.
    theta : float
        Where the keep probabilities start.
    estimator : {"first-order", "exact"}
        (27), without a further pass; or (26), with as many further passes as there are gates.
    theta_optimizer : {"adam", "sgd"}
        Of theta.
    theta_rate : float
        Its learning rate; for "sgd" on (12) itself, so far below 1 / N.
    tolerance : float
        theta_tol: blocks are removed when theta is at most that.
    keep_at : float, optional
        Gates are open for good when theta is at least that. By default, never. Together with
        ``theta = 1``, ``keep_at = 1`` trains the network as it is: the dense baseline.
    round_below : float
        Before fine-tuning theta below that becomes 0, and any other 1.
    fine_tune_epochs : int
        How many of the training's epochs come after rounding.
    fine_tune_rate : float, optional
        The network's learning rate in those; what it is by default.
    power, offset : float
        For Robbins-Monro steps (31), a(n) = theta_rate (1 + n / offset)^(-power), in theta and in
        W, plain gradient descent in both: 1/2 < power <= 1. By default, power 0, there are none,
        and the recipe's optimiser and schedule are followed.
    converged : float, optional
        Rounds already when the root mean square of an epoch's mean gradient of (12) / N, over all
        weights and thetas that may move, is at most this (step 5). By default it is not looked at.

    Raises
    ------
    ValueError
        If an option is out of its range; the message names it.
    """

    log_gamma: float
    decay: float = 1.0
    scaled_from: int | None = None
    warmup: int = 0
    factors: dict[str, float] = field(default_factory=dict)
    theta: float = 0.75
    estimator: Estimator = "first-order"
    theta_optimizer: ThetaOptimizer = "adam"
    theta_rate: float = 1e-3
    tolerance: float = 0.01
    keep_at: float | None = None
    round_below: float = 1e-3
    fine_tune_epochs: int = 0
    fine_tune_rate: float | None = None
    power: float = 0.0
    offset: float = 1000.0
    converged: float | None = None

    def __post_init__(self) -> None:
        _check("log_gamma", self.log_gamma, self.log_gamma <= 0, "0 or less")
        checks.not_negative(decay=self.decay)
        _check("theta", self.theta, 0 < self.theta <= 1, "a probability above 0")
        checks.positive(theta_rate=self.theta_rate, offset=self.offset)
        checks.below_one(tolerance=self.tolerance)
        _check("round_below", self.round_below, 0 <= self.round_below <= 1, "0 to 1")
        power = self.power == 0 or 0.5 < self.power <= 1
        _check("power", self.power, power, "0, or above 1/2 and up to 1, by (31)")
        for name in ("warmup", "fine_tune_epochs"):
            checks.count(0, **{name: getattr(self, name)})
        if self.scaled_from is not None:
            checks.count(1, scaled_from=self.scaled_from)
        for name in ("keep_at", "fine_tune_rate", "converged"):
            value = getattr(self, name)
            if value is not None:
                checks.positive(**{name: value})
        checks.one_of(get_args(Estimator), estimator=self.estimator)
        checks.one_of(get_args(ThetaOptimizer), theta_optimizer=self.theta_optimizer)
        for pattern, factor in self.factors.items():
            checks.positive(**{f"factors.{pattern}": factor})
        if self.power and self.theta_optimizer != "sgd":
            raise ValueError(
                f"theta_optimizer: got {self.theta_optimizer!r}, want 'sgd' with Robbins-Monro "
                f"steps (power {self.power})"
            )

    def start(self, model: nn.Module, setting: Setting) -> Training:
        """Make the training of a model with gated blocks.

        Raises
        ------
        ValueError
            If the model has no gated block, a pattern of `factors` matches none, or the options
            and the setting do not go together.
        """
        names = list(gates_of(model))
        if not names:
            raise ValueError(
                f"model: {type(model).__name__} has no gated block; put gates in with `gate` or "
                f"`gate_network`"
            )
        if self.fine_tune_epochs >= max(setting.epochs, 1):
            raise ValueError(
                f"fine_tune_epochs: got {self.fine_tune_epochs}, want fewer than the training's "
                f"{setting.epochs} epochs"
            )
        if self.fine_tune_rate is not None and setting.schedule is not None:
            raise ValueError("fine_tune_rate: cannot be set beside a schedule of learning rates")
        for pattern in self.factors:
            if not any(fnmatchcase(name, pattern) for name in names):
                raise ValueError(f"factors: {pattern!r} matches no gate; there are {names}")
        scale = 1.0 if self.scaled_from is None else setting.samples / self.scaled_from
        gating = Gating(
            model, self.theta, torch.Generator().manual_seed(setting.seed + _SAMPLER_SEED)
        )
        make_theta = Adam if self.theta_optimizer == "adam" else SGD
        gating.optimizer = make_theta([gating.theta], lr=self.theta_rate)
        if self.keep_at is not None:
            gating.fix(self.keep_at)
        optimizer = setting.make_optimizer(model.parameters())
        if self.power:
            _check_plain_sgd(optimizer, setting)
        rate = scale * self.decay / setting.samples
        penalty = _decay(optimizer, rate)
        pressure = Pressure(scale * self.log_gamma, self.warmup, tuple(self.factors.items()))
        training = Training(
            model,
            optimizer,
            setting.make_schedule(optimizer),
            penalty=penalty,
            parts={"gates": gating},
            describe=gating.describe,
        )
        work = _Work(self, setting, training, gating, pressure, rate if penalty is None else 0.0)
        training.callbacks, training.loss = work.callbacks(), work.loss
        return training

    def reshape(self, training: Training, description: dict[str, Any]) -> None:
        """Remove the blocks that a checkpoint's description says were removed, in that order.

        Raises
        ------
        ValueError
            If the description is of another model.
        """
        gating = gating_of(training)
        removed, kept = description["removed"], description["kept"]
        unknown = [name for name in [*removed, *kept] if name not in gating.gates]
        if unknown:
            raise ValueError(f"description: the model has no gated block {unknown[0]!r}")
        gating.keep([name for name in kept if name in gating.names])
        for name in removed:
            gating.remove([name], training.optimizer)
        if gating.names != list(description["theta"]):
            raise ValueError(
                f"description: the gates left are {gating.names}, not {list(description['theta'])}"
            )
        gating.kept = list(kept)

    def finish(self, training: Training) -> nn.Module:
        """Round what is not rounded, and return the network with its residual blocks plain."""
        gating = gating_of(training)
        if gating.rounded is None:
            gating.round(training.optimizer, self.round_below, epoch=-1)
        return ungate(training.model)


_SAMPLER_SEED = 0x6761746573  # another stream than that of the shuffling
_MOST_SHARE = 2.0  # of a part among equals, times their number: 1, but for rounding


def gating_of(training: Training) -> Gating:
    """Return the gates of a training that `Gates` started."""
    return cast("Gating", training.parts["gates"])


@dataclass
class _Work:
    """What happens in the loop: algorithm 1's steps, as callbacks."""

    method: Gates
    setting: Setting
    training: Training
    gating: Gating
    pressure: Pressure
    decay: float
    scale: Tensor | None = None
    mean: MeanGradient = field(default_factory=MeanGradient)
    log_gamma: Tensor | None = None
    log_gamma_for: tuple[int, int] = (-1, -1)

    def callbacks(self) -> Callbacks:
        return Callbacks(
            before_forward=(self.sample,),
            after_backward=(self.learn,),
            after_step=(self.prune,),
            after_epoch=(self.end_epoch,),
        )

    def sample(self, step: Step) -> None:
        """Step 1: one sample of the gates; the step size a(n)."""
        if self.method.power:
            self._set_step_size()
        self.gating.steps += 1
        if self.gating.names:
            first_order = self.method.estimator == "first-order"
            self.gating.sample(step.inputs.device, differentiable=first_order)

    def learn(self, step: Step) -> None:
        """Steps 2 and 3 for theta; its gradient belongs to the weights before their step."""
        gating = self.gating
        difference = torch.zeros(0)
        if gating.names:
            gating.decay_closed()
            difference = joint_mean(self._difference(step), step)
            if self._overflowed(difference):
                return
        if self.method.converged is not None:
            self.mean.add(step.model, self._slope(difference, step.epoch), self.decay)
        if gating.names:
            gating.step(difference, self._log_gamma(step.epoch), self.setting.samples)

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return the loss, and note what it is scaled by on its way to being propagated."""
        loss = self.setting.loss(outputs, targets)
        if loss.requires_grad:
            loss.register_hook(self._note_scale)
        return loss

    def _note_scale(self, scale: Tensor) -> None:
        self.scale = scale

    def _difference(self, step: Step) -> Tensor:
        """Estimate C_1 - C_0 over N from this process's part of the mini-batch."""
        gating = self.gating
        if gating.xi is None:
            return exact_difference(
                gating.model,
                gating.learnt,
                gating.pattern,
                step.inputs,
                step.targets,
                self.setting.loss,
            )
        if step.share == 0 or gating.xi.grad is None or self.scale is None:
            return torch.zeros_like(gating.xi)
        # 1 in a single process; a part's share of the batch, and float16's factor, elsewhere.
        return gating.xi.grad / self.scale

    def _overflowed(self, difference: Tensor) -> bool:
        """Whether float16's scaled gradients overflowed: the weights' step is passed over too."""
        scaled = self.scale is not None and float(self.scale) > _MOST_SHARE
        return scaled and not bool(difference.isfinite().all())

    def prune(self, step: Step) -> None:
        """Step 4; the gates are open until the next sample, for whoever evaluates meanwhile."""
        gating = self.gating
        if not gating.names:
            return
        clear_gates(gating.learnt)
        gating.prune(step.optimizer, self.method.tolerance)
        if self.method.keep_at is not None:
            gating.fix(self.method.keep_at)

    def end_epoch(self, epoch: Epoch, model: nn.Module, optimizer: Optimizer) -> bool:
        """Step 5: round when that is due; end when fine-tuning is over."""
        method, gating = self.method, self.gating
        done = epoch.number + 1
        if gating.rounded is None:
            due = done >= self.setting.epochs - method.fine_tune_epochs
            if due or self._has_converged():
                gating.round(optimizer, method.round_below, epoch.number)
                if method.fine_tune_rate is not None:
                    for group in optimizer.param_groups:
                        group["lr"] = method.fine_tune_rate
        self.mean = MeanGradient()
        return gating.rounded is not None and done > gating.rounded + method.fine_tune_epochs

    def _log_gamma(self, epoch: int) -> Tensor:
        wanted = (epoch, len(self.gating.names))
        if self.log_gamma is None or self.log_gamma_for != wanted:
            self.log_gamma = self.pressure.at(epoch, self.gating.names)
            self.log_gamma_for = wanted
        return self.log_gamma

    def _set_step_size(self) -> None:
        size = self.method.theta_rate * (1 + self.gating.steps / self.method.offset) ** (
            -self.method.power
        )
        for group in self.gating.optimizer.param_groups:
            group["lr"] = size
        for group in self.training.optimizer.param_groups:
            group["lr"] = size * self.setting.samples  # its loss is (12) over N

    def _slope(self, difference: Tensor, epoch: int) -> Tensor:
        return difference.cpu() - self._log_gamma(epoch) / self.setting.samples

    def _has_converged(self) -> bool:
        if self.method.converged is None:
            return False
        return self.mean.size(self.gating.theta.detach()) <= self.method.converged


def _decay(optimizer: Optimizer, rate: float) -> Callable[[nn.Module], Tensor] | None:
    """Add rate/2 |W|^2: as weight decay where that is the same and free, else as a penalty.

    Raises
    ------
    ValueError
        If the optimiser has a weight decay already.
    """
    for group in optimizer.param_groups:
        if group.get("weight_decay") and type(optimizer) in (SGD, Adam):
            raise ValueError(
                f"optimizer: a weight_decay of {group['weight_decay']} was asked for, but the "
                f"method's decay is the only one; set that"
            )
    if rate == 0:
        return None
    if type(optimizer) in (SGD, Adam) and not optimizer.defaults.get("decoupled_weight_decay"):
        for group in (*optimizer.param_groups, optimizer.defaults):
            group["weight_decay"] = rate
        return None

    def half_square(model: nn.Module) -> Tensor:
        return 0.5 * rate * torch.stack([p.square().sum() for p in model.parameters()]).sum()

    return half_square


def _check_plain_sgd(optimizer: Optimizer, setting: Setting) -> None:
    plain = type(optimizer) is SGD and not any(g["momentum"] for g in optimizer.param_groups)
    if not plain or setting.schedule is not None:
        raise ValueError(
            f"power: Robbins-Monro steps want SGD without momentum and no schedule, not "
            f"{type(optimizer).__name__} {setting.optimizer.options} and "
            f"{'no schedule' if setting.schedule is None else setting.schedule.name}"
        )


def _check(name: str, value: float, holds: bool, wanted: str) -> None:
    if not (isinstance(value, int | float) and math.isfinite(value) and holds):
        raise ValueError(f"{name}: got {value!r}, want {wanted}")
