"""Penalties on the observed codes of a model's sparse layers, added to the task's loss.

Each is a mean over entries, so one weight means the same at every width, image size and batch.
"""

from fnmatch import fnmatch

import torch
from torch import Tensor

from dsc import measures
from dsc._names import unknown
from dsc.observe import Observer, SparseLayer


class Regularizer:
    """``weight · Σ_layers penalty(z)`` over the layers whose name matches `layers` (a shell pattern).

    Raises:
        ValueError: a negative weight; when called, a pattern that matches no layer.
    """

    def __init__(self, weight: float, layers: str = "*") -> None:
        if not weight >= 0:
            raise ValueError(f"a regularizer's weight must be at least 0, got {weight}")
        self.weight, self.layers = weight, layers

    def __call__(self, observer: Observer) -> Tensor:
        """Penalty of the latest forward, a scalar with gradient."""
        chosen = [name for name in observer.layers if fnmatch(name, self.layers)]
        if not chosen:
            raise ValueError(unknown("layer", self.layers, observer.layers))
        codes = [(z, observer.layers[name]) for name in chosen for z in observer.features.get(name, [])]
        if not codes:
            raise ValueError(f"the model's forward reached none of the layers {', '.join(chosen)}")
        return self.weight * torch.stack([self.penalty(z, layer) for z, layer in codes]).sum()

    def penalty(self, z: Tensor, layer: SparseLayer) -> Tensor:
        """The penalty of one layer's code."""
        raise TypeError(f"{type(self).__name__} defines no penalty")


class L1(Regularizer):
    """``‖z‖₁/n``."""

    def penalty(self, z: Tensor, layer: SparseLayer) -> Tensor:
        return measures.mean_l1(z)


class GroupL21(Regularizer):
    """``Σ_g ‖z_g‖₂/n``, with the layer's own groups or groups of `group_size` channels."""

    def __init__(self, weight: float, layers: str = "*", group_size: int | None = None) -> None:
        super().__init__(weight, layers)
        self.group_size = group_size

    def penalty(self, z: Tensor, layer: SparseLayer) -> Tensor:
        size = self.group_size or layer.prox.group_size_of(z.shape[layer.prox.dim])
        return measures.mean_group_l21(z, size, layer.prox.dim)


class Hoyer(Regularizer):
    """``‖z‖₁²/(n‖z‖₂²)``: sparser codes whatever their scale."""

    def penalty(self, z: Tensor, layer: SparseLayer) -> Tensor:
        return measures.hoyer_square(z)
