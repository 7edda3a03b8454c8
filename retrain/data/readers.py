"""Arrays from files: npz, npy, the idx files of MNIST.

Files are treated as untrusted: headers are compared with file sizes before memory is allocated,
and nothing is unpickled.
"""

from __future__ import annotations

import gzip
import lzma
import math
import struct
import zipfile
import zlib
from pathlib import Path
from typing import IO, cast

import numpy as np

from retrain.files import READ_ERRORS, first_line

IDS = "input_ids"
"""Name under which tokenizers return token ids; a file with it holds a network's inputs by name."""

_DEFLATE_LIMIT = 1032
"""Largest ratio of the unpacked to the packed size of a deflate stream, a property of the format
(1032:1). A header that claims more is false. A smaller value would refuse very regular data."""

_LONGEST = 2**48
"""Length from which an axis of an array is refused as a false header. With this limit lengths and
their products fit numpy's integers and stay printable. Chosen by hand, far above any real file."""


_MOST_AXES = 32
"""Largest number of axes of an array. Networks take samples of about four axes, and numpy's own
limit is 32 or 64 depending on its version. Chosen by hand."""


def existing_file(path: Path) -> Path:
    """Return the path of a file that exists; refuse any other by name.

    Parameters
    ----------
    path : Path
        Path to check.

    Returns
    -------
    Path
        The same path.

    Raises
    ------
    FileNotFoundError
        If nothing exists there.
    ValueError
        If it is not a file.
    """
    if not path.exists():
        raise FileNotFoundError(f"data: there is no file {str(path)!r}")
    if not path.is_file():
        raise ValueError(f"data: {str(path)!r} is not a file")
    return path


def read_npz(path: Path) -> dict[str, np.ndarray]:
    """Read ``x`` and ``y`` of an npz file, or all its arrays where it holds input ids instead.

    Parameters
    ----------
    path : Path
        File.

    Returns
    -------
    dict from str to ndarray
        Samples ``x`` and labels ``y`` if there are any; or a network's inputs by name.

    Raises
    ------
    FileNotFoundError
        If the file does not exist.
    ValueError
        If the file is damaged, encrypted or has no array ``x`` and no input ids.
    """
    existing_file(path)
    arrays: dict[str, np.ndarray] = {}
    try:
        with zipfile.ZipFile(path) as archive:
            members = _members(archive, path)
            for key in ("x", "y") if "x" in members else sorted(members):
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
                    arrays[key] = read_npy(member, info.file_size, f"{path}:{key}", None)
    except READ_ERRORS as error:
        if str(error).startswith("data: "):
            raise  # one of our own checks
        raise ValueError(
            f"data: {str(path)!r} is not a readable npz file ({first_line(error)})"
        ) from error
    return arrays


def _members(archive: zipfile.ZipFile, path: Path) -> dict[str, zipfile.ZipInfo]:
    """Arrays of an npz file by name; ``x`` or input ids are among them."""
    names = [info for info in archive.infolist() if info.filename.endswith(".npy")]
    members = {info.filename.removesuffix(".npy"): info for info in names}
    if "x" not in members and IDS not in members:
        held = ", ".join(sorted(members)) or "nothing"
        raise ValueError(f"data: {str(path)!r} has no array 'x'; it holds {held:.200}")
    if len(members) < len(names):
        raise ValueError(f"data: {str(path)!r} has an array twice")
    return members


def read_npy(file: IO[bytes], size: int, name: str, limit: int | None) -> np.ndarray:
    """Read one array; its header must account for every byte of `size`.

    Parameters
    ----------
    file : binary file
        File at the beginning of the array.
    size : int
        Number of bytes that the array and its header take.
    name : str
        Name in messages.
    limit : int or None
        Number of entries of the first axis to read; None for all.

    Returns
    -------
    ndarray
        The array, in the dtype of the file.

    Raises
    ------
    ValueError
        If the file is damaged or truncated, or holds anything but real numbers.
    """
    try:
        version = np.lib.format.read_magic(file)
        if version == (1, 0):
            shape, fortran, dtype = np.lib.format.read_array_header_1_0(file)
        elif version == (2, 0):
            shape, fortran, dtype = np.lib.format.read_array_header_2_0(file)
        else:
            raise ValueError(f"version {version} is for structured arrays")
    except (zlib.error, lzma.LZMAError, zipfile.BadZipFile, OSError):
        raise  # an error of the archive around it, which the caller reports
    except READ_ERRORS as error:
        raise ValueError(
            f"data: {name!r} is not a readable .npy array ({first_line(error)})"
        ) from error
    if dtype.hasobject:
        raise ValueError(f"data: {name!r} holds pickled objects, want numbers; nothing was read")
    if dtype.kind not in "fiub":
        raise ValueError(f"data: {name!r} is of dtype {dtype}, want real numbers")
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


def read_mnist(folder: Path, prefix: str, limit: int | None) -> tuple[np.ndarray, np.ndarray]:
    """Read images, scaled to [0, 1] with a channel axis, and their labels.

    Parameters
    ----------
    folder : Path
        Directory with the idx files, gzipped or not.
    prefix : {"train", "t10k"}
        Beginning of the files' names.
    limit : int or None
        Number of images to read; None for all.

    Returns
    -------
    images : ndarray of float32, shape (n_samples, 1, 28, 28)
        Images.
    labels : ndarray of int64, shape (n_samples,)
        Digits.

    Raises
    ------
    FileNotFoundError
        If the directory or a file does not exist.
    ValueError
        If a file is damaged.
    """
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
