"""What a run leaves behind: its best weights, `summary.json`, a printed table, pictures, and a page."""

import csv
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from math import isqrt
from pathlib import Path
from typing import Any, cast

from torch import Tensor, nn

from dsc import figures, hub, runs
from dsc.data import ImageData
from dsc.details import Details, gather
from dsc.dictionaries import ConvDictionary, DenseDictionary
from dsc.figures import Logged
from dsc.gallery import DEPTHS, gallery, image_layer
from dsc.metrics import Curves, convergence_curves, curve_figures
from dsc.observe import activation_name
from dsc.page import QUALITIES, Source, page
from dsc.tasks import Classifier, Reconstructor, Task
from dsc.trainers import quiet_trainer

COLUMNS = ("active_fraction", "active_group_fraction", "hoyer", "dead_fraction")
PROBE_IMAGES = 32
SOLVED = "convergence/"
TOLERANCE = 2e-4  # between a card and a measurement: 0.02 points
# The converged code is that of at most 1000 steps: sums in another processor's order move it by some 1e-4.
SOLVING_TOLERANCE = 1e-3
PAGE, DETAILS = "report.html", "details.json"


def finish(run: Path, task: Task, data: Any, config: Mapping[str, Any]) -> dict[str, Any]:
    """Test the task's model and write its weights, summary, pictures and page into the run's folder.

    Returns the summary.
    """
    summary, curves = measure(task, data, config["seed_everything"])
    summary["run"] = str(run)
    best = save_best(run, task, data, summary, config)
    (run / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    draw(run, read_metrics(run), curves, task.model, data.in_chans * data.image_size**2)
    write_page([source(run, best, task, data)], runs.fresh(run / PAGE))
    return summary


def measure(task: Task, data: Any, seed: int) -> tuple[dict[str, Any], Curves]:
    """Test figures (in full precision, whatever it was trained in) and convergence curves of the task's model."""
    task.float()
    trainer = quiet_trainer()
    trainer.test(task, data, verbose=False)
    curves = probe_curves(task, data)
    return {
        "dataset": data.dataset,
        "seed": seed,
        "parameters": sum(p.numel() for p in task.model.parameters()),
        "test": {k.removeprefix("test/"): float(v) for k, v in trainer.callback_metrics.items()},
        "convergence": curve_figures(curves, DEPTHS),
    }, curves


def measure_checkpoint(folder: Path, root: str | None = None) -> tuple[dict[str, Any], Curves]:
    """The same for the weights of a checkpoint folder, on the data set they were trained on."""
    task, data = restore(folder, root)
    return measure(task, data, hub.read_config(folder)["dsc"]["seed"])


def restore(folder: Path, root: str | None = None) -> tuple[Task, ImageData]:
    """Task and data of a checkpoint folder, with its weights, and with its training's validation images."""
    config = hub.read_config(folder)
    facts = config["dsc"]
    held_out = hub.trained_with(facts, "data").get("val_fraction")
    split = {} if held_out is None else {"val_fraction": held_out}  # codes' convergence is measured on those images
    data = ImageData(facts["dataset"], root=root, normalize=facts["normalize"], **split)
    kind = {"Classifier": Classifier, "Reconstructor": Reconstructor}[facts["task"]]
    options = {"test_time_augmentation": True} if "accuracy_tta" in facts["metrics"] else {}
    trained = hub.trained_with(facts, "model")
    options["channels_last"] = bool(trained.get("channels_last"))  # as in its training, and on a CPU half again as fast
    task = kind(model=config["architecture"], model_args=config["model_args"], data=data, **options)
    hub.load_weights(task.model, folder)
    return task, data


def halve(folder: Path, out: Path, root: str | None = None) -> dict[str, Any]:
    """Write that checkpoint in half precision to `out`, with the figures that it has there. Returns its summary.

    Raises FileExistsError rather than replace another checkpoint.
    """
    hub.check_free(out)  # before the work, not after it
    config = hub.read_config(folder)
    task, data = restore(folder, root)
    task.model.load_state_dict(hub.halved(task.model.state_dict()))
    summary, _ = measure(task, data, config["dsc"]["seed"])
    facts = config["dsc"] | {"metrics": summary["test"], "convergence": summary["convergence"]}
    args = (config["architecture"], config["model_args"], config["pretrained_cfg"])
    hub.save(task.model, out, *args, facts, half=True)
    return summary


def flat_figures(test: Mapping[str, float], convergence: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Test figures of a summary or card by name, and of each layer and solver the errors and the rate."""
    found = dict(test)
    for row in convergence:
        errors = {f"k={steps}": error for steps, error in row["errors"].items()}
        rate = {} if row.get("rate") is None else {"rate": row["rate"]}
        found |= {f"{SOLVED}{row['layer']} {row['solver']} {k}": value for k, value in (errors | rate).items()}
    return found


def beside(measured: Mapping[str, float], card: Mapping[str, float]) -> str:
    """A table of every figure as the card has it and as it was measured."""
    names = [*card, *(name for name in measured if name not in card)]
    return table(["figure", "card", "measured"], [[k, _number(card.get(k)), _number(measured.get(k))] for k in names])


def differences(measured: Mapping[str, float], card: Mapping[str, float]) -> list[str]:
    """What a card says and was not measured to within `TOLERANCE`, or `SOLVING_TOLERANCE`, a line each."""
    return [
        f"{name}: card {value:.4f}, measured {measured.get(name)}"
        for name, value in card.items()
        if not abs(measured.get(name, float("inf")) - value) <= (SOLVING_TOLERANCE if SOLVED in name else TOLERANCE)
    ]


def probe_curves(task: Task, data: Any) -> Curves:
    """Convergence curves of the task's model on the first validation images."""
    probe = data.probe(PROBE_IMAGES).to(task.device)
    return convergence_curves(task.model.eval(), probe.contiguous(memory_format=task.memory_format))


def save_best(run: Path, task: Task, data: Any, summary: dict[str, Any], config: Mapping[str, Any]) -> Path:
    """Write the model as a checkpoint folder `best`, beside an earlier one of the same run if there is any."""
    own: dict[str, Any] = task.model.pretrained_cfg  # type: ignore[assignment]
    cfg = {
        "input_size": [data.in_chans, data.image_size, data.image_size],
        "fixed_input_size": bool(own.get("fixed_input_size", False)),
        "mean": list(data.mean if data.normalize else (0.0,) * data.in_chans),
        "std": list(data.std if data.normalize else (1.0,) * data.in_chans),
        "crop_pct": 1.0,
        "num_classes": task.model.num_classes,
        "classifier": own.get("classifier"),
        "label_names": list(data.class_names) if task.model.num_classes else None,
        "license": "mit",
    }
    facts = {
        "task": type(task).__name__,
        "dataset": data.dataset,
        "normalize": data.normalize,
        "activation": activation_name(task.model),
        "seed": summary["seed"],
        "metrics": summary["test"],
        "convergence": summary["convergence"],
        "training": {key: config[key] for key in ("data", "model", "trainer", "seed_everything") if key in config},
    }
    cfg = {key: value for key, value in cfg.items() if value is not None or key == "classifier"}
    return hub.save(task.model, runs.fresh(run / "best"), task.architecture, task.model_args, cfg, facts)


def text(summary: Mapping[str, Any]) -> str:
    """The figures of a run as aligned Markdown tables."""
    test = summary["test"]
    head = [f"{name}: {test[name]:.4f}" for name in QUALITIES if name in test]
    layers = sorted({key.split("/", 2)[2] for key in test if key.startswith("sparsity/")} - {"total"})
    sparsity = [[layer, *(_number(test.get(f"sparsity/{column}/{layer}")) for column in COLUMNS)] for layer in layers]
    convergence = [
        [row["layer"], row["solver"], *(_number(row["errors"][str(k)]) for k in DEPTHS), _number(row.get("rate"))]
        for row in summary["convergence"]
    ]
    parts = [
        f"{summary['dataset']}, seed {summary['seed']}, {summary['parameters']:,} parameters",
        "test " + ", ".join(head),
    ]
    if layers:
        parts[-1] += f", active fraction {test['sparsity/active_fraction/total']:.4f}"
        parts.append(table(["layer", *(c.replace("_", " ") for c in COLUMNS)], sparsity))
    if convergence:
        title = "relative error to the converged code after k steps, and the rate a step over the first 32:"
        parts += [title, table(["layer", "solver", *(f"k={k}" for k in DEPTHS), "rate"], convergence)]
    return "\n\n".join(parts)


def table(header: list[str], rows: list[list[str]]) -> str:
    """A Markdown table whose columns are aligned."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    lines = [header, ["-" * width for width in widths], *rows]
    return "\n".join("| " + " | ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)) + " |" for line in lines)


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}" if value == 0 or abs(value) >= 1e-3 else f"{value:.1e}"


def read_metrics(run: Path) -> Logged:
    """Everything the run logged, by name: (epoch, value), oldest first, from all of its `metrics*.csv`."""
    found: dict[str, dict[int, float]] = {}
    for path in sorted(run.glob("metrics*.csv"), key=lambda p: p.stat().st_mtime):
        with path.open(newline="") as file:
            for row in csv.DictReader(file):
                for name, value in row.items():
                    if value and name not in ("epoch", "step"):
                        found.setdefault(name, {})[int(row["epoch"])] = float(value)
    return {name: sorted(values.items()) for name, values in found.items()}


def draw(run: Path, logged: Logged, curves: Curves, model: nn.Module, pixels: int) -> None:
    """Write `training.png`, `sparsity.png`, and where the model has them `convergence.png` and `atoms.png`."""
    figures.training_figure(logged).savefig(run / "training.png", dpi=120)
    figures.sparsity_figure(logged).savefig(run / "sparsity.png", dpi=120)
    if curves:
        figures.convergence_figure(curves).savefig(run / "convergence.png", dpi=120)
    atoms = image_atoms(model, pixels)
    if atoms is not None:
        figures.atoms_figure(atoms).savefig(run / "atoms.png", dpi=120)


def image_atoms(model: nn.Module, pixels: int) -> Tensor | None:
    """Atoms of the first dictionary that lives on images, or None: (atoms, 1 or 3, height, width)."""
    found = image_layer(model, pixels)
    if found is None:
        return None
    dictionary = found[1].dictionary
    if isinstance(dictionary, ConvDictionary):
        return dictionary.atoms()
    return cast(DenseDictionary, dictionary).atoms(3 if 3 * isqrt(pixels // 3) ** 2 == pixels else 1)


def write_report(places: Sequence[str], out: Path | None = None, root: str | None = None) -> Path:
    """Write the page of a run, a published checkpoint or a checkpoint folder, or of two side by side; returns its path.

    A run alone has it in its own folder, others in the current one; none is ever replaced.

    Raises:
        FileNotFoundError: no such place, no weights, or no folder for `out`. ValueError: a name of no checkpoint.
        FileExistsError: `out` exists.
    """
    found = [locate(place) for place in places]
    if out is not None:
        runs.check_new(out)
    sources = [source(run, folder, *restore(folder, root)) for run, folder in found]
    if out is None and len(found) == 1 and found[0][0] is not None:
        out = found[0][0] / PAGE
    names = "-and-".join(s.name.replace("/", "-") for s in sources)
    return write_page(sources, out or runs.fresh(Path(f"report-{names}.html")))


def write_page(sources: Sequence[Source], path: Path) -> Path:
    """Write the page, whole or not at all; beside an earlier one of that name. Returns where."""
    text = page(sources)
    path = runs.fresh(path)
    with runs.whole(path) as unfinished:
        unfinished.write_text(text, encoding="utf-8")
    return path


def locate(place: str) -> tuple[Path | None, Path]:
    """Run folder, None for a checkpoint alone, and checkpoint folder of a path or of a published name.

    Raises:
        FileNotFoundError: neither a run nor a checkpoint, or a run without weights. ValueError: an unknown name.
    """
    folder = Path(place)
    if hub.is_run(folder):
        return folder, hub.kept_by(folder)
    if not (folder / hub.CONFIG).is_file() and (folder.exists() or folder.name != place):
        inside = sorted(path.parent for path in folder.glob("*/config.yaml"))
        hint = f"; did you mean {str(inside[-1])!r}?" if inside else ": a run has config.yaml, a checkpoint config.json"
        raise FileNotFoundError(f"{place} is neither a run nor a checkpoint{hint}")
    return None, hub.locate(place)


def source(run: Path | None, folder: Path, task: Task, data: ImageData) -> Source:
    """What a page shows of a run, or of the checkpoint `folder` alone; only what is not written yet is measured."""
    config = hub.read_config(folder)
    facts, pixels = config["dsc"], data.in_chans * data.image_size**2
    found = image_layer(task.model, pixels)
    details = _details(run, task, data, facts)
    return Source(
        name=folder.resolve().name if run is None else "/".join(run.resolve().parts[-2:]),
        architecture=config["architecture"],
        activation=facts["activation"],
        summary={
            "dataset": facts["dataset"],
            "seed": facts["seed"],
            "parameters": sum(p.numel() for p in task.model.parameters()),
            "test": facts["metrics"],
            "convergence": facts["convergence"],
        },
        config=facts["training"],
        logged={} if run is None else read_metrics(run),
        details=details,
        gallery=gallery(task, data, [example["index"] for example in details.examples]),
        atoms=image_atoms(task.model, pixels),
        atom_group=1 if found is None else found[1].prox.group_size_of(found[1].dictionary.num_atoms),
    )


def _details(run: Path | None, task: Task, data: ImageData, facts: Mapping[str, Any]) -> Details:
    # A run keeps them beside its summary, for the weights that they were measured with.
    path = None if run is None else run / DETAILS
    if path is not None and path.is_file():
        kept = json.loads(path.read_text())
        if kept.pop("sha256") == facts["sha256"]:
            return Details(**kept)
    details = gather(task, data, facts["seed"])
    if path is not None:
        path.write_text(json.dumps({"sha256": facts["sha256"], **asdict(details)}) + "\n")
    return details
