"""How near a code is to the minimiser of ``½‖x − Dz‖² + penalty(z)``, measured from the code alone.

Each function takes the residual ``x − Dz`` and its correlations ``Dᵀ(x − Dz)``, so that it serves any dictionary.
"""

import torch
from torch import Tensor

from dsc.prox import Prox


@torch.no_grad()
def duality_gap(prox: Prox, z: Tensor, residual: Tensor, correlations: Tensor) -> Tensor:
    """Upper bound of ``objective(z) − min objective`` for each signal, float64 of shape (batch,).

    The dual point is θ = s·r with r the residual, c its correlations and ``s = 1/max(1, gauge(c))`` the largest scale
    at most 1 that makes it feasible. In Fenchel and Young's form the gap is the sum of two terms that are not negative,

        ``½(1 − s)²‖r‖² + (penalty(z) + conjugate(s c) − s⟨z, c⟩)``,

    and not the difference of two objectives, so that little is lost to rounding: the rounding of c remains, about
    ``ε‖x‖/λ`` of the objective or 1e-6 in single precision. Infinite where the penalty is. Source: Mairal 2010 (thesis,
    appendix D); Ndiaye et al. 2017, arXiv 1611.05780.

    Shapes: `z` and `correlations` as the codes, `residual` as the signals.

    Raises:
        TypeError: an activation that is no prox, or whose penalty is not convex: it has no conjugate.
    """
    z, residual, correlations = z.double(), residual.double(), correlations.double()
    scale = 1 / prox.gauge(correlations).clamp_min(1)
    feasible = scale.reshape(-1, *[1] * (z.ndim - 1)) * correlations
    young = prox.penalty(z) + prox.conjugate(feasible) - (z * feasible).flatten(1).sum(1)
    # Fenchel and Young: not negative, but for rounding.
    return (1 - scale).square() * _energy(residual) / 2 + young.clamp_min(0)


@torch.no_grad()
def relative_duality_gap(prox: Prox, z: Tensor, residual: Tensor, correlations: Tensor) -> Tensor:
    """`duality_gap` over the objective ``½‖x − Dz‖² + penalty(z)`` of each signal, float64 of shape (batch,).

    At most 1, as no objective is below 0.
    """
    objective = _energy(residual.double()) / 2 + prox.penalty(z.double())
    return relative(duality_gap(prox, z, residual, correlations), objective).clamp_max(1)


@torch.no_grad()
def fixed_point_residual(z: Tensor, stepped: Tensor) -> Tensor:
    """``‖z − T(z)‖/‖z‖`` of each signal, shape (batch,), `stepped` being T(z), one proximal step on."""
    return relative((z - stepped).flatten(1).norm(dim=1), z.flatten(1).norm(dim=1))


def relative(value: Tensor, scale: Tensor) -> Tensor:
    """``value/scale``, and the value itself where it is 0 or infinite."""
    return torch.where((value == 0) | value.isinf(), value, value / scale)


def _energy(x: Tensor) -> Tensor:
    return x.flatten(1).square().sum(1)
