"""Options from tables of strangers: a dataclass made of one, with every misuse named."""

from __future__ import annotations

import inspect
import math
import types
import typing
from collections.abc import Callable, Mapping
from dataclasses import MISSING, fields
from difflib import get_close_matches
from typing import Any, Literal, TypeVar

import msgspec

Options = TypeVar("Options")


def make_options(kind: type[Options], table: Mapping[str, Any], where: str) -> Options:
    """Make a dataclass of a table's entries.

    Parameters
    ----------
    kind : dataclass
        Its fields are the keys; those without a default must be there. A field's type may be made
        of int, float (a whole number will do), str, bool, None, Literal, tuple, dict, and unions
        of them; a list of the table becomes a tuple.
    table : mapping
        As read from TOML or JSON.
    where : str
        What to call the table in messages: ``[training]``.

    Raises
    ------
    ValueError
        If a key is unknown or missing, or a value of another type or refused by the dataclass; the
        message names table and key.
    """
    hints = typing.get_type_hints(kind)
    known = {entry.name: entry for entry in fields(kind) if entry.init}  # type: ignore[arg-type]
    check_names(table, list(known), where)
    for name, entry in known.items():
        if name not in table and entry.default is MISSING and entry.default_factory is MISSING:
            raise ValueError(f"recipe: {where} lacks {name}")
    values = {key: convert(value, hints[key], f"{where} {key}") for key, value in table.items()}
    try:
        return kind(**values)
    except (ValueError, TypeError) as error:
        raise ValueError(f"recipe: {where} {error}") from error


def check_arguments(
    function: Callable[..., Any], table: Mapping[str, Any], where: str, *, given: int = 0
) -> None:
    """Check that a table's entries are keyword arguments of a function, its first `given` aside.

    Raises
    ------
    ValueError
        If one is unknown, or one without a default is missing.
    """
    parameters = list(inspect.signature(function).parameters.values())[given:]
    named = [p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    if not any(p.kind is p.VAR_KEYWORD for p in parameters):
        check_names(table, [p.name for p in named], where)
    for parameter in named:
        if parameter.default is parameter.empty and parameter.name not in table:
            raise ValueError(f"recipe: {where} lacks {parameter.name}")


def check_names(table: Mapping[str, Any], known: list[str], where: str) -> None:
    """Refuse a key that is not known, with the one that was probably meant.

    Raises
    ------
    ValueError
    """
    for key in table:
        if key not in known:
            near = get_close_matches(key, known, n=1)
            meant = f"; did you mean {near[0]}?" if near else ""
            there = f"; there are {', '.join(known)}" if known else "; there are no options"
            raise ValueError(f"recipe: {where} has no option {key!r}{meant or there}")


def convert(value: Any, hint: Any, where: str) -> Any:
    """Return a value as what a type hint wants: lists become tuples, whole numbers floats.

    Raises
    ------
    ValueError
        If it is of another type.
    """
    try:
        if _has_nan(value):
            raise ValueError("NaN is not a number to compute with")
        return msgspec.convert(value, hint, strict=True)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"recipe: {where}: got {_shown(value)}, want {_say(hint)}") from error


def _has_nan(value: Any) -> bool:
    if isinstance(value, Mapping):
        return any(map(_has_nan, value.values()))
    if isinstance(value, list | tuple):
        return any(map(_has_nan, value))
    return isinstance(value, float) and math.isnan(value)


def _shown(value: Any) -> str:
    """Show a value of a file, which may be nested as deep as it likes."""
    try:
        return f"{value!r:.80}"
    except RecursionError:
        return f"a {type(value).__name__} that is nested too deeply"


def _say(hint: Any) -> str:
    """Say a type in words."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    words = {int: "a whole number", float: "a number", str: "text", bool: "true or false"}
    if hint in words:
        return words[hint]
    if origin in (typing.Union, types.UnionType):
        return " or ".join(_say(entry) for entry in arguments if entry is not types.NoneType)
    if origin is Literal:
        return " or ".join(repr(entry) for entry in arguments)
    if origin is tuple:
        if arguments[-1] is Ellipsis:
            return f"a list, each entry {_say(arguments[0])}"
        return f"a list of {len(arguments)}: {', '.join(map(_say, arguments))}"
    return "a table" if origin is dict or hint is dict else str(getattr(hint, "__name__", hint))
