"""A layer program as the general solvers want it: quadratic objective, linear and ball constraints.

    minimise  x^T P x / 2 + q^T x
    subject to  A x = b,   G x <= h,   x >= l   [,   |F x - f| <= epsilon   in the constrained form]

Four ways to state (11), unit by unit; `lifted` states (4) too, all units side by side:

- lifted:   x = (u, t, z), z = Xu, -t <= u <= t, the fit and the ceilings on z. Sparse but for X.
- folded:   x = (u, t, r), r = (Xu)_Omega, the ceilings as rows of X.
- gram:     x = (u, t), the fit as u^T X_Omega^T X_Omega u. Dense.
- doubled:  x = (u+, u-) >= 0, the paper's (14). Dense, and singular.

Solvers without bounds of their own get those as rows of G. In each form the first rows of G are the
ceilings, whose dual values are the multiplier off Omega; on Omega the multiplier is that of the
fit, 2 lambda (Xu - y), or that of z = Xu.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import scipy.sparse as sp

from solvers import RegularisedProgram
from solvers.program import Program


@dataclass(frozen=True, eq=False)
class Ball:
    """|F x - f| <= epsilon."""

    matrix: sp.csc_matrix
    centre: np.ndarray
    epsilon: float


@dataclass(frozen=True, eq=False)
class Form:
    """One statement. `weight(x)` gives the units' weights, one column each."""

    name: str
    quadratic: sp.csc_matrix
    linear: np.ndarray
    equal: sp.csc_matrix
    equal_to: np.ndarray
    below: sp.csc_matrix
    bound: np.ndarray
    ball: Ball | None
    weight: Callable[[np.ndarray], np.ndarray]
    lower: np.ndarray | None = None

    @property
    def rows_below(self) -> tuple[sp.csc_matrix, np.ndarray]:
        """G and h with the lower bounds among them."""
        if self.lower is None:
            return self.below, self.bound
        eye = sp.identity(len(self.lower))
        return sp.csc_matrix(sp.vstack([self.below, -eye])), np.append(self.bound, -self.lower)


def lifted(program: Program) -> Form:
    """(u, t, z) for all units of the program."""
    n_samples, n_in, n_out = program.shape
    inputs = sp.csc_matrix(program.inputs)
    active = program.active.T.ravel()
    level = program.level.T.ravel()
    n_u, n_z = n_in * n_out, n_samples * n_out
    penalised = np.tile(_penalised(program), n_out)
    eye, nothing = sp.identity(n_u), sp.csc_matrix((n_u, n_z))
    choose = sp.identity(n_z, format="csr")
    equal = sp.hstack(
        [sp.block_diag([inputs] * n_out), sp.csc_matrix((n_z, n_u)), -sp.identity(n_z)]
    )
    under = sp.hstack([sp.csc_matrix(((~active).sum(), 2 * n_u)), choose[~active]])
    signs = sp.vstack([sp.hstack([eye, -eye, nothing]), sp.hstack([-eye, -eye, nothing])])
    linear = np.concatenate([np.zeros(n_u), penalised, np.zeros(n_z)])
    curvature = np.zeros(2 * n_u + n_z)
    ball = None
    if isinstance(program, RegularisedProgram):
        curvature[2 * n_u :] = 2 * program.fit_weight * active
        linear[2 * n_u :] = -2 * program.fit_weight * np.where(active, level, 0)
    else:
        fitted = sp.hstack([sp.csc_matrix((active.sum(), 2 * n_u)), choose[active]], format="csc")
        ball = Ball(fitted, level[active], program.epsilon)
    return Form(
        "lifted",
        sp.diags(curvature, format="csc"),
        linear,
        sp.csc_matrix(equal),
        np.zeros(n_z),
        sp.csc_matrix(sp.vstack([under, signs])),
        np.concatenate([level[~active], np.zeros(2 * n_u)]),
        ball,
        lambda x: x[:n_u].reshape(n_out, n_in).T,
    )


def folded(program: Program) -> Form:
    """(u, t, r) for one unit."""
    inputs, active, level, fit_weight = _unit(program)
    n_in, n_fit = inputs.shape[1], int(active.sum())
    eye, nothing = sp.identity(n_in), sp.csc_matrix((n_in, n_fit))
    equal = sp.hstack(
        [sp.csc_matrix(inputs[active]), sp.csc_matrix((n_fit, n_in)), -sp.identity(n_fit)]
    )
    under = sp.hstack(
        [sp.csc_matrix(inputs[~active]), sp.csc_matrix(((~active).sum(), n_in + n_fit))]
    )
    signs = sp.vstack([sp.hstack([eye, -eye, nothing]), sp.hstack([-eye, -eye, nothing])])
    curvature = np.concatenate([np.zeros(2 * n_in), np.full(n_fit, 2 * fit_weight)])
    linear = np.concatenate([np.zeros(n_in), _penalised(program), -2 * fit_weight * level[active]])
    return Form(
        "folded",
        sp.diags(curvature, format="csc"),
        linear,
        sp.csc_matrix(equal),
        np.zeros(n_fit),
        sp.csc_matrix(sp.vstack([under, signs])),
        np.concatenate([level[~active], np.zeros(2 * n_in)]),
        None,
        lambda x: x[:n_in, None],
    )


def gram(program: Program) -> Form:
    """(u, t) for one unit."""
    inputs, active, level, fit_weight = _unit(program)
    n_in = inputs.shape[1]
    eye, nothing = sp.identity(n_in), sp.csc_matrix((n_in, n_in))
    fitted = inputs[active]
    quadratic = sp.block_diag([2 * fit_weight * fitted.T @ fitted, nothing])
    linear = np.concatenate([-2 * fit_weight * fitted.T @ level[active], _penalised(program)])
    under = sp.hstack([sp.csc_matrix(inputs[~active]), sp.csc_matrix(((~active).sum(), n_in))])
    signs = sp.vstack([sp.hstack([eye, -eye]), sp.hstack([-eye, -eye])])
    return Form(
        "gram",
        sp.csc_matrix(quadratic),
        linear,
        sp.csc_matrix((0, 2 * n_in)),
        np.zeros(0),
        sp.csc_matrix(sp.vstack([under, signs])),
        np.concatenate([level[~active], np.zeros(2 * n_in)]),
        None,
        lambda x: x[:n_in, None],
    )


def doubled(program: Program) -> Form:
    """(u+, u-) for one unit: the paper's (14)."""
    inputs, active, level, fit_weight = _unit(program)
    n_in = inputs.shape[1]
    fitted = inputs[active]
    square, moment = 2 * fit_weight * fitted.T @ fitted, 2 * fit_weight * fitted.T @ level[active]
    under = sp.csc_matrix(np.hstack([inputs[~active], -inputs[~active]]))
    one = _penalised(program)
    return Form(
        "doubled",
        sp.csc_matrix(np.block([[square, -square], [-square, square]])),
        np.concatenate([one - moment, one + moment]),
        sp.csc_matrix((0, 2 * n_in)),
        np.zeros(0),
        under,
        level[~active],
        None,
        lambda x: (x[:n_in] - x[n_in:])[:, None],
        np.zeros(2 * n_in),
    )


FORMS: dict[str, Callable[[Program], Form]] = {
    "lifted": lifted,
    "folded": folded,
    "gram": gram,
    "doubled": doubled,
}


def multiplier(
    program: Program, weight: np.ndarray, under: np.ndarray, linked: np.ndarray | None
) -> np.ndarray:
    """Nu (samples, units) from the dual values of the ceilings, and on Omega from the fit.

    `linked`, the dual values of z = Xu, are what there is on Omega in the constrained form.
    """
    n_samples, _, n_out = program.shape
    nu = np.zeros((n_out, n_samples))
    off = ~program.active.T
    nu[off] = np.maximum(under, 0)
    if isinstance(program, RegularisedProgram):
        fit = 2 * program.fit_weight * (program.inputs @ weight - program.level)
        nu[~off] = fit.T[~off]
    else:
        assert linked is not None
        nu[~off] = linked.reshape(n_out, n_samples)[~off]
    return nu.T


def _penalised(program: Program) -> np.ndarray:
    one = np.zeros(program.shape[1])
    one[program.penalised] = 1.0
    return one


def _unit(program: Program) -> tuple[np.ndarray, np.ndarray, np.ndarray, float]:
    """Inputs, Omega, level and lambda of a program of one unit."""
    assert isinstance(program, RegularisedProgram)
    assert program.shape[2] == 1
    return program.inputs, program.active[:, 0], program.level[:, 0], program.fit_weight
