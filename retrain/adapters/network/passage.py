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

import logging
import math
from collections import ChainMap
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor, fx

from retrain.adapters.network.capture import arguments_of, label, name_of
from retrain.adapters.network.fold import batch_norm_shift
from retrain.adapters.network.frontier import Frontier, Plan, Values
from retrain.adapters.network.gain import (
    DROPOUTS,
    MOVES,
    Network,
    factor,
    shape_of,
)
from retrain.adapters.network.sites import OPERATIONS, operator_norm
from retrain.stream.stream import Follows, Gain, Passage
from solvers.arrays import norm

_log = logging.getLogger(__name__)

# Operations without rounding: they only move values, select some, or change their sign (derived).
_EXACT = {
    *MOVES,
    *DROPOUTS,
    "relu",
    "neg",
    "abs",
    "max_pool1d",
    "max_pool2d",
    "max_pool3d",
    "pad",
    "constant_pad_nd",
    "expand",
    "cat",
    "stack",
    "clamp",
    "clamp_min",
    "clamp_max",
    "hardtanh",
    "relu6",
    "upsample_nearest1d",
    "upsample_nearest2d",
    "upsample_nearest3d",
    "to",
    "_to_copy",
    "embedding",
}
_SUMS = ("add", "sub", "rsub")
_ROUNDOFF = 2.0**-53  # unit roundoff of float64 (derived from its 53 bits)
_UNDERFLOW = 2.0**-1074  # smallest positive float64: the error of a product that underflows

_TERMS = 8
"""Roundings counted per entry of an elementwise operation. An exp, a division and a product have
fewer. A smaller number could make a bound wrong, a larger one loosens it slightly. Chosen by hand
with a margin."""

WIDE = dict.fromkeys((torch.float16, torch.bfloat16, torch.float32), torch.float64)
"""Types that operations ask for, and what they get in float64."""

Tables = tuple[Mapping[str, Tensor], Mapping[str, Tensor]]
"""Parameters and buffers by name, of the dense and of the current network."""

Gains = tuple[Mapping[fx.Node, Gain], Mapping[fx.Node, Gain]]
"""Factors to the output with the given weights, and with the current ones."""

Outputs = tuple[Callable[[int], Tensor], Callable[[int], Tensor]]
"""From the number of a batch to the outputs of the dense and of the current network."""


@dataclass(frozen=True, eq=False)
class Pair:
    """The dense network and the retrained one, with their graph and their samples.

    Attributes
    ----------
    plan : Plan
        Captured graph of both.
    tensors : Tables
        Their parameters and buffers, as layers are solved: half types in float32.
    own : Outputs or None
        The same two in the types that they are saved in; None where those are the types that they
        are solved in.
    feed : callable
        From the number of a batch to the inputs' tensors.
    batches : int
        Number of batches.
    """

    plan: Plan
    tensors: Tables
    own: Outputs | None
    feed: Callable[[int], list[Tensor]]
    batches: int


@dataclass(frozen=True, eq=False)
class Changed:
    """One call of a layer whose weights differ.

    Attributes
    ----------
    name : str
        Name of the layer.
    follows : {"relu", "linear"}
        Activation after its response.
    nodes : tuple of fx.Node
        From the call to the response.
    """

    name: str
    follows: Follows
    nodes: tuple[fx.Node, ...]


def measure_outputs(
    outputs: Outputs, batches: Iterable[int], reason: str | None, samples: int
) -> Passage:
    """Measure the outputs alone, for networks that are equal or have no factors.

    Parameters
    ----------
    outputs : Outputs
        Both networks.
    batches : iterable of int
        Numbers of the batches.
    reason : str or None
        Why there is no bound; None for equal networks.
    samples : int
        Number of samples, for the report.

    Returns
    -------
    Passage
        Deviation of the outputs, without discrepancies.
    """
    moved, size = 0.0, 0.0
    for batch in batches:
        before, after = (output(batch) for output in outputs)
        moved = math.hypot(moved, norm(after.double() - before.double()))
        size = math.hypot(size, norm(before))
    return Passage(samples, moved, size, {}, {}, 0.0 if reason is None else None, reason)


def measure(
    pair: Pair,
    changed: Sequence[Changed],
    gains: Gains,
    last: fx.Node | None,
    samples: int,
) -> Passage:
    """Send samples through both networks, in their own dtypes and in float64.

    Parameters
    ----------
    pair : Pair
        The two networks.
    changed : list of Changed
        Calls of the layers whose weights differ.
    gains : Gains
        Factors to the output.
    last : fx.Node or None
        Call of the layer whose response is the output, if there is one.
    samples : int
        Number of samples.

    Returns
    -------
    Passage
        Deviations, discrepancies and the allowance for rounding.

    Notes
    -----
    Cost: two forward passes in the own dtype and up to two in float64 per batch. Memory: copies of
    both networks' tensors in float64, and the live values of one batch.

    References
    ----------
    Higham, Accuracy and Stability of Numerical Algorithms, section 3.1 (sums of products).
    """
    walk = Walk(pair, changed, gains)
    moved, size, own = 0.0, 0.0, [0.0, 0.0, 0.0]
    for batch in range(pair.batches):
        _log.info("bounds: both networks on batch %d of %d", batch + 1, pair.batches)
        seen: list[tuple[Tensor, Tensor]] = []
        ends = [
            _own_output(pair, tensors, batch, last if which else None, seen)
            for which, tensors in enumerate(pair.tensors)
        ]
        saved = ends if pair.own is None else [output(batch) for output in pair.own]
        moved = math.hypot(moved, norm(saved[1].double() - saved[0].double()))
        size = math.hypot(size, norm(saved[0]))
        try:
            wide = walk(batch)
        except ValueError as error:
            text = str(error.__cause__ or error).partition("\n")[0]
            outputs = pair.own or cast("Outputs", tuple(_outputs_of(pair, t) for t in pair.tensors))
            rest = range(batch + 1, pair.batches)
            left = measure_outputs(outputs, rest, f"not in float64: {text}", samples)
            return replace(
                left,
                measured=math.hypot(moved, left.measured),
                size=math.hypot(size, left.size),
            )
        # What half types lose beyond float32 comes on top, by the triangle inequality.
        halves = [norm(a.double() - b.double()) for a, b in zip(saved, ends, strict=True)]
        apart = [norm(end.double() - exact) for end, exact in zip(ends, wide, strict=True)]
        apart = [a + b for a, b in zip(apart, halves, strict=True)]
        lost = [walk.response_loss(cast("fx.Node", last), *values) for values in seen]
        own = [math.hypot(*both) for both in zip(own, [*apart, *(lost or [0.0])], strict=True)]
    reason = walk.unfollowed
    total = sum(own) + walk.total()
    if reason is None and (walk.overflow or not math.isfinite(total)):
        reason = f"{walk.overflow or 'an output'} overflows"
    rounding = total if reason is None else None
    return Passage(samples, moved, size, walk.discrepancy, walk.error, rounding, reason)


def _outputs_of(pair: Pair, tensors: Mapping[str, Tensor]) -> Callable[[int], Tensor]:
    return lambda batch: _own_output(pair, tensors, batch, None, [])


def _own_output(
    pair: Pair,
    tensors: Mapping[str, Tensor],
    batch: int,
    last: fx.Node | None,
    seen: list[tuple[Tensor, Tensor]],
) -> Tensor:
    """Run a batch in the own dtype; collect what one layer received and answered."""
    frontier = Frontier(pair.plan, tensors, pair.feed, pair.batches, math.inf)

    def look(node: fx.Node, values: Values) -> None:
        if node is last:
            received = frontier.value(arguments_of(node)[OPERATIONS[name_of(node)].input], values)
            seen.append((received.double(), values[node].double()))

    values = frontier.run(batch, 0, len(pair.plan.nodes), look)
    return cast("Tensor", frontier.value(pair.plan.captured.output, values))


class Walk:
    """Runs both networks in float64, node by node, side by side; sums up what the bounds need.

    Parameters
    ----------
    pair : Pair
        Both networks and their graph.
    changed : list of Changed
        Calls of the layers whose weights differ.
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

    def __init__(self, pair: Pair, changed: Sequence[Changed], gains: Gains) -> None:
        floating = [t.dtype for t in pair.tensors[0].values() if t.is_floating_point()]
        self._largest = torch.finfo(floating[0]).max
        self._plan = pair.plan
        self._ends = {one.nodes[-1]: one for one in changed}
        self._chains = {node for one in changed for node in one.nodes}
        self._gains = gains
        constants = {node: _wide(value) for node, value in pair.plan.captured.constants.items()}
        wide = Plan(replace(pair.plan.captured, constants=constants), types=WIDE)
        dense = {name: _wide(tensor) for name, tensor in pair.tensors[0].items()}
        current = {
            name: dense[name] if _equal(tensor, pair.tensors[0][name]) else _wide(tensor)
            for name, tensor in pair.tensors[1].items()
        }
        self._frontiers = tuple(
            Frontier(wide, table, lambda batch: [_wide(v) for v in pair.feed(batch)], 0, 0)
            for table in (dense, current)
        )
        self._networks = tuple(
            Network(wide, lambda node, f=frontier: f.value(node, {}), lambda *_: math.inf)  # type: ignore[misc]
            for frontier in self._frontiers
        )
        self._magnitudes: dict[tuple[fx.Node, int], float] = {}
        self._below = self._downstream()
        rounding = [node for node in pair.plan.captured.graph.nodes if _may_round(node)]
        self.unfollowed = self._unfollowed(rounding)
        watched = [node for node in rounding if any(gain[node].value != 0 for gain in gains)]
        self._losses = tuple(dict.fromkeys(() if self.unfollowed else watched, 0.0) for _ in gains)
        names = dict.fromkeys(one.name for one in changed)
        self.discrepancy: dict[str, float] = dict.fromkeys(names, 0.0)
        self.error: dict[str, float] = dict.fromkeys(names, 0.0)
        self.overflow = ""

    def _downstream(self) -> set[fx.Node]:
        """Return the nodes whose values differ between the networks; the others run once."""
        below: set[fx.Node] = set()
        for node in self._plan.nodes:
            if node in self._chains or any(parent in below for parent in node.all_input_nodes):
                below.add(node)
        return below

    def _unfollowed(self, nodes: Iterable[fx.Node]) -> str | None:
        """Say which node's rounding cannot be followed to the output, if there is one."""
        for node in nodes:
            for gain in self._gains:
                if gain[node].value is None:
                    return (
                        f"rounding in {label(node)} cannot be followed to the output: "
                        f"{gain[node].reason}"
                    )
            if self._gains[0][node].value == 0 == self._gains[1][node].value:
                continue
            for parent in node.all_input_nodes:
                if name_of(node) not in OPERATIONS and parent not in self._plan.fixed:
                    found = factor(node, parent, self._networks[0])
                    if isinstance(found, str):
                        return f"rounding in {label(node)} has no bound: {found}"
        return None

    def __call__(self, batch: int) -> list[Tensor]:
        """Run one batch; return the outputs of both networks."""
        plan = self._plan
        dense: Values = dict(self._frontiers[0].values(batch))
        current: Values = {}
        moved: Values = {}
        both = (dense, ChainMap(current, dense))
        with torch.no_grad():
            for index, node in enumerate(plan.nodes):
                if node not in plan.fixed:
                    dense[node] = self._run(node, both, 0)
                    if node in self._below:
                        current[node] = self._run(node, both, 1)
                    if node in self._chains:  # the current weights on the dense inputs
                        moved[node] = self._frontiers[1].evaluate(node, ChainMap(moved, dense))
                    if node in self._ends:
                        self._compare(self._ends[node], moved[node], dense[node])
                        moved.clear()
                for parent in (*node.all_input_nodes, node):
                    if plan.last[parent] <= index:
                        dense.pop(parent, None)
                        current.pop(parent, None)
        output = plan.captured.output
        return [f.value(output, v) for f, v in zip(self._frontiers, both, strict=True)]

    def _run(self, node: fx.Node, both: Sequence[Any], which: int) -> Any:
        """Run a node of one of the networks; watch it."""
        frontier, values = self._frontiers[which], both[which]
        found = frontier.evaluate(node, values)
        if node in self._losses[which]:
            value = _first(found)
            sums = name_of(node) in _SUMS
            sizes = {
                # A smaller operand of a sum is repeated.
                parent: norm(received)
                * (math.sqrt(max(value.numel() / max(received.numel(), 1), 1.0)) if sums else 1.0)
                for parent in node.all_input_nodes
                if isinstance(received := frontier.value(parent, values), Tensor)
                and received.is_floating_point()
            }
            lost = self._allowance(node, sizes, value, which)
            if not (math.isfinite(lost) and self._fits(value)):
                self.overflow = self.overflow or label(node)
            self._losses[which][node] = math.hypot(self._losses[which][node], lost)
        return found

    def _fits(self, value: Tensor) -> bool:
        """Whether the networks' own type can hold a value."""
        return norm(value) <= self._largest or float(value.abs().max()) <= self._largest

    def _compare(self, changed: Changed, new: Tensor, old: Tensor) -> None:
        """Add to a changed layer's discrepancy, activated where a ReLU follows."""
        name = changed.name
        self.error[name] = math.hypot(self.error[name], norm(new - old))
        if changed.follows == "relu":
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

    def response_loss(self, node: fx.Node, received: Tensor, answered: Tensor) -> float:
        """How far a response in the own type is from the exact one on the same inputs, at most.

        Parameters
        ----------
        node : fx.Node
            Call of the layer.
        received : Tensor
            Its inputs.
        answered : Tensor
            Its response in the own type.

        Returns
        -------
        float
            In the response's unit.
        """
        source = arguments_of(node)[OPERATIONS[name_of(node)].input]
        with torch.no_grad():
            exact = self._frontiers[1].evaluate(node, {source: received})
        return norm(exact - answered) + self._allowance(node, {source: norm(received)}, exact, 1)

    def _allowance(
        self, node: fx.Node, sizes: Mapping[fx.Node, float], value: Tensor, which: int
    ) -> float:
        """Bound the error of computing a node in float64.

        A sum of K products x_i w_i is off by at most K u sum |x_i| |w_i| and K times the smallest
        number (Higham, Accuracy and Stability, section 3.1), in any order, with u the unit
        roundoff; over all entries, sum |x_i| |w_i| has a Frobenius norm of at most |X|_F |W|_F.
        The other operations work entry by entry, or sum K entries with fixed factors.
        """
        kind, arguments = name_of(node), arguments_of(node)
        value_of = self._networks[which].value
        terms, constants = _TERMS, 0.0
        if kind in OPERATIONS:
            how = OPERATIONS[kind]
            weight = value_of(arguments[how.weight])
            size = self._magnitude(node, which) * sizes[arguments[how.input]]
            terms += how.matrix(weight, arguments, 0).shape[0]
            bias = arguments.get(how.bias) if how.bias else None
            if bias is not None:
                rows = value.numel() / value.shape[how.channel_axis]
                constants = math.sqrt(rows) * norm(value_of(bias))
        elif kind in _SUMS:
            alpha = max(abs(float(arguments.get("alpha", 1))), 1.0)
            operands = [arguments[name] for name in ("self", "other")]
            size = alpha * sum(sizes[one] for one in operands if one in sizes)
        else:
            moving = [parent for parent in sizes if parent not in self._plan.fixed]
            size = sum(self._factor(node, parent, which) * sizes[parent] for parent in moving)
            terms += max((_fan_in(kind, parent) for parent in moving), default=0)
            if kind == "batch_norm":
                rows = value.numel() / value.shape[1]
                constants = math.sqrt(rows) * self._shift(node, which)
        rounded = 2 * _ROUNDOFF * (size + constants + norm(value))
        lost = terms * (rounded + _UNDERFLOW * math.sqrt(value.numel()))
        if kind == "softplus":
            # Beyond the threshold torch returns x itself, log(1 + exp(-beta x))/beta too little.
            threshold, beta = arguments["threshold"], arguments["beta"]
            lost += math.sqrt(value.numel()) * math.exp(-threshold) / beta
        return lost

    def _magnitude(self, node: fx.Node, which: int) -> float:
        """Bound F with |sum_i |x_i| |w_i||_F <= F |X|_F over all entries of a layer's response."""
        key = node, which if node in self._chains else 0
        if key not in self._magnitudes:
            arguments, how = arguments_of(node), OPERATIONS[name_of(node)]
            weight = self._networks[which].value(arguments[how.weight])
            self._magnitudes[key] = operator_norm(how, weight, arguments, "frobenius")
        return self._magnitudes[key]

    def _shift(self, node: fx.Node, which: int) -> float:
        """Bound the size of a batch norm's shift over its channels: 2 |mu gamma / sigma| + |beta|.

        The mean is subtracted before the product, so both its parts can be rounded.
        """
        value_of = self._networks[which].value
        bias = arguments_of(node)["bias"]
        added = norm(value_of(bias)) if bias is not None else 0.0
        return 2 * (norm(batch_norm_shift(node, value_of)) + added) + added

    def _factor(self, node: fx.Node, source: fx.Node, which: int) -> float:
        """Factor of an operation other than a layer; infinity where none is known."""
        found = factor(node, source, self._networks[which])
        return math.inf if isinstance(found, str) else found


def _may_round(node: fx.Node) -> bool:
    """Tell whether a node computes floating-point numbers from others."""
    if node.op != "call_function" or not node.all_input_nodes or name_of(node) in _EXACT:
        return False
    value = _first(node.meta.get("val"))
    return isinstance(value, Tensor) and value.is_floating_point()


def _first(value: Any) -> Any:
    """Return a value, or the first of several."""
    return value[0] if isinstance(value, tuple | list) and value else value


def _equal(one: Tensor, other: Tensor) -> bool:
    return one is other or (one.dtype == other.dtype and torch.equal(one, other))


def _wide(value: Tensor) -> Tensor:
    """Copy a floating-point tensor into float64; return any other value as it is."""
    if isinstance(value, Tensor) and value.is_floating_point():
        return value.detach().to(torch.float64, copy=True)
    return value


def _fan_in(kind: str, source: fx.Node) -> int:
    """Bound the number of entries of a sample that are summed into one entry."""
    sizes = [size for size in shape_of(source) if isinstance(size, int)]
    if kind in ("softmax", "log_softmax"):
        return max(sizes, default=0)
    summed = ("avg_pool", "adaptive_avg_pool", "mean", "sum")
    return math.prod(sizes) if kind.startswith(summed) else 0
