"""Training cost of a `SparseCoding` layer over that of the `Conv2d` of the same shape, in each gradient mode.

`uv run benchmarks/layer.py` prints Markdown tables, each row beside the convolution, ReLU and backward pass that are
its floor, measured in turn with it: time, and peak memory. On a CPU that is the most that PyTorch's allocator has out
above what it had before the call, by its profiler (a kernel's own scratch is not seen); on a GPU,
`max_memory_allocated`. A last table holds the bias of `last`, against `implicit` at convergence.
"""

import argparse
from collections.abc import Callable, Iterator
from itertools import product
from typing import Any, get_args

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from common import header, interleaved, markdown
from dsc.activations import create_activation
from dsc.dictionaries import ConvDictionary, DenseDictionary
from dsc.gradients import Gradient
from dsc.layers import SparseCoding
from dsc.solvers import FISTA

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
THRESHOLD = 1.5  # for signals of unit variance: about one entry in twenty is not zero


def training_step(layer: nn.Module, x: Tensor) -> Callable[[], None]:
    """Forward and backward of a layer that is not the first."""
    x = x.detach().requires_grad_()
    seed = torch.randn_like(layer(x))

    def call() -> None:
        for tensor in (x, *layer.parameters()):
            tensor.grad = None
        layer(x).backward(seed)

    return call


def layers(images: int) -> tuple[Callable[[int, Gradient], Callable[[], None]], Callable[[], None]]:
    """The training step of a sparse-coding layer of K steps in a mode, and that of the plain layer."""
    torch.manual_seed(0)
    x = torch.randn(images, 64, 32, 32, device=DEVICE)

    def sparse(steps: int, gradient: Gradient) -> Callable[[], None]:
        prox = create_activation("relu", threshold=THRESHOLD)
        layer = SparseCoding(ConvDictionary(64, 128, 3, 1, 1), prox, FISTA(steps, gradient=gradient))
        return training_step(layer.to(DEVICE), x)

    plain = nn.Sequential(nn.Conv2d(64, 128, 3, 1, 1, bias=False), nn.ReLU(inplace=True))
    return sparse, training_step(plain.to(DEVICE), x)


def peak_bytes(call: Callable[[], Any]) -> int:
    """Most memory in use during a call, above that in use before it."""
    call()
    if DEVICE == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        call()
    fields = [e.extra_fields for e in _all(record.profiler.kineto_results.experimental_event_tree())]
    sizes = [f for f in fields if hasattr(f, "total_allocated")]
    return max(f.total_allocated for f in sizes) - (sizes[0].total_allocated - sizes[0].alloc_size)


def _all(events: list[Any]) -> Iterator[Any]:
    for event in sorted(events, key=lambda e: e.start_time_ns):
        yield event
        yield from _all(event.children)


def row(name: str, call: Callable[[], None], floor: Callable[[], None], repeats: int) -> tuple[str, ...]:
    """One line: time and memory, each with its ratio to the floor."""
    seconds = interleaved({"floor": floor, "layer": call}, repeats)
    ours, least = peak_bytes(call), peak_bytes(floor)
    ms, mib = (f"{1e3 * seconds[k]:.1f}" for k in ("floor", "layer")), (f"{b / 2**20:.0f}" for b in (least, ours))
    return name, *ms, f"{seconds['layer'] / seconds['floor']:.1f}", *mib, f"{ours / least:.1f}"


COLUMNS = ("mode, steps", "Conv2d, ms", "layer, ms", "ratio", "Conv2d, MiB", "layer, MiB", "ratio")


def costs(quick: bool) -> str:
    """The table of modes and steps."""
    sparse, plain = layers(2 if quick else 4)
    repeats = 1 if quick else 3
    depths = (1, 2) if quick else (1, 2, 4, 8, 16)
    rows = [
        row(f"{gradient}, {steps}", sparse(steps, gradient), plain, repeats)
        for gradient, steps in product(get_args(Gradient), depths)
    ]
    return markdown(COLUMNS, rows)


def growth_of_implicit(quick: bool) -> str:
    """Its peak memory for 1 and for 64 steps. The goal: 1.3."""
    sparse, _ = layers(2 if quick else 4)
    one, many = (peak_bytes(sparse(steps, "implicit")) for steps in (1, 64))
    row = f"{one / 2**20:.0f}", f"{many / 2**20:.0f}", f"{many / one:.2f}"
    return markdown(("implicit: 1 step, MiB", "64 steps, MiB", "ratio"), [row])


def bias_of_last(quick: bool) -> str:
    """How far the gradient of `last` is from the exact one, at codes that have converged."""
    rows = []
    for threshold in (0.2,) if quick else (0.03, 0.1, 0.2, 0.3):
        exact, biased, active = gradients_of_dictionary(threshold)
        error = (biased - exact).norm() / exact.norm()
        cosine = (biased * exact).sum() / biased.norm() / exact.norm()
        length = biased.norm() / exact.norm()
        rows.append((f"{threshold}", f"{active:.1f}", f"{error:.2f}", f"{cosine:.2f}", f"{length:.2f}"))
    return markdown(("λ", "non-zeros a code", "relative error", "cosine", "length over exact"), rows)


def gradients_of_dictionary(threshold: float) -> tuple[Tensor, Tensor, float]:
    """Exact gradient, that of `last`, and non-zeros a code: of a lasso with 64 features, 128 atoms, 256 unit signals.

    The loss is ⟨z, t⟩ with Gaussian t.
    """
    torch.manual_seed(0)
    layer = SparseCoding(DenseDictionary(64, 128), create_activation("soft", -1, threshold=threshold)).double().eval()
    x = nn.functional.normalize(torch.randn(256, 64, dtype=torch.float64), dim=1)
    target = torch.randn(256, 128, dtype=torch.float64)
    found = []
    for gradient in ("implicit", "last"):
        z = layer.solve(x, FISTA(1000, restart=True, gradient=gradient))
        found += torch.autograd.grad((z * target).sum(), layer.dictionary.weight)
    return found[0], found[1], (z != 0).sum().item() / len(x)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="few images, steps and repeats")
    quick = parser.parse_args().quick
    print(header())
    images = 2 if quick else 4
    print(f"\nForward and backward, {images} images of 64×32², 128 atoms of 3², relu, λ={THRESHOLD}:\n\n{costs(quick)}")
    print("\n" + growth_of_implicit(quick))
    print(f"\nBias of `last`, lasso of 64 features and 128 atoms, gradient of the dictionary:\n\n{bias_of_last(quick)}")


if __name__ == "__main__":
    main()
