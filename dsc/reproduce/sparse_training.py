"""Training for sparser features: accuracy against active fraction, and what noise and an attack leave of it.

Each strategy, at several strengths and with each activation, trains the same small network: a chain of dictionaries
solved layer by layer. On validation images the sparsest network is chosen that loses at most 0.3 points to the one
without a strategy; test images then see both, clean, under four kinds of noise and under attack. λ of the first layer
is also chosen for each image, by its reconstruction alone. Training strategies after *Convergence analysis for deep
sparse coding via CNNs* (arXiv 2408.05540), whose own figures could not be read: none here is the paper's. A run
that was stopped goes on with its folder as --out.
"""

import json
import time
import warnings
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, cast

import torch
from lightning.pytorch import seed_everything
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from dsc.data import ImageData
from dsc.metrics import SparsityMetrics
from dsc.observe import Observer
from dsc.regularizers import L1, Coherence, GroupL21, Hoyer, Log, Reconstruction
from dsc.reproduce import robustness
from dsc.reproduce import sparse_training_figures as pictures
from dsc.reproduce.results import Results, check_same, stream
from dsc.runs import whole
from dsc.tasks import Classifier
from dsc.trainers import quiet_trainer

Progress = Callable[[str], None]
GROUP_SIZE = 4
START = 0.003  # the weight from which a target finds its own
FACTORS = (1.0, 0.5, 1.5, 2.0, 3.0, 4.0, 6.0)  # of λ at inference; the first of equals is taken
CALIBRATION_IMAGES = 1000

# What a strategy of some strength adds to the arguments of `Classifier`.
STRATEGIES: dict[str, Callable[[float], dict[str, Any]]] = {
    "none": lambda strength: {},
    "l1": lambda w: {"regularizers": [L1(w)]},
    "group": lambda w: {"regularizers": [GroupL21(w, group_size=GROUP_SIZE)]},
    "hoyer": lambda w: {"regularizers": [Hoyer(w)]},
    "log": lambda w: {"regularizers": [Log(w)]},
    "reconstruction": lambda w: {"regularizers": [Reconstruction(w)]},
    "coherence": lambda w: {"regularizers": [Coherence(w)]},
    "threshold": lambda fraction: {"threshold": fraction},
    "l1_target": lambda fraction: {"regularizers": [L1(START, target=fraction)]},
    "hoyer_target": lambda fraction: {"regularizers": [Hoyer(START, target=fraction)]},
    "k": lambda k: {"model_args": {"k": int(k)}},
}
ACTIVATIONS: dict[str, dict[str, Any]] = {
    "relu": {"activation": "relu"},
    "group_relu": {"activation": "group_relu", "group_size": GROUP_SIZE},
    "top_k": {"activation": "top_k"},
}


@dataclass(frozen=True)
class Settings:
    """The network, its training, and the grid: strengths of the strategies, by activation."""

    dataset: str
    model: str
    model_args: Mapping[str, Any]
    grid: Mapping[str, Mapping[str, Sequence[float]]]
    noise: Mapping[str, Sequence[float]]
    radius: float  # of the attack, in units of a pixel's range
    epochs: int
    batch_size: int = 128
    rate: float = 2e-3
    augment: Sequence[str] = ()
    precision: Literal["bf16-mixed", "32-true"] = "bf16-mixed"
    noisy_images: int = 2000  # of the test set, the same for every network
    attacked_images: int = 1000
    attack_steps: int = 10


PENALTIES: dict[str, Sequence[float]] = {
    "l1": (1.0, 3.0, 10.0),
    "group": (1.0, 3.0, 10.0),
    "hoyer": (0.1, 0.3, 1.0),
    "log": (0.1, 0.3, 1.0),
    "reconstruction": (0.01, 0.1, 1.0),
    "coherence": (1.0, 10.0),
    "threshold": (1.0, 2.0, 4.0),
    "l1_target": (0.05, 0.1),
    "hoyer_target": (0.05, 0.1),
}
MNIST = Settings(
    dataset="mnist",
    model="dsc_mlp_pico",
    model_args={"joint": False},
    grid={
        "relu": {"none": (0,), **PENALTIES},
        "group_relu": {  # of which more is active, and where a larger λ leaves nothing
            "none": (0,),
            **PENALTIES,
            "threshold": (1.0, 1.5, 2.0),
            "l1_target": (0.1, 0.2),
            "hoyer_target": (0.1, 0.2),
        },
        "top_k": {"k": (8, 16, 32, 64)},
    },
    noise=robustness.STRONG,
    radius=0.1,
    epochs=3,
)
CIFAR10 = Settings(
    dataset="cifar10",
    model="dsc_cnn",
    model_args={
        "joint": False,
        "channels": (32, 64, 128),
        "kernel_sizes": (5, 3, 3),
        "strides": (2, 2, 2),
        "paddings": (2, 1, 1),
    },
    grid={"relu": {"none": (0,), "l1": (0.1, 1.0, 3.0), "hoyer": (0.1, 0.3, 1.0)}},
    noise=robustness.MILD,
    radius=2 / 255,
    epochs=5,
    augment=("crop", "flip"),
    noisy_images=1000,
    attacked_images=500,
)
SETTINGS = {"mnist": MNIST, "cifar10": CIFAR10}
FAST = replace(
    MNIST,
    dataset="digits",
    grid={"relu": {"none": (0,), "l1": (0.03, 0.3), "hoyer": (0.03, 0.3)}, "top_k": {"k": (16, 64)}},
    noise=robustness.MILD,
    epochs=10,
    batch_size=32,
    precision="32-true",
)


def add_arguments(parser: ArgumentParser) -> None:
    """The experiment's own options."""
    parser.add_argument(
        "--dataset",
        choices=SETTINGS,
        help="dense network on mnist (default), convolutional one on cifar10; --fast has scikit-learn's digits",
    )


@dataclass(frozen=True)
class Images:
    """Pixels in [0, 1] and classes to choose on and to test on, and test images with noise, by kind and level."""

    data: ImageData
    val: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]
    noisy: Mapping[str, Sequence[Tensor]]
    calibration: Sequence[Tensor]


@dataclass(frozen=True)
class Run:
    """One network of the grid."""

    activation: str
    strategy: str
    strength: float
    seed: int

    @property
    def name(self) -> str:
        return f"{self.activation}-{self.strategy}-{self.strength:g}-{self.seed}"


def run(args: Namespace, progress: Progress) -> Results:
    """Every network of the grid, `args.seeds` times."""
    if args.fast and args.dataset:
        raise ValueError(f"--fast has a data set of its own, {FAST.dataset}: leave out --dataset {args.dataset}")
    settings = FAST if args.fast else SETTINGS[args.dataset or "mnist"]
    images = load(settings)
    folder = args.out and args.out / "states"
    if folder is not None:
        check_settings(folder, settings)
    rows = []
    for one in (
        Run(activation, strategy, strength, seed)
        for seed in range(args.seeds)
        for activation, strategies in settings.grid.items()
        for strategy, strengths in strategies.items()
        for strength in strengths
    ):
        rows.append(kept(folder, one.name, partial(measured, one, settings, images)))
        progress(
            f"{one.name}: {100 * rows[-1]['test_accuracy']:.2f} %, {100 * rows[-1]['test_active']:.1f} % active, "
            f"with noise {100 * pictures.noisy(rows[-1]):.1f} %, {rows[-1]['seconds']:.0f} s"
        )
    figures: dict[str, Any] = {"settings": asdict(settings), "fast": args.fast, "runs": rows}
    figures["chosen"] = pictures.choose(rows)
    return Results(figures, pictures.markdown(figures), pictures.draw_fronts(rows, figures["chosen"]))


def check_settings(folder: Path, settings: Settings) -> None:
    """Leave the settings in `folder`, or raise ValueError where other ones have left networks there.

    The grid may differ: what it adds is trained.
    """
    path, ours = folder / "settings.json", json.loads(json.dumps(asdict(settings)))
    del ours["grid"]
    if path.is_file():
        check_same(f"what is in {folder}", json.loads(path.read_text()), ours)
    else:
        folder.mkdir(parents=True, exist_ok=True)
        with whole(path) as unfinished:
            unfinished.write_text(json.dumps(ours))


def kept(folder: Path | None, name: str, measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """The figures that `folder` has by that name, else measured and left there."""
    if folder is None:
        return measure()
    path = folder / f"{name}.json"
    if not path.is_file():
        with whole(path) as unfinished:
            unfinished.write_text(json.dumps(measure(), allow_nan=False))
    found: dict[str, Any] = json.loads(path.read_text())
    return found


def load(settings: Settings) -> Images:
    """The data set, and its test images with noise: the same for all networks."""
    data = ImageData(settings.dataset, batch_size=settings.batch_size, augment=settings.augment)
    data.prepare_data()
    data.setup()
    loaders = (data.val_dataloader(), data.test_dataloader())
    parts = [cast(TensorDataset, loader.dataset).tensors for loader in loaders]
    (val, val_labels), (test, test_labels) = ((images / 255, labels) for images, labels, _ in parts)
    generator = stream(0, 1)
    noisy = {
        kind: [robustness.NOISES[kind](test[: settings.noisy_images], level, generator) for level in levels]
        for kind, levels in settings.noise.items()
    }
    clean = val[:CALIBRATION_IMAGES]
    calibration = [clean, *(robustness.gaussian(clean, level, generator) for level in settings.noise["gaussian"])]
    return Images(data, (val, val_labels), (test, test_labels), noisy, calibration)


def measured(one: Run, settings: Settings, images: Images) -> dict[str, Any]:
    """Train a network and measure it."""
    begin = time.perf_counter()
    model = train(one, settings, images.data)
    training = time.perf_counter() - begin
    figures: dict[str, Any] = {**asdict(one), "seconds": round(training, 1)}
    for part, (x, labels) in {"val": images.val, "test": images.test}.items():
        figures[f"{part}_accuracy"], figures[f"{part}_active"] = accuracy_and_activity(model, x, labels)
    labels = images.test[1][: settings.noisy_images]
    figures["noise"] = under_noise(model, images.noisy, labels)
    x, labels_attacked = (part[: settings.attacked_images] for part in images.test)
    attacked = robustness.pgd(model, x, labels_attacked, settings.radius, settings.attack_steps, stream(0, 2))
    figures["attack"] = robustness.accuracy(model, attacked, labels_attacked)
    if one.activation != "top_k":  # which has no λ
        known = images.val[1][:CALIBRATION_IMAGES]
        adaptive = robustness.ThresholdByResidual(model, images.calibration, known, FACTORS)
        figures["factors"] = adaptive.factors
        figures["adaptive"] = under_noise(adaptive, images.noisy, labels)
        figures["adaptive_clean"] = robustness.accuracy(adaptive, *images.test)
    return figures


def under_noise(
    model: Callable[[Tensor], Tensor], noisy: Mapping[str, Sequence[Tensor]], labels: Tensor
) -> dict[str, list[float]]:
    """Accuracy at each level of each kind of noise."""
    return {kind: [robustness.accuracy(model, x, labels) for x in levels] for kind, levels in noisy.items()}


def train(one: Run, settings: Settings, data: ImageData) -> nn.Module:
    """A network of the grid, trained, as a classifier of pixels in [0, 1]."""
    seed_everything(one.seed, verbose=False)
    data.seed = one.seed
    strategy = STRATEGIES[one.strategy](one.strength)
    arguments = {**settings.model_args, **strategy.pop("model_args", {})}
    task = Classifier(
        model=settings.model,
        **ACTIVATIONS[one.activation],
        **strategy,
        model_args=arguments,
        optimizer=partial(torch.optim.AdamW, lr=settings.rate, weight_decay=0.05),
        channels_last=True,
        data=data,
    )
    trainer = quiet_trainer(
        max_epochs=settings.epochs, precision=settings.precision, barebones=True, limit_val_batches=0
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*barebones")
        trainer.fit(task, data)
    task.observer.remove()
    return robustness.Standardized(task.model.cpu().eval(), data.mean, data.std)


def accuracy_and_activity(model: nn.Module, x: Tensor, labels: Tensor) -> tuple[float, float]:
    """Accuracy, and the fraction of the entries of all sparse layers' codes that are not zero; both in [0, 1]."""
    with Observer(model) as observer:
        metrics = SparsityMetrics(observer.layers)

        def observed(part: Tensor) -> Tensor:
            logits: Tensor = model(part)
            metrics.update(observer)
            return logits

        return robustness.accuracy(observed, x, labels), metrics.compute()["active_fraction/total"]
