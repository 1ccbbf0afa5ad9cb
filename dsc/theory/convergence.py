"""Whether training goes towards the true dictionary: Theorems 1 and 2 of arXiv 2102.07003, measured.

Atoms A and true atoms A* are rows, (atoms, features), in groups of d consecutive ones. The autoencoder is
``ŷ = Aσ_λ(Aᵀy)`` with the group-sparse ReLU, its loss ``½E‖y − ŷ‖²``; Δ is A − A*, and α_i = ⟨a*_i, a_i⟩.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from scipy.optimize import least_squares
from torch import Tensor
from torch.nn import functional as F

from dsc.shrinkage import group_relu, grouped
from dsc.theory.guarantees import Finding, group_errors


@dataclass(frozen=True)
class Alignment(Finding):
    """How the expected gradient G lies to the error Δ; `value` is the cosine of the two, over all atoms.

    Attributes:
        tangential: that cosine without the part of G that only rescales a group, ``A_g sym(A_gᵀG_g)``, which
            normalising the atoms undoes.
        aligned: fraction of active atoms with ``⟨g_i, Δ_i⟩ > 0``.
        remainder: largest ``‖g_i − c_gα_iΔ_i‖/(c_g‖Δ_g‖_F)``.
        bound: Theorem 1's bound of it, ``α_max√(d² + 1) + δ``; the theorem `holds` where the remainder is within.
    """

    tangential: float
    aligned: float
    remainder: float
    bound: float


@dataclass(frozen=True)
class Contraction(Finding):
    """The fit ``e_k ≈ floor + (e_0 − floor)q^k`` of distances; `value` is q, the contraction an iteration.

    `holds` where q < 1, `vacuous` where no distance is below half of the first: then there is no decay to fit. `misfit`
    is the root mean square of ``log(fit/e_k)``: small where the decay is geometric.
    """

    floor: float
    misfit: float


def alignment(
    atoms: Tensor, truth: Tensor, signals: Tensor, codes: Tensor, threshold: float, group_size: int
) -> Alignment:
    """Theorem 1 on data: signals (N, features), true codes (N, atoms), λ = `threshold`; the gradient is exact.

    The theorem says ``2⟨g_i, Δ_i⟩ ≥ cα_i‖Δ_i‖² + ‖g_i‖²/(cα_i) − ‖v_i‖²/(cα_i) − O(…)``, which is an identity for
    v_i = g_i − cα_iΔ_i: its content is the bound of v_i, and that is what is measured. c_g is
    ``E[τ_g(2 − τ_g)‖z_g‖²/d]`` over active g, the paper's c where codes have unit covariance.

    Raises ValueError where A is A*, or no group is active.
    """
    error = atoms - truth
    if not error.any():
        raise ValueError("the atoms are the true ones: there is no direction towards them")
    gradient, energy, _ = _expected(atoms, signals, codes, threshold, group_size)
    if not energy.any():
        raise ValueError(f"no group that should be active is: threshold={threshold} is too large")
    per_atom, active = energy.repeat_interleave(group_size), (energy > 0).repeat_interleave(group_size)
    alpha = (atoms * truth).sum(1)
    errors = group_errors(atoms, truth, group_size)
    rest = (gradient - (per_atom * alpha).unsqueeze(1) * error).norm(dim=1)
    remainder = float((rest / (per_atom * errors.repeat_interleave(group_size)))[active].max())
    bound = float(alpha.max()) * (group_size**2 + 1) ** 0.5 + float(errors.max())
    aligned = ((gradient * error).sum(1) > 0)[active].float().mean()
    tangential = _cosine(_tangential(gradient, atoms, group_size), error)
    note = (
        f"{float(aligned):.1%} of atoms aligned, {tangential:.4g} up to rescaling; "
        f"remainder {remainder:.4g}, printed bound {bound:.4g}"
    )
    # With v_i at its bound the right-hand side is below c(α_i² − bound²)‖Δ‖²/α_i + ‖g‖²/(cα_i).
    vacuous = float(alpha.min()) <= bound
    statement = "Theorem 1, cosine of the expected gradient and A − A*"
    return Alignment(
        statement, _cosine(gradient, error), remainder <= bound, vacuous,
        note + ("; the bound exceeds α, so it implies no descent" if vacuous else ""),
        tangential, float(aligned), remainder, bound,
    )  # fmt: skip


def printed_contraction(atoms: Tensor, truth: Tensor, group_size: int) -> Finding:
    """Theorem 2's printed ρ at its largest rate ``1/(cα_max)``: ``(α_min − d(α_max√(d² + 1) + δ)²/α_min)/α_max``.

    ρ > 0 needs ``α_min² > d(α_max√(d² + 1) + δ)²``, which no dictionary meets, as d ≥ 1: always vacuous.
    Raises ValueError where an α is not positive, which the theorem supposes.
    """
    alpha = (atoms * truth).sum(1)
    low, high = float(alpha.min()), float(alpha.max())
    if low <= 0:
        raise ValueError(f"Theorem 2 needs every ⟨a_i, a*_i⟩ > 0, the least is {low:.4g}")
    error = float(group_errors(atoms, truth, group_size).max())
    squared = group_size * (high * (group_size**2 + 1) ** 0.5 + error) ** 2
    value = (low - squared / low) / high
    note = f"α_min² = {low**2:.4g} would have to exceed {squared:.4g}: the printed constant predicts no contraction"
    return Finding("Theorem 2, printed ρ > 0", value, value > 0, value <= 0, note if value <= 0 else "")


def norm_condition(
    atoms: Tensor, truth: Tensor, signals: Tensor, codes: Tensor, threshold: float, group_size: int
) -> Finding:
    """Theorem 2's condition ``‖A_gᵀA*_g‖_F² ≤ τ_g⁻²[3(2 − τ_g)(τ_g − ⅔)n + (τ_g − 1)²δ²]``; the value is the least τ_g.

    τ_g is the mean of ``1 − λ/‖A_gᵀy‖`` over signals where g is and should be active. Raises ValueError where a group
    never is.
    """
    _, energy, tau = _expected(atoms, signals, codes, threshold, group_size)
    if not (energy > 0).all():
        raise ValueError(f"group {int(energy.argmin())} is active in no signal: it has no τ")
    errors = group_errors(atoms, truth, group_size)
    own = (grouped(atoms, group_size, 0) @ grouped(truth, group_size, 0).mT).square().sum((1, 2))
    right = 3 * (2 - tau) * (tau - 2 / 3) * atoms.shape[1] + (tau - 1).square() * errors.max().square()
    holds = bool((own <= right / tau.square()).all())
    note = "" if holds else "it needs τ ≳ ⅔, that is λ ≲ ‖A_gᵀy‖/3"
    return Finding("Theorem 2, condition on norms, least τ", float(tau.min()), holds, False, note)


def contraction(distances: Sequence[float] | Tensor) -> Contraction:
    """Theorem 2 from a run: `distances`, as ``‖A − A*‖_F²`` after each iteration, fitted by a decay to a floor.

    The fit is least squares of logarithms, so that the way down and the floor count alike. Raises ValueError for
    fewer than four distances, or one that is not positive and finite.
    """
    found = np.asarray([float(value) for value in distances])
    if len(found) < 4 or not np.isfinite(found).all() or (found <= 0).any():
        raise ValueError(f"at least four distances are needed, positive and finite, got {found.tolist()[:8]}")
    steps, logs = np.arange(len(found)), np.log(found)

    def misfit(parameters: np.ndarray) -> np.ndarray:
        # Logarithms of e_0 − floor, of q, and of the floor: all of them stay positive.
        decay, rate, floor = parameters
        return np.logaddexp(decay + rate * steps, floor) - logs

    lowest, span = logs.min(), max(np.ptp(logs), 1e-3)
    below = max(int(steps[logs <= lowest + 0.1 * span][0]), 1)  # where the first nine tenths of the way down are done
    whole = (logs[-1] - logs[0]) / steps[-1]
    starts = [(logs[0], -span / below, lowest), (logs[0], whole, lowest - 5)]  # to a floor soon, or not yet near it
    scale = (1, 1 / len(found), 1)
    fits = [least_squares(misfit, start, x_scale=scale, xtol=1e-15, ftol=1e-15) for start in starts]
    fit = min(fits, key=lambda each: float(each.cost))
    _, rate, floor = fit.x
    q, level, error = float(np.exp(rate)), float(np.exp(floor)), float(np.sqrt(np.mean(fit.fun**2)))
    vacuous = bool(found.min() > found[0] / 2)
    note = f"floor {level:.4g}, misfit {error:.2g}" + ("; the distance never halves" if vacuous else "")
    return Contraction("Theorem 2, contraction an iteration", q, q < 1, vacuous, note, level, error)


def _expected(
    atoms: Tensor, signals: Tensor, codes: Tensor, threshold: float, group_size: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Mean gradient of the loss, c_g and the mean τ_g of each group."""
    with torch.enable_grad():
        weight = atoms.detach().requires_grad_()
        correlations = F.linear(signals, weight)
        z = group_relu(correlations, threshold, group_size)
        loss = (signals - z @ weight).square().sum() / (2 * len(signals))
        gradient = torch.autograd.grad(loss, weight)[0]
    norms = grouped(correlations.detach(), group_size).norm(dim=2)
    energy = grouped(codes, group_size).square().sum(2) / group_size
    found = (norms > threshold) & (energy > 0)
    tau = (1 - threshold / norms).where(found, 0)
    return gradient, (tau * (2 - tau) * energy).mean(0), tau.sum(0) / found.sum(0)


def _tangential(gradient: Tensor, atoms: Tensor, group_size: int) -> Tensor:
    basis, parts = grouped(atoms, group_size, 0), grouped(gradient, group_size, 0)
    inner = parts @ basis.mT
    return (parts - (inner + inner.mT) / 2 @ basis).flatten(0, 1)


def _cosine(first: Tensor, second: Tensor) -> float:
    return float(F.cosine_similarity(first.flatten(), second.flatten(), dim=0))
