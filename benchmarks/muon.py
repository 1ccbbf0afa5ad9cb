"""A step of Muon: `dsc.optimizers.Muon`'s over timm's own, and both over the gradient of the recipe's batch.

`uv run benchmarks/muon.py` prints a Markdown table for the configurations that train with it, in single precision.
"""

import argparse
from collections.abc import Callable

import timm.optim
import torch
from torch.nn import functional as F

import dsc
from common import header, interleaved, markdown
from dsc.optimizers import Muon

RECIPES = {"dsc_speed": (1000, 3), "dsc_resnet20": (128, 5), "dsc_vit_pico": (128, 5)}  # images, Newton–Schulz steps
COLUMNS = ("model", "batch", "timm's step, ms", "over ours", "timm's step over the gradient", "ours over the gradient")


def calls(name: str, batch: int, iterations: int) -> dict[str, Callable[[], object]]:
    """The gradient of a batch of random images, and both optimizers' steps with it."""
    torch.manual_seed(0)
    model = dsc.create_model(name).train().to(memory_format=torch.channels_last)
    x = torch.randn(batch, 3, 32, 32).contiguous(memory_format=torch.channels_last)
    target = torch.randint(10, (batch,))
    parameters = [p for p in model.parameters() if p.requires_grad]
    ours, timms = (make(parameters, lr=1e-3, ns_steps=iterations) for make in (Muon, timm.optim.Muon))
    return {
        "gradient": lambda: F.cross_entropy(model(x), target).backward(),
        "ours": ours.step,
        "timm's": timms.step,
    }


def row(name: str, repeats: int) -> tuple[str, ...]:
    batch, iterations = RECIPES[name]
    seconds = interleaved(calls(name, batch, iterations), repeats)
    gradient, ours, timms = seconds["gradient"], seconds["ours"], seconds["timm's"]
    ratios = (timms / ours, timms / gradient, ours / gradient)
    return name, str(batch), f"{1e3 * timms:.0f}", *(f"{ratio:.2f}" for ratio in ratios)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=5)
    repeats = parser.parse_args().repeats
    print(header(), markdown(COLUMNS, [row(name, repeats) for name in RECIPES]), sep="\n\n")


if __name__ == "__main__":
    main()
