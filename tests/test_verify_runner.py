"""Judging, running, resuming and writing; the statements themselves are tested beside."""

import json
import math
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
from filelock import FileLock

from retrain.verify import HEADINGS, run, runner, select, statements, table
from retrain.verify.statement import Row, Statement, judge, margin


def draw(case, rng):
    return case["scale"] * rng.standard_normal(4)


TOY = Statement(
    name="toy/triangle",
    paper="a paper",
    number="theorem 0",
    sentence="The sum's size is at most the sum of the sizes.",
    formula="|sum x| <= sum |x|",
    assumptions=("real numbers",),
    cases=lambda level: [{"scale": float(k)} for k in range(1, 4 if level == "quick" else 9)],
    sample=draw,
    measure=lambda x: {"size": abs(float(x.sum()))},
    bound=lambda x: {"size": float(np.abs(x).sum())},
)


def row(measured, bound, printed=None):
    return Row({"k": 1}, {"a": measured}, {"a": bound}, printed, {}, 0.0)


@pytest.mark.parametrize(
    ("relation", "measured", "bound", "expected"),
    [
        ("<=", 1.0, 2.0, 0.5),
        ("<=", 2.0, 1.0, -0.5),
        (">=", 2.0, 1.0, 0.5),
        (">=", 1.0, 2.0, -0.5),
        ("==", 1.0, 2.0, -0.5),
        ("==", 2.0, 1.0, -0.5),
        ("<=", 0.0, 0.0, 0.0),
        ("<=", -2.0, -1.0, 0.5),
        ("<=", 5.0, math.inf, 1.0),
        ("<=", math.inf, 5.0, -1.0),
        ("<=", math.nan, 5.0, -math.inf),
        ("==", 1.0, math.nan, -math.inf),
    ],
)
def test_margin(relation, measured, bound, expected):
    assert margin(relation, measured, bound, 0.0) == expected


def test_margin_below_the_floor_counts_as_zero():
    assert margin("==", 1e-12, 0.0, 1.0) == -1e-12


def test_judge_takes_the_worst_quantity():
    rows = [row(0.1, 1.0), row(0.9, 1.0), row(0.5, 1.0)]
    result = judge(TOY, "quick", 0, rows)
    assert (result.verdict, result.measured, result.quantities) == ("verified", 0.9, 3)
    assert result.quantity == "a (k 1)"
    assert result.tightness == 0.5
    assert judge(TOY, "quick", 0, [*rows, row(1.01, 1.0)]).verdict == "violated"
    assert judge(replace(TOY, slack=0.02), "quick", 0, [row(1.01, 1.0)]).verdict == "verified"
    assert judge(TOY, "quick", 0, [row(math.nan, 1.0)]).verdict == "violated"
    assert judge(replace(TOY, almost_sure=True), "quick", 0, rows).verdict == "illustrated"


def test_judge_wants_the_printed_form_to_fail():
    erratum = replace(TOY, printed=lambda x: {"a": 0.0}, erratum="zero is no bound")
    fails, holds = row(0.5, 1.0, {"a": 0.4}), row(0.5, 1.0, {"a": 0.6})
    assert judge(erratum, "quick", 0, [fails, holds]).verdict == "verified"
    assert judge(erratum, "quick", 0, [fails]).printed_margin == pytest.approx(-0.2)
    assert judge(erratum, "quick", 0, [holds]).verdict == "violated"
    assert judge(erratum, "quick", 0, [row(2.0, 1.0, {"a": 0.4})]).verdict == "violated"


def test_judge_errors():
    with pytest.raises(ValueError, match=r"rows: toy/triangle has none to judge"):
        judge(TOY, "quick", 0, [])
    odd = Row({}, {"a": 1.0}, {"b": 1.0}, None, {}, 0.0)
    with pytest.raises(ValueError, match=r"measured \['a'\] but bound \['b'\]"):
        judge(TOY, "quick", 0, [odd])


def test_select():
    names = [statement.name for statement in statements()]
    assert [statement.name for statement in select([])] == names
    assert [s.name for s in select(["net-trim/theorem-3"])] == ["net-trim/theorem-3"]
    assert {s.name.split("/")[0] for s in select(["l-obs", "itp"])} == {"l-obs", "itp"}
    assert all("theorem" in s.name for s in select(["*/theorem-*"]))
    # In the order of the list, whatever the order asked for, and once.
    chosen = [s.name for s in select(["itp/equation-15", "net-trim", "net-trim/theorem-1"])]
    assert chosen == [n for n in names if n.startswith("net-trim/") or n == "itp/equation-15"]
    with pytest.raises(ValueError, match=r"no statement is called 'theorem-9'; there are net-trim"):
        select(["theorem-9"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"level": "slow"}, "level: got 'slow', want 'quick' or 'full'"),
        ({"jobs": 0}, "jobs: got 0, want a whole number >= 1"),
        ({"seed": -1}, "seed: got -1, want a whole number >= 0"),
    ],
)
def test_run_errors(options, message):
    with pytest.raises(ValueError, match=message):
        run(["toy"], among=[TOY], **options)


def test_run_leaves_its_record(tmp_path):
    seen = []
    results = run([], among=[TOY], out=tmp_path, seed=3, on_result=seen.append)
    document = json.loads((tmp_path / "verify.json").read_text())
    assert seen == results
    assert (document["level"], document["seed"], document["violated"]) == ("quick", 3, [])
    (record,) = document["results"]
    for key in ("sentence", "formula", "assumptions", "seed", "verdict", "worst", "rows", "paper"):
        assert record[key] is not None
    assert [entry["case"] for entry in record["rows"]] == TOY.cases("quick")
    assert record["worst"]["measured"] == results[0].measured
    assert document["versions"]["numpy"] == np.__version__
    assert not list(tmp_path.glob("**/*.part*"))


def test_the_record_names_what_is_violated(tmp_path):
    broken = replace(TOY, bound=lambda x: {"size": 0.0})
    (result,) = run([], among=[broken], out=tmp_path)
    assert result.verdict == "violated"
    assert json.loads((tmp_path / "verify.json").read_text())["violated"] == ["toy/triangle"]


def test_infinities_are_json(tmp_path):
    endless = replace(TOY, bound=lambda x: {"size": math.inf})
    run([], among=[endless], out=tmp_path)
    record = json.loads((tmp_path / "verify.json").read_text())["results"][0]
    assert record["worst"]["bound"] == "inf"
    # And they come back as numbers when the run is resumed.
    assert run([], among=[endless], out=tmp_path)[0].bound == math.inf


def test_same_digits_whatever_the_jobs_and_the_choice(tmp_path):
    names = ["gates/equation-26", "net-trim/theorem-3", "itp/common-descent"]
    chosen = [
        replace(s, cases=lambda level, s=s: [*s.cases("quick")][:2])
        for s in select(names)
        if s.name != "net-trim/theorem-3"
    ]
    run([], among=chosen, out=tmp_path / "one", jobs=1, seed=7)
    run([], among=chosen, out=tmp_path / "two", jobs=2, seed=7)
    first, second = (tmp_path / name / "verify.json" for name in ("one", "two"))
    assert first.read_bytes() == second.read_bytes()
    (alone,) = run([], among=chosen[:1], seed=7)
    together = json.loads(first.read_text())["results"][0]
    assert [row.measured for row in alone.rows] == [row["measured"] for row in together["rows"]]
    (other,) = run([], among=chosen[:1], seed=8)
    assert other.measured != alone.measured


class Counter:
    """A sample that counts its calls, and stops at a given one."""

    def __init__(self, stop=None):
        self.calls, self.stop = 0, stop

    def __call__(self, case, rng):
        self.calls += 1
        if self.calls == self.stop:
            raise KeyboardInterrupt
        return draw(case, rng)


def test_resume(tmp_path):
    whole = run([], among=[TOY], out=tmp_path / "whole")
    cut = Counter(stop=3)
    with pytest.raises(KeyboardInterrupt):
        run([], among=[replace(TOY, sample=cut)], out=tmp_path / "cut")
    assert not (tmp_path / "cut" / "verify.json").exists()
    rest = Counter()
    resumed = run([], among=[replace(TOY, sample=rest)], out=tmp_path / "cut")
    assert rest.calls == 1
    assert resumed[0].rows == whole[0].rows
    first, second = (tmp_path / name / "verify.json" for name in ("whole", "cut"))
    assert first.read_bytes() == second.read_bytes()
    # Done is done.
    again = Counter()
    run([], among=[replace(TOY, sample=again)], out=tmp_path / "cut")
    assert again.calls == 0


def test_a_line_cut_short_is_done_again(tmp_path):
    run([], among=[TOY], out=tmp_path)
    rows = tmp_path / "rows" / "toy-triangle.jsonl"
    rows.write_text(rows.read_text()[:-20])
    counter = Counter()
    run([], among=[replace(TOY, sample=counter)], out=tmp_path)
    assert counter.calls == 1
    assert [json.loads(line)["index"] for line in rows.read_text().splitlines()] == [0, 1, 2]


@pytest.mark.parametrize("change", [{"seed": 1}, {"level": "full"}])
def test_rows_of_another_run_are_done_again(tmp_path, change):
    run([], among=[TOY], out=tmp_path)
    counter = Counter()
    run([], among=[replace(TOY, sample=counter)], out=tmp_path, **change)
    assert counter.calls == (8 if "level" in change else 3)


def test_rows_of_another_code_are_done_again(tmp_path, monkeypatch):
    run([], among=[TOY], out=tmp_path)
    monkeypatch.setattr(runner, "versions", lambda: {"numpy": "0"})
    counter = Counter()
    run([], among=[replace(TOY, sample=counter)], out=tmp_path)
    assert counter.calls == 3


def test_one_run_at_a_time(tmp_path):
    (tmp_path / "rows").mkdir()
    with (
        FileLock(tmp_path / ".lock"),
        pytest.raises(ValueError, match="out: another run is at work in"),
    ):
        run([], among=[TOY], out=tmp_path)
    assert run([], among=[TOY], out=tmp_path)[0].verdict == "verified"


def test_table():
    results = run([], among=[TOY, replace(TOY, name="toy/other")])
    rows = table(results)
    assert all(len(entry) == len(HEADINGS) for entry in rows)
    assert [entry[0] for entry in rows] == ["toy/triangle", "toy/other"]
    assert rows[0][1] == "verified"
    assert rows[0][4] == "<="


@pytest.mark.parametrize(
    "name",
    [
        "net-trim/theorem-1",
        "net-trim/theorem-3",
        "net-trim/phase-transition",
        "l-obs/theorem-3-2",
        "gates/theorem-5-3",
    ],
)
def test_pictures(tmp_path, name):
    (statement,) = select([name])
    few = {"sizes": 2, "inside": 1, "trials": 3}

    def cases(level):
        every = list(statement.cases(level))
        chosen = every[:3] + every[-1:]
        if name == "gates/theorem-5-3":
            chosen = every[:1]
        return [{**c, **{k: v for k, v in few.items() if k in c}} for c in chosen]

    run([], among=[replace(statement, cases=cases)], out=tmp_path)
    picture = tmp_path / f"{name.replace('/', '-')}.png"
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert picture.stat().st_size > 5000
    assert not list(tmp_path.glob("*.part*"))


def test_the_core_stays_light():
    code = (
        "import sys, retrain.verify as v; v.statements(); "
        "print([m for m in ('torch', 'matplotlib', 'cvxpy') if m in sys.modules])"
    )
    answer = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert answer.stdout.strip() == "[]"
