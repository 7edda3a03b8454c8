"""Lipschitz factors over a network's graph, from a change of one layer's output to the output.

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
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import fx, nn

from retrain.adapters.network.kinds import known_kind
from retrain.adapters.network.operations import operation, setting
from retrain.adapters.network.patches import cover
from retrain.stream.stream import Gain, compound

Norms = Callable[[str, torch.Tensor | None], float]
"""(layer name, factor per output channel or None) -> bound on the layer's norm as a map."""

# Functions that fx records for in-place arithmetic (`retrain.adapters.network.find`).
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
        Traced network.
    modules : mapping from str to nn.Module
        Modules of the network by name, with the weights to bound.
    norms : callable
        ``norms(name, scale)``: bound on the norm of a layer as a map, each output channel
        multiplied by its entry of `scale`, where there is one.
    shapes : mapping from fx.Node
        For a batch of two samples, the shape of every tensor, and other values as they are.

    Returns
    -------
    dict from fx.Node to Gain
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


def output_source(graph: fx.Graph, modules: Mapping[str, nn.Module]) -> tuple[fx.Node | None, str]:
    """Find the one node whose value, through its activation and reshaping only, is the output.

    Parameters
    ----------
    graph : fx.Graph
        Traced network.
    modules : mapping from str to nn.Module
        Modules of the network by name.

    Returns
    -------
    node : fx.Node or None
        Call of a layer; None where the output is computed in another way.
    reason : str
        Operation that prevents it; empty with a node.
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
    if operation(node, modules) == "layer":
        return node, ""
    return None, f"the output passes through {describe(node, modules)}"


def _is_size(node: fx.Node, modules: Mapping[str, nn.Module]) -> bool:
    """Tell whether a node is a size, or a part of one, rather than a value of the network."""
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
    """Compute G(node) from the G of its users; a text says why none is known."""
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
    """Find the batch norm that is the only user of a layer's response, if there is one."""
    if operation(node, modules) != "layer" or len(node.users) != 1:
        return None
    user = next(iter(node.users))
    # Batch norm scales axis 1, which has to be that of the layer's output channels.
    axis = known_kind(modules[str(node.target)]).channel_axis(len(shapes[node]))
    return user if operation(user, modules) == "batch_norm" and axis == 1 else None


@dataclass(frozen=True, eq=False)
class Call:
    """One node of the graph, and one of its inputs.

    Attributes
    ----------
    node, source : fx.Node
        Node, and its input.
    modules : mapping from str to nn.Module
        Modules of the network by name.
    norms : Norms
        Norms of the layers, as `gains` takes them.
    shapes : mapping from fx.Node
        Shapes of the values, as `gains` takes them.
    """

    node: fx.Node
    source: fx.Node
    modules: Mapping[str, nn.Module]
    norms: Norms
    shapes: Mapping[fx.Node, Any]

    def setting(self, position: int, name: str, default: Any) -> Any:
        """Return a setting of the operation; where it is computed from a shape, its value.

        Parameters
        ----------
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
        found = setting(self.node, self.modules, position, name, default)
        return fx.map_arg(found, self.shapes.__getitem__)

    def sizes(self, dims: int, position: int, name: str, default: Any) -> tuple[int, ...]:
        """Return a setting that has one number per dimension, or one for all.

        Parameters
        ----------
        dims : int
            Number of dimensions.
        position : int
            Position among the call's arguments, from 0.
        name : str
            Name of the argument, or of the module's attribute.
        default : object
            Value where it is not given.

        Returns
        -------
        tuple of int
            One number per dimension.
        """
        value = self.setting(position, name, default)
        entries = tuple(value) if isinstance(value, tuple | list) else (value,)
        return entries * dims if len(entries) == 1 else entries

    @property
    def module(self) -> nn.Module:
        """The module that the node calls."""
        return self.modules[str(self.node.target)]

    @property
    def label(self) -> str:
        """Name of the node for messages."""
        return describe(self.node, self.modules)


def factor(
    node: fx.Node,
    source: fx.Node,
    modules: Mapping[str, nn.Module],
    norms: Norms,
    shapes: Mapping[fx.Node, Any],
) -> float | str:
    """Compute the Lipschitz factor of one node for one of its inputs.

    Parameters
    ----------
    node : fx.Node
        Node.
    source : fx.Node
        Input of the node.
    modules : mapping from str to nn.Module
        Modules of the network by name.
    norms : callable
        Norms of the layers, as `gains` takes them.
    shapes : mapping from fx.Node
        Shapes of the values, as `gains` takes them.

    Returns
    -------
    float or str
        Factor, or the reason why none is known.
    """
    call = Call(node, source, modules, norms, shapes)
    rule = RULES.get(operation(node, modules) or "")
    if rule is None:
        return f"{call.label} has no known factor"
    return rule(call) if callable(rule) else rule


def overwrites(node: fx.Node, modules: Mapping[str, nn.Module]) -> bool:
    """Tell whether a node works in place on a value with other users, or on a view.

    Those users see what it wrote, a path that the graph does not show. That matters if the node
    stretches changes, or adds those of another value.

    Parameters
    ----------
    node : fx.Node
        Node.
    modules : mapping from str to nn.Module
        Modules of the network by name.

    Returns
    -------
    bool
        Whether it may overwrite a value that is used elsewhere.
    """
    if node.target not in _IN_PLACE and setting(node, modules, 99, "inplace", False) is not True:
        return False
    target = node.all_input_nodes[0]
    return len(target.users) > 1 or operation(target, modules) in ("move", "identity")


def describe(node: fx.Node, modules: Mapping[str, nn.Module]) -> str:
    """Name a node for messages: its class or function, and a module's name.

    Parameters
    ----------
    node : fx.Node
        Node.
    modules : mapping from str to nn.Module
        Modules of the network by name.

    Returns
    -------
    str
        ``"BatchNorm2d (bn1)"``, ``"softmax"``, ...
    """
    if node.op == "call_module":
        return f"{type(modules[str(node.target)]).__name__} ({node.target})"
    return str(getattr(node.target, "__name__", node.target))


def _layer(call: Call) -> float | str:
    """Return the layer's norm as a map; none is known for some kinds of padding."""
    unfit = known_kind(call.module).unfit(call.module)
    if unfit is not None:
        return f"{call.node.target} {unfit.removeprefix('it ')}"
    return call.norms(str(call.node.target), None)


def _prelu(call: Call) -> float | str:
    """max(1, |a|) over all channels: the slope is 1 above 0 and the channel's a below."""
    if call.node.op != "call_module":
        return f"{call.label} takes its slopes from outside a module"
    slopes = cast("torch.Tensor", call.module.weight)
    return max(1.0, float(slopes.detach().to(torch.float64).abs().max()))


def _log_softmax(call: Call) -> float | str:
    """sqrt(classes): the Jacobian I - 1 p^T is a projection of norm at most |1| |p|."""
    axis = call.setting(1, "dim", None)
    return "log_softmax without a dim" if axis is None else math.sqrt(call.shapes[call.node][axis])


def _adaptive_avg_pool(call: Call) -> float | str:
    """1 / sqrt(K) for means over windows of K entries that do not overlap."""
    shapes = call.shapes[call.source], call.shapes[call.node]
    ratio = [i / o for i, o in zip(*shapes, strict=True)]
    if any(r != int(r) for r in ratio):
        return f"{call.label} has windows of unequal size"
    return 1 / math.sqrt(math.prod(ratio))


def _select(call: Call) -> float | str:
    entries = call.node.args[1]
    index = entries if isinstance(entries, tuple) else (entries,)
    plain = all(entry is None or isinstance(entry, int | slice) for entry in index)
    return 1.0 if plain else "a selection that may repeat entries"


def _pad(call: Call) -> float | str:
    mode = call.setting(2, "mode", "constant")
    return 1.0 if mode == "constant" else f"it pads with {mode!r}"


def _cat(call: Call) -> float:
    """Count the parts of the concatenation that are the source: each has factor 1."""
    parts = setting(call.node, call.modules, 0, "tensors", ())
    return float(list(cast("list[fx.Node]", parts)).count(call.source))


def _batch_norm(call: Call) -> float | str:
    """Largest |γ| / sqrt(running variance + ε)."""
    layer, name = call.module, str(call.node.target)
    if not isinstance(layer.running_var, torch.Tensor) or not isinstance(layer.eps, float):
        return f"{name} normalises by the batch's own statistics"
    return float(batch_norm_scale(layer).abs().max())


def batch_norm_scale(layer: nn.Module) -> torch.Tensor:
    """Compute γ / sqrt(running variance + ε) per channel.

    Parameters
    ----------
    layer : nn.Module
        Batch norm with running statistics.

    Returns
    -------
    Tensor of float64, shape (channels,)
        Factors, with their signs.
    """
    variance = cast("torch.Tensor", layer.running_var).to(torch.float64)
    scale = 1 / torch.sqrt(variance + cast("float", layer.eps))
    if isinstance(layer.weight, torch.Tensor):
        scale = scale * layer.weight.detach().to(torch.float64)
    return scale


def _max_pool(call: Call, dims: int) -> float:
    """sqrt(c), c the most windows that cover one entry.

    Each output changes by no more than the largest change in its window, so the squares sum to at
    most c times the input's.
    """
    kernel, strides = _windows(call, dims)
    return math.sqrt(math.prod(map(cover, kernel, strides, call.sizes(dims, 4, "dilation", 1))))


def _avg_pool(call: Call, dims: int) -> float:
    """sqrt(c / K) for averages over K entries, c the most windows that cover one entry.

    The matrix has row sums 1 and column sums at most c / K, so its norm is at most sqrt(c / K)
    (Schur's test), which is exact when windows do not overlap. Where windows are cut at the border
    and divided by what is left, column sums are only known to be at most c.
    """
    kernel, strides = _windows(call, dims)
    covers = math.prod(map(cover, kernel, strides, (1,) * dims))
    divisor = call.setting(6, "divisor_override", None) if dims == 2 else None
    entries = math.prod(kernel)
    if divisor:
        return math.sqrt(entries * covers) / abs(divisor)
    cut = call.setting(4, "ceil_mode", False) or (
        any(call.sizes(dims, 3, "padding", 0)) and not call.setting(5, "count_include_pad", True)
    )
    return math.sqrt(covers) if cut else math.sqrt(covers / entries)


def _windows(call: Call, dims: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Kernel and stride of a pooling; without a stride it is the kernel."""
    kernel = call.sizes(dims, 1, "kernel_size", None)
    given = call.setting(2, "stride", None) not in (None, [], ())
    return kernel, call.sizes(dims, 2, "stride", None) if given else kernel


def _mean(call: Call) -> float | str:
    """Return 1 / sqrt(K) for a mean over K entries per sample."""
    axes, shape = call.setting(1, "dim", None), call.shapes[call.source]
    axes = [axes] if isinstance(axes, int) else axes
    if axes is None or any(axis % len(shape) == 0 for axis in axes):
        return "mean over the samples"
    return 1 / math.sqrt(math.prod(shape[axis] for axis in axes))


def _add(call: Call) -> float | str:
    """1 for each operand that the source is; sqrt(K) where each entry is repeated K times."""
    node, source = call.node, call.source
    if node.kwargs.get("alpha", 1) != 1 or len(node.args) != 2:
        return "a sum with a factor"
    given, summed = call.shapes[source], call.shapes[node]
    if not (isinstance(given, torch.Size) and isinstance(summed, torch.Size)):
        return "a sum of plain numbers"
    if len(given) != len(summed) or given[:1] != summed[:1]:
        return "a sum that repeats its operand over the samples"
    return list(node.args).count(source) * math.sqrt(math.prod(summed) / math.prod(given))


def _scale(call: Call) -> float | str:
    """Factor of a product with, or a quotient by, a plain number."""
    node, source = call.node, call.source
    if len(node.args) != 2 or node.kwargs:
        return "a product that is not by a number"
    first, second = node.args
    divides = "div" in str(getattr(node.target, "__name__", node.target))
    if first is source and isinstance(second, int | float) and (second or not divides):
        return 1 / abs(second) if divides else float(abs(second))
    if second is source and isinstance(first, int | float) and not divides:
        return float(abs(first))
    return "a product of two activations" if not divides else "a quotient by an activation"


RULES: dict[str, float | Callable[[Call], float | str]] = {
    "layer": _layer,
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
    "log_softmax": _log_softmax,
    "prelu": _prelu,
    "leaky_relu": lambda call: max(1.0, abs(call.setting(1, "negative_slope", 0.01))),
    "elu": lambda call: max(1.0, abs(call.setting(1, "alpha", 1.0))),
    "batch_norm": _batch_norm,
    "max_pool1d": lambda call: _max_pool(call, 1),
    "max_pool2d": lambda call: _max_pool(call, 2),
    "avg_pool1d": lambda call: _avg_pool(call, 1),
    "avg_pool2d": lambda call: _avg_pool(call, 2),
    "adaptive_avg_pool": _adaptive_avg_pool,
    "mean": _mean,
    "select": _select,
    "pad": _pad,
    "add": _add,
    "cat": _cat,
    "scale": _scale,
    "random": lambda call: f"{call.label} is random",
}
"""Lipschitz factor of each operation of `retrain.adapters.network.operations`: a number, or a rule
that gives one (or, as text, why none is known). An operation without an entry has no known factor.
The factors are derived: each is at least the operation's largest slope (for GELU and SiLU the
numerical maximum, rounded up). A smaller factor would make bounds wrong, a larger one loose.
"""

# Operations that may come between the last layer and the output if a bound on the layer's response
# is to hold for the output: reshaping, and activations with slopes of at most 1.
_KEEP = (
    "identity",
    "move",
    *(kind for kind, rule in RULES.items() if isinstance(rule, float) and 0 < rule <= 1),
)
