"""Everything that can be refused is refused here, before the first layer is solved.

A run takes long, and most causes of failure are known when it begins: held-out data that the
network does not accept, labels that fine-tuning cannot use, tensors that cannot be saved, a disk
that is too full. Each is tested where that is cheap: by one pass over the data, by one training
step on a copy, or by looking at the disk.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from array_api_compat import array_namespace

from retrain.data.arrays import Data
from retrain.runs.request import Request
from retrain.runs.subject import Subject
from retrain.stream.stream import LayerSpec, LayerStream, layer

_log = logging.getLogger(__name__)

Oversized = Callable[[LayerStream, LayerSpec], str | None]
"""Returns why a layer cannot be solved in the memory allowed, with the remedy; None if it can."""

_SPARE = 1.2
"""Free space on the disk that a run needs, relative to the bytes of the weights it writes. The
surplus is for headers and records; a smaller value risks a full disk during the run, a larger one
refuses disks that would do. Chosen by hand."""


@dataclass(frozen=True, eq=False)
class Prepared:
    """A run that may begin: the network on calibration and held-out data, and the layers.

    Attributes
    ----------
    stream : LayerStream
        Network on the calibration data.
    held_out : LayerStream or None
        Network on the held-out data.
    names : list of str
        Names of the layers to retrain.
    left : dict from str to str
        Layers that were selected but are not retrained, each with the reason.
    """

    stream: Any
    held_out: Any
    names: list[str]
    left: dict[str, str]


def prepare(request: Request, oversized: Oversized) -> Prepared:
    """Open a network on its data, and refuse whatever would end the run later.

    Parameters
    ----------
    request : Request
        Network, data, held-out data and run directory; the directory need not exist.
    oversized : callable
        (stream, spec) -> reason why the method cannot solve a layer in the memory allowed, or None.

    Returns
    -------
    Prepared
        Streams, and the layers to retrain.

    Raises
    ------
    ValueError
        If something is invalid; the message names the argument.
    OSError
        If the disk has too little room.

    Notes
    -----
    Cost: one pass of each data set through the dense network; with fine-tuning, up to two training
    steps on a copy.
    """
    data, held_out = request.data, request.held_out
    _log.info("reading: the network on %s (%d samples)", data.name, len(data))
    stream = request.subject.stream(data)
    chosen = select(stream.layers, request.layers, request.skip)
    names, left = _fitting(stream, chosen, request.layers, oversized)
    other = None
    if held_out is not None:
        _log.info("reading: the network on %s (%d samples)", held_out.name, len(held_out))
        other = _on_held_out(request.subject, held_out, stream, names)
    if request.fine_tune:
        request.subject.check_fine_tune(stream, data)
    request.subject.check_save(stream)
    if request.out is not None:
        _check_room(request.out, stream, names)
    _check_outputs(stream, data, "data")
    if other is not None and held_out is not None:
        _check_outputs(other, held_out, "evaluate")
    return Prepared(stream, other, names, left)


def _fitting(
    stream: LayerStream,
    names: list[str],
    layers: str | Sequence[str] | None,
    oversized: Oversized,
) -> tuple[list[str], dict[str, str]]:
    """Separate the layers that fit into memory from those that do not, with the reason.

    A layer that was named without a wildcard, or all layers, are never left out silently: then this
    raises.
    """
    reasons = {name: oversized(stream, layer(stream, name)) for name in names}
    left = {name: reason for name, reason in reasons.items() if reason is not None}
    named = [pattern for pattern in _patterns(layers) or [] if pattern in left]
    if named or len(left) == len(names):
        raise ValueError(left[named[0] if named else names[0]])
    return [name for name in names if name not in left], left


def select(
    layers: Sequence[LayerSpec],
    chosen: str | Sequence[str] | None,
    skip: str | Sequence[str] | None,
) -> list[str]:
    """Select the layers to retrain: those that can be, match `chosen` and do not match `skip`.

    Parameters
    ----------
    layers : sequence of LayerSpec
        All layers of the network.
    chosen : str, sequence of str or None
        Shell patterns of layer names, as a text separated by commas; all layers without it.
    skip : str, sequence of str or None
        Shell patterns of layer names to leave out.

    Returns
    -------
    list of str
        Names of the layers, in execution order.

    Raises
    ------
    ValueError
        If a pattern matches no layer, a layer named without a wildcard cannot be retrained, or
        nothing is left.
    """
    names = [spec.name for spec in layers if spec.reason is None]
    for argument, patterns in (("layers", _patterns(chosen)), ("skip", _patterns(skip))):
        for pattern in patterns or []:
            hits = [spec for spec in layers if fnmatchcase(spec.name, pattern)]
            if not hits:
                every = ", ".join(spec.name for spec in layers)
                raise ValueError(f"{argument}: no layer matches {pattern!r}; there are {every}")
            if argument == "layers" and all(spec.reason is not None for spec in hits):
                raise ValueError(f"layers: {hits[0].name!r} cannot be retrained: {hits[0].reason}")
    wanted, unwanted = _patterns(chosen), _patterns(skip) or []
    if wanted is not None:
        names = [name for name in names if any(fnmatchcase(name, p) for p in wanted)]
    names = [name for name in names if not any(fnmatchcase(name, p) for p in unwanted)]
    if not names:
        reasons = "; ".join(f"{spec.name}: {spec.reason}" for spec in layers if spec.reason)
        raise ValueError(f"layers: nothing is left to retrain{f' ({reasons})' if reasons else ''}")
    return names


def _patterns(value: str | Sequence[str] | None) -> list[str] | None:
    if value is None:
        return None
    parts = value.split(",") if isinstance(value, str) else list(value)
    return [part.strip() for part in parts if part.strip()]


def _on_held_out(subject: Subject, held_out: Data, stream: LayerStream, names: list[str]) -> Any:
    """Open the network on held-out data; the layers must be there as on the calibration data."""
    try:
        other = subject.stream(held_out, stream)
    except ValueError as error:
        raise ValueError(f"evaluate: {str(error).removeprefix('data: ')}") from error
    for name in names:
        reason = layer(other, name).reason
        if reason is not None:
            raise ValueError(
                f"evaluate: layer {name!r}, which is to be retrained, cannot be judged on "
                f"{held_out.name!r}: {reason}"
            )
    return other


def _check_room(out: Path, stream: LayerStream, names: Sequence[str]) -> None:
    """Refuse a disk that cannot hold the layers' files and the network's."""
    kept = 0
    for spec in stream.layers:
        if spec.reason is None:
            itemsize = stream.weight(spec.name).itemsize
            kept += spec.size * itemsize * (2 if spec.name in names else 1)
    there = next(folder for folder in (out.absolute(), *out.absolute().parents) if folder.exists())
    free = shutil.disk_usage(there).free
    if free < _SPARE * kept:
        raise OSError(
            f"out: {str(out)!r} wants about {_SPARE * kept / 2**20:.0f} MiB, and the disk has "
            f"{free / 2**20:.0f} MiB left; free some, or choose another directory"
        )


def _check_outputs(stream: LayerStream, data: Data, argument: str) -> None:
    """Send the data through the dense network once, whose outputs must be numbers."""
    start = 0
    for outputs in stream.outputs(dense=True):
        xp = array_namespace(outputs)
        count = outputs.shape[0]
        _log.info("reading: outputs on %d samples, after %d", count, start)
        if bool(xp.any(xp.isnan(outputs))):
            raise ValueError(
                f"{argument}: the network's outputs on {data.name!r} are NaN for some of the "
                f"samples {start} to {start + count - 1}"
            )
        start += count
