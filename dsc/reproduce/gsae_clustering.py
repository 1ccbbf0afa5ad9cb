"""Digits found without labels as well as can be: pooled group norms of a convolutional autoencoder, and their graph.

Four steps, none of which sees a label. Images are set upright by their second moments. A convolutional autoencoder
with group-sparse codes, trained to reconstruct, gives each group a norm at each position. Norms are averaged over
windows, scaled to sum 1 and compared by Hellinger's distance. The graph of nearest neighbours under it is cut: of
several spectral embeddings, the clusters that cut the fewest edges count. The same figure, which needs no label,
compares settings.

Beside it the same of raw pixels, of images as they are, and of codes without groups: what each step adds.
"""

import time
from argparse import Namespace
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any, cast

import torch
from matplotlib.figure import Figure
from scipy.sparse import csr_array
from sklearn.manifold import spectral_embedding
from sklearn.neighbors import kneighbors_graph
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from dsc.data import ImageData, IndexBatches
from dsc.metrics import clustering_scores
from dsc.models.autoencoder import ConvSparseAutoencoder
from dsc.report import table
from dsc.reproduce import gsae_mnist
from dsc.reproduce.clustering import KMEANS, SPECTRAL, kmeans, shares, spectral
from dsc.reproduce.results import PALETTE, Results, spread
from dsc.shrinkage import grouped
from dsc.tasks import Reconstructor
from dsc.trainers import quiet_trainer

BEST = "conv group norms, upright"
LEAST_CUT = "least cut"
METHODS = (KMEANS, SPECTRAL, LEAST_CUT)


@dataclass(frozen=True)
class Settings:
    """The autoencoder, its pooling and its graph."""

    num_atoms: int = 64
    group_size: int = 4
    kernel_size: int = 9
    stride: int = 2
    steps: int = 4
    penalty: float = 1.0  # λ
    images: int = 6000  # the first so many of the training images
    epochs: int = 1
    batch_size: int = 16
    rate: float = 1e-2  # of Adam, at its highest
    window: int = 5  # positions of the code, a side
    window_stride: int = 3
    neighbours: int = 10


FAST = Settings(images=1000)


def run(args: Namespace, progress: Callable[[str], None]) -> Results:
    """Every input and method, `args.seeds` times."""
    settings = FAST if args.fast else Settings()
    images = gsae_mnist.load(gsae_mnist.FAST if args.fast else gsae_mnist.Settings())
    found: list[dict[str, Any]] = []
    for seed in range(args.seeds):
        for row in ablation(settings, images.train, images.test, images.labels, images.facts, seed):
            found.append(row | {"seed": seed})
            progress(f"seed {seed}: {row['input']}, {row['method']}, {100 * row['accuracy']:.2f} %")
    figures = {"settings": asdict(settings), "fast": args.fast, "best": BEST, "clusters": found}
    return Results(figures, markdown(found), draw(found))


def upright(images: Tensor) -> Tensor:
    """Images (N, C, H, W) sheared and shifted so that their mass m is centred and has no slant.

    The value at (x, y), counted from the middle of the image, is the one that was at ``(x̄ + x + ay, ȳ + y)``, where
    ``a = Σm(x − x̄)(y − ȳ)/Σm(y − ȳ)²`` is the slant about the centre of mass (x̄, ȳ); bilinear, with zeros outside. So
    LeCun et al. (1998) prepare digits. An image without mass stays so.
    """
    height, width = images.shape[-2:]
    smallest = torch.finfo(images.dtype).tiny
    x = torch.arange(width, dtype=images.dtype, device=images.device) + 0.5
    y = (torch.arange(height, dtype=images.dtype, device=images.device) + 0.5).unsqueeze(1)
    mass = images.sum(1)
    mass = mass / mass.sum((1, 2), keepdim=True).clamp_min(smallest)
    mean_x, mean_y = (mass * x).sum((1, 2)), (mass * y).sum((1, 2))
    dx, dy = x - mean_x[:, None, None], y - mean_y[:, None, None]
    slant = (mass * dx * dy).sum((1, 2)) / (mass * dy.square()).sum((1, 2)).clamp_min(smallest)
    # Both sides of an image run from −1 to 1.
    one, zero = torch.ones_like(slant), torch.zeros_like(slant)
    to_x = torch.stack([one, slant * height / width, 2 * mean_x / width - 1], 1)
    to_y = torch.stack([zero, one, 2 * mean_y / height - 1], 1)
    grid = F.affine_grid(torch.stack([to_x, to_y], 1), list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, align_corners=False)


def train(settings: Settings, images: Tensor, facts: ImageData, seed: int) -> ConvSparseAutoencoder:
    """The convolutional autoencoder, fitted to reconstruct images (N, C, H, W) with pixels in [0, 1].

    The same seed gives the same model; the global random stream stays where it is.
    """
    s = settings
    shape: dict[str, Any] = dict(num_atoms=(s.num_atoms,), kernel_sizes=(s.kernel_size,), strides=(s.stride,))
    shape |= dict(paddings=(s.kernel_size // 2,), steps=s.steps)
    model: dict[str, Any] = dict(model="gsae_conv", group_size=s.group_size, threshold=s.penalty, model_args=shape)
    pixels = TensorDataset(images[: s.images], torch.arange(len(images[: s.images])))  # a number in each label's place
    batches = IndexBatches(len(pixels), s.batch_size, train=True, seed=seed)
    loader = DataLoader(pixels, sampler=batches, batch_size=None, generator=torch.Generator())
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        task = Reconstructor(data=facts, optimizer=partial(torch.optim.Adam, lr=s.rate), **model)
        quiet_trainer(max_epochs=s.epochs, barebones=True).fit(task, loader)
    return cast(ConvSparseAutoencoder, task.cpu().eval().model)


@torch.no_grad()
def features(model: ConvSparseAutoencoder, images: Tensor, settings: Settings) -> Tensor:
    """``√(p/Σp)`` of each image's pooled group norms p, (N, groups · windows): points at Hellinger's distances."""
    norms = [pooled_norms(model.encode(batch), settings) for batch in images.split(250)]
    return shares(torch.cat(norms).flatten(1)).sqrt()


def pooled_norms(z: Tensor, settings: Settings) -> Tensor:
    """Means of ``‖z_g‖₂`` of codes (N, atoms, h, w) over windows of positions, (N, groups, windows, windows)."""
    norms = grouped(z, settings.group_size).norm(dim=2)
    return F.avg_pool2d(norms, settings.window, settings.window_stride)


def least_cut(x: Tensor, num_clusters: int, neighbours: int, seed: int = 0) -> tuple[Tensor, float]:
    """Clusters of the rows of (N, features), int64 (N,), and their `cut` of the graph of `neighbours`.

    K-means clusters the nodes by the first eigenvectors of the graph's normalised Laplacian, each node's scaled to unit
    norm (Ng, Jordan and Weiss 2001): by the first k, the first k + 1, up to 2k. Of these the clusters of the smallest
    cut count: with k alone, a cluster that falls into two parts easily takes the place of a finer distinction.
    """
    graph = _graph(x, neighbours)
    # Eigenvectors come in order, so that the first k are also those of a smaller embedding.
    nodes = spectral_embedding(graph, n_components=2 * num_clusters, drop_first=False, random_state=seed)
    embedded = torch.from_numpy(nodes)
    found = [kmeans(F.normalize(embedded[:, :k], dim=1), num_clusters, seed)
             for k in range(num_clusters, 2 * num_clusters + 1)]  # fmt: skip
    return min(((clusters, cut(graph, clusters)) for clusters in found), key=lambda pair: pair[1])


def cut(graph: csr_array, clusters: Tensor) -> float:
    """Share of a cluster's edges that leave it, by weight, mean over the clusters: the normalised cut by their number.

    The objective of spectral clustering (Shi and Malik 2000), in [0, 1] for any features: among graphs with the same
    number of neighbours, the one of the smallest cut tells its clusters apart best. No label enters.
    """
    members = F.one_hot(clusters).numpy().astype(graph.dtype)
    between = members.T @ (graph @ members)
    return float(1 - (between.diagonal() / between.sum(1)).mean())


def _graph(x: Tensor, neighbours: int) -> csr_array:
    nearest = kneighbors_graph(x.cpu().numpy(), neighbours)
    return (nearest + nearest.T) / 2


def ablation(
    settings: Settings, train_images: Tensor, test_images: Tensor, labels: Tensor, facts: ImageData, seed: int
) -> Iterator[dict[str, Any]]:
    """A row an input and a method, as of `clustering.clustering_rows`; those of the least cut also have their ``cut``.

    Inputs are raw pixels, the same features with groups of one atom, and the pooled group norms; of images as they are,
    and upright. `BEST` is the last of them.

    Args:
        settings, facts, seed: as of `train`.
        train_images, test_images: (N, C, H, W), pixels in [0, 1].
        labels: classes of the test images, int64 (N,); for the scores alone.
    """
    settings_of = {"conv sparse codes": replace(settings, group_size=1), "conv group norms": settings}
    models = {name: train(own, train_images, facts, seed) for name, own in settings_of.items()}
    ways: dict[str, Callable[[Tensor], Tensor]] = {"": lambda x: x, ", upright": upright}
    for suffix, prepare in ways.items():
        images = prepare(test_images)
        yield from rows(f"raw pixels{suffix}", images.flatten(1), labels, settings.neighbours, seed)
        for name, model in models.items():
            x = features(model, images, settings_of[name])
            yield from rows(f"{name}{suffix}", x, labels, settings.neighbours, seed)


def rows(name: str, x: Tensor, labels: Tensor, neighbours: int, seed: int) -> Iterator[dict[str, Any]]:
    """Rows of features (N, F) in as many clusters as there are classes: k-means, spectral, and the least cut."""
    classes = len(labels.unique())
    start = time.perf_counter()
    yield _row(name, KMEANS, kmeans(x, classes, seed), labels, start)
    start = time.perf_counter()
    yield _row(name, SPECTRAL, spectral(x, classes, neighbours, seed), labels, start)
    start = time.perf_counter()
    clusters, value = least_cut(x, classes, neighbours, seed)
    yield _row(name, LEAST_CUT, clusters, labels, start) | {"cut": value}


def _row(name: str, method: str, clusters: Tensor, labels: Tensor, start: float) -> dict[str, Any]:
    seconds = round(time.perf_counter() - start, 1)
    return {"input": name, "method": method, **clustering_scores(clusters, labels), "seconds": seconds}


def markdown(found: list[dict[str, Any]]) -> str:
    """Accuracy of every input by every method, over seeds, and the cut that needs no label."""
    lines = []
    for name in dict.fromkeys(row["input"] for row in found):
        own = [row for row in found if row["input"] == name]
        accuracies = [[100 * row["accuracy"] for row in own if row["method"] == method] for method in METHODS]
        cuts = [row["cut"] for row in own if "cut" in row]
        lines.append([name, *(spread(values, 2) for values in accuracies), spread(cuts, 4)])
    return table(["clusters of", *(f"{method}, %" for method in METHODS), "cut"], lines)


def draw(found: list[dict[str, Any]]) -> Figure:
    """Accuracies as bars, an input a row; over several seeds the mean, each seed a dot."""
    names = list(dict.fromkeys(row["input"] for row in found))
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    for i, (method, colour) in enumerate(zip(METHODS, (PALETTE[7], PALETTE[2], PALETTE[5]), strict=True)):
        for j, name in enumerate(names):
            values = [100 * row["accuracy"] for row in found if (row["input"], row["method"]) == (name, method)]
            y = -j - 0.27 * (i - 1)
            axes.barh(y, sum(values) / len(values), 0.25, color=colour, label=method if j == 0 else None)
            axes.plot(values, [y] * len(values), ".", color=PALETTE[0], markersize=4)
    axes.set(xlabel="accuracy of clusters (%)", xlim=(0, 100), yticks=[-j for j in range(len(names))])
    axes.set_yticklabels(names)
    axes.grid(axis="x", alpha=0.3)
    figure.legend(loc="outside upper center", ncols=len(METHODS), frameon=False)
    return figure
