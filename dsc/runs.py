"""Run folders `runs/<name>/<n>/`: numbered, never overwritten, continued only when asked to; files whole or absent."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from dsc._names import unknown

RESUME = Path("resume") / "last.ckpt"


def new_run(root: str | Path, name: str) -> Path:
    """Make and return the next numbered folder of `name`, also when several runs start at once."""
    parent = Path(root) / name
    parent.mkdir(parents=True, exist_ok=True)
    number = max(_numbers(parent), default=0) + 1
    while True:
        try:
            (parent / str(number)).mkdir()
        except FileExistsError:
            number += 1
        else:
            return parent / str(number)


def latest_resumable(root: str | Path, name: str) -> Path:
    """Newest folder of `name` that holds a checkpoint to resume from. Raises FileNotFoundError if there is none."""
    parent = Path(root) / name
    numbers = [n for n in _numbers(parent) if (parent / str(n) / RESUME).is_file()]
    if not numbers:
        others = [path.name for path in Path(root).iterdir() if path.is_dir()] if Path(root).is_dir() else []
        raise FileNotFoundError(f"no run to continue in {parent}: {unknown('run', name, others)}")
    return parent / str(max(numbers))


def fresh(path: Path) -> Path:
    """`path`, or the first of `path-2`, `path-3`, … (before the suffix) that does not exist."""
    candidate, number = path, 2
    while candidate.exists():
        candidate = path.with_name(f"{path.stem}-{number}{path.suffix}")
        number += 1
    return candidate


def check_new(path: Path) -> None:
    """Raise FileExistsError where `path` exists, FileNotFoundError where its folder does not."""
    if path.exists():
        raise FileExistsError(f"{path} exists already: choose another file")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"{path.parent} is no folder: make it first, or choose another file")


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """A name beside `path` to write to, with its suffix: `path` itself once the block has ended well, else gone."""
    unfinished = path.with_name(f".{path.stem}.{os.getpid()}{path.suffix}")
    try:
        yield unfinished
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


def _numbers(parent: Path) -> list[int]:
    return [int(path.name) for path in parent.iterdir() if path.name.isdigit()] if parent.is_dir() else []
