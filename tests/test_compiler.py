import json
import math

import numpy as np
import pytest
import torch
from oracles import unfold
from torch import nn

from dsc import cli
from dsc.activations import create_activation
from dsc.dictionaries import ConvDictionary, DenseDictionary
from dsc.layers import DeepSparseCoding, SparseCoding
from dsc.learned import ALISTA
from dsc.reproduce import dsc_compiler
from dsc.shrinkage import group_relu
from dsc.solvers import FISTA, ISTA
from dsc.theory import Compiled, compile
from dsc.theory.compiler.factor import factor
from dsc.theory.compiler.units import BOUNDED, SMOOTH, pieces

EXACT = [
    {},
    {"activation": "leaky_relu"},
    {"to": "attention"},
    {"to": "transformer"},
]
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5}


def dense(features=12, atoms=20, name="soft", threshold=0.1, steps=4, seed=0, bias=True, **kwargs):
    torch.manual_seed(seed)
    act = create_activation(name, -1, threshold=threshold, **kwargs)
    return with_bias(SparseCoding(DenseDictionary(features, atoms), act, ISTA(steps), bias=bias))


def conv(channels=2, atoms=4, kernel=3, stride=1, padding=1, name="soft", threshold=0.1, steps=3, seed=0, **kwargs):
    torch.manual_seed(seed)
    act = create_activation(name, 1, threshold=threshold, **kwargs)
    return with_bias(
        SparseCoding(ConvDictionary(channels, atoms, kernel, stride, padding), act, ISTA(steps), bias=True)
    )


def with_bias(layer):
    if layer.bias is not None:
        nn.init.uniform_(layer.bias, -0.05, 0.05)
    return layer.double().eval()


def signals(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def error(network, layer, x):
    with torch.no_grad():
        expected = layer(x)
        assert expected.any()  # zero codes would prove nothing
        return float((network(x) - expected).abs().max())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", ["soft", "relu"])
@pytest.mark.parametrize("features, atoms", [(12, 20), (12, 7)])
def test_exact_networks_of_dense_dictionaries(features, atoms, name, dtype):
    layer, x = dense(features, atoms, name, steps=16), signals(5, features)
    layer, x = layer.to(dtype), x.to(dtype)
    images = [{"size": (3, 4)}, {"size": (2, 3)}, {"size": (3, 4), "kernel_size": 2}]
    for options in [*EXACT, {"kernel_size": 2}, {"kernel_size": 5}, *images]:
        assert error(compile(layer, **options), layer, x) <= TOLERANCE[dtype], options


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", ["soft", "relu"])
@pytest.mark.parametrize("kernel, stride, padding", [(3, 1, 1), (3, 1, 0), (4, 2, 1), (5, 2, 2), (2, 3, 0)])
def test_exact_networks_of_convolutional_dictionaries(kernel, stride, padding, name, dtype):
    layer = conv(2, 4, kernel, stride, padding, name, steps=4).to(dtype)
    for size in ((4, 4), (5, 4)):  # strides leave remainders of some of them
        x = signals(3, 2, *size).to(dtype)
        for options in EXACT:
            assert error(compile(layer, size=size, **options), layer, x) <= TOLERANCE[dtype], (size, options)


@pytest.mark.parametrize("options", EXACT)
def test_exact_networks_of_chains(options):
    for parts in (
        [dense(8, 12, seed=1), dense(12, 6, "relu", 0.02, seed=2), dense(6, 9, "soft", 0.004, seed=3)],
        [conv(1, 3, 3, 1, 1, seed=1), conv(3, 4, 4, 2, 1, "relu", 0.02, seed=2), conv(4, 3, 2, 1, 0, "soft", 0.004)],
    ):
        chain, is_conv = DeepSparseCoding(parts), isinstance(parts[0].dictionary, ConvDictionary)
        x = signals(3, 1, 6, 7) if is_conv else signals(3, 8)
        size = {"size": (6, 7)} if is_conv else {}
        assert error(compile(chain, **size, **options), chain, x) <= 1e-10


@pytest.mark.parametrize("name", ["soft", "relu", "elastic"])
def test_thresholds_by_channel(name):
    layer = conv(2, 3, name=name, threshold=[0.05, 0.1, 0.4])
    flat = dense(6, 5, name, [0.05, 0.1, 0.4, 0.0, 0.2])
    options = EXACT[:2] if name == "elastic" else EXACT
    for one, x, size in ((layer, signals(2, 2, 5, 5), {"size": (5, 5)}), (flat, signals(4, 6), {})):
        for option in options:
            assert error(compile(one, **size, **option), one, x) <= 1e-10


@pytest.mark.parametrize("name", ["elastic", "group_relu", "group_relu_nonneg", "sparse_group"])
def test_other_prox_that_are_piecewise_linear(name):
    layer = dense(6, 9, name, **({} if name == "elastic" else {"group_size": 1}))
    for options in EXACT:
        assert error(compile(layer, **options), layer, signals(4, 6)) <= 1e-10


def test_momentum_is_linear():
    for layer, x in ((dense(6, 9, steps=9), signals(4, 6)), (conv(steps=6), signals(2, 2, 5, 6))):
        layer.solver = FISTA(layer.solver.steps)
        for options in EXACT[:2]:
            assert error(compile(layer, **options), layer, x) <= 1e-10


@pytest.mark.parametrize("step", ["learned", 0.3])
def test_steps_are_those_of_evaluation(step):
    layer = SparseCoding(DenseDictionary(6, 9), create_activation("soft", -1), ISTA(5), step=step).double().train()
    network = compile(layer)
    assert layer.training
    assert error(network, layer.eval(), signals(4, 6)) <= 1e-10


def test_leading_dimensions_are_kept():
    layer = dense(6, 9)
    x = signals(2, 3, 6)
    for options in EXACT:
        network = compile(layer, **options)
        assert network(x).shape == (2, 3, 9) and error(network, layer, x) <= 1e-10
        assert network(x[0, 0]).shape == (9,)


def test_zeros_are_zeros():
    layer, x = dense(12, 20, threshold=0.3, steps=8), signals(20, 12)
    for options in ({}, {"to": "attention"}, {"to": "transformer"}):
        with torch.no_grad():
            assert torch.equal(compile(layer, **options)(x) == 0, layer(x) == 0)


def test_a_cnn_is_convolutions_and_relu_alone():
    kinds = {nn.Conv1d, nn.Conv2d, nn.ConvTranspose2d, nn.ReLU}
    for layer, options in ((dense(), {}), (dense(), {"kernel_size": 3, "size": (3, 4)}), (conv(), {})):
        network = compile(layer, **options).network
        assert type(network) is nn.Sequential and {type(module) for module in network} <= kinds


def test_depth_width_and_parameters():
    network = compile(dense(12, 20, steps=4))
    # z in two channels an atom, x in two an entry; a step each, and what decodes the code.
    assert (network.depth, network.width) == (5, 2 * 20 + 2 * 12)
    assert network.num_parameters == 64 * 13 + 2 * 64 * 65 + 40 * 65 + 20 * 41
    nonneg = compile(dense(12, 7, "relu", steps=4))
    assert (nonneg.depth, nonneg.width) == (4, 7 + 2 * 7)  # sDᵀx is smaller than x, and the code needs no decoding
    tied = compile(dense(12, 20, steps=4), "transformer")
    assert (tied.depth, tied.width) == (1 + 3 * 4 + 1, 2 + 32)
    assert tied.num_parameters == compile(dense(12, 20, steps=9), "transformer").num_parameters
    assert f"parameters={network.num_parameters}" in repr(network)


@pytest.mark.parametrize("lengths", [(27,), (20,), (7,), (6, 9), (5, 4), (1, 8)])
@pytest.mark.parametrize("size", [2, 3])
def test_small_kernels_are_as_many_as_the_logarithm(lengths, size):
    kernel, x = signals(5, 2, *lengths), signals(3, 2, *lengths, seed=1)
    factors, last = factor(kernel, size)
    convolve = nn.functional.conv1d if len(lengths) == 1 else nn.functional.conv2d
    for part in factors:
        assert max(part.kernel.shape[2:]) <= size
        x = convolve(x, part.kernel, stride=part.stride, padding=part.padding)
    assert len(factors) + 1 == max(math.ceil(round(math.log(n, size), 9)) for n in lengths)
    assert max(last.shape[2:]) <= size
    expected = torch.einsum("oc...,bc...->bo", kernel.flatten(2), signals(3, 2, *lengths, seed=1).flatten(2))
    torch.testing.assert_close(convolve(x, last).flatten(1), expected)


def test_small_kernels_have_as_many_channels_as_blocks_need():
    kernel = signals(1, 1, 1).expand(1, 1, 64)  # a sum: every block needs its sum alone
    factors, last = factor(kernel, 4)
    assert [part.kernel.shape[0] for part in factors] == [1, 1] and last.shape == (1, 1, 4)


@pytest.mark.parametrize("name", [*SMOOTH, *BOUNDED])
def test_units_come_near_a_kink_like_one_over_r(name):
    reach, scales = 2.0, [8.0, 16.0, 32.0, 64.0]
    errors = []
    for scale in scales:
        grid = torch.arange(-800, 801).double()  # 0 is the kink
        grid = torch.cat([grid / 200 / scale, grid * reach / 800])
        made = pieces(name, scale, reach, torch.finfo(torch.float64).eps)
        values = {}
        for what in ("positive", "identity"):
            unit = getattr(made, what)
            values[what] = made.activation()(grid.unsqueeze(1) * unit.gain + unit.offset.squeeze(1)) @ unit.weight[:, 0]
        errors.append(float((values["positive"] - grid.relu()).abs().max()))
        assert errors[-1] <= made.positive_error * (1 + 1e-9)
        assert errors[-1] >= 0.9 * made.positive_error  # no figure is looser than it need be
        assert (values["identity"] - grid).abs().max() <= made.identity_error + 1e-14
    assert np.polyfit(np.log(scales), np.log(errors), 1)[0] == pytest.approx(-1, abs=0.02)


@pytest.mark.parametrize("name", [*SMOOTH, *BOUNDED])
@pytest.mark.parametrize("prox", ["soft", "relu"])
def test_other_activations_stay_within_their_bound(name, prox):
    x = nn.functional.normalize(signals(4, 8))
    images = nn.functional.normalize(signals(2, 2, 5, 6).flatten(1)).view(2, 2, 5, 6)
    reach = {"reach": 2.0} if name in BOUNDED else {}
    chain = DeepSparseCoding([dense(8, 10, prox, 0.05), dense(10, 6, prox, 0.01)])
    for layer, data, extra in (
        (dense(8, 10, prox), x, {}),
        (dense(8, 5, prox), x, {"kernel_size": 2}),
        (chain, x, {}),
        (conv(name=prox), images, {}),
    ):
        errors = []
        for scale in (8.0, 32.0):
            network = compile(layer, activation=name, scale=scale, **reach, **extra)
            with torch.no_grad():
                errors.append((network(data) - layer(data)).flatten(1).norm(dim=1))
            assert errors[-1].max() > 0 and (errors[-1] <= network.bound(data)).all()
        assert errors[1].max() < 0.75 * errors[0].max()


def test_exact_networks_have_bound_zero():
    layer = dense()
    for options in EXACT:
        assert not compile(layer, **options).bound(signals(4, 12)).any()
        assert compile(layer, **options).part_error == 0


@pytest.mark.parametrize("to", ["attention", "transformer"])
@pytest.mark.parametrize("name", ["soft", "relu"])
def test_softmax_comes_near_by_the_square_of_its_temperature_until_rounding_meets_it(to, name):
    layer, x = dense(6, 10, name), signals(4, 6)
    temperatures, errors = [10.0**k for k in range(1, 8)], []
    for temperature in temperatures:
        network = compile(layer, to, temperature=temperature)
        with torch.no_grad():
            found = (network(x) - layer(x)).norm(dim=1)
        assert (found <= network.bound(x)).all()
        errors.append(float(found.max()))
    assert np.polyfit(np.log(temperatures[:3]), np.log(errors[:3]), 1)[0] == pytest.approx(-2, abs=0.05)
    assert 3 <= np.argmin(errors) <= 5 and min(errors) < 1e-8  # eps^(2/3) at T of about eps^(-1/3)
    assert errors[-1] > 10 * min(errors)


def test_attention_is_the_gradient_step_written_with_matrices():
    layer, x = conv(1, 2, 3, 2, 1, steps=1), signals(2, 1, 4, 5)
    z = compile(layer, "transformer", size=(4, 5))(x)
    matrix = unfold(layer.dictionary, (4, 5))
    bias = layer.bias.detach().repeat_interleave(6)
    u = layer.step_size() * (x.flatten(1) @ matrix + bias)
    torch.testing.assert_close(z.flatten(1), nn.functional.softshrink(u, 0.1 * float(layer.step_size())))


@pytest.mark.parametrize("name", ["group_relu", "group_relu_nonneg", "sparse_group"])
def test_groups_are_approximated_only_on_demand(name):
    layer, x = dense(6, 8, name, 0.3, steps=3, group_size=2), nn.functional.normalize(signals(4, 6))
    with pytest.raises(TypeError, match="group shrinkage is not piecewise linear.*approximate=True"):
        compile(layer)
    errors = []
    for scale in (6.0, 24.0):
        network = compile(layer, scale=scale, reach=1.5, approximate=True)
        assert network.measured and network.part_error > 0
        with torch.no_grad():
            found = (network(x) - layer(x)).norm(dim=1)
        assert (found <= network.bound(x)).all()  # a figure and no bound, yet it holds here
        errors.append(network.part_error)
    assert errors[1] < errors[0] / 6


def test_the_measured_error_of_groups_is_that_of_their_shrinkage():
    layer = dense(6, 8, "group_relu", [0.1, 0.3, 0.5, 0.7], steps=1, group_size=2, bias=False)
    layer.dictionary = DenseDictionary.from_atoms(torch.eye(8).double())
    network = compile(layer.eval(), scale=16.0, reach=2.0, approximate=True)
    u = 2 * torch.rand(4000, 8, generator=torch.Generator().manual_seed(0)).double().square() - 0.5
    with torch.no_grad():
        found = float((network(u) - group_relu(u, torch.tensor([[0.1], [0.3], [0.5], [0.7]]).double(), 2)).abs().max())
    assert 0.5 * network.part_error <= found <= 1.1 * network.part_error


@pytest.mark.parametrize("name", ["hard", "jump_relu", "top_k", "gelu"])
def test_a_prox_that_no_network_computes(name):
    kwargs = {"k": 2} if name == "top_k" else {}
    layer = SparseCoding(DenseDictionary(6, 8), create_activation(name, -1, **kwargs), ISTA(2))
    reason = {"top_k": "TopK keeps the largest of a code", "gelu": "no prox, and has no threshold"}
    expected = reason.get(name, "jumps at its threshold")
    with pytest.raises(TypeError, match=f"cannot express this activation: .*{expected}.*take soft, relu or elastic"):
        compile(layer)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"to": "rnn"}, "unknown network 'rnn'.*Known: attention, cnn, transformer"),
        ({"activation": "gelus"}, "unknown activation 'gelus'; did you mean 'gelu'"),
        ({"activation": "gelu"}, "activation='gelu' is approximate here: give scale"),
        ({"activation": "gelu", "scale": 0.0}, "scale must be finite and above 0, got 0.0"),
        ({"activation": "gelu", "scale": -1.0}, "scale must be finite and above 0, got -1.0"),
        ({"activation": "tanh", "scale": 4.0}, "activation='tanh' is approximate here: give reach"),
        ({"activation": "relu", "scale": 4.0}, "scale=4.0 has no effect here.*activation='relu' is exact"),
        ({"activation": "gelu", "scale": 4.0, "reach": 1.0}, "reach=1.0 has no effect here"),
        ({"temperature": 0.0, "to": "attention"}, "temperature must be finite and above 0, got 0.0"),
        ({"temperature": math.inf, "to": "attention"}, "temperature must be finite and above 0, got inf"),
        ({"temperature": 9.0}, 'temperature=9.0 has no effect here: it belongs to to="attention"'),
        ({"to": "attention", "activation": "gelu"}, "activation='gelu' belongs to to=\"cnn\""),
        ({"to": "attention", "kernel_size": 2}, "kernel_size=2 has no effect here"),
        ({"kernel_size": 1}, "kernel_size must be at least 2"),
        ({"size": (5, 2)}, r"size=\(5, 2\) does not fit signals of 12 entries"),
        ({"approximate": True}, "approximate=True is for groups"),
    ],
)
def test_wrong_options(options, message):
    with pytest.raises(ValueError, match=message):
        compile(dense(), **options)


def test_wrong_models():
    layer = dense()
    with pytest.raises(TypeError, match="takes a SparseCoding or DeepSparseCoding, got Linear"):
        compile(nn.Linear(2, 2))
    with pytest.raises(TypeError, match="ALISTA has another one"):
        compile(ALISTA(DenseDictionary(6, 8), create_activation("soft", -1)))
    with pytest.raises(ValueError, match="joint=False"):
        compile(DeepSparseCoding([dense()], joint=True))
    with pytest.raises(ValueError, match="do not chain: layer 0 has codes of 20 channels, and layer 1 takes.* 12"):
        compile(DeepSparseCoding([dense(), dense()]))
    with pytest.raises(TypeError, match="all dense or all convolutional"):
        compile(DeepSparseCoding([dense(), conv()]))
    for solver, message in ((ISTA(9, tol=1e-3), "fixed depth"), (FISTA(9, restart=True), "restart=False")):
        layer.solver = solver
        with pytest.raises(ValueError, match=message):
            compile(layer)
    layer.solver = FISTA(4)
    with pytest.raises(ValueError, match="attention takes ISTA"):
        compile(layer, "attention")
    with pytest.raises(ValueError, match="with kernel_size=2 the compiler takes a padding of at most 0"):
        compile(conv(kernel=2))
    with pytest.raises(ValueError, match=r"give size=\(height, width\)"):
        compile(conv(), "transformer")
    with pytest.raises(ValueError, match="elastic net with λ per channel"):
        compile(dense(2, 2, "elastic", [0.1, 0.2]), "attention")


def test_wrong_shapes():
    with pytest.raises(ValueError, match=r"signals of shape \(3, 11\) do not fit: expected 12 in dimension -1"):
        compile(dense())(signals(3, 11))
    with pytest.raises(ValueError, match=r"signals of shape \(3, 1, 6, 6\) do not fit: expected 2 in dimension -3"):
        compile(conv())(signals(3, 1, 6, 6))
    with pytest.raises(ValueError, match=r"compiled for images of shape \(2, 6, 6\), got \(2, 7, 6\)"):
        compile(conv(), "attention", size=(6, 6))(signals(3, 2, 7, 6))
    with pytest.raises(ValueError, match=r"images of 7×6 pixels leave other remainders.*size=\(7, 6\)"):
        compile(conv(kernel=4, stride=2))(signals(3, 2, 7, 6))
    with pytest.raises(ValueError, match="images of 1×6 pixels are too small"):
        compile(conv(padding=0))(signals(3, 2, 1, 6))


def test_compiling_leaves_everything_as_it_was():
    layer = dense().train()
    before, stream = {k: v.clone() for k, v in layer.state_dict().items()}, torch.get_rng_state()
    for options in EXACT:
        compile(layer, **options)
    assert torch.equal(torch.get_rng_state(), stream) and layer.training
    assert all(torch.equal(value, before[key]) for key, value in layer.state_dict().items())


@pytest.mark.parametrize("kind", ["dense", "conv", "attention", "softmax transformer"])
def test_networks_run_in_onnx_runtime_at_any_batch(kind, tmp_path):
    runtime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    small = {"activation": "gelu", "scale": 8.0, "kernel_size": 2, "size": (2, 3)}
    layer, x, options = {
        "dense": (dense(6, 8, steps=2), signals(2, 6), small),
        "conv": (conv(steps=2), signals(2, 2, 5, 6), {}),
        "attention": (conv(steps=2), signals(2, 2, 4, 4), {"to": "attention", "size": (4, 4)}),
        "softmax transformer": (dense(6, 8, steps=2), signals(2, 6), {"to": "transformer", "temperature": 10.0}),
    }[kind]
    network, path = compile(layer.float(), **options), tmp_path / "network.onnx"
    shapes = ({0: torch.export.Dim("batch")},)
    torch.onnx.export(network, (x.float(),), path, dynamo=True, dynamic_shapes=shapes, verbose=False)
    session = runtime.InferenceSession(path)
    for count in (1, 2, 5):
        data = signals(count, *x.shape[1:], seed=count).float()
        (got,) = session.run(None, {session.get_inputs()[0].name: data.numpy()})
        with torch.no_grad():
            torch.testing.assert_close(torch.from_numpy(got), network(data), rtol=1e-4, atol=1e-5)


TINY = dsc_compiler.Settings(
    side=4,
    atoms=18,
    channels=2,
    steps=3,
    signals=4,
    scales=(16, 64),
    bounded_scales=(8, 16),
    group_scales=(4, 8),
    temperatures=(10.0, 100.0),
)


def test_the_experiment(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(dsc_compiler, "FAST", TINY)
    cli.main(["reproduce", "dsc_compiler", "--fast", "--out", str(tmp_path)])
    found = json.loads((tmp_path / "dsc_compiler.json").read_text())
    rows = found["networks"]
    exact = [row for row in rows if row["bound"] == 0]
    assert len(exact) == 17 and {row["dictionary"] for row in exact} == set(dsc_compiler.models(TINY, 0))
    assert all(row["error"] <= 1e-10 and row["error_float32"] <= 1e-5 and row["code"] > 1e-3 for row in exact)
    assert all(row["error"] <= row["bound"] for row in rows if row["bound"] > 0)
    assert all(abs(one["slope"] + 1) < 0.02 for one in found["shrinkage"].values())
    table = (tmp_path / "dsc_compiler.md").read_text()
    assert table.strip() in capsys.readouterr().out
    row = next(row for row in exact if row["network"] == "CNN, relu")
    line = next(line for line in table.splitlines() if "| CNN, relu " in line).split("|")
    assert line[3].strip() == str(row["depth"]) and line[5].strip() == f"{row['parameters']:,}"
    assert (tmp_path / "dsc_compiler.png").read_bytes().startswith(b"\x89PNG")


def test_a_compiled_network_is_a_module():
    network = compile(dense())
    assert isinstance(network, Compiled) and not network.training
    other = compile(dense(seed=1))
    other.load_state_dict(network.state_dict())
    x = signals(3, 12)
    assert torch.equal(other(x), network(x))
