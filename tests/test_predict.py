"""What fired is what the model's own code says; images reach the model as torchvision would bring them."""

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import functional as F

from dsc import Observer, cli, create_model, hub, predict


@pytest.fixture
def digit(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (28, 28), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "digit.png")
    return tmp_path / "digit.png", torch.from_numpy(pixels)[None, None] / 255


def test_an_image_of_the_right_size_is_normalised_and_nothing_else(digit):
    path, pixels = digit
    model = create_model("dsc_cnn.mnist_relu", pretrained=True)
    expected = F.normalize(pixels, model.pretrained_cfg["mean"], model.pretrained_cfg["std"])
    torch.testing.assert_close(predict.read_images(model, [path]), expected)


def test_sixteen_bits_of_grey_are_the_same_picture(digit, tmp_path):
    pixels = np.asarray(Image.open(digit[0])).astype(np.uint16)
    Image.fromarray(pixels * 257).save(tmp_path / "deep.png")
    model = create_model("gsae")
    assert torch.equal(*(predict.read_images(model, [path]) for path in (digit[0], tmp_path / "deep.png")))


def test_colours_follow_the_model(digit, tmp_path):
    assert predict.read_images(create_model("dsc_speed"), [digit[0]]).shape == (1, 3, 32, 32)
    Image.new("RGBA", (50, 40), (255, 0, 0, 255)).save(tmp_path / "red.png")
    assert predict.read_images(create_model("gsae"), [tmp_path / "red.png"]).shape == (1, 1, 28, 28)


def test_classes_are_the_softmax_in_order():
    model = create_model("dsc_cnn.mnist_relu", pretrained=True).eval()
    x = torch.randn(3, 1, 28, 28)
    expected = torch.cat([model(image).softmax(1).detach() for image in x.split(1)])
    for found, p in zip(predict.predict(model, x), expected, strict=True):
        values = [value for _, value in found.classes]
        assert values == sorted(values, reverse=True) and sum(values) == pytest.approx(1)
        assert {name: value for name, value in found.classes} == pytest.approx({str(k): float(p[k]) for k in range(10)})


def test_fired_atoms_and_groups_are_those_of_the_code():
    model = create_model("gsae", num_atoms=12, group_size=4, steps=3, threshold=0.8, img_size=6).double()
    x = torch.rand(2, 1, 6, 6).double()
    code = model.eval().encode(x).detach().numpy()
    assert (code == 0).any() and (code != 0).any()
    for found, z in zip(predict.predict(model, x), code, strict=True):
        (layer,) = found.fired
        assert found.classes == [] and layer.active == (z != 0).sum() and layer.entries == 12
        assert [k for k, _ in layer.atoms] == [int(k) for k in np.argsort(-np.abs(z)) if z[k]]
        assert dict(layer.groups) == pytest.approx(
            {g: np.linalg.norm(z[4 * g : 4 * g + 4]) for g in range(3) if z[4 * g : 4 * g + 4].any()}
        )


def test_windows_of_an_image_are_all_its_own():
    # MobileViT's transformers see an image as four sequences, so that a code's first dimension is not the images.
    model = create_model("mobilevit_xxs", activation="relu", num_classes=2).eval()
    x = torch.randn(2, 3, 64, 64)
    for found, image in zip(predict.predict(model, x), x, strict=True):
        with Observer(model) as observer, torch.no_grad():
            model(image[None])
        codes = {name: z[0] for name, z in observer.features.items()}
        assert {f.layer: (f.active, f.entries) for f in found.fired} == {
            name: (int(z.count_nonzero()), z.numel()) for name, z in codes.items()
        }


def test_a_convolution_s_channel_counts_where_it_is_largest():
    model = create_model("gsae_conv", num_atoms=(4,), kernel_sizes=(3,), strides=(2,), paddings=(0,), group_size=2)
    model, x = model.double().eval(), torch.rand(1, 1, 9, 9).double()
    z = model.encode(x)[0].detach()
    (layer,) = predict.predict(model, x)[0].fired
    assert layer.active == int((z != 0).sum()) and layer.entries == z.numel()
    assert dict(layer.atoms) == pytest.approx({k: float(z[k].abs().max()) for k in range(4) if z[k].any()})
    assert dict(layer.groups) == pytest.approx(
        {g: float(z[2 * g : 2 * g + 2].norm(dim=0).max()) for g in range(2) if z[2 * g : 2 * g + 2].any()}
    )


def test_command(digit, capsys):
    cli.main(["predict", str(digit[0]), "--checkpoint", "dsc_cnn.mnist_relu", "--top", "2"])
    printed = capsys.readouterr().out
    assert printed.count(" %") == 2 and "coder.layers.2: " in printed and " of 512 entries active" in printed


@pytest.mark.parametrize(
    "name, says", [("text.png", "is no image"), ("cut.png", "is no image"), ("none.png", "there is no")]
)
def test_no_image(name, says, digit, tmp_path, capsys):
    (tmp_path / "text.png").write_text("no picture")
    (tmp_path / "cut.png").write_bytes(digit[0].read_bytes()[:100])
    with pytest.raises(SystemExit, match="2"):
        cli.main(["predict", str(tmp_path / name), "--checkpoint", "dsc_cnn.mnist_relu"])
    error = capsys.readouterr().err
    assert says in error and name in error


def test_unknown_checkpoint(capsys, digit):
    with pytest.raises(SystemExit, match="2"):
        cli.main(["predict", str(digit[0]), "--checkpoint", "dsc_cnn.mnist_rel"])
    assert "did you mean 'dsc_cnn.mnist_relu'" in capsys.readouterr().err
    assert hub.locate("dsc_cnn.mnist_relu") == hub.locate(hub.find("dsc_cnn.mnist_relu"))
