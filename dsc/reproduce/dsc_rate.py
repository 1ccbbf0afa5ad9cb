"""Deep sparse coding, its theory measured: the linear rate of unrolled layers, and how tight the stability bound is.

Rate: J = 1, 2, 3 layers in sequence, K steps each with the thresholds of the theory, which know s, B and ε and never
the code. The figure is the largest ‖x − x*‖₂ of the deepest code over the signals, against K, in float64, beside the
predicted factor ρ = max_j (2s_j − 1)μ̃_j, bound and floor. The measured factor and R² are of a line through the
logarithms, from where the bound says more than that zero is as near, to ten times the last error.

Stability: models that satisfy the conditions, and for each two codes of one signal as far apart as can be found; the
figure is their distance over the bound, at most 1 if the theorem is right, and 1 where it is tight.
"""

import math
from argparse import Namespace
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache
from statistics import mean, median
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from dsc import frames
from dsc.dictionaries import ConvDictionary, DenseDictionary, Dictionary
from dsc.report import table
from dsc.reproduce.results import PALETTE, Results, spread
from dsc.synthetic import DeepSample, DeepSparse, gaussian_dictionary
from dsc.theory.adversary import distant_pair
from dsc.theory.deep import Layer, covered, mutual_coherence, stability
from dsc.theory.rates import (
    LinearRate,
    coupled_weights,
    in_sequence,
    linear_rate,
    measured_rate,
    predicted_network,
    steps_to,
)

Progress = Callable[[str], None]


@dataclass(frozen=True)
class Settings:
    """Sizes of the experiment."""

    rate_frames: tuple[str, ...] = (
        "Steiner 120 × 256", "identity, Hadamard 256 × 512", "Paley 129 × 258", "patches 11 × 11"
    )  # fmt: skip
    stability_frames: tuple[str, ...] = (
        "identity, Hadamard 64 × 128", "Paley 31 × 62", "Steiner 120 × 256", "Paley 129 × 258", "patches 7 × 7"
    )  # fmt: skip
    sparsity: int = 4  # s_1
    signals: int = 32
    error: float = 1e-12  # to reach without noise
    tolerance: float = 1e-8  # ε_j with noise, of codes whose entries are about 1
    coherence: float = 0.1  # of the deeper layers: five non-zeros are covered
    models: int = 1000


FAST = Settings(
    rate_frames=("Steiner 120 × 256",),
    stability_frames=("identity, Hadamard 64 × 128", "Paley 31 × 62", "patches 7 × 7"),
    signals=4,
    models=90,
)
LAYERS = (1, 2, 3)
ROUNDING = 1e-14  # of float64, for entries of about 1
FRAMES: dict[str, Callable[[], Tensor]] = {
    "Steiner 120 × 256": lambda: frames.steiner(16),
    "identity, Hadamard 64 × 128": lambda: frames.identity_hadamard(64),
    "identity, Hadamard 256 × 512": lambda: frames.identity_hadamard(256),
    "Paley 31 × 62": lambda: frames.paley(61),
    "Paley 129 × 258": lambda: frames.paley(257),
    "patches 7 × 7": lambda: frames.paley(97),
    "patches 11 × 11": lambda: frames.paley(241),
}


def run(args: Namespace, progress: Progress) -> Results:
    """Rates for every frame, depth and noise, `args.seeds` times; then the stability of as many models as asked."""
    settings = FAST if args.fast else Settings()
    rates = []
    for seed in range(args.seeds):
        for frame in settings.rate_frames:
            for layers in LAYERS:
                for noisy in (False, True):
                    rates.append(measure_rate(settings, frame, layers, noisy, seed))
                    progress(_line(rates[-1]))
    bounds = measure_stability(settings, progress)
    figures = {
        "settings": asdict(settings), "fast": args.fast,
        "coverage": coverage(settings), "rates": rates, "stability": bounds,
    }  # fmt: skip
    return Results(figures, markdown(figures), draw([row for row in rates if row["frame"] == settings.rate_frames[0]]))


def measure_rate(settings: Settings, frame: str, layers: int, noisy: bool, seed: int) -> dict[str, Any]:
    """One row: what the theory predicts of this chain, and what its network does."""
    generator = torch.Generator().manual_seed(1_000_003 * seed + layers)
    dictionaries = [first_layer(frame, generator)]
    for _ in range(layers - 1):
        pairs = frames.sparse_pairs(dictionaries[0].num_atoms, settings.coherence, generator=generator)
        dictionaries.append(like(dictionaries[0], pairs))
    tolerances = [settings.tolerance * noisy] * layers
    problem = DeepSparse(
        dictionaries, settings.sparsity // 2 ** (layers - 1), tolerances, side=image_side(dictionaries[0])
    )
    weights = [coupled_weights(dictionary) for dictionary in dictionaries]
    known = zip(dictionaries, weights, problem.sparsities, problem.bounds, strict=True)
    exact = [linear_rate(*each) for each in known]
    steps = steps_to(exact, settings.error)
    rates = [replace(rate, noise=tolerance) for rate, tolerance in zip(exact, tolerances, strict=True)]
    found = follow(problem, weights, rates, steps, problem.sample(settings.signals, generator))
    errors, bounds = found.errors[:, -1], found.bounds[:, -1]
    told = int((bounds > errors[0]).nonzero().max())  # from here on the bound says more than that zero is as near
    whole, fit = measured_rate(errors), measured_rate(errors[told:])
    ratios = (found.errors / found.bounds)[1:].flatten()
    return {
        "frame": frame, "layers": layers, "noisy": noisy, "seed": seed, "steps": steps,
        "sparsities": problem.sparsities, "coherences": [rate.coherence for rate in rates],
        "predicted_rate": max(rate.value for rate in rates), "measured_rate": fit.rate,
        "r_squared": fit.value, "r_squared_from_zero": whole.value, "first_fitted": told, "fitted_errors": fit.steps,
        "predicted_floor": in_sequence(rates, steps)[-1].floor if noisy else 0.0, "last_error": fit.last,
        "checked": len(ratios), "above_the_bound": int((ratios > 1).sum()), "largest_ratio": float(ratios.max()),
        "false_positives": found.false_positives,
        "errors": errors.tolist(), "bounds": bounds.tolist(),
    }  # fmt: skip


@dataclass(frozen=True)
class Course:
    """Largest errors and their bounds for K = 0, 1, …, both (steps + 1, layers), and false positives in all codes.

    Of equiangular atoms the interference can equal the threshold, and then rounding decides: entries below `ROUNDING`
    are no false positives.
    """

    errors: Tensor
    bounds: Tensor
    false_positives: int


@torch.no_grad()
def follow(
    problem: DeepSparse, weights: Sequence[Dictionary], rates: Sequence[LinearRate], steps: int, sample: DeepSample
) -> Course:
    """Solve with networks of 1, 2, …, `steps` steps a layer."""
    errors = [torch.stack([truth.flatten(1).norm(dim=1).max() for truth in sample.codes])]
    bounds = [torch.tensor([rate.sparsity * rate.magnitude for rate in rates], dtype=torch.float64)]
    wrong = 0
    for depth in range(1, steps + 1):
        network = predicted_network(problem.dictionaries, weights, rates, depth, problem.nonneg)
        codes = network.codes(sample.signals)
        pairs = list(zip(codes, sample.codes, strict=True))
        errors.append(torch.stack([(z - truth).flatten(1).norm(dim=1).max() for z, truth in pairs]))
        bounds.append(torch.stack([rate.bounds(depth)[-1] for rate in in_sequence(rates, depth)]))
        wrong += sum(int((z[truth == 0].abs() > ROUNDING).sum()) for z, truth in pairs)
    return Course(torch.stack(errors), torch.stack(bounds), wrong)


def measure_stability(settings: Settings, progress: Progress) -> list[dict[str, Any]]:
    """One row a frame and depth: how near to the bound the distances of its models come, and how many are above it."""
    cases = [(frame, layers) for frame in settings.stability_frames for layers in LAYERS]
    found: dict[tuple[str, int], list[dict[str, Any]]] = {case: [] for case in cases}
    for number in range(settings.models):
        frame, layers = case = cases[number % len(cases)]
        found[case].append(measure_model(frame, layers, number))
        if (number + 1) % max(1, settings.models // 10) == 0:
            progress(f"stability: {number + 1} of {settings.models} models")
    return [summary(frame, layers, models) for (frame, layers), models in found.items() if models]


def measure_model(frame: str, layers: int, seed: int) -> dict[str, Any]:
    """A random model that satisfies the conditions: distances over bounds, of a far pair a layer and of a random one.

    Those above the bound are counted in every layer of every pair; the ratios are those of the layer aimed at.
    """
    generator = torch.Generator().manual_seed(seed)
    problem = random_model(frame, layers, generator)
    known = zip(problem.dictionaries, problem.sparsities, problem.tolerances, strict=True)
    chain = [Layer(mutual_coherence(d), s, tolerance, math.inf) for d, s, tolerance in known]
    bounds = [finding.value for finding in stability(chain)]
    if not all(math.isfinite(bound) for bound in bounds):
        raise RuntimeError(f"the model of seed {seed} does not satisfy the conditions: {chain}")
    far = [distant_pair(problem, target, generator).distances for target in range(1, layers + 1)]
    drawn = distant_pair(problem, layers, generator, worst=False).distances
    ratios = [[d / bound for d, bound in zip(pair, bounds, strict=True)] for pair in (*far, drawn)]
    return {
        "sparsities": problem.sparsities,
        "distances": sum(map(len, ratios)),
        "above": sum(ratio > 1 + 1e-9 for pair in ratios for ratio in pair),  # up to rounding
        "far": [ratios[layer][layer] for layer in range(layers)],
        "random": ratios[-1][-1],
    }


def random_model(frame: str, layers: int, generator: torch.Generator) -> DeepSparse:
    """A chain with as many non-zeros as its conditions allow, or fewer; some of its deeper tolerances are 0."""
    first = first_layer(frame, generator)
    most = int(covered(mutual_coherence(first).value))
    sparsity, deeper = 1 + _draw(most // 2 ** (layers - 1), generator), []
    if layers == 2 and most >= 4 and _draw(3, generator) == 0:
        sparsity = 1 + _draw(min(most // 4, 2), generator)  # each atom is of 4 non-zeros, at μ = 1/4
        deeper = [like(first, frames.sparse_lines(first.num_atoms, 4, 2 * first.num_atoms, generator))]
    for layer in range(2, layers + 1) if not deeper else ():
        allowed = 1 / (2 * sparsity * 2 ** (layers - layer) - 1)
        coherence = 0.95 * allowed * float(torch.rand((), generator=generator))
        deeper.append(like(first, frames.sparse_pairs(first.num_atoms, coherence, generator=generator)))
    sizes = 10.0 ** (-3 * torch.rand(layers, generator=generator, dtype=torch.float64))
    tolerances = [float(sizes[0]), *(float(size) * (_draw(3, generator) > 0) for size in sizes[1:])]
    return DeepSparse([first, *deeper], sparsity, tolerances, side=image_side(first))


def coverage(settings: Settings) -> list[dict[str, Any]]:
    """μ of each frame, and of random Gaussian atoms, with the non-zeros that uniqueness covers."""
    chosen = dict.fromkeys((*settings.rate_frames, *settings.stability_frames))
    found = {name: mutual_coherence(first_layer(name, torch.Generator().manual_seed(0))).value for name in chosen}
    found["Gaussian 250 × 500"] = mutual_coherence(gaussian_dictionary(250, 500, seed=0).double()).value
    return [{"frame": name, "coherence": value, "covered": covered(value)} for name, value in found.items()]


@cache
def frame_of(name: str) -> Tensor:
    """The atoms of a frame."""
    return FRAMES[name]()


def first_layer(frame: str, generator: torch.Generator) -> Dictionary:
    """The frame's atoms in random order, with random signs; of patches side by side, where its name says so."""
    atoms = frames.shuffled(frame_of(frame), generator)
    if "patches" not in frame:
        return DenseDictionary.from_atoms(atoms).requires_grad_(False)
    side = math.isqrt(atoms.shape[1])
    return _convolution(atoms.view(-1, 1, side, side), side)


def like(dictionary: Dictionary, atoms: Tensor) -> Dictionary:
    """A deeper layer of these atoms: dense, or convolutional with 1 × 1 kernels, as `dictionary` is."""
    if isinstance(dictionary, ConvDictionary):
        return _convolution(atoms[..., None, None], 1)
    return DenseDictionary.from_atoms(atoms).requires_grad_(False)


def image_side(dictionary: Dictionary) -> int | None:
    """Two patches, for a convolutional dictionary."""
    return 2 * dictionary.kernel_size if isinstance(dictionary, ConvDictionary) else None


def _convolution(weight: Tensor, stride: int) -> ConvDictionary:
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        dictionary = ConvDictionary(weight.shape[1], len(weight), weight.shape[-1], stride).to(weight)
        dictionary.weight.copy_(weight)
    return dictionary.requires_grad_(False)


def _draw(count: int, generator: torch.Generator) -> int:
    return int(torch.randint(max(count, 1), (), generator=generator))


def summary(frame: str, layers: int, models: list[dict[str, Any]]) -> dict[str, Any]:
    """The models of a frame and depth in one row."""
    far = [model["far"] for model in models]
    return {
        "frame": frame, "layers": layers, "models": len(models),
        "most_nonzeros": max(model["sparsities"][0] for model in models),
        "distances": sum(model["distances"] for model in models), "above_the_bound": sum(m["above"] for m in models),
        "median_ratio": median(max(ratios) for ratios in far),
        "largest_ratios": [max(ratios[layer] for ratios in far) for layer in range(layers)],
        "largest_random_ratio": max(model["random"] for model in models),
    }  # fmt: skip


def markdown(figures: dict[str, Any]) -> str:
    """What the frames cover, the rates, and the stability."""
    cover = [[row["frame"], f"{row['coherence']:.4f}", f"{row['covered']:g}"] for row in figures["coverage"]]
    header = ["rate", "J", "noise", "s", "ρ predicted", "measured", "R²", "from K = 0", "floor at most", "last error",
              "error / bound", "above the bound", "false positives"]  # fmt: skip
    cases = dict.fromkeys((row["frame"], row["layers"], row["noisy"]) for row in figures["rates"])
    lines = [
        _rate_cells([r for r in figures["rates"] if (r["frame"], r["layers"], r["noisy"]) == case]) for case in cases
    ]
    stable = ["stability", "J", "models", "s_1 up to", "distances", "above the bound", "distance / bound, median",
              "largest, layer by layer", "random pairs, largest"]  # fmt: skip
    bounds = [_stability_cells(row) for row in figures["stability"]]
    return "\n\n".join([table(["frame", "μ", "non-zeros covered"], cover), table(header, lines), table(stable, bounds)])


def _rate_cells(rows: list[dict[str, Any]]) -> list[str]:
    first = rows[0]
    worst = {key: max(row[key] for row in rows) for key in ("predicted_floor", "last_error", "largest_ratio")}
    total = {key: sum(row[key] for row in rows) for key in ("above_the_bound", "checked", "false_positives")}
    return [
        first["frame"], str(first["layers"]), "on" if first["noisy"] else "off",
        ", ".join(map(str, first["sparsities"])),
        spread([row["predicted_rate"] for row in rows], 3), spread([row["measured_rate"] for row in rows], 3),
        *(f"{min(row[key] for row in rows):.4f}" for key in ("r_squared", "r_squared_from_zero")),
        f"{worst['predicted_floor']:.1e}" if first["noisy"] else "none",
        f"{worst['last_error']:.1e}", f"{worst['largest_ratio']:.2f}",
        f"{total['above_the_bound']} of {total['checked']}", str(total["false_positives"]),
    ]  # fmt: skip


def _stability_cells(row: dict[str, Any]) -> list[str]:
    return [
        row["frame"], str(row["layers"]), str(row["models"]), str(row["most_nonzeros"]), str(row["distances"]),
        str(row["above_the_bound"]), f"{row['median_ratio']:.2f}", ", ".join(f"{r:.2f}" for r in row["largest_ratios"]),
        f"{row['largest_random_ratio']:.2f}",
    ]  # fmt: skip


def _line(row: dict[str, Any]) -> str:
    noise = "noise" if row["noisy"] else "no noise"
    return (
        f"{row['frame']}, J = {row['layers']}, {noise}, seed {row['seed']}: ρ {row['predicted_rate']:.3f} predicted, "
        f"{row['measured_rate']:.3f} measured; last error {row['last_error']:.1e}"
    )


def draw(rows: list[dict[str, Any]]) -> Figure:
    """Log-error against steps, a panel a depth: measured, the bound of the theory, and its floor."""
    depths = sorted({row["layers"] for row in rows})
    figure = Figure(figsize=(4.2 * len(depths), 4.4), layout="constrained")
    panels = figure.subplots(1, len(depths), squeeze=False, sharey=True)[0]
    for axes, layers in zip(panels, depths, strict=True):
        for noisy, colour in ((True, PALETTE[4]), (False, PALETTE[5])):
            own = [row for row in rows if row["layers"] == layers and row["noisy"] == noisy]
            _curves(axes, own, colour, "noise" if noisy else "no noise")
        title = f"J = {layers}, s = {', '.join(map(str, own[0]['sparsities']))}"
        axes.set(title=title, xlabel="steps a layer, K", yscale="log")
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("largest ‖x − x*‖₂ of the deepest code")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=5, frameon=False)
    figure.suptitle(own[0]["frame"])
    return figure


def _curves(axes: Axes, rows: list[dict[str, Any]], colour: str, name: str) -> None:
    errors, bounds = ([row[key] for row in rows] for key in ("errors", "bounds"))
    columns = list(zip(*errors, strict=True))
    steps = range(len(columns))
    style: dict[str, Any] = {"color": colour, "linewidth": 1}
    axes.plot(steps, [mean(c) for c in columns], ".-", markersize=5, label=f"measured, {name}", **style)
    if len(rows) > 1:
        axes.fill_between(steps, [min(c) for c in columns], [max(c) for c in columns], color=colour, alpha=0.2)
    axes.plot(steps, [max(c) for c in zip(*bounds, strict=True)], "--", label=f"bound, {name}", **style)
    if rows[0]["noisy"]:
        floor = max(row["predicted_floor"] for row in rows)
        axes.axhline(floor, linestyle=":", label="floor Cσ", **style)
