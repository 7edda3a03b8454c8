"""Plain modules for what torch has no layer for: sums of branches, and skips that change widths.

With torch's own layers they make up what a training run saves
(`retrain.adapters.files.description`). They have no parameters, so that a saved network's tensors
are those of torch's layers alone.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from solvers import checks


class Sum(nn.Module):
    """Sum of branches on the same input: ``Sum(body, nn.Identity())`` is a residual block.

    The branches are children called "0", "1", ..., as in a Sequential.

    Parameters
    ----------
    *branches : nn.Module
        Modules that take the same input and return outputs of one shape; at least one.

    Raises
    ------
    ValueError
        If there is no branch.
    """

    def __init__(self, *branches: nn.Module) -> None:
        super().__init__()
        if not branches:
            raise ValueError("branches: want at least one module")
        for number, branch in enumerate(branches):
            self.add_module(str(number), branch)

    def forward(self, inputs: Tensor) -> Tensor:
        """Add up the branches' outputs.

        Parameters
        ----------
        inputs : Tensor
            Input of every branch.

        Returns
        -------
        Tensor
            Sum of the outputs.
        """
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
        Number of zero channels added before and after the input's channels (axis 1).
    stride : int, optional
        Distance between the pixels kept, along every axis after the channels.

    Raises
    ------
    ValueError
        If a number of channels is below 0 or the stride below 1.
    """

    def __init__(self, before: int, after: int, stride: int = 1) -> None:
        super().__init__()
        checks.count(0, before=before, after=after)
        checks.count(1, stride=stride)
        self.before, self.after, self.stride = before, after, stride

    def forward(self, inputs: Tensor) -> Tensor:
        """Map (B, C, ...) to (B, before + C + after, ...).

        Parameters
        ----------
        inputs : Tensor, shape (B, C, ...)
            Input.

        Returns
        -------
        Tensor, shape (B, before + C + after, ...)
            Kept pixels with the zero channels.
        """
        padding = [0, 0] * (inputs.ndim - 2) + [self.before, self.after]
        return functional.pad(_strided(inputs, self.stride), padding)

    def extra_repr(self) -> str:
        """Write the arguments for the module's text.

        Returns
        -------
        str
            Arguments.
        """
        return f"before={self.before}, after={self.after}, stride={self.stride}"


class StackChannels(nn.Module):
    """A skip to a multiple of the channels: copies of the input stacked along axis 1.

    Parameters
    ----------
    copies : int
        Number of copies.
    stride : int, optional
        Distance between the pixels kept, along every axis after the channels.

    Raises
    ------
    ValueError
        If an argument is below 1.
    """

    def __init__(self, copies: int, stride: int = 1) -> None:
        super().__init__()
        checks.count(1, copies=copies, stride=stride)
        self.copies, self.stride = copies, stride

    def forward(self, inputs: Tensor) -> Tensor:
        """Map (B, C, ...) to (B, copies C, ...).

        Parameters
        ----------
        inputs : Tensor, shape (B, C, ...)
            Input.

        Returns
        -------
        Tensor, shape (B, copies C, ...)
            Stacked copies of the kept pixels.
        """
        return torch.cat([_strided(inputs, self.stride)] * self.copies, dim=1)

    def extra_repr(self) -> str:
        """Write the arguments for the module's text.

        Returns
        -------
        str
            Arguments.
        """
        return f"copies={self.copies}, stride={self.stride}"


def _strided(inputs: Tensor, stride: int) -> Tensor:
    """Return every `stride`-th entry along every axis after the channels."""
    if stride == 1:
        return inputs
    return inputs[(slice(None), slice(None), *[slice(None, None, stride)] * (inputs.ndim - 2))]
