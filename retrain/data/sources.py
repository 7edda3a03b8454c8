"""Data sources: samples (and labels) from files, from scikit-learn, from a function, from batches.

Everything ends as one `Data`: finite floating-point samples, first axis the sample. Files are taken
for hostile: headers are compared with file sizes before memory is taken, and nothing is unpickled.
Torch tensors and loaders are recognised by what they can do; this module does not import torch.
"""

from __future__ import annotations

import gzip
import hashlib
import importlib
import lzma
import math
import struct
import sys
import traceback
import zipfile
import zlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import IO, Any, cast

import numpy as np

from retrain.files import READ_ERRORS, first_line

FORMS = (
    "FILE.npz, FILE.npy, mnist:DIR, mnist-test:DIR, digits, digits-test or package.module:factory"
)
_DEFLATE_LIMIT = 1032
"""No deflate stream expands by more than this, so a larger claim in a header is a lie."""
_LONGEST = 2**48
"""No axis of an array in a file is as long: with this bound, lengths and their products stay
printable, and numpy's own integers hold them."""
_MOST_AXES = 32
"""numpy's own limit is 64; networks take samples of four axes or so."""


@dataclass(frozen=True, eq=False)
class Data:
    """Samples of a network's input, with labels or targets where there are some.

    Attributes
    ----------
    x : ndarray, shape (n_samples, ...)
        Finite, float32 or float64. Images are (n_samples, channels, height, width).
    y : ndarray or None, shape (n_samples, ...)
        Integer labels or real targets.
    name : str
        Where they came from.
    """

    x: np.ndarray
    y: np.ndarray | None
    name: str

    def __len__(self) -> int:
        return int(self.x.shape[0])

    @property
    def flat(self) -> np.ndarray:
        """The samples as rows, shape (n_samples, n_features): what a dense first layer takes."""
        return self.x.reshape(len(self), -1)

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of dtypes, shapes and bytes of samples and labels; the name is left out."""
        digest = hashlib.sha256()
        for array in (self.x, self.y):
            if array is None:
                digest.update(b"none;")
                continue
            digest.update(f"{array.dtype.newbyteorder('<').str}{array.shape};".encode())
            little = array.astype(array.dtype.newbyteorder("<"), copy=False)
            digest.update(np.ascontiguousarray(little).data)
        return digest.hexdigest()


def load_data(
    source: str | Path,
    *,
    limit: int | None = None,
    normalise: str | tuple[Any, Any] | None = None,
) -> Data:
    """Load a data source.

    Parameters
    ----------
    source : str or Path
        ``FILE.npz`` (arrays ``x`` and, if there are labels, ``y``), ``FILE.npy``; ``mnist:DIR`` or
        ``mnist-test:DIR`` (the idx files, gzipped or not, scaled to [0, 1], 1 x 28 x 28);
        ``digits`` or ``digits-test`` (scikit-learn's digits scaled to [0, 1], 1 x 8 x 8, a fixed
        split of 1437 and 360); ``package.module:factory``, a callable that returns x or (x, y).
    limit : int, optional
        Take the first `limit` samples only.
    normalise : str or (mean, std), optional
        Replace x by (x - mean) / std. Numbers, or one number a channel (axis 1 of x); as text
        ``MEAN,STD``, or with k channels k means, then k standard deviations.

    Returns
    -------
    Data

    Raises
    ------
    FileNotFoundError
        If a file is not there.
    ValueError
        If the source is not understood, truncated, pickled, empty, not numeric, not finite, or if
        its labels do not match; one line that says which.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"limit: got {limit}, wanted a positive number of samples")
    mean_std = parse_normalise(normalise) if isinstance(normalise, str) else normalise
    x, y = _read(str(source), limit)
    data = _checked(x, y, str(source), limit)
    return data if mean_std is None else _normalised(data, *mean_std)


def as_data(data: Any, *, name: str | None = None) -> Data:
    """Make a `Data` of whatever holds samples.

    Parameters
    ----------
    data : object
        A `Data`; a source as `load_data` takes it (text or a path); an array or torch tensor; a
        pair (x, y) of those; a nested list of numbers; or an iterable of batches (a DataLoader,
        a list, a generator), each an array or tensor, or a tuple whose first two entries are x
        and y. All batches are gathered in memory.
    name : str, optional
        What to call it.

    Raises
    ------
    ValueError
        As `load_data`; or if a batch is not understood.
    """
    if isinstance(data, Data):
        return data
    if isinstance(data, str | Path):
        return load_data(data)
    label = name or type(data).__name__
    if _is_array(data):
        return _checked(_array(data), None, label)
    if isinstance(data, tuple) and len(data) == 2 and all(map(_is_array_or_numbers, data)):
        return _checked(_array(data[0]), _array(data[1]), label)
    if _is_array_or_numbers(data):
        return _checked(_array(data), None, label)
    if isinstance(data, Mapping) or not isinstance(data, Iterable):
        raise ValueError(
            f"data: got a {type(data).__name__}, wanted an array, a tensor, a pair (x, y), a "
            "loader or another iterable of batches"
        )
    return _gathered(data, label)


def parse_normalise(text: str) -> tuple[Any, Any]:
    """Read ``MEAN,STD``: two numbers, or k means followed by k standard deviations.

    Raises
    ------
    ValueError
        If it is not an even number of numbers.
    """
    try:
        numbers = [float(part) for part in text.split(",")]
    except ValueError:
        numbers = []
    if not numbers or len(numbers) % 2:
        raise ValueError(f"normalise: got {text!r}, wanted MEAN,STD or k means and then k STDs")
    half = len(numbers) // 2
    if half == 1:
        return numbers[0], numbers[1]
    return tuple(numbers[:half]), tuple(numbers[half:])


def import_factory(spec: str, argument: str) -> Callable[[], Any]:
    """Import the callable that ``package.module:factory`` names; the working directory counts too.

    Raises
    ------
    ValueError
        If there is no such module, or nothing callable of that name in it.
    """
    module_name, _, attribute = spec.partition(":")
    if not module_name or not attribute:
        raise ValueError(f"{argument}: got {spec!r}, wanted package.module:factory")
    here = str(Path.cwd())
    added = here not in sys.path
    if added:
        sys.path.insert(0, here)
    try:
        with _Told(argument, f"{spec!r}: importing {module_name}"):
            target: Any = importlib.import_module(module_name)
    finally:
        if added:
            sys.path.remove(here)
    for part in attribute.split("."):
        if not hasattr(target, part):
            raise ValueError(f"{argument}: module {module_name!r} has no {attribute!r}")
        target = getattr(target, part)
    if not callable(target):
        raise ValueError(f"{argument}: {spec!r} is a {type(target).__name__}, wanted a callable")
    return cast("Callable[[], Any]", target)


def call_factory(spec: str, argument: str) -> Any:
    """Call what ``package.module:factory`` names, without arguments.

    Raises
    ------
    ValueError
        As `import_factory`; or if the call fails, whatever it raised, with its place.
    """
    factory = import_factory(spec, argument)
    with _Told(argument, f"calling {spec}()"):
        return factory()


class _Told:
    """Tell whatever a user's own module or factory raises, SystemExit too, in one line.

    Ctrl-C passes, and so do errors of our own.
    """

    def __init__(self, argument: str, what: str) -> None:
        self.argument, self.what = argument, what

    def __enter__(self) -> None:
        return None

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: Any
    ) -> None:
        if not isinstance(error, Exception | SystemExit):
            return
        own = isinstance(error, ValueError | FileNotFoundError)
        if own and str(error).startswith(f"{self.argument}: "):
            return
        where = ""
        for frame, line in traceback.walk_tb(trace):
            file = Path(frame.f_code.co_filename)
            others = (Path(__file__).parent, Path(importlib.__file__).parents[1])
            installed = "site-packages" in file.parts or any(map(file.is_relative_to, others))
            if file.suffix == ".py" and not installed:  # a line of the user's own
                where = f", {file.name} line {line}"
        text = " ".join(first_line(error).split())
        raise ValueError(
            f"{self.argument}: {self.what} failed: {type(error).__name__}: {text}{where}"
        ) from error


# --- sources ------------------------------------------------------------------------------------


def _read(source: str, limit: int | None) -> tuple[np.ndarray, np.ndarray | None]:
    """Read a source's arrays as they are; `limit` only spares reading what is not wanted."""
    kind, _, rest = source.partition(":")
    if source in ("digits", "digits-test"):
        return _digits(test=source == "digits-test")
    if kind in ("mnist", "mnist-test") and rest:
        return _mnist(Path(rest), "t10k" if kind == "mnist-test" else "train", limit)
    if source.lower().endswith(".npz"):
        return _npz(Path(source))
    if source.lower().endswith(".npy"):
        path = _existing(Path(source))
        with path.open("rb") as file:
            return _npy(file, path.stat().st_size, str(path), limit), None
    if rest:
        with _Told("data", f"calling {source}()"):
            data = as_data(import_factory(source, "data")(), name=source)
        return data.x, data.y
    raise ValueError(f"data: got {source!r}, wanted {FORMS}")


def _existing(path: Path) -> Path:
    if not path.exists():
        raise FileNotFoundError(f"data: there is no file {str(path)!r}")
    if not path.is_file():
        raise ValueError(f"data: {str(path)!r} is not a file")
    return path


def _npz(path: Path) -> tuple[np.ndarray, np.ndarray | None]:
    """Read ``x`` and ``y`` of an npz file."""
    _existing(path)
    arrays = {}
    try:
        with zipfile.ZipFile(path) as archive:
            members = _members(archive, path)
            for key in ("x", "y"):
                if key not in members:
                    continue
                info = members[key]
                if info.flag_bits & 1:
                    raise ValueError(
                        f"data: {key!r} in {str(path)!r} is encrypted; save it without a password"
                    )
                if info.file_size > _DEFLATE_LIMIT * max(path.stat().st_size, 1):
                    raise ValueError(f"data: {key!r} in {str(path)!r} claims more than it can hold")
                with archive.open(info) as member:
                    arrays[key] = _npy(member, info.file_size, f"{path}:{key}", None)
    except READ_ERRORS as error:
        if str(error).startswith("data: "):
            raise  # one of our own checks
        raise ValueError(
            f"data: {str(path)!r} is not a readable npz file ({first_line(error)})"
        ) from error
    return arrays["x"], arrays.get("y")


def _members(archive: zipfile.ZipFile, path: Path) -> dict[str, zipfile.ZipInfo]:
    """Arrays of an npz file by name; ``x`` is among them."""
    names = [info for info in archive.infolist() if info.filename.endswith(".npy")]
    members = {info.filename.removesuffix(".npy"): info for info in names}
    if "x" not in members:
        held = ", ".join(sorted(members)) or "nothing"
        raise ValueError(f"data: {str(path)!r} has no array 'x'; it holds {held:.200}")
    if len(members) < len(names):
        raise ValueError(f"data: {str(path)!r} has an array twice")
    return members


def _npy(file: IO[bytes], size: int, name: str, limit: int | None) -> np.ndarray:
    """Read one array; its header must account for every byte of `size`."""
    try:
        version = np.lib.format.read_magic(file)
        if version == (1, 0):
            shape, fortran, dtype = np.lib.format.read_array_header_1_0(file)
        elif version == (2, 0):
            shape, fortran, dtype = np.lib.format.read_array_header_2_0(file)
        else:
            raise ValueError(f"version {version} is for structured arrays")
    except (zlib.error, lzma.LZMAError, zipfile.BadZipFile, OSError):
        raise  # of the archive around it
    except READ_ERRORS as error:
        raise ValueError(
            f"data: {name!r} is not a readable .npy array ({first_line(error)})"
        ) from error
    if dtype.hasobject:
        raise ValueError(f"data: {name!r} holds pickled objects, wanted numbers; nothing was read")
    if dtype.kind not in "fiub":
        raise ValueError(f"data: {name!r} is of dtype {dtype}, wanted real numbers")
    if any(not 0 <= length < _LONGEST for length in shape):
        raise ValueError(f"data: {name!r} has a header that lies: a length is beyond any file's")
    claimed = math.prod(shape) * dtype.itemsize
    if claimed != size - file.tell() or len(shape) > _MOST_AXES:
        raise ValueError(
            f"data: {name!r} is truncated or its header lies: shape {shape} of {dtype} needs "
            f"{claimed} bytes, the file has {size - file.tell()}"
        )
    wanted = claimed
    if limit is not None and shape and not fortran and shape[0] > limit:
        shape = (limit, *shape[1:])
        wanted = math.prod(shape) * dtype.itemsize
    raw = _read_exactly(file, wanted, name)
    flat = np.frombuffer(raw, dtype=dtype)
    return flat.reshape(shape, order="F" if fortran else "C")


def _read_exactly(file: IO[bytes], size: int, name: str) -> bytearray:
    """Read `size` bytes in pieces, so that memory grows with what is really there."""
    raw = bytearray()
    while len(raw) < size:
        piece = file.read(min(size - len(raw), 1 << 20))
        if not piece:
            raise ValueError(f"data: {name!r} is truncated: {len(raw)} of {size} bytes are there")
        raw += piece
    return raw


def _mnist(folder: Path, prefix: str, limit: int | None) -> tuple[np.ndarray, np.ndarray]:
    images = _idx(_idx_path(folder, f"{prefix}-images", 3), 3, limit)
    labels = _idx(_idx_path(folder, f"{prefix}-labels", 1), 1, limit)
    return images[:, None].astype(np.float32) / np.float32(255), labels.astype(np.int64)


def _idx_path(folder: Path, stem: str, ndim: int) -> Path:
    if not folder.is_dir():
        raise FileNotFoundError(f"data: there is no folder {str(folder)!r}")
    names = [f"{stem}{dot}idx{ndim}-ubyte{end}" for dot in "-." for end in ("", ".gz")]
    for name in names:
        if (folder / name).is_file():
            return folder / name
    raise FileNotFoundError(f"data: {str(folder)!r} has none of {', '.join(names)}")


def _idx(path: Path, ndim: int, limit: int | None) -> np.ndarray:
    """Read an idx file of bytes: 0, 0, type 8, ndim, the sizes as big-endian words, the entries."""
    packed = path.suffix == ".gz"
    stored = path.stat().st_size
    try:
        with gzip.open(path) if packed else path.open("rb") as file:
            head = _read_exactly(cast("IO[bytes]", file), 4 + 4 * ndim, str(path))
            if head[:4] != bytes((0, 0, 8, ndim)):
                raise ValueError(
                    f"data: {str(path)!r} is no idx file of bytes with {ndim} dimensions "
                    f"(it begins with {bytes(head[:4]).hex()})"
                )
            shape = tuple(int(size) for size in np.frombuffer(head, ">u4")[1:])
            claimed = math.prod(shape)
            held = _DEFLATE_LIMIT * stored if packed else stored - len(head)
            if claimed > held or (not packed and claimed != held):
                raise ValueError(
                    f"data: {str(path)!r} is truncated or its header lies: shape {shape} needs "
                    f"{claimed} bytes, the file has {'at most ' if packed else ''}{held}"
                )
            if limit is not None and limit < shape[0]:
                shape = (limit, *shape[1:])
            raw = _read_exactly(cast("IO[bytes]", file), math.prod(shape), str(path))
            if math.prod(shape) == claimed and file.read(1):
                raise ValueError(f"data: {str(path)!r} has more bytes than its header says")
    except (gzip.BadGzipFile, zlib.error, EOFError, struct.error) as error:
        raise ValueError(f"data: {str(path)!r} is no whole gzip file ({error})") from error
    return np.frombuffer(raw, np.uint8).reshape(shape)


def _digits(*, test: bool) -> tuple[np.ndarray, np.ndarray]:
    from sklearn.datasets import load_digits  # half a second, so only when asked for

    digits = load_digits()
    order = np.random.default_rng(0).permutation(len(digits.target))
    chosen = order[1437:] if test else order[:1437]
    x = (digits.images[chosen, None] / 16).astype(np.float32)
    return x, digits.target[chosen].astype(np.int64)


# --- objects ------------------------------------------------------------------------------------


def _is_array(value: Any) -> bool:
    return hasattr(value, "shape") and hasattr(value, "dtype")


def _is_array_or_numbers(value: Any) -> bool:
    """Arrays, tensors and nested lists of plain numbers; a list of arrays is a list of batches."""
    if _is_array(value):
        return True
    if not isinstance(value, list | tuple) or not value:
        return False
    return all(isinstance(v, int | float | np.generic) or _nested_numbers(v) for v in value)


def _nested_numbers(value: Any) -> bool:
    return isinstance(value, list) and _is_array_or_numbers(value) and not _is_array(value)


def _array(value: Any) -> np.ndarray:
    """Turn an array, a torch tensor (any device, half types too) or nested lists into numpy."""
    if hasattr(value, "detach") and hasattr(value, "cpu"):
        value = value.detach().cpu()
        if str(value.dtype) == "torch.bfloat16":  # numpy has no such type
            value = value.float()
        return cast("np.ndarray", value.numpy())
    try:
        return np.asarray(value)
    except ValueError as error:
        raise ValueError(f"data: the rows are not of one length ({error})") from error


def _gathered(batches: Iterable[Any], name: str) -> Data:
    xs: list[np.ndarray] = []
    ys: list[np.ndarray] = []
    for batch in batches:
        parts = batch if isinstance(batch, list | tuple) else (batch,)
        if not parts or not all(_is_array_or_numbers(part) for part in parts[:2]):
            raise ValueError(
                f"data: got a batch of type {type(batch).__name__}, wanted x or (x, y) of arrays"
            )
        xs.append(_array(parts[0]))
        if len(parts) > 1:
            ys.append(_array(parts[1]))
    if not xs:
        raise ValueError("data: there is no sample")
    if len({x.shape[1:] for x in xs}) > 1:
        raise ValueError(f"data: batches of different shapes {sorted({x.shape[1:] for x in xs})}")
    if ys and len(ys) != len(xs):
        raise ValueError(f"data: {len(ys)} of {len(xs)} batches have labels")
    return _checked(np.concatenate(xs), np.concatenate(ys) if ys else None, name)


# --- checks -------------------------------------------------------------------------------------


def _checked(x: np.ndarray, y: np.ndarray | None, name: str, limit: int | None = None) -> Data:
    """Return the first `limit` samples, in float32 or float64 (integers and halves in float32)."""
    if x.dtype.kind not in "fiub":
        raise ValueError(f"data: {name!r} has samples of dtype {x.dtype}, wanted real numbers")
    if x.ndim < 2:
        raise ValueError(f"data: {name!r} has shape {x.shape}, wanted (samples, features, ...)")
    if x.size == 0:
        raise ValueError(f"data: {name!r} is empty: shape {x.shape}")
    if y is not None:
        if y.dtype.kind not in "fiub":
            raise ValueError(f"data: {name!r} has labels of dtype {y.dtype}, wanted numbers")
        if y.ndim == 0 or len(y) != len(x):
            got = len(y) if y.ndim else "a single number"
            raise ValueError(f"data: {name!r} has {len(x)} samples but labels for {got}")
        y = y[:limit]
        if not np.isfinite(y).all():
            raise ValueError(f"data: {name!r} has NaN or infinite labels")
    x = x[:limit]
    dtype = np.float64 if x.dtype.kind == "f" and x.dtype.itemsize >= 8 else np.float32
    x = x.astype(dtype, copy=False)  # in the native byte order too
    if not np.isfinite(x).all():
        raise ValueError(f"data: {name!r} has NaN or infinite samples")
    return Data(x, y, name)


def _normalised(data: Data, mean: Any, std: Any) -> Data:
    """Return (x - mean) / std, by channel (axis 1) where there are several."""
    x = data.x
    shift, scale = (np.atleast_1d(np.asarray(v, dtype=np.float64)) for v in (mean, std))
    if shift.shape != scale.shape or shift.ndim != 1 or len(shift) not in (1, x.shape[1]):
        raise ValueError(
            f"normalise: got {shift.size} means and {scale.size} STDs, wanted one of each, or "
            f"{x.shape[1]} (one a channel, axis 1 of shape {x.shape})"
        )
    if not (np.isfinite(shift).all() and np.isfinite(scale).all() and (scale > 0).all()):
        raise ValueError(f"normalise: got {mean}, {std}, wanted finite means and positive STDs")
    by_channel = (1, -1) + (1,) * (x.ndim - 2)
    shift, scale = (v.reshape(by_channel).astype(x.dtype) for v in (shift, scale))
    if not scale.all():
        raise ValueError(f"normalise: the STD {std} is zero in {x.dtype}")
    return replace(data, x=(x - shift) / scale)
