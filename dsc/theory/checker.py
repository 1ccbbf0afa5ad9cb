"""Which guarantees a trained model enjoys on the codes of given inputs, layer by layer."""

from dataclasses import dataclass

import torch
from torch import Tensor

from dsc.layers import DeepSparseCoding
from dsc.synthetic import check_chain
from dsc.theory.deep import UNIT, Layer, covered, input_stability, measure_layers, stability, uniqueness
from dsc.theory.guarantees import Finding

HEADER = ["layer", "μ", "non-zeros", "covered", "unique", "(2s−1)μ", "rate", "ε", "‖x‖", "Δ at most", "stable"]


@dataclass(frozen=True)
class LayerGuarantees:
    """The findings about one layer; `rate` is ``(2s − 1)μ``, the factor a step of `linear_rate` with W = D."""

    layer: Layer
    uniqueness: Finding
    rate: Finding
    stability: Finding
    input_stability: Finding

    def cells(self) -> list[str]:
        """The layer's row of the table."""
        layer = self.layer
        return [
            f"{layer.coherence.value:.4g}", str(layer.sparsity), f"{covered(layer.coherence.value):g}",
            _verdict(self.uniqueness), f"{self.rate.value:.4g}", _verdict(self.rate),
            f"{layer.tolerance:.3g}", f"{layer.norm:.3g}", f"{self.stability.value:.3g}", _verdict(self.stability),
        ]  # fmt: skip


@dataclass(frozen=True)
class Guarantees:
    """The findings about every layer of a model; prints as a table."""

    layers: list[LayerGuarantees]

    def __str__(self) -> str:
        lines = [HEADER, *([str(j), *found.cells()] for j, found in enumerate(self.layers, 1))]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        return "\n".join("  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)).rstrip() for line in lines)


@torch.no_grad()
def check_model(model: DeepSparseCoding, x: Tensor) -> Guarantees:
    """Measure the model's codes of inputs `x` (batch, …), and say which bounds cover them.

    μ is each dictionary's coherence; s the most non-zeros of a code (of a stripe, for a convolution), ε the largest
    ``‖x_{j−1} − D_j x_j‖₂`` and ‖x‖ the largest norm of a code, all over these inputs; "covered" is the s that
    uniqueness allows. A verdict is "yes", "no", or "vacuous" for a bound that is true and says nothing. Atoms may have
    any norm: μ and the rate are those of the normalised ones, and Δ is that of the codes as they are.

    Raises ValueError for dictionaries that do not chain, or an atom that is zero.
    """
    dictionaries = [layer.dictionary for layer in model]
    check_chain(dictionaries)
    layers = measure_layers(dictionaries, x, model.codes(x))
    bounds = zip(layers, stability(layers), input_stability(layers), strict=True)
    return Guarantees([LayerGuarantees(layer, uniqueness(layer), _rate(layer), *both) for layer, *both in bounds])


def _rate(layer: Layer) -> Finding:
    value, note = layer.interference, ""
    uncut = layer.coherence.energy > 1 - UNIT
    if not uncut:
        note = "padding cuts atoms at the border, where W = D does not serve"
    holds = value < 1 and uncut
    return Finding("linear rate, (2s − 1)μ < 1", value, holds, not holds, note)


def _verdict(finding: Finding) -> str:
    return "no" if not finding.holds else "vacuous" if finding.vacuous else "yes"
