"""What a solve takes of memory is no more than `rows_within` promises, for both solvers."""

import tracemalloc

import numpy as np
import pytest

import solvers.program
from retrain.methods.net_trim.task import rows_within
from retrain.stream.stream import LayerSpec
from solvers import Status, solve_admm, solve_newton, trim_program

SHAPES = [(5000, 40, 150), (5000, 250, 50)]


def layer(n_samples, n_in, n_out, dtype):
    rng = np.random.default_rng(0)
    inputs = np.maximum(rng.standard_normal((n_samples, n_in + 1)), 0).astype(dtype)
    inputs[:, -1] = 1
    weight = rng.standard_normal((n_in + 1, n_out)) * (rng.random((n_in + 1, n_out)) < 0.3)
    targets = np.maximum(inputs @ weight.astype(dtype), 0)
    return trim_program(
        inputs,
        targets,
        epsilon=0.05 * float(np.linalg.norm(targets)),
        free_rows=(n_in,),
        old_weight=weight.astype(dtype),
    )


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("solver", ["admm", "newton"])
def test_a_solve_stays_within_its_memory(solver, dtype, shape, monkeypatch):
    # What does not grow with the rows, blocks of the certificate, is kept small beside them.
    monkeypatch.setattr(solvers.program, "_BLOCK_ENTRIES", 20_000)
    monkeypatch.setattr(solvers.program, "_ROWS", 256)
    monkeypatch.setattr("solvers.newton.work.CHUNK", 256)
    n_samples, n_in, n_out = shape
    solve = {"admm": solve_admm, "newton": solve_newton}[solver]
    solve(layer(200, 8, 4, dtype), tolerance=1e-2)  # what compiles once is not the solve's memory
    tracemalloc.start()
    try:
        program = layer(*shape, dtype)
        tracemalloc.reset_peak()
        result = solve(program, tolerance=1e-2, violation_tolerance=1e-3)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert result.status is Status.SOLVED
    spec = LayerSpec("fc", "linear", (n_in, n_out), bias=True, follows="relu")
    assert rows_within(spec, peak, np.dtype(dtype).itemsize, solver) <= n_samples


def test_sixty_thousand_samples_of_a_thousand_units_fit_into_4_gib():
    spec = LayerSpec("fc2", "linear", (300, 1000), bias=True, follows="relu")
    for solver in ("admm", "newton"):
        assert rows_within(spec, 4 * 2**30, 4, solver) >= 60_000
