"""What the benchmarks share: times taken side by side, the machine, Markdown."""

import os
import platform
import statistics
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any, TypeVar

import torch

PACKAGES = ("torch", "scikit-learn", "spams-bin", "numpy")
K = TypeVar("K", bound=Hashable)


def interleaved(calls: Mapping[K, Callable[[], Any]], repeats: int) -> dict[K, float]:
    """Median seconds of each call, all called in turn `repeats` times after one turn that does not count."""
    times: dict[K, list[float]] = {name: [] for name in calls}
    for turn in range(repeats + 1):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if turn:
                times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in times.items()}


def header() -> str:
    """The machine and the versions, on one line each."""
    found = []
    for package in PACKAGES:
        try:
            found.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            found.append(f"no {package}")
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else _processor()
    return f"{device}; {torch.get_num_threads()} threads, load {os.getloadavg()[0]:.1f}\n" + ", ".join(found)


def _processor() -> str:
    try:
        with open("/proc/cpuinfo") as info:
            return next(line.split(":")[1].strip() for line in info if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def markdown(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table, its columns after the first aligned right."""
    lines = [list(columns), ["---", *["---:"] * (len(columns) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
