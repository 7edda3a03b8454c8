"""What every layer method does with a stream: which layers, and committing their weights."""

from __future__ import annotations

from collections.abc import Sequence

from retrain.stream.stream import Array, LayerSpec, LayerStream, layer
from solvers.arrays import like, to_numpy


def chosen(stream: LayerStream, layers: Sequence[str] | None) -> list[LayerSpec]:
    """Return the layers to retrain: the named ones, or all that can be.

    Parameters
    ----------
    stream : LayerStream
        Network.
    layers : sequence of str or None
        Names of the layers; None for all that can be retrained.

    Returns
    -------
    list of LayerSpec
        Layers in execution order.

    Raises
    ------
    ValueError
        If a named layer does not exist or cannot be retrained.
    """
    if layers is None:
        return [spec for spec in stream.layers if spec.reason is None]
    for name in layers:
        spec = layer(stream, name)
        if spec.reason is not None:
            raise ValueError(f"layers: {name!r} cannot be retrained: {spec.reason}")
    return [spec for spec in stream.layers if spec.name in set(layers)]


def commit(stream: LayerStream, name: str, weights: Sequence[Array]) -> None:
    """Commit a layer's weights, converted to the stream's array type.

    Parameters
    ----------
    stream : LayerStream
        Network whose weights are replaced.
    name : str
        Name of the layer.
    weights : sequence of array, shape (n_in [+ 1], n_out) each
        One weight matrix per group, numpy or torch.
    """
    for group, weight in enumerate(weights):
        stream.commit(name, like(to_numpy(weight), stream.weight(name, group)), group)
