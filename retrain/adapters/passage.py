"""One passage of the data through the given and the retrained network, for the bounds.

Let z_v be the value that the network computes at node v of its graph, in its own type, and f_v the
node's operation in exact arithmetic. The loss of a node is

    rho_v = |f_v(z_parents) - z_v|_F,

what its arithmetic lost on the values that it received. Replacing the nodes one after the other,
from the last to the first, with G(v) the factor of `retrain.adapters.gain`,

    |exact outputs - computed outputs|_F  <=  sum_v rho_v G(v).                            (*)

f_v is computed in float64, whose own error the allowance of `_allowance` covers, so that (*) holds
with nothing assumed about how errors add up: in float32 rho_v is measured, cancellation between
hidden values, underflow and reduced precision of a device included.
"""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, fx, nn

from retrain.adapters.gain import describe, factor
from retrain.adapters.operations import operation, setting
from retrain.adapters.patches import conv_lipschitz, frobenius_norm, padding
from retrain.adapters.rows import matrix
from retrain.stream import Follows, Gain, Passage
from solvers.arrays import norm

_log = logging.getLogger(__name__)

# These only move values about, pick some, or change their sign: they round nothing.
_EXACT = (
    "relu",
    "identity",
    "negate",
    "move",
    "shape",
    "max_pool",
    "select",
    "pad",
    "cat",
)
_ROUNDOFF = 2.0**-53  # unit roundoff of float64
_UNDERFLOW = 2.0**-1074  # float64's smallest number: the error of a product that underflows
# Roundings of one term of an elementwise operation: exp, a division and a product stay below.
_TERMS = 8
# Computed outputs of the graph and of the network's own forward pass may differ by the order of
# sums only. Beyond this share of their norm, the graph is not what the network computes.
_SAME = 1e-3


def measure_outputs(
    dense: nn.Module, current: nn.Module, samples: Iterable[Tensor], reason: str | None
) -> Passage:
    """Measure the outputs alone: of networks that did not change, or have no graph (`reason`)."""
    moved, size, rows = 0.0, 0.0, 0
    for batch in samples:
        with torch.no_grad():
            before, after = dense(batch.clone()), current(batch.clone())
        moved = math.hypot(moved, norm(after.double() - before.double()))
        size = math.hypot(size, norm(before))
        rows += len(batch)
    return Passage(rows, moved, size, {}, 0.0 if reason is None else None, reason)


def measure(
    graph: fx.Graph,
    dense: nn.Module,
    current: nn.Module,
    changed: Mapping[str, Follows],
    dense_gains: Mapping[fx.Node, Gain],
    gains: Mapping[fx.Node, Gain],
    shapes: Mapping[fx.Node, Any],
    samples: Iterable[Tensor],
) -> Passage:
    """Send samples through both networks, node by node.

    Parameters
    ----------
    graph : fx.Graph
        The forward pass of both.
    dense, current : nn.Module
        The given network and the retrained one, in evaluation mode.
    changed : mapping from str to {"relu", "linear"}
        The layers whose weights differ, and what follows each.
    dense_gains, gains : mapping from node to Gain
        Factors to the output with the given and with the current weights.
    shapes : mapping
        As for `retrain.adapters.gain.gains`.
    samples : iterable of Tensor
        Batches of inputs.

    Returns
    -------
    Passage

    Notes
    -----
    Costs about four forward passes in the network's own type and two in float64.
    """
    both = (dense_gains, gains)
    modules = dict(dense.named_modules())
    reason = _unfollowed(graph, modules, both)
    rounding = [node for node in graph.nodes if _may_round(node, modules)]
    watched: list[fx.Node] = []
    if reason is None:
        watched = [node for node in rounding if any(gain[node].value != 0 for gain in both)]
    new = {name: current.get_submodule(name) for name in changed}
    before = _Losses(dense, graph, watched, shapes, changed, new)
    after = _Losses(current, graph, watched, shapes, {}, {})
    moved, size, rows, between = 0.0, 0.0, 0, 0.0
    for batch in samples:
        _log.info("bounds: both networks on %d samples, after %d", len(batch), rows)
        with torch.no_grad():
            outputs = [network(batch.clone()) for network in (dense, current)]
            traced = [losses.run(batch.clone()) for losses in (before, after)]
        moved = math.hypot(moved, norm(outputs[1].double() - outputs[0].double()))
        size = math.hypot(size, norm(outputs[0]))
        rows += len(batch)
        for own, found in zip(outputs, traced, strict=True):
            # What is bounded is the graph's outputs; as far as the network's differ, add to it.
            gone = norm(own.double() - found.double())
            if reason is None and not gone <= _SAME * norm(own):
                reason = "the traced graph and the network give different outputs"
            between += gone
    total = between
    for node in watched:
        factors = [cast("float", gain[node].value) for gain in both]
        total += before.loss[node] * sum(factors) + after.loss[node] * factors[1]
    overflow = before.overflow or after.overflow
    if overflow or (reason is None and not math.isfinite(total)):
        reason = f"{overflow or 'a bound on rounding'} overflows"
    return Passage(rows, moved, size, before.discrepancy, total if reason is None else None, reason)


def _unfollowed(
    graph: fx.Graph, modules: Mapping[str, nn.Module], both: Iterable[Mapping[fx.Node, Gain]]
) -> str | None:
    """Say which node's rounding cannot be followed to the output, if there is one."""
    for gains in both:
        for node in graph.nodes:
            gain = gains[node]
            if gain.value is None and _may_round(node, modules):
                return (
                    f"rounding in {describe(node, modules)} cannot be followed to the output: "
                    f"{gain.reason}"
                )
    return None


def _may_round(node: fx.Node, modules: Mapping[str, nn.Module]) -> bool:
    if node.op not in ("call_module", "call_function", "call_method"):
        return False
    return operation(node, modules) not in _EXACT


class _Losses(fx.Interpreter):
    """Runs a network's graph and sums up, node by node, what its arithmetic lost.

    Attributes
    ----------
    loss : dict from node to float
        rho_v over all batches so far, for the nodes that can round and that the output needs.
    discrepancy : dict from str to float
        By changed layer, how far its activated response on these inputs moves with the new weights.
    overflow : str
        The first node with a value that is not finite, or empty.
    """

    def __init__(
        self,
        network: nn.Module,
        graph: fx.Graph,
        watched: Iterable[fx.Node],
        shapes: Mapping[fx.Node, Any],
        changed: Mapping[str, Follows],
        new: Mapping[str, nn.Module],
    ) -> None:
        super().__init__(network, graph=graph)
        self._modules = dict(network.named_modules())
        self._shapes = shapes
        self._changed = changed
        self._new = new
        self._wide: dict[tuple[str, bool], nn.Module] = {}
        self.loss: dict[fx.Node, float] = dict.fromkeys(watched, 0.0)
        self.discrepancy: dict[str, float] = dict.fromkeys(changed, 0.0)
        self.overflow = ""

    def run_node(self, n: fx.Node) -> Any:
        """Run a node; where it can round or has new weights, run it in float64 beside that."""
        moved = n.op == "call_module" and str(n.target) in self._changed
        if not (moved or n in self.loss):
            return super().run_node(n)
        # Copies, taken before the node runs: it may work in place.
        args, kwargs = fx.node.map_aggregate(self.fetch_args_kwargs_from_env(n), _widened)
        sizes = {
            parent: norm(value)
            for parent in n.all_input_nodes
            if isinstance(value := self.env[parent], Tensor) and value.is_floating_point()
        }
        given = super().run_node(n)
        value = given.double()
        if moved:
            self._compare(str(n.target), args[0], value)
        if n in self.loss:
            exact = self._exactly(n, args, kwargs)
            lost = norm(exact - value) + self._allowance(n, sizes, value)
            if not math.isfinite(lost):
                self.overflow = self.overflow or describe(n, self._modules)
            self.loss[n] = math.hypot(self.loss[n], lost)
        return given

    def _compare(self, name: str, inputs: Tensor, value: Tensor) -> None:
        """Add to a changed layer's discrepancy, activated where a ReLU follows."""
        response = self._twin(name, new=True)(inputs)
        if self._changed[name] == "relu":
            response, value = response.clamp(min=0), value.clamp(min=0)
        apart = norm(response - value)
        self.discrepancy[name] = math.hypot(self.discrepancy[name], apart)

    def _exactly(self, node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        """Compute a node's operation in float64."""
        if node.op == "call_module":
            return self._twin(str(node.target), new=False)(*args, **kwargs)
        if node.op == "call_method":
            return getattr(args[0], str(node.target))(*args[1:], **kwargs)
        return cast("Any", node.target)(*args, **kwargs)

    def _twin(self, name: str, *, new: bool) -> nn.Module:
        """Copy a module into float64, once."""
        if (name, new) not in self._wide:
            source = self._new if new else self._modules
            self._wide[name, new] = copy.deepcopy(source[name]).double()
        return self._wide[name, new]

    def _allowance(self, node: fx.Node, sizes: Mapping[fx.Node, float], value: Tensor) -> float:
        """Bound the error of computing a node in float64.

        A sum of K products x_i w_i is off by at most K u sum |x_i| |w_i| and K times the smallest
        number (Higham, Accuracy and Stability, section 3.1), in any order, with u the unit
        roundoff; over all entries, sum |x_i| |w_i| has a Frobenius norm of at most |X|_F |W|_F.
        The other operations work entry by entry, or sum K entries with fixed factors.
        """
        kind = operation(node, self._modules)
        terms, constants = _TERMS, 0.0
        if kind in ("linear", "conv2d"):
            module = self._twin(str(node.target), new=False)
            groups = range(getattr(module, "groups", 1))
            norms = [frobenius_norm(matrix(module, group)) for group in groups]
            step = norms[0]
            if isinstance(module, nn.Conv2d):
                # Padding by other values than zeros repeats each entry at most 2 p + 1 times.
                left, right, top, bottom = padding(module)
                repeats = (1 + left + right) * (1 + top + bottom)
                step = conv_lipschitz(module, norms)
                step *= 1 if module.padding_mode == "zeros" else math.sqrt(repeats)
            size = step * sum(sizes.values())
            terms += len(matrix(module, 0))
            if module.bias is not None:
                rows = value.numel() / value.shape[1 if kind == "conv2d" else -1]
                constants = math.sqrt(rows) * norm(cast("Tensor", module.bias).detach())
        else:
            shapes = self._shapes
            steps = {parent: self._factor(node, parent) for parent in sizes}
            size = sum(steps[parent] * sizes[parent] for parent in sizes)
            terms += max((_fan_in(kind, shapes[p], shapes[node]) for p in sizes), default=0)
            if kind == "batch_norm":
                rows = value.numel() / value.shape[1]
                constants = math.sqrt(rows) * _shift(self._twin(str(node.target), new=False))
        rounded = 2 * _ROUNDOFF * (size + constants + norm(value))
        lost = terms * (rounded + _UNDERFLOW * math.sqrt(value.numel()))
        if kind == "softplus":
            # Beyond the threshold torch returns x itself, log(1 + exp(-beta x))/beta too little.
            threshold = setting(node, self._modules, 2, "threshold", 20)
            beta = setting(node, self._modules, 1, "beta", 1)
            lost += math.sqrt(value.numel()) * math.exp(-threshold) / beta
        return lost

    def _factor(self, node: fx.Node, source: fx.Node) -> float:
        """Factor of an operation that is no layer; infinity where there is none."""
        found = factor(node, source, self._modules, lambda name: [], self._shapes)
        return math.inf if isinstance(found, str) else found


def _widened(value: Any) -> Any:
    """Copy a tensor of floating numbers into float64; leave what is none."""
    if isinstance(value, Tensor) and value.is_floating_point():
        return value.to(torch.float64, copy=True)
    return value


def _fan_in(kind: str | None, source: Sequence[int], value: Sequence[int]) -> int:
    """How many entries of a sample are summed into one, at most."""
    if kind in ("softmax", "log_softmax"):
        return max(source)
    if kind in ("avg_pool", "adaptive_avg_pool", "mean"):
        return math.prod(source[1:])
    return 0


def _shift(layer: nn.Module) -> float:
    """2 |mu gamma / sigma| + |beta| over a batch norm's channels: what its shift is made of."""
    mean, variance = cast("Tensor", layer.running_mean), cast("Tensor", layer.running_var)
    scale = 1 / torch.sqrt(variance + cast("float", layer.eps))
    if isinstance(layer.weight, Tensor):
        scale = scale * layer.weight.detach()
    shift = norm(layer.bias.detach()) if isinstance(layer.bias, Tensor) else 0.0
    return 2 * norm(mean * scale) + shift
