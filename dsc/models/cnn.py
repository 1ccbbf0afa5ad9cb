"""`dsc_cnn`: multi-layer convolutional sparse coding with a linear head."""

from collections.abc import Sequence
from math import prod
from typing import Any

from timm.layers import ClassifierHead
from timm.models import register_model
from torch import Tensor, nn

from dsc.activations import Activation
from dsc.dictionaries import ConvDictionary
from dsc.layers import DeepSparseCoding, SparseCoding
from dsc.models._build import Act, build, sparse_layer
from dsc.models._build import default_cfgs as make_default_cfgs
from dsc.solvers import create_solver


class DSCNN(nn.Module):
    """A `DeepSparseCoding` of convolutional dictionaries, batch norm, average pooling and a linear classifier.

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
    """

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 10,
        channels: Sequence[int] = (32, 64, 512),
        kernel_sizes: Sequence[int] = (6, 6, 4),
        strides: Sequence[int] = (2, 2, 1),
        paddings: Sequence[int] = (0, 0, 0),
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
        layers: list[SparseCoding] = []
        for shape in zip((in_chans, *channels), channels, kernel_sizes, strides, paddings, strict=False):
            size = layers[-1].code_size if layers else 1.0
            layers.append(sparse_layer(ConvDictionary(*shape), act, 1, rule, size))
        self.coder = DeepSparseCoding(layers, rule, joint)
        self.min_size = 1
        for kernel, stride, padding in reversed(list(zip(kernel_sizes, strides, paddings, strict=True))):
            self.min_size = max((self.min_size - 1) * stride + kernel - 2 * padding, 1)
        self.num_classes = num_classes
        self.num_features = self.head_hidden_size = channels[-1]
        self.feature_info = [
            dict(num_chs=c, reduction=prod(strides[: i + 1]), module=f"coder.layers.{i}.code")
            for i, c in enumerate(channels)
        ]
        self.norm = nn.BatchNorm2d(channels[-1])
        self.head = ClassifierHead(channels[-1], num_classes, pool_type=global_pool, drop_rate=drop_rate)

    def forward_features(self, x: Tensor) -> Tensor:
        """Normalised code of the deepest layer, (batch, channels, h, w). Raises ValueError for too small images."""
        if min(x.shape[-2:]) < self.min_size:
            raise ValueError(
                f"images of {x.shape[-2]}×{x.shape[-1]} pixels are too small: this network needs {self.min_size} a side"
            )
        return self.norm(self.coder(x))

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Pooled features, or logits."""
        return self.head(x, pre_logits=pre_logits)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))

    def get_classifier(self) -> nn.Module:
        """The last linear layer."""
        return self.head.fc

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """A fresh head for another number of classes."""
        self.num_classes = num_classes
        self.head.reset(num_classes, global_pool)


_cfg = dict(
    input_size=(3, 32, 32), num_classes=10, mean=(0.5,) * 3, std=(0.25,) * 3, crop_pct=1.0, classifier="head.fc"
)
_features = dict(out_indices=(0, 1, 2), feature_cls="hook")
default_cfgs = make_default_cfgs(dsc_cnn=_cfg, dsc_cnn_pico=_cfg)


@register_model
def dsc_cnn(pretrained: bool = False, **kwargs: Any) -> DSCNN:
    """Three dictionaries of 32, 64 and 512 atoms of 6, 6 and 4 pixels, as ML-ISTA's network for MNIST."""
    return build(DSCNN, "dsc_cnn", pretrained, kwargs, feature_cfg=dict(_features))


@register_model
def dsc_cnn_pico(pretrained: bool = False, **kwargs: Any) -> DSCNN:
    """Three dictionaries of 32, 64 and 128 atoms of 3 pixels, for images from 8 pixels on."""
    shape = dict(channels=(32, 64, 128), kernel_sizes=(3, 3, 3), strides=(1, 2, 2), paddings=(1, 1, 1))
    return build(DSCNN, "dsc_cnn_pico", pretrained, shape | kwargs, feature_cfg=dict(_features))
