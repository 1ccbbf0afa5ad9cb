"""Time of a FISTA iteration over that of the two products it cannot do without, side by side in one run.

`uv run benchmarks/iteration.py` prints Markdown tables: dense and convolutional layers, and the growth with batch,
atoms and steps. The floor of a row is Dz and then Dᵀr of ready tensors (dense: into ready memory), for the whole batch
or in the blocks that the layer takes, whichever is faster; a layer's time is a solve of K steps over K − ½, as its
first step from zero needs one product. No gradients are kept.
"""

import argparse
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from common import header, interleaved, markdown
from dsc.activations import create_activation
from dsc.dictionaries import ConvDictionary, DenseDictionary
from dsc.layers import SparseCoding, rows_in_cache
from dsc.solvers import FISTA

STEPS = 10
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
COLUMNS = ("iteration", "its products, ms", "FISTA, ms", "ratio")


def dense_products(layer: SparseCoding, x: Tensor, z: Tensor) -> Callable[[int], None]:
    """Dz and Dᵀr, in blocks of so many signals."""
    weight, codes, signals = layer.dictionary.weight.detach(), torch.empty_like(z), torch.empty_like(x)

    def products(rows: int) -> None:
        for r, a, b in zip(signals.split(rows), z.split(rows), codes.split(rows), strict=True):
            torch.mm(a, weight, out=r)
            torch.mm(r, weight.mT, out=b)

    return products


def conv_products(layer: SparseCoding, x: Tensor, z: Tensor) -> Callable[[int], None]:
    """The same of convolutions of kernel size 3, padding 1."""
    weight = layer.dictionary.weight.detach()

    def products(rows: int) -> None:
        for a in z.split(rows):
            F.conv2d(F.conv_transpose2d(a, weight, padding=1), weight, padding=1)

    return products


def row(name: str, layer: SparseCoding, x: Tensor, repeats: int) -> tuple[str, ...]:
    """One line of a table."""
    layer, x = layer.eval().to(DEVICE), x.to(DEVICE)
    steps = layer.solver.steps
    with torch.no_grad():
        z = layer(x)
        z = torch.randn_like(z)
        bare = (dense_products if z.ndim == 2 else conv_products)(layer, x, z)
        rows = rows_in_cache(z) or len(z)
        calls = {"whole": lambda: bare(len(z)), "blocks": lambda: bare(rows), "layer": lambda: layer(x)}
        seconds = interleaved(calls, repeats)
    floor, ours = min(seconds["whole"], seconds["blocks"]), seconds["layer"] / (steps - 0.5)
    return name, f"{1e3 * floor:.2f}", f"{1e3 * ours:.2f}", f"{ours / floor:.2f}"


def dense(batch: int, features: int, atoms: int, activation: str = "soft", steps: int = STEPS, restart: bool = False):
    """A layer and its signals; about a tenth of the code is not zero."""
    torch.manual_seed(0)
    solver = FISTA(steps, restart=restart)
    prox = create_activation(activation, -1, threshold=0.3)
    return SparseCoding(DenseDictionary(features, atoms), prox, solver), torch.randn(batch, features)


def conv(batch: int, activation: str = "soft", memory_format: torch.memory_format = torch.contiguous_format):
    """A layer of 64 channels, 128 atoms of 3×3, and images of 32×32."""
    torch.manual_seed(0)
    prox = create_activation(activation, threshold=0.3)
    layer = SparseCoding(ConvDictionary(64, 128, 3, 1, 1), prox, FISTA(STEPS))
    return layer, torch.randn(batch, 64, 32, 32).to(memory_format=memory_format)


def iterations(quick: bool) -> str:
    """The table of single shapes. The goals: dense 1.25, convolutional 1.2."""
    batch, images, repeats = (500, 4, 2) if quick else (4000, 128, 9)
    few = 2 if quick else 3
    shape, image = f"{batch}×256, 512 atoms", f"{images}×64×32², 128 atoms 3²"
    rows = [
        row(f"dense {shape}, soft", *dense(batch, 256, 512), repeats),
        row(f"dense {shape}, soft, restart", *dense(batch, 256, 512, restart=True), repeats),
        row(f"dense {shape}, group_relu", *dense(batch, 256, 512, "group_relu"), repeats),
        row(f"conv {image}, soft", *conv(images), few),
        row(f"conv {image}, soft, channels last", *conv(images, memory_format=torch.channels_last), few),
        row(f"conv {image}, group_relu", *conv(images, "group_relu"), few),
    ]
    return markdown(COLUMNS, rows)


def growth(quick: bool) -> str:
    """The table of batches, atoms (which change to the Gram form below the number of features) and steps."""
    repeats, scale = (2, 4) if quick else (5, 1)
    rows = [row(f"batch {n}", *dense(n, 256, 512), repeats) for n in (250 // scale, 1000 // scale, 16000 // scale)]
    rows += [row(f"atoms {n}", *dense(4000 // scale, 256, n), repeats) for n in (64, 128, 256, 1024, 2048)]
    rows += [row(f"steps {k}", *dense(4000 // scale, 256, 512, steps=k), repeats) for k in (2, 5, 20, 80 // scale)]
    return markdown(COLUMNS, rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="small shapes, fewer repeats")
    quick = parser.parse_args().quick
    print(header())
    print("\n" + iterations(quick))
    print(f"\nGrowth, from {1000 if quick else 4000}×256 and 512 atoms in {STEPS} steps:\n\n{growth(quick)}")


if __name__ == "__main__":
    main()
