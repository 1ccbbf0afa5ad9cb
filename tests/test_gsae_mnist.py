import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.spatial.distance import cdist
from sklearn.datasets import load_digits

from dsc import cli
from dsc.data import IndexBatches
from dsc.metrics import clustering_scores
from dsc.reproduce import gsae_mnist, gsae_mnist_figures
from dsc.reproduce.clustering import kmeans, shares

TINY = replace(
    gsae_mnist.FAST, dataset="digits", train_images=300, test_images=200, group_size=4, steps=3, step=0.05,
    group_penalty=1.0, sparse_penalty=0.2, epochs=2, batch_size=64, every=1, neighbours=10, baseline_images=100,
    baseline_turns=1,
)  # fmt: skip


@pytest.fixture(scope="module")
def images():
    return gsae_mnist.load(TINY)


def silent(line):
    pass


def fitted(settings, images, folder=None, kind="group", seed=0):
    return gsae_mnist.train(kind, settings, images, seed, folder, silent)


def test_all_training_images_and_no_other(images):
    found = gsae_mnist.load(replace(TINY, train_images=60_000, test_images=10_000))
    assert len(found.train) + len(found.test) == 1797 and len(found.labels) == len(found.test) == 360
    originals = load_digits().data / 16
    seen = torch.cat([found.train, found.test]).flatten(1).double().numpy()
    order, expected = np.lexsort(seen.T.round(2)), np.lexsort(originals.T.round(2))
    assert np.allclose(seen[order], originals[expected], atol=0.5 / 255)
    assert torch.equal(images.train, found.train[:300]) and torch.equal(images.test, found.test[:200])


def textbook_code(x, atoms, shrink, step, steps):
    """FISTA from zero."""
    z = y = np.zeros((len(x), len(atoms)))
    t = 1.0
    for _ in range(steps):
        before, z = z, shrink(y + step * (x - y @ atoms) @ atoms.T)
        following = (1 + (1 + 4 * t**2) ** 0.5) / 2
        y = z + (t - 1) / following * (z - before)
        t = following
    return z


def test_the_state_is_kept_after_every_epoch(images, tmp_path):
    kept = []
    state = tmp_path / "states" / "group-0" / "last.ckpt"
    gsae_mnist.train("group", replace(TINY, epochs=3), images, 0, tmp_path, lambda _: kept.append(state.is_file()))
    assert kept == [False, True, True]  # told of an epoch before its state is kept


@pytest.mark.parametrize("kind", ["sparse", "group"])
def test_codes_are_textbook_fista_with_the_applied_threshold(images, kind):
    def soft(u):
        return np.sign(u) * np.maximum(np.abs(u) - 0.05 * 0.2, 0)

    def group(u):
        blocks = u.reshape(len(u), 10, 4)
        norms = np.linalg.norm(blocks, axis=2, keepdims=True)
        return (blocks * np.maximum(1 - 0.05 * 1.0 / norms, 0)).reshape(u.shape)

    task = gsae_mnist.autoencoder(kind, replace(TINY, steps=15, initial="samples"), images, 0)
    atoms = gsae_mnist.layer_of(task).dictionary.weight.detach().double().numpy()
    x = images.test.flatten(1).double().numpy()
    expected = textbook_code(x, atoms, {"sparse": soft, "group": group}[kind], 0.05, 15)
    assert np.allclose(gsae_mnist.encode(task, images.test), expected, atol=1e-5)
    assert (expected == 0).any() and (expected != 0).any()


def test_the_papers_thresholds():
    s = gsae_mnist.Settings()
    assert s.group_penalty * s.step == pytest.approx(0.2) and s.sparse_penalty * s.step == pytest.approx(0.03)
    assert (s.num_atoms, s.train_images, s.epochs, s.steps) == (160, 60_000, 300, 15)


def test_first_atoms(images):
    x = images.train.flatten(1)
    group = gsae_mnist.first_atoms("group", TINY, x, 0).reshape(10, 4, 64).double().numpy()
    leading = np.linalg.svd(x.double().numpy(), full_matrices=False)[2][:4]
    for atoms in group:
        assert np.allclose(atoms @ atoms.T, np.eye(4), atol=1e-5)
        assert np.linalg.norm(atoms @ leading.T) ** 2 == pytest.approx(4, abs=1e-4)
    sampled = gsae_mnist.first_atoms("group", replace(TINY, initial="samples"), x, 0)
    cosines = sampled @ torch.nn.functional.normalize(x, dim=1).T
    assert torch.allclose(cosines.amax(1), torch.ones(40), atol=1e-5)


def test_an_epoch_is_adam_on_half_the_squared_error_with_unit_atoms(images):
    settings = replace(TINY, epochs=1)
    weight = torch.nn.Parameter(gsae_mnist.first_atoms("group", settings, images.train.flatten(1), 0))
    optimizer = torch.optim.Adam([weight], lr=1e-3)
    order = IndexBatches(300, 64, train=True, seed=0)
    order.set_epoch(0)
    for indices in order:
        x = images.train[indices].flatten(1)
        z = y = torch.zeros(len(x), 40)
        t = 1.0
        for _ in range(3):
            u = (y + 0.05 * (x - y @ weight) @ weight.T).view(-1, 10, 4)
            before, z = z, (u * (1 - 0.05 / u.norm(dim=2, keepdim=True)).clamp_min(0)).flatten(1)
            following = (1 + (1 + 4 * t**2) ** 0.5) / 2
            y, t = z + (t - 1) / following * (z - before), following
        optimizer.zero_grad()
        ((z @ weight - x) ** 2).mean().div(2).backward()
        optimizer.step()
        with torch.no_grad():
            weight /= weight.norm(dim=1, keepdim=True)
    start = gsae_mnist.first_atoms("group", settings, images.train.flatten(1), 0)
    found = fitted(settings, images).atoms
    # Adam divides by the size of a gradient: pixels that are always dark have none but rounding.
    lit = images.train.flatten(1).amax(0) > 0.1
    assert (found - start)[:, lit].norm() > 0.1
    assert (found - weight.detach())[:, lit].norm() < 0.02 * (found - start)[:, lit].norm()


@pytest.mark.parametrize("settings", [TINY, replace(TINY, initial="samples", step="lipschitz")])
def test_a_stopped_run_continues_as_if_it_had_not_been(images, tmp_path, settings):
    whole = fitted(replace(settings, epochs=4), images)
    fitted(settings, images, tmp_path)
    resumed = fitted(replace(settings, epochs=4), images, tmp_path)
    assert torch.equal(whole.atoms, resumed.atoms)
    assert whole.figures["course"] == resumed.figures["course"] and len(resumed.figures["course"]) == 4
    assert whole.figures["loss"] == resumed.figures["loss"] and len(resumed.figures["epoch_seconds"]) == 4
    with pytest.raises(ValueError, match="has 4 epochs, more than the 3 to train: choose another --out"):
        fitted(replace(settings, epochs=3), images, tmp_path)
    with pytest.raises(ValueError, match="was made with steps=3: choose another --out"):
        fitted(replace(settings, epochs=5, steps=4), images, tmp_path)


def test_figures_of_an_autoencoder(images):
    found = fitted(TINY, images)
    z, labels = found.codes.numpy(), images.labels.numpy()
    active = (np.linalg.norm(z.reshape(200, 10, 4), axis=2) > 0).sum(1)
    assert found.figures["active_groups"] == pytest.approx(active.mean(), abs=1e-3)
    assert found.figures["active_groups_by_class"] == pytest.approx(
        [active[labels == c].mean() for c in range(10)], abs=1e-3
    )
    assert found.figures["active_atoms"] == pytest.approx((z != 0).sum(1).mean(), abs=1e-3)
    last = found.figures["course"][-1]
    assert last["epoch"] == 2 and last["active_groups"] == pytest.approx(active.mean())
    assert last["accuracy"] == clustering_scores(kmeans(shares(found.codes), 10), images.labels)["accuracy"]
    norm = np.linalg.norm(found.atoms.double().numpy(), 2)
    assert last["step_times_lipschitz"] == pytest.approx(0.05 * norm**2, rel=1e-4)
    assert found.figures["loss"][1] < found.figures["loss"][0]


@pytest.fixture
def tiny(monkeypatch, tmp_path):
    monkeypatch.setattr(gsae_mnist, "FAST", TINY)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_experiment_leaves_its_table_and_pictures(tiny, capsys):
    cli.main(["reproduce", "gsae_mnist", "--fast", "--seeds", "2", "--epochs", "1", "--out", "found"])
    found = json.loads((tiny / "found" / "gsae_mnist.json").read_text())
    inputs = ["raw pixels", "sparse codes", "sparse codes₊", "group codes", "group codes₊"]
    baselines = ["alternating minimisation, group codes₊", "alternating minimisation, ℓ1 codes₊",
                 "MiniBatchDictionaryLearning, ℓ1 codes₊"]  # fmt: skip
    pairs = [(name, method) for name in inputs for method in ("k-means", "spectral")]
    pairs += [("group codes", "strongest group")]
    pairs += [(name, method) for name in baselines for method in ("k-means", "spectral")]
    rows = {(row["input"], row["method"], row["seed"]): row for row in found["clusters"]}
    assert list(rows) == [(*pair, seed) for seed in (0, 1) for pair in pairs]
    assert [(one["model"], one["seed"]) for one in found["models"]] == [
        (kind, seed) for seed in (0, 1) for kind in ("sparse", "group")
    ]
    table = (tiny / "found" / "gsae_mnist.md").read_text()
    assert table.strip() in capsys.readouterr().out
    own = [100 * rows["group codes₊", "k-means", seed]["accuracy"] for seed in (0, 1)]
    line = next(line for line in table.splitlines() if line.startswith("| group codes₊ ")).split("|")
    assert line[3].strip() == f"{np.mean(own):.2f} ± {np.std(own, ddof=1):.2f}" and line[4].strip() == "80.09"
    for name in ("gsae_mnist", "gsae_mnist_distances", "gsae_mnist_course"):
        assert (tiny / "found" / f"{name}.png").read_bytes().startswith(b"\x89PNG")


def test_distances_are_those_of_group_norms(images):
    z = torch.randn(200, 40, generator=torch.Generator().manual_seed(1))
    figure = gsae_mnist_figures.draw_distances(images.test, images.labels, {"sparse": z, "group": z}, 4, per_class=5)
    panels = [axes for axes in figure.axes if axes.images and axes.get_title()]
    chosen = np.concatenate([np.flatnonzero(images.labels.numpy() == c)[:5] for c in range(10)])
    norms = np.linalg.norm(z.numpy()[chosen].reshape(50, 10, 4), axis=2)
    for axes, x in zip(panels, (images.test.flatten(1).numpy()[chosen], z.numpy()[chosen], norms), strict=True):
        assert np.allclose(axes.images[0].get_array(), cdist(x, x), atol=5e-3), axes.get_title()


@pytest.mark.parametrize(
    "args, message",
    [
        (["--epochs", "0"], "expected a number of at least 1, got '0'"),
        (["--initial", "svd"], "invalid choice: 'svd'"),
    ],
)
def test_wrong_arguments(tiny, args, message, capsys):
    with pytest.raises(SystemExit, match="2"):
        cli.main(["reproduce", "gsae_mnist", *args])
    assert message in capsys.readouterr().err
    assert not list(tiny.iterdir())
