"""Fourier symbols of convolutions, and certified bounds of their norms.

A convolution with a kernel (atoms, channels, k, k) is, at each frequency ω, the matrix Ŵ(ω) of shape (atoms, channels).
"""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

FINE_GRID_BELOW = 2**15  # weights
SLACK = 1e-3
FREQUENCIES_AT_ONCE = 32


def sampled_symbol(kernel: Tensor) -> tuple[Tensor, Tensor]:
    """Real and imaginary part of Ŵ on a coarse grid, (frequencies, atoms, channels), with gradients.

    A real kernel needs half of the frequencies. Between them the symbol is smooth; that of a small kernel has sharper
    peaks, and can afford a finer grid.
    """
    side = kernel.shape[-1]
    half = 2 * side if kernel.numel() < FINE_GRID_BELOW else side
    device = kernel.device
    rows, columns = torch.meshgrid(
        torch.arange(2 * half, device=device), torch.arange(half + 1, device=device), indexing="ij"
    )
    tap = torch.arange(side, device=device)
    taps = torch.cartesian_prod(tap, tap).to(kernel)
    angle = torch.stack([rows.flatten(), columns.flatten()], 1).to(kernel) @ taps.mT * (math.pi / half)
    waves = torch.cat([angle.cos(), angle.sin()])
    real, imaginary = (waves @ kernel.permute(2, 3, 0, 1).flatten(2).flatten(0, 1)).chunk(2)
    return real.unflatten(1, kernel.shape[:2]), imaginary.unflatten(1, kernel.shape[:2])


def squared_norm_bound(kernel: Tensor) -> Tensor:
    """Upper bound of ``max_ω λ_max(Ŵ(ω)ᴴŴ(ω))``: that on a grid, with the bound for what lies between its points.

    Each ``vᴴŴᴴŴv`` is a trigonometric polynomial of degree k − 1, so its maximum is at most ``1/cos(π(k − 1)/N)`` times
    that on an N-point grid, once a dimension (Ehlich and Zeller 1964).
    """
    degree = kernel.shape[-1] - 1
    points = max(1, 16 * degree)
    angles = 2 * math.pi / points * torch.cartesian_prod(torch.arange(points), torch.arange(points // 2 + 1))
    rounding = 1 + 1e-4  # of single precision
    return rounding * largest_eigenvalue(kernel.float(), angles) / math.cos(math.pi * degree / points) ** 2


def largest_eigenvalue(kernel: Tensor, angles: Tensor) -> Tensor:
    """Upper bound of the largest eigenvalue of ``G = ŴᴴŴ`` at these frequencies (number, 2), at most 0.1 % above it.

    ``cI − G`` has a Cholesky factor only if c is above G's eigenvalues, and that costs a fraction of computing them:
    only where it fails for the largest found so far is there a larger one to find.
    """
    lags, offsets = autocorrelation(kernel)
    largest = kernel.new_zeros(())
    identity = torch.eye(len(lags), device=kernel.device)
    for part in range(parts := -(-len(angles) // FREQUENCIES_AT_ONCE)):
        some = angles[part::parts].to(kernel)  # of all over the grid: soon there is little left to find
        waves = torch.polar(torch.ones_like(some[:, :1]), some @ offsets.mT)
        grams = (waves @ lags.flatten(0, 1).mT.to(waves)).unflatten(1, identity.shape)
        failed = torch.linalg.cholesky_ex((1 + SLACK) * largest * identity - grams).info != 0
        if failed.any():
            largest = torch.linalg.eigvalsh(grams[failed])[:, -1].max().maximum(largest)
    return (1 + SLACK) * largest


def autocorrelation(kernel: Tensor) -> tuple[Tensor, Tensor]:
    """``Σ_t W(t)ᵀW(t + δ)`` and δ: ŴᴴŴ as a trigonometric polynomial of few terms; of ŴŴᴴ where that is smaller.

    Shapes: (n, n, lags) and (lags, 2).
    """
    small = kernel.transpose(0, 1) if kernel.shape[1] <= kernel.shape[0] else kernel
    reach = kernel.shape[-1] - 1
    # In double precision: a GPU's convolutions in single precision may round to TF32.
    lags = F.conv2d(small.double(), small.double(), padding=reach).flatten(2).to(kernel)
    offset = torch.arange(-reach, reach + 1, device=kernel.device)
    return lags, torch.cartesian_prod(offset, offset).to(kernel)


def apply(real: Tensor, imaginary: Tensor | None, v: Tensor) -> Tensor:
    """(R + iM)v for complex vectors v = (real, imaginary) along the last dimension."""
    image = real @ v
    if imaginary is None:
        return image
    crossed = imaginary @ v
    return image + torch.stack([-crossed[..., 1], crossed[..., 0]], -1)


def power_iteration(real: Tensor, imaginary: Tensor | None, probe: Tensor) -> Tensor:
    """``AᴴAv/‖AᴴAv‖`` of each matrix A = R + iM, (frequencies, rows, columns), and its vector v, as in `apply`."""
    adjoint = real.mT, None if imaginary is None else -imaginary.mT
    image = apply(*adjoint, apply(real, imaginary, probe))
    return image / image.norm(dim=(1, 2), keepdim=True).clamp_min(torch.finfo(image.dtype).tiny)
