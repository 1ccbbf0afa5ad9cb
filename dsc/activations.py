"""The registry of activations: every prox and torch's own activations, by name.

Torch's activations (`gelu`, `silu`, …) are no prox, have no penalty and say so.
"""

import copy
import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor, nn

from dsc import nonconvex, prox
from dsc._names import unknown
from dsc.prox import Prox
from dsc.shrinkage import Threshold

PROX: dict[str, type[Prox]] = {
    "relu": prox.ReLU,
    "soft": prox.Soft,
    "group_relu": prox.GroupReLU,
    "group_relu_nonneg": prox.GroupReLUNonneg,
    "sparse_group": prox.SparseGroup,
    "elastic": prox.Elastic,
    "hard": nonconvex.Hard,
    "jump_relu": nonconvex.JumpReLU,
    "top_k": nonconvex.TopK,
    "group_top_k": nonconvex.GroupTopK,
}
TORCH: dict[str, type[nn.Module]] = {
    "gelu": nn.GELU,
    "silu": nn.SiLU,
    "softplus": nn.Softplus,
    "leaky_relu": nn.LeakyReLU,
    "elu": nn.ELU,
    "tanh": nn.Tanh,
}

Activation = str | type[nn.Module] | partial[nn.Module] | Callable[[Tensor], Tensor]


class Elementwise(Prox):
    """One of torch's activations (or any callable) in the place of a prox: no threshold, no penalty, no prox."""

    is_prox = False
    has_threshold = False

    def __init__(self, function: Callable[[Tensor], Tensor], dim: int = 1) -> None:
        super().__init__(0.0, dim=dim)
        self.function = function

    def forward(self, z: Tensor, step: Threshold = 1.0) -> Tensor:
        return self.function(z)

    def _title(self) -> str:
        return str(self.function)

    def extra_repr(self) -> str:
        return ""


def list_activations() -> list[str]:
    """Names that `create_activation` knows."""
    return sorted(PROX | TORCH)


def create_activation(activation: Activation, dim: int = 1, **kwargs: Any) -> Prox:
    """Activation module by name: `create_activation("group_relu", group_size=8, threshold=0.1)`.

    A torch class, a `functools.partial` of one or a callable passes through, wrapped so that it can be called like a
    prox. Arguments that are None are left to the activation's own default.

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
    make, kind = _resolve(activation, given)
    if not isinstance(kind, type):
        return Elementwise(make, dim)
    return make(dim=dim, **given) if issubclass(kind, Prox) else Elementwise(make(), dim)


def is_grouped(activation: Activation) -> bool:
    """Whether an activation takes groups."""
    return "groups" in _takes(_resolve(activation, {})[1])


def configure(activation: Activation, **kwargs: Any) -> Activation:
    """`activation` with some of its arguments filled in, itself an activation: `configure("top_k", k=32)`.

    Raises ValueError as `create_activation`.
    """
    return partial(_resolve(activation, kwargs)[0], **kwargs)


def _resolve(activation: Activation, given: dict[str, Any]) -> tuple[Any, Any]:
    # What makes (or is) that activation and takes all the arguments given; and the class behind it, if there is one.
    if isinstance(activation, str) and activation not in PROX | TORCH:
        raise ValueError(unknown("activation", activation, list_activations()))
    make = (PROX | TORCH)[activation] if isinstance(activation, str) else activation
    kind = make.func if isinstance(make, partial) else make
    for key in sorted(given.keys() - _takes(kind)):
        who = [name for name, known in PROX.items() if key in inspect.signature(known).parameters]
        raise ValueError(f"activation {activation!r} takes no {key} (taken by: {', '.join(who) or 'none'})")
    return make, kind


def _takes(kind: Any) -> set[str]:
    return set(inspect.signature(kind).parameters) if isinstance(kind, type) and issubclass(kind, Prox) else set()


def activation_factory(activation: Activation, **kwargs: Any) -> Callable[..., Prox]:
    """Callable for timm's `act_layer=`: makes the activation anew on each call and ignores `inplace`."""

    def make(inplace: bool = False) -> Prox:
        return copy.deepcopy(create_activation(activation, **kwargs))  # deep: a ready module is not to be shared

    return make
