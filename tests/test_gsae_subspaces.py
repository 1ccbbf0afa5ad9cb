import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.linalg import subspace_angles
from sklearn.datasets import load_digits
from torch import Generator
from torch.nn import functional as F

from dsc import cli
from dsc.init import perturbed
from dsc.metrics import clustering_scores
from dsc.recovery import match_groups
from dsc.reproduce import gsae_subspaces as subspaces
from dsc.reproduce.baselines import Learned
from dsc.reproduce.gsae_subspaces import FAST, Case, Settings

TINY = replace(FAST, num_features=8, num_groups=2, signals=60, epochs=2, batch_size=20, turns=2, restarts=1,
               neighbours=5, snr_db=(10.0, 5.0), group_size=(2,), overlap=(0.0, 0.5))  # fmt: skip
METHODS = list(subspaces.STYLES)


def orthogonal_subspaces(count=120, seed=0):
    """Noiseless signals on three orthogonal planes of R^12, their classes and bases."""
    generator = Generator().manual_seed(seed)
    bases = torch.linalg.qr(torch.randn(12, 6, generator=generator)).Q.mT
    labels = torch.arange(count) % 3
    codes = torch.randn(count, 2, generator=generator)
    signals = torch.einsum("nd,ndf->nf", codes, bases.unflatten(0, (3, 2))[labels])
    return signals, labels, bases


def test_the_subspaces_overlap_as_they_are_told_to():
    settings = replace(Settings(), num_features=2000, num_groups=4)
    for overlap in (0.0, 0.4, 0.8):
        union = subspaces.union_of_subspaces(Case(group_size=3, overlap=overlap), settings, seed=1)
        bases = union.dictionary.weight.double().numpy().reshape(4, 3, -1)
        np.testing.assert_allclose(bases[2] @ bases[2].T, np.eye(3), atol=1e-5)
        cosines = np.cos([subspace_angles(bases[g].T, bases[h].T) for g in range(4) for h in range(g)])
        assert np.abs(cosines - overlap).max() < 0.12
    sample = union.sample(4000, Generator().manual_seed(0))
    clean = (sample.codes @ union.dictionary.weight).square().sum()
    noise = (sample.signals - sample.codes @ union.dictionary.weight).square().sum()
    assert 10 * math.log10(clean / noise) == pytest.approx(10, abs=0.2)


@pytest.mark.parametrize(
    "case, message",
    [
        (Case(overlap=1.0), "overlap must be at least 0 and below 1, where all subspaces are one, got 1.0"),
        (Case(overlap=-0.1), "got -0.1"),
        (Case(snr_db=-math.inf), "snr_db must be a number of dB, or None for no noise, got -inf"),
        (Case(group_size=31), "group_size=31 atoms of 30 features cannot be orthonormal"),
    ],
)
def test_cases_that_cannot_be(case, message):
    with pytest.raises(ValueError, match=message.replace(".", r"\.")):
        subspaces.problem(case, Settings(), 0)


def test_signals_follow_the_seed_and_the_digits_do_not():
    union = [subspaces.problem(Case(), TINY, seed) for seed in (0, 0, 1)]
    assert torch.equal(union[0].signals, union[1].signals) and not torch.equal(union[0].signals, union[2].signals)
    digits = subspaces.problem(Case("digits"), replace(TINY, signals=10_000), 3)
    raw = load_digits()
    np.testing.assert_allclose(digits.signals, raw.data / 16 - raw.data.mean(0) / 16, atol=1e-6)
    np.testing.assert_array_equal(digits.labels, raw.target)
    assert digits.truth is None


def test_seeds_find_orthogonal_subspaces_at_once():
    signals, _, bases = orthogonal_subspaces()
    for seed in range(5):
        start = subspaces.seeded_groups(F.normalize(signals, dim=1), 3, 2, Generator().manual_seed(seed))
        assert match_groups(start, bases, 2).mean_squared_cosine == pytest.approx(1, abs=1e-4)
        blocks = (start @ start.mT).unflatten(1, (3, 2)).unflatten(0, (3, 2)).diagonal(dim1=0, dim2=2)
        torch.testing.assert_close(blocks, torch.eye(2).unsqueeze(2).expand(2, 2, 3), atol=1e-5, rtol=0)


def test_cosines_know_neither_signs_nor_norms():
    signals, labels, _ = orthogonal_subspaces()
    found = subspaces.spectral_of_cosines(signals, 3, 8, 0)
    assert clustering_scores(found, labels)["accuracy"] == 1
    factors = torch.randn(len(signals), 1, generator=Generator().manual_seed(5)) * 3
    assert clustering_scores(subspaces.spectral_of_cosines(factors * signals, 3, 8, 0), found)["accuracy"] == 1


def fista(x, atoms, threshold, steps, group_size):
    """FISTA on ½‖x − zD‖² + λ Σ‖z_g‖ in steps of 1/‖D‖², its textbook loop."""
    step = 1 / np.linalg.norm(atoms, 2) ** 2
    z = y = np.zeros((len(x), len(atoms)))
    t = 1.0
    for _ in range(steps):
        u = (y + step * (x - y @ atoms) @ atoms.T).reshape(len(x), -1, group_size)
        norms = np.linalg.norm(u, axis=2, keepdims=True)
        before, z = z, (np.maximum(1 - threshold * step / norms, 0) * u).reshape(len(x), -1)
        following = (1 + (1 + 4 * t**2) ** 0.5) / 2
        y, t = z + (t - 1) / following * (z - before), following
    return z


def test_the_autoencoder_is_the_unfolded_one_and_learns():
    case = Case(group_size=2)
    settings = replace(TINY, num_groups=3, num_features=10, signals=200, epochs=10)
    given = subspaces.problem(case, settings, 0)
    x = F.normalize(given.signals, dim=1)
    start = perturbed(given.truth, 0.8, Generator().manual_seed(7))
    first, again = (subspaces.autoencoder(x, start, settings, 2, 0) for _ in range(2))
    assert torch.equal(first.atoms, again.atoms)
    torch.testing.assert_close(first.atoms.norm(dim=1), torch.ones(6))
    atoms, z = first.atoms.double().numpy(), first.codes.double().numpy()
    expected = fista(x.double().numpy(), atoms, settings.threshold, settings.steps, 2)
    np.testing.assert_allclose(z, expected, atol=2e-3)
    objective = ((x.numpy() - z @ atoms) ** 2).sum(1) / 2
    objective += settings.threshold * np.linalg.norm(z.reshape(len(z), 3, 2), axis=2).sum(1)
    assert first.objective == pytest.approx(objective.mean(), rel=1e-4)
    untrained = fista(x.double().numpy(), start.double().numpy(), settings.threshold, settings.steps, 2)
    errors = [((x.numpy() - z @ d) ** 2).sum() for z, d in ((untrained, start.double().numpy()), (expected, atoms))]
    assert errors[1] < errors[0]
    near = [match_groups(d, given.truth, 2).mean_squared_cosine for d in (start, first.atoms)]
    assert near[0] < 0.85 and near[1] > 0.95


def test_the_least_objective_counts_and_the_seconds_of_all():
    fits = [Learned("m", torch.zeros(1), torch.zeros(1), value, 1, 2.0) for value in (3.0, 1.0, 2.0)]
    assert (subspaces.best(fits).objective, subspaces.best(fits).seconds) == (1.0, 6.0)


def test_methods_for_subspaces_find_easy_ones_and_k_means_does_not():
    settings = replace(
        Settings(), num_features=16, num_groups=4, signals=400, epochs=15, batch_size=50, restarts=2, turns=5
    )
    case = Case(group_size=2, snr_db=25.0)
    rows = {row["method"]: row for row in subspaces.measure(case, settings, 0)}
    assert list(rows) == METHODS
    for method in (METHODS[2], *METHODS[4:7]):
        assert rows[method]["accuracy"] > 0.9, method
    assert rows["k-means"]["accuracy"] < 0.7
    for method in (METHODS[4], METHODS[7]):
        assert rows[method]["affinity"] > 0.97, method
    assert "affinity" not in rows["k-means"] and "objective" not in rows["Gaussian mixture"]


def test_the_command_leaves_figures_table_and_picture(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(subspaces, "FAST", TINY)
    cli.main(["reproduce", "gsae_subspaces", "--fast", "--seeds", "2", "--out", str(tmp_path / "found")])
    found = json.loads((tmp_path / "found" / "gsae_subspaces.json").read_text())
    cases = [("digits", 10.0, 4, 0.0), ("union", 10.0, 4, 0.0), ("union", 5.0, 4, 0.0), ("union", 10.0, 2, 0.0),
             ("union", 10.0, 4, 0.5)]  # fmt: skip
    keys = [(r["seed"], r["data"], r["snr_db"], r["group_size"], r["overlap"], r["method"]) for r in found["results"]]
    assert keys == [(seed, *case, method) for seed in (0, 1) for case in cases for method in METHODS]
    assert all(("affinity" in row) == (row["data"] == "union") for row in found["results"] if ":" in row["method"])
    table = (tmp_path / "found" / "gsae_subspaces.md").read_text()
    assert table.strip() in capsys.readouterr().out
    noisy = [100 * r["accuracy"] for r in found["results"] if r["snr_db"] == 5 and r["method"] == "Gaussian mixture"]
    start = table.index("accuracy (%); signal-to-noise")
    line = next(line for line in table[start:].splitlines() if line.startswith("| Gaussian mixture"))
    assert line.split("|")[3].strip() == f"{np.mean(noisy):.1f} ± {np.std(noisy, ddof=1):.1f}"
    assert (tmp_path / "found" / "gsae_subspaces.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("args, message", [(["--seeds", "none"], "expected a number of at least 1, got 'none'")])
def test_wrong_arguments(args, message, capsys):
    with pytest.raises(SystemExit, match="2"):
        cli.main(["reproduce", "gsae_subspaces", *args])
    assert message in capsys.readouterr().err
