"""A network's forward pass as a graph of operations, captured by `torch.export`.

Export runs the forward pass once on example inputs: branches that do not depend on the values of
tensors, keyword inputs, integer inputs and nested outputs are no obstacle, since only what was
computed is recorded. The batch axis, and for integer inputs all axes, stay free where the network
lets them. One output is kept, the one that runs measure (`main_output`); export then drops what it
does not need.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

PREFIX = "model."
"""Before a tensor's name in the captured graph: the wrapper's attribute that holds the network."""

Inputs = tuple[tuple[str | None, Tensor], ...]
"""A network's arguments: positional ones, named None, and then keywords."""


class CaptureError(ValueError):
    """The forward pass could not be captured; the message has export's first line."""


@dataclass(frozen=True, eq=False)
class Captured:
    """A captured forward pass.

    Attributes
    ----------
    graph : fx.Graph
        Operations in the order of execution.
    module : fx.GraphModule
        Holder of the graph's submodules, for control flow that is part of the graph.
    tensors : dict from fx.Node to str
        Qualified name of the parameter or buffer that each placeholder stands for.
    constants : dict from fx.Node to Tensor
        Tensors that the forward pass made from nothing.
    inputs : tuple of fx.Node
        Placeholders of the arguments' tensors, in order.
    output : fx.Node
        Node of the main output.
    batch : int or None
        Number of samples that the graph is fixed to; None where it is free.
    """

    graph: fx.Graph
    module: fx.GraphModule
    tensors: Mapping[fx.Node, str]
    constants: Mapping[fx.Node, Any]
    inputs: tuple[fx.Node, ...]
    output: fx.Node
    batch: int | None


def main_output(value: Any) -> Tensor:
    """Choose the output that a run measures: the tensor, ``logits``, or the first tensor.

    Parameters
    ----------
    value : object
        What a forward pass returned: a tensor, a mapping (as Hugging Face models return), a
        sequence, nested in any way.

    Returns
    -------
    Tensor
        The output.

    Raises
    ------
    CaptureError
        If there is no floating-point tensor in it.
    """
    found = _first_tensor(value)
    if found is None:
        raise CaptureError(f"model: returns a {type(value).__name__} without a tensor of numbers")
    return found


def _first_tensor(value: Any) -> Tensor | None:
    if isinstance(value, Tensor):
        return value if value.is_floating_point() else None
    if isinstance(value, Mapping):
        if "logits" in value:
            return _first_tensor(value["logits"])
        value = list(value.values())
    if isinstance(value, list | tuple):
        for entry in value:
            found = _first_tensor(entry)
            if found is not None:
                return found
    return None


class _Main(nn.Module):
    """A network with positional inputs whose forward pass returns its main output alone."""

    def __init__(self, model: nn.Module, names: Sequence[str | None]) -> None:
        super().__init__()
        self.model = model
        self.names = tuple(names)

    def forward(self, *values: Tensor) -> Tensor:
        return forward(self.model, tuple(zip(self.names, values, strict=True)))


def forward(model: nn.Module, inputs: Inputs) -> Tensor:
    """Run a network and return its main output.

    Parameters
    ----------
    model : nn.Module
        Network.
    inputs : sequence of (str or None, Tensor)
        Arguments, positional ones first.

    Returns
    -------
    Tensor
        Main output.
    """
    args = [value for name, value in inputs if name is None]
    return main_output(model(*args, **{name: value for name, value in inputs if name is not None}))


def capture(model: nn.Module, inputs: Inputs) -> Captured:
    """Capture a forward pass.

    Parameters
    ----------
    model : nn.Module
        Network in evaluation mode.
    inputs : sequence of (str or None, Tensor)
        Example arguments, first axis the sample; at least two samples, or the batch axis would be
        fixed to one.

    Returns
    -------
    Captured
        The graph.

    Raises
    ------
    CaptureError
        If export refuses the network.
    """
    free = torch.export.Dim.AUTO

    def axes(value: Tensor) -> dict[int, Any]:
        everything = not value.is_floating_point()
        return {axis: free for axis in range(value.ndim) if axis == 0 or everything}

    values = tuple(value for _, value in inputs)
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # export speaks of its own tracing
            program = torch.export.export(
                _Main(model, [name for name, _ in inputs]),
                values,
                dynamic_shapes=(tuple(axes(value) for value in values),),
                strict=False,
            )
    except CaptureError:
        raise
    except Exception as error:  # export raises errors of many kinds for what it cannot follow
        text = " ".join(str(error).strip().split("\n")[0].split())
        raise CaptureError(f"{type(error).__name__}: {text:.200}") from error
    if any(_writes(node) for node in program.graph.nodes):
        program = program.run_decompositions({})  # the same without writing into its own values
    return _read(program)


def _writes(node: fx.Node) -> bool:
    schema = getattr(node.target, "_schema", None)
    return bool(schema is not None and schema.is_mutable)


def _read(program: Any) -> Captured:
    """Sort an exported program's placeholders."""
    signature = program.graph_signature
    named = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
    lifted = signature.inputs_to_lifted_tensor_constants
    tensors, constants, inputs = {}, {}, []
    for node in program.graph.find_nodes(op="placeholder"):
        if node.name in named:
            tensors[node] = str(named[node.name]).removeprefix(PREFIX)
        elif node.name in lifted:
            constants[node] = program.constants[lifted[node.name]]
        else:
            inputs.append(node)
    (output,) = program.graph.find_nodes(op="output")
    name = signature.user_outputs[0]
    nodes = [node for node in output.all_input_nodes if node.name == name]
    sizes = [node.meta["val"].shape[0] for node in inputs if isinstance(node.meta["val"], Tensor)]
    fixed = next((size for size in sizes if isinstance(size, int)), None)
    return Captured(
        program.graph, program.graph_module, tensors, constants, tuple(inputs), nodes[0], fixed
    )


def arguments_of(node: fx.Node) -> dict[str, Any]:
    """Return an operation's arguments by their names in its schema, defaults included.

    Parameters
    ----------
    node : fx.Node
        Call of an ATen operation.

    Returns
    -------
    dict
        Nodes and plain values by name.
    """
    target: Any = node.target
    found: dict[str, Any] = {}
    for index, argument in enumerate(target._schema.arguments):
        if index < len(node.args):
            found[argument.name] = node.args[index]
        elif argument.name in node.kwargs:
            found[argument.name] = node.kwargs[argument.name]
        elif argument.has_default_value():
            found[argument.name] = argument.default_value
    return found


def operation(node: fx.Node) -> str:
    """Return the name of an ATen operation without its overload: ``"linear"``, ``"conv2d"``.

    Parameters
    ----------
    node : fx.Node
        Node of a captured graph.

    Returns
    -------
    str
        Name; empty for anything else.
    """
    packet = getattr(node.target, "overloadpacket", None)
    return "" if packet is None else str(packet).rpartition(".")[2]


def name_of(node: fx.Node) -> str:
    """Return the name of what a node computes; ``"getitem"`` for a part of several values.

    Parameters
    ----------
    node : fx.Node
        Node of a captured graph.

    Returns
    -------
    str
        Name; empty for placeholders and the output.
    """
    if node.op != "call_function":
        return ""
    name = operation(node).removesuffix("_") or str(getattr(node.target, "__name__", node.target))
    return _SAME.get(name, name)


_SAME = {
    "_native_batch_norm_legit_no_training": "batch_norm",
    "_adaptive_avg_pool2d": "adaptive_avg_pool2d",
    "_adaptive_avg_pool3d": "adaptive_avg_pool3d",
    "_softmax": "softmax",
    "_log_softmax": "log_softmax",
    "max_pool2d_with_indices": "max_pool2d",
    "max_pool3d_with_indices": "max_pool3d",
    "_prelu_kernel": "prelu",
    "log_sigmoid_forward": "log_sigmoid",
}
"""Names that export's decompositions give to operations that have a plain one."""


def readers(node: fx.Node) -> list[fx.Node]:
    """Return the users of a node that read its value, and not only its shape or type.

    Parameters
    ----------
    node : fx.Node
        Node of a captured graph.

    Returns
    -------
    list of fx.Node
        Users.
    """
    return [u for u in node.users if name_of(u) not in ("sym_size", "_assert_tensor_metadata")]


def label(node: fx.Node) -> str:
    """Name a node for messages: the class and name of the module that computes it, if one does.

    Parameters
    ----------
    node : fx.Node
        Node of a captured graph.

    Returns
    -------
    str
        ``"BatchNorm2d (bn1)"``, ``"softmax"``, ...
    """
    owner = owner_of(node)
    if owner is None:
        return name_of(node) or node.name
    name, kind = owner
    return f"{kind.rpartition('.')[2]} ({name})" if kind.startswith("torch.nn.") else name_of(node)


def owner_of(node: fx.Node) -> tuple[str, str] | None:
    """Return the innermost module in whose forward pass a node was computed.

    Parameters
    ----------
    node : fx.Node
        Node of a captured graph.

    Returns
    -------
    name, kind : str
        Its qualified name and its class; None where export did not keep them, or for the network
        itself.
    """
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    if not stack:
        return None
    name, kind = stack[-1]
    name = str(name)
    if name.startswith("_"):  # export's own
        return None
    name = name.removeprefix(PREFIX.rstrip(".")).removeprefix(".")
    kind = kind if isinstance(kind, str) else f"{kind.__module__}.{kind.__qualname__}"
    return (name, kind) if name else None
