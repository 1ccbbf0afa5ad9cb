"""How fast an unrolled network finds the true code: the linear rate of LISTA-CP (Chen et al. 2018, arXiv 1808.10038).

For a signal ``b = Dx* + e`` with at most s non-zeros in x*, none larger than B, and ‖e‖₂ ≤ σ, the iteration is

    ``x^{k+1} = S_{θ_k}(x^k + Wᵀ(b − Dx^k))``,  ``w_iᵀd_i = 1``,  ``x^0 = 0``,

with ``μ̃ = max_{i≠l} |w_iᵀd_l|`` and ``C_W = max_i ‖w_i‖₂``. With ``t_0 = sB``, θ_k and the bound t_k of ‖x^k − x*‖₁ are

    ``θ_k = μ̃ t_k + C_W σ``,  ``t_{k+1} = ρ t_k + 2s C_W σ``,  ``ρ = (2s − 1)μ̃``,

so that no step has a false positive, and ``‖x^k − x*‖₂ ≤ t_k ≤ sBρ^k + Cσ`` with ``C = 2s C_W/(1 − ρ)``: linear down to
the floor Cσ wherever ρ < 1, that is ``s < ½(1 + 1/μ̃)``. The thresholds need s, B and σ, and never the code.

Of J layers in sequence each codes what the one before found: ``σ_j = ε_j + t_K`` of layer j − 1, after its K steps.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import count

import numpy as np
import torch
from torch import Tensor

from dsc import measures
from dsc.dictionaries import DenseDictionary, Dictionary
from dsc.layers import DeepSparseCoding
from dsc.learned import Coupled, analytic_weights
from dsc.prox import ReLU, Soft, inverse_softplus
from dsc.theory.deep import check_unit_norm, inner_products
from dsc.theory.guarantees import Finding


@dataclass(frozen=True)
class LinearRate(Finding):
    """What the theory predicts of a layer; `value` is the factor ρ a step, and it is vacuous where ρ ≥ 1.

    Attributes:
        coherence: μ̃.
        gain: C_W.
        sparsity: s.
        magnitude: B.
        noise: σ.
    """

    coherence: float
    gain: float
    sparsity: int
    magnitude: float
    noise: float

    @property
    def floor(self) -> float:
        """``Cσ``, the error that noise leaves at most. Raises ValueError where there is no rate."""
        self._check()
        return 2 * self.sparsity * self.gain * self.noise / (1 - self.value)

    def bounds(self, steps: int) -> Tensor:
        """``t_0, …, t_K``, float64 (steps + 1,). Raises ValueError where there is no rate."""
        decay = self.value ** torch.arange(steps + 1, dtype=torch.float64)
        return self.sparsity * self.magnitude * decay + self.floor * (1 - decay)

    def thresholds(self, steps: int) -> Tensor:
        """``θ_0, …, θ_{K−1}``, float64 (steps,). Raises ValueError where there is no rate."""
        return self.coherence * self.bounds(steps - 1) + self.gain * self.noise

    def _check(self) -> None:
        if self.vacuous:
            raise ValueError(
                f"no rate is guaranteed: (2s − 1)μ̃ = {self.value:.4g} for s = {self.sparsity} and μ̃ = "
                f"{self.coherence:.4g}; it must be below 1, which takes s < {(1 + 1 / self.coherence) / 2:.4g}"
            )


@dataclass(frozen=True)
class MeasuredRate(Finding):
    """A straight line through the logarithms of errors; `value` is R², and it holds from 0.99 on.

    Attributes:
        rate: factor a step.
        last: the last error; with noise, its floor.
        steps: how many errors lie above ten times that, through which the line goes.
    """

    rate: float
    last: float
    steps: int


class PredictedLISTACP(Coupled):
    """K steps ``x^{k+1} = S_{θ_k}(x^k + Wᵀ(b − Dx^k))`` with the thresholds of a `LinearRate`: nothing is learned yet.

    No entry outside the true support becomes non-zero, up to rounding: of equiangular atoms the interference can equal
    the threshold.

    Args:
        dictionary: D.
        weights: W, as a dictionary of the shape of D.
        rate: what `linear_rate` found of them.
        steps: K.
        nonneg: the code is known to have no entry below 0: ``S_θ(u) = ReLU(u − θ)``.

    Raises:
        ValueError: no rate is guaranteed.
    """

    def __init__(
        self, dictionary: Dictionary, weights: Dictionary, rate: LinearRate, steps: int, nonneg: bool = False
    ) -> None:
        dim = -1 if isinstance(dictionary, DenseDictionary) else 1
        prox = ReLU(1.0, dim=dim) if nonneg else Soft(1.0, dim=dim)
        super().__init__(dictionary, prox, steps, decay=1.0, scale=1.0, selection=None)
        self.fixed = weights
        with torch.no_grad():
            self.raw_thresholds.copy_(inverse_softplus(rate.thresholds(steps)))

    def weights(self, k: int) -> Dictionary:
        return self.fixed


def coupled_weights(dictionary: Dictionary) -> Dictionary:
    """W: that of `dsc.learned.analytic_weights` for a dense dictionary, for a convolutional one D itself."""
    if not isinstance(dictionary, DenseDictionary):
        return dictionary
    return DenseDictionary.from_atoms(analytic_weights(dictionary)[0]).requires_grad_(False)


@torch.no_grad()
def linear_rate(
    dictionary: Dictionary, weights: Dictionary, sparsity: int, magnitude: float, noise: float = 0.0
) -> LinearRate:
    """ρ, μ̃ and C_W of a dictionary D and weights W (D itself is valid), for codes of this s and B, and this σ.

    Raises ValueError for a D of atoms that are not of unit norm, a W without ``w_iᵀd_i = 1``, a padded convolution
    (whose border atoms are cut), s below 1, or B or σ that are not positive and at least 0.
    """
    if sparsity < 1 or not 0 < magnitude < math.inf or not 0 <= noise < math.inf:
        raise ValueError(f"a rate needs s ≥ 1, 0 < B < inf and 0 ≤ σ < inf, got {sparsity}, {magnitude} and {noise}")
    if padding := getattr(dictionary, "padding", 0):
        raise ValueError(f"padding={padding} cuts atoms at the border, where w_iᵀd_i is not 1: expected padding=0")
    check_unit_norm(dictionary)
    products = inner_products(dictionary, weights.weight.detach())
    itself = products.shape[-1] // 2
    own = products[..., itself, itself]
    if not torch.allclose(own.diagonal(), own.new_ones(()), atol=1e-4):
        raise ValueError(
            f"every w_iᵀd_i must be 1, got {float(own.diagonal().min()):.4g} and more: see `coupled_weights`"
        )
    own.fill_diagonal_(0)
    coherence, gain = float(products.abs().max()), float(weights.weight.flatten(1).norm(dim=1).max())
    factor = (2 * sparsity - 1) * coherence
    note = f"s = {sparsity}, μ̃ = {coherence:.4g}"
    holds, statement = factor < 1, "linear rate, ρ = (2s − 1)μ̃ < 1"
    return LinearRate(
        statement, factor, holds, not holds, note, coherence, gain, sparsity, magnitude, noise
    )  # fmt: skip


def in_sequence(rates: Sequence[LinearRate], steps: int) -> list[LinearRate]:
    """The rates of layers one after the other, K steps each: to its own error ε_j each adds t_K of the one before.

    Raises ValueError where a layer has no rate.
    """
    below, chain = 0.0, []
    for rate in rates:
        chain.append(replace(rate, noise=rate.noise + below))
        below = float(chain[-1].bounds(steps)[-1])
    return chain


def steps_to(rates: Sequence[LinearRate], error: float) -> int:
    """Least K with which the bound of the last layer's error is at most `error`, of noiseless layers in sequence.

    Raises ValueError where a layer has no rate or a noise, or for an error not above 0.
    """
    if error <= 0 or any(rate.noise for rate in rates):
        noise = [rate.noise for rate in rates]
        raise ValueError(f"steps lead to an error above 0 and without noise, got error={error} and noise {noise}")
    return next(steps for steps in count(1) if in_sequence(rates, steps)[-1].bounds(steps)[-1] <= error)


def predicted_network(
    dictionaries: Sequence[Dictionary],
    weights: Sequence[Dictionary],
    rates: Sequence[LinearRate],
    steps: int,
    nonneg: bool = False,
) -> DeepSparseCoding:
    """The network of J layers of K steps whose rate is predicted; `rates` are those of each layer for itself.

    Raises ValueError where a layer has no rate.
    """
    chain = zip(dictionaries, weights, in_sequence(rates, steps), strict=True)
    return DeepSparseCoding([PredictedLISTACP(d, w, rate, steps, nonneg) for d, w, rate in chain])


def measured_rate(errors: Tensor) -> MeasuredRate:
    """Least squares through the logarithms of `errors` (steps + 1,), as far as they are ten times above the last one.

    Vacuous for fewer than four such errors: any curve is straight then. Raises ValueError for errors that are not
    positive and finite, or none above.
    """
    errors = errors.detach().double().cpu()
    if not (errors.isfinite().all() and (errors > 0).all()):
        raise ValueError(f"errors must be positive and finite, got {errors.tolist()[:8]}")
    last = float(errors[-1])
    rate = measures.fitted_rate(errors, 10 * last)
    if rate is None:
        raise ValueError(f"fewer than two errors lie above ten times the last one, {last:.4g}: there is no line")
    above = int((errors > 10 * last).long().cumprod(0).sum())
    logs = errors[:above].log().numpy()
    straight = float(np.corrcoef(np.arange(above), logs)[0, 1] ** 2)
    note = f"{above} errors, rate {float(rate):.4g}, last {last:.2e}"
    statement = "straight in log-error, R² ≥ 0.99"
    return MeasuredRate(statement, straight, straight >= 0.99, above < 4, note, float(rate), last, above)
