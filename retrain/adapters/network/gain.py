"""How much a network can stretch a change of one layer's output: Lipschitz factors over its graph.

All factors are for the Frobenius norm over a batch, in evaluation mode. A node whose inputs change
by δ_1, δ_2, ... changes by at most sum_i f_i ||δ_i||, f_i its factor for input i. So a change at a
node reaches the output multiplied by at most

    G(output) = 1,    G(node) = sum over users u of f_u(node) · G(u),

which in a chain is the product of the later layers' norms, and in a graph the sum over all paths.
A node that the output does not depend on has G = 0.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping
from typing import Any, cast

import torch
from torch import fx, nn

from retrain.adapters.network.operations import operation, setting
from retrain.adapters.network.patches import cover
from retrain.stream.stream import Gain, compound

CONSTANT = {
    "relu": 1.0,
    "identity": 1.0,
    "negate": 1.0,
    "move": 1.0,
    "shape": 0.0,  # a size does not depend on the values
    "tanh": 1.0,
    "sigmoid": 0.25,
    "gelu": 1.13,  # largest slope 1.1290, and below 1.13 in the tanh form
    "silu": 1.1,  # 1.0998
    "softplus": 1.0,
    "softsign": 1.0,
    "relu6": 1.0,
    "hardtanh": 1.0,
    "logsigmoid": 1.0,
    "softmax": 1.0,  # its Jacobian diag(p) − p pᵀ has norm at most 1/2
}

Norms = Callable[[str, torch.Tensor | None], float]

_IN_PLACE = (operator.iadd, operator.isub, operator.imul, operator.itruediv)


def gains(
    graph: fx.Graph,
    modules: Mapping[str, nn.Module],
    norms: Norms,
    shapes: Mapping[fx.Node, Any],
) -> dict[fx.Node, Gain]:
    """Bound the factor from every node's value to the network's output.

    Parameters
    ----------
    graph : fx.Graph
        The traced network.
    modules : mapping
        Its modules by name, with the weights to bound.
    norms : callable
        ``norms(name, scale)``: a bound on the norm of a Linear or Conv2d as a map, each output
        channel multiplied by its entry of `scale`, where there is one.
    shapes : mapping
        For a batch of two samples, the shape of every tensor, and other values as they are.

    Returns
    -------
    dict
        G of each node. Its value is None, with the reason, where some operation on the way to the
        output has no finite factor. A ReLU has factor 1, so a layer's G is also the factor from
        its activated output.
    """
    factors: dict[fx.Node, float | str] = {}
    for node in reversed(graph.nodes):
        factors[node] = _to_output(node, factors, modules, norms, shapes)
    return {node: _as_gain(found) for node, found in factors.items()}


def _as_gain(found: float | str) -> Gain:
    if isinstance(found, str):
        return Gain(None, found)
    if not math.isfinite(found):
        return Gain(None, "the product of the later layers' norms overflows")
    return Gain(found)


# What may stand between the last layer and the output for a bound on its response to be one on
# the output: reshaping, and activations with slopes of at most 1.
_KEEP = ("identity", "move", *(kind for kind in CONSTANT if 0 < CONSTANT[kind] <= 1))


def output_source(graph: fx.Graph, modules: Mapping[str, nn.Module]) -> tuple[fx.Node | None, str]:
    """Find the one node whose value, through its activation and reshaping only, is the output.

    Returns
    -------
    node : fx.Node or None
        A call of a layer, or None where the output is made in another way.
    reason : str
        What stands in the way; empty with a node.
    """
    node = next(node for node in graph.nodes if node.op == "output")
    if not isinstance(node.args[0], fx.Node):
        return None, "the network's output is not one tensor"
    node = node.args[0]
    while operation(node, modules) in _KEEP:
        values = [parent for parent in node.all_input_nodes if not _is_size(parent, modules)]
        if len(values) != 1:
            return None, f"the output passes through {describe(node, modules)}"
        node = values[0]
    if operation(node, modules) in ("linear", "conv2d"):
        return node, ""
    return None, f"the output passes through {describe(node, modules)}"


def _is_size(node: fx.Node, modules: Mapping[str, nn.Module]) -> bool:
    """Whether a node is a size, or a part of one, and not a value of the network."""
    if operation(node, modules) == "select":
        return _is_size(node.all_input_nodes[0], modules)
    return operation(node, modules) == "shape"


def _to_output(
    node: fx.Node,
    factors: Mapping[fx.Node, float | str],
    modules: Mapping[str, nn.Module],
    norms: Norms,
    shapes: Mapping[fx.Node, Any],
) -> float | str:
    """G(node) from its users'; text where there is none."""
    if node.op == "output":
        single = isinstance(node.args[0], fx.Node)
        return 1.0 if single else "the network's output is not one tensor"
    total = 0.0
    for user in node.users:
        step = 1.0 if user.op == "output" else factor(user, node, modules, norms, shapes)
        rest = factors[user]
        if isinstance(step, str):
            return step
        if overwrites(user, modules) and (step > 1 or len(user.all_input_nodes) > 1):
            return f"{describe(user, modules)} overwrites a value that is used elsewhere"
        scaling = _only_scaled(user, modules, shapes)
        if scaling is not None:
            # A layer and the batch norm behind it are one map; its norm is at most the product.
            apart = factor(scaling, user, modules, norms, shapes)
            if isinstance(apart, str):
                return apart
            joint = norms(str(user.target), batch_norm_scale(modules[str(scaling.target)]))
            step, rest = min(compound(step, apart), joint), factors[scaling]
        if step == 0:
            continue
        if isinstance(rest, str):
            return rest
        total += compound(step, rest)
    return total


def _only_scaled(
    node: fx.Node, modules: Mapping[str, nn.Module], shapes: Mapping[fx.Node, Any]
) -> fx.Node | None:
    """Find the batch norm in evaluation mode that is all a layer's response meets, if it is."""
    if operation(node, modules) not in ("linear", "conv2d") or len(node.users) != 1:
        return None
    user = next(iter(node.users))
    channels_last = operation(node, modules) == "linear" and len(shapes[node]) != 2
    return user if operation(user, modules) == "batch_norm" and not channels_last else None


def factor(
    node: fx.Node,
    source: fx.Node,
    modules: Mapping[str, nn.Module],
    norms: Norms,
    shapes: Mapping[fx.Node, Any],
) -> float | str:
    """Lipschitz factor of one node for one of its inputs, or text that says why there is none."""

    def known(position: int, name: str, default: Any) -> Any:
        """A setting; where it is computed from the samples' shape, its value."""
        return fx.map_arg(setting(node, modules, position, name, default), shapes.__getitem__)

    kind = operation(node, modules)
    if kind is None:
        return f"{describe(node, modules)} has no known factor"
    if kind in CONSTANT:
        return CONSTANT[kind]
    if kind == "linear":
        return norms(str(node.target), None)
    if kind == "conv2d":
        layer = cast("nn.Conv2d", modules[str(node.target)])
        if layer.padding_mode != "zeros":
            return f"{node.target} pads with {layer.padding_mode!r}"
        return norms(str(node.target), None)
    if kind == "prelu":
        # Slope 1 above 0 and the channel's a below; |a x - a y| <= |a| |x - y|.
        return _prelu(node, modules)
    if kind == "leaky_relu":
        return max(1.0, abs(known(1, "negative_slope", 0.01)))
    if kind == "elu":
        return max(1.0, abs(known(1, "alpha", 1.0)))
    if kind == "batch_norm":
        return _batch_norm(modules[str(node.target)], str(node.target))
    if kind == "log_softmax":
        # The Jacobian I − 1 pᵀ is a projection, so its norm is ||1|| ||p|| <= sqrt(classes).
        axis = known(1, "dim", None)
        return "log_softmax without a dim" if axis is None else math.sqrt(shapes[node][axis])
    if kind in ("max_pool", "avg_pool"):
        return _pool(kind, int(describe(node, modules).split(" ")[0][-2]), known)
    if kind == "adaptive_avg_pool":
        ratio = [i / o for i, o in zip(shapes[source], shapes[node], strict=True)]
        if any(r != int(r) for r in ratio):
            return f"{describe(node, modules)} has windows of unequal size"
        return 1 / math.sqrt(math.prod(ratio))
    if kind == "mean":
        return _mean(known(1, "dim", None), shapes[source])
    if kind == "select":
        index = node.args[1] if isinstance(node.args[1], tuple) else (node.args[1],)
        plain = all(entry is None or isinstance(entry, int | slice) for entry in index)
        return 1.0 if plain else "a selection that may repeat entries"
    if kind == "pad":
        mode = known(2, "mode", "constant")
        return 1.0 if mode == "constant" else f"it pads with {mode!r}"
    if kind == "add":
        return _add(node, source, shapes)
    if kind == "cat":
        parts = setting(node, modules, 0, "tensors", ())
        return float(list(cast("list[fx.Node]", parts)).count(source))
    if kind == "scale":
        return _scale(node, source)
    return f"{describe(node, modules)} is random"


def overwrites(node: fx.Node, modules: Mapping[str, nn.Module]) -> bool:
    """Whether a node works in place on a value with other users, or on a view.

    Those users see what it wrote, a path that the graph does not show. That matters if it stretches
    changes, or brings in those of another value.
    """
    if node.target not in _IN_PLACE and setting(node, modules, 99, "inplace", False) is not True:
        return False
    target = node.all_input_nodes[0]
    return len(target.users) > 1 or operation(target, modules) in ("move", "identity")


def describe(node: fx.Node, modules: Mapping[str, nn.Module]) -> str:
    """Name a node for a person: its class or function, and a module's name."""
    if node.op == "call_module":
        return f"{type(modules[str(node.target)]).__name__} ({node.target})"
    return str(getattr(node.target, "__name__", node.target))


def _prelu(node: fx.Node, modules: Mapping[str, nn.Module]) -> float | str:
    """max(1, |a|) over all channels."""
    if node.op != "call_module":
        return f"{describe(node, modules)} takes its slopes from outside a module"
    slopes = cast("torch.Tensor", modules[str(node.target)].weight)
    return max(1.0, float(slopes.detach().to(torch.float64).abs().max()))


def _batch_norm(layer: nn.Module, name: str) -> float | str:
    """Largest |γ| / sqrt(running variance + ε)."""
    if not isinstance(layer.running_var, torch.Tensor) or not isinstance(layer.eps, float):
        return f"{name} normalises by the batch's own statistics"
    return float(batch_norm_scale(layer).abs().max())


def batch_norm_scale(layer: nn.Module) -> torch.Tensor:
    """γ / sqrt(running variance + ε) by channel, in float64."""
    variance = cast("torch.Tensor", layer.running_var).to(torch.float64)
    scale = 1 / torch.sqrt(variance + cast("float", layer.eps))
    if isinstance(layer.weight, torch.Tensor):
        scale = scale * layer.weight.detach().to(torch.float64)
    return scale


def _pool(kind: str, dims: int, known: Callable[[int, str, Any], Any]) -> float:
    """Factor of max and average pooling over one or two axes.

    With c the most windows that cover one entry: for the maximum, each output changes by no more
    than the largest change in its window, so the squares sum to at most c times the input's. For
    the average over K entries, the matrix has row sums 1 and column sums at most c/K, so its norm
    is at most sqrt(c/K) (Schur's test), which is exact when windows do not overlap. Where windows
    are cut at the border and divided by what is left, column sums are only known to be at most c.
    """

    def sizes(position: int, name: str, default: Any) -> tuple[int, ...]:
        value = known(position, name, default)
        entries = tuple(value) if isinstance(value, tuple | list) else (value,)
        return entries * dims if len(entries) == 1 else entries

    kernel = sizes(1, "kernel_size", None)
    stride = known(2, "stride", None)
    strides = sizes(2, "stride", None) if stride not in (None, [], ()) else kernel
    if kind == "max_pool":
        return math.sqrt(math.prod(map(cover, kernel, strides, sizes(4, "dilation", 1))))
    covers = math.prod(map(cover, kernel, strides, (1,) * dims))
    divisor = known(6, "divisor_override", None) if dims == 2 else None
    entries = math.prod(kernel)
    if divisor:
        return math.sqrt(entries * covers) / abs(divisor)
    cut = known(4, "ceil_mode", False) or (
        any(sizes(3, "padding", 0)) and not known(5, "count_include_pad", True)
    )
    return math.sqrt(covers) if cut else math.sqrt(covers / entries)


def _mean(axes: Any, shape: torch.Size) -> float | str:
    """1 / sqrt(K) for a mean over K entries of a sample."""
    axes = [axes] if isinstance(axes, int) else axes
    if axes is None or any(axis % len(shape) == 0 for axis in axes):
        return "mean over the samples"
    return 1 / math.sqrt(math.prod(shape[axis] for axis in axes))


def _add(node: fx.Node, source: fx.Node, shapes: Mapping[fx.Node, Any]) -> float | str:
    """1 for each operand that the source is."""
    if node.kwargs.get("alpha", 1) != 1 or len(node.args) != 2:
        return "a sum with a factor"
    if shapes[source] != shapes[node]:
        return "a sum that repeats its operand"
    return float(list(node.args).count(source))


def _scale(node: fx.Node, source: fx.Node) -> float | str:
    """Factor of a product with, or a quotient by, a plain number."""
    if len(node.args) != 2 or node.kwargs:
        return "a product that is not by a number"
    first, second = node.args
    divides = "div" in str(getattr(node.target, "__name__", node.target))
    if first is source and isinstance(second, int | float) and (second or not divides):
        return 1 / abs(second) if divides else float(abs(second))
    if second is source and isinstance(first, int | float) and not divides:
        return float(abs(first))
    return "a product of two activations" if not divides else "a quotient by an activation"
