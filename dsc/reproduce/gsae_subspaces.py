"""Which subspace a signal comes from, found without labels: unions of subspaces, and scikit-learn's digits.

A group-sparse autoencoder (arXiv 2102.07003) has a group of atoms for each subspace. A signal's cluster is its
strongest group, or what k-means or spectral clustering make of its codes₊. Beside it stand scikit-learn's k-means,
spectral clustering and Gaussian mixture, which is the very model that the synthetic signals are drawn from, and
dictionary learning without a network. Who starts at random may do so as often as the others, and its own objective
chooses among the outcomes; no label does.
"""

import time
from argparse import Namespace
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import chain
from statistics import mean
from types import SimpleNamespace
from typing import Any, cast

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from sklearn.cluster import spectral_clustering
from sklearn.datasets import load_digits
from sklearn.mixture import GaussianMixture
from torch import Generator, Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from dsc.data import IndexBatches
from dsc.dictionaries import DenseDictionary
from dsc.layers import SparseCoding
from dsc.measures import strongest_group
from dsc.metrics import clustering_scores
from dsc.models.autoencoder import SparseAutoencoder
from dsc.recovery import match_groups, orthonormal_groups
from dsc.report import table
from dsc.reproduce.baselines import Learned, alternating_minimisation, online_learning
from dsc.reproduce.clustering import kmeans, shares, spectral
from dsc.reproduce.results import PALETTE, Results, spread, stream
from dsc.schedules import OneCycle
from dsc.synthetic import GroupSparse
from dsc.tasks import Reconstructor
from dsc.trainers import quiet_trainer

Progress = Callable[[str], None]


@dataclass(frozen=True)
class Case:
    """Signals to cluster: `snr_db`, dimension and `overlap` of a union of subspaces, or the digits."""

    data: str = "union"
    snr_db: float = 10.0
    group_size: int = 4
    overlap: float = 0.0


@dataclass(frozen=True)
class Settings:
    """Sizes of the problems and of the training, the same for every case."""

    num_features: int = 30
    num_groups: int = 10
    signals: int = 2000
    threshold: float = 0.5  # λ, for signals of unit norm
    steps: int = 10
    epochs: int = 30
    batch_size: int = 200
    rate: float = 1e-2
    turns: int = 20  # of dictionary learning
    restarts: int = 5
    neighbours: int = 20  # in the graphs of spectral clustering
    snr_db: tuple[float, ...] = (20.0, 10.0, 5.0, 2.0, 0.0)
    group_size: tuple[int, ...] = (1, 2, 4, 8)
    overlap: tuple[float, ...] = (0.0, 0.4, 0.6, 0.8)


FAST = Settings(signals=500, num_groups=5, num_features=20, epochs=20, batch_size=50, turns=5, restarts=2,
                snr_db=(10.0, 2.0), group_size=(2, 4), overlap=(0.0, 0.6))  # fmt: skip
SWEEPS = {
    "snr_db": "signal-to-noise ratio (dB)",
    "group_size": "dimension of the subspaces",
    "overlap": "overlap of the subspaces",
}


@dataclass(frozen=True)
class Problem:
    """Signals (N, features), classes, int64 (N,), and where there is one the true dictionary, (atoms, features)."""

    signals: Tensor
    labels: Tensor
    truth: Tensor | None = None


def run(args: Namespace, progress: Progress) -> Results:
    """Every method on every case, `args.seeds` times."""
    settings = FAST if args.fast else Settings()
    rows: list[dict[str, Any]] = []
    for seed in range(args.seeds):
        for case in cases(settings):
            for row in measure(case, settings, seed):
                rows.append({**asdict(case), "seed": seed, **row})
                progress(f"{name_of(case)}, seed {seed}: {row['method']}, {100 * row['accuracy']:.1f} %, "
                         f"{row['seconds']:.1f} s")  # fmt: skip
    figures = {"settings": asdict(settings), "fast": args.fast, "results": rows}
    return Results(figures, markdown(rows, settings), draw(rows, settings))


def cases(settings: Settings) -> list[Case]:
    """The digits, the usual union, and those that differ from it in one respect."""
    swept = [replace(Case(), **{name: value}) for name in SWEEPS for value in getattr(settings, name)]
    return list(dict.fromkeys([Case("digits"), Case(), *swept]))


def name_of(case: Case) -> str:
    """A case in words."""
    if case.data == "digits":
        return "digits"
    return f"{case.group_size} dimensions, SNR {case.snr_db:g} dB, overlap {case.overlap:g}"


def problem(case: Case, settings: Settings, seed: int) -> Problem:
    """The signals of a case; those of a union follow from `seed`, and digits are without their mean image."""
    if case.data == "digits":
        digits = load_digits()
        signals = torch.from_numpy(digits.data / 16).float()[: settings.signals]
        return Problem(signals - signals.mean(0), torch.from_numpy(digits.target).long()[: settings.signals])
    union = union_of_subspaces(case, settings, seed)
    sample = union.sample(settings.signals, stream(seed, 2))
    return Problem(sample.signals, sample.labels, union.dictionary.weight)


def union_of_subspaces(case: Case, settings: Settings, seed: int) -> GroupSparse:
    """A mixture of Gaussians of mean 0, each on a random subspace; with an overlap c, subspaces that are near.

    An orthonormal basis Q_g becomes the nearest one to ``√c Q_0 + √(1 − c) Q_g``, with one Q_0 for all: the cosines of
    the principal angles of two subspaces are about c where these have few dimensions of many.

    Raises ValueError for an overlap outside [0, 1), and for subspaces of more dimensions than there are features.
    """
    if not 0 <= case.overlap < 1:
        raise ValueError(f"overlap must be at least 0 and below 1, where all subspaces are one, got {case.overlap}")
    d, groups, c = case.group_size, settings.num_groups, case.overlap
    union = GroupSparse(
        settings.num_features, groups * d, d, 1, norms=None, snr_db=case.snr_db, orthonormal=True, seed=seed
    )
    if c:
        drawn = torch.randn(d, settings.num_features, generator=stream(seed, 1))
        common = orthonormal_groups(drawn, d).repeat(groups, 1)
        atoms = orthonormal_groups(c**0.5 * common + (1 - c) ** 0.5 * union.dictionary.weight, d)
        union.dictionary = DenseDictionary.from_atoms(atoms)
        union.dictionary.requires_grad_(False)
    return union


def measure(case: Case, settings: Settings, seed: int) -> Iterator[dict[str, Any]]:
    """One row a method: how its clusters agree with the classes, and its subspaces with the true ones.

    ``{"method": …, "accuracy": …, "nmi": …, "ari": …, "seconds": …}``, with `affinity`, the mean squared cosine of the
    principal angles of matched subspaces, and the `objective` that chose among restarts.
    """
    given = problem(case, settings, seed)
    for found in chain(classical(given, case, settings, seed), learned(given, case, settings, seed)):
        row = {"method": found.method, **clustering_scores(found.clusters, given.labels)}
        row["seconds"] = round(found.seconds, 2)
        if found.atoms is not None and given.truth is not None:
            row["affinity"] = match_groups(found.atoms, given.truth, case.group_size).mean_squared_cosine
        yield row if found.objective is None else row | {"objective": found.objective}


@dataclass(frozen=True)
class Found:
    """A method's clusters, int64 (N,), and where it has them its subspaces, (atoms, features), and its objective."""

    method: str
    clusters: Tensor
    seconds: float
    atoms: Tensor | None = None
    objective: float | None = None


def classical(given: Problem, case: Case, settings: Settings, seed: int) -> Iterator[Found]:
    """scikit-learn's methods on the signals themselves."""
    s, x, count = settings, given.signals, len(given.labels.unique())
    methods: dict[str, Callable[[], Tensor]] = {
        "k-means": lambda: kmeans(x, count, seed),
        "spectral clustering": lambda: spectral(x, count, s.neighbours, seed),
        "spectral clustering of absolute cosines": lambda: spectral_of_cosines(x, count, s.neighbours, seed),
    }
    for name, cluster in methods.items():
        start = time.perf_counter()
        clusters = cluster()
        yield Found(name, clusters, time.perf_counter() - start)
    start = time.perf_counter()
    mixture = GaussianMixture(count, n_init=s.restarts, max_iter=1000, random_state=seed)
    clusters = torch.from_numpy(mixture.fit_predict(x.double().numpy()))
    directions = torch.linalg.eigh(torch.from_numpy(mixture.covariances_)).eigenvectors.mT  # least variance first
    atoms = directions[:, -case.group_size :].flatten(0, 1).float()
    yield Found("Gaussian mixture", clusters, time.perf_counter() - start, atoms)


def spectral_of_cosines(x: Tensor, num_clusters: int, neighbours: int, seed: int) -> Tensor:
    """Clusters of signals (N, features) by the graph of each one's largest ``|⟨x_i, x_j⟩|/‖x_i‖‖x_j‖``, int64 (N,).

    Neither the sign nor the norm of a signal matters to it, as neither matters to the subspace (thresholding-based
    subspace clustering, Heckel and Bölcskei 2015, arXiv 1307.4891).
    """
    cosines = F.normalize(x, dim=1) @ F.normalize(x, dim=1).mT
    nearest = cosines.abs().fill_diagonal_(0).topk(neighbours)
    graph = torch.zeros_like(cosines).scatter_(1, nearest.indices, nearest.values).numpy()
    found = spectral_clustering((graph + graph.T) / 2, n_clusters=num_clusters, n_init=10, random_state=seed)
    return torch.from_numpy(found).long()


def learned(given: Problem, case: Case, settings: Settings, seed: int) -> Iterator[Found]:
    """Clusters by learned dictionaries, of signals of unit norm, from the same random starts."""
    s, d, count = settings, case.group_size, len(given.labels.unique())
    x, generator = F.normalize(given.signals, dim=1), stream(seed, 3)
    starts = [seeded_groups(x, count, d, generator) for _ in range(s.restarts)]
    network = best(autoencoder(x, start, s, d, seed) for start in starts)
    clusterings: dict[str, Callable[[Tensor], Tensor]] = {
        "strongest group": lambda z: strongest_group(z, d),
        "k-means of codes₊": lambda z: kmeans(shares(z), count, seed),
        "spectral clustering of codes₊": lambda z: spectral(shares(z), count, s.neighbours, seed),
    }
    for how, cluster in clusterings.items():
        yield clustered(network, how, cluster)
    group = best(alternating_minimisation(x, start, s.threshold, s.turns, d) for start in starts)
    yield clustered(group, "strongest group", clusterings["strongest group"])
    sparse = best(online_learning(x, start, s.threshold, s.turns, seed) for start in starts)
    yield clustered(sparse, "k-means of codes₊", clusterings["k-means of codes₊"])


def clustered(dictionary: Learned, how: str, cluster: Callable[[Tensor], Tensor]) -> Found:
    """The clusters of its codes."""
    start = time.perf_counter()
    clusters = cluster(dictionary.codes)
    seconds = dictionary.seconds + time.perf_counter() - start
    return Found(f"{dictionary.method}: {how}", clusters, seconds, dictionary.atoms, dictionary.objective)


def best(fits: Iterable[Learned]) -> Learned:
    """The one of least objective, with the seconds of all."""
    every = list(fits)
    return replace(min(every, key=lambda fit: fit.objective), seconds=sum(fit.seconds for fit in every))


def seeded_groups(x: Tensor, num_groups: int, group_size: int, generator: Generator) -> Tensor:
    """First atoms from signals of unit norm (N, features): (groups · d, features), orthonormal within a group.

    As k-means++ draws its centres: a signal is drawn with a probability as large as the energy that no group before it
    explains; the group is the d leading singular vectors of the 3d signals of largest |cosine| with it.
    """
    unexplained, groups = torch.ones(len(x)), []
    for _ in range(num_groups):
        drawn = int(torch.multinomial(unexplained.clamp_min(torch.finfo(x.dtype).tiny), 1, generator=generator))
        alike = (x @ x[drawn]).abs().topk(min(3 * group_size, len(x))).indices
        groups.append(torch.linalg.svd(x[alike], full_matrices=False).Vh[:group_size])
        unexplained = torch.minimum(unexplained, 1 - (x @ groups[-1].mT).square().sum(1))
    return torch.cat(groups)


def autoencoder(x: Tensor, start: Tensor, settings: Settings, group_size: int, seed: int) -> Learned:
    """The unfolded, tied group-sparse autoencoder of signals (N, features), trained to reconstruct them."""
    s, begin = settings, time.perf_counter()
    task = Reconstructor(
        model="gsae",
        group_size=group_size,
        threshold=s.threshold,
        model_args=dict(num_atoms=len(start), steps=s.steps),
        optimizer=partial(torch.optim.Adam, lr=s.rate),
        lr_scheduler=OneCycle,
        data=SimpleNamespace(in_chans=1, image_size=(1, x.shape[1])),
    )
    coder = cast(SparseCoding, cast(SparseAutoencoder, task.model).coder)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)  # of the estimate of L, too
        coder.dictionary = DenseDictionary.from_atoms(start)
        fit(task, x, s, seed)
    with torch.no_grad():
        z = coder(x)
        objective = float(coder.objective(x, z).mean())
    seconds = time.perf_counter() - begin
    return Learned("autoencoder", coder.dictionary.weight.detach(), z, objective, s.epochs, seconds)


def fit(task: Reconstructor, x: Tensor, settings: Settings, seed: int) -> None:
    """Train the task, in place, on signals as images of one row."""
    images = TensorDataset(x.unflatten(1, (1, 1, -1)), torch.arange(len(x)))
    batches = IndexBatches(len(x), settings.batch_size, train=True, seed=seed)
    loader = DataLoader(images, sampler=batches, batch_size=None, generator=Generator())
    quiet_trainer(max_epochs=settings.epochs, accelerator="cpu").fit(task, loader)
    task.eval()


def markdown(rows: list[dict[str, Any]], settings: Settings) -> str:
    """The digits and the usual union in every measure; then each sweep: accuracy, and how near the subspaces are."""
    parts = [_measures(rows, case) for case in cases(settings)[:2]]
    for sweep in SWEEPS:
        parts.append(_sweep(rows, settings, sweep, "accuracy", 100, "accuracy (%)"))
        parts.append(_sweep(rows, settings, sweep, "affinity", 1, "mean squared cosine of principal angles"))
    return "\n\n".join(parts)


def _measures(rows: list[dict[str, Any]], case: Case) -> str:
    own = _of(rows, case)
    lines = []
    for method in _methods(own):
        found = [row for row in own if row["method"] == method]
        figures = [spread([100 * row[name] for row in found], 1) for name in ("accuracy", "nmi", "ari")]
        lines.append([method, *figures, f"{mean(row['seconds'] for row in found):.1f}"])
    return table([name_of(case), "accuracy (%)", "NMI (%)", "ARI (%)", "seconds"], lines)


def _sweep(rows: list[dict[str, Any]], settings: Settings, sweep: str, figure: str, scale: float, what: str) -> str:
    values = getattr(settings, sweep)
    lines: dict[str, list[str]] = {}
    for method in _methods(row for row in rows if figure in row):
        found = [[scale * y for y in ys] for ys in _curve(rows, settings, sweep, figure, method)]
        name = method.split(":")[0] if figure == "affinity" else method  # which is the dictionary's, not the clusters'
        lines[name] = [spread(ys, 1 if scale > 1 else 3) for ys in found]
    header = [f"{what}; {SWEEPS[sweep]}", *(f"{value:g}" for value in values)]
    return table(header, [[name, *cells] for name, cells in lines.items()])


def _curve(rows: list[dict[str, Any]], settings: Settings, sweep: str, figure: str, method: str) -> list[list[float]]:
    """A method's figures of every seed, at each value of the sweep."""
    swept = [_of(rows, replace(Case(), **{sweep: value})) for value in getattr(settings, sweep)]
    return [[row[figure] for row in own if row["method"] == method] for own in swept]


def _of(rows: list[dict[str, Any]], case: Case) -> list[dict[str, Any]]:
    return [row for row in rows if asdict(case).items() <= row.items()]


def _methods(rows: Iterable[dict[str, Any]]) -> list[str]:
    return list(dict.fromkeys(row["method"] for row in rows))


def draw(rows: list[dict[str, Any]], settings: Settings) -> Figure:
    """Accuracy in each sweep and, as bars, of the digits; over several seeds the mean, and its range."""
    figure = Figure(figsize=(12, 8.5), layout="constrained")
    upper, lower = cast(Any, figure.subfigures(2, 1, height_ratios=(5, 3)))
    for axes, sweep in zip(upper.subplots(1, len(SWEEPS)), SWEEPS, strict=True):
        values = getattr(settings, sweep)
        for method, style in STYLES.items():
            curve = [[100 * y for y in ys] for ys in _curve(rows, settings, sweep, "accuracy", method)]
            axes.plot(values, [mean(ys) for ys in curve], markersize=5, linewidth=1.3, label=method, **style)
            ends = ([end(ys) for ys in curve] for end in (min, max))
            axes.fill_between(values, *ends, color=style["color"], alpha=0.15)
        axes.set(xlabel=SWEEPS[sweep], ylabel="accuracy (%)", ylim=(0, 102), xticks=values)
        axes.grid(alpha=0.3)
    upper.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=9, frameon=False)
    _bars(lower.subplots(), _of(rows, Case("digits")))
    return figure


def _bars(axes: Axes, rows: list[dict[str, Any]]) -> None:
    for place, (method, style) in enumerate(STYLES.items()):
        values = [100 * row["accuracy"] for row in rows if row["method"] == method]
        ends = [[mean(values) - min(values)], [max(values) - mean(values)]]
        axes.barh(place, mean(values), xerr=ends, color=style["color"], height=0.7)
    axes.set(xlabel="accuracy (%), digits", xlim=(0, 100), yticks=range(len(STYLES)), yticklabels=STYLES)
    axes.invert_yaxis()
    axes.grid(axis="x", alpha=0.3)


# The autoencoder in warm colours, dictionary learning in blue, scikit-learn's methods in black, grey and green.
STYLES: dict[str, dict[str, Any]] = {
    "k-means": {"color": PALETTE[7], "marker": "."},
    "spectral clustering": {"color": PALETTE[7], "linestyle": ":", "marker": "x"},
    "spectral clustering of absolute cosines": {"color": PALETTE[3], "marker": "^"},
    "Gaussian mixture": {"color": PALETTE[0], "marker": "D"},
    "autoencoder: strongest group": {"color": PALETTE[4], "marker": "o"},
    "autoencoder: k-means of codes₊": {"color": PALETTE[1], "marker": "s"},
    "autoencoder: spectral clustering of codes₊": {"color": PALETTE[6], "marker": "P"},
    "alternating minimisation, group: strongest group": {"color": PALETTE[5], "marker": "v"},
    "MiniBatchDictionaryLearning, ℓ1: k-means of codes₊": {"color": PALETTE[2], "linestyle": "--"},
}
