"""The bench of solvers: forms, peers, problems, rows, tables."""

import argparse
import json
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from shared_data import LENET, MNIST, SHARED

from bench import answers, curve, peers, solver_tables, solvers
from bench.forms import FORMS
from bench.peers import PEERS, solve_unit
from bench.problems import SETS, Problem, problem, some_units, typical_units
from solvers import solve_newton

PAIRS = [(name, form) for name, peer in PEERS.items() for form in peer.forms]


@pytest.fixture(scope="module")
def unit():
    program = some_units(problem("correlated-30x150x8").make().program, [3])
    optimum = solve_newton(program, tolerance=1e-9).certificate.objective
    return program, float(optimum[0])


@pytest.mark.parametrize(("name", "form"), PAIRS)
def test_every_form_of_every_peer_has_the_optimum(unit, name, form):
    if not PEERS[name].available:
        pytest.skip(f"{PEERS[name].package} is not installed")
    program, optimum = unit
    attempt = solve_unit(name, program, (1e-6, 1e-6), form)
    assert attempt.certified
    assert float(attempt.certificate.objective[0]) == pytest.approx(optimum, rel=2e-6)
    assert attempt.cpu_seconds > 0


@pytest.mark.parametrize("name", [name for name, peer in PEERS.items() if peer.ball])
def test_a_ball_is_stated_for_all_units_at_once(name):
    program = problem("known-12x80x5-ball").make()
    attempt = solve_unit(name, program.program, (1e-5, 1e-5), "lifted")
    assert attempt.certified
    objective = float(attempt.certificate.objective)
    assert objective == pytest.approx(float(program.optimum), rel=1e-4)


@pytest.mark.parametrize("form", FORMS)
def test_a_free_row_has_no_penalty_in_any_form(form):
    program = some_units(problem("digits-65x60x8").make().program, [2])
    attempt = solve_unit("clarabel" if form != "gram" else "osqp", program, (1e-5, 1e-5), form)
    assert attempt.certified
    best = solve_newton(program, tolerance=1e-8).certificate.objective
    assert attempt.certificate.objective == pytest.approx(best, rel=1e-4)


def test_the_ladder_ends_with_the_first_accuracy_that_is_certified(unit):
    program, _ = unit
    form = FORMS["lifted"](program)
    tried = list(peers.attempts(PEERS["scs"], form, program, (1e-9, 1e-9)))
    assert [attempt.accuracy for attempt in tried] == list(PEERS["scs"].ladder)
    chosen = solve_unit("scs", program, (1e-3, 1e-3), "lifted")
    assert chosen.certified
    first = next(attempt for attempt in tried if attempt.certificate.gap[0] <= 1e-3)
    assert chosen.accuracy <= first.accuracy
    again = solve_unit("scs", program, (1e-3, 1e-3), "lifted", first=chosen.accuracy)
    assert again.accuracy == chosen.accuracy


def test_a_solver_that_lies_is_found_out(unit, monkeypatch):
    program, _ = unit

    def lie(form, accuracy):
        return peers.Solution(
            np.zeros(len(form.linear)), np.zeros(len(form.bound)), np.zeros(0), 1, "solved"
        )

    monkeypatch.setitem(PEERS, "liar", replace(PEERS["osqp"], solve=lie))
    attempt = solve_unit("liar", program, (1e-2, 1e-2), "gram")
    assert not attempt.certified
    assert attempt.accuracy == PEERS["osqp"].ladder[-1]


# --- problems -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["known-30x200x10", "known-20x120x6-ball"])
def test_the_known_optimum_is_the_optimum(name):
    instance = problem(name).make()
    certificate = solve_newton(instance.program, tolerance=1e-8).certificate
    assert np.all(certificate.within(1e-8, 1e-8))
    np.testing.assert_allclose(certificate.objective, instance.optimum, rtol=1e-7)


def test_names_have_sizes_and_forms_and_the_same_name_the_same_data():
    program = problem("relu2-20x50x7-ball").make().program
    assert program.shape == (50, 20, 7)
    assert program.epsilon > 0
    again = problem("relu2-20x50x7-ball").make().program
    assert np.array_equal(program.inputs, again.inputs)
    assert np.array_equal(program.level, again.level)
    names = {name for names in SETS.values() for name in names if not name.startswith("lenet")}
    assert all(problem(name).name == name for name in names)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("mnist", "want FAMILY"),
        ("iid-3x4", "want FAMILY"),
        ("lenet-fc1", "lenet-fc1: wants --data DIR"),
    ],
)
def test_unknown_problems_are_refused(name, said, capsys):
    with pytest.raises(ValueError, match=said):
        problem(name)
    assert solvers.main(["--problems", name]) == 2
    assert said in capsys.readouterr().err


def test_sizes_that_a_family_does_not_have():
    with pytest.raises(ValueError, match="known: got 60 units, want at most a quarter"):
        problem("known-10x100x60").make()
    with pytest.raises(ValueError, match="digits: has 64 inputs and a bias, 65, got 64"):
        problem("digits-64x100x8").make()


@pytest.mark.shared_data(LENET, *MNIST)
def test_the_layers_of_lenet():
    data = SHARED / "data"
    program = problem("lenet-fc3-200-ball", data).make().program
    assert program.shape == (200, 101, 10)
    assert program.active.all()
    assert problem("lenet-fc1-50", data).make().program.shape == (50, 785, 300)
    # The old weights fit exactly, so the program is feasible and the layer is the network's own.
    assert program.certificate(program.old_weight, 0 * program.level).violation < 1e-5
    assert answers.can_state("clarabel", program)
    assert not answers.can_state("clarabel", problem("iid-4x5000x5-ball").make().program)


def test_typical_units_are_of_all_sizes():
    program = problem("iid-10x60x30").make().program
    counts = program.active.sum(axis=0)
    low, middle, high = (counts[unit] for unit in typical_units(program, 3))
    assert counts.min() <= low <= middle <= high <= counts.max()
    assert len(typical_units(program, 99)) == 30


# --- rows and tables ----------------------------------------------------------------------------


def test_rows_are_kept_and_not_run_again(tmp_path, capsys, monkeypatch):
    out = tmp_path / "rows.jsonl"
    arguments = ["--problems", "iid-10x40x4", "known-8x40x4", "--solvers", "newton", "clarabel"]
    arguments += ["osqp:gram", "--gap", "1e-3", "1e-4", "--units", "2", "--out", str(out)]
    assert solvers.main(arguments) == 0
    first = capsys.readouterr().out
    assert "losses" in first
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert len(rows) == 2 * 2 * 3
    for row in rows:
        assert row["certified"]
        assert row["gap"] <= row["tolerance"]
        assert row["cpu_seconds_a_unit"] > 0
        assert row["passes"] > 0
        assert row["solved_units"] == (4 if row["solver"] == "newton" else 2)
    (known,) = [r for r in rows if r["error"] is not None and r["tolerance"] == 1e-4]
    assert abs(known["error"]) <= 2e-4
    assert out.with_suffix(".png").stat().st_size > 10_000
    # A kill in the middle of a line, and the rest is not run again.
    text = out.read_text()
    out.write_text(text[: text.rindex("{") + 40])
    measured = []
    real = solvers.measure
    monkeypatch.setattr(solvers, "measure", lambda *a: measured.append(a[1]) or real(*a))
    assert solvers.main(arguments) == 0
    assert len(measured) == 1
    # Other code makes other rows.
    monkeypatch.setattr(solvers, "environment", lambda kind: {"code": "new", "versions": {}})
    assert solvers.main([*arguments, "--solvers", "newton"]) == 0
    assert len(measured) == 1 + 4


def test_absent_peers_are_named(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(PEERS, "piqp", replace(PEERS["piqp"], package="no_such_package"))
    arguments = ["--problems", "iid-6x20x2", "--solvers", "newton", "piqp", "--out"]
    assert solvers.main([*arguments, str(tmp_path / "rows.jsonl")]) == 0
    out = capsys.readouterr().out
    assert "absent: piqp (package no_such_package cannot be imported)" in out
    assert "piqp" not in out.replace("absent: piqp", "")


def test_unknown_solvers_are_refused(capsys):
    assert solvers.main(["--solvers", "gurobi"]) == 2
    assert "solver: want one of newton, admm" in capsys.readouterr().err
    assert solvers.main(["--solvers", "piqp:cubic"]) == 2


def row(solver, seconds, *, name="iid", certified=True, tolerance=1e-4, **changes):
    return {
        "problem": name,
        "tolerance": tolerance,
        "violation_tolerance": tolerance,
        "solver": solver,
        "cpu_seconds_a_unit": seconds,
        "certified": certified,
        "gap": 1e-5,
        "violation": None,
        "status": "solved",
        "form": "regularised",
        "inputs": 10,
        "samples": 100,
        "layer_units": 3,
        "iterations": 50,
        **changes,
    }


def test_verdicts_take_the_fastest_rival_that_is_certified():
    rows = [row("newton", 0.01), row("osqp", 0.5, certified=False), row("scs", 2), row("piqp", 1.5)]
    (line,) = solver_tables.verdicts(rows)
    assert "150.0 times as fast a unit as the fastest rival, piqp (want 100: met)" in line
    (line,) = solver_tables.verdicts([row("newton", 0.02), row("piqp", 1.5)])
    assert "(want 100: MISSED)" in line
    assert solver_tables.verdicts([row("newton", 0.02, certified=False), row("piqp", 1)]) == []


def test_gap_and_violation_may_be_asked_for_apart():
    assert solvers.parse_limits("1e-3") == (1e-3, 1e-3)
    assert solvers.parse_limits("1e-3,1e-4") == (1e-3, 1e-4)
    for text in ("0", "1e-3,1e-4,1e-5", "2"):
        with pytest.raises(argparse.ArgumentTypeError, match="want GAP"):
            solvers.parse_limits(text)
    both = {"name": "lenet-fc2-ball", "tolerance": 1e-3, "violation_tolerance": 1e-4}
    taken = [
        row("newton", 1, passes=n, certified=c, **both) for n, c in ((299, 1), (301, 1), (9, 0))
    ]
    taken += [row("admm", 1, passes=1, **both), row("newton", 1, passes=1)]
    lines = solver_tables.passes(taken)
    assert [line.rpartition(": ")[2] for line in lines] == ["met)", "MISSED)", "MISSED)"]
    assert lines[0].startswith("lenet-fc2-ball at 0.001 (violation 0.0001): newton took 299 passes")


def test_losses_and_means():
    rows = [row("newton", 0.5), row("piqp", 0.1), row("scs", 1.0, certified=False)]
    lines = solver_tables.losses(rows)
    assert any("scs missed 0.0001" in line for line in lines)
    assert any("piqp is 5.0 times as fast as the fastest of ours" in line for line in lines)
    text = "\n".join(solver_tables.means(rows))
    assert text.index("piqp") < text.index("newton") < text.index("scs")
    assert "60.00000 s a unit,   0% of 1 certified" in text


def test_the_profile_is_of_problems_that_all_have_tried(tmp_path):
    picture = tmp_path / "profile.png"
    rows = [row("newton", 0.5), row("piqp", 0.1), row("newton", 0.1, name="relu2")]
    assert solver_tables.profile(rows, picture)
    assert picture.stat().st_size > 10_000
    assert not solver_tables.profile(rows[1:], picture)
    assert not solver_tables.profile(rows[:1], picture)


@given(st.lists(st.floats(1e-4, 100), min_size=1, max_size=8))
def test_the_shifted_mean_lies_between(values):
    mean = solver_tables.shifted_mean(values)
    assert min(values) - 1e-9 <= mean <= max(values) + 1e-9


def test_exponents_are_of_the_layer():
    rows = [
        row("newton", 1e-4 * n**1.5, name=f"iid-{n}x5000x3", inputs=n, samples=5000)
        for n in (64, 128, 256)
    ]
    (line,) = solver_tables.exponents(rows)
    assert line.startswith("cost in N by newton at 0.0001 (64 to 256")
    assert "exponent 1.50, of ADMM's flops at 100 iterations 1.24" in line
    assert solver_tables.slope([1, 2, 4], [3, 12, 48]) == pytest.approx(2)


def test_the_curve_of_a_layer(tmp_path, capsys):
    out = tmp_path / "curve.jsonl"
    arguments = [
        "--problems",
        "iid-12x60x4-ball",
        "--radii",
        "0.4",
        "0.2",
        "0.1",
        "--out",
        str(out),
    ]
    assert curve.main(arguments) == 0
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [entry["radius"] for entry in rows] == [0.4, 0.2, 0.1]
    residuals = [entry["relative_residual"] for entry in rows]
    np.testing.assert_allclose(residuals, [0.4, 0.2, 0.1], rtol=2e-3)
    assert rows[0]["sparsity"] > rows[2]["sparsity"]
    printed = capsys.readouterr().out
    assert curve.main(arguments) == 0
    assert capsys.readouterr().out == printed
    assert len(out.read_text().splitlines()) == 3
    assert curve.main(["--problems", "nothing"]) == 2
    with pytest.raises(ValueError, match="want one with a ball to follow"):
        curve.follow(problem("iid-6x20x2"), [0.1], 1e-2, {})
    assert isinstance(problem("iid-6x20x2"), Problem)
