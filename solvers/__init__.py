"""Solvers of the layer programs: arrays in, arrays out.

This package knows no network, no file and no torch module; its arrays may be numpy's or torch's.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from solvers.admm.solve import prepare, solve_admm
    from solvers.newton.layer import solve_newton
    from solvers.path.count import solve_count
    from solvers.path.path import PathPoint, solve_path
    from solvers.penalties import L1, ElasticNet, Group, Penalty
    from solvers.program import ConstrainedProgram, RegularisedProgram, trim_program
    from solvers.qp import solve_osqp
    from solvers.reference import solve_cvxpy
    from solvers.result import Certificate, SolveResult, Status

__all__ = [
    "L1",
    "Certificate",
    "ConstrainedProgram",
    "ElasticNet",
    "Group",
    "PathPoint",
    "Penalty",
    "RegularisedProgram",
    "SolveResult",
    "Status",
    "prepare",
    "solve_admm",
    "solve_count",
    "solve_cvxpy",
    "solve_newton",
    "solve_osqp",
    "solve_path",
    "trim_program",
]

_MODULES = {
    "prepare": "solvers.admm.solve",
    "solve_admm": "solvers.admm.solve",
    "solve_newton": "solvers.newton.layer",
    "solve_count": "solvers.path.count",
    "PathPoint": "solvers.path.path",
    "solve_path": "solvers.path.path",
    "L1": "solvers.penalties",
    "ElasticNet": "solvers.penalties",
    "Group": "solvers.penalties",
    "Penalty": "solvers.penalties",
    "ConstrainedProgram": "solvers.program",
    "RegularisedProgram": "solvers.program",
    "trim_program": "solvers.program",
    "solve_osqp": "solvers.qp",
    "solve_cvxpy": "solvers.reference",
    "Certificate": "solvers.result",
    "SolveResult": "solvers.result",
    "Status": "solvers.result",
}
"""Where each name lives: loaded at first use, so that what solves nothing starts without numba."""


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_MODULES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
