"""ADMM's steps with products in bfloat16, where the processor multiplies it, on numpy arrays.

A bfloat16 number has 8 significant bits. A product A x rounded to it would be wrong by some 1e-3
for good, too far for a start of Newton's method. But the iteration moves less and less, so that
only what *changes* is rounded, and what rounding leaves is made good by the next change. For
iterates x_1, x_2, ... keep the sum x^ of what has gone into the product, and y = A x^:

    d = the leading 8 bits of x_k - x^,      x^ += d,      y += A d.

Then |x_k - x^| <= 2^-8 |x_k - last x^|, which vanishes as the iterates settle. The entries of A are
rounded too, which does not vanish, but acts only on the changes since y was last exact: where a
walk begins. There z = Xu and p = -tau X^T q are what they should be, since a full step goes before
each walk, so that y is known for both products, X u and X^T (c - z), without one.

Nor need u = (I + tau X^T X)^-1 (a + tau X^T c) be computed from nothing. As (I + tau X^T X) u is
u + tau X^T z, the next u is

    u + (I + tau X^T X)^-1 r,      r = a - u + tau X^T (c - z),

and r vanishes at the solution: (a, c) - (u, z) = alpha (w - u, v - z) + (p, q). Rounding r and the
inverse makes the step wrong by a part of itself, and what is missing of it is in the next r, which
is made of the X u that was, not of the one that was meant. Along the large eigenvectors of X^T X
that part grows with r, tau lambda times the step; it is still small beside the step's |X du|.

With s = 2^16 + 1, fl(s x) - (fl(s x) - x) is x rounded to 24 - 16 bits (Veltkamp), which bfloat16
holds exactly.

torch has the products; it is imported where they are worth it, so that importing `solvers` stays
free of it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from array_api_compat import is_numpy_array
from numba import njit

from solvers.admm.splitting import Splitting, State, relax

LEAST_FLOPS = 5e8
"""Operations of one iteration from which products in bfloat16 are used. Twice as many: layers of
half that size go without them. Below it, importing torch takes longer than all iterations
(measured)."""

_SPLIT = np.float32(2**16 + 1)
"""Multiplier of Dekker's splitting: it cuts a float32 into a part of 8 digits, which bfloat16
holds, and the rest. Derived from the two formats; another power of two would cut elsewhere and lose
digits."""


def half_walk(splitting: Splitting) -> Callable[[Splitting, State, int], State] | None:
    """Walk for `splitting.advance` with products in bfloat16; None where they are no gain.

    They are one where the processor has instructions for them, and for tall inputs, in numpy and
    float32, of a layer of some size. Two walks give the same bytes with the same torch threads.

    Parameters
    ----------
    splitting : Splitting
        The program as ADMM iterates on it: scaled data and the factorisation.

    Returns
    -------
    callable or None
        Walk with the signature of `plain_walk`.
    """
    inputs = splitting.inputs
    n_samples, n_in, n_out = splitting.program.shape
    if not is_numpy_array(inputs) or inputs.dtype != np.float32 or n_samples < n_in:
        return None
    if 4.0 * n_samples * n_in * n_out < LEAST_FLOPS or not has_products():
        return None
    forward, adjoint, inverse = map(_rounded, (inputs, inputs.T, splitting.inverse))

    def walk(splitting: Splitting, state: State, count: int) -> State:
        u, z, p, q, w, rho = state.u, state.z, state.p, state.q, state.w, state.rho
        tau, alpha = np.float32(splitting.tau), np.float32(splitting.relaxation)
        response, dual = _Product.at(forward, u, z), _Product.at(adjoint, q, -p / tau)
        for _ in range(count):
            w = splitting.prox_penalty(u - p, rho)
            relax(splitting, z, q, rho)  # q is c - z now
            dual.follow(q)
            p += alpha * (w - u)  # a - u
            step = _multiply(inverse, p + tau * dual.value)
            u = u + step
            p -= step
            _subtract(q, response.follow(u))
        return State(u, z, p, q, w, rho)

    return walk


def has_products() -> bool:
    """Tell whether the processor multiplies bfloat16 by itself, and torch knows how.

    Returns
    -------
    bool
        False where torch cannot tell.
    """
    import torch

    capabilities: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()  # new in 2.10
    native = any(capabilities.get(name) for name in ("avx512_bf16", "amx_bf16"))
    return native and torch.backends.mkldnn.is_available()


@dataclass(eq=False)
class _Product:
    """A matrix in bfloat16 times what iterates have changed by.

    Attributes
    ----------
    matrix : torch tensor, bfloat16
        A.
    total, value : float32 arrays
        x^ and y.
    change, rounded, moved
        Room for d, for it in bfloat16, and for A d.
    """

    matrix: Any
    total: np.ndarray
    value: np.ndarray
    change: np.ndarray
    rounded: Any
    moved: Any

    @staticmethod
    def at(matrix: Any, x: np.ndarray, value: np.ndarray) -> _Product:
        """Begin where A x is known."""
        change = np.empty_like(x)
        moved = matrix.new_empty(value.shape)
        return _Product(matrix, x.copy(), value, change, matrix.new_empty(x.shape), moved)

    def follow(self, x: np.ndarray) -> Any:
        """Let x^ and y go along with an iterate; return the change of y."""
        import torch

        _lead(x, self.total, self.change)
        self.rounded.copy_(torch.from_numpy(self.change))
        torch.mm(self.matrix, self.rounded, out=self.moved)
        torch.from_numpy(self.value).add_(self.moved)
        return self.moved


def _rounded(array: np.ndarray) -> Any:
    """A float32 matrix as a torch tensor in bfloat16."""
    import torch

    return torch.from_numpy(np.ascontiguousarray(array)).bfloat16()


def _multiply(matrix: Any, x: np.ndarray) -> np.ndarray:
    """A matrix in bfloat16 times x rounded to it."""
    product: np.ndarray = (matrix @ _rounded(x)).float().numpy()
    return product


def _subtract(x: np.ndarray, change: Any) -> None:
    """Overwrite x by x - change, a torch tensor."""
    import torch

    torch.from_numpy(x).sub_(change)


@njit(cache=True, nogil=True)
def _lead(x, total, change):  # type: ignore[no-untyped-def]
    """Write the leading 8 bits of x - total to `change`, and add them to `total`."""
    for i in range(x.shape[0]):
        for m in range(x.shape[1]):
            difference = x[i, m] - total[i, m]
            scaled = _SPLIT * difference
            leading = scaled - (scaled - difference)
            total[i, m] += leading
            change[i, m] = leading
