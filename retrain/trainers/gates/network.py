"""Gating modules of any network, finding its gated blocks, and making it plain again."""

from __future__ import annotations

from collections import OrderedDict

from torch import nn

from retrain.adapters.files.blocks import Sum
from retrain.trainers.gates.block import Gated


def gate(
    module: nn.Module, *, skip: nn.Module | None = None, after: nn.Module | None = None
) -> Gated:
    """Put a gate on any module, and a skip around it: ``after(xi * module(z) + skip(z))``.

    Parameters
    ----------
    module : nn.Module
        From one tensor, samples first, to another.
    skip : nn.Module, optional
        Of the module's output shape; the identity by default. See `retrain.trainers.gates.block`.
    after : nn.Module, optional
        Applied to the sum; the identity by default.

    Raises
    ------
    ValueError
        If the module is gated already, or has no weights: there would be nothing to prune.
    """
    if any(isinstance(part, Gated) for part in module.modules()):
        raise ValueError(f"module: {type(module).__name__} is gated already, or a part of it is")
    if next(module.parameters(), None) is None:
        raise ValueError(f"module: {type(module).__name__} has no weights to prune")
    return Gated(module, skip, after)


def gates_of(model: nn.Module) -> dict[str, Gated]:
    """Find the gated blocks of a model by name, in the model's order."""
    return {name: part for name, part in model.named_modules() if isinstance(part, Gated)}


def ungate(model: nn.Module) -> nn.Module:
    """Replace gated blocks by plain residual ones, `Sum`s of block and skip, in place; return it.

    Weights are shared with what was there before, but not their names.
    """
    for name, gated in gates_of(model).items():
        total = Sum(gated.block, gated.skip)
        plain = (
            total
            if isinstance(gated.after, nn.Identity)
            else nn.Sequential(OrderedDict(sum=total, after=gated.after))
        )
        plain.train(gated.training)
        parent, _, key = name.rpartition(".")
        if not name:
            return plain
        model.get_submodule(parent)._modules[key] = plain
    return model
