import json
from dataclasses import replace

import pytest
import torch
from scipy.stats import poisson
from torch import nn

from dsc import cli
from dsc.dictionaries import DenseDictionary
from dsc.layers import SparseCoding
from dsc.models import create_model
from dsc.prox import ReLU
from dsc.reproduce import robustness, sparse_training, sparse_training_figures

TINY = replace(
    sparse_training.FAST,
    grid={"relu": {"none": (0,), "l1": (0.1,)}, "top_k": {"k": (8,)}},
    epochs=2,
    noisy_images=60,
    attacked_images=40,
    attack_steps=2,
)


def stream(seed=0):
    return torch.Generator().manual_seed(seed)


def test_noises_have_the_moments_they_say():
    grey = torch.full((40, 1, 50, 50), 0.5)
    for name, level, deviation in (("gaussian", 0.1, 0.1), ("shot", 100, 0.005**0.5), ("speckle", 0.2, 0.1)):
        x = robustness.NOISES[name](grey, level, stream())
        assert x.mean() == pytest.approx(0.5, abs=1e-3), name
        assert x.std() == pytest.approx(deviation, rel=0.02), name
    counts = 20 * robustness.shot(torch.full((10**5,), 0.1), 20, stream())
    assert (counts == 3).double().mean() == pytest.approx(poisson(2).pmf(3), abs=4e-3)
    x = robustness.impulse(grey, 0.3, stream())
    assert [(x == v).double().mean().item() for v in (0, 0.5, 1)] == pytest.approx([0.15, 0.7, 0.15], abs=4e-3)


def test_noisy_images_are_images():
    x = torch.rand(5, 1, 8, 8)
    for name, noise in robustness.NOISES.items():
        found = noise(x, {"shot": 3}.get(name, 0.9), stream())
        assert found.shape == x.shape and found.min() >= 0 and found.max() <= 1, name


def test_an_attack_on_a_linear_classifier_is_the_worst_in_its_cube():
    # Of two classes the loss grows in the sign of the difference of their weights, wherever the image is.
    torch.manual_seed(0)
    model, x, labels = nn.Sequential(nn.Flatten(), nn.Linear(12, 2)), torch.rand(9, 1, 3, 4), torch.arange(9) % 2
    w = model[1].weight.detach()
    for_other = (w[1 - labels] - w[labels]).sign().view_as(x)
    attacked = robustness.pgd(model, x, labels, 0.1, 10, stream())
    assert torch.allclose(attacked, (x + 0.1 * for_other).clamp(0, 1))
    assert all(p.grad is None for p in model.parameters())


def test_a_threshold_is_multiplied_for_a_while():
    prox = ReLU([0.2, 0.5], learn=True)
    with robustness.threshold_times(prox, 3):
        assert torch.allclose(prox.threshold, torch.tensor([0.6, 1.5]))
    assert torch.allclose(prox.threshold, torch.tensor([0.2, 0.5]))


def test_standardized_takes_pixels():
    x = torch.rand(2, 3, 4, 4)
    mean, std = torch.tensor([0.1, 0.2, 0.3]), torch.tensor([0.5, 0.6, 0.7])
    found = robustness.Standardized(nn.Identity(), mean.tolist(), std.tolist())(x)
    assert torch.allclose(found, (x - mean.view(3, 1, 1)) / std.view(3, 1, 1))


class Denoiser(nn.Module):
    """Which of two orthogonal atoms an image has, when all others are noise below λ."""

    def __init__(self):
        super().__init__()
        self.coder = SparseCoding(
            DenseDictionary.from_atoms(torch.eye(6)), ReLU([0.1] * 6, learn=True, dim=-1), step=1.0
        )

    def forward(self, x):
        z = self.coder(x)
        return torch.stack([z[:, 0] - 10 * z[:, 2:].sum(1), z[:, 1] - 10 * z[:, 2:].sum(1) + 0.2], 1)


def test_each_image_takes_the_factor_of_the_level_that_its_residual_is_nearest_to():
    model = Denoiser()
    labels = torch.tensor([0, 0, 1, 1])
    clean = torch.eye(6)[labels]
    loud = clean + torch.tensor([0, 0, 0.5, 0.5, 0.5, 0.5])  # class 0 loses unless λ is above 0.5
    adaptive = robustness.ThresholdByResidual(model, [clean, loud], labels, (1.0, 6.0))
    # Residuals: λ² for each atom that is found, the rest where it is not.
    assert adaptive.residuals.tolist() == pytest.approx([0.01 / 6, 5 * 0.01 / 6])
    assert adaptive.residual(loud).tolist() == pytest.approx([5 * 0.01 / 6] * 4)
    logits = adaptive(torch.cat([loud[:1], clean[2:3]]))
    chosen = torch.tensor(adaptive.factors)
    for row, x, factor in ((0, loud[:1], chosen[1]), (1, clean[2:3], chosen[0])):
        with robustness.threshold_times(model.coder.prox, float(factor)):
            assert torch.allclose(logits[row], model(x)[0])
    assert float(model.coder.prox.threshold[0].detach()) == pytest.approx(0.1)


def row(strategy, strength, seed, val, active, activation="relu"):
    return {
        "activation": activation, "strategy": strategy, "strength": strength, "seed": seed,
        "val_accuracy": val, "val_active": active,
    }  # fmt: skip


def test_the_sparsest_within_the_loss_is_chosen_by_means_over_seeds():
    rows = [row("none", 0, seed, val, 0.5) for seed, val in enumerate((0.98, 0.99))]
    rows += [row("l1", 0.1, seed, val, 0.3) for seed, val in enumerate((0.99, 0.99))]
    rows += [row("l1", 1.0, seed, val, 0.2) for seed, val in enumerate((0.97, 0.9945))]  # mean 0.98225
    rows += [row("l1", 10.0, seed, val, 0.1) for seed, val in enumerate((0.98, 0.98))]  # 0.5 points lost
    rows += [row("hoyer", 1.0, 0, 0.9, 0.01)]
    rows += [row("k", 8, 0, 0.983, 0.1, activation="top_k")]
    found = {(c["activation"], c["strategy"]): c["strength"] for c in sparse_training_figures.choose(rows)}
    assert found == {("relu", "l1"): 1.0, ("relu", "hoyer"): None, ("top_k", "k"): 8}


def test_every_strategy_makes_a_network_that_trains():
    images = sparse_training.load(replace(TINY, noisy_images=10))
    for strategy in sparse_training.STRATEGIES:
        one = sparse_training.Run("top_k" if strategy == "k" else "relu", strategy, 8 if strategy == "k" else 0.2, 0)
        before = create_model("dsc_mlp_pico", in_chans=1, img_size=8, joint=False)
        model = sparse_training.train(one, replace(TINY, epochs=1), images.data)
        weights = model.model.state_dict()
        assert {k: v.shape for k, v in weights.items() if v.ndim > 1} == {
            k: v.shape for k, v in before.state_dict().items() if v.ndim > 1
        }
        assert robustness.accuracy(model, *images.test) > 0.5, strategy  # ten classes


def test_top_k_has_k_active_entries_at_most():
    images = sparse_training.load(TINY)
    model = sparse_training.train(sparse_training.Run("top_k", "k", 8, 0), replace(TINY, epochs=1), images.data)
    accuracy, active = sparse_training.accuracy_and_activity(model, *images.test)
    assert accuracy == robustness.accuracy(model, *images.test)
    assert 0 < active <= 8 / 256


@pytest.fixture
def tiny(monkeypatch, tmp_path):
    monkeypatch.setattr(sparse_training, "FAST", TINY)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_stopped_experiment_goes_on_and_its_files_agree(tiny, monkeypatch):
    arguments = ["reproduce", "sparse_training", "--fast", "--out", "found"]
    trained, train = [], sparse_training.train

    def stopping(one, *args):
        trained.append(one.name)
        if len(trained) == 3:
            raise KeyboardInterrupt
        return train(one, *args)

    monkeypatch.setattr(sparse_training, "train", stopping)
    with pytest.raises(KeyboardInterrupt):
        cli.main(arguments)
    cli.main(arguments)
    assert trained == ["relu-none-0-0", "relu-l1-0.1-0", "top_k-k-8-0", "top_k-k-8-0"]
    found = json.loads((tiny / "found" / "sparse_training.json").read_text())
    rows = {row["strategy"]: row for row in found["runs"]}
    assert list(rows) == ["none", "l1", "k"]
    assert rows["l1"]["adaptive"].keys() == rows["k"]["noise"].keys() == robustness.NOISES.keys()
    assert "adaptive" not in rows["k"]
    table = (tiny / "found" / "sparse_training.md").read_text()
    assert f"| {100 * rows['k']['test_accuracy']:.2f}" in table
    assert (tiny / "found" / "sparse_training.png").read_bytes().startswith(b"\x89PNG")


def test_networks_of_other_settings_are_not_taken(tiny):
    folder = tiny / "states"
    sparse_training.check_settings(folder, TINY)
    sparse_training.check_settings(folder, TINY)
    with pytest.raises(ValueError, match="epochs=2: choose another --out"):
        sparse_training.check_settings(folder, replace(TINY, epochs=3))


def test_the_fast_instance_has_a_data_set_of_its_own(tiny):
    with pytest.raises(SystemExit):
        cli.main(["reproduce", "sparse_training", "--fast", "--dataset", "cifar10"])
