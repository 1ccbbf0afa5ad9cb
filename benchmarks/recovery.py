"""An epoch of `dsc reproduce gsae_recovery`, at full size, over its bare matrix products.

`uv run benchmarks/recovery.py` prints a Markdown table. *Gradients* are the losses and gradients of both networks on
the epoch's 10,000 signals, the *epoch* is these and Adam's step; drawing the signals is in neither. A step has five
*products*: one dense, ``AᵀY``, and four over the active atoms alone, ``AX``, its two gradients, and the encoder's, of
which two gather rows of A and two scatter into A. All are taken in turn.
"""

import argparse
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from common import header, interleaved, markdown
from dsc.reproduce.gsae_recovery import Instance, Settings
from dsc.reproduce.shallow import ShallowAutoencoder, Training, scattered


def products(network: ShallowAutoencoder, signals: Tensor) -> tuple[Callable[[], object], Callable[[], object]]:
    """The dense product of a step, and the four others."""
    with torch.no_grad():
        codes = network.encode(signals)
    rows, columns = codes.rows.repeat_interleave(network.group_size), codes.columns.flatten()
    adjoint = scattered(columns, rows, codes.values.flatten(), (len(network.weight), len(signals)))

    @torch.no_grad()
    def active() -> None:
        for _ in range(2):
            network.decode(codes, len(signals))
            adjoint @ signals

    return torch.no_grad()(partial(F.linear, signals, network.weight)), active


def row(snr_db: float, repeats: int) -> list[str]:
    """Near the true dictionary, where most epochs are."""
    instance = Instance(Settings(), snr_db, seed=0)
    networks = instance.networks(instance.truth)
    training = Training(networks, 0.0, measure=float)  # a rate of zero: each epoch does the same
    optimizer = training.configure_optimizers()
    blocks = list(instance.fresh(2))

    def gradients() -> None:
        for network in networks.values():
            for signals in blocks:
                torch.autograd.grad(network.loss(signals), [network.weight])

    def epoch() -> None:
        optimizer.zero_grad()
        for signals in blocks:
            sum(network.loss(signals) for network in networks.values()).backward()
        optimizer.step()

    pairs = [products(network, signals) for network in networks.values() for signals in blocks]

    def dense() -> None:
        for product, _ in pairs:
            product()

    def active() -> None:
        for _, product in pairs:
            product()

    calls = {"epoch": epoch, "gradients": gradients, "dense": dense, "active": active}
    seconds = interleaved(calls, repeats)
    floor = seconds["dense"] + seconds["active"]
    ratios = (seconds["epoch"] / floor, seconds["gradients"] / floor, seconds["gradients"] / (5 * seconds["dense"]))
    return [f"{snr_db:g} dB", f"{seconds['epoch']:.2f}", f"{floor:.2f}", *(f"{ratio:.2f}" for ratio in ratios)]


COLUMNS = (
    "signals", "seconds an epoch", "bare products", "epoch over products", "gradients over products",
    "gradients over a dense network's products",
)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--snr", nargs="+", type=float, default=[1.0, 5.0, 10.0], metavar="DB")
    parser.add_argument("--repeats", type=int, default=15)
    parsed = parser.parse_args()
    print(header() + "\n")
    print(markdown(COLUMNS, [row(snr_db, parsed.repeats) for snr_db in parsed.snr]))


if __name__ == "__main__":
    main()
