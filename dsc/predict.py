"""What a trained model says of images: classes with probabilities, and which atoms and groups fired."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from timm.data import create_transform, resolve_model_data_config
from torch import Tensor, nn

from dsc.observe import Observer
from dsc.prox import Prox
from dsc.shrinkage import grouped


@dataclass(frozen=True)
class Fired:
    """What of a sparse layer is active for one image; the strongest come first.

    Attributes:
        layer: the module's name.
        active: entries that are not zero, of `entries`.
        atoms: (channel, largest magnitude over all positions) of every active one.
        groups: (group, largest norm over all positions) likewise; empty for a layer without groups.
    """

    layer: str
    active: int
    entries: int
    atoms: list[tuple[int, float]]
    groups: list[tuple[int, float]]


@dataclass(frozen=True)
class Prediction:
    """Classes (name, probability), the likeliest first and none for a model without; and what fired, by layer."""

    classes: list[tuple[str, float]]
    fired: list[Fired]


def text(prediction: Prediction, top: int) -> str:
    """The prediction in lines: its `top` likeliest classes, then each layer's strongest atoms and groups."""
    classes = ", ".join(f"{name} {100 * p:.1f} %" for name, p in prediction.classes[:top])
    lines = [classes or "no classes"]
    for f in prediction.fired:
        lines.append(f"  {f.layer}: {f.active} of {f.entries} entries active; {_named('atoms', f.atoms, top)}")
        if f.groups:
            lines[-1] += f"; {_named('groups', f.groups, top)}"
    return "\n".join(lines)


def _named(what: str, strongest: list[tuple[int, float]], top: int) -> str:
    shown = ", ".join(f"{k} ({size:.3g})" for k, size in strongest[:top])
    return f"{len(strongest)} {what}" + (f": {shown}" + ", …" * (len(strongest) > top) if shown else "")


def read_images(model: nn.Module, paths: Sequence[str | Path]) -> Tensor:
    """Image files as the model's input (images, channels, height, width), by timm's own transform for it.

    Raises FileNotFoundError, or ValueError for a file that is no image.
    """
    cfg: dict[str, Any] = resolve_model_data_config(model)
    transform = create_transform(**cfg, is_training=False)
    mode = "L" if cfg["input_size"][0] == 1 else "RGB"
    return torch.stack([transform(_open(Path(path)).convert(mode)) for path in paths])


def _open(path: Path) -> Image.Image:
    try:
        image: Image.Image = Image.open(path)
        image.load()
        if image.mode.startswith("I"):  # grey of 16 bits, which Pillow would clip to white
            image = Image.fromarray((np.asarray(image) // 257).astype(np.uint8))
    except FileNotFoundError:
        raise FileNotFoundError(f"there is no image {path}") from None
    except (UnidentifiedImageError, OSError) as error:
        raise ValueError(f"{path} is no image that Pillow can read: {error}") from None
    return image


@torch.no_grad()
def predict(model: nn.Module, images: Tensor) -> list[Prediction]:
    """A prediction an image, for images (images, channels, height, width) as the model's input."""
    # One at a time: where a network cuts images into windows, a code's first dimension does not tell them apart.
    with Observer(model.eval()) as observer:
        return [_predict_one(model, image, observer) for image in images.unsqueeze(1)]


def _predict_one(model: nn.Module, image: Tensor, observer: Observer) -> Prediction:
    output = model(image)
    num_classes = getattr(model, "num_classes", 0)
    probabilities = output.softmax(1)[0] if num_classes else output.new_zeros(0)
    names = _label_names(model, num_classes)
    return Prediction(
        [(names[k], float(probabilities[k])) for k in probabilities.argsort(descending=True).tolist()],
        [_fired(name, z, observer.layers[name].prox) for name, codes in observer.features.items() for z in codes],
    )


def _label_names(model: nn.Module, num_classes: int) -> list[str]:
    names = model.pretrained_cfg.get("label_names")  # type: ignore[union-attr, operator]
    return list(names) if names and len(names) == num_classes else [str(k) for k in range(num_classes)]


def _fired(name: str, z: Tensor, prox: Prox) -> Fired:
    channels = z.movedim(prox.dim, 0).flatten(1)  # (channels, positions)
    groups: list[tuple[int, float]] = []
    if prox.is_grouped:
        groups = _strongest(grouped(channels, prox.group_size_of(len(channels)), 0).norm(dim=1).amax(1))
    return Fired(name, int(z.count_nonzero()), z.numel(), _strongest(channels.abs().amax(1)), groups)


def _strongest(strengths: Tensor) -> list[tuple[int, float]]:
    order = strengths.argsort(descending=True)
    return [(int(k), float(strengths[k])) for k in order if strengths[k] > 0]
