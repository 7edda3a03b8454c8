"""A convolution as a dense layer over patches.

A Conv2d computes, at every output position p and in every group, z_p = Wᵀ x_p + b, where x_p is the
patch of padded input under the kernel at p, its entries in the order (channel, kernel row, kernel
column), and W, of shape (c_in/groups · kh · kw, c_out/groups), is the kernel reshaped. So a
convolution is a dense layer with one row per patch; row number = sample · positions + position,
positions row by row over the output image.
"""

from __future__ import annotations

import math
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from retrain.stream.stream import Norm
from solvers.arrays import norm as frobenius


def padding(layer: nn.Conv2d) -> tuple[int, int, int, int]:
    """Compute the zeros that the layer adds at each side ("same" may add one more at the end).

    Parameters
    ----------
    layer : nn.Conv2d
        Convolution.

    Returns
    -------
    tuple of int
        Number of pixels (left, right, top, bottom).
    """
    if layer.padding == "valid":
        return 0, 0, 0, 0
    if layer.padding == "same":  # torch adds an odd zero at the end
        total = [d * (k - 1) for d, k in zip(layer.dilation, layer.kernel_size, strict=True)]
        (top, bottom), (left, right) = ((t // 2, t - t // 2) for t in total)
        return left, right, top, bottom
    rows, columns = (int(p) for p in layer.padding)
    return columns, columns, rows, rows


def patches(layer: nn.Conv2d, inputs: Tensor, group: int) -> Tensor:
    """Unfold one group's patches.

    Parameters
    ----------
    layer : nn.Conv2d
        Convolution, zero padding mode.
    inputs : Tensor, shape (n, c_in, height, width)
        Images that it receives.
    group : int
        Index of the group, from 0.

    Returns
    -------
    Tensor, shape (n · positions, c_in/groups · kh · kw)
        One row per patch.

    Notes
    -----
    Memory: kh · kw / stride² times that of the group's input.
    """
    width = layer.in_channels // layer.groups
    channels = inputs[:, group * width : (group + 1) * width]
    windows = functional.pad(channels, padding(layer))
    # Views, copied once into rows: half the time of torch's own unfold, which copies twice.
    for axis in (2, 3):
        kernel, stride, dilation = (
            pair[axis - 2] for pair in (layer.kernel_size, layer.stride, layer.dilation)
        )
        windows = windows.unfold(axis, dilation * (kernel - 1) + 1, stride)[..., ::dilation]
    size = width * math.prod(layer.kernel_size)
    return windows.permute(0, 2, 3, 1, 4, 5).reshape(-1, size)


def responses(layer: nn.Conv2d, outputs: Tensor, group: int) -> Tensor:
    """Lay one group's outputs out as rows.

    Parameters
    ----------
    layer : nn.Conv2d
        Convolution.
    outputs : Tensor, shape (n, c_out, height, width)
        Images that it returns.
    group : int
        Index of the group, from 0.

    Returns
    -------
    Tensor, shape (n · positions, c_out/groups)
        One row per position.
    """
    width = layer.out_channels // layer.groups
    channels = outputs[:, group * width : (group + 1) * width]
    return channels.flatten(2).transpose(1, 2).reshape(-1, width)


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


def conv_lipschitz(layer: nn.Conv2d, norms: list[float]) -> float:
    """Bound how much a convolution stretches a change of its input, in the Frobenius norm.

    Let δ be the change of the input and δ_p that of the patch at position p. In one group, with its
    weight matrix W,

        sum_p ||Wᵀ δ_p||² <= ||W||² sum_p ||δ_p||² <= ||W||² · c · ||δ||²,

    since every input entry occurs in at most c patches, c the product of `cover` over both
    dimensions. Groups read and write disjoint channels, so the largest of them counts. ||W|| is the
    spectral norm, or anything above it, such as the Frobenius norm.

    Parameters
    ----------
    layer : nn.Conv2d
        Convolution, zero padding mode.
    norms : list of float
        ||W|| of each group.

    Returns
    -------
    float
        max ||W|| · sqrt(c).
    """
    covers = map(cover, layer.kernel_size, layer.stride, layer.dilation)
    return max(norms) * math.sqrt(math.prod(covers))


def frequency_norm(kernel: Tensor) -> float:
    """Bound the norm of a convolution, at any image size, by its response to each frequency.

    On the whole plane a stride-1 convolution is multiplication by K(w) = sum_j k_j exp(i j.w) at
    each frequency w, so its norm is the largest |K(w)|_2. Zero padding restricts it to images
    within the plane, and a stride drops outputs: neither can raise the norm. A dilation stretches
    the frequencies.

    The largest value is bounded from samples. For unit vectors u, v, the function u* K(w) v is a
    trigonometric polynomial in each coordinate, of type d = (k - 1)/2 once shifted, and one of norm
    1 is at least cos(d t) at a distance t < pi/(2 d) from its maximum (M. Riesz). With m samples
    per coordinate the nearest is within pi/m.

    Parameters
    ----------
    kernel : Tensor of float64, shape (c_out, c_in, rows, columns)
        Kernel of one group.

    Returns
    -------
    float
        Upper bound on the norm, rounded up beyond the rounding of its computation.

    Notes
    -----
    Cost: one singular value decomposition (c_out x c_in) per sampled frequency, 64 rows · columns
    of them. The 8 samples per kernel entry are chosen by hand: more tighten the bound and cost
    more.
    """
    counts = [8 * size if size > 1 else 1 for size in kernel.shape[2:]]
    responses = torch.fft.fft2(kernel, s=counts).permute(2, 3, 0, 1)
    largest = torch.linalg.matrix_norm(responses, 2).max().item()
    between = math.prod(
        math.cos((size - 1) / 2 * math.pi / count)
        for size, count in zip(kernel.shape[2:], counts, strict=True)
    )
    rounding = 1 + 100 * max(kernel.shape) * torch.finfo(torch.float64).eps
    return largest / between * rounding


def operator_norm(layer: nn.Module, norm: Norm, scale: Tensor | None = None) -> float:
    """Bound the norm of a Linear or Conv2d as a map, bias aside.

    Parameters
    ----------
    layer : nn.Module
        Linear layer, or a Conv2d that pads with zeros.
    norm : {"spectral", "frobenius"}
        Norm of the weights. For a convolution, ``"spectral"`` gives the smaller of `conv_lipschitz`
        and `frequency_norm` of its groups; ``"frobenius"``, as in L-OBS's theorems, the former.
    scale : Tensor, shape (n_out,), optional
        Factor of each output channel.

    Returns
    -------
    float
        Upper bound on the norm.
    """
    weight = cast("Tensor", layer.weight).detach().to(torch.float64)
    if scale is not None:
        weight = weight * scale.reshape(-1, *[1] * (weight.ndim - 1))
    measure = spectral_norm if norm == "spectral" else frobenius_norm
    if not isinstance(layer, nn.Conv2d):
        return measure(weight)
    kernels = weight.chunk(layer.groups)
    bound = conv_lipschitz(layer, [measure(kernel.flatten(1)) for kernel in kernels])
    if norm == "frobenius" or not math.isfinite(bound):
        return bound
    return min(bound, max(map(frequency_norm, kernels)))


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
