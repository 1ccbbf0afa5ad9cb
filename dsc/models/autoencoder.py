"""`gsae*` and `sae*`: group-sparse and sparse autoencoders with tied weights, dense and convolutional."""

from collections.abc import Sequence
from math import prod
from typing import Any, Literal, cast, get_args

import torch
from timm.models import register_model
from torch import Tensor, nn

from dsc._names import unknown
from dsc.activations import Activation
from dsc.dictionaries import ConvDictionary, DenseDictionary, Dictionary
from dsc.init import Start, from_signals
from dsc.layers import DeepSparseCoding, SparseCoding, StepSize
from dsc.models._build import Act, build, check_size, least_side
from dsc.models._build import default_cfgs as make_default_cfgs
from dsc.models._heads import Unrolled
from dsc.solvers import create_solver

Initial = Literal["random", Start]


class Autoencoder(Unrolled):
    """What autoencoders share: codes are their features, in timm's words, and the decoder is their head."""

    def encode(self, x: Tensor) -> Tensor:
        """Codes of images."""
        raise TypeError(f"{type(self).__name__} defines no code")

    def decode(self, z: Tensor) -> Tensor:
        """Images of codes."""
        raise TypeError(f"{type(self).__name__} defines no decoder")

    def forward_features(self, x: Tensor) -> Tensor:
        """Codes of images."""
        return self.encode(x)

    def forward_head(self, z: Tensor, pre_logits: bool = False) -> Tensor:
        """The codes, or images of them."""
        return z if pre_logits else self.decode(z)

    def get_classifier(self) -> nn.Module:
        """None: the identity."""
        return nn.Identity()

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Nothing to do for no classes. Raises ValueError for any, or for a pooling."""
        check_no_classes(num_classes)
        if global_pool:
            raise ValueError(f"an autoencoder decodes its code and does not pool it, got global_pool={global_pool!r}")


class SparseAutoencoder(Autoencoder):
    """Image → code over dense dictionaries → image, ``x̂ = D₁⋯D_L z(x)``, encoder and decoder tied.

    Shallow (one dictionary, ``steps=1``) it is the autoencoder of *On the convergence of group-sparse autoencoders*
    (arXiv 2102.07003): ``x̂ = A σ_λ(Aᵀx)`` where ``step=1.0``; unfolded it takes that many steps of ISTA or FISTA. With
    ``activation="top_k"``, ``pre_bias`` and such a step it is ``x̂ = A topk(Aᵀ(x − b)) + b`` (Gao et al. 2024, arXiv
    2406.04093).

    Args:
        img_size: height and width (or one number) of the images; fixed.
        num_atoms: columns of D; one entry a layer for a deep code, of which the last is what `encode` returns.
        steps, solver, step: the encoder's; `step` as in `dsc.SparseCoding`.
        joint: solve all layers together, or one after the other.
        activation, group_size, groups, threshold, learn_threshold: see `dsc.create_activation`.
        pre_bias: learn a bias b that is subtracted from images and added to reconstructions, zero at first.
        initial: the first layer's atoms before training: "random", or from images, by `initialize`: "samples" of them,
            or their leading "singular" vectors, of which each group has the same, turned (`dsc.init.singular_groups`).
            Where λ is above what random atoms correlate with images, no gradient reaches those.

    Raises:
        ValueError: a number of classes: an autoencoder has none; an unknown `initial`.
    """

    def __init__(
        self,
        in_chans: int = 1,
        img_size: int | tuple[int, int] = 28,
        num_atoms: int | Sequence[int] = 160,
        steps: int = 15,
        solver: str = "fista",
        joint: bool = False,
        step: StepSize = "lipschitz",
        activation: Activation = "group_relu",
        group_size: int | None = None,
        groups: int | None = None,
        threshold: float | None = None,
        learn_threshold: bool | None = None,
        pre_bias: bool = False,
        initial: Initial = "random",
        num_classes: int = 0,
    ) -> None:
        super().__init__()
        check_no_classes(num_classes)
        if initial not in get_args(Initial):
            raise ValueError(unknown("initial", initial, get_args(Initial)))
        self.initial = initial
        self.num_classes = 0
        self.img_size = _pair(img_size)
        self.in_chans = in_chans
        widths = (in_chans * prod(self.img_size), *_several(num_atoms))
        dictionaries = [DenseDictionary(*shape) for shape in zip(widths, widths[1:], strict=False)]
        act = Act(activation, group_size, groups, threshold, learn_threshold)
        self.coder = make_coder(dictionaries, act, -1, steps, solver, joint, step)
        self.pre_bias = nn.Parameter(torch.zeros(widths[0])) if pre_bias else None
        self.num_features = widths[-1]

    @property
    def starts_from_images(self) -> bool:
        """Whether `initialize` is to be called before training."""
        return self.initial != "random"

    @torch.no_grad()
    def initialize(self, images: Tensor) -> None:
        """Set the first layer's atoms from images (N, in_chans, height, width), as `initial` says."""
        if self.initial == "random":
            return
        layer = layers_of(self.coder)[0]
        atoms = layer.dictionary.num_atoms
        size = layer.prox.group_size_of(atoms)
        layer.dictionary.weight.copy_(from_signals(images.flatten(1), atoms, size, self.initial))

    def encode(self, x: Tensor) -> Tensor:
        """Codes of images, (batch, num_features). Raises ValueError for images of another size."""
        if x.shape[1:] != (self.in_chans, *self.img_size):
            raise ValueError(f"images of shape {tuple(x.shape[1:])}, expected {(self.in_chans, *self.img_size)}")
        x = x.flatten(1)
        return self.coder(x if self.pre_bias is None else x - self.pre_bias)

    def decode(self, z: Tensor) -> Tensor:
        """Images of codes, (batch, in_chans, height, width)."""
        for layer in reversed(layers_of(self.coder)):
            z = layer.decode(z)
        x = z if self.pre_bias is None else z + self.pre_bias
        return x.unflatten(1, (self.in_chans, *self.img_size))

    def forward(self, x: Tensor) -> Tensor:
        return self.decode(self.encode(x))


class ConvSparseAutoencoder(Autoencoder):
    """The same over strided convolutional dictionaries: a code of small images, and any image size.

    Args:
        img_size: height and width (or one number) of the images that `decode` returns unless told otherwise.
        num_atoms, kernel_sizes, strides, paddings: one entry a layer; a layer's λ counts at every position.
        steps, solver, joint, step, activation, group_size, groups, threshold, learn_threshold: as of
            `SparseAutoencoder`.
        pre_bias: learn a bias a channel that is subtracted from images and added to reconstructions, zero at first.

    Raises:
        ValueError: a number of classes: an autoencoder has none; lists of different lengths.
    """

    def __init__(
        self,
        in_chans: int = 1,
        img_size: int | tuple[int, int] = 28,
        num_atoms: Sequence[int] = (64,),
        kernel_sizes: Sequence[int] = (8,),
        strides: Sequence[int] = (4,),
        paddings: Sequence[int] = (2,),
        steps: int = 15,
        solver: str = "fista",
        joint: bool = False,
        step: StepSize = "lipschitz",
        activation: Activation = "group_relu",
        group_size: int | None = None,
        groups: int | None = None,
        threshold: float | None = None,
        learn_threshold: bool | None = None,
        pre_bias: bool = False,
        num_classes: int = 0,
    ) -> None:
        super().__init__()
        check_no_classes(num_classes)
        if len({len(num_atoms), len(kernel_sizes), len(strides), len(paddings)}) > 1:
            raise ValueError("num_atoms, kernel_sizes, strides and paddings need one entry a layer")
        self.num_classes = 0
        self.img_size = _pair(img_size)
        shapes = zip((in_chans, *num_atoms), num_atoms, kernel_sizes, strides, paddings, strict=False)
        dictionaries = [ConvDictionary(*shape) for shape in shapes]
        act = Act(activation, group_size, groups, threshold, learn_threshold)
        self.coder = make_coder(dictionaries, act, 1, steps, solver, joint, step)
        self.pre_bias = nn.Parameter(torch.zeros(in_chans)) if pre_bias else None
        self.min_size = least_side(dictionaries)
        self.num_features = num_atoms[-1]
        names = {layer: name for name, layer in self.named_modules()}
        self.feature_info = [
            dict(num_chs=num_atoms[i], reduction=prod(strides[: i + 1]), module=f"{names[layer]}.code")
            for i, layer in enumerate(layers_of(self.coder))
        ]

    def encode(self, x: Tensor) -> Tensor:
        """Codes of images, (batch, num_features, h, w). Raises ValueError for too small images."""
        check_size(x, self.min_size)
        return self.coder(x if self.pre_bias is None else x - self.pre_bias[:, None, None])

    def decode(self, z: Tensor, size: Sequence[int] | None = None) -> Tensor:
        """Images of codes, (batch, in_chans, height, width); a stride leaves their `size`, (height, width), open.

        Raises ValueError for a code that does not come from images of that size.
        """
        layers = layers_of(self.coder)
        sizes = [tuple(size or self.img_size)]
        for layer in layers[:-1]:
            dictionary = cast(ConvDictionary, layer.dictionary)
            sizes.append(tuple(dictionary.code_side(side) for side in sizes[-1]))
        for layer, signal in zip(reversed(layers), reversed(sizes), strict=True):
            z = layer.decode(z, signal)
        return z if self.pre_bias is None else z + self.pre_bias[:, None, None]

    def forward(self, x: Tensor) -> Tensor:
        return self.decode(self.encode(x), x.shape[-2:])


def make_coder(
    dictionaries: Sequence[Dictionary], act: Act, dim: int, steps: int, solver: str, joint: bool, step: StepSize
) -> SparseCoding | DeepSparseCoding:
    """The layer of one dictionary, or the chain of several; unit atoms, and λ as it is given."""
    rule = create_solver(solver, steps)
    layers = [SparseCoding(dictionary, act.make(dim), rule, step) for dictionary in dictionaries]
    return layers[0] if len(layers) == 1 else DeepSparseCoding(layers, rule, joint)


def layers_of(coder: SparseCoding | DeepSparseCoding) -> list[SparseCoding]:
    """From the image to the deepest code."""
    return [coder] if isinstance(coder, SparseCoding) else list(coder)


def check_no_classes(num_classes: int) -> None:
    """Raise ValueError unless there are none."""
    if num_classes:
        raise ValueError(f"an autoencoder has no classes, got num_classes={num_classes}")


def _pair(size: int | Sequence[int]) -> tuple[int, int]:
    height, width = (size, size) if isinstance(size, int) else size
    return height, width


def _several(count: int | Sequence[int]) -> tuple[int, ...]:
    return (count,) if isinstance(count, int) else tuple(count)


_dense = dict(
    input_size=(1, 28, 28), fixed_input_size=True, num_classes=0, mean=(0.0,), std=(1.0,), crop_pct=1.0, classifier=None
)
_conv = _dense | dict(fixed_input_size=False)
default_cfgs = make_default_cfgs(
    gsae=_dense, sae=_dense, gsae_deep=_dense, sae_deep=_dense,
    gsae_conv=_conv, sae_conv=_conv, gsae_conv_deep=_conv, sae_conv_deep=_conv,
)  # fmt: skip
DEEP = dict(num_atoms=(320, 240, 160))
CONV_DEEP = dict(num_atoms=(32, 64, 128), kernel_sizes=(4, 4, 4), strides=(2, 2, 2), paddings=(1, 1, 1))


GROUPED = dict(activation="group_relu")
SOFT = dict(activation="soft")


def _conv_build(architecture: str, pretrained: bool, kwargs: dict[str, Any], **own: Any) -> ConvSparseAutoencoder:
    return build(ConvSparseAutoencoder, architecture, pretrained, kwargs, own, stages="num_atoms", feature_cls="hook")


@register_model
def gsae(pretrained: bool = False, **kwargs: Any) -> SparseAutoencoder:
    """Ten groups of sixteen atoms, fifteen FISTA steps."""
    return build(SparseAutoencoder, "gsae", pretrained, kwargs, GROUPED | dict(group_size=16))


@register_model
def sae(pretrained: bool = False, **kwargs: Any) -> SparseAutoencoder:
    """The same with a two-sided ℓ1 code."""
    return build(SparseAutoencoder, "sae", pretrained, kwargs, SOFT)


@register_model
def gsae_deep(pretrained: bool = False, **kwargs: Any) -> SparseAutoencoder:
    """Three dictionaries of 320, 240 and 160 atoms, groups of sixteen: the code is as wide as that of `gsae`."""
    return build(SparseAutoencoder, "gsae_deep", pretrained, kwargs, DEEP | GROUPED | dict(group_size=16))


@register_model
def sae_deep(pretrained: bool = False, **kwargs: Any) -> SparseAutoencoder:
    """The same with two-sided ℓ1 codes."""
    return build(SparseAutoencoder, "sae_deep", pretrained, kwargs, DEEP | SOFT)


@register_model
def gsae_conv(pretrained: bool = False, **kwargs: Any) -> ConvSparseAutoencoder:
    """Eight groups of eight atoms of 8×8 pixels, four pixels apart."""
    return _conv_build("gsae_conv", pretrained, kwargs, group_size=8, **GROUPED)


@register_model
def sae_conv(pretrained: bool = False, **kwargs: Any) -> ConvSparseAutoencoder:
    """The same with a two-sided ℓ1 code."""
    return _conv_build("sae_conv", pretrained, kwargs, **SOFT)


@register_model
def gsae_conv_deep(pretrained: bool = False, **kwargs: Any) -> ConvSparseAutoencoder:
    """Three dictionaries of 32, 64 and 128 atoms of 4×4 pixels, each of stride 2, groups of eight."""
    return _conv_build("gsae_conv_deep", pretrained, kwargs, group_size=8, **CONV_DEEP, **GROUPED)


@register_model
def sae_conv_deep(pretrained: bool = False, **kwargs: Any) -> ConvSparseAutoencoder:
    """The same with two-sided ℓ1 codes."""
    return _conv_build("sae_conv_deep", pretrained, kwargs, **CONV_DEEP, **SOFT)
