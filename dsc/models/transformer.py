"""`dsc_vit_*`: attention step and sparse-coding step; `dsc_attn_*`: attention with the prox alone."""

from typing import Any

from timm.models import register_model
from torch import Tensor, nn

from dsc.activations import Activation
from dsc.blocks import AttentionBlock, ConvStem, TransformerBlock
from dsc.dictionaries import DenseDictionary
from dsc.models._build import Act, build, sparse_layer
from dsc.models._build import default_cfgs as make_default_cfgs
from dsc.solvers import create_solver


class DSCTransformer(nn.Module):
    """A convolutional stem, blocks on the tokens, their mean, and a linear classifier; any image size.

    Args:
        dim, depth, num_heads: as in a vision transformer.
        atoms_ratio: atoms of each token dictionary over `dim`; None for blocks of attention and prox alone.
        steps, solver: the sparse-coding step's; ``steps=1`` is the standard transformer block.
        activation, group_size, groups: see `dsc.create_activation`.
        threshold: λ; in sparse-coding steps (more than one), as a fraction of the code's expected size.
        learn_threshold: learn λ of each channel or group; None for whenever there is more than one step.
    """

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 10,
        dim: int = 64,
        depth: int = 4,
        num_heads: int = 4,
        atoms_ratio: int | None = 4,
        steps: int = 2,
        solver: str = "ista",
        activation: Activation = "relu",
        group_size: int | None = None,
        groups: int | None = None,
        threshold: float | None = None,
        learn_threshold: bool | None = None,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
    ) -> None:
        super().__init__()
        if global_pool != "avg":
            raise ValueError(f"global_pool must be 'avg' (the mean over tokens), got {global_pool!r}")
        plain = steps == 1 or atoms_ratio is None
        act = Act(activation, group_size, groups, threshold, not plain if learn_threshold is None else learn_threshold)
        rule = create_solver(solver, steps)

        def block() -> nn.Module:
            if atoms_ratio is None:
                return AttentionBlock(dim, num_heads, act.make(-1))
            dictionary = DenseDictionary(dim, atoms_ratio * dim)
            return TransformerBlock(dim, num_heads, sparse_layer(dictionary, act, -1, rule))

        self.stem = ConvStem(in_chans, dim)
        self.blocks = nn.Sequential(*(block() for _ in range(depth)))
        self.norm = nn.LayerNorm(dim)
        self.num_classes, self.num_features, self.head_hidden_size = num_classes, dim, dim
        self.head_drop = nn.Dropout(drop_rate)
        self.reset_classifier(num_classes)

    def forward_features(self, x: Tensor) -> Tensor:
        """Normalised tokens, (batch, tokens, dim)."""
        return self.norm(self.blocks(self.stem(x)))

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Mean token, or logits."""
        x = self.head_drop(x.mean(1))
        return x if pre_logits else self.head(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))

    def get_classifier(self) -> nn.Module:
        """The last linear layer."""
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """A fresh head for another number of classes."""
        self.num_classes = num_classes
        self.head = nn.Linear(self.num_features, num_classes) if num_classes else nn.Identity()


_cfg = dict(input_size=(3, 32, 32), num_classes=10, mean=(0.5,) * 3, std=(0.25,) * 3, crop_pct=1.0, classifier="head")
default_cfgs = make_default_cfgs(dsc_vit_pico=_cfg, dsc_attn_pico=_cfg)


@register_model
def dsc_vit_pico(pretrained: bool = False, **kwargs: Any) -> DSCTransformer:
    """Four blocks of width 64, made for two cores."""
    return build(DSCTransformer, "dsc_vit_pico", pretrained, kwargs)


@register_model
def dsc_attn_pico(pretrained: bool = False, **kwargs: Any) -> DSCTransformer:
    """Six blocks of attention and prox, width 64."""
    kwargs = dict(depth=6, atoms_ratio=None) | kwargs
    return build(DSCTransformer, "dsc_attn_pico", pretrained, kwargs)
