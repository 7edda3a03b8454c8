"""Lipschitz factors over a captured graph, from a change of one layer's output to the output.

All factors are for the Frobenius norm over a whole batch. A node whose inputs change by δ_1, δ_2,
... changes by at most sum_i f_i ||δ_i||, f_i its factor for input i. So a change at a node reaches
the output multiplied by at most

    G(output) = 1,    G(node) = sum over users u of f_u(node) · G(u),

which in a chain is the product of the later layers' norms, and in a graph the sum over all paths.
A node that the output does not depend on has G = 0.

Nothing in it needs samples to be independent of each other: a rule whose factor would depend on the
number of samples gives none.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx

from retrain.adapters.network.capture import arguments_of, label, name_of
from retrain.adapters.network.fold import batch_norm_scale
from retrain.adapters.network.frontier import Plan
from retrain.adapters.network.norms import cover
from retrain.adapters.network.sites import OPERATIONS
from retrain.stream.stream import Gain, compound

Norms = Callable[[fx.Node, "Tensor | None"], float]
"""(call of a layer, factor per output channel or None) -> bound on its norm as a map."""

Size = int | str
"""Length of an axis; a name where it is free, as that of the samples."""


@dataclass(frozen=True, eq=False)
class Network:
    """One network, dense or current, as the rules see it.

    Attributes
    ----------
    plan : Plan
        The captured graph.
    value : callable
        From a node that depends on no input (a parameter, a view of one) to its value.
    norms : Norms
        Norms of the layers with this network's weights.
    """

    plan: Plan
    value: Callable[[fx.Node], Any]
    norms: Norms


def gains(network: Network) -> dict[fx.Node, Gain]:
    """Bound the factor from every node's value to the network's output.

    Parameters
    ----------
    network : Network
        Network with the weights to bound.

    Returns
    -------
    dict from fx.Node to Gain
        G of each node. Its value is None, with the reason, where some operation on the way to the
        output has no finite factor. A ReLU has factor 1, so a layer's G is also the factor from
        its activated output.
    """
    factors: dict[fx.Node, float | str] = {}
    for node in reversed(network.plan.captured.graph.nodes):
        factors[node] = _to_output(node, factors, network)
    return {node: _as_gain(found) for node, found in factors.items()}


def _as_gain(found: float | str) -> Gain:
    if isinstance(found, str):
        return Gain(None, found)
    if not math.isfinite(found):
        return Gain(None, "the product of the later layers' norms overflows")
    return Gain(found)


def output_source(plan: Plan) -> tuple[fx.Node | None, str]:
    """Find the one node whose value, through its activation and reshaping only, is the output.

    Parameters
    ----------
    plan : Plan
        The captured graph.

    Returns
    -------
    node : fx.Node or None
        Call of a layer; None where the output is computed in another way.
    reason : str
        Operation that prevents it; empty with a node.
    """
    node = plan.captured.output
    while name_of(node) in _KEEP:
        values = [parent for parent in node.all_input_nodes if _is_value(parent)]
        if len(values) != 1:
            return None, f"the output passes through {label(node)}"
        node = values[0]
    if name_of(node) in OPERATIONS:
        return node, ""
    return None, f"the output passes through {label(node)}"


def _is_value(node: fx.Node) -> bool:
    """Tell whether a node's value is a tensor, or several, rather than a size."""
    value = node.meta.get("val")
    return isinstance(value, Tensor | tuple | list)


def _to_output(
    node: fx.Node, factors: Mapping[fx.Node, float | str], network: Network
) -> float | str:
    """Compute G(node) from the G of its users; a text says why none is known."""
    total = 1.0 if node is network.plan.captured.output else 0.0
    for user in node.users:
        if user.op == "output":
            continue
        rest = factors[user]
        if rest == 0:
            continue
        step = factor(user, node, network)
        if isinstance(step, str):
            return step
        scaling = _only_scaled(user)
        if scaling is not None and node is arguments_of(user)[OPERATIONS[name_of(user)].input]:
            # A layer and the batch norm behind it are one map; its norm is at most the product.
            apart = factor(scaling, user, network)
            if isinstance(apart, str):
                return apart
            joint = network.norms(user, batch_norm_scale(scaling, network.value))
            step, rest = min(compound(step, apart), joint), factors[scaling]
        if step == 0:
            continue
        if isinstance(rest, str):
            return rest
        total += compound(step, rest)
    return total


def _only_scaled(node: fx.Node) -> fx.Node | None:
    """Find the batch norm that is the only user of a layer's response, if there is one."""
    how = OPERATIONS.get(name_of(node))
    if how is None or len(node.users) != 1:
        return None
    user = next(iter(node.users))
    # Batch norm scales axis 1, which has to be that of the layer's output channels.
    axis = how.channel_axis % node.meta["val"].ndim
    return user if name_of(user) == "batch_norm" and axis == 1 else None


@dataclass(frozen=True, eq=False)
class Call:
    """One node of the graph, and one of its inputs.

    Attributes
    ----------
    node, source : fx.Node
        Node, and its input.
    network : Network
        Network.
    """

    node: fx.Node
    source: fx.Node
    network: Network

    @property
    def arguments(self) -> dict[str, Any]:
        """Arguments of the operation by name, defaults included."""
        return arguments_of(self.node)

    @property
    def label(self) -> str:
        """Name of the node for messages."""
        return label(self.node)

    def known(self, name: str) -> Tensor | None:
        """Return an argument that depends on no input, in float64; None where it does.

        Parameters
        ----------
        name : str
            Name of the argument.

        Returns
        -------
        Tensor or None
            Its value.
        """
        node = self.arguments.get(name)
        if not isinstance(node, fx.Node) or node not in self.network.plan.fixed:
            return None
        value = self.network.value(node)
        return value.detach().double() if isinstance(value, Tensor) else None

    def sizes(self, dims: int, name: str) -> tuple[int, ...]:
        """Return a setting that has one number per dimension, or one for all.

        Parameters
        ----------
        dims : int
            Number of dimensions.
        name : str
            Name of the argument.

        Returns
        -------
        tuple of int
            One number per dimension; empty where none was given.
        """
        value = self.arguments.get(name)
        if value is None:
            return ()
        entries = tuple(value) if isinstance(value, tuple | list) else (value,)
        return entries * dims if len(entries) == 1 else entries


def factor(node: fx.Node, source: fx.Node, network: Network) -> float | str:
    """Compute the Lipschitz factor of one node for one of its inputs.

    Parameters
    ----------
    node : fx.Node
        Node.
    source : fx.Node
        Input of the node.
    network : Network
        Network.

    Returns
    -------
    float or str
        Factor, or the reason why none is known.
    """
    if not _is_value(node):
        return 0.0  # a size does not depend on the values
    call = Call(node, source, network)
    name = name_of(node)
    rule = _layer if name in OPERATIONS else RULES.get(name)
    if rule is None:
        return f"{call.label} has no known factor"
    found = rule(call) if callable(rule) else rule
    return float(found) if isinstance(found, int) else found


def shape_of(node: fx.Node) -> tuple[Size, ...]:
    """Return the lengths of a node's axes as the graph has them.

    Parameters
    ----------
    node : fx.Node
        Node.

    Returns
    -------
    tuple of int or str
        Lengths; empty where the value is not a tensor.
    """
    value = node.meta.get("val")
    if not isinstance(value, Tensor):
        return ()
    return tuple(size if isinstance(size, int) else str(size) for size in value.shape)


def repeated(given: tuple[Size, ...], made: tuple[Size, ...]) -> float | None:
    """Compute how often each entry occurs when a tensor is broadcast.

    Parameters
    ----------
    given, made : tuple of int or str
        Shape before and after.

    Returns
    -------
    float or None
        Number of times; None where it depends on the number of samples.
    """
    times = 1.0
    for before, after in zip((1,) * (len(made) - len(given)) + given, made, strict=True):
        if before == after:
            continue
        if before != 1 or not isinstance(after, int):
            return None
        times *= after
    return times


_SAMPLES = "that repeats its operand over the samples"


def _layer(call: Call) -> float | str:
    """Return the layer's norm as a map."""
    how = OPERATIONS[name_of(call.node)]
    arguments = call.arguments
    weight = arguments[how.weight]
    if call.source is not arguments[how.input] or call.source is weight:
        return f"{call.label} with weights that are computed"
    if weight not in call.network.plan.fixed:
        return "a product of two activations"
    value = call.network.value(weight)
    unfit = how.unfit(arguments, value)
    return call.network.norms(call.node, None) if unfit is None else f"{call.label}: {unfit}"


def _prelu(call: Call) -> float | str:
    """max(1, |a|) over all channels: the slope is 1 above 0 and the channel's a below."""
    slopes = call.known("weight")
    if slopes is None or call.source is call.arguments["weight"]:
        return f"{call.label} takes its slopes from outside a module"
    return max(1.0, float(slopes.abs().max()))


def _axis(call: Call) -> list[Size] | str:
    """Lengths of the axes that an operation works along; a text where samples are among them."""
    axes = call.arguments.get("dim")
    shape = shape_of(call.source)
    if axes is None or axes == []:
        return "over the samples"
    axes = [axes] if isinstance(axes, int) else list(axes)
    if any(axis % len(shape) == 0 for axis in axes):
        return "over the samples"
    return [shape[axis] for axis in axes]


def _entries(call: Call) -> float | str:
    """Number of entries along an operation's axes."""
    found = _axis(call)
    if isinstance(found, str):
        return f"{name_of(call.node)} {found}"
    if not all(isinstance(size, int) for size in found):
        return f"{name_of(call.node)} over an axis of any length"
    return float(math.prod(size for size in found if isinstance(size, int)))


def _mean(call: Call) -> float | str:
    """Return 1 / sqrt(K) for a mean over K entries per sample."""
    entries = _entries(call)
    return entries if isinstance(entries, str) else 1 / math.sqrt(entries)


def _sum(call: Call) -> float | str:
    """Return sqrt(K) for a sum over K entries per sample, which is also log_softmax's over K.

    The Jacobian of log_softmax, I - 1 p^T, is a projection of norm at most |1| |p|.
    """
    entries = _entries(call)
    return entries if isinstance(entries, str) else math.sqrt(entries)


def _adaptive_avg_pool(call: Call) -> float | str:
    """1 / sqrt(K) for means over windows of K entries that do not overlap."""
    ratio = []
    for before, after in zip(shape_of(call.source), shape_of(call.node), strict=True):
        if before == after:
            continue
        if not (isinstance(before, int) and isinstance(after, int)) or before % after:
            return f"{call.label} has windows of unequal size"
        ratio.append(before // after)
    return 1 / math.sqrt(math.prod(ratio))


def _pad(call: Call) -> float:
    """1 with constants; else the root of how often an entry can occur, counted along each axis."""
    if call.arguments.get("mode", "constant") == "constant":
        return 1.0
    sides = [max(int(side), 0) for side in call.arguments["pad"]]
    return math.sqrt(math.prod(1 + a + b for a, b in zip(sides[::2], sides[1::2], strict=True)))


def _cat(call: Call) -> float:
    """Count the parts of the concatenation that are the source: each has factor 1."""
    return float(list(call.arguments["tensors"]).count(call.source))


def _batch_norm(call: Call) -> float | str:
    """Largest |γ| / sqrt(running variance + ε)."""
    arguments = call.arguments
    if arguments.get("training") or arguments["running_var"] is None:
        return f"{call.label} normalises by the batch's own statistics"
    if call.source is not arguments["input"]:
        return f"{call.label} with statistics that are computed"
    return float(batch_norm_scale(call.node, call.network.value).abs().max())


def _max_pool(call: Call, dims: int) -> float:
    """sqrt(c), c the most windows that cover one entry.

    Each output changes by no more than the largest change in its window, so the squares sum to at
    most c times the input's.
    """
    kernel, strides = _windows(call, dims)
    return math.sqrt(math.prod(map(cover, kernel, strides, call.sizes(dims, "dilation"))))


def _avg_pool(call: Call, dims: int) -> float:
    """sqrt(c / K) for averages over K entries, c the most windows that cover one entry.

    The matrix has row sums 1 and column sums at most c / K, so its norm is at most sqrt(c / K)
    (Schur's test), which is exact when windows do not overlap. Where windows are cut at the border
    and divided by what is left, column sums are only known to be at most c.
    """
    kernel, strides = _windows(call, dims)
    covers = math.prod(map(cover, kernel, strides, (1,) * dims))
    divisor = call.arguments.get("divisor_override")
    entries = math.prod(kernel)
    if divisor:
        return math.sqrt(entries * covers) / abs(divisor)
    cut = call.arguments.get("ceil_mode", False) or (
        any(call.sizes(dims, "padding")) and not call.arguments.get("count_include_pad", True)
    )
    return math.sqrt(covers) if cut else math.sqrt(covers / entries)


def _windows(call: Call, dims: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Kernel and stride of a pooling; without a stride it is the kernel."""
    kernel = call.sizes(dims, "kernel_size")
    return kernel, call.sizes(dims, "stride") or kernel


def _upsample(call: Call) -> float | str:
    """Root of how often an entry is repeated."""
    times = 1.0
    for before, after in zip(shape_of(call.source), shape_of(call.node), strict=True):
        if before != after:
            if not (isinstance(before, int) and isinstance(after, int)):
                return f"{call.label} to a size that is free"
            times *= math.ceil(after / before)
    return math.sqrt(times)


def _expand(call: Call) -> float | str:
    times = repeated(shape_of(call.source), shape_of(call.node))
    return f"{call.label} {_SAMPLES}" if times is None else math.sqrt(times)


def _add(call: Call) -> float | str:
    """|factor| for each operand that the source is; sqrt(K) where entries are repeated K times."""
    arguments = call.arguments
    alpha = arguments.get("alpha", 1)
    if not isinstance(alpha, int | float):
        return "a sum with a factor"
    times = repeated(shape_of(call.source), shape_of(call.node))
    if times is None:
        return f"a sum {_SAMPLES}"
    scaled = "self" if name_of(call.node) == "rsub" else "other"
    counts = {name: arguments[name] is call.source for name in ("self", "other")}
    total = sum(abs(alpha) if name == scaled else 1.0 for name, is_it in counts.items() if is_it)
    return total * math.sqrt(times)


def _scale(call: Call) -> float | str:
    """Factor of a product with, or a quotient by, a number or a tensor that no input changes."""
    arguments, divides = call.arguments, name_of(call.node) == "div"
    first, second = arguments["self"], arguments["other"]
    if divides and arguments.get("rounding_mode") is not None:
        return "a quotient that is rounded"
    if _is_softsign(call.node):
        return 1.0 if call.source is first else 0.0  # x / (1 + |x|) as one map of x
    if call.source is second and divides:
        return "a quotient by an activation"
    if first is second:
        return "a product of two activations"
    other, name = (second, "other") if call.source is first else (first, "self")
    if isinstance(other, int | float):
        size = abs(float(other))
    else:
        values = call.known(name)
        if values is None or not values.numel():
            return "a quotient by an activation" if divides else "a product of two activations"
        size = float(values.abs().min() if divides else values.abs().max())
    if divides and size == 0:
        return "a quotient by zero"
    times = repeated(shape_of(call.source), shape_of(call.node))
    if times is None:
        return f"a product {_SAMPLES}"
    return (1 / size if divides else size) * math.sqrt(times)


def _is_softsign(node: fx.Node) -> bool:
    """Tell whether a node is x / (|x| + 1), as torch writes softsign."""
    arguments = arguments_of(node)
    below = arguments["other"]
    if not isinstance(below, fx.Node) or name_of(below) != "add" or len(below.users) != 1:
        return False
    inner = arguments_of(below)
    size = inner["self"]
    return (
        isinstance(size, fx.Node)
        and name_of(size) == "abs"
        and arguments_of(size)["self"] is arguments["self"]
        and len(size.users) == 1
        and inner["other"] == 1
        and inner["alpha"] == 1
    )


def _elu(call: Call) -> float:
    """Larger of the slopes at both sides of 0: s, and s a c for s a (exp(c x) - 1)."""
    scale, alpha, inner = (
        call.arguments.get(name, 1) for name in ("scale", "alpha", "input_scale")
    )
    return float(max(abs(scale), abs(scale * alpha * inner)))


def _dropout(call: Call) -> float | str:
    """1 where nothing is dropped."""
    still = call.arguments.get("train") is False or call.arguments.get("p") == 0
    return 1.0 if still else f"{call.label} is random"


def _cast(call: Call) -> float | str:
    """1 between floating-point types: rounding is counted apart."""
    value = call.node.meta["val"]
    return 1.0 if value.is_floating_point() else f"{call.label} makes whole numbers"


MOVES = (
    "view", "reshape", "flatten", "unflatten", "permute", "transpose", "t", "numpy_T", "squeeze",
    "unsqueeze", "movedim", "contiguous", "clone", "alias", "detach", "_unsafe_view", "select",
    "slice", "narrow", "chunk", "split", "split_with_sizes", "unbind", "getitem", "flip", "roll",
    "pixel_shuffle", "pixel_unshuffle", "channel_shuffle", "lift_fresh_copy", "view_as",
)  # fmt: skip
"""Operations that move entries, or leave some out; each entry occurs once at most."""

DROPOUTS = ("dropout", "feature_dropout", "alpha_dropout", "feature_alpha_dropout")

RULES: dict[str, float | Callable[[Call], float | str]] = {
    **dict.fromkeys(MOVES, 1.0),
    **dict.fromkeys(DROPOUTS, _dropout),
    "relu": 1.0,
    "neg": 1.0,
    "abs": 1.0,
    "tanh": 1.0,
    "sigmoid": 0.25,
    "hardsigmoid": 1 / 6,
    "gelu": 1.13,  # largest slope 1.1290, and below 1.13 in the tanh form
    "silu": 1.1,  # 1.0998
    "mish": 1.09,  # 1.0885
    "hardswish": 1.5,
    "softplus": 1.0,
    "relu6": 1.0,
    "hardtanh": 1.0,
    "clamp": 1.0,
    "clamp_min": 1.0,
    "clamp_max": 1.0,
    "hardshrink": lambda call: f"{call.label} jumps",
    "softshrink": 1.0,
    "log_sigmoid": 1.0,
    "softmax": 1.0,  # its Jacobian diag(p) − p pᵀ has norm at most 1/2
    "log_softmax": _sum,
    "prelu": _prelu,
    "leaky_relu": lambda call: max(1.0, abs(call.arguments["negative_slope"])),
    "elu": _elu,
    "selu": 1.7581,  # scale times alpha, 1.75810
    "celu": 1.0,
    "batch_norm": _batch_norm,
    "max_pool1d": lambda call: _max_pool(call, 1),
    "max_pool2d": lambda call: _max_pool(call, 2),
    "max_pool3d": lambda call: _max_pool(call, 3),
    "avg_pool1d": lambda call: _avg_pool(call, 1),
    "avg_pool2d": lambda call: _avg_pool(call, 2),
    "avg_pool3d": lambda call: _avg_pool(call, 3),
    "adaptive_avg_pool1d": _adaptive_avg_pool,
    "adaptive_avg_pool2d": _adaptive_avg_pool,
    "adaptive_avg_pool3d": _adaptive_avg_pool,
    "upsample_nearest1d": _upsample,
    "upsample_nearest2d": _upsample,
    "upsample_nearest3d": _upsample,
    "mean": _mean,
    "sum": _sum,
    "pad": _pad,
    "constant_pad_nd": 1.0,
    "expand": _expand,
    "add": _add,
    "sub": _add,
    "rsub": _add,
    "cat": _cat,
    "stack": _cat,
    "mul": _scale,
    "div": _scale,
    "to": _cast,
    "_to_copy": _cast,
}
"""Lipschitz factor of each ATen operation beside the layers': a number, or a rule that gives one
(or, as text, why none is known). An operation without an entry has no known factor. The factors are
derived: each is at least the operation's largest slope (for GELU, SiLU and Mish the numerical
maximum, rounded up). A smaller factor would make bounds wrong, a larger one loose.
"""

# Operations that may come between the last layer and the output if a bound on the layer's response
# is to hold for the output: reshaping, and activations with slopes of at most 1.
_KEEP = (
    *DROPOUTS,
    *(kind for kind, rule in RULES.items() if isinstance(rule, float) and 0 < rule <= 1),
)
