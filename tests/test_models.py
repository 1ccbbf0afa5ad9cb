import shutil

import numpy as np
import pytest
import timm
import torch
from oracles import rows, unrows
from timm.layers.activations import GELU
from timm.models import metaformer
from timm.models._hub import save_for_hf
from torch import nn

from dsc import hub, models
from dsc.activations import create_activation, list_activations
from dsc.layers import SparseCoding
from dsc.observe import Observer, sparse_layers
from dsc.prox import Prox

MODELS = models.list_models()
BACKBONES = {
    "resnet18": {},
    "convnext_atto": {},
    "convnext_tiny": {"depths": (1, 1, 1, 1), "dims": (16, 16, 32, 32)},  # channels last inside its blocks
    "vit_tiny_patch16_224": {"img_size": 32},
    "mobilenetv3_small_050": {},
    "mixer_s16_224": {"img_size": 32},
}
SMALL_CNN = {"channels": (8, 8, 16), "kernel_sizes": (3, 3, 3), "strides": (2, 1, 1)}
SMALL = {  # entries that take long as they are
    **{f"{kind}_{shape}": {"steps": 2} for kind in ("gsae", "sae") for shape in ("deep", "conv")},
    **{f"{kind}_conv_deep": {"steps": 2, "num_atoms": (16, 16, 32)} for kind in ("gsae", "sae")},
    "dsc_cnn": {"channels": (8, 16, 32)},
    "dsc_cnn_cifar": {"channels": (8, 16, 16), "tail": (16, 8, 8)},
    "dsc_cnn_pico": {"channels": (8, 16, 16)},
    "dsc_speed": {"channels": (8, 16, 16)},
    "dsc_mlp_base": {"num_atoms": (64, 64, 64)},
    "dsc_resnet18": {"channels": (4, 8, 8, 16), "depths": (1, 1, 1, 1)},
    "dsc_resnet20": {"channels": (4, 8, 8), "depths": (2, 1, 1)},
    "dsc_vit_tiny": {"dim": 24, "depth": 2},
    "dsc_vit_small": {"dim": 24, "depth": 2},
    "dsc_attn_tiny": {"dim": 24, "depth": 2},
    "dsc_resnet34": {"channels": (4, 8, 8, 16), "depths": (1, 1, 1, 1), "unrolled": "all"},
}


CLASSIFIERS = [name for name in MODELS if timm.get_pretrained_cfg(name).classifier]


def make(name, seed=0, **kwargs):
    torch.manual_seed(seed)
    return models.create_model(name, **kwargs)


def entry(name, seed=0, **kwargs):
    return make(name, seed, **SMALL.get(name, {}), **kwargs)


def images(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def batch(model, size=2, seed=0):
    return images(size, *model.pretrained_cfg["input_size"], seed=seed)


def has_unrolled_layers(model):
    return any(m.solver.steps > 1 for m in model.modules() if isinstance(m, SparseCoding))


def output_shape(model, x):
    return (len(x), model.num_classes) if model.pretrained_cfg["classifier"] else tuple(x.shape)


@pytest.mark.parametrize("name", MODELS)
def test_output_is_logits_or_an_image_and_every_parameter_learns(name):
    model = entry(name).train()
    x = batch(model)
    out = model(x)
    assert model.num_classes == model.pretrained_cfg["num_classes"]
    assert tuple(out.shape) == output_shape(model, x)
    (out * images(*out.shape, seed=1)).sum().backward()
    for key, parameter in model.named_parameters():
        if parameter.requires_grad:  # a dictionary set from data is not learned
            assert parameter.grad is not None and parameter.grad.isfinite().all(), key
            assert parameter.grad.any(), key


@pytest.mark.parametrize("name", MODELS)
def test_any_image_size_unless_the_model_declares_its_own(name):
    model = entry(name).eval()
    channels, height, width = model.pretrained_cfg["input_size"]
    other = images(2, channels, height - 4, width + 5)
    if model.pretrained_cfg["fixed_input_size"]:
        with pytest.raises(ValueError, match=rf"{height - 4}, {width + 5}.*{height}, {width}"):
            model(other)
    else:
        assert tuple(model(other).shape) == output_shape(model, other)


@pytest.mark.parametrize("name", MODELS)
def test_images_of_other_channels_are_refused_by_both_numbers(name):
    model = entry(name)
    channels, *size = model.pretrained_cfg["input_size"]
    with pytest.raises((ValueError, RuntimeError), match=rf"\b{channels + 1}\b.*\b{channels}\b"):
        model(images(2, channels + 1, *size))


@pytest.mark.parametrize("name", MODELS)
def test_state_dict_carries_the_whole_model(name):
    model, copy = entry(name), entry(name, seed=1)
    x = batch(model)
    model.train()(x)  # moves what is not a parameter: running statistics, power iterations
    expected = model.eval()(x)
    assert not torch.equal(copy.eval()(x), expected)
    copy.load_state_dict(model.state_dict())
    assert torch.equal(copy(x), expected)


@pytest.mark.parametrize("name", MODELS)
def test_images_of_a_batch_do_not_touch_each_other(name):
    model = entry(name).double().eval()
    x = batch(model, 3).double()
    torch.testing.assert_close(model(x)[1:2], model(x[1:2]))


@pytest.mark.parametrize("name", MODELS)
def test_compiled_without_graph_breaks_equals_eager(name):
    torch._dynamo.reset()
    model = entry(name).eval()
    x = batch(model)
    with torch.no_grad():
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="needs a C++ compiler")
def test_inductor_equals_eager():
    torch._dynamo.reset()
    model = make("gsae", img_size=4, num_atoms=32, steps=2).eval()
    x = images(2, 1, 4, 4)
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(model, fullgraph=True)(x), model(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", MODELS)
def test_exported_program_takes_any_batch(name):
    model = entry(name).eval()
    dynamic = ({0: torch.export.Dim("batch", min=1)},)
    program = torch.export.export(model, (batch(model, 3),), dynamic_shapes=dynamic).module()
    for size in (1, 5):
        x = batch(model, size, seed=size)
        torch.testing.assert_close(program(x), model(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", MODELS)
def test_timm_builds_the_same_model(name):
    ours = entry(name)
    torch.manual_seed(0)
    theirs = timm.create_model(name, **SMALL.get(name, {}))
    assert type(ours) is type(theirs)
    ours, theirs = ours.state_dict(), theirs.state_dict()
    assert list(ours) == list(theirs)
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_a_threshold_that_leaves_no_code_is_refused():
    with pytest.raises(ValueError, match=r"threshold=6 leaves no entry .* \(default 0.5\), so take a smaller one"):
        models.create_model("dsc_mlp_pico", activation="group_relu", group_size=8, threshold=6)
    with pytest.raises(
        ValueError, match=r"Soft\(threshold=6.*leaves no entry .* unit size: give it a smaller threshold"
    ):
        models.create_model("dsc_mlp_pico", activation=create_activation("soft", threshold=6))


@pytest.mark.parametrize("name", MODELS)
def test_head_for_another_number_of_classes(name):
    model = entry(name)
    if not model.pretrained_cfg["classifier"]:
        with pytest.raises(ValueError, match="no classes"):
            entry(name, num_classes=3)
        return
    x = batch(model)
    assert model.get_submodule(model.pretrained_cfg["classifier"]) is model.get_classifier()
    assert entry(name, num_classes=7)(x).shape == (2, 7)
    features = model.eval().forward_head(model.forward_features(x), pre_logits=True)
    assert features.shape == (2, model.num_features)
    model.reset_classifier(3)
    assert (model.num_classes, model.get_classifier().out_features) == (3, 3)
    torch.testing.assert_close(model(x), model.get_classifier()(features))
    model.reset_classifier(0)
    torch.testing.assert_close(model(x), features)


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_features_come_unpooled_as_timm_has_them(name):
    model = entry(name).eval()
    x = batch(model)
    features = model.forward_features(x)
    model.reset_classifier(0, "")
    assert torch.equal(model(x), features)
    assert torch.equal(entry(name, num_classes=0, global_pool="").eval()(x), features)


UNROLLED = [name for name in MODELS if has_unrolled_layers(entry(name))]


@pytest.mark.parametrize("name", UNROLLED)
def test_checkpointing_gives_the_same_gradients_from_less_memory(name):
    gradients, kept = [], []
    for enable in (False, True):
        model = make(name, **SMALL.get(name, {}) | {"steps": 4}).double().train()
        model.set_grad_checkpointing(enable)
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: (sizes.append(t.numel()), t)[1], lambda t: t):  # noqa: B023
            out = model(batch(model).double())
        kept.append(sum(sizes))
        out.square().sum().backward()
        gradients.append([p.grad for p in model.parameters() if p.requires_grad])
    for plain, checkpointed in zip(*gradients, strict=True):
        torch.testing.assert_close(checkpointed, plain, rtol=1e-9, atol=1e-12)
    assert kept[1] < kept[0]


@pytest.mark.parametrize("name", [name for name in MODELS if name not in CLASSIFIERS])
def test_the_code_of_an_autoencoder_is_its_features_and_the_decoder_its_head(name):
    model = entry(name).eval()
    x = batch(model)
    code = model.forward_features(x)
    assert code.shape[1] == model.num_features and torch.equal(code, model.encode(x))
    assert torch.equal(model.forward_head(code), model(x)) and model.forward_head(code, pre_logits=True) is code
    model.reset_classifier(0)
    assert isinstance(model.get_classifier(), nn.Identity)
    with pytest.raises(ValueError, match="no classes, got num_classes=3"):
        model.reset_classifier(3)
    with pytest.raises(ValueError, match="does not pool it, got global_pool='avg'"):
        model.reset_classifier(0, "avg")


@pytest.mark.parametrize("name", UNROLLED)
def test_plain_twin_has_the_same_weights(name):
    model, twin = entry(name), make(name, **SMALL.get(name, {}) | {"steps": 1})
    weights, of_twin = ({k: p.shape for k, p in m.named_parameters() if p.ndim > 1} for m in (model, twin))
    assert weights == of_twin
    x = batch(model)
    assert model(x).shape == twin(x).shape
    assert not has_unrolled_layers(twin)


@pytest.mark.parametrize("name", MODELS)
def test_bfloat16_is_close_to_full_precision(name):
    model = entry(name).eval()
    x = batch(model, 8)
    with torch.no_grad():
        expected = model(x)
        with torch.autocast("cpu", torch.bfloat16):
            found = model(x)
    assert (found - expected).norm() < 0.05 * expected.norm()


@pytest.mark.parametrize("name", [n for n in MODELS if not hasattr(entry(n), "feature_info")])
def test_models_without_feature_maps_say_so(name):
    with pytest.raises(ValueError, match=f"{name} has no maps of several resolutions"):
        entry(name, features_only=True)


@pytest.mark.parametrize("name", [n for n in MODELS if hasattr(entry(n), "feature_info")])
def test_feature_maps_have_the_channels_and_sizes_that_are_declared(name):
    model = entry(name, features_only=True).eval()
    x = batch(model) if hasattr(model, "pretrained_cfg") else images(2, 3, 32, 32)
    maps = model(x)
    assert [z.shape[1] for z in maps] == model.feature_info.channels()
    for z, reduction in zip(maps, model.feature_info.reduction(), strict=True):
        reach = x.shape[-1] / reduction  # layers without padding lose a border on top
        assert reach - 6 <= z.shape[-1] <= reach


@pytest.mark.parametrize("activation", list_activations())
@pytest.mark.parametrize(
    "name, kwargs",
    [
        ("dsc_cnn", SMALL_CNN),
        ("dsc_speed", {"channels": (8, 16)}),
        ("dsc_vit_pico", {"dim": 16, "depth": 1}),
        ("dsc_attn_pico", {"dim": 16, "depth": 1}),
        ("sae", {"steps": 3}),
        ("sae_conv", {"steps": 2}),
    ],
)
def test_every_activation_trains_in_every_family(name, kwargs, activation):
    model = make(name, activation=activation, **kwargs)
    x = batch(model)
    for layer in sparse_layers(model).values():
        assert activation.replace("_", "") in repr(layer.prox).lower()
    out = model(x)
    (out * images(*out.shape, seed=1)).sum().backward()
    assert out.isfinite().all()
    assert all(p.grad.isfinite().all() and p.grad.any() for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("name", ["dsc_cnn_pico", "dsc_resnet20", "dsc_speed", "dsc_vit_pico", "dsc_attn_pico"])
@pytest.mark.parametrize("steps", [1, 2])
def test_of_an_activation_that_is_made_already_every_layer_has_a_copy(name, steps):
    steps = {} if name == "dsc_attn_pico" else {"steps": steps}
    ready = create_activation("group_relu", group_size=4, threshold=0.01)
    model = entry(name, activation=ready, **steps)
    found = [layer.prox for layer in sparse_layers(model).values()]
    assert len({id(prox) for prox in found} | {id(ready)}) == len(found) + 1
    dim = -1 if name in ("dsc_vit_pico", "dsc_attn_pico") else 1
    assert all((prox.group_size, prox.threshold, prox.dim) == (4, 0.01, dim) for prox in found)


# What the models are made of


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_cnn_of_one_step_is_the_plain_cnn(mode):
    model = make("dsc_cnn", steps=1, channels=(4, 6, 8), paddings=(2, 0, 1)).double()
    a, b, c = model.coder
    for layer in model.coder:
        nn.init.normal_(layer.bias, std=0.1)
    plain = nn.Sequential(
        nn.Conv2d(3, 4, 6, 2, 2), nn.ReLU(), nn.Conv2d(4, 6, 6, 2), nn.ReLU(),
        nn.Conv2d(6, 8, 4, 1, 1), nn.ReLU(), nn.BatchNorm2d(8),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10),
    ).double()  # fmt: skip
    shared = [a.dictionary.weight, a.bias, b.dictionary.weight, b.bias, c.dictionary.weight, c.bias]
    shared += [*model.norm.parameters(), *model.get_classifier().parameters()]
    assert len(shared) == len(list(model.parameters()))
    with torch.no_grad():
        for target, value in zip(plain.parameters(), shared, strict=True):
            target.copy_(value)
    x = images(3, 3, 32, 29, dtype=torch.float64)
    ours, theirs = getattr(model, mode)()(x), getattr(plain, mode)()(x)
    torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-12)
    weights = images(*ours.shape, seed=1, dtype=torch.float64)
    gradients = zip(
        torch.autograd.grad((ours * weights).sum(), shared),
        torch.autograd.grad((theirs * weights).sum(), list(plain.parameters())),
        strict=True,
    )
    for mine, other in gradients:
        torch.testing.assert_close(mine, other, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("shape", [{"group_size": 16}, {"groups": 4}])
def test_shallow_group_autoencoder_is_the_formula_of_the_paper(shape):
    model = make("gsae", img_size=(5, 4), in_chans=2, num_atoms=64, steps=1, step=1.0, threshold=4.0, **shape)
    model = model.double().eval()
    x = images(3, 2, 5, 4, dtype=torch.float64)
    matrix = model.coder.dictionary.weight.detach().T  # A: a column an atom
    correlations = x.flatten(1) @ matrix
    groups = rows(correlations, 16)
    norms = np.linalg.norm(groups, axis=-1, keepdims=True)
    code = unrows(groups * np.maximum(1 - 4 / norms, 0), correlations)
    assert 0 < (code != 0).double().mean() < 1
    torch.testing.assert_close(model.encode(x), code)
    torch.testing.assert_close(model(x), (code @ matrix.T).view_as(x))


@pytest.mark.parametrize("name", [n for n in MODELS if hasattr(make(n), "encode")])
def test_autoencoder_decodes_what_it_encodes(name):
    model = make(name).eval()
    x = batch(model)
    z = model.encode(x)
    assert z.shape[:2] == (2, model.num_features)
    assert torch.equal(model.decode(z), model(x))


def test_converged_autoencoder_solves_its_problem():
    model = make("sae", img_size=6, num_atoms=50, steps=2000, threshold=0.05).double().eval()
    x = images(2, 1, 6, 6, dtype=torch.float64)
    gradient = (x.flatten(1) - model(x).flatten(1)) @ model.coder.dictionary.weight.T
    code = model.encode(x).detach()
    torch.testing.assert_close(gradient[code != 0], 0.05 * code[code != 0].sign(), rtol=1e-3, atol=0)
    assert gradient.abs().max() <= 0.05 * 1.001


@pytest.mark.parametrize("activation", ["relu", "group_relu"])
def test_joint_and_greedy_agree_after_one_step(activation):
    x = images(2, 3, 16, 16)
    kwargs = {"activation": activation, **SMALL_CNN}
    for steps in (1, 3):
        joint, greedy = (make("dsc_cnn", steps=steps, joint=j, **kwargs).eval() for j in (True, False))
        assert torch.equal(joint(x), greedy(x)) == (steps == 1)


@pytest.mark.parametrize("activation, members, fraction", [("relu", 1, 0.1), ("group_relu", 8, 0.5), ("soft", 1, 0.3)])
def test_unrolled_layers_start_at_a_relative_threshold(activation, members, fraction):
    threshold = 0.3 if activation == "soft" else None  # given, or the default of its kind
    model = make("dsc_cnn", activation=activation, threshold=threshold, channels=(32, 64, 64)).eval()
    layer = next(iter(model.coder))
    entries = layer.dictionary.analyze(images(8, 3, 32, 32))
    typical = entries.unflatten(1, (-1, members)).square().sum(2).mean().sqrt().item()
    for value in layer.prox.threshold.detach():
        assert value.item() == pytest.approx(fraction * typical, rel=0.1)
    assert layer.prox.raw_threshold.shape == (32 // members,)
    assert 0.8 < float(layer.dictionary.curvature()) < 1.1


@pytest.mark.parametrize("activation, size", [("soft", None), ("group_relu", 1), ("group_relu", 4), ("group_relu", 16)])
def test_half_of_a_plain_signed_prox_starts_at_zero_as_of_a_relu(activation, size):
    prox = models._build.Act(activation, group_size=size).make_alone(1, 32)
    torch.manual_seed(0)
    on = prox(torch.randn(20000, 32)).unflatten(1, (-1, size or 1)).any(2)
    assert on.float().mean() == pytest.approx(0.5, abs=0.01)


def test_a_plain_network_of_signed_codes_starts_neither_linear_nor_dead():
    model = make("dsc_speed", activation="group_relu", group_size=8, channels=(16, 32, 32), steps=1)
    model.initialize(images(500, 3, 32, 32))
    observer = Observer(model)
    model(images(32, 3, 32, 32))  # in training mode: normalised by the batch
    active = {name: (code != 0).float().mean() for name, (code,) in observer.features.items() if name != "whiten"}
    assert active and all(0.05 < share < 0.7 for share in active.values())  # tails are heavier than normal here


@pytest.mark.parametrize("given", [{"threshold": 0.2}, {"activation": "relu"}, {"activation": "group_relu_nonneg"}])
def test_a_plain_prox_keeps_a_given_threshold_and_a_rectifier_its_own(given):
    act = models._build.Act(given.get("activation", "group_relu"), threshold=given.get("threshold"))
    assert act.make_alone(1, 32).threshold == act.make(1).threshold


@pytest.mark.parametrize(
    "given, expected",
    [
        ({}, {"activation": "group_relu", "group_size": 16}),
        ({"group_size": None, "steps": None}, {"activation": "group_relu", "group_size": 16, "steps": None}),
        ({"group_size": 4}, {"activation": "group_relu", "group_size": 4}),
        ({"groups": 8}, {"activation": "group_relu", "groups": 8}),
        ({"activation": "top_k"}, {"activation": "top_k"}),
        ({"activation": "group_relu_nonneg"}, {"activation": "group_relu_nonneg", "group_size": 16}),
    ],
)
def test_an_entrys_defaults_give_way(given, expected):
    assert models._build.with_defaults(given, {"activation": "group_relu", "group_size": 16}) == expected


def test_none_is_an_argument_like_any_other():
    assert models._build.with_defaults({"atoms_ratio": None}, {"atoms_ratio": 1}) == {"atoms_ratio": None}
    attention = models.transformer.dsc_crate_pico(atoms_ratio=None, residual=True)  # timm drops a None
    assert not [module for module in attention.modules() if isinstance(module, SparseCoding)]


def test_feature_maps_are_the_codes():
    model = make("dsc_cnn", **SMALL_CNN).eval()
    torch.manual_seed(0)
    features = timm.create_model("dsc_cnn", features_only=True, **SMALL_CNN).eval()
    for key, found in (("num_chs", features.feature_info.channels()), ("reduction", [2, 2, 2])):
        assert [info[key] for info in model.feature_info] == found
    assert features.feature_info.reduction() == [2, 2, 2]
    x = images(2, 3, 16, 16)
    maps = features(x)
    assert [m.shape[1] for m in maps] == [8, 8, 16]
    for found, code in zip(maps, model.coder.codes(x), strict=True):
        assert torch.equal(found, code)
    deepest = make("dsc_cnn", features_only=True, out_indices=(2,), **SMALL_CNN).eval()  # the second such model
    assert torch.equal(deepest(x)[0], maps[2])


# timm's backbones


def is_gate(name):
    return bool({"se", "gate"} & set(name.split(".")))


@pytest.mark.parametrize("name", BACKBONES)
def test_every_activation_of_a_backbone_is_swapped_but_its_gates(name):
    plain = timm.create_model(name, num_classes=4, **BACKBONES[name])
    kinds = (nn.ReLU, nn.GELU, GELU, nn.Hardswish)
    activations = {n for n, m in plain.named_modules() if isinstance(m, kinds)}
    model = make(name, activation="soft", num_classes=4, **BACKBONES[name])
    assert set(model.swapped_activations) == {n for n in activations if not is_gate(n)}
    assert len(model.swapped_activations) == len(set(model.swapped_activations))
    for n, module in model.named_modules():
        if n in activations:
            assert isinstance(module, kinds) if is_gate(n) else isinstance(module, Prox), n
    known = {"resnet18": 1 + 8 * 2, "convnext_atto": 2 + 2 + 6 + 2, "vit_tiny_patch16_224": 12}
    assert len(model.swapped_activations) == known.get(name, len(model.swapped_activations))
    assert any(is_gate(n) for n in activations) == name.startswith("mobilenet")


@pytest.mark.parametrize("name", BACKBONES)
def test_swapped_activation_knows_where_the_channels_lie(name):
    model = make(name, activation="group_relu", group_size=4, num_classes=4, **BACKBONES[name]).eval()
    latest, seen = [], []

    def check(module, args, z):
        layer = latest[-1]
        if isinstance(layer, nn.Linear):
            channels, last = layer.out_features, True
        else:
            channels, last = getattr(layer, "out_channels", None) or layer.num_features, False
        assert z.shape[module.dim] == channels
        assert module.dim % z.ndim == (z.ndim - 1 if last else 1)
        groups = rows(args[0], 4, module.dim)
        norms = np.linalg.norm(groups, axis=-1, keepdims=True).clip(1e-300)
        shrunk = unrows(groups * np.maximum(1 - 0.1 / norms, 0), z, module.dim)
        torch.testing.assert_close(z.double(), shrunk, rtol=1e-3, atol=1e-5)
        seen.append(module)

    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Conv2d | nn.BatchNorm2d):
            module.register_forward_pre_hook(lambda module, args: latest.append(module))
        if isinstance(module, Prox):
            module.register_forward_hook(check)
    assert model(images(1, 3, 32, 32)).shape == (1, 4)
    assert len(seen) == len(model.swapped_activations) == len(set(seen))


def test_a_ready_activation_is_copied_into_a_backbone_along_each_layers_channels():
    ready = create_activation("group_relu", group_size=4, threshold=0.25)
    model = make("vit_tiny_patch16_224", activation=ready, depth=2, img_size=32, num_classes=4)
    first, second = (model.get_submodule(name) for name in model.swapped_activations)
    assert first is not second and first.dim == second.dim == -1 and ready.dim == 1


def test_weights_of_timms_in_a_folder_are_swapped_too(tmp_path):
    theirs = timm.create_model("test_resnet", num_classes=4).eval()
    save_for_hf(theirs, tmp_path, safe_serialization=True)
    name, x = f"local-dir:{tmp_path}", images(2, 3, 64, 64)
    torch.testing.assert_close(models.create_model(name, pretrained=True).eval()(x), theirs(x))
    swapped = models.create_model(name, pretrained=True, activation="soft", threshold=0.0).eval()
    plain = models.swap_activations(theirs, models._build.Act("soft", threshold=0.0))
    assert swapped.swapped_activations == plain
    torch.testing.assert_close(swapped(x), theirs(x))


def test_a_checkpoint_of_ours_in_a_folder_keeps_its_activation():
    name = f"local-dir:{hub.find('dsc_cnn.mnist_relu')}"
    assert models.create_model(name, pretrained=True).num_classes == 10
    with pytest.raises(
        ValueError, match="mnist_relu has the activations of its checkpoint, and none to swap for 'soft'"
    ):
        models.create_model(name, pretrained=True, activation="soft")


def test_what_makes_position_biases_keeps_its_activation():
    shape = dict(img_size=32, embed_dim=16, depths=(1, 1), num_heads=(2, 2), window_size=4)
    model = make("swinv2_tiny_window8_256", activation="soft", num_classes=4, **shape)
    assert model.swapped_activations == [f"layers.{i}.blocks.0.mlp.act" for i in range(2)]


def test_channels_are_found_in_layers_inside_of_others():
    model = make("levit_128s", activation="group_relu", group_size=4, num_classes=4, img_size=64).eval()
    stem = [name for name in model.swapped_activations if name.startswith("stem")]
    for name in model.swapped_activations:
        assert model.get_submodule(name).dim == (1 if name in stem else -1), name
    assert len(stem) == 3 and model(images(1, 3, 64, 64)).shape == (1, 4)


def inputs_met(model, x):
    """The input's shape and its channels of every swapped activation, by name."""
    met = {}
    for name, prox in model.named_modules():
        if isinstance(prox, Prox):
            prox.register_forward_pre_hook(
                lambda prox, args, n=name: met.update({n: (args[0].shape, args[0].shape[prox.dim])})
            )
    model(x)
    return met


def test_tokens_that_are_a_map_for_a_moment_are_told_apart():
    shape = dict(depths=(1, 1), embed_dims=(8, 16), num_heads=(1, 2), mlp_ratios=(2, 2), sr_ratios=(1, 1))
    model = make("pvt_v2_b2_li", activation="soft", num_classes=4, **shape).eval()
    seen = {name: (len(shape), channels) for name, (shape, channels) in inputs_met(model, images(1, 3, 32, 32)).items()}
    for stage, hidden in enumerate((16, 32)):
        mlp = f"stages.{stage}.blocks.0.mlp"
        assert seen[f"{mlp}.relu"] == (4, hidden) and seen[f"{mlp}.act"] == (3, hidden)


@pytest.mark.parametrize("name", ["seresnext26ts", "skresnet18", "gcresnext26ts", "legacy_seresnet18", "resnest14d"])
def test_gates_keep_their_activation_whatever_their_name(name):
    # A gate's activation is on what was pooled to one pixel (or, of a mean over channels, on no map at all).
    model = make(name, activation="soft", num_classes=4).eval()
    sides = {name: shape[-1] for name, (shape, _) in inputs_met(model, images(1, 3, 128, 128)).items()}
    assert sides.keys() == set(model.swapped_activations) and min(sides.values()) > 1


def test_kernel_of_linear_attention_stays_nonnegative():
    model = make("efficientvit_b0", activation="group_relu", group_size=8, num_classes=4).eval()
    assert not any("kernel_func" in name for name in model.swapped_activations)
    assert model(images(1, 3, 64, 64)).shape == (1, 4)


def test_channels_are_found_beside_what_owns_an_activation():
    # StarReLU holds nothing but its ReLU: on maps in the first stages of a CAFormer, on tokens in the last ones.
    mixers = [metaformer.SepConv] * 2 + [metaformer.Attention] * 2
    norms = [metaformer.LayerNorm2dNoBias] * 2 + [metaformer.LayerNormNoBias] * 2
    shape = dict(depths=(1, 1, 1, 1), dims=(8, 16, 32, 64))
    model = metaformer.MetaFormer(**shape, token_mixers=mixers, norm_layers=norms).eval()
    models.swap_activations(model, models._build.Act("soft"))
    assert {n: channels for n, (_, channels) in inputs_met(model, images(1, 3, 64, 64)).items() if "mlp" in n} == {
        f"stages.{i}.blocks.0.mlp.act.relu": 4 * width for i, width in enumerate(shape["dims"])
    }


def test_features_that_are_activations_stay_features():
    torch.manual_seed(0)
    plain = timm.create_model("legacy_xception", features_only=True).eval()
    swapped = make("legacy_xception", activation="relu", features_only=True).eval()
    x = images(1, 3, 64, 64)
    with torch.no_grad():
        expected = plain(x)
        assert len(expected) == 5
        torch.testing.assert_close(swapped(x), expected)


@pytest.mark.parametrize("kwargs", [{}, {"features_only": True}])
def test_relu_for_relu_changes_nothing(kwargs):
    torch.manual_seed(0)
    plain = timm.create_model("resnet18", **kwargs).eval()
    swapped = make("resnet18", activation="relu", **kwargs).eval()
    x = images(1, 3, 64, 64)
    found, expected = swapped(x), plain(x)
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a, b)


def test_backbone_without_an_activation_is_timms_own():
    torch.manual_seed(0)
    plain = timm.create_model("resnet18", num_classes=4)
    ours = make("resnet18", num_classes=4)
    assert not sparse_layers(ours)
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), ours.parameters(), strict=True))


def test_activation_that_appears_twice_is_swapped_twice():
    act = nn.ReLU()
    model = nn.Sequential(nn.Linear(4, 4), act, nn.Linear(4, 4), act)
    names = models.swap_activations(model, models._build.Act("soft", threshold=0.1))
    assert names == ["1", "3"]
    assert not any(isinstance(m, nn.ReLU) for m in model.modules())


# Errors


def test_a_network_of_functional_activations_is_refused():
    # timm's GammaAct calls a function; what is left to swap are gates.
    with pytest.raises(ValueError, match="has no activation that could be swapped"), torch.device("meta"):
        make("dm_nfnet_f0", activation="relu")


def test_vectors_have_nothing_to_pool():
    with pytest.raises(ValueError, match="global_pool of DSCMLP must be '', got 'max'"):
        make("dsc_mlp_pico", img_size=8, num_atoms=(8, 8)).reset_classifier(3, "max")


def test_nothing_to_swap_is_an_error():
    with pytest.raises(ValueError, match="Sequential has no activation.*'soft'"):
        models.swap_activations(nn.Sequential(nn.Linear(2, 2), nn.Sigmoid()), models._build.Act("soft"))


@pytest.mark.parametrize(
    "name, nearest", [("dsc_vit_pic", "dsc_vit_pico"), ("gsea", "gsae"), ("resnet_18", "resnet18")]
)
def test_unknown_model_names_the_nearest(name, nearest):
    with pytest.raises(ValueError, match=f"unknown model '{name}'; did you mean '{nearest}'"):
        models.create_model(name)


@pytest.mark.parametrize(
    "name, kwargs, message",
    [
        ("resnet18", {"threshold": 0.1}, "threshold given without an activation"),
        ("resnet18", {"group_size": 4, "groups": 2}, "group_size, groups given without an activation"),
        ("resnet18", {"activation": "rellu"}, "unknown activation 'rellu'; did you mean 'relu'"),
        ("dsc_cnn", {"activation": "sfot"}, "unknown activation 'sfot'; did you mean 'soft'"),
        ("dsc_cnn", {"activation": "gelu", "threshold": 0.1}, "'gelu' takes no threshold"),
        ("dsc_cnn", {"activation": "relu", "group_size": 4}, "takes no group_size"),
        ("dsc_cnn", {"activation": "group_relu", "group_size": 4, "groups": 4}, "not both"),
        ("dsc_cnn", {"steps": 0}, "steps .* at least 1, got 0"),
        ("dsc_vit_pico", {"steps": 0}, "steps .* at least 1, got 0"),
        ("gsae", {"steps": 0}, "steps .* at least 1, got 0"),
        ("gsae", {"group_size": 0}, "group_size must be at least 1, got 0"),
        ("dsc_cnn", {"solver": "fsta"}, "unknown solver 'fsta'; did you mean 'fista'"),
        ("dsc_cnn", {"channels": (4, 8)}, "one entry a layer"),
        ("dsc_vit_pico", {"global_pool": "max"}, "global_pool of DSCTransformer must be 'avg' or '', got 'max'"),
        ("dsc_attn_pico", {"steps": 7}, "attention alone has no code to solve: .* got steps=7"),
        ("sae", {"num_classes": 10}, "no classes, got num_classes=10"),
    ],
)
def test_contradictory_arguments_say_so(name, kwargs, message):
    with pytest.raises(ValueError, match=message):
        models.create_model(name, **kwargs)


@pytest.mark.parametrize("shape", [{"groups": 5}, {"group_size": 5}])
@pytest.mark.parametrize("name", ["dsc_cnn", "dsc_vit_pico", "dsc_attn_pico", "gsae", "resnet18"])
@pytest.mark.parametrize("steps", [1, 2])
def test_groups_that_do_not_divide_name_those_that_do(name, steps, shape):
    kwargs = {} if name in ("resnet18", "dsc_attn_pico") else {"steps": steps}
    kwargs |= {"num_atoms": 64} if name == "gsae" else {}
    with pytest.raises(ValueError, match="5 does not divide the (16|32|64|256) channels.*nearest .*: 4 or 8"):
        model = make(name, activation="group_relu", **shape, **kwargs)
        model(batch(model))


def test_images_that_are_too_small_name_the_least_size():
    with pytest.raises(ValueError, match="images of 4×4 pixels are too small: this network needs 28 a side"):
        make("dsc_cnn")(images(1, 3, 4, 4))


def test_pretrained_without_a_published_checkpoint(monkeypatch):
    monkeypatch.setattr(hub, "checkpoint_folders", dict)
    with pytest.raises(ValueError, match="dsc_cnn has no published checkpoint yet"):
        models.create_model("dsc_cnn", pretrained=True)


@pytest.mark.parametrize("pretrained", [False, True])
def test_unknown_tag_is_an_error(pretrained):
    for name, near in (("dsc_cnn.mnist_rleu", "dsc_cnn.mnist_relu"), ("resnet18.a1_in2k", "resnet18.a1_in1k")):
        with pytest.raises(ValueError, match=f"unknown checkpoint '{name}'; did you mean '{near}'"):
            models.create_model(name, pretrained=pretrained)
    assert models.create_model("convnext_atto_rms.untrained", num_classes=4).num_classes == 4  # a tag without weights


def test_plain_layers_have_a_bias_and_unrolled_ones_learn_their_threshold():
    for name in ("dsc_cnn", "dsc_vit_pico"):
        for steps in (1, 2):
            coders = [m for m in make(name, steps=steps).modules() if isinstance(m, SparseCoding)]
            assert all((c.bias is not None) == (steps == 1) and c.prox.learn == (steps > 1) for c in coders)
