"""Second order: prune a layer so that its output changes least. Arrays in, arrays out.

One layer is a `LayerProblem` (weight, Hessian, what may be zero); how much goes is a `Pattern`;
what comes back is a `Pruned`. `METHODS` lists the complete methods by name.
"""

from __future__ import annotations

from solvers.obs.greedy import (
    Allocation,
    RemovalPath,
    allocate,
    allocate_to_loss,
    path_support,
    pattern_support,
    prune_greedy,
    prune_greedy_to_tolerance,
    removal_path,
)
from solvers.obs.hessian import (
    HessianSum,
    add_rows,
    dead_inputs,
    decoupled,
    hessian_of,
    inverse_cholesky,
    inverse_recursion,
    mean_diagonal,
    mean_hessian,
)
from solvers.obs.large import admm_support, prune_large
from solvers.obs.methods import METHODS, Method, prune, prune_best, prune_swaps
from solvers.obs.one_shot import Sensitivities, prune_one_shot, prune_to_tolerance, sensitivities
from solvers.obs.pattern import (
    Pattern,
    kept_by,
    layer_count,
    n_of_m,
    parse_pattern,
    per_layer,
    per_layer_count,
    per_unit,
    whole_inputs,
)
from solvers.obs.problem import LayerProblem, Pruned, layer_error, layer_problem
from solvers.obs.refit import refit, refit_cg
from solvers.obs.structured import InputPath, input_path, prune_inputs
from solvers.obs.swaps import improve
from solvers.obs.sweep import prune_sweep

__all__ = [
    "METHODS",
    "Allocation",
    "HessianSum",
    "InputPath",
    "LayerProblem",
    "Method",
    "Pattern",
    "Pruned",
    "RemovalPath",
    "Sensitivities",
    "add_rows",
    "admm_support",
    "allocate",
    "allocate_to_loss",
    "dead_inputs",
    "decoupled",
    "hessian_of",
    "improve",
    "input_path",
    "inverse_cholesky",
    "inverse_recursion",
    "kept_by",
    "layer_count",
    "layer_error",
    "layer_problem",
    "mean_diagonal",
    "mean_hessian",
    "n_of_m",
    "parse_pattern",
    "path_support",
    "pattern_support",
    "per_layer",
    "per_layer_count",
    "per_unit",
    "prune",
    "prune_best",
    "prune_greedy",
    "prune_greedy_to_tolerance",
    "prune_inputs",
    "prune_large",
    "prune_one_shot",
    "prune_swaps",
    "prune_sweep",
    "prune_to_tolerance",
    "refit",
    "refit_cg",
    "removal_path",
    "sensitivities",
    "whole_inputs",
]
