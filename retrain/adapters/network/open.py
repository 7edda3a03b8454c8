"""The stream for a network and its data: traced where that reads every layer, else captured.

A traced network (`retrain.adapters.network.stream`) has bounds; a captured one
(`retrain.adapters.network.captured_stream`) has none, and is read whatever its forward pass looks
like. So the traced one is taken where the captured one would retrain no more weights.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import nn

from retrain.adapters.network.capture import CaptureError
from retrain.adapters.network.captured_stream import CapturedStream
from retrain.adapters.network.find import FoundLayer
from retrain.adapters.network.stream import TorchStream
from retrain.data.arrays import Data
from retrain.data.sources import as_data

_log = logging.getLogger(__name__)


def open_network(
    model: nn.Module,
    data: Any,
    *,
    device: str | torch.device | None = None,
    like: TorchStream | CapturedStream | None = None,
) -> TorchStream | CapturedStream:
    """Open a network on its data.

    Parameters
    ----------
    model : nn.Module
        Network; it is not changed.
    data : Data or anything that `retrain.data.sources.as_data` takes
        Samples.
    device : str or torch.device, optional
        Device on which to compute; by default that of the module's first parameter.
    like : TorchStream or CapturedStream, optional
        The same network on other data, which is read in the same way.

    Returns
    -------
    TorchStream or CapturedStream
        The network on these samples.

    Raises
    ------
    ValueError
        If neither way reads the network on this data; the message is the first way's.
    """
    samples: Data = as_data(data)
    if like is not None:
        return type(like)(model, samples, device=device)
    refused: ValueError | None = None
    traced: TorchStream | None = None
    if not samples.inputs:
        try:
            traced = TorchStream(model, samples, device=device)
        except ValueError as error:
            refused = error
        if traced is not None and (traced.mixes is not None or not _left(traced)):
            return traced
    try:
        captured = CapturedStream(model, samples, device=device)
    except CaptureError as error:
        _log.info("reading: the forward pass could not be captured: %s", error)
        if traced is not None:
            return traced
        if refused is not None and samples.raw is None:
            raise refused from error
        raise ValueError(f"model: the forward pass could not be captured: {error}") from error
    except ValueError:
        if traced is not None:
            return traced
        if refused is not None and samples.raw is None:
            raise refused from None
        raise
    return captured if traced is None or _weights(captured) > _weights(traced) else traced


def open_layers(model: nn.Module, data: Any) -> tuple[FoundLayer, ...]:
    """List a network's layers as they are read on data, for a person to read.

    Parameters
    ----------
    model : nn.Module
        Network; it is not changed.
    data : Data or anything that `retrain.data.sources.as_data` takes
        A few samples.

    Returns
    -------
    tuple of FoundLayer
        All layers with weights, in execution order.

    Raises
    ------
    ValueError
        As for `open_network`.
    """
    stream = open_network(model, data)
    if isinstance(stream, TorchStream):
        return stream.network.layers
    return tuple(
        FoundLayer(
            site.spec,
            site.spec.kind,
            site.parameters,
            "relu" if site.spec.follows == "relu" else "",
            f"called {len(site.calls)} times" if len(site.calls) > 1 else "",
        )
        for site in stream.sites.values()
    )


def _left(stream: TorchStream) -> bool:
    """Tell whether a matrix is left; norms have none."""
    return any(spec.reason is not None and min(spec.shape) > 1 for spec in stream.layers)


def _weights(stream: TorchStream | CapturedStream) -> int:
    return sum(spec.size for spec in stream.layers if spec.reason is None)
