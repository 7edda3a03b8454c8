"""Wrappers around a network (data parallel training, a compiler), and hidden weights.

Wrappers are removed: the network inside is the same function with shorter names. Weights that are
computed anew at each call (pruning masks, weight norm) are refused with the line of code that
converts them to plain weights, since only their owner can tell whether that is wanted.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Collection

from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

_PREFIX = "module."
"""Prefix that data parallel training puts before every name, once per wrapper."""

_INNER = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
"""Parts of names that only torch's wrappers give to a module; removed anywhere in a name."""

# For each way to hide weights: how a message names it, and the line of code that undoes it.
_EACH = "for m in list(model.modules()) for n in list(m._parameters)"
_MASKS = (
    "has pruning masks (torch.nn.utils.prune)",
    f"[torch.nn.utils.prune.remove(m, n[:-5]) {_EACH} if n[:-5] + '_mask' in m._buffers]",
)
_WEIGHT_NORM = (
    "has weight norm of the old kind (torch.nn.utils.weight_norm)",
    f"[torch.nn.utils.remove_weight_norm(m, n[:-2]) {_EACH} if n[:-2] + '_v' in m._parameters "
    "and n.endswith('_g')]",
)
_SPECTRAL_NORM = (
    "has spectral norm of the old kind (torch.nn.utils.spectral_norm)",
    f"[torch.nn.utils.remove_spectral_norm(m, n[:-5]) {_EACH} if n[:-5] + '_u' in m._buffers]",
)
_PARAMETRISED = (
    "has parametrised weights (torch.nn.utils.parametrize)",
    "[torch.nn.utils.parametrize.remove_parametrizations(m, n) for m in list(model.modules()) "
    "for n in list(getattr(m, 'parametrizations', ()))]",
)
# Endings of two tensor names of one weight that identify each way.
_HIDDEN = (
    ("_orig", "_mask", _MASKS),
    ("_g", "_v", _WEIGHT_NORM),
    ("_orig", "_u", _SPECTRAL_NORM),
)


def unwrapped(module: nn.Module) -> nn.Module:
    """Return the network inside DataParallel, DistributedDataParallel and torch.compile.

    Parameters
    ----------
    module : nn.Module
        Network; it is not changed.

    Returns
    -------
    nn.Module
        The module itself if it has no wrapper; the network inside if the wrapper is outermost;
        a module that shares everything else where a part of it is wrapped.
    """
    return _unwrapped(module, {})


def _unwrapped(module: nn.Module, done: dict[int, nn.Module]) -> nn.Module:
    if id(module) in done:
        return done[id(module)]
    inside = module
    while (held := _held(inside)) is not None:
        inside = held
    children = {
        name: None if child is None else _unwrapped(child, done)
        for name, child in inside._modules.items()
    }
    if any(children[name] is not child for name, child in inside._modules.items()):
        inside = copy.copy(inside)
        inside._modules = children
    done[id(module)] = inside
    return inside


def _held(module: nn.Module) -> nn.Module | None:
    """Return the module inside a wrapper; None if the module is not a wrapper."""
    if isinstance(module, DataParallel | DistributedDataParallel):
        return module.module
    # Importing torch's compiler takes seconds; a compiled module exists only where it has been.
    compiler = sys.modules.get("torch._dynamo.eval_frame")
    if compiler is not None and isinstance(module, compiler.OptimizedModule):
        return module._orig_mod
    return None


def check_plain_weights(module: nn.Module) -> None:
    """Refuse a network whose weights are computed from others at each call.

    A layer with a parametrisation of torch.nn.utils.parametrize can be copied; such a layer is
    listed with its reason instead (`retrain.adapters.network.sites`).

    Parameters
    ----------
    module : nn.Module
        Network.

    Raises
    ------
    ValueError
        If there is such a weight; the message has the line of code that converts it, in which
        ``model`` is the module.
    """
    for name, part in module.named_modules():
        own = [*part._parameters, *part._buffers]
        found = _hidden(own)
        if found is not None:
            _refuse(f"{name or 'the network'!r}", found, "first")


def check_plain_names(names: Collection[str]) -> None:
    """Refuse the names of a state dict whose weights were computed from others at each call.

    Parameters
    ----------
    names : collection of str
        Names of the tensors.

    Raises
    ------
    ValueError
        If there is such a weight; the message has the line of code to run before saving.
    """
    found = _hidden(names)
    if found is None and any("parametrizations." in name for name in names):
        found = _PARAMETRISED
    if found is not None:
        _refuse("the file", found, "before saving")


def _hidden(names: Collection[str]) -> tuple[str, str] | None:
    known = set(names)
    for one, other, found in _HIDDEN:
        if any(n.endswith(one) and n.removesuffix(one) + other in known for n in names):
            return found
    return None


def _refuse(who: str, found: tuple[str, str], when: str) -> None:
    what, code = found
    raise ValueError(f"model: {who} {what}; make plain weights of them {when}: {code}")


def without_wrappers(names: Collection[str]) -> list[str]:
    """Remove the parts of a state dict's names that wrappers add.

    ``module.`` is removed as long as all names begin with it; the parts that only torch gives
    (``_orig_mod``) are removed anywhere. So nested wrappers may come in any order.

    Parameters
    ----------
    names : collection of str
        Names of the tensors.

    Returns
    -------
    list of str
        Shortened names in the same order; the original ones where two would become equal.
    """
    short = [".".join(part for part in name.split(".") if part not in _INNER) for name in names]
    while short and all(name.startswith(_PREFIX) for name in short):
        short = [name.removeprefix(_PREFIX) for name in short]
    return short if len(set(short)) == len(short) else list(names)


def shorter_names(names: Collection[str]) -> list[list[str]]:
    """List the namings of a state dict to try on an architecture, the likeliest first.

    As they are; without wrappers; without wrappers of a part of the network; and without one, two,
    ... of the leading parts that all names share (``model.``).

    Parameters
    ----------
    names : collection of str
        Names of the tensors.

    Returns
    -------
    list of list of str
        Lists of names, each in the order of `names` and without duplicates.
    """
    tries = [list(names), without_wrappers(names)]
    tries.append([".".join(p for p in name.split(".") if p != "module") for name in tries[1]])
    while all("." in name for name in tries[-1]) and len({n.split(".")[0] for n in tries[-1]}) == 1:
        tries.append([name.partition(".")[2] for name in tries[-1]])
    return [names for names in tries if len(set(names)) == len(names)]


def evaluation_copy(model: nn.Module) -> nn.Module:
    """Copy a module, without wrappers around it, and put the copy into evaluation mode.

    Parameters
    ----------
    model : nn.Module
        Network; it is not changed.

    Returns
    -------
    nn.Module
        Copy in evaluation mode.

    Raises
    ------
    ValueError
        If it is not a module, is a single layer, has weights that are computed at each call
        (pruning masks, weight norm), or cannot be copied.
    """
    if not isinstance(model, nn.Module):
        raise ValueError(f"model: got a {type(model).__name__}, want a torch module")
    model = unwrapped(model)
    check_plain_weights(model)
    if next(model.parameters(), None) is None:
        raise ValueError(f"model: {type(model).__name__} has no weights")
    if isinstance(model, nn.Linear | nn.modules.conv._ConvNd):
        raise ValueError("model: got a single layer; wrap it in torch.nn.Sequential")
    try:
        return copy.deepcopy(model).eval()
    except (RuntimeError, TypeError) as error:
        text = str(error).split("\n")[0]
        raise ValueError(f"model: {type(model).__name__} cannot be copied: {text}") from error
