"""Thresholding functions: the proximal step of each penalty, which is the activation of sparse coding.

Each solves ``argmin_u ½‖u − z‖² + step·penalty(u)``, with t = λ·step, r = `l1_ratio` and z⁺ = max(z, 0):

=================== ========================================= ======================================= ====== =======
name                formula                                   prox of                                 convex source
=================== ========================================= ======================================= ====== =======
`relu`              ``max(z − t, 0)``                         ``λ Σ u`` over ``u ≥ 0``                yes    [1]
`soft`              ``sign(z) max(|z| − t, 0)``               ``λ ‖u‖₁``                              yes    [1]
`group_relu`        ``max(1 − t/‖z_g‖, 0) z_g``               ``λ Σ_g ‖u_g‖₂``                        yes    [2, 3]
`group_relu_nonneg` ``max(1 − t/‖z_g⁺‖, 0) z_g⁺``             ``λ Σ_g ‖u_g‖₂`` over ``u ≥ 0``         yes    [2, 4]
`sparse_group`      `group_relu` at (1 − r)t of `soft` at rt  ``λ Σ_g r‖u_g‖₁ + (1 − r)‖u_g‖₂``       yes    [5]
`elastic`           `soft` at rt, over ``1 + (1 − r)t``       ``λ (r‖u‖₁ + (1 − r)/2 ‖u‖₂²)``         yes    [6]
`hard`              z where ``|z| > √(2t)``, else 0           ``λ ‖u‖₀``                              no     [7]
`jump_relu`         z where ``z > √(2t)``, else 0             ``λ ‖u‖₀`` over ``u ≥ 0``               no     [8]
`top_k`             z at its k largest ``|z|``, else 0        0 if ``‖u‖₀ ≤ k``, else ∞               no     [7, 9]
`group_top_k`       z_g at its k largest ``‖z_g‖``, else 0    0 if at most k groups are not 0, else ∞ no     [10]
=================== ========================================= ======================================= ====== =======

Where the penalty is not convex, ties have several minimisers: an entry at the threshold becomes 0.

Groups g are equal, consecutive entries along `dim`; no norm counts as less than 2e-13 (3e-103 in double precision). A
`threshold` is a number or a tensor that broadcasts with the entries, or for groups with their norms, whose `dim` is
(groups, 1). Each function returns a tensor of the shape of z.

Sources: [1] Daubechies, Defrise and De Mol 2004. [2] Yuan and Lin 2006. [3] *On the convergence of group-sparse
autoencoders*, arXiv 2102.07003, where it is the group-sparse ReLU. [4] Bertrand et al. 2022 (skglm), arXiv 2204.07826.
[5] Simon, Friedman, Hastie and Tibshirani 2013. [6] Zou and Hastie 2005. [7] Blumensath and Davies 2009 (iterative hard
thresholding). [8] Rajamanoharan et al. 2024, arXiv 2407.14435. [9] Gao et al. 2024, arXiv 2406.04093. [10] Baraniuk
et al. 2010 (model-based compressive sensing).
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

Threshold = float | Tensor


def relu(z: Tensor, threshold: Threshold) -> Tensor:
    """One-sided shrinkage ``max(z − t, 0)``."""
    # The difference nobody else holds; as a sum, its gradient needs no pass that changes signs.
    return F.relu(z + -threshold, inplace=True)


def soft(z: Tensor, threshold: Threshold) -> Tensor:
    """Two-sided shrinkage ``sign(z) max(|z| − t, 0)``."""
    if isinstance(threshold, Tensor):
        return z - torch.clamp(z, -threshold, threshold)
    return F.softshrink(z, threshold)


def elastic(z: Tensor, threshold: Threshold, l1_ratio: float = 0.5) -> Tensor:
    """Shrinkage of the elastic net, ``soft(z, rt) / (1 + (1 − r)t)``."""
    return soft(z, l1_ratio * threshold) / (1 + (1 - l1_ratio) * threshold)


def group_relu(z: Tensor, threshold: Threshold, group_size: int, dim: int = 1) -> Tensor:
    """Group shrinkage ``max(1 − t/‖z_g‖, 0) z_g`` over groups of `group_size` consecutive entries of `dim`."""
    return _shrink_groups(grouped(z, group_size, dim), threshold, dim % z.ndim + 1)


def group_relu_nonneg(z: Tensor, threshold: Threshold, group_size: int, dim: int = 1) -> Tensor:
    """Non-negative group shrinkage: `group_relu` of the positive part, the prox of the norm on ``u ≥ 0``."""
    return group_relu(F.relu(z), threshold, group_size, dim)


def sparse_group(z: Tensor, threshold: Threshold, group_size: int, l1_ratio: float = 0.5, dim: int = 1) -> Tensor:
    """Sparse-group shrinkage: `soft` at rt, then `group_relu` at (1 − r)t."""
    groups = soft(grouped(z, group_size, dim), l1_ratio * threshold)
    return _shrink_groups(groups, (1 - l1_ratio) * threshold, dim % z.ndim + 1)


def hard(z: Tensor, threshold: Threshold, bandwidth: float = 0.05) -> Tensor:
    """Hard thresholding: z where ``|z| > θ``, else 0; θ, the `threshold`, is ``√(2t)`` for the prox.

    Its gradient is exact with respect to z. With respect to θ, a jump, it is the straight-through estimate of arXiv
    2407.14435: ``−(θ/ε) sign(z)`` where ``||z| − θ| < ε/2``, with ε = `bandwidth` in units of z, else 0.
    """
    if not isinstance(threshold, Tensor):
        return F.hardshrink(z, threshold)
    if threshold.requires_grad:
        return _Jump.apply(z, threshold, bandwidth, True)
    return _kept(z, threshold, True)


def jump_relu(z: Tensor, threshold: Threshold, bandwidth: float = 0.05) -> Tensor:
    """One-sided hard thresholding: z where ``z > θ``, else 0; θ ≥ 0, the `threshold`, is ``√(2t)`` for the prox.

    Its gradient is exact with respect to z. With respect to θ, a jump, it is the straight-through estimate of arXiv
    2407.14435: ``−θ/ε`` where ``|z − θ| < ε/2``, with ε = `bandwidth` in units of z, else 0.
    """
    if not isinstance(threshold, Tensor):
        return F.threshold(z, threshold, 0.0)
    if threshold.requires_grad:
        return _Jump.apply(z, threshold, bandwidth, False)
    return _kept(z, threshold, False)


def _kept(z: Tensor, threshold: Tensor, two_sided: bool) -> Tensor:
    # `masked_fill` would give up channels-last memory.
    return z * (z.abs() > threshold) if two_sided else torch.where(z <= threshold, 0, z)  # -inf too becomes 0


class _Jump(torch.autograd.Function):
    """`hard` (two-sided) or `jump_relu`, with a gradient for the threshold; it keeps z and no masks."""

    generate_vmap_rule = True

    @staticmethod
    def forward(z: Tensor, threshold: Tensor, bandwidth: float, two_sided: bool) -> Tensor:
        return _kept(z, threshold, two_sided)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        z, threshold, ctx.bandwidth, ctx.two_sided = inputs
        ctx.save_for_backward(z, threshold)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:
        z, threshold = ctx.saved_tensors
        size = z.abs() if ctx.two_sided else z
        near = torch.where((size - threshold).abs() >= ctx.bandwidth / 2, 0, grad)
        near = near * z.sign() if ctx.two_sided else near
        slope = (near * threshold).sum_to_size(threshold.shape) / -ctx.bandwidth
        return torch.where(size <= threshold, 0, grad), slope.to(threshold.dtype), None, None


def top_k(z: Tensor, k: int, dim: int = 1, nonneg: bool = False) -> Tensor:
    """The k entries largest in magnitude along `dim`, all others 0; `nonneg`: the k largest, of those above 0.

    Raises ValueError for k above the number of entries.
    """
    _check_k(k, z.shape[dim], "channels", dim)
    if nonneg:
        values, largest = z.topk(k, dim, sorted=False)
        values = F.relu(values)
    else:
        largest = z.detach().abs().topk(k, dim, sorted=False).indices
        values = z.gather(dim, largest)
    return torch.zeros_like(z).scatter_(dim, largest, values)


def group_top_k(z: Tensor, k: int, group_size: int, dim: int = 1, nonneg: bool = False) -> Tensor:
    """The k groups of largest norm along `dim`, all others 0; `nonneg`: of the positive part of z.

    Raises ValueError for k above the number of groups.
    """
    groups, outer = grouped(F.relu(z) if nonneg else z, group_size, dim), dim % z.ndim
    _check_k(k, groups.shape[outer], "groups", dim)
    largest = group_norm(groups.detach(), outer + 1).topk(k, outer, sorted=False).indices
    kept = torch.zeros_like(groups.narrow(outer + 1, 0, 1)).scatter(outer, largest, 1)
    return (groups * kept).flatten(outer, outer + 1)


def _check_k(k: int, available: int, what: str, dim: int) -> None:
    if k > available:
        raise ValueError(
            f"k={k} is more than the {available} {what} of dimension {dim}: at most {available} can be kept"
        )


def grouped(z: Tensor, group_size: int, dim: int = 1) -> Tensor:
    """View of `z` with `dim` split into (groups, group_size). Raises ValueError if the size does not divide."""
    channels = z.shape[dim]
    if channels % group_size:
        raise ValueError(
            f"group_size={group_size} does not divide the {channels} channels of dimension {dim}; "
            f"nearest sizes that do: {nearest_divisors(channels, group_size)}"
        )
    return z.unflatten(dim, (channels // group_size, group_size))


def nearest_divisors(channels: int, wanted: int) -> str:
    """The divisors of `channels` next to `wanted`, as words for an error: "4 or 6"."""
    divisors = [d for d in range(1, channels + 1) if channels % d == 0]
    below = [str(d) for d in divisors if d < wanted][-1:]
    above = [str(d) for d in divisors if d > wanted][:1]
    return " or ".join(below + above)


def group_norm(groups: Tensor, dim: int) -> Tensor:
    """‖z_g‖₂ along `dim`, which stays, in at least float32; at a zero group its gradient is 0."""
    if groups.device.type != "cpu":
        return torch.linalg.vector_norm(groups, dim=dim, keepdim=True, dtype=_wide(groups))
    energy = _energy(groups, dim)
    return energy.clamp_min(torch.finfo(energy.dtype).tiny).sqrt().masked_fill(energy == 0, 0)


def _energy(groups: Tensor, dim: int) -> Tensor:
    # On a CPU `vector_norm` runs over the channels of images entry by entry, twenty times slower than this.
    return groups.to(_wide(groups)).square().sum(dim, keepdim=True)


def _wide(groups: Tensor) -> torch.dtype:
    return torch.promote_types(groups.dtype, torch.float32)


def _shrink_groups(groups: Tensor, threshold: Threshold, dim: int) -> Tensor:
    """The groups, along `dim`, times their shrinkage, flattened to channels again."""
    if groups.stride(dim) != 1:
        return (groups * _shrinkage(groups, threshold, dim)).flatten(dim - 1, dim)
    # Channels last in memory: all that is computed between gets that order, too, and is not turned over, which is slow.
    ends = (dim - 1, dim), (-2, -1)
    if isinstance(threshold, Tensor) and threshold.ndim:
        threshold = threshold[(None,) * (groups.ndim - threshold.ndim)].movedim(*ends)
    rows = groups.movedim(*ends)
    return (rows * _shrinkage(rows, threshold, -1)).flatten(-2).movedim(-1, dim - 1)


def _shrinkage(groups: Tensor, threshold: Threshold, dim: int) -> Tensor:
    # The norm is kept away from zero, so that a zero group has gradient 0, not NaN.
    least = torch.finfo(_wide(groups)).tiny ** (1 / 3)  # whose inverse cubed, in the gradient, is finite
    if groups.device.type != "cpu":
        inverse = group_norm(groups, dim).clamp_min(least).reciprocal()
    else:
        inverse = (_energy(groups, dim) + least**2).rsqrt()  # in few passes: they add up over a solver's steps
    return F.relu(1 - threshold * inverse).to(groups.dtype)
