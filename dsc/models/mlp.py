"""`dsc_mlp_*`: dense deep sparse coding of whole images."""

from collections.abc import Sequence
from typing import Any

from timm.models import register_model
from torch import Tensor, nn

from dsc.activations import Activation
from dsc.dictionaries import DenseDictionary
from dsc.layers import DeepSparseCoding, SparseCoding
from dsc.models._build import Act, build, sparse_layer
from dsc.models._build import default_cfgs as make_default_cfgs
from dsc.models._heads import VectorClassifier
from dsc.solvers import create_solver


class DSCMLP(VectorClassifier):
    """A `DeepSparseCoding` of dense dictionaries on all pixels, between layer norms, and a linear classifier.

    ``logits = W LN(z)``, z the deepest code of ``LN(x)``. With ``steps=1`` each layer is a linear map with bias and
    activation: the multi-layer perceptron of the same shapes.

    Args:
        img_size: height and width (or one number) of the images; fixed.
        num_atoms: one entry a layer.
        steps: proximal steps; jointly over all layers (the first a forward pass), or in each one.
        solver: "ista" or "fista".
        joint: solve all layers together, or one after the other.
        activation, group_size, groups: see `dsc.create_activation`.
        threshold: λ; with more than one step, as a fraction of the code's expected size.
        learn_threshold: learn λ of each unit or group; None for whenever there is more than one step.
    """

    def __init__(
        self,
        in_chans: int = 1,
        num_classes: int = 10,
        img_size: int | tuple[int, int] = 28,
        num_atoms: Sequence[int] = (256, 256),
        steps: int = 3,
        solver: str = "ista",
        joint: bool = True,
        activation: Activation = "relu",
        group_size: int | None = None,
        groups: int | None = None,
        threshold: float | None = None,
        learn_threshold: bool | None = None,
        global_pool: str = "",
        drop_rate: float = 0.0,
    ) -> None:
        super().__init__()
        self.img_size = (img_size, img_size) if isinstance(img_size, int) else tuple(img_size)
        self.in_chans = in_chans
        act = Act(activation, group_size, groups, threshold, steps > 1 if learn_threshold is None else learn_threshold)
        rule = create_solver(solver, steps)
        pixels = in_chans * self.img_size[0] * self.img_size[1]
        layers: list[SparseCoding] = []
        for shape in zip((pixels, *num_atoms), num_atoms, strict=False):
            size = layers[-1].code_size if layers else 1.0
            layers.append(sparse_layer(DenseDictionary(*shape), act, -1, rule, size))
        self.norm1 = nn.LayerNorm(pixels)
        self.coder = DeepSparseCoding(layers, rule, joint)
        self.norm2 = nn.LayerNorm(num_atoms[-1])
        self.add_head(num_atoms[-1], num_classes, global_pool, drop_rate)

    def forward_features(self, x: Tensor) -> Tensor:
        """Normalised code of the deepest layer, (batch, atoms). Raises ValueError for images of another size."""
        if x.shape[1:] != (self.in_chans, *self.img_size):
            raise ValueError(f"images of shape {tuple(x.shape[1:])}, expected {(self.in_chans, *self.img_size)}")
        return self.norm2(self.coder(self.norm1(x.flatten(1))))


_cfg = dict(
    input_size=(1, 28, 28),
    fixed_input_size=True,
    num_classes=10,
    mean=(0.5,),
    std=(0.25,),
    crop_pct=1.0,
    classifier="head",
)
default_cfgs = make_default_cfgs(dsc_mlp_pico=_cfg, dsc_mlp_base=_cfg)


@register_model
def dsc_mlp_pico(pretrained: bool = False, **kwargs: Any) -> DSCMLP:
    """Two dictionaries of 256 atoms."""
    return build(DSCMLP, "dsc_mlp_pico", pretrained, kwargs, dict(num_atoms=(256, 256)))


@register_model
def dsc_mlp_base(pretrained: bool = False, **kwargs: Any) -> DSCMLP:
    """Three dictionaries of 1,024 atoms."""
    return build(DSCMLP, "dsc_mlp_base", pretrained, kwargs, dict(num_atoms=(1024,) * 3))
