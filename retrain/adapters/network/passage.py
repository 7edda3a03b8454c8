"""One passage of the data through the dense and the retrained network, for the bounds.

Both networks run twice, in their own dtype and in float64. Let Y and Yhat be the exact outputs, Y64
and Yhat64 those in float64, Yown and Yhatown those in the networks' own dtype. In float64 node v of
the graph is off by at most eta_v (`_allowance`) on the values that it receives. Replacing the nodes
one after the other, from the last to the first, with G(v) the factors of
`retrain.adapters.network.gain`,

    |Y - Y64|_F <= sum_v eta_v G(v),        |Yhat - Yhat64|_F <= sum_v etahat_v Ghat(v).   (*)

The sum over layers (`retrain.bounds.outputs`) has its discrepancies e_j in float64 too, so that it
bounds

    |Yhat - Y|_F  <=  sum_j e_j Ghat(j) + sum_v eta_v (G(v) + Ghat(v)).

The contribution of the networks' own arithmetic is measured, end to end: |Yown - Y64|_F and
|Yhatown - Yhat64|_F. So float32's rounding counts with its effect on these outputs, hidden values
that cancel or underflow included, rather than with its worst case.

The direct bound concerns the last layer on the inputs that it received in the own dtype. The
distance of its own response from the exact one on these inputs is measured in the same way.
"""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, fx, nn

from retrain.adapters.network.gain import batch_norm_scale, describe, factor, overwrites
from retrain.adapters.network.kinds import known_kind
from retrain.adapters.network.operations import operation, setting
from retrain.stream.stream import Follows, Gain, Passage
from solvers.arrays import norm

_log = logging.getLogger(__name__)

# Operations without rounding: they only move values, select some, or change their sign (derived).
_EXACT = (
    "relu",
    "identity",
    "negate",
    "move",
    "shape",
    "max_pool1d",
    "max_pool2d",
    "select",
    "pad",
    "cat",
)
_ROUNDOFF = 2.0**-53  # unit roundoff of float64 (derived from its 53 bits)
_UNDERFLOW = 2.0**-1074  # smallest positive float64: the error of a product that underflows

_TERMS = 8
"""Roundings counted per entry of an elementwise operation. An exp, a division and a product have
fewer. A smaller number could make a bound wrong, a larger one loosens it slightly. Chosen by hand
with a margin."""

_SAME = 1e-3
"""Relative difference of the outputs beyond which the traced graph does not represent the network.
The two may differ by the order of sums only, which in float32 stays far below. A smaller value
gives up bounds for rounding; a larger one trusts a wrong graph. Chosen by hand."""


@dataclass(frozen=True, eq=False)
class Networks:
    """The dense network and the retrained one, in evaluation mode, with their graph.

    Attributes
    ----------
    dense : nn.Module
        Dense network, as its layers are solved: half types in float32.
    current : nn.Module
        Retrained network, likewise.
    own : tuple of callable, or None
        The same two in the types that they are saved in, each a function of a batch; None where
        those are the types that they are solved in.
    graph : fx.Graph
        Traced forward pass of both.
    shapes : mapping from fx.Node
        Shapes of the values, as `retrain.adapters.network.gain.gains` takes them.
    """

    dense: nn.Module
    current: nn.Module
    own: tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]] | None
    graph: fx.Graph
    shapes: Mapping[fx.Node, Any]


Gains = tuple[Mapping[fx.Node, Gain], Mapping[fx.Node, Gain]]
"""Factors to the output with the given weights, and with the current ones."""


def measure_outputs(
    networks: tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]],
    samples: Iterable[Tensor],
    reason: str | None,
) -> Passage:
    """Measure the outputs alone, for networks that are equal or have no graph.

    Parameters
    ----------
    networks : tuple of callable
        Forward passes of the dense and of the current network, in evaluation mode.
    samples : iterable of Tensor
        Batches of inputs.
    reason : str or None
        Why rounding has no bound; None for equal networks.

    Returns
    -------
    Passage
        Deviation of the outputs, without discrepancies.
    """
    moved, size, rows = 0.0, 0.0, 0
    for batch in samples:
        with torch.no_grad():
            before, after = (network(batch.clone()) for network in networks)
        moved = math.hypot(moved, norm(after.double() - before.double()))
        size = math.hypot(size, norm(before))
        rows += len(batch)
    return Passage(rows, moved, size, {}, {}, 0.0 if reason is None else None, reason)


def measure(
    networks: Networks,
    changed: Mapping[str, Follows],
    gains: Gains,
    last: str | None,
    samples: Iterable[Tensor],
) -> Passage:
    """Send samples through both networks, in their own dtypes and in float64.

    Parameters
    ----------
    networks : Networks
        The two networks.
    changed : mapping from str to {"relu", "linear"}
        Activation after each layer whose weights differ, by layer name.
    gains : Gains
        Factors to the output.
    last : str or None
        Name of the layer whose response is the output, if there is one.
    samples : iterable of Tensor
        Batches of inputs.

    Returns
    -------
    Passage
        Deviations, discrepancies and the allowance for rounding.

    Notes
    -----
    Cost: two forward passes in the own dtype and up to two in float64 per batch. Memory: copies of
    both networks in float64, and the live values of one batch.

    References
    ----------
    Higham, Accuracy and Stability of Numerical Algorithms, section 3.1 (sums of products).
    """
    walk = Walk(networks, changed, gains)
    reason = walk.unfollowed
    moved, size, rows, own = 0.0, 0.0, 0, [0.0, 0.0, 0.0]
    for batch in samples:
        _log.info("bounds: both networks on %d samples, after %d", len(batch), rows)
        with torch.no_grad(), _received(networks.current, last) as seen:
            ends = [net(batch.clone()) for net in (networks.dense, networks.current)]
        saved = ends
        if networks.own is not None:
            with torch.no_grad():
                saved = [net(batch.clone()) for net in networks.own]
        moved = math.hypot(moved, norm(saved[1].double() - saved[0].double()))
        size = math.hypot(size, norm(saved[0]))
        if rows == 0 and not _same_graph(networks, batch, ends[0]):
            reason = reason or "the traced graph gives other outputs than the network"
        rows += len(batch)
        try:
            with torch.no_grad():
                wide = walk(batch)
        except (RuntimeError, TypeError) as error:
            text = str(error).partition("\n")[0]
            return _rest(networks, samples, (rows, moved, size), f"not in float64: {text}")
        # What half types lose beyond float32 comes on top, by the triangle inequality.
        halves = [norm(a.double() - b.double()) for a, b in zip(saved, ends, strict=True)]
        apart = [norm(end.double() - exact) for end, exact in zip(ends, wide, strict=True)]
        apart = [a + b for a, b in zip(apart, halves, strict=True)]
        lost = [walk.response_loss(str(last), *pair) for pair in seen]
        own = [math.hypot(*pair) for pair in zip(own, [*apart, *(lost or [0.0])], strict=True)]
    total = sum(own) + walk.total()
    if reason is None and (walk.overflow or not math.isfinite(total)):
        reason = f"{walk.overflow or 'an output'} overflows"
    rounding = total if reason is None else None
    return Passage(rows, moved, size, walk.discrepancy, walk.error, rounding, reason)


def _rest(
    networks: Networks, samples: Iterable[Tensor], done: tuple[int, float, float], reason: str
) -> Passage:
    """Measure the outputs of the batches that are left, where float64 has failed."""
    rest = measure_outputs(networks.own or (networks.dense, networks.current), samples, reason)
    rows, moved, size = done
    return Passage(
        rows + rest.rows,
        math.hypot(moved, rest.measured),
        math.hypot(size, rest.size),
        {},
        {},
        None,
        reason,
    )


@contextmanager
def _received(network: nn.Module, name: str | None) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """Collect the inputs and responses of a layer."""
    seen: list[tuple[Tensor, Tensor]] = []
    if name is None:
        yield seen
        return

    def keep(_: nn.Module, received: tuple[Tensor, ...], answered: Tensor) -> None:
        seen.append((received[0].double(), answered.double()))

    handle = network.get_submodule(name).register_forward_hook(keep)
    try:
        yield seen
    finally:
        handle.remove()


def _same_graph(networks: Networks, batch: Tensor, own: Tensor) -> bool:
    """Whether the graph, in the dense network's own type, computes what its forward pass did."""
    with torch.no_grad():
        found = fx.Interpreter(networks.dense, graph=networks.graph).run(batch.clone())
    return not math.isfinite(norm(own)) or norm(found.double() - own.double()) <= _SAME * norm(own)


class Walk:
    """Runs both networks in float64, node by node, side by side; sums up what the bounds need.

    Parameters
    ----------
    networks : Networks
        Both networks and their graph.
    changed : mapping from str to {"relu", "linear"}
        What follows each changed layer, by name.
    gains : pair of mapping from fx.Node to Gain
        Factors from each node to the output, of the dense and of the current network.

    Attributes
    ----------
    discrepancy, error : dict from str to float
        e_j by changed layer, over all batches so far, and the same before the activation.
    overflow : str
        Name of the first node with a value that is not finite, or empty.
    unfollowed : str or None
        Name of the node whose rounding has no bound at the output, with the reason.
    """

    def __init__(self, networks: Networks, changed: Mapping[str, Follows], gains: Gains) -> None:
        own = next(p.dtype for p in networks.dense.parameters() if p.is_floating_point())
        self._largest = torch.finfo(own).max
        self._graph = networks.graph
        self._shapes = networks.shapes
        self._changed = changed
        self._gains = gains
        self._networks = tuple(
            copy.deepcopy(network).double() for network in (networks.dense, networks.current)
        )
        self._modules = tuple(dict(network.named_modules()) for network in self._networks)
        modules = self._modules[0]
        self._below = self._downstream()
        self._last_use = {
            argument: node for node in self._graph.nodes for argument in node.all_input_nodes
        }
        rounding = [node for node in self._graph.nodes if _may_round(node, modules)]
        self.unfollowed = _unfollowed(rounding, modules, gains)
        watched = [node for node in rounding if any(gain[node].value != 0 for gain in gains)]
        self._losses = tuple(dict.fromkeys(() if self.unfollowed else watched, 0.0) for _ in gains)
        self.discrepancy: dict[str, float] = dict.fromkeys(changed, 0.0)
        self.error: dict[str, float] = dict.fromkeys(changed, 0.0)
        self.overflow = ""

    def _downstream(self) -> set[fx.Node]:
        """Return the nodes whose values differ between the networks; the others are computed once.

        All nodes, where a node overwrites a value with other users: the networks must not share it
        then.
        """
        if any(overwrites(node, self._modules[0]) for node in self._graph.nodes):
            return set(self._graph.nodes)
        below: set[fx.Node] = set()
        for node in self._graph.nodes:
            called = node.op == "call_module" and str(node.target) in self._changed
            if called or any(parent in below for parent in node.all_input_nodes):
                below.add(node)
        return below

    def __call__(self, batch: Tensor) -> list[Tensor]:
        """Run one batch; return the outputs of both networks."""
        values: dict[fx.Node, list[Any]] = {}
        inputs = iter([batch])
        for node in self._graph.nodes:
            if node.op == "output":
                return [self._value(node.args[0], values, which) for which in (0, 1)]
            if node.op == "placeholder":
                default = node.args[0] if node.args else None
                given = next(inputs, default)
                values[node] = [_wide(given), _wide(given) if node in self._below else None]
                continue
            first = self._run(node, values, 0)
            second = self._run(node, values, 1) if node in self._below else None
            values[node] = [first, second]
            for parent in node.all_input_nodes:
                if self._last_use[parent] is node:
                    del values[parent]
        raise ValueError("graph: has no output")

    def _value(self, node: Any, values: Mapping[fx.Node, list[Any]], which: int) -> Any:
        return values[node][which if node in self._below else 0]

    def _run(self, node: fx.Node, values: Mapping[fx.Node, list[Any]], which: int) -> Any:
        """Run a node of one of the networks; watch it."""
        modules = self._modules[which]

        def value_of(parent: fx.Node) -> Any:
            value = self._value(parent, values, which)
            # An in-place node gets a copy, since both networks share values.
            return value.clone() if in_place and isinstance(value, Tensor) else value

        in_place = len(self._below) < len(self._graph.nodes) and _works_in_place(node, modules)
        args = fx.map_arg(node.args, value_of)
        kwargs = fx.map_arg(node.kwargs, value_of)
        watched = node in self._losses[which]
        received: dict[fx.Node, tuple[float, int]] = {}
        if watched:
            for parent in node.all_input_nodes:
                value = self._value(parent, values, which)
                if isinstance(value, Tensor) and value.is_floating_point():
                    received[parent] = norm(value), value.numel()
        name = str(node.target)
        if which == 0 and node.op == "call_module" and name in self._changed:
            inputs = args[0] if args else next(iter(kwargs.values()))
            new = self._modules[1][name](inputs)
        else:
            new = None
        found = _call(node, args, kwargs, self._networks[0], modules)
        if new is not None:
            self._compare(name, new, found)
        if watched:
            sizes = {parent: size for parent, (size, _) in received.items()}
            if operation(node, modules) == "add":  # a smaller operand is repeated
                for parent, (size, count) in received.items():
                    sizes[parent] = size * math.sqrt(max(found.numel() / max(count, 1), 1.0))
            lost = self._allowance(node, sizes, found, which)
            if not (math.isfinite(lost) and self._fits(found)):
                self.overflow = self.overflow or describe(node, modules)
            self._losses[which][node] = math.hypot(self._losses[which][node], lost)
        return found

    def _fits(self, value: Tensor) -> bool:
        """Whether the networks' own type can hold a value."""
        return norm(value) <= self._largest or float(value.abs().max()) <= self._largest

    def _compare(self, name: str, new: Tensor, old: Tensor) -> None:
        """Add to a changed layer's discrepancy, activated where a ReLU follows."""
        self.error[name] = math.hypot(self.error[name], norm(new - old))
        if self._changed[name] == "relu":
            new, old = new.clamp(min=0), old.clamp(min=0)
        self.discrepancy[name] = math.hypot(self.discrepancy[name], norm(new - old))

    def total(self) -> float:
        """Sum (*) over both networks, with both factors for the given one.

        Returns
        -------
        float
            Bound on what rounding adds, in the output's unit.
        """
        given, gains = self._gains
        total = 0.0
        for node, lost in self._losses[0].items():
            factors = cast("float", given[node].value), cast("float", gains[node].value)
            # Where the networks do not differ the second was not run: its loss is the same.
            again = self._losses[1][node] if node in self._below else lost
            total += lost * sum(factors) + again * factors[1]
        return total

    def response_loss(self, name: str, received: Tensor, answered: Tensor) -> float:
        """How far a response in the own type is from the exact one on the same inputs, at most.

        Parameters
        ----------
        name : str
            Name of the layer.
        received : Tensor
            Its inputs.
        answered : Tensor
            Its response in the own type.

        Returns
        -------
        float
            In the response's unit.
        """
        node = next(n for n in self._graph.nodes if n.op == "call_module" and n.target == name)
        with torch.no_grad():
            exact = self._modules[1][name](received)
        parents = dict.fromkeys(node.all_input_nodes, norm(received))
        return norm(exact - answered) + self._allowance(node, parents, exact, 1)

    def _allowance(
        self, node: fx.Node, sizes: Mapping[fx.Node, float], value: Tensor, which: int
    ) -> float:
        """Bound the error of computing a node in float64.

        A sum of K products x_i w_i is off by at most K u sum |x_i| |w_i| and K times the smallest
        number (Higham, Accuracy and Stability, section 3.1), in any order, with u the unit
        roundoff; over all entries, sum |x_i| |w_i| has a Frobenius norm of at most |X|_F |W|_F.
        The other operations work entry by entry, or sum K entries with fixed factors.
        """
        modules = self._modules[which]
        kind = operation(node, modules)
        terms, constants = _TERMS, 0.0
        if kind == "layer":
            module = modules[str(node.target)]
            size = known_kind(module).magnitude(module) * sum(sizes.values())
            terms += cast("Tensor", module.weight)[0].numel()
            if isinstance(module.bias, Tensor):
                rows = value.numel() / value.shape[known_kind(module).channel_axis(value.ndim)]
                constants = math.sqrt(rows) * norm(module.bias.detach())
        elif kind == "add":
            size = sum(list(node.args).count(parent) * sizes[parent] for parent in sizes)
        else:
            size = sum(self._factor(node, parent, which) * sizes[parent] for parent in sizes)
            fan_in = (_fan_in(kind, self._shapes[parent]) for parent in sizes)
            terms += max(fan_in, default=0)
            if kind == "batch_norm":
                rows = value.numel() / value.shape[1]
                constants = math.sqrt(rows) * _shift(modules[str(node.target)])
        rounded = 2 * _ROUNDOFF * (size + constants + norm(value))
        lost = terms * (rounded + _UNDERFLOW * math.sqrt(value.numel()))
        if kind == "softplus":
            # Beyond the threshold torch returns x itself, log(1 + exp(-beta x))/beta too little.
            threshold = setting(node, modules, 2, "threshold", 20)
            beta = setting(node, modules, 1, "beta", 1)
            lost += math.sqrt(value.numel()) * math.exp(-threshold) / beta
        return lost

    def _factor(self, node: fx.Node, source: fx.Node, which: int) -> float:
        """Factor of an operation other than a layer; infinity where none is known."""
        found = factor(node, source, self._modules[which], lambda *_: math.inf, self._shapes)
        return math.inf if isinstance(found, str) else found


def _unfollowed(
    nodes: Iterable[fx.Node], modules: Mapping[str, nn.Module], gains: Gains
) -> str | None:
    """Say which node's rounding cannot be followed to the output, if there is one."""
    for node in nodes:
        for gain in gains:
            if gain[node].value is None:
                return (
                    f"rounding in {describe(node, modules)} cannot be followed to the output: "
                    f"{gain[node].reason}"
                )
    return None


def _may_round(node: fx.Node, modules: Mapping[str, nn.Module]) -> bool:
    if node.op not in ("call_module", "call_function", "call_method"):
        return False
    return operation(node, modules) not in _EXACT


def _works_in_place(node: fx.Node, modules: Mapping[str, nn.Module]) -> bool:
    """Whether a node may write into its argument: by its name, or by torch's `inplace`."""
    name = getattr(node.target, "__name__", str(node.target)).rpartition(".")[2]
    named = node.op != "call_module" and (name.endswith("_") or name in _AUGMENTED)
    return named or setting(node, modules, 99, "inplace", False) is True


_AUGMENTED = ("iadd", "isub", "imul", "itruediv")  # names of Python's in-place operators


def _call(
    node: fx.Node,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    dense: nn.Module,
    modules: Mapping[str, nn.Module],
) -> Any:
    """Compute a node; constants, which tracing may have made, are the dense network's."""
    if node.op == "call_module":
        return modules[str(node.target)](*args, **kwargs)
    if node.op == "call_method":
        return getattr(args[0], str(node.target))(*args[1:], **kwargs)
    if node.op == "call_function":
        return cast("Callable[..., Any]", node.target)(*args, **kwargs)
    owner, _, name = str(node.target).rpartition(".")
    return _wide(getattr(dense.get_submodule(owner), name))


def _wide(value: Any) -> Any:
    """Copy a floating-point tensor into float64; return any other value as it is."""
    if isinstance(value, Tensor) and value.is_floating_point():
        return value.detach().to(torch.float64, copy=True)
    return value


def _fan_in(kind: str | None, source: Sequence[int]) -> int:
    """Bound the number of entries of a sample that are summed into one entry."""
    if kind in ("softmax", "log_softmax"):
        return max(source)
    if kind in ("avg_pool1d", "avg_pool2d", "adaptive_avg_pool", "mean"):
        return math.prod(source[1:])
    return 0


def _shift(layer: nn.Module) -> float:
    """Bound the size of a batch norm's shift: 2 |mu gamma / sigma| + |beta| over its channels."""
    mean = cast("Tensor", layer.running_mean)
    shift = norm(layer.bias.detach()) if isinstance(layer.bias, Tensor) else 0.0
    return 2 * norm(mean * batch_norm_scale(layer)) + shift
