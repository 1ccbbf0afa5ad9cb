"""`dsc_vit_*`: attention step and sparse-coding step; `dsc_crate_*`: the code in the token's place, as in CRATE;
`dsc_attn_*`: attention with the prox alone.
"""

from collections.abc import Mapping
from typing import Any, ClassVar, Literal, get_args

from timm.models import register_model
from timm.models._features import feature_take_indices
from torch import Tensor, nn

from dsc._names import unknown
from dsc.activations import Activation
from dsc.blocks import Attention, AttentionBlock, CodeBlock, ConvStem, TokenCoding, TransformerBlock
from dsc.dictionaries import DenseDictionary
from dsc.models._build import NO_DEFAULTS, Act, build, sparse_layer
from dsc.models._build import default_cfgs as make_default_cfgs
from dsc.models._heads import VectorClassifier
from dsc.solvers import ISTA, create_solver

CRATE_STEP = 0.1  # as published
TokenFormat = Literal["NCHW", "NLC"]


class DSCTransformer(VectorClassifier):
    """A convolutional stem, blocks on the tokens, their mean, and a linear classifier; any image size.

    The stem makes a token of 4×4 pixels and shows it its place, so that no position embedding fixes the image's size.

    Args:
        dim, depth, num_heads: as in a vision transformer.
        atoms_ratio: atoms of each token dictionary over `dim`; None for blocks of attention and prox alone.
        attention: "standard", or "subspace" for CRATE's, see `dsc.blocks.SelfAttention`.
        residual: add the decoded code to the token; False: the code, solved from the token on, replaces it, as in
            CRATE, which takes one step of size 0.1; more steps are 1/L long.
        steps, solver: the sparse-coding step's; ``steps=1`` with `residual` is the standard transformer block.
        activation, group_size, groups: see `dsc.create_activation`.
        threshold: λ; with more than one step or without `residual`, as a fraction of the code's expected size. Blocks
            of attention alone shrink what all blocks before them have made, so that λ is best small there.
        learn_threshold: learn λ of each channel or group; None for whenever there is more than one step.
        global_pool: "avg", or "" for features (and logits) of every token.

    Raises:
        ValueError: without `residual`, a dictionary that is not square; several steps without a dictionary; an unknown
            `global_pool`; `num_heads` that do not divide `dim`.
    """

    pools: ClassVar = ("avg", "")

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 10,
        dim: int = 64,
        depth: int = 4,
        num_heads: int = 4,
        atoms_ratio: int | None = 4,
        attention: Attention = "standard",
        residual: bool = True,
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
        if not residual and atoms_ratio != 1:
            raise ValueError(f"residual=False puts the code in the token's place: atoms_ratio=1, got {atoms_ratio!r}")
        if atoms_ratio is None and steps != 1:
            raise ValueError(f"attention alone has no code to solve: its activation is one step, got steps={steps}")
        plain = steps == 1
        act = Act(activation, group_size, groups, threshold, not plain if learn_threshold is None else learn_threshold)
        rule = create_solver(solver, steps)

        def block() -> nn.Module:
            if atoms_ratio is None:
                return AttentionBlock(dim, num_heads, act.make(-1), attention)
            if not residual:
                return CodeBlock(dim, num_heads, token_coding(dim, act, rule), attention)
            coder = sparse_layer(DenseDictionary(dim, atoms_ratio * dim), act, -1, rule)
            return TransformerBlock(dim, num_heads, coder, attention)

        self.stem = ConvStem(in_chans, dim)
        self.blocks = nn.Sequential(*(block() for _ in range(depth)))
        self.norm: nn.Module = nn.LayerNorm(dim)
        self.feature_info = [dict(num_chs=dim, reduction=4, module=f"blocks.{i}") for i in range(depth)]
        self.add_head(dim, num_classes, global_pool, drop_rate)

    def forward_features(self, x: Tensor) -> Tensor:
        """Normalised tokens, (batch, tokens, dim)."""
        return self.norm(self.blocks(self.stem(x)))

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: TokenFormat = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """Features and the tokens behind single blocks, or these alone, as timm's vision transformers give them.

        Args:
            indices: of the blocks; a number for that many of the last, None for all.
            norm: pass the tokens through the last norm, too.
            stop_early: take no block after the last one asked for.
            output_fmt: "NCHW" for maps (batch, dim, ⌈h/4⌉, ⌈w/4⌉), "NLC" for tokens.
            intermediates_only: leave the features out.

        Raises:
            ValueError: an unknown format.
        """
        if output_fmt not in get_args(TokenFormat):
            raise ValueError(unknown("output_fmt", output_fmt, get_args(TokenFormat)))
        wanted, last = feature_take_indices(len(self.blocks), indices)
        size = [-(-side // 4) for side in x.shape[-2:]]
        x, found = self.stem(x), []
        for i, block in enumerate(self.blocks[: last + 1] if stop_early else self.blocks):
            x = block(x)
            if i in wanted:
                tokens = self.norm(x) if norm else x
                found.append(tokens.mT.unflatten(-1, size) if output_fmt == "NCHW" else tokens)
        return found if intermediates_only else (self.norm(x), found)

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drop what `forward_intermediates` of these blocks does not need; returns their indices."""
        wanted, last = feature_take_indices(len(self.blocks), indices)
        self.blocks = self.blocks[: last + 1]
        if prune_norm:
            self.norm = nn.Identity()
        if prune_head:
            self.reset_classifier(0, "")
        return wanted

    def pool(self, x: Tensor) -> Tensor:
        """Mean token, or all of them."""
        return x.mean(1) if self.global_pool else x


def token_coding(dim: int, act: Act, solver: ISTA) -> TokenCoding:
    """A coder that starts from a normalised token: one step as CRATE's, or several that 1/L keeps convergent."""
    prox = act.make_relative(-1, dim, size=1.0)  # for ReLU λ = 0.1, which is CRATE's
    return TokenCoding(DenseDictionary(dim, dim), prox, solver, CRATE_STEP if solver.steps == 1 else "learned")


_cfg = dict(input_size=(3, 32, 32), num_classes=10, mean=(0.5,) * 3, std=(0.25,) * 3, crop_pct=1.0, classifier="head")
default_cfgs = make_default_cfgs(
    dsc_vit_pico=_cfg,
    dsc_vit_tiny=_cfg,
    dsc_vit_small=_cfg,
    dsc_crate_pico=_cfg,
    dsc_attn_pico=_cfg,
    dsc_attn_tiny=_cfg,
)


def _transformer(
    architecture: str, pretrained: bool, kwargs: dict[str, Any], shape: Mapping[str, Any] = NO_DEFAULTS
) -> DSCTransformer:
    return build(DSCTransformer, architecture, pretrained, kwargs, shape, stages="depth", feature_cls="getter")


@register_model
def dsc_vit_pico(pretrained: bool = False, **kwargs: Any) -> DSCTransformer:
    """Four blocks of width 64, small enough to train on a CPU."""
    return _transformer("dsc_vit_pico", pretrained, kwargs)


@register_model
def dsc_vit_tiny(pretrained: bool = False, **kwargs: Any) -> DSCTransformer:
    """Twelve blocks of width 192, three heads: the blocks of ViT-Tiny."""
    shape = dict(dim=192, depth=12, num_heads=3)
    return _transformer("dsc_vit_tiny", pretrained, kwargs, shape)


@register_model
def dsc_vit_small(pretrained: bool = False, **kwargs: Any) -> DSCTransformer:
    """Twelve blocks of width 384, six heads: the blocks of ViT-Small."""
    shape = dict(dim=384, depth=12, num_heads=6)
    return _transformer("dsc_vit_small", pretrained, kwargs, shape)


@register_model
def dsc_crate_pico(pretrained: bool = False, **kwargs: Any) -> DSCTransformer:
    """Four blocks of CRATE, width 64: subspace attention, one step over a square dictionary from the token on."""
    crate = dict(attention="subspace", atoms_ratio=1, residual=False, steps=1)
    return _transformer("dsc_crate_pico", pretrained, kwargs, crate)


@register_model
def dsc_attn_pico(pretrained: bool = False, **kwargs: Any) -> DSCTransformer:
    """Six blocks of attention and prox, width 64."""
    return _transformer("dsc_attn_pico", pretrained, kwargs, dict(depth=6, atoms_ratio=None, steps=1))


@register_model
def dsc_attn_tiny(pretrained: bool = False, **kwargs: Any) -> DSCTransformer:
    """Twelve blocks of attention and prox, width 192, three heads."""
    shape = dict(dim=192, depth=12, num_heads=3, atoms_ratio=None, steps=1)
    return _transformer("dsc_attn_tiny", pretrained, kwargs, shape)
