"""Net-Trim's statements on one layer's programs: proposition 1, feasibility, the paper's QP."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from retrain.stream.chain import Chain, forward, link_normalise
from retrain.verify.net_trim import PAPER, SLACK, VIOLATION, cascade, network_cases, trim
from retrain.verify.statement import Case, Level, Numbers, Statement
from solvers import solve_admm, solve_cvxpy, solve_osqp, trim_program
from solvers.program import RegularisedProgram

# Proposition 1 ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class OneLayer:
    """A ReLU layer, its targets and its new weights."""

    inputs: np.ndarray
    targets: np.ndarray
    new_weight: np.ndarray
    epsilon: float


def one_layer(case: Case, rng: np.random.Generator) -> OneLayer:
    """Solve (4) for one random layer; the radius is relative to |Y|_F."""
    inputs = rng.standard_normal((case["samples"], case["n_in"]))
    if case["rectified"]:
        inputs = np.maximum(inputs, 0)
    weight = rng.standard_normal((case["n_in"], case["n_out"]))
    targets = np.maximum(inputs @ weight, 0)
    epsilon = case["radius"] * float(np.linalg.norm(targets))
    program = trim_program(inputs, targets, epsilon=epsilon, old_weight=weight)
    if case["solver"] == "cvxpy":
        result = solve_cvxpy(program, violation_tolerance=VIOLATION)
    else:
        result = solve_admm(
            program, tolerance=1e-2, violation_tolerance=VIOLATION, max_iterations=100_000
        )
    # The old weights are feasible too, and stand in where a certificate is missing.
    new_weight = result.weight if result.certified.all() else weight
    return OneLayer(inputs, targets, new_weight, epsilon)


def layer_cases(level: Level) -> list[Case]:
    """Shapes, inputs of both signs and rectified, radii, and two solvers."""
    shapes = ((60, 15, 8), (20, 30, 5), (100, 10, 3))
    radii = (0.02, 0.2) if level == "quick" else (0.01, 0.05, 0.2, 0.5, 0.9)
    return [
        {
            "samples": samples,
            "n_in": n_in,
            "n_out": n_out,
            "rectified": rectified,
            "radius": radius,
            "solver": solver,
        }
        for samples, n_in, n_out in shapes
        for rectified in (False, True)
        for radius in radii
        for solver in ("admm", "cvxpy")
    ]


def layer_deviation(layer: OneLayer) -> Numbers:
    """|max(X What, 0) - Y|_F."""
    difference = np.maximum(layer.inputs @ layer.new_weight, 0) - layer.targets
    return {"deviation": float(np.linalg.norm(difference))}


# Feasibility of the cascade's programs ----------------------------------------------------------


@dataclass(frozen=True)
class CascadeLayer:
    """Data of (6) for the last layer: retrained inputs, targets, old weights, gamma = 1."""

    inputs: np.ndarray
    targets: np.ndarray
    old_weight: np.ndarray
    epsilon: float


def cascade_layer(case: Case, rng: np.random.Generator) -> CascadeLayer:
    """The last layer after the others have been retrained by the cascade."""
    run = cascade(case, rng)
    last = len(run.dense) - 1
    upstream = forward(run.new, run.inputs)[last - 1]
    targets = forward(run.dense, run.inputs)[last]
    dtype = np.dtype(case["dtype"])
    inputs, targets = upstream.astype(dtype), targets.astype(dtype)
    if run.dense.biases[last]:
        inputs = np.concatenate([inputs, np.ones((len(inputs), 1), dtype)], axis=1)
    old = run.dense.weights[last].astype(dtype)
    residual = np.where(targets > 0, inputs @ old - targets, 0)
    return CascadeLayer(inputs, targets, old, float(np.linalg.norm(residual)))


def old_weights_violation(layer: CascadeLayer) -> Numbers:
    """Violations of (6) by the old weights, as the program itself measures them."""
    program = trim_program(
        layer.inputs,
        layer.targets,
        epsilon=layer.epsilon,
        ceilings=layer.inputs @ layer.old_weight,
    )
    certificate = program.certificate(layer.old_weight, np.zeros_like(layer.targets))
    return {
        "ball": float(certificate.ball_violation),
        "ceilings": float(certificate.ceiling_violation),
    }


def rounding(layer: CascadeLayer) -> Numbers:
    """2e-7 in float32; 1e-12 in float64."""
    limit = 2e-7 if layer.inputs.dtype == np.float32 else 1e-12
    return {"ball": limit, "ceilings": limit}


def merged_layer(case: Case, rng: np.random.Generator) -> CascadeLayer:
    """A second layer that tells its samples apart by a unit that the first layer's retraining lost.

    h = x with x_1 from 1 to 2 and x_2 either 0 or 0.1; y = max(h_1 - 30 h_2, 0). Program (4) for
    the first layer drops the small h_2, and what remains of it cannot be zero for one half of the
    samples and fit the other, while the old weights still fit.
    """
    count = case["samples"]
    marked = np.arange(count) % 2 == 1
    inputs = np.stack([1 + rng.random(count), 0.1 * marked], axis=1)
    chain = Chain((np.eye(2), np.array([[1.0], [-30.0]])), follows=("relu", "relu"))
    chain = link_normalise(chain)[0]
    hidden, targets = forward(chain, inputs)
    radius = case["radius"] * float(np.linalg.norm(hidden[:, 1]))
    new = trim(chain, 0, inputs, hidden, None, radius)
    upstream = np.maximum(inputs @ new, 0)
    old = chain.weights[1]
    residual = np.where(targets > 0, upstream @ old - targets, 0)
    return CascadeLayer(upstream, targets, old, float(np.linalg.norm(residual)))


def smallest_residual(layer: CascadeLayer) -> Numbers:
    """The least |XU - Y| on Omega under zero ceilings, V = 0: more than epsilon is infeasible."""
    import cvxpy as cp

    active = layer.targets[:, 0] > 0
    weight = cp.Variable(layer.inputs.shape[1])
    scale = float(np.linalg.norm(layer.targets))
    fitted, target = layer.inputs[active] / scale, layer.targets[active, 0] / scale
    problem = cp.Problem(
        cp.Minimize(cp.norm(fitted @ weight - target)),
        [layer.inputs[~active] / scale @ weight <= 0],
    )
    problem.solve(solver="CLARABEL")
    return {"least residual": scale * float(problem.value)}


def cascade_cases(level: Level) -> list[Case]:
    """Cascades of both precisions."""
    chosen = [case for case in network_cases(level) if case["radius"] >= 0.1]
    return [{**case, "dtype": dtype} for case in chosen for dtype in ("float64", "float32")]


# The paper's QP ---------------------------------------------------------------------------------


def regularised_layer(case: Case, rng: np.random.Generator) -> RegularisedProgram:
    """A random layer's program (11)."""
    inputs = np.maximum(rng.standard_normal((case["samples"], case["n_in"])), 0)
    weight = rng.standard_normal((case["n_in"], 3))
    program = trim_program(
        inputs, np.maximum(inputs @ weight, 0), fit_weight=case["fit_weight"], old_weight=weight
    )
    assert isinstance(program, RegularisedProgram)
    return program


def objective_of_14(program: RegularisedProgram) -> Numbers:
    """Objective of (11) at OSQP's solutions of (14)."""
    result = solve_osqp(program, tolerance=1e-7, max_iterations=200_000)
    objective = program.objective(result.weight)
    return {f"unit {unit}": float(value) for unit, value in enumerate(objective)}


def objective_of_11(program: RegularisedProgram) -> Numbers:
    """Objective of (11), solved as written by cvxpy."""
    objective = program.objective(solve_cvxpy(program).weight)
    return {f"unit {unit}": float(value) for unit, value in enumerate(objective)}


def qp_cases(level: Level) -> list[Case]:
    """Fit weights over four decades."""
    weights = (0.1, 10.0) if level == "quick" else (0.01, 0.1, 1.0, 10.0, 100.0)
    return [{"samples": 50, "n_in": 12, "fit_weight": weight} for weight in weights]


STATEMENTS = (
    Statement(
        name="net-trim/proposition-1",
        paper=PAPER,
        number="proposition 1",
        sentence=(
            "Let What be the solution to (4). For Yhat = max(What^T X, 0) being the "
            "retrained layer "
            "response, |Yhat - Y|_F <= eps."
        ),
        formula="|max(X What, 0) - Y|_F <= eps",
        assumptions=("V = 0", "(4) solved by two solvers, violations within 1e-5"),
        cases=layer_cases,
        sample=one_layer,
        measure=layer_deviation,
        bound=lambda layer: {"deviation": layer.epsilon},
        slack=SLACK,
    ),
    Statement(
        name="net-trim/cascade-feasible",
        paper=PAPER,
        number="(6), (7)",
        sentence=(
            "Such program is not necessarily feasible and needs to be sufficiently slacked to "
            "warrant feasibility: (6) with eps_l as in (7)."
        ),
        formula="the old weights break no constraint of (6), (7) at gamma = 1 beyond rounding",
        assumptions=(
            "retrained inputs of a cascade, float64 and float32",
            "rounding allowed: 1e-12 in float64, 2e-7 in float32, relative as in the certificate",
        ),
        cases=cascade_cases,
        sample=cascade_layer,
        measure=old_weights_violation,
        bound=rounding,
    ),
    Statement(
        name="net-trim/cascade-unslacked",
        paper=PAPER,
        number="before (6)",
        sentence=(
            "One would ideally seek to address (5) with the modified constraint U in "
            "C_eps(Yhat^(l-1), Y^(l), 0). However, such program is not necessarily feasible."
        ),
        formula=(
            "an instance with min |(Yhat U - Y)_Omega|_F under Yhat U <= 0 off Omega above eps of "
            "(7), gamma = 1"
        ),
        assumptions=("built so that retraining the first layer merges samples",),
        cases=lambda level: [
            {"samples": samples, "radius": radius}
            for samples in (20, 60)
            for radius in ((1.5,) if level == "quick" else (1.2, 1.5, 3.0))
        ],
        sample=merged_layer,
        measure=smallest_residual,
        bound=lambda layer: {"least residual": layer.epsilon},
        relation=">=",
        slack=-1e-3,
    ),
    Statement(
        name="net-trim/equation-14",
        paper=PAPER,
        number="(12)-(14)",
        sentence=(
            "The convex program (13) [(12) is meant] is now cast as the standard quadratic program "
            "(14)."
        ),
        formula="optimum of (14) by OSQP = optimum of (11) by Clarabel",
        assumptions=("both solved to 1e-6",),
        cases=qp_cases,
        sample=regularised_layer,
        measure=objective_of_14,
        bound=objective_of_11,
        relation="==",
        slack=1e-5,
        floor=0.1,
    ),
)
