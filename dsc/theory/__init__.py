"""Theory made measurable: what the papers state, with the figure, whether it holds, and whether it says anything."""

from dsc.theory.convergence import (
    Alignment,
    Contraction,
    alignment,
    contraction,
    norm_condition,
    printed_contraction,
)
from dsc.theory.guarantees import (
    CodeBounds,
    Finding,
    SupportRange,
    block_coherence,
    code_bounds,
    coherence,
    dictionary_error,
    observed_support_range,
    support_range,
)

__all__ = [
    "Alignment",
    "CodeBounds",
    "Contraction",
    "Finding",
    "SupportRange",
    "alignment",
    "block_coherence",
    "code_bounds",
    "coherence",
    "contraction",
    "dictionary_error",
    "norm_condition",
    "observed_support_range",
    "printed_contraction",
    "support_range",
]
