"""Set aside the modes that a caller has switched in torch, while this package computes.

A verb gives the same result wherever it is called, and can train where the caller does not: inside
``torch.no_grad()``, ``torch.inference_mode()`` or ``torch.autocast``, under another default dtype
or default device, under a mode that sees every call (``torch.device("meta")``, a counter of
operations, fake tensors), in anomaly mode, and with less than float32's precision allowed in
products (the rounding that the bounds contain is float32's). All of it, and the state of the
generators that a data loader draws from, is restored when the context is left, also by an error.
Tensors that are created inside, copies of inference tensors among them, are plain ones.

Not changed: ``torch.use_deterministic_algorithms``, which this package can respect. A network whose
forward pass reads torch's default dtype or device gets float32 and the CPU there; it should name
the ones it needs.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from torch.overrides import _len_torch_function_stack, _pop_mode, _push_mode
from torch.utils._python_dispatch import _disable_current_modes

_AUTOCAST = ("cpu", "cuda", "mps", "xpu")
"""Device types whose autocast is switched off. A type that is missing here keeps the caller's."""


@contextmanager
def apart() -> Iterator[None]:
    """Compute as in a fresh interpreter, independently of the caller's modes; then restore them.

    Yields
    ------
    None
        Nothing.
    """
    with ExitStack() as stack:
        stack.enter_context(_without_function_modes())
        stack.enter_context(_disable_current_modes())
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        stack.enter_context(torch.autograd.set_detect_anomaly(False))
        for kind in _AUTOCAST:
            if torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        stack.enter_context(_default_dtype())
        stack.enter_context(_whole_precision())
        stack.enter_context(_generators_kept())
        yield


@contextmanager
def _without_function_modes() -> Iterator[None]:
    """Remove all modes from torch's stack: default devices, and others that override functions."""
    modes = [_pop_mode() for _ in range(_len_torch_function_stack())]
    try:
        yield
    finally:
        for each in reversed(modes):
            _push_mode(each)


@contextmanager
def _default_dtype() -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextmanager
def _whole_precision() -> Iterator[None]:
    """Have products of float32 computed with all their bits (no TF32, no bfloat16).

    Torch has an older and a newer set of settings for that, and parts of it (`torch.export`) raise
    where the two disagree. So both are set, and both put back; the older ones cannot be read where
    the caller has made them disagree.
    """
    backends: Any = torch.backends
    places: list[Any] = []
    if hasattr(backends, "fp32_precision"):  # since torch 2.9; the first one is the others' default
        places = [backends, backends.cuda.matmul, backends.cudnn.conv, backends.cudnn.rnn]
        places += [backends.mkldnn.matmul, backends.mkldnn.conv, backends.mkldnn.rnn]
    newer = [place.fp32_precision for place in places]
    matmul = _read(torch.get_float32_matmul_precision)
    convolutions = _read(lambda: backends.cudnn.allow_tf32)
    try:
        if places:
            backends.fp32_precision = "ieee"
        torch.set_float32_matmul_precision("highest")
        backends.cudnn.allow_tf32 = False
        yield
    finally:
        if matmul is not None:
            torch.set_float32_matmul_precision(matmul)
        if convolutions is not None:
            backends.cudnn.allow_tf32 = convolutions
        for place, value in zip(places, newer, strict=True):
            place.fp32_precision = value


def _read(setting: Callable[[], Any]) -> Any:
    """Read one of the older settings; None where it disagrees with the newer ones."""
    try:
        return setting()
    except RuntimeError:
        return None


@contextmanager
def _generators_kept() -> Iterator[None]:
    """Put the global generators back: torch's (of GPUs in use too), numpy's and Python's."""
    gpus = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []
    python, numpy = random.getstate(), np.random.get_state()  # noqa: NPY002 - the global one is meant
    with torch.random.fork_rng(gpus):
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)  # noqa: NPY002
