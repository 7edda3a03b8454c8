"""How a step is computed: as torch does it, in mixed precision, in several processes together."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.optim import Optimizer

from retrain.trainers.loop.batches import WHOLE, Part
from retrain.trainers.loop.distributed import Replicas

HALVES = {"bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True, eq=False)
class Computation:
    """Forward pass, backward pass and step; by default plain torch.

    Attributes
    ----------
    half : torch.dtype, optional
        Run the forward pass under torch's autocast to this type; the weights stay float32, and
        the loss is taken in float32.
    scaler : GradScaler, optional
        Scales the loss, so that float16's gradients do not vanish; gradients are as they should be
        again when callbacks see them.
    replicas : Replicas, optional
        Averages the gradients over processes.
    part : Part
        Which part of each batch this process computes.
    """

    half: torch.dtype | None = None
    scaler: GradScaler | None = None
    replicas: Replicas | None = None
    part: Part = WHOLE

    def forward(self, model: nn.Module, inputs: Tensor) -> Tensor:
        """Return the model's outputs."""
        run = model if self.replicas is None else self.replicas.of(model)
        if self.half is None:
            outputs: Tensor = run(inputs)
            return outputs
        with torch.autocast(inputs.device.type, self.half):
            outputs = run(inputs)
        return outputs.float()

    def backward(self, loss: Tensor, penalty: Tensor | None, share: float) -> None:
        """Propagate the loss, which has `share` of the whole batch's weight, and the penalty."""
        objective = loss
        if self.part.processes > 1:
            # Gradients are averaged over the processes: sum of share_r loss_r = mean of the batch.
            objective = loss * (share * self.part.processes)
        if penalty is not None:
            objective = objective + penalty
        if self.scaler is not None:
            objective = self.scaler.scale(objective)
        objective.backward()

    def unscale(self, optimizer: Optimizer) -> None:
        """Make the gradients those of the loss, where it was scaled."""
        if self.scaler is not None:
            self.scaler.unscale_(optimizer)

    def step(self, optimizer: Optimizer) -> None:
        """Take the optimiser's step; with a scaler, unless a gradient overflowed."""
        if self.scaler is None:
            optimizer.step()
        else:
            self.scaler.step(optimizer)
            self.scaler.update()

    def states(self) -> dict[str, Any]:
        """Return what a checkpoint holds of it: the scaler's state."""
        return {} if self.scaler is None else {"scaler": self.scaler.state_dict()}

    def load_states(self, states: dict[str, Any]) -> None:
        """Put the scaler's state back."""
        if self.scaler is not None:
            self.scaler.load_state_dict(states["scaler"])


PLAIN = Computation()


def computation(
    precision: str,
    device: torch.device,
    *,
    replicas: Replicas | None = None,
    part: Part = WHOLE,
) -> Computation:
    """Return how to compute in a precision on a device.

    Parameters
    ----------
    precision : {"float32", "bfloat16", "float16"}
        bfloat16 on a GPU that has it, or a CPU (which is slower at it than at float32 unless it
        has the instructions); float16 on a GPU.
    device : torch.device
    replicas, part
        As for `Computation`.

    Raises
    ------
    ValueError
        If the precision is unknown, or the device does not have it.
    """
    if precision == "float32":
        return Computation(replicas=replicas, part=part)
    if precision not in HALVES:
        raise ValueError(f"precision: got {precision!r}, want float32, bfloat16 or float16")
    on_gpu = device.type == "cuda"
    if precision == "float16" and not on_gpu:
        raise ValueError("precision: float16 is for CUDA; use bfloat16 on a CPU")
    if on_gpu and precision == "bfloat16":
        with torch.cuda.device(device) if device.index is not None else nullcontext():
            if not torch.cuda.is_bf16_supported(including_emulation=False):
                raise ValueError("precision: this GPU has no bfloat16; use float16 or float32")
    scaler = GradScaler("cuda") if precision == "float16" else None
    return Computation(HALVES[precision], scaler, replicas, part)
