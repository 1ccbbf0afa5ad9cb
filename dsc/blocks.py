"""Transformer blocks in which the activation is a proximal step, and a small convolutional stem for tokens."""

from typing import Literal, get_args

from torch import Tensor, nn
from torch.nn import functional as F

from dsc._names import unknown
from dsc.layers import SparseCoding
from dsc.shrinkage import nearest_divisors
from dsc.solvers import ISTA

Attention = Literal["standard", "subspace"]


class ConvStem(nn.Module):
    """Images to tokens: two 3×3 convolutions of stride 2, then a 3×3 depth-wise one that tells tokens their place.

    Shapes: (batch, in_chans, h, w) → (batch, ⌈h/4⌉·⌈w/4⌉, dim). The zero padding of the last convolution makes
    position visible at every image size (Chu et al. 2021, conditional positional encodings). Its GELU stays, whatever
    activation the blocks have.
    """

    def __init__(self, in_chans: int, dim: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_chans, dim // 2, 3, stride=2, padding=1)
        self.act = nn.GELU()
        self.conv2 = nn.Conv2d(dim // 2, dim, 3, stride=2, padding=1)
        self.position = nn.Conv2d(dim, dim, 3, padding=1, groups=dim)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv2(self.act(self.conv1(x)))
        return (x + self.position(x)).flatten(2).mT


class SelfAttention(nn.Module):
    """Multi-head self-attention ``softmax(QKᵀ/√d) V`` of heads of width d, and a linear map behind; tokens as above.

    Args:
        dim, num_heads: d is dim over num_heads.
        kind: "standard", with the parameters of timm's `Attention`, or "subspace": one projection without a bias is
            query, key and value alike, ``w = Ux`` and ``softmax(wwᵀ/√d) w``, and U has a basis of a subspace a head
            (CRATE: Yu et al. 2023, arXiv 2306.01129).

    Raises:
        ValueError: a number of heads that does not divide dim, or an unknown kind.
    """

    def __init__(self, dim: int, num_heads: int, kind: Attention = "standard") -> None:
        super().__init__()
        if kind not in get_args(Attention):
            raise ValueError(unknown("attention", kind, get_args(Attention)))
        if num_heads < 1 or dim % num_heads:
            near = nearest_divisors(dim, num_heads)
            raise ValueError(f"num_heads={num_heads} does not divide dim={dim}; nearest numbers that do: {near}")
        self.num_heads = num_heads
        shared = kind == "subspace"
        self.qkv = nn.Linear(dim, dim if shared else 3 * dim, bias=not shared)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        heads = self.qkv(x).unflatten(-1, (-1, self.num_heads, x.shape[-1] // self.num_heads)).permute(2, 0, 3, 1, 4)
        query, key, value = heads.expand(3, -1, -1, -1, -1)
        return self.proj(attend(query, key, value).transpose(1, 2).flatten(2))


def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """``softmax(QKᵀ/√d) V``, each (batch, heads, tokens, d)."""
    if query.device.type == "cpu" and query.requires_grad and query.dtype.itemsize < 4:
        # The fused kernel's backward in half precision takes several times as long as these products.
        return (query * query.shape[-1] ** -0.5 @ key.mT).softmax(-1) @ value
    return F.scaled_dot_product_attention(query, key, value)


class AttentionBlock(nn.Module):
    """Attention alone: ``x ← prox(x + Attention(LN(x)))``, tokens (batch, tokens, dim)."""

    def __init__(self, dim: int, num_heads: int, prox: nn.Module, attention: Attention = "standard") -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.attention = SelfAttention(dim, num_heads, attention)
        self.prox = prox

    def forward(self, x: Tensor) -> Tensor:
        return self.prox(x + self.attention(self.norm(x)))


class TransformerBlock(nn.Module):
    """An attention step, then a sparse-coding step on each token: ``x ← x + W z(LN(x))``, tokens (batch, tokens, dim).

    z is the code of the token over an overcomplete dictionary, W a decoder of its own (as in CRATE-α, Yang et al.
    2024). With one step of size 1 the second half is the standard transformer's MLP.
    """

    def __init__(self, dim: int, num_heads: int, coder: SparseCoding, attention: Attention = "standard") -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attention = SelfAttention(dim, num_heads, attention)
        self.norm2 = nn.LayerNorm(dim)
        self.coder = coder
        self.decoder = nn.Linear(coder.dictionary.num_atoms, dim)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.decoder(self.coder(self.norm2(x)))


class CodeBlock(nn.Module):
    """An attention step, then each token's code in its place: ``x ← z(LN(x))``, tokens (batch, tokens, dim).

    The code has as many entries as the token. This is CRATE's block (Yu et al. 2023, arXiv 2306.01129) where attention
    is "subspace" and `coder` a `TokenCoding` of one step of ReLU, of size 0.1 and with λ = 0.1.
    """

    def __init__(self, dim: int, num_heads: int, coder: SparseCoding, attention: Attention = "subspace") -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attention = SelfAttention(dim, num_heads, attention)
        self.norm2 = nn.LayerNorm(dim)
        self.coder = coder

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return self.coder(self.norm2(x))


class TokenCoding(SparseCoding):
    """`SparseCoding` over a square dictionary that starts from the signal, ``z₀ = x``, and not from zero.

    One step is ``prox(x + s Dᵀ(x − Dx), s)``.
    """

    def solve(
        self, x: Tensor, solver: ISTA | None = None, record: list[Tensor] | None = None, start: Tensor | None = None
    ) -> Tensor:
        return super().solve(x, solver, record, x if start is None else start)
