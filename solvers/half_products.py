"""ADMM's steps with products in bfloat16, where the processor multiplies it, on numpy arrays.

A bfloat16 number has 8 significant bits. A product A x rounded to it would be wrong by some 1e-3
for good, too far for a start of Newton's method. But the iteration moves less and less, so that
only what *changes* is rounded, and what rounding leaves is made good by the next change. For
iterates x_1, x_2, ... keep the sum x^ of what has gone into the product, and y = A x^:

    d = the leading 8 bits of x_k - x^,      x^ += d,      y += A d.

Then |x_k - x^| <= 2^-8 |x_k - last x^|, which vanishes as the iterates settle. The entries of A are
rounded too, which does not vanish, but acts only on the changes since y was last exact: after the
first step of each walk, which is full, as are those between walks, where rho changes.

The products with X are made so, not that with (I + tau X^T X)^-1: along the large eigenvectors of
X^T X what goes into it is tau lambda times larger than what comes out, and so would its error be.
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

from solvers.splitting import Splitting, State, relax

_LEAST_FLOPS = 5e8  # of a step; below, importing torch takes longer than all steps do
_SPLIT = np.float32(2**16 + 1)


def half_walk(splitting: Splitting) -> Callable[[Splitting, State, int], State] | None:
    """Walk for `splitting.advance` with products in bfloat16; None where they are no gain.

    They are one where the processor has instructions for them, and for tall inputs, in numpy and
    float32, of a layer of some size. Two walks give the same bytes with the same torch threads.
    """
    inputs = splitting.inputs
    n_samples, n_in, n_out = splitting.program.shape
    if not is_numpy_array(inputs) or inputs.dtype != np.float32 or n_samples < n_in:
        return None
    if 4.0 * n_samples * n_in * n_out < _LEAST_FLOPS or not has_products():
        return None
    forward, adjoint = _rounded(inputs), _rounded(inputs.T)

    def walk(splitting: Splitting, state: State, count: int) -> State:
        if count == 0:
            return state
        u, z, p, q, w, rho = state.u, state.z, state.p, state.q, state.w, state.rho
        tau, alpha = np.float32(splitting.tau), np.float32(splitting.relaxation)
        b = np.empty_like(u)
        for number in range(count):
            w = splitting.prox_penalty(u - p, rho)
            relax(splitting, z, q, rho)  # q is c now
            if number == 0:
                dual = _Product.at(adjoint, q, inputs.T @ q)
            else:
                dual.follow(q)
            _combine(w, u, p, dual.value, alpha, tau, b)  # p is a now
            u = splitting.inverse @ b
            if number == 0:
                response = _Product.at(forward, u, inputs @ u)
            else:
                response.follow(u)
            z = response.value
            q -= z
            p -= u
        return State(u, z, p, q, w, rho)

    return walk


def has_products() -> bool:
    """Tell whether the processor multiplies bfloat16 by itself, and torch knows how."""
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

    def follow(self, x: np.ndarray) -> None:
        """Let x^ and y go along with an iterate."""
        import torch

        _lead(x, self.total, self.change)
        self.rounded.copy_(torch.from_numpy(self.change))
        torch.mm(self.matrix, self.rounded, out=self.moved)
        torch.from_numpy(self.value).add_(self.moved)


def _rounded(array: np.ndarray) -> Any:
    """A float32 matrix as a torch tensor in bfloat16."""
    import torch

    return torch.from_numpy(np.ascontiguousarray(array)).bfloat16()


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


@njit(cache=True, nogil=True)
def _combine(w, u, p, dual, alpha, tau, b):  # type: ignore[no-untyped-def]
    """Overwrite p by a = alpha w + (1 - alpha) u + p, and b by a + tau X^T c."""
    rest = np.float32(1) - alpha
    for i in range(w.shape[0]):
        for m in range(w.shape[1]):
            a = p[i, m] + alpha * w[i, m] + rest * u[i, m]
            p[i, m] = a
            b[i, m] = a + tau * dual[i, m]
