"""Pictures: curves by matplotlib, for files and for a page of light or dark background; images, atoms and codes."""

import re
from base64 import b64encode
from collections.abc import Iterable, Mapping, Sequence
from io import BytesIO, StringIO
from itertools import count, cycle
from math import isqrt

import numpy as np
import torch
from matplotlib import colormaps, rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, NullLocator
from PIL import Image
from torch import Tensor
from torch.nn import functional as F
from torchvision.utils import make_grid

PALETTE = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000", "#999999")
POSITIVE, NEGATIVE = (30, 136, 220), (228, 106, 20)  # of codes, on light and on dark
INK = "#010203"  # what a page shows in the colour of its own text
PAGE_STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "dsc",
    "font.size": 9.0,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
    **{f"{part}.color": INK for part in ("text", "xtick", "ytick", "grid")},
    **{f"axes.{part}": INK for part in ("edgecolor", "labelcolor")},
}
NO_METADATA = dict.fromkeys(("Creator", "Date", "Format", "Type"))

Points = Iterable[tuple[int, float]]
Logged = dict[str, list[tuple[int, float]]]


def training_figure(logged: Logged) -> Figure:
    """Loss, and the quality on validation images, against the epoch."""
    quality = next((name for name in ("val/accuracy", "val/mse") if name in logged), None)
    figure = Figure(figsize=(9, 3.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    _epochs(
        left,
        {name: logged[name] for name in ("train/loss", "val/loss") if name in logged},
        "loss (nats or ½ mse)",
        True,
    )
    if quality:
        _epochs(right, {quality: logged[quality]}, quality.removeprefix("val/"), False)
    return figure


def sparsity_figure(logged: Logged) -> Figure:
    """Active fraction and Hoyer index of every sparse layer against the epoch."""
    figure = Figure(figsize=(9, 3.4), layout="constrained")
    for axes, quantity in zip(figure.subplots(1, 2), ("active_fraction", "hoyer"), strict=True):
        lines = by_layer(logged, f"sparsity/{quantity}")
        _epochs(axes, lines, f"{quantity.replace('_', ' ')} (validation)", len(lines) > 1)
        axes.set_ylim(0, 1.02)
    return figure


def by_layer(logged: Logged, quantity: str) -> Logged:
    """What was logged as `quantity/<layer>`, by layer."""
    return {name.removeprefix(f"{quantity}/"): v for name, v in logged.items() if name.startswith(f"{quantity}/")}


def _epochs(axes: Axes, lines: Mapping[str, Points], label: str, legend: bool) -> None:
    for color, (name, points) in zip(_colors(len(lines)), lines.items(), strict=False):
        epochs, values = zip(*points, strict=True)
        axes.plot([epoch + 1 for epoch in epochs], values, marker="o", markersize=3, label=name, color=color)
    axes.set(xlabel="epoch", ylabel=label)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.2)
    if legend:
        handles, names = axes.get_legend_handles_labels()
        shown = slice(None) if len(lines) <= len(PALETTE) else slice(None, None, len(lines) - 1)  # first and last
        axes.legend(handles[shown], names[shown], fontsize=8)


def _colors(count: int) -> Iterable[object]:
    # Beyond what can be told apart, a ramp from the first layer to the last.
    return cycle(PALETTE) if count <= len(PALETTE) else colormaps["viridis"](np.linspace(0.35, 0.8, count))


def convergence_figure(curves: Mapping[str, Mapping[str, Tensor]]) -> Figure:
    """Relative error to the converged code against the solver's step, a panel a layer, log scale.

    Raises ValueError without any layer.
    """
    if not curves:
        raise ValueError("there is no layer of several steps, hence no convergence to draw")
    figure = Figure(figsize=(min(4.2 * len(curves), 13) + 0.5, 3.4 * -(-len(curves) // 3)), layout="constrained")
    grid = figure.subplots(-(-len(curves) // 3), min(3, len(curves)), squeeze=False, sharey=True).flatten()
    for axes, (layer, by_solver) in zip(grid, curves.items(), strict=False):
        for color, (solver, errors) in zip(PALETTE, by_solver.items(), strict=False):
            axes.semilogy(range(1, len(errors) + 1), errors.cpu(), marker=".", label=solver, color=color)
        axes.set(title=layer, xlabel="step k", ylabel="‖z$_k$ − z$_{ref}$‖ / ‖z$_{ref}$‖")
        axes.title.set_fontsize(9)
        axes.grid(alpha=0.3)
        axes.legend()
    for axes in grid[len(curves) :]:
        axes.remove()
    return figure


def atoms_figure(atoms: Tensor) -> Figure:
    """Every atom as an image, each scaled to its own range (grey is zero)."""
    picture = make_grid(_own_range(atoms[:256]), nrow=16, padding=1, pad_value=1.0).permute(1, 2, 0)
    figure = Figure(figsize=(6, 6 * picture.shape[0] / picture.shape[1] + 0.1), layout="constrained")
    axes = figure.subplots()
    axes.imshow(picture.numpy(), interpolation="nearest")
    axes.axis("off")
    return figure


def epochs_panel(lines: Mapping[str, Points], label: str) -> str:
    """Lines against the epoch, as SVG for a page."""
    with rc_context(PAGE_STYLE):
        figure = Figure(figsize=(4.4, 2.7), layout="constrained")
        _epochs(figure.subplots(), lines, label, True)
        return svg(figure, f"{label} against the epoch: {', '.join(lines)}")


def errors_panel(errors: Mapping[str, Mapping[int, float]], own: int | None, layer: str) -> str:
    """Relative errors by solver and step on logarithmic axes, as SVG for a page; `own` marks the model's depth."""
    with rc_context(PAGE_STYLE):
        figure = Figure(figsize=(4.4, 2.7), layout="constrained")
        axes = figure.subplots()
        for color, (solver, by_step) in zip(PALETTE, errors.items(), strict=False):
            axes.loglog(list(by_step), list(by_step.values()), marker="o", markersize=3, label=solver, color=color)
        ticks = sorted({k for by_step in errors.values() for k in by_step})
        axes.set_xticks(ticks, [str(k) for k in ticks])
        axes.xaxis.set_minor_locator(NullLocator())
        if own is not None:
            axes.axvline(own, color=INK, linewidth=0.8, linestyle=":", label=f"the model: {own} steps")
        axes.set(xlabel="step k", ylabel="relative error of the code")
        axes.grid(alpha=0.2)
        axes.legend(fontsize=8)
        return svg(figure, f"error of the codes of {layer} against the solver's step: {', '.join(errors)}")


def svg(figure: Figure, text: str) -> str:
    """The figure as an SVG element that takes its colours from the page: text from it, lines from `--line-0`, ….

    `text` describes it to who cannot see it.
    """
    file = StringIO()
    figure.savefig(file, format="svg", transparent=True, metadata=NO_METADATA)
    drawn = file.getvalue()
    drawn = drawn[drawn.index("<svg") :].replace(INK, "currentColor")
    for number, color in enumerate(PALETTE):
        drawn = drawn.replace(color, f"var(--line-{number})")
    drawn = re.sub(r' (?:width|height)="[\d.]+pt"', "", drawn, count=2)
    described = text.replace("&", "&amp;").replace('"', "&quot;").replace("<", "&lt;")
    return drawn.replace("<svg", f'<svg role="img" aria-label="{described}"', 1)


def tell_apart(html: str) -> str:
    """The page with a name of its own for every part of every drawing: each alone has the same ones."""
    numbers = count()

    def rename(drawing: re.Match[str]) -> str:
        number = next(numbers)
        return re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>drawing-{number}-", drawing[0])

    return re.sub(r"<svg.*?</svg>", rename, html, flags=re.DOTALL)


def photo(image: Tensor) -> str:
    """An image (1 or 3, height, width) in [0, 1] as a data URI."""
    pixels = (image.clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0)
    return png(pixels.expand(-1, -1, 3).numpy())


def atom_sheet(atoms: Tensor, columns: int) -> str:
    """Atoms (n, 1 or 3, height, width) in rows as a data URI, each scaled to its own range; gaps are transparent."""
    scaled = F.pad(_own_range(atoms).expand(-1, 3, -1, -1), (0, 1, 0, 1))
    opaque = F.pad(torch.ones_like(scaled[:, :1, :-1, :-1]), (0, 1, 0, 1))
    sheet = make_grid(torch.cat([scaled, opaque], 1), nrow=columns, padding=0)
    return png((sheet * 255).round().to(torch.uint8).permute(1, 2, 0)[:-1, :-1].numpy())


def _own_range(atoms: Tensor) -> Tensor:
    size = atoms.abs().amax((1, 2, 3), keepdim=True).clamp_min(1e-12)
    return (atoms / size).float().cpu() / 2 + 0.5


def code_picture(code: Tensor, group_size: int, maps: int = 16) -> tuple[str, tuple[int, int]]:
    """A code (atoms, *positions) as a data URI and its (rows, columns): blue above zero, orange below, else clear.

    A vector has a row a group, or is as square as may be; of feature maps the `maps` strongest are shown, in two rows.
    """
    if code.ndim == 2 and isqrt(code.shape[1]) ** 2 == code.shape[1]:
        code = code.unflatten(1, (isqrt(code.shape[1]), -1))  # tokens of a square image
    if code.ndim == 3:
        strongest = code.square().sum((1, 2)).topk(min(maps, len(code))).indices
        sheet = make_grid(code[strongest].unsqueeze(1), nrow=-(-len(strongest) // 2), padding=1)[0]
    else:
        sheet = code if code.ndim == 2 else code.unflatten(0, (_rows(len(code), group_size), -1))
    strength = (sheet.abs() / sheet.abs().max().clamp_min(1e-12)).sqrt()
    pixels = torch.where(sheet.unsqueeze(-1) > 0, torch.tensor(POSITIVE), torch.tensor(NEGATIVE))
    pixels = torch.cat([pixels, (255 * strength).round().unsqueeze(-1)], -1).to(torch.uint8)
    return png(pixels.numpy()), (sheet.shape[0], sheet.shape[1])


def _rows(length: int, group_size: int) -> int:
    if group_size > 1:
        return length // group_size
    return max(rows for rows in range(1, isqrt(length) + 1) if length % rows == 0)


def heat_sheet(shares: Sequence[Sequence[float]]) -> str:
    """Shares in [0, 1] as a data URI, a pixel each, the more opaque the larger."""
    strength = torch.as_tensor(shares).clamp(0, 1).sqrt().unsqueeze(-1) * 255
    color = torch.tensor(POSITIVE).expand(*strength.shape[:2], 3)
    return png(torch.cat([color, strength.round()], -1).to(torch.uint8).numpy())


def png(pixels: np.ndarray) -> str:
    """Pixels (height, width, 3 or 4), uint8, as a data URI."""
    file = BytesIO()
    Image.fromarray(pixels).save(file, "PNG", optimize=True)
    return "data:image/png;base64," + b64encode(file.getvalue()).decode()
