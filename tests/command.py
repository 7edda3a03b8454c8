"""The command line in processes of its own, forked off one that has imported everything.

A process of its own can be killed, has its own standard streams and a real exit code; forking
spares each of them the seconds that importing torch takes.
"""

import atexit
import multiprocessing
import multiprocessing.forkserver
import os
import signal
import sys
import tempfile
import threading
import traceback
from dataclasses import dataclass
from pathlib import Path

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")  # a process that is forked should have no threads
_FORKS = multiprocessing.get_context("forkserver")
_FORKS.set_forkserver_preload(
    [
        "retrain.api.net_trim",
        "retrain.report.terminal",
        "retrain.demo",
        "retrain.runs.training",
        "warm",
    ]
)


def _start_server() -> None:
    """Start the process that is forked, unless it runs; this folder is on its path, for `warm`."""
    before = os.environ.get("PYTHONPATH")
    folders = [str(Path(__file__).parent), *([before] if before else [])]
    os.environ["PYTHONPATH"] = os.pathsep.join(folders)
    try:
        multiprocessing.forkserver.ensure_running()
    finally:
        del os.environ["PYTHONPATH"]
        if before:
            os.environ["PYTHONPATH"] = before


@dataclass(frozen=True)
class Answer:
    """What a command left."""

    code: int
    out: str
    err: str

    def error(self) -> str:
        """The one line of a refused command, the last; on a busy machine phases come before it."""
        assert self.code == 2, self
        assert self.out == "", self
        lines = self.err.splitlines()
        assert [line.startswith("retrain") for line in lines] == [False] * len(lines[1:]) + [True]
        return lines[-1]


class Command:
    """A running command."""

    def __init__(self, folder: Path, arguments: list[str], prepare) -> None:
        self._kept = tempfile.TemporaryDirectory()
        self.files = [Path(self._kept.name) / name for name in ("out", "err")]
        _start_server()
        self.process = _FORKS.Process(
            target=_child, args=(str(folder), arguments, self.files, prepare)
        )
        self.process.start()

    def wait(self, seconds: float = 60) -> Answer:
        """Wait for its end."""
        self.process.join(seconds)
        if self.process.exitcode is None:
            self.kill()
            pytest.fail(f"no end after {seconds} s: {self.read()}")
        return self.read()

    def read(self) -> Answer:
        """What there is by now."""
        out, err = (file.read_text() if file.exists() else "" for file in self.files)
        code = self.process.exitcode
        return Answer(-1 if code is None else code, out, err)

    @property
    def running(self) -> bool:
        """Whether it has not ended."""
        return self.process.exitcode is None

    def kill(self) -> None:
        """SIGKILL, which a process cannot answer; only the command, not its workers."""
        self.process.kill()
        self.process.join()

    def sweep(self) -> None:
        """SIGKILL to what is left of the group: workers that wait for a parent that is no more.

        joblib's resource tracker is spared: it removes what they had in shared memory, then ends.
        """
        for pid in self.group():
            try:
                if b"resource_tracker" not in Path(f"/proc/{pid}/cmdline").read_bytes():
                    os.kill(pid, signal.SIGKILL)
            except (FileNotFoundError, ProcessLookupError):
                continue

    def interrupt(self) -> None:
        """SIGINT to the command and its workers, as Ctrl-C on a terminal."""
        os.killpg(self.process.pid, signal.SIGINT)

    def group(self) -> list[int]:
        """Processes of the command's group that are alive: itself, its workers."""
        alive = []
        for entry in Path("/proc").iterdir():
            if not entry.name.isdigit():
                continue
            try:
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
            except (FileNotFoundError, ProcessLookupError):
                continue
            if int(fields[2]) == self.process.pid and fields[0] != "Z":
                alive.append(int(entry.name))
        return alive


def start(folder: Path, *arguments: object, prepare=None) -> Command:
    """Start ``retrain ARGUMENTS`` in a folder; `prepare()` is called first, in the process."""
    return Command(folder, [str(part) for part in arguments], prepare)


def command(folder: Path, *arguments: object, prepare=None, seconds: float = 60) -> Answer:
    """Run ``retrain ARGUMENTS`` in a folder to its end."""
    return start(folder, *arguments, prepare=prepare).wait(seconds)


def _child(folder: str, arguments: list[str], files: list[Path], prepare) -> None:
    os.setsid()
    # A suite that runs in the background of a shell has been told to ignore it.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.chdir(folder)
    for number, file in enumerate(files, start=1):
        handle = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(handle, number)
        os.close(handle)
    # Line by line, as the interpreter has it for a file only on stderr.
    sys.stdout = os.fdopen(1, "w", closefd=False)
    sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)
    from retrain.cli import main

    if prepare is not None:
        prepare()
    try:
        code = main(arguments)
    except SystemExit as end:
        code = end.code
    except BaseException as error:  # noqa: BLE001 - an interpreter's last resort
        traceback.print_exception(error)
        code = 1
    # The end of an interpreter, in its order; multiprocessing's own is another one.
    threading._shutdown()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    os._exit(code)
