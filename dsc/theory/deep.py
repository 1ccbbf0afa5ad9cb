"""Which codes of a deep sparse coding model are unique and stable: bounds by coherence, layer by layer.

A model is a chain of unit-norm dictionaries, ``x_{j−1} = D_j x_j + e_j`` with ‖e_j‖₂ ≤ ε_j and x_j of at most s_j
non-zeros. All bounds come from one inequality: by Gershgorin's theorem, v with 2s non-zeros has
``‖Dv‖² ≥ (1 − (2s − 1)μ)‖v‖²``, μ the coherence of D.

In a convolutional dictionary the atoms are all translates. There s counts the non-zeros of a *stripe*, the
neighbourhood of a code entry whose atoms can overlap with its own, which is all that the inequality needs (Papyan et
al. 2017, arXiv 1607.02005). Padding cuts atoms at the border; with m the least squared norm left, μ becomes the largest
product of two atoms over m, and the inequality gets the factor m.
"""

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from dsc.dictionaries import ConvDictionary, Dictionary
from dsc.synthetic import check_chain
from dsc.theory.guarantees import Finding

UNIT = 1e-4  # how far from 1 a norm may be
ROUNDING = 1e-6  # an error this small beside the code is none


@dataclass(frozen=True)
class Coherence(Finding):
    """μ over all pairs of atoms, translates among them; `energy` is the least squared norm of an atom, 1 unpadded."""

    energy: float


@dataclass(frozen=True)
class Layer:
    """What the bounds need to know of a layer and of the codes it is about.

    Attributes:
        coherence: μ, with the energy m.
        sparsity: s, the most non-zeros of a code (of a stripe, for a convolution).
        tolerance: ε, the largest ``‖x_{j−1} − D_j x_j‖₂``.
        norm: the largest ``‖x_j‖₂``.
        scale: the least norm of an atom. Where it is not 1, μ and m are those of the normalised atoms.
    """

    coherence: Coherence
    sparsity: int
    tolerance: float
    norm: float
    scale: float = 1.0

    @property
    def interference(self) -> float:
        """``(2s − 1)μ``, what the atoms on two codes take from one another at most; from 1 on there is no bound."""
        return 0.0 if self.sparsity == 0 else (2 * self.sparsity - 1) * self.coherence.value

    @property
    def kept(self) -> float:
        """``scale² m(1 − (2s − 1)μ)``, the part of ‖v‖² that ‖Dv‖² keeps at least."""
        return self.scale**2 * self.coherence.energy * (1 - self.interference)


@torch.no_grad()
def measure_layers(dictionaries: Sequence[Dictionary], x: Tensor, codes: Sequence[Tensor]) -> list[Layer]:
    """μ_j, s_j, ε_j and the norm of each layer, the largest over signals `x` (batch, …) and their `codes`.

    Atoms of any norm: where D = D̃N with D̃ normalised, the codes Nx_j are as sparse, and ``‖x_j‖ ≤ ‖Nx_j‖/scale``.
    Raises ValueError for dictionaries that do not chain, an atom that is zero, or codes of another number.
    """
    check_chain(dictionaries)
    if len(codes) != len(dictionaries):
        raise ValueError(f"{len(dictionaries)} dictionaries need as many codes, got {len(codes)}")
    layers = []
    for dictionary, signal, code in zip(dictionaries, [x, *codes[:-1]], codes, strict=True):
        residual = _signals(dictionary, signal - dictionary.synthesize(code, signal.shape[-2:]))
        size = (signal.shape[-2], signal.shape[-1]) if isinstance(dictionary, ConvDictionary) else None
        found = mutual_coherence(copy.deepcopy(dictionary).normalize_(), size)
        tolerance, norm = residual.norm(dim=1).max(), _signals(dictionary, code).norm(dim=1).max()
        scale = dictionary.weight.flatten(1).norm(dim=1).min()
        layers.append(Layer(found, sparsity(dictionary, code), float(tolerance), float(norm), float(scale)))
    return layers


@torch.no_grad()
def mutual_coherence(dictionary: Dictionary, size: tuple[int, int] | None = None) -> Coherence:
    """``μ = max |⟨d_i, d_l⟩|/m`` over all different atoms, with m the least ``‖d_i‖²``: 1 but for a padded convolution.

    `size` is that of the images, which a padded convolution needs to know what is cut. At μ < 1 every code of a single
    non-zero is covered.

    Raises ValueError for atoms that are not of unit norm, and where `size` is missing.
    """
    check_unit_norm(dictionary)
    energy, largest = 1.0, 0.0
    for window in _windows(dictionary, size):
        products = inner_products(dictionary, dictionary.weight.detach() * window)
        itself = products.shape[-1] // 2
        own = products[..., itself, itself]
        energy = min(energy, float(own.diagonal().min()))
        own.fill_diagonal_(0)
        largest = max(largest, float(products.abs().max()))
    value = largest / energy if energy > 0 else math.inf
    note = "" if energy > 1 - UNIT else f"padding leaves border atoms {energy:.4g} of their energy"
    return Coherence("coherence μ < 1", value, value < 1, value >= 1, note, energy)


def inner_products(dictionary: Dictionary, weights: Tensor) -> Tensor:
    """``⟨w_i, d_l⟩`` for all translates that overlap: (atoms, atoms, lags, lags), lag 0 in the middle; dense: one lag.

    `weights` has the shape of the dictionary's own.
    """
    atoms = dictionary.weight.detach()
    if not isinstance(dictionary, ConvDictionary):
        return (weights @ atoms.mT)[..., None, None]
    reach = (dictionary.kernel_size - 1) // dictionary.stride * dictionary.stride  # only whole strides apart
    padded = F.pad(weights, (reach,) * 4)
    return F.conv2d(padded, atoms, stride=dictionary.stride)


def sparsity(dictionary: Dictionary, code: Tensor) -> int:
    """Most non-zeros of a code, or of a stripe of a convolutional one."""
    active = (code != 0).to(torch.float32)
    if not isinstance(dictionary, ConvDictionary):
        return int(active.sum(-1).max())
    reach = (dictionary.kernel_size - 1) // dictionary.stride
    window = torch.ones(1, 1, 2 * reach + 1, 2 * reach + 1, device=code.device)
    return int(F.conv2d(active.sum(1, keepdim=True), window, padding=reach).max().round())


def covered(coherence: float) -> float:
    """Most non-zeros s of codes that are covered, ``s < ½(1 + 1/μ)``; infinite for orthogonal atoms."""
    return math.inf if coherence == 0 else math.ceil((1 + 1 / coherence) / 2) - 1


def uniqueness(layer: Layer) -> Finding:
    """``s < ½(1 + 1/μ)``: then no other code of s non-zeros synthesizes the same (Donoho and Elad 2003).

    The value is the right-hand side. Vacuous where it does not cover the layer's codes, or these are zero.
    """
    coherence, holds = layer.coherence.value, layer.interference < 1
    value = math.inf if coherence == 0 else (1 + 1 / coherence) / 2
    note = f"covers up to {covered(coherence):g} non-zeros, the codes have {layer.sparsity}"
    return Finding("uniqueness, s < ½(1 + 1/μ)", value, holds, not holds or layer.sparsity == 0, note)


def stability(layers: Sequence[Layer]) -> list[Finding]:
    """``Δ_j ≤ (Δ_{j−1} + 2ε_j)/√(1 − (2s_j − 1)μ_j)``, Δ_0 = 0: how far apart two codes of one signal can be.

    The value is the right-hand side, of each layer; it holds where every root so far is of a positive number. Vacuous
    where it does not, or where it is no less than twice the norm of the codes, which is as far as any two can be.
    """
    bound, findings = 0.0, []
    for layer in layers:
        bound = _over(bound + 2 * layer.tolerance, layer)
        holds = bound < math.inf
        findings.append(Finding("stability, Δ", bound, holds, not holds or bound >= 2 * layer.norm, ""))
    return findings


def input_stability(layers: Sequence[Layer]) -> list[Finding]:
    """``Δ_j² ≤ 4ε_1² Π_{i≤j} 1/(1 − (2s_i − 1)μ_i)``: where only the signal has an error (Papyan et al. 2017).

    As `stability`; but where a deeper layer errs, too, the bound supposes too much: it does not hold, and is vacuous.
    """
    bound, deeper, findings = 2 * layers[0].tolerance, 0.0, []
    for number, layer in enumerate(layers):
        bound = _over(bound, layer)
        deeper = max(deeper, layer.tolerance / max(layer.norm, 1e-30) if number else 0.0)
        holds = bound < math.inf and deeper <= ROUNDING
        note = (
            "" if deeper <= ROUNDING else f"it supposes exact deeper layers, these err by {deeper:.2g} of a code's norm"
        )
        vacuous = not holds or bound >= 2 * layer.norm
        findings.append(Finding("stability to errors of the signal, Δ", bound, holds, vacuous, note))
    return findings


def check_unit_norm(dictionary: Dictionary) -> None:
    """Raise ValueError unless all atoms have unit norm, up to rounding."""
    norms = dictionary.weight.detach().flatten(1).norm(dim=1)
    if not ((norms - 1).abs() <= UNIT).all():
        raise ValueError(
            f"the dictionary has atoms of norm {float(norms.min()):.4g} to {float(norms.max()):.4g}, but this "
            "condition is about unit-norm atoms: call dictionary.normalize_() and solve for the codes anew"
        )


def _over(distance: float, layer: Layer) -> float:
    return distance / math.sqrt(layer.kept) if layer.interference < 1 else math.inf


def _signals(dictionary: Dictionary, values: Tensor) -> Tensor:
    """One signal (or code) a row; a dense dictionary codes vectors along the last dimension, tokens among them."""
    return values.flatten(1) if isinstance(dictionary, ConvDictionary) else values.flatten(0, -2)


def _windows(dictionary: Dictionary, size: tuple[int, int] | None) -> list[Tensor]:
    """Which parts of an atom are left of it somewhere in an image of that size, as masks of its shape."""
    weight = dictionary.weight.detach()
    if not isinstance(dictionary, ConvDictionary) or not dictionary.padding:
        return [torch.ones_like(weight[0])]
    if size is None:
        raise ValueError(f"padding={dictionary.padding} cuts atoms at the border: give the size of the images")
    cuts = [_cuts(dictionary, side, weight) for side in size]
    return [rows[:, None] * columns for rows in cuts[0] for columns in cuts[1]]


def _cuts(dictionary: ConvDictionary, side: int, like: Tensor) -> Tensor:
    starts = torch.arange(dictionary.code_side(side), device=like.device) * dictionary.stride - dictionary.padding
    pixels = starts.unsqueeze(1) + torch.arange(dictionary.kernel_size, device=like.device)
    return ((pixels >= 0) & (pixels < side)).to(like).unique(dim=0)
