"""Mutants: change the code in one place at a time and see whether its tests notice.

Mutants are made by cosmic-ray's operators, which change the text, so that jitted kernels are
mutated like everything else. They are drawn by seed: to each file in proportion to its lines of
code, within a file a place uniformly and then one of that place's changes. Not drawn are changes
that no test could see: of annotations (never evaluated), of the `*` in a signature, of a compiling
decorator, and text that does not compile.

Each mutant runs against the tests of its room until the first that fails. Rows go to a file as they
come, and the same command resumes; `--again` repeats those that survived, against the tests as they
are now. Survivors that change nothing anyone could see are listed, with the reason, in
`mutants-harmless.toml`; a line there names the file and the line before and after.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import json
import os
import random
import sys
import time
import tomllib
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

from bench.campaigns import _rooms
from bench.campaigns._rooms import ROOT

HARMLESS = Path(__file__).with_name("mutants-harmless.toml")

_SOLVERS = ("test_program.py", "test_admm.py", "test_newton.py", "test_solvers_random.py")
_OBS = (
    "test_obs_hessian.py",
    "test_obs_pattern.py",
    "test_obs_refit.py",
    "test_obs_one_shot.py",
    "test_obs_swaps.py",
    "test_obs_greedy.py",
    "test_obs_large.py",
    "test_obs_methods.py",
    "test_obs_robust.py",
)
_ADAPTERS = ("test_adapters_find.py", "test_adapters_gain.py", "test_adapters_stream.py")
ROOMS: dict[str, tuple[str, ...]] = {
    "solvers/program.py": (*_SOLVERS, "test_path.py", "test_count.py", "test_reference.py"),
    "solvers/penalties.py": ("test_penalties.py", *_SOLVERS, "test_qp.py", "test_reference.py"),
    "solvers/free_row.py": _SOLVERS,
    "solvers/obs/": _OBS,
    "retrain/bounds": (
        "test_bounds.py",
        "test_bounds_networks.py",
        "test_chain.py",
        "test_net_trim.py",
        "test_api.py",
    ),
    "retrain/adapters/network/gain.py": (*_ADAPTERS, "test_bounds.py", "test_bounds_networks.py"),
    "retrain/adapters/": (*_ADAPTERS, "test_adapters_description.py"),
    "retrain/runs/directory.py": ("test_run.py", "test_checkpoints.py", "test_training_run.py"),
}
"""By the beginning of a file's name, the tests of its room, in the order in which they run."""

MUTATED = (
    "solvers/program.py",
    "solvers/penalties.py",
    "solvers/free_row.py",
    "solvers/obs/*.py",
    "retrain/bounds*",
    "retrain/adapters/network/gain.py",
    "retrain/adapters/network/norms.py",
    "retrain/adapters/network/passage.py",
    "retrain/adapters/network/sites.py",
    "retrain/runs/directory.py",
)


@dataclass(frozen=True)
class Mutant:
    """One change of one file.

    Attributes
    ----------
    file, operator : str
        What is changed, and the operator's name.
    occurrence : int
        Which of the places that the operator could change, in the order of the text.
    line : int
        Line number, from 1.
    before, after : str
        That line (from where the two texts differ to where they agree again), stripped.
    source : str
        Hash of the unchanged file.
    """

    file: str
    operator: str
    occurrence: int
    line: int
    before: str
    after: str
    source: str

    @property
    def key(self) -> tuple[str, str, str, int]:
        """What identifies it as long as its file stays."""
        return self.file, self.source, self.operator, self.occurrence


def main(arguments: list[str]) -> int:
    """Run the campaign."""
    parser = argparse.ArgumentParser(prog="python -m bench campaigns.mutants", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/mutants"))
    parser.add_argument("--count", type=int, default=330, help="mutants; default 330")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--files", nargs="*", default=[""], help="beginnings of files' names")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--again", action="store_true", help="repeat those that survived")
    parser.add_argument("--table", action="store_true", help="run nothing, print what there is")
    parser.add_argument("--wanted", type=float, default=0.9, help="score that is success")
    options = parser.parse_args(arguments)

    options.out.mkdir(parents=True, exist_ok=True)
    rows_file = options.out / "rows.jsonl"
    drawn = draw(options.count, options.seed)
    chosen = [m for m in drawn if m.file.startswith(tuple(options.files))]
    rows = read_rows(rows_file)
    if not options.table:
        todo = [
            mutant
            for mutant in chosen
            if mutant.key not in rows
            or (options.again and rows[mutant.key]["killed_by"] is None and not harmless(mutant))
        ]
        campaign(todo, rows, rows_file, options.out, options.jobs)
        rows = read_rows(rows_file)
    return report(chosen, rows, options.wanted)


# --- which mutants -----------------------------------------------------------------------------


def files() -> list[str]:
    """All files that are mutated; a folder's as well as a module's."""
    found: set[str] = set()
    for pattern in MUTATED:
        for path in ROOT.glob(pattern):
            inside = path.rglob("*.py") if path.is_dir() else [path]
            found.update(entry.relative_to(ROOT).as_posix() for entry in inside)
    return sorted(name for name in found if name.endswith(".py"))


def draw(count: int, seed: int) -> list[Mutant]:
    """Draw mutants by seed, to each file in proportion to its lines of code."""
    sources = {name: (ROOT / name).read_text(encoding="utf-8") for name in files()}
    weights = {name: code_lines(text) for name, text in sources.items() if places(text)}
    shares = {name: count * lines / sum(weights.values()) for name, lines in weights.items()}
    numbers = {name: int(share) for name, share in shares.items()}
    for name in sorted(shares, key=lambda name: numbers[name] - shares[name]):
        if sum(numbers.values()) < count:
            numbers[name] += 1
    return [mutant for name, number in numbers.items() for mutant in _drawn(name, number, seed)]


def code_lines(source: str) -> int:
    """Count the lines that hold code: neither blank, nor a comment, nor a docstring."""
    tree = ast.parse(source)
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    text: set[int] = set()
    for node in ast.walk(tree):
        if isinstance(node, documented) and ast.get_docstring(node) is not None:
            text.update(range(node.body[0].lineno, (node.body[0].end_lineno or 0) + 1))
    lines = enumerate(source.splitlines(), start=1)
    return sum(
        bool(line.strip()) and not line.strip().startswith("#")
        for number, line in lines
        if number not in text
    )


def _drawn(name: str, number: int, seed: int) -> Iterator[Mutant]:
    """Draw mutants of one file."""
    source = (ROOT / name).read_text(encoding="utf-8")
    chance = random.Random(f"{seed} {name}")
    sites = list(places(source).values())
    chance.shuffle(sites)
    for site in sites:
        if number == 0:
            return
        operator, occurrence = chance.choice(site)
        text = mutated(source, operator, occurrence)
        if text is None or not _compiles(text):
            continue
        line, before, after = _difference(source, text)
        digest = hashlib.sha256(source.encode()).hexdigest()[:12]
        yield Mutant(name, operator, occurrence, line, before, after, digest)
        number -= 1


@cache
def places(source: str) -> dict[tuple[Any, str], list[tuple[str, int]]]:
    """List what can be mutated: by position and kind of operator, the operators and occurrences."""
    from cosmic_ray.ast import ast_nodes, get_ast
    from cosmic_ray.operators.provider import OperatorProvider

    provider = OperatorProvider()
    operators = {name: provider[name] for name in provider if not name.startswith("Variable")}
    counts: Counter[str] = Counter()
    found: dict[tuple[Any, str], list[tuple[str, int]]] = {}
    for node in ast_nodes(get_ast(source)):
        unseen = _unseen(node)
        for name, operator in operators.items():
            for position in operator().mutation_positions(node):
                occurrence = counts[name]
                counts[name] += 1
                if not unseen:
                    found.setdefault((position, name.split("_")[0]), []).append((name, occurrence))
    return found


def _unseen(node: Any) -> bool:
    """Whether a change of this node cannot be seen by any test (see the module's docstring)."""
    if node.type == "operator" and node.parent.type in ("parameters", "param"):
        return node.value in ("*", "/", "**")
    if node.type == "decorator" and "njit" in node.get_code():
        return True
    child, parent = node, node.parent
    while parent is not None:
        if parent.type == "decorator" and "njit" in parent.get_code():
            return True
        if parent.type == "tfpdef" and child is not parent.children[0]:
            return True
        if parent.type == "annassign" and child is parent.children[1]:
            return True
        if parent.type == "funcdef" and parent.annotation is child:
            return True
        child, parent = parent, parent.parent
    return False


def mutated(source: str, operator: str, occurrence: int) -> str | None:
    """Apply a mutation to a text; None where the operator cannot."""
    from cosmic_ray.mutating import mutate_code
    from cosmic_ray.operators.provider import OperatorProvider

    try:
        return mutate_code(source, OperatorProvider()[operator](), occurrence)
    except AttributeError:  # cosmic-ray 8.7's, of an exception with a dot in its name
        return None


def _compiles(text: str) -> bool:
    try:
        with warnings.catch_warnings(
            action="ignore", category=SyntaxWarning
        ):  # "is" with a literal
            compile(text, "mutant", "exec")
    except SyntaxError:
        return False
    return True


def _difference(source: str, text: str) -> tuple[int, str, str]:
    """The first line that differs, as it was and as it is."""
    old, new = source.splitlines(), text.splitlines()
    index = next((i for i, (a, b) in enumerate(zip(old, new, strict=False)) if a != b), len(new))
    removed = len(old) - len(new)
    before = " ".join(line.strip() for line in old[index : index + max(removed, 1)]).strip()
    after = "" if removed > 0 else new[index].strip()
    return index + 1, before, after


# --- running -----------------------------------------------------------------------------------


def campaign(
    todo: list[Mutant], rows: dict[Any, dict[str, Any]], rows_file: Path, out: Path, jobs: int
) -> None:
    """Run mutants, each in its turn or `jobs` at a time, and append a row for each."""
    if not todo:
        return
    _rooms.preload()
    started = time.perf_counter()
    workers = []
    for job in range(min(jobs, len(todo))):
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                _work(todo[job::jobs], rows, rows_file, (out / f"job{job}" / "tree").resolve())
                code = 0
            except KeyboardInterrupt:
                code = 130
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code)
        workers.append(pid)
    codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in workers]
    if any(codes):
        raise SystemExit(f"mutants: a worker ended with {max(codes)}; the same command resumes")
    print(f"{len(todo)} mutants in {(time.perf_counter() - started) / 60:.1f} minutes", flush=True)


def _work(todo: list[Mutant], rows: dict[Any, dict[str, Any]], rows_file: Path, tree: Path) -> None:
    """Run mutants one after the other in one copy of the repository."""
    _rooms.copy_tree(tree)
    cache = tree.with_name("kernels")
    killers: dict[str, Counter[str]] = {}
    for row in rows.values():
        killers.setdefault(row["file"], Counter())[row["killed_by"] or ""] += 1
    room: set[str] = set()
    durations: dict[str, float] = {}
    failing: list[str] = []
    for mutant in sorted(todo, key=lambda mutant: sorted(room_of(mutant.file))):
        tests = [name for name in room_of(mutant.file) if (tree / "tests" / name).exists()]
        if set(tests) != room:
            room = set(tests)
            durations, failing = _untouched(tree, cache, sorted(tests))
        source = (tree / mutant.file).read_text(encoding="utf-8")
        text = mutated(source, mutant.operator, mutant.occurrence)
        if text is None:
            raise ValueError(f"{mutant.file}: the file changed while the campaign was running")
        known = killers.setdefault(mutant.file, Counter())
        first = [name for name, _ in known.most_common(12) if name in durations]
        reaches = _rooms.reaches_kernels(source, mutant.line)
        dropped = _rooms.stale(tree, mutant.file) if reaches else set()
        with (
            _rooms.kernels(cache, dropped) as copy,
            _rooms.changed(tree / mutant.file, text, unnoticed=not reaches),
        ):
            verdict = _rooms.run_tests(
                tree, copy, tests, durations=durations, first=first, skipped=failing
            )
        known[verdict.killed_by or ""] += 1
        row = {**asdict(mutant), "killed_by": verdict.killed_by, "seconds": verdict.seconds}
        with rows_file.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        said = verdict.killed_by or "SURVIVED"
        print(f"{mutant.file}:{mutant.line}: {mutant.after[:60]!r}: {said}", flush=True)


def _untouched(tree: Path, cache: Path, tests: list[str]) -> tuple[dict[str, float], list[str]]:
    """Run a room's tests on the code as it is, twice; name those that fail or cannot be relied on.

    The first run compiles what is not in the cache, the second gives the seconds. Both are kept for
    the next campaign on the same code.
    """
    kept, digest = tree.with_name("untouched.json"), hashlib.sha256("".join(tests).encode())
    for path in sorted(tree.rglob("*.py")):
        digest.update(path.read_bytes())
    known = json.loads(kept.read_text()) if kept.exists() else {}
    if digest.hexdigest() in known:
        return known[digest.hexdigest()]["durations"], known[digest.hexdigest()]["failing"]
    failing: list[str] = []
    for _ in range(2):
        verdict = _rooms.run_tests(tree, cache, tests, skipped=failing)
        while verdict.killed_by is not None:
            if verdict.killed_by in failing or "::" not in verdict.killed_by:
                raise ValueError(f"the tests of {tests[0]}'s room fail: {verdict.killed_by}")
            print(f"left out, it fails without a change: {verdict.killed_by}", flush=True)
            failing.append(verdict.killed_by)
            verdict = _rooms.run_tests(tree, cache, tests, skipped=failing)
    total = sum(verdict.durations.values())
    print(f"room of {tests[0]}: {len(verdict.durations)} tests, {total:.0f} s", flush=True)
    known[digest.hexdigest()] = {"durations": verdict.durations, "failing": failing}
    kept.write_text(json.dumps(known))
    return verdict.durations, failing


def room_of(file: str) -> tuple[str, ...]:
    """Test files of a file's room: its own first, where it has one."""
    tests = next(tests for start, tests in ROOMS.items() if file.startswith(start))
    tests = (*tests, "test_frozen.py")
    path = Path(file)
    own = (f"test_{path.stem}.py", f"test_{path.parent.name}_{path.stem}.py")
    return (*(name for name in tests if name in own), *(name for name in tests if name not in own))


# --- results -----------------------------------------------------------------------------------


def read_rows(path: Path) -> dict[Any, dict[str, Any]]:
    """Read rows by mutant; a later row counts for the same mutant."""
    rows = {}
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            continue  # the line that a crash cut short
        rows[row["file"], row["source"], row["operator"], row["occurrence"]] = row
    return rows


def harmless(mutant: Mutant) -> str | None:
    """Why a mutant changes nothing that anyone could see; None where that is not known."""
    if not HARMLESS.exists():
        return None
    entries = tomllib.loads(HARMLESS.read_text(encoding="utf-8")).get("mutant", [])
    for entry in entries:
        same = (mutant.file, mutant.before, mutant.after)
        if same == (entry["file"], entry["before"], entry["after"]):
            return str(entry["reason"])
    return None


def report(chosen: list[Mutant], rows: dict[Any, dict[str, Any]], wanted: float) -> int:
    """Print the table and the survivors; return 1 if too many survive."""
    width = max(map(len, files()))
    print(f"{'file':{width}}  drawn  killed  harmless  survived  score")
    totals: Counter[str] = Counter()
    survivors = []
    for name in sorted({mutant.file for mutant in chosen}):
        counts: Counter[str] = Counter()
        for mutant in (mutant for mutant in chosen if mutant.file == name):
            row = rows.get(mutant.key)
            counts["drawn"] += 1
            if row is None:
                counts["not run"] += 1
            elif row["killed_by"] is not None:
                counts["killed"] += 1
            elif harmless(mutant):
                counts["harmless"] += 1
            else:
                counts["survived"] += 1
                survivors.append(mutant)
        totals += counts
        print(_line(name, counts, width))
    print(_line("all", totals, width))
    for mutant in survivors:
        print(f"survived: {mutant.file}:{mutant.line} {mutant.operator} {mutant.occurrence}")
        print(f"  - {mutant.before}\n  + {mutant.after}")
    if totals["not run"]:
        print(f"{totals['not run']} not run yet")
    return int(totals["not run"] > 0 or _score(totals) < wanted)


def _score(counts: Counter[str]) -> float:
    rest = counts["killed"] + counts["survived"]
    return counts["killed"] / rest if rest else 1.0


def _line(name: str, counts: Counter[str], width: int) -> str:
    numbers = [counts[key] for key in ("drawn", "killed", "harmless", "survived")]
    drawn, killed, harmless_, survived = numbers
    score = f"{100 * _score(counts):.1f} %"
    return f"{name:{width}}  {drawn:5}  {killed:6}  {harmless_:8}  {survived:8}  {score:>7}"
