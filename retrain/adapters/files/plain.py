"""Decide whether a network's tensors alone determine what it computes."""

from __future__ import annotations

from collections.abc import Mapping

from torch import fx, nn

from retrain.adapters.files.dense import read_chain
from retrain.adapters.network.find import Network
from retrain.adapters.network.operations import operation, setting


def is_plain(network: Network, model: nn.Module) -> bool:
    """Tell whether `load_model` can rebuild the network from its saved tensors alone, without code.

    That is so for a chain of dense layers with ReLUs between them and nothing after the last, whose
    samples are at most flattened first, if names and shapes determine the order.

    Parameters
    ----------
    network : Network
        Traced network.
    model : nn.Module
        Module that was traced, in evaluation mode.

    Returns
    -------
    bool
        Whether the tensors are enough.
    """
    if network.graph is None or any(found.spec.reason for found in network.layers):
        return False
    state = model.state_dict()
    try:
        chain, _ = read_chain(state, activation="relu", ordered=False)
    except ValueError:  # other tensors, or an ambiguous order
        return False
    names = [layer.name for layer in chain.dense_layers]
    return names == [found.spec.name for found in network.layers] and _is_chain(
        network.graph, dict(model.named_modules())
    )


def _is_chain(graph: fx.Graph, modules: Mapping[str, nn.Module]) -> bool:
    """Walk from the input to the output: dense layers, a ReLU between each two, no other step."""
    node = next(node for node in graph.nodes if node.op == "placeholder")
    layers, open_layer = 0, False  # open: nothing has followed the last layer yet
    while True:
        users = [user for user in node.users if operation(user, modules) != "shape"]
        if len(users) != 1:
            return False
        node = users[0]
        kind = operation(node, modules)
        if node.op == "output":
            return node.args[0] is not None and open_layer
        if isinstance(modules.get(str(node.target)), nn.Linear) and not open_layer:
            layers, open_layer = layers + 1, True
        elif kind == "relu" and open_layer:
            open_layer = False
        elif kind != "identity" and not (layers == 0 and _flattens(node, modules)):
            return False


def _flattens(node: fx.Node, modules: Mapping[str, nn.Module]) -> bool:
    """Tell whether a node makes one row of every sample."""
    name = node.target if node.op == "call_method" else getattr(node.target, "__name__", "")
    if name in ("view", "reshape"):
        return len(node.args) == 3
    if name == "flatten" or isinstance(modules.get(str(node.target)), nn.Flatten):
        start = setting(node, modules, 1, "start_dim", 0)
        return bool(start == 1 and setting(node, modules, 2, "end_dim", -1) == -1)
    return False
