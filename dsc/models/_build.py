"""What every family shares: its activation's arguments, its default configurations, and its way through timm."""

from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from timm.models import build_model_with_cfg, generate_default_cfgs
from torch import nn

from dsc import hub
from dsc.dictionaries import Dictionary
from dsc.layers import SparseCoding
from dsc.prox import Activation, Prox, create_activation
from dsc.solvers import ISTA

M = TypeVar("M", bound=nn.Module)
SMALL_THRESHOLD = 0.01  # where a learned λ starts whose activation's own is 0 (a softplus cannot start there)


@dataclass(frozen=True)
class Act:
    """An activation to be made anew for each layer; None leaves an argument to the activation's default."""

    name: Activation
    group_size: int | None = None
    groups: int | None = None
    threshold: float | None = None
    learn_threshold: bool | None = None

    def make(self, dim: int, channels: int | None = None) -> Prox:
        """The module, its channels along `dim`; a learned λ has one value a channel (or group) of `channels`."""
        arguments = dict(group_size=self.group_size, groups=self.groups)
        prox = create_activation(self.name, dim, threshold=self.threshold, **arguments)
        if not (self.learn_threshold and prox.is_prox):
            return prox
        start = float(prox.threshold) or SMALL_THRESHOLD
        units = 1 if channels is None else channels // prox.group_size_of(channels)
        return create_activation(self.name, dim, threshold=[start] * units, learn=True, **arguments)


def sparse_layer(dictionary: Dictionary, prox: Prox, solver: ISTA) -> SparseCoding:
    """A network's layer: one step of size 1 with a bias, the plain layer; or several that 1/L keeps convergent."""
    plain = solver.steps == 1
    if not plain:
        # From unit atoms to ‖D‖ ≈ 1: the first step then keeps the scale of its input, layer upon layer.
        with torch.no_grad():
            dictionary.weight.div_(dictionary.curvature().sqrt())
    return SparseCoding(dictionary, prox, solver, step=1.0 if plain else "learned", bias=plain)


def default_cfgs(**architectures: dict[str, Any]) -> dict[str, Any]:
    """timm's configurations of these architectures and of their published checkpoints."""
    cfgs: dict[str, Any] = dict(architectures)
    for name, folder in hub.checkpoint_folders().items():
        if name.split(".")[0] in architectures:
            cfgs[name] = hub.read_config(folder)["pretrained_cfg"] | {"file": str(folder / hub.WEIGHTS)}
    return generate_default_cfgs(cfgs)  # type: ignore[no-any-return]


def build(model: type[M], architecture: str, pretrained: bool, kwargs: dict[str, Any], **build_args: Any) -> M:
    """Build `model` through timm; a checkpoint's own arguments are read from its `config.json`.

    Raises ValueError where an argument contradicts the checkpoint's.
    """
    tag = kwargs.get("pretrained_cfg")
    name = f"{architecture}.{tag}" if isinstance(tag, str) and tag else None
    if name is None and pretrained and tag is None:
        name = next((known for known in hub.checkpoint_folders() if known.split(".")[0] == architecture), None)
    if name in hub.checkpoint_folders():
        config = hub.read_config(hub.find(name))
        _check(name, config["model_args"], kwargs)
        kwargs = config["model_args"] | kwargs
    return build_model_with_cfg(model, architecture, pretrained, **build_args, **kwargs)  # type: ignore[return-value]


HEAD_ARGS = ("num_classes", "in_chans", "drop_rate", "pretrained_cfg")


def _check(name: str, saved: dict[str, Any], asked: dict[str, Any]) -> None:
    for key, value in asked.items():
        if key in saved and key not in HEAD_ARGS and saved[key] != value:
            raise ValueError(f"checkpoint {name} was trained with {key}={saved[key]!r}, not {value!r}")
