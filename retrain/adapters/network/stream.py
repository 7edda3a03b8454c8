"""A torch module and a data set as a `LayerStream`, captured by `torch.export`.

Two frontiers (`retrain.adapters.network.frontier`), of the dense and of the current network, move
through the captured graph from layer to layer. As long as no layer before them has changed they are
one. Layers in the order of execution cost one forward pass of each network; going back to an
earlier layer begins anew.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, fx, nn

from retrain.adapters.network.capture import (
    Captured,
    CaptureError,
    Inputs,
    arguments_of,
    capture,
    forward,
    label,
    name_of,
)
from retrain.adapters.network.copies import ModuleStream
from retrain.adapters.network.fold import Scaling, scaling, settled
from retrain.adapters.network.frontier import Frontier, Plan, Values
from retrain.adapters.network.gain import Network, gains, output_source
from retrain.adapters.network.passage import Changed, Outputs, Pair, measure, measure_outputs
from retrain.adapters.network.recurrent import STEPS, unrolled
from retrain.adapters.network.sites import (
    OPERATIONS,
    Operation,
    Site,
    find_sites,
    operator_norm,
    view_of,
)
from retrain.adapters.network.structure import structure
from retrain.adapters.network.tensors import named_tensors
from retrain.stream.stream import (
    Array,
    Gain,
    LayerBatch,
    LayerSpec,
    Norm,
    Passage,
    changed,
    layer,
)
from solvers.arrays import norm as frobenius

_log = logging.getLogger(__name__)

BLOCK = 1 << 24
"""Approximate largest number of entries in the input rows of one piece of a batch: 64 MiB in
float32. Larger pieces take more memory and save nothing; smaller ones cost one unfolding call each.
Chosen by hand."""

LIVE = 2.0**30
"""Bytes of live values of each network that stay in memory; the rest is kept on disk. A larger
number spares the disk."""

_SAME = 1e-3
"""Relative difference of the outputs beyond which the captured graph does not represent the
network. The two may differ by the order of sums only, which in float32 stays far below. A smaller
value refuses right graphs; a larger one trusts wrong ones. Chosen by hand."""


class TorchStream(ModuleStream):
    """The layers of a torch module on a data set; implements `retrain.stream.stream.LayerStream`.

    The forward pass is captured by `torch.export`: any number and type of inputs and any nested
    outputs, of which the first (or ``logits``) counts. Layers are operations whose weight is a
    parameter (`retrain.adapters.network.sites`); those that cannot be retrained are in `layers`
    with the reason. Arrays are detached tensors on the stream's device, in the layers' own dtype,
    half types in float32.

    Parameters
    ----------
    model : nn.Module
        Network; copies of it are held, and it is not changed.
    data : Data or anything that `retrain.data.sources.as_data` takes
        Samples. Images are flattened for a network that begins with a dense layer of that width.
    batch_size : int, optional
        Number of samples per forward pass. It is part of the identity, since it changes the last
        bits; by default it is chosen by the size of a sample. Larger batches take more memory.
    device : str or torch.device, optional
        Device on which to compute; by default that of the module's first parameter.
    like : TorchStream, optional
        The same network on other data: its captured graph is used again where the samples have the
        same form.

    Raises
    ------
    ValueError
        If the module or the data are malformed, or do not fit each other.
    CaptureError
        If the forward pass cannot be captured on this data.

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
        like: TorchStream | None = None,
    ) -> None:
        super().__init__(model, data, batch_size=batch_size, device=device)
        self._captured = self._capture(like)
        self._plan = Plan(self._captured)
        computation = structure(self._model, self._captured)
        self._tables = {id(m): named_tensors(m) for m in (self._dense, self._current, self._model)}
        self._sites = {s.spec.name: s for s in find_sites(self._captured, self._dense)}
        self._random = _random(self._captured)
        self._mixes: str | None = None
        if self._random is None:
            own = self._some_outputs()
            stray = self._stray(own)
            if stray is not None:
                raise CaptureError(stray)
            self._mixes = self._mixed(own)
        self._surveyed: dict[int, Tensor] = {}
        self._rows, self._leading = self._survey()
        self._layers = tuple(self._judged(site) for site in self._sites.values())
        self._frontiers: dict[bool, Frontier | None] = {True: self._begin(dense=True), False: None}
        self._norms: dict[tuple[str, fx.Node, Norm, bool, bool], float] = {}
        self._identity = self._parts_of_identity(computation)

    # --- description --------------------------------------------------------------------------

    @property
    def captured(self) -> Captured:
        """The captured forward pass."""
        return self._captured

    @property
    def sites(self) -> Mapping[str, Site]:
        """The layers' places in the graph, by name."""
        return self._sites

    @property
    def mixes(self) -> str | None:
        """Why an output depends on other samples of its batch (no bounds then), or None."""
        return self._mixes

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
        network = self._dense if dense else self._current
        weight, bias, how, arguments = self._parts(name, network)
        units = slice(group * spec.shape[1], (group + 1) * spec.shape[1])
        values = how.matrix(weight, arguments, group)
        row = None if bias is None else bias[units]
        scaled = self._scaling(name, network, units)
        if scaled is not None:
            before = 0.0 if row is None else row.double()
            row = (scaled.scale * before + scaled.shift).to(values.dtype)
            values = (values.double() * scaled.scale).to(values.dtype)
        if row is not None:
            values = torch.cat([values, row[None]])
        return values.detach().clone()

    def _scaling(self, name: str, network: nn.Module, units: slice) -> Scaling | None:
        """Scale and shift of the batch norm that is folded into a layer, if there is one."""
        fold = self._sites[name].fold
        if fold is None:
            return None
        return scaling(fold, self._captured, self._tables[id(network)]).part(units)

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
        folded = self._sites[name].fold is not None
        own = self._parts(name, self._model)[0].dtype
        new = self._own_weight(spec, weight, self._dtype if folded else own)
        if folded:
            new_matrix, new_row = self._unfolded(name, new, group)
        else:
            new_matrix, new_row = new[: spec.shape[0]], new[spec.shape[0] :]
        self._part_current(name)
        units = slice(group * spec.shape[1], (group + 1) * spec.shape[1])
        with torch.no_grad():
            for network in {self._model, self._current}:
                target, _, how, arguments = self._parts(name, network)
                values = how.unmatrix(new_matrix, target, arguments, group)
                how.part(target, arguments, group).copy_(values)
                if spec.bias:
                    self._row(name, network)[units].copy_(new_row.reshape(-1))
        self._changed.add(name)
        self._norms = {key: value for key, value in self._norms.items() if key[0] != name or key[3]}

    def _row(self, name: str, network: nn.Module) -> Tensor:
        """The tensor that takes a layer's bias row: its bias, or the folded norm's β or mean."""
        bias, fold = self._parts(name, network)[1], self._sites[name].fold
        if bias is not None:
            return bias
        assert fold is not None
        return self._tables[id(network)][fold.bias or fold.mean]

    def _unfolded(self, name: str, new: Tensor, group: int) -> tuple[Tensor, Tensor]:
        """Take a folded weight apart: the layer's matrix, and what its bias row is written to."""
        spec, fold = self._sites[name].spec, self._sites[name].fold
        assert fold is not None
        units = slice(group * spec.shape[1], (group + 1) * spec.shape[1])
        weight, bias, how, arguments = self._parts(name, self._dense)
        own = self._parts(name, self._model)[0].dtype
        scaled = self._scaling(name, self._dense, units)
        assert scaled is not None
        scale, shift = scaled.scale, scaled.shift
        dense = how.matrix(weight, arguments, group).to(own)
        matrix = settled(
            new[: spec.shape[0]],
            dense,
            lambda x: (x.double() / scale).to(own),
            lambda w: (w.double() * scale).to(new.dtype),
        )
        stored = self._row(name, self._dense)[units].to(self._row(name, self._model).dtype)
        kind = stored.dtype

        if bias is not None:
            slope, rest = scale, shift
        elif fold.bias is not None:  # t = β + centre
            slope, rest = torch.ones_like(scale), scaled.centre
        else:  # t = -s mean
            slope, rest = -scale, torch.zeros_like(shift)
        row = settled(
            new[spec.shape[0]],
            stored,
            lambda x: ((x.double() - rest) / slope).to(kind),
            lambda b: (slope * b.double() + rest).to(new.dtype),
        )
        row, matrix = (torch.where(scaled.tiny, a, b) for a, b in ((stored, row), (dense, matrix)))
        if not (torch.isfinite(row).all() and torch.isfinite(matrix).all()):
            raise ValueError(f"weight: layer {name!r} got NaN or infinity in {own}, unfolded")
        return matrix, row

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
        values: Values = dict(frontier.values(batch))
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
            if answered is not None and site.fold is not None:
                answered = self._behind(frontier, site, {**values, call: answered})
            found.append((received.to(self._dtype), answered))
        return found

    def _behind(self, frontier: Frontier, site: Site, values: Values) -> Tensor:
        """The response behind a folded norm; channels that are not folded have their own."""
        assert site.fold is not None
        raw = values[site.calls[0]]
        with torch.no_grad():
            for node in site.fold.nodes:
                values[node] = frontier.evaluate(node, values)
        tiny = scaling(site.fold, self._captured, frontier.tensors).tiny
        shape = [-1 if axis == 1 else 1 for axis in range(raw.ndim)]
        return torch.where(tiny.reshape(shape), raw, values[site.fold.end])

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

    def _feed(self, batch: int) -> list[Tensor]:
        return [value for _, value in self.batch(batch)]

    # --- bounds ---------------------------------------------------------------------------------

    def gain(self, name: str, *, norm: Norm = "spectral") -> Gain:
        """Bound the Lipschitz factor from the layer's output to the network's (current weights).

        Frobenius norms over the samples; see `retrain.adapters.network.gain`. For a convolution,
        "output" is the whole image of responses, so it applies to an error summed over all of its
        rows and groups.

        Parameters
        ----------
        name : str
            Name of the layer.
        norm : {"spectral", "frobenius"}
            Norm of the later layers' weights.

        Returns
        -------
        Gain
            Factor, or the reason why none is known.
        """
        layer(self, name)
        found = self._gain_of(name, gains(self._network(norm, dense=False)))
        mixed = found.value is not None and self._mixes is not None
        return Gain(None, self._mixes) if mixed else found

    def _gain_of(self, name: str, found: Mapping[fx.Node, Gain]) -> Gain:
        """Factor from a layer.

        Of one that is called several times, sqrt(sum_c G(c)²): by Cauchy and Schwarz, the sum over
        its calls c of e_c G(c) is at most that times sqrt(sum_c e_c²).
        """
        each = [found[node] for node in self._sites[name].ends]
        if not each:
            return Gain(None, "it is not a layer that the forward pass runs")
        values = [gain.value for gain in each if gain.value is not None]
        if len(values) < len(each):
            return next(gain for gain in each if gain.value is None)
        return each[0] if len(each) == 1 else Gain(math.hypot(*values))

    def _network(self, norm: Norm, *, dense: bool) -> Network:
        """The dense or the current network as the rules for factors see it."""
        table = self._tables[id(self._dense if dense else self._current)]
        frontier = Frontier(self._plan, table, self._feed, 0, 0)
        places = {call: name for name, site in self._sites.items() for call in site.calls}

        def value(node: fx.Node) -> Any:
            return frontier.value(node, {})

        def norms(node: fx.Node, scale: Tensor | None) -> float:
            """Cached until the next commit; a batch norm is not retrained, so scales stay."""
            name = places.get(node, node.name)
            key = (name, node, norm, dense or name not in self._changed, scale is not None)
            if key not in self._norms:
                how, arguments = OPERATIONS[name_of(node)], arguments_of(node)
                weight = value(arguments[how.weight])
                self._norms[key] = operator_norm(how, weight, arguments, norm, scale)
            return self._norms[key]

        return Network(self._plan, value, norms)

    def output_layer(self) -> tuple[str | None, str]:
        """Name the layer whose activated response is the network's output.

        Returns
        -------
        name : str or None
            Name of the layer; None where there is no such layer.
        reason : str
            Why there is none; empty with a name.
        """
        if self._mixes is not None:
            return None, self._mixes
        node, reason = output_source(self._plan)
        if node is None:
            return None, reason
        name = next((n for n, site in self._sites.items() if node in site.calls), None)
        if name is None or len(self._sites[name].calls) != 1:
            return None, f"the output is of a layer that is used several times, {name}"
        return name, ""

    def passage(self) -> Passage:
        """Send the data through both networks once, and measure what the bounds need.

        Returns
        -------
        Passage
            Deviations, discrepancies and the allowance for rounding.

        Notes
        -----
        Where a changed layer has no factor, the outputs alone are measured.
        """
        names = [
            spec.name for spec in self._layers if spec.name in self._changed and changed(self, spec)
        ]
        batches, samples = range(self._batches), len(self._data)
        if not names:
            return measure_outputs(self._outputs(), batches, None, samples)
        current = gains(self._network("spectral", dense=False))
        reasons = {name: self._gain_of(name, current).reason for name in names}
        reason = next((f"{name}: {text}" for name, text in reasons.items() if text), None)
        reason = reason or self._mixes or self._stray(self._some_outputs())
        if reason is not None:
            return measure_outputs(self._outputs(), batches, reason, samples)
        given = gains(self._network("spectral", dense=True))
        places = [
            Changed(name, self._sites[name].spec.follows, chain)
            for name in names
            for chain in self._sites[name].chains
        ]
        tables = self._tables[id(self._dense)], self._tables[id(self._current)]
        pair = Pair(self._plan, tables, self._own(), self._feed, self._batches)
        last = self.output_layer()[0]
        node = None if last is None else self._sites[last].calls[0]
        return measure(pair, places, (given, current), node, samples)

    def _outputs(self) -> Outputs:
        """Both networks' outputs by batch, in the types that they are saved in."""
        own = self._own()
        if own is not None:
            return own
        streamed = tuple(iter(self.outputs(dense=dense)) for dense in (True, False))
        return cast("Outputs", tuple(lambda _, each=each: next(each) for each in streamed))

    def _own(self) -> Outputs | None:
        """The dense and the current network in half types, where those are theirs and run here."""
        if self._given is None:
            return None
        dtype = next(p.dtype for p in self._given.parameters() if p.is_floating_point())

        def runs(network: nn.Module) -> Callable[[int], Tensor]:
            def run(batch: int) -> Tensor:
                inputs = self.batch(batch)
                cast_ = tuple((n, v.to(dtype) if v.is_floating_point() else v) for n, v in inputs)
                with torch.no_grad():
                    return forward(network, cast_)

            return run

        networks = runs(self._given), runs(self._model)
        try:
            networks[0](0)
        except (RuntimeError, TypeError) as error:
            text = str(error).partition("\n")[0]
            _log.warning("bounds: measured in float32; %s does not run here: %s", dtype, text)
            return None
        return networks

    # --- checks at the start --------------------------------------------------------------------

    def _capture(self, like: TorchStream | None) -> Captured:
        """Capture the network on the first samples, or take the graph of the same network."""
        if like is not None and self._signature() == like._signature():
            if like._captured.batch is not None:
                self._batch_size = 1
            return like._captured
        count = min(len(self._data), self._batch_size)
        network = unrolled(self._dense) if self._longest() <= STEPS else self._dense
        example = self.inputs(0, count) if count > 1 else self._few()
        captured = capture(network, example)
        if captured.batch is not None and self._batch_size != 1:
            _log.info("reading: the network fixes its batch; one sample is sent at a time")
            self._batch_size = 1
            captured = capture(network, self.inputs(0, 1))
        return captured

    def _signature(self) -> list[tuple[Any, ...]]:
        """Names, types and shapes of a sample's inputs."""
        found: list[tuple[Any, ...]] = [(n, v.dtype, v.shape[1:]) for n, v in self.inputs(0, 1)]
        return [*found, (self._device, self._dtype)]

    def _longest(self) -> int:
        """Largest size of an input's second axis: the steps of a sequence, if it is one."""
        arrays = self._data.arguments(integers=True)
        return max((v.shape[1] for _, v in arrays if v.ndim > 1), default=1)

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
            self._check_output(output, batch)
        self._spent += frontier.ran
        return rows, leading

    def _some(self) -> Inputs:
        """A few samples, enough to show whether they are mixed."""
        return self.inputs(0, 1 if self._captured.batch is not None else 4)

    def _some_outputs(self) -> Tensor:
        """What the dense network's forward pass gives for these samples."""
        return self._answer(self._dense, self._some())

    def _stray(self, own: Tensor) -> str | None:
        """Say that the graph does not compute what the forward pass does, if so."""
        some = self._some()
        table = self._tables[id(self._dense)]
        frontier = Frontier(self._plan, table, lambda _: [value for _, value in some], 1, math.inf)
        try:
            values = frontier.run(0, 0, len(self._plan.nodes))
        except ValueError as error:  # the graph counts on as many samples as it was captured on
            return f"the captured graph fails on {len(some[0][1])} samples: {error.__cause__}"
        found = frontier.value(self._captured.output, values)
        size = frobenius(own)
        far = own.shape != found.shape or (
            math.isfinite(size) and frobenius(own.double() - found.double()) > _SAME * size
        )
        return "the captured graph gives other outputs than the network" if far else None

    def _mixed(self, own: Tensor) -> str | None:
        """Say that an output depends on other samples of its batch, where a few samples show it.

        A sample beside copies of itself runs in the same kernels as beside others, so any
        difference counts; in another order, it has to be beyond rounding.
        """
        some = self._some()
        count = len(some[0][1])
        if count == 1:
            return None
        alone = tuple((name, value[[0] * count]) for name, value in some)
        turned = tuple((name, value.flip(0)) for name, value in some)
        same, back = (self._answer(self._dense, each) for each in (alone, turned))
        own, same, back = (value.nan_to_num() for value in (own, same, back.flip(0)))
        far = frobenius(back.double() - own.double()) > _SAME * frobenius(own)
        if not torch.equal(own[0], same[0]) or far:
            return "an output depends on the other samples of its batch"
        return None

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
        if spec.reason is None and self._random:
            return replace(spec, reason=self._random)
        if spec.reason is None and not all(self._rows[call] for call in site.calls):
            return replace(spec, reason="the forward pass does not reach it on this data")
        return spec


def _random(captured: Captured) -> str | None:
    """Say that a network is random in evaluation mode, where an operation is."""
    for node in captured.graph.nodes:
        if torch.Tag.nondeterministic_seeded not in getattr(node.target, "tags", ()):
            continue
        arguments = arguments_of(node)
        shares = [arguments.get(key) for key in ("p", "dropout_p", "dropout")]
        still = any(share == 0 for share in shares if share is not None) or any(
            arguments.get(key) is False for key in ("train", "training")
        )
        if not still:
            return f"the network is random in evaluation mode ({label(node)})"
    return None
