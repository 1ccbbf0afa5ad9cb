import pytest
import torch
from torch import nn
from torch.nn import functional as F

from dsc import models
from dsc.activations import list_activations
from dsc.observe import sparse_layers

SMALL = {"img_size": (3, 4), "in_chans": 2, "num_atoms": (8, 16)}


def make(name="dsc_mlp_pico", seed=0, **kwargs):
    torch.manual_seed(seed)
    return models.create_model(name, **kwargs)


def images(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("joint", [False, True])
def test_one_step_is_the_multi_layer_perceptron(joint):
    model = make(steps=1, joint=joint, num_classes=5, **SMALL).double()
    plain = nn.Sequential(
        nn.Flatten(), nn.LayerNorm(24), nn.Linear(24, 8), nn.ReLU(), nn.Linear(8, 16), nn.ReLU(),
        nn.LayerNorm(16), nn.Linear(16, 5),
    ).double()  # fmt: skip
    for parameter in model.parameters():
        if parameter.ndim == 1:
            nn.init.normal_(parameter, std=0.3)
    shared = [*model.norm1.parameters()]
    for layer in model.coder:
        shared += [layer.dictionary.weight, layer.bias]
    shared += [*model.norm2.parameters(), *model.head.parameters()]
    assert len(shared) == len(list(model.parameters()))
    with torch.no_grad():
        for target, value in zip(plain.parameters(), shared, strict=True):
            target.copy_(value)
    x = images(3, 2, 3, 4, dtype=torch.float64)
    ours, theirs = model(x), plain(x)
    torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-12)
    weights = images(*ours.shape, seed=1, dtype=torch.float64)
    mine = torch.autograd.grad((ours * weights).sum(), shared)
    other = torch.autograd.grad((theirs * weights).sum(), list(plain.parameters()))
    for a, b in zip(mine, other, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


def parts(model):
    """D (a column an atom), λ and s of every layer."""
    steps = [layer.relative_step.sigmoid() / layer.dictionary.lipschitz() for layer in model.coder]
    return [(la.dictionary.weight.mT, la.prox.threshold, s) for la, s in zip(model.coder, steps, strict=True)]


def test_joint_code_is_ml_istas():
    model = make(steps=3, joint=True, **SMALL).double().eval()
    x = images(3, 2, 3, 4, dtype=torch.float64)
    signal = F.layer_norm(x.flatten(1), (24,))
    (d1, t1, s1), (d2, t2, s2) = parts(model)
    z1 = z2 = torch.zeros((), dtype=torch.float64)
    for k in range(3):
        below = z2 @ d2.mT if k else torch.zeros(3, 8, dtype=torch.float64)
        z1 = F.relu(below + s1 * (signal - below @ d1.mT) @ d1 - s1 * t1)
        z2 = z2 if k else torch.zeros(3, 16, dtype=torch.float64)
        z2 = F.relu(z2 + s2 * (z1 - z2 @ d2.mT) @ d2 - s2 * t2)
    assert 0 < (z2 != 0).double().mean() < 1
    torch.testing.assert_close(model(x), model.head(F.layer_norm(z2, (16,))), rtol=1e-6, atol=1e-8)


def test_greedy_code_is_istas_layer_by_layer():
    model = make(steps=3, joint=False, **SMALL).double().eval()
    x = images(3, 2, 3, 4, dtype=torch.float64)
    code = F.layer_norm(x.flatten(1), (24,))
    for d, threshold, step in parts(model):
        z = torch.zeros(3, d.shape[1], dtype=torch.float64)
        for _ in range(3):
            z = F.relu(z + step * (code - z @ d.mT) @ d - step * threshold)
        code = z
    torch.testing.assert_close(model(x), model.head(F.layer_norm(code, (16,))), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("name, widths", [("dsc_mlp_pico", [256] * 2), ("dsc_mlp_base", [1024] * 3)])
def test_entries_have_the_widths_they_state(name, widths):
    model = make(name, steps=1)
    shapes = [layer.dictionary.weight.shape for layer in model.coder]
    assert shapes == [(above, below) for below, above in zip([784, *widths], widths, strict=False)]
    assert list(sparse_layers(model)) == [f"coder.layers.{i}" for i in range(len(widths))]


def test_size_of_the_images_can_be_chosen():
    model = make(img_size=8, in_chans=3)
    assert model(images(2, 3, 8, 8)).shape == (2, 10)
    with pytest.raises(ValueError, match=r"images of shape \(3, 8, 9\), expected \(3, 8, 8\)"):
        model(images(2, 3, 8, 9))
    with pytest.raises(ValueError, match=r"images of shape \(1, 8, 8\), expected \(3, 8, 8\)"):
        model(images(2, 1, 8, 8))


@pytest.mark.parametrize("joint", [False, True])
@pytest.mark.parametrize("activation", list_activations())
def test_every_activation_trains(activation, joint):
    model = make(activation=activation, joint=joint, **SMALL | {"num_atoms": (64, 64)})
    out = model(images(16, 2, 3, 4))
    (out * images(*out.shape, seed=1)).sum().backward()
    assert out.isfinite().all()
    assert all(p.grad.isfinite().all() and p.grad.any() for p in model.parameters())


@pytest.mark.parametrize("steps, threshold", [(1, 0.8), (3, None)])
def test_group_activation_zeroes_whole_groups(steps, threshold):
    model = make(activation="group_relu", group_size=4, threshold=threshold, steps=steps, **SMALL)
    for code in model.coder.codes(model.norm1(images(64, 2, 3, 4).flatten(1))):
        active = code.unflatten(1, (-1, 4)) != 0
        assert (active.any(2) == active.all(2)).all()
        assert 0 < active.double().mean() < 1


@pytest.mark.parametrize(
    "kwargs, message",
    [
        ({"num_atoms": ()}, "DeepSparseCoding needs at least one layer"),
        ({"steps": 0}, "steps .* at least 1, got 0"),
        ({"solver": "fsta"}, "did you mean 'fista'"),
        ({"activation": "group_relu", "group_size": 5}, "5 does not divide the 256 channels.*nearest .*: 4 or 8"),
    ],
)
def test_contradictory_arguments_say_so(kwargs, message):
    with pytest.raises(ValueError, match=message):
        make(**kwargs)
