"""Generative models as a Lightning data module: fresh signals each epoch, or a fixed set."""

from collections.abc import Iterator

import numpy as np
import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from dsc.synthetic import GroupSparse


class Draws(Dataset[tuple[Tensor, Tensor]]):
    """Batch (signals, labels) by the seed it is drawn with."""

    def __init__(self, problem: GroupSparse, batch_size: int) -> None:
        self.problem, self.batch_size = problem, batch_size

    def __getitem__(self, seed: int) -> tuple[Tensor, Tensor]:
        sample = self.problem.sample(self.batch_size, torch.Generator().manual_seed(seed))
        return sample.signals, sample.labels


class Seeds(Sampler[int]):
    """A seed a batch, from (seed, part, epoch, number of the batch): a resumed run draws what an unbroken one does."""

    def __init__(self, batches: int, seed: int, part: int, fresh: bool) -> None:
        self.batches, self.seed, self.part, self.fresh = batches, seed, part, fresh
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the signals of the next pass; Lightning calls this before every epoch."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.batches

    def __iter__(self) -> Iterator[int]:
        # Drawn one by one: when a fit is resumed, Lightning makes the iterator before it sets the epoch.
        for number in range(self.batches):
            key = (self.seed, self.part, self.epoch if self.fresh else 0, number)
            yield int(np.random.SeedSequence(key).generate_state(1)[0])


class SyntheticData(LightningDataModule):
    """Batches (signals (B, features), labels (B,) int64) of a `GroupSparse` problem; a label is the strongest group.

    Args:
        problem: the generative model, with the true dictionary.
        batches, batch_size: of an epoch; validation is one batch.
        fresh: draw new training signals each epoch, or the same.
        seed: of the signals.
    """

    def __init__(
        self, problem: GroupSparse, batches: int = 1, batch_size: int = 10_000, fresh: bool = True, seed: int = 0
    ) -> None:
        super().__init__()
        self.problem, self.batches, self.batch_size, self.fresh, self.seed = problem, batches, batch_size, fresh, seed

    def train_dataloader(self) -> DataLoader[tuple[Tensor, Tensor]]:
        """The training batches."""
        return self._loader(self.batches, 0, self.fresh)

    def val_dataloader(self) -> DataLoader[tuple[Tensor, Tensor]]:
        """One batch, the same each epoch, that training never sees."""
        return self._loader(1, 1, False)

    def _loader(self, batches: int, part: int, fresh: bool) -> DataLoader[tuple[Tensor, Tensor]]:
        seeds = Seeds(batches, self.seed, part, fresh)
        return DataLoader(
            Draws(self.problem, self.batch_size), sampler=seeds, batch_size=None, generator=torch.Generator()
        )
