"""A run directory: lock, identity, finished layers, resume.

    DIR/
      lock                  held (by the operating system) while a process works here
      run.json              identity and options from the start, results at the end
      layers/000.safetensors ...   each finished layer's weights, its report in the header
      checkpoint.pt, history.jsonl   instead of layers/, in a training run: as of its last epoch
      model.safetensors     the finished network

The file of a layer appears by one rename when the layer is done, so a killed run loses at most the
layer it was working on. The same command resumes; a command that differs in anything that could
change a weight is refused. The lock of a process that ends is released by the operating system.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import msgspec
import numpy as np
from filelock import FileLock, Timeout
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from retrain.files import (
    READ_ERRORS,
    first_line,
    parse_json,
    plain,
    read_as,
    read_json,
    write_json,
    write_whole,
)
from retrain.runs.identity import differences
from retrain.stream.layer_report import LayerReport, LayerResult
from retrain.stream.stream import LayerSpec, LayerStream
from solvers.arrays import to_numpy

# Names of the files and the folder of a run directory. They are part of the run format: a directory
# with other names is not found or not resumed.
RUN_FILE = "run.json"
MODEL_FILE = "model.safetensors"
EXPORT_FILE = "model.pt2"
CHECKPOINT_FILE = "checkpoint.pt"
HISTORY_FILE = "history.jsonl"
LAYERS = "layers"

FORMAT = 1
"""Number of the run format in `run.json`. Directories with another number are refused; it is
increased when a record can no longer be read as before."""

_DIGEST = "sha256"  # key of the digest in a layer's report, part of the run format


@dataclass(frozen=True)
class RunDirectory:
    """An open run directory. Made by `open_run`; only its process writes there.

    Attributes
    ----------
    path : Path
        The directory.
    names : tuple of str
        The network's layers in execution order, which number the layer files.
    """

    path: Path
    names: tuple[str, ...]

    def layer_path(self, name: str) -> Path:
        """Return the path of a layer's file: numbered, so that no layer name is part of a path.

        Parameters
        ----------
        name : str
            Name of the layer, one of `names`.

        Returns
        -------
        Path
            ``DIR/layers/NNN.safetensors``; the file need not exist.
        """
        return self.path / LAYERS / f"{self.names.index(name):03d}.safetensors"

    def write_layer(self, result: LayerResult) -> None:
        """Save a finished layer: the file appears complete or not at all.

        Parameters
        ----------
        result : LayerResult
            Weights and report of the layer.
        """
        tensors = {
            f"weight.{group}": np.ascontiguousarray(to_numpy(weight))
            for group, weight in enumerate(result.weights)
        }
        said = plain(result.report.to_json())
        said[_DIGEST] = _digest(said, tensors.values())
        content = save(tensors, metadata={"report": json.dumps(said, allow_nan=False)})
        write_whole(self.layer_path(result.report.name), content)

    def read_layer(self, spec: LayerSpec) -> LayerResult | None:
        """Read a finished layer.

        Parameters
        ----------
        spec : LayerSpec
            Layer as the network has it, to check the file against.

        Returns
        -------
        LayerResult or None
            Weights and report; None when the layer is not finished.

        Raises
        ------
        ValueError
            If the file is damaged or not of this layer's shape.
        """
        path = self.layer_path(spec.name)
        if not path.exists():
            return None
        try:
            return _read_layer(path, spec)
        except (SafetensorError, *READ_ERRORS) as error:
            raise ValueError(
                f"run: {path} is damaged ({first_line(error)}); delete it, and the layer is done "
                "again"
            ) from error

    def finished(self, stream: LayerStream) -> dict[str, LayerResult]:
        """Read all finished layers by name, in execution order.

        Parameters
        ----------
        stream : LayerStream
            Network of the run.

        Returns
        -------
        dict from str to LayerResult
            Finished layers by name.

        Raises
        ------
        ValueError
            If a file is damaged or has another layer's shape, or a layer's weights are not of the
            network's dtype.
        """
        results = {}
        for spec in stream.layers:
            result = None if spec.reason is not None else self.read_layer(spec)
            if result is None:
                continue
            dtype = to_numpy(stream.weight(spec.name)).dtype
            if any(weight.dtype != dtype for weight in result.weights):
                path = self.layer_path(spec.name)
                raise ValueError(f"run: {path} is damaged (want {dtype}); delete it to redo it")
            results[spec.name] = result
        return results

    def write_record(self, record: Mapping[str, Any]) -> None:
        """Write run.json, complete or not at all.

        Parameters
        ----------
        record : mapping
            JSON values; the format number is added.
        """
        write_json(self.path / RUN_FILE, {"format": FORMAT, **record})


def _read_layer(path: Path, spec: LayerSpec) -> LayerResult:
    """Read a layer's file, checking everything against the layer."""
    shape = [spec.shape[0] + int(spec.bias), spec.shape[1]]
    with safe_open(path, framework="numpy") as file:
        names = [f"weight.{group}" for group in range(spec.groups)]
        if sorted(file.keys()) != sorted(names):
            raise ValueError(f"it does not hold layer {spec.name!r}")
        for name in names:
            if file.get_slice(name).get_shape() != shape:
                raise ValueError(f"it does not have layer {spec.name!r}'s shape")
        said = parse_json((file.metadata() or {}).get("report", "{}"), "its report")
        weights = [file.get_tensor(name) for name in names]
    digest = said.pop(_DIGEST, None) if isinstance(said, dict) else None
    if digest is not None and digest != _digest(said, weights):  # older runs' files have none
        raise ValueError("its bytes are not those that were written")
    report = LayerReport.from_json(said, "its report")
    unknown = sorted(set(said) - set(report.to_json()))
    if unknown:  # such as the digest's key, altered
        raise ValueError(f"its report has an unknown entry {unknown[0]!r:.80}")
    report.check_certificate()
    if (report.name, report.shape) != (spec.name, spec.shape):
        raise ValueError(f"its report is not of layer {spec.name!r}")
    if not all(np.isfinite(weight).all() for weight in weights):
        raise ValueError("it has NaN or infinite weights")
    return LayerResult(weights, report)


def _digest(report: Mapping[str, Any], weights: Iterable[np.ndarray]) -> str:
    """Hash a layer's report and weights, so that altered weights are noticed."""
    digest = hashlib.sha256(json.dumps(report, sort_keys=True).encode())
    for weight in weights:
        digest.update(np.ascontiguousarray(weight).data)
    return digest.hexdigest()


def check_out(out: str | Path | None) -> None:
    """Refuse an empty text for a directory, which would mean the current one.

    Parameters
    ----------
    out : str, Path or None
        Run directory as the caller gave it.

    Raises
    ------
    ValueError
        If it is an empty text.
    """
    if out == "":
        raise ValueError("out: got '', want a directory ('.' is the current one)")


@contextmanager
def open_run(
    path: str | Path, identity: Mapping[str, Any], names: tuple[str, ...]
) -> Iterator[RunDirectory]:
    """Lock a run directory, new or of the same run, for as long as the context lasts.

    Parameters
    ----------
    path : str or Path
        Run directory; created if it does not exist.
    identity : mapping
        Everything that could change a weight: `retrain.runs.identity` and the method's own entries.
        JSON values.
    names : tuple of str
        Names of the network's layers in execution order; empty in a training run.

    Yields
    ------
    RunDirectory
        Locked directory.

    Raises
    ------
    ValueError
        If the directory belongs to another run (the message lists what differs), holds something
        else, or is in use.
    OSError
        If it cannot be created or written.

    Notes
    -----
    A run that fails before a layer is finished leaves nothing, so that a corrected command can have
    the directory. One that is interrupted leaves what it has.
    """
    directory = Path(path)
    if directory.exists() and not directory.is_dir():
        raise ValueError(f"out: {str(directory)!r} is a file")
    there = directory.exists()
    if there and not (directory / RUN_FILE).exists():
        others = [entry.name for entry in directory.iterdir() if not _empty_part(entry)]
        if others:
            raise ValueError(
                f"out: {str(directory)!r} is not empty and holds no run (it has {min(others)!r}); "
                "choose another directory"
            )
    for part in ("lock", LAYERS):
        if (directory / part).is_symlink():
            raise ValueError(f"out: {str(directory / part)!r} is a link, which no run makes")
    directory.mkdir(parents=True, exist_ok=True)
    if names:
        (directory / LAYERS).mkdir(exist_ok=True)
    lock = FileLock(directory / "lock", timeout=0)
    try:
        lock.acquire()
    except Timeout as error:
        raise ValueError(
            f"out: {str(directory)!r} is in use by another process; wait for it, or choose another"
        ) from error
    fresh = not (directory / RUN_FILE).exists()
    try:
        if fresh:
            record = {"format": FORMAT, "state": "running", "identity": dict(identity)}
            write_json(directory / RUN_FILE, record)
        else:
            _check_identity(directory, identity)
        _sweep(directory)
        yield RunDirectory(directory, names)
    except Exception:
        if fresh:
            _withdraw(directory, there)
        raise
    finally:
        lock.release()


def read_record(path: str | Path) -> dict[str, Any]:
    """Read run.json of a run directory.

    Parameters
    ----------
    path : str or Path
        Run directory.

    Returns
    -------
    dict
        JSON values of ``run.json``; only its format and its state have been checked.

    Raises
    ------
    ValueError
        If the file does not exist, is damaged, or was not written by this package.
    """
    file = Path(path) / RUN_FILE
    if not file.is_file():
        raise ValueError(f"run: {str(path)!r} holds no {RUN_FILE}")
    try:
        record = read_json(file, f"run: {file}")
    except ValueError as error:
        raise ValueError(f"{error}; delete the directory to start anew") from error
    if not isinstance(record, dict) or record.get("format") != FORMAT:
        raise ValueError(f"run: {file} is not a run's record of format {FORMAT}")
    read_as(_Head, record, f"run: {file}")
    return record


def read_if_finished(path: Path | None) -> dict[str, Any] | None:
    """Read run.json of a finished run.

    Parameters
    ----------
    path : Path or None
        Run directory.

    Returns
    -------
    dict or None
        JSON values; None where there is no directory or the run is not finished.

    Raises
    ------
    ValueError
        If the file is damaged or was not written by this package.
    """
    if path is None or not (path / RUN_FILE).is_file():
        return None
    record = read_record(path)
    return record if record.get("state") == "finished" else None


class _Head(msgspec.Struct, frozen=True):
    """What the record of every run says, finished or not."""

    state: Literal["running", "finished"] = "running"
    kind: str = ""


def _check_identity(directory: Path, identity: Mapping[str, Any]) -> None:
    """Refuse to resume a run that another command began, saying what differs."""
    before = read_record(directory).get("identity", {})
    now = json.loads(json.dumps(plain(identity)))
    differing = differences(before, now)
    if differing:
        raise ValueError(
            f"out: {str(directory)!r} belongs to another run ({differing}); "
            "repeat that run's command to resume it, or choose another directory"
        )


def _is_temporary(path: Path) -> bool:
    """Tell whether a file is a temporary file of `write_whole`."""
    files = (RUN_FILE, MODEL_FILE, EXPORT_FILE, CHECKPOINT_FILE, HISTORY_FILE)
    ours = "|".join([*map(re.escape, files), r"\d+\.safetensors"])
    return re.fullmatch(rf"\.({ours})\.\d+\.tmp", path.name) is not None


def _empty_part(entry: Path) -> bool:
    """Tell whether an entry is one that a run killed at its very beginning leaves."""
    if entry.name == LAYERS and entry.is_dir():
        return not any(entry.iterdir())
    return entry.name == "lock" or _is_temporary(entry)


def _sweep(directory: Path) -> None:
    """Remove temporary files that a killed process left."""
    for folder in (directory, directory / LAYERS):
        for entry in folder.iterdir() if folder.is_dir() else ():
            if _is_temporary(entry):
                entry.unlink()


def _withdraw(directory: Path, there: bool) -> None:
    """Remove a new run that failed with nothing finished, and the directory if it is new."""
    layers = directory / LAYERS
    if (layers.is_dir() and any(layers.iterdir())) or (directory / CHECKPOINT_FILE).exists():
        return
    with suppress(OSError):  # the error that is being raised matters more
        (directory / RUN_FILE).unlink(missing_ok=True)
        (directory / HISTORY_FILE).unlink(missing_ok=True)
        if layers.is_dir():
            layers.rmdir()
        (directory / "lock").unlink()
        if not there:
            directory.rmdir()
