"""What every stream of a torch module has: copies of the network, its data, weights in and out.

Two copies of the module run in evaluation mode, the dense network and the one that is being
retrained. The caller's module is never changed.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from retrain.adapters.network.capture import Captured, CaptureError, Inputs, forward
from retrain.adapters.network.structure import weights_hash
from retrain.adapters.network.tensors import HALF, check_finite, computing
from retrain.adapters.network.wrappers import evaluation_copy
from retrain.data.arrays import Data
from retrain.data.sources import as_data
from retrain.stream.stream import Array, LayerBatch, LayerSpec, identity_hash, layer
from solvers import checks

RUN_ERRORS = (
    RuntimeError,
    ValueError,
    TypeError,
    IndexError,
    KeyError,
    AttributeError,
    AssertionError,
    NotImplementedError,
)
"""What a network's own code raises on samples that it cannot take."""

_TOKENS = 8192
"""Entries of integer inputs in a batch. More take more memory and fewer calls."""

_NUMBERS = 2**21
"""Entries of other inputs in a batch, 8 MiB in float32; at most 256 samples."""


class ModuleStream:
    """A torch module's copies and its data; a base of streams, not a stream itself.

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

    Raises
    ------
    ValueError
        If the module or the data are malformed, or do not fit each other.
    """

    _layers: tuple[LayerSpec, ...]
    _identity: dict[str, Any]

    def __init__(
        self,
        model: nn.Module,
        data: Any,
        *,
        batch_size: int | None = None,
        device: str | torch.device | None = None,
    ) -> None:
        if batch_size is not None:
            checks.count(1, batch_size=batch_size)
        self._data: Data = as_data(data)
        given = evaluation_copy(model)
        self._device = torch.device(device or next(given.parameters()).device)
        check_finite(given)
        given.requires_grad_(False).to(self._device)
        self._model = given
        self._dense = computing(copy.deepcopy(given))
        # For networks without half types the current network computes with its own weights.
        half = any(tensor.dtype in HALF for tensor in given.state_dict().values())
        self._current = computing(copy.deepcopy(given)) if half else given
        self._given = copy.deepcopy(given) if half else None
        floating = [p.dtype for p in self._dense.parameters() if p.is_floating_point()]
        self._dtype = floating[0] if floating else torch.float32
        self._changed: set[str] = set()
        self._integers, self._flat = self._data.integers, False
        self._fit()
        self._batch_size = batch_size or _fitting_batch(self._data, integers=self._integers)

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
    def captured(self) -> Captured | None:
        """The captured forward pass, where there is one."""
        return None

    @property
    def takes_numbers(self) -> bool:
        """Whether the network has one input, of floating-point numbers."""
        return not self._data.inputs and not self._integers

    def _retrainable(self, name: str, group: int = 0) -> LayerSpec:
        spec = layer(self, name)  # type: ignore[arg-type]  # the streams made of it are
        if spec.reason is not None:
            raise ValueError(f"name: layer {name!r} cannot be retrained: {spec.reason}")
        if not 0 <= group < spec.groups:
            raise ValueError(f"group: got {group}, layer {name!r} has {spec.groups}")
        return spec

    def _own_weight(self, spec: LayerSpec, weight: Array, dtype: torch.dtype) -> Tensor:
        """Check a new weight, and cast it to the layer's own type."""
        wanted = (spec.shape[0] + spec.bias, spec.shape[1])
        new = weight if isinstance(weight, Tensor) else torch.tensor(np.asarray(weight))
        if tuple(new.shape) != wanted:
            raise ValueError(
                f"weight: got shape {tuple(new.shape)}, want {wanted} for layer {spec.name!r}"
            )
        new = new.detach().to(self._device, dtype)
        if not torch.isfinite(new).all():
            raise ValueError(f"weight: layer {spec.name!r} got NaN or infinity in {dtype}")
        return new

    def _parts_of_identity(self, computation: dict[str, Any]) -> dict[str, Any]:
        """What decides a run's result; the weights are still the dense ones."""
        return {
            "arrays": "torch",
            "weights": weights_hash(self._model),
            "computation": {**computation, "layers": [repr(spec) for spec in self._layers]},
            "data": self._data.fingerprint,
            "batch size": self._batch_size,
        }

    # --- rows -----------------------------------------------------------------------------------

    def count(self, name: str) -> int:
        """Return the number of rows of a layer.

        Parameters
        ----------
        name : str
            Name of the layer.

        Returns
        -------
        int
            Rows of all its calls; positions that an attention mask excludes may be left out.
        """
        raise NotImplementedError

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
            If the layer cannot be retrained, `rows` are not increasing row numbers of the layer, or
            the retrained network calls it otherwise than the dense one.
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
        raise NotImplementedError

    # --- samples --------------------------------------------------------------------------------

    @property
    def _batches(self) -> int:
        return -(-len(self._data) // self._batch_size)

    def _size(self, batch: int) -> int:
        """Samples of a batch."""
        return min(self._batch_size, len(self._data) - batch * self._batch_size)

    def inputs(self, start: int, stop: int) -> Inputs:
        """Copy samples to the device, as the network takes them.

        Parameters
        ----------
        start, stop : int
            The samples' numbers.

        Returns
        -------
        tuple of (str or None, Tensor)
            Arguments of the forward pass; integers stay integers where the network takes them.
        """
        found = []
        for name, values in self._data.arguments(integers=self._integers):
            part = torch.tensor(values[start:stop], device=self._device)
            part = part.flatten(1) if self._flat else part
            found.append((name, part.to(self._dtype) if part.is_floating_point() else part))
        return tuple(found)

    def batch(self, number: int) -> Inputs:
        """Copy a batch of samples to the device.

        Parameters
        ----------
        number : int
            Number of the batch.

        Returns
        -------
        tuple of (str or None, Tensor)
            Arguments of the forward pass.
        """
        start = number * self._batch_size
        return self.inputs(start, min(start + self._batch_size, len(self._data)))

    def _answer(self, network: nn.Module, inputs: Inputs) -> Tensor:
        """Run a network; say in one line that it cannot take the samples."""
        try:
            with torch.no_grad():
                return forward(network, inputs).detach()
        except RUN_ERRORS as error:
            text = str(error).strip().split("\n")[0]
            raise ValueError(f"data: the network cannot take these samples: {text}") from error

    def _check_output(self, output: Tensor, batch: int) -> None:
        """Refuse a network whose output is not one entry for each sample."""
        size = self._size(batch)
        if output.shape[:1] != (size,):
            raise ValueError(
                f"model: returned {tuple(output.shape)} for {size} samples, want an output "
                "whose first axis is the sample"
            )

    def _few(self) -> Inputs:
        """Copy the first two samples, or one twice: a batch of one could be special."""
        return tuple((n, v if len(v) > 1 else torch.cat([v, v])) for n, v in self.inputs(0, 2))

    def _fit(self) -> None:
        """Run a few samples, to find the form in which the network takes them."""
        errors: list[str] = []
        for integers in dict.fromkeys((self._integers, False)):
            self._integers = integers
            problem = self._misfit()
            if isinstance(problem, nn.Linear):
                self._flat = True
                problem = self._misfit()
            if problem is None:
                return
            self._flat = False
            errors.append(str(problem))
        known = [text for text in errors if "data: layer" in text]
        raise ValueError((known or errors)[0])

    def _misfit(self) -> str | nn.Module | None:
        """Say why the network cannot take the data; a dense layer that wants it flattened."""
        entered: list[tuple[str, nn.Module, torch.Size]] = []
        with ExitStack() as hooks:
            for name, module in self._dense.named_modules():
                if _wants(module) is not None:

                    def keep(module: nn.Module, args: tuple[Any, ...], name: str = name) -> None:
                        if args and isinstance(args[0], Tensor):
                            entered.append((name, module, args[0].shape))

                    hooks.callback(module.register_forward_pre_hook(keep).remove)
            try:
                with torch.no_grad():
                    forward(self._dense, self._few())
            except CaptureError:
                raise
            except RUN_ERRORS as error:
                text = str(error).strip().split("\n")[0] or type(error).__name__
            else:
                return None
        shape = tuple(self._data.x.shape[1:])
        if entered:
            name, module, got = entered[-1]
            features = int(np.prod(shape))
            first = len(entered) == 1 and len(shape) > 1 and not self._flat
            if first and isinstance(module, nn.Linear) and module.in_features == features:
                return module
            wanted = _wants(module)
            if wanted is not None and not _takes(module, got):
                return (
                    f"data: layer {name!r} wants {wanted} and got "
                    f"{_given(module, got)}; samples have shape {shape}"
                )
        return f"data: the network cannot take samples of shape {shape}: {text}"

    def shaped(self, x: np.ndarray) -> np.ndarray:
        """Reshape samples to the form in which the network takes them, for training loops.

        Parameters
        ----------
        x : ndarray, shape (n_samples, ...)
            Samples, as in `retrain.data.arrays.Data.x`.

        Returns
        -------
        ndarray, shape (n_samples, n_features) or the original shape
            View of `x`.
        """
        return x.reshape(len(x), -1) if self._flat else x


def _wants(module: nn.Module) -> str | None:
    """What a layer's input has to be, in words; None for kinds whose input is not checked here."""
    if type(module) is nn.Linear:
        return f"{module.in_features} inputs"
    if type(module) is nn.Conv2d:
        return f"images of {module.in_channels} channels"
    return None


def _takes(module: nn.Module, got: torch.Size) -> bool:
    if isinstance(module, nn.Conv2d):
        return len(got) == 4 and got[1] == module.in_channels
    return bool(isinstance(module, nn.Linear) and got[-1] == module.in_features)


def _given(module: nn.Module, got: torch.Size) -> str:
    return f"shape {tuple(got[1:])}" if isinstance(module, nn.Conv2d) else str(got[-1])


def _fitting_batch(data: Data, *, integers: bool) -> int:
    """Number of samples whose inputs fit `_TOKENS` and `_NUMBERS`."""
    size = 1
    for _, values in data.arguments(integers=integers):
        each = int(np.prod(values.shape[1:]))
        most = _TOKENS if values.dtype.kind in "iu" else _NUMBERS
        size = max(size, -(-each * 256 // most))
    return max(1, 256 // size)
