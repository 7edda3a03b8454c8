"""Write a network as an exported program, `.pt2`."""

from __future__ import annotations

import io
from pathlib import Path

import torch
from torch import Tensor, nn

from retrain.files import write_whole


def write_export(network: nn.Module, sample: Tensor, path: Path) -> None:
    """Write a network as an exported program that takes any number of samples, whole or not at all.

    Parameters
    ----------
    network : nn.Module
        Network on the CPU, in evaluation mode.
    sample : Tensor, shape (1, ...)
        One input.
    path : Path
        File to write; `torch.export.load` reads it.

    Raises
    ------
    ValueError
        If torch.export cannot follow the network.
    OSError
        If the file cannot be written.
    """
    samples = torch.cat([sample.cpu()] * 2)  # torch treats a dimension of 1 as a constant
    batch = torch.export.Dim("batch")
    try:
        program = torch.export.export(network, (samples,), dynamic_shapes=({0: batch},))
    except (RuntimeError, ValueError, TypeError) as error:
        text = str(error).strip().split("\n")[0]
        raise ValueError(f"export: torch.export cannot follow the network ({text})") from error
    buffer = io.BytesIO()
    torch.export.save(program, buffer)
    write_whole(path, buffer.getvalue())
