import pytest
import torch
from oracles import rows
from torch import nn
from torch.nn import functional as F

from dsc import models
from dsc.dictionaries import ConvDictionary
from dsc.layers import DeepSparseCoding
from dsc.observe import Observer

CONV = {"num_atoms": (8, 12), "kernel_sizes": (4, 3), "strides": (2, 2), "paddings": (1, 0)}
TINY = {
    "gsae": {"img_size": 6, "num_atoms": 32},
    "sae": {"img_size": 6, "num_atoms": 32},
    "gsae_deep": {"img_size": 6, "num_atoms": (32, 16)},
    "sae_deep": {"img_size": 6, "num_atoms": (32, 16)},
    "gsae_conv": {"num_atoms": (16,), "kernel_sizes": (4,), "strides": (2,), "paddings": (1,)},
    "sae_conv": {"num_atoms": (16,), "kernel_sizes": (4,), "strides": (2,), "paddings": (1,)},
    "gsae_conv_deep": CONV | {"group_size": 4},
    "sae_conv_deep": CONV,
}


def make(name, **kwargs):
    torch.manual_seed(0)
    return models.create_model(name, **TINY[name] | kwargs).double()


def images(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def layers(model):
    return list(model.coder) if isinstance(model.coder, DeepSparseCoding) else [model.coder]


def test_published_entries_keep_their_weights_and_shapes():
    for name, size in (("gsae", 16), ("sae", 1)):
        model = models.create_model(name)
        assert {k: tuple(p.shape) for k, p in model.named_parameters()} == {"coder.dictionary.weight": (160, 784)}
        assert (model.coder.solver.steps, model.coder.step) == (15, "lipschitz")
        assert model.coder.prox.group_size_of(160) == size


@pytest.mark.parametrize("name", TINY)
def test_converged_codes_meet_the_kkt_conditions_layer_by_layer(name):
    grouped, threshold = name.startswith("g"), 0.2
    model = make(name, steps=800, threshold=threshold, pre_bias=True).eval()
    nn.init.normal_(model.pre_bias)
    x = images(2, 1, 6, 6)
    with Observer(model) as observer, torch.no_grad():
        reconstruction = model(x)
        codes = [found[0] for found in observer.features.values()]
    dense = not isinstance(layers(model)[0].dictionary, ConvDictionary)
    bias = model.pre_bias if dense else model.pre_bias[:, None, None]
    signal = (x.flatten(1) if dense else x) - bias
    for layer, code in zip(layers(model), codes, strict=True):
        dual = layer.dictionary.analyze(signal - layer.decode(code, signal.shape[-2:])).detach()
        size, dim = (layer.prox.group_size if grouped else 1), layer.prox.dim
        z, c = (torch.from_numpy(rows(t, size, dim)) for t in (code, dual))
        norm, active = z.norm(dim=-1), (z != 0).any(-1)
        assert 0 < active.double().mean() <= 1
        assert c.norm(dim=-1).max() <= threshold * (1 + 1e-3)
        torch.testing.assert_close(
            c[active], threshold * (z / norm.unsqueeze(-1))[active], rtol=0, atol=1e-3 * threshold
        )
        signal = code
    for layer, size in zip(reversed(layers(model)), sizes_below(model, x), strict=True):
        signal = layer.dictionary.synthesize(signal, size)
    expected = signal + bias
    torch.testing.assert_close(reconstruction, expected.view_as(x))


def sizes_below(model, x):
    """Spatial sizes of every layer's signal, the deepest layer's first, by running the convolutions."""
    found = []
    for layer in layers(model):
        found.insert(0, x.shape[-2:])
        x = layer.dictionary.analyze(x if isinstance(layer.dictionary, ConvDictionary) else x.flatten(1))
    return found


@pytest.mark.parametrize("height, width", [(8, 8), (9, 12), (13, 8), (11, 10)])
@pytest.mark.parametrize("name", ["sae_conv", "sae_conv_deep"])
def test_convolutional_autoencoder_of_one_step_is_convolutions_and_their_transposes(name, height, width):
    model = make(name, steps=1, step=1.0, threshold=0.3, in_chans=2)
    x = images(3, 2, height, width)
    shape = TINY[name]
    z, inputs = x, []
    for layer, stride, padding in zip(layers(model), shape["strides"], shape["paddings"], strict=True):
        inputs.append(z)
        z = F.softshrink(F.conv2d(z, layer.dictionary.weight, stride=stride, padding=padding), 0.3)
    torch.testing.assert_close(model.encode(x), z)
    expected = z
    for layer, below, stride, padding in reversed(
        list(zip(layers(model), inputs, shape["strides"], shape["paddings"], strict=True))
    ):
        adjoint = torch.autograd.functional.vjp(
            lambda v, w=layer.dictionary.weight, s=stride, p=padding: F.conv2d(v, w, stride=s, padding=p),
            below.detach(),
            expected.detach(),
        )[1]
        expected = adjoint
    torch.testing.assert_close(model(x), expected)
    assert torch.equal(model.decode(model.encode(x), (height, width)), model(x))


def test_deep_autoencoder_solves_jointly_when_asked():
    x = images(2, 1, 6, 6)
    model = make("sae_deep", steps=4, solver="ista", joint=True).eval()
    a, b = (layer.dictionary.weight for layer in model.coder)  # an atom a row
    s, t = (1 / torch.linalg.matrix_norm(w, 2) ** 2 for w in (a, b))
    x = x.flatten(1)
    first = shrink(s * x @ a.T, 0.1 * s)
    deepest = shrink(t * first @ b.T, 0.1 * t)
    for _ in range(3):
        estimate = deepest @ b
        first = shrink(estimate + s * (x - estimate @ a) @ a.T, 0.1 * s)
        deepest = shrink(deepest + t * (first - estimate) @ b.T, 0.1 * t)
    torch.testing.assert_close(model.encode(x.view(2, 1, 6, 6)), deepest, rtol=1e-5, atol=1e-7)
    assert not torch.allclose(make("sae_deep", steps=4, solver="ista").eval().encode(x.view(2, 1, 6, 6)), deepest)


def shrink(z, threshold):
    return z.sign() * (z.abs() - threshold).clamp_min(0)


@pytest.mark.parametrize("nonneg", [False, True])
def test_top_k_autoencoder_is_the_formula_of_openai(nonneg):
    model = make("sae", activation="top_k", k=5, nonneg=nonneg, steps=1, step=1.0, pre_bias=True)
    nn.init.normal_(model.pre_bias)
    x = images(4, 1, 6, 6)
    w, b = (p.detach().clone().requires_grad_() for p in (model.coder.dictionary.weight, model.pre_bias))
    code = (x.flatten(1) - b) @ w.T
    order = code if nonneg else code.abs()
    kept = (order >= order.sort(dim=1).values[:, -5:-4]) & (code > 0 if nonneg else code != 0)
    theirs = ((code * kept) @ w + b).view_as(x)
    ours = model(x)
    torch.testing.assert_close(ours, theirs)
    weights = images(4, 1, 6, 6, seed=1)
    mine = torch.autograd.grad((ours * weights).sum(), (model.coder.dictionary.weight, model.pre_bias))
    for found, expected in zip(mine, torch.autograd.grad((theirs * weights).sum(), (w, b)), strict=True):
        torch.testing.assert_close(found, expected)


def test_jump_relu_autoencoder_has_the_straight_through_gradient_of_its_threshold():
    shape = {"activation": "jump_relu", "bandwidth": 0.4, "threshold": 0.5, "learn_threshold": True}
    model = make("sae", **shape, steps=1, step=1.0)
    x = images(8, 1, 6, 6)
    w = model.coder.dictionary.weight.detach().clone().requires_grad_()
    code = x.flatten(1) @ w.T
    theirs = (code * (code > 1)) @ w  # θ = √(2·0.5)
    weights = images(8, 36, seed=1)
    ours = model(x).flatten(1)
    torch.testing.assert_close(ours, theirs)
    prox = model.coder.prox
    mine = torch.autograd.grad((ours * weights).sum(), (model.coder.dictionary.weight, prox.raw_threshold))
    torch.testing.assert_close(mine[0], torch.autograd.grad((theirs * weights).sum(), w)[0])
    near = ((code - 1).abs() < 0.2).double()
    slope = (-1 / 0.4 * near * (weights @ w.T)).sum()  # −θ/ε where the code is near θ, by the gradient of the code
    chain = torch.sigmoid(prox.raw_threshold.detach())  # of the softplus; dθ/dλ = 1/θ = 1
    torch.testing.assert_close(mine[1], (slope * chain).detach())
    assert near.any() and slope != 0


@pytest.mark.parametrize("name, k", [("sae", 8), ("sae_conv_deep", 4)])
@pytest.mark.parametrize("activation", ["top_k", "jump_relu"])
def test_sparse_autoencoders_of_today_learn(name, k, activation):
    extra = {"k": k} if activation == "top_k" else {"learn_threshold": True}
    model = make(name, activation=activation, steps=1, pre_bias=True, **extra).train()
    x = 1 + images(16, 1, 6, 1) @ images(16, 1, 1, 6, seed=1)  # rank one, far from zero
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        loss = (model(x) - x).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    if activation == "top_k":
        assert (model.encode(x) != 0).sum(1).max() <= k


def test_small_images_and_wrong_sizes_are_named():
    model = make("sae_conv_deep")
    with pytest.raises(ValueError, match="images of 9×5 pixels are too small: this network needs 6 a side"):
        model(images(1, 1, 9, 5))
    assert model(images(1, 1, 6, 6)).shape == (1, 1, 6, 6)
    with pytest.raises(ValueError, match=r"does not come from signals of size"):
        model.decode(model.encode(images(1, 1, 6, 6)), (20, 20))
    with pytest.raises(ValueError, match="one entry a layer"):
        make("sae_conv", strides=(2, 2))
    with pytest.raises(ValueError, match="no classes, got num_classes=2"):
        make("gsae_conv", num_classes=2)


def test_feature_maps_are_the_codes_of_the_layers():
    model = make("sae_conv_deep").eval()
    torch.manual_seed(0)
    features = models.create_model("sae_conv_deep", features_only=True, **CONV).double().eval()
    assert (features.feature_info.channels(), features.feature_info.reduction()) == ([8, 12], [2, 4])
    x = images(2, 1, 10, 12)
    for found, code in zip(features(x), model.coder.codes(x), strict=True):
        torch.testing.assert_close(found, code)


# Atoms to begin with


def test_singular_groups_span_the_leading_directions_of_the_images():
    model = make("gsae", num_atoms=8, group_size=4, initial="singular")
    x = images(50, 1, 6, 6)
    assert model.starts_from_images
    model.initialize(x)
    leading = torch.linalg.svd(x.flatten(1), full_matrices=False).Vh[:4]
    for group in model.coder.dictionary.weight.detach().split(4):
        torch.testing.assert_close(group.mT @ group, leading.mT @ leading)


def test_singular_atoms_without_groups_are_the_leading_directions_themselves():
    model = make("sae", num_atoms=8, initial="singular")
    x = images(50, 1, 6, 6)
    model.initialize(x)
    leading = torch.linalg.svd(x.flatten(1), full_matrices=False).Vh[:8]
    cosines = model.coder.dictionary.weight.detach() @ leading.mT
    torch.testing.assert_close(cosines.abs(), torch.eye(8, dtype=torch.float64))


def test_atoms_may_begin_as_images():
    model = make("sae", initial="samples")
    x = images(50, 1, 6, 6)
    model.initialize(x)
    cosines = model.coder.dictionary.weight @ F.normalize(x.flatten(1), dim=1).mT
    torch.testing.assert_close(cosines.amax(1), torch.ones(32, dtype=torch.float64))
    assert len(cosines.argmax(1).unique()) == 32


def test_random_atoms_stay_and_an_unknown_start_names_the_nearest():
    model = make("gsae")
    before = model.coder.dictionary.weight.clone()
    model.initialize(images(50, 1, 6, 6))
    assert not model.starts_from_images and torch.equal(model.coder.dictionary.weight, before)
    with pytest.raises(ValueError, match="initial.*'singulr'.*singular"):
        make("gsae", initial="singulr")
