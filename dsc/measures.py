"""Every quantity once, as a pure function of tensors."""

import torch
from torch import Tensor

from dsc.shrinkage import grouped


def active_fraction(z: Tensor) -> Tensor:
    """Fraction of entries that are not exactly zero, in [0, 1]."""
    return (z != 0).float().mean()


def active_group_fraction(z: Tensor, group_size: int, dim: int = 1) -> Tensor:
    """Fraction of groups with any entry that is not zero, in [0, 1]."""
    return group_support(z, group_size, dim).float().mean()


def group_support(z: Tensor, group_size: int, dim: int = 1) -> Tensor:
    """Which groups have an entry that is not zero: bool, with `dim` as groups."""
    return (grouped(z, group_size, dim) != 0).any(dim % z.ndim + 1)


def strongest_group(z: Tensor, group_size: int, dim: int = 1) -> Tensor:
    """Group of largest norm in each signal's code, over all positions: int64 (signals,); of a zero code the first."""
    energy = z.square().movedim(dim, 1).reshape(len(z), z.shape[dim], -1).sum(2)
    return grouped(energy, group_size).sum(2).argmax(1)


def hoyer(z: Tensor) -> Tensor:
    """Hoyer index ``(√n − ‖z‖₁/‖z‖₂)/(√n − 1)`` of each signal: 0 for equal entries, 1 for a single one.

    Shape (signals,); signals whose code is all zero have no index and are left out (Hoyer 2004).
    """
    flat = z.flatten(1).float()
    if flat.shape[1] < 2:
        raise ValueError("a Hoyer index needs codes of at least two entries")
    flat = flat[flat.any(1)] / flat[flat.any(1)].abs().amax(1, keepdim=True)  # keeps tiny codes from underflow
    root = flat.shape[1] ** 0.5
    return (root - flat.norm(p=1, dim=1) / flat.norm(dim=1)) / (root - 1)


def mean_l1(z: Tensor) -> Tensor:
    """Mean absolute entry, ``‖z‖₁/n``."""
    return z.abs().mean()


def mean_group_l21(z: Tensor, group_size: int, dim: int = 1) -> Tensor:
    """Mean group norm by entry, ``Σ_g ‖z_g‖₂/n``; with groups of one entry this is `mean_l1`."""
    norms = torch.linalg.vector_norm(grouped(z, group_size, dim), dim=dim % z.ndim + 1)
    return norms.sum() / z.numel()


def hoyer_square(z: Tensor) -> Tensor:
    """Mean over signals of ``‖z‖₁²/(n‖z‖₂²)``, in (0, 1] and 0 for a zero code (DeepHoyer, Yang et al. 2020)."""
    flat = z.flatten(1)
    energy = flat.square().sum(1).clamp_min(torch.finfo(flat.dtype).tiny ** 0.5)
    return (flat.abs().sum(1).square() / energy).mean() / flat.shape[1]


def mean_log(z: Tensor, eps: float) -> Tensor:
    """``Σ log(1 + |z|/ε)/n``."""
    return (z.abs() / eps).log1p().mean()


def active_units(z: Tensor, dim: int = 1) -> Tensor:
    """Which channels along `dim` are anywhere not zero: bool (channels,)."""
    others = [i for i in range(z.ndim) if i != dim % z.ndim]
    return (z != 0).any(dim=others) if others else z != 0


def relative_error(z: Tensor, reference: Tensor) -> Tensor:
    """``‖z − z_ref‖/‖z_ref‖`` over the whole batch. A reference of zero has none: raises ValueError."""
    scale = reference.norm()
    if scale == 0:
        raise ValueError("the reference code is zero: a relative error has no meaning")
    return (z - reference).norm() / scale


def relative_residual(x: Tensor, reconstruction: Tensor) -> Tensor:
    """``‖x − x̂‖²/‖x‖²`` over the whole batch; signals that are all zero count by the smallest number there is."""
    energy = x.square().sum().clamp_min(torch.finfo(x.dtype).tiny)
    return (x - reconstruction).square().sum() / energy


def nmse(z: Tensor, truth: Tensor) -> Tensor:
    """Normalised mean squared error in dB, ``10 log₁₀(E‖z − z*‖²/E‖z*‖²)`` over the batch; −∞ for equal codes.

    A truth of zero has none: raises ValueError.
    """
    energy = truth.square().sum()
    if energy == 0:
        raise ValueError("the true code is zero: an error relative to it has no meaning")
    return 10 * ((z - truth).square().sum() / energy).log10()


def fitted_rate(errors: Tensor, floor: float = 1e-6) -> Tensor | None:
    """Rate a step: exp of the least-squares slope of log errors, over the leading ones above `floor`.

    None where fewer than two errors are left or one is not finite.
    """
    errors = errors.detach().double()
    above = ~(errors <= floor)  # NaN counts as above, and is answered below
    errors = errors[: int(above.long().cumprod(0).sum())]
    if len(errors) < 2 or not errors.isfinite().all():
        return None
    steps = torch.arange(len(errors), dtype=errors.dtype, device=errors.device)
    centred = steps - steps.mean()
    return ((centred * errors.log()).sum() / centred.square().sum()).exp()


def coherence(atoms: Tensor) -> Tensor:
    """Largest absolute cosine between two rows of `atoms`, in [0, 1]."""
    unit = torch.nn.functional.normalize(atoms, dim=1)
    gram = (unit @ unit.mT).abs()
    return gram.fill_diagonal_(0).max()


def mean_squared_coherence(atoms: Tensor, group_size: int = 1) -> Tensor:
    """Mean squared cosine over pairs of rows in different groups of `group_size` consecutive ones, in [0, 1].

    Raises ValueError for a single group.
    """
    size = len(atoms)
    if size == group_size:
        raise ValueError(f"{size} atoms in one group: a coherence is between groups, so there must be two")
    unit = torch.nn.functional.normalize(atoms, dim=1)
    energy = grouped(grouped((unit @ unit.mT).square(), group_size, 0), group_size, 2).sum((1, 3))
    return energy.fill_diagonal_(0).sum() / (size * (size - group_size))


def block_coherence(atoms: Tensor, group_size: int) -> Tensor:
    """``max_{g≠h} ‖A_gᵀA_h‖₂/d`` of the normalised rows in groups of d consecutive ones (arXiv 2102.07003)."""
    unit = torch.nn.functional.normalize(atoms, dim=1)
    return block_norms(unit, unit, group_size).fill_diagonal_(0).max() / group_size


def block_norms(atoms: Tensor, others: Tensor, group_size: int) -> Tensor:
    """``‖A_gᵀB_h‖₂`` of rows as they are, in groups of d consecutive ones: (groups, other groups)."""
    products = torch.einsum("gdn,hen->ghde", grouped(atoms, group_size, 0), grouped(others, group_size, 0))
    return torch.linalg.matrix_norm(products, ord=2)
