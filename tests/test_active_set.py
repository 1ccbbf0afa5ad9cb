"""The parts of the active-set method, each against what it restates; `test_encode.py` has the whole."""

import pytest
import torch
from oracles import CONVEX, GROUPED, kkt_residual
from torch.autograd.functional import hessian, jacobian

import dsc.active_set
from dsc.activations import create_activation
from dsc.active_set import ActiveSet, argmax_, newton
from dsc.penalties import penalty_of


def gaussian(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def unit(atoms):
    return atoms / atoms.norm(dim=1, keepdim=True)


def make(name, threshold=0.3, size=3):
    return create_activation(name, threshold=threshold, group_size=size if GROUPED[name] else None)


def penalty(name, threshold=0.3):
    return penalty_of(make(name, threshold), 3 if GROUPED[name] else 1)


def feasible(prox, z):
    return z.abs() if prox.nonneg else z


@pytest.mark.parametrize("threshold", ["one", "many"])
@pytest.mark.parametrize("name", CONVEX)
def test_penalty_is_that_of_the_prox(name, threshold):
    count = 2 if GROUPED[name] else 6
    prox = make(name, 0.3 if threshold == "one" else [0.125 * (i + 1) for i in range(count)])
    h, u = penalty_of(prox, 3 if GROUPED[name] else 1), gaussian(5, 6)
    torch.testing.assert_close(h.minimiser(u), prox(u))
    z = feasible(prox, u)
    torch.testing.assert_close(h.value(z), prox.penalty(z))


@pytest.mark.parametrize("threshold", ["one", "many"])
@pytest.mark.parametrize("name", CONVEX)
def test_penalty_in_scaled_codes(name, threshold):
    size, count = (3, 2) if GROUPED[name] else (1, 6)
    prox = make(name, 0.3 if threshold == "one" else [0.125 * (i + 1) for i in range(count)])
    scale = torch.linspace(0.5, 3, count, dtype=torch.float64)
    z = feasible(prox, gaussian(5, 6))
    padded = torch.cat([z * scale.repeat_interleave(size), z.new_zeros(5, size)], 1)
    torch.testing.assert_close(penalty_of(prox, size, scale, padding=1).value(padded), prox.penalty(z))


@pytest.mark.parametrize("name", CONVEX)
def test_slope_and_curvature_are_derivatives_of_the_value(name):
    prox = make(name)
    h, z = penalty(name), feasible(prox, gaussian(1, 6))
    value = lambda z: h.value(z).sum()  # noqa: E731
    torch.testing.assert_close(h.gradient(z), jacobian(value, z))
    curvature = z.new_zeros(1, 6, 6)
    h.add_curvature(curvature, z)
    torch.testing.assert_close(curvature[0], hessian(value, z)[0, :, 0])


@pytest.mark.parametrize("name", CONVEX)
def test_a_working_set_has_the_penalty_of_its_groups(name):
    size, count = (3, 4) if GROUPED[name] else (1, 12)
    prox = make(name, [0.125 * (i + 1) for i in range(count)])
    groups = torch.tensor([[0, 2], [3, 1]])
    entries = (groups.unsqueeze(-1) * size + torch.arange(size)).flatten(1)
    h, z = penalty_of(prox, size), torch.zeros(2, 12, dtype=torch.float64)
    part = feasible(prox, gaussian(2, 2 * size))
    z.scatter_(1, entries, part)
    torch.testing.assert_close(h.take(entries, groups).value(part), h.value(z))
    torch.testing.assert_close(h.take(entries, groups).rows(torch.tensor([1])).value(part[1:]), h.value(z)[1:])


@pytest.mark.parametrize("name", CONVEX)
def test_newton_never_goes_uphill_and_ends_where_the_slope_vanishes(name):
    prox, atoms, x = make(name, 0.1), unit(gaussian(6, 10)), gaussian(20, 10, seed=1)
    h, gram = penalty(name, 0.1), (atoms @ atoms.mT).expand(20, -1, -1)
    objective = lambda z: (x - z @ atoms).square().sum(1) / 2 + h.value(z)  # noqa: E731
    z = feasible(prox, gaussian(20, 6, seed=2))
    c = (x - z @ atoms) @ atoms.mT
    for _ in range(40):
        after, c = newton(gram, z, c, h)
        assert (objective(after) <= objective(z) * (1 + 1e-12)).all()
        torch.testing.assert_close(c, (x - after @ atoms) @ atoms.mT)
        z = after
    if not prox.nonneg:
        assert ((c - h.gradient(z)) * (z != 0)).abs().max() <= 1e-9


def test_newton_is_exact_where_no_sign_changes():
    atoms, x = unit(gaussian(4, 10)), gaussian(8, 4, seed=1).sign().mul(5) @ unit(gaussian(4, 10))
    gram, h = (atoms @ atoms.mT).expand(8, -1, -1), penalty("soft", 0.1)
    expected = torch.linalg.solve(gram[0], (x @ atoms.mT - 0.1 * (x @ atoms.mT @ gram[0].inverse()).sign()).mT).mT
    start = expected + 0.5 * gaussian(8, 4, seed=2).clamp(-1, 1)
    z, c = newton(gram, start, (x - start @ atoms) @ atoms.mT, h)
    torch.testing.assert_close(z, expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(c, 0.1 * z.sign(), rtol=0, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("columns", [1, 2, 3, 512, 1000])
def test_argmax_is_of_an_entry_about_as_large_as_the_largest(dtype, columns):
    score = gaussian(50, columns, seed=columns).abs().to(dtype)
    score[0] = 0
    index = argmax_(score.clone())
    assert index.shape == (50, 1) and (index >= 0).all() and (index < columns).all()
    found, largest = score.gather(1, index).squeeze(1), score.amax(1)
    assert (found >= largest * (1 - 2 * columns * torch.finfo(dtype).eps)).all()


@pytest.mark.parametrize("name", CONVEX)
def test_a_start_changes_no_solution(name):
    prox, atoms, x = make(name, 0.2), unit(gaussian(18, 8)), gaussian(6, 8, seed=1)
    solver, size = ActiveSet(atoms, prox), 3 if GROUPED[name] else 1
    z, gaps = solver.solve(x, 1e-13, 30)
    assert gaps.max() <= 1e-13
    assert kkt_residual(name, z, (x - z @ atoms) @ atoms.mT, 0.2, size) <= 1e-6
    for start in (z, feasible(prox, gaussian(6, 18, seed=2)), feasible(prox, 1e6 * gaussian(6, 18, seed=2))):
        before = start.clone()
        other, gaps = solver.solve(x, 1e-12, 30, start)
        assert gaps.max() <= 1e-12 and torch.equal(start, before)
        torch.testing.assert_close(other, z, rtol=0, atol=1e-5)
    kept, gaps = solver.solve(x, 1e-12, 0, z)  # no round: what it was given, and its gap
    torch.testing.assert_close(kept, z)
    assert gaps.max() <= 1e-12


@pytest.mark.parametrize("name", CONVEX)
def test_every_round_leads_down(name):
    prox, atoms, x = make(name, 0.05), 3 * unit(gaussian(30, 10)), gaussian(10, 10, seed=1)
    objective = lambda z: (x - z @ atoms).square().sum(1) / 2 + prox.penalty(z)  # noqa: E731
    solver, values = ActiveSet(atoms, prox), [x.square().sum(1) / 2]
    for rounds in (1, 2, 3, 5, 8):
        z, _ = solver.solve(x, 1e-12, rounds)
        values.append(objective(z))
        assert (values[-1] <= values[-2] * (1 + 1e-12)).all()


@pytest.mark.parametrize("name", CONVEX)
def test_greedy_steps_of_parts_are_those_of_all(name, monkeypatch):
    solver, x = ActiveSet(unit(gaussian(18, 8)), make(name, 0.2)), gaussian(7, 8, seed=1)
    start = lambda: (torch.zeros(7, len(solver.atoms), dtype=x.dtype), x @ solver.atoms.mT)  # noqa: E731
    z, c = start()
    solver._greedy(z, c)
    assert (z != 0).any(1).all()
    torch.testing.assert_close(c, (x - z @ solver.atoms) @ solver.atoms.mT)
    monkeypatch.setattr(dsc.active_set, "IN_CACHE", 3 * len(solver.atoms))  # 3, 3 and 1 of the signals
    z_of_parts, c_of_parts = start()
    solver._greedy(z_of_parts, c_of_parts)
    torch.testing.assert_close(z_of_parts, z)
    torch.testing.assert_close(c_of_parts, c)
