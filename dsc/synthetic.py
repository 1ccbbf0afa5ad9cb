"""Generative models with known ground truth: signals with the dictionary and the codes they were made from."""

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from dsc.dictionaries import ConvDictionary, DenseDictionary, Dictionary
from dsc.recovery import orthonormal_groups
from dsc.shrinkage import grouped, nearest_divisors


class BernoulliGaussian:
    """``x = Dz + e``: each entry of z is active with probability p, and then N(0, 1); e is white Gaussian noise.

    D has unit-norm Gaussian atoms. The signal-to-noise ratio is that of expected energies, which fixes the noise's
    standard deviation exactly: ``SNR = 10 log₁₀(E‖Dz‖²/E‖e‖²)`` dB with ``E‖Dz‖² = pn`` and ``E‖e‖² = mσ²``, so
    ``σ² = pn / (m 10^{SNR/10})``. The standard protocol of learned solvers is the default (Chen et al. 2018).

    Args:
        num_features: m.
        num_atoms: n.
        active: p, in (0, 1].
        snr_db: SNR in dB, or None for no noise.
        seed: of the dictionary.

    Raises:
        ValueError: a size below 1, p outside (0, 1], or an SNR of −inf or NaN.
    """

    def __init__(
        self,
        num_features: int = 250,
        num_atoms: int = 500,
        active: float = 0.1,
        snr_db: float | None = None,
        seed: int = 0,
    ) -> None:
        if not 0 < active <= 1:
            raise ValueError(f"active is the probability of a non-zero entry, in (0, 1], got {active}")
        check_snr(snr_db)
        self.active, self.snr_db = active, snr_db
        self.dictionary = gaussian_dictionary(num_features, num_atoms, seed)

    @property
    def noise(self) -> float:
        """σ, the standard deviation of an entry of e."""
        return noise_deviation(self.active * self.dictionary.num_atoms, self.dictionary.num_features, self.snr_db)

    def sample(self, count: int, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        """Signals (count, features) and their true codes (count, atoms)."""
        shape = (count, self.dictionary.num_atoms)
        support = torch.rand(shape, generator=generator) < self.active
        z = torch.randn(shape, generator=generator) * support
        x = self.dictionary.synthesize(z)
        return x + self.noise * torch.randn(x.shape, generator=generator), z


class GroupSample(NamedTuple):
    """Signals (count, features), their codes (count, atoms), and which groups are active: bool (count, groups)."""

    signals: Tensor
    codes: Tensor
    supports: Tensor

    @property
    def labels(self) -> Tensor:
        """The group of largest norm, int64 (count,): with one active group, the class."""
        group_size = self.codes.shape[1] // self.supports.shape[1]
        return grouped(self.codes, group_size).norm(dim=2).argmax(1)


class GroupSparse:
    """A union of group subspaces, ``x = Σ_{g∈S} D_g z_g + e``: S is γ of the Γ groups of d atoms, uniformly drawn.

    The code of an active group is ``z_g = c u``, with u uniform on the sphere of R^d and c uniform in [B_min, B_max].
    D has unit-norm Gaussian atoms, e is white Gaussian noise, and as above ``SNR = 10 log₁₀(E‖Dz‖²/E‖e‖²)`` dB. The
    defaults are the simulation of *On the convergence of group-sparse autoencoders* (arXiv 2102.07003). Special cases:

    - sparse codes: ``group_size=1``, entries ±c;
    - non-negative sparse codes: ``group_size=1, nonneg=True``;
    - a mixture of Γ Gaussians of mean 0 and covariance ``D_gD_gᵀ + σ²I``: ``active_groups=1, norms=None``.

    Args:
        num_features, num_atoms: n, and Γd.
        group_size: d.
        active_groups: γ.
        norms: (B_min, B_max), or None for z_g ~ N(0, I).
        snr_db: SNR in dB, or None for no noise.
        nonneg: take absolute values of the code.
        orthonormal: make each group's atoms orthonormal, as the paper's theory assumes.
        seed: of the dictionary.

    Raises:
        ValueError: a size below 1, groups that do not tile the atoms, more active groups than groups, norms that are
            not 0 < B_min ≤ B_max < ∞, or an SNR of −inf or NaN.
    """

    def __init__(
        self,
        num_features: int = 950,
        num_atoms: int = 1000,
        group_size: int = 2,
        active_groups: int = 3,
        norms: tuple[float, float] | None = (4.0, 5.0),
        snr_db: float | None = None,
        nonneg: bool = False,
        orthonormal: bool = False,
        seed: int = 0,
    ) -> None:
        if group_size < 1 or num_atoms % group_size:
            near = nearest_divisors(num_atoms, group_size)
            raise ValueError(f"groups of {group_size} do not tile {num_atoms} atoms; nearest sizes that do: {near}")
        if not 1 <= active_groups <= num_atoms // group_size:
            raise ValueError(
                f"active_groups must be from 1 to the number of groups, {num_atoms // group_size}, got {active_groups}"
            )
        if norms is not None and not 0 < norms[0] <= norms[1] < math.inf:
            raise ValueError(f"norms must be (least, largest) with 0 < least ≤ largest < inf, got {norms}")
        check_snr(snr_db)
        self.group_size, self.active_groups = group_size, active_groups
        self.norms, self.snr_db, self.nonneg = norms, snr_db, nonneg
        self.dictionary = gaussian_dictionary(num_features, num_atoms, seed)
        if orthonormal:
            self.dictionary = DenseDictionary.from_atoms(orthonormal_groups(self.dictionary.weight, group_size))
            self.dictionary.requires_grad_(False)

    @property
    def num_groups(self) -> int:
        """Γ."""
        return self.dictionary.num_atoms // self.group_size

    @property
    def noise(self) -> float:
        """σ, the standard deviation of an entry of e."""
        return noise_deviation(self.energy, self.dictionary.num_features, self.snr_db)

    @property
    def energy(self) -> float:
        """``E‖Dz‖²``: ``γ E‖z_g‖²`` for unit atoms, and with `nonneg` what the positive means of codes add."""
        d, groups, active = self.group_size, self.num_groups, self.active_groups
        mean, second = self._norm_moments()
        if not self.nonneg:
            return active * second
        gram = self.dictionary.gram()
        within = float(grouped(gram, d, 0).unflatten(2, (groups, d)).diagonal(dim1=0, dim2=2).sum())
        entry = _chi_mean(1) / _chi_mean(d)  # mean of an entry of |u|; E|u_i||u_j| is 2/(πd) for i ≠ j
        joint = active * (active - 1) / (groups * (groups - 1)) if groups > 1 else 0.0
        same = active / groups * second * 2 / (math.pi * d) * (within - len(gram))
        return active * second + same + joint * (mean * entry) ** 2 * (float(gram.sum()) - within)

    def _norm_moments(self) -> tuple[float, float]:
        """E‖z_g‖ and E‖z_g‖² of an active group."""
        if self.norms is None:
            return _chi_mean(self.group_size), float(self.group_size)
        low, high = self.norms
        return (low + high) / 2, (low * low + low * high + high * high) / 3

    def sample(self, count: int, generator: torch.Generator | None = None) -> GroupSample:
        """That many signals with the codes and supports they are made from, on the dictionary's device."""
        atoms, d, active = self.dictionary.weight, self.group_size, self.active_groups
        draw: dict[str, Any] = dict(generator=generator, device=atoms.device)
        chosen = torch.rand(count, self.num_groups, **draw).topk(active, sorted=False).indices
        z = torch.randn(count, active, d, dtype=atoms.dtype, **draw)
        if self.norms is not None:
            z = F.normalize(z, dim=2) * torch.empty_like(z[..., :1]).uniform_(*self.norms, generator=generator)
        z = (z.abs() if self.nonneg else z).flatten(1)
        indices = (chosen.unsqueeze(2) * d + torch.arange(d, device=atoms.device)).flatten(1)
        # Only the active atoms are summed: with few of many, an order less work than a matrix product.
        x = F.embedding_bag(indices, atoms, per_sample_weights=z, mode="sum")
        if self.noise:
            x = x + self.noise * torch.randn(x.shape, dtype=x.dtype, **draw)
        codes = torch.zeros(count, len(atoms), dtype=z.dtype, device=z.device).scatter_(1, indices, z)
        supports = torch.zeros(count, self.num_groups, dtype=torch.bool, device=z.device).scatter_(1, chosen, True)
        return GroupSample(x, codes, supports)


class DeepSample(NamedTuple):
    """Signals, and the codes they are made from: those of each layer, the deepest last."""

    signals: Tensor
    codes: list[Tensor]


class DeepSparse:
    """A chain of dictionaries, ``x_{j−1} = D_j x_j + e_j`` with ‖e_j‖₂ = ε_j and ‖x_j‖₀ ≤ s_j; x_0 is the signal.

    x_J has s_J non-zeros at random places, of magnitudes uniform in [low, high]. Above, codes are sparse where the
    atoms below them are: ``s_{j−1} = s_j max_i ‖d_i‖₀``. e_1 is white, and of norm ε_1; the other e_j lie on the
    support of D_j x_j, so that a tolerance costs no sparsity.

    Args:
        dictionaries: D_1, …, D_J, all dense or all convolutional; see `dsc.frames` for some of low coherence.
        sparsity: s_J.
        tolerances: ε_1, …, ε_J; default: none.
        magnitudes: (low, high).
        nonneg: no code has an entry below 0.
        side: height and width of the signals, for convolutional dictionaries.

    Raises:
        ValueError: dictionaries that do not chain, a tolerance missing or below 0, s_J below 1 or above the entries of
            x_J, magnitudes that are not 0 < low ≤ high < ∞, a `side` without or missing for convolutions, or `nonneg`
            with an entry below 0 in D_2, …, D_J.
    """

    def __init__(
        self,
        dictionaries: Sequence[Dictionary],
        sparsity: int,
        tolerances: Sequence[float] | None = None,
        magnitudes: tuple[float, float] = (0.5, 1.0),
        nonneg: bool = False,
        side: int | None = None,
    ) -> None:
        check_chain(dictionaries)
        self.dictionaries = list(dictionaries)
        self.tolerances = [0.0] * len(dictionaries) if tolerances is None else [float(e) for e in tolerances]
        if len(self.tolerances) != len(dictionaries) or not all(0 <= e < math.inf for e in self.tolerances):
            raise ValueError(f"tolerances are {len(dictionaries)} numbers of at least 0, one a layer, got {tolerances}")
        if not 0 < magnitudes[0] <= magnitudes[1] < math.inf:
            raise ValueError(f"magnitudes must be (least, largest) with 0 < least ≤ largest < inf, got {magnitudes}")
        for j, dictionary in enumerate(dictionaries[1:], 2):
            if nonneg and (lowest := float(dictionary.weight.min())) < 0:
                raise ValueError(f"nonneg codes need non-negative dictionaries below the first, layer {j} has {lowest}")
        self.magnitudes, self.nonneg = magnitudes, nonneg
        self.shapes = self._shapes(side)
        if not 1 <= sparsity <= math.prod(self.shapes[-1]):
            raise ValueError(f"sparsity must be from 1 to the {math.prod(self.shapes[-1])} entries, got {sparsity}")
        self.sparsities, self.bounds = self._reach(sparsity)

    def _shapes(self, side: int | None) -> list[tuple[int, ...]]:
        """Shapes of the signal and of every code."""
        first = self.dictionaries[0]
        if not isinstance(first, ConvDictionary):
            if side is not None:
                raise ValueError(f"dense dictionaries code vectors: expected side=None, got {side}")
            return [(first.weight.shape[1],), *((d.num_atoms,) for d in self.dictionaries)]
        if side is None:
            raise ValueError("convolutional dictionaries code images: give their height and width as side")
        shapes: list[tuple[int, ...]] = [(first.weight.shape[1], side, side)]
        for j, dictionary in enumerate(self.dictionaries, 1):
            above, side = side, dictionary.code_side(side)  # type: ignore[operator]
            if side < 1:
                raise ValueError(f"images of side {shapes[0][-1]} are too small: layer {j} would code {above} pixels")
            shapes.append((dictionary.num_atoms, side, side))
        return shapes

    def _reach(self, sparsity: int) -> tuple[list[int], list[float]]:
        """The s_j, and the B_j that no entry of x_j exceeds: both hold for every code that can be drawn."""
        sparsities, bounds = [sparsity], [self.magnitudes[1]]
        below = zip(self.dictionaries[:0:-1], self.tolerances[:0:-1], self.shapes[-2:0:-1], strict=True)
        for dictionary, tolerance, shape in below:
            weight = dictionary.weight.detach()
            taps = weight.abs().transpose(0, 1).flatten(1)  # an entry of Dx meets s atoms at most, each by one tap
            most = taps.topk(min(sparsities[0], taps.shape[1])).values.sum(1).max()
            bounds.insert(0, float(most) * bounds[0] + tolerance)
            spread = int((weight != 0).flatten(1).sum(1).max())
            sparsities.insert(0, min(sparsities[0] * spread, math.prod(shape)))
        return sparsities, bounds

    def sample(self, count: int, generator: torch.Generator | None = None) -> DeepSample:
        """That many signals, (count, features) or (count, channels, side, side), and their codes."""
        weight = self.dictionaries[-1].weight
        draw: dict[str, Any] = dict(generator=generator, device=weight.device)
        places = torch.rand(count, math.prod(self.shapes[-1]), **draw).topk(self.sparsities[-1]).indices
        values = torch.empty(places.shape, dtype=weight.dtype, device=weight.device)
        values.uniform_(*self.magnitudes, generator=generator)
        if not self.nonneg:
            values *= torch.randint(2, values.shape, **draw) * 2 - 1
        deepest = values.new_zeros(count, math.prod(self.shapes[-1])).scatter_(1, places, values)
        chain = [deepest.unflatten(1, self.shapes[-1])]
        for j in reversed(range(len(self.dictionaries))):
            with torch.no_grad():
                x = self.dictionaries[j].synthesize(chain[0], self.shapes[j][-2:])
            error = torch.randn(x.shape, dtype=x.dtype, **draw)
            if j > 0:
                error = (error.abs() if self.nonneg else error) * (x != 0)
            chain.insert(0, x + self.tolerances[j] * F.normalize(error.flatten(1)).view_as(x))
        return DeepSample(chain[0], chain[1:])


def check_chain(dictionaries: Sequence[Dictionary]) -> None:
    """Raise ValueError unless each dictionary synthesizes codes of the one before it."""
    if not dictionaries:
        raise ValueError("a chain needs at least one dictionary")
    for j, (before, after) in enumerate(pairwise(dictionaries), 2):
        if before.weight.ndim != after.weight.ndim:
            kinds = f"{type(after).__name__} after {type(before).__name__}"
            raise ValueError(
                f"dictionaries do not chain: layer {j} is a {kinds}; expected all dense or all convolutional"
            )
        if after.weight.shape[1] != before.num_atoms:
            raise ValueError(
                f"dictionaries do not chain: layer {j} synthesizes {after.weight.shape[1]} features or channels, "
                f"but layer {j - 1} has {before.num_atoms} atoms"
            )


def gaussian_dictionary(num_features: int, num_atoms: int, seed: int) -> DenseDictionary:
    """A fixed dictionary of unit-norm Gaussian atoms; the global random stream stays where it is."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return DenseDictionary(num_features, num_atoms).requires_grad_(False)


def noise_deviation(energy: float, num_features: int, snr_db: float | None) -> float:
    """σ of white noise at this SNR in dB to signals of this expected energy; 0 for None."""
    return 0.0 if snr_db is None else math.sqrt(energy / num_features * 10 ** (-snr_db / 10))


def check_snr(snr_db: float | None) -> None:
    """Raise ValueError for an SNR of −inf (there is no signal) or NaN."""
    if snr_db is not None and (math.isnan(snr_db) or snr_db == -math.inf):
        raise ValueError(f"snr_db must be a number of dB, or None for no noise, got {snr_db}")


def _chi_mean(d: int) -> float:
    """E‖g‖ of g ~ N(0, I) in R^d."""
    return math.sqrt(2) * math.exp(math.lgamma((d + 1) / 2) - math.lgamma(d / 2))
