"""What a method sees of a network: layers, their weights, and batches of activations.

Net-Trim, L-OBS, the bounds and the reports know a network only through `LayerStream`. The chain of
arrays (`retrain.stream.chain`) and the torch adapters implement it; graphs, convolutions and
transformers can, without a change in a method, because a method never asks how a layer's rows came
about: a dense layer has one row a sample, a convolution one row a patch, an attention projection
one row a token.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np
from array_api_compat import array_namespace

Array = Any
"""A numpy array or torch tensor. All arrays of one stream share a namespace and a device."""

Follows = Literal["relu", "linear"]
Norm = Literal["spectral", "frobenius"]


@dataclass(frozen=True)
class LayerSpec:
    """One layer of a network, as a method sees it.

    Attributes
    ----------
    name : str
        The layer's name in the network: for a torch module, its qualified name.
    kind : str
        ``"linear"``, ``"conv2d"``, or the class name of what cannot be retrained.
    shape : tuple of int
        ``(n_in, n_out)`` of one group's weight matrix, without the bias row.
    bias : bool
        Whether the layer has a bias. Then `LayerStream.weight` has ``n_in + 1`` rows, the bias
        last, and the batches' inputs a last column of ones.
    follows : {"relu", "linear"}
        What the response meets next. Anything but a ReLU counts as linear: every entry of the
        response then matters.
    groups : int
        How many weight matrices the layer holds (grouped convolutions); 1 otherwise.
    reason : str or None
        Why the layer cannot be retrained, or None when it can.
    """

    name: str
    kind: str
    shape: tuple[int, int]
    bias: bool
    follows: Follows
    groups: int = 1
    reason: str | None = None

    @property
    def size(self) -> int:
        """Number of weights that may be pruned: all groups, biases not counted."""
        return self.groups * self.shape[0] * self.shape[1]


@dataclass(frozen=True)
class LayerBatch:
    """Aligned rows of one layer (one group of it).

    Attributes
    ----------
    inputs : array, shape (rows, n_in [+ 1])
        What the layer receives in the network as it is now, after every `LayerStream.commit`.
    dense_inputs : array, shape (rows, n_in [+ 1])
        What it receives in the network as it was given.
    responses : array, shape (rows, n_out)
        The given network's response, before the activation.
    rows : ndarray of int64, shape (rows,)
        Which of the layer's ``count(name)`` rows these are.
    """

    inputs: Array
    dense_inputs: Array
    responses: Array
    rows: np.ndarray


@dataclass(frozen=True)
class Gain:
    """A Lipschitz factor from a layer's (activated) output to the network's output.

    Attributes
    ----------
    value : float or None
        The factor, or None where there is no finite one.
    reason : str or None
        Why there is none.
    """

    value: float | None
    reason: str | None = None


def compound(first: float, second: float) -> float:
    """Multiply two Lipschitz factors; a product of positive ones never underflows to 0."""
    return max(first * second, sys.float_info.min) if first and second else 0.0


@dataclass(frozen=True)
class Passage:
    """What one passage of all samples through both networks finds. All norms in float64.

    Attributes
    ----------
    rows : int
        Number of samples.
    measured : float
        |Yhat - Y|_F of the outputs, as both networks compute them.
    size : float
        |Y|_F of the given network's outputs.
    discrepancies : dict from str to float
        By changed layer, |act(X What) - act(X W)|_F on the dense network's inputs X in float64.
    errors : dict from str to float
        The same before the activation, |X (What - W)|_F.
    rounding : float or None
        What the arithmetic of the two networks can have contributed to the outputs' deviation, and
        to a bound on it; see `retrain.bounds.outputs`. None where that has no bound.
    reason : str or None
        Why `rounding` is None.
    """

    rows: int
    measured: float
    size: float
    discrepancies: dict[str, float]
    errors: dict[str, float]
    rounding: float | None
    reason: str | None = None


class LayerStream(Protocol):
    """A network and a data set, layer by layer.

    Batches are recomputed from the data each time they are asked for, so that memory stays bounded
    by one batch and every iteration yields the same rows in the same order.
    """

    @property
    def fingerprint(self) -> str:
        """SHA-256 of `identity` (`identity_hash`)."""
        ...

    @property
    def identity(self) -> dict[str, Any]:
        """What the run's results depend on here, by name, as JSON values.

        ``arrays`` ("numpy" or "torch": who computes), ``weights`` and ``data`` (hashes), and
        ``computation``: the function that the given network is.
        """
        ...

    @property
    def layers(self) -> Sequence[LayerSpec]:
        """All layers with weights in execution order, those that cannot be retrained included."""
        ...

    def weight(self, name: str, group: int = 0, *, dense: bool = False) -> Array:
        """Weight matrix (n_in [+ 1], n_out), bias last: as it is now, or as given when `dense`."""
        ...

    def count(self, name: str) -> int:
        """How many rows the layer has on this data."""
        ...

    def batches(
        self, name: str, group: int = 0, *, rows: np.ndarray | None = None
    ) -> Iterator[LayerBatch]:
        """Yield the layer's rows in order; only the given sorted `rows` when there are any."""
        ...

    def commit(self, name: str, weight: Array, group: int = 0) -> None:
        """Replace a weight, cast to the network's own dtype; later `inputs` are made with it."""
        ...

    def gain(self, name: str, *, norm: Norm = "spectral") -> Gain:
        """Lipschitz factor from the layer's output to the network's, with the current weights."""
        ...

    def outputs(self, *, dense: bool) -> Iterator[Array]:
        """Yield the network's outputs batch by batch: of the given network, or of the current."""
        ...

    def passage(self) -> Passage:
        """Send the data through both networks once; measure what the bounds are made of."""
        ...

    def output_layer(self) -> tuple[str | None, str]:
        """Name the layer whose activated response is the network's output, or say why none is.

        Between the layer and the output there is an activation with slopes of at most 1 and
        reshaping, nothing else; so what another layer contributes passes through this one.
        """
        ...


def layer(stream: LayerStream, name: str) -> LayerSpec:
    """Return the spec of the layer called `name`.

    Raises
    ------
    ValueError
        If the stream has no such layer.
    """
    for spec in stream.layers:
        if spec.name == name:
            return spec
    names = ", ".join(spec.name for spec in stream.layers)
    raise ValueError(f"name: no layer is called {name!r}; there are {names}")


def changed(stream: LayerStream, spec: LayerSpec) -> bool:
    """Tell whether a layer's weights are no longer the given ones."""
    pairs = (
        (stream.weight(spec.name, group), stream.weight(spec.name, group, dense=True))
        for group in range(spec.groups)
    )
    return any(not bool(array_namespace(old).all(new == old)) for new, old in pairs)


def identity_hash(identity: Mapping[str, Any]) -> str:
    """SHA-256 of a stream's `identity`."""
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()


def collect(
    stream: LayerStream, name: str, group: int = 0, *, rows: np.ndarray | None = None
) -> LayerBatch:
    """Concatenate a layer's batches into one.

    Parameters
    ----------
    stream : LayerStream
        The network and its data.
    name : str
        The layer.
    group : int, optional
        The group of a grouped layer.
    rows : ndarray of int64, optional
        Sorted row numbers; all rows by default.

    Returns
    -------
    LayerBatch
        All (chosen) rows. Memory: rows x (2 n_in + n_out) numbers.

    Raises
    ------
    ValueError
        If there is no row.
    """
    parts = list(stream.batches(name, group, rows=rows))
    if not parts:
        raise ValueError(f"rows: layer {name!r} has no rows on this data")
    xp = array_namespace(parts[0].inputs)

    def join(field: str) -> Array:
        return xp.concat([getattr(part, field) for part in parts], axis=0)

    return LayerBatch(
        join("inputs"),
        join("dense_inputs"),
        join("responses"),
        np.concatenate([part.rows for part in parts]),
    )


def sample_rows(count: int, limit: int, seed: int) -> np.ndarray | None:
    """Choose `limit` of `count` rows by seed, sorted; None when all of them fit.

    The choice depends on nothing but the three numbers, so a layer's dense and current inputs, and
    a resumed run, see the same rows.
    """
    if count <= limit:
        return None
    return np.sort(np.random.default_rng(seed).choice(count, size=limit, replace=False))
