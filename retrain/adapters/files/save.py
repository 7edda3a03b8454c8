"""Save a network as safetensors, complete or not at all."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor, nn

from retrain.files import write_whole

METADATA = {"format": "pt"}
"""The only metadata of the file: loaders ask for this key, and with more keys the bytes of the file
would not repeat."""


def save_model(
    module: nn.Module, path: str | Path, *, names: Mapping[str, str] | None = None
) -> None:
    """Save a module's state dict.

    Parameters
    ----------
    module : nn.Module
        Network, on any device.
    path : str or Path
        File to write; an existing one is replaced in one step, or stays if anything fails.
    names : mapping from str to str, optional
        Tensors to save and the name of each in the file (`LoadedModel.names`); by default the
        whole state dict under its own names.

    Raises
    ------
    ValueError
        If a tensor is missing or cannot be saved.
    OSError
        If the file cannot be written; then no partial file is left.
    """
    state = module.state_dict()
    if names is None:
        names = {name: name for name in state}
    missing = [name for name in names if name not in state]
    if missing:
        raise ValueError(f"names: the module has no tensor {missing[0]!r}")
    save_tensors({theirs: state[ours] for ours, theirs in names.items()}, path)


def save_tensors(tensors: Mapping[str, Tensor], path: str | Path) -> None:
    """Save tensors by name, in their own dtypes; tensors that share memory are written separately.

    The bytes depend only on names, dtypes, shapes and values.

    Parameters
    ----------
    tensors : mapping from str to Tensor
        Tensors, on any device.
    path : str or Path
        File to write.

    Raises
    ------
    ValueError
        If an entry is not a tensor, or one that safetensors cannot hold (sparse, quantised, meta).
    OSError
        If the file cannot be written; then no partial file is left.
    """
    check_tensors(tensors)
    own = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    write_whole(Path(path), save(own, metadata=METADATA))


def check_tensors(tensors: Mapping[str, Any]) -> None:
    """Refuse tensors that `save_tensors` cannot write.

    Parameters
    ----------
    tensors : mapping from str to Tensor
        Tensors to check.

    Raises
    ------
    ValueError
        If an entry is not a tensor, or one that safetensors cannot hold (sparse, quantised, meta).
    """
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            raise ValueError(f"tensors: {name!r} is a {type(tensor).__name__}, not a tensor")
        if tensor.layout != torch.strided or tensor.is_quantized or tensor.is_meta:
            raise ValueError(f"tensors: {name!r} is sparse, quantised or without values")
