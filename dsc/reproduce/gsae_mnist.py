"""Group-sparse and sparse autoencoders on MNIST: their atoms, their codes, and the digits found without labels.

Both have 160 atoms and tie encoder and decoder over 15 steps of FISTA. The codes of one are sparse in 10 groups of 16
atoms, those of the other entry by entry. The figure is how well clusters of the codes of the 10,000 test images are the
digits (arXiv 2102.07003, Figs 4 and 5, Table 1). A run that was stopped goes on with its folder as --out.
"""

import time
import warnings
from argparse import ArgumentParser, ArgumentTypeError, Namespace
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, cast, get_args

import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from dsc.data import ImageData, IndexBatches
from dsc.dictionaries import DenseDictionary
from dsc.encode import sparse_encode
from dsc.init import Start, data_samples, from_signals
from dsc.layers import SparseCoding, StepSize
from dsc.measures import active_fraction, group_support, strongest_group
from dsc.metrics import clustering_scores
from dsc.models.autoencoder import SparseAutoencoder, layers_of
from dsc.reproduce import gsae_mnist_figures as pictures
from dsc.reproduce.baselines import Learned, alternating_minimisation, online_learning
from dsc.reproduce.clustering import clustering_rows, kmeans, shares, strongest_group_row
from dsc.reproduce.results import Results, check_same
from dsc.tasks import Reconstructor
from dsc.trainers import quiet_trainer

Progress = Callable[[str], None]
KINDS = ("sparse", "group")


@dataclass(frozen=True)
class Settings:
    """Sizes of the experiment and of the training: the paper's and, where it is silent, its authors' code's."""

    dataset: str = "mnist"
    train_images: int = 60_000
    test_images: int = 10_000
    num_groups: int = 10
    group_size: int = 16
    steps: int = 15
    step: StepSize = 0.04
    group_penalty: float = 5.0  # λ, of which λ·step = 0.2 is the threshold of a step
    sparse_penalty: float = 0.75  # λ·step = 0.03
    initial: Start = "singular"
    epochs: int = 300
    batch_size: int = 256
    rate: float = 1e-3
    neighbours: int = 1000
    every: int = 5  # epochs between two looks at the clusters
    baseline_images: int = 10_000
    baseline_turns: int = 10

    @property
    def num_atoms(self) -> int:
        return self.num_groups * self.group_size


FAST = Settings(
    train_images=5_000,
    test_images=1000,
    epochs=4,
    batch_size=64,
    neighbours=100,
    every=2,
    baseline_images=500,
    baseline_turns=3,
)


def add_arguments(parser: ArgumentParser) -> None:
    """The experiment's own options."""
    parser.add_argument(
        "--epochs",
        type=_epochs,
        help=f"passes over the training images (default: {Settings.epochs}, or {FAST.epochs} with --fast)",
    )
    parser.add_argument(
        "--initial",
        choices=get_args(Start),
        default=Settings.initial,
        help="first atoms: leading singular vectors, rotated for each group, or images, whose atoms are so alike that "
        "the steps must be 1/L instead of 0.04 (default: %(default)s)",
    )


def _epochs(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise ArgumentTypeError(f"expected a number of at least 1, got {text!r}")
    return int(text)


@dataclass(frozen=True)
class Images:
    """Pixels in [0, 1], (images, channels, height, width), and the classes of the test images."""

    facts: ImageData
    train: Tensor
    test: Tensor
    labels: Tensor


def run(args: Namespace, progress: Progress) -> Results:
    """Both autoencoders and the baselines, `args.seeds` times."""
    settings = replace(FAST if args.fast else Settings(), initial=args.initial)
    settings = replace(settings, epochs=args.epochs or settings.epochs)
    if settings.initial == "samples":
        settings = replace(settings, step="lipschitz")
    images = load(settings)
    clusters: list[dict[str, Any]] = []
    models: list[dict[str, Any]] = []
    first: dict[str, Trained] = {}
    for seed in range(args.seeds):
        trained = {kind: train(kind, settings, images, seed, args.out, progress) for kind in KINDS}
        first = first or trained
        models += [one.figures for one in trained.values()]
        for row in cluster(settings, images, {kind: one.codes for kind, one in trained.items()}, seed):
            clusters.append(row | {"seed": seed})
            progress(f"seed {seed}: {row['input']}, {row['method']}, {100 * row['accuracy']:.2f} %")
    figures = {"settings": asdict(settings), "fast": args.fast, "paper": pictures.PAPER, "models": models}
    figures["clusters"] = clusters
    atoms = {kind: one.atoms for kind, one in first.items()}
    codes = {kind: one.codes for kind, one in first.items()}
    more = {
        "distances": pictures.draw_distances(images.test, images.labels, codes, settings.group_size),
        "course": pictures.draw_course(models),
    }
    picture = pictures.draw_models(images.test, atoms, codes, settings.group_size)
    return Results(figures, pictures.markdown(figures), picture, more)


def load(settings: Settings) -> Images:
    """The data set: all official training images, labels of the test images alone."""
    data = ImageData(settings.dataset, normalize=False)
    data.prepare_data()
    data.setup()
    loaders = (data.train_dataloader(), data.val_dataloader(), data.test_dataloader())
    parts = [data.on_after_batch_transfer(cast(TensorDataset, loader.dataset).tensors, 0) for loader in loaders]
    train, val, test = parts
    n = settings.test_images
    return Images(data, torch.cat([train[0], val[0]])[: settings.train_images], test[0][:n], test[1][:n])


@dataclass(frozen=True)
class Trained:
    """An autoencoder's atoms (atoms, pixels), its codes of the test images, and the figures of its training."""

    atoms: Tensor
    codes: Tensor
    figures: dict[str, Any]


def train(
    kind: str, settings: Settings, images: Images, seed: int, folder: Path | None = None, progress: Progress = print
) -> Trained:
    """One autoencoder, "group" or "sparse"; its state after every epoch is kept in `folder`, and continued.

    Raises ValueError for a state in `folder` that other settings have left there.
    """
    task = autoencoder(kind, settings, images, seed)
    course = Course(kind, settings, images, seed, progress)
    batches = IndexBatches(len(images.train), settings.batch_size, train=True, seed=seed)
    pixels = TensorDataset(images.train, torch.arange(len(images.train)))
    loader = DataLoader(pixels, sampler=batches, batch_size=None, generator=torch.Generator())
    fit(task, course, loader, settings.epochs, folder and folder / "states" / f"{kind}-{seed}")
    codes = encode(task, images.test)
    figures = course.figures() | {"loss": task.epoch_losses} | usage(kind, settings, codes, images.labels)
    return Trained(layer_of(task).dictionary.weight.detach().clone(), codes, figures)


def autoencoder(kind: str, settings: Settings, images: Images, seed: int) -> Reconstructor:
    """The task before training, with its first atoms."""
    s = settings
    own: dict[str, Any] = dict(model="sae", threshold=s.sparse_penalty)
    if kind == "group":
        own = dict(model="gsae", group_size=s.group_size, threshold=s.group_penalty)
    shape = dict(num_atoms=s.num_atoms, steps=s.steps, step=s.step)
    optimizer = partial(torch.optim.Adam, lr=s.rate)
    task = Reconstructor(data=images.facts, model_args=shape, optimizer=optimizer, lr_scheduler=None, **own)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)  # of the vector that the estimate of L begins with
        layer_of(task).dictionary = DenseDictionary.from_atoms(first_atoms(kind, s, images.train.flatten(1), seed))
    return task


def first_atoms(kind: str, settings: Settings, signals: Tensor, seed: int) -> Tensor:
    """Atoms to begin with, (atoms, pixels)."""
    size = settings.group_size if kind == "group" else 1
    return from_signals(signals, settings.num_atoms, size, settings.initial, torch.Generator().manual_seed(seed))


def layer_of(task: Reconstructor) -> SparseCoding:
    """The one layer of an autoencoder."""
    (layer,) = layers_of(cast(SparseAutoencoder, task.model).coder)
    return layer


@torch.no_grad()
def encode(task: Reconstructor, images: Tensor) -> Tensor:
    """Codes of images, (images, atoms), on the CPU."""
    model, training = cast(SparseAutoencoder, task.model), task.training
    task.eval()  # in training a look would move the estimate of L, and with it the training
    codes = torch.cat([model.encode(batch.to(task.device)).cpu() for batch in images.split(1000)])
    task.train(training)
    return codes


def fit(
    task: Reconstructor, course: "Course", loader: DataLoader[Any], epochs: int, folder: Path | None = None
) -> None:
    """Train the task, in place, from where `folder` has it."""
    callbacks: list[Callback] = [course]
    state = None
    if folder is not None:
        state = folder / "last.ckpt"
        callbacks.append(
            ModelCheckpoint(folder, state.stem, save_on_train_epoch_end=True, enable_version_counter=False)
        )
    trainer = quiet_trainer(max_epochs=epochs, callbacks=callbacks, enable_checkpointing=folder is not None)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*no `val_dataloader`")  # no epoch is chosen: nothing to hold out
        trainer.fit(task, loader, ckpt_path=state if state and state.is_file() else None, weights_only=True)
    task.cpu().eval()


class Course(Callback):
    """What an autoencoder's codes of the test images are, every few epochs; no label goes into its training."""

    def __init__(self, kind: str, settings: Settings, images: Images, seed: int, progress: Progress) -> None:
        self.kind, self.settings, self.images, self.seed, self.progress = kind, settings, images, seed, progress
        self.rows: list[dict[str, Any]] = []
        self.seconds: list[float] = []
        self._begin = 0.0

    def on_train_epoch_start(self, trainer: Trainer, task: Any) -> None:
        self._begin = time.perf_counter()

    def on_train_epoch_end(self, trainer: Trainer, task: Any) -> None:
        self.seconds.append(round(time.perf_counter() - self._begin, 2))
        epoch = trainer.current_epoch + 1
        if epoch % self.settings.every == 0 or epoch == self.settings.epochs:
            row = {"epoch": epoch, **self.look(task)}
            self.rows.append(row)
            self.progress(f"seed {self.seed}, {self.kind}, epoch {epoch}: accuracy {100 * row['accuracy']:.1f} %, "
                          f"{self.seconds[-1]:.1f} s an epoch")  # fmt: skip

    @torch.no_grad()
    def look(self, task: Reconstructor) -> dict[str, float]:
        """Accuracy of k-means on codes₊ (and of the strongest group), what is active, and step·L."""
        s, labels = self.settings, self.images.labels
        z = encode(task, self.images.test)
        found = {"accuracy": clustering_scores(kmeans(shares(z), len(labels.unique()), self.seed), labels)["accuracy"]}
        if self.kind == "group":
            found["strongest_group_accuracy"] = clustering_scores(strongest_group(z, s.group_size), labels)["accuracy"]
            found["active_groups"] = float(group_support(z, s.group_size).sum(1).float().mean())
        found["active_fraction"] = float(active_fraction(z))
        bound = float(layer_of(task).dictionary.lipschitz())
        found["step_times_lipschitz"] = s.step * bound if isinstance(s.step, float) else 1.0
        return found

    def figures(self) -> dict[str, Any]:
        """For JSON: looks at some epochs, seconds of each."""
        return {"model": self.kind, "seed": self.seed, "course": self.rows, "epoch_seconds": self.seconds}

    def state_dict(self) -> dict[str, Any]:
        return {"settings": self._what_decides(), "rows": self.rows, "seconds": self.seconds}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        check_same("the state to continue", state_dict["settings"], self._what_decides())
        if len(state_dict["seconds"]) > self.settings.epochs:
            raise ValueError(f"the state to continue has {len(state_dict['seconds'])} epochs, more than the "
                             f"{self.settings.epochs} to train: choose another --out")  # fmt: skip
        self.rows, self.seconds = list(state_dict["rows"]), list(state_dict["seconds"])

    def _what_decides(self) -> dict[str, Any]:
        free = ("epochs", "every", "neighbours", "baseline_images", "baseline_turns")
        return {key: value for key, value in asdict(self.settings).items() if key not in free}


def usage(kind: str, settings: Settings, z: Tensor, labels: Tensor) -> dict[str, Any]:
    """How many atoms and groups the codes of an image use, on average, and by class."""
    used = {"active_atoms": (z != 0).sum(1).float()}
    if kind == "group":
        used["active_groups"] = group_support(z, settings.group_size).sum(1).float()
    figures: dict[str, Any] = {name: round(float(count.mean()), 3) for name, count in used.items()}
    for name, count in used.items():
        figures[f"{name}_by_class"] = [round(float(count[labels == c].mean()), 3) for c in labels.unique()]
    return figures


def cluster(settings: Settings, images: Images, codes: dict[str, Tensor], seed: int) -> Iterator[dict[str, Any]]:
    """Rows of the table: the paper's, the strongest group alone, and the baselines."""
    features = {"raw pixels": images.test}
    for kind, z in codes.items():
        features |= {f"{kind} codes": z, f"{kind} codes₊": shares(z)}
    yield from clustering_rows(features, images.labels, settings.neighbours, seed)
    yield strongest_group_row("group codes", codes["group"], settings.group_size, images.labels)
    for learned, z in baselines(settings, images, seed):
        features = {f"{learned.method} codes₊": shares(z)}
        for row in clustering_rows(features, images.labels, settings.neighbours, seed):
            yield row | {"baseline": learned.row()}


def baselines(settings: Settings, images: Images, seed: int) -> Iterator[tuple[Learned, Tensor]]:
    """What classical dictionary learning makes of some training images, and its exact codes of the test images.

    Each method begins with images drawn at random, its usual start.
    """
    s = settings
    signals = images.train[: s.baseline_images].flatten(1)
    start = data_samples(signals, s.num_atoms, torch.Generator().manual_seed(seed))
    group = alternating_minimisation(signals, start, s.group_penalty, s.baseline_turns, s.group_size)
    yield group, _codes(images.test, group, s.group_penalty, prox="group_relu", group_size=s.group_size)
    for sparse in (
        alternating_minimisation(signals, start, s.sparse_penalty, s.baseline_turns),
        online_learning(signals, start, s.sparse_penalty, s.baseline_turns, seed),
    ):
        yield sparse, _codes(images.test, sparse, s.sparse_penalty)


def _codes(images: Tensor, learned: Learned, penalty: float, **prox: Any) -> Tensor:
    return cast(Tensor, sparse_encode(images.flatten(1), learned.atoms, penalty, tol=1e-3, **prox))
