"""Truncation, the baseline of the Net-Trim paper: small weights out, the active ones trained again.

The paper's HPTD (section 6; Han, Pool, Tran and Dally, "Learning both weights and connections for
efficient neural networks", NIPS 2015) is two calls::

    truncated = truncate(model, count)                   # "HPTD No FT"
    trained = fine_tune(truncated, data, epochs=10)      # "HPTD + FT"; zeros stay zero

with as many weights truncated as Net-Trim pruned.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping

import torch
from torch import nn

from retrain.trainers.loop.masked import weights_of
from retrain.trainers.loop.supervised import Model


def truncate(
    model: Model, count: int | Mapping[str, int], *, names: Iterable[str] | None = None
) -> Model:
    """Set the `count` weights of smallest magnitude to zero, in a copy of `model`.

    Parameters
    ----------
    model : nn.Module
        Not touched.
    count : int or mapping of str to int
        How many weights: an int ranks the weights of all the named parameters together; a mapping
        gives each parameter its own number. Met exactly. Weights that are zero already are the
        smallest there are, and count. Ties go to the parameter that comes first in the model, and
        in it to the entry that comes first in row-major order.
    names : iterable of str, optional
        Parameters to choose from, for an int; by default all weights, as
        `retrain.trainers.loop.masked.weights_of` finds them.

    Returns
    -------
    nn.Module
        The copy, where `model` is.

    Raises
    ------
    ValueError
        If a count is negative or above the number of weights, a name is not a parameter's, a
        weight is not finite, or `names` comes with a mapping.

    Notes
    -----
    Sorts all magnitudes at once: 16 bytes a weight beside the model.
    """
    truncated = copy.deepcopy(model)
    if not isinstance(count, Mapping):
        _truncate(weights_of(truncated, names), count)
        return truncated
    if names is not None:
        raise ValueError("names: a mapping as count names the parameters already")
    for name, parameter in weights_of(truncated, count).items():
        _truncate({name: parameter}, count[name])
    return truncated


def _truncate(weights: Mapping[str, nn.Parameter], count: int) -> None:
    """Zero, in place, the `count` smallest of all the weights given."""
    sizes = [parameter.numel() for parameter in weights.values()]
    size = sum(sizes)
    if not 0 <= count <= size:
        raise ValueError(
            f"count: got {count}, want 0 to {size} of the weights of {', '.join(weights)}"
        )
    for name, parameter in weights.items():
        if not bool(parameter.isfinite().all()):
            raise ValueError(f"model: weight {name!r} is not finite")
    if count == 0:
        return
    magnitudes = torch.cat([parameter.detach().abs().flatten() for parameter in weights.values()])
    small = torch.zeros(size, dtype=torch.bool, device=magnitudes.device)
    small[magnitudes.argsort(stable=True)[:count]] = True
    with torch.no_grad():
        for parameter, part in zip(weights.values(), small.split(sizes), strict=True):
            parameter.masked_fill_(part.view(parameter.shape), 0)
