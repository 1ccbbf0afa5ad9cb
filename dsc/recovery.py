"""How well a dictionary is recovered, up to what cannot be told apart: sign, order, and a rotation within a group.

Atoms are rows, (atoms, features), as the weights of a `DenseDictionary`; groups are `group_size` consecutive ones.
Assignments are those of largest total (the Hungarian method, by SciPy).
"""

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from torch.nn import functional as F

from dsc._names import unknown
from dsc.shrinkage import grouped

Match = Literal["none", "within", "groups", "atoms"]


def dictionary_distance(atoms: Tensor, truth: Tensor, group_size: int = 1, match: Match = "none") -> Tensor:
    """``Σ_i ‖a_i/‖a_i‖ − a*_i/‖a*_i‖‖²``, the squared Frobenius distance of normalised atoms.

    With a `match` it is the least over signs and over the orders of atoms that this allows: "within" each group, of
    "groups" as a whole and within each, or of all "atoms". Shapes: both (atoms, features).

    Raises ValueError for different shapes, an unknown match, or a group size that does not divide the atoms.
    """
    order = match_atoms(atoms, truth, group_size, match)
    cosines = F.cosine_similarity(atoms[order], truth, dim=1)
    if match != "none":
        cosines = cosines.abs()
    return 2 * (1 - cosines).sum()


def match_atoms(atoms: Tensor, truth: Tensor, group_size: int = 1, match: Match = "atoms") -> Tensor:
    """Which row of `atoms` each true atom is, int64 (atoms,): the order of largest total absolute cosine.

    Raises what `dictionary_distance` does.
    """
    _check_same_shape(atoms, truth)
    if match not in get_args(Match):
        raise ValueError(unknown("match", match, get_args(Match)))
    if match == "none":
        return torch.arange(len(atoms), device=atoms.device)
    cosines = (F.normalize(truth, dim=1) @ F.normalize(atoms, dim=1).mT).abs()
    if match == "atoms":
        return assign(cosines)
    blocks = _blocks(cosines, group_size)
    groups = torch.arange(len(blocks), device=atoms.device)
    partner = groups if match == "within" else assign(_best_within(blocks))
    inner = torch.stack([assign(block) for block in blocks[groups, partner]])
    return (partner.unsqueeze(1) * group_size + inner).flatten()


def assign(gains: Tensor) -> Tensor:
    """The column of each row, one to one, with the largest total gain: int64 (rows,), for rows ≤ columns."""
    _, columns = linear_sum_assignment(gains.detach().cpu(), maximize=True)
    return torch.as_tensor(columns, device=gains.device)


@dataclass(frozen=True)
class GroupMatch:
    """Which learned group is which true one, and how near their subspaces and atoms are.

    Attributes:
        order: the learned group of each true one, int64 (groups,).
        affinities: ``‖QᵀQ*‖_F²/d`` of their orthonormal bases, which is the mean squared cosine of the principal
            angles, (groups,).
        correlations: cosine of each atom and its true one after the rotation within the group that brings all of
            the group's atoms nearest (Procrustes), (groups, d).
    """

    order: Tensor
    affinities: Tensor
    correlations: Tensor

    @property
    def mean_squared_cosine(self) -> float:
        """Mean of the affinities, in [0, 1]: 1 where every subspace is recovered."""
        return float(self.affinities.mean())

    def align(self, z: Tensor) -> Tensor:
        """Codes (signals, atoms) of the learned dictionary with their groups in the order of the true ones."""
        return grouped(z, self.correlations.shape[1])[:, self.order].flatten(1)


def match_groups(atoms: Tensor, truth: Tensor, group_size: int) -> GroupMatch:
    """The order of groups with the largest total affinity of subspaces.

    Raises ValueError for different shapes, or a group size that does not divide the atoms or exceeds the features.
    """
    _check_same_shape(atoms, truth)
    bases, found = orthonormal_groups(truth, group_size), orthonormal_groups(atoms, group_size)
    affinities = group_affinities(bases, found, group_size)
    order = assign(affinities)
    rotated = procrustes(grouped(atoms, group_size, 0)[order], grouped(truth, group_size, 0))
    correlations = F.cosine_similarity(rotated, grouped(truth, group_size, 0), dim=2)
    return GroupMatch(order, affinities.gather(1, order.unsqueeze(1)).squeeze(1), correlations)


def group_affinities(bases: Tensor, others: Tensor, group_size: int) -> Tensor:
    """``‖Q_gᵀQ'_h‖_F²/d`` of orthonormal rows in groups of d: in [0, 1], (groups, other groups)."""
    return _blocks((bases @ others.mT).square(), group_size).sum((2, 3)) / group_size


def orthonormal_groups(atoms: Tensor, group_size: int) -> Tensor:
    """Atoms of the same group subspaces that are orthonormal within each group, of the same shape.

    They are the nearest ones, ``U Vᵀ`` of each group's singular value decomposition. Where a group spans less than d
    dimensions, so do its rows: a dead group stays zero.

    Raises ValueError for groups of more atoms than features.
    """
    groups = grouped(atoms, group_size, 0)
    if group_size > atoms.shape[1]:
        raise ValueError(f"group_size={group_size} atoms of {atoms.shape[1]} features cannot be orthonormal")
    left, sizes, right = torch.linalg.svd(groups, full_matrices=False)
    spanned = sizes > torch.finfo(sizes.dtype).eps * max(groups.shape[1:]) * sizes[:, :1]
    return ((left * spanned.unsqueeze(1)) @ right).flatten(0, 1)


def procrustes(groups: Tensor, truth: Tensor) -> Tensor:
    """Each group of rows, rotated or reflected within its span to be nearest to the true one: (groups, d, features)."""
    left, _, right = torch.linalg.svd(truth @ groups.mT)
    return left @ right @ groups


def _best_within(blocks: Tensor) -> Tensor:
    """Largest total of each pair of groups over orders within, (groups, groups)."""
    if blocks.shape[2] == 1:
        return blocks.flatten(1)
    totals = [torch.stack([block.gather(1, assign(block).unsqueeze(1)).sum() for block in row]) for row in blocks]
    return torch.stack(totals)


def _blocks(products: Tensor, group_size: int) -> Tensor:
    """A matrix (atoms, atoms) as (groups, groups, d, d)."""
    return grouped(grouped(products, group_size, 0), group_size, 2).transpose(1, 2)


def _check_same_shape(atoms: Tensor, truth: Tensor) -> None:
    if atoms.shape != truth.shape or atoms.ndim != 2:
        raise ValueError(
            f"atoms of shape {tuple(atoms.shape)} and true ones of shape {tuple(truth.shape)}: both must be the same "
            "(atoms, features)"
        )
