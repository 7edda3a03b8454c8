"""The command line, one command a file.

Imports what a command needs when it is called, so that help answers at once. Exit codes: 0 done, 1
done but something is not certified or a bound is a defect, 2 bad usage or input; 130 after Ctrl-C.
"""

from __future__ import annotations

import argparse
import errno
import logging
import os
import sys
import warnings
from collections.abc import Sequence
from concurrent.futures import BrokenExecutor
from typing import NoReturn

from retrain.cli import demo, layers, lobs, train, trim, verify
from retrain.cli.shared import BAD_INPUT, DONE, INTERRUPTED
from retrain.cli.streams import make_streams_safe

COMMANDS = (layers, trim, lobs, train, verify, demo)


class _Parser(argparse.ArgumentParser):
    """A parser whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(BAD_INPUT, f"{self.prog}: error: {message} (see {self.prog} --help)\n")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return its exit code."""
    make_streams_safe()
    parser = build_parser()
    options = parser.parse_args(arguments)
    logging.basicConfig(format="%(message)s", level=logging.ERROR)
    if not sys.warnoptions:  # python -W ... shows them
        warnings.simplefilter("ignore")
    if 0 < (getattr(options, "threads", None) or 0) <= 4096:  # others are refused later
        # Before numpy and torch start their pools.
        for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
            os.environ[name] = str(options.threads)
    try:
        return options.run(options)
    except KeyboardInterrupt:
        print("retrain: interrupted; the same command resumes", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        # The reader of our output went away; what was to be written to disk is written.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return DONE
    except (ValueError, OSError, FloatingPointError, MemoryError, BrokenExecutor) as error:
        print(f"retrain: error: {one_line(error)}", file=sys.stderr)
        return BAD_INPUT


def one_line(error: BaseException) -> str:
    """Say an error in one line; of an OSError the system's words and the file."""
    if isinstance(error, OSError) and error.strerror:
        where = f": {error.filename}" if error.filename else ""
        full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        after = "; finished layers are kept, and the same command resumes" if full else ""
        return f"{error.strerror}{where}{after}"
    if isinstance(error, MemoryError):
        return f"out of memory ({error}); use a smaller --memory, --jobs or --limit"
    if isinstance(error, BrokenExecutor):
        return "a worker ended before its time (out of memory?); the same command resumes"
    return " ".join(str(error).split())


def build_parser() -> argparse.ArgumentParser:
    """Build the parser of all commands."""
    parser = _Parser(
        prog="retrain",
        description="Convex and second-order retraining of trained networks, with certificates.",
    )
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for command in COMMANDS:
        command.add_command(commands)
    return parser
