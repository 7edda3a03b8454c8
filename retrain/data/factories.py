"""Import and call what `package.module:factory` names; its errors become one line."""

from __future__ import annotations

import importlib
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

from retrain.files import first_line


def import_factory(spec: str, argument: str) -> Callable[[], Any]:
    """Import the callable of ``package.module:factory``; the working directory is searched too.

    Parameters
    ----------
    spec : str
        ``package.module:factory``.
    argument : str
        Name of the argument in error messages.

    Returns
    -------
    callable
        The factory.

    Raises
    ------
    ValueError
        If the module does not exist or cannot be imported, or has no callable of that name.
    """
    module_name, _, attribute = spec.partition(":")
    if not module_name or not attribute:
        raise ValueError(f"{argument}: got {spec!r}, want package.module:factory")
    here = str(Path.cwd())
    added = here not in sys.path
    if added:
        sys.path.insert(0, here)
    try:
        with ToldInOneLine(argument, f"{spec!r}: importing {module_name}"):
            target: Any = importlib.import_module(module_name)
    finally:
        if added:
            sys.path.remove(here)
    for part in attribute.split("."):
        if not hasattr(target, part):
            raise ValueError(f"{argument}: module {module_name!r} has no {attribute!r}")
        target = getattr(target, part)
    if not callable(target):
        raise ValueError(f"{argument}: {spec!r} is a {type(target).__name__}, want a callable")
    return cast("Callable[[], Any]", target)


def call_factory(spec: str, argument: str) -> Any:
    """Call what ``package.module:factory`` names, without arguments.

    Parameters
    ----------
    spec : str
        ``package.module:factory``.
    argument : str
        Name of the argument in error messages.

    Returns
    -------
    object
        Return value of the factory.

    Raises
    ------
    ValueError
        If the factory cannot be imported, or the call fails; the message has the place of the
        error.
    """
    factory = import_factory(spec, argument)
    with ToldInOneLine(argument, f"calling {spec}()"):
        return factory()


class ToldInOneLine:
    """Turn any error of a user's module or factory, SystemExit too, into a one-line ValueError.

    KeyboardInterrupt (Ctrl-C) and errors raised by this package pass unchanged.

    Parameters
    ----------
    argument : str
        Name of the argument in the message.
    what : str
        Description of the step that failed: ``"calling package.module:factory()"``.
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
            others = (Path(__file__).parents[1], Path(importlib.__file__).parents[1])
            installed = "site-packages" in file.parts or any(map(file.is_relative_to, others))
            if file.suffix == ".py" and not installed:  # a line of the user's code
                where = f", {file.name} line {line}"
        text = " ".join(first_line(error).split())
        raise ValueError(
            f"{self.argument}: {self.what} failed: {type(error).__name__}: {text}{where}"
        ) from error
