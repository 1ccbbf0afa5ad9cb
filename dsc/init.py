"""Where a dictionary's atoms begin, in the spirit of `torch.nn.init`: rows of unit norm, (atoms, features).

The first four are the starts of *On the convergence of group-sparse autoencoders* (arXiv 2102.07003) and of its
authors' code; the last finds groups in signals alone. They are for `DenseDictionary.from_atoms`; the random start is
the dictionary's own, ``DenseDictionary(features, atoms)``.
"""

import math
from collections.abc import Iterable
from typing import Literal

import torch
from scipy.optimize import brentq
from torch import Generator, Tensor, nn
from torch.nn import functional as F

Start = Literal["singular", "samples"]
PARTNERS = 4  # signals that one is paired with, to find a subspace they share


def perturbed(truth: Tensor, correlation: float, generator: Generator | None = None) -> Tensor:
    """True atoms, (atoms, features), with a Gaussian perturbation: ``(a*_i + σb_i)/‖a*_i + σb_i‖``, b_i ~ N(0, I).

    σ, one for all, is such that the mean of ``⟨a_i, a*_i⟩/‖a*_i‖`` is `correlation`: such a start needs no matching to
    the truth. Raises ValueError for a correlation outside [0, 1] or a true atom that is zero.
    """
    if not 0 <= correlation <= 1:
        raise ValueError(f"correlation must be from 0 to 1, got {correlation}")
    unit = _unit(truth, "true atom")
    noise = torch.randn(unit.shape, generator=generator, dtype=unit.dtype, device=unit.device) / unit.shape[1] ** 0.5

    def moved(angle: float) -> Tensor:  # σ is the angle's tangent, so that a bounded interval has all of them
        return F.normalize(math.cos(angle) * unit + math.sin(angle) * noise, dim=1)

    # Each ⟨a_i, a*_i⟩ falls from 1 to −1 as the angle grows: there is one root.
    angle = brentq(lambda angle: float((moved(angle) * unit).sum(1).mean()) - correlation, 0, math.pi, xtol=1e-9)
    return moved(angle) if correlation < 1 else unit


def data_samples(signals: Tensor, num_atoms: int, generator: Generator | None = None) -> Tensor:
    """That many different signals of (signals, features), drawn at random and normalised; zero ones are left out.

    Raises ValueError where there are fewer.
    """
    candidates = signals[signals.any(1)]
    if num_atoms > len(candidates):
        raise ValueError(f"num_atoms={num_atoms} of signals that are not zero: there are {len(candidates)}")
    drawn = torch.randperm(len(candidates), generator=generator, device=signals.device)[:num_atoms]
    return F.normalize(candidates[drawn], dim=1)


def singular(signals: Tensor, num_atoms: int) -> Tensor:
    """The right singular vectors of the signals (signals, features) with the largest singular values, largest first.

    Raises ValueError for more of them than there are signals or features.
    """
    if num_atoms > min(signals.shape):
        raise ValueError(f"num_atoms={num_atoms} singular vectors: {len(signals)} signals of {signals.shape[1]} "
                         f"features have {min(signals.shape)}")  # fmt: skip
    # The triangle has the same ones, and no left vectors that are as many as the signals.
    triangle = torch.linalg.qr(signals, mode="r").R
    return torch.linalg.svd(triangle, full_matrices=False).Vh[:num_atoms].contiguous()


def singular_groups(signals: Tensor, num_groups: int, group_size: int, generator: Generator | None = None) -> Tensor:
    """Groups ``Q_gV``: V the first d singular vectors of the signals, Q_g a random orthogonal matrix of d × d each.

    All groups span one subspace, in different coordinates. Raises ValueError as `singular` does.
    """
    leading = singular(signals, group_size)
    turns = [nn.init.orthogonal_(leading.new_empty(group_size, group_size), generator=generator)
             for _ in range(num_groups)]  # fmt: skip
    return torch.cat([turn @ leading for turn in turns])


def from_signals(
    signals: Tensor, num_atoms: int, group_size: int, start: Start, generator: Generator | None = None
) -> Tensor:
    """Atoms from signals (signals, features): `data_samples`, or `singular` (in groups of several `singular_groups`).

    Raises what these do.
    """
    if start == "samples":
        return data_samples(signals, num_atoms, generator)
    if group_size == 1:
        return singular(signals, num_atoms)
    return singular_groups(signals, num_atoms // group_size, group_size, generator)


def shared_subspaces(signals: Tensor, num_groups: int, group_size: int, threshold: float) -> Tensor:
    """Orthonormal groups, one after the other: each a subspace that the signal represented worst shares with others.

    Signals (signals, features) of few groups each correlate, as a rule, only where they share one; those that correlate
    with both of such a pair share it, too, and their first singular vectors span it (Arora et al. 2015, arXiv
    1503.00778, for single atoms). From there the subspace follows the signals y with ``‖Qy‖ > λ``, the `threshold`,
    and what it explains of them is taken off before the next. No knowledge of the true atoms enters.

    Raises ValueError for fewer signals than twice the atoms, or groups of more atoms than features.
    """
    if len(signals) < 2 * num_groups * group_size or group_size > signals.shape[1]:
        raise ValueError(
            f"{len(signals)} signals of {signals.shape[1]} features for {num_groups} groups of {group_size}: it takes "
            f"at least {2 * num_groups * group_size} signals of {group_size} features"
        )
    residual = signals.clone()
    energy = residual.square().sum(1)
    groups = []
    for _ in range(num_groups):
        worst = int(energy.argmax())
        energy[worst] = 0  # whether or not its group explains it, another's turn is next
        basis = _shared_with(residual, worst, group_size, threshold, len(signals) // num_groups)
        basis = _followed(residual, basis, threshold, (group_size, group_size))
        projected = residual @ basis.mT
        active = projected.square().sum(1) > threshold**2
        residual[active] -= projected[active] @ basis
        energy[active] = residual[active].square().sum(1)
        groups.append(basis)
    return torch.cat(groups)


def _shared_with(signals: Tensor, index: int, group_size: int, threshold: float, expected: int) -> Tensor:
    """Orthonormal rows (d, features) of a subspace that this signal shares with about as many others as `expected`."""
    own = signals @ signals[index]
    own[index] = 0
    count = min(max(expected, 2 * PARTNERS), len(signals) - 1)
    nearest = own.abs().topk(min(10 * count, len(signals) - 1)).indices
    near, own = signals[nearest], own[nearest]
    best, largest = _leading(near[:count], group_size), 0.0
    for partner in range(0, count, max(count // PARTNERS, 1)):
        weights = own * (near @ near[partner])
        strongest = weights.abs().topk(count).indices
        first = _leading(near[strongest] * weights[strongest].unsqueeze(1), 1)
        basis = _followed(near, first, threshold, (*range(1, group_size + 1), group_size))
        energy = (near @ basis.mT).square().sum(1)
        energy = energy[energy > threshold**2]
        # A subspace of half a group and half another has signals partly in it, and so a smaller mean by energy.
        contrast = float(energy.square().sum() / energy.sum())
        if len(basis) == group_size and contrast > largest:
            best, largest = basis, contrast
    return best


def _followed(signals: Tensor, basis: Tensor, threshold: float, ranks: Iterable[int]) -> Tensor:
    """The subspace moved to the first singular vectors of its signals, to each of these ranks in turn."""
    for rank in ranks:
        active = (signals @ basis.mT).square().sum(1) > threshold**2
        if int(active.sum()) < rank:
            break
        basis = _leading(signals[active], rank)
    return basis


def _leading(signals: Tensor, rank: int) -> Tensor:
    return torch.linalg.svd(signals, full_matrices=False).Vh[:rank]


def _unit(atoms: Tensor, what: str) -> Tensor:
    norms = atoms.norm(dim=1, keepdim=True)
    if not norms.all():
        raise ValueError(f"{what} {int(norms.argmin())} is zero and has no direction")
    return atoms / norms
