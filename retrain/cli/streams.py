"""Output that every terminal can show: what its encoding lacks is written in ASCII instead."""

from __future__ import annotations

import codecs
import io
import sys
import unicodedata

_NAME = "retrain-ascii"
_INSTEAD = {
    "→": "->",
    "…": "...",
    "×": "x",
    "–": "-",
    "—": "-",
    "≤": "<=",
    "≥": ">=",
    "ε": "epsilon",
    "λ": "lambda",
    "γ": "gamma",
    "•": "*",
    "━": "-",
    "╸": "-",
    "╺": "-",
}


def make_streams_safe() -> None:
    """Let standard output and error write any text, whatever their encoding (ASCII, cp1252, ...).

    In UTF-8 nothing changes but for halves of surrogate pairs (file names that are not UTF-8).
    """
    codecs.register_error(_NAME, _in_ascii)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors=_NAME)


def _in_ascii(error: UnicodeError) -> tuple[str, int]:
    """Say in ASCII what could not be encoded: an equivalent, the bare letter, or its number."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    found = ""
    for letter in error.object[error.start : error.end]:
        bare = unicodedata.normalize("NFKD", letter).encode("ascii", "ignore").decode()
        number = letter.encode("ascii", "backslashreplace").decode()
        found += _INSTEAD.get(letter) or bare or number
    return found, error.end
