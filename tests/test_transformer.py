import pytest
import timm
import torch
from timm.layers import Attention
from timm.models.vision_transformer import Block
from torch import nn
from torch.nn import functional as F

from dsc import metrics, models
from dsc.activations import list_activations
from dsc.blocks import SelfAttention, attend
from dsc.observe import Observer, sparse_layers
from dsc.prox import Prox

TIMM = {"dsc_vit_tiny": "vit_tiny_patch16_224", "dsc_vit_small": "vit_small_patch16_224"}


def make(name, seed=0, **kwargs):
    torch.manual_seed(seed)
    return models.create_model(name, **kwargs)


def normal(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def layer_norm(x, norm):
    return F.layer_norm(x, norm.normalized_shape, norm.weight, norm.bias)


# Attention


def multihead(attention, dim, heads):
    """torch's own module with the parameters of ours."""
    module = nn.MultiheadAttention(dim, heads, batch_first=True).double()
    shared = attention.qkv.bias is None
    weight, bias = attention.qkv.weight, torch.zeros(3 * dim) if shared else attention.qkv.bias
    module.in_proj_weight = nn.Parameter(weight.repeat(3, 1) if shared else weight)
    module.in_proj_bias, module.out_proj = nn.Parameter(bias.double()), attention.proj
    return module


@pytest.mark.parametrize("kind", ["standard", "subspace"])
def test_attention_is_torchs(kind):
    attention = SelfAttention(24, 3, kind).double()
    x = normal(2, 7, 24)
    torch.testing.assert_close(attention(x), multihead(attention, 24, 3)(x, x, x)[0], rtol=1e-10, atol=1e-12)
    assert attention.qkv.out_features == (72 if kind == "standard" else 24)


def test_standard_attention_has_the_parameters_of_timms():
    ours, theirs = SelfAttention(24, 3).double(), Attention(24, 3, qkv_bias=True).double()
    theirs.load_state_dict(ours.state_dict())
    x = normal(2, 7, 24)
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype, tolerance", [(torch.bfloat16, 2e-2), (torch.float16, 3e-3)])
def test_half_precision_on_a_cpu_learns_as_double_precision_does(dtype, tolerance):
    inputs = normal(3, 2, 3, 9, 16).to(dtype)
    weights = normal(2, 3, 9, 16, seed=1)
    found, expected = (inputs.to(kind, copy=True).requires_grad_() for kind in (dtype, torch.float64))
    ours, exact = attend(*found), F.scaled_dot_product_attention(*expected)
    (ours * weights).sum().backward()
    (exact * weights).sum().backward()
    assert ours.dtype == dtype
    for mine, other in ((ours, exact), (found.grad, expected.grad)):
        assert (mine.double() - other).norm() < tolerance * other.norm()


# Blocks


@pytest.mark.parametrize("dim, heads, activation", [(64, 4, nn.ReLU), (192, 3, nn.GELU), (384, 6, nn.GELU)])
def test_transformer_block_of_one_step_is_the_standard_one(dim, heads, activation):
    kwargs = {"dim": dim, "num_heads": heads, "activation": activation}
    model = make("dsc_vit_pico", steps=1, depth=2, **kwargs).double().eval()
    tokens = normal(2, 9, dim)
    for ours in model.blocks:
        nn.init.normal_(ours.coder.bias, std=0.1)
        standard = Block(dim, heads, qkv_bias=True, act_layer=activation, norm_layer=nn.LayerNorm).double()
        parts = [(standard.norm1, ours.norm1), (standard.attn, ours.attention), (standard.norm2, ours.norm2)]
        for theirs, mine in [*parts, (standard.mlp.fc2, ours.decoder)]:
            theirs.load_state_dict(mine.state_dict())
        standard.mlp.fc1.load_state_dict({"weight": ours.coder.dictionary.weight, "bias": ours.coder.bias})
        torch.testing.assert_close(ours(tokens), standard(tokens), rtol=1e-12, atol=1e-12)
        assert sum(p.numel() for p in ours.parameters()) == sum(p.numel() for p in standard.parameters())


@pytest.mark.parametrize("name", TIMM)
def test_twin_has_the_blocks_of_the_vision_transformer(name):
    with torch.device("meta"):
        theirs = timm.create_model(TIMM[name])
    ours = make(name, steps=1)
    shapes = [sorted(tuple(p.shape) for p in block.parameters()) for block in ours.blocks]
    assert shapes == [sorted(tuple(p.shape) for p in block.parameters()) for block in theirs.blocks]
    assert [b.attention.num_heads for b in ours.blocks] == [b.attn.num_heads for b in theirs.blocks]


def test_transformer_block_adds_the_decoded_code():
    block = make("dsc_vit_pico", steps=3, solver="fista").double().eval().blocks[0]
    tokens = normal(2, 9, 64)
    middle = tokens + block.attention(block.norm1(tokens))
    code = block.coder.solve(layer_norm(middle, block.norm2))
    torch.testing.assert_close(block(tokens), middle + code @ block.decoder.weight.T + block.decoder.bias)


@pytest.mark.parametrize("kind", ["standard", "subspace"])
def test_attention_block_is_the_prox_of_a_residual_attention(kind):
    block = make("dsc_attn_pico", activation="soft", threshold=0.2, attention=kind).double().eval().blocks[0]
    x = normal(2, 9, 64)
    normed = layer_norm(x, block.norm)
    summed = x + multihead(block.attention, 64, 4)(normed, normed, normed)[0]
    torch.testing.assert_close(block(x), F.softshrink(summed, 0.2), rtol=1e-10, atol=1e-12)


def test_tokens_are_pixels_of_the_stem_row_by_row():
    stem = make("dsc_vit_pico").eval().stem
    x = normal(2, 3, 13, 22, dtype=torch.float32)
    pixels = stem.conv2(F.gelu(stem.conv1(x)))
    pixels = pixels + stem.position(pixels)
    assert pixels.shape[-2:] == (4, 6)
    tokens = torch.stack([pixels[:, :, i, j] for i in range(4) for j in range(6)], dim=1)
    torch.testing.assert_close(stem(x), tokens)


# CRATE


def crate_block(x, block, eta=0.1, lam=0.1):
    """The published formulas (arXiv 2306.01129), a head at a time: Z ← Z + MSSA(LN(Z)), Z ← ISTA(LN(Z)).

    Columns of a subspace's basis are rows of U here; D of the paper is `dictionary`, tokens are rows.
    """
    normed = layer_norm(x, block.norm1)
    outputs = []
    for basis in block.attention.qkv.weight.chunk(block.attention.num_heads):
        w = normed @ basis.T
        outputs.append(torch.softmax(w @ w.mT / w.shape[-1] ** 0.5, -1) @ w)
    x = x + torch.cat(outputs, -1) @ block.attention.proj.weight.T + block.attention.proj.bias
    z = layer_norm(x, block.norm2)
    dictionary = block.coder.dictionary.weight.T
    correlations, image = z @ dictionary, z @ dictionary.T
    gradient = correlations - image @ dictionary
    return torch.relu(z + eta * gradient - eta * lam)


@pytest.mark.parametrize("tokens", [9, 100])  # fewer and more rows than a Gram matrix pays for
def test_crate_is_its_published_formula(tokens):
    model = make("dsc_crate_pico").double()
    x = normal(2, tokens, 64)
    for parameter in model.blocks.parameters():  # norms and biases away from where they start
        nn.init.normal_(parameter, std=0.2)
    for block in model.blocks:
        ours, published = block(x), crate_block(x, block)
        assert 0.2 < (ours == 0).double().mean() < 0.8
        torch.testing.assert_close(ours, published, rtol=1e-10, atol=1e-12)
        weights = normal(*ours.shape, seed=1)
        parameters = list(block.parameters())
        mine, theirs = (torch.autograd.grad((y * weights).sum(), parameters) for y in (ours, published))
        for gradient, other in zip(mine, theirs, strict=True):
            torch.testing.assert_close(gradient, other, rtol=1e-8, atol=1e-9)
        x = ours.detach()


def test_crate_of_more_steps_descends_from_the_token():
    coder = make("dsc_crate_pico", steps=4).double().eval().blocks[0].coder
    x = F.layer_norm(normal(5, 64), (64,))
    dictionary, step, lam = coder.dictionary.weight.detach().T, coder.step_size().item(), 0.1
    assert step * torch.linalg.matrix_norm(dictionary, 2) ** 2 <= 1
    z, objectives = x, []
    for _ in range(4):
        z = torch.relu(z + step * ((x - z @ dictionary.T) @ dictionary - lam))
        objectives.append((x - z @ dictionary.T).square().sum(1) / 2 + lam * z.sum(1))
    torch.testing.assert_close(coder(x), z, rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(coder.trace(x).objective[:4], torch.stack(objectives), rtol=1e-6, atol=0)
    assert (torch.stack(objectives).diff(dim=0) <= 0).all()


def test_crate_code_is_seen_once_and_measured():
    model = make("dsc_crate_pico", steps=3, depth=2, dim=16).eval()
    x = normal(2, 3, 16, 16, dtype=torch.float32)
    with Observer(model) as observer, torch.no_grad():
        model(x)
        tokens = model.blocks[0](model.stem(x))
    codes = observer.features["blocks.0.coder"]
    assert torch.equal(codes[-1], tokens) and len(observer.features["blocks.1.coder"]) == 1
    figures = metrics.convergence(model, x)
    assert figures["steps/blocks.1.coder"] == 3 and figures["error/blocks.1.coder"] < 1


# Any activation


@pytest.mark.parametrize("activation", list_activations())
@pytest.mark.parametrize(
    "name, kwargs", [("dsc_crate_pico", {}), ("dsc_crate_pico", {"steps": 2}), ("dsc_attn_tiny", {})]
)
def test_every_activation_trains_on_the_tokens(name, kwargs, activation):
    shape = {"dim": 48, "depth": 1, "num_heads": 3}
    model = make(name, activation=activation, **shape, **kwargs).double()
    out = model(normal(2, 3, 16, 16))
    (out * normal(*out.shape, seed=1)).sum().backward()
    assert out.isfinite().all()
    assert all(p.grad.isfinite().all() and p.grad.any() for p in model.parameters())
    for layer in sparse_layers(model).values():
        assert layer.prox.dim == -1


@pytest.mark.parametrize("name", ["dsc_crate_pico", "dsc_attn_pico", "dsc_vit_pico"])
def test_groups_lie_within_a_token(name):
    model = make(name, activation="group_relu", group_size=4).double().eval()
    prox = next(m for m in model.modules() if isinstance(m, Prox))
    calls = []
    prox.register_forward_hook(lambda module, args, output: calls.append((args[0], args[1:], output)))
    model(normal(2, 3, 16, 16))
    z, step, output = calls[0]
    threshold = prox.threshold * (step[0] if step else 1.0)
    norms = z.unflatten(-1, (-1, 4)).norm(dim=-1)
    shrunk = (1 - threshold / norms).clamp_min(0).repeat_interleave(4, -1) * z
    torch.testing.assert_close(output, shrunk, rtol=1e-6, atol=1e-9)


# timm's ways to tokens


def test_tokens_behind_single_blocks():
    model = make("dsc_vit_pico", dim=16, depth=3).double().eval()
    x = normal(2, 3, 18, 25)
    tokens = [model.stem(x)]
    for block in model.blocks:
        tokens.append(block(tokens[-1]))
    features, maps = model.forward_intermediates(x)
    assert torch.equal(features, model.forward_features(x))
    assert [tuple(m.shape) for m in maps] == [(2, 16, 5, 7)] * 3
    for found, expected in zip(maps, tokens[1:], strict=True):
        assert torch.equal(found.flatten(2).mT, expected)
    (last,) = model.forward_intermediates(x, indices=1, norm=True, output_fmt="NLC", intermediates_only=True)
    assert torch.equal(last, features)
    early, (first,) = model.forward_intermediates(x, indices=[0], stop_early=True, output_fmt="NLC")
    assert torch.equal(first, tokens[1]) and torch.equal(early, model.norm(tokens[1]))


def test_feature_maps_of_a_published_transformer_are_its_tokens():
    x = normal(2, 1, 28, 28, dtype=torch.float32)
    whole = models.create_model("dsc_vit_pico.mnist_relu", pretrained=True).eval()
    expected = whole.forward_intermediates(x, indices=[0, 2], intermediates_only=True)
    for create in (models.create_model, timm.create_model):
        maps = create("dsc_vit_pico.mnist_relu", pretrained=True, features_only=True, out_indices=(0, 2)).eval()
        assert maps.feature_info.channels() == [64, 64] and maps.feature_info.reduction() == [4, 4]
        assert all(torch.equal(a, b) for a, b in zip(maps(x), expected, strict=True))


def test_unknown_format_of_tokens():
    with pytest.raises(ValueError, match="unknown output_fmt 'NHWC'; did you mean 'NCHW'"):
        make("dsc_vit_pico", depth=1).forward_intermediates(normal(1, 3, 8, 8), output_fmt="NHWC")


# Errors


@pytest.mark.parametrize(
    "name, kwargs, message",
    [
        ("dsc_vit_pico", {"attention": "subspce"}, "unknown attention 'subspce'; did you mean 'subspace'"),
        ("dsc_vit_tiny", {"num_heads": 5}, "num_heads=5 does not divide dim=192; nearest numbers that do: 4 or 6"),
        ("dsc_vit_pico", {"residual": False}, "residual=False .*atoms_ratio=1, got 4"),
        ("dsc_attn_pico", {"residual": False}, "residual=False .*atoms_ratio=1, got None"),
    ],
)
def test_wrong_settings_say_so(name, kwargs, message):
    with pytest.raises(ValueError, match=message):
        make(name, **kwargs)


def test_head_with_another_pooling_is_an_error():
    with pytest.raises(ValueError, match=r"global_pool of DSCTransformer must be 'avg' or '', got 'token'"):
        make("dsc_vit_pico", depth=1).reset_classifier(3, global_pool="token")
