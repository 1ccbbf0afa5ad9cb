import dataclasses
import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch

from dsc import hub, models

CNN = {"channels": [8, 8, 16], "kernel_sizes": [3, 3, 3], "strides": [2, 1, 1], "num_classes": 4}
ENTRIES = {  # small shapes; another entry is tried as it is
    "dsc_cnn": CNN | {"activation": "group_relu", "group_size": 4},
    "dsc_cnn_pico": {"channels": [8, 8, 16], "num_classes": 4, "solver": "fista"},
    "dsc_vit_pico": {"dim": 16, "depth": 2, "num_classes": 4},
    "dsc_attn_pico": {"dim": 16, "depth": 2, "num_classes": 4, "activation": "soft", "threshold": 0.2},
    "gsae": {"img_size": 8, "num_atoms": 32, "group_size": 8},
    "sae": {"img_size": 8, "num_atoms": 32, "steps": 3},
}
FACTS = {
    "task": "Classifier",
    "dataset": "digits",
    "normalize": True,
    "activation": "GroupReLU",
    "seed": 7,
    "metrics": {"accuracy": 0.98765, "loss": 0.04321},
    "convergence": [],
    "training": {"seed_everything": 7},
}


def trained(name, args):
    """A model whose parameters and buffers all differ from a fresh one's."""
    torch.manual_seed(1)
    model = models.create_model(name, **args).train()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
        for _ in range(2):
            model(inputs(model, args, seed=3))
    return model.eval()


def inputs(model, args, seed=0):
    channels, size, _ = model.pretrained_cfg["input_size"]
    size = args.get("img_size", size)
    return torch.randn(2, channels, size, size, generator=torch.Generator().manual_seed(seed))


def save(model, folder, name="dsc_cnn", args=ENTRIES["dsc_cnn"], **facts):
    cfg = {key: model.pretrained_cfg[key] for key in ("classifier", "fixed_input_size")}
    size = args.get("img_size", model.pretrained_cfg["input_size"][-1])
    channels = model.pretrained_cfg["input_size"][0]
    cfg |= {"input_size": [channels, size, size], "num_classes": model.num_classes}
    cfg |= {"mean": [0.25] * channels, "std": [0.5] * channels, "crop_pct": 1.0, "license": "mit"}
    return hub.save(model, folder, name, args, cfg, FACTS | facts)


@pytest.fixture(scope="module")
def model():
    return trained("dsc_cnn", ENTRIES["dsc_cnn"])


@pytest.fixture
def folder(model, tmp_path):
    return save(model, tmp_path / "best")


@pytest.mark.parametrize("name", models.list_models())
def test_round_trip_by_us_and_by_timm(name, tmp_path):
    args = ENTRIES.get(name, {})
    model = trained(name, args)
    folder = save(model, tmp_path / "best", name, args)
    x = inputs(model, args)
    for loaded in (models.load(folder), timm.create_model(f"local-dir:{folder}", pretrained=True)):
        assert type(loaded) is type(model) and loaded.state_dict().keys() == model.state_dict().keys()
        assert torch.equal(loaded.eval()(x), model(x))
        assert tuple(loaded.pretrained_cfg["mean"]) == (0.25,) * x.shape[1]
        assert tuple(loaded.pretrained_cfg["input_size"]) == tuple(x.shape[1:])


def test_folder_says_what_it_holds(folder, model):
    assert {path.name for path in folder.iterdir()} == {"config.json", "model.safetensors", "README.md"}
    config = json.loads((folder / "config.json").read_text())
    assert config["architecture"] == "dsc_cnn" and config["num_classes"] == 4
    assert config["model_args"] == ENTRIES["dsc_cnn"]
    assert FACTS.items() <= config["dsc"].items()
    digest = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    assert config["dsc"]["sha256"] == digest and config["dsc"]["torch"] == torch.__version__


def test_card_shows_the_figures(folder):
    text = (folder / "README.md").read_text()
    assert text == hub.card(hub.read_config(folder))
    assert "# dsc_cnn, digits, GroupReLU" in text and "Seed 7" in text
    assert "| accuracy | 0.9877 |" in text and "| loss | 0.0432 |" in text


@pytest.mark.parametrize("place", [0, 100, -1])
def test_altered_byte_is_found(folder, place):
    path = folder / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)
    with pytest.raises(ValueError, match="model.safetensors was altered or truncated.*SHA-256"):
        models.load(folder)


def test_numbers_too_large_for_half_precision_are_refused():
    weights = {"a": torch.full((2, 2), 65504.0), "b": torch.full((2,), 1e6)}
    assert {key: value.dtype for key, value in hub.halved(weights).items()} == {"a": torch.half, "b": torch.float}
    with pytest.raises(ValueError, match="^c has entries beyond ±65504"):
        hub.halved(weights | {"c": torch.full((1, 2), 7e4)})


@pytest.mark.parametrize("kept", [0, 1000, -1])
def test_truncated_file_is_found(folder, kept):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(ValueError, match="model.safetensors was altered or truncated"):
        models.load(folder)


@pytest.mark.parametrize("pickle", ["pytorch_model.bin", "model.pt", "last.ckpt"])
def test_missing_weights_and_no_pickle_in_their_place(folder, model, pickle):
    (folder / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="has no model.safetensors$"):
        models.load(folder)
    torch.save(model.state_dict(), folder / pickle)
    with pytest.raises(FileNotFoundError, match=f"has no model.safetensors .{pickle} may hold a pickle"):
        models.load(folder)


def test_folder_that_is_none(tmp_path, folder):
    with pytest.raises(FileNotFoundError, match="no checkpoint folder: it has no config.json"):
        models.load(tmp_path / "nowhere")
    (folder / "config.json").write_text('{"architecture": "resnet18"}')
    with pytest.raises(ValueError, match="config.json lacks .*'dsc': it was not written by dsc"):
        models.load(folder)


def test_altered_card_is_found(folder):
    path = folder / "config.json"
    text = path.read_text()
    path.write_text(text[:200])
    with pytest.raises(ValueError, match=f"{path} was altered or truncated: .*line"):
        models.load(folder)
    path.write_bytes(b"\xff" + text.encode())
    with pytest.raises(ValueError, match=f"{path} was altered or truncated: .*0xff"):
        models.load(folder)
    path.write_text(text.replace('"sha256"', '"sha"'))
    with pytest.raises(ValueError, match=f"{path} lacks 'sha256'"):
        models.load(folder)


def test_a_run_s_folder_stands_for_what_it_wrote_last(model, tmp_path):
    (tmp_path / "config.yaml").touch()
    for call in (models.load, hub.locate):
        with pytest.raises(FileNotFoundError, match="has no weights yet"):
            call(tmp_path)
    save(model, tmp_path / "best", seed=1)
    last = save(model, tmp_path / "best-2", seed=2)
    os.utime(last / "config.json", (4e9, 4e9))
    assert hub.locate(tmp_path) == hub.locate(str(tmp_path)) == last
    (last / "model.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match="best-2/model.safetensors was altered"):
        models.load(tmp_path)


def test_other_architecture_says_what_differs(folder):
    torch.manual_seed(0)
    wider = models.create_model("dsc_cnn", **ENTRIES["dsc_cnn"] | {"channels": [8, 8, 24]})
    before = {key: value.clone() for key, value in wider.state_dict().items()}
    differs = r"coder.layers.2.dictionary.weight has shape \(16, 8, 3, 3\), the model \(24, 8, 3, 3\)"
    with pytest.raises(ValueError, match=f"another architecture .dsc_cnn.: .*{differs}"):
        hub.load_weights(wider, folder)
    assert all(torch.equal(value, before[key]) for key, value in wider.state_dict().items())
    with pytest.raises(ValueError, match="missing blocks.*; …"):
        hub.load_weights(models.create_model("dsc_vit_pico"), folder)


@pytest.mark.parametrize("args", [{}, {"num_classes": 7}, {"activation": "relu", "group_size": None, "num_classes": 7}])
def test_training_starts_from_a_checkpoint_of_another_head_or_activation(folder, model, args):
    torch.manual_seed(5)
    other = models.create_model("dsc_cnn", **ENTRIES["dsc_cnn"] | args)
    fresh = {key: value.clone() for key, value in other.state_dict().items()}
    afresh = hub.start_from(other, folder)
    expected = ["head.fc.bias", "head.fc.weight"] if "num_classes" in args else []
    expected += [key for key in fresh if key.endswith("threshold")] if "activation" in args else []
    assert sorted(afresh) == sorted(expected) and ("activation" not in args or len(afresh) == 5)
    saved = model.state_dict()
    for key, value in other.state_dict().items():
        assert torch.equal(value, fresh[key] if key in afresh else saved[key]), key


@pytest.mark.parametrize("asked, kept", [({}, True), ({"group_size": 4}, True), ({"threshold": 0.3}, False)])
def test_training_starts_with_the_threshold_that_was_asked_for(folder, model, asked, kept):
    other = models.create_model("dsc_cnn", **ENTRIES["dsc_cnn"] | asked)
    fresh = {key: value.clone() for key, value in other.state_dict().items() if key.endswith("threshold")}
    afresh = hub.start_from(other, folder, asked)
    assert afresh == ([] if kept else list(fresh)) and len(fresh) == 3
    for key, value in fresh.items():
        assert torch.equal(other.state_dict()[key], model.state_dict()[key] if kept else value), key


def test_thresholds_of_another_activation_start_afresh(tmp_path):
    shape = {key: value for key, value in ENTRIES["dsc_cnn"].items() if key not in ("activation", "group_size")}
    args = shape | {"activation": "soft"}
    folder = save(trained("dsc_cnn", args), tmp_path / "best", "dsc_cnn", args, activation="Soft")
    own = models.create_model("dsc_cnn", **shape)
    assert hub.start_from(own, folder) == [key for key in own.state_dict() if key.endswith("threshold")] != []
    assert hub.start_from(models.create_model("dsc_cnn", **args), folder, {"activation": "soft"}) == []


def test_more_steps_of_a_trained_layer_may_be_asked_for():
    name = "checkpoints/dsc_cnn.mnist_relu"
    x = torch.rand(2, 1, 28, 28)
    few, more = (models.load(name, **args).eval() for args in ({}, {"steps": 9}))
    assert few.coder.solver.steps == 3 and not torch.equal(few(x), more(x))
    few.coder.solver = dataclasses.replace(few.coder.solver, steps=9)
    assert torch.equal(few(x), more(x))


def test_training_does_not_start_from_another_architecture(folder):
    deeper = models.create_model("dsc_cnn", **ENTRIES["dsc_cnn"] | {"channels": [8, 8, 24], "num_classes": 7})
    with pytest.raises(
        ValueError, match=r"another architecture .dsc_cnn.: .*\(16, 8, 3, 3\), the model \(24, 8, 3, 3\)"
    ):
        hub.start_from(deeper, folder)
    with pytest.raises(ValueError, match="another architecture .dsc_cnn.: missing blocks.*; …"):
        hub.start_from(models.create_model("dsc_vit_pico"), folder)


def test_several_heads_are_replaced_together(tmp_path):
    args = dict(img_size=32, embed_dim=16, depth=1, num_heads=2, activation="relu")
    name = "deit_tiny_distilled_patch16_224"
    model = models.create_model(name, num_classes=4, **args)
    cfg = {"num_classes": 4, "classifier": list(model.pretrained_cfg["classifier"]), "input_size": [3, 32, 32]}
    folder = hub.save(model, tmp_path / "best", name, args | {"num_classes": 4}, cfg, FACTS)
    loaded = models.load(folder, num_classes=7)
    assert [head.out_features for head in loaded.get_classifier()] == [7, 7]
    heads = [f"{head}.{part}" for head in ("head", "head_dist") for part in ("bias", "weight")]
    assert hub.start_from(models.create_model(name, num_classes=7, **args), folder) == heads
    for key in model.state_dict().keys() - set(heads):
        assert torch.equal(loaded.state_dict()[key], model.state_dict()[key]), key


def load_by_timm(folder, **kwargs):
    return timm.create_model(f"local-dir:{folder}", pretrained=True, **kwargs)


@pytest.mark.parametrize("load", [models.load, load_by_timm])
def test_another_number_of_classes_replaces_the_head_alone(folder, model, load):
    torch.manual_seed(5)
    loaded = load(folder, num_classes=7)
    assert loaded.num_classes == loaded.get_classifier().out_features == 7
    for key, value in model.state_dict().items():
        if not key.startswith("head."):
            assert torch.equal(loaded.state_dict()[key], value), key
    other = load(folder, num_classes=7)
    assert not torch.equal(other.get_classifier().weight, loaded.get_classifier().weight)  # it is a fresh one
    x = inputs(model, {})
    assert torch.equal(loaded.eval().forward_features(x), model.forward_features(x))


def test_a_tuple_is_the_list_that_was_saved(folder, model):
    loaded = models.load(folder, channels=(8, 8, 16))
    assert torch.equal(loaded.get_classifier().weight, model.get_classifier().weight)


def test_number_of_classes_that_is_the_same_keeps_the_head(folder, model):
    head = models.load(folder, num_classes=4).get_classifier()
    assert torch.equal(head.weight, model.get_classifier().weight)


@pytest.mark.parametrize(
    "key, value", [("activation", "soft"), ("activation", None), ("group_size", 2), ("channels", [4, 4, 4])]
)
def test_argument_against_the_checkpoint_is_an_error(folder, key, value):
    with pytest.raises(ValueError, match=f"checkpoint best was trained with {key}=.*, not "):
        models.load(folder, **{key: value})
    saved = ENTRIES["dsc_cnn"].get(key)
    assert models.load(folder, **{key: saved}) is not None


@pytest.mark.parametrize(
    "name, args",
    [
        ("dsc_cnn.mnist_relu", {"strides": (1, 1, 1)}),
        ("dsc_cnn.mnist_relu", {"joint": False}),
        ("dsc_cnn.mnist_relu", {"threshold": 0.3}),
        ("dsc_cnn.mnist_relu", {"in_chans": 3}),
        ("dsc_speed.cifar10_relu", {"global_pool": "avg"}),
        ("dsc_vit_pico.mnist_relu", {"num_heads": 2}),
        ("resnet18.cifar10_group_relu_nonneg", {"output_stride": 8}),
    ],
)
def test_argument_that_the_weights_shapes_do_not_tell_is_an_error(name, args):
    with pytest.raises(ValueError, match=f"checkpoint {name} was trained with"):
        models.create_model(name, pretrained=True, **args)
    if not name.startswith("resnet18"):
        with pytest.raises(ValueError, match=f"checkpoint {name} was trained with"):
            timm.create_model(name, pretrained=True, **args)
    free = {key: None for key in args} | {"drop_rate": 0.1}
    assert models.load(hub.find(name), **{k: v for k, v in free.items() if k != "in_chans"}) is not None


@pytest.mark.parametrize("kwargs", [{}, {"out_indices": (1, 2)}, {"num_classes": 4}])
def test_features_of_a_checkpoint_are_its_codes(folder, model, kwargs):
    features = models.load(folder, features_only=True, **kwargs).eval()
    x = inputs(model, {})
    codes = model.coder.codes(x)
    for found, code in zip(features(x), codes[1:] if "out_indices" in kwargs else codes, strict=True):
        assert torch.equal(found, code)


@pytest.mark.parametrize(
    "name, kwargs", [("resnet18", {}), ("convnext_atto", {}), ("vit_tiny_patch16_224", {"img_size": 32})]
)
def test_backbone_round_trip_also_as_features(name, kwargs, tmp_path):
    args = {"activation": "soft", "threshold": 0.05, "num_classes": 3, **kwargs}
    torch.manual_seed(0)
    model = models.create_model(name, **args).eval()
    folder = save(model, tmp_path / "best", name, args)
    x = inputs(model, {"img_size": 32})
    loaded = models.load(folder).eval()
    assert torch.equal(loaded(x), model(x)) and loaded.swapped_activations == model.swapped_activations
    other = models.load(folder, num_classes=5).eval()
    assert other(x).shape == (2, 5) and torch.equal(other.forward_features(x), model.forward_features(x))
    torch.manual_seed(1)
    maps = models.load(folder, features_only=True).eval()(x)
    torch.manual_seed(2)
    again = models.load(folder, features_only=True).eval()(x)
    for first, second in zip(maps, again, strict=True):  # weights that were not loaded would be random
        assert torch.equal(first, second)


def test_a_published_backbone_of_timms_is_found_by_its_name(tmp_path, monkeypatch):
    monkeypatch.setattr(hub, "__file__", str(tmp_path / "dsc" / "hub.py"))
    args = {"activation": "group_relu_nonneg", "group_size": 4, "num_classes": 3}
    torch.manual_seed(0)
    model = models.create_model("resnet18", **args).eval()
    save(model, tmp_path / "checkpoints" / "resnet18.digits_group", "resnet18", args)
    x = inputs(model, {"img_size": 32})
    loaded = models.create_model("resnet18.digits_group", pretrained=True).eval()
    assert torch.equal(loaded(x), model(x)) and tuple(loaded.pretrained_cfg["mean"]) == (0.25,) * 3
    fresh = models.create_model("resnet18.digits_group", num_classes=5).eval()
    assert fresh(x).shape == (2, 5) and fresh.swapped_activations == model.swapped_activations
    assert models.create_model("resnet18", num_classes=3).get_submodule("act1").__class__ is torch.nn.ReLU


def test_checkpoint_is_never_overwritten(folder, model):
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(FileExistsError, match="never overwritten"):
        save(trained("dsc_cnn", ENTRIES["dsc_cnn"] | {"activation": "group_relu_nonneg"}), folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


# Published checkpoints: folders beside (or in) the package


@pytest.fixture
def published(model, tmp_path, monkeypatch):
    """A clone with one checkpoint beside its package and one in it."""
    monkeypatch.setattr(hub, "__file__", str(tmp_path / "dsc" / "hub.py"))
    save(model, tmp_path / "checkpoints" / "dsc_cnn.digits")
    args = ENTRIES["gsae"]
    save(trained("gsae", args), tmp_path / "dsc" / "checkpoints" / "gsae.mnist", "gsae", args)
    (tmp_path / "checkpoints" / "no_config").mkdir()
    return tmp_path


def test_published_checkpoints_are_found_by_name(published, model):
    assert hub.checkpoint_folders() == {
        "dsc_cnn.digits": published / "checkpoints" / "dsc_cnn.digits",
        "gsae.mnist": published / "dsc" / "checkpoints" / "gsae.mnist",
    }
    x = inputs(model, {})
    for name in ("dsc_cnn.digits", "dsc_cnn"):
        assert torch.equal(models.create_model(name, pretrained=True).eval()(x), model(x))
    assert models.create_model("dsc_cnn", pretrained=True, num_classes=6).num_classes == 6
    with pytest.raises(ValueError, match="dsc_cnn.digits was trained with activation='group_relu', not 'r"):
        models.create_model("dsc_cnn.digits", pretrained=True, activation="relu")


def test_unknown_checkpoint_names_the_nearest(published):
    message = "unknown checkpoint 'dsc_cnn.digit'; did you mean 'dsc_cnn.digits'.*dsc_cnn.digits, gsae.mnist"
    with pytest.raises(ValueError, match=message):
        hub.find("dsc_cnn.digit")
    with pytest.raises(ValueError, match=message):
        models.create_model("dsc_cnn.digit", pretrained=True)


def test_timm_knows_published_checkpoints(published, model):
    package = Path(models.__file__).parents[1]
    ignored = shutil.ignore_patterns("__pycache__", "checkpoints")
    shutil.copytree(package, published / "dsc", dirs_exist_ok=True, ignore=ignored)
    torch.save(model(inputs(model, {})), published / "expected.pt")
    script = """
import sys, timm, torch
from dsc import models
x = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
expected = torch.load("expected.pt")
assert {"dsc_cnn.digits", "gsae.mnist"} <= set(timm.list_pretrained())
for make in (timm.create_model, models.create_model):
    for name in ("dsc_cnn.digits", "dsc_cnn"):
        model = make(name, pretrained=True).eval()
        assert torch.equal(model(x), expected), name
        assert tuple(model.pretrained_cfg["mean"]) == (0.25,) * 3, name
    assert make("dsc_cnn.digits", pretrained=True, num_classes=9)(x).shape == (2, 9)
    try:
        make("dsc_cnn.digits", pretrained=True, activation="soft")
    except ValueError as error:
        assert "trained with activation='group_relu', not 'soft'" in str(error)
    else:
        sys.exit("a conflicting activation was accepted")
assert models.create_model("dsc_cnn").num_classes == 10, "a published checkpoint changed the untrained model"
from pathlib import Path
weights = Path("checkpoints/dsc_cnn.digits/model.safetensors")
weights.write_bytes(weights.read_bytes()[:-1] + b"!")
for make in (timm.create_model, models.create_model):
    for name in ("dsc_cnn.digits", "dsc_cnn"):
        try:
            make(name, pretrained=True)
        except ValueError as error:
            assert "model.safetensors was altered or truncated" in str(error)
        else:
            sys.exit("an altered file was loaded")
"""
    environment = os.environ | {"PYTHONPATH": str(published)}
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, cwd=published, env=environment
    )
    assert done.returncode == 0, done.stderr[-2000:]


def test_a_plain_twin_is_no_default(tmp_path, monkeypatch):
    names = ["dsc_cnn.a_plain", "dsc_cnn.a_group_relu", "dsc_cnn.b_relu", "dsc_cnn.c_relu", "gsae.a_plain"]
    monkeypatch.setattr(hub, "checkpoint_folders", lambda: dict.fromkeys(names, tmp_path))
    assert hub.default_checkpoint("dsc_cnn") == "dsc_cnn.b_relu"
    assert hub.default_checkpoint("gsae") == "gsae.a_plain" and hub.default_checkpoint("sae") is None


def test_timm_s_hub_names_load_from_the_cache(model, tmp_path):
    """A stand-in of huggingface_hub's cache, as a download would have left it; no network."""
    repository = tmp_path / "hub" / "models--someone--digits"
    save(model, repository / "snapshots" / "abc")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("abc")
    torch.save(model(inputs(model, {})), tmp_path / "expected.pt")
    script = """
import timm, torch
import dsc.models
x = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
model = timm.create_model("hf-hub:someone/digits", pretrained=True).eval()
assert torch.equal(model(x), torch.load("expected.pt"))
assert tuple(model.pretrained_cfg["mean"]) == (0.25,) * 3
"""
    offline = os.environ | {"HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    offline.pop("HF_HUB_CACHE", None)
    subprocess.run([sys.executable, "-c", script], check=True, cwd=tmp_path, env=offline)


@pytest.mark.slow
def test_a_wheel_has_the_checkpoints(tmp_path):
    root = Path(__file__).resolve().parents[1]
    subprocess.run(["uv", "build", "--wheel", "-o", tmp_path, root], check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    assert wheel.stat().st_size < 95 * 2**20  # what an index takes is 100 MB
    shutil.unpack_archive(wheel, tmp_path / "installed", "zip")
    script = """
import timm
import dsc
from dsc import hub
print(dsc.__file__)
for name in hub.checkpoint_folders():
    (dsc if name.startswith("resnet18.") else timm).create_model(name, pretrained=True)  # timm knows its own tags
    print(name)
"""
    installed = os.environ | {"PYTHONPATH": str(tmp_path / "installed")}
    command = [sys.executable, "-P", "-c", script]
    done = subprocess.run(command, check=True, capture_output=True, text=True, cwd=tmp_path, env=installed)
    found, *names = done.stdout.split()
    assert Path(found).is_relative_to(tmp_path)
    assert sorted(names) == sorted(path.name for path in (root / "checkpoints").iterdir())
