import pytest
import timm
import torch
from torch import nn

from dsc import models
from dsc.activations import create_activation
from dsc.dictionaries import DenseDictionary
from dsc.layers import SparseCoding
from dsc.observe import Observer, coder_inputs, sparse_layers

CNN = {"channels": (8, 8, 16), "kernel_sizes": (3, 3, 3), "strides": (2, 1, 1)}
CASES = {
    "joint": ("dsc_cnn", CNN | {"joint": True, "steps": 3}, (3, 12, 12)),
    "greedy": ("dsc_cnn", CNN | {"joint": False, "steps": 3}, (3, 12, 12)),
    "one step": ("dsc_cnn", CNN | {"steps": 1}, (3, 12, 12)),
    "vit": ("dsc_vit_pico", {"dim": 16, "depth": 2}, (3, 16, 16)),
    "attention": ("dsc_attn_pico", {"dim": 16, "depth": 2}, (3, 16, 16)),
    "autoencoder": ("gsae", {"img_size": 8, "num_atoms": 32, "steps": 3}, (1, 8, 8)),
    "backbone": ("resnet18", {"activation": "soft"}, (3, 32, 32)),
}


def build(case):
    name, kwargs, shape = CASES[case]
    torch.manual_seed(0)
    return models.create_model(name, **kwargs).eval(), torch.randn(2, *shape)


def hooks(model):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def test_names_are_those_of_the_modules():
    expected = {
        "joint": [f"coder.layers.{i}" for i in range(3)],
        "greedy": [f"coder.layers.{i}" for i in range(3)],
        "vit": ["blocks.0.coder", "blocks.1.coder"],
        "attention": ["blocks.0.prox", "blocks.1.prox"],
        "autoencoder": ["coder"],
    }
    for case, names in expected.items():
        layers = sparse_layers(build(case)[0])
        assert list(layers) == names
        assert all((layer.coder is None) == (case == "attention") for layer in layers.values())


def test_names_of_a_timm_backbone_are_those_of_its_activations():
    plain = timm.create_model("resnet18")
    names = [name for name, module in plain.named_modules() if isinstance(module, nn.ReLU)]
    model, _ = build("backbone")
    assert list(sparse_layers(model)) == names
    assert sorted(model.swapped_activations) == sorted(names)
    assert not sparse_layers(plain)


@pytest.mark.parametrize("case", CASES)
def test_features_are_what_a_hook_sees_and_the_forward_stays(case):
    model, x = build(case)
    before, expected = hooks(model), model(x)
    seen = {}
    for name, layer in sparse_layers(model).items():
        layer.output.register_forward_hook(lambda m, args, z, name=name: seen.setdefault(name, []).append(z))
    with Observer(model) as observer:
        for _ in range(2):  # the latest forward only
            seen.clear()
            assert torch.equal(model(x), expected)
        assert list(observer.features) == list(seen) == list(observer.layers)
        for name, codes in observer.features.items():
            assert len(codes) == len(seen[name]) == 1 and codes[0] is seen[name][0]
    assert hooks(model) == before + len(seen)
    kept = {name: list(codes) for name, codes in observer.features.items()}
    model(x + 1)
    assert all(kept[name][0] is observer.features[name][0] for name in kept)


@pytest.mark.parametrize("case", ["joint", "greedy", "one step"])
def test_every_code_is_seen_once_and_is_the_final_one(case):
    model, x = build(case)
    with Observer(model) as observer:
        model(x)
    codes = model.coder.codes(x)
    assert [len(seen) for seen in observer.features.values()] == [1, 1, 1]
    for (seen,), code in zip(observer.features.values(), codes, strict=True):
        assert torch.equal(seen, code)


def test_gradient_flows_through_what_is_seen():
    model, x = build("vit")
    with Observer(model) as observer:
        model(x)
        observer.features["blocks.0.coder"][0].sum().backward()
    assert model.blocks[0].coder.dictionary.weight.grad.any()
    assert model.blocks[1].coder.dictionary.weight.grad is None


def test_shared_activation_is_seen_at_every_call():
    act = create_activation("soft", threshold=0.5)
    model, x = nn.Sequential(act, nn.Linear(4, 4), act), torch.randn(3, 4)
    with Observer(model) as observer:
        out = model(x)
    first, second = observer.features["0"]
    assert torch.equal(first, act(x)) and torch.equal(second, out)
    assert list(observer.features) == ["0"]


def test_activation_inside_a_coder_is_no_layer_of_its_own():
    coder = SparseCoding(DenseDictionary(4, 6), create_activation("soft", -1))
    assert [layer.coder for layer in sparse_layers(coder).values()] == [coder]
    assert list(sparse_layers(nn.Sequential(coder, create_activation("relu")))) == ["0", "1"]
    assert list(sparse_layers(coder)) == ["SparseCoding"]


def test_leaving_by_an_exception_takes_the_hooks_away():
    model, x = build("joint")
    before = hooks(model)
    with pytest.raises(ZeroDivisionError), Observer(model):
        assert hooks(model) > before
        raise ZeroDivisionError
    assert hooks(model) == before


@pytest.mark.parametrize("how", ["wrapped", "in place", "a part"])
def test_compiled_model_is_refused(how):
    model, _ = build("joint")
    if how == "wrapped":
        model = torch.compile(model, backend="eager")
    elif how == "in place":
        model.compile(backend="eager")
    else:
        model.coder.compile(backend="eager")
    before = hooks(model)
    with pytest.raises(RuntimeError, match="observe before torch.compile"):
        Observer(model)
    assert hooks(model) == before


@pytest.mark.parametrize("case", ["joint", "vit", "autoencoder"])
def test_observed_and_then_compiled(case):
    torch._dynamo.reset()
    model, x = build(case)
    with Observer(model) as observer, torch.no_grad():
        model(x)
        expected = {name: codes[0] for name, codes in observer.features.items()}
        compiled = torch.compile(model, backend="aot_eager")
        for _ in range(2):
            compiled(x)
            assert list(observer.features) == list(expected)
            for name, codes in observer.features.items():
                assert len(codes) == 1
                torch.testing.assert_close(codes[0], expected[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("case", ["joint", "greedy", "one step"])
def test_inputs_of_a_chain_are_the_image_and_the_codes_below(case):
    model, x = build(case)
    inputs = coder_inputs(model, x)
    assert list(inputs) == [f"coder.layers.{i}" for i in range(3)]
    for found, expected in zip(inputs.values(), [x, *model.coder.codes(x)[:-1]], strict=True):
        assert torch.equal(found, expected)


def test_inputs_of_token_and_image_coders():
    model, x = build("vit")
    normed = []
    handles = [b.norm2.register_forward_hook(lambda m, a, out: normed.append(out)) for b in model.blocks]
    inputs = coder_inputs(model, x)
    for handle in handles:
        handle.remove()
    assert all(torch.equal(a, b) for a, b in zip(inputs.values(), normed, strict=True))
    model, x = build("autoencoder")
    assert torch.equal(coder_inputs(model, x)["coder"], x.flatten(1))
    assert coder_inputs(*build("backbone")) == {}


@pytest.mark.parametrize("case", ["joint", "greedy", "vit"])
def test_input_reproduces_the_code_and_leaves_no_hooks(case):
    model, x = build(case)
    before = hooks(model)
    inputs = coder_inputs(model, x)
    assert hooks(model) == before
    if case != "joint":  # there the layers are not solved one by one
        with Observer(model) as observer:
            model(x)
        for name, layer in observer.layers.items():
            assert torch.equal(layer.coder.solve(inputs[name]), observer.features[name][0])
    with pytest.raises((RuntimeError, ValueError)):
        coder_inputs(model, x[:, :1])
    assert hooks(model) == before
