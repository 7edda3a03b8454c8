"""The gated block of figure 1, h(xi block(z) + skip(z)), and the skips that go around it.

Table 1's kinds differ in what they are made of only:

* ResNet: block W-B-a-W-B, h a ReLU; skip the identity, `padded` or `pointwise`;
* ResNet-v2: block B-a-W-B-a-W, h the identity;
* VGG with added skips: block W-(B), h a ReLU; skip the identity, or `stacked` where the width
  doubles;
* ours: block W-(B)-a-W, h the identity; skip the identity or W3 (`pointwise`, `dense`), which is
  absorbed when the block is pruned.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from retrain.adapters.files.blocks import PadChannels, StackChannels


@dataclass(slots=True)
class Switch:
    """How a gate is set for one mini-batch; as it is made, open.

    An object of its own because a module's attributes are slow to set, and these are set at every
    step.

    Attributes
    ----------
    is_open : bool
        xi, the gate of the whole mini-batch.
    xi : Tensor, optional
        The same as a scalar that is differentiated by, for the first-order estimate (27); None
        where theta is not learnt, or not in this way. A closed gate's block then still runs forward
        (its output is a factor of (27)), without a graph and without a trace; otherwise it costs
        nothing.
    pattern : sequence of bool, optional
        Gates of several copies of the mini-batch, stacked along the first axis: for (26).
    """

    is_open: bool = True
    xi: Tensor | None = None
    pattern: Sequence[bool] | None = None


class Gated(nn.Module):
    """A block that can be skipped: ``after(xi * block(z) + skip(z))``.

    As it is made it is a plain residual block. During training its switch is set for every
    mini-batch.

    Parameters
    ----------
    block : nn.Module
        The nonlinear path, from (B, ...) to the shape that `skip` gives. By theorem 5.3 it should
        end with a weight layer (or its batch normalisation), so that weights at 0 make it 0.
    skip : nn.Module, optional
        The linear path; the identity by default.
    after : nn.Module, optional
        h of figure 1; the identity by default.

    Attributes
    ----------
    switch : Switch
        How the gate is set.
    """

    def __init__(
        self, block: nn.Module, skip: nn.Module | None = None, after: nn.Module | None = None
    ) -> None:
        super().__init__()
        self.block = block
        self.skip = nn.Identity() if skip is None else skip
        self.after = nn.Identity() if after is None else after
        self.switch = Switch()

    def forward(self, z: Tensor) -> Tensor:
        """Return the block's output with its gate as it is set."""
        switch = self.switch
        if switch.pattern is not None:
            joined = self._with_pattern(z, switch.pattern)
        elif switch.xi is not None:
            # One kernel; d loss / d xi = sum over samples and entries of delta-bar * path, (27).
            joined = torch.addcmul(*self._both(z), switch.xi)
        elif switch.is_open:
            joined = self.block(z) + self.skip(z)
        else:
            joined = self.skip(z)
        activated: Tensor = self.after(joined)
        return activated

    def _both(self, z: Tensor) -> tuple[Tensor, Tensor]:
        if self.switch.is_open:
            path = self.block(z)
        else:
            with torch.no_grad(), without_trace(self.block):
                path = self.block(z)
        return _matched(self.skip(z), path)

    def _with_pattern(self, z: Tensor, pattern: Sequence[bool]) -> Tensor:
        """Run the block on the copies of the batch whose gate is open, and on those only."""
        skipped = self.skip(z)
        if not any(pattern):
            return skipped
        if all(pattern):
            skipped, path = _matched(skipped, self.block(z))
            return skipped + path
        rows = torch.tensor(pattern, device=z.device).repeat_interleave(len(z) // len(pattern))
        rows = rows.nonzero().squeeze(1)
        path = self.block(z[rows])
        _matched(skipped[: len(rows)], path)
        return skipped.index_add(0, rows, path.to(skipped.dtype))


def _matched(skipped: Tensor, path: Tensor) -> tuple[Tensor, Tensor]:
    """Refuse to add what would be broadcast."""
    if skipped.shape != path.shape:
        raise ValueError(
            f"skip: the block gives {tuple(path.shape)}, but its skip gives "
            f"{tuple(skipped.shape)}, want a skip of the block's shape (padded, stacked, "
            f"pointwise or dense)"
        )
    return skipped, path


@contextmanager
def without_trace(module: nn.Module) -> Iterator[None]:
    """Run batch normalisations in the mode they are in, leaving their running statistics alone."""
    norms = [m for m in module.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]
    for norm in norms:
        norm.track_running_stats = not norm.training
    try:
        yield
    finally:
        for norm in norms:
            norm.track_running_stats = True


# Skips -------------------------------------------------------------------------------------------


def padded(in_channels: int, out_channels: int, stride: int = 1) -> nn.Module:
    """Make a skip that subsamples images and pads them with channels of zeros, half on each side.

    Raises
    ------
    ValueError
        If there are fewer channels out than in.
    """
    extra = out_channels - in_channels
    if extra < 0:
        raise ValueError(
            f"out_channels: got {out_channels}, want {in_channels} or more: a skip that "
            f"pads cannot drop channels"
        )
    return PadChannels(extra // 2, extra - extra // 2, stride)


def stacked() -> nn.Module:
    """Make a skip that stacks a copy of its images' channels onto them: twice as many."""
    return StackChannels(2)


def pointwise(in_channels: int, out_channels: int, stride: int = 1) -> nn.Conv2d:
    """Make W3 of a convolutional block: a 1x1 convolution without a bias."""
    return nn.Conv2d(in_channels, out_channels, 1, stride, bias=False)


def dense(in_features: int, out_features: int) -> nn.Linear:
    """Make W3 of a dense block: a matrix without a bias."""
    return nn.Linear(in_features, out_features, bias=False)
