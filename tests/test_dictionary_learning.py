import warnings

import numpy as np
import oracles
import pytest
import sklearn.decomposition
import torch
from scipy.optimize import linear_sum_assignment
from sklearn.base import clone
from sklearn.cluster import KMeans
from sklearn.exceptions import ConvergenceWarning
from sklearn.metrics import adjusted_rand_score
from sklearn.pipeline import make_pipeline
from sklearn.utils.estimator_checks import parametrize_with_checks

from dsc.dictionary_learning import SWEEPS, DictionaryLearning, improved_atoms
from dsc.encode import sparse_encode

PROX = {"soft": {}, "relu": {}, "elastic": {"l1_ratio": 0.7}}
PROX |= {"group_relu": {"group_size": 2}, "group_relu_nonneg": {"group_size": 2}}
PROX |= {"sparse_group": {"group_size": 2, "l1_ratio": 0.4}}


def unit(atoms):
    return atoms / np.linalg.norm(atoms, axis=1, keepdims=True)


def made(features, atoms, active, signals, size=1, noise=0.01, seed=0):
    """Signals of `active` groups of `size` atoms each, the atoms, and which groups."""
    random = np.random.default_rng(seed)
    dictionary = unit(random.standard_normal((atoms, features)))
    support = random.random((signals, atoms // size)).argsort(1)[:, :active]
    codes = np.zeros((signals, atoms // size, size))
    np.put_along_axis(codes, support[..., None], random.standard_normal((signals, active, size)), axis=1)
    x = codes.reshape(signals, atoms) @ dictionary
    return x + noise * random.standard_normal(x.shape), dictionary, support


def near(dictionary, correlation=0.56, seed=1):
    """Atoms of about that correlation with the true ones, as at the start of the paper's simulations."""
    noise = np.random.default_rng(seed).standard_normal(dictionary.shape) / dictionary.shape[1] ** 0.5
    return unit(dictionary + (1 / correlation**2 - 1) ** 0.5 * noise)


def matched(similarity):
    """Similarity of each true atom or group to the one found for it."""
    return similarity[linear_sum_assignment(similarity, maximize=True)]


def subspace_cosines(found, true, size):
    """Cosine of the largest principal angle between every two groups."""
    a, b = (np.linalg.qr(d.reshape(-1, size, d.shape[1]).swapaxes(1, 2))[0] for d in (found, true))
    return np.linalg.svd(np.einsum("gnd,hne->ghde", a, b), compute_uv=False)[..., -1]


def objective(x, codes, atoms, name="soft", alpha=1.0, group_size=1, l1_ratio=0.5):
    penalty = oracles.penalty(name, torch.from_numpy(codes), alpha, group_size, l1_ratio=l1_ratio)
    return ((x - codes @ atoms) ** 2).sum() / 2 + penalty.sum()


@parametrize_with_checks([DictionaryLearning()])
def test_scikit_learns_own_checks(estimator, check):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        check(estimator)


def test_recovers_the_atoms_that_made_the_signals():
    x, truth, _ = made(20, 30, 3, 2000)
    model = DictionaryLearning(30, alpha=0.2, random_state=0).fit(x)
    np.testing.assert_allclose(np.linalg.norm(model.components_, axis=1), 1, rtol=1e-12)
    cosines = matched(abs(model.components_ @ truth.T))  # up to sign and order
    assert (cosines > 0.99).mean() >= 0.9
    assert np.median(cosines) > 0.999


def test_recovers_groups_from_a_start_near_them():
    x, truth, support = made(30, 30, 2, 600, size=2)
    start = near(truth)
    assert np.median(subspace_cosines(start, truth, 2).diagonal()) < 0.6
    model = DictionaryLearning(30, alpha=0.3, prox="group_relu", group_size=2, dict_init=start, tol=1e-4).fit(x)
    assert subspace_cosines(model.components_, truth, 2).diagonal().min() > 0.99
    norms = np.linalg.norm(model.transform(x).reshape(600, 15, 2), axis=2)
    assert (np.sort(norms.argsort(1)[:, -2:]) == np.sort(support)).all(1).mean() > 0.85


def test_recovers_groups_from_the_signals_alone():
    x, truth, _ = made(16, 24, 1, 400, size=3)
    model = DictionaryLearning(24, alpha=0.3, prox="group_relu", group_size=3, tol=1e-4, random_state=0).fit(x)
    assert (matched(subspace_cosines(model.components_, truth, 3)) > 0.99).mean() >= 0.75


def test_agrees_with_scikit_learn():
    x, truth, _ = made(10, 15, 2, 300, noise=0.05)
    start = near(truth, 0.9)
    ours = DictionaryLearning(15, alpha=0.2, tol=1e-8, dict_init=start).fit(x)
    theirs = sklearn.decomposition.DictionaryLearning(
        15, alpha=0.2, tol=1e-8, fit_algorithm="cd", dict_init=start, code_init=np.zeros((300, 15))
    ).fit(x)
    assert ours.error_[0] <= theirs.error_[0]  # five sweeps of the same least squares against one
    assert ours.error_[-1] == pytest.approx(theirs.error_[-1], rel=1e-6)
    np.testing.assert_allclose(ours.components_, theirs.components_, atol=2e-3)


@pytest.mark.parametrize("seed", range(3))
def test_is_not_worse_than_scikit_learn_after_as_many_turns(seed):
    x, _, _ = made(10, 15, 2, 300, noise=0.05, seed=seed)
    start = unit(x[:15])
    ours = DictionaryLearning(15, alpha=0.2, tol=0, max_iter=10, dict_init=start)
    theirs = sklearn.decomposition.DictionaryLearning(
        15, alpha=0.2, tol=0, max_iter=10, fit_algorithm="cd", dict_init=start, code_init=np.zeros((300, 15))
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        # From one start they may end in different local minima: 4 % apart is the most seen, either way.
        assert ours.fit(x).error_[-1] <= 1.05 * theirs.fit(x).error_[-1]


@pytest.mark.parametrize("name", PROX)
def test_the_objective_never_rises(name):
    x, _, _ = made(6, 8, 2, 60, size=2, noise=0.1)
    model = DictionaryLearning(8, alpha=0.3, prox=name, random_state=0, tol=0, max_iter=15, **PROX[name])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        error = model.fit(x).error_
    assert len(error) == model.n_iter_ > 5
    assert (error[1:] <= error[:-1] * (1 + model.transform_tol)).all()
    assert error[-1] < 0.95 * error[0]


@pytest.mark.parametrize("name", PROX)
def test_each_half_step_lowers_the_stated_objective(name):
    x, truth, _ = made(6, 8, 2, 100, size=2, noise=0.1)
    arguments, start = PROX[name], near(truth)
    codes = sparse_encode(x, start, threshold=0.3, prox=name, tol=1e-6, **arguments)
    before = objective(x, codes, start, name, 0.3, **arguments)
    atoms, scaled = (t.numpy() for t in improved_atoms(*map(torch.from_numpy, (x, codes, start))))
    after = objective(x, scaled, atoms, name, 0.3, **arguments)
    assert after < before
    with pytest.warns(ConvergenceWarning, match="max_iter=1 turns"):
        model = DictionaryLearning(alpha=0.3, prox=name, dict_init=start, max_iter=1, **arguments).fit(x)
    assert model.error_ == pytest.approx([after], rel=1e-12)
    recoded = model.transform(x)
    assert objective(x, recoded, model.components_, name, 0.3, **arguments) <= after * (1 + 1e-6)


def test_least_squares_for_the_atoms_is_solved_under_its_bound():
    x, truth, _ = made(6, 8, 3, 100, noise=0.1)
    codes = torch.from_numpy(sparse_encode(x, near(truth), threshold=0.3))
    codes[:, 0] *= 3  # this atom had better be short
    x, atoms = torch.from_numpy(x), torch.from_numpy(near(truth))
    for _ in range(100 // SWEEPS):
        atoms, codes = improved_atoms(x, codes, atoms)
    torch.testing.assert_close(atoms.norm(dim=1), torch.ones(8, dtype=x.dtype))
    descent = codes.mT @ (x - codes @ atoms)
    multiplier = (descent * atoms).sum(1)
    assert (multiplier > -1e-9).all() and (multiplier > 1).any()
    np.testing.assert_allclose(descent, multiplier[:, None] * atoms, atol=1e-9)


def test_transform_is_sparse_encode():
    x, truth, _ = made(6, 8, 2, 100, size=2)
    model = DictionaryLearning(
        8, alpha=0.3, prox="sparse_group", group_size=np.int64(2), l1_ratio=0.4, tol=0.01, random_state=0
    )
    codes = model.fit_transform(x)
    arguments = {"prox": "sparse_group", "group_size": 2, "l1_ratio": 0.4, "tol": 1e-6}
    np.testing.assert_array_equal(codes, sparse_encode(x, model.components_, threshold=0.3, **arguments))
    np.testing.assert_array_equal(codes, model.transform(x))
    np.testing.assert_array_equal(model.inverse_transform(codes), codes @ model.components_)
    model.set_params(transform_alpha=0.1, transform_tol=1e-3)
    arguments["tol"] = 1e-3
    np.testing.assert_array_equal(model.transform(x), sparse_encode(x, model.components_, threshold=0.1, **arguments))
    with pytest.raises(ValueError, match="codes have 7 entries, expected 8"):
        model.inverse_transform(codes[:, :7])
    assert list(model.get_feature_names_out()) == [f"dictionarylearning{j}" for j in range(8)]


def test_single_precision_stays_and_agrees():
    x, truth, _ = made(10, 15, 2, 300)
    model = DictionaryLearning(15, alpha=0.2, dict_init=near(truth, 0.9), tol=1e-4)
    double = clone(model).fit(x)
    single = model.fit(x.astype(np.float32))
    assert single.components_.dtype == np.float32 and single.transform(x.astype(np.float32)).dtype == np.float32
    assert double.components_.dtype == np.float64
    assert single.error_[-1] == pytest.approx(double.error_[-1], rel=1e-4)
    np.testing.assert_allclose(single.components_, double.components_, atol=1e-2)


def test_an_atom_that_no_code_uses_becomes_the_signal_represented_worst():
    x = np.array([[3.0, 0, 0, 0], [2, 0, 0, 0], [0, 1, 1, 0], [0, 4, 3, 0]])
    with pytest.warns(ConvergenceWarning):
        model = DictionaryLearning(2, alpha=0.1, dict_init=[[1, 0, 0, 0], [0, 0, 0, 2]], max_iter=1).fit(x)
    np.testing.assert_allclose(model.components_, [[1, 0, 0, 0], [0, 0.8, 0.6, 0]], atol=1e-12)
    assert model.set_params(max_iter=50).fit(x).error_[-1] < 0.2 * model.set_params(tol=1).fit(x).error_[0]


def test_starts_from_signals_drawn_by_the_random_state():
    x, _, _ = made(6, 8, 2, 100)
    learn = DictionaryLearning(4, alpha=100.0, tol=1)  # no code is non-zero, and atoms are signals
    first = learn.set_params(random_state=3).fit(x).components_
    np.testing.assert_array_equal(first, learn.fit(x).components_)
    largest = np.linalg.norm(x, axis=1).argsort()[::-1][:4]
    np.testing.assert_allclose(first, unit(x[largest]), atol=1e-12)
    learn.set_params(alpha=0.1)
    np.testing.assert_array_equal(learn.fit(x).components_, learn.fit(x).components_)
    other = clone(learn).set_params(random_state=4).fit(x)
    assert not np.allclose(learn.components_, other.components_)


@pytest.mark.parametrize("x", [np.zeros((5, 3)), np.ones((5, 3)), np.eye(3)[:2]], ids=["zeros", "equal", "few"])
@pytest.mark.parametrize("size", [1, 4])
def test_poor_data_still_give_a_dictionary(x, size):
    model = DictionaryLearning(8, alpha=0.1, prox="group_relu", group_size=size, random_state=0).fit(x)
    np.testing.assert_allclose(np.linalg.norm(model.components_, axis=1), 1, rtol=1e-12)
    loss = ((x - model.inverse_transform(model.transform(x))) ** 2).sum() / 2
    assert np.isfinite(model.error_).all() and loss <= 0.1 * (x**2).sum()


def test_codes_go_into_a_pipeline():
    random = np.random.default_rng(0)
    label = random.integers(3, size=150)
    centres = np.linalg.qr(random.standard_normal((9, 9)))[0].reshape(3, 3, 9)
    x = np.einsum("ni,nif->nf", random.random((150, 3)) + 0.5, centres[label])
    starts = [
        DictionaryLearning(9, alpha=0.1, prox="group_relu_nonneg", group_size=3, tol=1e-3, random_state=seed)
        for seed in range(3)
    ]
    best = min(starts, key=lambda learn: learn.fit(x).error_[-1])  # turns stop in local minima
    clusters = make_pipeline(best, KMeans(3, n_init=5, random_state=0)).fit_predict(x)
    assert adjusted_rand_score(label, clusters) == 1


def test_warns_only_where_it_has_not_converged():
    x, _, _ = made(6, 8, 2, 100)
    with pytest.warns(ConvergenceWarning, match="tol=0 in max_iter=2"):
        assert DictionaryLearning(8, alpha=0.1, tol=0, max_iter=2, random_state=0).fit(x).n_iter_ == 2
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = DictionaryLearning(8, alpha=0.1, tol=1e-3, random_state=0).fit(x)
    decrease = -np.diff(model.error_) / model.error_[:-1]
    assert (decrease[:-1] > 1e-3).all() and decrease[-1] <= 1e-3


BAD = [
    ({"prox": "sotf"}, "unknown convex prox 'sotf'; did you mean 'soft'"),
    ({"prox": "top_k"}, "unknown convex prox 'top_k'.*Known: elastic, group_relu, "),
    ({"prox": "soft", "group_size": 2}, "'soft' takes no group_size"),
    ({"prox": "elastic", "l1_ratio": 1.5}, "'l1_ratio'.*Got 1.5"),
    ({"alpha": 0.0}, "'alpha'.*Got 0.0"),
    ({"alpha": -1}, "'alpha'.*Got -1"),
    ({"transform_tol": 0}, "'transform_tol'.*Got 0"),
    ({"max_iter": 0}, "'max_iter'.*Got 0"),
    (
        {"n_components": 10, "prox": "group_relu", "group_size": 4},
        "group_size=4 .*n_components=10; .*8 or 12",
    ),
    ({"n_components": 3, "prox": "group_relu", "group_size": 4}, "nearest that it divides: 4$"),
    ({"prox": "group_relu", "dict_init": np.ones((4, 6))}, "group_size=8 .*n_components=4; .*: 8"),
    ({"dict_init": np.ones((4, 5))}, r"shape \(4, 5\), expected .*\(4, 6\)"),
    ({"n_components": 3, "dict_init": np.ones((4, 6))}, r"shape \(4, 6\), expected .*\(3, 6\)"),
    ({"dict_init": np.full((4, 6), np.nan)}, "dict_init contains NaN"),
    ({"dict_init": np.zeros((4, 6))}, "atom 0 is zero"),
]


@pytest.mark.parametrize("arguments, message", BAD, ids=[f"{list(a)[-1]}-{i}" for i, (a, *_) in enumerate(BAD)])
def test_says_what_is_wrong(arguments, message):
    with pytest.raises(ValueError, match=message):
        DictionaryLearning(**arguments).fit(made(6, 8, 2, 20)[0])


def test_says_that_signals_are_not_finite():
    x = made(6, 8, 2, 20)[0]
    x[3, 2] = np.nan
    with pytest.raises(ValueError, match="X contains NaN"):
        DictionaryLearning().fit(x)
