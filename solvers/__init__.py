"""Solvers of the layer programs: arrays in, arrays out.

This package knows no network, no file and no torch module; its arrays may be numpy's or torch's.
"""

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
