"""`dsc_resnet*`: residual networks of convolutional sparse coding for small images."""

from collections.abc import Sequence
from typing import Any

from timm.models import register_model
from torch import Tensor, nn

from dsc._names import unknown
from dsc.activations import Activation
from dsc.dictionaries import ConvDictionary
from dsc.layers import SparseCoding
from dsc.models._build import Act, build, sparse_layer
from dsc.models._build import default_cfgs as make_default_cfgs
from dsc.models._heads import MapClassifier
from dsc.solvers import ISTA, create_solver

UNROLLED = ("first", "all")


class ResidualBlock(nn.Module):
    """A code of the features, decoded and added: ``x ← P x + W BN(z(BN(x)))``.

    z is the code over a dictionary of 3×3 atoms, which carries the stride; W a 3×3 convolution; P the identity, or a
    1×1 convolution where the shape changes. With one step of size 1 it has the two convolutions of a plain block.
    """

    def __init__(self, in_channels: int, coder: SparseCoding, stride: int = 1) -> None:
        super().__init__()
        channels = coder.dictionary.num_atoms
        self.norm1 = nn.BatchNorm2d(in_channels)
        self.coder = coder
        self.norm2 = nn.BatchNorm2d(channels)
        self.decoder = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        same = stride == 1 and in_channels == channels
        self.shortcut = nn.Identity() if same else nn.Conv2d(in_channels, channels, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.shortcut(x) + self.decoder(self.norm2(self.coder(self.norm1(x))))


class DSCResNet(MapClassifier):
    """A sparse code of the image, stages of residual blocks, batch norm, pooling and a linear classifier.

    The stem has 3×3 atoms at full resolution, and each stage but the first halves it, as in the ResNet for CIFAR (He
    et al., arXiv 1512.03385). Sparse coding in place of convolutions as in SDNet (Dai et al., arXiv 2210.12945).
    ``steps=1`` is the plain network of the same shapes: two 3×3 convolutions a block, with one activation between them.

    Args:
        channels, depths: one entry a stage; depths are numbers of blocks.
        steps, solver: of the unrolled layers. With two steps FISTA has no momentum yet and equals ISTA.
        unrolled: which layers take `steps` steps, the others taking one: "first" for the stem alone (in SDNet the
            cheaper choice and the more accurate one), or "all" for the stem and every block.
        activation, group_size, groups: see `dsc.create_activation`.
        threshold: λ; in layers of several steps, as a fraction of the code's expected size.
        learn_threshold: learn λ of each channel or group; None for in layers of several steps.

    Raises:
        ValueError: another word for `unrolled`, or not as many channels as depths.
    """

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 10,
        channels: Sequence[int] = (64, 128, 256, 512),
        depths: Sequence[int] = (2, 2, 2, 2),
        steps: int = 2,
        solver: str = "fista",
        unrolled: str = "first",
        activation: Activation = "relu",
        group_size: int | None = None,
        groups: int | None = None,
        threshold: float | None = None,
        learn_threshold: bool | None = None,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
    ) -> None:
        super().__init__()
        if unrolled not in UNROLLED:
            raise ValueError(unknown("choice of unrolled layers", unrolled, UNROLLED))
        if len(channels) != len(depths):
            raise ValueError(f"channels and depths need one entry a stage, got {len(channels)} and {len(depths)}")
        shape = (activation, group_size, groups, threshold)
        rule = create_solver(solver, steps)

        def coder(below: int, width: int, stride: int, rule: ISTA) -> SparseCoding:
            act = Act(*shape, rule.steps > 1 if learn_threshold is None else learn_threshold)
            return sparse_layer(ConvDictionary(below, width, 3, stride, padding=1), act, 1, rule)

        def stage(below: int, width: int, depth: int, stride: int) -> nn.Sequential:
            shapes = [(below, stride), *[(width, 1)] * (depth - 1)]
            inner = rule if unrolled == "all" else ISTA()
            return nn.Sequential(*(ResidualBlock(b, coder(b, width, s, inner), s) for b, s in shapes))

        self.stem = coder(in_chans, channels[0], 1, rule)
        widths, strides = (channels[0], *channels), (1, *[2] * (len(channels) - 1))
        self.stages = nn.Sequential(*map(stage, widths, channels, depths, strides))
        self.norm = nn.BatchNorm2d(channels[-1])
        self.feature_info = [dict(num_chs=c, reduction=2**i, module=f"stages.{i}") for i, c in enumerate(channels)]
        self.add_head(channels[-1], num_classes, global_pool, drop_rate)

    def forward_features(self, x: Tensor) -> Tensor:
        """Normalised features of the last stage, (batch, channels, h, w)."""
        return self.norm(self.stages(self.stem(x)))


_cfg = dict(
    input_size=(3, 32, 32), num_classes=10, mean=(0.5,) * 3, std=(0.25,) * 3, crop_pct=1.0, classifier="head.fc"
)
default_cfgs = make_default_cfgs(dsc_resnet18=_cfg, dsc_resnet20=_cfg, dsc_resnet34=_cfg)


def _resnet(architecture: str, pretrained: bool, shape: dict[str, Any], kwargs: dict[str, Any]) -> DSCResNet:
    return build(DSCResNet, architecture, pretrained, kwargs, shape, stages="depths", flatten_sequential=True)


@register_model
def dsc_resnet18(pretrained: bool = False, **kwargs: Any) -> DSCResNet:
    """Four stages of two blocks, 64 to 512 channels."""
    return _resnet("dsc_resnet18", pretrained, dict(depths=(2, 2, 2, 2)), kwargs)


@register_model
def dsc_resnet34(pretrained: bool = False, **kwargs: Any) -> DSCResNet:
    """Four stages of three, four, six and three blocks, 64 to 512 channels."""
    return _resnet("dsc_resnet34", pretrained, dict(depths=(3, 4, 6, 3)), kwargs)


@register_model
def dsc_resnet20(pretrained: bool = False, **kwargs: Any) -> DSCResNet:
    """Three stages of three blocks, 16 to 64 channels, as He et al.'s for CIFAR-10: small enough for a CPU."""
    return _resnet("dsc_resnet20", pretrained, dict(channels=(16, 32, 64), depths=(3, 3, 3)), kwargs)
