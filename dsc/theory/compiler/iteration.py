"""What a layer computes, as matrices and numbers; and the layers that no network of standard parts can compute."""

import copy
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from torch import Tensor

from dsc.dictionaries import ConvDictionary, DenseDictionary
from dsc.layers import DeepSparseCoding, SparseCoding
from dsc.prox import Elastic, Grouped, GroupReLU, Prox, ReLU, Soft, SparseGroup
from dsc.solvers import FISTA, ISTA


@dataclass(frozen=True)
class Shrinkage:
    """``u ↦ gain · soft(u, θ)``, or ``gain · max(u − θ, 0)`` if `nonneg`; then group shrinkage where there is `group`.

    Attributes:
        threshold, gain: θ and the gain of each atom, (atoms,).
        group: threshold of each group of `size` consecutive atoms, (groups,), or None.
    """

    threshold: Tensor
    gain: Tensor
    nonneg: bool
    size: int = 1
    group: Tensor | None = None


@dataclass(frozen=True)
class Iteration:
    """``z_{k+1} = shrink(y_k + s(Dᵀ(x − D y_k) + b))`` with ``y_k = z_k + β_k(z_k − z_{k−1})``, from zero; float64.

    Attributes:
        weight: D, atoms as rows: (atoms, features), or (atoms, channels, k, k) with `stride` and `padding`.
        step: s.
        shift: s·b of each atom, (atoms,).
        momentum: β before each step but the first, so there is one step more.
        norm: a bound of ``‖D‖``.
    """

    weight: Tensor
    stride: int
    padding: int
    step: float
    shift: Tensor
    momentum: tuple[float, ...]
    shrinkage: Shrinkage
    norm: float

    @property
    def is_dense(self) -> bool:
        return self.weight.ndim == 2

    @property
    def atoms(self) -> int:
        return len(self.weight)

    @property
    def contraction(self) -> float:
        """A bound of ``‖I − sDᵀD‖``."""
        return max(1.0, self.step * self.norm**2 - 1)

    def code_size(self, size: tuple[int, int]) -> tuple[int, int]:
        """Height and width of the code of an image. Raises ValueError for an image smaller than the kernel."""
        k = self.weight.shape[-1]
        if min(size) + 2 * self.padding < k:
            raise ValueError(
                f"images of {size[0]}×{size[1]} pixels are too small: with kernel_size={k} and padding={self.padding} "
                f"they need at least {k - 2 * self.padding} a side"
            )
        height, width = ((n + 2 * self.padding - k) // self.stride + 1 for n in size)
        return height, width

    def remainder(self, size: tuple[int, int]) -> tuple[int, int]:
        """Pixels of an image beyond those that strides divide, as far as a second step has to know of them."""
        if not (self.padding and self.momentum):  # without padding no atom reaches them
            return 0, 0
        height, width = ((n + 2 * self.padding - self.weight.shape[-1]) % self.stride for n in size)
        return height, width

    def unfolded(self, size: tuple[int, int]) -> "Iteration":
        """The same as a dense iteration on flattened images of that size: an atom more at each place of the code."""
        places = self.code_size(size)
        channels, k = self.weight.shape[1], self.weight.shape[-1]
        dictionary = ConvDictionary(channels, self.atoms, k, self.stride, self.padding).to(self.weight)
        with torch.no_grad():
            dictionary.weight.copy_(self.weight)
            codes = torch.eye(self.atoms * places[0] * places[1]).to(self.weight).unflatten(1, (self.atoms, *places))
            weight = dictionary.synthesize(codes, size).flatten(1)
        each = places[0] * places[1]
        shrinkage = replace(
            self.shrinkage,
            threshold=self.shrinkage.threshold.repeat_interleave(each),
            gain=self.shrinkage.gain.repeat_interleave(each),
        )
        shift = self.shift.repeat_interleave(each)
        return replace(self, weight=weight, stride=1, padding=0, shift=shift, shrinkage=shrinkage)


def iterations(model: SparseCoding | DeepSparseCoding) -> list[Iteration]:
    """The iterations that `model` runs one after the other in evaluation mode.

    Raises:
        TypeError: another module, layers that are not of one kind, or a prox that is not piecewise linear.
        ValueError: the joint mode, or a solver whose depth or momentum depends on the signal.
    """
    if isinstance(model, DeepSparseCoding) and model.joint:
        raise ValueError("the joint mode solves all layers at once: compile takes joint=False, layer after layer")
    if not isinstance(model, SparseCoding | DeepSparseCoding):
        raise TypeError(f"compile takes a SparseCoding or DeepSparseCoding, got {type(model).__name__}")
    found = [iteration(layer) for layer in (model if isinstance(model, DeepSparseCoding) else [model])]
    if len({one.is_dense for one in found}) > 1:
        raise TypeError("the dictionaries of a chain must be all dense or all convolutional")
    for j, (below, above) in enumerate(pairwise(found)):
        if above.weight.shape[1] != below.atoms:
            raise ValueError(
                f"the dictionaries do not chain: layer {j} has codes of {below.atoms} channels, and layer {j + 1} "
                f"takes signals of {above.weight.shape[1]}"
            )
    return found


@torch.no_grad()
def iteration(layer: SparseCoding) -> Iteration:
    """The iteration of one layer, see `iterations`."""
    if type(layer).solve is not SparseCoding.solve:
        raise TypeError(f"compile takes the iteration of SparseCoding, and {type(layer).__name__} has another one")
    dictionary = layer.dictionary
    if not isinstance(dictionary, DenseDictionary | ConvDictionary):
        raise TypeError(f"compile takes a DenseDictionary or ConvDictionary, got {type(dictionary).__name__}")
    step = float(copy.deepcopy(layer).eval().step_size())
    weight = dictionary.weight.detach().double().cpu()
    bias = torch.zeros(len(weight)).double() if layer.bias is None else layer.bias.detach().double().cpu()
    return Iteration(
        weight,
        dictionary.stride if isinstance(dictionary, ConvDictionary) else 1,
        dictionary.padding if isinstance(dictionary, ConvDictionary) else 0,
        step,
        step * bias,
        momentum(layer.solver),
        shrinkage(layer.prox, weight, step),
        float(dictionary.lipschitz()) ** 0.5,
    )


def momentum(solver: ISTA) -> tuple[float, ...]:
    """β before each step but the first: 0, or Nesterov's ``(t_k − 1)/t_{k+1}``."""
    if solver.tol is not None:
        raise ValueError(f"a network has a fixed depth: compile takes a solver with tol=None, got tol={solver.tol}")
    if not isinstance(solver, FISTA):
        return (0.0,) * (solver.steps - 1)
    if solver.restart:
        raise ValueError("restarts depend on the signal: compile takes FISTA with restart=False")
    t, weights = 1.0, []
    for _ in range(solver.steps - 1):
        following = (1 + (1 + 4 * t**2) ** 0.5) / 2
        weights.append((t - 1) / following)
        t = following
    return tuple(weights)


def shrinkage(prox: Prox, weight: Tensor, step: float) -> Shrinkage:
    """The prox at threshold λ·step. Raises TypeError for one that is not piecewise linear, except groups."""
    _check_expressible(prox)
    atoms = len(weight)
    size = prox.group_size_of(atoms)
    if atoms % size:
        raise ValueError(f"group_size={size} does not divide the {atoms} atoms")
    given = torch.as_tensor(prox.threshold, dtype=weight.dtype, device=weight.device).detach()
    if given.numel() > 1:
        _check_channels(prox, weight, given)
    scaled = (step * given.reshape(-1)).expand(atoms // size)
    zero, one = torch.zeros(atoms).to(weight), torch.ones(atoms).to(weight)
    ratio = getattr(prox, "l1_ratio", 1.0)
    if isinstance(prox, Elastic):
        return Shrinkage(ratio * scaled, one / (1 + (1 - ratio) * scaled), False)
    if size == 1:  # the norm of a group is an absolute value: ratios add up to 1
        return Shrinkage(scaled.clone(), one, prox.nonneg)
    if isinstance(prox, SparseGroup):
        return Shrinkage(ratio * scaled.repeat_interleave(size), one, False, size, (1 - ratio) * scaled)
    return Shrinkage(zero, one, prox.nonneg, size, scaled.clone())


def _check_expressible(prox: Prox) -> None:
    if isinstance(prox, ReLU | Soft | Elastic | GroupReLU | SparseGroup):
        return
    if not prox.is_prox:
        why = f"{getattr(prox, 'function', prox)} is no prox, and has no threshold to compile"
    elif isinstance(prox, Grouped) or not prox.has_threshold:
        why = f"{type(prox).__name__} keeps the largest of a code, which jumps where two change places"
    else:
        why = f"{type(prox).__name__} jumps at its threshold"
    raise TypeError(
        f"compile cannot express this activation: {why}. A network of continuous activations is continuous: take "
        "soft, relu or elastic, or group_relu, group_relu_nonneg or sparse_group with approximate=True"
    )


def _check_channels(prox: Prox, weight: Tensor, given: Tensor) -> None:
    dims, expected = ((-1, 1), "-1") if weight.ndim == 2 else ((1, -3), "1")
    if prox.dim not in dims:
        raise ValueError(f"atoms lie along dimension {expected} of the code, and the prox has dim={prox.dim}")
    groups = len(weight) // prox.group_size_of(len(weight))
    if given.numel() != groups:
        raise ValueError(f"threshold has {given.numel()} values, expected 1 or {groups}")
