"""Plain modules for what torch has no layer for: sums of branches, and skips that change widths.

With torch's own layers they make up what a training run saves
(`retrain.adapters.files.description`). They have no parameters, so that a saved network's tensors
are those of torch's layers alone.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional


class Sum(nn.Module):
    """Sum of branches on the same input: ``Sum(body, nn.Identity())`` is a residual block.

    The branches are children called "0", "1", ..., as in a Sequential.
    """

    def __init__(self, *branches: nn.Module) -> None:
        super().__init__()
        if not branches:
            raise ValueError("branches: want at least one module")
        for number, branch in enumerate(branches):
            self.add_module(str(number), branch)

    def forward(self, inputs: Tensor) -> Tensor:
        """Add up the branches' outputs."""
        first, *others = self.children()
        outputs: Tensor = first(inputs)
        for branch in others:
            outputs = outputs + branch(inputs)
        return outputs


class PadChannels(nn.Module):
    """A skip to more channels: every `stride`-th pixel, zero channels before and after.

    Parameters
    ----------
    before, after : int
        Zero channels put before and after those there are (axis 1).
    stride : int, optional
        Of the pixels kept, along every axis after the channels.
    """

    def __init__(self, before: int, after: int, stride: int = 1) -> None:
        super().__init__()
        _check_counts(before=before, after=after)
        _check_counts(least=1, stride=stride)
        self.before, self.after, self.stride = before, after, stride

    def forward(self, inputs: Tensor) -> Tensor:
        """Map (B, C, ...) to (B, before + C + after, ...)."""
        padding = [0, 0] * (inputs.ndim - 2) + [self.before, self.after]
        return functional.pad(_strided(inputs, self.stride), padding)

    def extra_repr(self) -> str:
        """Say the arguments."""
        return f"before={self.before}, after={self.after}, stride={self.stride}"


class StackChannels(nn.Module):
    """A skip to a multiple of the channels: copies of the input stacked along axis 1.

    Parameters
    ----------
    copies : int
        How many.
    stride : int, optional
        As of `PadChannels`.
    """

    def __init__(self, copies: int, stride: int = 1) -> None:
        super().__init__()
        _check_counts(least=1, copies=copies, stride=stride)
        self.copies, self.stride = copies, stride

    def forward(self, inputs: Tensor) -> Tensor:
        """Map (B, C, ...) to (B, copies C, ...)."""
        return torch.cat([_strided(inputs, self.stride)] * self.copies, dim=1)

    def extra_repr(self) -> str:
        """Say the arguments."""
        return f"copies={self.copies}, stride={self.stride}"


def _strided(inputs: Tensor, stride: int) -> Tensor:
    """Return every `stride`-th entry along every axis after the channels."""
    if stride == 1:
        return inputs
    return inputs[(slice(None), slice(None), *[slice(None, None, stride)] * (inputs.ndim - 2))]


def _check_counts(least: int = 0, **counts: int) -> None:
    for name, count in counts.items():
        if type(count) is not int or count < least:
            raise ValueError(f"{name}: want a whole number >= {least}, got {count!r}")
