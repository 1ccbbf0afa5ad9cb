"""Learned solvers: K steps of a proximal iteration whose weights, gains and thresholds are learned from data.

With ``z_0 = 0``, step k computes ``z_k = shrink(u_k, θ_k)`` from

=========== ========================================= ============================== ======================
layer       u_k                                       learned                        source
=========== ========================================= ============================== ======================
`LISTA`     ``B_k x + S_k z_{k−1}``                   ``B_k, S_k`` (or one pair), θ  Gregor and LeCun 2010
`LISTACP`   ``z_{k−1} + γ_k W_kᵀ(x − D z_{k−1})``     ``W_k, γ_k, θ_k`` and D        Chen et al. 2018 [1]
`ALISTA`    ``z_{k−1} + γ_k Wᵀ(x − D z_{k−1})``       ``γ_k, θ_k``                   Liu et al. 2019 [2]
=========== ========================================= ============================== ======================

They approach the codes they were trained for, not the minimiser of an objective: no step can be added to them, and
they have no fixed point to measure a convergence by (``solves`` is False).

[1] *Theoretical linear convergence of unfolded ISTA*, arXiv 1808.10038, also the source of `SupportSelection`.
[2] *ALISTA: analytic weights are as good as learned weights*, ICLR 2019.
"""

import copy
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dsc.dictionaries import DenseDictionary, Dictionary
from dsc.layers import SparseCoding, Trace
from dsc.prox import Prox, inverse_softplus
from dsc.solvers import ISTA, iterate

Initial = Literal["ista", "analytic"]


@dataclass(frozen=True)
class SupportSelection:
    """The largest entries of a step are taken to be the support and pass without being shrunk.

    In step k these are the ``min(k·rate, most)·n`` largest of n channels, as far as they exceed the threshold:
    shrinkage biases what is certain, and deeper steps are more certain (Chen et al. 2018, "LISTA-SS").

    Args:
        rate: fraction of the channels that each step adds, in (0, 1].
        most: largest fraction, in (0, 1].

    Raises:
        ValueError: a fraction outside (0, 1].
    """

    rate: float = 0.012
    most: float = 0.13

    def __post_init__(self) -> None:
        for name, value in (("rate", self.rate), ("most", self.most)):
            if not 0 < value <= 1:
                raise ValueError(f"{name} is a fraction of the channels in (0, 1], got {value}")

    def count(self, step: int, channels: int) -> int:
        """How many of `channels` entries are selected in `step`, counted from 1."""
        return round(min(self.rate * step, self.most) * channels)

    def select(self, u: Tensor, shrunk: Tensor, step: int, dim: int) -> Tensor:
        """`shrunk`, with the selected entries along `dim` as they were in `u`."""
        count = self.count(step, u.shape[dim])
        largest = shrunk.detach().abs().topk(count, dim=dim).indices
        support = torch.zeros_like(shrunk, dtype=torch.bool).scatter(dim, largest, True) & (shrunk != 0)
        return torch.where(support, u, shrunk)


class LearnedSparseCoding(SparseCoding):
    """What the learned solvers share: their depth, their thresholds, and the loop.

    The thresholds start at ``θ_k = λ s decay^{k−1}``, with λ the prox's and s the size of the first steps, and are
    kept positive by a softplus.

    Args:
        dictionary: D.
        prox: its `shrink` and the λ that the thresholds start from: one positive number.
        steps: K, the depth.
        decay: ratio of successive thresholds at the start, in (0, 1]. Codes without noise want falling thresholds.
        scale: s.

    Raises:
        ValueError: a λ that is learned by the prox, not one number, or not positive; a decay outside (0, 1].
        TypeError: a prox without a threshold.
    """

    solves: ClassVar[bool] = False  # no fixed-point iteration: it has no minimiser to converge to

    def __init__(self, dictionary: Dictionary, prox: Prox, steps: int, decay: float, scale: float) -> None:
        super().__init__(dictionary, prox, ISTA(steps))
        if not 0 < decay <= 1:
            raise ValueError(f"decay is a ratio of thresholds in (0, 1], got {decay}")
        self.decay = decay
        start = _threshold_of(prox) * scale * decay ** torch.arange(steps, dtype=torch.float64)
        self.raw_thresholds = nn.Parameter(inverse_softplus(start).to(dictionary.weight.dtype))

    @property
    def thresholds(self) -> Tensor:
        """``θ_1, …, θ_K``, shape (steps,)."""
        return F.softplus(self.raw_thresholds)

    def solve(
        self, x: Tensor, solver: ISTA | None = None, record: list[Tensor] | None = None, start: Tensor | None = None
    ) -> Tensor:
        """Code of `x` after K steps, or after the first few of them if `solver` is an `ISTA` of fewer steps.

        Raises ValueError for more steps than there are, another kind of solver, or a `start` other than zero.
        """
        depth = self._depth(solver, start)
        thresholds = self.thresholds.to(x.dtype).unbind()
        first = self._shrink(self.move(x, None, 0), thresholds[0], 0)
        remaining = iter(range(1, depth))

        def step(z: Tensor) -> Tensor:
            k = next(remaining)
            return self._shrink(self.move(x, z, k), thresholds[k], k)

        return iterate(first, step, depth, record=record)

    def trace(self, x: Tensor, steps: int | None = None, solver: type[ISTA] | None = None) -> Trace:
        """Codes after 1, …, `steps` steps with the input frozen; by default after each there is."""
        return super().trace(x, self.solver.steps if steps is None else steps, solver)

    def move(self, x: Tensor, z: Tensor | None, k: int) -> Tensor:
        """``u_{k+1}``, the point that step k (from 0) shrinks; None stands for a code of zero."""
        raise TypeError(f"{type(self).__name__} defines no steps")

    def _shrink(self, u: Tensor, threshold: Tensor, k: int) -> Tensor:
        return self.prox.shrink(u, threshold)

    def _depth(self, solver: ISTA | None, start: Tensor | None) -> int:
        steps = self.solver.steps
        if start is not None:
            raise ValueError(f"{type(self).__name__} starts from zero: its first step was learned there")
        if solver is None:
            return steps
        if solver != ISTA(solver.steps) or solver.steps > steps:
            raise ValueError(
                f"{type(self).__name__} has {steps} learned steps and no other solver: "
                f"expected at most ISTA(steps={steps}), got {solver}"
            )
        return solver.steps


class LISTA(LearnedSparseCoding):
    """Learned ISTA, ``z_k = shrink(B_k x + S_k z_{k−1}, θ_k)`` (Gregor and LeCun 2010).

    It starts at ``B = Wᵀ, S = I − WᵀD``: with ``W = D/L`` it is ISTA of that depth until it is trained. The
    dictionary gives this start and decodes; it takes no part in the code.

    Args:
        dictionary: D, dense.
        prox: its `shrink` and the λ that the thresholds start from.
        steps: K, the depth.
        tied: one pair ``B, S`` for all steps, instead of one a step; the thresholds differ anyway.
        initial: "ista" for ``W = D/L``, "analytic" for the weights of `analytic_weights`.
        decay: ratio of successive thresholds at the start.

    Shapes: signals (…, features), codes (…, atoms).
    """

    def __init__(
        self,
        dictionary: DenseDictionary,
        prox: Prox,
        steps: int = 16,
        tied: bool = False,
        initial: Initial = "ista",
        decay: float = 1.0,
    ) -> None:
        _dense(dictionary, type(self).__name__, "LISTACP takes any dictionary")
        weight, scale = _initial_weight(dictionary, initial)
        super().__init__(dictionary, prox, steps, decay, scale)
        self.tied = tied
        encoder = scale * weight
        inhibition = torch.eye(dictionary.num_atoms).to(weight) - encoder @ dictionary.weight.detach().mT
        pairs = 1 if tied else steps
        self.encoders = nn.ParameterList(encoder.clone() for _ in range(pairs))
        # From zero the first step needs none.
        self.inhibitions = nn.ParameterList(inhibition.clone() for _ in range(1 if tied else steps - 1))

    def move(self, x: Tensor, z: Tensor | None, k: int) -> Tensor:
        driven = F.linear(x, self.encoders[0 if self.tied else k])
        return driven if z is None else driven + F.linear(z, self.inhibitions[0 if self.tied else k - 1])


class Coupled(LearnedSparseCoding):
    """Coupled steps ``z_k = shrink(z_{k−1} + γ_k W_kᵀ(x − D z_{k−1}), θ_k)``, gains kept positive by a softplus.

    Raises:
        ValueError: support selection with a group prox, whose entries are not kept one by one.
    """

    def __init__(
        self,
        dictionary: Dictionary,
        prox: Prox,
        steps: int,
        decay: float,
        scale: float,
        selection: SupportSelection | None,
    ) -> None:
        super().__init__(dictionary, prox, steps, decay, scale)
        if selection is not None and prox.is_grouped:
            raise ValueError(
                f"support selection keeps entries, but {type(prox).__name__} keeps groups: "
                "take an elementwise prox (soft, relu) or selection=None"
            )
        self.selection = selection
        start = torch.full((steps,), scale, dtype=torch.float64)
        self.raw_gains = nn.Parameter(inverse_softplus(start).to(dictionary.weight.dtype))

    @property
    def gains(self) -> Tensor:
        """``γ_1, …, γ_K``, shape (steps,)."""
        return F.softplus(self.raw_gains)

    def weights(self, k: int) -> Dictionary:
        """W of step k, as a dictionary of the shape of D: it is used by its `analyze`."""
        raise TypeError(f"{type(self).__name__} defines no weights")

    def move(self, x: Tensor, z: Tensor | None, k: int) -> Tensor:
        residual = x if z is None else x - self.dictionary.synthesize(z, x.shape[-2:])
        moved = F.softplus(self.raw_gains[k]).to(x.dtype) * self.weights(k).analyze(residual)
        return moved if z is None else z + moved

    def _shrink(self, u: Tensor, threshold: Tensor, k: int) -> Tensor:
        shrunk = super()._shrink(u, threshold, k)
        return shrunk if self.selection is None else self.selection.select(u, shrunk, k + 1, self.prox.dim)


class LISTACP(Coupled):
    """LISTA-CP, ``z_k = shrink(z_{k−1} + γ_k W_kᵀ(x − D z_{k−1}), θ_k)``, each ``W_k`` learned (Chen et al. 2018).

    The necessary condition ``S_k → I − W_kᵀD`` of LISTA's convergence holds by construction. With ``W_k = D`` and
    ``γ_k = 1/L`` it is ISTA of that depth until it is trained.

    Args:
        dictionary: D, dense or convolutional; it is learned too, unless frozen by `requires_grad_(False)`.
        prox: its `shrink` and the λ that the thresholds start from.
        steps: K, the depth.
        selection: keep the largest entries unshrunk ("LISTA-CPSS"); elementwise prox only.
        initial: "ista" for ``W = D, γ = 1/L``, "analytic" for the weights of `analytic_weights` and ``γ = 1``.
        decay: ratio of successive thresholds at the start.

    Shapes: signals and codes as the dictionary's.
    """

    def __init__(
        self,
        dictionary: Dictionary,
        prox: Prox,
        steps: int = 16,
        selection: SupportSelection | None = None,
        initial: Initial = "ista",
        decay: float = 1.0,
    ) -> None:
        weight, scale = _initial_weight(dictionary, initial)
        super().__init__(dictionary, prox, steps, decay, scale, selection)
        # Learned also where D is known and frozen.
        self.coupled = nn.ModuleList(_with_weight(dictionary, weight).requires_grad_() for _ in range(steps))

    def weights(self, k: int) -> Dictionary:
        return self.coupled[k]  # type: ignore[return-value]


class ALISTA(Coupled):
    """Analytic LISTA, ``z_k = shrink(z_{k−1} + γ_k Wᵀ(x − D z_{k−1}), θ_k)`` with a computed W (Liu et al. 2019).

    W is that of `analytic_weights`. Only the 2K numbers ``γ_k, θ_k`` are learned; D, which W belongs to, is frozen.

    Args:
        dictionary: D, dense.
        prox: its `shrink` and the λ that the thresholds start from.
        steps: K, the depth.
        selection: keep the largest entries unshrunk; elementwise prox only.
        decay: ratio of successive thresholds at the start.

    Shapes: signals (…, features), codes (…, atoms).
    """

    def __init__(
        self,
        dictionary: DenseDictionary,
        prox: Prox,
        steps: int = 16,
        selection: SupportSelection | None = None,
        decay: float = 1.0,
    ) -> None:
        weight, scale = _initial_weight(dictionary, "analytic")
        super().__init__(dictionary, prox, steps, decay, scale, selection)
        self.analytic = _with_weight(dictionary, weight)
        self.dictionary.requires_grad_(False)
        self.analytic.requires_grad_(False)

    def weights(self, k: int) -> Dictionary:
        return self.analytic


@torch.no_grad()
def analytic_weights(dictionary: DenseDictionary) -> tuple[Tensor, Tensor]:
    """``W = argmin ‖WᵀD‖_F²`` subject to ``w_iᵀd_i = 1`` for every atom, and its coherence ``max_{i≠j} |w_iᵀd_j|``.

    The problem falls apart into atoms, ``min ‖Dᵀw_i‖²`` on a hyperplane, each with the closed form
    ``w_i = (DDᵀ)⁺d_i / (d_iᵀ(DDᵀ)⁺d_i)``. It stands in for the smallest possible coherence, the generalised mutual
    coherence (Liu et al. 2019, section 3.1).

    Shapes: W as the dictionary's weight, (atoms, features); the coherence is a number.

    Raises:
        TypeError: a dictionary that is not dense.
    """
    _dense(dictionary, "analytic_weights", "a convolutional one has no closed form here")
    atoms = dictionary.weight.double()
    solved = atoms @ torch.linalg.pinv(atoms.mT @ atoms, hermitian=True)
    weights = solved / (solved * atoms).sum(1, keepdim=True)
    coherence = (weights @ atoms.mT).fill_diagonal_(0).abs().max()
    return weights.to(dictionary.weight.dtype), coherence.to(dictionary.weight.dtype)


@torch.no_grad()
def _initial_weight(dictionary: Dictionary, initial: Initial) -> tuple[Tensor, float]:
    # W and the gain γ of the first steps.
    if initial == "ista":
        return dictionary.weight.detach(), 1 / float(dictionary.lipschitz())
    if initial != "analytic":
        raise ValueError(f'initial must be "ista" or "analytic", got {initial!r}')
    return analytic_weights(_dense(dictionary, 'initial="analytic"', 'take initial="ista"'))[0], 1.0


def _with_weight(dictionary: Dictionary, weight: Tensor) -> Dictionary:
    other = copy.deepcopy(dictionary)
    with torch.no_grad():
        other.weight.copy_(weight)
    return other


def _dense(dictionary: Dictionary, who: str, instead: str) -> DenseDictionary:
    if not isinstance(dictionary, DenseDictionary):
        raise TypeError(f"{who} needs a DenseDictionary, got {type(dictionary).__name__}: {instead}")
    return dictionary


def _threshold_of(prox: Prox) -> float:
    if not (prox.is_prox and prox.has_threshold):
        raise TypeError(f"learned steps need a prox with a threshold, such as soft, relu or group_relu, got {prox}")
    if prox.learn:
        raise ValueError(f"the steps learn their own thresholds: give {type(prox).__name__} a fixed λ to start from")
    value = torch.as_tensor(prox.threshold, dtype=torch.float64)
    if value.numel() != 1 or value <= 0:
        raise ValueError(
            f"learned thresholds start from one λ above 0 (they are a softplus), got {type(prox).__name__} "
            f"with threshold={prox.threshold}"
        )
    return float(value)
