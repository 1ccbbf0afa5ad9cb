"""`sparse_encode` against KKT conditions, scikit-learn, a search over all supports, and its own promises."""

import threading
import warnings
from functools import cache
from itertools import product

import numpy as np
import pytest
import torch
from oracles import CONVEX, GROUPED, NONNEG, kkt_residual, penalty, unfold, weights
from scipy.optimize import minimize
from sklearn.linear_model import ElasticNet, Lasso

import dsc.active_set
import dsc.encode
from dsc.activations import create_activation
from dsc.active_set import ActiveSet
from dsc.dictionaries import ConvDictionary, DenseDictionary, Dictionary
from dsc.encode import sparse_encode
from dsc.solvers import FISTA, ConvergenceWarning

EXACT = 3e-14  # a relative duality gap that double precision reaches
GROUPS = [name for name in CONVEX if GROUPED[name]]
HOMOGENEOUS = [name for name in CONVEX if name != "elastic"]  # Ω(sz) = sΩ(z)


@pytest.fixture(autouse=True)
def _no_warning_is_missed():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


@pytest.fixture(params=["compiled", "batched"])
def engine(request, monkeypatch):
    """The solvers with numba and without."""
    if request.param == "batched":
        monkeypatch.setattr(dsc.active_set, "compiled_descent", lambda: None)


def groups(name, size=2):
    return {"group_size": size} if GROUPED[name] else {}


def gaussian(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def unit(atoms):
    return atoms / atoms.norm(dim=1, keepdim=True)


def problem(kind, signals=8, seed=0):
    """Signals and a dictionary of some kind."""
    features, atoms = {"undercomplete": (24, 12), "one feature": (1, 12), "one group": (12, 4)}.get(kind, (12, 24))
    dictionary = unit(gaussian(atoms, features, seed=seed))
    if kind == "any norms":
        dictionary *= 10 ** gaussian(atoms, 1, seed=seed + 1)
    if kind == "coherent":
        dictionary = unit(dictionary[:1] + 0.2 * dictionary)
    if kind == "duplicated":
        dictionary[atoms // 2 :] = dictionary[: atoms // 2]
    return gaussian(signals, features, seed=seed + 2), dictionary


def largest_correlation(x, dictionary):
    return (x @ dictionary.mT).abs().amax(1).mean().item()


def objectives(name, x, dictionary, z, threshold, size=1, l1_ratio=0.5):
    x, dictionary, z = (t.double() for t in (x, dictionary, z))
    residual = (x - z @ dictionary).numpy()
    return (residual**2).sum(1) / 2 + penalty(name, z, threshold, size, l1_ratio=l1_ratio)


def residual_of(name, x, dictionary, z, threshold, size=1):
    return kkt_residual(name, z, (x - z @ dictionary) @ dictionary.mT, threshold, size)


def minimum(name, x, dictionary, threshold, size=1, l1_ratio=0.5):
    """Least objective of one signal: the best over every set of groups that may be non-zero, each by L-BFGS-B."""
    t = np.broadcast_to(threshold, len(dictionary) // size)
    best = (x**2).sum() / 2
    for chosen in product((False, True), repeat=len(t)):
        if any(chosen):
            on = np.array(chosen)
            best = min(best, _minimum_on(name, x, dictionary[np.repeat(on, size)], t[on], size, l1_ratio))
    return best


def _minimum_on(name, x, atoms, t, size, l1_ratio):
    # With u = p − n, p ≥ 0 and n ≥ 0, the ℓ1 part is linear, and the norms are smooth where no group vanishes.
    a, b, e = weights(name, l1_ratio)
    entry = np.repeat(t, size)
    split = np.eye(len(atoms)) if NONNEG[name] else np.concatenate([np.eye(len(atoms)), -np.eye(len(atoms))])

    def value(p):
        u = p @ split
        norm = np.maximum(np.linalg.norm(u.reshape(-1, size), axis=1), 1e-300)
        r = x - u @ atoms
        slope = -atoms @ r + entry * (b / np.repeat(norm, size) + e) * u
        h = a * entry @ p.reshape(-1, len(u)).sum(0) + b * t @ norm + e / 2 * entry @ u**2
        return r @ r / 2 + h, split @ slope + a * np.tile(entry, len(p) // len(u))

    start = np.maximum(split @ np.linalg.lstsq(atoms.T, x, rcond=None)[0], 1e-3)
    options = {"ftol": 0, "gtol": 1e-13, "maxiter": 3000, "maxfun": 10000, "maxcor": 20}
    found = minimize(value, start, jac=True, bounds=[(0, None)] * len(start), method="L-BFGS-B", options=options)
    return found.fun


# Exactness


@pytest.mark.usefixtures("engine")
@pytest.mark.parametrize("share", [0.5, 0.1])
@pytest.mark.parametrize("kind", ["overcomplete", "undercomplete", "duplicated", "one feature", "one group"])
@pytest.mark.parametrize("name", CONVEX)
def test_dense_codes_are_stationary(name, kind, share):
    x, dictionary = problem(kind)
    size, threshold = (4 if GROUPED[name] else 1), share * largest_correlation(x, dictionary)
    z = sparse_encode(x, dictionary, threshold, name, EXACT, **groups(name, 4))
    assert residual_of(name, x, dictionary, z, threshold, size) <= 1e-10
    assert (z != 0).any()


@pytest.mark.usefixtures("engine")
@pytest.mark.parametrize("name", CONVEX)
def test_codes_of_atoms_of_any_norm_are_stationary(name):
    x, dictionary = problem("any norms")
    threshold = 0.05 * largest_correlation(x, dictionary)
    z = sparse_encode(x, dictionary, threshold, name, EXACT, **groups(name))
    assert residual_of(name, x, dictionary, z, threshold, 2 if GROUPED[name] else 1) <= 1e-10 * max(threshold, 1)


@pytest.mark.parametrize("stride,padding,size", [(1, 1, (5, 5)), (2, 1, (6, 7)), (2, 0, (6, 7))])
@pytest.mark.parametrize("name", CONVEX)
def test_convolutional_codes_are_stationary(name, stride, padding, size):
    torch.manual_seed(0)
    dictionary, x = ConvDictionary(2, 4, 3, stride, padding).double(), gaussian(2, 2, *size)
    z = sparse_encode(x, dictionary, 0.25, name, EXACT, **groups(name))
    matrix = unfold(dictionary, size)
    descent = ((x.flatten(1) - z.flatten(1) @ matrix.T) @ matrix).view_as(z)
    assert kkt_residual(name, z, descent, 0.25, 2 if GROUPED[name] else 1) <= 1e-8
    assert (z != 0).any()


@pytest.mark.usefixtures("engine")
@pytest.mark.parametrize("seed", range(100))
def test_objective_equals_scikit_learn(seed):
    draw = np.random.default_rng(seed)
    kind = ("overcomplete", "undercomplete", "any norms", "coherent", "duplicated")[seed % 5]
    x, dictionary = problem(kind, 3, seed)
    threshold, positive = draw.uniform(0.02, 0.6) * largest_correlation(x, dictionary), seed % 2 == 0
    lasso = Lasso(threshold / x.shape[1], fit_intercept=False, positive=positive, tol=1e-13, max_iter=10**6)
    theirs = torch.from_numpy(lasso.fit(dictionary.T.numpy(), x.T.numpy()).coef_)
    name = "relu" if positive else "soft"
    ours = sparse_encode(x, dictionary, threshold, name, 1e-11)
    expected = objectives(name, x, dictionary, theirs, threshold)
    np.testing.assert_allclose(objectives(name, x, dictionary, ours, threshold), expected, rtol=1e-9)


@pytest.mark.usefixtures("engine")
@pytest.mark.parametrize("l1_ratio", [0.1, 0.5, 0.95])
def test_elastic_net_equals_scikit_learn(l1_ratio):
    x, dictionary = problem("any norms")
    threshold = 0.1 * largest_correlation(x, dictionary)
    net = ElasticNet(threshold / x.shape[1], l1_ratio=l1_ratio, fit_intercept=False, tol=1e-13, max_iter=10**6)
    theirs = torch.from_numpy(net.fit(dictionary.T.numpy(), x.T.numpy()).coef_)
    ours = sparse_encode(x, dictionary, threshold, "elastic", 1e-13, l1_ratio=l1_ratio)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-7 * theirs.abs().max().item())
    values = [objectives("elastic", x, dictionary, z, threshold, l1_ratio=l1_ratio) for z in (ours, theirs)]
    np.testing.assert_allclose(*values, rtol=1e-9)


@pytest.mark.parametrize("shape", [(4, 2, 5), (3, 3, 12), (5, 2, 6)])
@pytest.mark.parametrize("name", GROUPS)
def test_group_codes_are_the_best_over_all_sets_of_groups(name, shape):
    count, size, features = shape
    dictionary, x = unit(gaussian(count * size, features)), gaussian(3, features, seed=1)
    threshold = np.linspace(0.1, 0.6, count)
    codes = sparse_encode(x, dictionary, threshold.tolist(), name, 1e-11, group_size=size)
    threshold = np.float32(threshold).astype(float)  # as a prox keeps its thresholds
    found = objectives(name, x, dictionary, codes, threshold, size)
    best = [minimum(name, signal, dictionary.numpy(), threshold, size) for signal in x.numpy()]
    np.testing.assert_allclose(found, best, rtol=1e-9)


# Certificates


def certified_problem():
    # Numbers that single precision and bfloat16 hold; atoms of norms from 0.4 to 4.
    x, dictionary = (gaussian(n, m, seed=n).bfloat16().double() for n, m in ((3, 5), (6, 5)))
    return x, dictionary * torch.tensor([0.25, 0.5, 1.0, 1.0, 2.0, 1.0], dtype=torch.float64)[:, None]


@cache
def least(name):
    x, dictionary = certified_problem()
    return np.array([minimum(name, s, dictionary.numpy(), 0.3, 2 if GROUPED[name] else 1) for s in x.numpy()])


@pytest.mark.usefixtures("engine")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", CONVEX)
def test_gap_bounds_the_suboptimality(name, dtype):
    x, dictionary = certified_problem()
    for tol in (1e-1, 1e-2, 1e-4, 1e-6):
        z, gaps = sparse_encode(x.to(dtype), dictionary.to(dtype), 0.3, name, tol, return_gap=True, **groups(name))
        assert z.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert gaps.dtype == torch.float64 and gaps.shape == (3,) and (gaps >= 0).all() and (gaps <= tol).all()
        found = objectives(name, x, dictionary, z, 0.3, 2 if GROUPED[name] else 1)
        assert ((found - least(name)) / found <= gaps.numpy() + 1e-11).all()


@pytest.mark.usefixtures("engine")
@pytest.mark.parametrize("name", CONVEX)
def test_a_tolerance_below_single_precision_is_reached(name):
    x, dictionary = (t.float() for t in problem("overcomplete", 20))
    z, gaps = sparse_encode(x, dictionary, 0.2, name, 1e-10, return_gap=True, **groups(name))
    exact = sparse_encode(x.double(), dictionary.double(), 0.2, name, 1e-12, **groups(name))
    size = 2 if GROUPED[name] else 1
    least, found = (objectives(name, x, dictionary, code, 0.2, size) for code in (exact, z))
    assert z.dtype == torch.float32 and gaps.max() <= 1e-10
    assert ((found - least) / found).max() <= 1e-10


@pytest.mark.usefixtures("engine")
@pytest.mark.parametrize("name", HOMOGENEOUS)
def test_large_signals_in_single_precision_are_finished_in_double(name):
    # The correlations are a million times λ, and their rounding is near it.
    x, dictionary = problem("overcomplete", 10)
    x, dictionary = (1e6 * x).float(), dictionary.float()
    z, gaps = sparse_encode(x, dictionary, 0.2, name, 1e-4, return_gap=True, **groups(name))
    size = 2 if GROUPED[name] else 1
    exact = sparse_encode(x.double(), dictionary.double(), 0.2, name, 1e-6, **groups(name))
    found, least = (objectives(name, x, dictionary, code, 0.2, size) for code in (z, exact))
    assert gaps.max() <= 1e-4
    assert ((found - least) / found).max() <= 1e-4


def test_a_signal_that_does_not_reach_the_tolerance_is_warned_of(monkeypatch):
    x, dictionary = problem("overcomplete", 6)
    x[4] = 0  # certified at once
    monkeypatch.setattr(dsc.encode, "ROUNDS", 1)
    monkeypatch.setattr(dsc.active_set, "compiled_descent", lambda: None)  # with numba no round is needed
    threshold = 0.01 * largest_correlation(x, dictionary)
    with pytest.warns(ConvergenceWarning) as caught:
        z, gaps = sparse_encode(x, dictionary, threshold, tol=1e-12, return_gap=True)
    left = int((gaps > 1e-12).sum())
    assert 0 < left < 6
    assert str(caught[0].message) == (
        f"{left} of 6 signals have not reached the relative duality gap tol=1e-12: the farthest is at {gaps.max():.2g}"
    )
    assert caught[0].filename == __file__
    monkeypatch.undo()
    found = objectives("soft", x, dictionary, z, threshold)
    exact = objectives("soft", x, dictionary, sparse_encode(x, dictionary, threshold, tol=1e-11), threshold)
    assert (found - exact <= gaps.numpy() * found + 1e-12).all()


def test_a_convolution_that_does_not_reach_the_tolerance_is_warned_of(monkeypatch):
    torch.manual_seed(0)
    dictionary, x = ConvDictionary(1, 4, 3).double(), gaussian(3, 1, 6, 6)
    monkeypatch.setattr(dsc.encode, "STEPS", FISTA(2))
    monkeypatch.setattr(dsc.encode, "BLOCKS", 1)
    with pytest.warns(ConvergenceWarning, match=r"3 of 3 signals .* tol=1e-10: the farthest is at \d"):
        sparse_encode(x, dictionary, 0.1, tol=1e-10)


class Reversed(Dictionary):
    """Signals (…, features) read backwards, over atoms as rows."""

    def synthesize(self, z, size=None):
        return (z @ self.weight).flip(-1)

    def analyze(self, x):
        return x.flip(-1) @ self.weight.T

    def lipschitz(self):
        return torch.linalg.matrix_norm(self.weight, 2).square()


def test_a_dictionary_of_ones_own_is_served():
    torch.manual_seed(0)
    dictionary, x = Reversed(torch.randn(12, 5, dtype=torch.float64)), gaussian(4, 5)
    atoms = dictionary.weight.detach().flip(-1)
    found, gaps = sparse_encode(x, dictionary, 0.1, tol=1e-10, return_gap=True)
    assert gaps.max() <= 1e-10
    torch.testing.assert_close(found @ atoms, sparse_encode(x, atoms, 0.1, tol=1e-10) @ atoms, rtol=0, atol=1e-4)
    with pytest.raises(ValueError, match="signal 1 has values that are not finite"):
        sparse_encode(torch.where(torch.arange(4)[:, None] == 1, torch.nan, x), dictionary, 0.1)


def test_single_precision_convolutions_are_finished_in_double():
    torch.manual_seed(0)
    dictionary, x = ConvDictionary(1, 4, 3, padding=1), gaussian(1, 1, 6, 6).float()
    z, gaps = sparse_encode(x, dictionary, 0.1, tol=1e-8, return_gap=True)
    assert z.dtype == torch.float32 and gaps.max() <= 1e-8


# Batches


@pytest.mark.parametrize("name", CONVEX)
def test_signals_are_coded_independently(name):
    x, dictionary = problem("overcomplete", 8)
    encode = lambda x: sparse_encode(x, dictionary, 0.2, name, 1e-12, **groups(name))  # noqa: E731
    together, order = encode(x), torch.randperm(8, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(torch.cat([encode(row) for row in x.split(1)]), together, rtol=0, atol=1e-6)
    torch.testing.assert_close(encode(x[order]), together[order], rtol=0, atol=1e-6)


@pytest.mark.parametrize("scale", [1e-20, 1e-6, 1e6, 1e20])
@pytest.mark.parametrize("name", HOMOGENEOUS)
def test_codes_scale_with_signals_and_threshold(name, scale):
    x, dictionary = problem("overcomplete")
    z = sparse_encode(x, dictionary, 0.2, name, 1e-12, **groups(name))
    scaled = sparse_encode(scale * x, dictionary, 0.2 * scale, name, 1e-12, **groups(name))
    torch.testing.assert_close(scaled / scale, z, rtol=0, atol=1e-6)
    inverse = sparse_encode(x, scale * dictionary, 0.2 * scale, name, 1e-12, **groups(name))
    torch.testing.assert_close(inverse * scale, z, rtol=0, atol=1e-6)


@pytest.mark.usefixtures("engine")
@pytest.mark.parametrize("scale", [1e-20, 1e18])
@pytest.mark.parametrize("name", HOMOGENEOUS)
def test_single_precision_codes_scale_too(name, scale):
    # The energy of these signals is no single-precision number.
    x, dictionary = (t.float() for t in problem("overcomplete"))
    exact = sparse_encode(x.double(), dictionary.double(), 0.2, name, 1e-12, **groups(name))
    scaled, gaps = sparse_encode(scale * x, dictionary, 0.2 * scale, name, 1e-6, return_gap=True, **groups(name))
    assert gaps.max() <= 1e-6
    torch.testing.assert_close(scaled.double() / scale, exact, rtol=0, atol=2e-2)


@pytest.mark.parametrize("name", ["soft", "group_relu"])
def test_a_gap_that_is_no_number_is_not_taken_for_a_certificate(name):
    # In single precision the energy of these signals is 0.
    x, dictionary = (t.float() for t in problem("overcomplete"))
    z, gaps = sparse_encode(1e-30 * x, dictionary, 2e-31, name, return_gap=True, **groups(name))
    assert (gaps <= 1e-4).all()
    codes = sparse_encode(x, dictionary, 0.2, name, **groups(name)), z.double() / 1e-30
    size = 2 if GROUPED[name] else 1
    np.testing.assert_allclose(*(objectives(name, x, dictionary, code, 0.2, size) for code in codes), rtol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", CONVEX)
def test_zero_signals_and_large_thresholds_give_zero_codes(name, dtype):
    x, dictionary = (t.to(dtype) for t in problem("overcomplete"))
    z, gaps = sparse_encode(0 * x, dictionary, 0.1, name, 1e-12, return_gap=True, **groups(name))
    assert not z.any() and not gaps.any()
    c = x.double() @ dictionary.double().mT
    least = create_activation(name, threshold=1.0, l1_ratio=1.0 if name == "elastic" else None, **groups(name))
    largest = least.gauge(c).max().item() * (2 if name == "elastic" else 1)  # above it the only code is zero
    z, gaps = sparse_encode(x, dictionary, largest * 1.001, name, 1e-12, return_gap=True, **groups(name))
    assert not z.any() and not gaps.any()
    assert sparse_encode(x, dictionary, largest * 0.9, name, 1e-6, **groups(name)).any()


@pytest.mark.parametrize("kind", ["array", "tensor"])
@pytest.mark.parametrize("name", ["soft", "group_relu"])
def test_no_signals_give_no_codes(name, kind):
    x, dictionary = torch.zeros(0, 6), unit(gaussian(8, 6)).float()
    x = x.numpy() if kind == "array" else x
    z, gaps = sparse_encode(x, dictionary, 0.1, name, return_gap=True, **groups(name))
    assert type(z) is type(x) and tuple(z.shape) == (0, 8) and tuple(gaps.shape) == (0,)


def test_one_atom_has_a_closed_form():
    atom, x = gaussian(1, 7, seed=3), gaussian(5, 7)
    c, energy = x @ atom[0], atom.square().sum()
    shrunk = c.sign() * (c.abs() - 0.5).clamp_min(0) / energy
    torch.testing.assert_close(sparse_encode(x, atom, 0.5, tol=1e-13)[:, 0], shrunk)
    torch.testing.assert_close(sparse_encode(x, atom, 0.5, "relu", 1e-13)[:, 0], shrunk.clamp_min(0))


@pytest.mark.usefixtures("engine")
@pytest.mark.parametrize("name", CONVEX)
def test_a_dictionary_of_rank_one_is_coded(name):
    x, dictionary = gaussian(10, 6), gaussian(16, 1, seed=1) @ unit(gaussian(1, 6, seed=2))
    z = sparse_encode(x, dictionary, 0.1, name, 1e-11, **groups(name, 8))
    assert residual_of(name, x, dictionary, z, 0.1, 8 if GROUPED[name] else 1) <= 1e-5


@pytest.mark.parametrize("name", CONVEX)
def test_a_tiny_threshold_leads_to_the_least_squares_fit(name):
    x, dictionary = problem("undercomplete" if not NONNEG[name] else "overcomplete")
    z = sparse_encode(x, dictionary, 1e-5, name, 1e-8, **groups(name))
    assert residual_of(name, x, dictionary, z, 1e-5, 2 if GROUPED[name] else 1) <= 1e-10
    if not NONNEG[name]:
        torch.testing.assert_close(z, torch.linalg.lstsq(dictionary.T, x.T).solution.T, rtol=0, atol=1e-3)


@pytest.mark.parametrize("name", ["soft", "group_relu"])
def test_an_overcomplete_dictionary_uses_at_most_as_many_groups_as_features(name):
    x, dictionary = problem("overcomplete", 30)
    z = sparse_encode(x, dictionary, 1e-4, name, 1e-7, **groups(name))
    torch.testing.assert_close(z @ dictionary, x, rtol=0, atol=1e-2)
    if name == "soft":
        assert (z != 0).sum(1).max() <= x.shape[1]


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def threads_of_a_new_thread():
    seen = []
    thread = threading.Thread(target=lambda: seen.append(torch.get_num_threads()))
    thread.start()
    thread.join()
    return seen[0]


@pytest.mark.usefixtures("engine")
@pytest.mark.parametrize("name", ["soft", "group_relu"])
def test_parts_and_threads_change_no_code(name, two_threads, monkeypatch):
    x, dictionary = problem("overcomplete", 1500)
    encode = lambda: sparse_encode(x, dictionary, 0.3, name, 1e-11, return_gap=True, **groups(name))  # noqa: E731
    threaded = encode()
    assert torch.get_num_threads() == threads_of_a_new_thread() == 2
    torch.set_num_threads(1)
    alone = encode()
    monkeypatch.setattr(dsc.encode, "CODES_AT_ONCE", 24 * 111)
    parts = encode()
    for z, gaps in (threaded, parts):
        assert gaps.max() <= 1e-11
        torch.testing.assert_close(z, alone[0], rtol=0, atol=1e-5)


def test_a_failing_thread_is_heard_of_and_leaves_the_threads_alone(two_threads, monkeypatch):
    def fail(*args):
        raise MemoryError("no room")

    monkeypatch.setattr(ActiveSet, "solve", fail)
    with pytest.raises(MemoryError, match="no room"):
        sparse_encode(gaussian(600, 4), unit(gaussian(8, 4)), 0.1)
    assert torch.get_num_threads() == threads_of_a_new_thread() == 2


# Arguments


@pytest.mark.usefixtures("engine")
@pytest.mark.parametrize("kind", [list, np.array, torch.tensor])
@pytest.mark.parametrize("name", CONVEX)
def test_threshold_per_atom_or_group(name, kind):
    x, dictionary = problem("overcomplete")
    size = 2 if GROUPED[name] else 1
    threshold = np.linspace(0.1, 0.5, 24 // size)
    z = sparse_encode(x, dictionary, kind(threshold.tolist()), name, EXACT, **groups(name))
    assert residual_of(name, x, dictionary, z, threshold, size) <= 1e-7  # kept in single precision


def test_threshold_per_atom_keeps_double_precision():
    x, dictionary = problem("overcomplete")
    threshold = torch.linspace(0.1, 0.5, 24, dtype=torch.float64)
    z = sparse_encode(x, dictionary, threshold, tol=EXACT)
    assert residual_of("soft", x, dictionary, z, threshold.numpy()) <= 1e-10


@pytest.mark.parametrize("threshold", [0.25, [0.25], np.float64(0.25), np.float32(0.25), torch.tensor(0.25)])
def test_one_threshold_in_any_form(threshold):
    x, dictionary = problem("overcomplete")
    torch.testing.assert_close(sparse_encode(x, dictionary, threshold), sparse_encode(x, dictionary, 0.25))


@pytest.mark.parametrize("name", GROUPS)
def test_groups_by_their_number_or_their_size(name):
    x, dictionary = problem("any norms")
    z = sparse_encode(x, dictionary, 0.25, name, 1e-10, groups=6)
    torch.testing.assert_close(z, sparse_encode(x, dictionary, 0.25, name, 1e-10, group_size=4))


@pytest.mark.parametrize("learn", [False, True])
@pytest.mark.parametrize("threshold", [0.25, np.linspace(0.125, 1, 24).tolist()])
def test_a_prox_module_brings_its_own_threshold(threshold, learn):
    x, dictionary = problem("overcomplete")
    prox = create_activation("soft", threshold=threshold, learn=learn)
    z, gaps = sparse_encode(x, dictionary, prox=prox, tol=1e-10, return_gap=True)
    assert not z.requires_grad and not gaps.requires_grad
    assert residual_of("soft", x, dictionary, z, np.array(threshold)) <= 1e-6
    assert prox.training
    if learn:
        prox(x[:, :1].expand(-1, 24)).sum().backward()  # its parameter still learns
        assert prox.raw_threshold.grad.any()


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
def test_arrays_in_arrays_out(dtype):
    x, dictionary = (t.numpy().astype(dtype) for t in problem("overcomplete"))
    z, gaps = sparse_encode(x, dictionary, 0.2, return_gap=True)
    assert isinstance(z, np.ndarray) and z.dtype == dtype and gaps.dtype == np.float64
    expected = sparse_encode(torch.from_numpy(x), torch.from_numpy(dictionary), 0.2)
    np.testing.assert_allclose(z, expected.numpy(), atol=1e-4)


def test_an_array_that_may_not_be_written_to_is_only_read():
    x, dictionary = (t.numpy() for t in problem("overcomplete"))
    before = x.copy(), dictionary.copy()
    x.flags.writeable = dictionary.flags.writeable = False
    sparse_encode(x, dictionary, 0.2)
    np.testing.assert_array_equal(x, before[0])
    np.testing.assert_array_equal(dictionary, before[1])


def test_whole_numbers_are_signals_too():
    x, dictionary = (3 * problem("overcomplete")[0]).round(), problem("overcomplete")[1]
    z = sparse_encode(x.long(), dictionary, 0.2)
    assert z.dtype == torch.float32
    torch.testing.assert_close(z, sparse_encode(x.float(), dictionary.float(), 0.2))


def test_no_gradient_is_recorded():
    x, dictionary = (t.requires_grad_() for t in problem("overcomplete"))
    z, gaps = sparse_encode(x, dictionary, 0.2, return_gap=True)
    assert not z.requires_grad and not gaps.requires_grad and torch.is_grad_enabled()


@pytest.mark.parametrize("training", [False, True])
def test_a_dictionary_module_stays_as_it_is(training):
    torch.manual_seed(0)
    dictionary, x = ConvDictionary(1, 4, 3).double().train(training), gaussian(2, 1, 6, 6)
    state = {key: value.clone() for key, value in dictionary.state_dict().items()}
    sparse_encode(x, dictionary, 0.2)
    assert dictionary.training == training
    for key, value in dictionary.state_dict().items():
        assert torch.equal(value, state[key])
    with pytest.raises(ValueError):
        sparse_encode(x[..., :2, :2], dictionary, 0.2)
    assert dictionary.training == training


@pytest.mark.parametrize("name", CONVEX)
def test_a_dense_dictionary_module_is_its_atoms(name):
    torch.manual_seed(0)
    dictionary, x = DenseDictionary(12, 24).double(), gaussian(5, 12)
    z, gaps = sparse_encode(x, dictionary, 0.2, name, 1e-10, return_gap=True, **groups(name))
    expected = sparse_encode(x, dictionary.weight, 0.2, name, 1e-10, **groups(name))
    torch.testing.assert_close(z, expected, rtol=0, atol=1e-4)
    assert gaps.max() <= 1e-10


# Bad input


def bad(**values):
    """Arguments of a small problem, with some of them replaced."""
    arguments = {"x": gaussian(5, 6), "dictionary": unit(gaussian(8, 6)), "threshold": 0.1} | values
    return arguments.pop("x"), arguments.pop("dictionary"), arguments


def with_value(value, row, rows, columns=6):
    values = gaussian(rows, columns)
    values[row] = value
    return values


@pytest.mark.parametrize(
    "values,error,message",
    [
        ({"x": gaussian(6)}, ValueError, r"\(signals, features\).*got \(6,\) and \(8, 6\)"),
        ({"x": gaussian(1, 5, 6)}, ValueError, r"\(signals, features\).*got \(1, 5, 6\)"),
        ({"x": gaussian(5, 7)}, ValueError, r"atoms as rows; got \(5, 7\) and \(8, 6\)"),
        ({"dictionary": gaussian(6, 8)}, ValueError, r"atoms as rows; got \(5, 6\) and \(6, 8\)"),
        ({"dictionary": gaussian(6)}, ValueError, r"got \(5, 6\) and \(6,\)"),
        ({"x": with_value(torch.nan, 3, 5)}, ValueError, "signal 3 has values that are not finite"),
        ({"x": with_value(torch.inf, 2, 5)}, ValueError, "signal 2 has values that are not finite"),
        ({"dictionary": with_value(-torch.inf, 1, 8)}, ValueError, "atom 1 has values that are not finite"),
        ({"dictionary": with_value(0, 4, 8)}, ValueError, "atom 4 is zero.*remove it"),
        ({"dictionary": gaussian(0, 6)}, ValueError, "atoms"),
        ({"threshold": None}, ValueError, r"give the threshold λ > 0 of 'soft': sparse_encode\(.*threshold=0.1\)"),
        ({"threshold": 0}, ValueError, "threshold must be above 0 .*got 0"),
        ({"threshold": -0.5}, ValueError, "threshold must be .*got -0.5"),
        ({"threshold": float("nan")}, ValueError, "threshold must be above 0.*got nan"),
        ({"threshold": float("inf")}, ValueError, "threshold must be finite.*got inf"),
        ({"threshold": [0.1] * 7}, ValueError, "threshold has 7 values, expected 1 or 8"),
        ({"threshold": [0.1] * 7 + [0.0]}, ValueError, "threshold must be above 0"),
        ({"threshold": torch.ones(1, 8)}, ValueError, r"threshold must be a number or a list.*shape \(1, 8\)"),
        ({"threshold": [0.1] * 8, "prox": "group_relu", "group_size": 2}, ValueError, "8 values, expected 1 or 4"),
        ({"tol": 0}, ValueError, r"tol.*between 0 and 1 \(such as 1e-4\), got 0"),
        ({"tol": -1e-4}, ValueError, "tol.*between 0 and 1.*got -0.0001"),
        ({"tol": float("nan")}, ValueError, "tol.*between 0 and 1.*got nan"),
        ({"tol": None}, (TypeError, ValueError), "tol"),
        ({"prox": "sofft"}, ValueError, "'sofft'; did you mean 'soft'"),
        ({"prox": "hard"}, TypeError, "penalty of hard is not convex.*take one of relu, soft"),
        ({"prox": "top_k", "k": 3, "threshold": None}, TypeError, "top_k.*not convex.*take one of relu, soft"),
        ({"prox": "gelu", "threshold": None}, TypeError, "gelu.*take one of relu, soft"),
        ({"group_size": 2}, ValueError, r"'soft' takes no group_size \(taken by: group_relu"),
        ({"alpha": 0.1, "threshold": None}, ValueError, "alpha"),
        ({"prox": "group_relu", "group_size": 3}, ValueError, "group_size=3 does not divide the 8.*2 or 4"),
        ({"prox": "group_relu", "groups": 3}, ValueError, "groups=3 does not divide the 8.*2 or 4"),
        ({"prox": "group_relu", "groups": 2, "group_size": 4}, ValueError, "group_size or groups, not both"),
        ({"prox": "elastic", "l1_ratio": 1.5}, ValueError, "l1_ratio must lie between 0 .* got 1.5"),
        ({"prox": create_activation("soft", threshold=0.2)}, ValueError, "threshold given beside"),
        ({"prox": create_activation("relu"), "threshold": None}, ValueError, "threshold must be above 0"),
        ({"x": gaussian(5, 6) + 0j}, (TypeError, ValueError), "complex"),
    ],
)
def test_bad_input_is_named(values, error, message):
    x, dictionary, arguments = bad(**values)
    with pytest.raises(error, match=message):
        sparse_encode(x, dictionary, **arguments)


@pytest.mark.parametrize(
    "values,error,message",
    [
        ({"x": torch.full((2, 1, 6, 6), torch.nan)}, ValueError, "not finite"),
        ({"x": torch.zeros(2, 2, 6, 6)}, ValueError, r"\(signals, 1, height, width\), got \(2, 2, 6, 6\)"),
        ({"x": torch.zeros(6, 6)}, ValueError, r"\(6, 6\)"),
        ({"x": torch.zeros(1, 6, 6)}, ValueError, r"\(1, 6, 6\)"),
        ({"x": torch.zeros(2, 1, 2, 2)}, ValueError, "2×2 pixels is too small.*at least 3"),
        ({"threshold": [0.1] * 5}, ValueError, "threshold has 5 values, expected 1 or 4"),
        ({"prox": "group_relu", "group_size": 3}, ValueError, "group_size=3 does not divide the 4.*2 or 4"),
        ({"threshold": 0.0}, ValueError, "threshold must be above 0"),
    ],
)
def test_bad_images_are_named(values, error, message):
    x, dictionary, arguments = bad(**{"x": torch.ones(2, 1, 6, 6), "dictionary": ConvDictionary(1, 4, 3)} | values)
    with pytest.raises(error, match=message):
        sparse_encode(x, dictionary, **arguments)


@pytest.mark.parametrize("shape", [(5, 7), (6,)])
def test_bad_signals_of_a_dense_module_are_named(shape):
    with pytest.raises(ValueError, match=str(shape[-1])):
        sparse_encode(torch.zeros(shape), DenseDictionary(6, 8), 0.1)


@pytest.mark.parametrize("make", [lambda: DenseDictionary(6, 8), lambda: ConvDictionary(6, 8, 1)])
def test_signals_of_another_precision_than_the_module(make):
    dictionary = make()
    x = gaussian(5, 6) if isinstance(dictionary, DenseDictionary) else gaussian(5, 6, 2, 2)
    z = sparse_encode(x, dictionary, 0.2)
    expected = sparse_encode(x.float(), dictionary, 0.2)
    assert z.dtype == torch.float64
    torch.testing.assert_close(z.float(), expected, rtol=0, atol=1e-2)


def test_a_dictionary_too_large_for_its_gram_matrix_is_solved_by_steps(monkeypatch):
    x, dictionary = problem("overcomplete", 5)
    expected = sparse_encode(x, dictionary, 0.2, tol=1e-10)
    monkeypatch.setattr(dsc.encode, "MOST_ATOMS", 1)
    monkeypatch.setattr(dsc.encode, "ActiveSet", None)
    z, gaps = sparse_encode(x, dictionary, 0.2, tol=1e-10, return_gap=True)
    torch.testing.assert_close(z, expected, rtol=0, atol=1e-4)
    assert gaps.max() <= 1e-10
