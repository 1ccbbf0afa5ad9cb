"""Penalties on the observed codes of a model's sparse layers, added to the task's loss.

Each is a mean over entries, so one weight means the same at every width, image size and batch.
"""

from collections.abc import Callable
from fnmatch import fnmatch
from typing import Any, Self

import torch
from torch import Tensor, nn

from dsc import measures
from dsc._names import unknown
from dsc.layers import SparseCoding
from dsc.observe import Observer, SparseLayer

WINDOW = 10  # training steps that the running mean of the active fraction looks back
RATE = 0.02  # most that log-weight moves in a training step
DAMPING = 2  # power of the active fraction in the weight in use


class Regularizer(nn.Module):
    """``w Σ_layers penalty(z)`` over the layers whose name matches `layers` (a shell pattern).

    With a `target` τ, the weight is adapted until a fraction τ of the codes is active: of their entries that are not
    0, or of such groups where the prox has groups; a is its mean over these layers' codes. Each training step after
    the warm-up takes

        ā ← ā + (a − ā)/10,    w ← w exp(0.02 clip(ā/τ − 1, −1, 1)),    weight in use: w ā²,

    with ā = 1 at first. This is an integral controller of log w, which rests only where ā = τ and moves w by at most
    2 % a step, so by a factor of ten in 115; ā² damps it, as the codes follow the weight late. Start low: units that
    too large a weight has silenced come back slowly, or never. ``w`` and ``ā`` then belong to the state dict, so that
    a resumed run goes on as if it had not stopped.

    Args:
        weight: w, at least 0; with a target the value to start from, above 0.
        layers: pattern of the layers' names.
        warmup: fraction of the run, in [0, 1], in which the weight rises linearly from 0.
        target: τ, in (0, 1); None for a fixed weight.

    Raises:
        ValueError: an argument out of its range; when called, a pattern that matches no layer, or a target for an
            activation without a threshold (its number of zeros does not follow a penalty).
    """

    weight: Tensor
    active: Tensor

    def __init__(self, weight: float, layers: str = "*", warmup: float = 0.0, target: float | None = None) -> None:
        super().__init__()
        if not weight >= 0:
            raise ValueError(f"a regularizer's weight must be at least 0, got {weight}")
        if not 0 <= warmup <= 1:
            raise ValueError(f"warmup is a fraction of the run in [0, 1], got {warmup}")
        if target is not None:
            _check_target(target, weight, warmup)
        self.layers, self.warmup, self.target = layers, warmup, target
        # A fixed weight is configuration, not state: a resumed run takes the one it is given.
        self.register_buffer("weight", torch.tensor(float(weight)), persistent=target is not None)
        if target is not None:
            self.register_buffer("active", torch.ones(()))

    def forward(self, observer: Observer, progress: float = 1.0) -> Tensor:
        """Penalty of the latest forward, a scalar with gradient; `progress` is the fraction of the run behind it.

        In training mode this adapts the weight to the target first.
        """
        names = [name for name in observer.layers if fnmatch(name, self.layers)]
        if not names:
            raise ValueError(unknown("layer", self.layers, observer.layers))
        terms = self.terms(observer, names)
        if not terms:
            raise ValueError(f"the model's forward reached none of the layers {', '.join(names)}")
        if self.target is not None and self.training and progress >= self.warmup:
            self._adapt(self.target, observer, names)
        return self.weight_at(progress) * torch.stack(terms).sum()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        # Moved with the model, but never rounded with it: in bfloat16 the weight's small steps would be lost.
        return super()._apply(lambda tensor: tensor.to(fn(tensor).device), recurse)

    def weight_at(self, progress: float) -> Tensor:
        """The weight in use at that fraction of the run, a scalar."""
        weight = self.weight if self.target is None else self.weight * self.active**DAMPING
        return weight * (1.0 if progress >= self.warmup else progress / self.warmup)

    def terms(self, observer: Observer, names: list[str]) -> list[Tensor]:
        """The penalties to be summed: one a call of each of these layers."""
        return [self.penalty(z, layer) for z, layer in _codes(observer, names)]

    def penalty(self, z: Tensor, layer: SparseLayer) -> Tensor:
        """The penalty of one layer's code."""
        raise TypeError(f"{type(self).__name__} defines no penalty")

    @torch.no_grad()
    def _adapt(self, target: float, observer: Observer, names: list[str]) -> None:
        for name in names:
            prox = observer.layers[name].prox
            if not prox.has_threshold:
                raise ValueError(
                    f"target={target} cannot be held in layer {name}: the number of zeros of {prox} does not follow "
                    "a penalty; take an activation with a threshold, such as relu, soft or group_relu"
                )
        fractions = [_active(z, layer) for z, layer in _codes(observer, names)]
        self.active.lerp_(torch.stack(fractions).mean().to(self.active), 1 / WINDOW)
        error = (self.active / target - 1).clamp(-1, 1)
        self.weight.mul_((RATE * error).exp())

    def extra_repr(self) -> str:
        target = "" if self.target is None else f", target={self.target}"
        return f"weight={float(self.weight):g}, layers={self.layers!r}, warmup={self.warmup}{target}"


class L1(Regularizer):
    """``‖z‖₁/n``."""

    def penalty(self, z: Tensor, layer: SparseLayer) -> Tensor:
        return measures.mean_l1(z)


class GroupL21(Regularizer):
    """``Σ_g ‖z_g‖₂/n``, with the layer's own groups or groups of `group_size` channels."""

    def __init__(self, weight: float, layers: str = "*", group_size: int | None = None, **kwargs: Any) -> None:
        super().__init__(weight, layers, **kwargs)
        if group_size is not None and group_size < 1:
            raise ValueError(f"group_size must be at least 1, got {group_size}")
        self.group_size = group_size

    def penalty(self, z: Tensor, layer: SparseLayer) -> Tensor:
        size = self.group_size or layer.prox.group_size_of(z.shape[layer.prox.dim])
        return measures.mean_group_l21(z, size, layer.prox.dim)


class Hoyer(Regularizer):
    """``‖z‖₁²/(n‖z‖₂²)``: sparser codes whatever their scale."""

    def penalty(self, z: Tensor, layer: SparseLayer) -> Tensor:
        return measures.hoyer_square(z)


class Log(Regularizer):
    """``Σ log(1 + |z|/ε)/n``: with falling ε from ℓ1 towards a count of the entries (Candès, Wakin and Boyd 2008).

    Args:
        eps: ε > 0, in units of z: entries well above it are hardly shrunk further.
    """

    def __init__(self, weight: float, layers: str = "*", eps: float = 0.1, **kwargs: Any) -> None:
        super().__init__(weight, layers, **kwargs)
        if not eps > 0:
            raise ValueError(f"eps must be above 0, got {eps}")
        self.eps = eps

    def penalty(self, z: Tensor, layer: SparseLayer) -> Tensor:
        return measures.mean_log(z, self.eps)


class Coherence(Regularizer):
    """Mean squared cosine between a dictionary's atoms, leaving out pairs within a group where the prox has groups.

    Atoms count with unit norm; translates of convolutional ones are not compared. Layers without a dictionary are
    passed over.
    """

    def __init__(self, weight: float, layers: str = "*", warmup: float = 0.0) -> None:
        super().__init__(weight, layers, warmup)

    def terms(self, observer: Observer, names: list[str]) -> list[Tensor]:
        return [self.coherence(coder) for coder in _coders(observer, names, "Coherence").values()]

    def coherence(self, coder: SparseCoding) -> Tensor:
        """The penalty of one layer's dictionary."""
        atoms = coder.dictionary.weight.flatten(1)
        return measures.mean_squared_coherence(atoms, coder.prox.group_size_of(len(atoms)))


class Reconstruction(Regularizer):
    """``‖x − Dz‖²/‖x‖²`` over the batch: what part of a layer's input x its code z leaves unexplained.

    The gradient reaches D, z and, through x, the layers below. Layers without a dictionary are passed over.
    """

    def __init__(self, weight: float, layers: str = "*", warmup: float = 0.0) -> None:
        super().__init__(weight, layers, warmup)

    def terms(self, observer: Observer, names: list[str]) -> list[Tensor]:
        return [
            measures.relative_residual(x, coder.decode(z, x.shape[-2:]))
            for name, coder in _coders(observer, names, "Reconstruction").items()
            for x, z in zip(observer.inputs.get(name, []), observer.features.get(name, []), strict=True)
        ]


def _codes(observer: Observer, names: list[str]) -> list[tuple[Tensor, SparseLayer]]:
    return [(z, observer.layers[name]) for name in names for z in observer.features.get(name, [])]


def _coders(observer: Observer, names: list[str], who: str) -> dict[str, SparseCoding]:
    coders = {name: layer.coder for name, layer in observer.layers.items() if layer.coder is not None}
    chosen = {name: coders[name] for name in names if name in coders}
    if not chosen:
        raise ValueError(
            f"{who} needs layers with a dictionary, and {', '.join(names)} has none; "
            f"the model's layers with one: {', '.join(coders) or 'none'}"
        )
    return chosen


def _active(z: Tensor, layer: SparseLayer) -> Tensor:
    dim = layer.prox.dim
    return measures.active_group_fraction(z, layer.prox.group_size_of(z.shape[dim]), dim)


def _check_target(target: float, weight: float, warmup: float) -> None:
    if not 0 < target < 1:
        raise ValueError(f"target is an active fraction in (0, 1), got {target}")
    if weight == 0:
        raise ValueError(f"target={target} adapts the weight by factors: start from one above 0, such as 0.01")
    if warmup == 1:
        raise ValueError(f"warmup=1 leaves no step to reach target={target} in: take a warmup below 1")
