"""A torch module and a data set as a `LayerStream`.

Two copies of the module run in evaluation mode, the dense network and the one that is being
retrained; hooks read a layer's input from both, and the forward pass stops there. The caller's
module is never changed.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from dataclasses import replace
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, fx, nn

from retrain.adapters.network.find import Network, evaluation_copy, find_layers
from retrain.adapters.network.gain import gains, output_source
from retrain.adapters.network.kinds import Kind, bias_of, kind_of, known_kind, matrix, write
from retrain.adapters.network.passage import Networks, measure, measure_outputs
from retrain.adapters.network.probe import Probe, variants
from retrain.adapters.network.rows import by_sample, input_rows, pieces, response_rows
from retrain.adapters.network.structure import structure, weights_hash
from retrain.adapters.network.tensors import HALF, check_finite, computing
from retrain.data.arrays import Data
from retrain.data.sources import as_data
from retrain.stream.stream import (
    Array,
    Gain,
    LayerBatch,
    LayerSpec,
    Norm,
    Passage,
    changed,
    identity_hash,
    layer,
)
from solvers import checks

_log = logging.getLogger(__name__)


class _Reached(BaseException):
    """Ends a forward pass. Not an Exception, so that a network's own handler cannot catch it."""


class TorchStream:
    """The layers of a torch module on a data set; implements `retrain.stream.stream.LayerStream`.

    Feed-forward networks of Linear and Conv2d layers, nested and branching in any way. Layers that
    cannot be retrained are in `layers` with the reason. Arrays are detached tensors on the stream's
    device, in the layers' own dtype, half types in float32.

    Parameters
    ----------
    model : nn.Module
        Network; two copies of it are held (four with half types), and it is not changed.
    data : Data or anything that `retrain.data.sources.as_data` takes
        Samples. Images are flattened for a network that begins with a dense layer of that width.
    batch_size : int, optional
        Number of samples per forward pass. It is part of the identity, since it changes the last
        bits. Larger batches take more memory and fewer calls.
    device : str or torch.device, optional
        Device on which to compute; by default that of the module's first parameter.

    Raises
    ------
    ValueError
        If the module or the data are malformed, or do not fit each other.

    Notes
    -----
    Memory: the copies of the network, the data (on the CPU), and the activations of one batch.
    Building a stream runs the network on a few samples several times
    (`retrain.adapters.network.probe`).
    """

    def __init__(
        self,
        model: nn.Module,
        data: Any,
        *,
        batch_size: int = 256,
        device: str | torch.device | None = None,
    ) -> None:
        checks.count(1, batch_size=batch_size)
        self._data: Data = as_data(data)
        given = evaluation_copy(model)
        parameters = list(given.parameters())
        if not parameters:
            raise ValueError(f"model: {type(model).__name__} has no weights")
        self._device = torch.device(device) if device is not None else parameters[0].device
        check_finite(given)
        given.requires_grad_(False).to(self._device)
        self._batch_size = batch_size
        self._model = given
        self._dense = computing(copy.deepcopy(given))
        # For networks without half types the current network computes with its own weights.
        half = any(tensor.dtype in HALF for tensor in given.state_dict().values())
        self._current = computing(copy.deepcopy(given)) if half else given
        self._given = copy.deepcopy(given) if half else None
        self._network: Network = find_layers(self._dense)
        # Recorded before the network runs, since running it may add attributes to it.
        computation = structure(given, self._network.graph, self._dense)
        self._shape = sample_shape(self._network, self._dense, self._data.x.shape[1:])
        floating = [p.dtype for p in self._dense.parameters() if p.is_floating_point()]
        self._dtype = floating[0] if floating else torch.float32
        self._layers, self._positions, self._mixes = self._probe()
        self._changed: set[str] = set()
        self._norms: dict[tuple[str, Norm, bool, bool], float] = {}
        self._shapes: dict[fx.Node, Any] | None = None
        self._identity = self._parts(computation)

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
    def network(self) -> Network:
        """The traced network and its layers."""
        return self._network

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
        """The dense weights, the computation, the layers and the data, as JSON values."""
        return self._identity

    @property
    def layers(self) -> tuple[LayerSpec, ...]:
        """All layers with weights in execution order, those that cannot be retrained included."""
        return self._layers

    @property
    def mixes(self) -> str | None:
        """Why an output depends on other samples of its batch (no bounds then), or None."""
        return self._mixes

    def count(self, name: str) -> int:
        """Return the number of rows of a layer: samples times positions.

        Parameters
        ----------
        name : str
            Name of the layer.

        Returns
        -------
        int
            Number of rows.
        """
        return len(self._data) * self._positions[self._retrainable(name).name]

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
        module = (self._dense if dense else self._current).get_submodule(name)
        values = matrix(module, group)
        if spec.bias:
            values = torch.cat([values, bias_of(module, group)[None]])
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
        module = self._model.get_submodule(name)
        new = new.detach().to(self._device, cast("Tensor", module.weight).dtype)
        if not torch.isfinite(new).all():
            raise ValueError(f"weight: layer {name!r} got NaN or infinity in {new.dtype}")
        for network in {self._model, self._current}:
            write(network.get_submodule(name), group, new)
        self._changed.add(name)
        self._norms = {key: value for key, value in self._norms.items() if key[0] != name or key[2]}

    # --- activations ----------------------------------------------------------------------------

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
        spec = self._retrainable(name, group)
        if rows is not None:
            rows = np.asarray(rows)
            count = self.count(name)
            if rows.ndim != 1 or rows.dtype.kind not in "iu" or (np.diff(rows) <= 0).any():
                raise ValueError("rows: want different row numbers in increasing order")
            if rows.size and (rows[0] < 0 or rows[-1] >= count):
                raise ValueError(f"rows: got {rows[0]} to {rows[-1]}, layer {name!r} has {count}")
        return self._batches(spec, group, rows)

    def _batches(
        self, spec: LayerSpec, group: int, rows: np.ndarray | None
    ) -> Iterator[LayerBatch]:
        positions = self._positions[spec.name]
        dense_layer = self._dense.get_submodule(spec.name)
        before = [s.name for s in self._layers[: self._layers.index(spec)]]
        changed = any(name in self._changed for name in before)
        for start in range(0, len(self._data), self._batch_size):
            stop = min(start + self._batch_size, len(self._data))
            chosen = np.arange(start * positions, stop * positions)
            if rows is not None:
                chosen = rows[slice(*np.searchsorted(rows, (start * positions, stop * positions)))]
                if not chosen.size:
                    continue
            # The whole batch runs even for a few rows: other shapes could round differently.
            dense, responses = self._read(self._dense, spec.name, start, stop)
            inputs = self._read(self._current, spec.name, start, stop)[0] if changed else dense
            for piece in pieces(chosen, positions, spec):
                samples, local = np.unique(piece // positions - start, return_inverse=True)
                pick = torch.from_numpy(local * positions + piece % positions).to(self._device)
                which = torch.from_numpy(samples).to(self._device)

                def rows_of(values: Tensor, which: Tensor = which, pick: Tensor = pick) -> Tensor:
                    return input_rows(dense_layer, values[which], group)[pick]

                dense_rows = rows_of(dense)
                yield LayerBatch(
                    rows_of(inputs) if changed else dense_rows,
                    dense_rows,
                    response_rows(dense_layer, responses[which], group)[pick],
                    piece.astype(np.int64),
                )

    def outputs(self, *, dense: bool) -> Iterator[Tensor]:
        """Yield the network's outputs batch by batch.

        Parameters
        ----------
        dense : bool
            Whether the dense network computes them, or the current one.

        Yields
        ------
        Tensor, shape (samples, ...)
            Outputs of one batch.
        """
        network = self._dense if dense else self._current
        for start in range(0, len(self._data), self._batch_size):
            with torch.no_grad():
                answered = network(self._inputs(start, start + self._batch_size))
            yield answered.detach()

    def _inputs(self, start: int, stop: int) -> Tensor:
        """Copy samples to the device, so that a network that works in place cannot change them."""
        part = self._data.x[start:stop]
        values = torch.tensor(part, dtype=self._dtype, device=self._device)
        return values.reshape(len(part), *self._shape)

    def _read(self, network: nn.Module, name: str, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """Run a batch up to a layer; return the layer's input and its response."""
        seen: list[tuple[Tensor, Tensor]] = []

        def stop_here(_: nn.Module, received: tuple[Tensor, ...], answered: Tensor) -> None:
            seen.append((received[0].detach(), answered.detach()))
            raise _Reached

        handle = network.get_submodule(name).register_forward_hook(stop_here)
        try:
            with torch.no_grad():
                network(self._inputs(start, stop))
        except _Reached:
            pass
        finally:
            handle.remove()
        received, answered = seen[0]
        module = network.get_submodule(name)
        count = min(stop, len(self._data)) - start
        # Under the network's own autocast a layer's response can be of a half type.
        received, answered = received.to(self._dtype), answered.to(self._dtype)
        return by_sample(module, received, count), by_sample(module, answered, count)

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
        graph, node = self._network.graph, self._network.nodes.get(name)
        if graph is None or node is None:
            return Gain(None, f"layer {name!r} has no single place in a traced network")
        found = self._gains(graph, norm, dense=False)[node]
        # The factor assumes that samples do not depend on each other.
        mixed = found.value is not None and self._mixes is not None
        return Gain(None, self._mixes) if mixed else found

    def _gains(self, graph: fx.Graph, norm: Norm, *, dense: bool) -> dict[fx.Node, Gain]:
        """Compute G of every node (`retrain.adapters.network.gain`), dense or current network."""
        if self._shapes is None:
            first = self._inputs(0, 1)  # twice, since a batch of one would hide broadcasting
            self._shapes = _node_shapes(self._dense, graph, torch.cat([first, first]))
        network = self._dense if dense else self._current
        modules = dict(network.named_modules())

        def norms(name: str, scale: Tensor | None) -> float:
            return self._layer_norm(name, norm, scale, dense=dense)

        return gains(graph, modules, norms, self._shapes)

    def _layer_norm(self, name: str, norm: Norm, scale: Tensor | None, *, dense: bool) -> float:
        """Compute the norm of a layer as a map, without the bias; cached until the next commit."""
        dense = dense or name not in self._changed
        # A batch norm is not retrained, so a layer has at most one scale.
        key = (name, norm, dense, scale is not None)
        if key not in self._norms:
            module = (self._dense if dense else self._current).get_submodule(name)
            self._norms[key] = known_kind(module).norm(module, norm, scale)
        return self._norms[key]

    def output_layer(self) -> tuple[str | None, str]:
        """Name the layer whose activated response is the network's output.

        Returns
        -------
        name : str or None
            Name of the layer; None where there is no such layer.
        reason : str
            Why there is none; empty with a name.
        """
        graph = self._network.graph
        if self._mixes is not None:
            return None, self._mixes
        if graph is None:
            return None, "the network could not be traced"
        node, reason = output_source(graph, dict(self._dense.named_modules()))
        if node is None:
            return None, reason
        found = self._gains(graph, "frobenius", dense=True)[node]
        if found.value is None:  # something overwrites the response in place
            return None, str(found.reason)
        return str(node.target), ""

    def passage(self) -> Passage:
        """Send the data through both networks once, and measure what the bounds need.

        Returns
        -------
        Passage
            Deviations, discrepancies and the allowance for rounding.
        """
        changed_layers = {
            spec.name: spec.follows
            for spec in self._layers
            if spec.name in self._changed and changed(self, spec)
        }
        starts = range(0, len(self._data), self._batch_size)
        samples = (self._inputs(start, start + self._batch_size) for start in starts)
        graph = self._network.graph
        if graph is None or self._mixes is not None or not changed_layers:
            reason = (self._mixes or "the network could not be traced") if changed_layers else None
            pair = self._own() or (self._dense, self._current)
            return measure_outputs(pair, samples, reason)
        given, gains = (self._gains(graph, "spectral", dense=dense) for dense in (True, False))
        assert self._shapes is not None
        networks = Networks(self._dense, self._current, self._own(), graph, self._shapes)
        return measure(networks, changed_layers, (given, gains), self.output_layer()[0], samples)

    def _own(self) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]] | None:
        """The dense and the current network in half types, where those are theirs and run here."""
        if self._given is None:
            return None
        dtype = next(p.dtype for p in self._given.parameters() if p.is_floating_point())
        dense, current = self._given, self._model
        try:
            with torch.no_grad():
                dense(self._inputs(0, 1).to(dtype))
        except (RuntimeError, TypeError) as error:
            text = str(error).partition("\n")[0]
            _log.warning("bounds: measured in float32; %s does not run here: %s", dtype, text)
            return None
        return lambda batch: dense(batch.to(dtype)), lambda batch: current(batch.to(dtype))

    # --- checks at the start --------------------------------------------------------------------

    def _probe(self) -> tuple[tuple[LayerSpec, ...], dict[str, int], str | None]:
        """Run a few samples in several batches, to find layers whose rows depend on other samples.

        A layer whose input for a sample changes with the other samples of the batch, or is not laid
        out one sample after the other, cannot be retrained row by row.

        Returns
        -------
        layers : tuple of LayerSpec
            All layers, those that cannot be retrained with the reason.
        positions : dict from str to int
            Number of rows per sample, by layer.
        mixes : str or None
            Why the network's outputs depend on other samples of the batch; None where they do not.
        """
        specs = [found.spec for found in self._network.layers]
        open_specs = [spec for spec in specs if spec.reason is None]
        probe = self._ask(self._dense, open_specs, self._dtype)
        wide: list[Probe] = []

        def separate(name: str, *, axes: int | None = None) -> bool:
            """Probe, and again in float64, where rounding cannot be taken for mixing."""
            if probe.separate(name, axes=axes):
                return True
            if not wide and self._dtype != torch.float64:
                with suppress(ValueError):  # a network that computes in one type only
                    network = copy.deepcopy(self._dense).double()
                    wide.append(self._ask(network, open_specs, torch.float64))
            return any(again.reached(name) and again.separate(name, axes=axes) for again in wide)

        positions: dict[str, int] = {}
        for i, spec in enumerate(specs):
            if spec.reason is not None:
                continue
            if not probe.reached(spec.name):
                specs[i] = replace(spec, reason="the forward pass does not reach it on this data")
            elif not separate(spec.name, axes=self._kind(spec).input_axes):
                specs[i] = replace(spec, reason="its input is not one sample after the other")
            else:
                module = self._dense.get_submodule(spec.name)
                positions[spec.name] = len(input_rows(module, probe.one(spec.name), 0))
        if probe.refused is not None and len(self._data) % self._batch_size == 1:
            raise ValueError(
                f"data: the last batch of {self._data.name!r} has one sample, and the network "
                f"cannot take one alone ({probe.refused}); use one sample more or less"
            )
        mixes = None if separate("") else "an output depends on the other samples of its batch"
        return tuple(specs), positions, mixes

    def _kind(self, spec: LayerSpec) -> Kind:
        return known_kind(self._dense.get_submodule(spec.name))

    def _ask(self, network: nn.Module, specs: list[LayerSpec], dtype: torch.dtype) -> Probe:
        """Probe a network with a few samples of the data."""
        company = self._inputs(0, min(len(self._data), self._batch_size)).to(dtype)
        places = sorted({0, len(self._data) // 2, len(self._data) - 1})
        some = torch.cat([self._inputs(i, i + 1) for i in places]).to(dtype)
        return Probe(
            variants(some, company),
            company,
            lambda values, count: self._run(network, specs, values, count),
        )

    def _run(
        self, network: nn.Module, specs: list[LayerSpec], values: Tensor, count: int
    ) -> dict[str, Tensor]:
        """Run samples; return what each layer received for the first `count`, and the output.

        Keys are the layers' names, and "" for the output; tensors are cloned.
        """
        received: dict[str, Tensor] = {}
        entered: list[tuple[str, nn.Module, torch.Size]] = []
        samples = len(values)

        def part(value: Tensor) -> Tensor:
            rows = len(value) // samples * count if value.ndim and len(value) % samples == 0 else 0
            return (value[:rows] if rows else value).detach().clone()

        with ExitStack() as hooks:
            for spec in specs:
                module = network.get_submodule(spec.name)

                def keep(
                    module: nn.Module, args: tuple[Tensor, ...], name: str = spec.name
                ) -> None:
                    entered.append((name, module, args[0].shape))
                    received[name] = part(args[0])

                hooks.callback(module.register_forward_pre_hook(keep).remove)
            try:
                with torch.no_grad():
                    output = network(values.clone())
            except (RuntimeError, ValueError, TypeError, IndexError) as error:
                raise ValueError(self._misfit(entered, error)) from error
        if not isinstance(output, Tensor) or output.shape[:1] != values.shape[:1]:
            got = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
            raise ValueError(
                f"model: returned {got} for {samples} samples, want one tensor whose first "
                "axis is the sample"
            )
        received[""] = part(output)
        return received

    def _misfit(self, entered: list[tuple[str, nn.Module, torch.Size]], error: Exception) -> str:
        """Say why the network cannot take the data: which layer failed, or torch's first line."""
        shape = tuple(self._data.x.shape[1:])
        if entered:
            name, module, got = entered[-1]
            kind = kind_of(module)
            misfit = None if kind is None else kind.misfit(module, got)
            if misfit is not None:
                return f"data: layer {name!r} wants {misfit}; samples have shape {shape}"
        text = str(error).strip().split("\n")[0]
        return f"data: the network cannot take samples of shape {shape}: {text}"

    def _parts(self, computation: dict[str, Any]) -> dict[str, Any]:
        return {
            "arrays": "torch",
            "weights": weights_hash(self._model),
            "computation": {**computation, "layers": [repr(spec) for spec in self._layers]},
            "data": self._data.fingerprint,
            "batch size": self._batch_size,
        }

    def _retrainable(self, name: str, group: int = 0) -> LayerSpec:
        spec = layer(self, name)
        if spec.reason is not None:
            raise ValueError(f"name: layer {name!r} cannot be retrained: {spec.reason}")
        if not 0 <= group < spec.groups:
            raise ValueError(f"group: got {group}, layer {name!r} has {spec.groups}")
        return spec


def fit_samples(model: nn.Module, x: np.ndarray) -> np.ndarray:
    """Reshape samples to the form that a network takes, as streams do, for training loops.

    Parameters
    ----------
    model : nn.Module
        Network; it is not changed.
    x : ndarray, shape (n_samples, ...)
        Samples, as in `retrain.data.arrays.Data.x`.

    Returns
    -------
    ndarray, shape (n_samples, n_features) or the original shape
        View of `x`.
    """
    copied = evaluation_copy(model)
    return x.reshape(len(x), *sample_shape(find_layers(copied), copied, x.shape[1:]))


def sample_shape(network: Network, model: nn.Module, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return the shape in which a network takes a sample that is stored in `shape`.

    That is `shape`, except that images are flattened for a network which passes its input to a
    dense layer of that many inputs.

    Parameters
    ----------
    network : Network
        Traced network.
    model : nn.Module
        Module that was traced.
    shape : tuple of int
        Shape of a stored sample.

    Returns
    -------
    tuple of int
        Shape of a sample for the network.
    """
    features = int(np.prod(shape))
    if network.graph is None or len(shape) == 1:
        return shape
    node = next(node for node in network.graph.nodes if node.op == "placeholder")
    modules = dict(model.named_modules())
    while len(node.users) == 1:
        node = next(iter(node.users))
        module = modules.get(str(node.target)) if node.op == "call_module" else None
        if isinstance(module, nn.Linear):
            wide = module.in_features == features and shape[-1] != features
            return (features,) if wide else shape
        if not isinstance(module, nn.Dropout | nn.Identity):
            break
    return shape


def _node_shapes(model: nn.Module, graph: fx.Graph, samples: Tensor) -> dict[fx.Node, Any]:
    """Run the graph on some samples; return the shapes of its tensors, and its other values."""
    shapes: dict[fx.Node, Any] = {}

    class Shapes(fx.Interpreter):
        def run_node(self, node: fx.Node) -> Any:
            value = super().run_node(node)
            shapes[node] = value.shape if isinstance(value, Tensor) else value
            return value

    with torch.no_grad():
        Shapes(model, graph=graph).run(samples)
    return shapes
