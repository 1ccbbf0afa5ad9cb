import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from dsc import cli, frames
from dsc.dictionaries import ConvDictionary
from dsc.reproduce import dsc_rate

FRAME, LARGER, PATCHES = "Steiner 28 × 64", "Paley 31 × 62", "patches 3 × 3"
TINY = replace(
    dsc_rate.FAST, rate_frames=(FRAME, PATCHES), stability_frames=(FRAME, PATCHES), sparsity=2, signals=3, models=7,
    error=1e-5,
)  # fmt: skip


def filters():
    """Eight filters of nine pixels, of low coherence."""
    g = torch.Generator().manual_seed(0)
    mixed = torch.linalg.qr(torch.randn(9, 8, generator=g, dtype=torch.float64)).Q.T
    noise = 0.06 * torch.randn(8, 9, generator=g, dtype=torch.float64)
    return torch.nn.functional.normalize(mixed + noise, dim=1)


@pytest.fixture(autouse=True)
def tiny(monkeypatch, tmp_path):
    monkeypatch.setattr(
        dsc_rate, "FRAMES", {FRAME: lambda: frames.steiner(8), LARGER: lambda: frames.paley(61), PATCHES: filters}
    )
    monkeypatch.setattr(dsc_rate, "FAST", TINY)
    monkeypatch.setattr(dsc_rate, "LAYERS", (1, 2))
    monkeypatch.chdir(tmp_path)
    dsc_rate.frame_of.cache_clear()
    yield tmp_path
    dsc_rate.frame_of.cache_clear()


def test_the_experiment_and_its_figures(tiny, capsys):
    cli.main(["reproduce", "dsc_rate", "--fast", "--seeds", "2", "--out", "found"])
    found = json.loads((tiny / "found" / "dsc_rate.json").read_text())
    rates, bounds = found["rates"], found["stability"]
    cases = [(seed, frame, layers, noisy) for seed in (0, 1) for frame in (FRAME, PATCHES) for layers in (1, 2)
             for noisy in (False, True)]  # fmt: skip
    assert [(row["seed"], row["frame"], row["layers"], row["noisy"]) for row in rates] == cases
    for row in rates:
        assert row["above_the_bound"] == 0 and row["false_positives"] == 0 and row["largest_ratio"] <= 1
        assert len(row["errors"]) == len(row["bounds"]) == row["steps"] + 1
        assert row["checked"] == row["layers"] * row["steps"]
        assert row["predicted_rate"] == pytest.approx(
            max((2 * s - 1) * mu for s, mu in zip(row["sparsities"], row["coherences"], strict=True))
        )
        assert row["noisy"] or row["last_error"] <= 1e-5
        assert (row["predicted_floor"] > 0) == row["noisy"] and 0 < row["last_error"] <= row["bounds"][-1]
    assert [(row["frame"], row["layers"]) for row in bounds] == [(f, j) for f in (FRAME, PATCHES) for j in (1, 2)]
    assert sum(row["models"] for row in bounds) == 7 and not any(row["above_the_bound"] for row in bounds)
    assert bounds[0]["largest_ratios"][0] == pytest.approx(1)  # a simplex attains the bound
    covered = {row["frame"]: row["covered"] for row in found["coverage"]}
    assert covered[FRAME] == 3 and covered["Gaussian 250 × 500"] == 2
    table = (tiny / "found" / "dsc_rate.md").read_text()
    assert table.strip() in capsys.readouterr().out and "2, 1" in table
    measured = [
        row["measured_rate"] for row in rates if (row["frame"], row["layers"], row["noisy"]) == (FRAME, 1, False)
    ]
    assert f"{np.mean(measured):.3f} ± {np.std(measured, ddof=1):.3f}" in table
    assert (tiny / "found" / "dsc_rate.png").read_bytes().startswith(b"\x89PNG")


def test_a_row_can_be_made_again():
    first, second = (dsc_rate.measure_rate(TINY, FRAME, 2, True, seed=3) for _ in range(2))
    assert first == second


def test_the_random_models_satisfy_the_conditions_and_differ():
    seen = set()
    for seed in range(8):
        for frame in (FRAME, LARGER, PATCHES):
            found = dsc_rate.measure_model(frame, 1 + seed % 2, seed)
            assert found["above"] == 0 and len(found["far"]) == 1 + seed % 2
            assert found["distances"] == (1 + seed % 2) * (2 + seed % 2)
            assert found["random"] <= max(found["far"]) + 1e-12
            seen.add((frame, tuple(found["sparsities"])))
    assert len(seen) > 6 and (LARGER, (4, 1)) in seen  # lines of four points, of which Paley's frame takes one


def test_patches_are_a_convolution():
    first = dsc_rate.first_layer(PATCHES, torch.Generator().manual_seed(0))
    assert isinstance(first, ConvDictionary) and first.stride == 3 and dsc_rate.image_side(first) == 6
    atoms = first.weight.flatten(1)
    assert sorted(math.fsum(a) for a in atoms.abs().tolist()) == pytest.approx(
        sorted(math.fsum(a) for a in filters().abs().tolist())
    )


def test_its_name_is_known(capsys):
    with pytest.raises(SystemExit, match="2"):
        cli.main(["reproduce", "dsc_rat"])
    assert "did you mean 'dsc_rate'?" in capsys.readouterr().err
