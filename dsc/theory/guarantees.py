"""When one step of a group-sparse autoencoder finds the right groups: the assumptions and Lemma 1 of arXiv 2102.07003.

Atoms A and true atoms A* are rows, (atoms, features), in groups of d consecutive ones; signals ``y = A*z`` are rows,
too. The encoder is ``x_g = max(1 − λ/‖A_gᵀy‖, 0) A_gᵀy``.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from dsc import measures
from dsc.shrinkage import grouped


@dataclass(frozen=True)
class Finding:
    """A statement of the theory, measured.

    Attributes:
        statement: what is claimed, in a line.
        value: the figure it is about.
        holds: whether the claim is true of what was measured.
        vacuous: whether it says nothing here, true or not.
        note: what a reader must know beside it; may be empty.
    """

    statement: str
    value: float
    holds: bool
    vacuous: bool
    note: str

    def __str__(self) -> str:
        verdict = "holds" if self.holds else "fails"
        return f"{self.statement}: {self.value:.4g} ({verdict}{', vacuous' * self.vacuous})" + (
            f"; {self.note}" if self.note else ""
        )


@dataclass(frozen=True)
class CodeBounds(Finding):
    """Smallest and largest norm of an active group, B_min and B_max; `value` is their ratio B_max/B_min."""

    smallest: float
    largest: float


@dataclass(frozen=True)
class SupportRange(Finding):
    """Thresholds λ in [lower, upper) for which every support is found; `value` is the length, negative where empty.

    `vacuous` where it is empty. `printed` is Lemma 1's own range (lower, upper), or None for a measured range.
    """

    lower: float
    upper: float
    printed: tuple[float, float] | None

    def guarantees(self, threshold: float) -> bool:
        """Whether λ lies in the range. Raises ValueError where that is empty: nothing is guaranteed."""
        self._check_not_empty()
        return self.lower <= threshold < self.upper

    def middle(self) -> float:
        """The λ farthest from both ends. Raises ValueError for an empty range."""
        self._check_not_empty()
        return (self.lower + self.upper) / 2

    def _check_not_empty(self) -> None:
        if self.vacuous:
            raise ValueError(
                f"no λ is guaranteed to find the support: the range [{self.lower:.4g}, {self.upper:.4g}) is empty. It "
                "opens with fewer active groups, less coherent groups, or atoms nearer to the true ones"
            )


def coherence(atoms: Tensor) -> Finding:
    """``μ = max_{i≠j} |⟨a_i, a_j⟩|`` of normalised atoms: at 1, two of them cannot be told apart."""
    value = float(measures.coherence(atoms))
    return Finding("coherence μ < 1", value, value < 1, False, "")


def block_coherence(atoms: Tensor, group_size: int) -> Finding:
    """``μ_B = max_{g≠h} ‖A_gᵀA_h‖₂/d`` of normalised atoms, and whether μ_B ≤ μ."""
    value = float(measures.block_coherence(atoms, group_size))
    largest = f"a group meets another by at most dμ_B = {group_size * value:.4g}"
    return Finding("block coherence μ_B ≤ μ", value, value <= float(measures.coherence(atoms)) + 1e-6, False, largest)


def dictionary_error(atoms: Tensor, truth: Tensor, group_size: int) -> Finding:
    """``δ = max_g ‖A_g − A*_g‖_F``, which is assumed to be at most 1; beyond it Lemma 1's range is empty."""
    value = float(group_errors(atoms, truth, group_size).max())
    return Finding("dictionary error δ ≤ 1", value, value <= 1, False, "")


def code_bounds(codes: Tensor, group_size: int) -> CodeBounds:
    """B_min and B_max of true codes (signals, atoms). Raises ValueError where no group is active."""
    norms = grouped(codes, group_size).norm(dim=2)
    norms = norms[norms > 0]
    if not len(norms):
        raise ValueError("no group is active in any code: their norms have no bounds")
    low, high = float(norms.min()), float(norms.max())
    statement = "B_min ≤ ‖z_g‖ ≤ B_max with B_min > 0, as B_max/B_min"
    return CodeBounds(statement, high / low, True, False, f"B_min = {low:.4g}, B_max = {high:.4g}", low, high)


def support_range(atoms: Tensor, truth: Tensor, codes: Tensor, group_size: int) -> SupportRange:
    """The λ with which one step finds the support of every noiseless signal whose code is bounded as `codes` are.

    With γ active groups, s = min_g σ_min(A_gᵀA*_g) and κ_k the largest sum of k norms ``‖A_vᵀA*_h‖₂`` over h ≠ v, an
    inactive group's correlation is at most ``B_max κ_γ``, and an active one's at least ``B_min s − B_max κ_{γ−1}``.

    The printed range of Lemma 1, ``[γB_max(μ_B + δ), B_min(1 − δ) − γB_max(μ_B + δ)]``, is in `printed`. It takes
    ``‖A*_vᵀA*_h‖₂ ≤ μ_B``, where the definition of μ_B gives dμ_B: for d > 1 it can promise a support that is not
    found. The range returned needs no orthonormal groups either.

    Raises ValueError where no group is active in `codes`.
    """
    bounds = code_bounds(codes, group_size)
    active = int(measures.group_support(codes, group_size).sum(1).max())
    norms = measures.block_norms(atoms, truth, group_size).fill_diagonal_(0)
    worst = norms.sort(1, descending=True).values[:, :active].cumsum(1).amax(0)
    interference, among_active = float(worst[-1]), float(worst[-2]) if active > 1 else 0.0
    own = grouped(atoms, group_size, 0) @ grouped(truth, group_size, 0).mT
    kept = float(torch.linalg.matrix_norm(own, ord=-2).min())
    lower = bounds.largest * interference
    upper = bounds.smallest * kept - bounds.largest * among_active
    printed = _printed_range(atoms, truth, bounds, active, group_size)
    return _range("λ that finds every support (proved)", lower, upper, printed)


def observed_support_range(atoms: Tensor, signals: Tensor, codes: Tensor, group_size: int) -> SupportRange:
    """The λ with which one step finds the support of each of these signals (signals, features), noisy or not.

    From the largest ``‖A_gᵀy‖`` of an inactive group to the least of an active one. Raises ValueError where either
    kind is missing.
    """
    active = measures.group_support(codes, group_size)
    if active.all() or not active.any():
        raise ValueError("the range lies between inactive and active groups: the codes need both")
    norms = grouped(signals @ atoms.mT, group_size).norm(dim=2)
    return _range("λ that finds every support (observed)", float(norms[~active].max()), float(norms[active].min()))


def _printed_range(
    atoms: Tensor, truth: Tensor, bounds: CodeBounds, active: int, group_size: int
) -> tuple[float, float]:
    error = dictionary_error(atoms, truth, group_size).value
    interference = active * bounds.largest * (float(measures.block_coherence(truth, group_size)) + error)
    return interference, bounds.smallest * (1 - error) - interference


def _range(statement: str, lower: float, upper: float, printed: tuple[float, float] | None = None) -> SupportRange:
    shown = f"[{lower:.4g}, {upper:.4g})" + (" is empty" if lower >= upper else "")
    if printed is not None:
        shown += f"; Lemma 1 prints [{printed[0]:.4g}, {printed[1]:.4g}]" + " (empty)" * (printed[0] > printed[1])
    open_ = lower < upper
    return SupportRange(f"{statement}, length", upper - lower, open_, not open_, shown, lower, upper, printed)


def group_errors(atoms: Tensor, truth: Tensor, group_size: int) -> Tensor:
    """``‖A_g − A*_g‖_F`` of each group."""
    return grouped(atoms - truth, group_size, 0).flatten(1).norm(dim=1)
