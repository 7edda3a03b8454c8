"""Norms of layers as maps, bounded from above, and how many windows cover an entry.

Everything is in float64 and rounded up beyond the error of its computation.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from solvers.arrays import norm as frobenius


def cover(kernel: int, stride: int, dilation: int) -> int:
    """Compute the largest number of windows, along one dimension, that cover the same input entry.

    Parameters
    ----------
    kernel, stride, dilation : int
        Settings of the convolution or pooling along that dimension.

    Returns
    -------
    int
        Number of windows.
    """
    return math.ceil(kernel / (stride // math.gcd(stride, dilation)))


def frequency_norm(kernel: Tensor) -> float:
    """Bound the norm of a convolution, at any image size, by its response to each frequency.

    On the whole space a stride-1 convolution is multiplication by K(w) = sum_j k_j exp(i j.w) at
    each frequency w, so its norm is the largest |K(w)|_2. Zero padding restricts it to images
    within the space, and a stride drops outputs: neither can raise the norm. A dilation stretches
    the frequencies. A transposed convolution is the adjoint of a convolution, with the same norm.

    The largest value is bounded from samples. For unit vectors u, v, the function u* K(w) v is a
    trigonometric polynomial in each coordinate, of type d = (k - 1)/2 once shifted, and one of norm
    1 is at least cos(d t) at a distance t < pi/(2 d) from its maximum (M. Riesz). With m samples
    per coordinate the nearest is within pi/m.

    Parameters
    ----------
    kernel : Tensor of float64, shape (c_out, c_in, *sizes)
        Kernel of one group, with any number of dimensions.

    Returns
    -------
    float
        Upper bound on the norm, rounded up beyond the rounding of its computation.

    Notes
    -----
    Cost: one singular value decomposition (c_out x c_in) per sampled frequency, 8 for each size of
    the kernel along each dimension. The 8 is chosen by hand: more tighten the bound and cost more.
    """
    dims = kernel.ndim - 2
    counts = [8 * size if size > 1 else 1 for size in kernel.shape[2:]]
    axes = tuple(range(2, kernel.ndim))
    responses = torch.fft.fftn(kernel, s=counts, dim=axes).permute(*axes, 0, 1)
    largest = torch.linalg.matrix_norm(responses, 2).max().item()
    between = math.prod(
        math.cos((size - 1) / 2 * math.pi / count)
        for size, count in zip(kernel.shape[2:], counts, strict=True)
    )
    rounding = 1 + 100 * max(kernel.shape) * max(dims, 1) * torch.finfo(torch.float64).eps
    return largest / between * rounding


def spectral_norm(matrix: Tensor) -> float:
    """Compute the largest singular value in float64, rounded up beyond the error of the SVD.

    LAPACK's singular values of an m x n matrix are those of a matrix that differs by a small
    multiple of eps · max(m, n) times its norm; ten times that is added.

    Parameters
    ----------
    matrix : Tensor, shape (m, n)
        Matrix of any float dtype.

    Returns
    -------
    float
        Upper bound on the spectral norm; 0 for an empty matrix.
    """
    if matrix.numel() == 0:
        return 0.0
    largest = torch.linalg.svdvals(matrix.detach().to(torch.float64)).max().item()
    return float(largest * (1 + 10 * max(matrix.shape) * torch.finfo(torch.float64).eps))


def frobenius_norm(matrix: Tensor) -> float:
    """Compute the root of the sum of squares in float64, rounded up beyond the error of the sum.

    Parameters
    ----------
    matrix : Tensor
        Tensor of any shape and float dtype.

    Returns
    -------
    float
        Upper bound on the Frobenius norm.
    """
    return frobenius(matrix.detach()) * (1 + matrix.numel() * torch.finfo(torch.float64).eps)
