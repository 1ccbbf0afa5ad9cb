import subprocess
import sys

import numpy as np
import pytest
import torch

from dsc import coordinate_descent
from dsc.activations import create_activation
from dsc.active_set import ActiveSet
from dsc.coordinate_descent import MOST_MEMBERS, descend, keep_support, minimiser, polish
from dsc.encode import sparse_encode
from dsc.prox import Prox

PROX = ["soft", "relu", "elastic"]


def gaussian(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def unit(atoms):
    return atoms / atoms.norm(dim=1, keepdim=True)


def make(name, threshold) -> Prox:
    return create_activation(name, threshold=threshold, **({"l1_ratio": 0.7} if name == "elastic" else {}))


def solver_of(name, atoms=30, features=12, threshold=0.3, dtype=torch.float64) -> ActiveSet:
    return ActiveSet(unit(gaussian(atoms, features, dtype=dtype)), make(name, threshold))


@pytest.mark.parametrize("name", PROX)
def test_minimiser_is_the_penaltys(name):
    penalty = solver_of(name).penalty
    u = gaussian(1, 200)
    expected = penalty.minimiser(u)[0].tolist()
    found = [minimiser(value, penalty.l1, 1 / (1 + penalty.ridge), penalty.nonneg) for value in u[0].tolist()]
    assert found == pytest.approx(expected, abs=1e-15)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("start", ["zero", "elsewhere"])
@pytest.mark.parametrize("name", PROX)
def test_no_entry_alone_would_move(name, start, dtype):
    solver, x = solver_of(name, dtype=dtype), gaussian(9, 12, seed=1, dtype=dtype)
    z = torch.zeros(9, len(solver.atoms), dtype=dtype)
    if start == "elsewhere":
        z[:, : solver.count] = gaussian(9, solver.count, seed=2, dtype=dtype).relu()
    c = (x - z @ solver.atoms) @ solver.atoms.mT
    solver.descend(z, c, 1e-12)
    exact = {torch.float32: 5e-6, torch.float64: 1e-13}[dtype]
    fresh = (x - z @ solver.atoms) @ solver.atoms.mT
    torch.testing.assert_close(c, fresh, rtol=0, atol=exact)
    moved = solver.penalty.minimiser(fresh + z) - z
    assert moved[:, : solver.count].abs().max() <= exact
    assert (z != 0).any(1).all()


def test_a_looser_tolerance_is_kept_too():
    solver, x = solver_of("soft", 200, 40, 0.05), gaussian(20, 40, seed=1)
    for tol in (1e-1, 1e-3):
        z = torch.zeros(20, len(solver.atoms), dtype=x.dtype)
        solver.descend(z, x @ solver.atoms.mT, tol)
        c = (x - z @ solver.atoms) @ solver.atoms.mT
        assert (solver.penalty.minimiser(c + z) - z).abs().max() <= tol * 0.05


def test_a_support_beyond_the_working_set_is_left_to_the_caller():
    x, atoms = 10 * gaussian(2, 4 * MOST_MEMBERS), unit(gaussian(2 * MOST_MEMBERS, 4 * MOST_MEMBERS, seed=1))
    solver = ActiveSet(atoms, make("soft", 0.01))
    z = torch.zeros(2, len(solver.atoms), dtype=x.dtype)
    solver.descend(z, x @ solver.atoms.mT, 1e-9)
    assert ((z != 0).sum(1) <= MOST_MEMBERS).all()
    z, gaps = sparse_encode(x, atoms, 0.01, return_gap=True, tol=1e-9)
    assert ((z != 0).sum(1) > MOST_MEMBERS).all() and gaps.max() <= 1e-9


def test_newtons_step_is_the_least_squares_solution_of_its_signs():
    rng = np.random.default_rng(0)
    atoms, x = rng.normal(size=(5, 9)), rng.normal(size=9)
    gram, l1, inverse = atoms @ atoms.T, np.full(5, 0.01), np.full(5, 1 / 1.3)
    z = np.linalg.solve(gram, atoms @ x) * 1.1
    own = np.stack([z, atoms @ (x - z @ atoms), l1, inverse])
    assert polish(own, 5, gram, np.empty((5, 5)), np.empty(5))
    expected = np.linalg.solve(gram + 0.3 * np.eye(5), atoms @ x - 0.01 * np.sign(z))
    assert (np.sign(expected) == np.sign(z)).all()
    np.testing.assert_allclose(own[0], expected, rtol=1e-12)


@pytest.mark.parametrize("why", ["a sign would change", "atoms depend on one another"])
def test_newtons_step_is_not_taken_where(why):
    atoms = np.eye(3)
    if why == "atoms depend on one another":
        atoms[2] = atoms[1]
    z = np.array([1.0, 1.0, -1.0])
    own = np.stack([z, atoms @ (np.ones(3) - z @ atoms), np.full(3, 0.1), np.ones(3)])
    assert not polish(own, 3, atoms @ atoms.T, np.empty((3, 3)), np.empty(3))
    assert (own[0] == z).all()


def test_members_that_left_the_support_are_dropped_with_their_products():
    rng = np.random.default_rng(0)
    products = rng.normal(size=(40, 40))
    members, z = np.array([7, 3, 11, 30, 2]), np.array([0.0, 1.0, 0.0, -2.0, 0.5])
    block = products[np.ix_(members, members)]
    kept = keep_support(z, members, block)
    assert kept == 3 and members[:kept].tolist() == [3, 30, 2]
    np.testing.assert_array_equal(block[:kept, :kept], products[np.ix_(members[:kept], members[:kept])])


def test_the_interpreter_computes_the_same(monkeypatch):
    for name in ("minimiser", "find_moves", "enter", "shift", "gather", "settle", "polish", "keep_support"):
        monkeypatch.setattr(coordinate_descent, name, getattr(coordinate_descent, name).py_func)
    solver, x = solver_of("elastic"), gaussian(3, 12, seed=1)
    found = []
    for function in (descend, descend.py_func):
        z = torch.zeros(3, len(solver.atoms), dtype=x.dtype)
        l1, inverse = (
            np.full(len(solver.atoms), value) for value in (solver.penalty.l1, 1 / (1 + solver.penalty.ridge))
        )
        function(z.numpy(), (x @ solver.atoms.mT).numpy(), solver.gram.numpy(), l1, inverse, False, 1e-12)
        found.append(z)
    torch.testing.assert_close(*found, rtol=0, atol=1e-13)


def test_a_numba_that_does_not_work_is_warned_of_and_done_without(tmp_path):
    (tmp_path / "numba.py").write_text("raise ImportError('Numba needs NumPy 1.9 or less')\n")
    script = """
import sys, warnings
sys.path.insert(0, sys.argv[1])
import torch, dsc
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    for _ in range(2):
        z, gaps = dsc.sparse_encode(torch.eye(3), torch.eye(3), 0.25, return_gap=True)
assert torch.equal(z, 0.75 * torch.eye(3)), z
found = [str(warning.message) for warning in caught if "numba" in str(warning.message)]
assert found == ["numba is installed but does not work, so codes take longer: Numba needs NumPy 1.9 or less"], found
"""
    subprocess.run([sys.executable, "-c", script, str(tmp_path)], check=True)
