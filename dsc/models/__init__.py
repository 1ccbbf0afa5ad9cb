"""The zoo: one file a family, each entry registered with timm, and the one door to all of them."""

import re
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import timm
from timm.models import get_pretrained_cfg, is_model, model_entrypoint, split_model_name_tag
from torch import nn

from dsc import hub
from dsc._names import unknown
from dsc.activations import Activation
from dsc.models import autoencoder, cnn, mlp, resnet, speed, transformer
from dsc.models._build import Act, build, check_against, default_cfgs, sparse_layer, take_options
from dsc.models.backbones import create_backbone, swap_activations

__all__ = ["create_model", "list_models", "load", "swap_activations"]
__all__ += ["Act", "build", "default_cfgs", "sparse_layer"]  # for models of your own

SOURCES = ("hf-hub:", "hf_hub:", "local-dir:")  # timm's own, of whose files no hash is checked
FAMILIES = (mlp, cnn, resnet, speed, transformer, autoencoder)


def list_models(pattern: str = "*") -> list[str]:
    """Architectures of this library that match a shell pattern, sorted; timm's backbones come on top of them."""
    return sorted({name for family in FAMILIES for name in family.default_cfgs if fnmatch(name, pattern)})


def create_model(
    name: str,
    pretrained: bool = False,
    activation: Activation | None = None,
    group_size: int | None = None,
    groups: int | None = None,
    threshold: float | None = None,
    learn_threshold: bool | None = None,
    **kwargs: Any,
) -> nn.Module:
    """Model by name: one of ours (`architecture` or `architecture.tag`), or any of timm's with `activation` swapped in.

    Args:
        name: as above, or a checkpoint as timm names it, `hf-hub:` or `local-dir:` and its place.
        pretrained: load a published checkpoint (its hash is verified), or timm's own weights for its backbones.
        activation: see `dsc.list_activations()`; None keeps the model's own.
        group_size, groups, threshold, learn_threshold: the activation's arguments. In a backbone of timm's a signed
            prox (`soft`, `group_relu`) needs a `threshold` of its input's size: it is nearly linear by its own.
        **kwargs: the model's own, as `num_classes` and `in_chans`, and those of a single activation, as `k` of top_k.

    Raises:
        ValueError: an unknown name (with the nearest), or arguments that contradict a checkpoint.
    """
    architecture, tag = split_model_name_tag(name)
    given = dict(activation=activation, group_size=group_size, groups=groups, threshold=threshold)
    given = {k: v for k, v in (given | dict(learn_threshold=learn_threshold)).items() if v is not None}
    ours, published = architecture in list_models(), name in hub.checkpoint_folders()
    if pretrained and (ours or published):
        return _load(hub.find(name if tag else _default_checkpoint(architecture)), given | kwargs)
    if ours:
        if tag:
            hub.find(name)  # timm's error for an unknown one names no other
        return timm.create_model(architecture, pretrained_cfg=tag or None, **given, **kwargs)
    if published:  # a backbone of timm's, which knows no such tag
        return create_model(architecture, **(hub.read_config(hub.find(name))["model_args"] | given | kwargs))
    if not name.startswith(SOURCES):
        _check_known(name, architecture)
        if not model_entrypoint(architecture).__module__.startswith("timm."):  # a user's own, and knows its activation
            return timm.create_model(name, pretrained=pretrained, **given, **kwargs)
    if activation is None:
        if given:
            raise ValueError(f"{', '.join(given)} given without an activation to swap into {name}")
        return timm.create_model(name, pretrained=pretrained, **kwargs)
    kwargs = take_options({"activation": activation} | kwargs)
    act = Act(kwargs.pop("activation"), group_size, groups, threshold, learn_threshold)
    return create_backbone(name, act, pretrained, **kwargs)


def _check_known(name: str, architecture: str) -> None:
    if not is_model(architecture):
        raise ValueError(unknown("model", name, [*list_models(), *timm.list_models()])[:400] + " …")
    try:
        get_pretrained_cfg(name)
    except RuntimeError:
        raise ValueError(unknown("checkpoint", name, timm.list_pretrained(f"{architecture}*"))) from None


def load(folder: str | Path, **kwargs: Any) -> nn.Module:
    """Model of a checkpoint folder, or of what a run's folder keeps, its weights verified and loaded strictly.

    Another `num_classes` replaces the head by a fresh one; `steps` and `solver`, where the training left them at their
    default, solve the same layers further.

    Raises:
        FileNotFoundError, ValueError: no such folder, an altered file, another architecture.
    """
    folder = Path(folder)
    return _load(hub.kept_by(folder) if hub.is_run(folder) else folder, kwargs)


def _load(folder: Path, kwargs: dict[str, Any]) -> nn.Module:
    config = hub.read_config(folder)
    saved = config["model_args"]
    check_against(folder.name, saved, kwargs)
    wrapper = {key: kwargs.pop(key) for key in ("features_only", "out_indices") if key in kwargs}
    args = saved | kwargs
    model = create_model(config["architecture"], **args)
    new_head = args.get("num_classes", config["num_classes"]) != config["num_classes"]
    hub.load_weights(model, folder, skip=hub.head_prefixes(config) if new_head else ())
    model.pretrained_cfg = {**model.pretrained_cfg, **config["pretrained_cfg"]}  # type: ignore[assignment,dict-item]
    return _features(create_model(config["architecture"], **args, **wrapper), model) if wrapper else model


def _features(wrapped: nn.Module, model: nn.Module) -> nn.Module:
    # timm's wrappers rename what they hold: `body.` or `model.` in front, and dots made underscores.
    weights = {_flat(key): value for key, value in model.state_dict().items()}
    own = {key: _flat(re.sub(r"^(body|model)\.", "", key)) for key in wrapped.state_dict()}
    missing = [key for key, name in own.items() if name not in weights]
    if missing:
        raise ValueError(f"features_only is not possible here: {', '.join(missing[:5])} have no weights")
    wrapped.load_state_dict({key: weights[name] for key, name in own.items()})
    return wrapped


def _flat(key: str) -> str:
    return re.sub(r"[._]", "", key)


def _default_checkpoint(architecture: str) -> str:
    name = hub.default_checkpoint(architecture)
    if name is None:
        raise ValueError(f"{architecture} has no published checkpoint yet: use pretrained=False, or dsc.load(folder)")
    return name
