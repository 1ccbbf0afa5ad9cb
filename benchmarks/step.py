"""Training step of every family of the zoo, over its plain twin's and over the bare products that it must do.

`uv run benchmarks/step.py [NAME …]` prints a Markdown table. The floor of a row is every convolution, transposed
convolution, matrix product and attention of one forward and backward pass, called again alone on the same operands, in
turn with the whole pass; the optimizer is in neither.
"""

import argparse
from collections.abc import Callable
from dataclasses import dataclass, field
from fnmatch import fnmatch
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import dsc
from common import header, interleaved, markdown
from dsc.compiling import compiled

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
PRODUCTS = ("convolution", "convolution_backward", "mm", "addmm", "bmm", "baddbmm", "_scaled_dot_product")


@dataclass(frozen=True)
class Case:
    """A model, its arguments, the images of a batch, and how many of them."""

    name: str
    shape: tuple[int, int, int]
    batch: int
    args: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return ", ".join([self.name, *(f"{key}={value}" for key, value in self.args.items())])


MNIST, CIFAR = (1, 28, 28), (3, 32, 32)
CASES = (
    Case("dsc_mlp_base", MNIST, 512),
    Case("dsc_cnn", MNIST, 128),
    Case("dsc_cnn_cifar", CIFAR, 128),
    Case("dsc_speed", CIFAR, 128),
    Case("dsc_speed", CIFAR, 128, {"unrolled": "last"}),
    Case("dsc_resnet20", CIFAR, 64),
    Case("dsc_resnet18", CIFAR, 16),
    Case("dsc_vit_pico", CIFAR, 64),
    Case("dsc_vit_tiny", CIFAR, 16),
    Case("dsc_attn_pico", CIFAR, 64),
    Case("gsae", MNIST, 512),
    Case("gsae_conv", MNIST, 64),
    Case("gsae_conv_deep", MNIST, 64),
)


class Products(TorchDispatchMode):
    """Keeps every product that is computed inside it, with its operands."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Callable[[], Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.removeprefix("aten::")
        if name in PRODUCTS or name.startswith(PRODUCTS[-1]):
            self.calls.append(lambda: func(*args, **(kwargs or {})))
        return func(*args, **(kwargs or {}))

    def replay(self) -> None:
        with torch.no_grad():
            for call in self.calls:
                call()


def training_pass(case: Case, half: bool = True, fused: bool = False, **args: Any) -> Callable[[], None]:
    """Forward and backward of the model on random images, in bfloat16 where `half` and autocast allow it."""
    torch.manual_seed(0)
    model = dsc.create_model(case.name, in_chans=case.shape[0], **case.args, **args).to(DEVICE).train()
    model.to(memory_format=torch.channels_last)
    run = compiled(model) if fused else model
    x = torch.randn(case.batch, *case.shape, device=DEVICE).contiguous(memory_format=torch.channels_last)
    target = torch.randint(10, (case.batch,), device=DEVICE)

    def call() -> None:
        model.zero_grad()
        with torch.autocast(DEVICE, torch.bfloat16, enabled=half):
            loss = _loss(run, x, target)
        loss.backward()

    return call


def _loss(model: Callable[[Tensor], Tensor], x: Tensor, target: Tensor) -> Tensor:
    out = model(x)
    return F.cross_entropy(out, target) if out.ndim == 2 else F.mse_loss(out, x)


def row(case: Case, repeats: int, half: bool, fused: bool) -> tuple[str, ...]:
    """Steps of the model and of its twin, in ms an image, and the ratios; where every layer takes one, without twin."""
    calls: dict[tuple[str, str], Callable[[], None]] = {}
    kinds = KINDS if is_unrolled(dsc.create_model(case.name, **case.args)) else {"sparse": {}}
    for kind, args in kinds.items():
        step = calls[kind, "eager"] = training_pass(case, half, **args)
        step()
        with Products() as products:
            step()
        calls[kind, "floor"] = products.replay
        if fused:
            calls[kind, "compiled"] = training_pass(case, half, fused, **args)
    seconds = interleaved(calls, repeats)
    ways = ("eager", "compiled") if fused else ("eager",)
    cells = {
        kind: [f"{1e3 * seconds[kind, 'eager'] / case.batch:.3f}"]
        + [f"{seconds[kind, way] / seconds[kind, 'floor']:.2f}" for way in ways]
        for kind in kinds
    }
    speed = f"{seconds['twin', 'eager'] / seconds['sparse', 'eager']:.2f}" if "twin" in kinds else ""
    (ms, *ratios), (twins, *twins_ratios) = (cells.get(kind, [""] * (1 + len(ways))) for kind in KINDS)
    return str(case), ms, twins, speed, *(cell for pair in zip(ratios, twins_ratios, strict=True) for cell in pair)


def is_unrolled(model: nn.Module) -> bool:
    """Whether some layer takes several steps."""
    return any(layer.solver.steps > 1 for layer in model.modules() if isinstance(layer, dsc.SparseCoding))


KINDS: dict[str, dict[str, Any]] = {"sparse": {}, "twin": {"steps": 1}}
COLUMNS = ("model", "ms an image", "twin", "images/s over twin's", "time over bare products", "twin's")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", default=["*"], help="shell patterns of model names")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--float32", action="store_true", help="no autocast, for processors that emulate bfloat16")
    parser.add_argument("--compile", action="store_true", help="also compiled, over the same products")
    parsed = parser.parse_args()
    print(header() + "\n")
    cases = [case for case in CASES if any(fnmatch(case.name, pattern) for pattern in parsed.names)]
    rows = [row(case, parsed.repeats, not parsed.float32, parsed.compile) for case in cases]
    print(markdown(COLUMNS + ("compiled", "twin's compiled") * parsed.compile, rows))


if __name__ == "__main__":
    main()
