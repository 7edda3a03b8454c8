"""A torch module and a data set as a `LayerStream`, read through forward hooks.

For networks that `torch.export` refuses, such as those with control flow that depends on values.
Layers are modules of the known kinds; their rows are what they receive. A pass through the network
up to the layer is needed each time that its rows are read. What follows a layer is not seen, so
every layer has the linear form, and there is no bound.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from retrain.adapters.network.capture import forward
from retrain.adapters.network.copies import ModuleStream
from retrain.adapters.network.passage import measure_outputs
from retrain.adapters.network.sites import OPERATIONS, Operation
from retrain.adapters.network.structure import structure
from retrain.stream.stream import Array, Gain, LayerBatch, LayerSpec, Norm, Passage, layer

MODULES: dict[type[nn.Module], str] = {
    nn.Linear: "linear",
    nn.Conv1d: "conv1d",
    nn.Conv2d: "conv2d",
    nn.Conv3d: "conv3d",
    nn.ConvTranspose1d: "conv_transpose1d",
    nn.ConvTranspose2d: "conv_transpose2d",
    nn.ConvTranspose3d: "conv_transpose3d",
}
"""Operation of `OPERATIONS` by exact class of a module: a subclass may compute something else."""

Call = tuple[Tensor, Tensor]
"""What a layer received and answered."""


class _Reached(BaseException):
    """Ends a forward pass. Not an Exception, so that a network's own handler cannot catch it."""


@dataclass(frozen=True, eq=False)
class _Found:
    """A layer's description, operation and calls, each batch's rows per call."""

    spec: LayerSpec
    how: Operation
    rows: list[list[int]]


class HookedStream(ModuleStream):
    """The layers of a torch module on a data set; implements `retrain.stream.stream.LayerStream`.

    Parameters
    ----------
    model : nn.Module
        Network; copies of it are held, and it is not changed.
    data : Data or anything that `retrain.data.sources.as_data` takes
        Samples. Images are flattened for a network that begins with a dense layer of that width.
    batch_size : int, optional
        Number of samples per forward pass, part of the identity; by default chosen by the size of
        a sample.
    device : str or torch.device, optional
        Device on which to compute; by default that of the module's first parameter.
    why : str
        Why the network is read through hooks, for the bound's reason.

    Raises
    ------
    ValueError
        If the module or the data are malformed, or do not fit each other.
    """

    def __init__(
        self,
        model: nn.Module,
        data: Any,
        *,
        batch_size: int | None = None,
        device: str | torch.device | None = None,
        why: str = "",
    ) -> None:
        super().__init__(model, data, batch_size=batch_size, device=device)
        self._why = f"the network is read through hooks, which show no factors{why and ': '}{why}"
        computation = structure(self._model, None)
        self._found = self._survey()
        self._layers = tuple(found.spec for found in self._found.values())
        self._identity = self._parts_of_identity(computation)

    def count(self, name: str) -> int:
        """Return the number of rows of a layer.

        Parameters
        ----------
        name : str
            Name of the layer.

        Returns
        -------
        int
            Rows of all its calls.
        """
        self._retrainable(name)
        return sum(sum(each) for each in self._found[name].rows)

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
        values = self._found[name].how.matrix(_weight(module), _arguments(module), group)
        if spec.bias:
            values = torch.cat([values, _bias(module, spec, group)[None]])
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
        spec, how = self._retrainable(name, group), self._found[name].how
        new = self._own_weight(spec, weight, _weight(self._model.get_submodule(name)).dtype)
        n_in = spec.shape[0]
        with torch.no_grad():
            for network in {self._model, self._current}:
                module = network.get_submodule(name)
                target, arguments = _weight(module), _arguments(module)
                values = how.unmatrix(new[:n_in], target, arguments, group)
                how.part(target, arguments, group).copy_(values)
                if spec.bias:
                    _bias(module, spec, group).copy_(new[n_in])
        self._changed.add(name)

    def _read(self, name: str, group: int, rows: np.ndarray | None) -> Iterator[LayerBatch]:
        found = self._found[name]
        start = 0
        for batch in range(self._batches):
            sizes = found.rows[batch]
            stop = start + sum(sizes)
            if rows is None:
                chosen = np.arange(start, stop)
            else:
                chosen = rows[slice(*np.searchsorted(rows, (start, stop)))]
            if chosen.size:
                dense = self._calls(self._dense, name, batch)
                current = self._calls(self._current, name, batch) if self._changed else dense
                if [len(x) for x, _ in dense] != [len(x) for x, _ in current]:
                    raise ValueError(
                        f"name: layer {name!r} is called otherwise in the retrained network: the "
                        "forward pass depends on values"
                    )
                yield self._laid_out(found, name, group, dense, current, chosen, start)
            start = stop

    def _laid_out(
        self,
        found: _Found,
        name: str,
        group: int,
        dense: list[Call],
        current: list[Call],
        chosen: np.ndarray,
        start: int,
    ) -> LayerBatch:
        """Lay the calls of a batch out as rows, and choose among them."""
        module, how = self._dense.get_submodule(name), found.how
        weight, arguments = _weight(module), _arguments(module)
        pick = torch.from_numpy(chosen - start).to(self._device)

        def rows_of(calls: list[Call]) -> Tensor:
            parts = [how.rows(_padded(module, x), weight, arguments, group) for x, _ in calls]
            whole = torch.cat(parts)[pick].to(self._dtype)
            if found.spec.bias:
                whole = torch.cat([whole, whole.new_ones(len(whole), 1)], dim=1)
            return whole

        mine = rows_of(dense)
        answers = torch.cat([how.responses(y, arguments, group) for _, y in dense])[pick]
        theirs = mine if current is dense else rows_of(current)
        return LayerBatch(theirs, mine, answers.to(self._dtype), chosen.astype(np.int64))

    def _calls(self, network: nn.Module, name: str, batch: int) -> list[Call]:
        """Run a batch up to the layer's last call; return what it received and answered."""
        seen: list[Call] = []
        last = len(self._found[name].rows[batch])

        def keep(_: nn.Module, received: tuple[Any, ...], answered: Tensor) -> None:
            seen.append((received[0].detach(), answered.detach()))
            if len(seen) == last:
                raise _Reached

        handle = network.get_submodule(name).register_forward_hook(keep)
        try:
            with torch.no_grad():
                forward(network, self.batch(batch))
        except _Reached:
            pass
        finally:
            handle.remove()
        return seen

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
        for batch in range(self._batches):
            yield self._output(self._dense if dense else self._current, batch)

    def _output(self, network: nn.Module, batch: int) -> Tensor:
        return self._answer(network, self.batch(batch))

    # --- bounds ---------------------------------------------------------------------------------

    def gain(self, name: str, *, norm: Norm = "spectral") -> Gain:
        """Return no factor: hooks do not show what a layer's response goes through.

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
        return Gain(None, self._why)

    def output_layer(self) -> tuple[str | None, str]:
        """Return no layer: what lies behind it is not seen.

        Returns
        -------
        name : None
            There is none.
        reason : str
            Why.
        """
        return None, self._why

    def passage(self) -> Passage:
        """Send the data through both networks, and measure the outputs.

        Returns
        -------
        Passage
            Deviation of the outputs, without an allowance for rounding.
        """
        outputs = (
            lambda batch: self._output(self._dense, batch),
            lambda batch: self._output(self._current, batch),
        )
        reason = self._why if self._changed else None
        return measure_outputs(outputs, range(self._batches), reason, len(self._data))

    # --- checks at the start --------------------------------------------------------------------

    def _survey(self) -> dict[str, _Found]:
        """Run all batches once: which layers are called, in which order, on how many rows."""
        modules = {
            name: part for name, part in self._dense.named_modules() if type(part) in MODULES
        }
        rows: dict[str, list[list[int]]] = {}
        reasons: dict[str, str] = {}
        problem = ""
        for batch in range(self._batches):
            with ExitStack() as hooks:
                for name, module in modules.items():

                    def keep(
                        part: nn.Module,
                        received: tuple[Any, ...],
                        answered: Any,
                        name: str = name,
                        batch: int = batch,
                    ) -> None:
                        per_batch = rows.setdefault(name, [[] for _ in range(self._batches)])
                        if len(received) != 1 or not isinstance(answered, Tensor):
                            reasons[name] = "it is called with more than one positional argument"
                            return
                        how = OPERATIONS[MODULES[type(part)]]
                        per_batch[batch].append(len(how.responses(answered, _arguments(part), 0)))

                    hooks.callback(module.register_forward_hook(keep).remove)
                output = self._output(self._dense, batch)
            self._check_output(output, batch)
            if batch == 0:
                again = self._output(self._dense, batch)
                if not torch.equal(again.nan_to_num(), output.nan_to_num()):
                    problem = "the network is random in evaluation mode"
        order = [*rows, *(name for name in modules if name not in rows)]
        pointers = [t.data_ptr() for part in modules.values() for t in part.parameters()]
        found = {}
        for name in order:
            module = modules[name]
            how, arguments = OPERATIONS[MODULES[type(module)]], _arguments(module)
            weight = _weight(module)
            tied = any(pointers.count(t.data_ptr()) > 1 for t in module.parameters())
            reason: str | None = problem or reasons.get(name)
            if name not in rows:
                reason = "the forward pass does not reach it on this data"
            elif tied:
                reason = "its weight or bias is shared with another layer"
            shape = how.matrix(weight, arguments, 0).shape
            spec = LayerSpec(
                name,
                how.kind,
                (int(shape[0]), int(shape[1])),
                module.bias is not None,
                "linear",
                how.groups(arguments, weight),
                reason or None,
            )
            found[name] = _Found(spec, how, rows.get(name, []))
        return found


def _weight(module: nn.Module) -> Tensor:
    return cast("Tensor", module.weight)


def _bias(module: nn.Module, spec: LayerSpec, group: int) -> Tensor:
    units = spec.shape[1]
    return cast("Tensor", module.bias)[group * units : (group + 1) * units]


def _arguments(module: nn.Module) -> dict[str, Any]:
    """Arguments of the operation that a module calls; `_padded` pads where zeros are not meant."""
    names = ("stride", "padding", "dilation", "groups", "output_padding")
    found: dict[str, Any] = {key: getattr(module, key) for key in names if hasattr(module, key)}
    if getattr(module, "padding_mode", "zeros") != "zeros":
        found["padding"] = 0
    return found


def _padded(module: nn.Module, values: Tensor) -> Tensor:
    """Pad an input as the module does before it convolves, where it does not pad with zeros."""
    mode = getattr(module, "padding_mode", "zeros")
    if mode == "zeros":
        return values
    sides: Any = module._reversed_padding_repeated_twice
    return functional.pad(values, sides, mode=str(mode))
