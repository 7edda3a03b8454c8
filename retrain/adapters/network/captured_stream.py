"""A captured torch network and a data set as a `LayerStream`.

Two frontiers (`retrain.adapters.network.frontier`), of the dense and of the current network, move
through the captured graph from layer to layer. As long as no layer before them has changed they are
one. Layers in the order of execution cost one forward pass of each network; going back to an
earlier layer begins anew.
"""

from __future__ import annotations

import copy
import hashlib
import logging
import math
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn

from retrain.adapters.network.capture import Captured, CaptureError, Inputs, arguments_of, capture
from retrain.adapters.network.find import evaluation_copy
from retrain.adapters.network.frontier import Frontier, Plan, Values
from retrain.adapters.network.recurrent import STEPS, unrolled
from retrain.adapters.network.rows import BLOCK
from retrain.adapters.network.sites import Operation, Site, find_sites, view_of
from retrain.adapters.network.structure import weights_hash
from retrain.adapters.network.tensors import HALF, check_finite, computing, named_tensors
from retrain.data.arrays import Data
from retrain.data.sources import as_data
from retrain.stream.stream import (
    Array,
    Gain,
    LayerBatch,
    LayerSpec,
    Norm,
    Passage,
    identity_hash,
    layer,
)

_log = logging.getLogger(__name__)

NO_BOUND = "the network was captured by torch.export, for whose operations no factors are known"
"""Why such a run has no bound; its outputs' deviation is measured."""

_TOKENS = 8192
"""Entries of integer inputs in a batch. More take more memory and fewer calls."""

_NUMBERS = 2**21
"""Entries of other inputs in a batch, 8 MiB in float32; at most 256 samples."""

LIVE = 2.0**30
"""Bytes of live values of each network that stay in memory; the rest is kept on disk. A larger
number spares the disk."""


class CapturedStream:
    """The layers of a torch module, captured by `torch.export`, on a data set.

    Implements `retrain.stream.stream.LayerStream` for any number and type of inputs and any nested
    outputs, of which the first (or ``logits``) counts. Layers are operations whose weight is a
    parameter (`retrain.adapters.network.sites`). There is no bound (`NO_BOUND`).

    Parameters
    ----------
    model : nn.Module
        Network; copies of it are held, and it is not changed.
    data : Data or anything that `retrain.data.sources.as_data` takes
        Samples.
    batch_size : int, optional
        Number of samples per forward pass, part of the identity; by default chosen by the size of
        a sample.
    device : str or torch.device, optional
        Device on which to compute; by default that of the module's first parameter.

    Raises
    ------
    ValueError
        If the module or the data are malformed, or the forward pass cannot be captured on them
        (`CaptureError`).

    Notes
    -----
    Memory: three copies of the network (five with half types), the data, and the live values of all
    batches at one place of the graph, beyond `LIVE` bytes on disk.
    """

    def __init__(
        self,
        model: nn.Module,
        data: Any,
        *,
        batch_size: int | None = None,
        device: str | torch.device | None = None,
    ) -> None:
        self._data: Data = as_data(data)
        given = evaluation_copy(model)
        parameters = list(given.parameters())
        if not parameters:
            raise ValueError(f"model: {type(model).__name__} has no weights")
        self._device = torch.device(device) if device is not None else parameters[0].device
        check_finite(given)
        given.requires_grad_(False).to(self._device)
        self._model = given
        self._dense = computing(copy.deepcopy(given))
        half = any(tensor.dtype in HALF for tensor in given.state_dict().values())
        self._current = computing(copy.deepcopy(given)) if half else given
        floating = [p.dtype for p in self._dense.parameters() if p.is_floating_point()]
        self._dtype = floating[0] if floating else torch.float32
        self._batch_size = batch_size or _fitting_batch(self._data)
        self._integers = self._data.integers
        self._captured = self._capture()
        self._plan = Plan(self._captured)
        self._tables = {id(m): named_tensors(m) for m in (self._dense, self._current, self._model)}
        self._sites = {s.spec.name: s for s in find_sites(self._captured, self._dense)}
        self._surveyed: dict[int, Tensor] = {}
        self._rows, self._leading = self._survey()
        self._layers = tuple(self._judged(site) for site in self._sites.values())
        self._changed: set[str] = set()
        self._frontiers: dict[bool, Frontier | None] = {True: self._begin(dense=True), False: None}
        self._identity = {
            "arrays": "torch",
            "weights": weights_hash(self._model),
            "computation": {
                "captured": _graph_hash(self._captured),
                "layers": [repr(spec) for spec in self._layers],
            },
            "data": self._data.fingerprint,
            "batch size": self._batch_size,
        }

    # --- description --------------------------------------------------------------------------

    @property
    def model(self) -> nn.Module:
        """The network as it is now, in evaluation mode and in its own dtypes."""
        return self._model

    @property
    def data(self) -> Data:
        """The samples that the stream runs on."""
        return self._data

    @property
    def device(self) -> torch.device:
        """Device of the arrays."""
        return self._device

    @property
    def network(self) -> None:
        """There is no traced network."""
        return None

    @property
    def dense_model(self) -> nn.Module:
        """The dense network in evaluation mode, half types in float32; not to be changed."""
        return self._dense

    @property
    def fingerprint(self) -> str:
        """SHA-256 of `identity`."""
        return identity_hash(self._identity)

    @property
    def identity(self) -> dict[str, Any]:
        """The dense weights, the captured graph, the layers and the data, as JSON values."""
        return self._identity

    @property
    def layers(self) -> tuple[LayerSpec, ...]:
        """All layers with weights in execution order, those that cannot be retrained included."""
        return self._layers

    @property
    def sites(self) -> Mapping[str, Site]:
        """The layers' places in the graph, by name."""
        return self._sites

    @property
    def nodes_run(self) -> int:
        """Nodes of the graph that both frontiers have run, over all batches: what reading cost."""
        return sum(f.ran for f in self._frontiers.values() if f is not None) + self._spent

    _spent = 0

    def count(self, name: str) -> int:
        """Return the number of rows of a layer.

        Parameters
        ----------
        name : str
            Name of the layer.

        Returns
        -------
        int
            Samples times positions, those that an attention mask excludes left out.
        """
        self._retrainable(name)
        return sum(self._rows_of_batch(name, batch) for batch in range(self._batches))

    # --- weights --------------------------------------------------------------------------------

    def weight(self, name: str, group: int = 0, *, dense: bool = False) -> Tensor:
        """Return a copy of a weight matrix.

        Parameters
        ----------
        name : str
            Name of the layer.
        group : int, optional
            Index of the group, from 0.
        dense : bool, optional
            Whether to return the dense network's weight instead of the current one.

        Returns
        -------
        Tensor, shape (n_in [+ 1], n_out)
            Weight matrix, the bias last.
        """
        spec = self._retrainable(name, group)
        weight, bias, how, arguments = self._parts(name, self._dense if dense else self._current)
        values = how.matrix(weight, arguments, group)
        if bias is not None:
            units = spec.shape[1]
            values = torch.cat([values, bias[group * units : (group + 1) * units][None]])
        return values.detach().clone()

    def commit(self, name: str, weight: Array, group: int = 0) -> None:
        """Replace a weight, cast to the network's own dtype; later `inputs` are computed with it.

        Parameters
        ----------
        name : str
            Name of the layer.
        weight : array, shape (n_in [+ 1], n_out)
            New weight, the bias last.
        group : int, optional
            Index of the group, from 0.

        Raises
        ------
        ValueError
            If the layer cannot be retrained, or the weight has another shape or is not finite, also
            after the cast.
        """
        spec = self._retrainable(name, group)
        wanted = (spec.shape[0] + spec.bias, spec.shape[1])
        new = weight if isinstance(weight, Tensor) else torch.tensor(np.asarray(weight))
        if tuple(new.shape) != wanted:
            raise ValueError(
                f"weight: got shape {tuple(new.shape)}, want {wanted} for layer {name!r}"
            )
        own = self._parts(name, self._model)[0].dtype
        new = new.detach().to(self._device, own)
        if not torch.isfinite(new).all():
            raise ValueError(f"weight: layer {name!r} got NaN or infinity in {own}")
        self._part_current(name)
        n_in, units = spec.shape
        with torch.no_grad():
            for network in {self._model, self._current}:
                target, bias, how, arguments = self._parts(name, network)
                values = how.unmatrix(new[:n_in], target, arguments, group)
                how.part(target, arguments, group).copy_(values)
                if bias is not None:
                    bias[group * units : (group + 1) * units].copy_(new[n_in])
        self._changed.add(name)

    def _parts(
        self, name: str, network: nn.Module
    ) -> tuple[Tensor, Tensor | None, Operation, dict[str, Any]]:
        """Return a layer's weight and bias in one of the networks, and how they are used."""
        site = self._sites[name]
        assert site.operation is not None
        table = self._tables[id(network)]
        arguments = arguments_of(site.calls[0])
        weight = view_of(arguments[site.operation.weight], self._captured, table)
        bias = arguments.get(site.operation.bias) if site.operation.bias else None
        made = None if bias is None else view_of(bias, self._captured, table)
        return weight, made, site.operation, arguments

    def _part_current(self, name: str) -> None:
        """Let the current network leave the dense one before the layer that changes."""
        first = self._plan.place[self._sites[name].calls[0]]
        current = self._frontiers[False]
        dense = self._frontiers[True]
        assert dense is not None
        if current is None:
            if dense.place <= first:
                parted = dense.copy()
                parted.tensors = self._tables[id(self._current)]
                self._frontiers[False] = parted
            else:
                self._frontiers[False] = self._begin(dense=False)
        elif current.place > first:
            self._spent += current.ran
            self._frontiers[False] = self._begin(dense=False)

    # --- activations ----------------------------------------------------------------------------

    @property
    def _batches(self) -> int:
        return -(-len(self._data) // self._batch_size)

    def _begin(self, *, dense: bool) -> Frontier:
        table = self._tables[id(self._dense if dense else self._current)]
        return Frontier(self._plan, table, self._feed, self._batches, LIVE)

    def _at(self, place: int, *, dense: bool) -> Frontier:
        """Move a frontier to a place; begin anew where it is beyond."""
        frontier = self._frontiers[dense]
        if frontier is None:
            return self._at(place, dense=True)
        if frontier.place > place:
            self._spent += frontier.ran
            frontier = self._frontiers[dense] = self._begin(dense=dense)
        frontier.advance(place)
        return frontier

    def batches(
        self, name: str, group: int = 0, *, rows: np.ndarray | None = None
    ) -> Iterator[LayerBatch]:
        """Yield the layer's rows in order.

        Parameters
        ----------
        name : str
            Name of the layer.
        group : int, optional
            Index of the group, from 0.
        rows : ndarray of int, optional
            Sorted row numbers; all rows by default.

        Yields
        ------
        LayerBatch
            Aligned rows of the current and the dense network.

        Raises
        ------
        ValueError
            If the layer cannot be retrained, or `rows` are not increasing row numbers of the layer.
        """
        self._retrainable(name, group)
        if rows is not None:
            rows = np.asarray(rows)
            count = self.count(name)
            if rows.ndim != 1 or rows.dtype.kind not in "iu" or (np.diff(rows) <= 0).any():
                raise ValueError("rows: want different row numbers in increasing order")
            if rows.size and (rows[0] < 0 or rows[-1] >= count):
                raise ValueError(f"rows: got {rows[0]} to {rows[-1]}, layer {name!r} has {count}")
        return self._read(name, group, rows)

    def _read(self, name: str, group: int, rows: np.ndarray | None) -> Iterator[LayerBatch]:
        calls = self._sites[name].calls
        place = self._plan.place[calls[0]]
        dense, current = self._at(place, dense=True), self._at(place, dense=False)
        start = 0
        for batch in range(self._batches):
            count = self._rows_of_batch(name, batch)
            chosen = np.arange(count)
            if rows is not None:
                chosen = rows[slice(*np.searchsorted(rows, (start, start + count)))] - start
            if chosen.size:
                mine = self._received(dense, name, batch, place, responses=True)
                theirs = mine
                if current is not dense:
                    theirs = self._received(current, name, batch, place, responses=False)
                yield from self._pieces(name, group, batch, mine, theirs, chosen, start)
            start += count

    def _received(
        self, frontier: Frontier, name: str, batch: int, place: int, *, responses: bool
    ) -> list[tuple[Tensor, Tensor | None]]:
        """Return what each call of a layer receives for a batch, and what it answers."""
        site = self._sites[name]
        assert site.operation is not None
        values = dict(frontier.values(batch))
        found: list[tuple[Tensor, Tensor | None]] = []
        for call in site.calls:
            if self._plan.place[call] > place:
                # Only a layer that is called again needs what lies between.
                values = frontier.walk(batch, values, place, self._plan.place[call])
                place = self._plan.place[call]
            received = frontier.value(arguments_of(call)[site.operation.input], values)
            answered = None
            if responses:
                # The dense network's weights stay, so what is answered is what comes next.
                ahead = self._plan.place[call] == frontier.place
                with torch.no_grad():
                    answered = (
                        frontier.answer(batch, call, values)
                        if ahead
                        else frontier.evaluate(call, values)
                    )
            found.append((received.to(self._dtype), answered))
        return found

    def _pieces(
        self,
        name: str,
        group: int,
        batch: int,
        mine: list[tuple[Tensor, Tensor | None]],
        theirs: list[tuple[Tensor, Tensor | None]],
        chosen: np.ndarray,
        start: int,
    ) -> Iterator[LayerBatch]:
        """Lay a batch's inputs and responses out as rows, some samples at a time."""
        spec = self._sites[name].spec
        weight, _, how, _ = self._parts(name, self._dense)
        offset = 0
        for call, (x, y), (other, _) in zip(self._sites[name].calls, mine, theirs, strict=True):
            arguments = arguments_of(call)
            assert y is not None
            kept = self._kept_rows(call, batch)
            whole = self._rows[call][self._size(batch)]
            samples = len(x) if whole % max(len(x), 1) == 0 and len(y) == len(x) else 1
            each = whole // samples
            step = max(1, BLOCK // max(1, each * (spec.shape[0] + 1))) if samples > 1 else 1
            positions = np.arange(whole) if kept is None else kept
            wanted = chosen[(chosen >= offset) & (chosen < offset + len(positions))]
            numbers = positions[wanted - offset]  # of the rows within this call
            for first in range(0, samples, step):
                low, high = first * each, min(first + step, samples) * each
                here = slice(*np.searchsorted(numbers, (low, high)))
                pick = torch.from_numpy(numbers[here] - low).to(self._device)
                if not len(pick):
                    continue
                part = slice(first, first + step) if samples > 1 else slice(None)

                def rows_of(
                    values: Tensor, part: slice = part, pick: Tensor = pick, args: Any = arguments
                ) -> Tensor:
                    found = how.rows(values[part], weight, args, group)
                    found = found if len(pick) == len(found) else found[pick]
                    if spec.bias:
                        found = torch.cat([found, found.new_ones(len(found), 1)], dim=1)
                    return found

                dense_rows = rows_of(x)
                answers = how.responses(y[part], arguments, group).to(self._dtype)
                yield LayerBatch(
                    dense_rows if other is x else rows_of(other),
                    dense_rows,
                    answers if len(pick) == len(answers) else answers[pick],
                    (wanted[here] + start).astype(np.int64),
                )
            offset += len(positions)

    def outputs(self, *, dense: bool) -> Iterator[Tensor]:
        """Yield the network's main outputs batch by batch.

        Parameters
        ----------
        dense : bool
            Whether the dense network computes them, or the current one.

        Yields
        ------
        Tensor, shape (samples, ...)
            Outputs of one batch.
        """
        if not dense and self._frontiers[False] is None:
            dense = True
        frontier = self._frontiers[dense]
        assert frontier is not None
        end = len(self._plan.nodes)
        for batch in range(self._batches):
            if dense and frontier.place == 0 and batch in self._surveyed:
                yield self._surveyed[batch]
                continue
            # The frontier stays where it is: layers after it are still to be read.
            values = frontier.run(batch, frontier.place, end)
            yield frontier.value(self._captured.output, values).detach()

    def _inputs(self, start: int, stop: int) -> Inputs:
        """Copy samples to the device; integers stay integers where the network takes them."""
        found = []
        for name, values in self._data.arguments(integers=self._integers):
            part = torch.tensor(values[start:stop], device=self._device)
            found.append((name, part.to(self._dtype) if part.is_floating_point() else part))
        return tuple(found)

    def _feed(self, batch: int) -> list[Tensor]:
        start = batch * self._batch_size
        found = self._inputs(start, min(start + self._batch_size, len(self._data)))
        return [value for _, value in found]

    # --- bounds ---------------------------------------------------------------------------------

    def gain(self, name: str, *, norm: Norm = "spectral") -> Gain:
        """Return no factor: none is known for captured operations.

        Parameters
        ----------
        name : str
            Name of the layer.
        norm : {"spectral", "frobenius"}
            Norm of the later layers' weights.

        Returns
        -------
        Gain
            Without a value.
        """
        layer(self, name)
        return Gain(None, NO_BOUND)

    def output_layer(self) -> tuple[str | None, str]:
        """Return no layer: what lies behind it is not followed.

        Returns
        -------
        name : None
            There is none.
        reason : str
            Why.
        """
        return None, NO_BOUND

    def passage(self) -> Passage:
        """Send the data through what is left of both networks, and measure the outputs.

        Returns
        -------
        Passage
            Deviations of the outputs and of the changed layers, without an allowance for rounding.
        """
        moved = size = 0.0
        for mine, theirs in zip(self.outputs(dense=True), self.outputs(dense=False), strict=True):
            wide = mine.double()
            moved = math.hypot(moved, float((theirs.double() - wide).norm()))
            size = math.hypot(size, float(wide.norm()))
        return Passage(
            len(self._data), moved, size, {}, {}, None, NO_BOUND if self._changed else None
        )

    # --- checks at the start --------------------------------------------------------------------

    def _capture(self) -> Captured:
        """Capture the network on the first samples; integer inputs may have to be numbers."""
        count = min(len(self._data), self._batch_size)

        def example() -> Inputs:
            found = self._inputs(0, count)
            if count == 1:  # a batch of one would fix the batch axis
                found = tuple((name, torch.cat([value, value])) for name, value in found)
            return found

        network = unrolled(self._dense) if self._longest() <= STEPS else self._dense
        try:
            captured = capture(network, example())
        except CaptureError as refused:
            if not self._integers:
                raise
            self._integers = False
            try:
                captured = capture(network, example())
            except CaptureError:
                raise refused from None
        if captured.batch is not None and self._batch_size != 1:
            _log.info("reading: the network fixes its batch; one sample is sent at a time")
            self._batch_size = 1
            captured = capture(network, self._inputs(0, 1))
        return captured

    def _longest(self) -> int:
        """Largest size of an input's second axis: the steps of a sequence, if it is one."""
        arrays = self._data.arguments(integers=True)
        return max((v.shape[1] for _, v in arrays if v.ndim > 1), default=1)

    def _size(self, batch: int) -> int:
        """Samples of a batch."""
        return min(self._batch_size, len(self._data) - batch * self._batch_size)

    def _survey(self) -> tuple[dict[fx.Node, dict[int, int]], dict[fx.Node, tuple[int, ...]]]:
        """Run a first and a last batch: how many rows each call has, by the batch's size."""
        calls = {
            call: site.operation
            for site in self._sites.values()
            if site.operation is not None
            for call in site.calls
        }
        rows: dict[fx.Node, dict[int, int]] = {call: {} for call in calls}
        leading: dict[fx.Node, tuple[int, ...]] = {}
        frontier = self._begin(dense=True)
        for batch in sorted({0, self._batches - 1}):
            size = self._size(batch)

            def look(node: fx.Node, values: Values, size: int = size) -> None:
                how = calls.get(node)
                if how is None:
                    return
                answered = values[node]
                rows[node][size] = len(how.responses(answered, arguments_of(node), 0))
                received = frontier.value(arguments_of(node)[how.input], values)
                if size == self._size(0):
                    leading[node] = tuple(received.shape[:-1])

            values = frontier.run(batch, 0, len(self._plan.nodes), look)
            output = frontier.value(self._captured.output, values)
            self._surveyed[batch] = output.detach()
            if output.shape[:1] != (size,):
                raise ValueError(
                    f"model: returned {tuple(output.shape)} for {size} samples, want an output "
                    "whose first axis is the sample"
                )
        self._spent += frontier.ran
        return rows, leading

    def _kept_rows(self, call: fx.Node, batch: int) -> np.ndarray | None:
        """Numbers of a call's rows that are not padding; None where all count."""
        mask = self._data.mask
        shape = self._leading.get(call)
        if mask is None or shape is None or shape[:2] != (self._size(0), mask.shape[1]):
            return None
        if len(shape) != 2:
            return None
        start = batch * self._batch_size
        return np.flatnonzero(mask[start : start + self._batch_size].reshape(-1))

    def _rows_of_batch(self, name: str, batch: int) -> int:
        total = 0
        for call in self._sites[name].calls:
            kept = self._kept_rows(call, batch)
            total += self._rows[call][self._size(batch)] if kept is None else len(kept)
        return total

    def _judged(self, site: Site) -> LayerSpec:
        """A layer's description; a reason where the data does not reach it."""
        spec = site.spec
        if spec.reason is None and not all(self._rows[call] for call in site.calls):
            return replace(spec, reason="the forward pass does not reach it on this data")
        return spec

    def _retrainable(self, name: str, group: int = 0) -> LayerSpec:
        spec = layer(self, name)
        if spec.reason is not None:
            raise ValueError(f"name: layer {name!r} cannot be retrained: {spec.reason}")
        if not 0 <= group < spec.groups:
            raise ValueError(f"group: got {group}, layer {name!r} has {spec.groups}")
        return spec


def _fitting_batch(data: Data) -> int:
    """Number of samples whose inputs fit `_TOKENS` and `_NUMBERS`."""
    size = 1
    for _, values in data.arguments(integers=True):
        each = int(np.prod(values.shape[1:]))
        most = _TOKENS if values.dtype.kind in "iu" else _NUMBERS
        size = max(size, -(-each * 256 // most))
    return max(1, 256 // size)


def _graph_hash(captured: Captured) -> str:
    """SHA-256 of the graph's operations and of the tensors that the forward pass made."""
    digest = hashlib.sha256()
    for node in captured.graph.nodes:
        digest.update(f"{node.op} {node.name} {node.target} {node.args} {node.kwargs}\n".encode())
    for node, value in captured.constants.items():
        if isinstance(value, Tensor):
            digest.update(f"{node.name} {value.dtype} {tuple(value.shape)}".encode())
            digest.update(value.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
