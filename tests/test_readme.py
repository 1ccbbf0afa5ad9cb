"""The Python of README and docs runs as it stands, and README's figures are those of the published checkpoint."""

import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from dsc import cli, hub

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()


def test_python_examples_run_in_order(monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    names: dict[str, object] = {}
    for block in re.findall(r"```python\n(.*?)```", README, re.S):
        exec(block, names)
    assert names["codes"].shape == (4, 64, 32, 32)
    assert names["reconstruction"].shape == names["images"].shape
    assert "coder.layers.2" in capsys.readouterr().out


def test_extending_runs_in_order_and_each_part_is_short(monkeypatch):
    torch.manual_seed(0)
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs/extending.md").read_text(), re.S)
    assert len(blocks) == 5 and all(len(block.splitlines()) < 30 for block in blocks)
    page = ModuleType("extending")
    monkeypatch.setitem(sys.modules, page.__name__, page)  # timm looks up the module of what it registers
    for block in blocks:
        exec(block, page.__dict__)


@pytest.mark.parametrize("page", ["index", "paper2"])
def test_examples_of_the_pages_run(page, monkeypatch):
    monkeypatch.chdir(ROOT)
    names: dict[str, object] = {}
    for block in re.findall(r"```python\n(.*?)```", (ROOT / f"docs/{page}.md").read_text(), re.S):
        exec(block, names)
    assert page != "index" or names["codes"].shape == (2, 32, 32, 32)


def test_documentation_builds_without_a_broken_link(tmp_path):
    command = [sys.executable, "-m", "mkdocs", "build", "--quiet", "--strict", "--site-dir", str(tmp_path)]
    subprocess.run(command, check=True, cwd=ROOT)
    pages = {path.stem for path in (ROOT / "docs").glob("*.md")} - {"index"}
    assert all((tmp_path / page / "index.html").is_file() for page in pages)


def test_links_of_the_readme_lead_somewhere():
    for target in re.findall(r"\]\(([^)#]+)", README):
        assert target.startswith("http") or (ROOT / target).exists(), target


def test_convergence_table_is_the_published_checkpoint_s():
    facts = hub.read_config(ROOT / "checkpoints/dsc_cnn.mnist_relu")["dsc"]
    rows = re.findall(r"^\| (coder\S+) +\| (ista|fista) +\| (.+) \|$", README, re.M)
    assert [(row["layer"], row["solver"]) for row in facts["convergence"]] == [row[:2] for row in rows]
    for saved, (_, _, cells) in zip(facts["convergence"], rows, strict=True):
        shown = [float(cell) for cell in cells.split("|")]
        assert shown == pytest.approx([*saved["errors"].values(), saved["rate"]], abs=0.005)


def test_table_of_checkpoints_is_that_of_their_cards(capsys):
    cli.main(["models", "--pretrained"])
    assert capsys.readouterr().out in README, "paste the output of `dsc models --pretrained` into README.md"


def test_accuracy_in_the_table_is_the_published_checkpoint_s():
    accuracy = hub.read_config(ROOT / "checkpoints/dsc_cnn.mnist_relu")["dsc"]["metrics"]["accuracy"]
    assert f"{100 * accuracy:.2f}" in next(line for line in README.splitlines() if "mnist_cnn.yaml --seed" in line)
