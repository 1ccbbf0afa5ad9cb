"""Every family against its plain twin: `uv run benchmarks/zoo.py CONFIG … [--seeds N] [--out FOLDER]`.

Trains each configuration as it is and with `steps: 1`, with seeds 0, 1, …, in processes of their own, and prints a
Markdown table of the test figures. Runs are kept in `FOLDER/<configuration>-<sparse|plain>-<seed>/`; a finished one is
read instead of repeated, and an interrupted one continued, whatever the other arguments, which go to `dsc train`: give
those another FOLDER. Models without unrolled layers (`dsc_attn_*`, timm's) have no plain kind.

`uv run benchmarks/zoo.py --checkpoints PATTERN …` prints the same of published checkpoints, and trains nothing.
"""

import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from common import header, markdown
from dsc import hub
from dsc.catalogue import describe_checkpoints, describe_model
from dsc.metrics import convergence
from dsc.report import read_metrics, restore
from dsc.tasks import PROBE_IMAGES

ROOT = Path(__file__).resolve().parents[1]
KINDS: dict[str, list[str]] = {"sparse": [], "plain": ["--model.model_args.steps", "1"]}
FIGURES = {
    "accuracy, %": ("accuracy", 100),
    "with augmentation": ("accuracy_tta", 100),
    "mse": ("mse", 1),
    "active": ("sparsity/active_fraction/total", 1),
}
COLUMNS = (*FIGURES, "active groups", "convergence error")


def train(config: Path, kind: str, seed: int, out: Path, more: Sequence[str]) -> Path:
    """The finished run of that configuration, kind and seed."""
    name = f"{config.stem}-{kind}-{seed}"
    found = sorted((out / name).glob("*/summary.json"))
    if found:
        return found[-1].parent
    # One process a run: each begins from the same state.
    command = [sys.executable, "train.py", "--config", str(config.resolve()), "--name", name]
    command += ["--runs", str(out.resolve()), "--trainer.enable_progress_bar", "false"]
    command += [f"--{key}={seed}" for key in ("seed_everything", "data.seed")] + KINDS[kind] + list(more)
    if list((out / name).glob("*/resume/last.ckpt")):
        command += ["--ckpt_path", "last"]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, cwd=ROOT)
    return next((out / name).glob("*/summary.json")).parent


def figures(test: Mapping[str, float], errors: Sequence[float]) -> dict[str, float]:
    """What the table shows of a model's test and of its codes' errors, a layer each."""
    found = {name: factor * test[key] for name, (key, factor) in FIGURES.items() if key in test}
    groups = [value for key, value in test.items() if key.startswith("sparsity/active_group_fraction/")]
    means = {"active groups": groups, "convergence error": errors}
    return found | {name: statistics.mean(values) for name, values in means.items() if values}


def of_run(run: Path) -> dict[str, float]:
    """The figures that a run has kept."""
    logged = read_metrics(run)
    errors = [values[-1][1] for name, values in logged.items() if name.startswith("convergence/error/")]
    return figures(json.loads((run / "summary.json").read_text())["test"], errors)


def of_checkpoint(folder: Path) -> dict[str, float]:
    """The figures of its card, and its codes' errors measured now, as a run measures them after an epoch."""
    task, data = restore(folder)
    data.prepare_data()
    data.setup("fit")
    found = convergence(task.model.eval(), data.probe(PROBE_IMAGES))
    card = hub.read_config(folder)["dsc"]["metrics"]
    return figures(card, [value for name, value in found.items() if name.startswith("error/")])


def row(names: Sequence[str], folder: Path, found: Sequence[Mapping[str, float]], columns: Sequence[str]) -> list[str]:
    """Means and spreads of several models' figures, with the size and cost of the one in `folder`."""
    cells = [_mean_and_spread([f[name] for f in found if name in f]) for name in columns]
    saved = hub.read_config(folder)
    cost = describe_model(saved["architecture"], saved["pretrained_cfg"]["input_size"][1:], **saved["model_args"])
    size = f"{cost.parameters / 1e6:.2f}", f"{cost.macs / 1e6:.1f}"
    return [*names, *cells, *size]


def _mean_and_spread(values: Sequence[float]) -> str:
    if not values:
        return ""
    digits = 2 if max(values) > 2 else 3 if max(values) > 0.1 else 4
    spread = f" ({min(values):.{digits}f}–{max(values):.{digits}f})" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{digits}f}{spread}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("configs", nargs="*", type=Path)
    parser.add_argument("--checkpoints", nargs="+", default=[], metavar="PATTERN", help="shell patterns of their names")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--kinds", nargs="+", choices=list(KINDS), default=list(KINDS))
    parser.add_argument("--out", type=Path, default=Path("runs/zoo"))
    parsed, more = parser.parse_known_args()
    if not (parsed.configs or parsed.checkpoints):
        parser.error("give a configuration, or --checkpoints")
    rows = []
    for config in parsed.configs:
        for kind in parsed.kinds:
            runs = [train(config, kind, seed, parsed.out, more) for seed in range(parsed.seeds)]
            rows.append(((config.stem, kind), runs[0] / "best", [of_run(run) for run in runs]))
    for pattern in parsed.checkpoints:
        for published in describe_checkpoints(pattern):
            folder = hub.find(published.name)
            rows.append(((published.name, "published"), folder, [of_checkpoint(folder)]))
    columns = [name for name in COLUMNS if any(name in found for _, _, of_runs in rows for found in of_runs)]
    print(header() + f"\n\n{parsed.seeds} seeds: mean (least–most)\n")
    shown = ("configuration", "kind", *columns, "parameters, M", "multiply–accumulates, M")
    print(markdown(shown, [row(*found, columns) for found in rows]))


if __name__ == "__main__":
    main()
