"""`gsae` and `sae`: group-sparse and sparse autoencoders with tied weights."""

from typing import Any

from timm.models import register_model
from torch import Tensor, nn

from dsc.activations import Activation, is_grouped
from dsc.dictionaries import DenseDictionary
from dsc.layers import SparseCoding, StepSize
from dsc.models._build import Act, build
from dsc.models._build import default_cfgs as make_default_cfgs
from dsc.solvers import create_solver


class SparseAutoencoder(nn.Module):
    """Image → code over one dense dictionary → image, ``x̂ = D z(x)``, encoder and decoder tied.

    Shallow (``steps=1``) it is the autoencoder of *On the convergence of group-sparse autoencoders*
    (arXiv 2102.07003): ``x̂ = A σ_λ(Aᵀx)``; unfolded it takes that many steps of ISTA or FISTA.

    Args:
        img_size: height and width (or one number) of the images; fixed.
        num_atoms: columns of D.
        steps, solver, step: the encoder's; `step` as in `dsc.SparseCoding`.
        activation, group_size, groups, threshold, learn_threshold: see `dsc.create_activation`.

    Raises:
        ValueError: a number of classes: an autoencoder has none.
    """

    def __init__(
        self,
        in_chans: int = 1,
        img_size: int | tuple[int, int] = 28,
        num_atoms: int = 160,
        steps: int = 15,
        solver: str = "fista",
        step: StepSize = "lipschitz",
        activation: Activation = "group_relu",
        group_size: int | None = None,
        groups: int | None = None,
        threshold: float | None = None,
        learn_threshold: bool | None = None,
        num_classes: int = 0,
    ) -> None:
        super().__init__()
        if num_classes:
            raise ValueError(f"an autoencoder has no classes, got num_classes={num_classes}")
        self.num_classes = 0
        self.img_size = (img_size, img_size) if isinstance(img_size, int) else tuple(img_size)
        self.in_chans = in_chans
        dictionary = DenseDictionary(in_chans * self.img_size[0] * self.img_size[1], num_atoms)
        act = Act(activation, group_size, groups, threshold, learn_threshold)
        self.coder = SparseCoding(dictionary, act.make(-1), create_solver(solver, steps), step)
        self.num_features = num_atoms

    def encode(self, x: Tensor) -> Tensor:
        """Codes of images, (batch, num_atoms). Raises ValueError for images of another size."""
        if x.shape[1:] != (self.in_chans, *self.img_size):
            raise ValueError(f"images of shape {tuple(x.shape[1:])}, expected {(self.in_chans, *self.img_size)}")
        return self.coder(x.flatten(1))

    def decode(self, z: Tensor) -> Tensor:
        """Images of codes, (batch, in_chans, height, width)."""
        return self.coder.decode(z).unflatten(1, (self.in_chans, *self.img_size))

    def forward(self, x: Tensor) -> Tensor:
        return self.decode(self.encode(x))


_cfg = dict(
    input_size=(1, 28, 28), fixed_input_size=True, num_classes=0, mean=(0.0,), std=(1.0,), crop_pct=1.0, classifier=None
)
default_cfgs = make_default_cfgs(gsae=_cfg, sae=_cfg)


@register_model
def gsae(pretrained: bool = False, **kwargs: Any) -> SparseAutoencoder:
    """Ten groups of sixteen atoms, fifteen FISTA steps."""
    kwargs = dict(activation="group_relu") | kwargs
    sized = kwargs.get("groups") is not None or kwargs.get("group_size") is not None
    if is_grouped(kwargs["activation"]) and not sized:
        kwargs["group_size"] = 16
    return build(SparseAutoencoder, "gsae", pretrained, kwargs)


@register_model
def sae(pretrained: bool = False, **kwargs: Any) -> SparseAutoencoder:
    """The same with a two-sided ℓ1 code."""
    return build(SparseAutoencoder, "sae", pretrained, dict(activation="soft") | kwargs)
