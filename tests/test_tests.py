"""The tests' own sources: no private names of the package, marks on what needs shared data."""

import ast
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
OURS = ("retrain", "solvers", "bench")
FILES = sorted(set(HERE.glob("*.py")) - {Path(__file__)})
PATCHING = ("setattr", "getattr", "delattr", "hasattr", "setitem")
REACHED = re.compile(rf"^(?:{'|'.join(OURS)})(?:\.\w+)*\._[a-zA-Z]\w*|^_[a-zA-Z]\w*$")

ALLOWED = {
    "test_memory": {
        "solvers.program._BLOCK_ENTRIES": "sizes of a block that no caller can choose: they would",
        "solvers.program._ROWS": "hide what grows with the samples, unless there were millions",
    },
    "test_docstrings": {"kind._is_protocol": "a mark that typing leaves on a class"},
    "test_cli_odd_values": {
        "build_parser()._subparsers": "argparse lists a parser's options nowhere else",
        "build_parser()._subparsers._group_actions": "as above",
        "build_parser()._subparsers._group_actions[0].choices[name]._actions": "as above",
    },
}
"""Private names that a test reaches all the same, by file, with the reason."""


def private(name):
    return name.startswith("_") and not name.startswith("__")


def text_of(node):
    """The text of a string, with an empty one for what an f-string fills in."""
    if isinstance(node, ast.JoinedStr):
        return "".join(text_of(part) for part in node.values)
    return node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else ""


def root_of(node):
    """The name that a chain of attributes, calls and indices begins with."""
    while isinstance(node, ast.Attribute | ast.Call | ast.Subscript):
        node = node.func if isinstance(node, ast.Call) else node.value
    return node.id if isinstance(node, ast.Name) else ""


def private_names(tree):
    """Private names that a test imports, takes from anything but itself, or patches by name.

    Those of packages that are not ours (torch, the standard library) are theirs to reach.
    """
    foreign, found = {"self", "cls"}, []
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            ours = (node.module or "").split(".")[0] in OURS
            names = [entry.name for entry in node.names if ours and private(entry.name)]
            found += [f"{node.module}.{name}" for name in names]
            foreign.update(() if ours else [entry.asname or entry.name for entry in node.names])
        elif isinstance(node, ast.Import):
            roots = {entry.asname or entry.name.split(".")[0]: entry.name for entry in node.names}
            foreign.update(one for one, name in roots.items() if name.split(".")[0] not in OURS)
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and private(node.attr) and root_of(node) not in foreign:
            found.append(ast.unparse(node))
        elif isinstance(node, ast.Call):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else root_of(node.func)
            if called not in PATCHING:
                continue
            owner = "" if len(node.args) < 2 else ast.unparse(node.args[0])
            for argument in node.args[:2]:
                if REACHED.match(text_of(argument)) and root_of(node.args[0]) not in foreign:
                    text = text_of(argument)
                    found.append(f"{owner}.{text}" if private(text) else text)
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_no_private_names_of_the_package(path):
    found = private_names(ast.parse(path.read_text(encoding="utf-8")))
    assert set(found) == set(ALLOWED.get(path.stem, ()))


def test_the_search_finds_each_way_of_reaching_a_private_name():
    source = """
import retrain
from solvers.newton.block import _noise, solve_block
from solvers import program
program._gap(1)
retrain.files._whole("1")
stream._inputs
Chain(weights)._weights
monkeypatch.setattr(program, "_LIMIT", 3)
monkeypatch.setattr(retrain.runs.drive, "_retrain", 3)
monkeypatch.setattr("solvers.admm.solve._stalled", None)
monkeypatch.setattr(f"solvers.admm.solve._{name}", None)
getattr(stream, "_rows")
import torch
from torch import nn
nn.Module._hooks
monkeypatch.setattr(torch, "_version", None)
self._own
cut["_key"]
"""
    source = source.replace("_{name}", "_x{name}")
    assert sorted(private_names(ast.parse(source))) == [
        "Chain(weights)._weights",
        "program._LIMIT",
        "program._gap",
        "retrain.files._whole",
        "retrain.runs.drive._retrain",
        "solvers.admm.solve._stalled",
        "solvers.admm.solve._x",
        "solvers.newton.block._noise",
        "stream._inputs",
        "stream._rows",
    ]


# --- marks on what needs shared data --------------------------------------------------------------


def names_in(node):
    """Names that a piece of source refers to, the arguments of its functions among them."""
    each = list(ast.walk(node))
    names = {part.id for part in each if isinstance(part, ast.Name)}
    return names | {part.arg for part in each if isinstance(part, ast.arg)}


def unmarked(tree):
    """Tests that reach SHARED, by whatever names and functions of their file, without the mark."""
    defined, marks = {}, {"shared_data"}
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            defined[node.name] = node
        elif isinstance(node, ast.Assign):
            for target in node.targets:
                defined.update(dict.fromkeys(names_in(target), node.value))
                if "mark.shared_data(" in ast.unparse(node.value):
                    marks |= names_in(target)
    reaching, before = {"SHARED"}, set()
    while reaching != before:
        before = set(reaching)
        reaching |= {name for name, node in defined.items() if names_in(node) & reaching}
    found = []
    for name in sorted(reaching - {"SHARED"}):
        if name.startswith("test_"):
            said = [ast.unparse(decorator) for decorator in defined[name].decorator_list]
            if not any(one in marks or "mark.shared_data(" in one for one in said):
                found.append(name)
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_what_uses_shared_data_is_marked(path):
    """The skip and the count at the end of a run come from the mark."""
    source = path.read_text(encoding="utf-8")
    assert unmarked(ast.parse(source)) == []
    if path.stem != "shared_data":
        assert '/ "shared"' not in source and "wt-" not in source


def test_the_search_finds_each_way_of_forgetting_the_mark():
    source = """
from shared_data import SHARED
DATA = SHARED / "data"
needs_data = pytest.mark.shared_data("data/a")
def read(): return (DATA / "a").read_bytes()
@pytest.fixture
def images(): return read()
def test_direct(): assert SHARED.exists()
def test_by_a_function(): assert read()
def test_by_a_fixture(images): assert images
def test_without(): assert True
@needs_data
def test_marked(images): assert images
@pytest.mark.shared_data("data/a")
def test_marked_too(): assert read()
"""
    forgotten = ["test_by_a_fixture", "test_by_a_function", "test_direct"]
    assert unmarked(ast.parse(source)) == forgotten


MARKED = """
import pytest
@pytest.mark.shared_data("data/there.bin", "data/not-there.bin")
def test_one(): raise AssertionError
@pytest.mark.shared_data("data/there.bin")
def test_two(): pass
@pytest.mark.shared_data("data")  # a folder may lack the file that a test reads
def test_three(): raise AssertionError
def test_four(): pass
"""


def test_a_run_says_how_many_tests_lacked_data_and_which(tmp_path):
    tests = tmp_path / "repository" / "tests"
    tests.mkdir(parents=True)
    for name in ("conftest.py", "shared_data.py"):
        shutil.copy(HERE / name, tests)
    (tests / "test_marked.py").write_text(MARKED)
    (tests / "pytest.ini").write_text("[pytest]\npythonpath = .\nmarkers =\n shared_data\n gpu\n")
    (tmp_path / "shared" / "data").mkdir(parents=True)
    (tmp_path / "shared" / "data" / "there.bin").touch()
    answer = subprocess.run(
        [sys.executable, "-m", "pytest", "-rs", "-p", "no:cacheprovider"],
        cwd=tests,
        capture_output=True,
        text=True,
        check=False,
    )
    assert answer.returncode == 0, answer.stdout
    said = "tests on shared data: 3, 1 ran, 2 skipped (missing: data, data/not-there.bin)"
    assert said in answer.stdout.splitlines()
    assert "no shared data: data/not-there.bin\n" in answer.stdout
    assert "2 passed, 2 skipped" in answer.stdout
