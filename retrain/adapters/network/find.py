"""Find the layers of a torch module: kind, what follows, and why some cannot be retrained.

The forward pass is traced symbolically (`torch.fx`), so modules, functions and methods, however
nested, become one graph. A layer that this does not reach, or that shares its weights, is listed
with the reason and left unchanged.
"""

from __future__ import annotations

import copy
import inspect
import operator
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace

from torch import fx, nn

from retrain.adapters.network.gain import describe
from retrain.adapters.network.kinds import kind_of
from retrain.adapters.network.operations import operation
from retrain.adapters.network.tensors import FLOATS
from retrain.adapters.network.wrappers import check_plain_weights, unwrapped
from retrain.stream.stream import Follows, LayerSpec

# A ReLU commutes with every operation that only moves entries or takes a maximum: since it is
# monotone, relu(max(z)) = max(relu(z)). So a layer is followed by a ReLU also across these
# operations (derived).
_COMMUTE = ("identity", "move", "max_pool1d", "max_pool2d")

# Errors that tracing a network's own code raises; each means that it cannot be traced.
_TRACE_ERRORS = (
    fx.proxy.TraceError,
    TypeError,
    RuntimeError,
    ValueError,
    AttributeError,
    LookupError,
    AssertionError,
)


@dataclass(frozen=True)
class FoundLayer:
    """A module with weights.

    Attributes
    ----------
    spec : LayerSpec
        Layer as a method sees it.
    module : str
        Name of its class.
    parameters : int
        Number of its parameters, biases included.
    meets : str
        Operation after its response, in words: ``"relu"``, ``"BatchNorm2d (bn1)"``, ``"output"``.
    detail : str
        Kernel, stride and so on of a convolution; empty otherwise.
    """

    spec: LayerSpec
    module: str
    parameters: int
    meets: str
    detail: str = ""


@dataclass(frozen=True, eq=False)
class Network:
    """A traced module and its layers.

    Attributes
    ----------
    layers : tuple of FoundLayer
        All modules with weights, in execution order; those not reached come last.
    graph : fx.Graph or None
        Traced forward pass; None if it cannot be traced.
    nodes : mapping from str to fx.Node
        Node that calls the layer, by layer name, for layers that are called once.
    """

    layers: tuple[FoundLayer, ...]
    graph: fx.Graph | None
    nodes: Mapping[str, fx.Node]


def layer_table(model: nn.Module) -> tuple[FoundLayer, ...]:
    """List a module's layers, in execution order, for a person to read.

    Parameters
    ----------
    model : nn.Module
        Network; it is not changed.

    Returns
    -------
    tuple of FoundLayer
        All modules with weights.

    Raises
    ------
    ValueError
        If it is not a module, is a single layer, or has no weights.
    """
    return find_layers(evaluation_copy(model)).layers


def evaluation_copy(model: nn.Module) -> nn.Module:
    """Copy a module, without wrappers around it, and put the copy into evaluation mode.

    Parameters
    ----------
    model : nn.Module
        Network; it is not changed.

    Returns
    -------
    nn.Module
        Copy in evaluation mode.

    Raises
    ------
    ValueError
        If it is not a module, is a single layer, has weights that are computed at each call
        (pruning masks, weight norm), or cannot be copied.
    """
    if not isinstance(model, nn.Module):
        raise ValueError(f"model: got a {type(model).__name__}, want a torch module")
    model = unwrapped(model)
    check_plain_weights(model)
    if kind_of(model) is not None:
        raise ValueError("model: got a single layer; wrap it in torch.nn.Sequential")
    try:
        return copy.deepcopy(model).eval()
    except (RuntimeError, TypeError) as error:
        text = str(error).split("\n")[0]
        raise ValueError(f"model: {type(model).__name__} cannot be copied: {text}") from error


def find_layers(model: nn.Module) -> Network:
    """Trace a module and list its layers.

    Parameters
    ----------
    model : nn.Module
        Network in evaluation mode (`evaluation_copy`).

    Returns
    -------
    Network
        Layers, graph and nodes.

    Raises
    ------
    ValueError
        If the module has no weights.
    """
    graph, problem = trace(model)
    modules = dict(model.named_modules())
    nodes = list(graph.nodes) if graph else []
    if any(operation(node, modules) == "random" for node in nodes):
        problem = "the network is random in evaluation mode (dropout with training=True)"
    owners = dict(_owners(model))
    if not owners:
        raise ValueError(f"model: {type(model).__name__} has no weights")

    calls: dict[str, list[fx.Node]] = {name: [] for name in owners}
    outside: dict[str, fx.Node] = {}  # weights read without calling the module
    order: dict[str, int] = {}
    for position, node in enumerate(nodes):
        target = str(node.target)
        if node.op == "call_module":
            if target in calls:
                calls[target].append(node)
            for name in owners:
                if name == target or name.startswith(target + "."):
                    order.setdefault(name, position)
        elif node.op == "get_attr":
            owner = target.rpartition(".")[0]
            if owner in owners:
                outside.setdefault(owner, node)
                order.setdefault(owner, position)

    tied = _tied(owners)
    leaves = {str(node.target) for node in nodes if node.op == "call_module"}
    found = []
    for name in sorted(owners, key=lambda name: order.get(name, len(nodes))):  # stable
        layer = _describe_layer(name, owners[name])
        reason = _weights_reason(name, owners[name], tied)
        reason = reason or problem or _use_reason(name, calls[name], outside, leaves, modules)
        if len(calls[name]) == 1:
            meets, follows = _next(calls[name][0], modules)
            layer = replace(layer, meets=meets, spec=replace(layer.spec, follows=follows))
        found.append(replace(layer, spec=replace(layer.spec, reason=reason)))
    once = {name: called[0] for name, called in calls.items() if len(called) == 1}
    return Network(tuple(found), graph, once)


class _Proxy(fx.Proxy):
    """A traced value that records in-place arithmetic as such; fx would record a new value."""

    def __iadd__(self, other: object) -> fx.Proxy:
        return self._in_place(operator.iadd, other)

    def __isub__(self, other: object) -> fx.Proxy:
        return self._in_place(operator.isub, other)

    def __imul__(self, other: object) -> fx.Proxy:
        return self._in_place(operator.imul, other)

    def __itruediv__(self, other: object) -> fx.Proxy:
        return self._in_place(operator.itruediv, other)

    def _in_place(self, target: Callable[..., object], other: object) -> fx.Proxy:
        return self.tracer.create_proxy("call_function", target, (self, other), {})


class _Tracer(fx.Tracer):
    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Proxy(node, self)


def trace(model: nn.Module) -> tuple[fx.Graph | None, str | None]:
    """Trace the forward pass with its first argument; the other arguments keep their defaults.

    Parameters
    ----------
    model : nn.Module
        Network.

    Returns
    -------
    graph : fx.Graph or None
        Traced forward pass.
    reason : str or None
        Why it cannot be traced; None with a graph.
    """
    wanted = list(inspect.signature(model.forward).parameters.values())
    plain = [p for p in wanted if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    required = [p.name for p in plain if p.default is p.empty]
    if len(required) > 1:
        return None, f"the network takes several inputs ({', '.join(required)})"
    defaults = {p.name: p.default for p in plain[1:]}
    try:
        return _Tracer().trace(model, concrete_args=defaults or None), None
    except _TRACE_ERRORS as error:
        text = (str(error).strip() or type(error).__name__).split("\n")[0]
        return None, f"the network cannot be traced: {text}"


def _owners(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield the modules that hold parameters; a parametrised one represents those inside it."""
    parametrised: list[str] = []
    for name, module in model.named_modules():
        if any(name.startswith(prefix) for prefix in parametrised):
            continue
        if hasattr(module, "parametrizations"):
            parametrised.append(f"{name}.parametrizations")
            yield name, module
        elif next(module.parameters(recurse=False), None) is not None:
            yield name, module


def _tied(owners: Mapping[str, nn.Module]) -> dict[str, str]:
    """Find, by layer name, another layer that holds the same parameter or the same memory."""
    holders: dict[int, list[str]] = {}
    for name, module in owners.items():
        for parameter in module.parameters(recurse=False):
            if not isinstance(parameter, nn.UninitializedParameter) and parameter.numel():
                holders.setdefault(parameter.data_ptr(), []).append(name)
    tied = {}
    for names in holders.values():
        for name in names:
            others = [other for other in names if other != name]
            if others:
                tied[name] = others[0]
    return tied


def _describe_layer(name: str, module: nn.Module) -> FoundLayer:
    """Describe a module by itself: no reason and no successor yet."""
    label = type(module).__name__
    parameters = list(module.parameters())
    known = [p for p in parameters if not isinstance(p, nn.UninitializedParameter)]
    count = sum(p.numel() for p in known)
    kind = kind_of(module)
    if kind is not None:
        shape, detail, groups = kind.shape(module), kind.detail(module), kind.groups(module)
    else:
        detail, groups = "", 1
        largest = max(known, key=lambda p: p.numel(), default=None)
        rows = largest.shape[0] if largest is not None and largest.ndim > 1 else 1
        shape = (largest.numel() // max(rows, 1), rows) if largest is not None else (0, 0)
    bias = getattr(module, "bias", None) is not None
    spec = LayerSpec(
        name or "(root)", label if kind is None else kind.name, shape, bias, "linear", groups
    )
    return FoundLayer(spec, label, count, "", detail)


def _weights_reason(name: str, module: nn.Module, tied: Mapping[str, str]) -> str | None:
    """Say why a module's weights cannot be replaced, regardless of how the network uses them."""
    label = type(module).__name__
    parametrised = getattr(module, "parametrizations", None)
    if isinstance(parametrised, nn.ModuleDict):
        return (
            "its weight is parametrised; remove the parametrisation first: "
            "torch.nn.utils.parametrize.remove_parametrizations"
            f"(model.get_submodule({name!r}), {next(iter(parametrised))!r})"
        )
    kind = kind_of(module)
    if kind is None:
        return f"{label} layers are not retrained"
    if module._forward_hooks or module._forward_pre_hooks:
        return "it has forward hooks (weight norm, a pruning mask, ...); remove them first"
    weight = module.weight
    if not isinstance(weight, nn.Parameter) or isinstance(weight, nn.UninitializedParameter):
        return "its weight is not a plain parameter"
    if weight.dtype not in FLOATS or weight.is_meta:
        return f"its weight is of type {weight.dtype} on {weight.device}"
    if name in tied:
        return f"its weight or bias is shared with {tied[name] or '(root)'}"
    return kind.unfit(module)


def _use_reason(
    name: str,
    calls: list[fx.Node],
    outside: Mapping[str, fx.Node],
    leaves: set[str],
    modules: Mapping[str, nn.Module],
) -> str | None:
    """Say why the network's use of a layer prevents retraining it."""
    if name in outside:
        return "its weights are also used without calling it"
    if len(calls) > 1:
        return f"it is used {len(calls)} times"
    if calls:
        plain = len(calls[0].args) == 1 and not calls[0].kwargs
        return None if plain else "it is called with more than one positional argument"
    parents = [leaf for leaf in leaves if name.startswith(leaf + ".")]
    if parents:
        return f"it is inside {type(modules[parents[0]]).__name__} ({parents[0]})"
    return "the forward pass does not reach it"


def _next(node: fx.Node, modules: Mapping[str, nn.Module]) -> tuple[str, Follows]:
    """Find the operation that follows a layer's response."""
    while True:
        users = [user for user in node.users if operation(user, modules) != "shape"]
        if len(users) != 1:
            return ("several operations" if users else "nothing"), "linear"
        node = users[0]
        if node.op == "output":
            return "output", "linear"
        kind = operation(node, modules)
        if kind == "relu":
            return "relu", "relu"
        if kind not in _COMMUTE:
            return describe(node, modules), "linear"
