"""Finding the residual blocks of an existing network, and gating them.

The network is traced by `torch.fx`. Wherever two values are added, the last value that both come
from is where a residual block begins; the two ways from there are the block and its skip.
"""

from __future__ import annotations

import copy
import operator
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import fx, nn
from torch.nn import functional

from retrain.trainers.gates.block import Gated

_ADDITIONS = {operator.add, operator.iadd, torch.add, "add", "add_"}
_WEIGHTS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
_RELUS = {functional.relu, torch.relu, torch.relu_, "relu", "relu_"}


@dataclass(frozen=True)
class _Residual:
    """Nodes of a residual block: where it begins, both ways, and the addition."""

    fork: fx.Node
    block: list[fx.Node]
    skip: list[fx.Node]
    total: fx.Node


def gate_network(model: nn.Module) -> nn.Module:
    """Return a copy of a network with a gate on every residual block found in it.

    A block has weights, no way in but its beginning and no way out but the sum; its skip has at
    most one layer with weights (and what normalises it). A ReLU right after the sum becomes the
    block's h. The copy is a Sequential where the network runs in a row otherwise, or else a
    `torch.fx.GraphModule`; tensors keep their values, and get other names.

    Raises
    ------
    ValueError
        If the network cannot be traced, or has no residual block.
    """
    try:
        traced = fx.symbolic_trace(copy.deepcopy(model))
    except (fx.proxy.TraceError, TypeError, RuntimeError) as error:
        text = str(error).split("\n")[0]
        raise ValueError(
            f"model: {type(model).__name__} cannot be traced ({text}); put the gates in with `gate`"
        ) from error
    modules = dict(traced.named_modules())
    count = 0
    for node in list(traced.graph.nodes):
        found = _residual(node, modules)
        if found is None:
            continue
        count += 1
        name = f"gated{count}"
        user = next(iter(node.users)) if len(node.users) == 1 else None
        after = nn.ReLU() if user is not None and _is_relu(user, modules) else None
        block = _module(found.block, modules)
        skip = _module(found.skip, modules) if found.skip else None
        gated = Gated(block, skip, after)
        last = node if after is None or user is None else user
        traced.add_submodule(name, gated)
        modules[name] = gated
        with traced.graph.inserting_after(last):
            new = traced.graph.call_module(name, (found.fork,))
        last.replace_all_uses_with(new)
        for dead in dict.fromkeys([last, node, *reversed(_ordered(found))]):
            traced.graph.erase_node(dead)
    if count == 0:
        raise ValueError(
            f"model: {type(model).__name__} has no residual block; put the gates in with `gate`"
        )
    traced.delete_all_unused_submodules()
    traced.graph.lint()
    traced.recompile()
    return _row(traced).train(model.training)


def _residual(node: fx.Node, modules: dict[str, nn.Module]) -> _Residual | None:
    """Return the residual block that ends in an addition; None where there is none."""
    plain = len(node.args) == 2 and not node.kwargs
    if node.target not in _ADDITIONS or not plain:
        return None
    ends = [end for end in node.args if isinstance(end, fx.Node)]
    if len(ends) != 2 or ends[0] is ends[1]:
        return None
    above = [_ancestors(end) for end in ends]
    order = {known: number for number, known in enumerate(node.graph.nodes)}
    common = [known for known in above[0] & above[1] if known.op != "get_attr"]
    if not common:
        return None
    fork = max(common, key=lambda known: order[known])
    before = _ancestors(fork)
    ways = [sorted(nodes - before, key=lambda known: order[known]) for nodes in above]
    if not all(_is_closed(way, fork, node) for way in ways):
        return None
    skip, block = sorted(ways, key=lambda way: (_layers(way, modules), len(way)))
    gated = any(isinstance(_called(known, modules), Gated) for known in [*block, *skip])
    if gated or _layers(block, modules) == 0 or _layers(skip, modules) > 1:
        return None
    return _Residual(fork, block, skip, node)


def _ancestors(node: fx.Node) -> set[fx.Node]:
    """Return a node and all that it is made of."""
    found, left = {node}, [node]
    while left:
        for known in left.pop().all_input_nodes:
            if known not in found:
                found.add(known)
                left.append(known)
    return found


def _is_closed(way: Sequence[fx.Node], fork: fx.Node, total: fx.Node) -> bool:
    """Tell whether nothing comes in but from the fork, and nothing goes out but to the sum."""
    inside = set(way)
    return all(
        all(known in inside or known is fork for known in node.all_input_nodes)
        and all(user in inside or user is total for user in node.users)
        for node in way
    )


def _layers(way: Sequence[fx.Node], modules: dict[str, nn.Module]) -> int:
    return sum(isinstance(_called(node, modules), _WEIGHTS) for node in way)


def _called(node: fx.Node, modules: dict[str, nn.Module]) -> nn.Module | None:
    return modules.get(str(node.target)) if node.op == "call_module" else None


def _is_relu(node: fx.Node, modules: dict[str, nn.Module]) -> bool:
    return isinstance(_called(node, modules), nn.ReLU) or (
        node.op in ("call_function", "call_method") and node.target in _RELUS
    )


def _ordered(found: _Residual) -> list[fx.Node]:
    order = {known: number for number, known in enumerate(found.total.graph.nodes)}
    return sorted([*found.block, *found.skip], key=lambda known: order[known])


# From nodes to modules ----------------------------------------------------------------------------


def _module(way: Sequence[fx.Node], modules: dict[str, nn.Module]) -> nn.Module:
    """Make a module of a way: a Sequential where it can be one."""
    layers = [_layer(node, modules) for node in way]
    if all(layer is not None for layer in layers) and _in_a_row(way):
        named = [(node.name, layer) for node, layer in zip(way, layers, strict=True) if layer]
        return named[0][1] if len(named) == 1 else nn.Sequential(OrderedDict(named))
    graph = fx.Graph()
    inside = set(way)
    entry = graph.placeholder("inputs")
    new: dict[fx.Node, fx.Node] = {}
    for node in way:
        new[node] = graph.node_copy(node, lambda known: new[known] if known in inside else entry)
    graph.output(new[way[-1]])
    return fx.GraphModule(way[0].graph.owning_module or nn.Module(), graph)


def _in_a_row(nodes: Sequence[fx.Node]) -> bool:
    """Tell whether each node takes but the one before it."""
    return all(node.all_input_nodes == [before] for before, node in pairwise(nodes))


def _layer(node: fx.Node, modules: dict[str, nn.Module]) -> nn.Module | None:
    """Return the module that does what a node does; None where there is none."""
    if node.op == "call_module":
        return _called(node, modules) if len(node.args) == 1 and not node.kwargs else None
    if node.op not in ("call_function", "call_method"):
        return None
    if node.target in _RELUS:
        return nn.ReLU()
    options = (*node.args[1:], *node.kwargs.values())
    if any(isinstance(option, fx.Node) for option in options):
        return None
    make = _FUNCTIONS.get(node.target)
    return None if make is None else make(*node.args[1:], **node.kwargs)


_FUNCTIONS: dict[Any, Callable[..., nn.Module]] = {
    torch.flatten: nn.Flatten,
    "flatten": nn.Flatten,
    functional.adaptive_avg_pool2d: nn.AdaptiveAvgPool2d,
    functional.avg_pool2d: nn.AvgPool2d,
    torch.tanh: nn.Tanh,
    functional.tanh: nn.Tanh,
    functional.gelu: nn.GELU,
    functional.silu: nn.SiLU,
}


def _row(traced: fx.GraphModule) -> nn.Module:
    """Return a Sequential of a graph that runs in a row; the graph where it does not."""
    modules = dict(traced.named_modules())
    nodes = [node for node in traced.graph.nodes if not _is_batch_size(node)]
    first, *inner, last = nodes
    simple = first.op == "placeholder" and last.op == "output" and last.args == (inner[-1],)
    layers: list[tuple[str, nn.Module]] = []
    for before, node in zip(nodes, inner, strict=False):
        layer = nn.Flatten() if _is_flattening(node) else _layer(node, modules)
        inputs = [known for known in node.all_input_nodes if not _is_batch_size(known)]
        if layer is None or inputs != [before]:
            simple = False
            break
        layers.append((node.name, layer))
    return nn.Sequential(OrderedDict(layers)) if simple else traced


def _is_batch_size(node: fx.Node) -> bool:
    """x.size(0), only there for x.view(x.size(0), -1)."""
    return (
        node.op == "call_method"
        and node.target == "size"
        and tuple(node.args[1:]) == (0,)
        and all(_is_flattening(user) for user in node.users)
    )


def _is_flattening(node: fx.Node) -> bool:
    """x.view(x.size(0), -1), or reshape."""
    if node.op != "call_method" or node.target not in ("view", "reshape") or len(node.args) != 3:
        return False
    source, size, rest = node.args
    batch = isinstance(size, fx.Node) and size.target == "size" and size.args == (source, 0)
    return bool(batch and rest == -1)
