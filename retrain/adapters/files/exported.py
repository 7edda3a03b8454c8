"""Turn an exported program (`.pt2`) of dense layers into a plain module."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx

from retrain.adapters.files.dense import WAY_OUT, DenseChain, DenseLayer
from retrain.adapters.network.tensors import FLOATS
from retrain.files import READ_ERRORS, first_line

# Operations of an exported program that a chain can have; any other is refused.
_ACTIVATIONS = {
    torch.ops.aten.relu.default: "relu",
    torch.ops.aten.tanh.default: "tanh",
    torch.ops.aten.sigmoid.default: "sigmoid",
    torch.ops.aten.silu.default: "silu",
}
# Operations that can flatten samples; `_flattens` decides.
_FLATTEN = (
    torch.ops.aten.flatten.using_ints,
    torch.ops.aten.view.default,
    torch.ops.aten.reshape.default,
)
# Operations that change nothing in evaluation.
_IDENTITY = (
    torch.ops.aten.dropout.default,
    torch.ops.aten.clone.default,
    torch.ops.aten.alias.default,
    torch.ops.aten.detach.default,
)


def load_exported(path: Path) -> tuple[DenseChain, dict[str, str]]:
    """Load an exported program as a chain of linear layers; only for trusted files.

    Parameters
    ----------
    path : Path
        File. Loading it can run code that is in it.

    Returns
    -------
    chain : DenseChain
        Chain with the program's tensors.
    names : dict from str to str
        The program's tensor names, each mapped to itself.

    Raises
    ------
    ValueError
        If the file cannot be read, or its program is more than a chain of dense layers.
    """
    logger = logging.getLogger("torch.export")  # it would print a traceback before it raises
    was_disabled, logger.disabled = logger.disabled, True
    try:
        program = torch.export.load(path)
        layers, tensors = _layers(program)
        chain = DenseChain(layers)
        chain.load_state_dict(tensors, assign=True)
    except READ_ERRORS as error:
        if str(error).startswith("model: "):
            raise  # one of our own checks
        text = first_line(error)
        raise ValueError(f"model: {str(path)!r} is no whole exported program ({text})") from error
    finally:
        logger.disabled = was_disabled
    return chain, {name: name for name in tensors}


def _layers(program: Any) -> tuple[list[DenseLayer], dict[str, Tensor]]:
    """Walk the program from input to output; every step must be one that a chain can have."""
    signature = program.graph_signature
    parameters: dict[str, str] = dict(signature.inputs_to_parameters)
    if len(signature.user_inputs) != 1 or len(signature.user_outputs) != 1:
        raise ValueError(f"model: the exported program has several inputs or outputs; {WAY_OUT}")
    node = next(node for node in program.graph.nodes if node.name == signature.user_inputs[0])
    layers: list[DenseLayer] = []
    tensors: dict[str, Tensor] = {}
    while True:
        users = list(node.users)
        if len(users) != 1:
            raise ValueError(f"model: the exported program branches at {node.name!r}; {WAY_OUT}")
        node = users[0]
        if node.op == "output":
            break
        if node.target == torch.ops.aten.linear.default:
            layers.append(_linear(node, parameters, program.state_dict, tensors))
        elif node.target in _ACTIVATIONS and layers and layers[-1].activation == "none":
            last = layers[-1]
            name = _ACTIVATIONS[node.target]
            layers[-1] = DenseLayer(last.name, last.shape, last.bias, last.dtype, name)
        elif not (node.target in _IDENTITY and _inactive(node)) and not (
            node.target in _FLATTEN and not layers and _flattens(node)
        ):
            raise ValueError(
                f"model: the exported program does {node.target}, and only chains of dense layers "
                f"with {', '.join(_ACTIVATIONS.values())} are read; save a state dict and {WAY_OUT}"
            )
    if not layers:
        raise ValueError("model: the exported program has no dense layer")
    return layers, tensors


def _linear(
    node: fx.Node,
    parameters: dict[str, str],
    state: dict[str, Tensor],
    tensors: dict[str, Tensor],
) -> DenseLayer:
    """Read one linear layer; note its tensors under their names."""
    found = [parameters.get(getattr(arg, "name", "")) for arg in node.args[1:] if arg is not None]
    name = str(found[0]).removesuffix(".weight")
    if found not in ([f"{name}.weight"], [f"{name}.weight", f"{name}.bias"]):
        raise ValueError(f"model: {node.name!r} multiplies by what is no layer's weight; {WAY_OUT}")
    if f"{name}.weight" in tensors:
        raise ValueError(f"model: the exported program uses {name!r} twice; {WAY_OUT}")
    for key in found:
        tensor = state[str(key)].detach().cpu()
        if tensor.dtype not in FLOATS:
            raise ValueError(f"model: {key!r} is of type {tensor.dtype}, want real weights")
        tensors[str(key)] = tensor
    n_out, n_in = tensors[f"{name}.weight"].shape
    return DenseLayer(name, (n_in, n_out), len(found) == 2, tensors[f"{name}.weight"].dtype, "none")


def _inactive(node: fx.Node) -> bool:
    """Whether a node changes nothing: a dropout does when it was exported in training."""
    return node.target != torch.ops.aten.dropout.default or node.args[2] is False


def _flattens(node: fx.Node) -> bool:
    """Whether a reshape makes one row of every sample."""
    return getattr(node.meta.get("val"), "ndim", 0) == 2
