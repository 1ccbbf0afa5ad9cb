"""`dsc_speed`: a small convolutional network made for time to accuracy on small images."""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, ClassVar

import torch
from timm.models import register_model
from torch import Tensor, nn
from torch.nn import functional as F

from dsc._names import unknown
from dsc.activations import Activation
from dsc.dictionaries import ConvDictionary
from dsc.models._build import Act, build, check_size, sparse_layer
from dsc.models._build import default_cfgs as make_default_cfgs
from dsc.models._heads import MapClassifier
from dsc.solvers import ISTA, create_solver

UNROLLED = ("all", "last")
WHITENING_EPS = 5e-4  # added to the patches' variances, whose pixels have about unit variance


def whitening_atoms(images: Tensor, kernel_size: int, eps: float = WHITENING_EPS) -> Tensor:
    """Eigenvectors v of the patches' covariance as filters ``±v/√(λ + eps)``, of images (N, C, H, W).

    Returns (2·C·kernel_size², C, kernel_size, kernel_size), largest variance first, the negatives in the second half:
    with a rectifier behind them both signs are kept. Source: Jordan, 94% on CIFAR-10 in 3.29 seconds (2024).
    """
    channels = images.shape[1]
    patches = F.unfold(images.float(), kernel_size).mT.flatten(0, 1).double()
    variances, vectors = torch.linalg.eigh(patches.mT @ patches / len(patches))
    filters = (vectors / (variances + eps).sqrt()).mT.flip(0).float()
    return torch.cat([filters, -filters]).unflatten(1, (channels, kernel_size, kernel_size))


@torch.no_grad()
def begin_as_identity(weight: Tensor) -> None:
    """Filters (atoms, channels, h, w) of unit norm, in place: the first pass each channel on, the others are random.

    A square dictionary then is orthonormal. Source: Jordan, 94% on CIFAR-10 in 3.29 seconds (2024).
    """
    weight.div_(weight.flatten(1).norm(dim=1).view(-1, 1, 1, 1))
    nn.init.dirac_(weight[: weight.shape[1]])


class PooledLayer(nn.Module):
    """``conv → max pool → norm → prox``: what a stage begins with."""

    def __init__(self, in_channels: int, channels: int, plain_act: Act) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, channels, 3, padding=1, bias=False)
        begin_as_identity(self.conv.weight)
        self.pool = nn.MaxPool2d(2)
        self.norm1 = nn.BatchNorm2d(channels)
        self.prox = plain_act.make_alone(1, channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.prox(self.norm1(self.pool(self.conv(x))))


class PlainStage(PooledLayer):
    """``conv → max pool → norm → prox``, then ``conv → norm → prox`` at half the resolution."""

    maps: ClassVar = "prox2"

    def __init__(self, in_channels: int, channels: int, plain_act: Act) -> None:
        super().__init__(in_channels, channels, plain_act)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        begin_as_identity(self.conv2.weight)
        self.norm2 = nn.BatchNorm2d(channels)
        self.prox2 = plain_act.make_alone(1, channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.prox2(self.norm2(self.conv2(super().forward(x))))


class SpeedStage(PooledLayer):
    """``conv → max pool → norm → prox``, then ``norm → sparse coding → norm`` at half the resolution.

    A convolution at the full resolution costs more than all of an unrolled layer behind the pooling.
    """

    maps: ClassVar = "coder.code"

    def __init__(self, in_channels: int, channels: int, plain_act: Act, act: Act, solver: ISTA) -> None:
        super().__init__(in_channels, channels, plain_act)
        self.norm2 = nn.BatchNorm2d(channels)
        dictionary = ConvDictionary(channels, channels, 3, padding=1)
        begin_as_identity(dictionary.weight)
        self.coder = sparse_layer(dictionary, act, 1, solver)
        self.norm3 = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm3(self.coder(self.norm2(super().forward(x))))


class DSCSpeed(MapClassifier):
    """A whitening dictionary computed from the data, a few wide stages, the largest activations, a linear classifier.

    Shaped like airbench94 (Jordan 2024). Sparse coding takes several steps in a stage's second layer, where the
    resolution is low; ``steps=1`` is the plain network of the same shapes.

    Args:
        channels: one entry a stage.
        steps, solver: of the stages' sparse-coding layers.
        unrolled: which stages have one: "all", or "last" for the last alone, the others being airbench94's own, with
            a normalisation between their second convolution and its activation.
        activation, group_size, groups: see `dsc.create_activation`.
        plain_activation: of the layers that take one step whatever `steps` is; None for `activation` and what belongs
            to it.
        threshold: λ; in layers of several steps, as a fraction of the code's expected size.
        learn_threshold: learn λ of each channel or group; None for in layers of several steps.

    Raises:
        ValueError: an unknown word for `unrolled`.
    """

    starts_from_images: ClassVar = True

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 10,
        channels: Sequence[int] = (64, 256, 256),
        steps: int = 2,
        solver: str = "ista",
        unrolled: str = "all",
        activation: Activation = "relu",
        group_size: int | None = None,
        groups: int | None = None,
        threshold: float | None = None,
        learn_threshold: bool | None = None,
        plain_activation: Activation | None = None,
        global_pool: str = "max",
        drop_rate: float = 0.0,
    ) -> None:
        super().__init__()
        if unrolled not in UNROLLED:
            raise ValueError(unknown("choice of unrolled stages", unrolled, UNROLLED))
        shape = (activation, group_size, groups, threshold)
        act = Act(*shape, steps > 1 if learn_threshold is None else learn_threshold)
        plain_act = Act(*shape, learn_threshold) if plain_activation is None else Act(plain_activation)
        rule = create_solver(solver, steps)
        whitening = ConvDictionary(in_chans, 8 * in_chans, 2)
        whitening.weight.requires_grad_(False)
        self.whiten = sparse_layer(whitening, plain_act, 1, ISTA())
        widths = (whitening.num_atoms, *channels)
        last = len(channels) - 1
        self.stages = nn.Sequential(
            *(
                SpeedStage(below, width, plain_act, act, rule)
                if unrolled == "all" or i == last
                else PlainStage(below, width, plain_act)
                for i, (below, width) in enumerate(pairwise(widths))
            )
        )
        self.min_size = 2 ** len(channels) + 1
        self.feature_info = [
            dict(num_chs=c, reduction=2 ** (i + 1), module=f"stages.{i}.{stage.maps}")
            for i, (c, stage) in enumerate(zip(channels, self.stages, strict=True))
        ]
        self.add_head(channels[-1], num_classes, global_pool, drop_rate)

    @torch.no_grad()
    def initialize(self, images: Tensor) -> None:
        """Set the first dictionary to whiten these images (N, C, H, W), normalised as the network sees them."""
        self.whiten.dictionary.weight.copy_(whitening_atoms(images, 2))

    def forward_features(self, x: Tensor) -> Tensor:
        """Normalised code of the last stage, (batch, channels, h, w). Raises ValueError for too small images."""
        check_size(x, self.min_size)
        return self.stages(self.whiten(x))


_cfg = dict(
    input_size=(3, 32, 32), num_classes=10, mean=(0.5,) * 3, std=(0.25,) * 3, crop_pct=1.0, classifier="head.fc"
)
default_cfgs = make_default_cfgs(dsc_speed=_cfg)


@register_model
def dsc_speed(pretrained: bool = False, **kwargs: Any) -> DSCSpeed:
    """Three stages of 64, 256 and 256 channels."""
    return build(DSCSpeed, "dsc_speed", pretrained, kwargs, stages="channels", feature_cls="hook")
