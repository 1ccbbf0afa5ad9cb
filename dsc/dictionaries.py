"""Dictionaries D: synthesize ``Dz``, analyze ``Dᵀx``, a certified Lipschitz constant, atoms and coherence.

Weights are laid out as the `nn.Linear` or `nn.Conv2d` that computes ``Dᵀx``, one atom a row, so a plain layer's
weights are a dictionary and the other way round.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrize import is_parametrized

from dsc import measures, spectra

SAFETY = 1.05  # a power iteration approaches L from below; the margin covers what is missing
GradientStep = Callable[[Tensor, Tensor], Callable[[Tensor], Tensor]]


class Dictionary(nn.Module):
    """A linear map D from codes to signals, with ``weight`` of shape (atoms, …) holding its atoms.

    `curvature()` is what step sizes are made of. While training it follows ``L = ‖D‖²`` by one power iteration a
    call (weights move little between steps) and passes gradients to the weights; in evaluation it is the
    certified bound `lipschitz()`, computed once after the weights changed (a compiled program uses the bound as it was
    when evaluation began or weights were loaded: after any other change call `remeasure()`).

    A subclass defines `synthesize`, `analyze` and `lipschitz`. It may define a faster `gradient_step`, and the
    `_symbol` that power iterations need; without that, training computes `lipschitz()` itself at each call.
    """

    weight: nn.Parameter
    bound: Tensor
    probe: Tensor

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)
        self.normalize_()
        with torch.no_grad():
            symbol = self._symbol()
        if symbol is not None:
            real = symbol[0]
            probe = torch.randn(real.shape[0], real.shape[2], 2, dtype=weight.dtype)
            self.register_buffer("probe", probe)  # a complex vector a frequency, as (real, imaginary)
        self.register_buffer("bound", torch.ones(()), persistent=False)
        # Whether evaluation mode computes the bound ahead, so that a compiled program finds it: it costs seconds for a
        # large dictionary, and layers whose step is a number never ask for it.
        self.bound_ahead = False
        self._measured: tuple[Tensor, tuple[int, int, torch.dtype]] | None = None
        self.register_load_state_dict_post_hook(_measure_loaded)
        self._settle_probe()

    @property
    def num_atoms(self) -> int:
        """Number of atoms (channels of the code)."""
        return self.weight.shape[0]

    def synthesize(self, z: Tensor, size: Sequence[int] | None = None) -> Tensor:
        """Signal ``Dz``; `size` is the signal's spatial size (dense dictionaries ignore it).

        Raises ValueError for a shape that is not that of codes.
        """
        raise TypeError(f"{type(self).__name__} defines no synthesis")

    def analyze(self, x: Tensor) -> Tensor:
        """Correlations ``Dᵀx``, the exact adjoint of `synthesize`.

        Raises ValueError for a shape that is not that of signals.
        """
        raise TypeError(f"{type(self).__name__} defines no analysis")

    def drive(self, x: Tensor, step: float | Tensor, bias: Tensor | None = None, dim: int = -1) -> Tensor:
        """``s(Dᵀx + b)``, where s is one number and b a value an atom; atoms lie along `dim` of the code."""
        correlations = self.analyze(x)
        if bias is not None:
            correlations = correlations + bias.reshape(-1, *[1] * (correlations.ndim - 1 - dim % correlations.ndim))
        return step * correlations

    def gradient_step(self, step: float | Tensor, signals: Tensor, bias: Tensor | None = None) -> GradientStep:
        """The function ``(x, s(Dᵀx + b)) ↦ (z ↦ z + s(Dᵀ(x − Dz) + b))``; what its uses share is computed once.

        `step` is s, one number; `signals` are those to be coded, of which the x to come may be parts; `bias` is b, a
        value an atom.
        """
        return lambda x, driven: lambda z: z + driven - step * self.analyze(self.synthesize(z, x.shape[-2:]))

    def lipschitz(self) -> Tensor:
        """Upper bound of ``‖D‖²``, the Lipschitz constant of the gradient of ``½‖x − Dz‖²``."""
        raise TypeError(f"{type(self).__name__} defines no Lipschitz bound")

    def curvature(self) -> Tensor:
        """L for a step size: a warm estimate with gradient while training, the certified bound otherwise."""
        # A transform of torch.func allows no write to a buffer.
        frozen = not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active()
        if not self.training:
            if frozen and not self._is_current():
                return self._certified()
            self._refresh()
            return self.bound
        symbol = self._symbol()
        if symbol is None:
            return self.lipschitz()
        with torch.no_grad():
            probe = spectra.power_iteration(*symbol, self.probe)
            if not frozen:
                self.probe.copy_(probe)
        return SAFETY * spectra.apply(*symbol, probe).square().sum((1, 2)).max()

    @torch.no_grad()
    def _certified(self) -> Tensor:
        return self.lipschitz() * (1 + 4 * torch.finfo(self.weight.dtype).eps)

    def _symbol(self) -> tuple[Tensor, Tensor | None] | None:
        """Real and imaginary parts (None: 0) of the matrices D splits into, if any: (frequencies, atoms, channels)."""
        return None

    @torch.no_grad()
    def _settle_probe(self) -> None:
        symbol = None if self.weight.is_meta else self._symbol()
        if symbol is not None:
            for _ in range(20):
                self.probe.copy_(spectra.power_iteration(*symbol, self.probe))

    @torch.no_grad()
    def _refresh(self) -> None:
        # When compiled, `train` and loading weights refreshed the bound before; meta weights have none.
        if torch.compiler.is_compiling() or self.weight.is_meta:
            return
        if self.weight.is_inference() or not self._is_current():
            self.bound.copy_(self._certified())
            self._measured = None if self.weight.is_inference() else (self.weight, self._state())

    def _is_current(self) -> bool:
        return self._measured is not None and self._measured[0] is self.weight and self._measured[1] == self._state()

    def _state(self) -> tuple[int, int, torch.dtype]:
        # The id beside the tensor itself: a deep copy takes both along, and only the id then tells them apart.
        return id(self.weight), self.weight._version, self.weight.dtype

    def train(self, mode: bool = True) -> "Dictionary":
        super().train(mode)
        if mode:
            self._measured = None  # whatever training does to the weights, evaluation measures them anew
        self._evaluated()
        return self

    def remeasure(self) -> None:
        """Compute the bound anew, after weights were exchanged in a way that torch does not count (``.data``)."""
        self._measured = None
        self._evaluated()

    def _evaluated(self) -> None:
        if self.bound_ahead and not self.training:
            self._refresh()

    @torch.no_grad()
    def normalize_(self) -> "Dictionary":
        """Scale every atom to unit norm, in place. Raises ValueError for a zero atom or a parametrized weight."""
        if is_parametrized(self, "weight"):
            raise ValueError("the weight is parametrized (torch.nn.utils.parametrize): its atoms cannot be set")
        norms = self.weight.flatten(1).norm(dim=1)
        if (norms == 0).any():
            raise ValueError(f"atom {int(norms.argmin())} is zero and cannot be normalised")
        self.weight.div_(norms.reshape(-1, *[1] * (self.weight.ndim - 1)))
        return self

    def coherence(self) -> Tensor:
        """Largest absolute cosine between two atoms (translates of an atom are not compared)."""
        return measures.coherence(self.weight.flatten(1))

    def block_coherence(self, group_size: int) -> Tensor:
        """``max_{g≠h} ‖A_gᵀA_h‖₂/d`` of unit-norm atoms in groups of d consecutive ones (arXiv 2102.07003)."""
        return measures.block_coherence(self.weight.flatten(1), group_size)


class DenseDictionary(Dictionary):
    """``D ∈ R^{features × atoms}`` acting on the last dimension: signals (…, features), codes (…, atoms)."""

    def __init__(self, num_features: int, num_atoms: int) -> None:
        _positive(num_features=num_features, num_atoms=num_atoms)
        self.num_features = num_features
        super().__init__(torch.randn(num_atoms, num_features))

    @classmethod
    def from_atoms(cls, atoms: Tensor) -> Self:
        """The dictionary of these atoms, (atoms, features), copied as they are, of any norm.

        The global random stream stays where it is. Raises ValueError for another shape.
        """
        if atoms.ndim != 2:
            raise ValueError(f"atoms must be (atoms, features), atoms as rows, got shape {tuple(atoms.shape)}")
        with torch.random.fork_rng(devices=[]):
            dictionary = cls(atoms.shape[1], atoms.shape[0]).to(atoms)
        with torch.no_grad():
            dictionary.weight.copy_(atoms)
        dictionary._settle_probe()
        return dictionary

    def _symbol(self) -> tuple[Tensor, None]:
        return self.weight.unsqueeze(0), None

    def synthesize(self, z: Tensor, size: Sequence[int] | None = None) -> Tensor:
        _check_shape("codes", z, -1, self.num_atoms)
        return z @ self.weight

    def analyze(self, x: Tensor) -> Tensor:
        _check_shape("signals", x, -1, self.num_features)
        return F.linear(x, self.weight)

    def drive(self, x: Tensor, step: float | Tensor, bias: Tensor | None = None, dim: int = -1) -> Tensor:
        _check_shape("signals", x, -1, self.num_features)
        return F.linear(x, *_scaled(step, self.weight, bias))

    def gram(self) -> Tensor:
        """``DᵀD``, shape (atoms, atoms)."""
        return self.weight @ self.weight.mT

    def gradient_step(self, step: float | Tensor, signals: Tensor, bias: Tensor | None = None) -> GradientStep:
        weight = self.weight
        if self.gram_is_cheaper(signals):
            turn = torch.eye(self.num_atoms, dtype=weight.dtype, device=weight.device) - step * self.gram()
            return lambda x, driven: lambda z: torch.addmm(_rows(driven), _rows(z), turn).view(z.shape)
        scaled, shift = _scaled(step, weight, bias)
        back, negative = scaled.mT, -weight  # so that no gradient as large as the code has to change its sign

        def by_residual(x: Tensor, z: Tensor) -> Tensor:
            residual = torch.addmm(_rows(x), _rows(z), negative)
            moved = torch.addmm(_rows(z), residual, back).view(z.shape)
            return moved if shift is None else moved.add_(shift)

        return lambda x, driven: partial(by_residual, x)

    def gram_is_cheaper(self, signals: Tensor) -> bool:
        """Whether ``sDᵀx + (I − sDᵀD)z`` costs no more than ``z + sDᵀ(x − Dz)`` even if DᵀD serves a single step.

        Multiplications of that step are counted. A compiled program serves any batch: there it is taken to be large.
        """
        atoms, features = self.weight.shape
        if torch.compiler.is_compiling():
            return atoms <= features
        rows = signals.shape[:-1].numel()
        return atoms**2 * features + rows * atoms**2 <= rows * 2 * atoms * features

    def lipschitz(self) -> Tensor:
        weight = self.weight.double()
        small = weight.mT @ weight if self.num_atoms > self.num_features else weight @ weight.mT
        return torch.linalg.eigvalsh(small)[-1].to(self.weight.dtype)

    def atoms(self, in_chans: int = 1) -> Tensor:
        """Atoms as square images, (atoms, in_chans, size, size). Raises ValueError where they are not square."""
        size = math.isqrt(self.num_features // in_chans)
        if in_chans * size * size != self.num_features:
            raise ValueError(f"{self.num_features} features are no {in_chans}-channel square image")
        return self.weight.detach().reshape(-1, in_chans, size, size)

    def extra_repr(self) -> str:
        return f"features={self.num_features}, atoms={self.num_atoms}"


class ConvDictionary(Dictionary):
    """Translates of small atoms: ``Dᵀx`` is `conv2d`, ``Dz`` its transpose; images (batch, channels, h, w).

    Any image size at least the kernel's; `stride` and zero `padding` are `nn.Conv2d`'s.
    """

    def __init__(self, in_channels: int, num_atoms: int, kernel_size: int, stride: int = 1, padding: int = 0) -> None:
        _positive(in_channels=in_channels, num_atoms=num_atoms, kernel_size=kernel_size, stride=stride)
        if not 0 <= padding < kernel_size:
            raise ValueError(f"padding must be in [0, kernel_size={kernel_size}), got {padding}")
        self.kernel_size, self.stride, self.padding = kernel_size, stride, padding
        super().__init__(torch.randn(num_atoms, in_channels, kernel_size, kernel_size))

    def synthesize(self, z: Tensor, size: Sequence[int] | None = None) -> Tensor:
        _check_shape("codes", z, -3, self.num_atoms)
        return self._synthesize(z, size, self._kernel())

    def analyze(self, x: Tensor) -> Tensor:
        _check_shape("signals", x, -3, self.weight.shape[1])
        return self._analyze(x, self._kernel())

    def drive(self, x: Tensor, step: float | Tensor, bias: Tensor | None = None, dim: int = -1) -> Tensor:
        _check_shape("signals", x, -3, self.weight.shape[1])
        return self._analyze(x, *_scaled(step, self._kernel(), bias))

    def gradient_step(self, step: float | Tensor, signals: Tensor, bias: Tensor | None = None) -> GradientStep:
        kernel = self._kernel()
        (scaled, shift), negative = _scaled(step, kernel, bias), -kernel

        def move(x: Tensor, z: Tensor) -> Tensor:
            return self._analyze(x + self._synthesize(z, x.shape[-2:], negative), scaled, shift).add_(z)

        def move_phases(phases: Tensor, inside: Tensor, z: Tensor) -> Tensor:
            residual = torch.addcmul(phases, inside, F.conv_transpose2d(z, negative))
            return F.conv2d(residual, scaled, shift).add_(z)

        if self.by_phases:  # the residual stays in phases: no step turns it into an image and back
            return lambda x, driven: partial(move_phases, self._phases(x), self._phases(x.new_ones(x.shape[-3:])))
        return lambda x, driven: partial(move, x)

    def signal_side(self, side: int) -> int:
        """Least height (or width) of a signal whose code is of that height."""
        return (side - 1) * self.stride + self.kernel_size - 2 * self.padding

    def code_side(self, side: int) -> int:
        """Height (or width) of the code of a signal of that height, as of `nn.Conv2d`."""
        return (side + 2 * self.padding - self.kernel_size) // self.stride + 1

    def _kernel(self) -> Tensor:
        return self.polyphase() if self.by_phases else self.weight

    def _synthesize(self, z: Tensor, size: Sequence[int] | None, kernel: Tensor) -> Tensor:
        reached = [self.signal_side(n) for n in z.shape[-2:]]
        height, width = size or reached
        rows, columns = height - reached[0], width - reached[1]
        # A strided convolution drops up to stride − 1 pixels at the far edge: its adjoint puts zeros there.
        if not (0 <= rows < self.stride and 0 <= columns < self.stride):
            raise ValueError(
                f"a code of size {tuple(z.shape[-2:])} does not come from signals of size {tuple(size or ())}"
            )
        if self.by_phases:
            x = F.pixel_shuffle(F.conv_transpose2d(z, kernel), self.stride)
            right, below = width + self.padding - x.shape[-1], height + self.padding - x.shape[-2]
            return F.pad(x, (-self.padding, right, -self.padding, below))
        return F.conv_transpose2d(z, kernel, stride=self.stride, padding=self.padding, output_padding=(rows, columns))

    def _analyze(self, x: Tensor, kernel: Tensor, bias: Tensor | None = None) -> Tensor:
        if min(x.shape[-2:]) + 2 * self.padding < self.kernel_size:
            raise ValueError(
                f"image of {x.shape[-2]}×{x.shape[-1]} pixels is too small: with kernel_size={self.kernel_size} "
                f"and padding={self.padding} it needs at least {self.kernel_size - 2 * self.padding} a side"
            )
        if not self.by_phases:
            return F.conv2d(x, kernel, bias, self.stride, self.padding)
        return F.conv2d(self._phases(x), kernel, bias)

    def _phases(self, x: Tensor) -> Tensor:
        reach = -(-self.kernel_size // self.stride) - 1  # of the last atom, in strides: pixels beyond it are cut off
        far = [(self.code_side(n) + reach) * self.stride - n - self.padding for n in x.shape[-2:]]
        return F.pixel_unshuffle(F.pad(x, (self.padding, far[1], self.padding, far[0])), self.stride)

    @property
    def by_phases(self) -> bool:
        """Whether to compute at stride 1 on image phases: the same map, several times faster for few channels."""
        return self.stride > 1 and self.weight.shape[1] <= 4

    def polyphase(self) -> Tensor:
        """The same map at stride 1 on `pixel_unshuffle`d images: (atoms, channels·stride², k', k')."""
        if self.stride == 1:
            return self.weight
        grown = -self.kernel_size % self.stride
        return F.pixel_unshuffle(F.pad(self.weight, (0, grown, 0, grown)), self.stride)

    def lipschitz(self) -> Tensor:
        """``max_ω λ_max(Ŵ(ω)ᴴŴ(ω))``, see `dsc.spectra.squared_norm_bound`.

        Zero-padded or cropped images of any size have a smaller norm than the infinite one that this symbol describes.
        """
        return spectra.squared_norm_bound(self.polyphase()).to(self.weight.dtype)

    def _symbol(self) -> tuple[Tensor, Tensor]:
        return spectra.sampled_symbol(self.polyphase())

    def atoms(self) -> Tensor:
        """Atoms as images, (atoms, channels, kernel_size, kernel_size)."""
        return self.weight.detach()

    def extra_repr(self) -> str:
        atoms, channels = self.weight.shape[:2]
        return f"{channels}, {atoms}, kernel_size={self.kernel_size}, stride={self.stride}, padding={self.padding}"


def _measure_loaded(dictionary: Dictionary, keys: object) -> None:  # by name, so that layers can be pickled
    dictionary._evaluated()


def _scaled(step: float | Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
    # The step goes into the map, which is smaller than what comes out of it.
    if isinstance(step, float) and step == 1:
        return weight, bias
    return step * weight, None if bias is None else step * bias


def _rows(z: Tensor) -> Tensor:
    return z.reshape(-1, z.shape[-1])


def _check_shape(what: str, values: Tensor, dim: int, expected: int) -> None:
    if values.ndim < -dim or values.shape[dim] != expected:
        raise ValueError(f"{what} of shape {tuple(values.shape)} do not fit: expected {expected} in dimension {dim}")


def _positive(**values: int) -> None:
    for name, value in values.items():
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
