"""Generative models with known ground truth: signals with the dictionary and the codes they were made from."""

import torch
from torch import Tensor

from dsc.dictionaries import DenseDictionary


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
        ValueError: a size below 1, or p outside (0, 1].
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
        self.active, self.snr_db = active, snr_db
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.dictionary = DenseDictionary(num_features, num_atoms).requires_grad_(False)

    @property
    def noise(self) -> float:
        """σ, the standard deviation of an entry of e."""
        if self.snr_db is None:
            return 0.0
        energy = self.active * self.dictionary.num_atoms
        return float((energy / self.dictionary.num_features * 10 ** (-self.snr_db / 10)) ** 0.5)

    def sample(self, count: int, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        """Signals (count, features) and their true codes (count, atoms)."""
        shape = (count, self.dictionary.num_atoms)
        support = torch.rand(shape, generator=generator) < self.active
        z = torch.randn(shape, generator=generator) * support
        x = self.dictionary.synthesize(z)
        return x + self.noise * torch.randn(x.shape, generator=generator), z
