"""Names for the operations of a traced network, in one small vocabulary.

A ReLU can be a module, a function or a method; `operation` gives all three one name, so that the
search for what follows a layer and the Lipschitz factors refer to operations only.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from typing import Any

import torch
from torch import fx, nn
from torch.nn import functional

from retrain.adapters.network.kinds import kind_of

MODULES: dict[type[nn.Module], str] = {
    nn.ReLU: "relu",
    nn.Identity: "identity",
    nn.Dropout: "identity",
    nn.Dropout1d: "identity",
    nn.Dropout2d: "identity",
    nn.AlphaDropout: "identity",
    nn.Flatten: "move",
    nn.Unflatten: "move",
    nn.MaxPool1d: "max_pool1d",
    nn.MaxPool2d: "max_pool2d",
    nn.AvgPool1d: "avg_pool1d",
    nn.AvgPool2d: "avg_pool2d",
    nn.AdaptiveAvgPool1d: "adaptive_avg_pool",
    nn.AdaptiveAvgPool2d: "adaptive_avg_pool",
    nn.BatchNorm1d: "batch_norm",
    nn.BatchNorm2d: "batch_norm",
    nn.Tanh: "tanh",
    nn.Sigmoid: "sigmoid",
    nn.LeakyReLU: "leaky_relu",
    nn.PReLU: "prelu",
    nn.ELU: "elu",
    nn.GELU: "gelu",
    nn.SiLU: "silu",
    nn.Softplus: "softplus",
    nn.Softsign: "softsign",
    nn.ReLU6: "relu6",
    nn.Hardtanh: "hardtanh",
    nn.LogSigmoid: "logsigmoid",
    nn.Softmax: "softmax",
    nn.LogSoftmax: "log_softmax",
}
"""Operation by exact class of a module: a subclass may compute something else."""

# Operation by function. Functions that are missing here have no known Lipschitz factor.
FUNCTIONS: dict[Any, str] = {
    functional.relu: "relu",
    functional.relu_: "relu",
    torch.relu: "relu",
    torch.relu_: "relu",
    functional.dropout: "dropout",
    functional.dropout1d: "dropout",
    functional.dropout2d: "dropout",
    functional.alpha_dropout: "dropout",
    torch.dropout: "dropout",
    torch.flatten: "move",
    torch.reshape: "move",
    torch.permute: "move",
    torch.transpose: "move",
    torch.squeeze: "move",
    torch.unsqueeze: "move",
    torch.clone: "identity",
    functional.max_pool1d: "max_pool1d",
    functional.max_pool2d: "max_pool2d",
    functional.avg_pool1d: "avg_pool1d",
    functional.avg_pool2d: "avg_pool2d",
    functional.adaptive_avg_pool1d: "adaptive_avg_pool",
    functional.adaptive_avg_pool2d: "adaptive_avg_pool",
    torch.mean: "mean",
    functional.tanh: "tanh",
    torch.tanh: "tanh",
    functional.sigmoid: "sigmoid",
    torch.sigmoid: "sigmoid",
    functional.leaky_relu: "leaky_relu",
    functional.prelu: "prelu",
    torch.prelu: "prelu",
    functional.elu: "elu",
    functional.gelu: "gelu",
    functional.silu: "silu",
    functional.softplus: "softplus",
    functional.softsign: "softsign",
    functional.relu6: "relu6",
    functional.hardtanh: "hardtanh",
    functional.logsigmoid: "logsigmoid",
    functional.softmax: "softmax",
    torch.softmax: "softmax",
    functional.log_softmax: "log_softmax",
    torch.log_softmax: "log_softmax",
    operator.add: "add",
    operator.iadd: "add",
    torch.add: "add",
    operator.sub: "add",
    operator.isub: "add",
    torch.sub: "add",
    operator.neg: "negate",
    operator.mul: "scale",
    operator.imul: "scale",
    torch.mul: "scale",
    operator.truediv: "scale",
    operator.itruediv: "scale",
    torch.div: "scale",
    operator.getitem: "select",
    functional.pad: "pad",
    torch.cat: "cat",
    torch.concat: "cat",
    getattr: "getattr",
}

# Operation by name of a tensor's method.
METHODS: dict[str, str] = {
    "relu": "relu",
    "relu_": "relu",
    "tanh": "tanh",
    "sigmoid": "sigmoid",
    "softmax": "softmax",
    "log_softmax": "log_softmax",
    "view": "move",
    "reshape": "move",
    "flatten": "move",
    "unflatten": "move",
    "permute": "move",
    "transpose": "move",
    "squeeze": "move",
    "unsqueeze": "move",
    "contiguous": "identity",
    "clone": "identity",
    "detach": "identity",
    "neg": "negate",
    "add": "add",
    "sub": "add",
    "mul": "scale",
    "div": "scale",
    "mean": "mean",
    "size": "shape",
    "dim": "shape",
    "numel": "shape",
}


def operation(node: fx.Node, modules: Mapping[str, nn.Module]) -> str | None:
    """Name what a node computes.

    Every layer of `retrain.adapters.network.kinds` is a ``"layer"``.

    The network is in evaluation mode: dropout modules are the identity, and so is a functional
    dropout unless its call asks for training, which makes it ``"random"``.

    Parameters
    ----------
    node : fx.Node
        Node.
    modules : mapping from str to nn.Module
        Modules of the network by name.

    Returns
    -------
    str or None
        Name of the operation; None where it is not in this vocabulary.
    """
    if node.op == "call_module":
        module = modules[str(node.target)]
        return MODULES.get(type(module)) if kind_of(module) is None else "layer"
    if node.op == "call_method":
        return METHODS.get(str(node.target))
    if node.op != "call_function":
        return None
    name = FUNCTIONS.get(node.target)
    if name == "dropout":
        # torch.dropout requires `train`; torch.nn.functional's dropouts train by default.
        default = node.target is torch.dropout
        training = argument(node, 2, "train" if default else "training", True)
        return "identity" if training is False or argument(node, 1, "p", 0.5) == 0 else "random"
    if name == "getattr":
        return "shape" if node.args[1] in ("shape", "ndim", "dtype", "device") else None
    return name


def argument(node: fx.Node, position: int, name: str, default: Any) -> Any:
    """Return a call's argument, given by position or by name.

    Parameters
    ----------
    node : fx.Node
        Call of a function or method.
    position : int
        Position among the arguments, from 0.
    name : str
        Name of the argument.
    default : object
        Value where it is not given.

    Returns
    -------
    object
        Value.
    """
    if len(node.args) > position:
        return node.args[position]
    return node.kwargs.get(name, default)


def setting(
    node: fx.Node, modules: Mapping[str, nn.Module], position: int, name: str, default: Any
) -> Any:
    """Return a setting of an operation: a module's attribute or a call's argument.

    Parameters
    ----------
    node : fx.Node
        Node.
    modules : mapping from str to nn.Module
        Modules of the network by name.
    position : int
        Position among the call's arguments, from 0.
    name : str
        Name of the argument, or of the module's attribute.
    default : object
        Value where it is not given.

    Returns
    -------
    object
        Value.
    """
    if node.op == "call_module":
        return getattr(modules[str(node.target)], name, default)
    return argument(node, position, name, default)
