"""End this process at the n-th thing it does to a folder, or at its n-th import.

No part of the product: `install` replaces what Python programs write with (`open`, `os.open`,
`os.fsync`, `os.replace`, ...) in the process that it is called in. `sitecustomize.py`, which the
campaign writes, calls it in a fresh interpreter before anything is imported; a process that was
forked calls it itself.

Only what happens inside one folder counts. The events are numbered from 0, in the order in which
they happen; a file that is written has one event for each time that its buffer goes out.
"""

from __future__ import annotations

import atexit
import io
import json
import os
import signal
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

VARIABLE = "CAMPAIGN_KILL"


@dataclass(frozen=True)
class Plan:
    """Where to end.

    Attributes
    ----------
    folder : str
        The absolute folder whose events count.
    log : str
        A file outside of it that gets a line for each event: its kind, a tab, its path.
    event : int or None
        Number of the event at which to end; None for none.
    when : {"before", "torn", "after"}
        Before the event, after it, or, of a write, after half of it.
    imports : int or None
        Number of the import at which to end, from 0; None for none. With -1 the log gets their
        count when the process ends.
    group : bool
        Whether the whole process group ends, workers included.
    """

    folder: str
    log: str
    event: int | None = None
    when: str = "before"
    imports: int | None = None
    group: bool = False

    def environment(self) -> str:
        """The value of the environment variable that hands this to a fresh interpreter."""
        return json.dumps(asdict(self))


def install_from_environment() -> None:
    """Install the plan that the environment holds, in the process it was made for only."""
    text = os.environ.pop(VARIABLE, None)  # workers and other children are left alone
    if text is not None:
        install(Plan(**json.loads(text)))


def install(plan: Plan) -> None:
    """Watch this process, and end it where the plan says."""
    watch = _Watch(plan)
    if plan.imports is not None:
        sys.addaudithook(watch.audit)
        atexit.register(watch.count_imports)
    for name in ("fsync", "replace", "rename", "unlink", "remove", "mkdir", "rmdir", "open"):
        setattr(os, name, watch.around(name, getattr(os, name)))
    opened = io.open

    def opening(file: Any, mode: str = "r", *arguments: Any, **options: Any) -> Any:
        if not (set(mode) & set("wxa+") and watch.counts(file)):
            return opened(file, mode, *arguments, **options)
        return watch.opened(file, mode, *arguments, **options)

    io.open = opening
    import builtins

    builtins.open = opening


class _Watch:
    def __init__(self, plan: Plan) -> None:
        self.plan, self.number, self.imports = plan, 0, 0
        self.process = os.getpid()
        self.log = os.open(plan.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)

    def counts(self, path: Any) -> bool:
        """Whether a path, or what a descriptor stands for, is in the folder."""
        if os.getpid() != self.process:
            return False
        if isinstance(path, int):
            try:
                path = Path(f"/proc/self/fd/{path}").readlink()
            except OSError:
                return False
        try:
            place = str(Path(os.fsdecode(path)).absolute())
        except TypeError:
            return False
        return place == self.plan.folder or place.startswith(self.plan.folder + os.sep)

    def event(self, kind: str, path: Any, act: Callable[[], Any], half: Any = None) -> Any:
        """Do something that counts, unless this process ends before it or in its midst."""
        here = self.number == self.plan.event
        self.number += 1
        if isinstance(path, int):
            path = Path(f"/proc/self/fd/{path}").readlink()
        os.write(self.log, f"{kind}\t{Path(os.fsdecode(path)).absolute()}\n".encode())
        if here and self.plan.when == "before":
            self.end()
        if here and self.plan.when == "torn" and half is not None:
            half()
            self.end()
        try:
            return act()
        finally:
            if here:
                self.end()

    def end(self) -> None:
        """End as SIGKILL ends: nothing is flushed, nothing is undone."""
        if self.plan.group:
            os.killpg(os.getpgid(0), signal.SIGKILL)
        os.kill(os.getpid(), signal.SIGKILL)

    def around(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """Make a function of `os` count where it changes something in the folder."""

        def counting(path: Any, *arguments: Any, **options: Any) -> Any:
            changes = name != "open" or bool(
                (arguments[0] if arguments else options.get("flags", 0)) & os.O_CREAT
            )
            if not changes or options.get("dir_fd") is not None or not self.counts(path):
                return function(path, *arguments, **options)
            target = arguments[0] if name in ("replace", "rename") and arguments else path
            return self.event(name, target, lambda: function(path, *arguments, **options))

        return counting

    def opened(self, file: Any, mode: str, *arguments: Any, **options: Any) -> Any:
        """Open a file for writing whose every write counts."""
        plain = mode.replace("b", "").replace("t", "")
        raw = self.event("create", file, lambda: _Counted(self, file, plain))
        buffer: Any = io.BufferedRandom(raw) if "+" in mode else io.BufferedWriter(raw)
        if "b" in mode:
            return buffer
        names = ("buffering", "encoding", "errors", "newline")
        given = {**dict(zip(names, arguments, strict=False)), **options}
        text = {key: given[key] for key in names[1:] if key in given}
        return io.TextIOWrapper(buffer, **text)

    def count_imports(self) -> None:
        """Write down how many imports there were."""
        os.write(self.log, f"imports\t{self.imports}\n".encode())

    def audit(self, event: str, _arguments: Any) -> None:
        """Count imports."""
        if event == "import" and os.getpid() == self.process:
            if self.imports == self.plan.imports:
                self.end()
            self.imports += 1


class _Counted(io.FileIO):
    """A file whose writes count."""

    def __init__(self, watch: _Watch, file: Any, mode: str) -> None:
        super().__init__(file, mode)
        self.watch, self.path = watch, Path(file) if not isinstance(file, int) else file

    def write(self, data: Any) -> int:
        """Write, or end before, in the midst of, or after it."""
        whole = bytes(data)
        half = whole[: len(whole) // 2]
        act, torn = super().write, super().write
        return self.watch.event("write", self.path, lambda: act(whole), lambda: torn(half))
