import pytest
import torch
from torch import nn

from dsc.models import create_model
from dsc.models.speed import whitening_atoms
from dsc.prox import ReLU


def images(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def smooth_images(n=64):
    return nn.functional.avg_pool2d(images(n, 3, 18, 18), 3, stride=1)  # neighbouring pixels correlate


def make(seed=0, **kwargs):
    torch.manual_seed(seed)
    return create_model("dsc_speed", **kwargs)


def test_filtered_patches_are_white():
    x = smooth_images()
    atoms = whitening_atoms(x, 2, eps=0.0)
    assert atoms.shape == (24, 3, 2, 2)
    assert torch.equal(atoms[12:], -atoms[:12])
    patches = nn.functional.conv2d(x, atoms[:12]).permute(1, 0, 2, 3).flatten(1)
    torch.testing.assert_close(patches @ patches.mT / patches.shape[1], torch.eye(12), rtol=0, atol=1e-3)


def test_filters_are_ordered_by_variance_and_bounded_by_eps():
    x = smooth_images()
    norms = whitening_atoms(x, 2, eps=0.1)[:12].flatten(1).norm(dim=1)
    assert (norms.diff() >= 0).all()  # the direction of most variance is shrunk most
    assert norms.max() <= 0.1**-0.5


def test_data_set_the_first_dictionary_which_then_stays():
    model, x = make(), smooth_images()
    model.initialize(x)
    assert torch.equal(model.whiten.dictionary.weight, whitening_atoms(x, 2))
    assert [name for name, p in model.named_parameters() if not p.requires_grad] == ["whiten.dictionary.weight"]


@pytest.mark.parametrize("steps", [1, 2])
def test_filters_begin_as_the_identity_and_unit_atoms(steps):
    for below, stage in zip((24, 4, 6), make(steps=steps, channels=(4, 6, 8)).stages, strict=True):
        x = images(2, below, 5, 5)
        torch.testing.assert_close(stage.conv(x)[:, :below], x[:, : stage.conv.out_channels])
        torch.testing.assert_close(stage.conv.weight.flatten(1).norm(dim=1), torch.ones(stage.conv.out_channels))
        z = images(2, stage.conv.out_channels, 5, 5)
        dictionary = stage.coder.dictionary
        gram = dictionary.analyze(dictionary.synthesize(z))
        torch.testing.assert_close(gram, dictionary.weight[0].square().sum() * z)  # orthogonal atoms of one norm


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_one_step_is_the_plain_network(mode):
    model = make(steps=1, channels=(4, 6)).double()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.bias)
    nn.init.normal_(model.whiten.bias)
    plain: list[nn.Module] = [nn.Conv2d(3, 24, 2), nn.ReLU()]
    pairs = [(model.whiten, plain[0])]
    for below, width, stage in zip((24, 4), (4, 6), model.stages, strict=True):
        conv = nn.Conv2d(width, width, 3, padding=1)
        plain += [stage.conv, nn.MaxPool2d(2), stage.norm1, nn.ReLU(), stage.norm2, conv, nn.ReLU(), stage.norm3]
        assert (stage.conv.in_channels, stage.conv.out_channels) == (below, width)
        pairs.append((stage.coder, conv))
    for ours, theirs in pairs:
        theirs.double().load_state_dict({"weight": ours.dictionary.weight, "bias": ours.bias})
    network = nn.Sequential(*plain, nn.AdaptiveMaxPool2d(1), nn.Flatten(), model.head.fc)
    x = images(3, 3, 16, 13, dtype=torch.float64)
    getattr(model, mode)()
    torch.testing.assert_close(model(x), getattr(network, mode)()(x), rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(model(x), getattr(network, mode)()(x), rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize(("name", "kind"), [(None, nn.ReLU), ("gelu", nn.GELU)])
def test_only_the_last_stage_may_be_unrolled_the_others_being_airbenchs(mode, name, kind):
    model = make(unrolled="last", channels=(4, 6), plain_activation=name).double()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.bias)
    first, last = model.stages
    plain = [first.conv, nn.MaxPool2d(2), first.norm1, kind(), first.conv2, first.norm2, kind()]
    whiten = nn.Conv2d(3, 24, 2).double()
    whiten.load_state_dict({"weight": model.whiten.dictionary.weight, "bias": model.whiten.bias})
    x = images(3, 3, 16, 13, dtype=torch.float64)
    getattr(model, mode)()
    begin = nn.Sequential(last.conv, nn.MaxPool2d(2), last.norm1, kind(), last.norm2)
    expected = last.norm3(last.coder(begin(nn.Sequential(whiten, kind(), *plain)(x))))
    torch.testing.assert_close(model.forward_features(x), expected, rtol=1e-11, atol=1e-12)
    assert last.coder.solver.steps == 2 and isinstance(last.coder.prox, ReLU)
    torch.testing.assert_close(first.conv2(images(1, 4, 5, 5).double()), images(1, 4, 5, 5).double())


def test_unknown_choice_of_stages_is_named():
    with pytest.raises(ValueError, match=r"'first'.*all.*last"):
        make(unrolled="first")


def test_more_steps_solve_each_stages_problem():
    model = make(steps=300, solver="fista", channels=(4, 6), threshold=0.5).double().eval()
    coder = model.stages[0].coder
    x = images(2, 4, 8, 8, dtype=torch.float64)
    trace = coder.trace(x, steps=300)
    assert trace.gap[-1].max() < 1e-6 < trace.gap[0].min()
    torch.testing.assert_close(coder(x), trace.codes[-1])


@pytest.mark.parametrize("unrolled", ["all", "last"])
def test_feature_maps_are_the_stages_codes(unrolled):
    torch.manual_seed(0)
    features = create_model("dsc_speed", features_only=True, channels=(4, 6, 8), unrolled=unrolled).eval()
    model = make(channels=(4, 6, 8), unrolled=unrolled).eval()
    x = images(2, 3, 32, 32)
    maps, expected = features(x), model.whiten(x)
    assert features.feature_info.channels() == [4, 6, 8]
    assert features.feature_info.reduction() == [2, 4, 8]
    for found, stage in zip(maps, model.stages, strict=True):
        expected = stage(expected)
        assert torch.equal(stage.norm3(found) if hasattr(stage, "coder") else found, expected)


def test_fewer_stages_give_fewer_feature_maps():
    for name in ("dsc_speed", "dsc_cnn"):
        shape = {"kernel_sizes": (3, 3), "strides": (2, 1), "paddings": (1, 1)} if name == "dsc_cnn" else {}
        maps = create_model(name, features_only=True, channels=(4, 6), **shape).eval()(images(1, 3, 32, 32))
        assert [z.shape[1] for z in maps] == [4, 6]


def test_too_small_images_name_the_least_size():
    model = make(channels=(4, 6, 8)).eval()
    assert model(images(1, 3, 9, 9)).shape == (1, 10)
    with pytest.raises(ValueError, match="images of 8×12 pixels are too small: this network needs 9 a side"):
        model(images(1, 3, 8, 12))
