import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn
from torch.autograd import gradcheck

from dsc import cli, init
from dsc.activations import create_activation
from dsc.dictionaries import DenseDictionary
from dsc.layers import SparseCoding
from dsc.measures import group_support
from dsc.recovery import match_groups
from dsc.reproduce import gsae_recovery as experiment
from dsc.reproduce.gsae_recovery_figures import STARTS
from dsc.reproduce.shallow import FreshSignals, ShallowAutoencoder, Training, fit
from dsc.solvers import ISTA
from dsc.synthetic import GroupSparse

TINY = replace(experiment.FAST, num_features=40, num_groups=10, active_groups=2, signals=80, block=40, epochs=6,
               held_out=60, sweep=(1.5, 2.5), sweep_epochs=2, blind_epochs=4, baseline_turns=1)  # fmt: skip


def stream(seed=0):
    return torch.Generator().manual_seed(seed)


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=stream(seed), dtype=torch.float64)


def dense_loss(weight, signals, group_size, threshold):
    """The published formula, by dense products: ½‖y − A σ(Aᵀy)‖², its mean over signals."""
    products = signals @ weight.T
    groups = products.unflatten(1, (-1, group_size))
    norms = groups.norm(dim=2, keepdim=True)
    codes = (torch.where(norms > threshold, 1 - threshold / norms, 0) * groups).flatten(1)
    return (signals - codes @ weight).square().sum() / (2 * len(signals))


@pytest.mark.parametrize("group_size", [1, 2, 3])
@pytest.mark.parametrize("threshold", [0.05, 1.5, 1e3])
def test_loss_and_gradient_are_those_of_dense_products(group_size, threshold):
    atoms, signals = randn(12, 7) / 2, randn(9, 7, seed=1)
    network = ShallowAutoencoder(atoms, group_size, threshold)
    expected_weight = atoms.clone().requires_grad_()
    expected = dense_loss(expected_weight, signals, group_size, threshold)
    found = network.loss(signals)
    torch.testing.assert_close(found, expected)
    grads = torch.autograd.grad(expected, expected_weight)
    torch.testing.assert_close(torch.autograd.grad(found, network.weight), grads)


def test_gradients_are_those_of_finite_differences():
    signals = randn(4, 5, seed=1)

    def loss_and_reconstructions(weight):
        network = ShallowAutoencoder(weight, 2, 0.7)
        del network.weight
        network.weight = weight
        return network.loss(signals), network(signals)

    assert gradcheck(loss_and_reconstructions, randn(6, 5).requires_grad_())


@pytest.mark.parametrize("prox, group_size", [("group_relu", 2), ("soft", None)])
def test_it_is_one_step_of_sparse_coding(prox, group_size):
    atoms, signals = nn.functional.normalize(randn(12, 7)), randn(9, 7, seed=1)
    activation = create_activation(prox, threshold=0.8, group_size=group_size, dim=-1, learn=False)
    layer = SparseCoding(DenseDictionary.from_atoms(atoms), activation, ISTA(1), 1.0)
    network = ShallowAutoencoder(atoms, group_size or 1, 0.8)
    torch.testing.assert_close(network(signals), layer.decode(layer(signals)))


def test_networks_trained_together_are_trained_as_if_alone():
    """And a step an epoch, over all blocks, is Adam with the gradient of all signals."""
    problem = GroupSparse(20, 12, 2, 2, snr_db=10)
    truth = problem.dictionary.weight.detach()
    start = init.perturbed(truth, 0.6, stream())
    signals = problem.sample(30, stream(1)).signals
    together = {d: ShallowAutoencoder(start, d, 1.5) for d in (1, 2)}
    networks = {"sparse": together[1], "group": together[2]}
    courses = fit(Training(networks, 1e-2, lambda a: float((a - truth).norm())), list(signals.split(10)), 3, 4)
    for d, network in together.items():
        weight = start.clone().requires_grad_()
        adam = torch.optim.Adam([weight], 1e-2)
        losses, distances = [], [float((weight.detach() - truth).norm())]
        for _ in range(4):
            adam.zero_grad()
            loss = dense_loss(weight, signals, d, 1.5)
            loss.backward()
            adam.step()
            losses.append(float(loss.detach()))
            distances.append(float((weight.detach() - truth).norm()))
        torch.testing.assert_close(network.weight, weight, atol=1e-5, rtol=1e-4)
        course = courses["sparse" if d == 1 else "group"]
        assert course.loss == pytest.approx(losses, rel=1e-4)
        assert course.measured == pytest.approx(distances, rel=1e-4) and course.epochs == [0, 1, 2, 3, 4]


def test_every_epoch_has_new_signals():
    problem = GroupSparse(20, 12, 2, 2, snr_db=10)
    signals = FreshSignals(problem, 20, 10, stream())
    passes = [list(signals) for _ in range(2)]
    expected = stream()
    for block in passes[0] + passes[1]:
        assert torch.equal(block, problem.sample(10, expected).signals)
    with pytest.raises(ValueError, match="blocks of 7 do not tile 20 signals"):
        FreshSignals(problem, 20, 7, stream())


def test_supports_are_those_of_the_encoder():
    problem = GroupSparse(30, 20, 2, 2, snr_db=10)
    sample, truth = problem.sample(50, stream()), problem.dictionary.weight.detach()
    for d in (1, 2):
        active = group_support(sample.codes, d).numpy()
        norms = np.linalg.norm((sample.signals @ truth.T).unflatten(1, (-1, d)).double().numpy(), axis=2)
        found = norms > 1.7
        figures = experiment.supports(ShallowAutoencoder(truth, d, 1.7), sample)
        assert figures["recall"] == pytest.approx((found & active).sum() / active.sum(), abs=1e-5)
        assert figures["precision"] == pytest.approx((found & active).sum() / found.sum(), abs=1e-5)
        assert figures["exact"] == pytest.approx((found == active).all(1).mean(), abs=1e-5)


def test_supports_of_groups_in_another_order():
    problem = GroupSparse(30, 20, 2, 2)
    sample, truth = problem.sample(50, stream()), problem.dictionary.weight.detach()
    shuffled = truth.unflatten(0, (10, 2))[torch.randperm(10, generator=stream())].flatten(0, 1)
    order = match_groups(shuffled, truth, 2).order
    expected = experiment.supports(ShallowAutoencoder(truth, 2, 1.7), sample)
    assert experiment.supports(ShallowAutoencoder(shuffled, 2, 1.7), sample, order) == expected


@pytest.mark.parametrize(
    "distances, epoch",
    [([100, 50, 10, 1.9, 1.5, 1.0], 3), ([100, 1, 1, 1], 1), ([5, 5], 0), ([100, 1, 1, 30, 1], 4), ([9, 5, 1], 2)],
)
def test_flat_from_the_epoch_after_the_last_move(distances, epoch):
    assert experiment.flat_from(distances) == epoch


def test_the_annealed_threshold():
    settings = replace(TINY, threshold=5.0)
    instance = experiment.Instance(settings, 10.0, 0)
    signals = instance.problem.sample(80, stream()).signals
    schedule = experiment.annealed(instance.start, signals, settings)
    norms = (signals[:40] @ instance.start.T).unflatten(1, (10, 2)).norm(dim=2)
    assert schedule(0) == pytest.approx(float(np.sort(norms.numpy(), axis=None)[-40 * 2]))
    assert schedule(1) == pytest.approx((schedule(0) + 5) / 2)
    assert schedule(2) == schedule(3) == 5.0


@pytest.fixture
def tiny(monkeypatch, tmp_path):
    monkeypatch.setattr(experiment, "FAST", TINY)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def reproduce(*args):
    cli.main(["reproduce", "gsae_recovery", "--fast", *args])


def test_the_command_writes_its_figures(tiny, capsys):
    reproduce("--snr", "5", "20", "--active-groups", "2", "--seeds", "2", "--out", "found")
    found = json.loads((tiny / "found" / "gsae_recovery.json").read_text())
    rows = found["recovery"]
    assert [(r["seed"], r["snr_db"], r["model"]) for r in rows] == [
        (seed, snr, model) for seed in (0, 1) for snr in (5.0, 20.0) for model in ("group", "sparse")
    ]
    for row in rows:
        # ‖A − A*‖² = 2Σ(1 − cos) of unit atoms, whose mean cosine is the start's correlation.
        assert row["distance"][0] == pytest.approx(2 * 20 * (1 - 0.56), abs=1e-3)
        assert len(row["distance"]) == 7 and len(row["loss"]) == 6
        assert row["plotted_loss"] == pytest.approx([2 * loss / (40 * 80) for loss in row["loss"]], rel=1e-3)
    assert {fact["contraction"]["statement"] for fact in found["theory"]} == {"Theorem 2, contraction an iteration"}
    assert all(fact["printed_contraction_start"]["vacuous"] for fact in found["theory"])
    assert [(row["seed"], row["start"]) for row in found["blind"]] == [
        (seed, start) for seed in (0, 1) for start in STARTS
    ]
    # Of the first seed alone.
    assert [row["seed"] for row in found["fixed"]] == [0] * 5
    assert [(row["seed"], row["snr_db"]) for row in found["sweep"]] == [(0, 20.0)]
    table = (tiny / "found" / "gsae_recovery.md").read_text()
    assert table.strip() in capsys.readouterr().out
    ends = [r["distance"][-1] for r in rows if r["model"] == "group" and r["snr_db"] == 20]
    line = next(line for line in table.splitlines() if line.startswith("| ‖A − A*‖², end, group"))
    assert line.split("|")[3].strip() == f"{np.mean(ends):.2f} ± {np.std(ends, ddof=1):.2f}"
    for name in ("gsae_recovery.png", "gsae_recovery_beyond.png"):
        assert (tiny / "found" / name).read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    "args, message",
    [
        (["--snr=-inf"], "expected a finite number of dB, got '-inf'"),
        (["--snr", "1", "loud"], "expected a finite number of dB, got 'loud'"),
        (["--threshold", "0"], "expected a number above 0 or 'guaranteed', got '0'"),
        (["--active-groups", "11"], "active_groups must be from 1 to the number of groups, 10, got 11"),
        (["--threshold", "guaranteed"], "no λ is guaranteed to find the support: the range ["),
    ],
)
def test_wrong_arguments(tiny, args, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        reproduce(*args)
    assert message in capsys.readouterr().err + str(stopped.value.code)
    assert not list(tiny.rglob("*.json"))


@pytest.mark.slow
def test_the_fast_experiment_reaches_its_figures(tmp_path):
    cli.main(["reproduce", "gsae_recovery", "--fast", "--snr", "10", "--out", str(tmp_path)])
    found = json.loads((tmp_path / "gsae_recovery.json").read_text())
    group, sparse = found["recovery"]
    assert group["distance"][-1] < 0.05 * group["distance"][0]
    assert group["support"]["recall"] > 0.995 > 0.9 > sparse["support"]["recall"]
    blind = {row["start"]: row["mean_squared_cosine"] for row in found["blind"]}
    assert blind["shared subspaces"] > 0.98
