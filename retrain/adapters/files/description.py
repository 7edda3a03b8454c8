"""A network's architecture as JSON, for plain modules: layers of torch's own, in a row or summed.

    {"kind": "Sequential", "modules": {
        "0": {"kind": "Linear", "arguments": {"in_features": 784, "out_features": 9, "bias": true}},
        "1": {"kind": "ReLU"},
        "2": {"kind": "Sum", "modules": {
            "0": {"kind": "Sequential", "modules": {...}},
            "1": {"kind": "Identity"}}}}}

`Sequential` and `Sum` (of branches on one input) hold modules by name; every other kind is a layer
with its constructor's arguments. Names of tensors in the state dict follow from the names here.
Only the classes in `LAYERS` are ever constructed, so an untrusted description runs no foreign code.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from retrain.adapters.files.blocks import PadChannels, StackChannels, Sum
from retrain.adapters.files.load import fill
from retrain.files import READ_ERRORS, first_line

# Arguments of the layers' constructors; each is also an attribute of the layer.
_CONVOLUTION = (
    "in_channels",
    "out_channels",
    "kernel_size",
    "stride",
    "padding",
    "dilation",
    "groups",
    "bias",
    "padding_mode",
)
_NORM = ("num_features", "eps", "momentum", "affine", "track_running_stats")
_MAX_POOL = ("kernel_size", "stride", "padding", "dilation", "ceil_mode")
_MEAN_POOL = ("kernel_size", "stride", "padding", "ceil_mode", "count_include_pad")

LAYERS: dict[type[nn.Module], tuple[str, ...]] = {
    nn.Linear: ("in_features", "out_features", "bias"),
    nn.Conv1d: _CONVOLUTION,
    nn.Conv2d: _CONVOLUTION,
    nn.BatchNorm1d: _NORM,
    nn.BatchNorm2d: _NORM,
    nn.LayerNorm: ("normalized_shape", "eps", "elementwise_affine", "bias"),
    nn.GroupNorm: ("num_groups", "num_channels", "eps", "affine"),
    nn.ReLU: (),
    nn.LeakyReLU: ("negative_slope",),
    nn.ELU: ("alpha",),
    nn.GELU: ("approximate",),
    nn.SiLU: (),
    nn.Tanh: (),
    nn.Sigmoid: (),
    nn.Softplus: ("beta", "threshold"),
    nn.Softmax: ("dim",),
    nn.LogSoftmax: ("dim",),
    nn.Identity: (),
    nn.Flatten: ("start_dim", "end_dim"),
    nn.Unflatten: ("dim", "unflattened_size"),
    nn.Dropout: ("p",),
    nn.Dropout2d: ("p",),
    nn.MaxPool2d: _MAX_POOL,
    nn.AvgPool2d: _MEAN_POOL,
    nn.AdaptiveAvgPool2d: ("output_size",),
    PadChannels: ("before", "after", "stride"),
    StackChannels: ("copies", "stride"),
}
"""Layers that can be described, each with the constructor arguments that rebuild it."""

# Modules that hold other modules by name.
_CONTAINERS: dict[str, type[nn.Module]] = {"Sequential": nn.Sequential, "Sum": Sum}

_DEEPEST = 32
"""Largest depth of nested containers in a description that is built. Chosen by hand, far above any
real network and below Python's limit of recursion."""

_MOST = 100_000
"""Largest number of modules in a description that is built: a larger one is refused as damaged.
Chosen by hand."""


def describe_module(module: nn.Module) -> dict[str, Any]:
    """Return a module's architecture as JSON values.

    Parameters
    ----------
    module : nn.Module
        Network; it is not changed.

    Returns
    -------
    dict
        JSON values.

    Raises
    ------
    ValueError
        If a module in it is of another kind than those of `LAYERS`, `Sequential` and `Sum`, or has
        hooks, or has tensors and occurs twice; the message names it.
    """
    seen: dict[int, str] = {}
    return _describe(module, "", seen)


def described(module: nn.Module) -> tuple[dict[str, Any] | None, str]:
    """Return a module's description, or the reason why there is none.

    Parameters
    ----------
    module : nn.Module
        Network; it is not changed.

    Returns
    -------
    description : dict or None
        JSON values.
    reason : str
        Why there is no description; empty with one.
    """
    try:
        return describe_module(module), ""
    except ValueError as error:
        return None, str(error).removeprefix("model: ")


def build_module(description: Mapping[str, Any]) -> nn.Module:
    """Build the module of a description; its tensors are on torch's meta device, without memory.

    Parameters
    ----------
    description : mapping
        JSON values that `describe_module` returned.

    Returns
    -------
    nn.Module
        Network without values.

    Raises
    ------
    ValueError
        If the description is not of that form, or is too large.
    """
    budget = [_MOST]
    with torch.device("meta"):
        return _build(description, "model", _DEEPEST, budget)


def load_described(description: Mapping[str, Any], path: str | Path) -> nn.Module:
    """Build the module of a description with the tensors of a file; in evaluation mode, on the CPU.

    Parameters
    ----------
    description : mapping
        JSON values that `describe_module` returned.
    path : str or Path
        File with the tensors, under the names of the module's state dict.

    Returns
    -------
    nn.Module
        Network with these tensors.

    Raises
    ------
    ValueError
        If the description or the file is damaged, or they do not fit each other.
    """
    module = build_module(description)
    return fill(module, path, {name: name for name in module.state_dict()})


def _describe(module: nn.Module, name: str, seen: dict[int, str]) -> dict[str, Any]:
    what = f"{name or 'the model'} ({type(module).__name__})"
    if id(module) in seen and module.state_dict():
        raise ValueError(f"model: {what} stands in two places, also as {seen[id(module)]}")
    seen[id(module)] = what
    # Hooks and instance attributes can make a layer compute something else than its kind says.
    if module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module):
        raise ValueError(f"model: {what} has hooks, or a forward of its own, which no file holds")
    kind = type(module).__name__
    if _CONTAINERS.get(kind) is type(module):
        prefix = f"{name}." if name else ""
        children = {
            key: _describe(child, prefix + key, seen)
            for key, child in module._modules.items()
            if child is not None
        }
        return {"kind": kind, "modules": children}
    if type(module) not in LAYERS:
        known = ", ".join([*_CONTAINERS, *(layer.__name__ for layer in LAYERS)])
        raise ValueError(f"model: {what} cannot be described; what can be: {known}")
    arguments = {argument: _argument(module, argument) for argument in LAYERS[type(module)]}
    return {"kind": kind, "arguments": arguments} if arguments else {"kind": kind}


def _argument(module: nn.Module, name: str) -> Any:
    value = getattr(module, name)
    if name == "bias":
        return value is not None
    return list(value) if isinstance(value, tuple) else value


def _build(description: Any, name: str, depth: int, budget: list[int]) -> nn.Module:
    budget[0] -= 1
    if depth == 0 or budget[0] < 0:
        raise ValueError(f"description: more than {_DEEPEST} levels or {_MOST} modules at {name}")
    if not isinstance(description, Mapping) or not isinstance(description.get("kind"), str):
        raise ValueError(
            f"description: {name}: got {description!r:.80}, want an object with a kind"
        )
    kind = description["kind"]
    if kind in _CONTAINERS:
        _check_keys(description, {"kind", "modules"}, name)
        modules = description.get("modules")
        if not isinstance(modules, Mapping):
            raise ValueError(f"description: {name}: a {kind} wants modules, got {modules!r:.80}")
        children = OrderedDict(
            (key, _build(child, f"{name}.{key}", depth - 1, budget))
            for key, child in modules.items()
        )
        if any("." in key or not key for key in children):
            raise ValueError(f"description: {name}: a name is empty or has a dot")
        if kind == "Sum":
            if list(children) != [str(number) for number in range(len(children))]:
                raise ValueError(f"description: {name}: a Sum's modules are called 0, 1, ...")
            return Sum(*children.values())
        try:
            return nn.Sequential(children)
        except KeyError as error:  # an attribute of every module, such as forward
            raise ValueError(
                f"description: {name}: a module cannot be called so: {error}"
            ) from error
    layers = {layer.__name__: layer for layer in LAYERS}
    if kind not in layers:
        raise ValueError(f"description: {name}: no such kind {kind!r:.80}")
    _check_keys(description, {"kind", "arguments"}, name)
    return _make(layers[kind], description.get("arguments", {}), name)


def _make(layer: type[nn.Module], arguments: Any, name: str) -> nn.Module:
    if not isinstance(arguments, Mapping) or set(arguments) != set(LAYERS[layer]):
        wanted = ", ".join(LAYERS[layer]) or "none"
        raise ValueError(f"description: {name}: {layer.__name__} wants the arguments {wanted}")
    values = {key: _value(value, f"{name}.{key}") for key, value in arguments.items()}
    try:
        return layer(**values)
    except READ_ERRORS as error:
        text = first_line(error)
        raise ValueError(
            f"description: {name}: {layer.__name__} cannot be made ({text})"
        ) from error


def _value(value: Any, name: str) -> Any:
    """Check an argument: a number, text, true, false, nothing, or a list of whole numbers."""
    if isinstance(value, list) and all(type(entry) is int for entry in value):
        return tuple(value)
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise ValueError(f"description: {name}: got {value!r:.80}, want a number, a word or a list")


def _check_keys(description: Mapping[str, Any], known: set[str], name: str) -> None:
    unknown = sorted(set(description) - known)
    if unknown:
        raise ValueError(f"description: {name}: unknown key {unknown[0]!r:.80}")
