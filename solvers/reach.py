"""Whether constraints can be met at all, as far as a dual bound tells.

Where no weights come within epsilon of the targets and under the ceilings, the dual is unbounded:
multipliers with X^T nu = 0 and -<nu, level> > epsilon |nu_Omega| prove any bound when they are
scaled. In floating point X^T nu is rounding, not zero, so what is proven is a large bound: weights
that meet the constraints, if there are any, have at least that objective. A program counts as
unreachable when its bound is a million times the objective of usual weights: in each entry the
larger of the old weight's size and of the weight with which that input by itself is as large as the
unit's targets.
"""

from __future__ import annotations

import numpy as np
from array_api_compat import array_namespace

from solvers.arrays import like, to_numpy
from solvers.program import Program, RegularisedProgram

_FAR = 1e6
"""How many times the usual objective counts as out of reach. Larger: fewer programs are told to be
unreachable. Smaller: hard ones might be told so wrongly. Chosen by hand."""


def far(program: Program) -> np.ndarray:
    """Return an objective that no weights of use have: the layer's, or each unit's in form (11).

    Parameters
    ----------
    program : ConstrainedProgram or RegularisedProgram
        The layer's program.

    Returns
    -------
    ndarray, shape () or (n_out,)
        A bound above it proves that the constraints are out of reach.
    """
    xp = array_namespace(program.inputs)
    wide = xp.astype(program.inputs, xp.float64)
    lengths = xp.sqrt(xp.sum(wide * wide, axis=0))
    targets = program.fitted_norms()
    targets = like(np.where(targets > 0, targets, program.scale_floor()), program.inputs)
    one = xp.ones_like(lengths)
    reach = xp.where(lengths > 0, 1 / xp.where(lengths > 0, lengths, one), 0 * one)
    weights = reach[:, None] * targets
    if program.old_weight is not None:
        weights = xp.maximum(weights, xp.abs(xp.astype(program.old_weight, xp.float64)))
    objective = to_numpy(program.penalty_value(weights))
    if isinstance(program, RegularisedProgram):
        misfit = to_numpy(xp.sum(lengths[:, None] * weights, axis=0))
        return _FAR * (objective + program.fit_weight * misfit**2)
    return np.asarray(_FAR * np.sum(objective))
