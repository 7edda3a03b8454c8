"""The optimality conditions of the layer programs, written apart from the solvers and the programs.

Each condition is a number that is zero at an optimum; a pair is accepted when all are below the
tolerance, relative to the objective or to the size of what is compared.
"""

import numpy as np

from solvers import L1, ElasticNet, Group, RegularisedProgram


def kkt_errors(program, weight, multiplier):
    """Every condition's error, by name."""
    X = np.asarray(program.inputs, dtype=float)
    level = np.asarray(program.level, dtype=float)
    active = np.asarray(program.active)
    u = np.asarray(weight, dtype=float)
    nu = np.asarray(multiplier, dtype=float)
    z, c = X @ u, X.T @ nu
    free = np.isin(np.arange(len(u)), program.free_rows)
    support = np.ones(u.shape, bool) if program.support is None else np.asarray(program.support)
    size = max(np.abs(level).max(), np.abs(z).max(), 1e-300)
    force = max(np.abs(nu).max(), 1e-300)
    errors = {
        "mask": np.abs(u[~support]).max(initial=0),
        "ceiling": np.maximum(z - level, 0)[~active].max(initial=0) / size,
        "sign": np.maximum(-nu, 0)[~active].max(initial=0) / force,
        "ceiling slackness": np.abs(nu * (z - level))[~active].max(initial=0) / (size * force),
        "free row": np.abs(c[free] * support[free]).max(initial=0)
        / (np.abs(X).sum(0).max() * force),
    }
    residual = np.where(active, z - level, 0)
    fitted = np.where(active, nu, 0)
    if isinstance(program, RegularisedProgram):
        errors["fit"] = np.abs(2 * program.fit_weight * residual - fitted).max() / force
    else:
        errors["ball"] = max(np.linalg.norm(residual) - program.epsilon, 0) / size
        aligned = program.epsilon * np.linalg.norm(fitted) - np.sum(fitted * residual)
        errors["ball slackness"] = abs(aligned) / (size * force)
    # Fenchel and Young: penalty(u) + conjugate(-c) + <c, u> >= 0, and zero at an optimum.
    u, c = np.where(support, u, 0)[~free], np.where(support, c, 0)[~free]
    if isinstance(program.penalty, L1):
        errors["domain"] = np.maximum(np.abs(c) - 1, 0).max()
        young = np.abs(u) + c * u
    elif isinstance(program.penalty, ElasticNet):
        ridge = program.penalty.ridge
        over = np.maximum(np.abs(c) - 1, 0)
        young = np.abs(u) + ridge / 2 * u**2 + over**2 / (2 * ridge) + c * u
    else:
        assert isinstance(program.penalty, Group)
        radius = program.penalty.weight
        errors["domain"] = np.maximum(np.linalg.norm(c, axis=1) / radius - 1, 0).max()
        young = radius * np.linalg.norm(u, axis=1) + (c * u).sum(1)
    errors["stationarity"] = np.abs(young).max() / max(np.abs(u).max(), 1e-300) if u.any() else 0.0
    return errors


def assert_kkt(program, weight, multiplier, tolerance):
    """Fail with the names of the conditions that do not hold."""
    wrong = {
        name: float(error)
        for name, error in kkt_errors(program, weight, multiplier).items()
        if not error <= tolerance
    }
    assert not wrong, f"optimality conditions off by more than {tolerance}: {wrong}"
