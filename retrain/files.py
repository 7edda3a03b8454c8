"""Files: written complete or not at all; read strictly, and checked by type.

Every file is treated as possibly damaged until it has been read. Strict JSON is converted to a type
by the type's own hints (msgspec); any fault raises one `ValueError` that names the file, the entry,
what was found and what was wanted.
"""

from __future__ import annotations

import glob
import json
import lzma
import math
import os
import pickle
import re
import struct
import tokenize
import types
import typing
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from typing import Annotated, Any, NoReturn, TypeVar

import msgspec

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
"""Errors that readers of other packages (numpy, torch, Pillow, zipfile) raise on damaged bytes. The
type shows where the reader failed rather than what is wrong with the file, so each of them means
"damaged"."""


def first_line(error: BaseException) -> str:
    """Return the first line of an error's text, at most 200 characters; its type without one.

    Parameters
    ----------
    error : BaseException
        Error.

    Returns
    -------
    str
        Text of one line.
    """
    return (str(error).strip() or type(error).__name__).split("\n")[0][:200]


def write_whole(path: Path, content: bytes) -> None:
    """Write a file under a temporary name, force it to the disk, and rename it.

    Temporary files of the same name that killed processes left behind are removed.

    Parameters
    ----------
    path : Path
        File to write.
    content : bytes
        Its content.

    Raises
    ------
    OSError
        If a step fails; the earlier file, if there was one, is unchanged and no partial file is
        left.
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
    """Return nested data with every number that JSON cannot hold (NaN, infinity) as None.

    Parameters
    ----------
    value : object
        Nested dicts, lists and tuples of plain values.

    Returns
    -------
    object
        Copy in which every number that JSON cannot hold is None, tuples are lists and keys are
        text.
    """
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {str(key): plain(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(entry) for entry in value]
    return value


def json_bytes(record: dict[str, Any]) -> bytes:
    """Serialise a record readably, the same bytes for the same record.

    Parameters
    ----------
    record : dict
        Nested plain values.

    Returns
    -------
    bytes
        UTF-8 text with indentation.
    """
    return (json.dumps(plain(record), indent=1, allow_nan=False) + "\n").encode()


def write_json(path: Path, record: dict[str, Any]) -> None:
    """Write a record as JSON, complete or not at all.

    Parameters
    ----------
    path : Path
        File to write.
    record : dict
        Nested plain values.

    Raises
    ------
    OSError
        If the file cannot be written.
    """
    write_whole(path, json_bytes(record))


Kind = TypeVar("Kind")


Count = Annotated[int, msgspec.Meta(ge=0)]
"""A whole number of at least 0."""


Positive = Annotated[int, msgspec.Meta(ge=1)]
"""A whole number of at least 1."""


Size = Annotated[float, msgspec.Meta(ge=0)]
"""A number of at least 0."""


LARGEST = 64 * 2**20
"""Size in bytes of the largest record that is read; a run's own are thousands of times smaller. A
larger value lets a damaged file take more memory before it is refused. Chosen by hand."""


# msgspec's messages: the text, and the path of the entry after " - at ".
_MESSAGE = re.compile(r"(?P<said>.*?)(?: - at (?:`key` in )?`\$\.?(?P<path>[^`]*)`)?", re.DOTALL)

# The text of a message about a type: what was expected, and what was found.
_EXPECTED = re.compile(r"Expected (?P<want>.*?)(?:, got (?P<got>.*))?", re.DOTALL)


def parse_json(content: bytes | str, what: str) -> Any:
    """Parse JSON strictly.

    Parameters
    ----------
    content : bytes or str
        JSON text; UTF-8 where it is bytes.
    what : str
        Beginning of messages: ``run: DIR/run.json``.

    Returns
    -------
    object
        Nested plain values.

    Raises
    ------
    ValueError
        If it is not JSON, is nested too deeply, has a key twice, or a number that is not finite in
        float64, or text that is not Unicode.
    """
    try:
        text = content if isinstance(content, str) else content.decode("utf-8")
        value = json.loads(
            text,
            object_pairs_hook=_object,
            parse_constant=_not_finite,
            parse_float=_real,
            parse_int=_whole,
        )
        if "\\u" in text:  # an escaped half of a surrogate pair is JSON, but no text
            json.dumps(value, ensure_ascii=False).encode("utf-8")
    except RecursionError as error:
        raise ValueError(f"{what}: is damaged (nested too deeply)") from error
    except ValueError as error:
        raise ValueError(f"{what}: is damaged ({error})") from error
    return value


def read_json(path: Path, what: str) -> Any:
    """Read a JSON file of at most `LARGEST` bytes.

    Parameters
    ----------
    path : Path
        File.
    what : str
        Beginning of messages: ``run: DIR/run.json``.

    Returns
    -------
    object
        Nested plain values.

    Raises
    ------
    ValueError
        If the file is larger, or is not strict JSON.
    OSError
        If it cannot be read.
    """
    if path.stat().st_size > LARGEST:
        raise ValueError(f"{what}: is too large for a record")
    return parse_json(path.read_bytes(), what)


def read_as(kind: type[Kind], value: Any, what: str, at: str = "") -> Kind:
    """Convert plain values to a type, by the type's own hints.

    Parameters
    ----------
    kind : type
        Dataclass or msgspec Struct. A null where a dataclass wants a float becomes NaN, which JSON
        cannot hold; a field that a record of an older version lacks becomes None where it may be
        None.
    value : object
        Nested plain values, as readers of JSON, TOML or torch return them.
    what : str
        Beginning of messages: ``run: DIR/run.json``.
    at : str
        Place of the value in what was read: ``layers[3]``.

    Returns
    -------
    object
        Instance of `kind`.

    Raises
    ------
    ValueError
        If an entry is missing or of another type: ``WHAT: `layers[3].gap`: got str, want float``.
    """
    try:
        return msgspec.convert(_with_nan(kind, value), kind, strict=True)
    except (msgspec.ValidationError, RecursionError, OverflowError) as error:
        raise ValueError(f"{what}: {_said(error, at)}") from error


def _said(error: Exception, at: str) -> str:
    """Turn msgspec's words into ours."""
    parts = _MESSAGE.fullmatch(str(error) or type(error).__name__)
    said, path = (str(error), "") if parts is None else (parts["said"], parts["path"] or "")
    place = ".".join(part for part in (at, path) if part).replace(".[", "[")
    lacking = re.fullmatch(r"Object missing required field `(.*)`", said)
    expected = _EXPECTED.fullmatch(said)
    if lacking is not None:
        said = f"lacks `{lacking[1]}`"
    elif expected is not None:
        got = f"got {expected['got']}, " if expected["got"] else ""
        said = (got + f"want {expected['want']}").replace("`", "")
    return f"`{place}`: {said}" if place else said


def _with_nan(kind: Any, value: Any) -> Any:
    """Put NaN where a null stands for it, and None where an older record lacks what may be None."""
    if not is_dataclass(kind) or not isinstance(value, Mapping):
        return value
    hints = typing.get_type_hints(kind)
    filled = dict(value)
    for entry in fields(kind):
        hint = hints[entry.name]
        required = entry.default is MISSING and entry.default_factory is MISSING
        if entry.name not in filled:
            if required and types.NoneType in typing.get_args(hint):
                filled[entry.name] = None
        elif hint is float and filled[entry.name] is None:
            filled[entry.name] = math.nan
        elif hint == dict[str, float] and isinstance(filled[entry.name], Mapping):
            numbers = filled[entry.name].items()
            filled[entry.name] = {k: math.nan if v is None else v for k, v in numbers}
    return filled


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"it has {twice!r:.80} twice")
    return found


def _not_finite(text: str) -> NoReturn:
    raise ValueError(f"{text} is not a number that JSON has")


def _real(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"the number {text:.40} is beyond float64")
    return number


def _whole(text: str) -> int:
    if len(text) > 300:  # float64 ends at 309 digits, and converting text to int at 4300
        raise ValueError(f"the number {text:.40}... is too long")
    return int(text)
