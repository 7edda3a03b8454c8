"""`retrain verify`: the papers' statements, checked numerically."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from retrain.cli.shared import DONE, Progress, interrupts_kept_from_workers

VIOLATED = 1


def add_command(commands: Any) -> None:
    """Add `retrain verify` to the parser."""
    parser = commands.add_parser(
        "verify",
        help="check the papers' theorems numerically",
        description="Check every statement of the papers on seeded instances: what was measured "
        "beside the bound, the margin, the verdict. The exit code is 1 when one is violated. The "
        "same command resumes a check that was interrupted.",
    )
    parser.add_argument(
        "statements",
        nargs="*",
        metavar="STATEMENT",
        help="names, papers (net-trim) or shell patterns ('*/theorem-*'); default all",
    )
    parser.add_argument("--list", action="store_true", help="list the statements, and stop")
    level = parser.add_mutually_exclusive_group()
    level.add_argument(
        "--quick", action="store_const", const="quick", dest="level", help="minutes; the default"
    )
    level.add_argument(
        "--full", action="store_const", const="full", dest="level", help="up to half an hour"
    )
    parser.add_argument(
        "--out", metavar="DIR", help="write verify.json and pictures there, new or to resume"
    )
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="cases at a time")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="default 0")
    parser.add_argument("--json", action="store_true", help="print what verify.json holds")
    parser.add_argument("--quiet", action="store_true", help="print nothing but errors")
    parser.set_defaults(run=_run, level="quick")


def _run(options: argparse.Namespace) -> int:
    """Check statements."""
    if options.list:
        from retrain import verify

        for statement in verify.select(options.statements):
            print(f"{statement.name}: {statement.paper}, {statement.number}")
        return DONE

    with Progress(options) as progress, interrupts_kept_from_workers(options.jobs):
        from retrain import verify

        results = verify.run(
            options.statements,
            level=options.level,
            out=options.out,
            jobs=options.jobs,
            seed=options.seed,
            on_result=lambda result: progress.say(f"{result.statement.name}: {result.verdict}"),
        )
    if options.json:
        sys.stdout.write(verify.document(results, options.level, options.seed))
    elif not options.quiet:
        from rich.box import SIMPLE_HEAD
        from rich.table import Table

        from retrain.report.terminal import output

        table = Table(*verify.HEADINGS, box=SIMPLE_HEAD)
        for row in verify.table(results):
            table.add_row(*row)
        output().print(table)
    return VIOLATED if any(result.verdict == "violated" for result in results) else DONE
