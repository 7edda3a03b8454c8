"""Decide whether a network's tensors alone determine what it computes."""

from __future__ import annotations

from torch import fx, nn

from retrain.adapters.files.dense import read_chain
from retrain.adapters.network.capture import Captured, arguments_of, name_of, readers
from retrain.stream.stream import LayerSpec


def is_plain(captured: Captured, layers: tuple[LayerSpec, ...], model: nn.Module) -> bool:
    """Tell whether `load_model` can rebuild the network from its saved tensors alone, without code.

    That is so for a chain of dense layers with ReLUs between them and nothing after the last, whose
    samples are at most flattened first, if names and shapes determine the order.

    Parameters
    ----------
    captured : Captured
        Captured network.
    layers : tuple of LayerSpec
        Its layers.
    model : nn.Module
        Module that was captured, in evaluation mode.

    Returns
    -------
    bool
        Whether the tensors are enough.
    """
    if len(captured.inputs) != 1 or any(spec.reason for spec in layers):
        return False
    state = model.state_dict()
    try:
        chain, _ = read_chain(state, activation="relu", ordered=False)
    except ValueError:  # other tensors, or an ambiguous order
        return False
    names = [layer.name for layer in chain.dense_layers]
    return names == [spec.name for spec in layers] and _is_chain(captured)


_IDENTITY = (
    "dropout",
    "feature_dropout",
    "alpha_dropout",
    "clone",
    "contiguous",
    "alias",
    "detach",
)


def _is_chain(captured: Captured) -> bool:
    """Walk from the input to the output: dense layers, a ReLU between each two, no other step."""
    (node,) = captured.inputs
    layers, open_layer = 0, False  # open: nothing has followed the last layer yet
    while node is not captured.output:
        users = readers(node)
        if len(users) != 1:
            return False
        node = users[0]
        kind = name_of(node)
        if kind == "linear" and not open_layer:
            layers, open_layer = layers + 1, True
        elif kind == "relu" and open_layer:
            open_layer = False
        elif kind not in _IDENTITY and not (layers == 0 and _flattens(node)):
            return False
    return open_layer


def _flattens(node: fx.Node) -> bool:
    """Tell whether a node makes one row of every sample."""
    kind, arguments = name_of(node), arguments_of(node)
    if kind in ("view", "reshape"):
        return len(arguments.get("size") or arguments.get("shape") or ()) == 2
    return kind == "flatten" and arguments["start_dim"] == 1 and arguments["end_dim"] == -1
