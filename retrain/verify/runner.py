"""Run checks: cases in parallel, rows kept as they come, one `verify.json` and pictures at the end.

Each case has a generator of its own, seeded by (seed, statement, number of the case), so that
neither the number of jobs nor the choice of statements changes a digit.
"""

from __future__ import annotations

import hashlib
import json
import logging
import platform
import time
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from fnmatch import fnmatchcase
from importlib.metadata import version
from pathlib import Path
from typing import Any

import joblib
import msgspec
import numpy as np
from filelock import FileLock, Timeout
from threadpoolctl import threadpool_limits

from retrain.files import Count, parse_json, read_as, write_whole
from retrain.methods.amounts import check_parallel
from retrain.runs.directory import check_out
from retrain.runs.subject import apart_from_caller
from retrain.verify import (
    gates,
    gates_dynamics,
    gates_estimators,
    gates_prior,
    itp,
    l_obs,
    net_trim,
    net_trim_errata,
    net_trim_programs,
    net_trim_recovery,
    shrinknets,
)
from retrain.verify.statement import Level, Numbers, Result, Row, Statement, judge, row_to_json
from solvers.workers import workers

_log = logging.getLogger(__name__)

_PACKAGES = ("numpy", "scipy", "cvxpy", "joblib", "scikit-learn")
HEADINGS = ("statement", "verdict", "checked", "measured", "", "bound", "margin", "seconds")


def statements() -> list[Statement]:
    """List all statements, paper by paper."""
    modules = (
        net_trim_programs,
        net_trim,
        net_trim_recovery,
        net_trim_errata,
        l_obs,
        gates_prior,
        gates,
        gates_estimators,
        gates_dynamics,
        itp,
        shrinknets,
    )
    return [statement for module in modules for statement in module.STATEMENTS]


def select(names: Sequence[str], among: Sequence[Statement] | None = None) -> list[Statement]:
    """Choose statements by name, by paper (``net-trim``) or by pattern (``*/theorem-*``).

    Raises
    ------
    ValueError
        If a name matches none.
    """
    known = statements() if among is None else list(among)
    if not names:
        return known
    chosen = set()
    for name in names:
        matches = [
            statement.name
            for statement in known
            if fnmatchcase(statement.name, name) or statement.name.startswith(f"{name}/")
        ]
        if not matches:
            listed = ", ".join(statement.name for statement in known)
            raise ValueError(f"names: no statement is called {name!r}; there are {listed}")
        chosen.update(matches)
    return [statement for statement in known if statement.name in chosen]


@apart_from_caller()
def run(
    names: Sequence[str] = (),
    *,
    level: Level = "quick",
    out: str | Path | None = None,
    jobs: int = 1,
    seed: int = 0,
    among: Sequence[Statement] | None = None,
    on_result: Callable[[Result], None] | None = None,
) -> list[Result]:
    """Check statements.

    Parameters
    ----------
    names : sequence of str
        Statements, papers or patterns; all by default.
    level : {"quick", "full"}
        How many cases: for two cores, under 2 minutes or under 30.
    out : path, optional
        Directory for ``verify.json``, the pictures and, as they come, the rows of each case. The
        same call resumes from these rows; rows of another level, seed or version are done anew.
    jobs : int
        joblib workers, each with one linear algebra thread.
    seed : int
        Of everything that is drawn.
    among : sequence of Statement, optional
        To choose from, instead of `statements()`.
    on_result : function, optional
        Called with each result as soon as its last case is in.

    Returns
    -------
    list of Result
        In the order of `statements()`.

    Raises
    ------
    ValueError
        If an argument is malformed or another run is at work in `out`.
    """
    if level not in ("quick", "full"):
        raise ValueError(f"level: got {level!r}, want 'quick' or 'full'")
    check_parallel(jobs, None, seed)
    check_out(out)
    chosen = select(names, among)
    if out is None:
        return _run(chosen, level, None, jobs, seed, on_result)
    directory = Path(out)
    (directory / "rows").mkdir(parents=True, exist_ok=True)
    lock = FileLock(directory / ".lock")
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        raise ValueError(f"out: another run is at work in {directory}") from error
    try:
        return _run(chosen, level, directory, jobs, seed, on_result)
    finally:
        lock.release()


def table(results: Sequence[Result]) -> list[tuple[str, ...]]:
    """Make the terminal table's rows, one a statement, under `HEADINGS`."""
    return [
        (
            result.statement.name,
            result.verdict,
            f"{result.quantities} in {len(result.rows)}",
            f"{result.measured:.4g}",
            result.statement.relation,
            f"{result.bound:.4g}",
            f"{result.margin:+.1e}",
            f"{result.seconds:.1f}",
        )
        for result in results
    ]


def case_seed(seed: int, name: str, index: int) -> np.random.SeedSequence:
    """Seed of one case."""
    return np.random.SeedSequence(seed, spawn_key=(zlib.crc32(name.encode()), index))


def _run(
    chosen: Sequence[Statement],
    level: Level,
    directory: Path | None,
    jobs: int,
    seed: int,
    on_result: Callable[[Result], None] | None,
) -> list[Result]:
    fingerprint = _fingerprint(level, seed)
    cases = {statement.name: list(statement.cases(level)) for statement in chosen}
    rows: dict[str, dict[int, Row]] = {}
    for statement in chosen:
        kept = {} if directory is None else kept_answers(directory, statement.name, fingerprint)
        rows[statement.name] = {
            index: row
            for index, row in kept.items()
            if index < len(cases[statement.name]) and row.case == cases[statement.name][index]
        }
    tasks = [
        (statement, index, case)
        for statement in chosen
        for index, case in enumerate(cases[statement.name])
        if index not in rows[statement.name]
    ]
    results: dict[str, Result] = {}

    def finish(statement: Statement) -> None:
        have = rows[statement.name]
        if statement.name in results or len(have) < len(cases[statement.name]):
            return
        result = judge(statement, level, seed, [have[index] for index in range(len(have))])
        results[statement.name] = result
        if directory is not None and statement.picture is not None:
            path = directory / f"{statement.name.replace('/', '-')}.png"
            temporary = path.with_suffix(".part.png")
            statement.picture(result.rows, temporary)
            temporary.replace(path)
        if on_result is not None:
            on_result(result)

    for statement in chosen:
        finish(statement)
    for done, (statement, index, row) in enumerate(_work(tasks, jobs, seed), start=1):
        _log.info("checking: %s, %d of %d cases done", statement.name, done, len(tasks))
        rows[statement.name][index] = row
        if directory is not None:
            _keep(directory, statement.name, fingerprint, index, row)
        finish(statement)
    ordered = [results[statement.name] for statement in chosen]
    if directory is not None:
        write_whole(directory / "verify.json", document(ordered, level, seed).encode())
    return ordered


def _work(
    tasks: Iterable[tuple[Statement, int, dict[str, Any]]], jobs: int, seed: int
) -> Iterator[tuple[Statement, int, Row]]:
    """Do the tasks in any order, yielding each as it is done."""
    tasks = list(tasks)
    by_name = {statement.name: statement for statement, _, _ in tasks}
    pool = workers(jobs, return_as="generator_unordered", batch_size=1)
    calls = (joblib.delayed(_row)(statement, index, case, seed) for statement, index, case in tasks)
    for name, index, row in pool(calls):
        yield by_name[name], index, row


def _row(statement: Statement, index: int, case: dict[str, Any], seed: int) -> tuple[str, int, Row]:
    """Check one case."""
    started = time.perf_counter()
    with threadpool_limits(1, user_api="blas"):
        instance = statement.sample(
            case, np.random.default_rng(case_seed(seed, statement.name, index))
        )
        measured, bound = statement.measure(instance), statement.bound(instance)
        printed = None if statement.printed is None else statement.printed(instance)
        details = {} if statement.details is None else statement.details(instance)
    return (
        statement.name,
        index,
        Row(
            case=case,
            measured=_plain(measured),
            bound=_plain(bound),
            printed=None if printed is None else _plain(printed),
            details=details,
            seconds=time.perf_counter() - started,
        ),
    )


def _plain(numbers: Numbers) -> Numbers:
    return {name: float(value) for name, value in numbers.items()}


def _fingerprint(level: Level, seed: int) -> str:
    """Hash of what a row depends on: level, seed, versions, this code and what it checks."""
    root = Path(__file__).parents[2]
    digest = hashlib.sha256(repr((level, seed, versions())).encode())
    for folder in (
        "solvers",
        "retrain/verify",
        "retrain/methods",
        "retrain/bounds",
        "retrain/stream",
    ):
        for path in sorted((root / folder).rglob("*.py")):
            digest.update(path.read_bytes())
    return digest.hexdigest()


def versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that compute."""
    return {"python": platform.python_version(), **{name: version(name) for name in _PACKAGES}}


def _keep(directory: Path, name: str, fingerprint: str, index: int, row: Row) -> None:
    """Append a row; a line is whole or, after a crash, not JSON and not read."""
    record = {
        "fingerprint": fingerprint,
        "index": index,
        "seconds": row.seconds,
        **row_to_json(row),
    }
    with _rows_file(directory, name).open("a", encoding="utf-8") as file:
        file.write(json.dumps(record) + "\n")


def kept_answers(directory: Path, name: str, fingerprint: str) -> dict[int, Row]:
    """Rows of an earlier run of the same level, seed and code."""
    path = _rows_file(directory, name)
    rows: dict[int, Row] = {}
    if not path.exists():
        return rows
    whole = []
    for number, line in enumerate(path.read_bytes().splitlines(), start=1):
        what = f"out: {path}, line {number}"
        try:
            value = parse_json(line, what)
        except ValueError:
            continue  # the line that a crash cut short
        try:
            kept = read_as(_KeptRow, value, what)
            if kept.fingerprint != fingerprint:
                continue
            rows[kept.index] = Row(
                case=kept.case,
                measured=_numbers(kept.measured),
                bound=_numbers(kept.bound),
                printed=None if kept.printed is None else _numbers(kept.printed),
                details=kept.details,
                seconds=kept.seconds,
            )
        except ValueError as error:
            raise ValueError(f"{error}; delete the file, and its cases are done again") from error
        whole.append(line)
    write_whole(path, b"".join(line + b"\n" for line in whole))
    return rows


class _KeptRow(msgspec.Struct, frozen=True):
    """A line of the rows of an earlier run; an infinity is a word (`retrain.verify.statement`)."""

    fingerprint: str
    index: Count
    seconds: float
    case: dict[str, Any]
    measured: dict[str, float | str]
    bound: dict[str, float | str]
    printed: dict[str, float | str] | None
    details: dict[str, Any]


def _numbers(record: dict[str, float | str]) -> Numbers:
    return {name: float(value) for name, value in record.items()}


def _rows_file(directory: Path, name: str) -> Path:
    return directory / "rows" / f"{name.replace('/', '-')}.jsonl"


def document(results: Sequence[Result], level: Level, seed: int) -> str:
    """Serialise results as ``verify.json`` holds them."""
    record = {
        "level": level,
        "seed": seed,
        "versions": versions(),
        "violated": [r.statement.name for r in results if r.verdict == "violated"],
        "results": [result.to_json() for result in results],
    }
    return json.dumps(record, indent=1, allow_nan=False) + "\n"
