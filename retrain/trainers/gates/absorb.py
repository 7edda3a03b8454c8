"""Removing a gated block, and absorbing its linear path in what follows, as after (2).

With xi^(l-1) = 0 the block gives W3 z, and the next one is rewritten for z itself:

    W1 <- W1 W3^(l-1),    W3 <- W3 W3^(l-1),

after the last block the output layer, W^L <- W^L W3. An identity skip leaves nothing to absorb.
"""

from __future__ import annotations

import torch
from torch import nn

from retrain.compact.cut import Removal, fit_sizes, take_out
from retrain.trainers.gates.block import Gated


def remove_block(model: nn.Module, name: str) -> Removal:
    """Take the gated block called `name` out of a model, as if its gate were 0.

    What is left of it is h(skip(z)). A skip with weights is absorbed (2) when h is the identity and
    what comes next in the Sequential is a gated block that begins with weights, or a layer. A ReLU
    is dropped where its argument is not negative anyway. What cannot be absorbed stays in the
    block's place, so that the output is that with the gate at 0, but for rounding.

    Raises
    ------
    ValueError
        If `name` is no gated block of the model.
    """
    gate = dict(model.named_modules()).get(name)
    if not isinstance(gate, Gated):
        raise ValueError(f"name: {name!r} is no gated block of the model")
    before = list(model.parameters())
    chain = _chain(model, name)
    place = [known for known, _ in chain].index(name)
    following = chain[place + 1][1] if place + 1 < len(chain) else None
    removal = Removal()
    left: list[nn.Module] = []
    if not isinstance(gate.skip, nn.Identity):
        absorbed = (
            following is not None
            and isinstance(gate.after, nn.Identity)
            and _absorb(following, gate.skip, removal)
        )
        left += [] if absorbed else [gate.skip]
    preceding = [module for _, module in chain[:place]]
    spare = isinstance(gate.after, nn.ReLU) and not left and _is_nonnegative(preceding)
    left += [] if spare or isinstance(gate.after, nn.Identity) else [gate.after]
    take_out(model, name, left)
    remaining = set(model.parameters())
    removal.gone.extend(parameter for parameter in before if parameter not in remaining)
    return removal


def _chain(model: nn.Module, name: str) -> list[tuple[str, nn.Module]]:
    """List the modules run one after the other around `name`: those of nested Sequentials."""
    root = name
    while root:
        parent = root.rpartition(".")[0]
        if type(model.get_submodule(parent)) is not nn.Sequential:
            break
        root = parent
    return _flat(root, model.get_submodule(root))


def _flat(name: str, module: nn.Module) -> list[tuple[str, nn.Module]]:
    if type(module) is not nn.Sequential:
        return [(name, module)]
    children = module.named_children()
    return [
        entry for key, child in children for entry in _flat(f"{name}.{key}" if name else key, child)
    ]


def _is_nonnegative(preceding: list[nn.Module]) -> bool:
    """Tell whether what these give cannot be negative."""
    keeps_sign = (nn.Flatten, nn.Dropout, nn.Dropout2d, nn.MaxPool2d, nn.AvgPool2d, nn.Identity)
    for module in reversed(preceding):
        last = module.after if isinstance(module, Gated) else module
        if not isinstance(last, keeps_sign) or isinstance(module, Gated):
            return isinstance(last, nn.ReLU)
    return False


# Absorption ---------------------------------------------------------------------------------------


def _absorb(following: nn.Module, inner: nn.Module, removal: Removal) -> bool:
    """Put a linear map into what follows it; False, and nothing changed, where it cannot be."""
    if not isinstance(following, Gated):
        if not _takes(following, inner):
            return False
        _compose(following, inner, removal)
        return True
    first = _flat("", following.block)[0][1] if len(_flat("", following.block)) else None
    identity = isinstance(following.skip, nn.Identity)
    if first is None or not _takes(first, inner) or not (identity or _takes(following.skip, inner)):
        return False
    _compose(first, inner, removal)
    if identity:
        following.skip = inner
    else:
        _compose(following.skip, inner, removal)
    return True


def _takes(outer: nn.Module, inner: nn.Module) -> bool:
    """Tell whether outer(inner(z)) is one layer of outer's kind."""
    if isinstance(outer, nn.Linear):
        return isinstance(inner, nn.Linear)
    if not (isinstance(outer, nn.Conv2d) and isinstance(inner, nn.Conv2d)):
        return False
    # A bias before zero padding is another value than the padding's.
    padded = isinstance(outer.padding, str) or any(outer.padding)
    return (
        inner.kernel_size == (1, 1)
        and inner.padding in ((0, 0), "valid")
        and inner.groups == outer.groups == 1
        and not isinstance(outer.padding, str)
        and (not padded or (outer.padding_mode == "zeros" and inner.bias is None))
    )


def _compose(outer: nn.Module, inner: nn.Module, removal: Removal) -> None:
    """Set outer <- outer inner, in float64; the bias of inner goes into outer's."""
    with torch.no_grad():
        if isinstance(outer, nn.Linear) and isinstance(inner, nn.Linear):
            weight = outer.weight.double()
            _set(outer, weight @ inner.weight.double(), removal)
        elif isinstance(outer, nn.Conv2d) and isinstance(inner, nn.Conv2d):
            weight = outer.weight.double()
            composed = torch.einsum("omhw,mi->oihw", weight, inner.weight[:, :, 0, 0].double())
            weight = weight.sum((2, 3))  # what the bias meets: there is no padding with one
            _set(outer, composed, removal)
            # (W3 z)[i] = W3 z[s i]: W1's steps between pixels grow by s.
            for name in ("stride", "padding", "dilation"):
                steps = getattr(outer, name)
                setattr(outer, name, tuple(a * b for a, b in zip(steps, inner.stride, strict=True)))
        else:
            raise TypeError(f"{type(outer).__name__} does not take {type(inner).__name__}")
        if inner.bias is not None:
            moved = (weight @ inner.bias.double()).to(outer.weight.dtype)
            if outer.bias is None:
                outer.register_parameter("bias", nn.Parameter(moved))
                removal.added.append(outer.get_parameter("bias"))
            else:
                outer.bias.add_(moved)
                removal.changed.append(outer.get_parameter("bias"))


def _set(layer: nn.Linear | nn.Conv2d, weight: torch.Tensor, removal: Removal) -> None:
    layer.weight.data = weight.to(layer.weight.dtype)
    fit_sizes(layer)
    removal.changed.append(layer.get_parameter("weight"))
