"""Transformer blocks in which the activation is a proximal step, and a small convolutional stem for tokens."""

from timm.layers import Attention
from torch import Tensor, nn

from dsc.layers import SparseCoding


class ConvStem(nn.Module):
    """Images to tokens: two 3×3 convolutions of stride 2, then a 3×3 depth-wise one that tells tokens their place.

    Shapes: (batch, in_chans, h, w) → (batch, ⌈h/4⌉·⌈w/4⌉, dim). The zero padding of the last convolution makes
    position visible at every image size (Chu et al. 2021, conditional positional encodings).
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


class AttentionBlock(nn.Module):
    """Attention alone: ``x ← prox(x + Attention(LN(x)))``, tokens (batch, tokens, dim)."""

    def __init__(self, dim: int, num_heads: int, prox: nn.Module) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.attention = Attention(dim, num_heads=num_heads, qkv_bias=True)
        self.prox = prox

    def forward(self, x: Tensor) -> Tensor:
        return self.prox(x + self.attention(self.norm(x)))


class TransformerBlock(nn.Module):
    """An attention step, then a sparse-coding step on each token: ``x ← x + W z(LN(x))``, tokens (batch, tokens, dim).

    z is the code of the token over an overcomplete dictionary, W a decoder of its own (as in CRATE-α, Yang et al.
    2024). With one step of size 1 the second half is the standard transformer's MLP.
    """

    def __init__(self, dim: int, num_heads: int, coder: SparseCoding) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attention = Attention(dim, num_heads=num_heads, qkv_bias=True)
        self.norm2 = nn.LayerNorm(dim)
        self.coder = coder
        self.decoder = nn.Linear(coder.dictionary.num_atoms, dim)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.decoder(self.coder(self.norm2(x)))
