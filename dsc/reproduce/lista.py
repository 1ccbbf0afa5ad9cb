"""The standard protocol of learned sparse solvers: how well do 16 steps recover a known code?

Signals ``x = Dz* + e`` with D of 250 × 500, each entry of z* active with probability 0.1 and then N(0, 1); the
figure is the NMSE ``10 log₁₀(E‖z − z*‖²/E‖z*‖²)`` in dB over 1,000 signals that no method was trained or tuned on.
"""

import math
import time
from argparse import ArgumentParser, ArgumentTypeError, Namespace
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from statistics import mean
from typing import Any, get_args

import torch
from lightning.pytorch import LightningModule
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from dsc.dictionaries import DenseDictionary
from dsc.layers import SparseCoding
from dsc.learned import ALISTA, LISTA, LISTACP, Initial, LearnedSparseCoding, SupportSelection, analytic_weights
from dsc.measures import nmse
from dsc.prox import Soft
from dsc.report import table
from dsc.reproduce.results import PALETTE, Results, spread, stream
from dsc.solvers import FISTA, ISTA
from dsc.synthetic import BernoulliGaussian
from dsc.trainers import quiet_trainer

Progress = Callable[[str], None]


@dataclass(frozen=True)
class Settings:
    """Sizes of the experiment and of the training, the same for every learned method."""

    num_features: int = 250
    num_atoms: int = 500
    active: float = 0.1
    steps: int = 16
    held_out: int = 1000
    iterations: int = 1000
    batch_size: int = 64
    weight_rate: float = 1e-4  # learning rate of matrices
    scalar_rate: float = 3e-2  # learning rate of thresholds and gains, on the scale of their softplus
    threshold: float = 0.1  # λ of the classical solvers, unless chosen
    first_threshold: float = 0.5  # of the learned solvers at the start, falling by `decay` a step
    decay: float = 0.75
    initial: Initial = "analytic"  # weights of LISTA and LISTA-CP before training


FAST = Settings(num_features=50, num_atoms=100, held_out=500, iterations=100, weight_rate=1e-3)
CANDIDATES = [0.01 * 10 ** (k / 10) for k in range(21)]  # λ, to choose from


def add_arguments(parser: ArgumentParser) -> None:
    """The experiment's own options."""
    parser.add_argument(
        "--snr",
        nargs="+",
        type=_snr,
        default=[None, 30.0, 20.0],
        metavar="DB",
        help="signal-to-noise ratios in dB, or none (default: none 30 20)",
    )
    parser.add_argument(
        "--initial",
        choices=get_args(Initial),
        default=Settings.initial,
        help="weights of LISTA and LISTA-CP before training (default: %(default)s)",
    )


def _snr(text: str) -> float | None:
    if text == "none":
        return None
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise ArgumentTypeError(f"expected a number of dB or none, got {text!r}")
    return value


def run(args: Namespace, progress: Progress) -> Results:
    """Every method at every noise level, `args.seeds` times."""
    settings = replace(FAST if args.fast else Settings(), initial=args.initial)
    rows: list[dict[str, Any]] = []
    for seed in range(args.seeds):
        for snr_db in _unique(args.snr):
            for row in measure(settings, snr_db, seed):
                rows.append(row)
                progress(f"{noise_name(snr_db)}, seed {seed}: {row['method']}, {row['nmse_db'][-1]:.1f} dB, "
                         f"{row['seconds']:.0f} s")  # fmt: skip
    facts = [coherence(settings, seed) for seed in range(args.seeds)]
    figures = {"settings": asdict(settings), "fast": args.fast, "coherence": facts, "results": rows}
    return Results(figures, markdown(figures), draw(rows))


def measure(settings: Settings, snr_db: float | None, seed: int) -> Iterator[dict[str, Any]]:
    """One row a method: its NMSE after each step, its learned numbers, its seconds of training or tuning."""
    s = settings
    problem = BernoulliGaussian(s.num_features, s.num_atoms, s.active, snr_db, seed)
    # Three streams that never meet: what is measured on, tuned on, and trained on.
    held_out, validation = (problem.sample(s.held_out, stream(seed, use)) for use in (1, 2))
    for method, solver in {"ISTA": ISTA(s.steps), "FISTA": FISTA(s.steps)}.items():
        for chosen in (False, True):
            start = time.perf_counter()
            threshold = choose(problem.dictionary, solver, *validation) if chosen else s.threshold
            seconds = time.perf_counter() - start if chosen else 0.0
            layer = SparseCoding(problem.dictionary, Soft(threshold, dim=-1), solver).eval()
            name = f"{method}, λ chosen" if chosen else f"{method}, λ = {threshold:g}"
            yield _row(name, layer, held_out, snr_db, seed, seconds) | {"threshold": threshold}
    for name, layer in learned_layers(problem.dictionary, settings).items():
        start = time.perf_counter()
        fit(layer, problem, settings, seed)
        yield _row(name, layer, held_out, snr_db, seed, time.perf_counter() - start)


def learned_layers(dictionary: DenseDictionary, settings: Settings) -> dict[str, LearnedSparseCoding]:
    """The learned solvers before training, by name."""
    prox = Soft(settings.first_threshold, dim=-1)
    start: dict[str, Any] = {"prox": prox, "steps": settings.steps, "decay": settings.decay}
    select = SupportSelection()
    layers: dict[str, LearnedSparseCoding] = {
        "LISTA": LISTA(dictionary, initial=settings.initial, **start),
        "LISTA, tied": LISTA(dictionary, tied=True, initial=settings.initial, **start),
        "LISTA-CP": LISTACP(dictionary, initial=settings.initial, **start),
        "LISTA-CP, support selection": LISTACP(dictionary, selection=select, initial=settings.initial, **start),
        "ALISTA": ALISTA(dictionary, **start),
        "ALISTA, support selection": ALISTA(dictionary, selection=select, **start),
    }
    return layers


def choose(dictionary: DenseDictionary, solver: ISTA, x: Tensor, truth: Tensor) -> float:
    """λ of `CANDIDATES` with the smallest NMSE on validation signals."""
    layers = {t: SparseCoding(dictionary, Soft(t, dim=-1), solver).eval() for t in CANDIDATES}
    with torch.no_grad():
        return min(layers, key=lambda t: float(nmse(layers[t].solve(x), truth)))


class Fitting(LightningModule):
    """Trains a learned solver on the codes it should find: the mean NMSE in dB over its deeper half of steps.

    In dB every step counts by its relative improvement, though the last ones have a thousandth of the error.
    """

    def __init__(self, layer: LearnedSparseCoding, settings: Settings) -> None:
        super().__init__()
        self.layer, self.settings = layer, settings

    def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
        x, truth = batch
        codes: list[Tensor] = []
        self.layer.solve(x, record=codes)
        return torch.stack([nmse(z, truth) for z in codes[len(codes) // 2 - 1 :]]).mean()

    def configure_optimizers(self) -> Any:
        learned = [p for p in self.layer.parameters() if p.requires_grad]
        groups = [
            {"params": [p for p in learned if p.ndim > 1], "lr": self.settings.weight_rate},
            {"params": [p for p in learned if p.ndim == 1], "lr": self.settings.scalar_rate},
        ]
        optimizer = torch.optim.Adam([group for group in groups if group["params"]])
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self.settings.iterations)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class Batches(IterableDataset[tuple[Tensor, Tensor]]):
    """Fresh signals without end."""

    def __init__(self, problem: BernoulliGaussian, batch_size: int, generator: torch.Generator) -> None:
        self.problem, self.batch_size, self.generator = problem, batch_size, generator

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        while True:
            yield self.problem.sample(self.batch_size, self.generator)


def fit(layer: LearnedSparseCoding, problem: BernoulliGaussian, settings: Settings, seed: int) -> None:
    """Train the layer, in place."""
    batches = Batches(problem, settings.batch_size, stream(seed, 3))
    trainer = quiet_trainer(max_steps=settings.iterations, barebones=True)
    trainer.fit(Fitting(layer.train(), settings), DataLoader(batches, batch_size=None))
    layer.cpu().eval()


def _row(
    name: str,
    layer: SparseCoding,
    held_out: tuple[Tensor, Tensor],
    snr_db: float | None,
    seed: int,
    seconds: float,
) -> dict[str, Any]:
    x, truth = held_out
    codes: list[Tensor] = []
    with torch.no_grad():
        layer.solve(x, record=codes)
    return {
        "method": name,
        "snr_db": snr_db,
        "seed": seed,
        "nmse_db": [round(float(nmse(z, truth)), 3) for z in codes],
        "learned_numbers": sum(p.numel() for p in layer.parameters() if p.requires_grad),
        "seconds": round(seconds, 1),
    }


def coherence(settings: Settings, seed: int) -> dict[str, float]:
    """Coherences of the dictionary, and the support sizes their uniqueness bound ``½(1 + 1/μ)`` covers."""
    problem = BernoulliGaussian(settings.num_features, settings.num_atoms, settings.active, seed=seed)
    mutual = float(problem.dictionary.coherence())
    generalized = float(analytic_weights(problem.dictionary)[1])
    return {
        "seed": seed,
        "mutual": mutual,
        "generalized": generalized,
        "unique_up_to_atoms": (1 + 1 / mutual) / 2,
        "mean_active_atoms": settings.active * settings.num_atoms,
    }


def markdown(figures: dict[str, Any]) -> str:
    """The final NMSE of every method at every noise level, and then its course."""
    rows, s = figures["results"], figures["settings"]
    levels = _unique(row["snr_db"] for row in rows)
    methods = _unique(row["method"] for row in rows)
    header = [f"NMSE in dB after {s['steps']} steps", *map(noise_name, levels), "learned numbers", "seconds"]
    lines = []
    for method in methods:
        own = [row for row in rows if row["method"] == method]
        figures_of = [spread([r["nmse_db"][-1] for r in own if r["snr_db"] == level], 1) for level in levels]
        lines.append([method, *figures_of, f"{own[0]['learned_numbers']:,}", f"{mean(r['seconds'] for r in own):.0f}"])
    return "\n\n".join([table(header, lines), *(_course(rows, methods, level, s["steps"]) for level in levels)])


def _course(rows: list[dict[str, Any]], methods: list[str], level: float | None, steps: int) -> str:
    depths = [k for k in range(1, steps + 1) if k % 4 == 0 or k == steps]
    lines = []
    for method in methods:
        curves = [row["nmse_db"] for row in rows if row["method"] == method and row["snr_db"] == level]
        lines.append([method, *(spread([curve[k - 1] for curve in curves], 1) for k in depths)])
    return table([f"NMSE in dB, {noise_name(level)}", *(f"step {k}" for k in depths)], lines)


def _unique(values: Any) -> list[Any]:
    return list(dict.fromkeys(values))


def noise_name(snr_db: float | None) -> str:
    """A noise level in words."""
    return "no noise" if snr_db is None else f"SNR {snr_db:g} dB"


def draw(rows: list[dict[str, Any]]) -> Figure:
    """NMSE against the step, a panel a noise level; over several seeds the mean, and a band from least to largest."""
    levels, methods = _unique(row["snr_db"] for row in rows), _unique(row["method"] for row in rows)
    figure = Figure(figsize=(3.6 * len(levels) + 2.6, 4.2), layout="constrained")
    panels = figure.subplots(1, len(levels), squeeze=False)[0]
    for axes, level in zip(panels, levels, strict=True):
        for number, method in enumerate(methods):
            curves = [row["nmse_db"] for row in rows if row["method"] == method and row["snr_db"] == level]
            # Staggered marks: where curves lie on each other, each still shows.
            _curve(axes, method, curves, STYLES[method.split(", λ =")[0]] | {"markevery": (number % 4, 4)})
        axes.set(title=noise_name(level), xlabel="step", xticks=range(0, len(curves[0]) + 1, 4))
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("NMSE (dB)")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right center", fontsize=9, frameon=False)
    return figure


# Classical solvers in black and grey, learned ones in colour; a method keeps its line in every panel.
STYLES: dict[str, dict[str, Any]] = {
    "ISTA": {"color": PALETTE[7], "linestyle": ":"},
    "ISTA, λ chosen": {"color": PALETTE[7]},
    "FISTA": {"color": PALETTE[0], "linestyle": ":"},
    "FISTA, λ chosen": {"color": PALETTE[0]},
    "LISTA": {"color": PALETTE[5], "marker": "o"},
    "LISTA, tied": {"color": PALETTE[2], "marker": "s"},
    "LISTA-CP": {"color": PALETTE[1], "marker": "^"},
    "LISTA-CP, support selection": {"color": PALETTE[4], "marker": "v"},
    "ALISTA": {"color": PALETTE[3], "marker": "D"},
    "ALISTA, support selection": {"color": PALETTE[6], "marker": "P"},
}


def _curve(axes: Axes, method: str, curves: list[list[float]], style: dict[str, Any]) -> None:
    steps = range(1, len(curves[0]) + 1)
    columns = list(zip(*curves, strict=True))
    axes.plot(steps, [mean(c) for c in columns], label=method, markersize=5, linewidth=1.3, **style)
    if len(curves) > 1:
        axes.fill_between(steps, [min(c) for c in columns], [max(c) for c in columns], color=style["color"], alpha=0.2)
