"""A chain of convolutions and activations, written by the quantities that lie in its channels."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dsc.theory.compiler.units import Pieces, Units


@dataclass(frozen=True)
class Part:
    """`units` of ``Σ_name kernels[name] ∗ quantity[name] + bias``; kernels are (channels out, channels in, …)."""

    kernels: Mapping[str, Tensor]
    units: Units
    bias: Tensor | float = 0.0


class Chain:
    """Builds ``convolution, activation, convolution, …``, in float64.

    After a layer, `state` says how each named quantity lies in the channels: with weights (units, channels), it is
    ``Σ_i weights_i h_i``, where h are the channels in the order of the quantities, units and channels. At first there
    is one, "x", as it is.
    """

    def __init__(self, channels: int, dims: int, pieces: Pieces) -> None:
        self.dims, self.pieces = dims, pieces
        self.modules: list[nn.Module] = []
        self.state = {"x": torch.ones(1, channels, dtype=torch.float64)}

    def keep(self, name: str, by: Tensor | None = None) -> Part:
        """A quantity through the convolution `by` (default: as it is), carried on."""
        kernel = self.point(torch.eye(self.state[name].shape[1]).double()) if by is None else by
        return Part({name: kernel}, self.pieces.identity)

    def point(self, matrix: Tensor) -> Tensor:
        """A matrix as a convolution of single pixels."""
        return matrix[(..., *[None] * self.dims)]

    def layer(
        self,
        outputs: Mapping[str, list[Part]],
        stride: int | tuple[int, ...] = 1,
        padding: int | tuple[int, ...] = 0,
        remainder: tuple[int, ...] | None = None,
        activate: bool = True,
    ) -> None:
        """Append a convolution and an activation, after which the state is `outputs`, each the sum of its parts.

        With a `remainder` the convolution is transposed, and this its output padding.
        """
        if self._decodes_first(outputs):
            self._decode()
        rows, biases, state = [], [], {}
        for name, parts in outputs.items():
            decoded = []
            for part in parts:
                kernel, gain = self._encoded(part), part.units.gain
                rows.append((gain.reshape(-1, *[1] * kernel.ndim) * kernel).flatten(0, 1))
                shift = gain.unsqueeze(1) * torch.as_tensor(part.bias).double() + part.units.offset
                biases.append(shift.expand(-1, len(kernel)).flatten())
                decoded.append(part.units.weight.expand(-1, len(kernel)))
            state[name] = torch.cat(decoded)
        self.modules.append(self._convolution(torch.cat(rows), torch.cat(biases), stride, padding, remainder))
        if activate:
            self.modules.append(self.pieces.activation())
        self.state = state

    def finish(self) -> None:
        """Append what decodes "z", unless it lies in the channels as it is."""
        weights = self.state["z"]
        if not torch.equal(weights, torch.ones_like(weights[:1])):
            self._decode()

    def _decodes_first(self, outputs: Mapping[str, list[Part]]) -> bool:
        # Whether a convolution that decodes the channels, before that of the layer, saves most of the weights.
        quantities = sum(weights.shape[1] for weights in self.state.values())
        channels = sum(weights.numel() for weights in self.state.values())
        rows, pixels = 0, 1
        for part in (part for parts in outputs.values() for part in parts):
            kernel = next(iter(part.kernels.values()))
            rows, pixels = rows + len(part.units.gain) * len(kernel), kernel[0, 0].numel()
        return 4 * quantities * (channels + pixels * rows) < channels * pixels * rows

    def _decode(self) -> None:
        weights = torch.block_diag(*(torch.cat([*map(torch.diag, w)], 1) for w in self.state.values()))
        bias = torch.zeros(len(weights)).double()
        self.modules.append(self._convolution(self.point(weights), bias, 1, 0, None))
        self.state = {name: torch.ones_like(w[:1]) for name, w in self.state.items()}

    def _encoded(self, part: Part) -> Tensor:
        # Columns of the quantities that a part leaves out are zero.
        shape = next(iter(part.kernels.values())).shape
        columns = []
        for name, weights in self.state.items():
            kernel = part.kernels.get(name)
            if kernel is None:
                columns.append(torch.zeros(shape[0], weights.numel(), *shape[2:]).double())
            else:
                scaled = kernel.unsqueeze(1) * weights.reshape(1, *weights.shape, *[1] * self.dims)
                columns.append(scaled.flatten(1, 2))
        return torch.cat(columns, 1)

    def _convolution(
        self,
        weight: Tensor,
        bias: Tensor,
        stride: int | tuple[int, ...],
        padding: int | tuple[int, ...],
        remainder: tuple[int, ...] | None,
    ) -> nn.Module:
        sizes = (weight.shape[1], len(weight), tuple(weight.shape[2:]), stride, padding)
        made: nn.Conv1d | nn.Conv2d | nn.ConvTranspose2d
        if remainder is not None:
            made = nn.ConvTranspose2d(*sizes, output_padding=remainder, device="meta")  # type: ignore[arg-type]
            weight = weight.transpose(0, 1).contiguous()
        else:
            made = (nn.Conv1d if self.dims == 1 else nn.Conv2d)(*sizes, device="meta")  # type: ignore[arg-type]
        made.weight = nn.Parameter(weight)
        made.bias = nn.Parameter(bias)
        return made
