"""The data module: splits, batch order, augmentations against slow references, answers to bad files."""

import os
import pickle
import re
import struct
from functools import partial
from pathlib import Path
from typing import Any
from urllib.error import URLError

import numpy as np
import pytest
import torch
import torchvision.datasets as tv
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from sklearn.datasets import load_digits
from torch import Tensor
from torchvision.datasets.utils import calculate_md5

from dsc import data as module
from dsc.data import (
    AUGMENTATIONS,
    DATASETS,
    ImageData,
    IndexBatches,
    alternating_flip,
    cutout,
    random_crop,
    random_flip,
)

REAL = Path(os.environ.get("DSC_DATA", "no such folder"))


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def needs(folder: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(not (REAL / folder).is_dir(), reason=f"DSC_DATA names no folder with {folder}")


def ready(**arguments: Any) -> ImageData:
    data = ImageData(**arguments)
    data.prepare_data()
    data.setup()
    return data


def part(data: ImageData, name: str) -> tuple[Tensor, Tensor]:
    images, labels, indices = data._parts[name].tensors
    assert indices.tolist() == list(range(len(images)))
    return images, labels


def distinct(n: int, channels: int = 1, side: int = 6) -> Tensor:
    """Images (n, C, side, side) in which no pixel of an image is zero and no two are equal."""
    return torch.stack([torch.randperm(channels * side * side) + 1 for _ in range(n)]).view(n, channels, side, side)


class Recorder(LightningModule):
    """A one-layer model that keeps every batch it is given, by epoch."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(64, 10)
        self.train_batches: dict[int, list[tuple[Tensor, Tensor]]] = {}
        self.val_batches: list[Tensor] = []

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        x, y = batch
        self.train_batches.setdefault(self.current_epoch, []).append((x, y))
        return torch.nn.functional.cross_entropy(self.layer(x.flatten(1)), y)

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self.val_batches.append(batch[0])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)

    def images(self, epoch: int) -> Tensor:
        return torch.cat([x for x, _ in self.train_batches[epoch]])


def fit(epochs: int, data: ImageData, checkpoint: Path | None = None, **arguments: Any) -> Recorder:
    model = Recorder()
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    arguments = {"accelerator": "cpu", "enable_checkpointing": False, **quiet, **arguments}
    Trainer(max_epochs=epochs, **arguments).fit(model, data, ckpt_path=checkpoint)
    return model


# --- the parts ----------------------------------------------------------------------------------------------


def test_digits_are_the_original_images_and_labels() -> None:
    raw, data = load_digits(), ready()
    images = torch.cat([part(data, name)[0] for name in ("train", "val", "test")])
    labels = torch.cat([part(data, name)[1] for name in ("train", "val", "test")])
    assert images.shape == (1797, 1, 8, 8) and images.dtype == torch.uint8 and labels.dtype == torch.int64
    assert images.min() == 0 and images.max() == 255
    original = {
        (np.round(i * 255 / 16).astype(np.uint8).tobytes(), int(t)) for i, t in zip(raw.images, raw.target, strict=True)
    }
    assert {(i.numpy().tobytes(), int(t)) for i, t in zip(images, labels, strict=True)} == original
    assert raw.target[:10].tolist() == list(range(10))
    first = torch.from_numpy(raw.images[0] * 255 / 16).round()
    assert labels[(images[:, 0] == first).flatten(1).all(1)].tolist() == [0]


def test_parts_are_disjoint_and_stratified() -> None:
    data = ready(val_fraction=0.25)
    members = {name: {i.numpy().tobytes() for i in part(data, name)[0]} for name in ("train", "val", "test")}
    assert len(members["train"]) == 1077 and len(members["val"]) == 360 and len(members["test"]) == 360
    assert len(set.union(*members.values())) == 1797  # no image is in two parts: the 1797 are all different
    share = torch.bincount(torch.from_numpy(load_digits().target)) / 1797
    for name in members:
        labels = part(data, name)[1]
        assert (torch.bincount(labels) - share * len(labels)).abs().max() < 1.5


def test_parts_depend_on_neither_seed_nor_version() -> None:
    one, other = ready(seed=0), ready(seed=7)
    for name, total in {"train": 6438296, "val": 724686, "test": 1790819}.items():
        assert all(torch.equal(a, b) for a, b in zip(part(one, name), part(other, name), strict=True))
        # A change of these sums would silently change every published figure.
        assert part(one, name)[0].sum() == total


def test_test_part_does_not_depend_on_val_fraction() -> None:
    assert torch.equal(part(ready(val_fraction=0.1), "test")[0], part(ready(val_fraction=0.5), "test")[0])


def test_setup_reads_once() -> None:
    data = ready()
    before = data._parts["train"]
    data.setup("fit")
    data.setup("test")
    assert data._parts["train"] is before


def test_digits_statistics() -> None:
    data = ready()
    pixels = torch.cat([part(data, "train")[0], part(data, "val")[0]]) / 255
    assert abs(pixels.mean() - data.mean[0]) < 1e-4 and abs(pixels.std() - data.std[0]) < 2e-4


def test_description_needs_no_data(tmp_path: Path) -> None:
    for name, info in DATASETS.items():
        data = ImageData(name, root=str(tmp_path), download=False)
        assert (data.num_classes, data.in_chans, data.image_size) == (
            len(info.class_names),
            info.in_chans,
            info.image_size,
        )
        assert (data.mean, data.std, data.class_names) == (info.mean, info.std, info.class_names)
        assert len(data.mean) == len(data.std) == data.in_chans
    names = DATASETS["cifar100"].class_names
    assert len(set(names)) == 100 and list(names) == sorted(names)


# --- batches ------------------------------------------------------------------------------------------------


def test_order_is_a_function_of_seed_and_epoch() -> None:
    def order(seed: int, epoch: int) -> list[int]:
        batches = IndexBatches(50, 10, train=True, seed=seed)
        batches.set_epoch(epoch)
        return torch.cat(list(batches)).tolist()

    orders = {(seed, epoch): order(seed, epoch) for seed in range(4) for epoch in range(4)}
    assert len({tuple(o) for o in orders.values()}) == 16  # no (seed, epoch) repeats another, (0, 1) and (1, 0) neither
    assert all(sorted(o) == list(range(50)) for o in orders.values())
    assert all(order(*key) == o for key, o in orders.items())


@pytest.mark.parametrize(
    ("n", "size", "train", "lengths"),
    [
        (25, 10, True, [10, 10]),
        (20, 10, True, [10, 10]),
        (7, 10, True, [7]),
        (25, 10, False, [10, 10, 5]),
        (20, 10, False, [10, 10]),
    ],
)
def test_incomplete_batches(n: int, size: int, train: bool, lengths: list[int]) -> None:
    batches = IndexBatches(n, size, train)
    assert [len(b) for b in batches] == lengths and len(batches) == len(lengths)


def test_evaluation_keeps_every_image_in_order() -> None:
    data = ready(eval_batch_size=50)
    for name, loader in {"val": data.val_dataloader(), "test": data.test_dataloader()}.items():
        assert [len(y) for _, y, _ in loader][:2] == [50, 50]
        images, labels, indices = (torch.cat(column) for column in zip(*loader, strict=True))
        assert torch.equal(images, part(data, name)[0]) and torch.equal(labels, part(data, name)[1])
        assert indices.tolist() == list(range(len(images)))


def test_train_indices_point_at_their_images() -> None:
    data = ready(batch_size=100)
    for images, labels, indices in data.train_dataloader():
        assert torch.equal(images, part(data, "train")[0][indices]) and torch.equal(
            labels, part(data, "train")[1][indices]
        )


@pytest.mark.parametrize("at_epoch_end", [True, False], ids=["after training", "after validation"])
def test_resumed_fit_sees_the_batches_of_an_unbroken_one(tmp_path: Path, at_epoch_end: bool) -> None:
    settings: dict[str, Any] = {"batch_size": 256, "seed": 3, "augment": ["alternating_flip"]}
    unbroken = fit(3, ImageData(**settings))
    saver = ModelCheckpoint(tmp_path, filename="first", save_on_train_epoch_end=at_epoch_end)
    first = fit(1, ImageData(**settings), enable_checkpointing=True, callbacks=[saver])
    resumed = fit(3, ImageData(**settings), checkpoint=tmp_path / "first.ckpt")

    assert sorted(first.train_batches) == [0] and sorted(resumed.train_batches) == [1, 2]
    for epoch, run in ((0, first), (1, resumed), (2, resumed)):
        assert len(run.train_batches[epoch]) == 5
        for (x, y), (x0, y0) in zip(run.train_batches[epoch], unbroken.train_batches[epoch], strict=True):
            assert torch.equal(x, x0) and torch.equal(y, y0)
    assert not torch.equal(unbroken.images(0), unbroken.images(1))


def test_only_training_batches_are_augmented() -> None:
    data = ImageData(batch_size=1293, augment=["crop", "flip", "cutout"], cutout_size=3, crop_padding=1)
    model = fit(1, data, num_sanity_val_steps=1)
    val = (part(data, "val")[0] / 255 - data.mean[0]) / data.std[0]
    assert len(model.val_batches) == 2  # one of the sanity check, one of the epoch
    assert all(torch.allclose(x, val, atol=1e-5) for x in model.val_batches)
    train = (part(data, "train")[0] / 255 - data.mean[0]) / data.std[0]
    assert model.images(0).shape == train.shape
    originals = {x.numpy().tobytes() for x in train}
    assert sum(x.numpy().tobytes() in originals for x in model.images(0)) < 13


def test_fit_alternates_flips_from_epoch_to_epoch() -> None:
    model = fit(2, ImageData(batch_size=1293, augment=["alternating_flip"]))
    first = {x.numpy().tobytes() for x in model.images(0)}
    assert len(first) == 1293 and first == {x.flip(2).numpy().tobytes() for x in model.images(1)}


def test_inputs_have_the_precision_of_the_trainer() -> None:
    data = ImageData()
    model = fit(1, data, precision="64-true", limit_train_batches=1)
    assert model.images(0).dtype == data.probe(1).dtype == torch.float64


def test_evaluation_input_is_normalised() -> None:
    data = ready()
    images, labels, _ = batch = next(iter(data.val_dataloader()))
    before = images.clone()
    x, y = data.on_after_batch_transfer(batch, 0)
    assert x.dtype == torch.float32 and torch.equal(y, labels)
    assert torch.allclose(x, (images / 255 - data.mean[0]) / data.std[0], atol=1e-5)
    assert torch.equal(images, before)
    plain, _ = ready(normalize=False).on_after_batch_transfer(batch, 0)
    assert torch.allclose(plain, images / 255)


def test_probe_is_the_head_of_the_validation_input() -> None:
    data = ready(augment=["crop", "flip"])
    x, _ = data.on_after_batch_transfer(next(iter(data.val_dataloader())), 0)
    assert torch.equal(data.probe(5), x[:5]) and torch.equal(ImageData().probe(5), x[:5])
    assert len(data.probe(10**6)) == 144


def test_sample_is_the_head_of_the_training_images() -> None:
    data = ready(augment=["crop", "flip"])
    train = (part(data, "train")[0] / 255 - data.mean[0]) / data.std[0]
    assert torch.allclose(data.sample(5), train[:5], atol=1e-5)
    assert len(data.sample(10**6)) == 1293


def test_mixup_adds_each_pair_of_neighbours_in_the_proportion_of_its_labels() -> None:
    plain = fit(1, ImageData(batch_size=200))
    mixed = fit(1, ImageData(batch_size=200, augment=["mixup"], mixup_alpha=5.0))
    for (x, y), (mix, probabilities) in zip(plain.train_batches[0], mixed.train_batches[0], strict=True):
        ours, theirs = (torch.nn.functional.one_hot(labels, 10).float() for labels in (y, y.roll(1)))
        differ = (y != y.roll(1)).nonzero()[0].item()
        share = probabilities[differ, y[differ]]
        assert 0 < share < 1
        assert torch.allclose(probabilities, share * ours + (1 - share) * theirs, atol=1e-6)
        assert torch.allclose(mix, share * x + (1 - share) * x.roll(1, 0), atol=1e-5)


# --- augmentations ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["constant", "reflect"])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_random_crop_gives_every_shift_of_the_padded_image(dtype: torch.dtype, mode: Any) -> None:
    padding, x = 2, distinct(2000, channels=2).to(dtype)
    cropped = random_crop(x, padding, mode)
    assert cropped.shape == x.shape and cropped.dtype == dtype
    counts = torch.zeros(5, 5)
    for image, result in zip(x, cropped, strict=True):
        padded = torch.from_numpy(np.pad(image.numpy(), ((0, 0), (2, 2), (2, 2)), mode))
        shifts = [(i, j) for i in range(5) for j in range(5) if torch.equal(padded[:, i : i + 6, j : j + 6], result)]
        assert len(shifts) == 1
        counts[shifts[0]] += 1
    assert ((counts - 80) ** 2 / 80).sum() < 60  # chi-square of 24 degrees: above 60 once in 15 000


def test_crop_without_padding_is_the_identity() -> None:
    x = distinct(20)
    assert torch.equal(random_crop(x, 0), x)


def test_random_flip_mirrors_half_of_the_images() -> None:
    x = distinct(2000, channels=2)
    flipped = random_flip(x)
    mirrored = [torch.equal(b, a[:, :, [5, 4, 3, 2, 1, 0]]) for a, b in zip(x, flipped, strict=True)]
    assert all(m != torch.equal(a, b) for m, a, b in zip(mirrored, x, flipped, strict=True))
    assert 880 < sum(mirrored) < 1120


def mirrored_at(epoch: int, seed: int, indices: Tensor) -> Tensor:
    x = distinct(len(indices))
    flipped = alternating_flip(x, indices, epoch, seed)
    same = (flipped == x).flatten(1).all(1)
    assert torch.equal(~same, (flipped == x.flip(3)).flatten(1).all(1))
    return ~same


def test_alternating_flip_alternates() -> None:
    indices = torch.arange(1000)
    even, odd = mirrored_at(0, 5, indices), mirrored_at(1, 5, indices)
    assert torch.equal(even, ~odd)
    assert torch.equal(even, mirrored_at(2, 5, indices)) and torch.equal(odd, mirrored_at(3, 5, indices))
    assert 430 < even.sum() < 570
    some = torch.randperm(1000)[:50]  # a bit belongs to its image, whatever the batch
    assert torch.equal(mirrored_at(0, 5, some), even[some])
    assert 430 < (even != mirrored_at(0, 6, indices)).sum() < 570  # another seed: half of the bits differ


def test_alternating_flip_bits_are_the_hash_in_exact_integers() -> None:
    def bit(index: int, seed: int) -> bool:
        h = (index + seed * 0x9E3779B1) % 2**32
        h = (h ^ h >> 16) * 0x85EBCA6B % 2**32
        h = (h ^ h >> 13) * 0xC2B2AE35 % 2**32
        return bool((h ^ h >> 16) & 1)

    for seed in (0, 1, 2**31, 2**63 + 11):
        assert mirrored_at(0, seed, torch.arange(500)).tolist() == [bit(i, seed) for i in range(500)]


@pytest.mark.parametrize("size", [1, 3, 4, 6])
def test_cutout_clears_one_whole_square(size: int) -> None:
    x = distinct(1000, channels=2)
    corners = set()
    for image, result in zip(x, cutout(x, size), strict=True):
        rows, columns = torch.nonzero(result[0] == 0, as_tuple=True)
        top, left = int(rows.min()), int(columns.min())
        expected = image.clone()
        expected[:, top : top + size, left : left + size] = 0
        assert len(rows) == size**2 and torch.equal(result, expected)
        corners.add((top, left))
    assert len(corners) == (7 - size) ** 2


def test_augmentations_follow_the_global_generator() -> None:
    x = distinct(50)
    for augment in (partial(random_crop, padding=2), random_flip, partial(cutout, size=2)):
        torch.manual_seed(1)
        first, second = augment(x), augment(x)
        torch.manual_seed(1)
        assert torch.equal(augment(x), first) and not torch.equal(first, second)


# --- wrong arguments and bad files --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"dataset": "mnits"},
            "unknown data set 'mnits'; did you mean 'mnist'? Known: cifar10, cifar100, digits",
        ),
        ({"augment": ["crop", "flop"]}, "unknown augmentation 'flop'; did you mean 'flip'?"),
        ({"val_fraction": 0.0}, "strictly between 0 and 1, not 0.0"),
        ({"val_fraction": 1.0}, "strictly between 0 and 1, not 1.0"),
        ({"batch_size": 0}, "batch sizes must be positive, not 0, 1000"),
        ({"augment": ["cutout"]}, "cutout of 8 pixels does not fit images of 8 pixels"),
        ({"augment": ["crop"], "crop_padding": -1}, "crop of -1 pixels"),
        ({"crop_mode": "reflected"}, "unknown crop_mode 'reflected'; did you mean 'reflect'?"),
        ({"mixup_alpha": 0.0}, "mixup_alpha must be above 0, not 0.0"),
    ],
)
def test_wrong_arguments(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        ImageData(**arguments)


def test_every_augmentation_name_is_known() -> None:
    assert ImageData("mnist", augment=AUGMENTATIONS).augment == AUGMENTATIONS


def test_root_is_the_argument_then_the_environment_then_data(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DSC_DATA", raising=False)
    assert ImageData().root == Path("data")
    monkeypatch.setenv("DSC_DATA", "/from/environment")
    assert ImageData().root == Path("/from/environment")
    assert ImageData(root="/given").root == Path("/given")


@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("mnist", "MNIST/raw/t10k-labels-idx1-ubyte"),
        ("fashion_mnist", "FashionMNIST/raw/train-images-idx3-ubyte"),
        ("cifar10", "cifar-10-batches-py/data_batch_5"),
        ("cifar100", "cifar-100-python/meta"),
    ],
)
def test_no_data_and_no_network(name: str, file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_network(*_: Any, **__: Any) -> None:
        raise URLError("no route to host")

    monkeypatch.setattr(tv.mnist, "download_and_extract_archive", no_network)
    monkeypatch.setattr(tv.cifar, "download_and_extract_archive", no_network)
    with pytest.raises(FileNotFoundError, match="no route to host") as failure:
        ImageData(name, root=str(tmp_path)).prepare_data()
    for words in (str(tmp_path), file, "--data.root", "DSC_DATA"):
        assert words in str(failure.value)
    assert isinstance(failure.value.__cause__, URLError | RuntimeError)


def test_no_data_and_no_download(tmp_path: Path) -> None:
    data = ImageData("mnist", root=str(tmp_path), download=False)
    with pytest.raises(FileNotFoundError, match="downloading is switched off"):
        data.prepare_data()
    with pytest.raises(FileNotFoundError, match="train-images-idx3-ubyte"):
        data.probe(1)


def idx(values: np.ndarray[Any, np.dtype[np.uint8]]) -> bytes:
    return struct.pack(f">HBB{values.ndim}I", 0, 8, values.ndim, *values.shape) + values.tobytes()


def write_mnist(root: Path) -> dict[str, Tensor]:
    """A data set of 40 training and 20 test images in the files of MNIST, with all labels equally often."""
    folder, generator, written = root / "MNIST" / "raw", np.random.default_rng(0), {}
    folder.mkdir(parents=True)
    for name, n in (("train", 40), ("t10k", 20)):
        images = generator.integers(256, size=(n, 28, 28), dtype=np.uint8)
        (folder / f"{name}-images-idx3-ubyte").write_bytes(idx(images))
        (folder / f"{name}-labels-idx1-ubyte").write_bytes(idx(np.arange(n, dtype=np.uint8) % 10))
        written[name] = torch.from_numpy(images)
    return written


def write_cifar(root: Path) -> None:
    folder, generator = root / "cifar-10-batches-py", np.random.default_rng(0)
    folder.mkdir()
    for name in [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]:
        pixels = generator.integers(256, size=(20, 3072), dtype=np.uint8)
        (folder / name).write_bytes(pickle.dumps({"data": pixels, "labels": [i % 10 for i in range(20)]}))
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": list(DATASETS["cifar10"].class_names)}))


def test_altered_mnist_file(tmp_path: Path) -> None:
    write_mnist(tmp_path)
    data = ImageData("mnist", root=str(tmp_path))
    data.prepare_data()  # all files are there: nothing is downloaded over them
    with pytest.raises(ValueError, match="is not the original file") as failure:
        data.setup()
    file = tmp_path / "MNIST/raw/train-images-idx3-ubyte"
    for words in (str(file), calculate_md5(file), "6bbc9ace898e44ae57da46a324031adb"):
        assert words in str(failure.value)


def test_altered_cifar_file(tmp_path: Path) -> None:
    write_cifar(tmp_path)
    data = ImageData("cifar10", root=str(tmp_path))
    data.prepare_data()
    with pytest.raises(ValueError, match="is not the original file") as failure:
        data.setup()
    file = tmp_path / "cifar-10-batches-py/data_batch_1"
    for words in (str(file), calculate_md5(file), "c99cafc152244af753f735de768cd75f"):
        assert words in str(failure.value)


def test_mnist_files_are_read_as_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written = write_mnist(tmp_path)
    files = {f: calculate_md5(tmp_path / f) for f in module._FILES["mnist"]}
    monkeypatch.setitem(module._FILES, "mnist", files)
    data = ready(dataset="mnist", root=str(tmp_path), val_fraction=0.25)
    images, labels = part(data, "test")
    assert images.shape == (20, 1, 28, 28) and torch.equal(images[:, 0], written["t10k"])
    assert labels.tolist() == [i % 10 for i in range(20)]
    assert part(data, "val")[1].bincount().tolist() == [1] * 10  # of the 40 training images
    known = {image.numpy().tobytes(): i % 10 for i, image in enumerate(written["train"])}
    for name in ("train", "val"):
        assert [known[i.numpy().tobytes()] for i in part(data, name)[0]] == part(data, name)[1].tolist()


def test_cifar_files_are_read_as_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_cifar(tmp_path)
    files = {f: calculate_md5(tmp_path / f) for f in module._FILES["cifar10"]}
    md5 = {Path(f).name: value for f, value in files.items()}
    monkeypatch.setitem(module._FILES, "cifar10", files)
    monkeypatch.setattr(tv.CIFAR10, "train_list", [(f"data_batch_{i}", md5[f"data_batch_{i}"]) for i in range(1, 6)])
    monkeypatch.setattr(tv.CIFAR10, "test_list", [("test_batch", md5["test_batch"])])
    monkeypatch.setattr(tv.CIFAR10, "meta", {**tv.CIFAR10.meta, "md5": md5["batches.meta"]})
    data = ready(dataset="cifar10", root=str(tmp_path))
    stored = pickle.loads((tmp_path / "cifar-10-batches-py/test_batch").read_bytes())["data"]
    images, labels = part(data, "test")
    assert torch.equal(images, torch.from_numpy(stored).view(20, 3, 32, 32)) and images.is_contiguous()
    assert labels.tolist() == [i % 10 for i in range(20)] and labels.dtype == torch.int64
    assert len(part(data, "train")[0]) == 90 and len(part(data, "val")[0]) == 10
    x, _ = data.on_after_batch_transfer(next(iter(data.test_dataloader())), 0)
    for c in range(3):
        assert torch.allclose(x[:, c], (images[:, c] / 255 - data.mean[c]) / data.std[c], atol=1e-5)


# --- the real files -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "classes", "first_test_labels"),
    [
        pytest.param("mnist", tv.MNIST, [7, 2, 1, 0, 4, 1, 4, 9], marks=needs("MNIST/raw")),
        pytest.param("fashion_mnist", tv.FashionMNIST, [9, 2, 1, 1, 6, 1, 4, 6], marks=needs("FashionMNIST/raw")),
        pytest.param("cifar10", tv.CIFAR10, [3, 8, 8, 0, 6, 6, 1, 6], marks=needs("cifar-10-batches-py")),
    ],
)
def test_real_data(name: str, classes: Any, first_test_labels: list[int]) -> None:
    data = ready(dataset=name, download=False)
    images, labels = part(data, "test")
    assert len(images) == 10_000 and labels[:8].tolist() == first_test_labels
    expected = classes(REAL, train=False)[3][0]
    assert np.array_equal(np.atleast_3d(np.asarray(expected)), images[3].permute(1, 2, 0).numpy())
    train, val = part(data, "train")[0], part(data, "val")[0]
    assert len(train) + len(val) == len(classes(REAL, train=True)) and len(val) == (len(train) + len(val)) // 10
    for c in range(data.in_chans):
        pixels = torch.cat([train[:, c], val[:, c]]).double() / 255
        assert abs(pixels.mean() - data.mean[c]) < 1e-4 and abs(pixels.std() - data.std[c]) < 1e-4


@needs("cifar-10-batches-py")
def test_one_altered_file_among_real_ones(tmp_path: Path) -> None:
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    for file in (REAL / "cifar-10-batches-py").iterdir():
        (folder / file.name).symlink_to(file)
    (folder / "test_batch").unlink()
    changed = bytearray((REAL / "cifar-10-batches-py" / "test_batch").read_bytes())
    changed[1000] ^= 1
    (folder / "test_batch").write_bytes(changed)
    with pytest.raises(ValueError, match="test_batch is not the original file"):
        ready(dataset="cifar10", root=str(tmp_path))


@needs("cifar-10-batches-py")
def test_class_names_are_those_of_the_files() -> None:
    assert tuple(tv.CIFAR10(REAL).classes) == DATASETS["cifar10"].class_names
