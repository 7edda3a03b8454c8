"""`retrain demo`: the package on embedded digits."""

from __future__ import annotations

import argparse
from typing import Any

from retrain.cli.shared import Progress, add_common


def add_command(commands: Any) -> None:
    """Add `retrain demo` to the parser."""
    parser = commands.add_parser(
        "demo",
        help="train a small network on embedded digits, prune it both ways, report",
        description="Train a 64-128-64-10 ReLU network on scikit-learn's digits, save it, retrain "
        "it with both schemes of Net-Trim, and compare.",
    )
    parser.add_argument(
        "--out", default="runs/demo", metavar="DIR", help="where to write; default runs/demo"
    )
    add_common(parser)
    parser.set_defaults(run=_run)


def _run(options: argparse.Namespace) -> int:
    """Train, prune both ways, compare."""
    with Progress(options):
        from retrain.demo import demo

        return demo(
            options.out,
            seed=0 if options.seed is None else options.seed,
            threads=options.threads,
            device=options.device,
            quiet=options.quiet,
            as_json=options.json,
        )
