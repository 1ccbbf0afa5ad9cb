"""Tensors for pictures of a model at work: images, their codes, and what the steps of its first layer make of them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dsc.dictionaries import ConvDictionary, DenseDictionary
from dsc.layers import SparseCoding
from dsc.metrics import solving_layers
from dsc.observe import Observer, sparse_layers
from dsc.tasks import Reconstructor, Task

Show = Callable[[Tensor], Tensor]  # from what the model sees to values in [0, 1]
DEPTHS = (1, 2, 4, 8, 16, 32)


@dataclass(frozen=True)
class Film:
    """Reconstructions of images by the code after some steps of the layer that codes them.

    Attributes:
        layer: its name.
        own: how many steps the model takes.
        depths: after how many steps each frame is.
        frames: (len(depths), images, channels, height, width), with values as those of `signals`.
        signals: what the layer codes, (images, channels, height, width): the images in [0, 1], or where the model
            normalises each image first, that, scaled to [0, 1].
        errors: ``‖x − x̂‖²/‖x‖²`` of the layer's own signals, (len(depths), images).
    """

    layer: str
    own: int
    depths: list[int]
    frames: Tensor
    signals: Tensor
    errors: Tensor


@dataclass(frozen=True)
class Gallery:
    """Images in [0, 1], (images, channels, height, width), and if the model has them their codes and the film.

    `codes` are those of `layer`, (images, atoms, *positions), in groups of `group_size`.
    """

    images: Tensor
    layer: str | None = None
    codes: Tensor | None = None
    group_size: int = 1
    film: Film | None = None


def image_layer(model: nn.Module, pixels: int) -> tuple[str, SparseCoding] | None:
    """Name and layer of the first dictionary that lives on images of so many values, or None."""
    for name, layer in sparse_layers(model).items():
        if layer.coder is None:
            continue
        dictionary = layer.coder.dictionary
        on_maps = isinstance(dictionary, ConvDictionary) and dictionary.weight.shape[1] in (1, 3)
        fits = on_maps or (isinstance(dictionary, DenseDictionary) and dictionary.num_features == pixels)
        if fits and _comes_first(layer.coder, model):
            return name, layer.coder
    return None


def _comes_first(coder: SparseCoding, model: nn.Module) -> bool:
    # Behind other weights it codes features, which may have as many values as the images: tokens of a transformer.
    for module in model.modules():
        if module is coder or any(p.ndim > 1 for p in module.parameters(recurse=False)):
            return module is coder
    return False


def gallery(task: Task, data: Any, indices: Sequence[int]) -> Gallery:
    """The test images of those indices; an autoencoder's deepest code, else the one of the layer on images."""
    x = inputs(data, indices).to(task.device)
    with torch.no_grad(), Observer(task.model.eval()) as observer:
        task(x)
    layers = observer.layers
    mean, std = (torch.tensor(v, device=x.device).view(-1, 1, 1) for v in (data.mean, data.std))

    def show(values: Tensor) -> Tensor:
        return values * std + mean if data.normalize else values

    if not layers:
        return Gallery(show(x).cpu())
    first = image_layer(task.model, x[0].numel())
    shown = list(layers)[-1] if isinstance(task, Reconstructor) else first[0] if first else next(iter(layers))
    codes = observer.features[shown][-1].movedim(layers[shown].prox.dim, 1)
    film = make_film(task.model, *first, observer.inputs, x, show) if first else None
    group_size = layers[shown].prox.group_size_of(codes.shape[1])
    return Gallery(show(x).cpu(), shown, codes.float().cpu(), group_size, film)


def inputs(data: Any, indices: Sequence[int]) -> Tensor:
    """Test images as the model sees them, (len(indices), channels, height, width)."""
    data.prepare_data()
    data.setup()
    found: dict[int, Tensor] = {}
    for raw in data.test_dataloader():
        images, _ = data.on_after_batch_transfer(raw, 0)
        found |= {int(i): image for i, image in zip(raw[2], images, strict=True) if int(i) in indices}
        if len(found) == len(set(indices)):
            break
    return torch.stack([found[i] for i in indices]).float()


@torch.no_grad()
def make_film(
    model: nn.Module, name: str, coder: SparseCoding, seen: dict[str, list[Tensor]], x: Tensor, show: Show
) -> Film | None:
    """The film of that layer, by its own steps with its input frozen; None for a plain layer of one step."""
    signal, own = seen[name][-1], coder.solver.steps
    solves = name in solving_layers(model)
    if own == 1 and not solves:
        return None
    depths = sorted({own, *DEPTHS}) if solves else [*range(1, own + 1)]
    codes = coder.trace(signal, depths[-1]).codes
    frames = torch.stack([coder.decode(codes[k - 1], signal.shape[-2:]) for k in depths])
    errors = (frames - signal).flatten(2).square().sum(2) / signal.flatten(1).square().sum(1).clamp_min(1e-12)
    frames, signals = _shown(frames.reshape(-1, *x.shape), signal.reshape(x.shape), x, show)
    return Film(name, own, depths, frames.cpu(), signals.cpu(), errors.cpu())


def _shown(frames: Tensor, signal: Tensor, x: Tensor, show: Show) -> tuple[Tensor, Tensor]:
    """Frames and signals with values in [0, 1] where those of the images are."""
    shift = x - signal
    if torch.allclose(shift, shift[:1].expand_as(shift), atol=1e-5):  # the image itself, perhaps less a learned bias
        return show(frames + shift), show(x)
    low, high = signal.amin((1, 2, 3), keepdim=True), signal.amax((1, 2, 3), keepdim=True)
    scale = (high - low).clamp_min(1e-12)
    return (frames - low) / scale, (signal - low) / scale
