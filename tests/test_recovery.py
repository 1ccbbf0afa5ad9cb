import itertools

import numpy as np
import pytest
import scipy.linalg
import sklearn.metrics
import torch

from dsc import measures, recovery
from dsc.metrics import ClusterAccuracy, clustering_metrics, support_metrics


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def randint(high, count, seed=0):
    return torch.randint(high, (count,), generator=torch.Generator().manual_seed(seed))


def rotations(groups, d, seed=0):
    return torch.linalg.qr(randn(groups, d, d, seed=seed)).Q


# Atoms


def unit(rows):
    return rows / rows.norm(dim=1, keepdim=True)


def allowed(order, match, d):
    """Whether this order of atoms keeps what `match` keeps."""
    groups = [{i // d for i in order[start : start + d]} for start in range(0, len(order), d)]
    return match == "atoms" or (
        all(len(g) == 1 for g in groups) and (match == "groups" or [min(g) for g in groups] == list(range(len(groups))))
    )


def by_brute_force(atoms, truth, match, d):
    best = np.inf
    for order in itertools.permutations(range(len(atoms))):
        if allowed(order, match, d):
            rows, target = unit(atoms)[list(order)], unit(truth)
            flips = torch.minimum((rows - target).square().sum(1), (rows + target).square().sum(1))
            best = min(best, float(flips.sum()))
    return best


@pytest.mark.parametrize("match", ["within", "groups", "atoms"])
@pytest.mark.parametrize("d", [1, 2, 3])
@pytest.mark.parametrize("seed", range(3))
def test_matched_distance_is_the_least_over_all_orders_and_signs(match, d, seed):
    atoms, truth = randn(6, 4, seed=seed), randn(6, 4, seed=seed + 10)
    found = recovery.dictionary_distance(atoms, truth, d, match)
    assert float(found) == pytest.approx(by_brute_force(atoms, truth, match, d))


def test_distance_without_matching_is_frobenius_of_unit_atoms():
    atoms, truth = randn(6, 4), randn(6, 4, seed=1)
    expected = float((unit(atoms) - unit(truth)).square().sum())
    assert float(recovery.dictionary_distance(3 * atoms, truth)) == pytest.approx(expected)
    assert float(recovery.dictionary_distance(-truth, truth)) == pytest.approx(24)
    assert float(recovery.dictionary_distance(-truth, truth, match="within")) == pytest.approx(0, abs=1e-12)


def test_what_a_match_allows_costs_nothing():
    truth = randn(6, 8)
    within, groups, across = [1, 0, 2, 3, 5, 4], [5, 4, 0, 1, 3, 2], [2, 4, 0, 5, 3, 1]
    zero = {"within": [within], "groups": [within, groups], "atoms": [within, groups, across]}
    for match, free in zero.items():
        for order in (within, groups, across):
            scrambled = torch.empty_like(truth).index_copy(0, torch.tensor(order), truth) * randn(6, 1, seed=2)
            distance = float(recovery.dictionary_distance(scrambled, truth, 2, match))
            assert (distance < 1e-9) == (order in free)
            if order in free:
                assert recovery.match_atoms(scrambled, truth, 2, match).tolist() == order


# Groups


def test_rotated_groups_in_another_order_are_recovered():
    truth = randn(4, 3, 10)
    order = torch.tensor([2, 0, 3, 1])
    learned = torch.empty_like(truth)
    learned[order] = 1.7 * rotations(4, 3) @ truth
    match = recovery.match_groups(learned.flatten(0, 1), truth.flatten(0, 1), 3)
    assert torch.equal(match.order, order)
    assert match.mean_squared_cosine == pytest.approx(1)
    torch.testing.assert_close(match.correlations, torch.ones(4, 3).double())
    z = randn(5, 4, 3) * torch.tensor([1, 0, 1, 0]).view(1, 4, 1)
    assert torch.equal(match.align(torch.empty_like(z).index_copy(1, order, z).flatten(1)), z.flatten(1))


@pytest.mark.parametrize("seed", range(4))
def test_group_match_is_the_best_order_with_scipys_angles(seed):
    atoms, truth = randn(4, 3, 7, seed=seed), randn(4, 3, 7, seed=seed + 10)
    cosines = np.array([[(np.cos(scipy.linalg.subspace_angles(t.T, a.T)) ** 2).mean() for a in atoms] for t in truth])
    match = recovery.match_groups(atoms.flatten(0, 1), truth.flatten(0, 1), 3)
    orders = list(itertools.permutations(range(4)))
    best = max(orders, key=lambda order: cosines[range(4), order].sum())
    assert match.order.tolist() == list(best)
    np.testing.assert_allclose(match.affinities, cosines[range(4), best])
    for g, partner in enumerate(best):
        rotation, _ = scipy.linalg.orthogonal_procrustes(atoms[partner].T, truth[g].T)
        near = (atoms[partner].T @ rotation).T
        np.testing.assert_allclose(match.correlations[g], torch.cosine_similarity(near, truth[g], dim=1))


def test_a_dead_group_has_no_affinity_and_no_basis():
    truth = randn(6, 10)
    learned = truth.clone()
    learned[2:4] = 0
    match = recovery.match_groups(learned, truth, 2)
    assert match.order.tolist() == [0, 1, 2]
    assert match.affinities.tolist() == pytest.approx([1, 0, 1])
    basis = recovery.orthonormal_groups(learned, 2)
    assert not basis[2:4].any()
    torch.testing.assert_close(basis[:2] @ basis[:2].mT, torch.eye(2).double())


def test_orthonormal_groups_are_the_nearest():
    atoms = randn(6, 10)
    near = recovery.orthonormal_groups(atoms, 3)
    for g in (slice(0, 3), slice(3, 6)):
        np.testing.assert_allclose(near[g], scipy.linalg.polar(atoms[g])[0], atol=1e-12)
    np.testing.assert_allclose(recovery.orthonormal_groups(atoms, 1), unit(atoms))
    twice = torch.cat([atoms[:1], 2 * atoms[:1]])  # one dimension, though two atoms
    spanned = recovery.orthonormal_groups(twice, 2)
    np.testing.assert_allclose(spanned.mT @ spanned, unit(atoms[:1]).mT @ unit(atoms[:1]), atol=1e-12)


def test_bad_input():
    with pytest.raises(ValueError, match=r"atoms of shape \(4, 3\) and true ones of shape \(4, 2\)"):
        recovery.dictionary_distance(randn(4, 3), randn(4, 2))
    with pytest.raises(ValueError, match="unknown match 'group'; did you mean 'groups'"):
        recovery.dictionary_distance(randn(4, 3), randn(4, 3), 2, "group")
    with pytest.raises(ValueError, match="group_size=3 does not divide the 4"):
        recovery.match_groups(randn(4, 3), randn(4, 3), 3)
    with pytest.raises(ValueError, match="group_size=4 atoms of 3 features cannot be orthonormal"):
        recovery.match_groups(randn(4, 3), randn(4, 3), 4)


# Supports and clusters


@pytest.mark.parametrize("d", [1, 3])
def test_support_figures_are_scikit_learns(d):
    codes = randn(40, 12).relu() * (randn(40, 12, seed=1) > 0.8), randn(40, 12, seed=2) * (randn(40, 12) > 0.5)
    codes[0][:9] = codes[1][:9]  # some right
    found, active = (measures.group_support(z, d) for z in codes)
    assert found.shape == (40, 12 // d)
    assert torch.equal(found, codes[0].unflatten(1, (12 // d, d)).abs().amax(2) > 0)
    metrics = support_metrics(12 // d)
    for part in (slice(0, 30), slice(30, 40)):
        metrics.update(found[part], active[part])
    expected = {
        "recall": sklearn.metrics.recall_score(active, found, average="micro"),
        "precision": sklearn.metrics.precision_score(active, found, average="micro"),
        "exact": sklearn.metrics.accuracy_score(active, found),
    }
    assert {k: float(v) for k, v in metrics.compute().items()} == pytest.approx(expected)
    assert 9 / 40 <= expected["exact"] < 1
    nothing = support_metrics(2)(torch.zeros(3, 2, dtype=torch.bool), torch.ones(3, 2, dtype=torch.bool))
    assert [float(nothing[k]) for k in ("recall", "precision", "exact")] == [0, 0, 0]


@pytest.mark.filterwarnings("ignore:Sparse invariant checks")  # torchmetrics' own contingency table
@pytest.mark.parametrize("seed", range(3))
def test_cluster_figures(seed):
    clusters, classes = randint(5, 60, seed), randint(5, 60, seed + 10)
    clusters[:30] = (classes[:30] + 2) % 5
    metrics = clustering_metrics(5)
    for part in (slice(0, 50), slice(50, 60)):
        metrics.update(clusters[part], classes[part])
    names = torch.tensor(list(itertools.permutations(range(5))))
    expected = {
        "accuracy": float((names[:, clusters] == classes).double().mean(1).max()),
        "nmi": sklearn.metrics.normalized_mutual_info_score(classes, clusters),
        "ari": sklearn.metrics.adjusted_rand_score(classes, clusters),
    }
    assert {k: float(v) for k, v in metrics.compute().items()} == pytest.approx(expected, rel=1e-5)


def test_accuracy_with_more_clusters_than_classes_or_fewer():
    classes = torch.tensor([0, 0, 0, 1, 1, 1])
    assert float(ClusterAccuracy(4)(torch.tensor([3, 3, 2, 0, 0, 1]), classes)) == pytest.approx(4 / 6)
    assert float(ClusterAccuracy(4)(classes, torch.tensor([3, 3, 2, 0, 0, 1]))) == pytest.approx(4 / 6)
    assert float(ClusterAccuracy(2)(torch.ones(6, dtype=torch.long), classes)) == 0.5
    with pytest.raises(ValueError, match="cluster 2 is not from 0 to 1: give more classes"):
        clustering_metrics(2)(torch.tensor([2]), torch.tensor([0]))
    with pytest.raises(ValueError, match="class -1 is not from 0 to 1"):
        ClusterAccuracy(2)(torch.tensor([0]), torch.tensor([-1]))
