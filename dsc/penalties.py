"""Every convex penalty of the library as one formula, on whole codes and on working sets of them."""

from dataclasses import dataclass

import torch
from torch import Tensor

from dsc import shrinkage
from dsc.prox import Elastic, Grouped, Prox, SparseGroup

Weight = float | Tensor


@dataclass(frozen=True)
class Penalty:
    """``h(z) = Σ_i l1_i |z_i| + Σ_g l2_g ‖z_g‖₂ + Σ_i ½ ridge_i z_i²``, over z ≥ 0 if `nonneg`.

    A weight is a number or a tensor: (entries,) for l1 and ridge, (groups, 1) for l2, or with a batch in front.
    Groups hold `size` consecutive entries; codes have shape (signals, entries).
    """

    l1: Weight
    l2: Weight
    ridge: Weight
    size: int
    nonneg: bool

    def take(self, entries: Tensor, groups: Tensor) -> "Penalty":
        """h of the given entries and groups: (signals, …) of each."""
        l1, ridge = (w[entries] if isinstance(w, Tensor) and w.ndim > 0 else w for w in (self.l1, self.ridge))
        l2 = self.l2[groups] if isinstance(self.l2, Tensor) and self.l2.ndim > 0 else self.l2
        return Penalty(l1, l2, ridge, self.size, self.nonneg)

    def rows(self, index: Tensor) -> "Penalty":
        """h of some of the signals, where `take` made it one of several."""
        l1, l2, ridge = (
            w[index] if isinstance(w, Tensor) and w.ndim > 1 else w for w in (self.l1, self.l2, self.ridge)
        )
        return Penalty(l1, l2, ridge, self.size, self.nonneg)

    def minimiser(self, u: Tensor) -> Tensor:
        """``argmin_v ½‖v‖² − ⟨u, v⟩ + h(v)``."""
        v = u
        if self.nonneg:
            v = shrinkage.relu(u, self.l1)
        elif given(self.l1):
            v = shrinkage.soft(u, self.l1)
        if given(self.l2):
            v = shrinkage.group_relu(v, self.l2, self.size)
        return v / (1 + self.ridge) if given(self.ridge) else v

    def value(self, z: Tensor) -> Tensor:
        """h(z) of each signal, for feasible z."""
        total = (self.l1 * z.abs()).sum(1) if given(self.l1) else z.new_zeros(len(z))
        if given(self.l2):
            total = total + (self.l2 * self.norms(z)).sum((1, 2))
        return total + (self.ridge * z.square()).sum(1) / 2 if given(self.ridge) else total

    def gradient(self, z: Tensor) -> Tensor:
        """∇h(z) on the support of z."""
        slope = self.l1 * z.sign() + self.ridge * z
        if given(self.l2):
            slope = slope + (self.l2 * self._unit(z)).flatten(1)
        return slope

    def add_curvature(self, hessian: Tensor, z: Tensor) -> None:
        """Add ∇²h(z), on the support of z, to `hessian` of shape (signals, entries, entries)."""
        if given(self.ridge):
            hessian.diagonal(dim1=1, dim2=2).add_(self.ridge * (z != 0))
        if given(self.l2):
            unit, norms = self._unit(z), self.norms(z)
            tangent = torch.diag_embed((unit != 0).to(z.dtype)) - unit[..., :, None] * unit[..., None, :]
            blocks = tangent * (self.l2 / torch.where(norms > 0, norms, 1))[..., None]
            by_groups = hessian.unflatten(2, (-1, self.size)).unflatten(1, (-1, self.size))
            by_groups.diagonal(dim1=1, dim2=3).add_(blocks.permute(0, 2, 3, 1))

    def norms(self, z: Tensor) -> Tensor:
        """‖z_g‖₂, shape (signals, groups, 1)."""
        if self.size == 1:
            return z.abs().unsqueeze(-1)
        return torch.linalg.vector_norm(z.unflatten(1, (-1, self.size)), dim=2, keepdim=True)

    def _unit(self, z: Tensor) -> Tensor:
        norms = self.norms(z)
        return z.unflatten(1, (-1, self.size)) / torch.where(norms > 0, norms, 1)

    @property
    def is_curved(self) -> bool:
        """Whether h is not quadratic on a support of fixed signs."""
        return given(self.l2)

    def reach(self, z: Tensor, step: Tensor) -> Tensor:
        """Largest fraction of `step` up to which each entry of z keeps clear of a kink of h: at most 1, for z ≠ 0.

        Kinks are where an entry becomes 0 (l1, or z ≥ 0) and where a group does; the latter is met, or nearly, when
        the step has brought the group to ``⟨z_g, z_g + t step_g⟩ = 0``.
        """
        reach = torch.ones_like(z)
        if self.nonneg or given(self.l1):
            reach = torch.where(z * (z + step) < 0, -z / step, reach)
        if given(self.l2):
            energy = self.norms(z).square()
            inward = (z * step).unflatten(1, (-1, self.size)).sum(2, keepdim=True)
            until = torch.where(energy + inward < 0, -energy / inward, 1)
            reach = torch.minimum(reach, until.expand(-1, -1, self.size).flatten(1))
        return reach


def given(weight: Weight) -> bool:
    """Whether a weight is anything but the number 0."""
    return isinstance(weight, Tensor) or weight != 0


def penalty_of(prox: Prox, size: int, scale: Tensor | None = None, padding: int = 0) -> Penalty:
    """h of a convex `prox` with groups of `size`, in terms of ``z·scale`` (one a group; None for 1).

    `padding` more groups stand behind, whose weight is 1.
    """
    ratio = getattr(prox, "l1_ratio", 1.0)
    weight: Weight = prox.threshold.detach() if isinstance(prox.threshold, Tensor) else prox.threshold
    squared = weight
    if scale is not None:
        weight, squared = weight / scale, weight / scale.square()
    weight, squared = _padded(weight, padding), _padded(squared, padding)
    vector = isinstance(weight, Tensor) and weight.ndim > 0
    entry = weight.repeat_interleave(size) if isinstance(weight, Tensor) and vector else weight
    group = weight.unsqueeze(1) if isinstance(weight, Tensor) and vector else weight
    if isinstance(prox, SparseGroup):
        return Penalty(ratio * entry, (1 - ratio) * group, 0.0, size, False)
    if isinstance(prox, Grouped):
        return Penalty(0.0, group, 0.0, size, prox.nonneg)
    if isinstance(prox, Elastic):
        return Penalty(ratio * entry, 0.0, (1 - ratio) * squared, 1, False)
    return Penalty(entry, 0.0, 0.0, 1, prox.nonneg)


def _padded(weight: Weight, padding: int) -> Weight:
    if not isinstance(weight, Tensor):
        return weight
    if weight.numel() == 1:
        return weight.reshape(())
    return torch.cat([weight, weight.new_ones(padding)])
