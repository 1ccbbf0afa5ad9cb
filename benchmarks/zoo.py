"""Every family against its plain twin: `uv run benchmarks/zoo.py CONFIG … [--seeds N] [--out FOLDER]`.

Trains each configuration as it is and with `steps: 1`, with seeds 0, 1, …, in processes of their own, and prints a
Markdown table of the test figures. Runs are kept in `FOLDER/<configuration>-<sparse|plain>-<seed>/`; a finished one is
read instead of repeated, and an interrupted one continued, whatever the other arguments, which go to `dsc train`: give
those another FOLDER. Models without unrolled layers (`dsc_attn_*`, timm's) have no plain kind.
"""

import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from common import header, markdown
from dsc.catalogue import describe_model
from dsc.report import read_metrics

ROOT = Path(__file__).resolve().parents[1]
KINDS: dict[str, list[str]] = {"sparse": [], "plain": ["--model.model_args.steps", "1"]}
FIGURES = {
    "accuracy, %": ("accuracy", 100),
    "with augmentation": ("accuracy_tta", 100),
    "mse": ("mse", 1),
    "active": ("sparsity/active_fraction/total", 1),
}


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


def figures(run: Path) -> dict[str, Any]:
    """What the table shows of a run."""
    summary, logged = json.loads((run / "summary.json").read_text()), read_metrics(run)
    found = {name: factor * summary["test"][key] for name, (key, factor) in FIGURES.items() if key in summary["test"]}
    groups = [value for key, value in summary["test"].items() if key.startswith("sparsity/active_group_fraction/")]
    if groups:
        found["active groups"] = statistics.mean(groups)
    errors = [values[-1][1] for name, values in logged.items() if name.startswith("convergence/error/")]
    if errors:
        found["convergence error"] = statistics.mean(errors)
    return found


def row(config: Path, kind: str, runs: Sequence[Path], columns: Sequence[str]) -> list[str]:
    """Means and spreads of the runs of a configuration, with its size and cost."""
    of_runs = [figures(run) for run in runs]
    cells = [_mean_and_spread([f[name] for f in of_runs if name in f]) for name in columns]
    saved = json.loads((runs[0] / "best" / "config.json").read_text())
    cost = describe_model(saved["architecture"], saved["pretrained_cfg"]["input_size"][1:], **saved["model_args"])
    size = f"{cost.parameters / 1e6:.2f}", f"{cost.macs / 1e6:.1f}"
    return [config.stem, kind, str(saved["model_args"].get("activation", "")), *cells, *size]


def _mean_and_spread(values: Sequence[float]) -> str:
    if not values:
        return ""
    digits = 2 if max(values) > 2 else 3 if max(values) > 0.1 else 4
    spread = f" ({min(values):.{digits}f}–{max(values):.{digits}f})" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{digits}f}{spread}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("configs", nargs="+", type=Path)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--kinds", nargs="+", choices=list(KINDS), default=list(KINDS))
    parser.add_argument("--out", type=Path, default=Path("runs/zoo"))
    parsed, more = parser.parse_known_args()
    rows = []
    for config in parsed.configs:
        for kind in parsed.kinds:
            runs = [train(config, kind, seed, parsed.out, more) for seed in range(parsed.seeds)]
            rows.append((config, kind, runs))
    names = (*FIGURES, "active groups", "convergence error")
    columns = [name for name in names if any(name in figures(runs[0]) for _, _, runs in rows)]
    print(header() + f"\n\n{parsed.seeds} seeds: mean (least–most)\n")
    shown = ("configuration", "kind", "activation", *columns, "parameters, M", "multiply–accumulates, M")
    print(markdown(shown, [row(*found, columns) for found in rows]))


if __name__ == "__main__":
    main()
