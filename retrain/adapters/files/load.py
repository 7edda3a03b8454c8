"""Load a saved network from a file that is treated as untrusted.

Tensors are read to the CPU, from safetensors or through torch's weights-only unpickler, and checked
before anything is built. Code runs only when the user names it: a factory (``--arch``), or an
exported program that they trust (``--trust``).
"""

from __future__ import annotations

import re
import warnings
import zipfile
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from retrain.adapters.files.dense import read_chain
from retrain.adapters.files.exported import load_exported
from retrain.adapters.network.modes import apart
from retrain.adapters.network.tensors import FLOATS, check_finite
from retrain.adapters.network.wrappers import (
    check_plain_names,
    evaluation_copy,
    shorter_names,
    unwrapped,
    without_wrappers,
)
from retrain.data.factories import call_factory
from retrain.files import READ_ERRORS, first_line

STATE_DICTS = (".pt", ".pth", ".th", ".bin", ".ckpt")
"""Endings of files that hold a state dict as torch saves it; a convention."""

_NESTED = ("state_dict", "model_state_dict", "model")
"""Usual keys of the state dict in a checkpoint, in the order in which they are tried."""

_DEEPEST = 8
"""Number of levels of a checkpoint that are searched for tensors. A larger value searches deeper
and takes longer on files with other content. Chosen by hand."""

_OTHERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.bool)
"""Types of tensors beside the weights (buffers) that are accepted."""

_INSTEAD = (
    "save its state dict instead, torch.save(model.state_dict(), FILE), and "
    "give the architecture with --arch package.module:factory"
)
"""Remedy that ends the messages about files which hold code instead of tensors."""


@dataclass(frozen=True, eq=False)
class LoadedModel:
    """A network read from a file.

    Attributes
    ----------
    module : nn.Module
        Network on the CPU, in evaluation mode, in the dtypes of the file.
    names : mapping from str to str
        Name in the file by name in the module, for saving it again.
    path : Path
        The file.
    note : str
        Assumptions that were made, for the user to read; empty if there were none.
    factory : str
        ``package.module:factory`` that built the module; empty where none did.
    """

    module: nn.Module
    names: Mapping[str, str]
    path: Path
    note: str = ""
    factory: str = ""


@apart()
def load_model(
    path: str | Path,
    *,
    arch: str = "auto",
    activation: str = "relu",
    trust: bool = False,
    key: str | None = None,
) -> LoadedModel:
    """Load a network.

    Parameters
    ----------
    path : str or Path
        ``.safetensors``; a state dict ``.pt``, ``.pth``, ``.th``, ``.bin`` or ``.ckpt``; or an
        exported program ``.pt2``. The state dict may be inside a checkpoint, under ``state_dict``,
        ``model_state_dict`` or ``model``, or as its only mapping of tensors. Parts of names that
        wrappers add (``module.``, ``_orig_mod.``) are removed, and so is any prefix of all names
        (``model.``) without which they fit `arch`.
    arch : str, optional
        ``"auto"`` derives a chain of dense layers from the shapes. ``package.module:factory`` names
        a callable that builds the module; the tensors are then loaded into it. A wrapper around it
        (DataParallel, torch.compile) is removed.
    activation : str, optional
        Activation between the layers of a chain read with ``"auto"``.
    trust : bool, optional
        Whether a ``.pt2`` may be loaded, which can run code that is in the file.
    key : str, optional
        Key of the mapping of tensors in a checkpoint: ``net``, or ``teacher.net`` of a nested one.

    Returns
    -------
    LoadedModel
        Network, its names in the file, and the assumptions made.

    Raises
    ------
    FileNotFoundError
        If the file does not exist.
    ValueError
        If the file is truncated, holds other things than tensors, needs trust, does not fit the
        architecture, is not a chain, or has NaN or infinite weights. One line, with the remedy.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"model: there is no file {str(path)!r}")
    if not path.is_file():
        raise ValueError(f"model: {str(path)!r} is not a file")
    if path.suffix not in (".safetensors", ".pt2", *STATE_DICTS):
        raise ValueError(
            f"model: {path.name!r} is of no known kind, want .safetensors, .pt2 or a state dict "
            f"({', '.join(STATE_DICTS)})"
        )
    if path.suffix == ".pt2" or _members(path) & {"archive_format", "serialized_exported_program"}:
        if key is not None:
            raise ValueError(
                f"key: got {key!r}, but {path.name!r} is an exported program; leave it"
            )
        return _exported(path, arch, trust)
    tensors, ordered, taken = _tensors_and_key(path, key)
    from_key = f"from {taken!r}" if taken and taken not in _NESTED else ""
    if arch == "auto":
        check_plain_names(tensors)
        short = dict(zip(without_wrappers(tensors), tensors, strict=True))
        renamed = {ours: tensors[theirs] for ours, theirs in short.items()}
        chain, names = read_chain(renamed, activation=activation, ordered=ordered)
        names = {ours: short[theirs] for ours, theirs in names.items()}
        layers = chain.dense_layers
        widths = [layers[0].shape[0], *(layer.shape[1] for layer in layers)]
        note = f"read as dense layers {'-'.join(map(str, widths))}"
        if len(layers) > 1:
            note += f", assuming {activation} between them"
        note += f", {from_key}" if from_key else ""
        module: nn.Module = chain
    else:
        module = made_module(arch)
        names = _names_that_fit(module, tensors)
        prefix = _dropped(names)
        _fill(module, {ours: tensors[theirs] for ours, theirs in names.items()}, repr(arch))
        said = [f"read {from_key}"] if from_key else []
        said += [f"names are without their prefix {prefix!r}"] if prefix else []
        note = ", ".join(said)
    check_finite(module)
    return LoadedModel(module.eval(), names, path, note, "" if arch == "auto" else arch)


def made_module(arch: str) -> nn.Module:
    """Build the module of ``package.module:factory``, without wrappers around it.

    Parameters
    ----------
    arch : str
        ``package.module:factory``.

    Returns
    -------
    nn.Module
        Module that the factory returned.

    Raises
    ------
    ValueError
        If the factory is not found, fails, or returns something else.
    """
    module = call_factory(arch, "arch")
    if not isinstance(module, nn.Module):
        raise ValueError(f"arch: {arch!r} returned a {type(module).__name__}, want a module")
    return unwrapped(module)


def _names_that_fit(module: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """Return names for a file's tensors, each with its own: those that are the module's.

    Where none of `shorter_names` fits, the names without wrappers, which `_fill` then refuses.
    """
    own = module.state_dict()
    for names in shorter_names(tensors):
        if not any(_misfits(own, names)):
            return dict(zip(names, tensors, strict=True))
    if not any(_misfits(own, tensors)):
        return dict(zip(tensors, tensors, strict=True))
    check_plain_names([name for name in tensors if name not in own])
    return dict(zip(without_wrappers(tensors), tensors, strict=True))


def _misfits(own: Collection[str], names: Collection[str]) -> tuple[list[str], list[str]]:
    """Return the module's names that a file lacks, and the file's names that the module lacks."""
    # Files from before torch 0.4.1 lack this counter, which nothing in evaluation reads.
    missing = [n for n in own if n not in names and not n.endswith("num_batches_tracked")]
    return missing, [name for name in names if name not in own]


def _dropped(names: Mapping[str, str]) -> str:
    """Return the prefix that was dropped from all names and that no wrapper had put there."""
    kept = dict(zip(without_wrappers(names.values()), names, strict=True))
    theirs, ours = next(iter(kept.items()))
    return theirs.removesuffix(ours) if theirs.endswith(ours) else ""


def read_tensors(path: Path, key: str | None = None) -> tuple[dict[str, Tensor], bool]:
    """Read a file's tensors to the CPU without running code that is in it.

    Parameters
    ----------
    path : Path
        File.
    key : str, optional
        Key of the mapping of tensors in a checkpoint, see `load_model`.

    Returns
    -------
    tensors : dict from str to Tensor
        Tensors by their names in the file, on the CPU.
    ordered : bool
        Whether their order is that in which they were saved.

    Raises
    ------
    ValueError
        If the file is damaged or holds other things than tensors, or the key does not exist.
    """
    tensors, ordered, _ = _tensors_and_key(path, key)
    return tensors, ordered


def _tensors_and_key(path: Path, key: str | None) -> tuple[dict[str, Tensor], bool, str]:
    """Read tensors, whether their order means something, and the key they were under."""
    taken = ""
    if path.suffix == ".safetensors":
        if key is not None:
            raise ValueError(f"key: got {key!r}, but a safetensors file has no keys; leave it")
        try:
            tensors: Any = load_file(path)
        except (SafetensorError, *READ_ERRORS) as error:
            raise ValueError(
                f"model: {str(path)!r} is not a whole safetensors file ({_line(error)})"
            ) from error
    else:
        tensors, taken = _chosen(_unpickle(path), key, path)
    if not isinstance(tensors, Mapping):
        raise ValueError(
            f"model: {str(path)!r} holds a {type(tensors).__name__}, want a state dict (tensors "
            "by name)"
        )
    if not tensors:
        raise ValueError(f"model: {str(path)!r} holds no tensors")
    for name, tensor in tensors.items():
        _check_tensor(name, tensor)
    return dict(tensors), path.suffix != ".safetensors", taken


def _chosen(content: object, key: str | None, path: Path) -> tuple[object, str]:
    """Choose the mapping of tensors in a checkpoint, and say under which key it was.

    Without a key: the mapping under a usual key, else the only one. Content that is not a
    checkpoint is returned unchanged, and refused later entry by entry.
    """
    found = dict(_mappings(content, "", _DEEPEST))
    listed = ", ".join(name or "(the file itself)" for name in found) or "none"
    if key is not None:
        if not key or key not in found:
            raise ValueError(
                f"key: {str(path)!r} has no mapping of tensors called {key!r}; there are {listed}"
            )
        return found[key], key
    usual = [name for name in ("", *_NESTED) if name in found]
    if usual:
        return found[usual[0]], usual[0]
    if len(found) == 1:
        return next(iter(found.values())), next(iter(found))
    if found:
        raise ValueError(
            f"model: {str(path)!r} has several mappings of tensors, {listed}; choose one, --key "
            "NAME (key=NAME)"
        )
    if isinstance(content, Mapping):
        nested = (content[name] for name in _NESTED if isinstance(content.get(name), Mapping))
        return next(nested, content), ""
    return content, ""


def _mappings(content: object, name: str, depth: int) -> Iterator[tuple[str, Mapping[str, Tensor]]]:
    """Find the mappings of tensors by name in a checkpoint, with their dotted keys.

    An optimiser's state is by parameter number, and so is not found.
    """
    if not isinstance(content, Mapping) or not content:
        return
    if all(isinstance(k, str) and isinstance(v, Tensor) for k, v in content.items()):
        yield name, content
        return
    for key, value in content.items() if depth else ():
        if isinstance(key, str):
            yield from _mappings(value, f"{name}.{key}" if name else key, depth - 1)


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
    except READ_ERRORS:
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


def fill(model: nn.Module, path: str | Path, names: Mapping[str, str]) -> nn.Module:
    """Load a file's tensors into a copy of a module.

    Parameters
    ----------
    model : nn.Module
        Architecture; it is not changed.
    path : str or Path
        File that `retrain.adapters.files.save` wrote.
    names : mapping from str to str
        Name in the file by name in the module (`LoadedModel.names`).

    Returns
    -------
    nn.Module
        Copy with the file's tensors, in evaluation mode, on the CPU, in the file's dtypes.

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
    missing, extra = _misfits(own, tensors)
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
                f"model: {name!r}: got type {tensor.dtype}, want {target.dtype} as in {arch}"
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
    """Return the informative line of an error, not torch's advice to load without safety."""
    told = re.search(r"WeightsUnpickler error:\s*(\S[^\n]*)", str(error))
    return told[1][:200] if told else first_line(error)
