from functools import partial

import pytest
import torch
from torch import nn

import dsc
from dsc.activations import (
    PROX,
    TORCH,
    Elementwise,
    activation_factory,
    configure,
    create_activation,
    list_activations,
)
from dsc.nonconvex import TopK
from dsc.prox import Soft
from dsc.shrinkage import soft, top_k


def signals(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", sorted(TORCH))
def test_torch_activations_pass_through(name):
    z = signals(3, 6, 2)
    wrapped = create_activation(name)
    assert torch.equal(wrapped(z, 0.3), TORCH[name]()(z))
    assert not wrapped.is_prox and not wrapped.is_convex and not wrapped.has_threshold
    for call in (wrapped.penalty, wrapped.gauge, wrapped.conjugate):
        with pytest.raises(TypeError, match=rf"{TORCH[name].__name__}\(.*is no prox"):
            call(z)
    with pytest.raises(TypeError, match=rf"{TORCH[name].__name__}\(.*has no threshold"):
        wrapped.zeroing_threshold(1.0, 6)


@pytest.mark.parametrize("activation", [nn.Hardtanh, torch.tanh, nn.Mish(), partial(nn.GELU, approximate="tanh")])
def test_classes_and_callables_pass_through(activation):
    z = signals(3, 6, 2)
    plain = activation() if isinstance(activation, type | partial) else activation
    assert torch.equal(create_activation(activation)(z), plain(z))


@pytest.mark.parametrize("activation", [Soft, partial(Soft, threshold=0.5), configure("soft", threshold=0.5)])
def test_a_prox_class_is_made_with_its_arguments(activation):
    z, given = signals(2, 3, 6), {"threshold": 0.5} if activation is Soft else {}
    made = create_activation(activation, dim=-1, **given)
    assert isinstance(made, Soft) and made.dim == -1
    assert torch.equal(made(z), soft(z, 0.5))


def test_names_listed_are_the_names_created():
    assert list_activations() == sorted([*PROX, *TORCH])
    for name in list_activations():
        assert isinstance(create_activation(name), PROX.get(name, Elementwise))


@pytest.mark.parametrize(
    "arguments,message",
    [
        ({"activation": "group_rleu"}, "'group_rleu'; did you mean 'group_relu'.*silu"),
        ({"activation": "topk"}, "'topk'; did you mean 'top_k'"),
        ({"activation": "soft", "group_size": 2}, "'soft' takes no group_size .*group_relu, group_relu_n"),
        ({"activation": "gelu", "threshold": 0.1}, "'gelu' takes no threshold .*relu, soft"),
        ({"activation": "softplus", "threshold": 0.1}, "'softplus' takes no threshold .*relu, soft"),
        ({"activation": "top_k", "threshold": 0.1}, "'top_k' takes no threshold .*relu, soft"),
        ({"activation": "group_top_k", "learn": True}, "'group_top_k' takes no learn .*relu, soft"),
        ({"activation": "soft", "k": 2}, r"'soft' takes no k \(taken by: top_k, group_top_k\)"),
        ({"activation": "relu", "l1_ratio": 0.2}, r"'relu' takes no l1_ratio \(taken by: sparse_group, elastic\)"),
        ({"activation": "relu", "colour": 1}, "'relu' takes no colour .*none"),
    ],
)
@pytest.mark.parametrize("call", [create_activation, configure])
def test_wrong_arguments_are_named(call, arguments, message):
    with pytest.raises(ValueError, match=message):
        call(**arguments)


@pytest.mark.parametrize("activation", ["soft", Soft, Soft(0.5)])
def test_factory_makes_fresh_modules_and_ignores_inplace(activation):
    factory = activation_factory(activation, threshold=None if isinstance(activation, Soft) else 0.5)
    first, second = factory(inplace=True), factory()
    z = signals(3, 6, 2)
    before = z.clone()
    assert torch.equal(first(z), soft(before, 0.5))
    assert torch.equal(z, before)
    assert first is not second


def test_arguments_beside_a_ready_prox_are_not_dropped_silently():
    with pytest.raises(ValueError, match="threshold"):
        create_activation(Soft(0.1), threshold=0.5)


# In the models


def layers_of(model):
    return [layer.prox for layer in dsc.Observer(model).layers.values()]


@pytest.mark.parametrize(
    "name, options",
    [
        ("top_k", {"k": 3, "nonneg": True}),
        ("group_top_k", {"k": 2, "group_size": 4}),
        ("jump_relu", {"bandwidth": 0.1}),
        ("elastic", {"l1_ratio": 0.7}),
        ("sparse_group", {"l1_ratio": 0.7, "group_size": 4}),
    ],
)
@pytest.mark.parametrize("model, steps", [("dsc_vit_pico", 1), ("dsc_vit_pico", 2), ("dsc_cnn_pico", 2), ("sae", 2)])
def test_models_hand_its_arguments_to_every_activation(model, steps, name, options):
    proxes = layers_of(dsc.create_model(model, activation=name, steps=steps, **options))
    assert proxes
    for prox in proxes:
        assert isinstance(prox, PROX[name])
        assert all(getattr(prox, key) == value for key, value in options.items())


def test_a_top_k_autoencoder_keeps_the_k_largest():
    torch.manual_seed(0)
    model = dsc.create_model("sae", activation="top_k", k=5, nonneg=True, img_size=4, num_atoms=20, steps=1, step=1.0)
    x = signals(3, 1, 4, 4)
    correlations = x.flatten(1) @ model.coder.dictionary.weight.T
    torch.testing.assert_close(model.encode(x), top_k(correlations, 5, -1, True))
    made = type(model)(activation=partial(TopK, k=5), img_size=4)
    assert made.coder.prox.k == 5


@pytest.mark.parametrize("name", ["hard", "jump_relu", "sparse_group", "elastic", "relu", "group_relu"])
def test_unrolled_layers_start_where_small_entries_vanish(name):
    torch.manual_seed(0)
    model = dsc.create_model("dsc_vit_pico", activation=name, threshold=0.2, steps=2)
    for layer in dsc.Observer(model).layers.values():
        entry = 0.2 * layer.coder.dictionary.weight.norm(dim=1).mean()  # correlations with tokens of unit size
        small, large = (torch.full((1, 256), factor * entry.item()) for factor in (0.99, 1.01))
        assert not layer.prox(small).any() and layer.prox(large).all()


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"k": 2}, "k given without an activation"),
        ({"activation": "soft", "k": 2}, "'soft' takes no k .*top_k"),
        ({"activation": "top_k", "threshold": 0.1}, "takes no threshold"),
    ],
)
def test_models_name_arguments_that_do_not_fit(arguments, message):
    with pytest.raises(ValueError, match=message):
        dsc.create_model("dsc_cnn_pico", **arguments)
