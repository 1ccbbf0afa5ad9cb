"""Proximal operators of penalties that count, and so are not convex: ℓ0, and at most k entries or groups.

Each is the exact minimiser of its problem at one step; proximal gradient then descends, but to no certified minimum.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from dsc import shrinkage
from dsc.prox import Grouped, Prox, count_of
from dsc.shrinkage import Threshold


class Hard(Prox):
    """ℓ0, ``λ‖u‖₀``: `hard`, which drops entries up to ``√(2λ·step)``. Not convex.

    Args:
        bandwidth: width in units of z around the threshold in which entries give a learned λ its gradient. The
            default suits entries of about unit size.
    """

    default_threshold = 0.005  # drops entries up to 0.1

    def __init__(
        self,
        threshold: float | Sequence[float] | None = None,
        learn: bool = False,
        dim: int = 1,
        bandwidth: float = 0.05,
    ) -> None:
        super().__init__(threshold, learn, dim)
        if not 0 < bandwidth < math.inf:
            raise ValueError(f"bandwidth must be finite and above 0, got {bandwidth}")
        self.bandwidth = bandwidth

    def shrink(self, z: Tensor, threshold: Threshold) -> Tensor:
        return shrinkage.hard(z, _l0_threshold(threshold), self.bandwidth)

    def norm(self, z: Tensor) -> Tensor:
        return (z != 0).to(torch.promote_types(z.dtype, torch.float32))

    def zeroing_threshold(self, size: float, channels: int) -> float:
        return size**2 / 2

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, bandwidth={self.bandwidth}"


class JumpReLU(Hard):
    """ℓ0 over ``u ≥ 0``: `jump_relu`, which drops entries up to ``√(2λ·step)``. Not convex. Arguments as `Hard`."""

    nonneg = True

    def shrink(self, z: Tensor, threshold: Threshold) -> Tensor:
        return shrinkage.jump_relu(z, _l0_threshold(threshold), self.bandwidth)


class TopK(Prox):
    """At most k entries along `dim` at every position: `top_k`. It has no threshold. Not convex.

    Args:
        k: entries to keep.
        nonneg: keep the k largest values and of those the positive ones, as the TopK of sparse autoencoders
            (SAELens, dictionary_learning) does: the projection on ``‖u‖₀ ≤ k, u ≥ 0``. Otherwise the k largest
            magnitudes with their signs, as in iterative hard thresholding.
    """

    has_threshold = False

    def __init__(self, k: int = 8, dim: int = 1, nonneg: bool = False) -> None:
        super().__init__(0.0, dim=dim)
        self.k, self.nonneg = count_of("k", k), nonneg

    def shrink(self, z: Tensor, threshold: Threshold) -> Tensor:
        return shrinkage.top_k(z, self.k, self.dim, self.nonneg)

    def norm(self, z: Tensor) -> Tensor:
        return torch.zeros_like(z)

    def infeasible(self, z: Tensor) -> Tensor:
        return _more_than(self.k, z != 0, self.dim, super().infeasible(z))

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, k={self.k}, nonneg={self.nonneg}"


class GroupTopK(Grouped):
    """At most k groups along `dim` at every position: `group_top_k`. It has no threshold. Not convex.

    Args:
        k: groups to keep.
        nonneg: rank groups by their positive parts and keep those.
    """

    has_threshold = False

    def __init__(
        self,
        k: int = 1,
        dim: int = 1,
        group_size: int | None = None,
        groups: int | None = None,
        nonneg: bool = False,
    ) -> None:
        super().__init__(0.0, False, dim, group_size, groups)
        self.k, self.nonneg = count_of("k", k), nonneg

    def shrink(self, z: Tensor, threshold: Threshold) -> Tensor:
        return shrinkage.group_top_k(z, self.k, self.group_size_of(z.shape[self.dim]), self.dim, self.nonneg)

    def norm(self, z: Tensor) -> Tensor:
        return torch.zeros_like(z)

    def infeasible(self, z: Tensor) -> Tensor:
        groups, inner = self.grouped(z)
        return _more_than(self.k, (groups != 0).any(inner, keepdim=True), inner - 1, super().infeasible(z))

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, k={self.k}, nonneg={self.nonneg}"


def _more_than(k: int, active: Tensor, dim: int, infeasible: Tensor | None) -> Tensor:
    # Which signals have more than k active entries anywhere, or are infeasible already.
    more = (active.sum(dim, keepdim=True) > k).flatten(1).any(1)
    return more if infeasible is None else more | infeasible


def _l0_threshold(threshold: Threshold) -> Threshold:
    # Kept away from zero, where the root has no finite gradient.
    if not isinstance(threshold, Tensor):
        return math.sqrt(2 * threshold)
    return (2 * threshold).clamp_min(torch.finfo(threshold.dtype).tiny).sqrt()
