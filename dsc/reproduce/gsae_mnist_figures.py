"""The table and the pictures of `gsae_mnist`, in the arrangement of arXiv 2102.07003."""

from statistics import mean
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure
from torch import Tensor
from torchvision.utils import make_grid

from dsc.report import table
from dsc.reproduce.results import PALETTE, spread
from dsc.shrinkage import grouped

PAPER: list[dict[str, Any]] = [
    {"input": name, "method": method, "accuracy": accuracy}
    for name, by_method in {
        "raw pixels": {"k-means": 0.5446, "spectral": 0.6304},
        "sparse codes": {"k-means": 0.5414, "spectral": 0.5549},
        "sparse codes₊": {"k-means": 0.6094, "spectral": 0.5698},
        "group codes": {"k-means": 0.745, "spectral": 0.794},
        "group codes₊": {"k-means": 0.8009, "spectral": 0.8027},
    }.items()
    for method, accuracy in by_method.items()
]
COLORS = {"sparse": PALETTE[5], "group": PALETTE[4]}


def markdown(figures: dict[str, Any]) -> str:
    """The clustering table beside the paper's, then what the autoencoders came to."""
    return f"{clustering_table(figures['clusters'])}\n\n{training_table(figures['models'])}"


def clustering_table(rows: list[dict[str, Any]]) -> str:
    """Accuracy, NMI and ARI in % of every input and method, over seeds, beside the paper's accuracy."""
    paper = {(row["input"], row["method"]): f"{100 * row['accuracy']:.2f}" for row in PAPER}
    lines = []
    for name, method in dict.fromkeys((row["input"], row["method"]) for row in rows):
        own = [row for row in rows if (row["input"], row["method"]) == (name, method)]
        values = [spread([100 * row[key] for row in own], 2) for key in ("accuracy", "nmi", "ari")]
        lines.append([name, method, values[0], paper.get((name, method), ""), *values[1:]])
    return table(["clusters of", "by", "accuracy %", "paper %", "NMI %", "ARI %"], lines)


def training_table(models: list[dict[str, Any]]) -> str:
    """Loss, active atoms and groups, step times Lipschitz constant and seconds an epoch, over seeds."""
    lines = []
    for kind in dict.fromkeys(one["model"] for one in models):
        own = [one for one in models if one["model"] == kind]
        groups = [one["active_groups"] for one in own if "active_groups" in one]
        cells = [[one["loss"][-1] for one in own], [one["active_atoms"] for one in own], groups]
        cells += [[one["course"][-1]["step_times_lipschitz"] for one in own]]
        cells += [[mean(one["epoch_seconds"]) for one in own]]
        shown = [spread(c, digits) if c else "" for c, digits in zip(cells, (5, 1, 2, 2, 1), strict=True)]
        lines.append([kind, str(len(own[0]["loss"])), *shown])
    header = ["autoencoder", "epochs", "½ mse", "active atoms", "active groups", "step·L", "seconds an epoch"]
    return table(header, lines)


def draw_models(test: Tensor, atoms: dict[str, Tensor], codes: dict[str, Tensor], group_size: int) -> Figure:
    """Fig. 4: the atoms of both models, a row a group, and below them the codes of an image, entry by entry."""
    figure = Figure(figsize=(11, 6.6), layout="constrained")
    panels = figure.subfigures(1, len(atoms), squeeze=False)[0]
    example = int(grouped(codes["group"], group_size).norm(dim=2).amax(1).argsort()[len(test) // 2])
    for panel, (kind, rows) in zip(panels, atoms.items(), strict=True):
        _draw_model(panel, kind, rows.unflatten(1, test.shape[1:]), codes[kind][example], test[example], group_size)
    return figure


def _draw_model(panel: SubFigure, kind: str, atoms: Tensor, z: Tensor, image: Tensor, group_size: int) -> None:
    top, middle, bottom = panel.subplots(3, 1, height_ratios=[6, 1.5, 1.6])
    scaled = atoms / atoms.abs().amax((1, 2, 3), keepdim=True).clamp_min(1e-12) / 2 + 0.5
    top.imshow(make_grid(scaled, nrow=group_size, padding=1, pad_value=1.0).permute(1, 2, 0), interpolation="nearest")
    top.set_title(f"{kind}: atoms (grey is zero){', a group a row' if kind == 'group' else ''}")
    rebuilt = torch.tensordot(z, atoms, 1)
    pair = make_grid(torch.stack([image, rebuilt]).clamp(0, 1), nrow=2, padding=1, pad_value=1.0)
    middle.imshow(pair.permute(1, 2, 0), interpolation="nearest")
    middle.set_title("an image, and its reconstruction")
    for axes in (top, middle):
        axes.axis("off")
    for first in range(0, len(z), 2 * group_size):
        bottom.axvspan(first - 0.5, first + group_size - 0.5, color="0.93")
    bottom.vlines(range(len(z)), 0, z, color=COLORS[kind], linewidth=1.2)
    bottom.axhline(0, color="0.4", linewidth=0.6)
    bottom.set(xlabel="atom", ylabel="its code", xlim=(-0.5, len(z) - 0.5))


def draw_distances(
    test: Tensor, labels: Tensor, codes: dict[str, Tensor], group_size: int, per_class: int = 100
) -> Figure:
    """Fig. 5: Euclidean distances among 100 images a digit: of pixels, sparse codes, and norms of groups."""
    classes = labels.unique()
    chosen = torch.cat([(labels == c).nonzero().flatten()[:per_class] for c in classes])
    norms = grouped(codes["group"][chosen], group_size).norm(dim=2)
    panels = {"raw pixels": test[chosen].flatten(1), "sparse codes": codes["sparse"][chosen], "group norms": norms}
    figure = Figure(figsize=(12, 4), layout="constrained")
    counts = torch.tensor([int((labels[chosen] == c).sum()) for c in classes])
    centres = counts.cumsum(0) - counts / 2
    for axes, (name, x) in zip(figure.subplots(1, 3), panels.items(), strict=True):
        drawn = axes.imshow(torch.cdist(x, x), cmap="viridis", interpolation="nearest", vmin=0)
        axes.set(
            title=f"distances of {name}",
            xticks=centres,
            yticks=centres,
            xticklabels=classes.tolist(),
            yticklabels=classes.tolist(),
        )
        axes.tick_params(length=0)
        figure.colorbar(drawn, ax=axes, shrink=0.8)
    return figure


def draw_course(models: list[dict[str, Any]]) -> Figure:
    """Against the epoch: the accuracy of k-means on codes₊, the loss, and the groups active, a line a seed."""
    figure = Figure(figsize=(12, 3.6), layout="constrained")
    accuracy, loss, groups = figure.subplots(1, 3)
    for one in models:
        style: dict[str, Any] = {"color": COLORS[one["model"]], "linewidth": 1.2}
        label = one["model"] if one["seed"] == models[0]["seed"] else None
        epochs = [row["epoch"] for row in one["course"]]
        accuracy.plot(epochs, [100 * row["accuracy"] for row in one["course"]], label=label, marker=".", **style)
        loss.plot(range(1, len(one["loss"]) + 1), one["loss"], **style)
        if one["model"] == "group":
            groups.plot(epochs, [row["active_groups"] for row in one["course"]], marker=".", **style)
    _label(accuracy, "k-means on codes₊: accuracy (%)")
    _label(loss, "training loss (½ mse)")
    _label(groups, "active groups an image")
    for kind, color in COLORS.items():
        paper = next(
            row["accuracy"] for row in PAPER if row["input"] == f"{kind} codes₊" and row["method"] == "k-means"
        )
        accuracy.axhline(100 * paper, color=color, linestyle="--", linewidth=0.9, label=f"paper, {kind}")
    accuracy.legend(fontsize=8)
    return figure


def _label(axes: Axes, quantity: str) -> None:
    axes.set(xlabel="epoch", ylabel=quantity)
    axes.grid(alpha=0.3)
