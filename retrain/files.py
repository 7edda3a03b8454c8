"""Write files whole or not at all; what reading a damaged one raises."""

from __future__ import annotations

import glob
import json
import lzma
import math
import os
import pickle
import struct
import tokenize
import zipfile
import zlib
from pathlib import Path
from typing import Any

READ_ERRORS = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    BufferError,
    EOFError,
    ImportError,
    LookupError,
    MemoryError,
    NameError,
    OSError,
    RuntimeError,
    StopIteration,
    SyntaxError,
    SystemError,
    TypeError,
    ValueError,
    lzma.LZMAError,
    pickle.PickleError,
    struct.error,
    tokenize.TokenError,
    zipfile.BadZipFile,
    zlib.error,
)
"""What readers of other packages (numpy, torch, Pillow, zipfile) raise on damaged bytes. The type
says where the reader stumbled, not what is wrong with the file, so each of them means "damaged"."""


def first_line(error: BaseException) -> str:
    """Return the first line of an error's text, at most 200 characters; its type without one."""
    return (str(error).strip() or type(error).__name__).split("\n")[0][:200]


def write_whole(path: Path, content: bytes) -> None:
    """Write a file beside its place, force it to the disk, and move it there.

    What a process that was killed while it wrote the same file has left beside it is removed.

    Raises
    ------
    OSError
        If any of that fails; then what was there before is still there, and nothing else.
    """
    beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    _sweep_beside(path)
    try:
        with beside.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        beside.replace(path)
    except BaseException as error:
        if isinstance(error, OSError) and error.filename is None:
            error.filename = str(path)  # a full disk does not say where
        beside.unlink(missing_ok=True)
        raise
    _sync_folder(path.parent)


def _sweep_beside(path: Path) -> None:
    """Remove temporary files of `path` whose processes have ended (on POSIX, where that shows)."""
    if os.name != "posix":
        return
    for entry in path.parent.glob(f".{glob.escape(path.name)}.*.tmp"):
        number = entry.name.removesuffix(".tmp").rpartition(".")[2]
        if number.isdigit() and not _alive(int(number)):
            entry.unlink(missing_ok=True)


def _alive(process: int) -> bool:
    """Whether a process of this number exists."""
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True
    return True


def _sync_folder(folder: Path) -> None:
    """Force a rename to the disk, where folders can be opened (not on Windows)."""
    if os.name != "posix":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def plain(value: Any) -> Any:
    """Return nested data with every number that JSON cannot hold (NaN, infinity) as None."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {str(key): plain(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(entry) for entry in value]
    return value


def json_bytes(record: dict[str, Any]) -> bytes:
    """Serialise a record readably, the same bytes for the same record."""
    return (json.dumps(plain(record), indent=1, allow_nan=False) + "\n").encode()


def write_json(path: Path, record: dict[str, Any]) -> None:
    """Write a record as JSON, whole or not at all."""
    write_whole(path, json_bytes(record))
