from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy import ndimage
from scipy.sparse import csr_array
from scipy.spatial.distance import cdist, pdist, squareform
from sklearn.cluster import KMeans

from dsc.data import ImageData
from dsc.metrics import clustering_scores
from dsc.reproduce import gsae_clustering
from dsc.reproduce.clustering import kmeans, spectral
from dsc.reproduce.gsae_clustering import Settings

TINY = Settings(
    num_atoms=6, group_size=2, kernel_size=3, stride=1, steps=2, penalty=0.2, images=64, epochs=2, batch_size=16,
    window=3, window_stride=2, neighbours=8,
)  # fmt: skip


@pytest.fixture(scope="module")
def digits():
    data = ImageData("digits", normalize=False)
    data.setup()
    images, labels, _ = data.train_dataloader().dataset.tensors
    return data, images[:300].float() / 255, labels[:300]


def slant_of(image):
    rows, columns = np.indices(image.shape)
    mass = image / image.sum()
    dy, dx = rows - (mass * rows).sum(), columns - (mass * columns).sum()
    return (mass * dx * dy).sum() / (mass * dy**2).sum()


def test_upright_images_are_those_of_scipy():
    images = torch.rand(3, 1, 12, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    images *= torch.linspace(-1, 1, 12).view(12, 1).mul(2).sub(torch.linspace(-1, 1, 9)).abs() < 0.5
    for image, found in zip(images[:, 0].numpy(), gsae_clustering.upright(images)[:, 0].numpy(), strict=True):
        middle = (np.array(image.shape) - 1) / 2
        matrix = np.array([[1, 0], [slant_of(image), 1]])  # of (row, column)
        offset = np.array(ndimage.center_of_mass(image)) - matrix @ middle
        expected = ndimage.affine_transform(image, matrix, offset, order=1, mode="grid-constant")
        assert np.allclose(found, expected)


def test_a_slanted_stroke_becomes_upright_and_central():
    rows, columns = np.indices((28, 28))
    stroke = np.exp(-((columns - 16 - 0.4 * (rows - 12)) ** 2) / 4 - (rows - 12) ** 2 / 20)
    found = gsae_clustering.upright(torch.tensor(stroke)[None, None])[0, 0].numpy()
    assert slant_of(stroke) > 0.35 and abs(slant_of(found)) < 0.01
    assert np.allclose(ndimage.center_of_mass(found), 13.5, atol=0.01)


def test_an_image_without_mass_stays_so():
    assert torch.equal(gsae_clustering.upright(torch.zeros(2, 1, 5, 5)), torch.zeros(2, 1, 5, 5))


def test_pooled_norms_written_out():
    z = torch.randn(2, 6, 7, 7, generator=torch.Generator().manual_seed(0))
    found = gsae_clustering.pooled_norms(z, replace(TINY, group_size=3))
    assert found.shape == (2, 2, 3, 3)
    for n, g, i, j in np.ndindex(*found.shape):
        window = z[n, 3 * g : 3 * g + 3, 2 * i : 2 * i + 3, 2 * j : 2 * j + 3].numpy()
        expected = np.mean([np.linalg.norm(window[:, a, b]) for a, b in np.ndindex(3, 3)])
        assert np.isclose(found[n, g, i, j].item(), expected)


def test_features_lie_at_hellinger_distances(digits):
    facts, images, _ = digits
    model = gsae_clustering.train(TINY, images, facts, seed=0)
    found = gsae_clustering.features(model, images[:20], TINY).double().numpy()
    with torch.no_grad():
        p = gsae_clustering.pooled_norms(model.encode(images[:20]), TINY).flatten(1).double().numpy()
    p /= p.sum(1, keepdims=True)
    overlap = np.sqrt(p[:, None] * p[None]).sum(2)  # Bhattacharyya's coefficient
    assert np.allclose(squareform(pdist(found, "sqeuclidean")), 2 - 2 * overlap, atol=1e-5)


def test_training_is_that_of_its_seed(digits):
    facts, images, _ = digits
    state = torch.get_rng_state()
    first, again, other = (
        gsae_clustering.train(TINY, images, facts, seed).coder.dictionary.weight.detach() for seed in (0, 0, 1)
    )
    assert torch.equal(first, again) and not torch.allclose(first, other)
    assert torch.equal(state, torch.get_rng_state())
    assert torch.allclose(first.flatten(1).norm(dim=1), torch.ones(len(first)), atol=1e-5)


def test_training_uses_the_first_images_alone(digits):
    facts, images, _ = digits
    changed = torch.cat([images[:64], torch.zeros_like(images[64:])])
    models = [gsae_clustering.train(TINY, x, facts, seed=0) for x in (images, changed)]
    assert torch.equal(*(model.coder.dictionary.weight for model in models))


def test_training_makes_reconstructions_better(digits):
    facts, images, _ = digits
    settings = replace(TINY, images=256, epochs=4)
    before, after = (
        gsae_clustering.train(replace(settings, rate=r), images, facts, seed=0) for r in (1e-9, settings.rate)
    )
    with torch.no_grad():
        errors = [(model(images) - images).square().mean() for model in (before, after)]
    assert errors[1] < 0.8 * errors[0]


def graph_written_out(x, neighbours):
    distances, weights = cdist(x, x), np.zeros((len(x), len(x)))
    for i in range(len(x)):
        for j in np.argsort(distances[i])[1 : neighbours + 1]:  # the first is i itself
            weights[i, j] += 0.5
            weights[j, i] += 0.5
    return weights


def cut_written_out(weights, clusters):
    leaving = [weights[clusters == c][:, clusters != c].sum() / weights[clusters == c].sum() for c in set(clusters)]
    return np.mean(leaving)


def test_cut_by_brute_force():
    weights = graph_written_out(np.random.default_rng(0).normal(size=(30, 2)), 4)
    clusters = np.arange(30) % 3
    found = gsae_clustering.cut(csr_array(weights), torch.tensor(clusters))
    assert np.isclose(found, cut_written_out(weights, clusters))


def test_least_cut_is_that_of_all_embeddings():
    x = np.random.default_rng(0).normal(size=(90, 4)) + np.repeat(3 * np.eye(4)[:3], 30, axis=0)
    weights = graph_written_out(x, 6)
    degrees = weights.sum(1)
    _, vectors = np.linalg.eigh(np.eye(90) - weights / np.sqrt(degrees[:, None] * degrees))
    cuts = []
    for k in (3, 4, 5, 6):
        points = vectors[:, :k] / np.linalg.norm(vectors[:, :k], axis=1, keepdims=True)
        cuts.append(cut_written_out(weights, KMeans(3, n_init=10, random_state=0).fit_predict(points)))
    clusters, found = gsae_clustering.least_cut(torch.tensor(x), 3, 6)
    assert np.isclose(found, min(cuts))
    assert np.isclose(cut_written_out(weights, clusters.numpy()), found)
    assert clustering_scores(clusters, torch.arange(3).repeat_interleave(30))["accuracy"] > 0.9


def test_ablation_rows_are_clusters_of_each_input(digits):
    facts, images, labels = digits
    rows = list(gsae_clustering.ablation(TINY, images, images[:200], labels[:200], facts, seed=0))
    names = ["raw pixels", "conv sparse codes", "conv group norms"]
    names += [f"{name}, upright" for name in names]
    methods = ["k-means", "spectral", "least cut"]
    assert [(row["input"], row["method"]) for row in rows] == [(name, method) for name in names for method in methods]
    assert rows[-1]["input"] == gsae_clustering.BEST
    pixels = gsae_clustering.upright(images[:200]).flatten(1)
    least, cut = gsae_clustering.least_cut(pixels, 10, 8)
    for row, clusters in zip(rows[9:12], (kmeans(pixels, 10), spectral(pixels, 10, 8), least), strict=True):
        assert {key: row[key] for key in ("accuracy", "nmi", "ari")} == clustering_scores(clusters, labels[:200])
    assert rows[11]["cut"] == cut and ["cut" in row for row in rows[9:12]] == [False, False, True]


def test_labels_decide_scores_alone(digits):
    facts, images, labels = digits
    labels = labels[:200]
    x = images[:200].flatten(1)
    true, wrong = (list(gsae_clustering.rows("raw", x, y, 8, 0)) for y in (labels, labels.flip(0)))
    assert true[-1]["cut"] == wrong[-1]["cut"] and true[-1]["accuracy"] != wrong[-1]["accuracy"]


def test_table_has_means_and_spreads():
    found = [
        {"input": name, "method": method, "accuracy": a, "seed": seed} | ({"cut": 0.1} if method == "least cut" else {})
        for seed, a in enumerate((0.5, 0.7))
        for name in ("raw pixels", gsae_clustering.BEST)
        for method in gsae_clustering.METHODS
    ]
    lines = gsae_clustering.markdown(found).splitlines()
    assert len(lines) == 4 and lines[2].split("|")[1].strip() == "raw pixels"
    assert [cell.strip() for cell in lines[3].split("|")[2:-1]] == ["60.00 ± 14.14"] * 3 + ["0.1000 ± 0.0000"]
    assert len(gsae_clustering.draw(found).axes[0].patches) == 6
