"""A captured network stopped at one place of its graph, for every batch of samples.

Between two places only the values that later nodes still need are kept, so that reading all layers
in the order of execution costs one forward pass in all. Parameters are looked up when a node runs:
a weight that is replaced at its node takes effect from there on.
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Callable, Mapping, MutableMapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, fx

from retrain.adapters.network.capture import Captured

_log = logging.getLogger(__name__)

Values = MutableMapping[fx.Node, Any]
"""Live values by the node that made them."""

Look = Callable[[fx.Node, Values], None]
"""Called after a node has run, with the live values."""


class Plan:
    """A captured graph's nodes in order, and how long each value lives.

    Parameters
    ----------
    captured : Captured
        Network.
    types : mapping from torch.dtype to torch.dtype, optional
        Types that operations ask for by name, and those that they get instead.
    """

    def __init__(
        self, captured: Captured, *, types: Mapping[torch.dtype, torch.dtype] | None = None
    ) -> None:
        self.captured = captured
        self._types = types or {}
        self.nodes = [n for n in captured.graph.nodes if n.op not in ("placeholder", "output")]
        self.place = {node: index for index, node in enumerate(self.nodes)}
        given = set(captured.inputs)
        self.fixed: set[fx.Node] = set()
        """Nodes that depend on no input: views of weights, constants. They are never kept."""
        for node in captured.graph.nodes:
            if node in given or node.op == "output":
                continue
            if all(parent in self.fixed for parent in node.all_input_nodes):
                self.fixed.add(node)
        self.last = {
            node: max((self.place.get(user, len(self.nodes)) for user in node.users), default=-1)
            for node in captured.graph.nodes
        }
        for node in self.nodes:
            # A view of a weight is made where it is used.
            if node in self.fixed:
                for parent in node.all_input_nodes:
                    self.last[parent] = max(self.last[parent], self.last[node])
        self.last[captured.output] = len(self.nodes)

    def filled(self, node: fx.Node, value: Callable[[fx.Node], Any]) -> tuple[Any, Any]:
        """Return a node's arguments with values in the places of nodes.

        Parameters
        ----------
        node : fx.Node
            Node.
        value : callable
            From a node to its value.

        Returns
        -------
        args, kwargs
            Arguments.
        """

        def fill(entry: Any) -> Any:
            if isinstance(entry, fx.Node):
                return value(entry)
            return self._types.get(entry, entry) if isinstance(entry, torch.dtype) else entry

        return fx.node.map_aggregate(node.args, fill), fx.node.map_aggregate(node.kwargs, fill)


class Frontier:
    """One network, dense or current, stopped before one node.

    Parameters
    ----------
    plan : Plan
        The captured graph.
    tensors : mapping from str to Tensor
        Parameters and buffers by name, looked up whenever they are used.
    feed : callable
        From the number of a batch to the inputs' tensors.
    batches : int
        Number of batches.
    memory : float
        Bytes of live values that stay in memory; what exceeds it is kept on disk.
    """

    def __init__(
        self,
        plan: Plan,
        tensors: Mapping[str, Tensor],
        feed: Callable[[int], list[Tensor]],
        batches: int,
        memory: float,
    ) -> None:
        self.plan, self.tensors, self.batches, self.memory = plan, tensors, batches, memory
        self._feed = feed
        self.place = 0
        self.ran = 0
        """Nodes run so far, over all batches: what streaming has cost."""
        self._kept: dict[int, Values] = {}
        self._answers: dict[int, tuple[fx.Node, Tensor]] = {}
        self._spilled: dict[int, dict[fx.Node, Any]] = {}
        self._folder: tempfile.TemporaryDirectory[str] | None = None

    def copy(self) -> Frontier:
        """Return another frontier at the same place.

        Returns
        -------
        Frontier
            Shares the live values.
        """
        other = Frontier(self.plan, self.tensors, self._feed, self.batches, self.memory)
        other.place = self.place
        for batch in range(self.batches if self.place else 0):
            other._keep(batch, dict(self.values(batch)))
        return other

    def values(self, batch: int) -> Values:
        """Return a batch's live values; the inputs at the start.

        Parameters
        ----------
        batch : int
            Number of the batch.

        Returns
        -------
        dict
            Values by node; not to be changed.
        """
        if batch in self._kept:
            return self._kept[batch]
        if batch in self._spilled:
            stored = load_file(self._file(batch))
            names = {str(index): node for index, node in enumerate(self._spilled[batch])}
            return {
                node: stored[name] if name in stored else self._spilled[batch][node]
                for name, node in names.items()
            }
        fed = self._feed(batch)
        return dict(zip(self.plan.captured.inputs, fed, strict=True))

    def advance(self, to: int, look: Look | None = None) -> None:
        """Run all batches up to a node.

        Parameters
        ----------
        to : int
            Place of the node to stop before.
        look : callable, optional
            Called after each node.
        """
        if to <= self.place:
            return
        for batch in range(self.batches):
            self._keep(batch, self.run(batch, self.place, to, look))
            self._answers.pop(batch, None)
        self.place = to

    def run(self, batch: int, start: int, to: int, look: Look | None = None) -> Values:
        """Run one batch from the frontier's place to another, and leave the frontier as it is.

        Parameters
        ----------
        batch : int
            Number of the batch.
        start, to : int
            Places; `start` is the frontier's own.
        look : callable, optional
            Called after each node.

        Returns
        -------
        dict
            Live values there.
        """
        return self.walk(batch, dict(self.values(batch)), start, to, look)

    def walk(
        self, batch: int, values: Values, start: int, to: int, look: Look | None = None
    ) -> Values:
        """Run one batch's live values from one place to another.

        Parameters
        ----------
        batch : int
            Number of the batch.
        values : dict
            Live values at `start`; changed.
        start, to : int
            Places.
        look : callable, optional
            Called after each node.

        Returns
        -------
        dict
            The same dictionary, with the live values at `to`.
        """
        plan = self.plan
        known = self._answers.get(batch)
        with torch.no_grad():
            for index in range(start, to):
                node = plan.nodes[index]
                if node not in plan.fixed:
                    if known is not None and known[0] is node:
                        values[node] = known[1]
                    else:
                        values[node] = self.evaluate(node, values)
                        self.ran += 1
                    if look is not None:
                        look(node, values)
                for parent in (*node.all_input_nodes, node):
                    if plan.last[parent] <= index:
                        values.pop(parent, None)
        return values

    def answer(self, batch: int, node: fx.Node, values: Values) -> Tensor:
        """Run the node that the frontier stands before, and keep its value for when it goes on.

        Parameters
        ----------
        batch : int
            Number of the batch.
        node : fx.Node
            The next node; its weight must not change before the frontier goes on.
        values : dict
            The batch's live values.

        Returns
        -------
        Tensor
            Value of the node.
        """
        known = self._answers.get(batch)
        if known is not None and known[0] is node:
            return known[1]
        value = self.evaluate(node, values)
        self.ran += 1
        held = sum(v.numel() * v.element_size() for _, v in self._answers.values())
        if held + value.numel() * value.element_size() <= self.memory:
            self._answers[batch] = (node, value)
        return value

    def value(self, node: fx.Node, values: Values) -> Any:
        """Return a node's value, made anew where it depends on no input.

        Parameters
        ----------
        node : fx.Node
            Node of the graph that has run, or depends on no input.
        values : dict
            Live values.

        Returns
        -------
        object
            Value of the node.
        """
        captured = self.plan.captured
        if node in values:
            return values[node]
        if node in captured.tensors:
            return self.tensors[captured.tensors[node]]
        if node in captured.constants:
            return captured.constants[node]
        return self.evaluate(node, values)

    def evaluate(self, node: fx.Node, values: Values) -> Any:
        """Run one node on live values.

        Parameters
        ----------
        node : fx.Node
            Node of the graph.
        values : dict
            Live values; what depends on no input is made anew.

        Returns
        -------
        object
            Value of the node.

        Raises
        ------
        ValueError
            If the operation refuses the values, such as a token id beyond the vocabulary.
        """
        if node.op == "get_attr":
            found: Any = self.plan.captured.module
            for part in str(node.target).split("."):
                found = getattr(found, part)
            return found
        target: Any = node.target
        args, kwargs = self.plan.filled(node, lambda entry: self.value(entry, values))
        try:
            return target(*args, **kwargs)
        except (RuntimeError, IndexError, TypeError, ValueError) as error:
            text = str(error).strip().split("\n")[0]
            raise ValueError(f"data: the network cannot take these samples: {text}") from error

    def _keep(self, batch: int, values: Values) -> None:
        """Keep a batch's values in memory, or on disk where they are too many."""
        self._kept.pop(batch, None)
        self._spilled.pop(batch, None)
        held = sum(_size(each) for each in self._kept.values())
        if held + _size(values) <= self.memory:
            self._kept[batch] = values
            return
        tensors = {
            str(index): value.contiguous()
            for index, value in enumerate(values.values())
            if isinstance(value, Tensor)
        }
        save_file({name: tensor.clone() for name, tensor in tensors.items()}, self._file(batch))
        self._spilled[batch] = {
            node: None if isinstance(value, Tensor) else value for node, value in values.items()
        }

    def _file(self, batch: int) -> Path:
        if self._folder is None:
            self._folder = tempfile.TemporaryDirectory(prefix="retrain-")
            _log.info(
                "streaming: activations beyond the memory allowed go to %s", self._folder.name
            )
        return Path(self._folder.name) / f"{batch}.safetensors"


def _size(values: Values) -> int:
    """Bytes of the tensors among some values."""
    return sum(v.numel() * v.element_size() for v in values.values() if isinstance(v, Tensor))
