"""What each model of the zoo is and costs, and what each published checkpoint reaches: the tables of `dsc models`.

Models are built and run on torch's meta device, where tensors have shapes and no values: nothing is computed.
"""

import fnmatch
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from timm.layers import to_2tuple
from timm.models import model_entrypoint
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from dsc import hub
from dsc._names import unknown
from dsc.models import create_model, list_models

HEADER = ["model", "family", "input", "parameters", "multiply-accumulates", "stages", "pretrained"]
CHECKPOINT_HEADER = [
    "checkpoint", "data", "activation", "seed", "epochs", "accuracy, %", "with augmentation", "mse",
    "strongest group, %", "active", "MB",
]  # fmt: skip


@dataclass(frozen=True)
class ModelInfo:
    """A model's facts, as it is built by default.

    Attributes:
        family: the file of `dsc/models`, or of `timm/models`, that it comes from.
        input_size: of an image, (channels, height, width).
        parameters: how many numbers it has, those included that are set from data and not learned.
        macs: multiplications with an addition that one image of that size takes in evaluation mode, all steps of all
            solvers included. Convolutions, matrix products and attention count; element-wise work, normalisation and
            the Lipschitz constants behind step sizes, which depend on the weights alone, do not.
        stages: how many feature maps `features_only=True` gives at most; 0 for a model without.
        pretrained: tags of published weights.
    """

    name: str
    family: str
    input_size: tuple[int, int, int]
    parameters: int
    macs: int
    stages: int
    pretrained: tuple[str, ...]

    def cells(self) -> list[str]:
        """The facts as text, in the order of `HEADER`."""
        size = "×".join(map(str, self.input_size))
        counts = [f"{self.parameters:,}", f"{self.macs:,}", str(self.stages or "")]
        return [self.name, self.family, size, *counts, ", ".join(self.pretrained)]


@dataclass(frozen=True)
class CheckpointInfo:
    """What a published checkpoint's card says of it; accuracies are fractions of the test set, mse is per entry.

    `epochs` are those of its training, and before them of the published checkpoints that it started from.
    `accuracy_tta` is that with test-time augmentation, `strongest_group_accuracy` that of taking an autoencoder's
    strongest group for the class. A figure that the checkpoint does not have is None.
    """

    name: str
    dataset: str
    activation: str
    seed: int
    epochs: tuple[int, ...]
    accuracy: float | None
    accuracy_tta: float | None
    mse: float | None
    strongest_group_accuracy: float | None
    active_fraction: float
    megabytes: float

    def cells(self) -> list[str]:
        """The facts as text, in the order of `CHECKPOINT_HEADER`."""
        fractions = (self.accuracy, self.accuracy_tta, self.strongest_group_accuracy)
        plain, augmented, groups = ("" if a is None else f"{100 * a:.2f}" for a in fractions)
        mse = "" if self.mse is None else f"{self.mse:.4f}"
        measured = [plain, augmented, mse, groups, f"{self.active_fraction:.3f}"]
        recipe = [self.dataset, self.activation, str(self.seed), " + ".join(map(str, self.epochs))]
        return [f"`{self.name}`", *recipe, *measured, f"{self.megabytes:.1f}"]


def describe_models(pattern: str = "*") -> list[ModelInfo]:
    """Facts of every model whose name matches a shell pattern: of ours, or where none does, of timm's backbones.

    Raises ValueError for a pattern that matches neither, with the nearest name.
    """
    return [describe_model(name) for name in matching_models(pattern)]


def matching_models(pattern: str) -> list[str]:
    """Names that match a shell pattern, as `describe_models` looks for them, sorted."""
    known = list_models(), timm.list_models()
    for names in known:
        if found := fnmatch.filter(names, pattern):
            return found
    raise ValueError(unknown("model", pattern, [*known[0], *known[1]])[:400] + " …")


def describe_model(name: str, image_size: tuple[int, int] | None = None, **kwargs: Any) -> ModelInfo:
    """Facts of one model; `kwargs` are those of `dsc.create_model`, as ``steps=1`` for the plain twin.

    `image_size` is the height and width of the image to count for, None for the model's own.
    """
    with torch.device("meta"), _NoValues():
        model = create_model(name, **kwargs).eval()
        cfg: dict[str, Any] = model.pretrained_cfg  # type: ignore[assignment]
        channels, height, width = cfg["input_size"]
        size = (kwargs.get("in_chans", channels), *(image_size or to_2tuple(kwargs.get("img_size", (height, width)))))
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model(torch.empty(1, *size))
    return ModelInfo(
        name=name,
        family=model_entrypoint(name).__module__.rpartition(".")[2],
        input_size=size,
        parameters=sum(p.numel() for p in model.parameters()),
        macs=counter.get_total_flops() // 2,
        stages=len(getattr(model, "feature_info", ())),
        pretrained=tags_of(name),
    )


def tags_of(name: str) -> tuple[str, ...]:
    """Tags of the weights that an architecture can be built with: timm's, and those published here."""
    published = [found for found in hub.checkpoint_folders() if found.split(".")[0] == name]
    return tuple(tagged.partition(".")[2] for tagged in dict.fromkeys([*timm.list_pretrained(name), *published]))


def describe_checkpoints(pattern: str = "*") -> list[CheckpointInfo]:
    """Facts of every published checkpoint whose name matches a shell pattern, from their cards.

    Raises ValueError for a pattern that matches none, with the nearest name.
    """
    folders = hub.checkpoint_folders()
    names = fnmatch.filter(sorted(folders), pattern)
    if not names:
        raise ValueError(unknown("checkpoint", pattern, folders))
    return [describe_checkpoint(folders[name]) for name in names]


def describe_checkpoint(folder: Path) -> CheckpointInfo:
    """Facts of a checkpoint folder, from its card."""
    facts = hub.read_config(folder)["dsc"]
    metrics = facts["metrics"]
    return CheckpointInfo(
        name=folder.name,
        dataset=facts["dataset"],
        activation=facts["activation"],
        seed=facts["seed"],
        epochs=_epochs(facts),
        accuracy=metrics.get("accuracy"),
        accuracy_tta=metrics.get("accuracy_tta"),
        mse=metrics.get("mse"),
        strongest_group_accuracy=metrics.get("strongest_group_accuracy"),
        active_fraction=metrics["sparsity/active_fraction/total"],
        megabytes=(folder / hub.WEIGHTS).stat().st_size / 1e6,
    )


def _epochs(facts: Mapping[str, Any]) -> tuple[int, ...]:
    folder = hub.checkpoint_folders().get(hub.trained_with(facts, "model").get("initial_checkpoint", ""))
    before = _epochs(hub.read_config(folder)["dsc"]) if folder else ()
    return (*before, facts["training"]["trainer"]["max_epochs"])


class _NoValues(TorchDispatchMode):
    # Building a model asks for a few values: sizes to start from, whether an argument is valid. No shape depends on
    # them, so on the meta device a number is 1 and every check is passed.
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if args and isinstance(args[0], Tensor) and args[0].is_meta:
            if func in (torch.ops.aten.any.default, torch.ops.aten.all.default):
                return torch.tensor(func is torch.ops.aten.all.default, device="cpu")
            if func is torch.ops.aten._local_scalar_dense.default:
                return 1.0
        return func(*args, **(kwargs or {}))
