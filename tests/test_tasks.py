import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from lightning.pytorch import LightningDataModule, Trainer
from safetensors.torch import load_file
from scipy.optimize import linear_sum_assignment
from timm.optim import Muon
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from dsc.cli import cli_of, train
from dsc.data import ImageData
from dsc.metrics import convergence
from dsc.models import create_model, load
from dsc.models.speed import whitening_atoms
from dsc.regularizers import L1
from dsc.report import read_metrics
from dsc.schedules import OneCycle, Steps, scheduled
from dsc.tasks import PROBE_IMAGES, Classifier, Reconstructor, views

SMALL = {"channels": (4, 4, 8)}
QUIET = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}


@pytest.fixture(scope="module")
def digits():
    data = ImageData("digits", batch_size=64)
    data.setup()
    return data


def classifier(data, model="dsc_cnn_pico", model_args=SMALL, **kwargs):
    torch.manual_seed(0)
    return Classifier(data=data, model=model, model_args=dict(model_args), **kwargs)


def run(runs, *args):
    quick = ["--trainer.enable_progress_bar", "false", "--trainer.limit_train_batches", "4", "--runs", str(runs)]
    return train(["--config", "configs/digits.yaml", *quick, "--trainer.max_epochs", "1", *args])


# Test-time augmentation


def test_views_are_shifts_by_a_pixel_and_mirrors():
    x = torch.randn(2, 3, 5, 6)
    padded = np.pad(x.numpy(), [(0, 0), (0, 0), (1, 1), (1, 1)], mode="reflect")
    shifted = [padded[:, :, 1:-1, 1:-1], padded[:, :, :-2, :-2], padded[:, :, 2:, 2:]]
    expected = shifted + [image[..., ::-1] for image in shifted]
    assert len(views(x)) == 6
    for found, view in zip(views(x), expected, strict=True):
        np.testing.assert_array_equal(found.numpy(), view)


def test_augmented_accuracy_stands_beside_the_plain_one(digits):
    task = classifier(digits, test_time_augmentation=True)
    trainer = Trainer(**QUIET)
    trainer.test(task, digits, verbose=False)
    x, y, _ = digits._parts["test"].tensors
    x = digits._as_input(x)
    with torch.no_grad():
        plain = task.model.eval()(x)
        image, up, down, mirrored, mirrored_up, mirrored_down = (task.model(view) for view in views(x))
        mean = (image + mirrored) / 4 + (up + down + mirrored_up + mirrored_down) / 8
    for name, logits in {"accuracy": plain, "accuracy_tta": mean}.items():
        expected = (logits.argmax(1) == y).float().mean().item()
        assert trainer.callback_metrics[f"test/{name}"].item() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("model,args", [("gsae", {"num_atoms": 60}), ("gsae_conv", {"num_atoms": (48,)})])
def test_the_strongest_group_of_an_autoencoder_stands_against_the_class(digits, model, args):
    torch.manual_seed(0)
    task = Reconstructor(model=model, model_args=args | {"group_size": 4, "threshold": 0.01}, data=digits)
    trainer = Trainer(**QUIET)
    trainer.test(task, digits, verbose=False)
    x, y, _ = digits._parts["test"].tensors
    with torch.no_grad():
        z = task.model.eval().encode(digits._as_input(x))
    strongest = z.unflatten(1, (-1, 4)).square().flatten(2).sum(2).argmax(1)
    counts = np.zeros((15, 15))
    np.add.at(counts, (strongest, y), 1)
    expected = counts[linear_sum_assignment(-counts)].sum() / len(y)
    assert trainer.callback_metrics["test/strongest_group_accuracy"].item() == pytest.approx(expected, abs=1e-6)


def test_an_autoencoder_without_groups_has_no_strongest_one(digits):
    trainer = Trainer(**QUIET)
    trainer.test(Reconstructor(model="sae", model_args={"num_atoms": 20}, data=digits), digits, verbose=False)
    assert "test/mse" in trainer.callback_metrics and "test/strongest_group_accuracy" not in trainer.callback_metrics


def test_sparsity_is_that_of_the_plain_images(digits):
    figures = []
    for augmented in (False, True):
        trainer = Trainer(**QUIET)
        trainer.test(classifier(digits, test_time_augmentation=augmented), digits, verbose=False)
        figures.append({k: v for k, v in trainer.callback_metrics.items() if "sparsity" in k})
    assert figures[0] == figures[1]


# Optimizers and schedules


def test_muon_moves_matrices_and_leaves_the_classifier_to_its_fallback(digits):
    task = classifier(digits, model="dsc_speed", model_args={"channels": (4, 8)}, lr_scheduler=None)
    task.make_optimizer = lambda groups: Muon(groups, lr=0.1, weight_decay=0.01)
    optimizer = task.configure_optimizers()
    head = list(task.model.get_classifier().parameters())
    for parameter in task.model.parameters():
        groups = [g for g in optimizer.param_groups if any(p is parameter for p in g["params"])]
        assert len(groups) == parameter.requires_grad
        if groups:
            assert groups[0]["weight_decay"] == (0.01 if parameter.ndim > 1 else 0.0)
            assert groups[0].get("use_fallback", False) == (parameter.ndim > 1 and any(p is parameter for p in head))
    task.loss((digits.sample(8), torch.arange(8)), "train").backward()
    optimizer.step()
    for parameter in task.model.parameters():
        if parameter.requires_grad:
            matrix = parameter.ndim > 1 and not any(p is parameter for p in head)
            assert optimizer.state[parameter]["use_muon"] == matrix


def test_a_backbones_embeddings_do_not_decay_and_keep_no_norm(digits):
    shape = {"img_size": 16, "patch_size": 8, "depth": 1}
    task = classifier(digits, "vit_tiny_patch16_224", shape, lr_scheduler=None, bias_lr=8.0)
    groups = task.configure_optimizers().param_groups
    for name, parameter in task.model.named_parameters():
        (group,) = [g for g in groups if any(parameter is p for p in g["params"])]
        embedding = name in ("cls_token", "pos_embed")
        assert (group["weight_decay"] == 0) == (embedding or parameter.ndim == 1), name
        assert group["lr"] == (8e-3 if parameter.ndim == 1 else 1e-3), name
        assert not (embedding and name in task._matrices())


def test_what_has_one_dimension_learns_at_its_own_rate(digits):
    task = classifier(digits, model="dsc_speed", model_args={"channels": (4, 8)}, lr_scheduler=None, bias_lr=8.0)
    task.make_optimizer = lambda groups: Muon(groups, lr=0.1)
    for group in task.configure_optimizers().param_groups:
        for parameter in group["params"]:
            assert group["lr"] == pytest.approx(0.8 if parameter.ndim <= 1 else 0.1)


def test_an_optimizer_has_its_own_defaults_and_none_is_adamw(digits, tmp_path):
    path = tmp_path / "sgd.yaml"
    model = {"class_path": "dsc.tasks.Classifier", "init_args": {"optimizer": {"class_path": "torch.optim.SGD"}}}
    data = {"class_path": "dsc.data.ImageData", "init_args": {"dataset": "digits"}}
    path.write_text(yaml.safe_dump({"model": model, "data": data}))
    sgd = cli_of(["--config", str(path), "--trainer.fast_dev_run", "true"]).model.make_optimizer
    weight = nn.Parameter(torch.zeros(2, 2))
    assert sgd([weight]).defaults == torch.optim.SGD([weight]).defaults
    assert isinstance(classifier(digits, lr_scheduler=None).configure_optimizers(), torch.optim.AdamW)


@pytest.mark.parametrize("wrong", [0.0, -8.0, float("nan")])
def test_a_rate_for_biases_is_positive(digits, wrong):
    with pytest.raises(ValueError, match=f"bias_lr.*above 0, got {wrong}"):
        classifier(digits, bias_lr=wrong)


@pytest.mark.parametrize("keep", [False, True])
def test_matrices_keep_their_norms_and_still_turn(digits, keep):
    task = classifier(digits, keep_norms=keep, model="dsc_speed", model_args={"channels": (4, 8)})
    before = {name: p.detach().clone() for name, p in task.model.named_parameters() if p.ndim > 1}
    Trainer(max_epochs=1, limit_train_batches=3, limit_val_batches=0, **QUIET).fit(task, digits)
    for name, start in before.items():
        weight = task.model.get_parameter(name)
        if not weight.requires_grad:
            continue
        assert not torch.allclose(weight, start)
        kept = torch.isclose(weight.norm(), start.norm(), rtol=1e-5)
        assert kept == (keep and not name.startswith("head"))


def test_norms_to_keep_survive_an_interruption(digits):
    task = classifier(digits, keep_norms=True)
    task.norms = {"coder.layers.0.dictionary.weight": 2.5}
    saved: dict = {}
    task.on_save_checkpoint(saved)
    resumed = classifier(digits, keep_norms=True)
    resumed.on_load_checkpoint(saved)
    assert resumed.norms == task.norms


@pytest.mark.parametrize("total", [5, 6, 10, 40])
def test_one_cycle_rises_and_falls_in_runs_of_any_length(total):
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.5)
    schedule = OneCycle(optimizer, total, warmup=0.2)
    rates = []
    for _ in range(total):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    top = rates.index(max(rates))
    assert 0.4 <= rates[top] <= 0.5 and top <= 0.2 * total and abs(rates[-1]) < 1e-4
    assert rates == sorted(rates[:top]) + sorted(rates[top:], reverse=True)


@pytest.mark.parametrize("name, second", [("StepLR", "step_size"), ("ExponentialLR", "gamma")])
def test_a_schedule_that_takes_the_runs_length_for_something_else_is_refused(name, second):
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1)
    make = getattr(torch.optim.lr_scheduler, name)
    with pytest.raises(ValueError, match=f"{name} takes the run's number of steps for its {second}: .*OneCycle"):
        scheduled(make, optimizer, 30)
    cosine = scheduled(torch.optim.lr_scheduler.CosineAnnealingLR, optimizer, 30)
    assert cosine.T_max == 30
    assert scheduled(lambda optimizer, steps: make(optimizer, 0.5), optimizer, 30) is not None  # knows what it does


def test_a_schedule_needs_an_end():
    with pytest.raises(ValueError, match="needs the run's length: give trainer.max_epochs .*lr_scheduler: null"):
        scheduled(OneCycle, torch.optim.SGD([nn.Parameter(torch.zeros(1))]), float("inf"))


def test_rate_falls_in_steps():
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    schedule = Steps(optimizer, total_steps=10, every=0.3, gamma=0.5)
    rates = []
    for _ in range(10):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    assert rates == [1, 1, 1, 0.5, 0.5, 0.5, 0.25, 0.25, 0.25, 0.125]
    with pytest.raises(ValueError, match=r"every is a fraction of the run in \(0, 1\], got 0"):
        Steps(optimizer, 10, every=0)


@pytest.mark.parametrize("decay, steps", [(0.0, 4), (1.0, 1)])
def test_averaged_weights_are_what_a_run_keeps(tmp_path, decay, steps):
    # Torch's average begins with the weights after the first step: a decay of 1 keeps those.
    average = [
        "--trainer.callbacks+=lightning.pytorch.callbacks.EMAWeightAveraging",
        f"--trainer.callbacks.decay={decay}",
    ]
    run(tmp_path / "average", "--model.lr_scheduler=null", *average)
    run(tmp_path / "plain", "--model.lr_scheduler=null", "--trainer.limit_train_batches", str(steps / 20))
    found, plain = (
        load_file(tmp_path / kind / "digits" / "1" / "best" / "model.safetensors") for kind in ("average", "plain")
    )
    for key, value in plain.items():
        torch.testing.assert_close(found[key], value, msg=key)


def test_validation_of_averaged_weights_is_that_of_the_model_they_make(tmp_path):
    average = "--trainer.callbacks+=lightning.pytorch.callbacks.EMAWeightAveraging"
    summary = run(tmp_path, average, "--trainer.callbacks.decay=0.9", "--trainer.max_epochs", "2")
    kept = load(f"{summary['run']}/best").eval()
    data = ImageData("digits", batch_size=64)
    x, y = data.probe(10**6), data._parts["val"].tensors[1]
    with torch.no_grad():
        expected = nn.functional.cross_entropy(kept(x), y).item()
    logged = read_metrics(Path(summary["run"]))
    best = max(range(2), key=lambda epoch: logged["val/accuracy"][epoch][1])
    assert logged["val/loss"][best][1] == pytest.approx(expected, rel=1e-4)
    figures = convergence(kept, data.probe(PROBE_IMAGES))
    assert figures
    for name, value in figures.items():
        assert logged[f"convergence/{name}"][best][1] == pytest.approx(value, rel=1e-3), name


def test_a_run_that_ends_before_its_first_validation_keeps_its_last_weights(tmp_path):
    summary = run(tmp_path, "--trainer.max_steps", "3")
    resumed = torch.load(tmp_path / "digits/1/resume/last.ckpt", weights_only=True)["state_dict"]
    for key, value in load_file(f"{summary['run']}/best/model.safetensors").items():
        assert torch.equal(value, resumed[f"model.{key}"]), key


# What a model is told of the data


class Plain(LightningDataModule):
    """Loaders of digits and the facts that a task asks for, nothing else."""

    num_classes, in_chans, image_size = 10, 1, (8, 8)

    def train_dataloader(self):
        return DataLoader(TensorDataset(torch.randn(8, 1, 8, 8), torch.arange(8)), batch_size=4)

    val_dataloader = train_dataloader


def test_a_users_own_data_trains_without_figures_of_convergence():
    task = classifier(Plain())
    trainer = Trainer(max_epochs=1, **QUIET)
    trainer.fit(task, Plain())
    assert "sparsity/active_fraction/total" in trainer.logged_metrics
    assert not [name for name in trainer.logged_metrics if name.startswith("convergence/error")]


def test_a_model_that_starts_from_images_says_what_its_data_lacks():
    task = classifier(Plain(), "dsc_speed", {"channels": (4, 8)})
    with pytest.raises(ValueError, match=r"dsc_speed starts from images: its data needs sample\(n\)"):
        Trainer(max_epochs=1, **QUIET).fit(task, Plain())


def test_models_start_from_the_training_images(digits):
    task = classifier(digits, model="dsc_speed", model_args={"channels": (4, 8)})
    trainer = Trainer(max_steps=1, limit_val_batches=0, **QUIET)
    trainer.fit(task, digits)
    weight = task.model.whiten.dictionary.weight
    assert torch.equal(weight, whitening_atoms(digits.sample(5000), 2))


def test_a_run_may_start_from_the_best_weights_of_another(tmp_path):
    small = ["--model.model", "dsc_speed", "--model.model_args", "{channels: [4, 8]}"]
    first = Path(run(tmp_path, *small)["run"]) / "best"
    still = ["--model.initial_checkpoint", str(first), "--model.optimizer", "torch.optim.SGD", "--model.optimizer.lr=0"]
    second = run(tmp_path, *small, *still, "--model.activation", "group_relu_nonneg", "--model.group_size", "4")
    before, after = (load_file(folder / "model.safetensors") for folder in (first, Path(second["run"]) / "best"))
    matrices = [key for key, value in before.items() if key.endswith(".weight") and value.ndim > 1]
    assert len(matrices) == 6 and "whiten.dictionary.weight" in matrices
    for key in matrices:  # a rate of 0: these are the weights of the start
        assert torch.equal(before[key], after[key]), key
    kept = yaml.safe_load((Path(second["run"]) / "config.yaml").read_text())
    assert kept["model"]["init_args"]["initial_checkpoint"] == str(first)


def test_a_pretrained_start_is_no_argument_of_the_network_that_is_kept():
    data = ImageData("mnist")
    task = Reconstructor(model="gsae", model_args={"pretrained": True}, data=data)
    published = load("checkpoints/gsae.mnist_group_relu")
    assert task.starts_trained and "pretrained" not in task.model_args
    again = create_model(task.architecture, **task.model_args)
    again.load_state_dict(task.model.state_dict())
    x = torch.rand(2, 1, 28, 28)
    assert torch.equal(again.eval()(x), published.eval()(x))  # λ too, which is in no weight


def test_autoencoders_start_from_the_training_images_if_told_to(digits):
    args = {"num_atoms": 20, "group_size": 10, "initial": "singular", "threshold": 1e6}  # with which nothing is learned
    task = Reconstructor(model="gsae", model_args=args, data=digits)
    Trainer(max_steps=1, limit_val_batches=0, **QUIET).fit(task, digits)
    leading = torch.linalg.svd(digits.sample(5000).flatten(1), full_matrices=False).Vh[:10]
    for group in task.model.coder.dictionary.weight.detach().split(10):
        torch.testing.assert_close(group.mT @ group, leading.mT @ leading, atol=1e-4, rtol=0)


def test_a_run_in_bfloat16_starts_from_the_training_images_and_holds_its_target(tmp_path):
    args = ["--model", "dsc.tasks.Reconstructor", "--model.model", "gsae", "--trainer.precision", "bf16-true"]
    args += [
        "--model.activation",
        "group_relu",
        "--model.model_args",
        "{num_atoms: 20, group_size: 10, initial: singular}",
    ]
    target = ["--model.regularizers+=dsc.regularizers.L1", "--model.regularizers.weight=0.001"]
    run(tmp_path, *args, *target, "--model.regularizers.target=0.01")
    state = torch.load(tmp_path / "digits/1/resume/last.ckpt", weights_only=True)["state_dict"]
    assert state["model.coder.dictionary.weight"].dtype == torch.bfloat16
    # Four steps of two per cent, as the code stays far denser than the target.
    assert state["regularizers.0.weight"].item() == pytest.approx(0.001 * np.exp(0.02 * 4), rel=1e-6)


def test_a_task_takes_a_published_backbone_by_its_name():
    task = Classifier(model="resnet18.cifar10_group_relu_nonneg", data=ImageData("cifar10"))
    assert task.model.num_classes == 10 and len(task.model.swapped_activations) == 17


def test_models_of_fixed_size_learn_the_images_size(digits):
    task = classifier(digits, model="dsc_mlp_pico", model_args={})
    assert task.model(digits.sample(3)).shape == (3, 10)
    assert Reconstructor(model="sae", data=digits).model(digits.sample(3)).shape == (3, 1, 8, 8)


@pytest.mark.slow
@pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="needs a C++ compiler")
def test_compiled_training_follows_eager_training(digits):
    after = {}
    for compile in (False, True):
        torch._dynamo.reset()
        task = classifier(digits, compile=compile, regularizers=[L1(weight=0.1)], channels_last=True)
        trainer = Trainer(max_epochs=1, limit_train_batches=5, limit_val_batches=2, precision="64-true", **QUIET)
        trainer.fit(task, digits)
        after[compile] = task.state_dict(), {key: float(value) for key, value in trainer.logged_metrics.items()}
    assert after[False][1].keys() == after[True][1].keys() >= {"train/penalty", "val/accuracy"}
    for eager, compiled in zip(after[False], after[True], strict=True):
        torch.testing.assert_close(compiled, eager, rtol=1e-8, atol=1e-10)


# Regularizers


def test_warm_up_follows_the_run_and_a_targets_weight_is_kept(tmp_path):
    penalty = [
        "--model.regularizers+=dsc.regularizers.L1", "--model.regularizers.weight=0.5",
        "--model.regularizers.target=0.2", "--model.regularizers.warmup=0.5",
    ]  # fmt: skip
    cli = cli_of([
        "--config", "configs/digits.yaml", "--trainer.fast_dev_run", "true", "--trainer.enable_progress_bar", "false",
        *penalty,
    ])  # fmt: skip
    assert isinstance(cli.model.regularizers[0], L1)
    run(tmp_path, *penalty)
    resume = torch.load(tmp_path / "digits/1/resume/last.ckpt", weights_only=True)
    weight = resume["state_dict"]["regularizers.0.weight"].item()
    assert 0.5 < weight <= 0.5 * np.exp(0.02 * 2) * (1 + 1e-6)  # two of the four steps come after the warm-up


def test_a_warm_up_needs_an_end():
    task = classifier(Plain(), lr_scheduler=None, regularizers=[L1(weight=0.1, warmup=0.5)])
    with pytest.raises(ValueError, match="warm-up is a fraction of the run: give trainer.max_epochs"):
        Trainer(max_epochs=-1, max_time={"seconds": 1}, **QUIET).fit(task, Plain())


def test_progress_is_the_fraction_of_steps_behind(digits, monkeypatch):
    seen = []

    class Spy(L1):
        def forward(self, observer, progress=1.0):
            seen.append((self.training, progress))
            return super().forward(observer, progress)

    task = classifier(digits, regularizers=[Spy(0.1)])
    Trainer(max_epochs=2, limit_train_batches=3, limit_val_batches=1, num_sanity_val_steps=0, **QUIET).fit(task, digits)
    assert [p for training, p in seen if training] == [i / 6 for i in range(6)]
    assert [p for training, p in seen if not training] == [1.0, 1.0]
