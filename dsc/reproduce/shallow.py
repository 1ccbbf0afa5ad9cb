"""The shallow tied autoencoder of arXiv 2102.07003, trained by Lightning at the cost of one dense product an epoch.

Atoms A are rows, (atoms, features), in groups of d consecutive ones; signals y are rows, too.
"""

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from lightning.pytorch import LightningModule
from torch import Generator, Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.utils.data import DataLoader, IterableDataset

from dsc.shrinkage import group_relu
from dsc.synthetic import GroupSparse
from dsc.trainers import quiet_trainer


class _Entries(torch.autograd.Function):
    """Entries (row, column) of ``YAᵀ``, computed before; back, only atoms with an entry take part: ``A ← GᵀY``.

    Autograd would keep and go back through the dense product, nearly all of whose gradient is zero.
    """

    @staticmethod
    def forward(ctx: Any, atoms: Tensor, signals: Tensor, products: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
        ctx.save_for_backward(signals, rows, columns)
        ctx.num_atoms = len(atoms)
        return products[rows, columns]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None, None]:
        signals, rows, columns = ctx.saved_tensors
        return scattered(columns, rows, grads[0], (ctx.num_atoms, len(signals))) @ signals, None, None, None, None


class _Synthesis(torch.autograd.Function):
    """``ZA`` of sparse codes Z, whose entries begin at `starts` in each row; back, entries of ``GAᵀ`` and ``ZᵀG``.

    The gradients of `embedding_bag` are the same, and take three times as long.
    """

    @staticmethod
    def forward(ctx: Any, atoms: Tensor, values: Tensor, rows: Tensor, columns: Tensor, starts: Tensor) -> Tensor:
        ctx.save_for_backward(atoms, values, rows, columns, starts)
        return F.embedding_bag(columns, atoms, starts, mode="sum", per_sample_weights=values, include_last_offset=True)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        atoms, values, rows, columns, starts = ctx.saved_tensors
        shape = len(grads[0]), len(atoms)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta")
            codes = torch.sparse_csr_tensor(starts, columns, values, shape, check_invariants=False)
        products = torch.sparse.sampled_addmm(codes, grads[0], atoms.mT, beta=0.0).values()
        return scattered(columns, rows, values, shape[::-1]) @ grads[0], products, None, None, None


def scattered(rows: Tensor, columns: Tensor, values: Tensor, shape: tuple[int, int]) -> Tensor:
    """The sparse matrix of that shape with `values` in these rows and columns, whose repetitions add."""
    return torch.sparse_coo_tensor(torch.stack([rows, columns]), values, shape, check_invariants=False)


@dataclass(frozen=True)
class SparseCodes:
    """Codes by their active groups: `values` (active, d) of `columns` (active, d) in the signals `rows` (active,)."""

    rows: Tensor
    columns: Tensor
    values: Tensor


class ShallowAutoencoder(nn.Module):
    """``ŷ = Aσ_λ(Aᵀy)`` with the group-sparse ReLU; groups of one atom make it the two-sided soft threshold.

    It computes what `dsc.SparseCoding` does in one step of size 1, but decodes, and goes back, through the active
    groups alone: with few of many active, the product ``Aᵀy`` is most of a step. Signals get no gradient.

    Args:
        atoms: the first ones, (atoms, features).
        group_size: d.
        threshold: λ.
    """

    def __init__(self, atoms: Tensor, group_size: int, threshold: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(atoms.clone())
        self.group_size, self.threshold = group_size, threshold

    def encode(self, signals: Tensor) -> SparseCodes:
        """The codes of signals (signals, features)."""
        d = self.group_size
        with torch.no_grad():
            products = F.linear(signals, self.weight)
            rows, groups = above(group_energies(products, d), self.threshold**2)
            columns = groups.unsqueeze(1) * d + torch.arange(d, device=groups.device)
        entries = _Entries.apply(self.weight, signals, products, rows.repeat_interleave(d), columns.flatten())
        return SparseCodes(rows, columns, group_relu(entries.unflatten(0, columns.shape), self.threshold, d))

    def forward(self, signals: Tensor) -> Tensor:
        """Reconstructions (signals, features)."""
        return self.decode(self.encode(signals), len(signals))

    def decode(self, codes: SparseCodes, count: int) -> Tensor:
        """Reconstructions (count, features) of the codes of that many signals."""
        d = self.group_size
        starts = torch.searchsorted(codes.rows, torch.arange(count + 1, device=codes.rows.device)) * d
        rows, columns, values = codes.rows.repeat_interleave(d), codes.columns.flatten(), codes.values.flatten()
        return _Synthesis.apply(self.weight, values, rows, columns, starts)

    def loss(self, signals: Tensor) -> Tensor:
        """``‖Y − Ŷ‖_F²/(2N)``."""
        residual = self(signals).sub_(signals).flatten()
        # The gradient is the residual: that of ⟨r, r⟩ by one of its factors, a pass over signals instead of three.
        energy = residual @ residual.detach()
        return (energy - energy.detach() / 2) / len(signals)


def group_energies(products: Tensor, group_size: int) -> Tensor:
    """``‖A_gᵀy‖²`` of products (signals, atoms), (signals, groups)."""
    # Strided sums: a reduction over the few entries of a group is an order slower on a CPU.
    energy = products[:, ::group_size].square()
    for j in range(1, group_size):
        energy.addcmul_(products[:, j::group_size], products[:, j::group_size])
    return energy


def above(values: Tensor, threshold: float) -> tuple[Tensor, Tensor]:
    """Rows and columns of the entries above a threshold, row after row, int64 each."""
    if values.device.type != "cpu":
        return (values > threshold).nonzero(as_tuple=True)  # type: ignore[return-value]
    # NumPy compares and searches in a sixth of torch's time.
    rows, columns = np.divmod(np.flatnonzero(values.numpy() > threshold), values.shape[1])
    return torch.from_numpy(rows), torch.from_numpy(columns)


class FreshSignals(IterableDataset[Tensor]):
    """`count` new signals each epoch, in blocks."""

    def __init__(self, problem: GroupSparse, count: int, block: int, generator: Generator) -> None:
        if count % block:
            raise ValueError(f"blocks of {block} do not tile {count} signals")
        self.problem, self.count, self.block, self.generator = problem, count, block, generator

    def __iter__(self) -> Iterator[Tensor]:
        for _ in range(self.count // self.block):
            yield self.problem.sample(self.block, self.generator).signals


@dataclass
class Course:
    """A training: what was measured of the atoms after `epochs`, the first of them 0, and the loss of each epoch."""

    epochs: list[int] = field(default_factory=list)
    measured: list[float] = field(default_factory=list)
    loss: list[float] = field(default_factory=list)


class Training(LightningModule):
    """Trains networks side by side on the same signals, by Adam on all signals of an epoch at once.

    Their losses are added. Adam scales each number by its own gradients, so every network is trained as if alone.

    Args:
        networks: by name.
        rate: learning rate.
        measure: a figure of the atoms, taken before the first epoch and after every `every`.
        schedules: λ of an epoch, for networks whose λ changes.
    """

    def __init__(
        self,
        networks: Mapping[str, ShallowAutoencoder],
        rate: float,
        measure: Callable[[Tensor], float],
        every: int = 1,
        schedules: Mapping[str, Callable[[int], float]] | None = None,
    ) -> None:
        super().__init__()
        self.networks, self.rate, self.measure, self.every = networks, rate, measure, every
        self.trained = nn.ModuleList(networks.values())
        self.schedules = schedules or {}
        self.courses = {name: Course() for name in networks}
        self.losses: dict[str, list[Tensor]] = {}

    def on_train_start(self) -> None:
        self._measure(0)

    def on_train_epoch_start(self) -> None:
        self.losses = {name: [] for name in self.networks}
        for name, schedule in self.schedules.items():
            self.networks[name].threshold = schedule(self.current_epoch)

    def training_step(self, batch: Tensor, index: int) -> Tensor:
        losses = {name: network.loss(batch) for name, network in self.networks.items()}
        for name, loss in losses.items():
            self.losses[name].append(loss.detach())
        return torch.stack(list(losses.values())).sum()

    def on_train_epoch_end(self) -> None:
        for name, losses in self.losses.items():
            self.courses[name].loss.append(float(torch.stack(losses).mean()))
        if (self.current_epoch + 1) % self.every == 0:
            self._measure(self.current_epoch + 1)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), self.rate, fused=True)

    def _measure(self, epoch: int) -> None:
        for name, network in self.networks.items():
            self.courses[name].epochs.append(epoch)
            self.courses[name].measured.append(self.measure(network.weight.detach().cpu()))


def fit(module: Training, signals: Iterable[Tensor], blocks: int, epochs: int) -> dict[str, Course]:
    """Train on `signals`, whose passes are of that many blocks, a step a pass; returns the networks' courses."""
    trainer = quiet_trainer(max_epochs=epochs, accumulate_grad_batches=blocks, barebones=True)
    trainer.fit(module, DataLoader(signals, batch_size=None))  # type: ignore[arg-type]
    module.cpu()
    return module.courses
