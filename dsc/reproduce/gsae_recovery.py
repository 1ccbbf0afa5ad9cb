"""Do group-sparse autoencoders recover the dictionary their signals are made of? Figure 3 of arXiv 2102.07003.

Signals of three of 500 groups of two atoms in R^950, with noise: a shallow autoencoder sees 10,000 new ones an epoch,
and so does a sparse one of the same size. Beyond the paper: a sweep over λ, what theory promises, dictionary learning
on the same signals, and starts that know nothing of the truth.
"""

import math
import time
from argparse import ArgumentParser, ArgumentTypeError, Namespace
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Generator, Tensor

from dsc import init, theory
from dsc.measures import group_support
from dsc.metrics import support_metrics
from dsc.recovery import dictionary_distance, match_groups
from dsc.reproduce import baselines
from dsc.reproduce.gsae_recovery_figures import draw, draw_beyond, markdown
from dsc.reproduce.results import Results, stream
from dsc.reproduce.shallow import Course, FreshSignals, ShallowAutoencoder, Training, fit
from dsc.reproduce.shallow import group_energies as energies
from dsc.synthetic import GroupSample, GroupSparse, gaussian_dictionary

Progress = Callable[[str], None]


@dataclass(frozen=True)
class Settings:
    """Sizes of the experiment; the paper's unless it says otherwise."""

    num_features: int = 950
    num_groups: int = 500
    group_size: int = 2
    active_groups: int = 3
    signals: int = 10_000  # an epoch
    block: int = 2500  # of these, in memory at a time
    epochs: int = 300
    rate: float = 1e-3
    threshold: float = 2.0  # λ, of both networks
    correlation: float = 0.56  # of the start with the truth: the paper's text says 0.15, its figure begins at this
    held_out: int = 5000  # signals that supports are measured on
    sweep: tuple[float, ...] = (1.0, 1.5, 2.0, 2.5, 3.0, 3.5)  # λ of short trainings
    sweep_epochs: int = 100
    blind_epochs: int = 150  # from starts that know nothing of the truth
    baseline_turns: int = 3


FAST = Settings(num_features=400, num_groups=60, signals=1000, block=500, epochs=100, rate=2.5e-3, held_out=500,
                sweep=(1.5, 2.0, 2.5, 3.0), sweep_epochs=30, blind_epochs=60, baseline_turns=3)  # fmt: skip


def add_arguments(parser: ArgumentParser) -> None:
    """The experiment's own options."""
    parser.add_argument("--snr", nargs="+", type=_snr, default=[1.0, 5.0, 10.0], metavar="DB",
                        help="signal-to-noise ratios in dB (default: 1 5 10)")  # fmt: skip
    parser.add_argument("--threshold", type=_threshold, default=Settings.threshold, metavar="λ",
                        help="of both networks; 'guaranteed' takes the middle of the range that provably finds every "
                             "support from the start, where there is one (default: 2)")  # fmt: skip
    parser.add_argument("--active-groups", type=int, default=Settings.active_groups, metavar="γ",
                        help="of a signal (default: %(default)s)")  # fmt: skip


def _snr(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise ArgumentTypeError(f"expected a finite number of dB, got {text!r}")
    return value


def _threshold(text: str) -> float | None:
    if text == "guaranteed":
        return None
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise ArgumentTypeError(f"expected a number above 0 or 'guaranteed', got {text!r}")
    return value


def run(args: Namespace, progress: Progress) -> Results:
    """Every noise level, `args.seeds` times, and at the last of them what is beyond the paper: blind starts with every
    seed, the sweep over λ and dictionary learning with the first."""
    settings = replace(FAST if args.fast else Settings(), active_groups=args.active_groups)
    figures: dict[str, Any] = {"fast": args.fast, "recovery": [], "theory": [], "sweep": [], "blind": [], "fixed": []}
    for seed in range(args.seeds):
        threshold = guaranteed(settings, seed) if args.threshold is None else args.threshold
        settings = replace(settings, threshold=threshold)
        for snr_db in dict.fromkeys(args.snr):
            instance = Instance(settings, snr_db, seed)
            rows, facts = recover(instance)
            figures["recovery"] += rows
            figures["theory"].append(facts)
            ends = ", ".join(f"{row['model']} {row['distance'][-1]:.2f}" for row in rows)
            progress(f"SNR {snr_db:g} dB, seed {seed}: {ends}, {rows[0]['seconds']:.0f} s")
        once = {} if seed else {"sweep": sweep, "fixed": on_fixed_signals}  # half as long as the rest
        for name, part in {"blind": blind, **once}.items():
            begin = time.perf_counter()
            figures[name] += part(instance)
            progress(f"{name}, seed {seed}: {time.perf_counter() - begin:.0f} s")
    figures = {"settings": asdict(settings), **figures}
    return Results(figures, markdown(figures), draw(figures), {"beyond": draw_beyond(figures)})


class Instance:
    """A problem at a noise level, a start near its truth, and signals that no training sees."""

    def __init__(self, settings: Settings, snr_db: float, seed: int) -> None:
        s = self.settings = settings
        self.snr_db, self.seed = snr_db, seed
        self.problem = GroupSparse(
            s.num_features, s.num_groups * s.group_size, s.group_size, s.active_groups, snr_db=snr_db, seed=seed
        )
        self.truth = self.problem.dictionary.weight.detach()
        self.start = init.perturbed(self.truth, s.correlation, self.stream(0))
        self.held_out = self.problem.sample(s.held_out, self.stream(1))

    def stream(self, use: int) -> Generator:
        """Random numbers for one use, the same at every noise level."""
        return stream(self.seed, use)

    def fresh(self, use: int) -> FreshSignals:
        """New signals each epoch."""
        return FreshSignals(self.problem, self.settings.signals, self.settings.block, self.stream(use))

    @property
    def blocks(self) -> int:
        """Of an epoch."""
        return self.settings.signals // self.settings.block

    def networks(self, start: Tensor) -> dict[str, ShallowAutoencoder]:
        """The two to compare."""
        s = self.settings
        return {
            "group": ShallowAutoencoder(start, s.group_size, s.threshold),
            "sparse": ShallowAutoencoder(start, 1, s.threshold),
        }


def guaranteed(settings: Settings, seed: int) -> float:
    """The middle of the λ that provably find every support from the start. Raises ValueError where there is none."""
    instance = Instance(settings, math.inf, seed)
    found = theory.support_range(instance.start, instance.truth, instance.held_out.codes, settings.group_size)
    return found.middle()


def recover(instance: Instance) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Figure 3 at one noise level: a row a network, and what theory says of the group-sparse one."""
    s, networks, signals = instance.settings, instance.networks(instance.start), instance.fresh(2)
    before = {name: supports(network, instance.held_out) for name, network in networks.items()}
    training = Training(networks, s.rate, partial(_distance, instance.truth))
    begin = time.perf_counter()
    courses = fit(training, signals, instance.blocks, s.epochs)
    seconds = time.perf_counter() - begin
    rows = [
        {
            "model": name,
            "snr_db": instance.snr_db,
            "seed": instance.seed,
            **course_figures(courses[name], s),
            "support_at_start": before[name],
            "support": supports(network, instance.held_out),
            "seconds": round(seconds, 1),
        }
        for name, network in networks.items()
    ]
    return rows, findings(instance, networks["group"].weight.detach(), courses["group"].measured)


def _distance(truth: Tensor, atoms: Tensor) -> float:
    return float(dictionary_distance(atoms, truth))


def course_figures(course: Course, settings: Settings) -> dict[str, Any]:
    """Distance from the start on, loss, the loss in the unit of the paper's figure, and where the distance is flat."""
    unit = 2 / (settings.num_features * settings.signals)
    return {
        "distance": [round(value, 4) for value in course.measured],
        "flat_from_epoch": flat_from(course.measured),
        "loss": [round(value, 5) for value in course.loss],
        "plotted_loss": [float(f"{unit * value:.4g}") for value in course.loss],  # ‖Y − Ŷ‖²/(nN²)
    }


def flat_from(distances: list[float]) -> int:
    """The epoch from which on the distance stays within 1 % of the whole way down of its last value."""
    way = 0.01 * abs(distances[0] - distances[-1])
    moving = [epoch for epoch, value in enumerate(distances) if abs(value - distances[-1]) > way]
    return moving[-1] + 1 if moving else 0


@torch.no_grad()
def supports(network: ShallowAutoencoder, sample: GroupSample, order: Tensor | None = None) -> dict[str, float]:
    """Recall, precision and exact recovery of a network's supports: of groups, or of entries for groups of one.

    `order` is the network's group of each true one, where it differs.
    """
    products = sample.signals @ network.weight.mT
    found = energies(products, network.group_size) > network.threshold**2
    return support_figures(found if order is None else found[:, order], sample, network.group_size)


def support_figures(found: Tensor, sample: GroupSample, group_size: int) -> dict[str, float]:
    """The same of supports that are known, bool (signals, groups)."""
    metrics = support_metrics(found.shape[1])
    metrics.update(found, group_support(sample.codes, group_size))
    return {name: round(float(value), 5) for name, value in metrics.compute().items()}


def findings(instance: Instance, atoms: Tensor, distances: list[float]) -> dict[str, Any]:
    """What the paper's theory says, at the truth, at the start, and of the atoms learned from there."""
    s, sample, truth = instance.settings, instance.held_out, instance.truth
    learned = torch.nn.functional.normalize(atoms, dim=1)
    found: dict[str, theory.Finding] = {"contraction": theory.contraction(distances)}
    for when, at in {"truth": truth, "start": instance.start, "end": learned}.items():
        found[f"range_{when}"] = theory.support_range(at, truth, sample.codes, s.group_size)
        found[f"observed_range_{when}"] = theory.observed_support_range(at, *sample[:2], s.group_size)
        if when != "truth":
            found[f"alignment_{when}"] = theory.alignment(at, truth, *sample[:2], s.threshold, s.group_size)
            found[f"printed_contraction_{when}"] = theory.printed_contraction(at, truth, s.group_size)
    return {
        "snr_db": instance.snr_db,
        "seed": instance.seed,
        **{name: asdict(finding) | {"text": str(finding)} for name, finding in found.items()},
    }


def sweep(instance: Instance) -> list[dict[str, Any]]:
    """Supports against λ at the truth and at the start, and short trainings from there at some λ."""
    s, d = instance.settings, instance.settings.group_size
    grid = [0.2 * k for k in range(1, 26)]
    curves = {
        name: [{"threshold": round(t, 1), **supports(ShallowAutoencoder(atoms, d, t), instance.held_out)} for t in grid]
        for name, atoms in (("truth", instance.truth), ("start", instance.start))
    }
    networks = {f"{t:g}": ShallowAutoencoder(instance.start, d, t) for t in s.sweep}
    training = Training(networks, s.rate, partial(_distance, instance.truth), every=s.sweep_epochs)
    courses = fit(training, instance.fresh(4), instance.blocks, s.sweep_epochs)
    trained = [
        {
            "threshold": network.threshold,
            "distance": round(courses[name].measured[-1], 4),
            "support": supports(network, instance.held_out),
        }
        for name, network in networks.items()
    ]
    return [{"snr_db": instance.snr_db, "seed": instance.seed, "curves": curves, "trained": trained}]


def blind(instance: Instance) -> list[dict[str, Any]]:
    """Trainings from starts that know nothing of the truth: a row a start, with groups matched to the true ones.

    Random atoms are no start at the full size: no group of theirs exceeds λ for any signal, and the gradient is zero.
    """
    s, d, truth = instance.settings, instance.settings.group_size, instance.truth
    signals = instance.problem.sample(s.signals, instance.stream(5)).signals
    begin = time.perf_counter()
    shared = init.shared_subspaces(signals, s.num_groups, d, s.threshold)
    seconds = time.perf_counter() - begin
    random = gaussian_dictionary(s.num_features, len(truth), instance.seed + 1_000_003).weight.detach()
    starts = {
        "random": random,
        "random, λ annealed": random,
        "signals": init.data_samples(signals, len(truth), instance.stream(6)),
        "shared subspaces": shared,
    }
    networks = {name: ShallowAutoencoder(start, d, s.threshold) for name, start in starts.items()}
    active = {name: mean_active(network, instance.held_out.signals) for name, network in networks.items()}
    annealing = {"random, λ annealed": annealed(random, signals, s)}
    training = Training(networks, s.rate, partial(_affinity, truth, d), 10, annealing)
    courses = fit(training, instance.fresh(7), instance.blocks, s.blind_epochs)
    return [
        {"start": name, "snr_db": instance.snr_db, "seed": instance.seed}
        | {"epochs": courses[name].epochs, "affinity": [round(value, 5) for value in courses[name].measured]}
        | {"active_at_start": active[name]}
        | matched(network, instance)
        | ({"seconds_of_start": round(seconds, 1)} if name == "shared subspaces" else {})
        for name, network in networks.items()
    ]


def _affinity(truth: Tensor, group_size: int, atoms: Tensor) -> float:
    return match_groups(atoms, truth, group_size).mean_squared_cosine


def annealed(atoms: Tensor, signals: Tensor, settings: Settings) -> Callable[[int], float]:
    """λ of an epoch: from where as many random groups are active as should be, evenly up to λ over half the epochs."""
    s = settings
    products = signals[: s.block] @ atoms.mT
    expected = s.active_groups * len(products)
    first = float(energies(products, s.group_size).flatten().topk(expected).values[-1].sqrt())
    return lambda epoch: min(s.threshold, first + (s.threshold - first) * epoch / (s.blind_epochs / 2))


@torch.no_grad()
def mean_active(network: ShallowAutoencoder, signals: Tensor) -> float:
    """Active groups a signal."""
    return round(len(network.encode(signals).rows) / len(signals), 4)


def matched(network: ShallowAutoencoder, instance: Instance) -> dict[str, Any]:
    """How near the groups are to the true ones they are matched to, and the supports in that order."""
    match = match_groups(network.weight.detach(), instance.truth, instance.settings.group_size)
    return {
        "mean_squared_cosine": round(match.mean_squared_cosine, 5),
        "groups_found": round(float((match.affinities > 0.9).float().mean()), 5),
        "correlation_after_procrustes": round(float(match.correlations.mean()), 5),
        "support": supports(network, instance.held_out, match.order),
    }


def on_fixed_signals(instance: Instance) -> list[dict[str, Any]]:
    """A row a method: dictionary learning and both networks, from one start, on one set of signals, at one λ."""
    s, d = instance.settings, instance.settings.group_size
    sample = instance.problem.sample(s.signals, instance.stream(8))
    rows = []
    for learned in baselines.learn(
        sample.signals, instance.start, s.threshold, d, s.baseline_turns, seed=instance.seed
    ):
        size = d if "group" in learned.method else 1
        found = support_figures(group_support(learned.codes, size), sample, size)
        rows.append(learned.row() | {"support": found} | dictionary_figures(learned.atoms, instance))
    networks = instance.networks(instance.start)
    training = Training(networks, s.rate, partial(_distance, instance.truth), every=s.epochs)
    begin = time.perf_counter()
    fit(training, list(sample.signals.split(s.block)), instance.blocks, s.epochs)
    seconds = round(time.perf_counter() - begin, 1)  # of both
    rows += [
        {"method": f"{name} autoencoder", "turns": s.epochs, "seconds": seconds, "support": supports(network, sample)}
        | dictionary_figures(network.weight.detach(), instance)
        for name, network in networks.items()
    ]
    return [{"snr_db": instance.snr_db, "seed": instance.seed} | row for row in rows]


def dictionary_figures(atoms: Tensor, instance: Instance) -> dict[str, float]:
    """The distance to the truth, without matching, and the mean squared cosine of matched groups."""
    return {
        "distance": round(_distance(instance.truth, atoms), 4),
        "mean_squared_cosine": round(_affinity(instance.truth, instance.settings.group_size, atoms), 5),
    }
