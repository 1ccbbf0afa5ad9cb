"""How far a compiled network can be from its layer: the errors of its parts, carried through the contraction of steps.

With e_k the error of z_k, ``e_{k+1} ≤ ‖I − sDᵀD‖ ((1 + β)e_k + βe_{k−1}) + errors of the parts``, as shrinkage is no
expansion; the error of a layer's code is one of the next one's signal. Rounding is left out, but that of softmax.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dsc.theory.compiler.iteration import Iteration


@dataclass(frozen=True)
class Errors:
    """Largest errors of the parts of one layer's network.

    Attributes:
        shrink, carry: of an entry that is shrunk, and of one that is carried.
        signal, code: of the linear maps ``sDᵀ`` of x and ``sDᵀD`` of z, in the operator norm.
    """

    shrink: float = 0.0
    carry: float = 0.0
    signal: float = 0.0
    code: float = 0.0


def bound(iterations: Sequence[Iteration], errors: Sequence[Errors], x: Tensor, reads: Sequence[int]) -> Tensor:
    """Bound of ``‖ẑ − z‖₂`` of each signal, (signals,); `reads` are the entries carried before the first step.

    Shapes: x (signals, features), or (signals, channels, h, w) for convolutional iterations.
    """
    size = None if iterations[0].is_dense else (x.shape[-2], x.shape[-1])
    norm = x.detach().flatten(1).norm(dim=1).double()
    error = torch.full_like(norm, errors[0].carry * sum(n**0.5 for n in reads))
    for one, part in zip(iterations, errors, strict=True):
        after = None if size is None else one.code_size(size)
        features, codes = (
            count * (1 if grid is None else math.prod(grid))
            for count, grid in ((one.weight.shape[1], size), (one.atoms, after))
        )
        norm, error = _layer(one, part, norm, error, features, codes)
        size = after
    return error


def _layer(
    one: Iteration, part: Errors, norm: Tensor, error: Tensor, features: int, codes: int
) -> tuple[Tensor, Tensor]:
    # Bounds of the code's norm and error from those of the signal.
    pull, shrink, lost = one.step * one.norm, part.shrink * codes**0.5, part.carry * codes**0.5
    driven = pull * error + part.signal * (norm + error)
    drive = pull * norm + float(one.shift.norm()) * (codes / one.atoms) ** 0.5
    # What a step adds to the error of what drives it, and of the point that it starts from.
    if one.is_dense:
        fading, moving = (pull * part.carry * features**0.5 if features < codes else lost), 0.0
    else:
        fading, moving = 2 * lost, lost + pull * part.carry * features**0.5
    now, before = (drive, driven + shrink), (torch.zeros_like(norm), torch.zeros_like(norm))
    for beta in one.momentum:
        driven = driven + fading
        reach = (1 + beta) * now[0] + beta * before[0]
        off = (1 + beta) * now[1] + beta * (before[1] + 2 * lost)
        after = one.contraction * off + part.code * (reach + off) + driven + moving + shrink
        now, before = (one.contraction * reach + drive, after), now
    return now
