import numpy as np
import pytest
import torch
from scipy.linalg import eigh
from scipy.optimize import linear_sum_assignment
from sklearn.cluster import KMeans, SpectralClustering
from sklearn.datasets import load_digits
from sklearn.metrics import adjusted_rand_score, normalized_mutual_info_score

from dsc.metrics import clustering_scores
from dsc.reproduce.clustering import (
    clustering_rows,
    kmeans,
    shares,
    spectral,
    strongest_group_row,
)


@pytest.fixture(scope="module")
def digits():
    found = load_digits()
    return torch.from_numpy(found.data[:600] / 16).float(), torch.from_numpy(found.target[:600]).long()


def accuracy(clusters, labels):
    counts = np.zeros((10, 10))
    np.add.at(counts, (clusters, labels), 1)
    return counts[linear_sum_assignment(-counts)].sum() / counts.sum()


def test_codes_plus_are_shares_of_absolute_values():
    z = torch.tensor([[1.0, -3.0, 0.0], [0.0, 0.0, 0.0]])
    assert torch.equal(shares(z), torch.tensor([[0.25, 0.75, 0.0], [0.0, 0.0, 0.0]]))


def test_scores_are_those_of_scipy_and_sklearn(digits):
    x, labels = digits
    clusters = KMeans(10, n_init=10, random_state=3).fit_predict(x.numpy())
    assert kmeans(x, 10, seed=3).tolist() == clusters.tolist()
    found = clustering_scores(torch.from_numpy(clusters).long(), labels)
    assert found["accuracy"] == pytest.approx(accuracy(clusters, labels.numpy()))
    assert found["nmi"] == pytest.approx(normalized_mutual_info_score(labels, clusters), abs=1e-5)
    assert found["ari"] == pytest.approx(adjusted_rand_score(labels, clusters), abs=1e-5)


def test_more_clusters_than_classes_count_as_wrong():
    found = clustering_scores(torch.tensor([0, 1, 2, 3]), torch.tensor([0, 0, 1, 1]))
    assert found["accuracy"] == 0.5


def neighbour_graph(x, neighbours):
    distances = ((x[:, None] - x[None]) ** 2).sum(2)
    np.fill_diagonal(distances, np.inf)
    graph = np.zeros_like(distances)
    np.put_along_axis(graph, distances.argsort(1)[:, :neighbours], 1, axis=1)
    return (graph + graph.T) / 2


def test_spectral_clusters_are_kmeans_of_the_normalised_cut(digits):
    x, labels = digits[0][:300], digits[1][:300]
    graph = neighbour_graph(x.double().numpy(), 20)
    degrees = graph.sum(1)
    cut = np.eye(len(x)) - graph / np.sqrt(np.outer(degrees, degrees))
    coordinates = eigh(cut, subset_by_index=[0, 9])[1] / np.sqrt(degrees)[:, None]
    expected = KMeans(10, n_init=50, random_state=0).fit_predict(coordinates)
    found = spectral(x, 10, neighbours=20)
    assert adjusted_rand_score(expected, found) > 0.97
    exact = SpectralClustering(10, affinity="precomputed", random_state=0).fit_predict(graph)
    assert clustering_scores(found, labels)["accuracy"] == pytest.approx(accuracy(exact, labels.numpy()), abs=0.02)


def test_rows_name_inputs_and_methods(digits):
    x, labels = digits[0][:200], digits[1][:200]
    rows = list(clustering_rows({"pixels": x.view(-1, 1, 8, 8), "ones": x * 0 + 1}, labels, 10, methods=["k-means"]))
    assert [(row["input"], row["method"]) for row in rows] == [("pixels", "k-means"), ("ones", "k-means")]
    assert rows[0]["accuracy"] == clustering_scores(kmeans(x, 10), labels)["accuracy"]
    z = torch.nn.functional.one_hot(labels, 10).float().repeat_interleave(2, 1)
    assert strongest_group_row("codes", z, 2, labels)["accuracy"] == 1


@pytest.mark.parametrize("neighbours", [0, 30])
def test_as_many_neighbours_as_signals(neighbours):
    with pytest.raises(ValueError, match=f"from 1 to 29, one less than the 30 rows, got {neighbours}"):
        spectral(torch.randn(30, 3), 2, neighbours)
