"""ADMM's steps by what changes: their rounding vanishes as the iterates settle.

The step of `solvers.admm.splitting` projects (a, c) onto {z = Xu}. With X tall,

    u = (I + tau X^T X)^-1 (a + tau X^T c),     p = a - u,     q = c - z.

Along the largest eigenvectors of X^T X the bracket is tau lambda times larger than u, in the
thousands on real features, and float32 rounds it at its own size. So p + tau X^T q, zero by the
optimality of u, is off by that rounding however long one iterates, X^T nu by rho times as much,
and the certificate's gap stalls: at 1e-3 on LeNet's first layer.

(u, z) is on the graph already, so it can be subtracted from both sides:

    da = a - u = alpha (w - u) + p,      dc = c - z = alpha (v - z) + q,
    du = (I + tau X^T X)^-1 (da + tau X^T dc),
    u+ = u + du,    z+ = X u+,    p+ = da - du,    q+ = dc - (z+ - z).

At the solution w = u and v = z, and so da + tau X^T dc = p + tau X^T q = 0: what goes into the
inverse vanishes, and its rounding with it. The cost is the same. Wide inputs take plain steps, for
which z comes from the factor, not from X u.
"""

from __future__ import annotations

import numpy as np
from array_api_compat import is_numpy_array

from solvers.admm.splitting import Splitting, State, relax, step


def step_by_increments(splitting: Splitting, state: State) -> State:
    """One iteration, as in the module's docstring.

    Parameters
    ----------
    splitting : Splitting
        The program as ADMM iterates on it: scaled data and the factorisation.
    state : State
        Iterates u, z, the scaled multipliers p, q, the last w, and rho.

    Returns
    -------
    State
        After one iteration.
    """
    inputs, alpha, tau = splitting.inputs, splitting.relaxation, splitting.tau
    if inputs.shape[0] < inputs.shape[1]:
        return step(splitting, state)[0]
    u, z, p, q, rho = state.u, state.z, state.p, state.q, state.rho
    w = splitting.prox_penalty(u - p, rho)
    da = alpha * (w - u) + p
    dc = alpha * (splitting.prox_response(z, q, rho) - z) + q
    du = splitting.inverse @ (da + tau * (inputs.T @ dc))
    u = u + du
    response = inputs @ u
    return State(u, response, da - du, dc - (response - z), w, rho)


def walk_by_increments(splitting: Splitting, state: State, count: int) -> State:
    """Walk for `splitting.advance`; on numpy arrays z and q are overwritten.

    Parameters
    ----------
    splitting : Splitting
        The program as ADMM iterates on it: scaled data and the factorisation.
    state : State
        Iterates u, z, the scaled multipliers p, q, the last w, and rho.
    count : int
        Iterations to take.

    Returns
    -------
    State
        After `count` iterations.
    """
    inputs = splitting.inputs
    if not is_numpy_array(inputs) or inputs.shape[0] < inputs.shape[1]:
        for _ in range(count):
            state = step_by_increments(splitting, state)
        return state
    u, z, p, q, w, rho = state.u, state.z, state.p, state.q, state.w, state.rho
    for _ in range(count):
        w = splitting.prox_penalty(u - p, rho)
        relax(splitting, z, q, rho)  # q is dc now
        da = splitting.relaxation * (w - u) + p
        du = splitting.inverse @ (da + splitting.tau * (inputs.T @ q))
        u = u + du
        p = da - du
        q += z
        np.matmul(inputs, u, out=z)
        q -= z
    return State(u, z, p, q, w, rho)
