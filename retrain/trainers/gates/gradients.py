"""The gradient in theta, (23)-(27), its projection (30), and the hyper-prior's pressure.

    dL / dtheta^l = C_1^l - C_0^l - log gamma^l

with C the cost of the whole data set: N times the mean over a mini-batch, whatever its size. theta
is a float32 vector on the CPU, one entry a gate.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from retrain.trainers.gates.block import Gated, without_trace

Loss = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Pressure:
    """log gamma of each gate and epoch: 0 at first, then linear up to its value.

    Parameters
    ----------
    log_gamma : float
        Below 0; grows with the number of samples, as C does.
    warmup : int
        The epoch in which it has its full value. By default, 0, it is constant.
    factors : tuple of (pattern, factor)
        Times what it is for gates whose names match, as "stage3.*": the first that does.
    """

    log_gamma: float
    warmup: int = 0
    factors: tuple[tuple[str, float], ...] = ()

    def at(self, epoch: int, names: Sequence[str]) -> Tensor:
        """Return log gamma of the named gates in an epoch, shape (gates,)."""
        share = 1.0 if epoch >= self.warmup else epoch / self.warmup
        return torch.tensor([share * self.log_gamma * self._factor(name) for name in names])

    def _factor(self, name: str) -> float:
        return next((f for pattern, f in self.factors if fnmatchcase(name, pattern)), 1.0)


def project(theta: Tensor) -> None:
    """Put theta back into [0, 1], (30), in place."""
    theta.clamp_(0, 1)


@contextmanager
def open_gates(
    gates: Sequence[Gated], pattern: Sequence[bool], xi: Tensor | None = None
) -> Iterator[None]:
    """Set the gates for a while, and where `xi` is given as something to differentiate by."""
    set_gates(gates, pattern, xi)
    try:
        yield
    finally:
        clear_gates(gates)


def set_gates(gates: Sequence[Gated], pattern: Sequence[bool], xi: Tensor | None = None) -> None:
    """Set the gates of the next pass; `xi` holds the pattern as numbers, shape (gates,)."""
    scalars = [None] * len(gates) if xi is None else xi.unbind()
    for gate, is_open, scalar in zip(gates, pattern, scalars, strict=True):
        switch = gate.switch
        switch.is_open, switch.xi = is_open, scalar


def clear_gates(gates: Sequence[Gated]) -> None:
    """Open the gates, with nothing to learn: plain residual blocks."""
    for gate in gates:
        switch = gate.switch
        switch.is_open, switch.xi, switch.pattern = True, None, None


def exact_difference(
    model: nn.Module,
    gates: Sequence[Gated],
    pattern: Sequence[bool],
    inputs: Tensor,
    targets: Tensor,
    loss: Loss,
    *,
    largest_batch: int = 4096,
) -> Tensor:
    """Compute (26) over N: the loss with each gate open, less that with it closed.

    L + 1 evaluations for L gates: as sampled, and with one gate at a time the other way. They run
    as one batch of L + 1 copies, in which each block sees only the copies that it is open for. With
    a batch normalisation in training mode, whose statistics would mix the copies, they run one
    after the other; its running statistics are left alone. The gates are open afterwards.

    Parameters
    ----------
    gates, pattern : sequence
        All gates that are learnt, and the mini-batch's sample of them.
    loss : callable
        The mean over the samples.
    largest_batch : int, optional
        Rows of a batch of copies; more copies go into further batches.

    Returns
    -------
    Tensor, shape (L,)
        On the CPU. Times N it is (26).
    """
    rows = [list(pattern)]
    for index in range(len(gates)):
        flipped = list(pattern)
        flipped[index] = not flipped[index]
        rows.append(flipped)
    together = max(1, largest_batch // len(inputs))
    if any(isinstance(m, _BatchNorm) and m.training for m in model.modules()):
        together = 1
    losses: list[Tensor] = []
    with torch.no_grad(), without_trace(model):
        for start in range(0, len(rows), together):
            copies = rows[start : start + together]
            outputs = _evaluate(model, gates, copies, inputs)
            losses += [loss(output, targets) for output in outputs]
    found = torch.stack(losses).cpu()
    signs = torch.tensor([1 if is_open else -1 for is_open in pattern])
    return signs * (found[0] - found[1:])


def _evaluate(
    model: nn.Module, gates: Sequence[Gated], copies: Sequence[Sequence[bool]], inputs: Tensor
) -> Sequence[Tensor]:
    """Run the model once for every row of gates; return an output for each."""
    if len(copies) == 1:
        with open_gates(gates, copies[0]):
            output: Tensor = model(inputs)
        return [output]
    try:
        for gate, column in zip(gates, zip(*copies, strict=True), strict=True):
            gate.switch.pattern = column
        outputs: Tensor = model(inputs.repeat(len(copies), *(1,) * (inputs.ndim - 1)))
    finally:
        clear_gates(gates)
    return outputs.chunk(len(copies))


class MeanGradient:
    """The mean over an epoch of the gradient of (12) / N, for the convergence test of step 5.

    A mini-batch's own gradient stays large at a minimum; its mean does not.
    """

    def __init__(self) -> None:
        self._weights: dict[nn.Parameter, Tensor] = {}
        self._theta: Tensor | None = None
        self._steps = 0

    def add(self, model: nn.Module, theta: Tensor, decay: float) -> None:
        """Take in one mini-batch's gradients: of the weights, as they are; `theta`'s."""
        if self._theta is None or len(self._theta) != len(theta):
            # A block has gone: start over with those that are left.
            self._weights, self._theta, self._steps = {}, torch.zeros_like(theta), 0
        for weight in model.parameters():
            if weight.grad is not None:
                gradient = weight.grad + decay * weight.detach()
                held = self._weights.setdefault(weight, torch.zeros_like(gradient))
                held.add_(gradient)
        self._theta += theta
        self._steps += 1

    def size(self, theta: Tensor) -> float:
        """Return the root mean square over all entries; infinite before there is one.

        At a bound, theta's gradient counts only where it points inwards, as in (32).
        """
        if self._theta is None or len(self._theta) != len(theta):
            return float("inf")
        slope = self._theta
        pushed = ((theta <= 0) & (slope > 0)) | ((theta >= 1) & (slope < 0))
        parts = [*self._weights.values(), slope.masked_fill(pushed, 0)]
        total = sum(float(part.double().square().sum()) for part in parts)
        count = sum(part.numel() for part in parts)
        return float((total / max(count, 1)) ** 0.5) / self._steps
