"""The paper's network TN({W_l}, X) as plain arrays: forward pass, link normalisation, stream.

    Y^(0) = X,    Y^(l) = max(W_l^T Y^(l-1) + b_l, 0)                                  (1)

with samples as rows here, and with or without the last ReLU. Biases are not in the paper; a last
row of the weight matrix holds them.
"""

from __future__ import annotations

import hashlib
import logging
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from array_api_compat import array_namespace, device, is_numpy_namespace

from retrain.stream.stream import (
    Array,
    Follows,
    Gain,
    LayerBatch,
    LayerSpec,
    Norm,
    Passage,
    compound,
    identity_hash,
    layer,
)
from retrain.stream.stream import changed as is_changed
from solvers.arrays import like, to_numpy
from solvers.arrays import norm as frobenius

_log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Chain:
    """A feed-forward network of dense layers as a list of weight matrices.

    Attributes
    ----------
    weights : tuple of array, shape (n_in, n_out) or (n_in + 1, n_out) each
        One weight matrix per layer; a layer with a bias has it as the last row. Numpy or torch,
        float32 or float64, all of the same kind.
    biases : tuple of bool
        Whether each layer has a bias row; by default none has.
    follows : tuple of {"relu", "linear"}
        Activation after each layer. By default a ReLU after every layer but the last.

    Raises
    ------
    ValueError
        If consecutive widths differ, a matrix is empty or not finite, or the tuples' lengths
        differ.

    Notes
    -----
    The arrays are not copied: memory is that of the weights given. Building a chain reads every
    weight once, to check that it is finite.

    Examples
    --------
    >>> import numpy as np
    >>> import retrain
    >>> chain = retrain.Chain((np.ones((4, 3)), np.ones((4, 2))), biases=(False, True))
    >>> len(chain), chain.shape(1), chain.follows
    (2, (3, 2), ('relu', 'linear'))
    """

    weights: tuple[Array, ...]
    biases: tuple[bool, ...] = ()
    follows: tuple[Follows, ...] = ()

    def __post_init__(self) -> None:
        weights = tuple(self.weights)
        object.__setattr__(self, "weights", weights)
        object.__setattr__(self, "biases", tuple(self.biases) or (False,) * len(weights))
        relu: Follows = "relu"
        default: tuple[Follows, ...] = (*[relu] * (len(weights) - 1), "linear")
        object.__setattr__(self, "follows", tuple(self.follows) or default)
        if not weights:
            raise ValueError("weights: got none, want at least one layer")
        if not len(weights) == len(self.biases) == len(self.follows):
            raise ValueError(
                f"biases, follows: want {len(weights)} entries, one a layer, "
                f"got {len(self.biases)} and {len(self.follows)}"
            )
        for index, weight in enumerate(weights):
            xp = array_namespace(weight)
            if weight.ndim != 2 or 0 in weight.shape:
                raise ValueError(
                    f"weights: layer {index}: got {tuple(weight.shape)}, want a matrix"
                )
            if weight.dtype not in (xp.float32, xp.float64):
                raise ValueError(f"weights: layer {index}: got {weight.dtype}, want float32 or 64")
            if not bool(xp.all(xp.isfinite(weight))):
                raise ValueError(f"weights: layer {index} has NaN or infinite entries")
            if self.follows[index] not in ("relu", "linear"):
                raise ValueError(f"follows: got {self.follows[index]!r}, want 'relu' or 'linear'")
            if index and self.shape(index)[0] != self.shape(index - 1)[1]:
                raise ValueError(
                    f"weights: layer {index} takes {self.shape(index)[0]} inputs, "
                    f"but layer {index - 1} gives {self.shape(index - 1)[1]}"
                )

    def __len__(self) -> int:
        return len(self.weights)

    def links(self, index: int) -> Array:
        """Return a layer's weights without the bias row.

        Parameters
        ----------
        index : int
            Number of the layer, from 0.

        Returns
        -------
        array, shape (n_in, n_out)
            View of the weights.
        """
        return self.weights[index][:-1, :] if self.biases[index] else self.weights[index]

    def shape(self, index: int) -> tuple[int, int]:
        """Return the size of a layer; the bias row is not counted.

        Parameters
        ----------
        index : int
            Number of the layer, from 0.

        Returns
        -------
        tuple of int
            (n_in, n_out).
        """
        rows, columns = self.weights[index].shape
        return rows - int(self.biases[index]), columns


def response(chain: Chain, index: int, inputs: Array) -> Array:
    """Compute a layer's response before the activation, bias included.

    Parameters
    ----------
    chain : Chain
        Network.
    index : int
        Number of the layer, from 0.
    inputs : array, shape (n_samples, n_in)
        Inputs of the layer, without a column of ones.

    Returns
    -------
    array, shape (n_samples, n_out)
        Response.
    """
    weight = chain.weights[index]
    if not chain.biases[index]:
        return inputs @ weight
    return inputs @ weight[:-1, :] + weight[-1, :]


def activate(follows: Follows, values: Array) -> Array:
    """Apply the activation after a layer: the ReLU or nothing.

    Parameters
    ----------
    follows : {"relu", "linear"}
        Activation.
    values : array
        Response, of any shape.

    Returns
    -------
    array
        Activated response, of the same shape; `values` itself for ``"linear"``.
    """
    if follows == "linear":
        return values
    xp = array_namespace(values)
    return xp.maximum(values, xp.zeros_like(values))


def forward(chain: Chain, inputs: Array) -> list[Array]:
    """Compute all layer outcomes [Y^(1), ..., Y^(L)] of (1).

    Parameters
    ----------
    chain : Chain
        Network.
    inputs : array, shape (n_samples, n_in)
        X, one sample per row.

    Returns
    -------
    list of array, shape (n_samples, n_out) each
        Activated response of every layer, in execution order.

    References
    ----------
    Aghasi et al., Net-Trim (2017), eq. (1).
    """
    outcomes = []
    for index in range(len(chain)):
        inputs = activate(chain.follows[index], response(chain, index, inputs))
        outcomes.append(inputs)
    return outcomes


def link_normalise(chain: Chain) -> tuple[Chain, np.ndarray]:
    """Scale every layer's weights to entry-wise ``|W_l|_1 = 1``.

    Since ``max(a x, 0) = a max(x, 0)`` for a > 0, the normalised network's outcomes are those of
    the original network divided by the product of the scales so far:

        W'_l = W_l / s_l,   b'_l = b_l / (s_1 ... s_l),   s_l = |W_l|_1,
        Y'^(l) = Y^(l) / (s_1 ... s_l).

    (The bias adds to a response already divided by all earlier scales, so it needs all of them. The
    paper has no biases, and the product in its section 2 starts at index 0, one index too many.)

    Parameters
    ----------
    chain : Chain
        Network.

    Returns
    -------
    chain : Chain
        The normalised network.
    scales : ndarray, shape (L,)
        s_l. `link_denormalise` brings weights back.

    Raises
    ------
    ValueError
        If a layer's weights are all zero.

    References
    ----------
    Aghasi et al., Net-Trim (2017), section 2.
    """
    scales = []
    for index, weight in enumerate(chain.weights):
        xp = array_namespace(weight)
        rows = weight[:-1, :] if chain.biases[index] else weight
        scale = float(xp.sum(xp.abs(xp.astype(rows, xp.float64))))
        if scale == 0:
            raise ValueError(f"weights: layer {index} is all zero and cannot be link-normalised")
        scales.append(scale)
    return _rescale(chain, np.array(scales)), np.array(scales)


def link_denormalise(chain: Chain, scales: np.ndarray) -> Chain:
    """Undo `link_normalise`: W_l = s_l W'_l, b_l = (s_1 ... s_l) b'_l.

    Parameters
    ----------
    chain : Chain
        Link-normalised network.
    scales : ndarray, shape (L,)
        s_l, as `link_normalise` returned them.

    Returns
    -------
    Chain
        Network in the original scale.

    Raises
    ------
    ValueError
        If there is not one scale per layer.
    """
    if len(scales) != len(chain):
        raise ValueError(f"scales: got {len(scales)}, want {len(chain)}, one a layer")
    return _rescale(chain, 1 / np.asarray(scales))


def _rescale(chain: Chain, scales: np.ndarray) -> Chain:
    weights = []
    for index, weight in enumerate(chain.weights):
        xp = array_namespace(weight)
        divisor = np.full((weight.shape[0], 1), scales[index])
        if chain.biases[index]:
            divisor[-1] = np.prod(scales[: index + 1])
        wide = xp.astype(weight, xp.float64) / like(divisor, weight)
        weights.append(xp.astype(wide, weight.dtype))
    return replace(chain, weights=tuple(weights))


def spectral_norm(weight: Array) -> float:
    """Compute the largest singular value of a weight matrix, rounded up beyond the SVD's error.

    LAPACK's singular values are off by a small multiple of eps max(n_in, n_out); ten times that is
    added.

    Parameters
    ----------
    weight : array, shape (n_in, n_out)
        Weight matrix without the bias row.

    Returns
    -------
    float
        Upper bound on the spectral norm, in float64.
    """
    matrix = to_numpy(weight).astype(np.float64)
    return float(np.linalg.norm(matrix, 2) * (1 + 10 * max(matrix.shape) * 2.0**-52))


class ChainStream:
    """A `Chain` and its data as a `retrain.stream.stream.LayerStream`.

    Parameters
    ----------
    chain : Chain
        Network. It is not changed: `commit` replaces weights of a copy, `chain`.
    inputs : array, shape (n_samples, n_in)
        Data, of the weights' namespace and device; cast to their dtype.
    batch_size : int
        Number of samples per batch. Larger batches take more memory and fewer calls.

    Raises
    ------
    ValueError
        If the data is empty, not finite or not as wide as the first layer.
    """

    def __init__(self, chain: Chain, inputs: Array, *, batch_size: int = 4096) -> None:
        xp = array_namespace(inputs)
        want = chain.shape(0)[0]
        if inputs.ndim != 2 or inputs.shape[0] == 0 or inputs.shape[1] != want:
            raise ValueError(f"data: got shape {tuple(inputs.shape)}, want (n_samples, {want})")
        if not bool(xp.all(xp.isfinite(inputs))):
            raise ValueError("data: has NaN or infinite entries")
        self.dense = chain
        self.chain = chain
        self._inputs = xp.astype(inputs, chain.weights[0].dtype, copy=False)
        self._batch_size = batch_size
        self._identity = {
            "arrays": "numpy" if is_numpy_namespace(xp) else "torch",
            "weights": _hash(chain.weights),
            "computation": {
                "steps": [
                    f"{follows} of inputs @ {tuple(weight.shape)}{' with a bias' if bias else ''}"
                    for weight, bias, follows in zip(
                        chain.weights, chain.biases, chain.follows, strict=True
                    )
                ]
            },
            "data": _hash([self._inputs]),
            "batch size": batch_size,
        }

    @property
    def fingerprint(self) -> str:
        """SHA-256 of `identity`."""
        return identity_hash(self._identity)

    @property
    def device(self) -> Any:
        """Device of the arrays."""
        return device(self._inputs)

    @property
    def identity(self) -> dict[str, Any]:
        """The dense weights, the operations between them, and the data, as JSON values."""
        return self._identity

    @property
    def layers(self) -> Sequence[LayerSpec]:
        """One dense layer per weight matrix, named "0", "1", ..."""
        return [
            LayerSpec(
                name=str(index),
                kind="linear",
                shape=self.dense.shape(index),
                bias=self.dense.biases[index],
                follows=self.dense.follows[index],
            )
            for index in range(len(self.dense))
        ]

    def _index(self, name: str) -> int:
        return int(layer(self, name).name)

    def weight(self, name: str, group: int = 0, *, dense: bool = False) -> Array:
        """Return a layer's weight matrix.

        Parameters
        ----------
        name : str
            Name of the layer.
        group : int, optional
            Index of the group; a chain has one group per layer, 0.
        dense : bool, optional
            Whether to return the dense network's weight instead of the current one.

        Returns
        -------
        array, shape (n_in [+ 1], n_out)
            Weight matrix, the bias last; not a copy.
        """
        return (self.dense if dense else self.chain).weights[self._index(name)]

    def count(self, name: str) -> int:
        """Return the number of rows: one per sample.

        Parameters
        ----------
        name : str
            Name of the layer.

        Returns
        -------
        int
            Number of samples.
        """
        self._index(name)
        return self._inputs.shape[0]

    def batches(
        self, name: str, group: int = 0, *, rows: np.ndarray | None = None
    ) -> Iterator[LayerBatch]:
        """Run both networks up to the layer, batch by batch.

        Parameters
        ----------
        name : str
            Name of the layer.
        group : int, optional
            Index of the group; a chain has one group per layer, 0.
        rows : ndarray of int, optional
            Sorted row numbers; all rows by default.

        Yields
        ------
        LayerBatch
            Aligned rows of the current and the dense network.
        """
        index = self._index(name)
        xp = array_namespace(self._inputs)
        chosen = np.arange(self.count(name)) if rows is None else np.asarray(rows)
        for start in range(0, len(chosen), self._batch_size):
            part = chosen[start : start + self._batch_size]
            dense = current = xp.take(self._inputs, like(part, self._inputs), axis=0)
            for earlier in range(index):
                follows = self.dense.follows[earlier]
                dense = activate(follows, response(self.dense, earlier, dense))
                current = activate(follows, response(self.chain, earlier, current))
            responses = response(self.dense, index, dense)
            if self.dense.biases[index]:
                dense, current = _with_ones(dense), _with_ones(current)
            yield LayerBatch(current, dense, responses, part)

    def commit(self, name: str, weight: Array, group: int = 0) -> None:
        """Replace a layer's weight in `chain`.

        Parameters
        ----------
        name : str
            Name of the layer.
        weight : array, shape (n_in [+ 1], n_out)
            New weight, the bias last; cast to the layer's dtype.
        group : int, optional
            Index of the group; a chain has one group per layer, 0.

        Raises
        ------
        ValueError
            If the weight has another shape.
        """
        index = self._index(name)
        old = self.chain.weights[index]
        if tuple(weight.shape) != tuple(old.shape):
            raise ValueError(f"weight: got {tuple(weight.shape)}, want {tuple(old.shape)}")
        weights = list(self.chain.weights)
        weights[index] = array_namespace(old).astype(weight, old.dtype)
        self.chain = replace(self.chain, weights=tuple(weights))

    def gain(self, name: str, *, norm: Norm = "spectral") -> Gain:
        """Compute the product of the later layers' norms without bias rows (ReLU is 1-Lipschitz).

        Parameters
        ----------
        name : str
            Name of the layer.
        norm : {"spectral", "frobenius"}
            Norm of the later layers' weights.

        Returns
        -------
        Gain
            Factor; None with the reason where the product overflows.
        """
        value = _gains(self.chain, spectral_norm if norm == "spectral" else frobenius)[
            self._index(name)
        ]
        if not math.isfinite(value):
            return Gain(None, "the product of the later layers' norms overflows")
        return Gain(value)

    def outputs(self, *, dense: bool) -> Iterator[Array]:
        """Yield Y^(L), batch by batch.

        Parameters
        ----------
        dense : bool
            Whether the dense network computes it, or the current one.

        Yields
        ------
        array, shape (samples, n_out)
            Outputs of one batch.
        """
        chain = self.dense if dense else self.chain
        for start in range(0, self._inputs.shape[0], self._batch_size):
            yield forward(chain, self._inputs[start : start + self._batch_size, :])[-1]

    def output_layer(self) -> tuple[str | None, str]:
        """Name the last layer, whose activated response is the output.

        Returns
        -------
        name : str
            Name of the last layer.
        reason : str
            Empty.
        """
        return str(len(self.dense) - 1), ""

    def passage(self) -> Passage:
        """Send the data through both networks once, in their own dtype and in float64.

        `retrain.adapters.network.passage` describes what is measured and why; the nodes of a chain
        are its layers.

        Returns
        -------
        Passage
            Deviations, discrepancies and the allowance for rounding.
        """
        chains = (self.dense, self.chain)
        wide = tuple(
            replace(chain, weights=tuple(map(_widened, chain.weights))) for chain in chains
        )
        changed = [int(spec.name) for spec in self.layers if is_changed(self, spec)]
        discrepancy, errors = dict.fromkeys(changed, 0.0), dict.fromkeys(changed, 0.0)
        losses = np.zeros((2, len(self.dense)))
        xp = array_namespace(self._inputs)
        limit = float(xp.finfo(self._inputs.dtype).max)
        moved, size, rows, own = 0.0, 0.0, 0, 0.0
        for start in range(0, self._inputs.shape[0], self._batch_size):
            batch = self._inputs[start : start + self._batch_size, :]
            _log.info("bounds: both networks on %d samples, after %d", batch.shape[0], start)
            rows += batch.shape[0]
            ends = [forward(chain, batch) for chain in chains]
            moved = math.hypot(moved, frobenius(_widened(ends[1][-1]) - _widened(ends[0][-1])))
            size = math.hypot(size, frobenius(ends[0][-1]))
            received = ends[1][-2] if len(self.chain) > 1 else batch
            apart = [_loss(self.chain, len(self.chain) - 1, received)]
            for which, chain in enumerate(wide):
                values = _widened(batch)
                for index, follows in enumerate(chain.follows):
                    lost = _allowance(chain, index, values)
                    losses[which, index] = math.hypot(losses[which, index], lost)
                    given = response(chain, index, values)
                    if _largest(given) > limit:
                        losses[which, index] = math.inf
                    if which == 0 and index in changed:
                        new = response(wide[1], index, values)
                        gone = frobenius(activate(follows, new) - activate(follows, given))
                        discrepancy[index] = math.hypot(discrepancy[index], gone)
                        errors[index] = math.hypot(errors[index], frobenius(new - given))
                    values = activate(follows, given)
                apart.append(frobenius(_widened(ends[which][-1]) - values))
            own = math.hypot(own, sum(apart))
        rounding, reason = 0.0, None
        if changed:
            gains = np.array([_gains(chain, spectral_norm) for chain in chains])
            with np.errstate(over="ignore", invalid="ignore"):
                rounding = own + float(losses[0] @ (gains[0] + gains[1]) + losses[1] @ gains[1])
            if not math.isfinite(rounding):
                reason = _overflow(losses)
        return Passage(
            rows,
            moved,
            size,
            {str(index): value for index, value in discrepancy.items()},
            {str(index): value for index, value in errors.items()},
            rounding if reason is None else None,
            reason,
        )


def _gains(chain: Chain, measure: Callable[[Array], float]) -> list[float]:
    """Compute the product of the norms of the layers after each one."""
    products = [1.0]
    for index in range(len(chain) - 1, 0, -1):
        products.append(compound(measure(chain.links(index)), products[-1]))
    return products[::-1]


def _overflow(losses: np.ndarray) -> str:
    """Name the first layer with a value that is not finite."""
    bad = np.flatnonzero(~np.isfinite(losses).all(axis=0))
    return f"layer {bad[0]} overflows" if bad.size else "an output overflows"


def _largest(array: Array) -> float:
    xp = array_namespace(array)
    return float(xp.max(xp.abs(array)))


def _widened(array: Array) -> Array:
    xp = array_namespace(array)
    return xp.astype(array, xp.float64, copy=False)


def _allowance(chain: Chain, index: int, inputs: Array) -> float:
    """Bound the error of a layer's response in float64, over all rows.

    A sum of K products is off by at most K u times the sum of their magnitudes, and K times the
    smallest number (Higham, Accuracy and Stability of Numerical Algorithms, section 3.1), u the
    unit roundoff.
    """
    terms = chain.shape(index)[0] + 2
    rows, units = inputs.shape[0], chain.shape(index)[1]
    size = frobenius(inputs) * frobenius(chain.links(index))
    if chain.biases[index]:
        size += math.sqrt(rows) * frobenius(chain.weights[index][-1:, :])
    return 2 * terms * (2.0**-53 * size + 2.0**-1074 * math.sqrt(rows * units))


def _loss(chain: Chain, index: int, inputs: Array) -> float:
    """Bound the distance of a layer's response in its own dtype from the exact one."""
    wide = replace(chain, weights=tuple(map(_widened, chain.weights)))
    exact = response(wide, index, _widened(inputs))
    given = _widened(response(chain, index, inputs))
    return frobenius(exact - given) + _allowance(wide, index, _widened(inputs))


def _hash(arrays: Iterable[Array]) -> str:
    """SHA-256 of arrays: shapes, types, order in memory (which decides the kernels), bytes."""
    digest = hashlib.sha256()
    for array in arrays:
        values = to_numpy(array)
        order = "C" if values.flags.c_contiguous else f"{values.strides}"
        digest.update(repr((tuple(array.shape), str(array.dtype), order)).encode())
        digest.update(np.ascontiguousarray(values).tobytes())
    return digest.hexdigest()


def _with_ones(inputs: Array) -> Array:
    """Append the column that carries the bias."""
    xp = array_namespace(inputs)
    ones: Any = xp.ones((inputs.shape[0], 1), dtype=inputs.dtype, device=device(inputs))
    return xp.concat([inputs, ones], axis=1)
