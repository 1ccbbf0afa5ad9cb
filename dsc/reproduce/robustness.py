"""What noise and an attack leave of a classifier's accuracy, and λ chosen for each image by its reconstruction.

Images are pixels in [0, 1], (images, channels, height, width); classifiers take these (see `Standardized`).
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.transforms.v2.functional import normalize

from dsc.observe import Observer, sparse_layers
from dsc.prox import Prox, inverse_softplus

Noise = Callable[[Tensor, float, torch.Generator], Tensor]
BATCH = 1000
# The weakest, middle and strongest of five levels, for small images of few pixels' detail and for others
# (Hendrycks and Dietterich 2019: CIFAR-10-C and ImageNet-C).
MILD = {
    "gaussian": (0.04, 0.08, 0.1),
    "shot": (500, 100, 50),
    "speckle": (0.06, 0.12, 0.2),
    "impulse": (0.01, 0.03, 0.07),
}
STRONG = {
    "gaussian": (0.08, 0.18, 0.38),
    "shot": (60, 12, 3),
    "speckle": (0.15, 0.35, 0.6),
    "impulse": (0.03, 0.09, 0.27),
}


def gaussian(x: Tensor, sigma: float, generator: torch.Generator) -> Tensor:
    """``x + σn``, n standard normal, cut off at 0 and 1."""
    return (x + sigma * torch.randn(x.shape, generator=generator)).clamp(0, 1)


def shot(x: Tensor, photons: float, generator: torch.Generator) -> Tensor:
    """``Poisson(cx)/c`` for c photons a white pixel, cut off at 1."""
    return (torch.poisson(photons * x, generator) / photons).clamp(max=1)


def speckle(x: Tensor, sigma: float, generator: torch.Generator) -> Tensor:
    """``x + σxn``, n standard normal, cut off at 0 and 1."""
    return (x + sigma * x * torch.randn(x.shape, generator=generator)).clamp(0, 1)


def impulse(x: Tensor, fraction: float, generator: torch.Generator) -> Tensor:
    """That fraction of the values set to 0 or 1, with equal chances."""
    hit, white = (torch.rand(x.shape, generator=generator) < p for p in (fraction, 0.5))
    return torch.where(hit, white.to(x.dtype), x)


NOISES: dict[str, Noise] = {"gaussian": gaussian, "shot": shot, "speckle": speckle, "impulse": impulse}


class Standardized(nn.Module):
    """A classifier of pixels in [0, 1], by one that takes images of mean 0 and standard deviation 1."""

    def __init__(self, model: nn.Module, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self.model, self.mean, self.std = model, list(mean), list(std)

    def forward(self, x: Tensor) -> Tensor:
        return self.model(normalize(x, self.mean, self.std))


@torch.no_grad()
def accuracy(model: Callable[[Tensor], Tensor], x: Tensor, labels: Tensor) -> float:
    """Fraction of images in their class, in [0, 1]."""
    return float(torch.cat([model(part).argmax(1) for part in x.split(BATCH)]).eq(labels).float().mean())


def pgd(model: nn.Module, x: Tensor, labels: Tensor, radius: float, steps: int, generator: torch.Generator) -> Tensor:
    """Images within `radius` of x in the largest norm that raise the cross entropy, from a random start.

    ``x ← Π(x + (radius/4) sign ∇loss)``, Π onto that cube and onto [0, 1] (Madry et al. 2018). The model's parameters
    gather no gradient.
    """
    start = (2 * torch.rand(x.shape, generator=generator) - 1) * radius
    attacked = (x + start).clamp(0, 1)
    for _ in range(steps):
        attacked.requires_grad_()
        (slope,) = torch.autograd.grad(F.cross_entropy(model(attacked), labels), attacked)
        moved = attacked.detach() + radius / 4 * slope.sign()
        attacked = torch.clamp(moved, x - radius, x + radius).clamp(0, 1)
    return attacked


@contextmanager
def threshold_times(prox: Prox, factor: float) -> Iterator[None]:
    """λ, a learned one, times a factor."""
    kept = prox.raw_threshold.data
    prox.raw_threshold.data = inverse_softplus(factor * F.softplus(kept))
    try:
        yield
    finally:
        prox.raw_threshold.data = kept


class ThresholdByResidual:
    """The first layer's λ for each image, chosen by how far its reconstruction is from the image alone.

    Images with noise of known levels tell which factor of λ serves each level best, and which residual
    ``‖x − Dz‖²/n`` of λ as learned belongs to it. An image then takes the factor of the level whose residual is nearest
    to its own: neither its noise nor its class is known. After Dai et al. (SDNet, 2022), who fit a line instead.

    Args:
        model: of images as `x`, its first sparse layer a `SparseCoding` with a learned λ.
        levels: images (N, …) with noise, of several levels; a batch each.
        labels: their classes, the same at every level.
        factors: to choose from.
    """

    def __init__(self, model: nn.Module, levels: Sequence[Tensor], labels: Tensor, factors: Sequence[float]) -> None:
        self.model = model
        coders = ((name, layer.coder) for name, layer in sparse_layers(model).items())
        self.name, self.coder = next((name, coder) for name, coder in coders if coder is not None)
        self.residuals = torch.stack([self.residual(x).mean() for x in levels])
        self.factors = [self._best(factors, x, labels) for x in levels]

    @torch.no_grad()
    def residual(self, x: Tensor) -> Tensor:
        """Mean squared error of each image's reconstruction from its code in the first layer, (images,)."""
        with Observer(self.model) as observer:
            self.model(x)
        signal, code = observer.inputs[self.name][0], observer.features[self.name][0]
        return (signal - self.coder.decode(code, signal.shape[-2:])).square().flatten(1).mean(1)

    @torch.no_grad()
    def __call__(self, x: Tensor) -> Tensor:
        nearest = (self.residual(x)[:, None] - self.residuals).abs().argmin(1)
        chosen = torch.tensor(self.factors)[nearest]
        factors = chosen.unique().tolist()
        rows = [(chosen == factor).nonzero().squeeze(1) for factor in factors]
        logits = torch.cat([self._logits(x[those], factor) for those, factor in zip(rows, factors, strict=True)])
        return logits[torch.cat(rows).argsort()]

    def _best(self, factors: Sequence[float], x: Tensor, labels: Tensor) -> float:
        return max(factors, key=lambda factor: accuracy(partial(self._logits, factor=factor), x, labels))

    def _logits(self, x: Tensor, factor: float) -> Tensor:
        with threshold_times(self.coder.prox, factor):
            logits: Tensor = self.model(x)
            return logits
