"""`train.py` as a user runs it: from the first command to a resumed run and to every kind of wrong input."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

import dsc
from dsc.cli import COMMANDS, cli_of, main
from dsc.data import ImageData
from dsc.report import read_metrics

ROOT = Path(__file__).resolve().parents[1]
CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))
QUICK = ["--trainer.enable_progress_bar", "false", "--trainer.limit_train_batches", "4"]


def train(runs, *args):
    return COMMANDS["train"](["--config", str(ROOT / "configs/digits.yaml"), "--runs", str(runs), *QUICK, *args])


def failure(capsys, *args):
    with pytest.raises(SystemExit) as stop:
        main(["train", *args])
    assert stop.value.code == 2
    return capsys.readouterr().err.strip().splitlines()[-1]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    root = tmp_path_factory.mktemp("runs")
    command = [sys.executable, str(ROOT / "train.py"), "--runs", str(root), "--trainer.max_epochs", "3"]
    command += ["--data.val_fraction", "0.12"]  # other images than by default, on which convergence is measured
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return root / "digits" / "1", done.stdout


def test_a_run_leaves_everything_behind(run):
    folder, printed = run
    for name in ("config.yaml", "metrics.csv", "summary.json", "resume/last.ckpt", "best/model.safetensors"):
        assert (folder / name).is_file(), name
    assert list(folder.glob("events.out.tfevents*"))
    for picture in ("training", "sparsity", "convergence", "atoms"):
        assert (folder / f"{picture}.png").read_bytes().startswith(b"\x89PNG")
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["test"]["accuracy"] > 0.5  # three epochs; chance is 0.1
    assert f"accuracy: {summary['test']['accuracy']:.4f}" in printed


def test_every_figure_the_design_lists_is_logged_under_its_unit(run):
    logged = read_metrics(run[0])
    layers = [f"coder.layers.{i}" for i in range(3)]
    for layer in layers:
        for name in ("active_fraction", "hoyer", "dead_fraction"):
            assert all(0 <= value <= 1 for _, value in logged[f"sparsity/{name}/{layer}"])
        assert f"sparsity/active_group_fraction/{layer}" not in logged  # ReLU has no groups
        assert all(0 < value < 1 for _, value in logged[f"convergence/rate/{layer}"])
        assert all(value > 0 for _, value in logged[f"convergence/error/{layer}"])
        assert {value for _, value in logged[f"convergence/steps/{layer}"]} == {3}
        assert all(value > 0 for _, value in logged[f"convergence/dictionary/{layer}"])
    total = dict(logged["sparsity/active_fraction/total"])
    assert len(total) == 3 and all(0 < value < 1 for value in total.values())
    losses = torch.tensor([value for _, value in logged["train/loss"]], dtype=torch.float64)
    expected = (
        torch.linalg.lstsq(torch.stack([torch.ones(3), torch.arange(3.0)], 1).double(), losses.log().unsqueeze(1))
        .solution[1]
        .exp()
    )
    assert logged["convergence/train/rate"][-1][1] == pytest.approx(float(expected), rel=1e-4)


def test_best_weights_load_and_give_the_accuracy_of_the_summary(run):
    folder, _ = run
    model = dsc.load(folder / "best").eval()
    data = ImageData("digits")
    data.setup()
    images, labels, _ = data._parts["test"].tensors
    with torch.no_grad():
        accuracy = (model(data._as_input(images)).argmax(1) == labels).float().mean()
    summary = json.loads((folder / "summary.json").read_text())
    assert float(accuracy) == pytest.approx(summary["test"]["accuracy"], abs=1e-6)


def test_evaluate_agrees_with_the_card_and_notices_when_it_does_not(run, capsys, tmp_path):
    folder, _ = run
    main(["evaluate", str(folder / "best"), "--picture", str(tmp_path / "curves.png")])
    card = json.loads((folder / "best/config.json").read_text())["dsc"]
    accuracy, error = card["metrics"]["accuracy"], card["convergence"][0]["errors"]["8"]
    out = capsys.readouterr().out
    assert re.search(rf"\| accuracy +\| {accuracy:.4f} +\| {accuracy:.4f} +\|", out)
    assert re.search(rf"\| convergence/\S+ ista k=8 +\| {error:.4f} +\| {error:.4f} +\|", out)
    assert (tmp_path / "curves.png").is_file()
    for places, message in (([folder], "curves.png exists already"), ([folder, folder], "of one checkpoint, got 2")):
        with pytest.raises(SystemExit):
            main(["evaluate", *map(str, places), "--picture", str(tmp_path / "curves.png")])
        assert message in capsys.readouterr().err


def test_evaluate_tells_every_difference_once_all_is_measured(run, capsys, tmp_path):
    folder, _ = run
    for wrong in ("accuracy", "error"):
        other = tmp_path / wrong
        shutil.copytree(folder / "best", other)
        config = json.loads((other / "config.json").read_text())
        if wrong == "accuracy":
            config["dsc"]["metrics"]["accuracy"] += 0.01
        else:
            config["dsc"]["convergence"][-1]["errors"]["4"] += 0.01
        (other / "config.json").write_text(json.dumps(config))
    with pytest.raises(SystemExit):
        main(["evaluate", str(tmp_path / "accuracy"), str(tmp_path / "error"), str(folder)])
    told = capsys.readouterr()
    assert told.out.count("test accuracy") == 3
    (line,) = told.err.splitlines()[-1:]
    assert "these figures are not their card's" in line and line.count("card 0.") == 2
    assert re.search(r"accuracy: accuracy: card .*; .*error: convergence/\S+ fista k=4: card ", line)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["dsc_mlp_pico.mnist_relu", "dsc_attn_pico.mnist_soft", "gsae.mnist_group_relu"])
def test_published_checkpoints_are_measured_as_their_cards_say(name):
    if ImageData("mnist")._missing():
        pytest.skip("no mnist data: set DSC_DATA to its folder")
    main(["evaluate", name])  # ends with an error where a figure is not its card's


def test_halve_writes_rounded_weights_with_the_figures_they_reach(run, capsys, tmp_path):
    best, out = run[0] / "best", tmp_path / "half"
    main(["halve", str(best), str(out)])
    whole, half = load_file(best / "model.safetensors"), load_file(out / "model.safetensors")
    assert whole.keys() == half.keys()
    for key, value in whole.items():
        rounded = value.half() if value.ndim > 1 else value
        assert half[key].dtype == rounded.dtype and torch.equal(half[key], rounded)
    loaded = dsc.load(out)
    assert all(torch.equal(value, half[key].to(value.dtype)) for key, value in loaded.state_dict().items())
    assert {value.dtype for value in loaded.parameters()} == {torch.float32}
    before, after = (json.loads((folder / "config.json").read_text())["dsc"]["metrics"] for folder in (best, out))
    assert before.keys() == after.keys() and before["loss"] != after["loss"]
    main(["evaluate", str(out)])
    with pytest.raises(SystemExit):
        main(["halve", str(best), str(out)])
    assert "never overwritten" in capsys.readouterr().err


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_every_configuration_runs(path):
    config = yaml.safe_load(path.read_text())
    data = ImageData(config["data"]["init_args"]["dataset"])
    if data._missing():
        pytest.skip(f"no {data.dataset} data in {data.root}: set DSC_DATA to its folder")
    small = ["--data.batch_size", "16", "--data.eval_batch_size", "16"]
    assert COMMANDS["train"](["--config", str(path), "--trainer.fast_dev_run", "true", *small]) is None


@pytest.mark.parametrize(
    "args",
    [
        ["--model.activation", "group_relu", "--model.group_size", "4"],
        ["--model.activation", "gelu"],
        ["--model.model", "resnet18", "--model.activation", "group_relu"],
        ["--model.model", "dsc_attn_pico"],
        ["--model.model_args.steps", "1"],
        ["--model.model_args.joint", "false", "--model.model_args.solver", "fista"],
        ["--trainer.precision", "bf16-mixed", "--model.channels_last", "true"],
    ],
    ids=lambda args: " ".join(args[-4:]),
)
def test_activation_backbone_and_precision_change_from_the_command_line(args, tmp_path):
    summary = train(tmp_path, "--trainer.max_epochs", "1", *args)
    assert 0 <= summary["test"]["accuracy"] <= 1
    grouped = any("group" in arg for arg in args)
    assert any(name.startswith("sparsity/active_group_fraction/") for name in summary["test"]) == grouped
    solving = not any(arg in ("gelu", "resnet18", "dsc_attn_pico", "1") for arg in args)
    assert bool(summary["convergence"]) == solving


@pytest.mark.parametrize(
    "precision,processor,hinted",
    [
        ("bf16-mixed", {"avx512_bf16": False, "amx_bf16": False}, True),
        ("bf16-mixed", {"avx512_bf16": True}, False),
        ("bf16-mixed", {"bf16": True}, False),
        ("bf16-mixed", {}, False),  # nothing is known of it
        ("32-true", {"avx512_bf16": False}, False),
    ],
)
def test_emulated_bfloat16_gets_a_hint(precision, processor, hinted, monkeypatch, capsys):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: processor, raising=False)
    once = ["--trainer.fast_dev_run", "true", "--trainer.accelerator", "cpu", "--trainer.precision", precision]
    COMMANDS["train"](["--config", str(ROOT / "configs/digits.yaml"), *once])
    assert ("--trainer.precision 32-true" in capsys.readouterr().err) == hinted


def test_a_regularizer_makes_codes_sparser(tmp_path):
    penalty = ["--model.regularizers+=dsc.regularizers.L1", "--model.regularizers.weight=1.0"]
    runs = [train(tmp_path / name, "--trainer.max_epochs", "6", *extra) for name, extra in (("a", []), ("b", penalty))]
    plain, sparse = (run["test"]["sparsity/active_fraction/total"] for run in runs)
    assert sparse < plain
    main(["evaluate", str(Path(runs[1]["run"]) / "best")])  # which knows of no regularizer


def test_runs_are_numbered_and_never_overwritten(tmp_path):
    first = train(tmp_path, "--trainer.max_epochs", "1")
    before = {p: p.read_bytes() for p in (tmp_path / "digits/1").rglob("*") if p.is_file()}
    second = train(tmp_path, "--trainer.max_epochs", "1")
    assert (Path(first["run"]).name, Path(second["run"]).name) == ("1", "2")
    assert before == {p: p.read_bytes() for p in (tmp_path / "digits/1").rglob("*") if p.is_file()}
    # The same seed gives the same weights.
    weights = [load_file(tmp_path / f"digits/{n}/best/model.safetensors") for n in (1, 2)]
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])


def test_resume_after_a_kill_gives_the_weights_of_an_unbroken_run(tmp_path):
    args = [sys.executable, "train.py", *QUICK, "--trainer.max_epochs", "6", "--data.augment", "[crop, cutout]"]
    args += ["--data.cutout_size", "2", "--model.model_args.drop_rate", "0.2"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    broken = [*args, "--runs", str(tmp_path / "broken")]
    checkpoint = tmp_path / "broken/digits/1/resume/last.ckpt"
    process = subprocess.Popen(broken, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 300
    while not checkpoint.exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "broken/digits/1/summary.json").exists(), "it was killed too late to test anything"
    for command in ([*broken, "--ckpt_path", "last"], [*args, "--runs", str(tmp_path / "whole")]):
        subprocess.run(command, cwd=ROOT, env=environment, check=True, capture_output=True)
    assert [p.name for p in (tmp_path / "broken/digits").iterdir()] == ["1"]
    states = [
        torch.load(tmp_path / name / "digits/1/resume/last.ckpt", weights_only=True) for name in ("broken", "whole")
    ]
    assert states[0]["epoch_losses"] == states[1]["epoch_losses"]
    for key, value in states[1]["state_dict"].items():
        assert torch.equal(states[0]["state_dict"][key], value), key
    logged = [read_metrics(tmp_path / name / "digits/1")["val/loss"] for name in ("broken", "whole")]
    assert logged[0] == logged[1]


def test_a_run_is_not_resumed_for_another_length(tmp_path, capsys):
    train(tmp_path, "--trainer.max_epochs", "1")
    longer = ["--runs", str(tmp_path), *QUICK, "--trainer.max_epochs", "2", "--ckpt_path", "last"]
    message = failure(capsys, *longer)
    assert "planned for 4 steps and is resumed for 8" in message and "--model.initial_checkpoint" in message


def test_a_run_without_a_schedule_may_be_prolonged(tmp_path):
    rate = ["--model.lr_scheduler", "null"]
    train(tmp_path, *rate, "--trainer.max_epochs", "1")
    train(tmp_path, *rate, "--trainer.max_epochs", "2", "--ckpt_path", "last")
    kept = torch.load(tmp_path / "digits/1/resume/last.ckpt", weights_only=True)
    assert kept["global_step"] == 8 and len(kept["epoch_losses"]) == 2


def test_every_epoch_can_be_continued_from_and_the_best_is_kept(tmp_path):
    train(tmp_path, "--trainer.max_epochs", "3", "--model.optimizer.init_args.lr", "0")  # no epoch beats the first
    kept = tmp_path / "digits/1/resume"
    epochs = {path.stem: torch.load(path, weights_only=True)["epoch"] for path in kept.iterdir()}
    assert epochs == {"best": 0, "last": 2}


def test_validation_may_be_rare(tmp_path):
    train(tmp_path, "--trainer.max_epochs", "3", "--trainer.check_val_every_n_epoch", "2")
    kept = tmp_path / "digits/1/resume"
    epochs = {path.stem: torch.load(path, weights_only=True)["epoch"] for path in kept.iterdir()}
    assert epochs == {"best": 1, "last": 2}


def test_an_infinite_loss_stops_names_the_step_and_keeps_the_last_good_checkpoint(tmp_path, monkeypatch, capsys):
    from dsc.tasks import Classifier

    honest = Classifier.loss

    def loss(self, batch, stage):
        value = honest(self, batch, stage)
        return value * float("inf") if stage == "train" and self.global_step == 6 else value

    monkeypatch.setattr(Classifier, "loss", loss)
    message = failure(capsys, "--runs", str(tmp_path), *QUICK)
    assert "the loss is inf at step 6 (epoch 1)" in message
    kept = torch.load(tmp_path / "digits/1/resume/last.ckpt", weights_only=True)
    assert kept["epoch"] == 0 and all(value.isfinite().all() for value in kept["state_dict"].values())


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        (["--trainer.accelerator", "cpu", "--trainer.devices", "2"], "trained on one device, not on 2"),
        (["--model.activaton", "relu"], "unknown key 'activaton'; did you mean 'activation'?"),
        (["--trainer.max_epochz", "3"], "unknown key 'trainer.max_epochz'; did you mean 'trainer.max_epochs'?"),
        (["--model.activation", "group_rleu"], "unknown activation 'group_rleu'; did you mean 'group_relu'?"),
        (["--model.model", "resnet81"], "unknown model 'resnet81'; did you mean 'resnet18'?"),
        (["--data.dataset", "mnits"], "unknown data set 'mnits'; did you mean 'mnist'?"),
        (
            ["--model.activation", "group_relu", "--model.group_size", "5"],
            "group_size=5 does not divide the 32 channels",
        ),
        (["--model.threshold", "-1"], "threshold must be finite and at least 0, got -1"),
        (
            ["--model.initial_checkpoint", "dsc_cnn.mnist_rleu"],
            "unknown checkpoint 'dsc_cnn.mnist_rleu'; did you mean 'dsc_cnn.mnist_relu'?",
        ),
        (["--model.initial_checkpoint", "dsc_cnn.mnist_relu"], "dsc_cnn.mnist_relu holds another architecture"),
        (["--model.model_args.steps", "0"], "must be at least 1, got 0"),
        (["--model.model", "dsc_cnn"], "images of 8×8 pixels are too small: this network needs 28 a side"),
        (["--ckpt_path", "last", "--name", "digts"], "no run to continue"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_wrong_input_gets_one_clear_line(args, expected, tmp_path, capsys):
    assert expected in failure(capsys, "--runs", str(tmp_path), *QUICK, *args)


def test_an_unknown_regularized_layer_names_the_nearest(tmp_path, capsys):
    args = [
        "--model.regularizers+=dsc.regularizers.L1",
        "--model.regularizers.weight=1",
        "--model.regularizers.layers=coder.layer.0",
    ]
    message = failure(capsys, "--runs", str(tmp_path), *QUICK, *args)
    assert "unknown layer 'coder.layer.0'; did you mean 'coder.layers.0'?" in message


def test_a_wrong_key_in_a_file_names_the_nearest(tmp_path, capsys):
    text = (ROOT / "configs/digits.yaml").read_text().replace("label_smoothing", "label_smothing")
    (tmp_path / "wrong.yaml").write_text(text)
    message = failure(capsys, "--config", str(tmp_path / "wrong.yaml"))
    assert "unknown key 'label_smothing'; did you mean 'label_smoothing'?" in message


@pytest.mark.parametrize("form", ["--config=configs/mnist_sae.yaml", "--config configs/mnist_sae.yaml"])
def test_the_library_s_configurations_are_found_from_any_folder(form, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = cli_of([*form.split(), "--trainer.fast_dev_run", "true"])
    assert found.model.architecture == "sae" and found.datamodule.dataset == "mnist"
    (tmp_path / "configs").mkdir()
    own = (ROOT / "configs/mnist_sae.yaml").read_text().replace("model: sae", "model: sae_deep")
    (tmp_path / "configs/mnist_sae.yaml").write_text(own)
    assert cli_of([*form.split(), "--trainer.fast_dev_run", "true"]).model.architecture == "sae_deep"


def test_callbacks_of_a_user_come_beside_the_run_s_own(tmp_path):
    text = (ROOT / "configs/digits.yaml").read_text()
    single = "trainer:\n  callbacks: {class_path: lightning.pytorch.callbacks.LearningRateMonitor}\n"
    (tmp_path / "one.yaml").write_text(text.replace("trainer:\n", single))
    another = [
        "--trainer.callbacks=lightning.pytorch.callbacks.ModelCheckpoint",
        "--trainer.callbacks.monitor=val/loss",
    ]
    for config, more, count in ((tmp_path / "one.yaml", [], 2), (ROOT / "configs/digits.yaml", another, 3)):
        trainer = cli_of(["--config", str(config), "--runs", str(tmp_path), *more]).trainer
        assert trainer.checkpoint_callback.monitor == "val/accuracy"  # whose best weights a run keeps
        assert len(trainer.checkpoint_callbacks) == count


def test_help_says_what_each_command_does(capsys):
    main(["--help"])
    shown = capsys.readouterr().out
    for name, command in COMMANDS.items():
        assert re.search(rf"^  {name} +{re.escape(command.__doc__.splitlines()[0])}$", shown, re.M), name


def test_an_unknown_command_names_the_nearest(capsys):
    with pytest.raises(SystemExit, match="unknown command 'trian'; did you mean 'train'"):
        main(["trian"])


def test_a_reader_that_stops_reading_ends_the_command_without_a_traceback():
    command = [sys.executable, "-c", "from dsc.cli import main; main()", "models", "dsc_mlp*"]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    process.stdout.close()
    assert process.stderr.read() == ""
    assert process.wait() == 1
