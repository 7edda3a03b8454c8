"""Run a room's tests on a copy of the code, in a process forked off one that has imported torch.

What takes seconds to import and is not under test (numpy, scipy, numba, torch, cvxpy, hypothesis)
is imported once, in the parent. A child imports the packages under test from a copy of the
repository, so that the copy can be changed between two children.

Compiled kernels are cached. Numba drops a file's kernels when the file changes, but not those of
other files that call them, which have the old code inlined; `stale` finds both.
"""

from __future__ import annotations

import ast
import contextlib
import importlib
import json
import os
import resource
import shutil
import signal
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).parents[2]
COPIED = ("solvers", "retrain", "tests", "bench", "pyproject.toml", "constraints.txt", "README.md")
PRELOADED = (
    "numpy",
    "scipy.linalg",
    "scipy.optimize",
    "scipy.sparse",
    "scipy.stats",
    "array_api_compat.numpy",
    "array_api_compat.torch",
    "numba",
    "torch",
    "safetensors.torch",
    "cvxpy",
    "osqp",
    "sklearn.datasets",
    "joblib",
    "hypothesis.strategies",
    "pytest",
)
# Beyond these many seconds of its process, plus so many times its own on the untouched code, a
# test hangs. Generous, because a changed kernel is compiled within the first test that calls it.
LIMIT, LIMIT_FACTOR = 20.0, 10.0
WAITING = 10.0  # times that of wall clock, for a test that waits, on a machine that may be busy
# Numba knows a changed file by its time and size. The copies of files with kernels end with so many
# empty lines, so that a change outside of the kernels can leave both as they were.
PADDING = 400
MEMORY = 12 * 2**30  # bytes of address space; a mutant that asks for more is refused


@dataclass(frozen=True)
class Verdict:
    """What the tests said.

    Attributes
    ----------
    killed_by : str or None
        The test that failed, or how the process ended; None where all tests passed.
    seconds : float
        Wall clock.
    durations : dict
        Seconds of processor by test.
    """

    killed_by: str | None
    seconds: float
    durations: dict[str, float] = field(default_factory=dict)


def preload() -> None:
    """Import what the tests need and the campaign does not change."""
    os.environ["OMP_NUM_THREADS"] = "1"
    os.environ["PYTHONDONTWRITEBYTECODE"] = "1"
    for name in PRELOADED:
        importlib.import_module(name)
    loaded = [name for name in sys.modules if name.split(".")[0] in ("solvers", "retrain")]
    if loaded:
        raise RuntimeError(f"imported before its copy could be: {', '.join(loaded[:3])}")


def copy_tree(tree: Path) -> None:
    """Copy what the tests need of the repository, as it is now."""
    shutil.rmtree(tree, ignore_errors=True)
    tree.mkdir(parents=True)
    skipped = shutil.ignore_patterns("__pycache__")
    for name in COPIED:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, tree / name, ignore=skipped)
        else:
            shutil.copy2(source, tree / name)
    for path in (tree / "solvers").rglob("*.py"):
        stamp = path.stat()
        with path.open("a", encoding="utf-8") as file:
            file.write("\n" * PADDING)
        os.utime(path, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
    # Some tests read data that lies beside the repository, where there is any.
    shared = tree.parent / "shared"
    if (ROOT.parent / "shared").is_dir() and not shared.is_symlink():
        shared.symlink_to(ROOT.parent / "shared")


@contextlib.contextmanager
def changed(file: Path, text: str, *, unnoticed: bool = False) -> Iterator[None]:
    """Replace a file's text for as long as the context lasts; its time stamp comes back too.

    `unnoticed` leaves time and size as they were, so that Numba takes the file's kernels from its
    cache; for a change that does not reach them.
    """
    before, stamp = file.read_bytes(), file.stat()
    content = text.encode()
    if unnoticed:
        content = content.rstrip(b"\n") + b"\n"
        unnoticed = len(content) <= len(before)  # a file without kernels has no padding
        content = content.ljust(len(before), b"\n")
    file.write_bytes(content)
    if unnoticed:
        os.utime(file, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
    else:
        os.utime(file)
    try:
        yield
    finally:
        file.write_bytes(before)
        os.utime(file, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))


def reaches_kernels(source: str, line: int) -> bool:
    """Whether a change of a line can reach a compiled kernel: all but what is in other functions.

    Kernels take functions and constants of the module; no plain function is among them, since a
    kernel cannot call one.
    """
    module = ast.parse(source)
    for node in module.body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            first = min([node.lineno, *(d.lineno for d in node.decorator_list)])
            if first <= line <= (node.end_lineno or 0):
                return any("njit" in ast.unparse(decorator) for decorator in node.decorator_list)
    return True


@contextlib.contextmanager
def kernels(clean: Path, without: Iterable[str]) -> Iterator[Path]:
    """Copy the kernels' cache, without those of some modules (``greedy``), for one child."""
    copy = clean.with_name(f"{clean.name}-{os.getpid()}-{time.monotonic_ns()}")
    dropped = tuple(f"{name}." for name in without)

    def skip(_folder: str, names: list[str]) -> list[str]:
        return [name for name in names if name.startswith(dropped)]

    if clean.exists():
        shutil.copytree(clean, copy, ignore=skip if dropped else None)
    try:
        yield copy
    finally:
        shutil.rmtree(copy, ignore_errors=True)


def stale(tree: Path, file: str) -> set[str]:
    """Modules whose compiled kernels a change of a file can reach, by the last part of their names.

    The file itself, and whoever's kernels use a function or a constant that comes from it.
    """
    uses = {path: _kernel_imports(tree, path) for path in _sources(tree)}
    reached = {file}
    while True:
        more = {path for path, used in uses.items() if used & reached} - reached
        if not more:
            return {Path(path).stem for path in reached}
        reached |= more


def _sources(tree: Path) -> list[str]:
    return [path.relative_to(tree).as_posix() for path in sorted((tree / "solvers").rglob("*.py"))]


def _kernel_imports(tree: Path, path: str) -> set[str]:
    """Files from which a module's jitted functions take names."""
    module = ast.parse((tree / path).read_text(encoding="utf-8"))
    jitted = [
        node
        for node in ast.walk(module)
        if isinstance(node, ast.FunctionDef)
        and any("njit" in ast.unparse(decorator) for decorator in node.decorator_list)
    ]
    if not jitted:
        return set()
    # Names that the module itself defines can carry imported ones, so all of them count.
    return {
        f"{node.module.replace('.', '/')}.py"
        for node in ast.walk(module)
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("solvers")
    }


def run_tests(
    tree: Path,
    cache: Path,
    files: Sequence[str],
    *,
    durations: dict[str, float] | None = None,
    first: Sequence[str] = (),
    skipped: Sequence[str] = (),
    wall: float = 900.0,
) -> Verdict:
    """Run test files in a child.

    Parameters
    ----------
    tree : path
        The copy of the repository.
    cache : path
        Folder of compiled kernels.
    files : sequence of str
        Test files, ``test_run.py``, in the order in which they are to run.
    durations : dict, optional
        Seconds by test on the untouched code. Without them every test runs, whatever fails; with
        them the first failure ends the child, and so does a test far beyond its seconds.
    first : sequence of str
        Tests that run before all others.
    skipped : sequence of str
        Tests that do not run.
    wall : float
        Seconds after which the child is killed.
    """
    started = time.perf_counter()
    report = cache.with_name(f"{cache.name}.report")
    report.unlink(missing_ok=True)
    pid = os.fork()
    if pid == 0:
        _child(tree, cache, files, durations, first, skipped, report)
    status = _wait(pid, started + wall)
    seconds = time.perf_counter() - started
    lines = report.read_text().splitlines() if report.exists() else []
    report.unlink(missing_ok=True)
    said = [json.loads(line) for line in lines]
    took = {entry["test"]: entry["seconds"] for entry in said if "seconds" in entry}
    failed = [entry["failed"] for entry in said if "failed" in entry]
    if failed:
        return Verdict(failed[0], seconds, took)
    if status is None:
        return Verdict("no end", seconds, took)
    if os.WIFSIGNALED(status):
        name = signal.Signals(os.WTERMSIG(status)).name
        begun = [entry["test"] for entry in said if "begun" in entry]
        return Verdict(f"{name} in {begun[-1] if begun else 'import'}", seconds, took)
    code = os.waitstatus_to_exitcode(status)
    return Verdict(None if code == 0 else f"pytest ended with {code}", seconds, took)


def _wait(pid: int, until: float) -> int | None:
    """Wait for a child and its group; None if it had to be killed for lateness."""
    status = None
    while status is None and time.perf_counter() < until:
        done, code = os.waitpid(pid, os.WNOHANG)
        if done:
            status = code
        else:
            time.sleep(0.02)
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, signal.SIGKILL)  # and what it has started
    if status is None:
        os.waitpid(pid, 0)
    return status


def _child(
    tree: Path,
    cache: Path,
    files: Sequence[str],
    durations: dict[str, float] | None,
    first: Sequence[str],
    skipped: Sequence[str],
    report: Path,
) -> None:
    """Become a pytest of the copy; does not return."""
    os.setsid()
    null = os.open(os.devnull, os.O_RDWR)
    for handle in (0, 1, 2):
        os.dup2(null, handle)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    code = 70
    try:
        os.chdir(tree)
        here = {str(ROOT), str(ROOT / "tests"), ""}
        sys.path[:] = [str(tree), *(entry for entry in sys.path if entry not in here)]
        for name in [name for name in sys.modules if name.split(".")[0] == "bench"]:
            del sys.modules[name]
        from numba.core import config

        config.CACHE_DIR = str(cache)
        os.environ["NUMBA_CACHE_DIR"] = str(cache)
        os.environ["PYTHONPATH"] = str(tree)
        import pytest
        from hypothesis import settings

        settings.register_profile(
            "campaign", derandomize=True, database=None, deadline=None, print_blob=False
        )
        settings.load_profile("campaign")
        watch = Watch(report, durations, first, skipped)
        options = ["-q", "-p", "no:cacheprovider", "-p", "no:xdist", "--tb=no"]
        options += [] if durations is None else ["-x"]
        code = int(pytest.main([*options, *(f"tests/{name}" for name in files)], plugins=[watch]))
    finally:
        os._exit(code)


class Watch:
    """A pytest plugin: orders the tests, writes down how each went, ends one that hangs."""

    def __init__(
        self,
        report: Path,
        durations: dict[str, float] | None,
        first: Sequence[str],
        skipped: Sequence[str],
    ) -> None:
        self.handle = os.open(report, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        self.durations = durations
        self.first, self.skipped = {name: i for i, name in enumerate(first)}, set(skipped)
        self.started = 0.0

    def note(self, **entry: object) -> None:
        """Write a line at once: the process may end at any time."""
        os.write(self.handle, (json.dumps(entry) + "\n").encode())

    def pytest_collection_modifyitems(self, items: list) -> None:
        """Put the likeliest killers first, then file by file, the fastest test first."""
        items[:] = [item for item in items if item.nodeid not in self.skipped]
        took = self.durations
        if took is None:
            return
        files = {item.nodeid.split("::")[0]: 0 for item in items}
        order = {name: place for place, name in enumerate(files)}

        def key(item: object) -> tuple[int, int, float]:
            name = item.nodeid  # type: ignore[attr-defined]
            if name in self.first:
                return (-1, self.first[name], 0.0)
            return (order[name.split("::")[0]], 0, took.get(name, 0.0))

        items.sort(key=key)

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        """Start the clock of a test."""
        self.started = time.process_time()
        if self.durations is not None:
            self.note(test=nodeid, begun=True)
            limit = LIMIT + LIMIT_FACTOR * self.durations.get(nodeid, 0.0)
            # Not caught by Python: a kernel that loops for ever would not see it.
            signal.signal(signal.SIGPROF, signal.SIG_DFL)
            signal.setitimer(signal.ITIMER_PROF, limit)
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
            signal.setitimer(signal.ITIMER_REAL, WAITING * limit)

    def pytest_runtest_logfinish(self, nodeid: str) -> None:
        """Stop the clock of a test."""
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.setitimer(signal.ITIMER_REAL, 0)
        if self.durations is None:
            self.note(test=nodeid, seconds=round(time.process_time() - self.started, 3))

    def pytest_runtest_logreport(self, report: object) -> None:
        """Write down a failure."""
        if report.failed:  # type: ignore[attr-defined]
            self.note(failed=report.nodeid)  # type: ignore[attr-defined]

    def pytest_collectreport(self, report: object) -> None:
        """Write down a test file that cannot be imported."""
        if report.failed:  # type: ignore[attr-defined]
            self.note(failed=f"collection of {report.nodeid}")  # type: ignore[attr-defined]
