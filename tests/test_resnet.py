import pytest
import torch
from torch import nn
from torch.nn import functional as F

from dsc import models
from dsc.activations import list_activations
from dsc.layers import SparseCoding
from dsc.observe import sparse_layers

SMALL = {"channels": (4, 6, 8), "depths": (2, 1, 1)}


def make(name="dsc_resnet20", seed=0, **kwargs):
    torch.manual_seed(seed)
    return models.create_model(name, **kwargs)


def images(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


class PlainBlock(nn.Module):
    def __init__(self, below, width, stride):
        super().__init__()
        self.norm1 = nn.BatchNorm2d(below)
        self.conv1 = nn.Conv2d(below, width, 3, stride, 1)
        self.norm2 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.down = None if below == width else nn.Conv2d(below, width, 1, stride, bias=False)

    def forward(self, x):
        branch = self.conv2(self.norm2(F.relu(self.conv1(self.norm1(x)))))
        return branch + (x if self.down is None else self.down(x))


def plain_resnet():
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, 1, 1), nn.ReLU(),
        PlainBlock(4, 4, 1), PlainBlock(4, 4, 1), PlainBlock(4, 6, 2), PlainBlock(6, 8, 2), nn.BatchNorm2d(8),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10),
    ).double()  # fmt: skip


def in_plain_order(model):
    def layer(coder):
        return [coder.dictionary.weight, coder.bias]

    shared = layer(model.stem)
    for block in (b for stage in model.stages for b in stage):
        shared += [*block.norm1.parameters(), *layer(block.coder), *block.norm2.parameters()]
        shared += [*block.decoder.parameters(), *block.shortcut.parameters()]
    return [*shared, *model.norm.parameters(), *model.get_classifier().parameters()]


@pytest.mark.parametrize("unrolled", ["first", "all"])
@pytest.mark.parametrize("mode", ["train", "eval"])
def test_one_step_is_the_plain_residual_network(mode, unrolled):
    model, plain = make(steps=1, unrolled=unrolled, **SMALL).double(), plain_resnet()
    for parameter in model.parameters():
        if parameter.ndim == 1:
            nn.init.normal_(parameter, std=0.3)
    shared = in_plain_order(model)
    assert len(shared) == len(list(model.parameters()))
    with torch.no_grad():
        for target, value in zip(plain.parameters(), shared, strict=True):
            target.copy_(value)
    x = images(3, 3, 13, 10, dtype=torch.float64)
    ours, theirs = getattr(model, mode)()(x), getattr(plain, mode)()(x)
    torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-12)
    weights = images(*ours.shape, seed=1, dtype=torch.float64)
    mine = torch.autograd.grad((ours * weights).sum(), shared)
    other = torch.autograd.grad((theirs * weights).sum(), list(plain.parameters()))
    for a, b in zip(mine, other, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("name, depth", [("dsc_resnet18", 18), ("dsc_resnet34", 34), ("dsc_resnet20", 20)])
def test_depth_is_that_of_the_name(name, depth):
    widths = (4, 4, 8) if depth == 20 else (4, 4, 8, 8)
    modules = list(make(name, steps=1, channels=widths).modules())
    coders = [m for m in modules if isinstance(m, SparseCoding)]
    convs = [m for m in modules if isinstance(m, nn.Conv2d) and m.kernel_size == (3, 3)]
    assert len(coders) + len(convs) + 1 == depth


@pytest.mark.parametrize("name, millions", [("dsc_resnet18", 11.17), ("dsc_resnet20", 0.27)])
def test_size_is_the_published_one(name, millions):
    assert sum(p.numel() for p in make(name).parameters()) / 1e6 == pytest.approx(millions, abs=0.01)


@pytest.mark.parametrize("unrolled", ["first", "all"])
def test_unrolled_layers_solve_by_steps_and_the_others_take_one(unrolled):
    model = make(steps=3, unrolled=unrolled, **SMALL)
    for name, layer in sparse_layers(model).items():
        several = name == "stem" or unrolled == "all"
        assert layer.coder.solver.steps == (3 if several else 1)
        assert (layer.coder.bias is None) == layer.prox.learn == several
    assert len(sparse_layers(model)) == 1 + 4


def ista(x, weight, threshold, step, stride, steps):
    """ReLU(z + s Wᵀ-correlations of the residual − sλ), written with torch's own convolutions."""
    z = torch.zeros_like(F.conv2d(x, weight, None, stride, 1))
    for _ in range(steps):
        back = torch.autograd.functional.vjp(lambda v: F.conv2d(v, weight, None, stride, 1), torch.zeros_like(x), z)[1]
        z = F.relu(z + step * F.conv2d(x - back, weight, None, stride, 1) - step * threshold.view(-1, 1, 1))
    return z


def test_unrolled_block_adds_the_decoded_code_of_its_normalised_features():
    model = make(steps=3, solver="ista", unrolled="all", **SMALL).double().eval()
    block, x = model.stages[1][0], images(2, 4, 9, 6, dtype=torch.float64)
    layer = block.coder
    step = layer.relative_step.sigmoid() / layer.dictionary.lipschitz()
    code = ista(block.norm1(x), layer.dictionary.weight, layer.prox.threshold, step, 2, 3)
    assert 0 < (code != 0).double().mean() < 1
    expected = F.conv2d(block.norm2(code), block.decoder.weight, padding=1)
    expected = expected + F.conv2d(x, block.shortcut.weight, stride=2)
    torch.testing.assert_close(block(x), expected, rtol=1e-5, atol=1e-6)


def test_feature_maps_are_the_stages():
    model = make(**SMALL).eval()
    features = make(features_only=True, **SMALL).eval()
    assert features.feature_info.channels() == [4, 6, 8]
    assert features.feature_info.reduction() == [1, 2, 4]
    x = images(2, 3, 16, 12)
    expected = model.stem(x)
    for stage, found in zip(model.stages, features(x), strict=True):
        expected = stage(expected)
        assert torch.equal(found, expected)
    last = make(features_only=True, out_indices=(-1,), **SMALL).eval()
    assert torch.equal(last(x)[0], expected)


@pytest.mark.parametrize("activation", list_activations())
def test_every_activation_trains(activation):
    model = make(activation=activation, unrolled="all", **SMALL | {"channels": (8, 8, 16)})
    out = model(images(2, 3, 8, 8))
    (out * images(*out.shape, seed=1)).sum().backward()
    assert out.isfinite().all()
    assert all(p.grad.isfinite().all() and p.grad.any() for p in model.parameters())


@pytest.mark.parametrize("steps, threshold", [(1, 0.8), (2, None)])
def test_group_activation_zeroes_whole_groups(steps, threshold):
    shape = {"group_size": 4, "threshold": threshold, "steps": steps, "unrolled": "all"}
    model = make(activation="group_relu", **shape, **SMALL | {"channels": (8, 8, 16)})
    codes = {}
    for name, layer in sparse_layers(model).items():
        layer.output.register_forward_hook(lambda module, args, out, name=name: codes.update({name: out}))
    model(images(4, 3, 8, 8))
    assert len(codes) == 5
    for code in codes.values():
        active = code.unflatten(1, (-1, 4)) != 0
        assert (active.any(2) == active.all(2)).all()
        assert 0 < active.double().mean() < 1


@pytest.mark.parametrize(
    "kwargs, message",
    [
        ({"unrolled": "frist"}, "unknown choice of unrolled layers 'frist'; did you mean 'first'.*Known: all, first"),
        ({"channels": (4, 8)}, "one entry a stage, got 2 and 3"),
        ({"steps": 0}, "steps .* at least 1, got 0"),
        ({"solver": "fsta"}, "did you mean 'fista'"),
        ({"activation": "group_relu", "group_size": 5}, "5 does not divide the 16 channels.*nearest .*: 4 or 8"),
    ],
)
def test_contradictory_arguments_say_so(kwargs, message):
    with pytest.raises(ValueError, match=message):
        make(**kwargs)
