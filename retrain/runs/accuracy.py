"""Accuracies of a stream's two networks, where the data has a class for each sample."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from retrain.data.arrays import Data
from retrain.data.labels import Labels, class_labels, class_numbers
from retrain.stream.stream import LayerStream, layer
from solvers.arrays import to_numpy

if TYPE_CHECKING:
    pass


def labels_for(stream: LayerStream, y: np.ndarray | None) -> Labels:
    """Read class numbers for the network of a stream.

    The number of classes is taken from the shape of the dense network's first batch of outputs.

    Parameters
    ----------
    stream : LayerStream
        Network on the data that the labels belong to.
    y : ndarray or None, shape (n_samples, ...)
        Labels as the data has them.

    Returns
    -------
    Labels
        Class numbers, or the reason why there are none.
    """
    if y is None:
        return class_numbers(y)
    outputs = next(iter(stream.outputs(dense=True)))
    return class_labels(y, tuple(int(size) for size in outputs.shape[1:]))


_log = logging.getLogger(__name__)


def copy_weights(source: LayerStream, target: LayerStream, names: Sequence[str]) -> None:
    """Commit one stream's weights of the named layers to another stream of the same network.

    Parameters
    ----------
    source : LayerStream
        Stream whose current weights are read.
    target : LayerStream
        Stream whose weights are replaced.
    names : sequence of str
        Names of the layers.
    """
    for name in names:
        for group in range(layer(source, name).groups):
            target.commit(name, source.weight(name, group), group)


def accuracies(stream: LayerStream, data: Data) -> dict[str, Any]:
    """Measure the accuracy of the dense and of the retrained network.

    Parameters
    ----------
    stream : LayerStream
        Both networks on the data.
    data : Data
        Data of that stream, with its labels.

    Returns
    -------
    dict
        ``before`` (dense) and ``after`` (retrained): share of samples in [0, 1] classified
        correctly, or None, with the ``reason`` beside them; ``labels`` says how labels were
        converted, if they were. With a label for each position (the next token of a text), shares
        of the positions, and ``perplexity`` beside them: exp of the mean cross-entropy.
    """
    by_position = _position_labels(stream, data.y)
    if by_position is not None:
        before, after = (_by_position(stream, by_position, dense=dense) for dense in (True, False))
        return {
            "before": before[0],
            "after": after[0],
            "perplexity": {"before": before[1], "after": after[1]},
        }
    labels = labels_for(stream, data.y)
    said = {"labels": labels.note, "reason": labels.reason}
    return {
        "before": _accuracy(stream, labels.classes, dense=True),
        "after": _accuracy(stream, labels.classes, dense=False),
        **{name: text for name, text in said.items() if text},
    }


def _position_labels(stream: LayerStream, y: np.ndarray | None) -> np.ndarray | None:
    """Labels of positions, shape (n_samples, ...), where outputs have classes for each of them."""
    if y is None or y.dtype.kind not in "iu" or y.ndim < 2 or y.size == len(y):
        return None
    shape = tuple(int(n) for n in next(iter(stream.outputs(dense=True))).shape[1:])
    fits = shape[:-1] == y.shape[1:] and (y < shape[-1]).all()
    return y if fits else None


def _by_position(
    stream: LayerStream, labels: np.ndarray, *, dense: bool
) -> tuple[float | None, float | None]:
    """Share of positions predicted rightly, and the perplexity; negative labels do not count."""
    hits, count, loss, start = 0, 0, 0.0, 0
    for outputs in stream.outputs(dense=dense):
        values = to_numpy(outputs).astype(np.float64)
        wanted = labels[start : start + len(values)]
        start += len(values)
        counted = wanted >= 0
        values, wanted = values[counted], wanted[counted]
        largest = values.max(axis=1, keepdims=True, initial=-math.inf)
        logs = largest[:, 0] + np.log(np.exp(values - largest).sum(axis=1))
        loss += float((logs - values[np.arange(len(wanted)), wanted]).sum())
        hits += int((values.argmax(axis=1) == wanted).sum())
        count += len(wanted)
    if count == 0:
        return None, None
    mean = loss / count
    return hits / count, math.exp(mean) if mean < 700 else math.inf


def _accuracy(stream: LayerStream, classes: np.ndarray | None, *, dense: bool) -> float | None:
    """Share of samples whose largest output is their class's; None without classes."""
    if classes is None:
        return None
    which = "dense" if dense else "retrained"
    hits, start = 0, 0
    for outputs in stream.outputs(dense=dense):
        values = to_numpy(outputs)
        hits += int((values.argmax(axis=1) == classes[start : start + len(values)]).sum())
        start += len(values)
        _log.debug("accuracy: the %s network, %d of %d samples", which, start, len(classes))
    return hits / start
