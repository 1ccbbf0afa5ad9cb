"""Clusters of features, against the classes: by k-means, by spectral clustering, and by the strongest group."""

import time
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from sklearn.cluster import KMeans, spectral_clustering
from sklearn.neighbors import kneighbors_graph
from torch import Tensor

from dsc.measures import strongest_group
from dsc.metrics import clustering_scores

RESTARTS = 10  # of k-means, of which the one of least inertia counts
KMEANS, SPECTRAL, STRONGEST = "k-means", "spectral", "strongest group"


def shares(z: Tensor) -> Tensor:
    """The codes₊ of arXiv 2102.07003, ``|z|/Σ|z|`` of each row of (N, atoms); a zero code stays zero."""
    size = z.abs()
    total = size.sum(1, keepdim=True)
    return size / total.masked_fill(total == 0, 1)


def kmeans(x: Tensor, num_clusters: int, seed: int = 0) -> Tensor:
    """Clusters of the rows of (N, features), int64 (N,)."""
    found = KMeans(num_clusters, n_init=RESTARTS, random_state=seed).fit_predict(x.cpu().numpy())
    return torch.from_numpy(found).long()


def spectral(x: Tensor, num_clusters: int, neighbours: int, seed: int = 0) -> Tensor:
    """Clusters of the rows of (N, features) by normalised cuts of their graph, int64 (N,).

    Its weights are ``(G + Gᵀ)/2``, where G_ij is 1 if j is among the `neighbours` nearest rows to i.

    Raises ValueError for as many neighbours as there are rows, or more.
    """
    if not 1 <= neighbours < len(x):
        raise ValueError(
            f"neighbours must be from 1 to {len(x) - 1}, one less than the {len(x)} rows, got {neighbours}"
        )
    graph = kneighbors_graph(x.cpu().numpy(), neighbours)
    # With a tenth of all pairs in the graph, ARPACK's factorisation of it takes minutes; LOBPCG needs products alone.
    found = spectral_clustering(
        (graph + graph.T) / 2, n_clusters=num_clusters, n_init=RESTARTS, eigen_solver="lobpcg", random_state=seed
    )
    return torch.from_numpy(found).long()


def clustering_rows(
    features: Mapping[str, Tensor],
    labels: Tensor,
    neighbours: int = 1000,
    seed: int = 0,
    methods: Iterable[str] = (KMEANS, SPECTRAL),
) -> Iterator[dict[str, Any]]:
    """A row an input and a method, as it is found, into as many clusters as there are classes.

    ``{"input": …, "method": …, "accuracy": …, "nmi": …, "ari": …, "seconds": …}``.

    Args:
        features: by name, each (N, …).
        labels: classes, int64 (N,).
        neighbours, seed: of `spectral` and `kmeans`.
        methods: of "k-means" and "spectral".
    """
    classes = len(labels.unique())
    solve = {
        KMEANS: lambda x: kmeans(x, classes, seed),
        SPECTRAL: lambda x: spectral(x, classes, neighbours, seed),
    }
    for name, x in features.items():
        for method in methods:
            start = time.perf_counter()
            found = clustering_scores(solve[method](x.flatten(1)), labels)
            yield {"input": name, "method": method, **found, "seconds": round(time.perf_counter() - start, 1)}


def strongest_group_row(name: str, z: Tensor, group_size: int, labels: Tensor) -> dict[str, Any]:
    """The row of clustering by the strongest group alone; where there are more groups than classes, some cost."""
    return {"input": name, "method": STRONGEST, **clustering_scores(strongest_group(z, group_size), labels)}
