import numpy as np
import pytest
import torch
from oracles import GROUPED, NONNEG, penalty, unfold
from oracles import weights as penalty_weights

from dsc.activations import create_activation
from dsc.certificates import duality_gap, fixed_point_residual, relative_duality_gap
from dsc.dictionaries import ConvDictionary, DenseDictionary
from dsc.layers import SparseCoding
from dsc.solvers import FISTA

CONVEX = ["relu", "soft", "group_relu", "group_relu_nonneg", "sparse_group", "elastic"]
SCALES = [0.0, 0.01, 1.0, 3.0]  # of the code: from where the dual point is scaled down to where it is not


def problem(name, kind="dense", threshold=0.3, dtype=torch.float64):
    torch.manual_seed(0)
    prox = create_activation(name, threshold=threshold, group_size=4 if GROUPED[name] else None)
    dictionary, shape = {
        "dense": (DenseDictionary(10, 20), (6, 10)),
        "conv": (ConvDictionary(2, 4, 3, 1, 1), (3, 2, 4, 5)),
    }[kind]
    return SparseCoding(dictionary, prox).to(dtype).eval(), torch.randn(shape, dtype=torch.float64).to(dtype)


def feasible_code(name, layer, x, scale):
    z = scale * torch.randn_like(layer(x))
    return z.abs() if NONNEG[name] else z


def pieces(layer, x, z):
    residual = x - layer.decode(z, x.shape[-2:])
    return residual, layer.dictionary.analyze(residual)


def conjugate(name, c, threshold):
    # Of the feasible c that the gap is made with: 0 for what grows linearly, and the elastic net's own.
    a, _, e = penalty_weights(name)
    beyond = np.maximum(abs(c.flatten(1).numpy()) - threshold * a, 0)
    return (beyond**2 / (2 * threshold * e)).sum(1) if e else np.zeros(len(c))


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("kind", ["dense", "conv"])
@pytest.mark.parametrize("name", CONVEX)
def test_gap_is_the_primal_less_a_feasible_dual_objective(name, kind, scale):
    layer, x = problem(name, kind)
    z = feasible_code(name, layer, x, scale)
    matrix = layer.dictionary.weight.detach().T if kind == "dense" else unfold(layer.dictionary, x.shape[-2:])
    residual = x.flatten(1) - z.flatten(1) @ matrix.T
    primal = residual.square().sum(1).numpy() / 2 + penalty(name, z, 0.3, 4 if GROUPED[name] else 1)
    correlations = (residual @ matrix).view_as(z)
    s = 1 / layer.prox.gauge(correlations).clamp_min(1)
    theta = s[:, None] * residual
    dual = ((x.flatten(1) * theta).sum(1) - theta.square().sum(1) / 2).numpy()
    dual = dual - conjugate(name, s.view(-1, *[1] * (z.ndim - 1)) * correlations, 0.3)
    got = duality_gap(layer.prox, z, *pieces(layer, x, z))
    np.testing.assert_allclose(got, primal - dual, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(layer.relative_gap(x, z), np.minimum(got / primal, 1), rtol=1e-12)


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("name", CONVEX)
def test_gap_bounds_the_distance_to_the_minimum_and_closes(name, scale):
    layer, x = problem(name)
    best = layer.reference(x, tol=1e-12, max_steps=3000)
    minimum = layer.objective(x, best)
    z = feasible_code(name, layer, x, scale)
    assert (duality_gap(layer.prox, z, *pieces(layer, x, z)) >= layer.objective(x, z) - minimum).all()
    assert (layer.relative_gap(x, best) <= 1e-10).all()


@pytest.mark.parametrize("name", CONVEX)
def test_gap_of_single_precision_codes_certifies_about_1e_6(name):
    layer, x = problem(name, dtype=torch.float32)
    z = layer.solve(x, FISTA(1000, restart=True))
    assert z.dtype == torch.float32
    gap = layer.relative_gap(x, z)
    assert gap.dtype == torch.float64 and (gap >= 0).all()
    assert (gap <= 2 * torch.finfo(z.dtype).eps * x.norm(dim=1) / 0.3).all()
    double = layer.double()
    exact = double.objective(x.double(), double.reference(x.double(), tol=1e-12, max_steps=3000))
    error = double.objective(x.double(), z.double()) / exact - 1
    assert (error <= gap + 1e-12).all()


def test_gap_is_infinite_outside_the_domain_and_zero_for_zero_signals():
    layer, x = problem("relu")
    z = torch.ones_like(layer(x))
    z[0, 0] = -1
    assert duality_gap(layer.prox, z, *pieces(layer, x, z)).isinf().tolist() == [True, *[False] * 5]
    assert layer.relative_gap(x, z)[0] == 1  # no objective is below 0
    assert torch.equal(layer.relative_gap(0 * x, 0 * z), torch.zeros(6).double())


@pytest.mark.parametrize("name,message", [("gelu", "no prox"), ("hard", "not convex"), ("jump_relu", "not convex")])
def test_a_gap_needs_a_convex_penalty(name, message):
    z = torch.ones(2, 3)
    for function in (duality_gap, relative_duality_gap):
        with pytest.raises(TypeError, match=message):
            function(create_activation(name), z, z, z)


def test_a_gap_is_refused_with_a_bias():
    layer = SparseCoding(DenseDictionary(4, 4), create_activation("relu"), bias=True)
    with pytest.raises(TypeError, match="bias"):
        layer.relative_gap(torch.ones(1, 4), torch.ones(1, 4))


def test_fixed_point_residual_is_relative_and_vanishes_at_the_minimiser():
    layer, x = problem("soft", "conv")
    z = layer.reference(x, tol=1e-12, max_steps=3000)
    stepped = layer.solve(x, FISTA(1), start=z)
    assert (fixed_point_residual(z, stepped) <= 1e-10).all()
    expected = [np.linalg.norm((a - b).numpy()) / np.linalg.norm(a.numpy()) for a, b in zip(z, x[:, :1], strict=True)]
    np.testing.assert_allclose(fixed_point_residual(z, x[:, :1].expand_as(z)), expected)
    zero = torch.zeros(2, 3)
    assert torch.equal(fixed_point_residual(zero, zero), zero[:, 0])
    assert fixed_point_residual(zero, zero + 1).isinf().all()
