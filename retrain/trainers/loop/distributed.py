"""Training in several processes: `torchrun`, torch's DistributedDataParallel, joint batch norm.

Each process has the whole model and computes its part of every batch; gradients are averaged, so
that each takes the step that one process would take with the whole batch. Whatever else a method
computes from data it makes joint itself, with `joint_mean`; whatever it draws it draws from
generators that are seeded alike in all processes.
"""

from __future__ import annotations

import io
import os
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel

from retrain.trainers.loop.batches import WHOLE, Part
from retrain.trainers.loop.callbacks import Step
from solvers.workers import end_with_parent

if distributed.is_available():
    # DistributedDataParallel imports it. Imported after a group is joined, it keeps that group for
    # good, as the default of its functions' arguments.
    import torch.distributed.nn


@contextmanager
def processes(device: torch.device) -> Iterator[tuple[Part, torch.device]]:
    """Join the processes that ``torchrun`` started, if it did; leave them at the end.

    A program that trains more than once does so inside this context, for torch's default group
    cannot be left and joined again. A group that is there already is used, and kept.

    The group's threads, which each want the interpreter's lock to let go of a tensor, have to end
    before the interpreter does (one of them would abort the process), and they end with the last
    reference to the group. That must be the one that is given up here: DistributedDataParallel
    gives up its own under that lock, and so may wait for ever. Hence its wrappers go first
    (`Replicas.close`), and an error's frames lose their local variables, which hold it too.

    Yields
    ------
    part : Part
        Which process this is, of how many.
    device : torch.device
        The one to compute on: of several GPUs, this process's.

    Raises
    ------
    ValueError
        If there are fewer GPUs than processes on this machine.
    """
    count = int(os.environ.get("WORLD_SIZE", "1"))
    if count == 1 or "RANK" not in os.environ:
        yield WHOLE, device
        return
    local = int(os.environ.get("LOCAL_RANK", os.environ["RANK"]))
    if device.type == "cuda" and device.index is None:
        if local >= torch.cuda.device_count():
            raise ValueError(
                f"device: process {local} of this machine has no GPU of its own; there are "
                f"{torch.cuda.device_count()}"
            )
        device = torch.device("cuda", local)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if "TORCHELASTIC_RUN_ID" in os.environ:
        end_with_parent(os.getppid())  # torchrun, which cannot end its processes when it is killed
    ours = not distributed.is_initialized()
    if ours:
        distributed.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield Part(distributed.get_rank(), distributed.get_world_size()), device
        distributed.barrier()  # the first process writes at the end; the others wait
    except BaseException as error:
        _clear_frames(error)
        raise
    finally:
        if ours:
            distributed.destroy_process_group()


def _clear_frames(error: BaseException | None) -> None:
    """Take the local variables out of an error's frames, and of the errors' that led to it."""
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error = error.__cause__ or error.__context__


class Replicas:
    """A model's copies in all processes, by DistributedDataParallel; closed when they are done.

    A model that is pruned while it trains loses parameters; DistributedDataParallel, which takes
    note of them once, is then made anew.
    """

    def __init__(self) -> None:
        self._wrapped: DistributedDataParallel | None = None
        self._parameters: list[tuple[int, torch.Size]] = []

    def of(self, model: nn.Module) -> nn.Module:
        """Return the model wrapped, to be called in its stead."""
        # The wrapped module keeps its parameters alive, so an id is not used twice.
        parameters = [(id(p), p.shape) for p in model.parameters() if p.requires_grad]
        if self._wrapped is None or parameters != self._parameters:
            self._wrapped = None  # takes its hooks off the parameters
            devices = {p.device for p in model.parameters()}
            index = next(iter(devices)).index
            self._wrapped = DistributedDataParallel(
                model,
                device_ids=None if index is None else [index],
                find_unused_parameters=True,  # a block that is skipped has no gradients
            )
            self._parameters = parameters
        return self._wrapped

    def close(self) -> None:
        """Let go of the wrapped model, and with it of the group of processes."""
        self._wrapped = None


def joint_mean(mean: Tensor, step: Step) -> Tensor:
    """Return the mean over the whole batch of what `mean` is over this process's part.

    The tensor itself in a single process.
    """
    if not is_joint():
        return mean
    total = mean.detach() * step.share
    distributed.all_reduce(total)
    return total


def joint_sums(sums: list[float], device: torch.device) -> list[float]:
    """Return the sums over all processes of what each has summed up."""
    if not is_joint():
        return sums
    total = torch.tensor(sums, dtype=torch.float64, device=device)
    distributed.all_reduce(total)
    return [float(entry) for entry in total]


def shared(value: Any) -> Any:
    """Return the first process's value (tensors and plain containers) in every process."""
    if not is_joint():
        return value
    kept = io.BytesIO()
    if distributed.get_rank() == 0:
        torch.save(value, kept)
    holder = [kept.getvalue()]
    distributed.broadcast_object_list(holder, src=0)
    return torch.load(io.BytesIO(holder[0]), map_location="cpu", weights_only=True)


def is_joint() -> bool:
    """Whether this process trains together with others."""
    return bool(distributed.is_available() and distributed.is_initialized())


class _JointSum(torch.autograd.Function):
    """Sum over processes; so is the gradient, for every process's loss depends on the sum."""

    @staticmethod
    def forward(ctx: Any, part: Tensor) -> Tensor:
        total = part.clone()
        distributed.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        total = gradient.clone()
        distributed.all_reduce(total)
        return total


class JointBatchNorm(_BatchNorm):
    """Batch norm whose training statistics are those of the whole batch, over all processes.

    torch's own SyncBatchNorm is for GPUs only; this one runs wherever all_reduce does. A layer
    becomes one in place (`join_batch_norms`) and stays what it was to those who ask its class.
    """

    def forward(self, inputs: Tensor) -> Tensor:
        """Normalise; in evaluation mode, or by running statistics alone, as torch's layers do."""
        if not self.training:
            return super().forward(inputs)
        self._check_input_dim(inputs)
        axes = [axis for axis in range(inputs.ndim) if axis != 1]
        shape = [1, -1] + [1] * (inputs.ndim - 2)
        values = inputs.float()
        ones = values.new_full((1,), values.numel() / values.shape[1])
        totals = _JointSum.apply(torch.cat([values.sum(axes), ones]))
        count = totals[-1].detach()
        mean = totals[:-1] / count
        centred = values - mean.view(shape)
        variance = _JointSum.apply(centred.square().sum(axes)) / count
        self._follow(mean.detach(), variance.detach(), float(count))
        outputs = centred * (variance + self.eps).rsqrt().view(shape)
        if self.affine:
            outputs = outputs * self.weight.view(shape) + self.bias.view(shape)
        return outputs.to(inputs.dtype)

    def _follow(self, mean: Tensor, variance: Tensor, count: float) -> None:
        """Move the running statistics, as torch does: the variance unbiased."""
        if not self.track_running_stats or self.running_mean is None or self.running_var is None:
            return
        if self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
        rate = self.momentum
        if rate is None:
            rate = 1 / float(self.num_batches_tracked)  # type: ignore[arg-type]
        unbiased = variance * (count / max(count - 1, 1))
        self.running_mean.lerp_(mean.to(self.running_mean.dtype), rate)
        self.running_var.lerp_(unbiased.to(self.running_var.dtype), rate)


class _Joint1d(JointBatchNorm, nn.BatchNorm1d):
    pass


class _Joint2d(JointBatchNorm, nn.BatchNorm2d):
    pass


_JOINT: dict[type[nn.Module], type[nn.Module]] = {
    nn.BatchNorm1d: _Joint1d,
    nn.BatchNorm2d: _Joint2d,
}


def join_batch_norms(model: nn.Module) -> bool:
    """Make the model's batch norms joint, in place; return whether there are any.

    Raises
    ------
    ValueError
        If one is neither BatchNorm1d nor BatchNorm2d.
    """
    found = False
    for module in model.modules():
        if type(module) in _JOINT:
            module.__class__ = _JOINT[type(module)]
        elif isinstance(module, _BatchNorm) and not isinstance(module, JointBatchNorm):
            raise ValueError(
                f"model: {type(module).__name__} cannot be trained in several processes; "
                "BatchNorm1d and BatchNorm2d can"
            )
        found = found or isinstance(module, JointBatchNorm)
    return found


def part_batch_norms(model: nn.Module) -> None:
    """Make joint batch norms torch's own again, in place."""
    own = {joint: layer for layer, joint in _JOINT.items()}
    for module in model.modules():
        if type(module) in own:
            module.__class__ = own[type(module)]
