"""What a run leaves behind: its best weights, `summary.json`, a printed table, and pictures."""

import csv
import json
from collections.abc import Iterable, Mapping
from math import isqrt
from pathlib import Path
from typing import Any

from lightning.pytorch import Trainer
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor, nn
from torchvision.utils import make_grid

from dsc import hub, runs
from dsc.data import ImageData
from dsc.dictionaries import ConvDictionary, DenseDictionary
from dsc.metrics import Curves, convergence_curves, curve_figures
from dsc.observe import sparse_layers
from dsc.tasks import Classifier, Reconstructor, Task

COLUMNS = ("active_fraction", "active_group_fraction", "hoyer", "dead_fraction")
DEPTHS = (1, 2, 4, 8, 16, 32)
PROBE_IMAGES = 32
PALETTE = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000", "#999999")


def finish(run: Path, task: Task, data: Any, config: Mapping[str, Any]) -> dict[str, Any]:
    """Test the task's model and write its weights, summary and pictures into the run's folder; returns the summary."""
    summary, curves = measure(task, data, config["seed_everything"])
    summary["run"] = str(run)
    save_best(run, task, data, summary, config)
    (run / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    draw(run, read_metrics(run), curves, task.model, data.in_chans * data.image_size**2)
    return summary


def measure(task: Task, data: Any, seed: int) -> tuple[dict[str, Any], Curves]:
    """Test figures (in full precision, whatever it was trained in) and convergence curves of the task's model."""
    trainer = Trainer(logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False)
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
    config = hub.read_config(folder)
    facts = config["dsc"]
    data = ImageData(facts["dataset"], root=root, normalize=facts["normalize"])
    kind = {"Classifier": Classifier, "Reconstructor": Reconstructor}[facts["task"]]
    options = {"test_time_augmentation": True} if "accuracy_tta" in facts["metrics"] else {}
    task = kind(model=config["architecture"], model_args=config["model_args"], data=data, **options)
    hub.load_weights(task.model, folder)
    return measure(task, data, facts["seed"])


def compare(measured: Mapping[str, float], card: Mapping[str, float], tolerance: float = 2e-4) -> None:
    """Raise ValueError where a figure differs from the card's by more than `tolerance` (0.02 points)."""
    wrong = [f"{k}: card {v:.4f}, measured {measured.get(k)}" for k, v in card.items()
             if not abs(measured.get(k, float("inf")) - v) <= tolerance]  # fmt: skip
    if wrong:
        raise ValueError("the checkpoint does not reach its card's figures: " + "; ".join(wrong))


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


def activation_name(model: nn.Module) -> str:
    """Names of the model's activations, as `GroupReLU`."""
    kinds = {getattr(layer.prox, "function", layer.prox) for layer in sparse_layers(model).values()}
    return ", ".join(sorted({type(kind).__name__ for kind in kinds})) or "none"


def text(summary: Mapping[str, Any]) -> str:
    """The figures of a run as aligned Markdown tables."""
    test = summary["test"]
    head = [f"{name}: {test[name]:.4f}" for name in ("accuracy", "accuracy_tta", "mse", "loss") if name in test]
    layers = sorted({key.split("/", 2)[2] for key in test if key.startswith("sparsity/")} - {"total"})
    sparsity = [[layer, *(_number(test.get(f"sparsity/{column}/{layer}")) for column in COLUMNS)] for layer in layers]
    convergence = [
        [row["layer"], row["solver"], *(_number(row["errors"][str(k)]) for k in DEPTHS), _number(row.get("rate"))]
        for row in summary["convergence"]
    ]
    parts = [
        f"{summary['dataset']}, seed {summary['seed']}, {summary['parameters']:,} parameters",
        "test " + ", ".join(head) + f", active fraction {test['sparsity/active_fraction/total']:.4f}",
        table(["layer", *(c.replace("_", " ") for c in COLUMNS)], sparsity),
    ]
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


def read_metrics(run: Path) -> dict[str, list[tuple[int, float]]]:
    """Everything the run logged, by name: (epoch, value), oldest first, from all of its `metrics*.csv`."""
    found: dict[str, dict[int, float]] = {}
    for path in sorted(run.glob("metrics*.csv"), key=lambda p: p.stat().st_mtime):
        with path.open(newline="") as file:
            for row in csv.DictReader(file):
                for name, value in row.items():
                    if value and name not in ("epoch", "step"):
                        found.setdefault(name, {})[int(row["epoch"])] = float(value)
    return {name: sorted(values.items()) for name, values in found.items()}


def draw(run: Path, logged: dict[str, list[tuple[int, float]]], curves: Curves, model: nn.Module, pixels: int) -> None:
    """Write `training.png`, `sparsity.png`, and where the model has them `convergence.png` and `atoms.png`."""
    training_figure(logged).savefig(run / "training.png", dpi=120)
    sparsity_figure(logged).savefig(run / "sparsity.png", dpi=120)
    if curves:
        convergence_figure(curves).savefig(run / "convergence.png", dpi=120)
    atoms = image_atoms(model, pixels)
    if atoms is not None:
        atoms_figure(atoms).savefig(run / "atoms.png", dpi=120)


def training_figure(logged: dict[str, list[tuple[int, float]]]) -> Figure:
    """Loss, and the quality on validation images, against the epoch."""
    quality = next((name for name in ("val/accuracy", "val/mse") if name in logged), None)
    figure = Figure(figsize=(9, 3.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    _lines(left, {name: logged[name] for name in ("train/loss", "val/loss") if name in logged}, "loss (nats or ½ mse)")
    if quality:
        _lines(right, {quality: logged[quality]}, quality.removeprefix("val/"))
    return figure


def sparsity_figure(logged: dict[str, list[tuple[int, float]]]) -> Figure:
    """Active fraction and Hoyer index of every sparse layer against the epoch."""
    figure = Figure(figsize=(9, 3.4), layout="constrained")
    for axes, quantity in zip(figure.subplots(1, 2), ("active_fraction", "hoyer"), strict=True):
        prefix = f"sparsity/{quantity}/"
        lines = {k.removeprefix(prefix): v for k, v in logged.items() if k.startswith(prefix)}
        _lines(axes, lines, f"{quantity.replace('_', ' ')} (validation)")
        axes.set_ylim(0, 1.02)
    return figure


def _lines(axes: Axes, lines: Mapping[str, Iterable[tuple[int, float]]], label: str) -> None:
    for color, (name, points) in zip(PALETTE * (1 + len(lines) // len(PALETTE)), lines.items(), strict=False):
        epochs, values = zip(*points, strict=True)
        axes.plot([epoch + 1 for epoch in epochs], values, marker="o", markersize=3, label=name, color=color)
    axes.set(xlabel="epoch", ylabel=label)
    axes.grid(alpha=0.3)
    if len(lines) > 1:
        axes.legend(fontsize=7, ncols=1 + len(lines) // 9)


def convergence_figure(curves: Curves) -> Figure:
    """Relative error to the converged code against the solver's step, a panel a layer, log scale."""
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


def image_atoms(model: nn.Module, pixels: int) -> Tensor | None:
    """Atoms of the first dictionary that lives on images, or None: (atoms, 1 or 3, height, width)."""
    for module in model.modules():
        if isinstance(module, ConvDictionary) and module.weight.shape[1] in (1, 3):
            return module.atoms()
        if isinstance(module, DenseDictionary) and module.num_features == pixels:
            return module.atoms(3 if 3 * isqrt(pixels // 3) ** 2 == pixels else 1)
    return None


def atoms_figure(atoms: Tensor) -> Figure:
    """Every atom as an image, each scaled to its own range (grey is zero)."""
    scaled = atoms.float().cpu() / atoms.abs().amax((1, 2, 3), keepdim=True).clamp_min(1e-12).cpu() / 2 + 0.5
    picture = make_grid(scaled[:256], nrow=16, padding=1, pad_value=1.0).permute(1, 2, 0)
    figure = Figure(figsize=(6, 6 * picture.shape[0] / picture.shape[1] + 0.1), layout="constrained")
    axes = figure.subplots()
    axes.imshow(picture.numpy(), interpolation="nearest")
    axes.axis("off")
    return figure
