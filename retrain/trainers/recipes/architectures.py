"""Architectures that need no method's own layers."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from torch import nn


def dense(*, widths: Sequence[int], dropout: float = 0.0) -> nn.Module:
    """Build dense layers with ReLUs between them, on flattened samples.

    Raises
    ------
    ValueError
        If there are fewer than two widths, or one below 1.
    """
    if len(widths) < 2 or any(type(width) is not int or width < 1 for width in widths):
        raise ValueError(f"widths: got {list(widths)!r}, want two or more whole numbers above 0")
    modules: list[nn.Module] = [nn.Flatten()]
    for number, (n_in, n_out) in enumerate(pairwise(widths), start=1):
        modules.append(nn.Linear(n_in, n_out))
        if number < len(widths) - 1:
            modules.append(nn.ReLU())
            if dropout:
                modules.append(nn.Dropout(dropout))
    return nn.Sequential(*modules)
