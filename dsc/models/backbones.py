"""Any timm backbone with its activations swapped for a prox."""

import timm
from timm.layers import get_act_layer
from timm.models.pvt_v2 import MlpWithDepthwiseConv
from torch import nn

from dsc.models._build import Act

# What a backbone's own non-linearity may be; gates (sigmoid, softmax) are none.
_NAMES = (
    "relu",
    "relu6",
    "gelu",
    "gelu_tanh",
    "quick_gelu",
    "silu",
    "hard_swish",
    "elu",
    "leaky_relu",
    "mish",
    "prelu",
)
_ACTIVATIONS = tuple({nn.Tanh, nn.GELU, nn.SiLU, nn.Hardswish, *(get_act_layer(name) for name in _NAMES)})
_GATES = ("se", "gate", "attn_gate", "squeeze", "eca", "cbam")
_POSITIONS = ("rel_pos", "cpb_mlp", "meta_mlp")  # make attention's biases from coordinates, and see no image


def swap_activations(model: nn.Module, act: Act) -> list[str]:
    """Replace every activation of `model` in place and return the names of those replaced.

    The channels' dimension comes from the layer before the activation: last for a linear one, 1 for a convolution.
    Squeeze-and-excite and gate modules keep theirs, and so do networks that make attention's position biases.

    Raises ValueError where nothing could be swapped.
    """
    swapped = []
    for owner_name, owner in list(model.named_modules()):
        if _is_no_feature(owner_name):
            continue
        for name, child in list(owner._modules.items()):  # a module under two names has two places
            if isinstance(child, _ACTIVATIONS) and not _is_no_feature(name):
                prox = act.make(_channel_dim(owner, name))
                prox._forward_hooks.update(child._forward_hooks)  # by which timm's `features_only` takes some maps
                prox._forward_pre_hooks.update(child._forward_pre_hooks)
                setattr(owner, name, prox)
                swapped.append(f"{owner_name}.{name}".lstrip("."))
    if not swapped:
        raise ValueError(f"{type(model).__name__} has no activation that could be swapped for {act.name!r}")
    return swapped


def _is_no_feature(name: str) -> bool:
    return any(part in (*_GATES, *_POSITIONS) for part in name.split("."))


def _channel_dim(owner: nn.Module, activation: str) -> int:
    if isinstance(owner, MlpWithDepthwiseConv):  # `relu` is on the map of its convolution, `act` on tokens again
        return 1 if activation == "relu" else -1
    # The nearest layer before the activation says how channels lie; failing that, the nearest one after it.
    names = [name for name, child in owner._modules.items() if child is not None]
    at = names.index(activation)
    for name in [*reversed(names[:at]), *names[at + 1 :]]:
        inside = list(owner.get_submodule(name).modules())
        for module in reversed(inside) if name in names[:at] else inside:
            if isinstance(module, nn.Linear):
                return -1
            if isinstance(module, nn.Conv2d | nn.BatchNorm2d):
                return 1
    return 1


def create_backbone(name: str, act: Act, pretrained: bool = False, **kwargs: object) -> nn.Module:
    """timm's model of that name with its activations swapped; `model.swapped_activations` lists them.

    A signed prox (`soft`, `group_relu`) is non-linear by its shrinkage alone: where λ is small beside what it meets,
    as its default beside normalised maps, the network is nearly linear. Give λ, or take a non-negative prox.
    """
    model: nn.Module = timm.create_model(name, pretrained=pretrained, **kwargs)
    model.swapped_activations = swap_activations(model, act)  # type: ignore[assignment]
    return model
