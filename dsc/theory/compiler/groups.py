"""Group shrinkage, which is not piecewise linear, by three hidden layers that are.

``z_g = τ_g v_g`` with ``τ_g = max(1 − t/‖v_g‖, 0)``: the squares of entries, then τ as a function of their sum, then
the product by ``τv = ((τ + v)² − (τ − v)²)/4``, each function interpolated linearly between knots 1/R apart, for
entries of size up to B. The error falls as 1/R² where R ≫ 1/t.
"""

import math
from dataclasses import replace

import torch
from torch import Tensor, nn

from dsc.shrinkage import group_relu
from dsc.theory.compiler.chain import Chain, Part
from dsc.theory.compiler.iteration import Shrinkage
from dsc.theory.compiler.units import Pieces, Units

SAMPLES = 8192


def elementwise(shrinkage: Shrinkage, pieces: Pieces) -> Units:
    """The part of a shrinkage that acts on single entries, times its gain."""
    threshold = shrinkage.threshold
    if shrinkage.nonneg:
        return pieces.positive.of(1, threshold).times(shrinkage.gain)
    if shrinkage.group is not None and not threshold.any():
        return pieces.identity
    both = pieces.positive.of(1, threshold).plus(pieces.positive.of(-1, threshold).times(-1))
    return both.times(shrinkage.gain)


def add_groups(chain: Chain, shrinkage: Shrinkage, scale: float, reach: float) -> None:
    """Append what shrinks the groups of the quantity "z"; all others are carried along."""
    assert shrinkage.group is not None
    positive, atoms = chain.pieces.positive, len(shrinkage.threshold)
    one = torch.eye(atoms).double()
    member = torch.eye(atoms // shrinkage.size).double().repeat_interleave(shrinkage.size, 0)
    others = [name for name in chain.state if name != "z"]

    def carried(*names: str) -> dict[str, list[Part]]:
        return {name: [chain.keep(name)] for name in (*names, *others)}

    chain.layer({"q": [Part({"z": chain.point(one)}, _square(positive, 1 / scale, reach))], **carried("z")})
    ratio = _ratio(positive, shrinkage.group, 1 / scale, reach * shrinkage.size**0.5)
    chain.layer({"ratio": [Part({"q": chain.point(member.mT)}, ratio)], **carried("z")})
    square = _square(positive, 1 / (reach * scale), 2.0).times(reach / 4)
    terms = [
        Part({"z": chain.point(one / reach), "ratio": chain.point(sign * member)}, square.times(sign))
        for sign in (1, -1)
    ]
    chain.layer({"z": terms, **carried()})


def measured_error(shrinkage: Shrinkage, pieces: Pieces, scale: float, reach: float) -> float:
    """Largest error of an entry over random groups of entries up to `reach`, of all norms: a figure, and no bound."""
    shrinkage = _unlike(shrinkage)
    chain = Chain(len(shrinkage.threshold), 1, pieces)
    one = chain.point(torch.eye(len(shrinkage.threshold)).double())
    chain.layer({"z": [Part({"x": one}, elementwise(shrinkage, pieces))]})
    add_groups(chain, shrinkage, scale, reach)
    chain.finish()
    network = nn.Sequential(*chain.modules)
    with torch.no_grad():
        parts = _samples(shrinkage, scale, reach).split(256)
        return max(float((network(u.unsqueeze(2)).squeeze(2) - exact(shrinkage, u)).abs().max()) for u in parts)


def _samples(shrinkage: Shrinkage, scale: float, reach: float) -> Tensor:
    # Points of the whole cube, the more the nearer to 0; and as many a few knots beyond the kink, where errors peak.
    assert shrinkage.group is not None
    generator = torch.Generator().manual_seed(0)
    shape = (SAMPLES // 2, len(shrinkage.group), shrinkage.size)
    radius = torch.rand(2, *shape[:2], 1, generator=generator, dtype=torch.float64)
    wide = reach * radius[0].square() * (2 * torch.rand(shape, generator=generator, dtype=torch.float64) - 1)
    ray = torch.randn(shape, generator=generator, dtype=torch.float64)
    near = (shrinkage.group.unsqueeze(1) + 4 / scale * radius[1]) * ray / ray.norm(dim=2, keepdim=True)
    near = near + near.sign() * shrinkage.threshold.unflatten(0, shape[1:])  # what elements lose before
    return torch.cat([wide, near.clamp(-reach, reach)]).flatten(1)


def _unlike(shrinkage: Shrinkage) -> Shrinkage:
    # One group of each kind: groups that share their thresholds share their error.
    assert shrinkage.group is not None
    by_group = (values.unflatten(0, (-1, shrinkage.size)) for values in (shrinkage.threshold, shrinkage.gain))
    kinds = torch.cat([*by_group, shrinkage.group.unsqueeze(1)], 1).unique(dim=0)
    threshold, gain, group = kinds.split([shrinkage.size, shrinkage.size, 1], 1)
    return replace(shrinkage, threshold=threshold.flatten(), gain=gain.flatten(), group=group.flatten())


def exact(shrinkage: Shrinkage, u: Tensor) -> Tensor:
    """The shrinkage itself, of points (signals, atoms)."""
    v = (u - shrinkage.threshold).clamp_min(0)
    if not shrinkage.nonneg:
        v = v - (-u - shrinkage.threshold).clamp_min(0)
    v = shrinkage.gain * v
    if shrinkage.group is None:
        return v
    return group_relu(v, shrinkage.group.unsqueeze(1), shrinkage.size)


def _square(positive: Units, width: float, reach: float) -> Units:
    # v² at the knots, and above it between them: by at most width²/4.
    knots = width * torch.arange(math.ceil(reach / width)).double()
    weights = torch.full_like(knots, 2 * width)
    weights[0] = width
    sides = [_hinges(positive, sign, knots.unsqueeze(1), weights.unsqueeze(1)) for sign in (1.0, -1.0)]
    return sides[0].plus(sides[1])


def _ratio(positive: Units, threshold: Tensor, width: float, reach: float) -> Units:
    # max(1 − t/√q, 0) at the knots √q = t + n·width, and constant behind the last of them.
    beyond = width * torch.arange(math.ceil(reach / width) + 1).double().unsqueeze(1)
    radius = threshold + beyond
    values, knots = torch.where(radius > 0, beyond / radius, 0), radius.square()
    slopes = values.diff(dim=0) / knots.diff(dim=0)
    nothing = torch.zeros_like(slopes[:1])
    return _hinges(positive, 1.0, knots, torch.cat([slopes, nothing]) - torch.cat([nothing, slopes]))


def _hinges(positive: Units, sign: float, knots: Tensor, weights: Tensor) -> Units:
    # Σ_n weights_n max(sign·v − knots_n, 0); both are (knots, channels or 1).
    count = len(knots)
    offset = positive.offset - positive.gain.unsqueeze(1) * knots.unsqueeze(1)
    weight = positive.weight * weights.unsqueeze(1)
    return Units(sign * positive.gain.repeat(count), offset.flatten(0, 1), weight.flatten(0, 1))
