"""`dsc_cnn`: multi-layer convolutional sparse coding with a linear head."""

from collections.abc import Sequence
from itertools import pairwise
from math import prod
from typing import Any

from timm.models import register_model
from torch import Tensor, nn

from dsc.activations import Activation
from dsc.dictionaries import ConvDictionary
from dsc.layers import DeepSparseCoding, SparseCoding
from dsc.models._build import Act, build, check_size, least_side, sparse_layer
from dsc.models._build import default_cfgs as make_default_cfgs
from dsc.models._heads import MapClassifier
from dsc.solvers import ISTA, create_solver


class DSCNN(MapClassifier):
    """A `DeepSparseCoding` of convolutional dictionaries, batch norm, pooling and a linear classifier.

    The shape of ML-ISTA (Sulam et al., arXiv 1806.00701). With ``steps=1`` each layer is a plain convolution with
    bias and activation: the CNN of the same shapes.

    Args:
        channels, kernel_sizes, strides, paddings: one entry a layer.
        steps: proximal steps; jointly over all layers (ML-ISTA with steps − 1 unfoldings), or in each one.
        solver: "ista" or "fista".
        joint: solve all layers together, or one after the other.
        activation, group_size, groups: see `dsc.create_activation`.
        threshold: λ; with more than one step, as a fraction of the code's expected size.
        learn_threshold: learn λ of each channel or group; None for whenever there is more than one step.
        tail: channels of plain 3×3 layers behind the code, each but the first followed by 2×2 max pooling.
    """

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 10,
        channels: Sequence[int] = (32, 64, 512),
        kernel_sizes: Sequence[int] = (6, 6, 4),
        strides: Sequence[int] = (2, 2, 1),
        paddings: Sequence[int] = (0, 0, 0),
        tail: Sequence[int] = (),
        steps: int = 3,
        solver: str = "ista",
        joint: bool = True,
        activation: Activation = "relu",
        group_size: int | None = None,
        groups: int | None = None,
        threshold: float | None = None,
        learn_threshold: bool | None = None,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
    ) -> None:
        super().__init__()
        lengths = {len(channels), len(kernel_sizes), len(strides), len(paddings)}
        if len(lengths) > 1:
            raise ValueError("channels, kernel_sizes, strides and paddings need one entry a layer")
        plain = steps == 1
        act = Act(activation, group_size, groups, threshold, not plain if learn_threshold is None else learn_threshold)
        rule = create_solver(solver, steps)
        shapes = zip((in_chans, *channels), channels, kernel_sizes, strides, paddings, strict=False)
        layers: list[SparseCoding] = []
        dictionaries: list[ConvDictionary] = []
        for shape in shapes:
            size = layers[-1].code_size if layers else 1.0
            dictionaries.append(ConvDictionary(*shape))
            layers.append(sparse_layer(dictionaries[-1], act, 1, rule, size))
        self.coder = DeepSparseCoding(layers, rule, joint)
        self.min_size = least_side(dictionaries)
        self.feature_info = [
            dict(num_chs=c, reduction=prod(strides[: i + 1]), module=f"coder.layers.{i}.code")
            for i, c in enumerate(channels)
        ]
        self.norm = nn.BatchNorm2d(channels[-1])
        tail_act = Act(activation, group_size, groups, threshold if plain else None, learn_threshold)
        self.tail = nn.Sequential(
            *(
                _plain_layer(below, width, tail_act, pool=i > 0)
                for i, (below, width) in enumerate(pairwise((channels[-1], *tail)))
            )
        )
        self.add_head((*channels, *tail)[-1], num_classes, global_pool, drop_rate)

    def forward_features(self, x: Tensor) -> Tensor:
        """Normalised code of the deepest layer, or what the tail makes of it, (batch, channels, h, w).

        Raises ValueError for too small images.
        """
        check_size(x, self.min_size)
        return self.tail(self.norm(self.coder(x)))


def _plain_layer(in_channels: int, channels: int, act: Act, pool: bool) -> nn.Sequential:
    layer = sparse_layer(ConvDictionary(in_channels, channels, 3, padding=1), act, 1, ISTA())
    return nn.Sequential(layer, nn.MaxPool2d(2, ceil_mode=True)) if pool else nn.Sequential(layer)


_cfg = dict(
    input_size=(3, 32, 32), num_classes=10, mean=(0.5,) * 3, std=(0.25,) * 3, crop_pct=1.0, classifier="head.fc"
)
default_cfgs = make_default_cfgs(dsc_cnn=_cfg, dsc_cnn_cifar=_cfg, dsc_cnn_pico=_cfg)


def _cnn(architecture: str, pretrained: bool, kwargs: dict[str, Any], **shape: Any) -> DSCNN:
    return build(DSCNN, architecture, pretrained, kwargs, shape, stages="channels", feature_cls="hook")


@register_model
def dsc_cnn(pretrained: bool = False, **kwargs: Any) -> DSCNN:
    """Three dictionaries of 32, 64 and 512 atoms of 6, 6 and 4 pixels, as ML-ISTA's network for MNIST."""
    return _cnn("dsc_cnn", pretrained, kwargs)


@register_model
def dsc_cnn_cifar(pretrained: bool = False, **kwargs: Any) -> DSCNN:
    """Dictionaries of 32, 64 and 128 atoms of 4 pixels, then three plain layers, as ML-ISTA's network for CIFAR-10."""
    shape = dict(channels=(32, 64, 128), kernel_sizes=(4, 4, 4), strides=(2, 2, 2), paddings=(1, 1, 1))
    return _cnn("dsc_cnn_cifar", pretrained, kwargs, tail=(256, 512, 512), **shape)


@register_model
def dsc_cnn_pico(pretrained: bool = False, **kwargs: Any) -> DSCNN:
    """Three dictionaries of 32, 64 and 128 atoms of 3 pixels, for images from 8 pixels on."""
    shape = dict(channels=(32, 64, 128), kernel_sizes=(3, 3, 3), strides=(1, 2, 2), paddings=(1, 1, 1))
    return _cnn("dsc_cnn_pico", pretrained, kwargs, **shape)
