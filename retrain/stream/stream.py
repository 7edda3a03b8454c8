"""The view that a method has of a network: layers, their weights, and batches of activations.

Net-Trim, L-OBS, the bounds and the reports know a network only through `LayerStream`. The chain of
arrays (`retrain.stream.chain`) and the torch adapters implement it; graphs, convolutions and
transformers can, without a change in a method, because a method never asks where a layer's rows
come from: a dense layer has one row per sample, a convolution one row per patch, an attention
projection one row per token.
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
"""Operation after a layer's response; every operation but a ReLU counts as linear."""

Norm = Literal["spectral", "frobenius"]
"""Matrix norm from which a gain is computed; the Frobenius norm is never the smaller one."""


@dataclass(frozen=True)
class LayerSpec:
    """One layer of a network, as a method sees it.

    Attributes
    ----------
    name : str
        Name of the layer in the network: for a torch module, its qualified name.
    kind : str
        ``"linear"``, ``"conv2d"``, or the class name of a layer that cannot be retrained.
    shape : tuple of int
        ``(n_in, n_out)`` of one group's weight matrix, without the bias row.
    bias : bool
        Whether the layer has a bias. Then `LayerStream.weight` has ``n_in + 1`` rows, the bias
        last, and the batches' inputs a last column of ones.
    follows : {"relu", "linear"}
        Operation after the response. Anything but a ReLU counts as linear: every entry of the
        response then matters.
    groups : int
        Number of weight matrices of the layer (grouped convolutions); 1 otherwise.
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
        Inputs of the layer in the current network, after every `LayerStream.commit`.
    dense_inputs : array, shape (rows, n_in [+ 1])
        Inputs of the layer in the dense network.
    responses : array, shape (rows, n_out)
        Dense network's response, before the activation.
    rows : ndarray of int64, shape (rows,)
        Row numbers, from 0 to ``count(name) - 1``.
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
        Factor, dimensionless; None where no finite one is known.
    reason : str or None
        Why `value` is None.
    """

    value: float | None
    reason: str | None = None


def compound(first: float, second: float) -> float:
    """Multiply two Lipschitz factors; a product of positive ones never underflows to 0.

    Parameters
    ----------
    first, second : float
        Factors, at least 0.

    Returns
    -------
    float
        Product; at least the smallest normal float64 where both factors are positive.
    """
    return max(first * second, sys.float_info.min) if first and second else 0.0


@dataclass(frozen=True)
class Passage:
    """Measurements of one passage of all samples through both networks. All norms in float64.

    Attributes
    ----------
    rows : int
        Number of samples.
    measured : float
        |Yhat - Y|_F of the outputs, as both networks compute them.
    size : float
        |Y|_F of the dense network's outputs.
    discrepancies : dict from str to float
        |act(X What) - act(X W)|_F by changed layer, on the dense network's inputs X in float64.
    errors : dict from str to float
        The same before the activation, |X (What - W)|_F.
    rounding : float or None
        Bound on the contribution of the two networks' arithmetic to the outputs' deviation, and to
        a bound on it; see `retrain.bounds.outputs`. None where it has no bound.
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
        """Everything in the network and the data that results depend on, as JSON values by name.

        ``arrays`` ("numpy" or "torch": the library that computes), ``weights`` and ``data``
        (hashes), and ``computation``: the function that the dense network computes.
        """
        ...

    @property
    def layers(self) -> Sequence[LayerSpec]:
        """All layers with weights in execution order, those that cannot be retrained included."""
        ...

    def weight(self, name: str, group: int = 0, *, dense: bool = False) -> Array:
        """Return a copy or view of a weight matrix.

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
        array, shape (n_in [+ 1], n_out)
            Weight matrix, the bias last.
        """
        ...

    def count(self, name: str) -> int:
        """Return the number of rows that the layer has on this data.

        Parameters
        ----------
        name : str
            Name of the layer.

        Returns
        -------
        int
            Number of rows: samples times positions.
        """
        ...

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
        """
        ...

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
            If the weight has another shape, or the layer cannot be retrained.
        """
        ...

    def gain(self, name: str, *, norm: Norm = "spectral") -> Gain:
        """Bound the Lipschitz factor from the layer's output to the network's (current weights).

        Parameters
        ----------
        name : str
            Name of the layer.
        norm : {"spectral", "frobenius"}
            Norm of the later layers' weights.

        Returns
        -------
        Gain
            Factor for Frobenius norms over the samples, or the reason why none is known.
        """
        ...

    def outputs(self, *, dense: bool) -> Iterator[Array]:
        """Yield the network's outputs batch by batch.

        Parameters
        ----------
        dense : bool
            Whether the dense network computes them, or the current one.

        Yields
        ------
        array, shape (samples, ...)
            Outputs of one batch.
        """
        ...

    def passage(self) -> Passage:
        """Send the data through both networks once, and measure what the bounds need.

        Returns
        -------
        Passage
            Deviations, discrepancies and the allowance for rounding.
        """
        ...

    def output_layer(self) -> tuple[str | None, str]:
        """Name the layer whose activated response is the network's output.

        Between the layer and the output there is an activation with slopes of at most 1 and
        reshaping, nothing else; so the contribution of every other layer passes through this one.

        Returns
        -------
        name : str or None
            Name of the layer; None where there is no such layer.
        reason : str
            Why there is none; empty with a name.
        """
        ...


def layer(stream: LayerStream, name: str) -> LayerSpec:
    """Return the spec of the layer called `name`.

    Parameters
    ----------
    stream : LayerStream
        Network.
    name : str
        Name of the layer.

    Returns
    -------
    LayerSpec
        Layer of that name.

    Raises
    ------
    ValueError
        If the stream has no layer of that name.
    """
    for spec in stream.layers:
        if spec.name == name:
            return spec
    names = ", ".join(spec.name for spec in stream.layers)
    raise ValueError(f"name: no layer is called {name!r}; there are {names}")


def changed(stream: LayerStream, spec: LayerSpec) -> bool:
    """Tell whether a layer's current weights differ from the dense ones.

    Parameters
    ----------
    stream : LayerStream
        Network.
    spec : LayerSpec
        Layer.

    Returns
    -------
    bool
        Whether any entry of any group differs.
    """
    pairs = (
        (stream.weight(spec.name, group), stream.weight(spec.name, group, dense=True))
        for group in range(spec.groups)
    )
    return any(not bool(array_namespace(old).all(new == old)) for new, old in pairs)


def identity_hash(identity: Mapping[str, Any]) -> str:
    """Hash a stream's `identity`.

    Parameters
    ----------
    identity : mapping
        JSON values.

    Returns
    -------
    str
        SHA-256 of its sorted JSON, in hexadecimal.
    """
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()


def collect(
    stream: LayerStream, name: str, group: int = 0, *, rows: np.ndarray | None = None
) -> LayerBatch:
    """Concatenate a layer's batches into one.

    Parameters
    ----------
    stream : LayerStream
        Network and its data.
    name : str
        Name of the layer.
    group : int, optional
        Index of the group, from 0.
    rows : ndarray of int64, optional
        Sorted row numbers; all rows by default.

    Returns
    -------
    LayerBatch
        All (chosen) rows.

    Raises
    ------
    ValueError
        If the layer has no rows on this data.

    Notes
    -----
    Memory: rows x (2 n_in + n_out) numbers.
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
    """Choose `limit` of `count` rows by seed.

    The choice depends only on the three numbers, so a layer's dense and current inputs, and a
    resumed run, use the same rows.

    Parameters
    ----------
    count : int
        Number of rows available.
    limit : int
        Largest number of rows to choose.
    seed : int
        Seed of the choice.

    Returns
    -------
    ndarray of int64, shape (limit,), or None
        Sorted row numbers; None when all rows fit.
    """
    if count <= limit:
        return None
    return np.sort(np.random.default_rng(seed).choice(count, size=limit, replace=False))
