"""What an experiment is, and the files it leaves: its figures as JSON, its table as Markdown, its pictures."""

import json
import platform
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from statistics import mean, stdev
from types import ModuleType
from typing import Any

import torch
from matplotlib.figure import Figure

SUFFIXES = (".json", ".md", ".png")
PACKAGES = ("deep-sparse-coding", "torch", "lightning", "numpy")

# Readable for the colour-blind (Okabe and Ito 2008).
PALETTE = ("#000000", "#e69f00", "#56b4e9", "#009e73", "#d55e00", "#0072b2", "#cc79a7", "#999999")


@dataclass(frozen=True)
class Results:
    """An experiment's outcome: `figures` for JSON, `table` in Markdown, the picture, and further ones by name."""

    figures: dict[str, Any]
    table: str
    picture: Figure
    more_pictures: Mapping[str, Figure] = field(default_factory=dict)


@dataclass(frozen=True)
class Experiment:
    """An experiment of `dsc reproduce`.

    `run` takes the parsed arguments (`fast` and `seeds` among them) and a function that it tells its progress, a
    line at a time.
    """

    description: str
    add_arguments: Callable[[ArgumentParser], None]
    run: Callable[[Namespace, Callable[[str], None]], Results]

    @classmethod
    def of(cls, module: ModuleType) -> "Experiment":
        """A file's experiment: its docstring, its `run`, and its `add_arguments` where it has options of its own."""
        return cls(module.__doc__ or "", getattr(module, "add_arguments", lambda parser: None), module.run)


def check_fresh(folder: Path, name: str) -> None:
    """Raise FileExistsError where `folder` holds results of that experiment already."""
    for path in sorted(folder.glob(f"{name}*")):
        if path.suffix in SUFFIXES and (path.stem == name or path.stem.startswith(f"{name}_")):
            raise FileExistsError(f"{path} exists already: choose another folder with --out")


def write(folder: Path, name: str, results: Results) -> None:
    """Write `<name>.json`, `.md` and `.png`, and `<name>_<key>.png` for further pictures, into `folder`.

    Raises FileExistsError, never overwrites.
    """
    check_fresh(folder, name)
    folder.mkdir(parents=True, exist_ok=True)
    figures = {"experiment": name, "environment": environment(), **results.figures}
    (folder / f"{name}.json").write_text(json.dumps(figures, indent=1, allow_nan=False) + "\n")
    (folder / f"{name}.md").write_text(results.table + "\n")
    results.picture.savefig(folder / f"{name}.png", dpi=120)
    for key, picture in results.more_pictures.items():
        picture.savefig(folder / f"{name}_{key}.png", dpi=120)


def check_same(what: str, found: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """Raise ValueError where `what`, to be continued, was made with other settings than those wanted."""
    if different := [f"{key}={found.get(key)}" for key in wanted if found.get(key) != wanted[key]]:
        raise ValueError(f"{what} was made with {', '.join(different)}: choose another --out")


def spread(values: list[float], digits: int) -> str:
    """Mean, and over several seeds the standard deviation, for a table."""
    shown = f"{mean(values):,.{digits}f}" + (f" ± {stdev(values):,.{digits}f}" if len(values) > 1 else "")
    return shown.replace("-", "−")


def stream(seed: int, use: int) -> torch.Generator:
    """Random numbers for one use of a seed: streams never meet, nor that of a dictionary drawn with the seed itself."""
    return torch.Generator().manual_seed(1_000_003 * (seed + 1) + use)


def environment() -> dict[str, Any]:
    """Versions, processor and threads that the figures were measured with."""
    return {
        "python": platform.python_version(),
        **{package: version(package) for package in PACKAGES},
        "machine": platform.machine(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }
