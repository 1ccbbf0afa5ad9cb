"""Tables and pictures of `gsae_recovery`, beside the figures of the paper."""

from collections.abc import Callable, Iterable
from statistics import mean
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from dsc.report import table
from dsc.reproduce.results import PALETTE, spread

Row = dict[str, Any]
Figured = Callable[[Row], float]

# Read off Figure 3 of arXiv 2102.07003, by SNR in dB.
PAPER: dict[str, str | dict[float, str]] = {
    "start": "880",
    "flat": "≈ 120",
    "group recall": "100 %",
    "sparse recall": "≈ 78 %",
    "distance": {1.0: "6.5", 5.0: "5.2", 10.0: "4.3"},
    "sparse": {1.0: "34, least 20"},
    "loss": {1.0: "0.51", 5.0: "0.20", 10.0: "0.07"},
}
COURSE = (0, 20, 40, 60, 80, 100, 120, 160, 200, 300)


def markdown(figures: Row) -> str:
    """All tables: mean and standard deviation over seeds, or the mean of one."""
    parts = [
        _recovery(figures["recovery"], figures["fast"]),
        _course(figures["recovery"]),
        _theory(figures["theory"], figures["settings"]["held_out"]),
        _sweep(figures["sweep"], figures["settings"]["sweep_epochs"]),
        _blind(figures["blind"]),
        _fixed(figures["fixed"]),
    ]
    s = figures["settings"]
    size = f"{s['num_groups']} groups of {s['group_size']} in {s['num_features']} dimensions, {s['active_groups']} used"
    note = " The paper's figures are of a larger problem: no yardstick here, and left out." if figures["fast"] else ""
    return "\n\n".join([f"{size}, {s['signals']:,} signals an epoch, λ = {s['threshold']:g}.{note}", *parts])


def _recovery(rows: list[Row], fast: bool) -> str:
    levels = _unique(row["snr_db"] for row in rows)

    def line(name: str, model: str, figure: Figured, digits: int = 2, percent: bool = False) -> list[str]:
        chosen = [[figure(r) for r in rows if r["model"] == model and r["snr_db"] == level] for level in levels]
        return [name, *(_percent(values) if percent else spread(values, digits) for values in chosen)]

    def paper(name: str) -> list[str]:
        found = PAPER[name]
        return ["— the paper", *(found if isinstance(found, str) else found.get(level, "") for level in levels)]

    def share(name: str) -> Figured:
        return lambda row: row["support"][name]

    lines = [
        line("‖A − A*‖², start", "group", lambda r: r["distance"][0], 0),
        paper("start"),
        line("‖A − A*‖², end, group", "group", lambda r: r["distance"][-1]),
        paper("distance"),
        line("— flat from epoch", "group", lambda r: r["flat_from_epoch"], 0),
        paper("flat"),
        line("‖A − A*‖², end, sparse", "sparse", lambda r: r["distance"][-1]),
        line("— least of all epochs", "sparse", lambda r: min(r["distance"])),
        paper("sparse"),
        line("10⁵‖Y − Ŷ‖²/(nN²), end, group", "group", lambda r: 1e5 * r["plotted_loss"][-1], 3),
        paper("loss"),
        line("active groups found, group", "group", share("recall"), percent=True),
        paper("group recall"),
        line("— of found, active", "group", share("precision"), percent=True),
        line("— supports all right", "group", share("exact"), percent=True),
        line("non-zero entries found, sparse", "sparse", share("recall"), percent=True),
        paper("sparse recall"),
        line("— of found, non-zero", "sparse", share("precision"), percent=True),
        line("— supports all right", "sparse", share("exact"), percent=True),
    ]
    shown = [row for row in lines if not (fast and row[0] == "— the paper")]
    return table(["near the truth", *map(_level, levels)], shown)


def _course(rows: list[Row]) -> str:
    epochs = [epoch for epoch in COURSE if epoch < len(rows[0]["distance"])]
    lines = []
    for model, level in _unique((row["model"], row["snr_db"]) for row in rows):
        own = [row["distance"] for row in rows if (row["model"], row["snr_db"]) == (model, level)]
        lines.append([f"{model}, {_level(level)}", *(spread([d[epoch] for d in own], 1) for epoch in epochs)])
    return table(["‖A − A*‖² at epoch", *map(str, epochs)], lines)


def _theory(facts: list[Row], signals: int) -> str:
    shown = [fact for fact in facts if fact["seed"] == facts[0]["seed"]]

    def bounds(name: str) -> Callable[[Row], str]:
        return lambda fact: _interval(fact[name]["lower"], fact[name]["upper"])

    def alignment(when: str) -> Callable[[Row], str]:
        found = f"alignment_{when}"
        return lambda fact: f"{fact[found]['value']:.3f} ({fact[found]['tangential']:.3f})"

    def remainder(when: str) -> Callable[[Row], str]:
        found = f"alignment_{when}"
        return lambda fact: f"{fact[found]['remainder']:.2f}, bound {fact[found]['bound']:.2f}"

    def printed(when: str) -> Callable[[Row], str]:
        found = f"printed_contraction_{when}"
        return lambda fact: f"{fact[found]['value']:.1f}".replace("-", "−") + ", vacuous" * fact[found]["vacuous"]

    def fitted(fact: Row) -> str:
        return f"{fact['contraction']['value']:.4f}, floor {fact['contraction']['floor']:.2f}"

    lines: dict[str, Callable[[Row], str]] = {"Theorem 2, contraction an epoch, fitted": fitted}
    for when in ("start", "end"):
        lines[f"Theorem 2, printed ρ, at the {when}"] = printed(when)
        lines[f"Theorem 1, cosine of gradient and A − A*, at the {when} (up to rescaling)"] = alignment(when)
        lines[f"Theorem 1, largest remainder, at the {when}"] = remainder(when)
    for when in ("truth", "start", "end"):
        lines[f"λ observed to find every support, at the {when}"] = bounds(f"observed_range_{when}")
        lines[f"λ proved to, without noise, at the {when}"] = bounds(f"range_{when}")
        lines[f"λ of Lemma 1 as printed, at the {when}"] = lambda fact, when=when: _interval(  # type: ignore[misc]
            *fact[f"range_{when}"]["printed"]
        )
    header = [f"theory, on {signals:,} signals of seed {facts[0]['seed']}", *(_level(fact["snr_db"]) for fact in shown)]
    return table(header, [[name, *map(cell, shown)] for name, cell in lines.items()])


def _interval(lower: float, upper: float) -> str:
    return f"[{lower:.2f}, {upper:.2f})".replace("-", "−") + " empty" * (lower >= upper)


def _sweep(rows: list[Row], epochs: int) -> str:
    lines = []
    for number, first in enumerate(rows[0]["trained"]):
        at = {
            start: [_nearest(row["curves"][start], first["threshold"]) for row in rows] for start in ("truth", "start")
        }
        trained = [row["trained"][number] for row in rows]
        lines.append([
            f"{first['threshold']:g}",
            *(_percent([point[name] for point in at[start]]) for start in at for name in ("recall", "exact")),
            spread([t["distance"] for t in trained], 1),
            *(_percent([t["support"][name] for t in trained]) for name in ("recall", "precision", "exact")),
        ])  # fmt: skip
    header = [f"λ, {_level(rows[0]['snr_db'])}", "recall at truth", "exact", "recall at start", "exact",
              f"‖A − A*‖² after {epochs} epochs", "recall", "precision", "exact"]  # fmt: skip
    return table(header, lines)


def _nearest(curve: list[Row], threshold: float) -> Row:
    return min(curve, key=lambda point: abs(point["threshold"] - threshold))


def _blind(rows: list[Row]) -> str:
    lines = []
    for start in _unique(row["start"] for row in rows):
        own = [row for row in rows if row["start"] == start]
        lines.append([
            start,
            spread([row["active_at_start"] for row in own], 3),
            spread([row["affinity"][0] for row in own], 4),
            spread([row["mean_squared_cosine"] for row in own], 4),
            _percent([row["groups_found"] for row in own]),
            spread([row["correlation_after_procrustes"] for row in own], 4),
            *(_percent([row["support"][name] for row in own]) for name in ("recall", "exact")),
        ])  # fmt: skip
    header = [f"no knowledge of the truth, {_level(rows[0]['snr_db'])}", "active groups a signal at start",
              "mean squared cosine at start", "at end",
              "groups found (> 0.9)", "correlation after Procrustes", "recall", "exact"]  # fmt: skip
    return table(header, lines)


def _fixed(rows: list[Row]) -> str:
    lines = []
    for method in _unique(row["method"] for row in rows):
        own = [row for row in rows if row["method"] == method]
        lines.append([
            method,
            spread([row["distance"] for row in own], 1),
            spread([row["mean_squared_cosine"] for row in own], 4),
            *(_percent([row["support"][name] for row in own]) for name in ("recall", "precision", "exact")),
            spread([row["turns"] for row in own], 0),
            spread([row["seconds"] for row in own], 0),
        ])  # fmt: skip
    header = [f"one set of signals, {_level(rows[0]['snr_db'])}", "‖A − A*‖²", "mean squared cosine", "recall",
              "precision", "exact", "turns", "seconds"]  # fmt: skip
    return table(header, lines)


def draw(figures: Row) -> Figure:
    """The paper's Figure 3: distances, losses, group against sparse, supports; over seeds the mean and the range."""
    rows = figures["recovery"]
    levels = _unique(row["snr_db"] for row in rows)
    colours = dict(zip(levels, (PALETTE[i % len(PALETTE)] for i in (5, 1, 3, 4, 6, 2, 0, 7)), strict=False))
    figure = Figure(figsize=(10.5, 7.6), layout="constrained")
    (distances, losses), (versus, found) = figure.subplots(2, 2)
    for level in levels:
        group = [row for row in rows if row["model"] == "group" and row["snr_db"] == level]
        _band(distances, [row["distance"] for row in group], _level(level), color=colours.get(level))
        _band(losses, [row["plotted_loss"] for row in group], _level(level), first=1, color=colours.get(level))
    for model, colour in MODELS.items():
        own = [row["distance"] for row in rows if row["model"] == model and row["snr_db"] == levels[0]]
        _band(versus, own, model, color=colour)
        for when, line in (("support", "-"), ("support_at_start", ":")):
            shares = [
                [row[when]["recall"] for row in rows if (row["model"], row["snr_db"]) == (model, level)]
                for level in levels
            ]
            label = model + (", start" if line == ":" else ", end")
            found.plot(levels, [100 * mean(v) for v in shares], line, marker="o", color=colour, label=label)
    distances.set(title="(a) group-sparse: distance", xlabel="epoch", ylabel="‖A − A*‖²", yscale="log")
    losses.set(title="(b) group-sparse: training loss", xlabel="epoch", ylabel="‖Y − Ŷ‖²/(nN²)", yscale="log")
    versus.set(title=f"(c) distance at {_level(levels[0])}", xlabel="epoch", ylabel="‖A − A*‖²", yscale="log")
    found.set(title="(d) supports: what is active and found", xlabel="SNR (dB)", ylabel="recall (%)", xticks=levels,
              ylim=(0, 105))  # fmt: skip
    _finish(distances, losses, versus)
    _finish(found, loc="lower right", ncols=2)
    return figure


MODELS = {"group": PALETTE[5], "sparse": PALETTE[4]}
STARTS = {"random": PALETTE[7], "random, λ annealed": PALETTE[1], "signals": PALETTE[4], "shared subspaces": PALETTE[5]}


def draw_beyond(figures: Row) -> Figure:
    """Beyond the paper: supports against λ, distances after short trainings, starts that know nothing of the truth."""
    sweep, blind, facts = figures["sweep"], figures["blind"], figures["theory"]
    figure = Figure(figsize=(14, 5), layout="constrained")
    supports, trained, starts = figure.subplots(1, 3)
    for start, colour in (("truth", PALETTE[3]), ("start", PALETTE[1])):
        for name, line in (("recall", "-"), ("exact", ":")):
            curves = [[100 * point[name] for point in row["curves"][start]] for row in sweep]
            x = [point["threshold"] for point in sweep[0]["curves"][start]]
            _band(supports, curves, f"{name}, at the {start}", x=x, color=colour, linestyle=line)
    own = next(fact for fact in facts if (fact["seed"], fact["snr_db"]) == (sweep[0]["seed"], sweep[0]["snr_db"]))
    observed = own["observed_range_truth"]
    if not observed["vacuous"]:
        for axes in (supports, trained):
            axes.axvspan(observed["lower"], observed["upper"], color=PALETTE[2], alpha=0.2, label="all right at truth")
    x = [point["threshold"] for point in sweep[0]["trained"]]
    _band(trained, [[p["distance"] for p in row["trained"]] for row in sweep], "distance", x=x, marker="o",
          color=PALETTE[5])  # fmt: skip
    for start, colour in STARTS.items():
        rows = [row for row in blind if row["start"] == start]
        _band(starts, [row["affinity"] for row in rows], start, x=rows[0]["epochs"], color=colour, marker="o")
    starts.axhline(0.98, color=PALETTE[0], linewidth=0.8, linestyle="--", label="0.98")
    level = _level(sweep[0]["snr_db"])
    supports.set(title=f"supports against λ, {level}", xlabel="λ", ylabel="signals or groups (%)")
    epochs = figures["settings"]["sweep_epochs"]
    trained.set(title=f"distance after {epochs} epochs", xlabel="λ", ylabel="‖A − A*‖²")
    starts.set(title=f"no knowledge of the truth, {level}", xlabel="epoch", ylabel="mean squared cosine of angles")
    _finish(supports, trained, starts, loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=2)
    return figure


def _band(
    axes: Axes, curves: list[list[float]], label: str, x: list[Any] | None = None, first: int = 0, **style: Any
) -> None:
    columns = list(zip(*curves, strict=True))
    at = x or range(first, first + len(columns))
    axes.plot(at, [mean(column) for column in columns], label=label, linewidth=1.4, markersize=4, **style)
    if len(curves) > 1:
        axes.fill_between(at, list(map(min, columns)), list(map(max, columns)), color=style["color"], alpha=0.2)


def _finish(*panels: Axes, **legend: Any) -> None:
    for axes in panels:
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8, frameon=False, **legend)


def _percent(shares: list[float]) -> str:
    return spread([100 * share for share in shares], 1) + " %"


def _level(snr_db: float) -> str:
    return f"{snr_db:g} dB".replace("-", "−")


def _unique(values: Iterable[Any]) -> list[Any]:
    return list(dict.fromkeys(values))
