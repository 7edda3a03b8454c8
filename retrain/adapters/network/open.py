"""The stream for a network and its data: captured by `torch.export`, or else read through hooks."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from retrain.adapters.network.capture import CaptureError, label, name_of
from retrain.adapters.network.hooked import MODULES, HookedStream
from retrain.adapters.network.sites import Site, response_user
from retrain.adapters.network.stream import TorchStream
from retrain.adapters.network.tensors import check_finite
from retrain.adapters.network.wrappers import evaluation_copy
from retrain.data.arrays import Data
from retrain.data.sources import as_data
from retrain.stream.stream import LayerSpec

_log = logging.getLogger(__name__)

Stream = TorchStream | HookedStream

_TRIES = 20
"""Random samples that are tried. More cost a forward pass each, and seldom fit."""

_SIDES = (32, 28, 64, 224, 8)
"""Sides of images that data sets have; the first that fits a network is taken to list its layers.
"""


@dataclass(frozen=True)
class FoundLayer:
    """A layer for a person to read.

    Attributes
    ----------
    spec : LayerSpec
        Layer as a method sees it.
    module : str
        Name of the class that holds its weights.
    parameters : int
        Number of its parameters.
    meets : str
        Operation after its response, in words: ``"relu"``, ``"BatchNorm2d (bn1)"``, ``"output"``.
    detail : str
        Kernel, stride and so on of a convolution, and how often it is called; empty otherwise.
    """

    spec: LayerSpec
    module: str
    parameters: int
    meets: str
    detail: str = ""


def open_network(
    model: nn.Module,
    data: Any,
    *,
    device: str | torch.device | None = None,
    like: Stream | None = None,
) -> Stream:
    """Open a network on its data.

    Parameters
    ----------
    model : nn.Module
        Network; it is not changed.
    data : Data or anything that `retrain.data.sources.as_data` takes
        Samples.
    device : str or torch.device, optional
        Device on which to compute; by default that of the module's first parameter.
    like : TorchStream or HookedStream, optional
        The same network on other data, which is read in the same way.

    Returns
    -------
    TorchStream or HookedStream
        The network on these samples.

    Raises
    ------
    ValueError
        If neither way reads the network on this data.
    """
    samples: Data = as_data(data)
    if isinstance(like, HookedStream):
        return HookedStream(model, samples, device=device)
    captured: TorchStream | None = None
    try:
        captured = TorchStream(model, samples, device=device, like=like)
        if like is not None or not _left(captured):
            return captured
        why = "the captured graph does not show every layer"
    except CaptureError as error:
        why = str(error)
    hooked = HookedStream(model, samples, device=device, why=why)
    if captured is not None and _weights(captured) >= _weights(hooked):
        return captured
    if not _weights(hooked):
        raise ValueError(f"model: the forward pass could not be captured: {why}")
    _log.info("reading: through hooks, since %s", why)
    return hooked


def _left(stream: TorchStream) -> bool:
    """Tell whether a layer of a kind that hooks read runs in a way that the graph hides."""
    kinds = {kind.__name__ for kind in MODULES}
    return any(
        spec.kind in kinds and spec.reason is not None and spec.reason.endswith("not retrained")
        for spec in stream.layers
    )


def _weights(stream: Stream) -> int:
    return sum(spec.size for spec in stream.layers if spec.reason is None)


def layer_table(model: nn.Module, data: Any = None) -> tuple[FoundLayer, ...]:
    """List a network's layers as they are read, for a person.

    Parameters
    ----------
    model : nn.Module
        Network; it is not changed.
    data : Data or anything that `retrain.data.sources.as_data` takes, optional
        A few samples; by default random ones of the shape that the first layer takes.

    Returns
    -------
    tuple of FoundLayer
        All layers with weights, in execution order.

    Raises
    ------
    ValueError
        As for `open_network`; or if no data is given, and no random sample fits.
    """
    if data is not None:
        return _table(open_network(model, data))
    first: ValueError | None = None
    check_finite(evaluation_copy(model))
    for samples in itertools.islice(_guesses(model), _TRIES):
        try:
            return _table(open_network(model, samples))
        except ValueError as error:
            first = first or error
    raise ValueError(
        "data: the network's inputs are not known from its first layer; give some samples (--data)"
    ) from first


def _guesses(model: nn.Module) -> Iterator[np.ndarray]:
    """Yield random samples of the shapes that a network's layers take, the first layers first."""
    draw = np.random.default_rng(0)
    for module in model.modules():
        if isinstance(module, nn.Linear):
            yield draw.normal(size=(2, module.in_features))
        elif isinstance(module, nn.RNNBase):
            yield draw.normal(size=(2, 4, module.input_size))
        elif isinstance(module, nn.Embedding):
            yield draw.integers(0, module.num_embeddings, size=(2, 8))
        elif isinstance(module, nn.modules.conv._ConvNd):
            for size in _SIDES:
                sides = (size,) * len(module.kernel_size)
                yield draw.normal(size=(2, module.in_channels, *sides))


def _table(stream: Stream) -> tuple[FoundLayer, ...]:
    network = stream.dense_model
    if isinstance(stream, HookedStream):
        return tuple(
            FoundLayer(spec, *_owner(network, spec.name, 0), "", _detail(network, spec.name))
            for spec in stream.layers
        )
    found = []
    for spec in stream.layers:
        site = stream.sites[spec.name]
        owner = site.parameter.rpartition(".")[0]
        detail = _detail(network, owner)
        if site.fold is not None:
            detail = f"{detail}, {label(site.fold.norm)} folded in".removeprefix(", ")
        if len(site.calls) > 1:
            detail = ", ".join(part for part in (detail, f"called {len(site.calls)} times") if part)
        count = site.parameters
        if site.operation is not None:
            count = spec.size + spec.bias * spec.shape[1] * spec.groups
        found.append(FoundLayer(spec, *_owner(network, owner, count), _meets(site), detail))
    return tuple(found)


def _owner(network: nn.Module, name: str, parameters: int) -> tuple[str, int]:
    """Class of the module that holds a layer's weights, and the number of its parameters."""
    module = network.get_submodule(name)
    count = sum(tensor.numel() for tensor in module.parameters(recurse=False))
    return type(module).__name__, parameters or count


def _meets(site: Site) -> str:
    """Say in words what follows a layer's response."""
    if not site.calls:
        return ""
    user, several = response_user(site.ends[0])
    if user is None:
        return "several operations" if several else "nothing"
    if user.op == "output":
        return "output"
    return "relu" if name_of(user) == "relu" else label(user)


def _detail(network: nn.Module, name: str) -> str:
    """Kernel, stride and so on of a convolution in words."""
    module: Any = network.get_submodule(name)
    if not hasattr(module, "kernel_size") or not hasattr(module, "in_channels"):
        return ""
    padded = "" if module.padding_mode == "zeros" else f" by {module.padding_mode}"
    return (
        f"{module.in_channels}→{module.out_channels} channels, "
        f"kernel {'x'.join(map(str, module.kernel_size))}, stride {module.stride}, "
        f"padding {module.padding}{padded}, dilation {module.dilation}, groups {module.groups}"
    )
