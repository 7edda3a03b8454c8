"""Each room has a README that names its files, and what must not be imported is not imported."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

WANTED = (
    "solvers",
    "solvers/admm",
    "solvers/newton",
    "solvers/path",
    "solvers/obs",
    "retrain",
    "retrain/api",
    "retrain/runs",
    "retrain/stream",
    "retrain/methods",
    "retrain/bounds",
    "retrain/adapters/network",
    "retrain/adapters/files",
    "retrain/compact",
    "retrain/data",
    "retrain/trainers",
    "retrain/verify",
    "retrain/report",
    "retrain/cli",
    "bench",
    "examples",
    "tests",
)


def rooms():
    """Every folder of the packages that has a README."""
    tops = (ROOT / top for top in ("solvers", "retrain", "bench", "examples", "tests"))
    return sorted(path.parent for top in tops for path in top.rglob("README.md"))


def named(room):
    """Files that a room's README names: the first column of its table."""
    return re.findall(r"^\| `([^`]+)` \|", (room / "README.md").read_text("utf-8"), re.MULTILINE)


def forbidden(room):
    """Modules that a room's README forbids to import."""
    text = (room / "README.md").read_text("utf-8")
    found = re.search(r"^Must not import: (.*?)\.$", text, re.MULTILINE | re.DOTALL)
    return re.findall(r"`([^`]+)`", found.group(1)) if found else []


def modules(room):
    """Modules of a room: those of its folders, without the folders that are rooms themselves."""
    others = [other for other in rooms() if other != room and other.is_relative_to(room)]
    return [
        path
        for path in sorted(room.rglob("*.py"))
        if path.name != "__init__.py" and not any(path.is_relative_to(other) for other in others)
    ]


def imported(source):
    """Modules that a module imports when it is itself imported, not on demand."""
    names = []
    nodes = list(ast.parse(source).body)
    while nodes:
        node = nodes.pop()
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names += [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        elif isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            nodes += node.orelse
        elif not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            nodes += ast.iter_child_nodes(node)
    return names


def crossed(source, rules):
    """Imports of a module that rules forbid."""
    return [
        name
        for name in imported(source)
        if any(name == rule or name.startswith(f"{rule}.") for rule in rules)
    ]


every_room = pytest.mark.parametrize("room", rooms(), ids=lambda room: str(room.relative_to(ROOT)))


def test_the_rooms_have_readmes():
    assert {str(room.relative_to(ROOT)) for room in rooms()} >= set(WANTED)


@every_room
def test_every_file_that_is_named_exists(room):
    assert [name for name in named(room) if not (room / name).is_file()] == []
    assert len(set(named(room))) == len(named(room))


@every_room
def test_every_module_is_named(room):
    assert set(named(room)) >= {path.relative_to(room).as_posix() for path in modules(room)}


@every_room
def test_the_arrows_hold(room):
    for path in modules(room):
        assert crossed(path.read_text("utf-8"), forbidden(room)) == [], path


def test_the_checks_can_fail():
    torch = "import numpy\nif numpy:\n    from torch.nn import functional\n"
    assert crossed(torch, ["torch"]) == ["torch.nn", "torch.nn.functional"]
    assert crossed("from retrain import cli\n", ["retrain.cli"]) == ["retrain.cli"]
    on_demand = "def f():\n    import torch\nif TYPE_CHECKING:\n    import torch\n"
    assert crossed(on_demand, ["torch"]) == []
    assert crossed("import torchvision\n", ["torch"]) == []
