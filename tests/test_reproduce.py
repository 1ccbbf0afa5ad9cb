import json
from dataclasses import replace
from importlib.metadata import version

import numpy as np
import pytest
import torch

from dsc import cli
from dsc.reproduce import EXPERIMENTS, lista, results
from dsc.synthetic import BernoulliGaussian

TINY = replace(lista.FAST, num_features=10, num_atoms=20, iterations=2, batch_size=4, held_out=50, steps=5)
METHODS = ["ISTA, λ = 0.1", "ISTA, λ chosen", "FISTA, λ = 0.1", "FISTA, λ chosen", "LISTA", "LISTA, tied", "LISTA-CP",
           "LISTA-CP, support selection", "ALISTA", "ALISTA, support selection"]  # fmt: skip


@pytest.fixture
def tiny(monkeypatch, tmp_path):
    monkeypatch.setattr(lista, "FAST", TINY)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def reproduce(*args):
    cli.main(["reproduce", "lista", "--fast", *args])


def classical(problem, x, threshold, steps, momentum):
    """ISTA or FISTA by their textbook loop: the codes after every step."""
    d = problem.dictionary.weight.double().numpy().T
    step = 1 / np.linalg.norm(d, 2) ** 2
    z = y = np.zeros((len(x), d.shape[1]))
    t, codes = 1.0, []
    for _ in range(steps):
        u = y + step * (x - y @ d.T) @ d
        following, before = (1 + (1 + 4 * t**2) ** 0.5) / 2, z
        z = np.sign(u) * np.maximum(np.abs(u) - threshold * step, 0)
        y = z + momentum * (t - 1) / following * (z - before)
        t = following
        codes.append(z)
    return codes


def decibels(z, truth):
    return 10 * np.log10(((z - truth) ** 2).sum() / (truth**2).sum())


def test_every_method_at_every_noise_level(tiny, capsys):
    reproduce("--snr", "none", "20", "--seeds", "2", "--out", "found")
    found = json.loads((tiny / "found" / "lista.json").read_text())
    rows = {(row["method"], row["snr_db"], row["seed"]): row for row in found["results"]}
    assert list(rows) == [(m, snr, seed) for seed in (0, 1) for snr in (None, 20.0) for m in METHODS]
    assert all(len(row["nmse_db"]) == 5 for row in rows.values())
    assert found["experiment"] == "lista" and found["environment"]["torch"] == version("torch")
    assert found["settings"]["num_atoms"] == 20 and found["settings"]["steps"] == 5
    table = (tiny / "found" / "lista.md").read_text()
    assert table.strip() in capsys.readouterr().out
    final = [rows["ALISTA", 20.0, seed]["nmse_db"][-1] for seed in (0, 1)]
    shown = f"{np.mean(final):.1f} ± {np.std(final, ddof=1):.1f}".replace("-", "−")
    line = next(line for line in table.splitlines() if line.startswith("| ALISTA  "))
    assert line.split("|")[3].strip() == shown
    assert (tiny / "found" / "lista.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("snr_db", [None, 20.0])
def test_the_classical_rows_are_the_textbook_iterations(snr_db):
    rows = {row["method"]: row for row in lista.measure(TINY, snr_db, 3)}
    problem = BernoulliGaussian(10, 20, 0.1, snr_db, seed=3)
    (x, truth), (x_val, truth_val) = (
        [a.double().numpy() for a in problem.sample(50, torch.Generator().manual_seed(4_000_012 + use))]
        for use in (1, 2)
    )
    for name, momentum in (("ISTA", 0), ("FISTA", 1)):
        codes = classical(problem, x, 0.1, 5, momentum)
        expected = [decibels(z, truth) for z in codes]
        assert rows[f"{name}, λ = 0.1"]["nmse_db"] == pytest.approx(expected, abs=1e-3)
        grid = np.logspace(-2, 0, 21)
        on_validation = [decibels(classical(problem, x_val, t, 5, momentum)[-1], truth_val) for t in grid]
        assert rows[f"{name}, λ chosen"]["threshold"] == pytest.approx(grid[int(np.argmin(on_validation))])


def test_training_improves_on_its_start_and_on_fista():
    settings = replace(TINY, iterations=40, batch_size=32, held_out=500)
    problem = BernoulliGaussian(10, 20)
    x, truth = problem.sample(500, torch.Generator().manual_seed(4))
    before = {m: decibels(z(x).detach(), truth) for m, z in lista.learned_layers(problem.dictionary, settings).items()}
    after = {row["method"]: row["nmse_db"][-1] for row in lista.measure(settings, None, 0)}
    for method in METHODS[4:]:
        assert after[method] < min(before[method] - 0.5, after["FISTA, λ chosen"]), method


def test_training_is_reproducible():
    problem = BernoulliGaussian(10, 20)
    weights = []
    for _ in range(2):
        layer = lista.learned_layers(problem.dictionary, TINY)["LISTA"]
        lista.fit(layer, problem, TINY, seed=1)
        weights.append(torch.cat([p.detach().flatten() for p in layer.parameters()]))
    assert torch.equal(*weights)


def test_the_coherence_bound():
    facts = lista.coherence(TINY, 0)
    problem = BernoulliGaussian(10, 20, seed=0)
    atoms = problem.dictionary.weight.double().numpy()
    mutual = np.abs(atoms @ atoms.T - np.eye(20)).max()
    assert facts["mutual"] == pytest.approx(mutual, abs=1e-5)
    assert facts["unique_up_to_atoms"] == pytest.approx((1 + 1 / mutual) / 2, rel=1e-5)
    assert facts["mean_active_atoms"] == 2 and 0 < facts["generalized"] < 1


def test_earlier_results_are_never_overwritten(tiny, capsys):
    reproduce("--snr", "none", "--out", "found")
    before = {path.name: path.read_bytes() for path in (tiny / "found").iterdir()}
    with pytest.raises(SystemExit, match="2"):
        reproduce("--snr", "none", "--out", "found")
    assert "lista.json exists already: choose another folder with --out" in capsys.readouterr().err
    assert {path.name: path.read_bytes() for path in (tiny / "found").iterdir()} == before
    for _ in range(2):
        reproduce("--snr", "none")
    assert sorted(p.name for p in (tiny / "runs" / "reproduce" / "lista").iterdir()) == ["1", "2"]
    made = results.Results({}, "", lista.draw(json.loads(before["lista.json"])["results"]))
    with pytest.raises(FileExistsError, match="choose another folder"):
        results.write(tiny / "found", "lista", made)


@pytest.mark.parametrize(
    "args, message",
    [
        (["lsta"], "unknown experiment 'lsta'; did you mean 'lista'? Known: "),
        ([], "the following arguments are required: experiment"),
        (["lista", "--snr", "loud"], "expected a number of dB or none, got 'loud'"),
        (["lista", "--snr", "20", "inf"], "expected a number of dB or none, got 'inf'"),
        (["lista", "--seeds", "0"], "expected a number of at least 1, got '0'"),
        (["lista", "--initial", "lasso"], "invalid choice: 'lasso'"),
    ],
)
def test_wrong_arguments(tiny, args, message, capsys):
    with pytest.raises(SystemExit, match="2"):
        cli.main(["reproduce", *args])
    assert message in capsys.readouterr().err
    assert not list(tiny.iterdir())


def test_help_lists_the_experiments_and_their_options(capsys):
    for args in (["--help"], ["lista", "--help"]):
        with pytest.raises(SystemExit, match="0"):
            cli.main(["reproduce", *args])
    shown = capsys.readouterr().out
    assert all(name in shown for name in EXPERIMENTS)
    assert "--snr" in shown and "--fast" in shown and "NMSE" in shown


@pytest.mark.slow
def test_the_fast_experiment_reaches_its_figures(tmp_path):
    cli.main(["reproduce", "lista", "--fast", "--snr", "none", "--out", str(tmp_path)])
    rows = json.loads((tmp_path / "lista.json").read_text())["results"]
    final = {row["method"]: row["nmse_db"][-1] for row in rows}
    assert final["FISTA, λ chosen"] < -10
    assert max(final[m] for m in ("LISTA", "LISTA, tied", "LISTA-CP", "ALISTA")) < -18
    assert max(final[m] for m in METHODS if "selection" in m) < -31
