"""What a checked statement is, and how its verdict comes about.

A statement of a paper becomes four small functions: `cases` (what is tried), `sample` (draw one
instance from a case and a generator), `measure` and `bound` (numbers of that instance, by name).
They are joined by a relation and a tolerance, and judged row by row. Because the four are plain
fields, a test breaks one of them with `dataclasses.replace` and sees the verdict turn.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

Level = Literal["quick", "full"]
Relation = Literal["<=", ">=", "=="]
Verdict = Literal["verified", "violated", "illustrated"]
Case = dict[str, Any]
Numbers = dict[str, float]


@dataclass(frozen=True)
class Row:
    """What came of one case.

    Attributes
    ----------
    case : dict
        The case, as JSON values.
    measured, bound : dict
        Quantities by name, of this instance.
    printed : dict or None
        The bound as the paper prints it, where that is an erratum.
    details : dict
        What a picture or a summary needs beside.
    seconds : float
        Wall time.
    """

    case: Case
    measured: Numbers
    bound: Numbers
    printed: Numbers | None
    details: dict[str, Any]
    seconds: float = field(compare=False)


@dataclass(frozen=True)
class Statement:
    """A statement of a paper and its check.

    Attributes
    ----------
    name : str
        ``paper/what``, as the command line takes it.
    paper, number : str
        Where it stands.
    sentence : str
        The paper's sentence.
    formula : str
        What is compared, as ASCII.
    assumptions : tuple of str
        What the instances fulfil.
    cases : function of "quick" or "full"
        The cases to try, each a dict of JSON values.
    sample : function of (case, generator)
        Draws an instance. All randomness is in here.
    measure, bound : function of an instance
        Quantities by name; both have the same names.
    relation : {"<=", ">=", "=="}
        Between measured and bound.
    slack : float
        How far the relation may fail, relative to the larger of the two and `floor`: rounding, and
        the tolerance a solver was asked for.
    floor : float
        Size below which a quantity counts as zero.
    printed : function of an instance, optional
        The bound as the paper prints it. Given, the statement is an erratum: the corrected form
        must hold everywhere, and the printed one must fail in at least one row.
    erratum : str
        What is wrong in print.
    almost_sure : bool
        A limit that a finite run can only illustrate.
    details : function of an instance, optional
        Values to keep for the picture and the summary.
    summarise : function of the rows, optional
        Figures over all cases.
    picture : function of (rows, path), optional
        Draws a PNG.
    """

    name: str
    paper: str
    number: str
    sentence: str
    formula: str
    assumptions: tuple[str, ...]
    cases: Callable[[Level], Sequence[Case]]
    sample: Callable[[Case, np.random.Generator], Any]
    measure: Callable[[Any], Numbers]
    bound: Callable[[Any], Numbers]
    relation: Relation = "<="
    slack: float = 0.0
    floor: float = 0.0
    printed: Callable[[Any], Numbers] | None = None
    erratum: str = ""
    almost_sure: bool = False
    details: Callable[[Any], dict[str, Any]] | None = None
    summarise: Callable[[Sequence[Row]], dict[str, Any]] | None = None
    picture: Callable[[Sequence[Row], Path], None] | None = None


@dataclass(frozen=True)
class Result:
    """A statement's outcome.

    Attributes
    ----------
    statement : Statement
        What was checked.
    level, seed : str, int
        How.
    rows : tuple of Row
        One a case.
    verdict : {"verified", "violated", "illustrated"}
        Violated when any row breaks the relation, or when no row breaks the form printed in error.
    quantities : int
        Numbers compared.
    quantity : str
        Name of the one with the smallest margin, and its case, for finding it again.
    measured, bound, margin : float
        That quantity. The margin is relative to the larger of the two, and negative by the
        violation; for "==" it is minus the relative difference.
    printed_margin : float or None
        The smallest margin of the printed form, which an erratum needs to be a violation.
    tightness : float or None
        Median of measured / bound over the nonzero bounds of an inequality: 1 would be tight.
    """

    statement: Statement
    level: Level
    seed: int
    rows: tuple[Row, ...]
    verdict: Verdict
    quantities: int
    quantity: str
    measured: float
    bound: float
    margin: float
    printed_margin: float | None
    tightness: float | None
    summary: dict[str, Any]

    @property
    def seconds(self) -> float:
        """Sum of the cases' wall times."""
        return sum(row.seconds for row in self.rows)

    def to_json(self) -> dict[str, Any]:
        """Return all but the times, which do not repeat, as JSON values."""
        statement = self.statement
        texts = ("name", "paper", "number", "sentence", "formula", "relation", "erratum")
        return {
            **{name: getattr(statement, name) for name in texts},
            "assumptions": list(statement.assumptions),
            "tolerance": statement.slack,
            "level": self.level,
            "seed": self.seed,
            "verdict": self.verdict,
            "cases": len(self.rows),
            "quantities": self.quantities,
            "worst": {
                "quantity": self.quantity,
                "measured": finite(self.measured),
                "bound": finite(self.bound),
                "margin": finite(self.margin),
            },
            "printed_margin": None if self.printed_margin is None else finite(self.printed_margin),
            "tightness": self.tightness,
            "summary": self.summary,
            "rows": [row_to_json(row) for row in self.rows],
        }


def row_to_json(row: Row) -> dict[str, Any]:
    """Return a row's numbers, without its time, as JSON values."""
    return {
        "case": row.case,
        "measured": {name: finite(value) for name, value in row.measured.items()},
        "bound": {name: finite(value) for name, value in row.bound.items()},
        "printed": None
        if row.printed is None
        else {name: finite(value) for name, value in row.printed.items()},
        "details": row.details,
    }


def finite(value: float) -> float | str:
    """JSON has no infinities: keep them as words."""
    return float(value) if math.isfinite(value) else repr(float(value))


def margin(relation: Relation, measured: float, bound: float, floor: float) -> float:
    """Relative distance to violating the relation; -inf when a number is NaN."""
    if math.isnan(measured) or math.isnan(bound):
        return -math.inf
    if measured == bound:
        return 0.0
    scale = max(abs(measured), abs(bound), floor)
    if math.isinf(scale):
        difference = math.copysign(1.0, bound - measured)
    else:
        difference = (bound - measured) / scale
    return {"<=": difference, ">=": -difference, "==": -abs(difference)}[relation]


def judge(statement: Statement, level: Level, seed: int, rows: Sequence[Row]) -> Result:
    """Judge all rows of a statement.

    Raises
    ------
    ValueError
        If there is no row, or a row's measured and bound differ in their names.
    """
    if not rows:
        raise ValueError(f"rows: {statement.name} has none to judge")
    worst: tuple[float, str, float, float] = (math.inf, "", math.nan, math.nan)
    printed_margin = None if statement.printed is None else math.inf
    ratios, count = [], 0
    for row in rows:
        if not row.measured or row.measured.keys() != row.bound.keys():
            raise ValueError(
                f"{statement.name}: measured {sorted(row.measured)} but bound {sorted(row.bound)}"
            )
        for name, measured in row.measured.items():
            count += 1
            distance = margin(statement.relation, measured, row.bound[name], statement.floor)
            if distance < worst[0]:
                label = ", ".join(f"{key} {value}" for key, value in row.case.items())
                worst = (
                    distance,
                    f"{name} ({label})" if label else name,
                    measured,
                    row.bound[name],
                )
            if statement.relation != "==" and row.bound[name] > 0:
                ratios.append(measured / row.bound[name])
            if row.printed is not None and printed_margin is not None and name in row.printed:
                printed_margin = min(
                    printed_margin,
                    margin(statement.relation, measured, row.printed[name], statement.floor),
                )
    holds = worst[0] >= -statement.slack
    if printed_margin is not None:
        holds &= printed_margin < -statement.slack
    verdict: Verdict = "violated"
    if holds:
        verdict = "illustrated" if statement.almost_sure else "verified"
    return Result(
        statement=statement,
        level=level,
        seed=seed,
        rows=tuple(rows),
        verdict=verdict,
        quantities=count,
        quantity=worst[1],
        measured=worst[2],
        bound=worst[3],
        margin=worst[0],
        printed_margin=printed_margin,
        tightness=float(np.median(ratios)) if ratios else None,
        summary={} if statement.summarise is None else statement.summarise(rows),
    )
