"""Steps by increments: plain steps but for rounding, which vanishes; and what they make of ADMM."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from instances import of_a_layer

from bench.problems import correlated, in_single_precision, relu2
from solvers import Status, prepare, solve_admm
from solvers.admm.increments import step_by_increments, walk_by_increments
from solvers.admm.solve import splitting_of
from solvers.admm.splitting import Splitting, plain_walk, start, step
from solvers.scaling import Scaling

FORMS = ("constrained", "regularised")
STATE = ("u", "z", "p", "q", "w")


def under_way(program, steps=30):
    """A splitting of the program, and its state after plain steps."""
    factor = prepare(program.inputs)
    scaling = Scaling.of(program, factor.sizes)
    splitting = Splitting.build(scaling, factor, program.inputs.dtype, relaxation=1.8)
    return splitting, plain_walk(splitting, start(splitting, factor, None), steps)


def copied(state):
    """The same state in arrays of its own, since walks overwrite theirs."""
    return replace(state, z=state.z.copy(), q=state.q.copy())


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", ["plain", "wide", "correlated"])
def test_an_increment_is_a_plain_step(form, kind):
    splitting, state = under_way(of_a_layer(0, form, kind=kind, bias=True))
    for _ in range(10):
        plain, _ = step(splitting, state)
        ours = step_by_increments(splitting, state)
        for name in STATE:
            np.testing.assert_allclose(getattr(ours, name), getattr(plain, name), atol=1e-11)
        state = ours


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", ["plain", "wide"])
def test_a_walk_is_its_steps(form, kind):
    splitting, state = under_way(of_a_layer(1, form, kind=kind, bias=True))
    walked = walk_by_increments(splitting, copied(state), 7)
    for _ in range(7):
        state = step_by_increments(splitting, state)
    for name in STATE:
        np.testing.assert_allclose(getattr(walked, name), getattr(state, name), atol=1e-11)


@pytest.mark.parametrize("form", FORMS)
def test_a_walk_on_tensors_is_the_walk_on_arrays(form):
    program = of_a_layer(2, form, bias=True)
    names = ("inputs", "active", "level", "old_weight")
    tensors = replace(program, **{n: torch.asarray(getattr(program, n)) for n in names})
    walked = [walk_by_increments(*under_way(each), 9) for each in (program, tensors)]
    for name in STATE:
        np.testing.assert_allclose(
            getattr(walked[1], name).numpy(), getattr(walked[0], name), atol=1e-11
        )


def off_by(splitting, state):
    """|p + tau X^T q| relative to |p|, in float64: zero but for rounding."""
    inputs = splitting.inputs.astype(float)
    return np.linalg.norm(state.p + splitting.tau * inputs.T @ state.q) / np.linalg.norm(state.p)


def test_what_float32_rounds_vanishes_with_the_changes():
    program = in_single_precision(correlated(150, 600, 10, ball=True).program)
    splitting, state = under_way(program, 1000)
    assert off_by(splitting, state) > 2e-5
    better = walk_by_increments(splitting, copied(state), 100)
    assert off_by(splitting, better) < 0.2 * off_by(splitting, state)


def test_float32_is_certified_without_float64(monkeypatch):
    """Plain steps stall above the tolerance in float32, those by increments do not."""
    program = in_single_precision(correlated(150, 600, 10, ball=True).program)
    monkeypatch.setattr("solvers.admm.solve.stalled", lambda *_: False)
    limits = {"tolerance": 3e-5, "max_iterations": 1000}
    assert solve_admm(program, **limits).status is Status.SOLVED
    monkeypatch.setattr("solvers.admm.solve.walk_by_increments", plain_walk)
    assert solve_admm(program, **limits).status is Status.ITERATION_LIMIT


def test_the_tuning_saves_iterations(monkeypatch):
    programs = [
        make(100, 600, 20, ball=ball).program
        for make in (correlated, relu2)
        for ball in (False, True)
    ]
    ours = [solve_admm(program, tolerance=1e-5) for program in programs]
    for name, plain in {
        "RELAXATION_BALL": 1.6,
        "EMPHASIS_BALL": 1.0,
        "EMPHASIS_CEILING": 1.0,
    }.items():
        monkeypatch.setattr(f"solvers.admm.solve.{name}", plain)
    textbook = [solve_admm(program, tolerance=1e-5) for program in programs]
    for one, other in zip(ours, textbook, strict=True):
        assert one.status is other.status is Status.SOLVED
        assert one.iterations <= other.iterations
        np.testing.assert_allclose(
            one.certificate.objective, other.certificate.objective, rtol=5e-5
        )
    total = [sum(result.iterations for result in each) for each in (ours, textbook)]
    assert total[0] < 0.85 * total[1]


def test_units_without_ceilings_keep_their_penalty_low():
    """Nothing can be violated there, and a larger rho made such a layer miss its iterations."""
    program = of_a_layer(3, "regularised", dtype=np.float32)
    everywhere = replace(program, active=np.ones_like(program.active))
    result = solve_admm(everywhere, tolerance=1e-3)
    assert result.status is Status.SOLVED
    splittings = []
    for each in (program, everywhere):
        factor = prepare(each.inputs)
        splittings.append(splitting_of(Scaling.of(each, factor.sizes), factor, float))
    np.testing.assert_array_equal(splittings[0].emphasis, np.where(program.active.all(0), 1, 2))
    np.testing.assert_array_equal(splittings[1].emphasis, np.ones(4))
