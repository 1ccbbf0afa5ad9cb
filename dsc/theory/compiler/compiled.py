"""`compile`: an unrolled sparse-coding layer as a plain CNN, an attention stack or a transformer of standard parts."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from dsc._names import unknown
from dsc.layers import DeepSparseCoding, SparseCoding
from dsc.theory.compiler import attention, bounds, cnn, groups, units
from dsc.theory.compiler.bounds import Errors
from dsc.theory.compiler.chain import Chain
from dsc.theory.compiler.iteration import Iteration, iterations

Target = Literal["cnn", "attention", "transformer"]
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.ConvTranspose2d)


@dataclass(frozen=True)
class Options:
    """What `compile` was asked for, see there; `size` is (height, width)."""

    to: Target
    activation: str
    scale: float | None
    reach: float | None
    kernel_size: int | None
    size: tuple[int, int] | None
    temperature: float | None
    approximate: bool


def remainders(source: list[Iteration], size: tuple[int, int]) -> list[tuple[int, int]]:
    """`Iteration.remainder` of each layer for an image of that size."""
    found = []
    for one in source:
        found.append(one.remainder(size))
        size = one.code_size(size)
    return found


@dataclass(frozen=True)
class Layout:
    """Shapes of one signal and one code in a network where they differ from the layer's, and of its only image."""

    signal: tuple[int, ...]
    code: tuple[int, ...]
    image: tuple[int, ...] | None = None


class Compiled(nn.Module):
    """A network that computes a layer's code: `network`, between two reshapes.

    Attributes:
        network: an `nn.Sequential` of standard parts.
        depth: linear maps in a row, where an attention counts one and a feed-forward two.
        width: most channels between two of them; of tokens, their coordinates.
        num_parameters: of the network; the steps of an attention or transformer stack share theirs.
        part_error: largest error of an entry that is shrunk, 0 where shrinkage is exact.
        measured: whether `part_error` is a measured figure, as for groups, and not a bound.

    Shapes: signals and codes as the layer's, in any batch.
    """

    def __init__(
        self,
        modules: Iterable[nn.Module],
        source: list[Iteration],
        errors: list[Errors],
        reads: list[int],
        layout: Layout | list[tuple[int, int]],
    ) -> None:
        super().__init__()
        self.network = nn.Sequential(*modules)
        self.part_error = max(error.shrink for error in errors)
        self.measured = any(one.shrinkage.group is not None for one in source)
        self._source, self._errors, self._reads, self._layout = source, errors, reads, layout

    @property
    def depth(self) -> int:
        return sum(_depth(module) for module in self.network)

    @property
    def width(self) -> int:
        convolutions = (m.out_channels for m in self.network if isinstance(m, CONVOLUTIONS))
        tokens = (m.position.shape[1] for m in self.network if isinstance(m, attention.Tokens))
        return max(*convolutions, *tokens, 0)

    @property
    def num_parameters(self) -> int:
        return sum(p.numel() for p in self.network.parameters())

    def forward(self, x: Tensor) -> Tensor:
        self._check_signals(x)
        if not isinstance(self._layout, Layout):
            return self.network(x)
        lead = x.shape[: -self._dims]
        return self.network(x.reshape(-1, *self._layout.signal)).reshape(*lead, *self._layout.code)

    def bound(self, x: Tensor) -> Tensor:
        """Bound of ``‖compiled(x) − layer(x)‖₂`` of each signal, (signals,), float64: see `compiler.bounds`.

        It is 0 where the network is exact, up to the rounding of its arithmetic. It supposes values within the `reach`
        where there is one, and is no bound, but a figure, where `measured`.
        """
        self._check_signals(x)
        return bounds.bound(self._source, self._errors, x.reshape(-1, *x.shape[-self._dims :]), self._reads)

    @property
    def _dims(self) -> int:
        return 1 if self._source[0].is_dense else 3

    def _check_signals(self, x: Tensor) -> None:
        expected = self._source[0].weight.shape[1]
        if x.ndim < self._dims or x.shape[-self._dims] != expected:
            raise ValueError(
                f"signals of shape {tuple(x.shape)} do not fit: expected {expected} in dimension {-self._dims}"
            )
        if not isinstance(self._layout, Layout):
            height, width = x.shape[-2:]
            if remainders(self._source, (height, width)) != self._layout:
                raise ValueError(
                    f"images of {height}×{width} pixels leave other remainders by the strides than those this network "
                    f"was compiled for: compile with size=({height}, {width})"
                )
        elif self._layout.image is not None and tuple(x.shape[-3:]) != self._layout.image:
            raise ValueError(f"compiled for images of shape {self._layout.image}, got {tuple(x.shape[-3:])}")

    def extra_repr(self) -> str:
        return f"depth={self.depth}, width={self.width}, parameters={self.num_parameters}"


def compile(
    model: SparseCoding | DeepSparseCoding,
    to: Target = "cnn",
    *,
    activation: str = "relu",
    scale: float | None = None,
    reach: float | None = None,
    kernel_size: int | None = None,
    size: tuple[int, int] | None = None,
    temperature: float | None = None,
    approximate: bool = False,
) -> Compiled:
    """A network of standard parts that computes `model`'s code, with its weights, steps and thresholds of now.

    - "cnn": an `nn.Sequential` of convolutions and activations, with ReLU and LeakyReLU equal to the iteration.
    - "attention": self-attention and ReLU, softmax-free and then equal to the iteration, see `compiler.attention`.
    - "transformer": the same attention, and feed-forwards that shrink.

    Args:
        model: layers of evaluation mode, greedy if several; ISTA, or for a CNN also FISTA without restarts.
        to: which network.
        activation: of a CNN: relu, leaky_relu, gelu, silu, softplus, elu, tanh or sigmoid, see `compiler.units`.
        scale: R of an activation that is not exact, whose error falls like 1/R; for groups, like 1/R².
        reach: B, largest size of values for which tanh, sigmoid and groups hold.
        kernel_size: of a dense CNN: read the signal by convolutions of this size, as many as log(length), see
            `compiler.factor`; None for one convolution as large as the signal.
        size: height and width of images. Of a dense CNN: the signals are flattened images (default: 1-D signals).
            Of attention to a convolutional dictionary: the images it is for. Of a convolutional CNN: images of which
            strides leave a remainder (default: none).
        temperature: T of softmax attention, whose error falls like 1/T² until rounding, which grows like T, meets it.
        approximate: accept group shrinkage, which is not piecewise linear; its error is measured.

    Raises:
        TypeError: a model, dictionary or prox that has no such network; groups without `approximate`.
        ValueError: the joint mode, a depth that depends on signals, dictionaries that do not chain, an option that
            is unknown, missing, without effect or not positive.

    Source: our reconstruction of *Deep sparse coding via CNNs*, arXiv 2408.05540; small kernels by arXiv 2210.09041.
    """
    options = Options(to, activation, scale, reach, kernel_size, size, temperature, approximate)
    source = iterations(model)
    _check(options, source)
    like = next(model.parameters())  # its data type and device
    with torch.no_grad():
        return (_cnn if to == "cnn" else _attention)(options, source, like).eval()


def _cnn(options: Options, source: list[Iteration], like: Tensor) -> Compiled:
    pieces = units.pieces(options.activation, options.scale, options.reach, torch.finfo(like.dtype).eps)
    errors = []
    for one in source:
        error = pieces.positive_error
        if one.shrinkage.group is not None:
            assert options.scale is not None and options.reach is not None
            error = groups.measured_error(one.shrinkage, pieces, options.scale, options.reach)
        errors.append(Errors(error, pieces.identity_error))
    features, dense = source[0].weight.shape[1], source[0].is_dense
    lengths = options.size or (features,)
    grid = (features // math.prod(lengths), *lengths)
    chain = Chain(grid[0] if dense else features, len(lengths) if dense else 2, pieces)
    left = [(0, 0)] * len(source) if dense or options.size is None else remainders(source, options.size)
    reads = cnn.build(chain, source, grid, left, options.kernel_size, options.scale, options.reach)
    layout = Layout(grid, (source[-1].atoms,)) if dense else left
    return Compiled(chain.modules, source, errors, reads, layout).to(like)


def _attention(options: Options, source: list[Iteration], like: Tensor) -> Compiled:
    modules: list[nn.Module] = []
    errors, size = [], options.size
    for one in source:
        flat = one if size is None else one.unfolded(size)
        part = [module.to(like) for module in attention.stack(flat, options.to, options.temperature)]
        errors.append(_softmax_errors(part, flat, options.temperature))
        modules += part
        size = None if size is None else one.code_size(size)
    weight = source[0].weight
    image = None if options.size is None else (weight.shape[1], *options.size)
    layout = Layout((math.prod(image or weight.shape[1:2]),), (source[-1].atoms, *(size or ())), image)
    return Compiled(modules, source, errors, [], layout)


def _softmax_errors(part: list[nn.Module], one: Iteration, temperature: float | None) -> Errors:
    if temperature is None:
        return Errors()
    block = next(m for m in part if isinstance(m, attention.Attention | attention.TransformerBlock))
    inner = block if isinstance(block, attention.Attention) else block.attention
    return Errors(0.0, 0.0, *attention.softmax_errors(inner, one, temperature))


def _depth(module: nn.Module) -> int:
    if isinstance(module, attention.TransformerBlock):
        return 3
    return int(isinstance(module, (*CONVOLUTIONS, attention.Attention, attention.Tokens, attention.Codes)))


def _check(options: Options, source: list[Iteration]) -> None:
    if options.to not in get_args(Target):
        raise ValueError(unknown("network", options.to, get_args(Target)))
    for name in ("scale", "reach", "temperature"):
        value = getattr(options, name)
        if value is not None and not 0 < value < math.inf:
            raise ValueError(f"{name} must be finite and above 0, got {value}")
    grouped = any(one.shrinkage.group is not None for one in source)
    if grouped and not options.approximate:
        raise TypeError(
            "group shrinkage is not piecewise linear, so that no ReLU network computes it: take group_size=1 (soft "
            "or relu), or approximate=True for one that comes near and reports its measured error"
        )
    if options.approximate and not grouped:
        raise ValueError("approximate=True is for groups of more than one atom: this model compiles without it")
    if options.to == "cnn":
        _check_cnn(options, source, grouped)
    else:
        _check_attention(options, source)


def _check_cnn(options: Options, source: list[Iteration], grouped: bool) -> None:
    name, dense = options.activation, source[0].is_dense
    if name not in units.ACTIVATIONS:
        raise ValueError(unknown("activation", name, units.ACTIVATIONS))
    if grouped and name not in units.EXACT:
        raise ValueError(f"groups are approximated with {' or '.join(units.EXACT)}, got activation={name!r}")
    _needed("scale", options.scale, grouped or name not in units.EXACT, f"activation={name!r}")
    _needed("reach", options.reach, grouped or name in units.BOUNDED, f"activation={name!r}")
    _needless("temperature", options.temperature, 'to="attention" or "transformer"')
    if not dense:
        _needless("kernel_size", options.kernel_size, "dense dictionaries")
        for one in source:
            k = one.weight.shape[-1]
            if k <= 2 * one.padding:
                raise ValueError(
                    f"padding={one.padding} makes codes larger than images, which then cannot carry them: with "
                    f"kernel_size={k} the compiler takes a padding of at most {(k - 1) // 2}"
                )
    if options.kernel_size is not None and options.kernel_size < 2:
        raise ValueError(
            f"kernel_size must be at least 2, or blocks do not shrink the signal; got {options.kernel_size}"
        )
    features = source[0].weight.shape[1]
    if dense and options.size is not None and (min(options.size) < 1 or features % math.prod(options.size)):
        raise ValueError(f"size={options.size} does not fit signals of {features} entries: its pixels must divide them")


def _check_attention(options: Options, source: list[Iteration]) -> None:
    if options.activation != "relu":
        raise ValueError(f'activation={options.activation!r} belongs to to="cnn": to={options.to!r} takes "relu"')
    _needless("scale", options.scale, 'to="cnn"')
    _needless("reach", options.reach, 'to="cnn"')
    _needless("kernel_size", options.kernel_size, 'to="cnn"')
    if source[0].is_dense:
        _needless("size", options.size, 'to="cnn" and convolutional dictionaries')
    elif options.size is None:
        raise ValueError(f"to={options.to!r} attends to the pixels of images of one size: give size=(height, width)")


def _needed(name: str, value: object, needed: bool, what: str) -> None:
    if needed and value is None:
        raise ValueError(f"{what} is approximate here: give {name} (above 0)")
    if not needed:
        _needless(name, value, f"approximations: {what} is exact" if name == "scale" else "tanh, sigmoid and groups")


def _needless(name: str, value: object, what: str) -> None:
    if value is not None:
        raise ValueError(f"{name}={value} has no effect here: it belongs to {what}")
