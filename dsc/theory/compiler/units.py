"""One-sided shrinkage and the identity as hidden units of an activation: ``g(v) ≈ Σ_i w_i φ(a_i v + c_i)``.

===================== ================================================== ================ ===========================
activation φ          ``max(v, 0)``                                      largest error    the identity
===================== ================================================== ================ ===========================
relu                  φ(v)                                               none             φ(v) − φ(−v)
leaky_relu (slope α)  (φ(v) + αφ(−v))/(1 − α²)                           none             (φ(v) − φ(−v))/(1 + α)
gelu, silu, softplus  φ(Rv)/R                                            0.170/R, 0.278/R (φ(Rv) − φ(−Rv))/R, exact
                                                                         and ln 2/R
elu                   φ(Rv)/R                                            1/R              (φ(Rv) − φ(−Rv))/R, to 1/R
sigmoid               ``1/R Σ_n φ(Rv − n − ½)``, n = 0, …, N             0.736/R, v ≤ B   (φ(εv) − φ(−εv))·2/ε
tanh                  as sigmoid, ``σ(v) = (1 + tanh(v/2))/2``           0.736/R, v ≤ B   φ(εv)/ε
===================== ================================================== ================ ===========================

Every error of order 1/R is attained near (or, for elu, far below) the kink. Bounded activations stand in steps, one a
unit, up to the bound B of the values, and are linear near 0; both only for values of size up to B, the `reach`. No
constant is added behind the units, so that what is padded by zeros decodes to zero.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from dsc._names import unknown

TAIL = 8  # steps beyond the reach, behind which the last sigmoid is off by e⁻⁸
SATURATED = 20.0  # tanh is 1 there, in float64


@dataclass(frozen=True)
class Units:
    """``Σ_i weight_i φ(gain_i v + offset_i)``, channel by channel: gain (units,), the others (units, channels or 1)."""

    gain: Tensor
    offset: Tensor
    weight: Tensor

    def of(self, sign: float, threshold: Tensor) -> "Units":
        """The function of ``sign·v − threshold``, with a threshold a channel."""
        return Units(sign * self.gain, self.offset - self.gain.unsqueeze(1) * threshold, self.weight)

    def times(self, factor: float | Tensor) -> "Units":
        """The function times `factor`, one number or one a channel."""
        return Units(self.gain, self.offset, self.weight * factor)

    def plus(self, other: "Units") -> "Units":
        """The sum of two functions."""
        gain, channels = torch.cat([self.gain, other.gain]), max(self.channels, other.channels)
        pairs = ((self.offset, other.offset), (self.weight, other.weight))
        offset, weight = (torch.cat([m.expand(-1, channels) for m in pair]) for pair in pairs)
        return Units(gain, offset, weight)

    @property
    def channels(self) -> int:
        """Number of channels that the units tell apart."""
        return max(self.offset.shape[1], self.weight.shape[1])


@dataclass(frozen=True)
class Pieces:
    """An activation and what is made of it.

    Attributes:
        activation: makes the module φ.
        positive, identity: ``max(v, 0)`` and v.
        positive_error, identity_error: their largest errors, for values of size up to `reach`.
    """

    activation: Callable[[], nn.Module]
    positive: Units
    identity: Units
    positive_error: float
    identity_error: float


EXACT = ("relu", "leaky_relu")
# Largest error of φ(v) for max(v, 0): the maximum of vΦ(−v), the root of v = 1 + e⁻ᵛ less 1, ln 2, and 1 at −∞.
SMOOTH: dict[str, tuple[Callable[[], nn.Module], float]] = {
    "gelu": (nn.GELU, 0.16998),
    "silu": (nn.SiLU, 0.27847),
    "softplus": (partial(nn.Softplus, threshold=40.0), math.log(2)),
    "elu": (nn.ELU, 1.0),
}
BOUNDED: dict[str, Callable[[], nn.Module]] = {"tanh": nn.Tanh, "sigmoid": nn.Sigmoid}
ACTIVATIONS = (*EXACT, *SMOOTH, *BOUNDED)


def pieces(name: str, scale: float | None, reach: float | None, precision: float) -> Pieces:
    """What `name` can stand in for, at R = `scale` and B = `reach`; `precision` is the data type's.

    Raises ValueError for an unknown name, a scale or reach that is missing, superfluous or not positive.
    """
    if name not in ACTIVATIONS:
        raise ValueError(unknown("activation", name, ACTIVATIONS))
    if name == "relu":
        return Pieces(nn.ReLU, units([1], [0], [1]), units([1, -1], [0, 0], [1, -1]), 0.0, 0.0)
    if name == "leaky_relu":
        slope = nn.LeakyReLU().negative_slope
        positive = units([1, -1], [0, 0], [1 / (1 - slope**2), slope / (1 - slope**2)])
        return Pieces(nn.LeakyReLU, positive, units([1, -1], [0, 0], [1 / (1 + slope), -1 / (1 + slope)]), 0.0, 0.0)
    assert scale is not None
    if name in SMOOTH:
        activation, error = SMOOTH[name]
        identity = units([scale, -scale], [0, 0], [1 / scale, -1 / scale])
        carried = 1 / scale if name == "elu" else 0.0
        return Pieces(activation, units([scale], [0], [1 / scale]), identity, error / scale, carried)
    assert reach is not None
    return _bounded(name, scale, reach, precision)


def _bounded(name: str, scale: float, reach: float, precision: float) -> Pieces:
    steps = math.ceil(reach * scale) + TAIL
    middles = [n + 0.5 for n in range(steps)]
    # ∫σ(R(v − t))dt over 0 ≤ t ≤ B + 8/R by the midpoint rule, of error h²/24 ∫|(d/dt)²σ| = 1/(48R); and where two
    # of them are subtracted, those errors, of either sign, may add up.
    error = (math.log(2) + 1 / 24 + math.exp(-TAIL)) / scale
    if name == "sigmoid":
        slope = precision ** (1 / 3) / reach  # the error of a cube and that of rounding are alike
        positive = units([scale] * steps, [-t for t in middles], [1 / scale] * steps)
        identity = units([slope, -slope], [0, 0], [2 / slope, -2 / slope])
        return Pieces(nn.Sigmoid, positive, identity, error, 4 * precision ** (2 / 3) * reach)
    slope = precision**0.5 / reach  # tanh loses nothing by rounding near 0
    gains, offsets = [scale / 2] * steps + [0], [-t / 2 for t in middles] + [SATURATED]
    positive = units(gains, offsets, [0.5 / scale] * steps + [0.5 / scale * steps])
    return Pieces(nn.Tanh, positive, units([slope], [0], [1 / slope]), error, precision * reach)


def units(gain: list[float], offset: list[float], weight: list[float]) -> Units:
    """Units alike in all channels; float64."""
    first, second, third = (torch.tensor(values, dtype=torch.float64) for values in (gain, offset, weight))
    return Units(first, second.unsqueeze(1), third.unsqueeze(1))
