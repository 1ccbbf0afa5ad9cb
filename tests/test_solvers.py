from itertools import pairwise

import pytest
import torch
from oracles import GROUPED, kkt_residual, unfold
from sklearn.decomposition import sparse_encode
from sklearn.linear_model import Lasso

from dsc.activations import create_activation
from dsc.certificates import fixed_point_residual
from dsc.dictionaries import ConvDictionary, DenseDictionary
from dsc.layers import SparseCoding
from dsc.measures import relative_error
from dsc.solvers import FISTA, ISTA, SOLVERS, ConvergenceWarning, create_solver

NAMES = ["relu", "soft", "group_relu", "group_relu_nonneg"]


def dense(name="soft", features=10, atoms=20, seed=0, threshold=0.25, **kwargs):
    torch.manual_seed(seed)
    prox = create_activation(name, threshold=threshold, group_size=4 if GROUPED[name] else None)
    return SparseCoding(DenseDictionary(features, atoms), prox, **kwargs).double().eval()


def conv(name="soft", stride=1, padding=1, **kwargs):
    torch.manual_seed(0)
    prox = create_activation(name, threshold=0.25, group_size=2 if GROUPED[name] else None)
    return SparseCoding(ConvDictionary(2, 4, 3, stride, padding), prox, **kwargs).double().eval()


def signals(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def set_bias(layer, low=-0.1, high=0.12):
    # Within λ∂Ω(0), where the objective is bounded below for every dictionary.
    with torch.no_grad():
        layer.bias.copy_(torch.linspace(low, high, len(layer.bias)))
    return layer.bias.detach()


def solved(layer, x):
    return layer.reference(x, tol=1e-12, max_steps=3000)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_dense_reference_is_stationary(name, bias):
    layer = dense(name, bias=bias)
    b = set_bias(layer) if bias else 0
    x, matrix = signals(5, 10), layer.dictionary.weight.detach().T
    z = solved(layer, x)
    descent = (x - z @ matrix.T) @ matrix + b
    assert kkt_residual(name, z, descent, 0.25, 4 if GROUPED[name] else 1) <= 1e-10
    assert 0 < (z != 0).double().mean() < 1


@pytest.mark.parametrize("stride,padding,size", [(1, 1, (5, 5)), (2, 1, (6, 7))])
@pytest.mark.parametrize("name", NAMES)
def test_conv_reference_is_stationary(name, stride, padding, size):
    layer = conv(name, stride, padding, bias=True)
    b = set_bias(layer)
    x, matrix = signals(2, 2, *size), unfold(layer.dictionary, size)
    z = solved(layer, x)
    descent = ((x.flatten(1) - z.flatten(1) @ matrix.T) @ matrix).view_as(z) + b.view(-1, 1, 1)
    assert kkt_residual(name, z, descent, 0.25, 2 if GROUPED[name] else 1) <= 1e-8
    assert 0 < (z != 0).double().mean() < 1


@pytest.mark.parametrize("features,atoms,high", [(20, 8, 0.4), (8, 20, -0.05)])
def test_bias_is_the_linear_term_of_the_problem(features, atoms, high):
    # An overcomplete dictionary needs b ≤ 0 here, or the objective falls without end along its null space.
    layer = dense("relu", features, atoms, threshold=0.0, bias=True)
    b, x, matrix = set_bias(layer, -0.3, high), signals(4, features), layer.dictionary.weight.detach().T
    z = solved(layer, x)  # min ½‖x − Dz‖² − bᵀz over z ≥ 0
    assert kkt_residual("relu", z, (x - z @ matrix.T) @ matrix + b, 0.0) <= 1e-10
    expected = (x - z @ matrix.T).square().sum(1) / 2 - z @ b
    torch.testing.assert_close(layer.objective(x, z), expected)


@pytest.mark.parametrize("positive", [False, True])
@pytest.mark.parametrize("seed", range(13))
def test_reference_objective_equals_scikit_learn(seed, positive):
    # 13 dictionaries × 4 signals, each twice: 104 problems.
    layer = dense("relu" if positive else "soft", 12, 24, seed, threshold=0.25)
    x, atoms = signals(4, 12, seed=seed + 100), layer.dictionary.weight.detach().numpy()
    ours = layer.objective(x, solved(layer, x))
    lasso = Lasso(0.25 / 12, fit_intercept=False, positive=positive, tol=1e-12, max_iter=100_000)
    z = torch.stack([torch.from_numpy(lasso.fit(atoms.T, signal).coef_) for signal in x.numpy()])
    torch.testing.assert_close(ours, layer.objective(x, z), rtol=1e-8, atol=0)
    for algorithm in ("lasso_lars", "lasso_cd"):
        z = sparse_encode(x.numpy(), atoms, algorithm=algorithm, alpha=0.25, positive=positive)
        assert not positive or z.min() > -1e-9  # rounding, in LARS
        theirs = layer.objective(x, torch.from_numpy(z.clip(0) if positive else z))
        torch.testing.assert_close(ours, theirs, rtol=1e-8 if algorithm == "lasso_lars" else 1e-3, atol=0)
        assert (ours <= theirs * (1 + 1e-8)).all()


@pytest.mark.parametrize("make,shape", [(dense, (5, 10)), (conv, (2, 2, 6, 6))])
@pytest.mark.parametrize("name", NAMES)
def test_ista_never_raises_the_objective(name, make, shape):
    layer, x = make(name, bias=True), signals(*shape)
    set_bias(layer)
    values = torch.stack([layer.objective(x, z) for z in layer.trace(x, 60, ISTA).codes])
    assert (values.diff(dim=0) <= 1e-12).all()
    assert (values[-1] < values[0] - 1e-3).all()


@pytest.mark.parametrize("make,shape", [(dense, (5, 10)), (conv, (2, 2, 6, 6))])
def test_fista_is_nearer_than_ista_after_32_steps(make, shape):
    layer, x = make("soft"), signals(*shape)
    reference = solved(layer, x)
    ista, fista = (relative_error(layer.trace(x, 32, solver).codes[-1], reference) for solver in (ISTA, FISTA))
    assert fista < ista


@pytest.mark.parametrize("name", NAMES)
def test_fista_keeps_its_rate(name):
    layer, x = dense(name), signals(5, 10)
    best = solved(layer, x)
    optimum, curvature = layer.objective(x, best), 1 / layer.step_size()
    for k, z in enumerate(layer.trace(x, 100, FISTA).codes, 1):
        gap = layer.objective(x, z) - optimum
        assert (gap <= 2 * curvature * best.square().sum(1) / (k + 1) ** 2 + 1e-12).all()


@pytest.mark.parametrize("solver", [ISTA, FISTA])
def test_iterates_are_those_of_the_textbook(solver):
    layer, x = dense("soft"), signals(3, 10)
    matrix, s = layer.dictionary.weight.detach().T, layer.step_size()
    y = old = torch.zeros(3, 20).double()
    t = 1.0
    for z in layer.trace(x, 10, solver).codes:
        point = y + s * (x - y @ matrix.T) @ matrix
        new = point.sign() * (point.abs() - s * 0.25).clamp_min(0)
        following = (1 + (1 + 4 * t**2) ** 0.5) / 2 if solver is FISTA else 1.0
        y, old, t = new + (t - 1) / following * (new - old), new, following
        torch.testing.assert_close(z, new, rtol=1e-6, atol=1e-7)  # t is kept in single precision


def test_restart_recovers_linear_convergence_of_a_strongly_convex_problem():
    layer, x = dense("soft", 40, 30, threshold=0.01), signals(4, 40)
    reference = solved(layer, x)
    plain = relative_error(layer.solve(x, FISTA(300)), reference)
    restarted = relative_error(layer.solve(x, FISTA(300, restart=True)), reference)
    assert restarted < plain / 10


def test_restart_is_decided_for_each_signal_alone():
    layer, x = dense("soft", 40, 30, threshold=0.01), signals(6, 40)
    solver = FISTA(80, restart=True)
    alone = torch.cat([layer.solve(signal, solver) for signal in x.split(1)])
    torch.testing.assert_close(layer.solve(x, solver), alone)


@pytest.mark.parametrize("name", NAMES)
def test_reference_reaches_its_tolerance_and_no_more_steps_than_allowed(name):
    layer, x = dense(name), signals(5, 10)
    assert relative_error(layer.reference(x), solved(layer, x)) < 1e-6
    with torch.no_grad():
        assert torch.equal(layer.reference(x, tol=0, max_steps=100), layer.solve(x, FISTA(100, restart=True)))
    assert torch.equal(layer.reference(torch.zeros_like(x)), torch.zeros(5, 20))


def test_a_solve_continues_from_its_start():
    layer, x = dense("soft", bias=True), signals(3, 10)
    set_bias(layer)
    halfway = layer.solve(x, ISTA(5))
    assert torch.equal(layer.solve(x, ISTA(3), start=halfway), layer.solve(x, ISTA(8)))


@pytest.mark.parametrize("solver", [ISTA(7), FISTA(7), FISTA(40, restart=True)])
def test_trace_has_every_step_and_ends_in_the_forward_code(solver):
    layer, x = dense("soft", solver=solver), signals(3, 10)
    trace = layer.trace(x, solver.steps).codes
    assert len(trace) == solver.steps
    torch.testing.assert_close(trace[-1], layer(x), rtol=0, atol=0)
    for earlier, later in zip(trace, layer.trace(x, solver.steps + 3).codes, strict=False):
        torch.testing.assert_close(earlier, later, rtol=0, atol=0)


def test_restarted_momentum_is_that_of_the_textbook():
    layer, x = dense("soft", 40, 30, threshold=0.01), signals(2, 40)
    matrix, s = layer.dictionary.weight.detach().T, layer.step_size()
    for i, signal in enumerate(x):
        y = old = torch.zeros(30).double()
        t, restarts = 1.0, 0
        for z in layer.trace(x, 60, RestartedFISTA).codes:
            point = y + s * (signal - y @ matrix.T) @ matrix
            new = point.sign() * (point.abs() - s * 0.01).clamp_min(0)
            if (y - new) @ (new - old) > 0:  # O'Donoghue and Candès 2015, the gradient scheme
                t, restarts = 1.0, restarts + 1
            following = (1 + (1 + 4 * t**2) ** 0.5) / 2
            y, old, t = new + (t - 1) / following * (new - old), new, following
            torch.testing.assert_close(z[i], new, rtol=1e-6, atol=1e-7)  # t is kept in single precision
        assert restarts > 0


class RestartedFISTA(FISTA):
    def __init__(self, steps=1, **kwargs):
        super().__init__(steps, **{**kwargs, "restart": True})


def stopping(name="soft", kind=dense, **kwargs):
    layer = kind(name)
    x = signals(5, 10) if kind is dense else signals(2, 2, 6, 6)
    record = []
    z = layer.solve(x, FISTA(2000, **kwargs), record)
    return layer, x, z, record


@pytest.mark.parametrize("restart", [False, True])
@pytest.mark.parametrize("tol", [1e-2, 1e-4])
@pytest.mark.parametrize("kind", [dense, conv])
def test_a_solve_stops_at_the_first_small_step(kind, tol, restart):
    layer, x, z, record = stopping(kind=kind, tol=tol, restart=restart)
    assert torch.equal(z, record[-1])
    assert (fixed_point_residual(z, layer.solve(x, ISTA(1), start=z)) <= tol).all()
    # The measure is that of the last step, from the point it started from: for ISTA, the code before.
    record = []
    layer.solve(x, ISTA(20_000, tol=tol), record)
    moves = torch.stack([fixed_point_residual(b, a).amax() for a, b in pairwise(record)])
    assert moves[-1] <= tol and (moves[:-1] > tol).all()


@pytest.mark.parametrize("tol", [1e-2, 1e-6])
@pytest.mark.parametrize("name", NAMES)
def test_a_solve_stops_at_a_small_gap_within_ten_steps(name, tol):
    layer, x, z, record = stopping(name, tol=tol, criterion="gap", restart=True)
    worst = [layer.relative_gap(x, z).max() for z in record]
    tested = [i for i in range(9, len(record), 10)]
    assert len(record) % 10 == 0 and worst[-1] <= tol
    assert all(worst[i] > tol for i in tested[:-1])
    error = layer.objective(x, z) / layer.objective(x, solved(layer, x)) - 1
    assert (error <= worst[-1] + 1e-12).all()


@pytest.mark.parametrize("criterion,figure", [("residual", "fixed-point residual"), ("gap", "relative duality gap")])
def test_a_solve_that_does_not_reach_its_tolerance_warns(criterion, figure):
    layer, x = dense("soft"), signals(5, 10)
    record = []
    with pytest.warns(ConvergenceWarning, match=rf"{figure} (\S+) after 12 steps, above tol=1.0e-08") as warned:
        layer.solve(x, ISTA(12, tol=1e-8, criterion=criterion), record)
    assert len(record) == 12 and len(warned) == 1
    value = float(str(warned[0].message).split(figure)[1].split()[0])
    expected = layer.relative_gap(x, record[-1]) if criterion == "gap" else fixed_point_residual(record[-1], record[-2])
    assert value == pytest.approx(expected.max().item(), rel=0.05)


def test_signals_that_are_zero_or_nan_end_a_solve():
    layer = dense("soft")
    assert not layer.solve(torch.zeros(2, 10).double(), ISTA(5, tol=1e-3)).any()
    for criterion in ("residual", "gap"):
        x = signals(3, 10)
        x[1, 2] = torch.nan
        with pytest.raises(ValueError, match="signal 1 became NaN.*signals must be finite"):
            layer.solve(x, ISTA(20, tol=1e-3, criterion=criterion))


def test_a_tolerance_passes_gradients_of_the_steps_it_took():
    layer, x = dense("soft"), signals(5, 10).requires_grad_()
    record = []
    z = layer.solve(x, FISTA(500, tol=1e-3), record)
    assert len(record) < 500
    (got,) = torch.autograd.grad(z.square().sum(), x)
    (expected,) = torch.autograd.grad(layer.solve(x, FISTA(len(record))).square().sum(), x)
    assert torch.equal(got, expected)


def test_solvers_are_made_by_name():
    assert {name: create_solver(name, 5) for name in SOLVERS} == {"ista": ISTA(5), "fista": FISTA(5)}
    options = dict(tol=1e-3, criterion="gap", gradient="implicit", damping=0.1)
    assert create_solver("fista", 9, **options) == FISTA(9, **options)


@pytest.mark.parametrize(
    "call,message",
    [
        (lambda: ISTA(0), "must be at least 1, got 0"),
        (lambda: FISTA(-2), "must be at least 1, got -2"),
        (lambda: create_solver("ista", 0), "must be at least 1, got 0"),
        (lambda: create_solver("fist"), "'fist'; did you mean 'fista'"),
        (lambda: ISTA(9, tol=0), "tol must be above 0 .*got 0"),
        (lambda: ISTA(9, tol=-1e-3), "tol must be above 0 .*got -0.001"),
        (lambda: ISTA(9, tol=float("nan")), "tol must be above 0 .*got nan"),
        (lambda: ISTA(1, tol=1e-3), "the most to take and must be at least 2, got 1"),
        (lambda: ISTA(9, criterion="gaps"), "unknown criterion 'gaps'; did you mean 'gap'"),
        (lambda: ISTA(9, gradient="implict"), "unknown gradient 'implict'; did you mean 'implicit'"),
        (lambda: ISTA(9, gradient="implicit", damping=-1), "damping must be at least 0.*got -1"),
        (lambda: ISTA(9, damping=0.1), "belongs to gradient='implicit'.*got 0.1"),
        (lambda: dense("soft", bias=True).solve(signals(2, 10), ISTA(9, tol=1, criterion="gap")), "here 'residual'"),
    ],
)
def test_wrong_solvers_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
