"""Any timm backbone with its activations swapped for a prox."""

from collections.abc import Iterator

import timm
from timm.layers import EffectiveSEModule, GatherExcite, GlobalContext, SEModule, SplitAttn, get_act_layer
from timm.layers.cbam import CbamModule, LightCbamModule
from timm.layers.selective_kernel import SelectiveKernelAttn
from timm.models import senet
from timm.models._efficientnet_blocks import SqueezeExcite
from timm.models.pvt_v2 import MlpWithDepthwiseConv
from torch import nn

from dsc.models._build import Act
from dsc.observe import sparse_layers

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
# Kept: what weights features (of squeeze-and-excite and its kin; a linear attention's kernel, which must stay
# non-negative), by class and by name, and what makes attention's biases from coordinates and sees no image.
_GATES = (
    SEModule,
    EffectiveSEModule,
    SqueezeExcite,
    senet.SEModule,
    GatherExcite,
    GlobalContext,
    CbamModule,
    LightCbamModule,
    SelectiveKernelAttn,
)
_KEPT = ("se", "gate", "attn_gate", "squeeze", "eca", "cbam", "kernel_func", "rel_pos", "cpb_mlp", "meta_mlp")


def swap_activations(model: nn.Module, act: Act) -> list[str]:
    """Replace every activation of `model` in place and return the names of those replaced.

    The channels' dimension comes from the layer before the activation: last for a linear one, 1 for a convolution.
    Squeeze-and-excite and gate modules keep theirs, and so do networks that make attention's position biases.

    Raises ValueError where nothing could be swapped.
    """
    swapped = []
    for owner, child, path in _features(model):
        prox = act.make(_channel_dim(model, path))
        prox._forward_hooks.update(child._forward_hooks)  # by which timm's `features_only` takes some maps
        prox._forward_pre_hooks.update(child._forward_pre_hooks)
        setattr(owner, path.rpartition(".")[2], prox)
        swapped.append(path)
    if not swapped:
        raise ValueError(f"{type(model).__name__} has no activation that could be swapped for {act.name!r}")
    return swapped


def _features(owner: nn.Module, prefix: str = "") -> Iterator[tuple[nn.Module, nn.Module, str]]:
    """Owner, module and path of every activation on features; a module under two names has two places."""
    for name, child in list(owner._modules.items()):
        of_split_attention = isinstance(owner, SplitAttn) and name == "act1"
        if child is None or name in _KEPT or isinstance(child, _GATES) or of_split_attention:
            continue
        if isinstance(child, _ACTIVATIONS):
            yield owner, child, prefix + name
        else:
            yield from _features(child, f"{prefix}{name}.")


def _channel_dim(model: nn.Module, path: str) -> int:
    """Of the activation there, by the layers beside it, else by those beside what owns it, and so on outwards."""
    while path:
        above, _, name = path.rpartition(".")
        owner = model.get_submodule(above)
        if isinstance(owner, MlpWithDepthwiseConv):  # `relu` is on the map of its convolution, `act` on tokens again
            return 1 if name == "relu" else -1
        if dim := _dim_beside(owner, name):
            return dim
        path = above
    return 1


def _dim_beside(owner: nn.Module, activation: str) -> int | None:
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
    return None


def create_backbone(name: str, act: Act, pretrained: bool = False, **kwargs: object) -> nn.Module:
    """timm's model of that name with its activations swapped; `model.swapped_activations` lists them.

    A signed prox (`soft`, `group_relu`) is non-linear by its shrinkage alone: where λ is small beside what it meets,
    as its default beside normalised maps, the network is nearly linear. Give λ, or take a non-negative prox.

    Raises ValueError where nothing could be swapped, or for a model of this library.
    """
    model: nn.Module = timm.create_model(name, pretrained=pretrained, **kwargs)
    if sparse_layers(model):
        raise ValueError(f"{name} has the activations of its checkpoint, and none to swap for {act.name!r}")
    model.swapped_activations = swap_activations(model, act)  # type: ignore[assignment]
    return model
