"""The compiler: sparse coding as a plain CNN, an attention stack and a transformer, with the error of each.

Random dictionaries and signals of unit norm. Exact networks differ from the iteration by rounding alone; with other
activations the error falls like 1/R, with softmax like 1/T² until rounding, which grows like T, meets it; for groups
it falls like 1/R². Figures are the largest over signals and seeds.
"""

from argparse import Namespace
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor

from dsc.activations import create_activation
from dsc.dictionaries import ConvDictionary, DenseDictionary, Dictionary
from dsc.layers import DeepSparseCoding, SparseCoding
from dsc.report import table
from dsc.reproduce.results import PALETTE, Results
from dsc.solvers import ISTA
from dsc.theory.compiler import Compiled, compile
from dsc.theory.compiler.units import BOUNDED, SMOOTH, pieces

Progress = Callable[[str], None]
Model = SparseCoding | DeepSparseCoding


@dataclass(frozen=True)
class Settings:
    """Sizes of the experiment."""

    side: int = 6  # of images; dense signals have side² entries
    atoms: int = 54
    channels: int = 4  # of convolutional codes
    steps: int = 16
    signals: int = 16
    threshold: float = 0.1
    scales: tuple[float, ...] = (16, 32, 64, 128, 256, 512, 1024)
    bounded_scales: tuple[float, ...] = (16, 32, 64)  # tanh and sigmoid stand in steps, as many as R
    group_scales: tuple[float, ...] = (8, 16, 32, 64)
    temperatures: tuple[float, ...] = tuple(10 ** (k / 2) for k in range(2, 12))


FAST = Settings(side=4, atoms=24, channels=2, steps=6, signals=8)
REACH = 1.5  # of values, for tanh, sigmoid and groups: signals have norm 1


def run(args: Namespace, progress: Progress) -> Results:
    """Every kind of network, `args.seeds` times."""
    settings = FAST if args.fast else Settings()
    rows = []
    for seed in range(args.seeds):
        for row in measure(settings, seed):
            rows.append(row)
            progress(f"seed {seed}: {row['dictionary']}, {row['network']}: error {row['error']:.1e}")
    figures = {
        "settings": asdict(settings),
        "fast": args.fast,
        "shrinkage": shrinkage_errors(settings),
        "networks": rows,
    }
    return Results(figures, markdown(figures), draw(figures))


def measure(settings: Settings, seed: int) -> Iterator[dict[str, Any]]:
    """A row a network: its size, its largest error ``‖ẑ − z‖₂`` over signals of unit norm, and the bound of that."""
    for name, (model, x) in models(settings, seed).items():
        image = {"size": (settings.side, settings.side)}
        conv, flat = name.startswith("convolutional"), name == "dense, 2-D"
        kernels = {} if conv else {"kernel_size": 2}
        for activation in ("relu", "leaky_relu"):
            yield _row(name, seed, model, x, {"activation": activation} | (image if flat else {}))
        if not conv:
            yield _row(name, seed, model, x, kernels | (image if flat else {}))
        if not flat:  # attention does not know that a signal is an image
            for to in ("attention", "transformer"):
                yield _row(name, seed, model, x, {"to": to} | (image if conv else {}))
    model, x = models(settings, seed)["dense, 1-D"]
    for activation in (*SMOOTH, *BOUNDED):
        bounded = activation in BOUNDED
        for scale in settings.bounded_scales if bounded else settings.scales:
            reach = {"reach": REACH} if bounded else {}
            yield _row("dense, 1-D", seed, model, x, {"activation": activation, "scale": scale} | reach)
    for temperature in settings.temperatures:
        yield _row("dense, 1-D", seed, model, x, {"to": "transformer", "temperature": temperature})
    model, x = grouped_model(settings, seed)
    for scale in settings.group_scales:
        yield _row("dense, groups of 2", seed, model, x, {"scale": scale, "reach": REACH, "approximate": True})


def models(settings: Settings, seed: int) -> dict[str, tuple[Model, Tensor]]:
    """Models by name, with their signals: one dense layer on rows and on images, and chains of three layers."""
    s, features = settings, settings.side**2
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        dense = _layer(DenseDictionary(features, s.atoms), s, "soft", -1)
        # Codes of codes are smaller than signals: so are their thresholds, or nothing would be left.
        chain = [dense, _layer(DenseDictionary(s.atoms, s.atoms // 2), s, "relu", -1, 0.2)]
        chain.append(_layer(DenseDictionary(s.atoms // 2, s.atoms), s, "soft", -1, 0.04))
        convolutional = [
            _layer(ConvDictionary(1, s.channels, 3, 1, 1), s, "soft", 1),
            _layer(ConvDictionary(s.channels, 2 * s.channels, 4, 2, 1), s, "relu", 1, 0.2),
        ]
        rows = torch.randn(s.signals, features, dtype=torch.float64)
    rows = rows / rows.norm(dim=1, keepdim=True)
    return {
        "dense, 1-D": (dense, rows),
        "dense, 2-D": (dense, rows),
        "dense, 3 layers": (_chain(chain), rows),
        "convolutional, 2 layers": (_chain(convolutional), rows.unflatten(1, (1, s.side, s.side))),
    }


def grouped_model(settings: Settings, seed: int) -> tuple[Model, Tensor]:
    """A layer of groups of two atoms, and signals."""
    small = Settings(side=4, atoms=24, steps=4, signals=settings.signals, threshold=0.3)
    _, rows = models(small, seed)["dense, 1-D"]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return _layer(DenseDictionary(16, 24), small, "group_relu", -1, group_size=2), rows


def _chain(layers: list[SparseCoding]) -> DeepSparseCoding:
    return DeepSparseCoding(layers).double().eval()


def _layer(
    dictionary: Dictionary, settings: Settings, prox: str, dim: int, relative: float = 1.0, **kwargs: int
) -> SparseCoding:
    activation = create_activation(prox, dim, threshold=relative * settings.threshold, **kwargs)
    return SparseCoding(dictionary, activation, ISTA(settings.steps)).double().eval()


@torch.no_grad()
def _row(name: str, seed: int, model: Model, x: Tensor, options: dict[str, Any]) -> dict[str, Any]:
    network = compile(model, **options)
    row = {
        "dictionary": name,
        "seed": seed,
        "network": _title(options),
        "options": options,
        "depth": network.depth,
        "width": network.width,
        "parameters": network.num_parameters,
        "bound": float(network.bound(x).max()),
        "measured": network.measured,
        "error": _error(network, model, x),
        "code": float(model(x).flatten(1).norm(dim=1).mean()),
    }
    if "scale" not in options:
        single = model.float()
        row["error_float32"] = _error(compile(single, **options), single, x.float())
        model.double()
    return row


def _error(network: Compiled, model: Model, x: Tensor) -> float:
    return float((network(x) - model(x)).flatten(1).norm(dim=1).max())


def _title(options: dict[str, Any]) -> str:
    if "approximate" in options:
        return "CNN, groups"
    if "to" in options:
        return options["to"] + (", softmax" if "temperature" in options else "")
    small = f", kernels of {options['kernel_size']}" if "kernel_size" in options else ""
    return f"CNN, {options.get('activation', 'relu')}{small}"


def shrinkage_errors(settings: Settings) -> dict[str, dict[str, Any]]:
    """Sup norm of the error of soft thresholding on a grid that contains the kinks, against R, and its slope."""
    theta = torch.tensor([1.0], dtype=torch.float64)
    around = torch.arange(-400, 401, dtype=torch.float64) / 100  # of which 0 is the kink
    grid = torch.cat([theta * sign + around / scale for sign in (-1, 1) for scale in settings.scales])
    grid = torch.cat([grid, torch.linspace(-1.4, 1.4, 281).double()])
    found = {}
    for name in (*SMOOTH, *BOUNDED):
        scales = settings.bounded_scales if name in BOUNDED else settings.scales
        errors, stated = [], []
        for scale in scales:
            made = pieces(name, scale, REACH, torch.finfo(torch.float64).eps)
            both = made.positive.of(1, theta).plus(made.positive.of(-1, theta).times(-1))
            hidden = made.activation()(grid.unsqueeze(1) * both.gain + both.offset.squeeze(1))
            soft = torch.nn.functional.softshrink(grid, 1.0)
            errors.append(float((hidden @ both.weight.squeeze(1) - soft).abs().max()))
            stated.append(made.positive_error)
        found[name] = {"scale": list(scales), "error": errors, "stated": stated, "slope": slope(scales, errors)}
    return found


def slope(x: Any, y: Any) -> float:
    """Least-squares slope of log y against log x."""
    return float(np.polyfit(np.log(x), np.log(y), 1)[0])


def markdown(figures: dict[str, Any]) -> str:
    """The exact networks; the activations and groups by R; softmax by its temperature."""
    rows = figures["networks"]
    exact = [row for row in rows if "error_float32" in row and "temperature" not in row["options"]]
    header = ["dictionary", "network", "depth", "width", "parameters", "bound", "error", "error, float32", "‖z‖, mean"]
    lines = []
    for same in _by(exact, "dictionary", "network"):
        worst = [f"{max(row[key] for row in same):.1e}" for key in ("error", "error_float32")]
        lines.append(
            [same[0]["dictionary"], same[0]["network"], *_size(same[0]), "exact", *worst, f"{same[0]['code']:.2g}"]
        )
    return "\n\n".join([table(header, lines), _by_scale(figures), _by_temperature(rows)])


def _by_scale(figures: dict[str, Any]) -> str:
    header = ["network", "R", "depth", "width", "parameters", "bound", "error", "slope", "slope of shrinkage"]
    lines = []
    for same in _by([row for row in figures["networks"] if "scale" in row["options"]], "network"):
        scales, errors, bounds = _curve(same, "scale")
        own = figures["shrinkage"].get(same[0]["options"].get("activation"))
        fitted = [f"{slope(scales, errors):.2f}", f"{own['slope']:.2f}" if own else ""]
        for i, (scale, error, bound) in enumerate(zip(scales, errors, bounds, strict=True)):
            size = _size(next(row for row in same if row["options"]["scale"] == scale))
            shown = f"{bound:.1e}" + " (measured)" * same[0]["measured"]
            last = fitted if i == len(scales) - 1 else ["", ""]
            lines.append([same[0]["network"], f"{scale:g}", *size, shown, f"{error:.1e}", *last])
    return table(header, [[cell.replace("-", "−") if i > 6 else cell for i, cell in enumerate(x)] for x in lines])


def _by_temperature(rows: list[dict[str, Any]]) -> str:
    softmax = [row for row in rows if "temperature" in row["options"]]
    temperatures, errors, bounds = _curve(softmax, "temperature")
    single = _curve(softmax, "temperature", "error_float32")[1]
    lines = [
        [
            f"{t:.3g}",
            f"{b:.1e}",
            f"{e:.1e}" + " (least)" * (e == min(errors)),
            f"{f:.1e}" + " (least)" * (f == min(single)),
        ]
        for t, b, e, f in zip(temperatures, bounds, errors, single, strict=True)
    ]
    return table(["softmax transformer, temperature", "bound", "error", "error, float32"], lines)


def _size(row: dict[str, Any]) -> list[str]:
    return [str(row["depth"]), f"{row['width']:,}", f"{row['parameters']:,}"]


def _by(rows: list[dict[str, Any]], *keys: str) -> list[list[dict[str, Any]]]:
    found: dict[Any, list[dict[str, Any]]] = {}
    for row in rows:
        found.setdefault(tuple(row[key] for key in keys), []).append(row)
    return list(found.values())


def _curve(rows: list[dict[str, Any]], option: str, key: str = "error") -> tuple[list[float], list[float], list[float]]:
    # Values of an option, and the largest error and bound at each.
    values = sorted({row["options"][option] for row in rows})
    at = [[row for row in rows if row["options"][option] == value] for value in values]
    return values, [max(row[key] for row in same) for same in at], [max(row["bound"] for row in same) for same in at]


def draw(figures: dict[str, Any]) -> Figure:
    """Errors against R, of soft thresholding and of whole networks, and against the temperature of softmax."""
    figure = Figure(figsize=(13.5, 4.2), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    rows = figures["networks"]
    for name, one in figures["shrinkage"].items():
        left.loglog(one["scale"], one["error"], label=name, **STYLES[name])
        scales, errors, bounds = _curve([r for r in rows if r["options"].get("activation") == name], "scale")
        middle.loglog(scales, errors, label=name, **STYLES[name])
        middle.loglog(scales, bounds, ":", color=STYLES[name]["color"])
    for key, color, name in (("error", PALETTE[0], "float64"), ("error_float32", PALETTE[4], "float32")):
        softmax = [row for row in rows if "temperature" in row["options"]]
        temperatures, errors, bounds = _curve(softmax, "temperature", key)
        right.loglog(temperatures, errors, marker="o", markersize=4, color=color, label=name)
    right.loglog(temperatures, bounds, ":", color=PALETTE[0], label="bound, float64")
    left.set(title="soft thresholding", xlabel="R", ylabel="sup norm of the error")
    middle.set(title="CNN (dotted: bound)", xlabel="R", ylabel="‖ẑ − z‖₂, signals of unit norm")
    right.set(title="softmax transformer", xlabel="temperature T", ylabel="‖ẑ − z‖₂, signals of unit norm")
    for axes in (left, middle, right):
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    return figure


# Hollow marks of several sizes: softplus, tanh and sigmoid lie on each other.
STYLES: dict[str, dict[str, Any]] = {
    "gelu": {"color": PALETTE[0], "marker": "o", "markersize": 4},
    "silu": {"color": PALETTE[1], "marker": "o", "markersize": 4},
    "softplus": {"color": PALETTE[2], "marker": "o", "markersize": 4},
    "elu": {"color": PALETTE[3], "marker": "o", "markersize": 4},
    "tanh": {"color": PALETTE[4], "marker": "s", "markersize": 8, "fillstyle": "none", "linestyle": "none"},
    "sigmoid": {"color": PALETTE[5], "marker": "o", "markersize": 12, "fillstyle": "none", "linestyle": "none"},
}
