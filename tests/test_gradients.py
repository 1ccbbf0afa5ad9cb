import sys
from pathlib import Path

import pytest
import torch
from oracles import GROUPED
from torch.autograd.graph import saved_tensors_hooks

from dsc.activations import create_activation
from dsc.dictionaries import ConvDictionary, DenseDictionary
from dsc.gradients import solve_on_support
from dsc.layers import DeepSparseCoding, SparseCoding
from dsc.solvers import FISTA, ISTA

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))

NAMES = ["relu", "soft", "group_relu", "group_relu_nonneg", "sparse_group", "elastic"]
KINDS = ["dense", "conv"]


def problem(kind, name, solver, dtype=torch.float64, bias=False):
    """A layer with a learnable λ and its signals; between a quarter and a half of the code is not zero."""
    torch.manual_seed(0)
    group = dict(group_size=2) if GROUPED[name] else {}
    dictionary, shape, dim = {
        "dense": (DenseDictionary(8, 12), (3, 8), -1),
        "conv": (ConvDictionary(1, 4, 3, 1, 1), (2, 1, 4, 4), 1),
    }[kind]
    prox = create_activation(name, dim, threshold=0.5, learn=True, **group)
    layer = SparseCoding(dictionary, prox, solver, bias=bias).to(dtype).eval()
    return layer, torch.randn(shape, dtype=torch.float64).to(dtype)


def call_of(layer):
    """The layer as a function of its input and its parameters, and their values."""
    names = [name for name, _ in layer.named_parameters()]
    values = tuple(p.detach().clone().requires_grad_() for p in layer.parameters())
    return lambda x, *p: torch.func.functional_call(layer, dict(zip(names, p, strict=True)), x), values


def gradients(layer, x, call=None):
    """Gradients of x and all parameters together, for a loss that weighs the entries of the code."""
    x = x.detach().requires_grad_()
    z = (layer if call is None else call)(x)
    weights = torch.linspace(-1, 1, z.numel(), dtype=z.dtype).view_as(z)
    found = torch.autograd.grad((z * weights).sum() + z.square().sum(), (x, *layer.parameters()))
    return torch.cat([g.flatten() for g in found])


def distance(a, b):
    return ((a - b).norm() / b.norm()).item()


@pytest.mark.parametrize("gradient", ["unroll", "implicit"])
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_of_the_minimiser_match_finite_differences(kind, name, gradient):
    steps = 80 if gradient == "unroll" else 250  # of which the derivative is exact; of which the code has to converge
    layer, x = problem(kind, name, FISTA(steps, restart=True, gradient=gradient))
    call, values = call_of(layer)
    assert 0.1 < (layer(x) != 0).double().mean() < 0.9
    # The fast mode compares the derivative along one random direction of every input and every parameter.
    assert torch.autograd.gradcheck(call, (x.requires_grad_(), *values), fast_mode=True)


def test_implicit_gradient_of_a_bias_matches_finite_differences():
    layer, x = problem("conv", "soft", FISTA(250, restart=True, gradient="implicit"), bias=True)
    torch.nn.init.uniform_(layer.bias, -0.05, 0.05)
    call, values = call_of(layer)
    assert len(values) == 3
    assert torch.autograd.gradcheck(call, (x.requires_grad_(), *values), fast_mode=True)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", KINDS)
def test_implicit_equals_unroll_at_convergence_in_single_precision(kind, name):
    found = {}
    for gradient in ("unroll", "implicit"):
        layer, x = problem(kind, name, FISTA(300, restart=True, gradient=gradient), torch.float32)
        found[gradient] = gradients(layer, x)
    assert distance(found["implicit"], found["unroll"]) <= 1e-4


@pytest.mark.parametrize("solver", [ISTA, FISTA])
@pytest.mark.parametrize("kind", KINDS)
def test_all_modes_have_the_code_of_the_unrolled_solver(kind, solver):
    codes = []
    for gradient in ("unroll", "checkpoint", "last", "implicit"):
        layer, x = problem(kind, "soft", solver(7, gradient=gradient))
        codes += [layer(x), layer.trace(x, 7).codes[-1]]
    assert all(torch.equal(z, codes[0]) for z in codes[1:])


@pytest.mark.parametrize("solver", [ISTA(6), FISTA(6), FISTA(40, restart=True)])
@pytest.mark.parametrize("kind", KINDS)
def test_checkpoint_has_the_gradient_of_unroll(kind, solver):
    layer, x = problem(kind, "group_relu", solver)
    expected = gradients(layer, x)
    layer.solver = type(solver)(**{**vars(solver), "gradient": "checkpoint"})
    assert torch.equal(gradients(layer, x), expected)


@pytest.mark.parametrize("solver", [ISTA, FISTA])
@pytest.mark.parametrize("kind", KINDS)
def test_last_is_the_gradient_of_the_last_step(kind, solver):
    layer, x = problem(kind, "soft", solver(6, gradient="last"))
    codes = layer.trace(x, 5).codes
    if solver is FISTA:
        t = [1.0]
        for _ in range(5):
            t.append((1 + (1 + 4 * t[-1] ** 2) ** 0.5) / 2)
        start = codes[4] + (t[4] - 1) / t[5] * (codes[4] - codes[3])
    else:
        start = codes[4]
    got = gradients(layer, x)
    layer.solve = lambda x: SparseCoding.solve(layer, x, ISTA(1), start=start)
    torch.testing.assert_close(got, gradients(layer, x))


def test_last_of_one_step_is_exact():
    layer, x = problem("dense", "soft", ISTA(1, gradient="last"))
    got = gradients(layer, x)
    layer.solver = ISTA(1)
    assert torch.equal(got, gradients(layer, x))


def test_bias_of_last_is_what_the_documentation_says():
    from layer import gradients_of_dictionary

    exact, biased, active = gradients_of_dictionary(0.2)
    cosine = (exact * biased).sum() / exact.norm() / biased.norm()
    assert 8 < active < 10
    assert 0.91 < cosine < 0.93
    assert 0.14 < biased.norm() / exact.norm() < 0.16


def saved_bytes(layer, x):
    """Bytes that the graph keeps for the backward pass, each storage counted once."""
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage  # held, so that no address comes twice
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        layer(x.requires_grad_())
    return sum(storage.nbytes() for storage in kept.values())


@pytest.mark.parametrize("kind", KINDS)
def test_memory_of_last_and_implicit_does_not_grow_with_the_steps(kind):
    def kept(gradient, steps):
        layer, x = problem(kind, "soft", FISTA(steps, gradient=gradient))
        return saved_bytes(layer, x)

    for gradient in ("last", "implicit"):
        assert kept(gradient, 2) == kept(gradient, 5) == kept(gradient, 50)
    layer, x = problem(kind, "soft", FISTA(1))
    code = layer(x).nbytes
    assert kept("checkpoint", 50) - kept("checkpoint", 5) == 45 * code
    assert kept("unroll", 50) - kept("unroll", 5) >= 2 * 45 * code


def test_implicit_gradient_of_a_support_of_dependent_atoms_needs_damping():
    layer, x = problem("dense", "soft", FISTA(1000, restart=True, gradient="implicit"))
    with torch.no_grad():
        layer.dictionary.weight[1] = layer.dictionary.weight[0]  # the code is split between the two
    with pytest.raises(torch.linalg.LinAlgError, match=r"signal \d \(\d+ entries\) is singular.*damping"):
        gradients(layer, x)
    layer.solver = FISTA(1000, restart=True, gradient="implicit", damping=1e-3)
    assert gradients(layer, x).isfinite().all()


def test_damping_is_a_ridge_on_the_gram_matrix_of_the_support():
    damping = 0.05
    layer, x = problem("dense", "soft", FISTA(1000, restart=True, gradient="implicit", damping=damping))
    x = x[:1].requires_grad_()
    z = layer(x)
    seed = torch.linspace(-1, 1, z.numel()).double().view_as(z)
    (got,) = torch.autograd.grad(z, x, seed)
    active = layer.dictionary.weight.detach()[z[0] != 0]
    gram = active @ active.mT + damping / layer.step_size() * torch.eye(len(active))
    expected = torch.linalg.solve(gram, seed[z != 0]) @ active
    torch.testing.assert_close(got[0], expected)


@pytest.mark.parametrize("seed", range(3))
def test_the_adjoint_system_is_solved_as_by_elimination(seed):
    # P of rank 4 with eigenvalues in (0, 1], as a group prox has; N = I − sG of eigenvalues in [0, 1).
    torch.manual_seed(seed)
    basis, other = (torch.linalg.qr(torch.randn(5, 9, 9).double())[0] for _ in range(2))
    p = basis @ (torch.tensor([1, 1, 0.4, 0.01, 0, 0, 0, 0, 0]).double().view(-1, 1) * basis.mT)
    n = other @ (torch.rand(9, 1).double() * other.mT)
    v = torch.randn(5, 9).double()
    u = torch.linalg.solve(torch.eye(9) - n @ p, v)

    def product(matrix):
        return lambda a: torch.einsum("bij,bj->bi", matrix, a)

    torch.testing.assert_close(solve_on_support(product(p), product(n), v, 1e-12), product(p)(u))


def test_adjoint_of_zero_and_of_an_empty_support_is_zero():
    layer, x = problem("dense", "soft", FISTA(200, restart=True, gradient="implicit"))
    x = x.requires_grad_()
    (gradient,) = torch.autograd.grad((0 * layer(x)).sum(), x)
    assert torch.equal(gradient, torch.zeros_like(x))
    small = (1e-3 * x).detach().requires_grad_()
    assert not layer(small).any()
    (gradient,) = torch.autograd.grad(layer(small).sum(), small)
    assert torch.equal(gradient, torch.zeros_like(small))


def test_implicit_gradient_passes_through_a_network_and_a_second_backward():
    first, x = problem("conv", "soft", FISTA(500, restart=True, gradient="implicit"))
    second = SparseCoding(ConvDictionary(4, 3, 3), create_activation("relu", threshold=0.1), first.solver)
    deep = DeepSparseCoding([first, second.double().eval()]).eval()
    loss = deep(x).square().sum()
    loss.backward(retain_graph=True)
    once = [p.grad.clone() for p in deep.parameters()]
    loss.backward()
    assert all(torch.equal(p.grad, 2 * g) for p, g in zip(deep.parameters(), once, strict=True))
    assert all(g.any() for g in once)


def test_implicit_gradient_has_no_second_derivative_and_says_so():
    layer, x = problem("dense", "soft", FISTA(200, restart=True, gradient="implicit"))
    x = x.requires_grad_()
    (gradient,) = torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


def test_a_tolerance_stops_before_the_differentiated_step():
    # ISTA's codes up to the tolerance, and one step more.
    layer, x = problem("dense", "soft", ISTA(5000, tol=1e-6, gradient="implicit"))
    with torch.no_grad():
        stopped = layer(x)
    expected = layer.solve(x, ISTA(1), start=stopped)
    assert not torch.equal(stopped, expected)
    assert torch.equal(layer(x), expected)


@pytest.mark.parametrize("steps", [1, 2])
def test_an_implicit_gradient_from_a_start_is_that_at_the_last_step(steps):
    layer, x = problem("dense", "relu", FISTA(500, restart=True))
    start = layer(x).detach()
    short = ISTA(steps, gradient="implicit")
    torch.testing.assert_close(layer.solve(x, short, start=start), start)
    x = x.requires_grad_()
    (got,) = torch.autograd.grad(layer.solve(x, short, start=start).square().sum(), x)
    (expected,) = torch.autograd.grad(layer(x).square().sum(), x)
    torch.testing.assert_close(got, expected)


def chain(gradient, steps):
    torch.manual_seed(0)
    layers = [
        SparseCoding(ConvDictionary(1, 2, 2), create_activation("soft", threshold=0.05)),
        SparseCoding(ConvDictionary(2, 3, 2), create_activation("relu", threshold=0.01)),
    ]
    return DeepSparseCoding(layers, FISTA(steps, gradient=gradient), joint=True).double().eval()


@pytest.mark.parametrize("gradient", ["unroll", "checkpoint", "last"])
def test_modes_of_a_joint_chain(gradient):
    x = torch.randn(2, 1, 5, 5).double()
    plain, other = chain("unroll", 5), chain(gradient, 5)
    for a, b in zip(other.codes(x), plain.codes(x), strict=True):
        assert torch.equal(a, b)
    for model in (plain, other):
        sum(z.square().sum() for z in model.codes(x)).backward()
    grads = [[p.grad for p in model.parameters()] for model in (plain, other)]
    if gradient == "last":
        assert all(g.any() for g in grads[1])
    else:
        assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_a_checkpointed_chain_compiles_without_a_break():
    torch.manual_seed(0)
    deep = chain("checkpoint", 3).float()
    x = torch.randn(2, 1, 5, 5)
    torch.compiler.reset()
    compiled = torch.compile(deep, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(gradients(deep, x, compiled), gradients(deep, x))


@pytest.mark.parametrize("gradient", ["checkpoint", "last"])
@pytest.mark.parametrize("kind", KINDS)
def test_modes_compile_without_a_break(kind, gradient):
    layer, x = problem(kind, "relu", FISTA(3, restart=True, gradient=gradient), torch.float32)
    torch.compiler.reset()
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(gradients(layer, x, compiled), gradients(layer, x))


def test_an_implicit_gradient_runs_outside_of_a_compiled_program():
    layer, x = problem("dense", "soft", FISTA(8, gradient="implicit"))
    torch.compiler.reset()
    with pytest.raises(torch._dynamo.exc.Unsupported, match="compile without it"):
        torch.compile(layer, backend="aot_eager", fullgraph=True)(x)
    torch.compiler.reset()
    compiled = torch.compile(layer, backend="aot_eager")
    torch.testing.assert_close(gradients(layer, x, compiled), gradients(layer, x))


def test_what_an_implicit_gradient_cannot_do_is_named():
    dictionary, solver = DenseDictionary(4, 6), FISTA(20, gradient="implicit")
    for name in ("gelu", "hard"):
        with pytest.raises(TypeError, match="convex penalty.*take 'unroll'"):
            SparseCoding(dictionary, create_activation(name, -1), solver)
    soft = create_activation("soft", -1)
    with pytest.raises(ValueError, match="learned step"):
        SparseCoding(dictionary, soft, solver, step="learned")
    with pytest.raises(ValueError, match="no implicit gradient: take 'unroll'"):
        DeepSparseCoding([SparseCoding(dictionary, soft)], solver, joint=True)
    layer, x = SparseCoding(dictionary, soft), torch.randn(2, 4)
    with pytest.raises(ValueError, match="single layer"):
        solver.solve(layer(x), lambda z: z)
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(TypeError, match=r"no autocast.*bfloat16"):
        layer.solve(x, solver)
