"""Calls go down: a file imports only from rows below it."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import dsc

PACKAGE = Path(__file__).resolve().parents[1] / "dsc"

# Each module may import from those in the lines below its own, and from nothing in its line or above.
ROWS = [
    ["__init__"],
    ["cli"],
    ["reproduce"],
    ["report"],
    ["page"],
    ["details"],
    ["markup", "gallery"],
    ["figures"],
    ["tasks"],
    ["synthetic_data"],
    ["data"],
    ["catalogue", "export", "predict"],
    ["models"],
    ["hub"],
    ["compiling", "metrics", "optimizers", "regularizers", "schedules", "trainers"],
    ["observe"],
    ["blocks"],
    ["dictionary_learning", "theory"],
    ["encode", "learned", "synthetic"],
    ["layers"],
    ["dictionaries", "solvers", "active_set"],
    ["measures", "frames", "recovery", "init", "spectra", "activations", "certificates", "gradients"],
    ["nonconvex", "penalties"],
    ["prox"],
    ["shrinkage", "coordinate_descent", "runs"],
    ["_names"],
]
RANK = {module: row for row, modules in enumerate(ROWS) for module in modules}


def imported(path: Path) -> set[str]:
    """First part below `dsc` of every module that the file imports from the package, at any depth of its code."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, f"{path}: relative import"
            names |= {node.module} if node.module != "dsc" else {f"dsc.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
    return {name.split(".")[1] for name in names if name.startswith("dsc.")}


def test_every_module_has_a_row():
    modules = {path.stem for path in PACKAGE.glob("*.py")} | {p.parent.name for p in PACKAGE.glob("*/__init__.py")}
    assert modules == RANK.keys()


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_go_down(path):
    inside = path.relative_to(PACKAGE).parts
    module = inside[0] if len(inside) > 1 else path.stem
    up = {name for name in imported(path) if RANK[name] <= RANK[module] and not (len(inside) > 1 and name == module)}
    assert not up


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_files_and_functions_stay_short(path):
    source = path.read_text()
    assert len(source.splitlines()) <= 400
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef):
            documented = ast.get_docstring(node) is not None
            body = node.body[1:] if documented else node.body
            length = body[-1].end_lineno - body[0].lineno + 1 if body else 0
            assert length <= 40, f"{node.name} has {length} lines"


def test_an_import_takes_nothing_heavy_beside_torch_and_timm():
    heavy = "sklearn", "lightning", "torchmetrics", "matplotlib", "pandas", "jsonargparse", "tensorboard"
    command = f"import dsc, sys; print([name for name in {heavy} if name in sys.modules])"
    assert subprocess.run([sys.executable, "-c", command], check=True, capture_output=True, text=True).stdout == "[]\n"
    assert dsc.DictionaryLearning.__module__ == "dsc.dictionary_learning"
    with pytest.raises(AttributeError, match="has no attribute 'DictionaryLearner'"):
        dsc.DictionaryLearner  # noqa: B018
