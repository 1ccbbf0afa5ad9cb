"""The choice, tables and picture of `sparse_training`."""

from collections.abc import Callable, Iterable
from operator import itemgetter
from statistics import mean
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from dsc.report import table
from dsc.reproduce.results import PALETTE, spread

Row = dict[str, Any]
Point = tuple[str, str, float]
ALLOWED_LOSS = 0.003  # of accuracy on validation images
ASKED_FRACTION = 1 / 3  # of the active fraction without a strategy
WITHOUT: dict[str, Point] = {  # what a strategy is compared with; top-k is one itself, in the place of ReLU
    "relu": ("relu", "none", 0),
    "group_relu": ("group_relu", "none", 0),
    "top_k": ("relu", "none", 0),
}
NAMES = {"relu": "ReLU", "group_relu": "group ReLU", "top_k": "top-k"}
TITLES = {
    "none": "none",
    "l1": "ℓ1",
    "group": "group ℓ2,1",
    "hoyer": "Hoyer",
    "log": "log",
    "reconstruction": "reconstruction",
    "coherence": "coherence",
    "threshold": "learned λ, from",
    "l1_target": "ℓ1, held at",
    "hoyer_target": "Hoyer, held at",
    "k": "k",
}


def points(rows: list[Row]) -> dict[Point, list[Row]]:
    """Runs that differ in their seed alone, seeds in order."""
    found: dict[Point, list[Row]] = {}
    for row in rows:
        found.setdefault((row["activation"], row["strategy"], row["strength"]), []).append(row)
    return found


def choose(rows: list[Row]) -> list[Row]:
    """For each activation and strategy the strength of fewest active entries, within the loss allowed.

    Both by validation images, as means over seeds; a strategy without such a strength has none.
    """
    by_point, chosen = points(rows), []
    for activation, strategy in dict.fromkeys((a, s) for a, s, _ in by_point if s != "none"):
        least = mean(row["val_accuracy"] for row in by_point[WITHOUT[activation]]) - ALLOWED_LOSS
        fit = {
            point: mean(row["val_active"] for row in found)
            for point, found in by_point.items()
            if point[:2] == (activation, strategy) and mean(row["val_accuracy"] for row in found) >= least
        }
        strength = min(fit, key=lambda point: fit[point])[2] if fit else None
        chosen.append({"activation": activation, "strategy": strategy, "strength": strength})
    return chosen


def noisy(row: Row) -> float:
    """Mean accuracy over all kinds and levels of noise."""
    return mean(value for levels in row["noise"].values() for value in levels)


active, clean, attacked = itemgetter("test_active"), itemgetter("test_accuracy"), itemgetter("attack")


def markdown(figures: Row) -> str:
    """The chosen networks beside those without a strategy, λ at inference, and every network."""
    rows, s = figures["runs"], figures["settings"]
    seeds = len({row["seed"] for row in rows})
    size = f"{s['dataset']}, {s['model']}, {s['epochs']} epochs, {seeds} seed" + ("s" if seeds > 1 else "")
    return "\n\n".join(
        [
            f"{size}. Changes are to the network of the same seed without a strategy, in points; under noise is the "
            "mean over four kinds, three levels each.",
            _chosen(rows, figures["chosen"]),
            _inference(rows, figures["chosen"]),
            _all(rows),
        ]
    )


def _chosen(rows: list[Row], chosen: list[Row]) -> str:
    header = ["activation", "strategy", "active, %", "of that without", "accuracy, %", "change", "under noise, change"]
    header += ["under attack, change", "a third for 0.3 points"]
    by_point, lines = points(rows), []
    for point in _baselines(by_point):
        found = by_point[point]
        figures = [_percent(map(f, found)) for f in (active, clean, noisy, attacked)]
        lines.append([NAMES[point[0]], "none", figures[0], "1", figures[1], "", *figures[2:], ""])
    for one in chosen:
        head = [NAMES[one["activation"]], TITLES[one["strategy"]]]
        if one["strength"] is None:
            lines.append([*head, *[""] * 6, "no strength within 0.3 points"])
            continue
        ours = by_point[one["activation"], one["strategy"], one["strength"]]
        theirs = by_point[WITHOUT[one["activation"]]]
        head[1] += f" {one['strength']:g}"
        share = [active(a) / active(b) for a, b in zip(ours, theirs, strict=True)]
        changes = [_change(ours, theirs, f) for f in (clean, noisy, attacked)]
        figures = [_percent(map(f, ours)) for f in (active, clean)]
        lost = _mean(theirs, clean) - _mean(ours, clean)
        met = "yes" if mean(share) <= ASKED_FRACTION and lost <= ALLOWED_LOSS else "no"
        lines.append([*head, figures[0], spread(share, 2), figures[1], *changes, met])
    return table(header, lines)


def _inference(rows: list[Row], chosen: list[Row]) -> str:
    by_point = points(rows)
    wanted = [*_baselines(by_point), *((c["activation"], c["strategy"], c["strength"]) for c in chosen)]
    kinds = list(rows[0]["noise"])
    lines = []
    for point in wanted:
        found = [row for row in by_point.get(point, []) if "adaptive" in row]
        if not found:
            continue
        cells = [([clean(row) for row in found], [row["adaptive_clean"] for row in found])]
        cells += [
            ([mean(row["noise"][kind]) for row in found], [mean(row["adaptive"][kind]) for row in found])
            for kind in kinds
        ]
        lines.append([*_name(point), *(f"{_percent(before)} → {_percent(after)}" for before, after in cells)])
    return table(["λ as learned → for each image, %", "strategy", "clean", *kinds], lines)


def _all(rows: list[Row]) -> str:
    header = ["activation", "strategy", "validation, %", "active, %", "accuracy, %", "under noise, %", "attack, %"]
    lines = []
    for point, found in points(rows).items():
        values = (itemgetter("val_accuracy"), active, clean, noisy, attacked)
        lines.append([*_name(point), *(_percent(map(value, found)) for value in values)])
    return table(header, lines)


def _baselines(by_point: dict[Point, list[Row]]) -> list[Point]:
    return [point for point in by_point if point[1] == "none"]


def _name(point: Point) -> list[str]:
    activation, strategy, strength = point
    return [NAMES[activation], TITLES[strategy] + ("" if strategy == "none" else f" {strength:g}")]


def _percent(values: Iterable[float]) -> str:
    return spread([100 * value for value in values], 2)


def _change(ours: list[Row], theirs: list[Row], figure: Callable[[Row], float]) -> str:
    shown = _percent([figure(a) - figure(b) for a, b in zip(ours, theirs, strict=True)])
    return shown if shown.startswith("−") else f"+{shown}"


def draw_fronts(rows: list[Row], chosen: list[Row]) -> Figure:
    """Accuracy against active fraction: clean, under noise and under attack, a column an activation."""
    by_point = points(rows)
    activations = list(dict.fromkeys(row["activation"] for row in rows))
    measures: dict[str, Callable[[Row], float]]
    measures = {"accuracy (%)": clean, "under noise (%)": noisy, "under attack (%)": attacked}
    figure = Figure(figsize=(4.2 * len(activations) + 1.8, 8.4), layout="constrained")
    panels = figure.subplots(len(measures), len(activations), squeeze=False, sharex=True, sharey="row")
    for line, (label, measure) in zip(panels, measures.items(), strict=True):
        for axes, activation in zip(line, activations, strict=True):
            _front(axes, activation, by_point, chosen, measure)
        line[0].set_ylabel(label)
    for axes, activation in zip(panels[0], activations, strict=True):
        axes.set_title(NAMES[activation])
        base = by_point[WITHOUT[activation]]
        axes.axvline(100 * ASKED_FRACTION * _mean(base, active), color="0.6", linestyle=":")
        axes.axhline(100 * (_mean(base, clean) - ALLOWED_LOSS), color="0.6", linestyle=":")
    for line, below, measure in zip(panels, (4, 15, 100), measures.values(), strict=True):
        best = 100 * max(_mean(found, measure) for found in by_point.values())
        line[0].set_ylim(max(best - below, 0), best + below / 8)  # strengths that ruin a network are in the table
    for axes in panels[-1]:
        axes.set_xlabel("active entries (%)")
    handles: dict[str, Any] = {}
    for axes in panels[0]:
        handles |= {label: handle for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles.keys(), loc="outside right center", frameon=False, fontsize=9)
    return figure


def _front(
    axes: Axes, activation: str, by_point: dict[Point, list[Row]], chosen: list[Row], measure: Callable[[Row], float]
) -> None:
    strategies = list(TITLES)
    strengths = {(c["strategy"], c["strength"]) for c in chosen if c["activation"] == activation}
    for strategy in strategies:
        found = {p: runs for p, runs in by_point.items() if p[:2] == (activation, strategy)}
        if strategy == "none" and not found:
            found = {WITHOUT[activation]: by_point[WITHOUT[activation]]}
        if not found:
            continue
        spots = {p: (100 * _mean(runs, active), 100 * _mean(runs, measure)) for p, runs in found.items()}
        color = PALETTE[strategies.index(strategy) % len(PALETTE)]
        style = (
            {"marker": "*", "markersize": 13} if strategy == "none" else {"marker": MARKERS[strategies.index(strategy)]}
        )
        axes.plot(
            *zip(*sorted(spots.values()), strict=True),
            color=color,
            label=TITLES[strategy],
            linewidth=1,
            **style,
        )
        for point, spot in spots.items():
            if (strategy, point[2]) in strengths:
                axes.plot(*spot, "o", markersize=13, markerfacecolor="none", markeredgecolor=color)
    axes.set_xscale("log")
    axes.grid(alpha=0.3)


MARKERS = "*osDv^<>PXh"


def _mean(rows: list[Row], measure: Callable[[Row], float]) -> float:
    return mean(measure(row) for row in rows)
