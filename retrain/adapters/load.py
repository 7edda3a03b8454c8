"""Load a saved network, taking the file for hostile.

Tensors are read to the CPU, from safetensors or through torch's weights-only unpickler, and checked
before anything is built. Code runs only when the user names it: a factory (``--arch``), or an
exported program that they trust (``--trust``).
"""

from __future__ import annotations

import pickle
import re
import struct
import warnings
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from retrain.adapters.dense import read_chain
from retrain.adapters.exported import load_exported
from retrain.adapters.find import evaluation_copy
from retrain.adapters.modes import apart
from retrain.adapters.tensors import FLOATS, check_finite
from retrain.data import import_factory

STATE_DICTS = (".pt", ".pth", ".th", ".bin", ".ckpt")
_NESTED = ("state_dict", "model_state_dict", "model")
_PREFIXES = ("module.", "_orig_mod.")
_OTHERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.bool)
_INSTEAD = (
    "save its state dict instead, torch.save(model.state_dict(), FILE), and "
    "give the architecture with --arch package.module:factory"
)

READ_ERRORS = (
    RuntimeError,
    ValueError,
    TypeError,
    AttributeError,
    LookupError,
    ArithmeticError,
    AssertionError,
    EOFError,
    ImportError,
    MemoryError,
    OSError,
    pickle.PickleError,
    struct.error,
    zipfile.BadZipFile,
)
"""What torch's reader can raise on bytes that are not what they claim."""


@dataclass(frozen=True, eq=False)
class LoadedModel:
    """A network read from a file.

    Attributes
    ----------
    module : nn.Module
        The network, on the CPU, in evaluation mode, in the file's types.
    names : mapping
        The module's tensor names, each with its name in the file: what to save it under.
    path : Path
        The file.
    note : str
        What was assumed, for the user to read; empty if nothing was.
    """

    module: nn.Module
    names: Mapping[str, str]
    path: Path
    note: str = ""


@apart()
def load_model(
    path: str | Path, *, arch: str = "auto", activation: str = "relu", trust: bool = False
) -> LoadedModel:
    """Load a network.

    Parameters
    ----------
    path : str or Path
        ``.safetensors``; a state dict ``.pt``, ``.pth``, ``.th``, ``.bin`` or ``.ckpt`` (also
        nested under ``state_dict``, ``model_state_dict`` or ``model``, and with the ``module.`` of
        data parallel training before every name); or an exported program ``.pt2``.
    arch : str, optional
        ``"auto"`` reads a chain of dense layers off the shapes. ``package.module:factory`` names a
        callable that builds the module; the tensors are then loaded into it.
    activation : str, optional
        What stands between the layers of a chain read with ``"auto"``.
    trust : bool, optional
        Allow a ``.pt2``: loading one can run code that is in the file.

    Returns
    -------
    LoadedModel

    Raises
    ------
    FileNotFoundError
        If there is no such file.
    ValueError
        If the file is truncated, holds other things than tensors, needs trust, does not fit the
        architecture, is no chain, or has NaN or infinite weights. One line, with the way out.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"model: there is no file {str(path)!r}")
    if not path.is_file():
        raise ValueError(f"model: {str(path)!r} is not a file")
    if path.suffix not in (".safetensors", ".pt2", *STATE_DICTS):
        raise ValueError(
            f"model: {path.name!r} is of no known kind, wanted .safetensors, .pt2 or a state dict "
            f"({', '.join(STATE_DICTS)})"
        )
    if path.suffix == ".pt2" or _members(path) & {"archive_format", "serialized_exported_program"}:
        return _exported(path, arch, trust)
    tensors, ordered = read_tensors(path)
    short = {_without_prefix(name, tensors): name for name in tensors}
    renamed = {ours: tensors[theirs] for ours, theirs in short.items()}
    if arch == "auto":
        chain, names = read_chain(renamed, activation=activation, ordered=ordered)
        names = {ours: short[theirs] for ours, theirs in names.items()}
        layers = chain.dense_layers
        widths = [layers[0].shape[0], *(layer.shape[1] for layer in layers)]
        note = f"read as dense layers {'-'.join(map(str, widths))}"
        if len(layers) > 1:
            note += f", assuming {activation} between them"
        module: nn.Module = chain
    else:
        module = import_factory(arch, "arch")()
        if not isinstance(module, nn.Module):
            raise ValueError(f"arch: {arch!r} returned a {type(module).__name__}, wanted a module")
        _fill(module, renamed, repr(arch))
        names, note = short, ""
    check_finite(module)
    return LoadedModel(module.eval(), names, path, note)


def read_tensors(path: Path) -> tuple[dict[str, Tensor], bool]:
    """Read a file's tensors to the CPU without running code that is in it.

    Returns
    -------
    tensors : dict
        By their names in the file.
    ordered : bool
        Whether their order is that in which they were saved.

    Raises
    ------
    ValueError
        As `load_model`.
    """
    if path.suffix == ".safetensors":
        try:
            tensors: Any = load_file(path)
        except (SafetensorError, *READ_ERRORS) as error:
            raise ValueError(
                f"model: {str(path)!r} is not a whole safetensors file ({_line(error)})"
            ) from error
    else:
        tensors = _unpickle(path)
        if isinstance(tensors, Mapping):
            for key in _NESTED:
                if isinstance(tensors.get(key), Mapping):
                    tensors = tensors[key]
                    break
    if not isinstance(tensors, Mapping):
        raise ValueError(
            f"model: {str(path)!r} holds a {type(tensors).__name__}, wanted a state dict (tensors "
            "by name)"
        )
    if not tensors:
        raise ValueError(f"model: {str(path)!r} holds no tensors")
    for name, tensor in tensors.items():
        _check_tensor(name, tensor)
    return dict(tensors), path.suffix != ".safetensors"


def _unpickle(path: Path) -> object:
    """Load by torch's weights-only unpickler, which knows tensors and containers only."""
    members = _members(path)
    if "constants.pkl" in members:
        raise ValueError(f"model: {str(path)!r} is a TorchScript archive; {_INSTEAD}")
    try:
        if members:
            _check_zip(path)
        with (
            warnings.catch_warnings()
        ):  # a newer pickle than torch writes is read, or refused below
            warnings.filterwarnings("ignore", message="Detected pickle protocol")
            return torch.load(path, map_location="cpu", weights_only=True)
    except READ_ERRORS as error:
        refused = re.search(r"GLOBAL (\S+)", str(error))
        if refused or "unrecognized function" in str(error):
            what = f" ({refused[1]})" if refused else ""
            raise ValueError(
                f"model: {str(path)!r} holds pickled objects{what}, which could run code, so it "
                f"was not loaded; {_INSTEAD}"
            ) from error
        raise ValueError(
            f"model: {str(path)!r} is truncated or not a file that torch.save wrote "
            f"({_line(error)})"
        ) from error


def _members(path: Path) -> set[str]:
    """Names in a zip archive, without torch's folder around them; none if it is no archive."""
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except (zipfile.BadZipFile, EOFError, ValueError, OSError, NotImplementedError):
        return set()
    return {name.partition("/")[2] or name for name in names} | {
        name.rpartition("/")[2].removesuffix(".json") for name in names
    }


def _check_zip(path: Path) -> None:
    """Refuse records that unpack to more than the file holds: torch stores them as they are."""
    with zipfile.ZipFile(path) as archive:
        records = archive.infolist()
    stored = all(record.compress_type == zipfile.ZIP_STORED for record in records)
    if not stored or sum(record.file_size for record in records) > path.stat().st_size:
        raise ValueError("its records claim more than the file holds")


def _check_tensor(name: object, tensor: object) -> None:
    """Refuse whatever is not a plain tensor with its own memory."""
    if not isinstance(name, str) or not isinstance(tensor, Tensor):
        raise ValueError(
            f"model: entry {name!r} is of type {type(tensor).__name__}, not a tensor; save the "
            "state dict alone, or under the key 'state_dict'"
        )
    if tensor.layout != torch.strided or tensor.is_quantized or tensor.is_meta:
        raise ValueError(f"model: {name!r} is a sparse, quantised or empty-handed tensor")
    if tensor.dtype not in (*FLOATS, *_OTHERS):
        raise ValueError(f"model: {name!r} is of type {tensor.dtype}, which cannot be retrained")
    if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
        raise ValueError(
            f"model: {name!r} claims shape {tuple(tensor.shape)}, more than its memory holds"
        )


def _without_prefix(name: str, names: Mapping[str, Tensor]) -> str:
    """Drop what wrappers put before every name."""
    for prefix in _PREFIXES:
        if all(other.startswith(prefix) for other in names):
            return name.removeprefix(prefix)
    return name


def fill(model: nn.Module, path: str | Path, names: Mapping[str, str]) -> nn.Module:
    """Load a file's tensors into a copy of a module.

    Parameters
    ----------
    model : nn.Module
        The architecture; it is not changed.
    path : str or Path
        A file that `retrain.adapters.save` wrote.
    names : mapping
        The module's tensor names, each with its name in the file (`LoadedModel.names`).

    Returns
    -------
    nn.Module
        In evaluation mode, on the CPU, in the file's types.

    Raises
    ------
    ValueError
        If the file cannot be read or does not fit.
    """
    tensors, _ = read_tensors(Path(path))
    absent = [theirs for theirs in names.values() if theirs not in tensors]
    if absent:
        raise ValueError(f"model: {str(path)!r} has no tensor {absent[0]!r}")
    copied = evaluation_copy(model)
    _fill(copied, {ours: tensors[theirs] for ours, theirs in names.items()}, "the given module")
    check_finite(copied)
    return copied


def _fill(module: nn.Module, tensors: Mapping[str, Tensor], arch: str) -> None:
    """Load tensors into a module in the types that they have; compare names and shapes first."""
    own = module.state_dict(keep_vars=True)
    # Files from before torch 0.4.1 lack this counter, which nothing in evaluation reads.
    missing = [n for n in own if n not in tensors and not n.endswith("num_batches_tracked")]
    extra = [name for name in tensors if name not in own]
    if missing or extra:
        parts = [
            f"{what} {', '.join(map(repr, names[:3]))}{' ...' if len(names) > 3 else ''}"
            for what, names in (("lacks", missing), ("has besides", extra))
            if names
        ]
        raise ValueError(f"model: the file does not fit {arch}: it {' and '.join(parts)}")
    for name, tensor in tensors.items():
        target = own[name]
        if tensor.shape != target.shape:
            raise ValueError(
                f"model: {name!r} has shape {tuple(tensor.shape)} in the file and "
                f"{tuple(target.shape)} in {arch}"
            )
        if tensor.dtype.is_floating_point != target.dtype.is_floating_point:
            raise ValueError(
                f"model: {name!r} is of type {tensor.dtype}, {arch} wants {target.dtype}"
            )
    meta = any(target.is_meta for target in own.values())
    if not meta:
        module.to("cpu")
    for name, tensor in tensors.items():
        own[name].data = own[name].data.to(tensor.dtype)  # in place, so that ties stay ties
    module.load_state_dict(dict(tensors), strict=False, assign=meta)
    for name, target in module.state_dict().items():
        if name in tensors and not torch.equal(target, tensors[name]) and _is_number(tensors[name]):
            raise ValueError(
                f"model: {name!r} shares its memory with another tensor in {arch}, but the file "
                "gives them different values"
            )


def _is_number(tensor: Tensor) -> bool:
    """Whether no entry is NaN, which is unequal to itself; `check_finite` names those."""
    return not bool(torch.isnan(tensor).any())


def _exported(path: Path, arch: str, trust: bool) -> LoadedModel:
    if not trust:
        raise ValueError(
            f"model: {path.name!r} is an exported program, and loading one can run code that is in "
            "it; pass --trust if you know where it comes from, or save "
            "a state dict instead, torch.save(model.state_dict(), 'model.pt')"
        )
    if arch != "auto":
        raise ValueError(f"arch: got {arch!r}, but an exported program brings its own; leave it")
    chain, names = load_exported(path)
    check_finite(chain)
    return LoadedModel(chain.eval(), names, path)


def _line(error: BaseException) -> str:
    """Return the telling line of an error; torch's advice to load without safety is not it."""
    told = re.search(r"WeightsUnpickler error:\s*(\S[^\n]*)", str(error))
    text = told[1] if told else str(error).strip() or type(error).__name__
    return text.split("\n")[0][:200]
