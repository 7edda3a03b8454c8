"""What several adapters do with a network's tensors: check finiteness, read bytes, widen."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedTensorMixin  # type: ignore[attr-defined]

HALF = (torch.float16, torch.bfloat16)
"""Half-precision types, which are converted to float32 for computing."""

FLOATS = (*HALF, torch.float32, torch.float64)
"""Types of weights that can be retrained."""


def check_finite(model: nn.Module) -> None:
    """Refuse NaN in parameters and buffers, and infinities in parameters.

    Buffers may hold infinities on purpose (attention masks).

    Parameters
    ----------
    model : nn.Module
        Network.

    Raises
    ------
    ValueError
        If an entry is not finite, or a tensor has no entries yet (on the meta device, or of a lazy
        module), or is of complex numbers; the message has the tensor's name.
    """
    for name, parameter in model.named_parameters():
        lazy = isinstance(parameter, UninitializedTensorMixin)
        if lazy or parameter.is_meta:
            raise ValueError(f"model: {name!r} has no values yet; run or load the network first")
        if parameter.is_complex():
            raise ValueError(f"model: {name!r} is of complex numbers, which are not retrained")
        if not torch.isfinite(parameter).all():
            raise ValueError(f"model: {name!r} has NaN or infinite entries")
    for name, buffer in model.named_buffers():
        if isinstance(buffer, UninitializedTensorMixin) or buffer.is_meta:
            raise ValueError(f"model: {name!r} has no values yet; run or load the network first")
        if torch.isnan(buffer).any():
            raise ValueError(f"model: {name!r} has NaN entries")


def tensor_bytes(tensor: Tensor) -> bytes:
    """Return a tensor's bytes in C order; any dtype and device.

    Parameters
    ----------
    tensor : Tensor
        Tensor.

    Returns
    -------
    bytes
        Its entries.
    """
    plain = tensor.detach().cpu().contiguous()
    return plain.reshape(-1).view(torch.uint8).numpy().tobytes()


def computing(model: nn.Module) -> nn.Module:
    """Convert a network's half-precision tensors to float32, in place.

    Parameters
    ----------
    model : nn.Module
        Network; it is changed.

    Returns
    -------
    nn.Module
        The same network.
    """
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.dtype in HALF:
            tensor.data = tensor.data.float()
    return model


def named_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return a network's parameters and buffers by every name they have.

    Parameters
    ----------
    model : nn.Module
        Network.

    Returns
    -------
    dict from str to Tensor
        Tensors; a tied one stands under each of its names.
    """
    return {
        **dict(model.named_buffers(remove_duplicate=False)),
        **dict(model.named_parameters(remove_duplicate=False)),
    }
