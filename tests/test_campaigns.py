"""Short forms of the campaigns: a few kills; what is mutated, and what is listed as harmless."""

import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from bench.campaigns import mutants

ROOT = Path(__file__).parents[1]


def test_a_few_kills_leave_the_same_bytes(tmp_path):
    """`python -m bench campaigns.kills` does hundreds, of every command."""
    options = ["--commands", "trim", "--share", "0.06", "--seed", "3", "--out", str(tmp_path)]
    answer = subprocess.run(
        [sys.executable, "-m", "bench", "campaigns.kills", *options],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert answer.returncode == 0, answer.stdout + answer.stderr
    total = next(line for line in answer.stdout.splitlines() if line.startswith("all"))
    *_, kills, faults = total.split()
    assert int(kills) >= 3
    assert faults == "0"


def test_mutants_are_drawn_by_seed_in_proportion_and_kernels_are_among_them():
    pytest.importorskip("cosmic_ray")
    drawn = mutants.draw(60, 3)
    assert len(drawn) == 60
    assert drawn == mutants.draw(60, 3)
    assert drawn != mutants.draw(60, 4)
    counts = {name: sum(m.file == name for m in drawn) for name in {m.file for m in drawn}}
    assert counts["solvers/program.py"] > counts["solvers/obs/refit.py"]
    source = (ROOT / "solvers" / "obs" / "swaps.py").read_text()
    kernel = source[: source.index("\ndef take_swaps(")].count("\n") + 2
    lines = {position[0][0] for position, _ in mutants.places(source)}
    assert len(lines & set(range(kernel + 10, kernel + 60))) > 10


def test_what_no_test_could_see_is_not_drawn():
    pytest.importorskip("cosmic_ray")
    source = (
        "@njit(cache=True)\n"
        "def f(a: int | None, *, b: list[int] | None = None) -> int | float:\n"
        "    c: int | str = 1 - 2\n"
        "    return c\n"
    )
    lines = [position[0] for position, _ in mutants.places(source)]
    assert {line for line, _ in lines} == {3}
    assert all(column > 18 for _, column in lines)


def test_every_harmless_mutant_is_of_a_line_that_is_there():
    """A line that has changed may have come to matter."""
    entries = tomllib.loads(mutants.HARMLESS.read_text(encoding="utf-8"))["mutant"]
    for entry in entries:
        lines = [line.strip() for line in (ROOT / entry["file"]).read_text().splitlines()]
        assert entry["before"] in lines, entry
        assert entry["after"] not in ("", entry["before"])
        assert len(entry["reason"]) > 20


def test_every_mutated_file_has_tests_that_are_there():
    for name in mutants.files():
        tests = mutants.room_of(name)
        assert (ROOT / "tests" / tests[0]).is_file(), (name, tests)
