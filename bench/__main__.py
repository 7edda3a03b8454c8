"""Run a bench by name: ``python -m bench solvers --smoke``."""

from __future__ import annotations

import ast
import importlib
import sys
from pathlib import Path

HERE = Path(__file__).parent


def benches(folder: Path = HERE) -> dict[str, Path]:
    """Find the benches under a folder: module names, a room's modules as ``room.module``."""
    found = {}
    for path in sorted(folder.rglob("*.py")):
        names = path.relative_to(folder).with_suffix("").parts
        if not any(name.startswith("_") for name in names) and _has_main(path):
            found[".".join(names)] = path
    return found


def main(arguments: list[str]) -> int:
    """Dispatch to ``bench.NAME.main(options)`` and return its exit code."""
    known = benches()
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_help(known))
        return 0 if arguments else 2
    name, *options = arguments
    if name not in known:
        print(f"bench: want one of {', '.join(known)}; got {name!r}", file=sys.stderr)
        return 2
    return int(importlib.import_module(f"bench.{name}").main(options) or 0)


def _has_main(path: Path) -> bool:
    """Tell, without importing it, whether a module can be run."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return any(isinstance(node, ast.FunctionDef) and node.name == "main" for node in tree.body)


def _help(known: dict[str, Path]) -> str:
    lines = ["usage: python -m bench NAME [options]", "", "benches (NAME --help tells more):"]
    width = max(map(len, known), default=0)
    for name, path in known.items():
        about = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
        lines.append(f"  {name:{width}}  {about.partition(chr(10))[0]}")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
