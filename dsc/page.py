"""A run's page: one HTML file without scripts or outside files, for light and dark screens, wide and narrow."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

import yaml
from torch import Tensor

from dsc import figures
from dsc.details import Details
from dsc.figures import Logged
from dsc.gallery import Film, Gallery
from dsc.markup import el, img, matrix, number, percent, scrolling, table

STYLE = Path(__file__).with_suffix(".css")
MANY_GROUPS = 64
QUALITIES = {
    "accuracy": "test accuracy",
    "accuracy_tta": "with test-time augmentation",
    "mse": "mean squared error",
    "strongest_group_accuracy": "classes told by the strongest group",
    "loss": "test loss",
}
CURVES = {  # what is drawn against the epoch, for one source
    "Loss": ("train/loss", "val/loss"),
    "Validation accuracy": ("val/accuracy",),
    "Validation error": ("val/mse",),
}


@dataclass(frozen=True)
class Source:
    """A run or a checkpoint, and all that its page shows.

    `summary` is the run's, `config` its configuration, `logged` empty for a checkpoint; `atoms` are images, in groups
    of `atom_group`, None where no dictionary lives on images.
    """

    name: str
    architecture: str
    activation: str
    summary: Mapping[str, Any]
    config: Mapping[str, Any]
    logged: Logged
    details: Details
    gallery: Gallery
    atoms: Tensor | None
    atom_group: int


def page(sources: Sequence[Source]) -> str:
    """The HTML of one source, or of two side by side."""
    sections = [
        ("configuration", "Configuration", configuration(sources), ""),
        ("learning", "Learning curves", learning(sources), ""),
        *((key, title, _side_by_side(sources, show), note) for key, title, show, note in SECTIONS),
    ]
    sections = [section for section in sections if section[2]]
    names = " and ".join(source.name for source in sources)
    body = [
        '<a class="skip" href="#main">Skip to the content</a>',
        _header(sources),
        _navigation([(key, title) for key, title, *_ in sections]),
        el("main", figures_at_a_glance(sources), *(_section(*section) for section in sections), id="main"),
        el("footer", el("p", "Written by <code>dsc report</code>, deep sparse coding for PyTorch.")),
    ]
    head = [
        '<meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        '<meta name="color-scheme" content="light dark">',
        '<link rel="icon" href="data:,">',  # none: a browser would ask the server for one
        el("title", escape(f"dsc report: {names}")),
        el("style", STYLE.read_text()),
    ]
    shown = el("body", figures.tell_apart("".join(body)))
    return "<!doctype html>\n" + el("html", el("head", *head), shown, lang="en") + "\n"


def _header(sources: Sequence[Source]) -> str:
    first = sources[0]
    if len(sources) > 1:
        title = " and ".join(escape(source.name) for source in sources)
        return el("header", el("p", "dsc report, side by side", class_="eyebrow"), el("h1", title))
    facts = f"{first.activation} · {first.summary['dataset']} · seed {first.summary['seed']}"
    title = f"{escape(first.architecture)} {el('small', escape(facts))}"
    return el("header", el("p", escape(f"dsc report: {first.name}"), class_="eyebrow"), el("h1", title))


def _navigation(sections: Iterable[tuple[str, str]]) -> str:
    links = [el("li", el("a", escape(title), href=f"#{key}")) for key, title in sections]
    return el("nav", el("ul", *links), aria_label="Sections")


def _section(key: str, title: str, inner: str, note: str) -> str:
    lead = el("p", escape(note), class_="note") if note else ""
    return el(
        "section", el("h2", escape(title), id=f"{key}-title"), lead, inner, id=key, aria_labelledby=f"{key}-title"
    )


def _side_by_side(sources: Sequence[Source], show: Callable[[Source], str]) -> str:
    shown = [show(source) for source in sources]
    if not any(shown):
        return ""
    if len(sources) == 1:
        return el("div", shown[0], class_="single")
    absent = el("p", "This has no meaning for this model.", class_="note")
    return el("div", *(el("div", _which(i, s), part or absent) for i, (s, part) in
                       enumerate(zip(sources, shown, strict=True))), class_="pair")  # fmt: skip


def _which(index: int, source: Source) -> str:
    return el("p", el("b", "AB"[index]), escape(source.name), class_="which")


def headline(source: Source) -> dict[str, str]:
    """The few figures that come first, as text."""
    test = source.summary["test"]
    found = {title: _quality(name, test[name]) for name, title in QUALITIES.items() if name in test}
    if "sparsity/active_fraction/total" in test:
        found["active code"] = percent(test["sparsity/active_fraction/total"], 1)
    units, dead = source.details.units, _by_layer(test, "dead_fraction")
    if dead:
        found["dead units"] = f"{sum(round(dead[k] * units[k]) for k in dead)} of {sum(units[k] for k in dead):,}"
    return found | {"parameters": f"{source.summary['parameters']:,}"}


def _quality(name: str, value: float) -> str:
    return percent(value) if name.startswith("accuracy") else number(value)


def figures_at_a_glance(sources: Sequence[Source]) -> str:
    """Tiles of one source, a table of two."""
    found = [headline(source) for source in sources]
    if len(found) == 1:
        tiles = [el("div", el("dt", escape(name)), el("dd", escape(text))) for name, text in found[0].items()]
        return el("dl", *tiles, class_="tiles", aria_label="Figures at a glance")
    names = dict.fromkeys(name for figures in found for name in figures)
    rows = [[name, *(figures.get(name, "") for figures in found)] for name in names]
    head = ["", *(f"{letter}: {source.name}" for letter, source in zip("AB", sources, strict=False))]
    title = el("h2", "Figures at a glance", id="glance-title")
    return el("section", title, table("Figures at a glance", head, rows, "wide"), aria_labelledby="glance-title")


def configuration(sources: Sequence[Source]) -> str:
    """What was set (of two sources, what differs), and all of it as YAML."""
    flat = [_settings(source.config) for source in sources]
    if len(flat) == 1:
        shown = el(
            "dl", *(el("div", el("dt", escape(k)), el("dd", escape(v))) for k, v in flat[0].items()), class_="settings"
        )
    else:
        keys = dict.fromkeys(key for settings in flat for key in settings)
        rows = [[key, *(settings.get(key, "") for settings in flat)] for key in keys]
        rows = [row for row in rows if row[1] != row[2]]
        shown = table("What differs", ["what differs", "A", "B"], rows, "wide left")
        if not rows:
            shown = el("p", "Both were trained with the same settings.", class_="note")
    return shown + "".join(_yaml(source) for source in sources)


def _yaml(source: Source) -> str:
    text = el("pre", escape(yaml.safe_dump(dict(source.config), sort_keys=False)), tabindex=0)
    return el("details", el("summary", escape(f"All settings of {source.name} (YAML)")), text)


def _settings(config: Mapping[str, Any]) -> dict[str, str]:
    """Settings that are not empty, by a short name; of Lightning's trainer the few that decide a result."""
    trainer = {k: v for k, v in config.get("trainer", {}).items() if k in ("max_epochs", "precision", "callbacks")}
    kept = {
        "seed": config.get("seed_everything"),
        **{name: config.get(name) for name in ("model", "data")},
        "trainer": trainer,
    }
    flat = {key.removeprefix("model."): value for key, value in _flat(kept)}
    return {key: str(value) for key, value in flat.items() if value not in (None, [], {}) and value is not False}


def _flat(value: Any, prefix: str = "") -> Iterable[tuple[str, Any]]:
    if not isinstance(value, Mapping) or not value:
        yield (
            prefix.removesuffix(".class_path"),
            str(value).rsplit(".", 1)[-1] if prefix.endswith("class_path") else value,
        )
        return
    for key, inner in value.items():
        yield from _flat(inner, prefix if key == "init_args" else f"{prefix}.{key}" if prefix else key)


def learning(sources: Sequence[Source]) -> str:
    """Curves against the epoch; those of two sources in the same panels."""
    logged = [source.logged for source in sources]
    letters = ["", ""] if len(sources) == 1 else ["A ", "B "]
    panels = []
    for title, names in CURVES.items():
        lines = {f"{a}{n}": log[n] for a, log in zip(letters, logged, strict=False) for n in names if n in log}
        panels.append((title, lines))
    for title, quantity in (("Active fraction", "sparsity/active_fraction"), ("Rate a step", "convergence/rate")):
        by_source = [figures.by_layer(log, quantity) for log in logged]
        if len(sources) > 1 and all("total" in layers for layers in by_source):
            by_source = [{"total": layers["total"]} for layers in by_source]
        lines = {f"{a}{n}": v for a, layers in zip(letters, by_source, strict=False) for n, v in layers.items()}
        panels.append((title, lines))
    drawn = [el("figure", el("figcaption", title), figures.epochs_panel(lines, title.lower()))
             for title, lines in panels if lines]  # fmt: skip
    return el("div", *drawn, class_="panels") if drawn else ""


def layers(source: Source) -> str:
    """The table of sparse layers."""
    test, details = source.summary["test"], source.details
    active, groups, dead = (_by_layer(test, q) for q in ("active_fraction", "active_group_fraction", "dead_fraction"))
    hoyer = _by_layer(test, "hoyer")
    rows = []
    for name in active:
        steps = details.convergence.get(f"steps/{name}")
        count = details.units.get(name)
        lost = f"{round(dead[name] * count)} of {count}" if name in dead and count else ""
        rows.append([
            name, percent(active[name], 1), percent(groups.get(name), 1), number(hoyer.get(name), 3), lost,
            "" if steps is None else f"{steps:.0f}",
            number(details.convergence.get(f"rate/{name}")), number(details.convergence.get(f"error/{name}"), 3),
        ])  # fmt: skip
    head = ["layer", "active", "active groups", "Hoyer", "dead units", "steps", "rate a step", "error"]
    kept = [i for i in range(len(head)) if any(row[i] for row in rows)]
    return table("Layers", [head[i] for i in kept], [[row[i] for i in kept] for row in rows]) if rows else ""


def _by_layer(test: Mapping[str, float], quantity: str) -> dict[str, float]:
    prefix = f"sparsity/{quantity}/"
    return {k.removeprefix(prefix): v for k, v in test.items() if k.startswith(prefix) and k != f"{prefix}total"}


def curves(source: Source) -> str:
    """Errors of ISTA and FISTA in every layer that solves for its code."""
    by_layer: dict[str, dict[str, dict[int, float]]] = {}
    for row in source.summary["convergence"]:
        points = {int(k): v for k, v in row["errors"].items() if v > 0}
        by_layer.setdefault(row["layer"], {})[row["solver"].upper()] = points
    drawn = []
    for layer, errors in by_layer.items():
        own = source.details.convergence.get(f"steps/{layer}")
        picture = figures.errors_panel(errors, None if own is None else int(own), layer)
        drawn.append(el("figure", el("figcaption", escape(layer)), picture))
    return el("div", *drawn, class_="panels") if drawn else ""


def atoms(source: Source) -> str:
    """Atoms by use; in groups, a sheet a group, the most used first."""
    use, pictures = source.details.use, source.atoms
    if pictures is None or use is None:
        return ""
    size, by_use = source.atom_group, sorted(range(len(use)), key=lambda i: -use[i])
    if size == 1 or len(use) // size > MANY_GROUPS:
        columns = 8 if len(use) <= 64 else 16 if len(use) <= 256 else 32
        return _sheet(pictures[by_use], columns, f"{len(use)} atoms, the most used first", "sheet")
    groups = [range(g, g + size) for g in range(0, len(use), size)]
    shares = {g[0]: sum(use[i] for i in g) / size for g in groups}
    strips = []
    for g in sorted(groups, key=lambda g: -shares[g[0]]):
        members = sorted(g, key=lambda i: -use[i])
        alt = f"the {size} atoms of group {g[0] // size}, the most used first"
        caption = el("figcaption", f"group {g[0] // size}: active for {percent(shares[g[0]], 1)}")
        strips.append(el("figure", _sheet(pictures[members], _columns(size), alt, ""), caption))
    return el("div", *strips, class_="groups")


def _columns(count: int) -> int:
    return count if count <= 4 else min(8, count)


def _sheet(pictures: Tensor, columns: int, alt: str, class_: str) -> str:
    side = pictures.shape[-1] + 1
    rows = -(-len(pictures) // columns)
    return img(figures.atom_sheet(pictures, columns), alt, columns * side - 1, rows * side - 1, class_)


def test_images(source: Source) -> str:
    """A card an image: itself, its code, the reconstruction growing, the class it was taken for."""
    cards = [_example(source, i, example) for i, example in enumerate(source.details.examples)]
    return el("div", *cards, class_="examples")


def _example(source: Source, index: int, example: Mapping[str, Any]) -> str:
    shown, label, predicted = source.gallery, example["label"], example["predicted"]
    way = "nearest class" if source.details.by_centroid else "taken for"
    sure = "" if example["probability"] is None else f" ({percent(example['probability'], 1)})"
    right = predicted == label
    verdict = el("span", escape(f"{way} {predicted}{sure}"), class_="right" if right else "wrong")
    title = el("h3", escape(f"{label} "), verdict)
    image = shown.images[index]
    parts = [title, img(figures.photo(image), f"test image of {label}", image.shape[2], image.shape[1], "photo")]
    if shown.codes is not None:
        code = shown.codes[index]
        uri, (height, width) = figures.code_picture(code, shown.group_size)
        active = f"{int((code != 0).sum()):,} of {code.numel():,} entries active"
        picture = img(uri, f"its code: {active}", width, height, "code")
        parts.append(el("figure", picture, el("figcaption", active)))
    if shown.film is not None:
        parts.append(_film(shown.film, index, label))
    return el("article", *parts, class_="example")


def _film(film: Film, index: int, label: str) -> str:
    signal = film.signals[index]
    size = signal.shape[2], signal.shape[1]
    frames = [(film.frames[i, index], k, float(film.errors[i, index])) for i, k in enumerate(film.depths)]
    pictures = []
    for frame, k, error in frames:
        steps = f"{k} step{'s' * (k > 1)}"
        picture = img(figures.photo(frame), f"reconstruction after {steps}, error {error:.3f}", *size, "")
        caption = el("figcaption", f"{steps}<br>{error:.3f}")
        pictures.append(el("figure", picture, caption, class_="frame own" if k == film.own else "frame"))
    target = el("figure", img(figures.photo(signal), "input of the layer", *size, ""),
                el("figcaption", "input"), class_="frame")  # fmt: skip
    return scrolling("".join([target, *pictures]), f"Steps of {film.layer} for {label}", "strip film")


def confusion(source: Source) -> str:
    """How many test images of each class (a row) were taken for each class (a column), and the usual mistakes."""
    counts, names = source.details.confusion, source.details.classes
    shares = [[n / max(1, sum(row)) for n in row] for row in counts]
    mistakes = sorted(((n, i, j) for i, row in enumerate(counts) for j, n in enumerate(row) if i != j and n),
                      key=lambda found: -found[0])[:5]  # fmt: skip
    right, total = sum(row[i] for i, row in enumerate(counts)), sum(map(sum, counts))
    text = f"{right:,} of {total:,} right"
    if source.details.by_centroid:
        text = f"By the nearest mean code of the validation images: {text}"
    if mistakes:
        text += ". The usual mistakes: " + ", ".join(f"{names[i]} for {names[j]} ({n})" for n, i, j in mistakes)
    picture = matrix("Confusion matrix", "class ╲ taken for", names, names, shares,
                     [[str(n) for n in row] for row in counts])  # fmt: skip
    return el("p", escape(text + ".")) + picture


def grouping(source: Source) -> str:
    """Clustering figures, and which group is the strongest for images of which class."""
    found, details = [], source.details
    if details.clustering:
        rows = [[row["method"], f"{row['images']:,}", percent(row["accuracy"], 1), number(row["nmi"], 3),
                 number(row["ari"], 3)] for row in details.clustering]  # fmt: skip
        found.append(table("Clustering", ["clusters by", "images", "accuracy", "NMI", "ARI"], rows))
    if details.groups and details.group_order:
        shares = [[row[g] for g in details.group_order] for row in details.groups]
        names = [str(g) for g in details.group_order]
        found.append(el("h3", "Strongest group of the images of each class, in per cent"))
        cells = [[f"{100 * v:.0f}" if v else "0" for v in row] for row in shares]
        found.append(matrix("Groups and classes", "class ╲ group", details.classes, names, shares, cells))
    return "".join(found)


SECTIONS: list[tuple[str, str, Callable[[Source], str], str]] = [
    (
        "layers",
        "Layers",
        layers,
        "Of the test set. The error of a code is relative to the converged one, after the steps that the model takes; "
        "each further step shrinks it by the rate.",
    ),
    (
        "convergence",
        "Convergence",
        curves,
        "Relative error to the converged code after k steps of either solver, with the layer's input frozen.",
    ),
    (
        "dictionary",
        "Dictionary",
        atoms,
        "Atoms of the first layer, the most used first, each in its own range; grey is zero.",
    ),
    (
        "images",
        "Test images",
        test_images,
        "The first image of each class, its code (blue above zero, orange below), and Dz after some steps of the first "
        "layer, with ‖x − Dz‖²/‖x‖². A frame marks the number of steps that the model takes.",
    ),
    (
        "confusion",
        "Confusion matrix",
        confusion,
        "A row a class, a column what its test images were taken for.",
    ),
    (
        "groups",
        "Groups and classes",
        grouping,
        "How well the codes know the classes that training never saw.",
    ),
]
