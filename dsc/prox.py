"""Proximal operators: the activations of sparse coding, and the registry that names them.

A prox with threshold ``t = λ·step`` solves ``argmin_u ½‖u − z‖² + step·penalty(u)``:

=================== ============================================ ==============================================
name                formula                                      prox of
=================== ============================================ ==============================================
`relu`              ``max(z − t, 0)``                            ``λ Σ u`` over ``u ≥ 0`` (non-negative ℓ1)
`soft`              ``sign(z) max(|z| − t, 0)``                  ``λ ‖u‖₁``
`group_relu`        ``max(1 − t/‖z_g‖, 0) z_g``                  ``λ Σ_g ‖u_g‖₂`` (group lasso, signed)
`group_relu_nonneg` ``max(1 − t/‖z_g⁺‖, 0) z_g⁺, z⁺ = max(z,0)`` ``λ Σ_g ‖u_g‖₂`` over ``u ≥ 0``
=================== ============================================ ==============================================

Sources: Daubechies et al. 2004 (`soft`); Yuan and Lin 2006 (group lasso); *On the convergence of group-sparse
autoencoders*, arXiv 2102.07003 (`group_relu`, there the group-sparse ReLU).
Groups are equal, consecutive channels along `dim`. Torch's activations (`gelu`, `silu`, …) share the registry;
they are no prox, have no penalty and say so.
"""

import copy
import inspect
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dsc._names import unknown

Threshold = float | Tensor


def relu(z: Tensor, threshold: Threshold) -> Tensor:
    """One-sided shrinkage ``max(z − t, 0)``; `threshold` is a number or broadcasts with `z`."""
    return F.relu(z - threshold)


def soft(z: Tensor, threshold: Threshold) -> Tensor:
    """Two-sided shrinkage ``sign(z) max(|z| − t, 0)``; `threshold` is a number or broadcasts with `z`."""
    if isinstance(threshold, Tensor):
        return z - torch.clamp(z, -threshold, threshold)
    return F.softshrink(z, threshold)


def group_relu(z: Tensor, threshold: Threshold, group_size: int, dim: int = 1) -> Tensor:
    """Group shrinkage ``max(1 − t/‖z_g‖, 0) z_g`` over groups of `group_size` consecutive entries of `dim`.

    A `threshold` tensor broadcasts with the groups' norms, whose `dim` is (groups, 1).
    """
    groups = grouped(z, group_size, dim)
    return (groups * _shrinkage(groups, threshold, dim % z.ndim + 1)).flatten(dim % z.ndim, dim % z.ndim + 1)


def group_relu_nonneg(z: Tensor, threshold: Threshold, group_size: int, dim: int = 1) -> Tensor:
    """Non-negative group shrinkage: `group_relu` of the positive part, the prox of the norm on ``u ≥ 0``."""
    return group_relu(F.relu(z), threshold, group_size, dim)


def grouped(z: Tensor, group_size: int, dim: int = 1) -> Tensor:
    """View of `z` with `dim` split into (groups, group_size). Raises ValueError if the size does not divide."""
    channels = z.shape[dim]
    if channels % group_size:
        raise ValueError(
            f"group_size={group_size} does not divide the {channels} channels of dimension {dim}; "
            f"nearest sizes that do: {_nearest_divisors(channels, group_size)}"
        )
    return z.unflatten(dim, (channels // group_size, group_size))


def _nearest_divisors(channels: int, wanted: int) -> str:
    divisors = [d for d in range(1, channels + 1) if channels % d == 0]
    below = [str(d) for d in divisors if d < wanted][-1:]
    above = [str(d) for d in divisors if d > wanted][:1]
    return " or ".join(below + above)


def _shrinkage(groups: Tensor, threshold: Threshold, dim: int) -> Tensor:
    # The norm is kept in at least float32 and away from zero, so that a zero group has gradient 0, not NaN.
    dtype = torch.promote_types(groups.dtype, torch.float32)
    norm = torch.linalg.vector_norm(groups, dim=dim, keepdim=True, dtype=dtype)
    norm = norm.clamp_min(torch.finfo(dtype).tiny ** 0.25)
    return F.relu(1 - threshold / norm).to(groups.dtype)


class Prox(nn.Module):
    """A thresholding activation: ``forward(z, step)`` minimises ``½‖u − z‖² + step·penalty(u)``.

    Args:
        threshold: λ ≥ 0; a number, or one value a channel (a group, for group prox). Default: the class's own.
        learn: make λ a parameter, kept positive by a softplus.
        dim: the channels' dimension: 1 for images, −1 for tokens.

    Raises:
        ValueError: a negative threshold, or a learnable one that is not positive.
    """

    is_prox: ClassVar[bool] = True
    is_grouped: ClassVar[bool] = False
    default_threshold: ClassVar[float] = 0.1

    def __init__(self, threshold: float | Sequence[float] | None = None, learn: bool = False, dim: int = 1) -> None:
        super().__init__()
        self.dim, self.learn = dim, learn
        given = self.default_threshold if threshold is None else threshold
        value = torch.as_tensor(given, dtype=torch.float32)
        if (value < 0).any() or not value.isfinite().all():
            raise ValueError(f"threshold must be finite and at least 0, got {threshold}")
        if learn:
            if (value == 0).any():
                raise ValueError("a learnable threshold starts above 0 (it is a softplus): give threshold > 0")
            self.raw_threshold = nn.Parameter(value + (-(-value).expm1()).log())  # the inverse of softplus
        elif isinstance(given, int | float):
            self.fixed_threshold = float(given)
        else:
            self.register_buffer("fixed_threshold", value)

    @property
    def threshold(self) -> Threshold:
        """λ: a number where it is one fixed number, else a tensor."""
        return F.softplus(self.raw_threshold) if self.learn else self.fixed_threshold

    def forward(self, z: Tensor, step: Threshold = 1.0) -> Tensor:
        """Minimiser of ``½‖u − z‖² + step·penalty(u)``, of the shape of `z`."""
        threshold = self._broadcast(z)
        if isinstance(threshold, Tensor):
            threshold = threshold.to(z.dtype)
        elif threshold == 0:  # stays a number, so that ReLU costs no subtraction
            return self.shrink(z, 0.0)
        return self.shrink(z, threshold * step)

    def penalty(self, z: Tensor) -> Tensor:
        """λΩ(z) of each signal: summed over all dimensions but the first, shape (batch,)."""
        threshold = self._broadcast(z)
        return (threshold * self.norm(z)).flatten(1).sum(1)

    def group_size_of(self, channels: int) -> int:
        """Channels a group, among `channels` of them: 1 for a prox without groups."""
        return 1

    def shrink(self, z: Tensor, threshold: Threshold) -> Tensor:
        """The thresholding function, `threshold` = λ·step."""
        raise TypeError(f"{type(self).__name__} defines no thresholding")

    def norm(self, z: Tensor) -> Tensor:
        """Ω by entry (or by group, where its dim is (groups, 1)); infinite outside its domain."""
        raise TypeError(f"{type(self).__name__} is no prox: it has no penalty")

    def _broadcast(self, z: Tensor) -> Threshold:
        # λ per channel lies along `dim`; the norms of a group prox have one more dimension behind it.
        threshold = self.threshold
        if not isinstance(threshold, Tensor) or threshold.ndim == 0:
            return threshold
        if threshold.numel() == 1:
            return threshold.reshape(())
        expected = z.shape[self.dim] // self.group_size_of(z.shape[self.dim])
        if threshold.numel() != expected:
            raise ValueError(f"threshold has {threshold.numel()} values, expected 1 or {expected}")
        behind = z.ndim - 1 - self.dim % z.ndim + self.is_grouped
        return threshold.reshape(-1, *[1] * behind)

    def extra_repr(self) -> str:
        shown = "learned" if self.learn else self.threshold
        return f"threshold={shown}, dim={self.dim}"


class ReLU(Prox):
    """Non-negative ℓ1: `relu`. With λ = 0, its default, this is `torch.nn.ReLU`."""

    default_threshold = 0.0

    def shrink(self, z: Tensor, threshold: Threshold) -> Tensor:
        return F.relu(z) if isinstance(threshold, float) and threshold == 0 else relu(z, threshold)

    def norm(self, z: Tensor) -> Tensor:
        return torch.where(z < 0, torch.inf, z)

    def penalty(self, z: Tensor) -> Tensor:
        # 0·inf is NaN: with λ = 0 the indicator of u ≥ 0 stays.
        infeasible = (z < 0).flatten(1).any(1)
        return super().penalty(z.clamp_min(0)).masked_fill(infeasible, torch.inf)


class Soft(Prox):
    """ℓ1: `soft`."""

    def shrink(self, z: Tensor, threshold: Threshold) -> Tensor:
        return soft(z, threshold)

    def norm(self, z: Tensor) -> Tensor:
        return z.abs()


class GroupReLU(Prox):
    """Group lasso, signed: `group_relu` (the group-sparse ReLU of arXiv 2102.07003).

    Args:
        group_size: channels a group (default 8), or
        groups: the number of groups; never both.
    """

    is_grouped = True

    def __init__(
        self,
        threshold: float | Sequence[float] | None = None,
        learn: bool = False,
        dim: int = 1,
        group_size: int | None = None,
        groups: int | None = None,
    ) -> None:
        super().__init__(threshold, learn, dim)
        if group_size is not None and groups is not None:
            raise ValueError(f"give group_size or groups, not both (got {group_size} and {groups})")
        for name, value in (("group_size", group_size), ("groups", groups)):
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        self.groups = groups
        self.group_size = 8 if group_size is None else group_size

    def group_size_of(self, channels: int) -> int:
        if self.groups is None:
            return self.group_size
        if channels % self.groups:
            raise ValueError(
                f"groups={self.groups} does not divide the {channels} channels; "
                f"nearest numbers that do: {_nearest_divisors(channels, self.groups)}"
            )
        return channels // self.groups

    def shrink(self, z: Tensor, threshold: Threshold) -> Tensor:
        return group_relu(z, threshold, self.group_size_of(z.shape[self.dim]), self.dim)

    def norm(self, z: Tensor) -> Tensor:
        groups = grouped(z, self.group_size_of(z.shape[self.dim]), self.dim)
        return torch.linalg.vector_norm(groups, dim=self.dim % z.ndim + 1, keepdim=True)

    def extra_repr(self) -> str:
        size = f"group_size={self.group_size}" if self.groups is None else f"groups={self.groups}"
        return f"{super().extra_repr()}, {size}"


class GroupReLUNonneg(GroupReLU):
    """Non-negative group lasso: `group_relu_nonneg`."""

    def shrink(self, z: Tensor, threshold: Threshold) -> Tensor:
        return super().shrink(F.relu(z), threshold)

    def penalty(self, z: Tensor) -> Tensor:
        return super().penalty(z).masked_fill((z < 0).flatten(1).any(1), torch.inf)


class Elementwise(Prox):
    """One of torch's activations (or any callable) in the place of a prox: no threshold, no penalty, no prox."""

    is_prox = False

    def __init__(self, function: Callable[[Tensor], Tensor], dim: int = 1) -> None:
        super().__init__(0.0, dim=dim)
        self.function = function

    def forward(self, z: Tensor, step: Threshold = 1.0) -> Tensor:
        return self.function(z)

    def penalty(self, z: Tensor) -> Tensor:
        raise TypeError(f"{self.function} is no prox: it has no penalty")

    def extra_repr(self) -> str:
        return ""


PROX: dict[str, type[Prox]] = {
    "relu": ReLU,
    "soft": Soft,
    "group_relu": GroupReLU,
    "group_relu_nonneg": GroupReLUNonneg,
}
TORCH: dict[str, type[nn.Module]] = {
    "gelu": nn.GELU,
    "silu": nn.SiLU,
    "softplus": nn.Softplus,
    "leaky_relu": nn.LeakyReLU,
    "elu": nn.ELU,
    "tanh": nn.Tanh,
}

Activation = str | type[nn.Module] | Callable[[Tensor], Tensor]


def list_activations() -> list[str]:
    """Names that `create_activation` knows."""
    return sorted(PROX | TORCH)


def create_activation(activation: Activation, dim: int = 1, **kwargs: Any) -> Prox:
    """Activation module by name: `create_activation("group_relu", group_size=8, threshold=0.1)`.

    A torch class or a callable passes through, wrapped so that it can be called like a prox. Arguments that are
    None are left to the activation's own default.

    Raises:
        ValueError: an unknown name (the near ones are listed), or an argument the activation does not take.
    """
    given = {key: value for key, value in kwargs.items() if value is not None}
    if isinstance(activation, Prox):
        if given:
            raise ValueError(
                f"{', '.join(sorted(given))} given beside an activation that is made already: {activation}"
            )
        return activation
    if isinstance(activation, str) and activation not in PROX | TORCH:
        raise ValueError(unknown("activation", activation, list_activations()))
    kind = (PROX | TORCH)[activation] if isinstance(activation, str) else activation
    if isinstance(kind, type) and issubclass(kind, Prox):
        _check_arguments(activation, given, kind)
        return kind(dim=dim, **given)
    _check_arguments(activation, given, None)
    return Elementwise(kind() if isinstance(kind, type) else kind, dim)


def _check_arguments(activation: Activation, given: dict[str, Any], kind: type[Prox] | None) -> None:
    takes = set(inspect.signature(kind).parameters) if kind else set()
    for key in sorted(given.keys() - takes):
        who = [name for name, prox in PROX.items() if key in inspect.signature(prox).parameters]
        raise ValueError(f"activation {activation!r} takes no {key} (taken by: {', '.join(who) or 'none'})")


def activation_factory(activation: Activation, **kwargs: Any) -> Callable[..., Prox]:
    """Callable for timm's `act_layer=`: makes the activation anew on each call and ignores `inplace`."""

    def make(inplace: bool = False) -> Prox:
        return copy.deepcopy(create_activation(activation, **kwargs))  # deep: a ready module is not to be shared

    return make
