"""Numerical checks of the papers' statements: one module a paper, one statement a check.

    results = retrain.verify.run(["net-trim/theorem-1"], level="quick", out="runs/v", jobs=2)

A check that cannot fail is worth nothing: every statement's parts are fields (`Statement`), and the
tests break each one to see its verdict turn.
"""

from retrain.verify.runner import HEADINGS, document, run, select, statements, table
from retrain.verify.statement import Result, Row, Statement

__all__ = [
    "HEADINGS",
    "Result",
    "Row",
    "Statement",
    "document",
    "run",
    "select",
    "statements",
    "table",
]
