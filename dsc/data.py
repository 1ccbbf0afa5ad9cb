"""Image data sets held in memory as uint8; batches are shuffled by index and augmented as a whole."""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from lightning.pytorch import LightningDataModule
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, Sampler, TensorDataset
from torchvision.datasets import CIFAR10, CIFAR100, MNIST, FashionMNIST
from torchvision.datasets.utils import calculate_md5
from torchvision.transforms.v2 import MixUp

from dsc._names import unknown

# Runs that differ only in their seed are compared on the same images: the splits have a seed of their own.
_SPLIT_SEED = 0
CropMode = Literal["constant", "reflect"]
AUGMENTATIONS = ("crop", "flip", "alternating_flip", "cutout", "mixup")


@dataclass(frozen=True)
class DatasetInfo:
    """Channels, side in pixels, mean and std of each channel of pixels in [0, 1], and class names."""

    in_chans: int
    image_size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    class_names: tuple[str, ...]

    @property
    def num_classes(self) -> int:
        return len(self.class_names)


_DIGIT_NAMES = tuple("0123456789")
_CIFAR10_NAMES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
_CIFAR100_NAMES = """
apple aquarium_fish baby bear beaver bed bee beetle bicycle bottle bowl boy bridge bus butterfly camel can
castle caterpillar cattle chair chimpanzee clock cloud cockroach couch crab crocodile cup dinosaur dolphin
elephant flatfish forest fox girl hamster house kangaroo keyboard lamp lawn_mower leopard lion lizard lobster
man maple_tree motorcycle mountain mouse mushroom oak_tree orange orchid otter palm_tree pear pickup_truck
pine_tree plain plate poppy porcupine possum rabbit raccoon ray road rocket rose sea seal shark shrew skunk
skyscraper snail snake spider squirrel streetcar sunflower sweet_pepper table tank telephone television tiger
tractor train trout tulip turtle wardrobe whale willow_tree wolf woman worm
"""

DATASETS = {
    "digits": DatasetInfo(1, 8, (0.3054,), (0.3760,), _DIGIT_NAMES),
    "mnist": DatasetInfo(1, 28, (0.1307,), (0.3081,), _DIGIT_NAMES),
    "fashion_mnist": DatasetInfo(1, 28, (0.2860,), (0.3530,), tuple(FashionMNIST.classes)),
    "cifar10": DatasetInfo(3, 32, (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616), _CIFAR10_NAMES),
    "cifar100": DatasetInfo(3, 32, (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762), tuple(_CIFAR100_NAMES.split())),
}
_SOURCES = {"mnist": MNIST, "fashion_mnist": FashionMNIST, "cifar10": CIFAR10, "cifar100": CIFAR100}


def _cifar_files(source: Any) -> dict[str, str]:
    listed = [*source.train_list, *source.test_list, (source.meta["filename"], source.meta["md5"])]
    return {f"{source.base_folder}/{name}": md5 for name, md5 in listed}


# Every file that is read, below the root folder, and its MD5. Torchvision checks the archives of the MNIST
# family but not the files extracted from them, which are the ones people copy: their sums are written here.
_FILES: dict[str, dict[str, str]] = {
    "digits": {},  # shipped inside scikit-learn
    "mnist": {
        "MNIST/raw/train-images-idx3-ubyte": "6bbc9ace898e44ae57da46a324031adb",
        "MNIST/raw/train-labels-idx1-ubyte": "a25bea736e30d166cdddb491f175f624",
        "MNIST/raw/t10k-images-idx3-ubyte": "2646ac647ad5339dbf082846283269ea",
        "MNIST/raw/t10k-labels-idx1-ubyte": "27ae3e4e09519cfbb04c329615203637",
    },
    "fashion_mnist": {
        "FashionMNIST/raw/train-images-idx3-ubyte": "f4a8712d7a061bf5bd6d2ca38dc4d50a",
        "FashionMNIST/raw/train-labels-idx1-ubyte": "9018921c3c673c538a1fc5bad174d6f9",
        "FashionMNIST/raw/t10k-images-idx3-ubyte": "8181f5470baa50b63fa0f6fddb340f0a",
        "FashionMNIST/raw/t10k-labels-idx1-ubyte": "15d484375f8d13e6eb1aabb0c3f46965",
    },
    "cifar10": _cifar_files(CIFAR10),
    "cifar100": _cifar_files(CIFAR100),
}


def random_crop(x: Tensor, padding: int, mode: CropMode = "constant") -> Tensor:
    """Shift each image of `x` (N, C, H, W) by up to `padding` pixels both ways.

    Zeros enter at the border, or the image mirrored in it ("reflect").
    """
    n, _, h, w = x.shape
    # A view of every shift, of which only the chosen ones are copied: 5x faster than a gather on a CPU.
    windows = F.pad(x, [padding] * 4, mode).unfold(2, h, 1).unfold(3, w, 1)
    top, left = torch.randint(2 * padding + 1, (2, n), device=x.device)
    return windows[torch.arange(n, device=x.device), :, top, left]


def random_flip(x: Tensor) -> Tensor:
    """Mirror each image of `x` (N, C, H, W) left to right with probability one half."""
    return _flip_where(torch.rand(len(x), device=x.device) < 0.5, x)


def alternating_flip(x: Tensor, indices: Tensor, epoch: int, seed: int) -> Tensor:
    """Mirror each image of `x` (N, C, H, W) every second epoch, odd or even by its index (N,) and `seed`."""
    return _flip_where(_coin(indices, seed) ^ (epoch % 2 == 1), x)


def cutout(x: Tensor, size: int) -> Tensor:
    """Set to zero a `size` x `size` square, randomly placed inside each image of `x` (N, C, H, W)."""
    n, _, h, w = x.shape
    top = torch.randint(h - size + 1, (n, 1, 1, 1), device=x.device)
    left = torch.randint(w - size + 1, (n, 1, 1, 1), device=x.device)
    row = torch.arange(h, device=x.device).view(h, 1) - top
    column = torch.arange(w, device=x.device) - left
    return x.masked_fill((row >= 0) & (row < size) & (column >= 0) & (column < size), 0)


def _flip_where(mask: Tensor, x: Tensor) -> Tensor:
    return torch.where(mask.view(-1, 1, 1, 1), x.flip(3), x)


def _coin(indices: Tensor, seed: int) -> Tensor:
    """A fair bit for each (index, seed): a 32-bit hash, the same on every device and in every batch."""
    mask = 0xFFFFFFFF
    h = (indices + (seed * 0x9E3779B1 & mask)) & mask
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        h = ((h ^ (h >> shift)) * factor) & mask
    return ((h ^ (h >> 16)) & 1).bool()


class IndexBatches(Sampler[Tensor]):
    """Batches of indices below `n`, each an int64 tensor (batch_size,).

    For training they are shuffled by (seed, epoch), and an incomplete last batch is dropped unless it is the
    only one; otherwise they come in order and all are kept.
    """

    def __init__(self, n: int, batch_size: int, train: bool = False, seed: int = 0) -> None:
        self.n, self.batch_size, self.train, self.seed = n, batch_size, train, seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the order of the next pass; Lightning calls this before every epoch, a resumed one too."""
        self.epoch = epoch

    def __len__(self) -> int:
        full, rest = divmod(self.n, self.batch_size)
        return max(full, 1) if self.train else full + (rest > 0)

    def __iter__(self) -> Iterator[Tensor]:
        # A generator, so that the order is drawn with the first batch: when a fit is resumed, Lightning makes
        # the iterator before it sets the epoch.
        order = torch.randperm(self.n, generator=self._generator()) if self.train else torch.arange(self.n)
        yield from torch.split(order, self.batch_size)[: len(self)]

    def _generator(self) -> torch.Generator:
        # A CPU generator keeps 32 bits of its seed: packing (seed, epoch) into 64 bits would lose the seed.
        mixed = np.random.SeedSequence((self.seed, self.epoch)).generate_state(1)
        return torch.Generator().manual_seed(int(mixed[0]))


def _part(images: Tensor, labels: Tensor) -> TensorDataset:
    return TensorDataset(images, labels, torch.arange(len(labels)))


def _split(images: Tensor, labels: Tensor, fraction: float) -> tuple[TensorDataset, TensorDataset]:
    """The rest and a `fraction` of the images, stratified: the same split at every call."""
    positions, classes = np.arange(len(labels)), labels.numpy()
    parts = train_test_split(positions, test_size=fraction, stratify=classes, random_state=_SPLIT_SEED)
    rest, held_out = (_part(images[part], labels[part]) for part in parts)
    return rest, held_out


def _digits() -> tuple[TensorDataset, TensorDataset]:
    raw = load_digits()
    images = torch.from_numpy(raw.images * 255 / 16).round().to(torch.uint8).unsqueeze(1)
    return _split(images, torch.from_numpy(raw.target).long(), 0.2)  # there is no official test set


def _official(source: Any, root: Path, train: bool) -> TensorDataset:
    stored = source(root, train=train)
    pixels = torch.as_tensor(stored.data)  # (N, H, W) for grey images, (N, H, W, 3) for coloured ones
    images = pixels.reshape(*pixels.shape[:3], -1).permute(0, 3, 1, 2).contiguous()
    return _part(images, torch.as_tensor(stored.targets))


class ImageData(LightningDataModule):
    """Batches (images (B, C, H, W) float, labels (B,) int64) of one of `DATASETS`.

    The files lie as torchvision lays them out, under `root`, else under the folder named by the environment
    variable DSC_DATA, else under `data`. Validation is `val_fraction` of the official training set, the same
    part for every `seed`; `seed` orders the training batches. `augment` lists what is done to training batches, in
    that order, "mixup" last of all: it makes labels probabilities (B, classes). Raises ValueError for a wrong argument.
    """

    def __init__(
        self,
        dataset: str = "digits",
        root: str | None = None,
        batch_size: int = 128,
        eval_batch_size: int = 1000,
        val_fraction: float = 0.1,
        augment: Sequence[str] = (),
        crop_padding: int = 2,
        crop_mode: CropMode = "constant",
        cutout_size: int = 8,
        mixup_alpha: float = 0.2,
        normalize: bool = True,
        seed: int = 0,
        download: bool = True,
    ) -> None:
        super().__init__()
        if dataset not in DATASETS:
            raise ValueError(unknown("data set", dataset, DATASETS))
        info = DATASETS[dataset]
        self.dataset = dataset
        self.root = Path(root or os.environ.get("DSC_DATA") or "data").expanduser()
        self.batch_size, self.eval_batch_size, self.val_fraction = batch_size, eval_batch_size, val_fraction
        self.augment, self.crop_padding, self.crop_mode = tuple(augment), crop_padding, crop_mode
        self.cutout_size, self.mixup_alpha = cutout_size, mixup_alpha
        self.normalize, self.seed, self.download = normalize, seed, download
        self.num_classes, self.class_names = info.num_classes, info.class_names
        self.in_chans, self.image_size = info.in_chans, info.image_size
        self.mean, self.std = info.mean, info.std
        self._check_arguments()
        mean, std = (info.mean, info.std) if normalize else ((0.0,), (1.0,))
        self._shift_scale = 255 * torch.tensor([mean, std]).view(2, -1, 1, 1)
        self._parts: dict[str, TensorDataset] = {}

    def _check_arguments(self) -> None:
        for name in self.augment:
            if name not in AUGMENTATIONS:
                raise ValueError(unknown("augmentation", name, AUGMENTATIONS))
        if self.crop_mode not in get_args(CropMode):
            raise ValueError(unknown("crop_mode", self.crop_mode, get_args(CropMode)))
        if not 0 < self.val_fraction < 1:
            raise ValueError(f"val_fraction must lie strictly between 0 and 1, not {self.val_fraction}")
        if min(self.batch_size, self.eval_batch_size) < 1:
            raise ValueError(f"batch sizes must be positive, not {self.batch_size}, {self.eval_batch_size}")
        if not self.mixup_alpha > 0:
            raise ValueError(f"mixup_alpha must be above 0, not {self.mixup_alpha}")
        for name, size in {"crop": self.crop_padding, "cutout": self.cutout_size}.items():
            if name in self.augment and not 0 <= size < self.image_size:
                raise ValueError(f"{name} of {size} pixels does not fit images of {self.image_size} pixels")

    def _missing(self) -> list[str]:
        return [file for file in _FILES[self.dataset] if not (self.root / file).is_file()]

    def _no_data(self, why: str) -> FileNotFoundError:
        return FileNotFoundError(
            f"no {self.dataset} data in {self.root.absolute()}: missing {', '.join(self._missing())}; {why}. "
            "Put these files there, or give the folder that has them with --data.root or DSC_DATA."
        )

    def prepare_data(self) -> None:
        """Download the files that are missing; raises FileNotFoundError if they cannot be had."""
        if not self._missing():
            return
        if not self.download:
            raise self._no_data("downloading is switched off")
        try:
            _SOURCES[self.dataset](self.root, train=False, download=True)
        except (OSError, RuntimeError, HTTPException) as error:
            raise self._no_data(f"the download failed ({' '.join(str(error).split())})") from error

    def setup(self, stage: str | None = None) -> None:
        """Check and read the files once; raises FileNotFoundError (missing) or ValueError (altered)."""
        if self._parts:
            return
        self._check_files()
        if self.dataset == "digits":
            official, test = _digits()
        else:
            official, test = (_official(_SOURCES[self.dataset], self.root, train) for train in (True, False))
        images, labels, _ = official.tensors
        train, val = _split(images, labels, self.val_fraction)
        self._parts = {"train": train, "val": val, "test": test}

    def _check_files(self) -> None:
        if self._missing():
            raise self._no_data("prepare_data() fetches them")
        for file, expected in _FILES[self.dataset].items():
            if (found := calculate_md5(self.root / file)) != expected:
                raise ValueError(
                    f"{self.root / file} is not the original file: its MD5 is {found}, expected {expected}. "
                    "Delete it to have it downloaded again, or replace it."
                )

    def _loader(self, part: str) -> DataLoader[tuple[Tensor, ...]]:
        train, data = part == "train", self._parts[part]
        batch_size = self.batch_size if train else self.eval_batch_size
        batches = IndexBatches(len(data), batch_size, train, self.seed)
        # batch_size=None: each tensor of the sampler indexes the data set once, with nothing to collate. A generator
        # of its own: a loader draws a number when it starts, earlier in a resumed run than in an unbroken one.
        return DataLoader(data, sampler=batches, batch_size=None, generator=torch.Generator())

    def train_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        """Raw uint8 images (B, C, H, W), labels (B,) and indices (B,), reshuffled each epoch."""
        return self._loader("train")

    def val_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        """Raw uint8 images (B, C, H, W), labels (B,) and indices (B,) held out of the training set."""
        return self._loader("val")

    def test_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        """Raw uint8 images (B, C, H, W), labels (B,) and indices (B,) of the test set."""
        return self._loader("test")

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> tuple[Tensor, Tensor]:
        """Float images (B, C, H, W) and labels (B,) of a raw batch, on its device, augmented in training."""
        images, labels, indices = batch
        if self.trainer is not None and self.trainer.training:
            images = self._augmented(images, indices, self.trainer.current_epoch)
            if "mixup" in self.augment:
                return MixUp(alpha=self.mixup_alpha, num_classes=self.num_classes)(self._as_input(images), labels)
        return self._as_input(images), labels

    def _augmented(self, x: Tensor, indices: Tensor, epoch: int) -> Tensor:
        for name in self.augment:
            match name:
                case "crop":
                    x = random_crop(x, self.crop_padding, self.crop_mode)
                case "flip":
                    x = random_flip(x)
                case "alternating_flip":
                    x = alternating_flip(x, indices, epoch, self.seed)
                case "cutout":
                    x = cutout(x, self.cutout_size)
        return x

    def _as_input(self, images: Tensor) -> Tensor:
        # Kept on the device of the last batch: a copy from the host each step would stall a GPU.
        self._shift_scale = self._shift_scale.to(images.device)
        shift, scale = self._shift_scale
        x: Tensor = images.float().sub_(shift).div_(scale)
        # Lightning converts inputs to the trainer's precision before this hook, when they are still uint8.
        return x if self.trainer is None else self.trainer.precision_plugin.convert_input(x)

    def probe(self, n: int) -> Tensor:
        """The first `n` validation images (or all) as the model sees them: (n, C, H, W), on the CPU."""
        self.setup()
        return self._as_input(self._parts["val"].tensors[0][:n])

    def sample(self, n: int) -> Tensor:
        """The first `n` training images (or all) as the model sees them: (n, C, H, W), on the CPU."""
        self.setup()
        return self._as_input(self._parts["train"].tensors[0][:n])
