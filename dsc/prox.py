"""Proximal operators as modules: the thresholding of `dsc.shrinkage` with the penalty it is the prox of.

The convex ones (here; the others are in `dsc.nonconvex`) have what certifies a solution, too: the `conjugate` of their
penalty and the `gauge` of its domain. With c = Dᵀθ, θ is a feasible dual point where ``gauge(c) ≤ 1``, and
``penalty(u) + conjugate(c) ≥ ⟨u, c⟩`` (Fenchel–Young) is an equality exactly where c is a subgradient at u.
"""

from collections.abc import Sequence
from numbers import Integral
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dsc import shrinkage
from dsc.shrinkage import Threshold, group_norm, grouped, nearest_divisors


class Prox(nn.Module):
    """A thresholding activation: ``forward(z, step)`` minimises ``½‖u − z‖² + step·penalty(u)``.

    Args:
        threshold: λ ≥ 0; a number, or one value a channel (a group, for group prox). Default: the class's own.
        learn: make λ a parameter, kept positive by a softplus.
        dim: the channels' dimension: 1 for images, −1 for tokens.

    Raises:
        ValueError: a negative threshold, or a learnable one that is not positive.
    """

    is_prox: ClassVar[bool] = True
    is_convex: ClassVar[bool] = False
    is_grouped: ClassVar[bool] = False
    has_threshold: ClassVar[bool] = True
    default_threshold: ClassVar[float] = 0.1
    nonneg: bool = False

    def __init__(
        self, threshold: float | Sequence[float] | Tensor | None = None, learn: bool = False, dim: int = 1
    ) -> None:
        super().__init__()
        self.dim, self.learn = dim, learn
        given = self.default_threshold if threshold is None else threshold
        value = torch.as_tensor(given, dtype=given.dtype if isinstance(given, Tensor) else torch.float32)
        if (value < 0).any() or not value.isfinite().all():
            raise ValueError(f"threshold must be finite and at least 0, got {threshold}")
        if value.ndim > 1:
            raise ValueError(f"threshold must be a number or a list of them, got shape {tuple(value.shape)}")
        if learn:
            if (value == 0).any():
                raise ValueError("a learnable threshold starts above 0 (it is a softplus): give threshold > 0")
            self.raw_threshold = nn.Parameter(inverse_softplus(value))
        elif isinstance(given, int | float):
            self.fixed_threshold = float(given)
        else:
            self.register_buffer("fixed_threshold", value.clone())

    @property
    def threshold(self) -> Threshold:
        """λ: a number where it is one fixed number, else a tensor."""
        return F.softplus(self.raw_threshold) if self.learn else self.fixed_threshold

    def forward(self, z: Tensor, step: Threshold = 1.0) -> Tensor:
        """Minimiser of ``½‖u − z‖² + step·penalty(u)``, of the shape of `z`."""
        threshold = self._broadcast(z)
        if isinstance(threshold, Tensor):
            threshold = threshold.to(z.dtype)
        elif threshold == 0:  # stays a number, so that ReLU costs no subtraction
            return self.shrink(z, 0.0)
        return self.shrink(z, threshold * step)

    def penalty(self, z: Tensor) -> Tensor:
        """λΩ(z) of each signal: summed over all dimensions but the first, shape (batch,).

        Raises TypeError for an activation that is no prox.
        """
        threshold, norm = self._broadcast(z), self.norm(z)
        dtype = torch.promote_types(norm.dtype, torch.float32)
        if isinstance(threshold, Tensor):
            value = (threshold * norm).flatten(1).sum(1, dtype=dtype)
        else:
            value = threshold * norm.flatten(1).sum(1, dtype=dtype)
        infeasible = self.infeasible(z)
        return value if infeasible is None else value.masked_fill(infeasible, torch.inf)

    def gauge(self, c: Tensor) -> Tensor:
        """Smallest ν ≥ 0 with ``conjugate(c/ν)`` finite, of each signal: shape (batch,).

        This is ``max Ω°(c)/λ`` over entries or groups (`polar`): infinite where λ is 0 and Ω°(c) is not.
        Raises TypeError unless the penalty is convex.
        """
        polar, threshold = self.polar(c), self._broadcast(c)
        if isinstance(threshold, float) and threshold > 0:
            return polar.flatten(1).amax(1) / threshold
        return torch.where(polar == 0, 0, polar / threshold).flatten(1).amax(1)

    def conjugate(self, c: Tensor) -> Tensor:
        """``sup_u ⟨c, u⟩ − penalty(u)`` of each signal whose `gauge` is at most 1, shape (batch,).

        It is 0 there for a penalty that grows linearly. Raises TypeError unless the penalty is convex.
        """
        if not self.is_convex:
            raise self._no_conjugate()
        return c.new_zeros(len(c))

    def group_size_of(self, channels: int) -> int:
        """Channels a group, among `channels` of them: 1 for a prox without groups."""
        return 1

    def zeroing_threshold(self, size: float, channels: int) -> float:
        """Least λ that makes a code of `channels` entries, all of them `size`, 0 in a step of 1.

        Raises TypeError for an activation without a threshold.
        """
        if not self.has_threshold:
            raise TypeError(f"{self._title()} has no threshold")
        return size * self.group_size_of(channels) ** 0.5

    def shrink(self, z: Tensor, threshold: Threshold) -> Tensor:
        """The thresholding function, `threshold` = λ·step."""
        raise TypeError(f"{self._title()} defines no thresholding")

    def norm(self, z: Tensor) -> Tensor:
        """Ω by entry (or by group, where its dim is (groups, 1)), wherever z is feasible."""
        raise TypeError(f"{self._title()} is no prox: it has no penalty")

    def infeasible(self, z: Tensor) -> Tensor | None:
        """Which signals have an infinite penalty: bool (batch,), or None where none can have."""
        return (z < 0).flatten(1).any(1) if self.nonneg else None

    def polar(self, c: Tensor) -> Tensor:
        """Ω°(c), the smallest ν ≥ 0 with c/ν in the domain of Ω's conjugate, by entry (or by group, as `norm`).

        Where Ω is a norm this is its dual norm. Raises TypeError unless the penalty is convex.
        """
        raise self._no_conjugate()

    def _no_conjugate(self) -> TypeError:
        why = "not convex" if self.is_prox else "no prox"
        return TypeError(f"{self._title()} is {why}: it has no conjugate")

    def _title(self) -> str:
        return type(self).__name__

    def _broadcast(self, z: Tensor) -> Threshold:
        # λ per channel lies along `dim`; the norms of a group prox have one more dimension behind it.
        threshold = self.threshold
        if not isinstance(threshold, Tensor) or threshold.ndim == 0:
            return threshold
        if threshold.numel() == 1:
            return threshold.reshape(())
        expected = z.shape[self.dim] // self.group_size_of(z.shape[self.dim])
        if threshold.numel() != expected:
            raise ValueError(f"threshold has {threshold.numel()} values, expected 1 or {expected}")
        behind = z.ndim - 1 - self.dim % z.ndim + self.is_grouped
        return threshold.reshape(-1, *[1] * behind)

    def extra_repr(self) -> str:
        shown = "learned" if self.learn else self.threshold
        return f"threshold={shown}, dim={self.dim}" if self.has_threshold else f"dim={self.dim}"


class ReLU(Prox):
    """Non-negative ℓ1: `relu`. With λ = 0, its default, this is `torch.nn.ReLU`."""

    is_convex = True
    nonneg = True
    default_threshold = 0.0

    def shrink(self, z: Tensor, threshold: Threshold) -> Tensor:
        return F.relu(z) if isinstance(threshold, float) and threshold == 0 else shrinkage.relu(z, threshold)

    def norm(self, z: Tensor) -> Tensor:
        return z

    def polar(self, c: Tensor) -> Tensor:
        return F.relu(c)


class Soft(Prox):
    """ℓ1: `soft`."""

    is_convex = True

    def shrink(self, z: Tensor, threshold: Threshold) -> Tensor:
        return shrinkage.soft(z, threshold)

    def norm(self, z: Tensor) -> Tensor:
        return z.abs()

    def polar(self, c: Tensor) -> Tensor:
        return c.abs()


class Elastic(Prox):
    """Elastic net, ``λ (r‖u‖₁ + (1 − r)/2 ‖u‖₂²)``: `elastic`.

    Its conjugate ``Σ soft(c, λr)² / (2λ(1 − r))`` is finite everywhere, unless r = 1.

    Args:
        l1_ratio: r in [0, 1], as in scikit-learn: 1 is `soft`, 0 scales.
    """

    is_convex = True

    def __init__(
        self,
        threshold: float | Sequence[float] | None = None,
        learn: bool = False,
        dim: int = 1,
        l1_ratio: float = 0.5,
    ) -> None:
        super().__init__(threshold, learn, dim)
        self.l1_ratio = _ratio(l1_ratio)

    def shrink(self, z: Tensor, threshold: Threshold) -> Tensor:
        return shrinkage.elastic(z, threshold, self.l1_ratio)

    def norm(self, z: Tensor) -> Tensor:
        return self.l1_ratio * z.abs() + (1 - self.l1_ratio) / 2 * z.square()

    def polar(self, c: Tensor) -> Tensor:
        return c.abs() * (self.l1_ratio == 1 or self._broadcast(c) == 0)  # no curvature, no bound on the conjugate

    def conjugate(self, c: Tensor) -> Tensor:
        if self.l1_ratio == 1:
            return super().conjugate(c)
        threshold = self._broadcast(c)
        beyond = shrinkage.soft(c, self.l1_ratio * threshold)
        value = beyond.square() / (2 * (1 - self.l1_ratio) * threshold)
        return torch.where(beyond == 0, 0, value).flatten(1).sum(1)

    def zeroing_threshold(self, size: float, channels: int) -> float:
        if self.l1_ratio == 0:
            raise ValueError("elastic with l1_ratio=0 only scales and makes no entry 0: give l1_ratio > 0")
        return size / self.l1_ratio

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, l1_ratio={self.l1_ratio}"


class Grouped(Prox):
    """A prox of groups: equal, consecutive channels along `dim`.

    Args:
        group_size: channels a group (default 8), or
        groups: the number of groups; never both.
    """

    is_grouped = True

    def __init__(
        self,
        threshold: float | Sequence[float] | None = None,
        learn: bool = False,
        dim: int = 1,
        group_size: int | None = None,
        groups: int | None = None,
    ) -> None:
        super().__init__(threshold, learn, dim)
        if group_size is not None and groups is not None:
            raise ValueError(f"give group_size or groups, not both (got {group_size} and {groups})")
        self.groups = None if groups is None else count_of("groups", groups)
        self.group_size = 8 if group_size is None else count_of("group_size", group_size)

    def group_size_of(self, channels: int) -> int:
        if self.groups is None:
            return self.group_size
        if channels % self.groups:
            raise ValueError(
                f"groups={self.groups} does not divide the {channels} channels; "
                f"nearest numbers that do: {nearest_divisors(channels, self.groups)}"
            )
        return channels // self.groups

    def grouped(self, z: Tensor) -> tuple[Tensor, int]:
        """View of `z` with `dim` split into (groups, group_size), and the dimension of the latter."""
        return grouped(z, self.group_size_of(z.shape[self.dim]), self.dim), self.dim % z.ndim + 1

    def extra_repr(self) -> str:
        size = f"group_size={self.group_size}" if self.groups is None else f"groups={self.groups}"
        return f"{super().extra_repr()}, {size}"


class GroupReLU(Grouped):
    """Group lasso, signed: `group_relu` (the group-sparse ReLU of arXiv 2102.07003)."""

    is_convex = True

    def shrink(self, z: Tensor, threshold: Threshold) -> Tensor:
        return shrinkage.group_relu(z, threshold, self.group_size_of(z.shape[self.dim]), self.dim)

    def norm(self, z: Tensor) -> Tensor:
        return group_norm(*self.grouped(z))

    def polar(self, c: Tensor) -> Tensor:
        return GroupReLU.norm(self, c)


class GroupReLUNonneg(GroupReLU):
    """Non-negative group lasso: `group_relu_nonneg`."""

    nonneg = True

    def shrink(self, z: Tensor, threshold: Threshold) -> Tensor:
        return super().shrink(F.relu(z), threshold)

    def polar(self, c: Tensor) -> Tensor:
        return super().polar(F.relu(c))


class SparseGroup(Grouped):
    """Sparse group lasso, ``λ Σ_g r‖u_g‖₁ + (1 − r)‖u_g‖₂``: `sparse_group`.

    Args:
        l1_ratio: r in [0, 1]: 1 is `soft`, 0 is `group_relu`.
    """

    is_convex = True

    def __init__(
        self,
        threshold: float | Sequence[float] | None = None,
        learn: bool = False,
        dim: int = 1,
        group_size: int | None = None,
        groups: int | None = None,
        l1_ratio: float = 0.5,
    ) -> None:
        super().__init__(threshold, learn, dim, group_size, groups)
        self.l1_ratio = _ratio(l1_ratio)

    def shrink(self, z: Tensor, threshold: Threshold) -> Tensor:
        return shrinkage.sparse_group(z, threshold, self.group_size_of(z.shape[self.dim]), self.l1_ratio, self.dim)

    def norm(self, z: Tensor) -> Tensor:
        groups, inner = self.grouped(z)
        absolute = groups.abs().sum(inner, keepdim=True, dtype=torch.promote_types(groups.dtype, torch.float32))
        return self.l1_ratio * absolute + (1 - self.l1_ratio) * group_norm(groups, inner)

    def polar(self, c: Tensor) -> Tensor:
        groups, inner = self.grouped(c)
        return _sparse_group_polar(groups.movedim(inner, -1), self.l1_ratio).movedim(-1, inner)

    def zeroing_threshold(self, size: float, channels: int) -> float:
        root = self.group_size_of(channels) ** 0.5
        return size * root / (self.l1_ratio * root + 1 - self.l1_ratio)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, l1_ratio={self.l1_ratio}"


def _sparse_group_polar(groups: Tensor, r: float) -> Tensor:
    """The root ν of ``‖soft(c, rν)‖₂ = (1 − r)ν`` for the groups c along the last dimension, which it keeps.

    In closed form by sorting: with the k entries above rν known, a quadratic (the ε-norm of Burdakov 1988; Ndiaye et
    al. 2016, arXiv 1602.06225). Sums of squares are taken about the mean, so that nothing cancels as r nears 1.
    """
    size = groups.abs().to(torch.promote_types(groups.dtype, torch.float32)).sort(descending=True).values
    largest = size[..., :1]
    size = size / torch.where(largest == 0, 1, largest)
    count = torch.ones_like(size).cumsum(-1)
    mean = size.cumsum(-1) / count
    spread = ((size - mean).square() * count / (count - 1).clamp_min(1)).cumsum(-1)
    above = r**2 * (spread + count * (mean - size).square()) < (1 - r) ** 2 * size.square()
    last = above.sum(-1, keepdim=True).sub(1).clamp_min(0)
    k, mean, spread = (first.gather(-1, last) for first in (count, mean, spread))
    energy = spread + k * mean.square()
    root = ((1 - r) ** 2 * energy - r**2 * k * spread).clamp_min(0).sqrt()
    return largest * energy / (r * k * mean + root).clamp_min(torch.finfo(size.dtype).tiny)


def inverse_softplus(value: Tensor) -> Tensor:
    """The number whose softplus is `value`, for values above 0."""
    return value + (-(-value).expm1()).log()


def _ratio(l1_ratio: float) -> float:
    if not 0 <= l1_ratio <= 1:
        raise ValueError(f"l1_ratio must lie between 0 (no ℓ1) and 1 (ℓ1 alone), got {l1_ratio}")
    return l1_ratio


def count_of(name: str, value: int) -> int:
    """`value`, if it counts something: a whole number of at least 1. Raises ValueError naming it otherwise."""
    if not isinstance(value, Integral):  # NumPy's too
        raise ValueError(f"{name} must be a whole number, got {value!r}")
    if value < 1:
        raise ValueError(f"{name} must be at least 1, got {value}")
    return int(value)
