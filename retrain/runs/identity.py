"""The identity of a run: everything that could change a weight, as readable JSON values.

The stream describes the network and the data (`retrain.stream.stream.LayerStream.identity`). This
module describes the rest: the machine, the packages, and what decides the last bits of a sum. Where
a library reports an effect, the effect is recorded rather than the environment variable behind it:
if OPENBLAS_CORETYPE names the kernels that OpenBLAS would choose anyway, the run is the same.
Paths, the order of imports, the language and the seed of Python's hashes are left out, since they
change no weight.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
from collections.abc import Callable, Iterator, Mapping
from functools import lru_cache
from importlib.metadata import requires, version
from itertools import pairwise, zip_longest
from pathlib import Path
from types import MappingProxyType
from typing import Any

import joblib
import llvmlite.binding
import numba
import numpy as np
import scipy.linalg
from threadpoolctl import threadpool_info, threadpool_limits

from retrain.stream.stream import LayerStream

_NO_NUMBERS = ("filelock", "matplotlib", "msgspec", "rich")
"""Dependencies that only lock, check records, draw or print; their versions change no weight and
are left out of the identity. A package listed here by mistake would hide a change of versions."""

_UNSEEN_SOURCES = ("cli", "report", "verify")
"""Subpackages of `retrain` whose code changes no weight; their sources are left out of the hash,
so that a run resumes after they change. The options they pass on are in the identity."""

# Settings of numba that change the machine code it compiles, and so the last bits.
_NUMBA_SETTINGS = (
    "CPU_NAME",
    "CPU_FEATURES",
    "ENABLE_AVX",
    "OPT",
    "LOOP_VECTORIZE",
    "SLP_VECTORIZE",
    "DISABLE_JIT",
    "DISABLE_INTEL_SVML",
    "USING_SVML",
    "BOUNDSCHECK",
)

VARIABLES = (
    "MKL_CBWR",
    "MKL_DEBUG_CPU_TYPE",
    "MKL_DOMAIN_NUM_THREADS",
    "MKL_DYNAMIC",
    "MKL_ENABLE_INSTRUCTIONS",
    "MKL_THREADING_LAYER",
    "ONEDNN_MAX_CPU_ISA",
    "DNNL_MAX_CPU_ISA",
    "ONEDNN_CPU_ISA_HINTS",
    "DNNL_CPU_ISA_HINTS",
    "ONEDNN_DEFAULT_FPMATH_MODE",
    "DNNL_DEFAULT_FPMATH_MODE",
    "OMP_DYNAMIC",
    "OMP_SCHEDULE",
    "OMP_THREAD_LIMIT",
    "KMP_DETERMINISTIC_REDUCTION",
    "KMP_FORCE_REDUCTION",
    "VECLIB_MAXIMUM_THREADS",
    "CUBLAS_WORKSPACE_CONFIG",
    "NVIDIA_TF32_OVERRIDE",
    "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE",
    "GLIBC_TUNABLES",
    "LD_PRELOAD",
)
"""Environment variables that can change the last bits and whose effect no library reports in full.
Collected from the libraries' manuals; a variable that is missing here lets a run resume under other
arithmetic."""


def run_identity(stream: LayerStream) -> dict[str, Any]:
    """Return the part of a run's identity that does not depend on its method.

    Parameters
    ----------
    stream : LayerStream
        Dense network on the calibration data.

    Returns
    -------
    dict
        JSON values: ``network and data`` (one hash), its parts by name, and `surroundings`.
    """
    parts = stream.identity
    device = str(getattr(stream, "device", "cpu"))
    return {
        "network and data": stream.fingerprint,
        **parts,
        **surroundings(device, with_torch=parts["arrays"] == "torch"),
    }


def surroundings(device: str, *, with_torch: bool) -> dict[str, Any]:
    """Describe the machine, the packages, and what decides the last bits of a result.

    Parameters
    ----------
    device : str
        Device on which torch computes.
    with_torch : bool
        Whether torch computes at all; without it, whether torch is loaded makes no difference.

    Returns
    -------
    dict
        JSON values: ``device``, ``cores``, ``versions``, ``code of retrain and solvers`` (a hash),
        ``kernels`` and ``environment``.
    """
    return {
        "device": device,
        "cores": joblib.cpu_count(),
        "versions": dict(versions()),
        "code of retrain and solvers": _sources(),
        "kernels": _kernels(device, with_torch),
        "environment": {name: os.environ[name] for name in VARIABLES if os.environ.get(name)},
    }


@lru_cache(maxsize=1)
def versions() -> Mapping[str, str]:
    """Return versions of Python, of this package, and of what it computes with.

    These are its dependencies as its metadata declares them, so a new one is never forgotten, and
    llvmlite, which numba compiles with. Looked up once: what this process has loaded stays.

    Returns
    -------
    mapping from str to str
        Version by name of the package, ``python`` included. Read-only.
    """
    names = {"llvmlite", "retrain"}
    for requirement in requires("retrain") or ():
        if "extra ==" not in requirement:
            names.add(re.split(r"[^A-Za-z0-9._-]", requirement, maxsplit=1)[0])
    packages = {name: version(name) for name in sorted(names - set(_NO_NUMBERS))}
    python = f"{platform.python_implementation()} {platform.python_version()}"
    return MappingProxyType({"python": python, **packages})


@lru_cache(maxsize=1)
def _sources() -> str:
    """Hash this package's code (SHA-256).

    The version does not change between two releases, so it cannot tell an edited checkout from the
    original. A developer who resumes with other code is refused rather once too often.
    """
    digest = hashlib.sha256()
    root = Path(__file__).parents[1]
    for package in ("retrain", "solvers"):
        for path in sorted((root / package).rglob("*.py")):
            place = path.relative_to(root)
            if place.parts[1] not in _UNSEEN_SOURCES:
                digest.update(f"{place.as_posix()};{path.stat().st_size};".encode())
                digest.update(path.read_bytes())
    return digest.hexdigest()


def _kernels(device: str, with_torch: bool) -> dict[str, Any]:
    """Return the kernels that the libraries report, and hashes of what they compute."""
    features = np.show_config(mode="dicts") or {}
    config = numba.config
    host = llvmlite.binding
    found: dict[str, Any] = {
        "processor": platform.machine(),
        "numpy": " ".join(features.get("SIMD Extensions", {}).get("found", [])),
        "BLAS": _blas(),
        "numba": {
            "host": host.get_host_cpu_name(),
            "features": _digest(host.get_host_cpu_features().flatten()),
            **{name: str(getattr(config, name, None)) for name in _NUMBA_SETTINGS},
        },
    }
    if with_torch:
        # MKL follows the limit, unless its own number of threads is set.
        with threadpool_limits(joblib.cpu_count()):
            found["torch"] = _torch_settings(device)
    with threadpool_limits(1):
        found["numpy's last bits"] = _numpy_bits()
        if with_torch:
            found["torch's last bits"] = _torch_bits(device)
    return found


def _blas() -> dict[str, str]:
    """Name the BLAS libraries that numpy and scipy use, each with the kernels that it chose.

    Libraries that other packages bring are left out: whether they are loaded depends on the calling
    program, and they compute nothing here.
    """
    found: dict[str, list[str]] = {}
    for library in threadpool_info():
        parts = Path(library["filepath"]).parts
        within = [part for folder, part in pairwise(parts) if folder.endswith("-packages")]
        owner = within[0].partition(".")[0] if within else "system"
        if library["user_api"] == "blas" and owner in ("system", "numpy", "scipy"):
            keys = ("internal_api", "version", "architecture", "threading_layer")
            says = " ".join(str(library[key]) for key in keys if library.get(key))
            found.setdefault(owner, []).append(says)
    return {owner: ", ".join(sorted(libraries)) for owner, libraries in found.items()}


def _numpy_bits() -> str:
    """Hash what numpy and scipy compute from fixed numbers: products, factors, functions, sums.

    The arrays are small enough that one thread computes each, so the number of threads does not
    matter.
    """
    digest = hashlib.sha256()
    for dtype in (np.float32, np.float64):
        left = _numbers(48 * 67, dtype).reshape(48, 67)
        right = _numbers(67 * 35, dtype).reshape(67, 35)
        gram = left.T @ left + 3 * np.eye(67, dtype=dtype)
        factor = scipy.linalg.cholesky(gram, lower=True)
        tiny = np.full(1, np.finfo(dtype).smallest_normal, dtype) * np.full(1, 0.25, dtype)
        for array in (
            left @ right,
            left @ right[:, 0],
            gram,
            factor,
            scipy.linalg.solve_triangular(factor, right, lower=True),
            scipy.linalg.eigh(gram[:24, :24])[0],
            np.linalg.norm(left, 2),
            np.exp(left),
            np.log(np.abs(left) + 1),
            np.tanh(left),
            left.sum(),
            left.mean(axis=0),
            (left * left).sum(axis=1),
            tiny,  # zero where denormal numbers are flushed
        ):
            digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()


def _torch_settings(device: str) -> dict[str, Any]:
    """Return torch's own report of how it computes on this machine."""
    import torch

    threads = re.search(r"mkl_get_max_threads\(\) : (\d+)", torch.__config__.parallel_info())
    found: dict[str, Any] = {
        "kernels": torch.backends.cpu.get_cpu_capability(),
        "build": _digest(torch.__config__.show()),
        "MKL threads": None if threads is None else int(threads[1]),
        "default type": str(torch.get_default_dtype()),
        "float32 products": torch.get_float32_matmul_precision(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "oneDNN": bool(torch.backends.mkldnn.is_available() and torch.backends.mkldnn.enabled),
        "autocast": str(torch.get_autocast_dtype("cpu"))
        if torch.is_autocast_enabled("cpu")
        else None,
    }
    if torch.device(device).type == "cuda":
        cuda, cudnn = torch.cuda, torch.backends.cudnn
        found["CUDA"] = {
            "device": cuda.get_device_name(device),
            "capability": list(cuda.get_device_capability(device)),
            "version": torch.version.cuda,
            "cuDNN": cudnn.version() if cudnn.enabled else None,
            "cuDNN is deterministic": cudnn.deterministic,
            "cuDNN tries kernels": cudnn.benchmark,
            "TF32 in cuDNN": cudnn.allow_tf32,
            "TF32 in products": torch.backends.cuda.matmul.allow_tf32,
        }
    return found


def _torch_bits(device: str) -> str:
    """Hash what torch computes from fixed numbers: layers, activations, sums, factors."""
    import torch
    from torch.nn import functional

    digest = hashlib.sha256()

    def note(*values: torch.Tensor) -> None:
        for value in values:
            digest.update(value.cpu().contiguous().view(torch.uint8).numpy().tobytes())

    with torch.inference_mode(False), torch.no_grad():
        for dtype in (torch.float32, torch.float64):
            values = torch.tensor(_numbers(48 * 67, np.float64), dtype=dtype, device=device)
            values = values.reshape(48, 67)
            weight = torch.tensor(_numbers(35 * 67, np.float64), dtype=dtype, device=device)
            weight = weight.reshape(35, 67)
            images = values[:, :64].reshape(12, 4, 8, 8).contiguous()
            kernels = weight[:, :36].reshape(35, 4, 3, 3).contiguous()
            gram = values.T @ values + 3 * torch.eye(67, dtype=dtype, device=device)
            note(functional.linear(values, weight, weight[:, 0].contiguous()), gram)
            note(torch.linalg.cholesky(gram))
            note(functional.conv2d(images, kernels, padding=1))
            note(*(apply(values) for apply in _activations()))
            note(functional.layer_norm(values, (67,)), functional.softmax(values, 1))
            note(functional.avg_pool2d(images, 3, 2), values.sum(0), values.mean(1))
        narrow = values.to(torch.bfloat16)
        note(narrow @ narrow.T)
    return digest.hexdigest()


def _activations() -> tuple[Callable[[Any], Any], ...]:
    import torch
    from torch.nn import functional

    return (torch.exp, torch.tanh, torch.sigmoid, functional.gelu, functional.silu)


def _numbers(count: int, dtype: Any) -> np.ndarray:
    """Return numbers between -1.3 and 1.3 that are equal on every machine: one division."""
    return ((np.arange(count) * 7919 % 263 - 131) / 101).astype(dtype)


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


# --- what differs ---------------------------------------------------------------------------------

_TOLD = 4  # number of differences that a message names; the rest are counted. Chosen by hand
_LONGEST = 72  # characters of a value that a message shows; chosen by hand, about a line

_HASHES = ("computation", "training", "weights", "network and data")
"""Entries that follow from others, or say less than they do. Messages name them last, in this
order."""

_ADDED = ("weights", "computation", "data", "kernels", "environment", "code of retrain and solvers",
          "arrays", "batch size", "tensor names", "training")  # fmt: skip
"""Entries that every identity has now and that identities of earlier versions may lack. Where one
is missing, the message says so instead of naming a difference."""


def differences(before: Any, now: Any) -> str:
    """Describe where two identities differ.

    Parameters
    ----------
    before, now : JSON values
        The recorded identity and that of the command at hand.

    Returns
    -------
    str
        Up to four differences in words, separated by semicolons; empty where there are none.
    """
    if not isinstance(before, Mapping):
        return "it has no identity"
    missing = [key for key in _ADDED if key in now and key not in before]
    found = list(_differing({**{key: now[key] for key in missing}, **before}, now))
    found.sort(key=lambda pair: _rank(pair[0]))
    told = [text for _, text in found]
    if len(told) > _TOLD:
        told = [*told[: _TOLD - 1], told[-1], f"and {len(told) - _TOLD} more"]
    if missing:
        told.append(f"an earlier version of retrain did not record its {', '.join(missing)}")
    return "; ".join(told)


def _rank(name: str) -> int:
    top = name.partition(".")[0]
    return _HASHES.index(top) + 1 if top in _HASHES else 0


def _differing(before: Any, now: Any, name: str = "") -> Iterator[tuple[str, str]]:
    """Yield what differs, leaf by leaf: its name, and the name with both values in words."""
    if isinstance(before, Mapping) and isinstance(now, Mapping):
        # The steps of a computation say most, so they come first.
        for key in sorted(before.keys() | now.keys(), key=lambda key: (key != "steps", key)):
            yield from _differing(before.get(key), now.get(key), f"{name}.{key}" if name else key)
    elif name.endswith(".steps") and isinstance(before, list) and isinstance(now, list):
        differing = [pair for pair in zip_longest(before, now) if pair[0] != pair[1]]
        if differing:
            was, is_now = _excerpts(*differing[0])
            more = f" (and {len(differing) - 1} more)" if len(differing) > 1 else ""
            yield name, f"{name.removesuffix('s')} was {was}, is {is_now}{more}"
    elif before != now:
        was, is_now = _excerpts(before, now)
        yield name, f"{name} was {was}, is {is_now}"


def _excerpts(before: Any, now: Any) -> tuple[str, str]:
    """Both values in few characters, with the place where they differ in view."""
    first, second = _said(before), _said(now)
    start = 0
    if max(len(first), len(second)) > _LONGEST:
        same = next(i for i, (a, b) in enumerate(zip_longest(first, second)) if a != b)
        start = max(first.rfind("; ", 0, same) + 2, same - _LONGEST // 2) if same > 12 else 0
    return _cut(first, start), _cut(second, start)


def _cut(text: str, start: int) -> str:
    stop = start + _LONGEST
    return f"{'…' if start else ''}{text[start:stop]}{'…' if len(text) > stop else ''}"


def _said(value: Any) -> str:
    """Write a value as JSON, a hash by its first digits."""
    if value is None:
        return "not set"
    text = json.dumps(value, ensure_ascii=False)
    return f"{text[:9]}…" if re.fullmatch('"[0-9a-f]{64}"', text) else text
