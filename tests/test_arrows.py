"""The imports, read from the sources: no circle, no arrow up, nothing beside the rooms."""

import ast
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# From the bottom to the top; a room may import from its own line and from the lines above it here.
LEVELS = (
    ("solvers",),
    ("retrain.files",),
    ("retrain.data",),
    ("retrain.stream",),
    ("retrain.methods", "retrain.bounds"),
    ("retrain.adapters",),
    ("retrain.compact",),
    ("retrain.trainers",),
    ("retrain.runs",),
    ("retrain.report", "retrain.verify"),
    ("retrain.api",),
    ("retrain.demo",),
    ("retrain.cli",),
    ("retrain.__main__",),
)
BESIDE_THE_ROOMS = {"__init__.py", "__main__.py", "data.py", "demo.py", "files.py", "py.typed"}
# These stand on torch and on the trainers; the rest of the room does so only inside functions.
ON_TORCH = {"retrain.runs.training", "retrain.runs.knee_search"}


def name_of(path):
    name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
    return name.removesuffix(".__init__")


@cache
def arrows():
    """(module, imported module, whether when it is loaded) for every import in both packages."""
    files = {
        name_of(path): path for top in ("solvers", "retrain") for path in (ROOT / top).rglob("*.py")
    }
    found = []

    def walk(node, module, at_load):
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.dump(child.test):
                continue
            if isinstance(child, ast.Import):
                found.extend((module, alias.name, at_load) for alias in child.names)
            elif isinstance(child, ast.ImportFrom) and child.module:
                for alias in child.names:
                    whole = f"{child.module}.{alias.name}"
                    found.append((module, whole if whole in files else child.module, at_load))
            inside = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef)
            walk(child, module, at_load and not inside)

    for module, path in files.items():
        walk(ast.parse(path.read_text("utf-8")), module, True)
    return [(a, b, at_load) for a, b, at_load in found if b in files and a != b]


def room(module):
    return ".".join(module.split(".")[: 1 if module.startswith("solvers") else 2])


def level(module):
    return next((i for i, names in enumerate(LEVELS) if room(module) in names), None)


def circles(pairs):
    """Groups of names that import one another, by removing what imports nothing any more."""
    left = {
        name: {b for a, b in pairs if a == name and b != name} for pair in pairs for name in pair
    }
    while True:
        free = {name for name, needs in left.items() if not needs & left.keys()}
        if not free:
            break
        left = {name: needs for name, needs in left.items() if name not in free}
    # What is left also holds what imports a circle; drop what nothing left imports.
    while True:
        wanted = set().union(*left.values()) if left else set()
        kept = {name: needs for name, needs in left.items() if name in wanted}
        if len(kept) == len(left):
            return sorted(left)
        left = kept


def test_every_module_has_a_level():
    assert {room(a) for a, _, _ in arrows() if a != "retrain" and level(a) is None} == set()


def test_no_arrow_goes_up():
    up = [
        f"{a} -> {b}"
        for a, b, _ in arrows()
        if a != "retrain" and b != "retrain" and level(b) > level(a)
    ]
    assert up == []


@pytest.mark.parametrize("depth", [2, 3])
def test_no_circle_of_rooms(depth):
    def cut(module):
        parts = module.split(".")
        return ".".join(parts[:depth]) if len(parts) > depth else ".".join(parts[:-1]) or module

    pairs = {(cut(a), cut(b)) for a, b, _ in arrows() if a != "retrain" and b != "retrain"}
    pairs = {(a, b) for a, b in pairs if not (b.startswith(a) or a.startswith(b))}
    assert circles(pairs) == []


def test_no_circle_of_modules_at_load():
    assert circles({(a, b) for a, b, at_load in arrows() if at_load}) == []


def test_nothing_stands_beside_the_rooms():
    here = {path.name for path in (ROOT / "retrain").iterdir() if path.is_file()}
    assert here - BESIDE_THE_ROOMS - {"README.md"} == set()


def test_runs_load_without_trainers():
    loaded = {
        a
        for a, b, at_load in arrows()
        if at_load and a.startswith("retrain.runs.") and b.startswith("retrain.trainers")
    }
    assert loaded <= ON_TORCH


def test_the_checks_can_fail():
    assert circles({("a", "b"), ("b", "c"), ("c", "a"), ("d", "a")}) == ["a", "b", "c"]
    assert circles({("a", "b"), ("b", "c")}) == []
    assert level("solvers.admm.solve") < level("retrain.cli.trim")
