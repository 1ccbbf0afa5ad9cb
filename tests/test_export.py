"""Exported files compute what the model does, for any batch size, and are not kept when they do not."""

import onnx
import onnxruntime
import pytest
import torch
from torch import nn

from dsc import cli, create_model
from dsc.export import export

SMALL = {
    "dsc_cnn": dict(channels=(4, 6), kernel_sizes=(3, 3), strides=(2, 2), paddings=(0, 0), in_chans=1),
    "gsae": dict(num_atoms=8, group_size=4, steps=2),
    "dsc_vit_pico": dict(depth=1),
}


def make(name, **kwargs):
    torch.manual_seed(0)
    model = create_model(name, **(SMALL[name] | kwargs)).eval()
    channels = 1 if name != "dsc_vit_pico" else model.pretrained_cfg["input_size"][0]
    model.pretrained_cfg = {**model.pretrained_cfg, "input_size": (channels, *model.pretrained_cfg["input_size"][1:])}
    return model


@pytest.mark.parametrize("name", SMALL)
def test_onnx_runtime_agrees_at_other_batch_sizes(name, tmp_path):
    model, path = make(name), tmp_path / "model.onnx"
    assert export(model, path) <= 1e-4
    onnx.checker.check_model(str(path), full_check=True)
    session = onnxruntime.InferenceSession(path)
    (taken,) = session.get_inputs()
    assert not isinstance(taken.shape[0], int) and taken.shape[1:] == list(model.pretrained_cfg["input_size"])
    for count in (1, 5):
        x = torch.randn(count, *model.pretrained_cfg["input_size"])
        found = torch.from_numpy(session.run(None, {taken.name: x.numpy()})[0])
        torch.testing.assert_close(found, model(x).detach(), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", SMALL)
def test_torch_s_own_format_agrees(name, tmp_path):
    model, path = make(name), tmp_path / "model.pt2"
    assert export(model, path, "torch") <= 1e-4
    again = torch.export.load(path).module()
    x = torch.randn(5, *model.pretrained_cfg["input_size"])
    torch.testing.assert_close(again(x), model(x))


class Restless(nn.Module):
    """Computes something else every time it is called."""

    pretrained_cfg = {"input_size": (2,)}

    def forward(self, x):
        return x + torch.randn_like(x)


@pytest.mark.parametrize("format", ["onnx", "torch"])
def test_a_file_that_computes_something_else_is_not_kept(format, tmp_path):
    with pytest.raises(ValueError, match="computes something else"):
        export(Restless(), tmp_path / "model", format)
    assert list(tmp_path.iterdir()) == []


def test_images_of_another_size_than_the_architecture_s(tmp_path):
    model = create_model("dsc_mlp_pico", img_size=8, in_chans=2, num_atoms=(8, 8))
    assert export(model, tmp_path / "model.pt2", "torch", input_size=(2, 8, 8)) <= 1e-4
    assert torch.export.load(tmp_path / "model.pt2").module()(torch.randn(5, 2, 8, 8)).shape == (5, 10)


def test_several_outputs_are_refused(tmp_path):
    with pytest.raises(ValueError, match="a model of several outputs"):
        export(create_model("dsc_cnn_pico", features_only=True), tmp_path / "model.pt2", "torch")


def test_nothing_is_overwritten(tmp_path):
    (tmp_path / "mine.onnx").write_text("mine")
    with pytest.raises(FileExistsError, match="mine.onnx exists already"):
        export(make("gsae"), tmp_path / "mine.onnx")
    assert (tmp_path / "mine.onnx").read_text() == "mine"


def test_unknown_format(tmp_path):
    with pytest.raises(ValueError, match="did you mean 'onnx'"):
        export(make("gsae"), tmp_path / "x", "onx")


def test_command(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    cli.main(["export", "dsc_cnn.mnist_relu", "--format", "torch"])
    assert (tmp_path / "dsc_cnn.mnist_relu.pt2").is_file() and "any batch size" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="2"):
        cli.main(["export", "dsc_cnn.mnist_relu", "--format", "torch"])
    assert "exists already" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        cli.main(["export", "dsc_cnn.mnist_relu", "--out", "nowhere/model.onnx"])
    assert "nowhere is no folder: make it first" in capsys.readouterr().err
