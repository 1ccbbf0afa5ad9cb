"""What a model does on test images, beyond its test figures: its mistakes, its atoms' use, its clusters, its steps."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from sklearn.cluster import KMeans
from sklearn.neighbors import NearestCentroid
from torch import Tensor
from torchmetrics.functional.classification import multiclass_confusion_matrix

from dsc.gallery import image_layer
from dsc.measures import strongest_group
from dsc.metrics import clustering_scores, convergence
from dsc.observe import Observer, sparse_layers
from dsc.prox import Prox
from dsc.recovery import assign
from dsc.tasks import PROBE_IMAGES, Reconstructor, Task

CLUSTERED = 2000  # test images, evenly spaced
RESTARTS = 10  # of k-means, of which the one of least inertia counts
EXAMPLES = 10

Batch = tuple[Tensor, Tensor, Tensor, dict[str, list[Tensor]]]  # images, labels, the model's output, codes by layer


@dataclass(frozen=True)
class Details:
    """Figures of a test set that are lists and matrices; what has no meaning for the model is None.

    Attributes:
        classes: their names.
        confusion: how many test images of class i were taken for class j.
        by_centroid: whether a class is that of the nearest mean code, on validation images, as autoencoders have it.
        examples: the first test image of each of the first classes: its index, label, predicted class, and that
            class's probability where the model gives one.
        units: channels of each sparse layer's code.
        convergence: rate, error and steps by layer, see `dsc.metrics.convergence`.
        use: how often each atom of the dictionary on images is active, a fraction of images and positions.
        groups: fraction of the images of class i in which group j is the strongest.
        group_order: groups in the order in which they fit the classes best.
        clustering: a row a method, with accuracy, nmi and ari.
    """

    classes: list[str]
    confusion: list[list[int]]
    by_centroid: bool
    examples: list[dict[str, Any]]
    units: dict[str, int]
    convergence: dict[str, float]
    use: list[float] | None = None
    groups: list[list[float]] | None = None
    group_order: list[int] | None = None
    clustering: list[dict[str, Any]] | None = None


def gather(task: Task, data: Any, seed: int = 0) -> Details:
    """One pass over the test set, and for autoencoders one over the validation set."""
    model = task.model.eval()
    layers = sparse_layers(model)
    first = image_layer(model, data.in_chans * data.image_size**2)
    labels, outputs, codes, counts, units = [], [], [], [], {}
    for _, y, output, features in batches(task, data, "test"):
        labels.append(y)
        outputs.append(output if not isinstance(task, Reconstructor) else y)
        units = {name: z[-1].shape[layers[name].prox.dim] for name, z in features.items()}
        if first:
            counts.append(len(y) * atom_use(features[first[0]][-1], layers[first[0]].prox.dim))
        if isinstance(task, Reconstructor):
            codes.append(list(features.values())[-1][-1])
    y = torch.cat(labels)
    probe = data.probe(PROBE_IMAGES).to(task.device)
    figures: dict[str, Any] = dict(
        classes=[str(name) for name in data.class_names],
        units=units,
        convergence=convergence(model, probe.contiguous(memory_format=task.memory_format)),
        use=(torch.stack(counts).sum(0) / len(y)).tolist() if counts else None,
        by_centroid=isinstance(task, Reconstructor),
    )
    if isinstance(task, Reconstructor):
        z, layer = torch.cat(codes), list(layers.values())[-1]
        predicted, probability = nearest_class(task, data, z), None
        figures |= clusters(z, y, layer.prox, seed)
    else:
        probability = torch.cat(outputs).softmax(1)
        predicted = probability.argmax(1)
    confusion = multiclass_confusion_matrix(predicted, y, len(data.class_names))
    examples = pick(y, predicted, probability, data.class_names)
    return Details(confusion=confusion.tolist(), examples=examples, **figures)


def batches(task: Task, data: Any, part: str) -> Iterator[Batch]:
    """Batches of the test ("test") or validation ("val") set with what the model makes of them, on the CPU."""
    data.prepare_data()
    data.setup()
    with Observer(task.model.eval()) as observer, torch.no_grad():
        for raw in data.test_dataloader() if part == "test" else data.val_dataloader():
            images, labels = data.on_after_batch_transfer([t.to(task.device) for t in raw], 0)
            output = task(images)
            codes = {name: [z.float().cpu() for z in seen] for name, seen in observer.features.items()}
            yield images.float().cpu(), labels.cpu(), output.float().cpu(), codes


def atom_use(z: Tensor, dim: int) -> Tensor:
    """Fraction of signals and positions in which each channel along `dim` is not zero, (channels,)."""
    return (z != 0).float().movedim(dim, 0).flatten(1).mean(1)


def nearest_class(task: Task, data: Any, z: Tensor) -> Tensor:
    """Class whose mean code on validation images is nearest to each code of (N, …), int64 (N,)."""
    seen = [(list(codes.values())[-1][-1], y) for _, y, _, codes in batches(task, data, "val")]
    codes, y = torch.cat([c for c, _ in seen]).flatten(1).numpy(), torch.cat([y for _, y in seen]).numpy()
    if not np.ptp(codes, axis=0).any():  # a dead code is as near to every class; scikit-learn refuses it
        return torch.full((len(z),), int(y.min()))
    fitted = NearestCentroid().fit(codes, y)
    return torch.from_numpy(np.asarray(fitted.predict(z.flatten(1).numpy()))).long()


def clusters(z: Tensor, y: Tensor, prox: Prox, seed: int) -> dict[str, Any]:
    """`clustering`, and of codes in groups `groups` and `group_order`, of `Details`; codes (N, …), classes (N,)."""
    classes = int(y.max()) + 1
    few = torch.linspace(0, len(z) - 1, min(CLUSTERED, len(z))).round().long()
    found = KMeans(classes, n_init=RESTARTS, random_state=seed).fit_predict(z[few].flatten(1).numpy())
    rows = [_scores("k-means of the codes", torch.from_numpy(found).long(), y[few])]
    figures: dict[str, Any] = {"clustering": rows}
    if prox.is_grouped:
        units = z.shape[prox.dim]
        size = prox.group_size_of(units)
        strongest = strongest_group(z, size, prox.dim)
        shares = torch.zeros(classes, units // size).index_put_((y, strongest), torch.ones(len(y)), True)
        shares = shares / shares.sum(1, keepdim=True).clamp_min(1)
        rows.append(_scores("strongest group", strongest, y))
        figures |= {"groups": shares.tolist(), "group_order": _fitting_order(shares)}
    return figures


def _scores(method: str, found: Tensor, y: Tensor) -> dict[str, Any]:
    return {"method": method, "images": len(y), **clustering_scores(found, y)}


def _fitting_order(shares: Tensor) -> list[int]:
    # The diagonal first, as far as there are groups for it; then what is left, the most used first.
    classes, groups = shares.shape
    first = assign(shares).tolist() if groups >= classes else assign(shares.mT).argsort().tolist()
    return first + [g for g in shares.sum(0).argsort(descending=True).tolist() if g not in first]


def pick(y: Tensor, predicted: Tensor, probability: Tensor | None, names: Any) -> list[dict[str, Any]]:
    """`examples` of `Details`."""
    chosen = sorted((y == c).nonzero()[0].item() for c in y.unique()[:EXAMPLES])
    chosen.sort(key=lambda i: y[int(i)].item())
    return [
        {
            "index": int(i),
            "label": str(names[int(y[int(i)])]),
            "predicted": str(names[int(predicted[int(i)])]),
            "probability": None if probability is None else float(probability[int(i)].max()),
        }
        for i in chosen
    ]
