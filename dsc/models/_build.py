"""What every family shares: its activation's arguments, its default configurations, and its way through timm."""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from inspect import signature
from types import MappingProxyType
from typing import Any, TypeVar

import torch
from timm.models import DefaultCfg, build_model_with_cfg, generate_default_cfgs
from torch import Tensor, nn

from dsc import hub
from dsc.activations import Activation, configure, create_activation, is_grouped
from dsc.dictionaries import ConvDictionary, Dictionary
from dsc.layers import SparseCoding
from dsc.prox import Prox
from dsc.solvers import ISTA

M = TypeVar("M", bound=nn.Module)
NO_DEFAULTS: Mapping[str, Any] = MappingProxyType({})
# Where an unrolled layer's λ starts, as a fraction of an entry's (or group norm's) expected size. Shrinkage is the
# only non-linearity of a signed group prox, so there it must bite from the start.
RELATIVE_THRESHOLD = {False: 0.1, True: 0.5}
# What single activations take beside the arguments that every model names.
OPTIONS = ("k", "nonneg", "l1_ratio", "bandwidth")


@dataclass(frozen=True)
class Act:
    """An activation to be made anew for each layer; None leaves an argument to the activation's default.

    Of a module that is made already each layer has a copy, with the λ that it came with.
    """

    name: Activation
    group_size: int | None = None
    groups: int | None = None
    threshold: float | None = None
    learn_threshold: bool | None = None

    def make(self, dim: int) -> Prox:
        """The module, its channels along `dim`, its λ as given."""
        shape = dict(group_size=self.group_size, groups=self.groups, threshold=self.threshold)
        if not isinstance(self.name, nn.Module):
            return create_activation(self.name, dim, learn=self.learn_threshold or None, **shape)
        own = create_activation(copy.deepcopy(self.name), dim, **shape)
        own.dim = dim
        return own

    def make_alone(self, dim: int, channels: int) -> Prox:
        """The module for the one step of a plain layer, on entries of about unit size.

        A signed prox has no other non-linearity than its shrinkage: unless λ is given, half of its entries (or groups)
        are zero at first, as half of a ReLU's are.
        """
        prox = self.make(dim)
        if self.threshold is not None or isinstance(self.name, Prox) or prox.nonneg or not prox.has_threshold:
            return prox
        size = median_size(prox.group_size_of(channels))
        return replace(self, threshold=prox.zeroing_threshold(size, channels)).make(dim)

    def make_relative(self, dim: int, channels: int, size: float) -> Prox:
        """The module for codes whose entries are about `size`: λ zeroes entries (or groups) of that fraction of it.

        A learned λ has one value a channel or group.
        """
        if isinstance(self.name, nn.Module):
            return self.make(dim)
        shape = dict(group_size=self.group_size, groups=self.groups)
        prox = create_activation(self.name, dim, threshold=self.threshold, **shape)
        if not prox.has_threshold:
            return prox
        fraction = RELATIVE_THRESHOLD[prox.is_grouped] if self.threshold is None else self.threshold
        value = prox.zeroing_threshold(fraction * size, channels)
        if not self.learn_threshold:
            return create_activation(self.name, dim, threshold=value, **shape)
        values = [value] * (channels // prox.group_size_of(channels))
        return create_activation(self.name, dim, threshold=values, learn=True, **shape)


def median_size(entries: int) -> float:
    """Median root mean square of that many standard normal numbers (Wilson and Hilferty's cube root, 1931)."""
    return (1 - 2 / (9 * entries)) ** 1.5


def sparse_layer(dictionary: Dictionary, act: Act, dim: int, solver: ISTA, size: float = 1.0) -> SparseCoding:
    """A network's layer: one step of size 1 with a bias, the plain layer; or several that 1/L keeps convergent.

    `size` is the expected size (root mean square) of the layer's input; the layer's `code_size` is its code's, on
    noise. An unrolled layer starts from ‖D‖ ≈ 1 rather than unit atoms: its code is then not smaller by 1/L.
    Raises ValueError for a λ that leaves nothing of it.
    """
    if solver.steps == 1:
        return SparseCoding(dictionary, act.make_alone(dim, dictionary.num_atoms), solver, step=1.0, bias=True)
    with torch.no_grad():
        gain = float(dictionary.curvature().rsqrt())
        dictionary.weight.mul_(gain)
        layer = SparseCoding(dictionary, act.make_relative(dim, dictionary.num_atoms, gain * size), solver, "learned")
        noise = gain * size * torch.randn(256, dictionary.num_atoms)
        layer.code_size = float(layer.prox(noise).square().mean().sqrt())  # dims 1 and −1 agree here
        if layer.code_size == 0:
            raise ValueError(_no_code_left(act, layer.prox))
    return layer


def _no_code_left(act: Act, prox: Prox) -> str:
    if isinstance(act.name, nn.Module):
        return f"{act.name} leaves no entry of a code from inputs of unit size: give it a smaller threshold"
    return (
        f"threshold={act.threshold} leaves no entry of a code: it is a fraction of the code's expected size "
        f"(default {RELATIVE_THRESHOLD[prox.is_grouped]}), so take a smaller one"
    )


def least_side(dictionaries: Sequence[ConvDictionary]) -> int:
    """Least height (and width) of images that these dictionaries, each on the code of the one before, can code."""
    side = 1
    for dictionary in reversed(dictionaries):
        side = max(dictionary.signal_side(side), 1)
    return side


def check_size(x: Tensor, least: int) -> None:
    """Raise ValueError for images (…, h, w) with less than that many pixels a side."""
    if min(x.shape[-2:]) < least:
        raise ValueError(
            f"images of {x.shape[-2]}×{x.shape[-1]} pixels are too small: this network needs {least} a side"
        )


def default_cfgs(**architectures: dict[str, Any]) -> dict[str, DefaultCfg]:
    """timm's configurations of these architectures and of their published checkpoints."""
    cfgs: dict[str, Any] = dict(architectures)
    for name, folder in hub.checkpoint_folders().items():
        if name.split(".")[0] in architectures:
            cfgs[name] = hub.read_config(folder)["pretrained_cfg"] | {"file": str(folder / hub.WEIGHTS)}
    found: dict[str, DefaultCfg] = generate_default_cfgs(cfgs)
    for cfg in found.values():  # timm makes a checkpoint the default; an untagged name here is the architecture itself
        cfg.tags.remove("")
        cfg.tags.appendleft("")
    return found


def build(
    model: type[M],
    architecture: str,
    pretrained: bool,
    kwargs: dict[str, Any],
    defaults: Mapping[str, Any] = NO_DEFAULTS,
    stages: str | None = None,
    **feature_cfg: Any,
) -> M:
    """Build `model` through timm; a checkpoint's own arguments are read from its `config.json`.

    `defaults` are the entry's arguments where neither the caller nor a checkpoint has others.
    `stages` names the constructor's argument with an entry a stage, or their number, where there are feature maps;
    `feature_cfg` tells timm how to take them. Raises ValueError where an argument contradicts the checkpoint's, or for
    `features_only` of a model without maps.
    """
    tag = kwargs.get("pretrained_cfg")
    name = f"{architecture}.{tag}" if isinstance(tag, str) and tag else None
    if name is None and pretrained and tag is None:
        name = hub.default_checkpoint(architecture)
    if name is not None and name in hub.checkpoint_folders():
        folder = hub.find(name)
        config = hub.read_config(folder)
        check_against(name, config["model_args"], kwargs)
        if pretrained:  # timm reads the file, and asks for no hash
            hub.verified(folder)
        kwargs = config["model_args"] | kwargs | {"pretrained_cfg": name.split(".", 1)[1]}
    kwargs = take_options(with_defaults(kwargs, defaults))
    if stages is None:
        if kwargs.get("features_only"):
            raise ValueError(f"features_only is not possible here: {architecture} has no maps of several resolutions")
        return build_model_with_cfg(model, architecture, pretrained, **kwargs)
    each = kwargs.get(stages, signature(model).parameters[stages].default)
    feature_cfg["out_indices"] = tuple(range(each if isinstance(each, int) else len(each)))
    return build_model_with_cfg(model, architecture, pretrained, feature_cfg=feature_cfg, **kwargs)


def with_defaults(kwargs: dict[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments on top of defaults, of which a group size is for groups that have neither a size nor a number."""
    merged = {**defaults, **kwargs}
    if "group_size" in defaults and kwargs.get("group_size") is None:
        del merged["group_size"]
        if merged.get("groups") is None and is_grouped(merged["activation"]):
            merged["group_size"] = defaults["group_size"]
    return merged


def take_options(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Arguments with the activation's `OPTIONS` filled into its ``activation``: a name becomes a partial.

    Raises ValueError for options without an activation, or with one that does not take them.
    """
    options = {key: kwargs[key] for key in OPTIONS if kwargs.get(key) is not None}
    if not options:
        return kwargs
    if kwargs.get("activation") is None:
        raise ValueError(f"{', '.join(options)} given without an activation to take it")
    rest = {key: value for key, value in kwargs.items() if key not in options}
    return rest | {"activation": configure(kwargs["activation"], **options)}


# What a checkpoint may be loaded with, whatever it was trained with: another head, and timm's own ways to load it …
LOADING_ARGS = (
    *("num_classes", "drop_rate", "drop_path_rate", "features_only", "out_indices"),
    *("pretrained_cfg", "pretrained_cfg_overlay", "cache_dir"),
)
SOLVING_ARGS = ("steps", "solver")  # … and where its training left them at their default, to solve the layers further


def check_against(name: str, saved: dict[str, Any], asked: dict[str, Any]) -> None:
    """Raise ValueError where an argument asked for may change what a checkpoint's weights compute.

    Strides or heads, say, have no weights of their own, so that the weights' shapes do not tell.
    """
    for key, value in asked.items():
        if key in LOADING_ARGS or (key, value) == ("global_pool", ""):  # the features themselves
            continue
        if key in saved and _plain(saved[key]) != _plain(value):
            raise ValueError(f"checkpoint {name} was trained with {key}={saved[key]!r}, not {value!r}")
        if key not in saved and key not in SOLVING_ARGS and value is not None:
            known = ", ".join(repr(k) for k in (*SOLVING_ARGS, "num_classes", "features_only"))
            raise ValueError(
                f"checkpoint {name} was trained without {key}={value!r}, and might compute something else with it: "
                f"load it as it is; what may be given is {known}"
            )


def _plain(value: Any) -> Any:
    return [_plain(v) for v in value] if isinstance(value, list | tuple) else value  # JSON knows no tuples
