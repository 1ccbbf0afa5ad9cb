"""Any linear map of a signal as convolutions with small kernels, as many as log(length) (arXiv 2210.09041).

Each convolution has its stride as large as its kernel, so that it turns blocks into pixels of more channels: as many
as the functionals of a block that the map needs span, exactly. The rest of the map then acts on fewer pixels.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Factor:
    """A convolution without bias whose stride is its kernel's size.

    Attributes:
        padding: may differ by dimension.
        entries: how many the signal has behind it, pixels times channels.
    """

    kernel: Tensor
    padding: tuple[int, ...]
    entries: int

    @property
    def stride(self) -> tuple[int, ...]:
        return tuple(self.kernel.shape[2:])


def factor(kernel: Tensor, size: int) -> tuple[list[Factor], Tensor]:
    """Convolutions with kernels of at most `size`, and the kernel of the last one, whose product is `kernel`.

    Shapes: kernel (out, channels, *lengths) reads a whole signal (channels, *lengths); the last one returned reads
    what the factors leave of it, and is at most `size` long.
    """
    factors = []
    while max(kernel.shape[2:]) > size:
        one, kernel = _split(kernel, size)
        factors.append(one)
    return factors, kernel


def _split(kernel: Tensor, size: int) -> tuple[Factor, Tensor]:
    lengths = kernel.shape[2:]
    blocks = [min(size, n) for n in lengths]
    counts = [math.ceil(n / f) for n, f in zip(lengths, blocks, strict=True)]
    missing = [c * f - n for c, f, n in zip(counts, blocks, lengths, strict=True)]
    padding = [math.ceil(m / 2) for m in missing]  # a convolution pads both sides alike
    sides = [side for p, m in zip(reversed(padding), reversed(missing), strict=True) for side in (p, m - p)]
    padded = torch.nn.functional.pad(kernel, sides)
    for dim in reversed(range(len(lengths))):
        padded = padded.unflatten(2 + dim, (counts[dim], blocks[dim]))
    # (out, channels, count, block, count, block) to (out, count, count | channels, block, block)
    dims = range(len(lengths))
    order = (0, *(2 + 2 * d for d in dims), 1, *(3 + 2 * d for d in dims))
    functionals = padded.permute(order).flatten(1 + len(lengths)).flatten(0, len(lengths))
    basis = _basis(functionals)
    taken = basis.mT.reshape(-1, kernel.shape[1], *blocks)
    rest = (functionals @ basis).reshape(len(kernel), *counts, -1).movedim(-1, 1)
    return Factor(taken, tuple(padding), rest[0].numel()), rest


def _basis(functionals: Tensor) -> Tensor:
    # Orthonormal columns that span the rows: unit vectors where that is the whole space.
    columns = functionals.shape[1]
    _, values, vectors = torch.linalg.svd(functionals, full_matrices=False)
    rank = int((values > values[0] * max(functionals.shape) * torch.finfo(values.dtype).eps).sum())
    return torch.eye(columns).to(functionals) if rank == columns else vectors[:rank].mT
