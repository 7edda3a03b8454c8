"""The tests' own sources: no private names of the package, marks on what needs shared data."""

import ast
from pathlib import Path

import pytest

HERE = Path(__file__).parent
OURS = ("retrain", "solvers", "bench")
FILES = sorted(set(HERE.glob("*.py")) - {Path(__file__)})


def private(name):
    return name.startswith("_") and not name.startswith("__")


def private_names(tree):
    """Private names of our packages that a test imports, patches or takes from a module."""
    modules, found = set(), []
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in OURS:
            found += [f"{node.module}.{entry.name}" for entry in node.names if private(entry.name)]
            modules.update(entry.asname or entry.name for entry in node.names)
        elif isinstance(node, ast.Import):
            modules.update(
                entry.asname or entry.name.split(".")[0]
                for entry in node.names
                if entry.name.split(".")[0] in OURS
            )
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            parts = node.value.split(".")
            if parts[0] in OURS and len(parts) > 1 and private(parts[-1]) and " " not in node.value:
                found.append(node.value)
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and private(node.attr):
            root = node.value
            while isinstance(root, ast.Attribute):
                root = root.value
            if isinstance(root, ast.Name) and root.id in modules:
                found.append(f"{ast.unparse(node.value)}.{node.attr}")
        called = node.func if isinstance(node, ast.Call) else None
        if isinstance(called, ast.Attribute) and called.attr in ("setattr", "setitem"):
            first, *rest = node.args
            named = rest[0].value if rest and isinstance(rest[0], ast.Constant) else ""
            owner = first.id if isinstance(first, ast.Name) else ""
            if owner in modules and isinstance(named, str) and private(named):
                found.append(f"{owner}.{named}")
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_no_private_names_of_the_package(path):
    assert private_names(ast.parse(path.read_text(encoding="utf-8"))) == []


def test_the_search_finds_each_way_of_reaching_a_private_name():
    source = """
import retrain
from solvers.newton.block import _noise, solve_block
from solvers import program
program._gap(1)
retrain.files._whole("1")
monkeypatch.setattr(program, "_LIMIT", 3)
monkeypatch.setattr("solvers.admm.solve._stalled", None)
nn.Module._hooks
"""
    assert sorted(private_names(ast.parse(source))) == [
        "program._LIMIT",
        "program._gap",
        "retrain.files._whole",
        "solvers.admm.solve._stalled",
        "solvers.newton.block._noise",
    ]


def test_what_uses_shared_data_is_marked():
    """The skip and the count at the end of a run come from the mark."""
    for path in FILES:
        source = path.read_text(encoding="utf-8")
        if "from shared_data import SHARED" in source:
            assert "mark.shared_data(" in source, path.name
        if path.stem not in ("shared_data", "test_tests"):
            assert '/ "shared"' not in source, path.name
