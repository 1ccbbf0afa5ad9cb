import copy
import pickle

import pytest
import torch
from oracles import GROUPED, operator_norm, unfold
from torch import nn

from dsc import layers
from dsc.activations import create_activation
from dsc.dictionaries import ConvDictionary, DenseDictionary, Dictionary
from dsc.layers import DeepSparseCoding, SparseCoding
from dsc.measures import relative_error
from dsc.shrinkage import group_relu
from dsc.solvers import FISTA, ISTA

NAMES = ["relu", "soft", "group_relu", "group_relu_nonneg"]


def activation(name, threshold=0.25, dim=1):
    return create_activation(name, dim, threshold=threshold, group_size=2 if GROUPED[name] else None)


def conv(channels=2, atoms=4, kernel=3, stride=1, padding=1, name="soft", threshold=0.25, seed=0, **kwargs):
    torch.manual_seed(seed)
    dictionary = ConvDictionary(channels, atoms, kernel, stride, padding)
    layer = SparseCoding(dictionary, activation(name, threshold), **kwargs)
    return with_bias(layer)


def dense(features=6, atoms=8, name="soft", threshold=0.25, dim=-1, seed=0, **kwargs):
    torch.manual_seed(seed)
    layer = SparseCoding(DenseDictionary(features, atoms), activation(name, threshold, dim), **kwargs)
    return with_bias(layer)


def with_bias(layer):
    if layer.bias is not None:
        nn.init.uniform_(layer.bias, -0.05, 0.05)
    return layer


def chain(joint, steps=1, solver=None, **kwargs):
    parts = [
        conv(2, 4, 3, 1, 1, threshold=0.05, seed=1, solver=ISTA(steps), **kwargs),
        conv(4, 6, 3, 2, 0, "group_relu", 0.01, seed=2, solver=ISTA(steps), **kwargs),
        conv(6, 3, 2, 1, 0, "relu", 0.001, seed=3, solver=ISTA(steps), **kwargs),
    ]
    return DeepSparseCoding(parts, solver or ISTA(steps), joint)


def signals(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("name", ["relu", "group_relu"])
def test_one_step_of_size_one_is_a_layer_of_a_network(name, stride, bias, dtype):
    act = nn.ReLU() if name == "relu" else lambda z: group_relu(z, 0.25, 2)
    threshold = 0.0 if name == "relu" else 0.25
    pairs = [
        (
            conv(3, 8, 5, stride, 2, name, threshold, step=1, bias=bias),
            nn.Conv2d(3, 8, 5, stride, 2),
            (2, 3, 9, 8),
        ),
        (dense(7, 8, name, threshold, step=1, bias=bias), nn.Linear(7, 8), (2, 7)),
    ]
    for layer, plain, shape in pairs:
        layer, plain = layer.to(dtype), plain.to(dtype)
        plain.weight = layer.dictionary.weight
        plain.bias = layer.bias
        x = signals(*shape).to(dtype)
        # A fused bias, or strides by phases, round in another order; the rest is the same to the last bit.
        tolerance = 32 * torch.finfo(dtype).eps if bias or stride > 1 else 0
        torch.testing.assert_close(layer(x), act(plain(x)), rtol=tolerance, atol=tolerance)


def test_tokens_are_coded_like_rows():
    for name in NAMES:
        layer = dense(name=name, bias=True, solver=FISTA(5)).double().eval()
        tokens = signals(2, 3, 6)
        torch.testing.assert_close(layer(tokens).flatten(0, 1), layer(tokens.flatten(0, 1)))
        torch.testing.assert_close(
            layer.objective(tokens, layer(tokens)),
            layer.objective(tokens.flatten(0, 1), layer(tokens.flatten(0, 1))).view(2, 3).sum(1),
        )


def test_a_fixed_step_is_used_as_given():
    x, layer = signals(2, 6), dense(step=0.3, solver=ISTA(2)).double()
    matrix = layer.dictionary.weight.detach().T
    z = torch.zeros(2, 8).double()
    for _ in range(2):
        z = nn.functional.softshrink(z + 0.3 * (x - z @ matrix.T) @ matrix, 0.3 * 0.25)
    torch.testing.assert_close(layer(x), z)


@pytest.mark.parametrize("make", [conv, dense])
def test_lipschitz_step_is_at_most_the_inverse_of_the_norm(make):
    layer = make().double().eval()
    assert 0.95 / operator_norm(layer.dictionary) <= layer.step_size() <= 1 / operator_norm(layer.dictionary)


@pytest.mark.parametrize("make", [conv, dense])
def test_learned_step_stays_between_zero_and_the_inverse_of_the_norm(make):
    layer = make(step="learned").double().eval()
    limit = 1 / layer.dictionary.curvature()
    torch.testing.assert_close(layer.step_size().detach(), 0.9 * limit)
    for value in (-50.0, -3.0, 0.0, 3.0, 50.0):
        nn.init.constant_(layer.relative_step, value)
        assert 0 < layer.step_size() <= limit <= 1 / operator_norm(layer.dictionary)


def test_learned_step_learns_to_use_the_best_step():
    layer, x = dense(10, 6, name="soft", step="learned", solver=ISTA(4)).double().eval(), signals(32, 10)
    layer.objective(x, layer(x)).mean().backward()
    gradient = layer.relative_step.grad.item()
    values = []
    for delta in (-1e-5, 1e-5):
        with torch.no_grad():
            layer.relative_step += delta
            values.append(layer.objective(x, layer(x)).mean().item())
            layer.relative_step -= delta
    assert gradient == pytest.approx((values[1] - values[0]) / 2e-5, rel=1e-4)


@pytest.mark.parametrize("solver", [ISTA(4), FISTA(4)])
@pytest.mark.parametrize("make,shape", [(conv, (1, 2, 5, 4)), (dense, (2, 6))])
def test_gradients_of_the_unrolled_solver_match_finite_differences(make, shape, solver):
    layer = make(name="soft", step=0.2, bias=True, solver=solver).double().eval()
    weights = {name: p.detach().requires_grad_() for name, p in layer.named_parameters()}

    def call(x, *values):
        return torch.func.functional_call(layer, dict(zip(weights, values, strict=True)), x)

    assert torch.autograd.gradcheck(call, (signals(*shape).requires_grad_(), *weights.values()))


@pytest.mark.parametrize("joint", [False, True])
def test_gradients_of_a_chain_match_finite_differences(joint):
    parts = [
        conv(1, 2, 2, 1, 1, step=0.2, bias=True),
        conv(2, 3, 2, 2, 0, "relu", step=0.2, bias=True, seed=1),
    ]
    deep = DeepSparseCoding(parts, FISTA(3), joint).double().eval()
    weights = {name: p.detach().requires_grad_() for name, p in deep.named_parameters()}

    def call(x, *values):
        return torch.func.functional_call(deep, dict(zip(weights, values, strict=True)), x)

    assert torch.autograd.gradcheck(call, (signals(1, 1, 4, 3).requires_grad_(), *weights.values()))


@pytest.mark.parametrize("solver", [ISTA(6), FISTA(6), FISTA(30, restart=True)])
@pytest.mark.parametrize("kind", ["dense", "tokens", "gram", "conv"])
def test_codes_do_not_depend_on_the_blocks_they_are_solved_in(kind, solver, monkeypatch):
    layer, x = {
        "dense": lambda: (dense(bias=True, solver=solver), signals(11, 6)),
        "tokens": lambda: (dense(bias=True, solver=solver), signals(11, 3, 6)),
        "gram": lambda: (dense(8, 4, solver=solver), signals(11, 8)),
        "conv": lambda: (conv(name="group_relu", bias=True, solver=solver), signals(11, 2, 5, 4)),
    }[kind]()
    layer = layer.double().eval()
    expected = layer(x).detach()
    monkeypatch.setattr(layers, "BLOCK_BYTES", 3 * expected[0].nbytes // torch.get_num_threads())
    with torch.no_grad():
        assert layers.rows_in_cache(expected) == 3
        torch.testing.assert_close(layer(x), expected)
        halfway = layer.solve(x, ISTA(3))
        torch.testing.assert_close(layer.solve(x, ISTA(4), start=halfway), layer.trace(x, 7, ISTA).codes[-1])
    assert layers.rows_in_cache(expected) is None  # a graph has to hold every step anyway


@pytest.mark.parametrize("gradient", ["unroll", "checkpoint", "last"])
@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("kind", ["dense", "conv", "joint"])
def test_a_fixed_depth_never_waits_for_the_device(kind, train, gradient):
    # A tensor on the meta device has no value that the host could ask for.
    model, x = network(kind, solver=FISTA(4, restart=True, gradient=gradient))
    model, x = model.train(train).to("meta"), x.to("meta")
    model(x).sum().backward()
    with torch.no_grad():
        model(x)


@pytest.mark.parametrize("train", [True, False])
def test_channels_last_images_give_channels_last_codes(train):
    layer = conv(3, 8, solver=FISTA(3)).train(train)
    x = torch.randn(2, 3, 8, 8)
    expected = copy.deepcopy(layer)(x)
    got = layer(x.to(memory_format=torch.channels_last))
    assert got.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("make,shape", [(dense, (3, 6)), (conv, (3, 2, 5, 4))])
@pytest.mark.parametrize("name", NAMES)
def test_a_trace_says_how_near_its_codes_are(name, make, shape):
    layer, x = make(name=name).double().eval(), signals(*shape)
    trace = layer.trace(x, 40, FISTA)
    assert len(trace.codes) == 40
    minimum = layer.objective(x, layer.reference(x, tol=1e-12, max_steps=3000))
    for k, z in enumerate(trace.codes):
        assert torch.equal(trace.objective[k], layer.objective(x, z))
        assert (trace.objective[k] * (1 - trace.gap[k]) <= minimum + 1e-12).all()
        moved = layer.solve(x, ISTA(1), start=z) - z
        torch.testing.assert_close(trace.residual[k], moved.flatten(1).norm(dim=1) / z.flatten(1).norm(dim=1))
        assert trace.support_size[k].tolist() == [int(code.count_nonzero()) for code in z]
        before = trace.codes[k - 1] if k else torch.zeros_like(z)
        changed = [int(((a != 0) != (b != 0)).sum()) for a, b in zip(before, z, strict=True)]
        assert trace.support_change[k].tolist() == changed
    assert (trace.gap[-1] < trace.gap[0] / 4).all()


def test_a_trace_has_no_gap_where_none_is_defined():
    x = signals(3, 6)
    assert dense(bias=True).double().trace(x, 2).gap is None
    layer = SparseCoding(DenseDictionary(6, 8), create_activation("hard", -1, threshold=0.1)).double()
    assert layer.trace(x, 2).gap is None and layer.trace(x, 2).objective.isfinite().all()
    layer = SparseCoding(DenseDictionary(6, 8), create_activation("gelu", -1)).double()
    trace = layer.trace(x, 2)
    assert trace.gap is None and trace.residual.shape == (2, 3)
    with pytest.raises(TypeError, match="no prox: it has no penalty"):
        _ = trace.objective


def test_a_trace_is_of_the_layer_s_own_kind_of_solver_and_takes_all_its_steps():
    x = signals(3, 6)
    layer = dense(solver=FISTA(50, tol=0.5, restart=True, gradient="implicit")).double().eval()
    codes = layer.trace(x, 20).codes
    assert len(codes) == 20
    assert torch.equal(codes[-1], layer.solve(x, FISTA(20, restart=True)))


def test_decode_is_synthesis_at_the_size_of_the_signal():
    layer = conv(2, 4, 3, 2, 0).double()
    z = signals(2, 4, 3, 3)
    torch.testing.assert_close(layer.decode(z, (8, 7)).flatten(1), z.flatten(1) @ unfold(layer.dictionary, (8, 7)).T)


def test_greedy_mode_composes_the_layers():
    deep, x = chain(joint=False, steps=3, bias=True).double().eval(), signals(2, 2, 9, 8)
    first, second, third = deep
    expected = [first(x), second(first(x)), third(second(first(x)))]
    assert all(torch.equal(z, e) for z, e in zip(deep.codes(x), expected, strict=True))
    assert torch.equal(deep(x), expected[-1])


@pytest.mark.parametrize("step", ["lipschitz", "learned", 0.3, 1])
def test_one_joint_step_is_the_greedy_network(step):
    x = signals(2, 2, 9, 8)
    greedy, joint = (chain(mode, bias=True, step=step).double().eval() for mode in (False, True))
    joint.load_state_dict(greedy.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(joint.codes(x), greedy.codes(x), strict=True))


@pytest.mark.parametrize("step", ["lipschitz", 0.2])
@pytest.mark.parametrize("solver", [ISTA(5), FISTA(5)])
def test_joint_mode_is_multilayer_ista_on_matrices(solver, step):
    deep, x = chain(True, bias=True, step=step).double().eval(), signals(2, 2, 8, 8)
    sizes = [(8, 8), (8, 8), (3, 3)]
    matrices = [unfold(layer.dictionary, size) for layer, size in zip(deep, sizes, strict=True)]
    shapes = [z.shape for z in deep.codes(x)]
    codes = [torch.zeros(shape).double().flatten(1) for shape in shapes]
    point, old, t = codes[-1], codes[-1], 1.0
    record = []
    for _ in range(solver.steps):  # Sulam et al., arXiv 1806.00701, algorithm 2
        estimates = [point]
        for matrix in reversed(matrices):
            estimates.insert(0, estimates[0] @ matrix.T)
        below = x.flatten(1)
        for i, (layer, matrix) in enumerate(zip(deep, matrices, strict=True)):
            s = layer.step_size()
            moved = estimates[i + 1] - s * (estimates[i + 1] @ matrix.T - below) @ matrix
            moved = moved.view(shapes[i]) + s * layer.bias.view(-1, 1, 1)
            below = codes[i] = layer.prox(moved, s).flatten(1)
        following = (1 + (1 + 4 * t**2) ** 0.5) / 2 if isinstance(solver, FISTA) else 1.0
        point, old, t = below + (t - 1) / following * (below - old), below, following
        record.append(below)
    trace = []
    for got, expected in zip(deep.solve(x, solver, trace), codes, strict=True):
        torch.testing.assert_close(got.flatten(1), expected, rtol=1e-6, atol=1e-7)
    for got, expected in zip(trace, record, strict=True):
        torch.testing.assert_close(got.flatten(1), expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("joint", [False, True])
def test_every_final_code_passes_its_layer_once(joint):
    deep, seen = chain(joint, steps=4), []
    for layer in deep:
        layer.code.register_forward_hook(lambda module, inputs, output: seen.append(output))
    codes = deep.codes(torch.randn(2, 2, 8, 8))
    assert [id(z) for z in seen] == [id(z) for z in codes]
    seen.clear()
    assert torch.equal(deep(torch.randn(2, 2, 8, 8)), seen[2])
    assert len(seen) == 3


def network(kind, name="group_relu", solver=None):
    arguments = {"name": name, "bias": True, "solver": solver or FISTA(3, restart=True), "step": "learned"}
    return {
        "dense": lambda: (dense(**arguments), torch.randn(3, 6)),
        "conv": lambda: (conv(stride=2, **arguments), torch.randn(3, 2, 8, 7)),
        "greedy": lambda: (chain(False, 2, bias=True), torch.randn(3, 2, 8, 8)),
        "joint": lambda: (chain(True, 2, solver, bias=True), torch.randn(3, 2, 8, 8)),
    }[kind]()


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("kind", ["dense", "conv", "greedy", "joint"])
def test_compiled_code_and_gradients_equal_eager(kind, train):
    model, x = network(kind)
    eager, twin = model.train(train), copy.deepcopy(model)
    torch.compiler.reset()
    compiled = torch.compile(twin, backend="aot_eager", fullgraph=True)
    for _ in range(2):  # the second call meets what the first left behind
        expected, got = eager(x), compiled(x)
        torch.testing.assert_close(got, expected)
        expected.square().sum().backward()
        got.square().sum().backward()
    for p, q in zip(eager.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(q.grad, p.grad, rtol=1e-4, atol=1e-5)


def test_compiled_code_follows_weights_loaded_in_eval_mode():
    model, x = network("conv")
    state = {k: 3 * v if k == "dictionary.weight" else v for k, v in model.state_dict().items()}
    model.eval().load_state_dict(state)
    torch.compiler.reset()
    got = torch.compile(model, backend="aot_eager", fullgraph=True)(x)
    torch.testing.assert_close(got, model(x))


@pytest.mark.parametrize("kind", ["conv", "joint"])
def test_exported_program_serves_any_batch(kind):
    model, x = network(kind)
    model.eval()
    program = torch.export.export(model, (x,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    for batch in (2, 5):
        other = torch.randn(batch, *x.shape[1:])
        torch.testing.assert_close(program.module()(other), model(other))


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("kind", ["dense", "conv", "joint"])
def test_autocast_is_close_to_full_precision(kind, train):
    model, x = network(kind, "relu")
    model.train(train)
    expected = copy.deepcopy(model)(x)
    with torch.autocast("cpu", torch.bfloat16):
        got = model(x)
    assert relative_error(got.float(), expected) < 0.03
    got.float().sum().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("joint", [False, True])
def test_training_reduces_the_loss_it_is_given(joint):
    model = chain(joint, 2, bias=True, step="learned")
    x, target = torch.randn(8, 2, 8, 8), torch.rand(8, 3, 2, 2)
    optimiser = torch.optim.Adam(model.parameters(), 0.01)
    losses = []
    for _ in range(30):
        optimiser.zero_grad()
        loss = (model(x) - target).square().mean()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]


def test_objective_needs_a_penalty():
    layer = SparseCoding(DenseDictionary(4, 4), create_activation("gelu"))
    with pytest.raises(TypeError, match="no prox"):
        layer.objective(torch.ones(1, 4), torch.ones(1, 4))


@pytest.mark.parametrize("step", [0, -0.1, float("nan"), float("inf"), "lipshitz"])
def test_wrong_steps_are_named(step):
    with pytest.raises(ValueError, match=f'"lipschitz", "learned" or a number above 0, got {step!r}'):
        dense(step=step)


def test_an_empty_chain_is_refused():
    with pytest.raises(ValueError, match="at least one layer"):
        DeepSparseCoding([])


@pytest.mark.parametrize("step, counted", [("lipschitz", 1), ("learned", 1), (0.5, 0)])
def test_only_layers_that_need_it_compute_the_lipschitz_bound(monkeypatch, step, counted):
    calls = []
    monkeypatch.setattr(DenseDictionary, "lipschitz", lambda self: calls.append(self) or torch.tensor(2.0))
    layer = SparseCoding(DenseDictionary(4, 8), create_activation("soft", -1, threshold=0.1), ISTA(2), step)
    layer.eval()
    layer(torch.randn(3, 4))
    assert len(calls) == counted


def test_a_dictionary_of_ones_own_takes_a_bias_along_the_dimension_of_its_atoms():
    class Circular(Dictionary):
        """Circular shifts of each atom (atoms, n): codes (batch, atoms, n)."""

        def analyze(self, x):
            return torch.fft.irfft(torch.fft.rfft(x).unsqueeze(1) * torch.fft.rfft(self.weight).conj(), x.shape[-1])

        def synthesize(self, z, size=None):
            return torch.fft.irfft((torch.fft.rfft(z) * torch.fft.rfft(self.weight)).sum(1), z.shape[-1])

        def lipschitz(self):
            return torch.fft.rfft(self.weight).abs().square().sum(0).max()

    layer = SparseCoding(Circular(torch.randn(6, 6)), create_activation("relu", 1), ISTA(), step=1.0, bias=True)
    nn.init.normal_(layer.bias)
    x = torch.randn(3, 6)
    torch.testing.assert_close(layer(x), (layer.dictionary.analyze(x) + layer.bias.view(6, 1)).relu())


# As any module of torch's


@pytest.mark.parametrize("make, shape", [(dense, (5, 6)), (conv, (5, 2, 6, 6))])
def test_a_layer_can_be_pickled_and_follows_its_own_weights_then(make, shape):
    layer, x = make().eval(), torch.randn(shape)
    code, bound = layer(x), layer.dictionary.curvature().clone()
    again = pickle.loads(pickle.dumps(layer))
    assert torch.equal(again(x), code)
    with torch.no_grad():
        again.dictionary.weight.mul_(3)
    torch.testing.assert_close(again.dictionary.curvature(), 9 * bound)
    assert torch.equal(layer.dictionary.curvature(), bound)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("make, shape", [(dense, (5, 6)), (conv, (5, 2, 6, 6))])
def test_gradients_of_torch_func_are_those_of_autograd(make, shape, training):
    layer, x = make().double().train(training), torch.randn(shape, dtype=torch.float64)
    parameters = dict(layer.named_parameters())

    def loss(parameters, signal):
        return torch.func.functional_call(layer, parameters, signal[None]).square().sum()

    probe = layer.dictionary.probe.clone()
    each = torch.func.vmap(torch.func.grad(loss), (None, 0))(parameters, x)
    assert torch.equal(layer.dictionary.probe, probe)
    expected = torch.autograd.grad(layer(x).square().sum(), list(parameters.values()))
    for name, gradient in zip(parameters, expected, strict=True):
        torch.testing.assert_close(each[name].sum(0), gradient, msg=name)
    jacobian = torch.func.jacrev(layer)(x[:1])
    _, forward = torch.func.jvp(layer, (x[:1],), (torch.ones_like(x[:1]),))
    torch.testing.assert_close(jacobian.flatten(-x.ndim).sum(-1), forward)


def test_a_tolerance_is_reached_by_no_signals():
    layer = dense(solver=FISTA(steps=50, tol=1e-3)).eval()
    assert layer(torch.randn(0, 6)).shape == (0, 8)


@pytest.mark.parametrize("kernel_size,stride", [(2, 2), (3, 2), (3, 1)])  # by phases, one without overlap, and not
def test_a_start_of_another_shape_is_refused_with_both(kernel_size, stride):
    layer = SparseCoding(ConvDictionary(1, 3, kernel_size, stride), create_activation("soft", threshold=0.1))
    with pytest.raises(ValueError, match=r"\(2, 3, 1, 1\), expected .*\(2, 3, \d, \d\)"):
        layer.solve(torch.randn(2, 1, 9, 9), start=torch.zeros(2, 3, 1, 1))
