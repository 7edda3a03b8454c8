"""Write a solver, run it beside ours, and have its answers certified by the program.

The solver below is one short function: the method of multipliers for the ceilings, with accelerated
proximal gradient steps inside. It solves the regularised form

    minimise  penalty(u) + fit_weight |(Xu - y)_Omega|^2   subject to  Xu <= v off Omega

With the multiplier nu >= 0 off Omega, both terms have one curvature, 2 fit_weight X^T X:

    penalty(u) + fit_weight |(Xu - y)_Omega|^2 + fit_weight |(Xu - v + nu / (2 fit_weight))_+|^2

It need not prove anything: `program.certificate` judges the pair that it returns.

The problems are the bench's, which is not installed with the package. So run this from the root of
the repository, ``python -m examples.a_solver_of_your_own``.
"""

import time

import numpy as np

from bench.problems import problem
from solvers import RegularisedProgram, SolveResult, solve_admm
from solvers.result import judge


def solve_proximal(
    program: RegularisedProgram, *, tolerance: float = 1e-4, max_iterations: int = 20_000
) -> SolveResult:
    """Solve the regularised form by the method of multipliers with accelerated proximal steps."""
    started = time.perf_counter()
    inputs, active, level = program.inputs, program.active, program.level
    slope = 2 * program.fit_weight
    step = 1 / (slope * np.linalg.norm(inputs, 2) ** 2)
    rows = program.penalised  # all rows but the bias, which has no penalty
    weight = ahead = np.zeros(program.shape[1:])
    nu = np.zeros(level.shape)  # the multiplier of the ceilings; zero on Omega
    momentum = 1.0
    for iteration in range(1, max_iterations + 1):
        force = slope * (inputs @ ahead - level) + nu
        force = np.where(active, force, np.maximum(force, 0))
        new = ahead - step * (inputs.T @ force)
        new[rows] = program.penalty.prox(new[rows], step)
        if np.sum((ahead - new) * (new - weight)) > 0:  # the momentum points uphill: start afresh
            momentum = 1.0
        following = (1 + np.sqrt(1 + 4 * momentum**2)) / 2
        ahead = new + (momentum - 1) / following * (new - weight)
        weight, momentum = new, following
        if iteration % 50 == 0:
            multiplier = slope * (inputs @ weight - level) + nu
            multiplier = np.where(active, multiplier, np.maximum(multiplier, 0))
            nu, ahead, momentum = np.where(active, 0, multiplier), weight, 1.0
            certificate = program.certificate(weight, multiplier)
            if certificate.within(tolerance, tolerance).all():
                break
    certified = certificate.within(tolerance, tolerance)
    return SolveResult(
        weight=weight,
        multiplier=multiplier,
        status=judge(
            certified,
            finite=bool(np.isfinite(certificate.objective).all()),
            exhausted=iteration == max_iterations,
        ),
        certificate=certificate,
        certified=certified,
        iterations=iteration,
        solver="proximal",
        setup_seconds=0.0,
        solve_seconds=time.perf_counter() - started,
    )


# The bench's problems are generated from a seed; `known` is built around a chosen optimum.
solve_admm(problem("iid-8x30x2").make().program)  # compiles, so that the times below are fair
for name in ("iid-60x300x40", "known-30x200x10", "digits-65x300x20"):
    instance = problem(name).make()
    program = instance.program
    print(f"{name}: inputs x samples x units")
    for solve in (solve_proximal, solve_admm):
        result = solve(program, tolerance=1e-4)
        # The verdict is the program's, whatever the solver says of itself.
        certificate = program.certificate(result.weight, result.multiplier)
        print(
            f"  {result.solver:9} {result.status.value:8} {result.iterations:6} iterations, "
            f"{result.solve_seconds:6.3f} s, objective {certificate.objective.sum():.4f}, "
            f"gap {certificate.gap.max():.0e}, violation {certificate.violation.max():.0e}, "
            f"certified {int(certificate.within(1e-4, 1e-4).sum())} of {program.shape[2]} units"
        )
    if instance.optimum is not None:
        print(f"  known optimum {instance.optimum.sum():.4f}")
