"""A model as a file that runs without this library: ONNX, or `torch.export`'s own; checked before it is kept."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from dsc._names import unknown
from dsc.runs import check_new, whole

Format = Literal["onnx", "torch"]
SUFFIX: dict[str, str] = {"onnx": ".onnx", "torch": ".pt2"}
TOLERANCE = 1e-4  # largest difference of an output to the model's, relative to the output's largest entry


def export(
    model: nn.Module, path: str | Path, format: Format = "onnx", input_size: Sequence[int] | None = None
) -> float:
    """Write `model` in evaluation mode, for batches of any size; returns the largest relative difference of outputs.

    The difference ``max|f(x) − m(x)|/max|m(x)|`` is of what the written file computes, for one and for three images of
    `input_size` (channels, height, width), which is by default the model's own (`model.pretrained_cfg`): give it for a
    model built for other images than its architecture's. ONNX needs the packages of ``deep-sparse-coding[export]``.

    Raises:
        ValueError: an unknown format, a model of several outputs (``features_only``), or a difference above 1e-4: then
            nothing is left behind.
        FileExistsError: the file is there already. FileNotFoundError: its folder is not.
        ImportError: a package is missing.
    """
    path = Path(path)
    if format not in get_args(Format):
        raise ValueError(unknown("format", format, get_args(Format)))
    check_new(path)
    model.eval()
    size = input_size or model.pretrained_cfg["input_size"]  # type: ignore[index]
    with whole(path) as unfinished:
        run = _write[format](model, unfinished, torch.randn(2, *size))
        difference = max(_difference(run, model, torch.randn(n, *size)) for n in (1, 3))
        if not difference <= TOLERANCE:
            raise ValueError(f"the exported file computes something else: relative difference {difference:.2g}")
    return difference


@torch.no_grad()
def _difference(run: Callable[[Tensor], Tensor], model: nn.Module, x: Tensor) -> float:
    expected = model(x)
    if not isinstance(expected, Tensor):
        raise ValueError("a model of several outputs cannot be checked: export one that returns a single tensor")
    return float((run(x) - expected).abs().max() / expected.abs().max())


def _exported(model: nn.Module, x: Tensor) -> torch.export.ExportedProgram:
    with torch.no_grad():
        return torch.export.export(model, (x,), dynamic_shapes=({0: torch.export.Dim("batch")},))


def _write_torch(model: nn.Module, path: Path, x: Tensor) -> Callable[[Tensor], Tensor]:
    torch.export.save(_exported(model, x), path)
    return torch.export.load(path).module()


def _write_onnx(model: nn.Module, path: Path, x: Tensor) -> Callable[[Tensor], Tensor]:
    try:
        import onnxruntime
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise ImportError(f"ONNX needs {error.name}: pip install 'deep-sparse-coding[export]'") from None
    program = torch.onnx.export(_exported(model, x), (x,), dynamo=True, input_names=["images"], verbose=False)
    assert program is not None
    program.save(path, external_data=False)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return lambda x: torch.from_numpy(session.run(None, {"images": x.numpy()})[0])


_write = {"onnx": _write_onnx, "torch": _write_torch}
