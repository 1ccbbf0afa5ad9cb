"""Checkpoint folders in the Hugging Face Hub layout that timm reads: find, verify, read and write them.

A folder holds `config.json` (timm's keys, and ours under `dsc`), `model.safetensors` and `README.md`. No pickle is
ever read.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from dsc._names import unknown
from dsc.observe import activation_name

NO_ARGS: Mapping[str, Any] = MappingProxyType({})
CONFIG, WEIGHTS, CARD = "config.json", "model.safetensors", "README.md"
KEYS = ("architecture", "num_classes", "model_args", "pretrained_cfg", "dsc")  # of every `config.json`
FACTS = ("task", "dataset", "normalize", "activation", "seed", "metrics", "convergence", "training", "sha256")


def checkpoint_folders() -> dict[str, Path]:
    """Published checkpoints by name (`architecture.tag`): inside an installed package, or beside it in a clone."""
    package = Path(__file__).resolve().parent
    folders: dict[str, Path] = {}
    for root in (package.parent / "checkpoints", package / "checkpoints"):
        folders |= {path.parent.name: path.parent for path in sorted(root.glob(f"*/{CONFIG}"))}
    return folders


def find(name: str) -> Path:
    """Folder of a published checkpoint. Raises ValueError for an unknown name, with the nearest."""
    folders = checkpoint_folders()
    if name not in folders:
        raise ValueError(unknown("checkpoint", name, folders))
    return folders[name]


def locate(name: str | Path) -> Path:
    """Folder of a checkpoint by its path, its run's, or its published name.

    Raises:
        ValueError: none of them; it names the nearest. FileNotFoundError: a run without weights.
    """
    folder = Path(name)
    if is_run(folder):
        return kept_by(folder)
    return folder if (folder / CONFIG).is_file() else find(str(name))


def is_run(folder: Path) -> bool:
    """Whether that is a run's folder."""
    return (folder / "config.yaml").is_file()


def kept_by(run: Path) -> Path:
    """The checkpoint folder that a run wrote last. Raises FileNotFoundError where it has not written any."""
    kept = sorted(run.glob(f"best*/{CONFIG}"), key=lambda path: path.stat().st_mtime)
    if not kept:
        raise FileNotFoundError(
            f"{run} has no weights yet: its run has not finished; `--ckpt_path last` continues the newest run"
        )
    return kept[-1].parent


def default_checkpoint(architecture: str) -> str | None:
    """Published checkpoint that an architecture's untagged name stands for; None without any.

    The one whose tag has the fewest words, as `<data>_<activation>`, and of several the first by name; a plain twin
    (`<data>_plain`) only where there is no other.
    """
    names = [name for name in checkpoint_folders() if name.split(".")[0] == architecture]
    return min(names, key=lambda name: (name.endswith("_plain"), name.count("_"), name), default=None)


def read_config(folder: str | Path) -> dict[str, Any]:
    """`config.json` of a checkpoint folder.

    Raises FileNotFoundError, or ValueError where it was altered, truncated, or is not ours.
    """
    path = Path(folder) / CONFIG
    if not path.is_file():
        raise FileNotFoundError(f"{folder} is no checkpoint folder: it has no {CONFIG}")
    try:
        config: dict[str, Any] = json.loads(path.read_text())
    except ValueError as error:  # of JSON, or of UTF-8
        raise ValueError(f"{path} was altered or truncated: {error}") from None
    missing = [key for key in KEYS if key not in config] or [key for key in FACTS if key not in config["dsc"]]
    if missing:
        raise ValueError(f"{path} lacks {', '.join(map(repr, missing))}: it was not written by dsc, or altered")
    return config


def trained_with(facts: Mapping[str, Any], part: str) -> dict[str, Any]:
    """Arguments of a card's training, of its "model" or "data"; none where the card does not say."""
    found: dict[str, Any] = facts["training"].get(part, {}).get("init_args", {})
    return found


def read_weights(folder: str | Path) -> dict[str, Tensor]:
    """Weights of a checkpoint folder, verified. Raises as `verified`."""
    return load_file(verified(folder))


def verified(folder: str | Path) -> Path:
    """Path of a checkpoint folder's weights, once their SHA-256 agrees with its `config.json`.

    Raises:
        FileNotFoundError: no weights. ValueError: another hash: the file was altered or truncated.
    """
    expected = read_config(folder)["dsc"]["sha256"]
    path = Path(folder) / WEIGHTS
    if not path.is_file():
        pickles = sorted(p.name for p in Path(folder).iterdir() if p.suffix in {".bin", ".pt", ".pth", ".ckpt", ".pkl"})
        refused = f" ({', '.join(pickles)} may hold a pickle and is not read)" if pickles else ""
        raise FileNotFoundError(f"{folder} has no {WEIGHTS}{refused}")
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    if found != expected:
        raise ValueError(f"{path} was altered or truncated: its SHA-256 is {found}, {CONFIG} says {expected}")
    return path


def load_weights(model: nn.Module, folder: str | Path, skip: tuple[str, ...] = ()) -> None:
    """Load a checkpoint folder's weights strictly; keys that start with an entry of `skip` are left as they are.

    Raises ValueError naming the missing, unexpected and differently shaped keys.
    """
    _put(read_weights(folder), model, folder, skip)


def _put(weights: dict[str, Tensor], model: nn.Module, folder: str | Path, skip: tuple[str, ...]) -> None:
    weights = {k: v for k, v in weights.items() if not k.startswith(skip or ("\0",))}
    own = {k: v for k, v in model.state_dict().items() if not k.startswith(skip or ("\0",))}
    problems = [f"missing {key}" for key in own.keys() - weights.keys()]
    problems += [f"unexpected {key}" for key in weights.keys() - own.keys()]
    problems += [
        f"{key} has shape {tuple(weights[key].shape)}, the model {tuple(own[key].shape)}"
        for key in own.keys() & weights.keys()
        if own[key].shape != weights[key].shape
    ]
    if problems:
        shown = "; ".join(sorted(problems)[:8]) + ("; …" if len(problems) > 8 else "")
        raise ValueError(f"{folder} holds another architecture ({read_config(folder)['architecture']}): {shown}")
    model.load_state_dict(weights, strict=not skip)


def start_from(model: nn.Module, folder: str | Path, activation: Mapping[str, Any] = NO_ARGS) -> list[str]:
    """Load a checkpoint folder's weights into a model whose head or activation may be another.

    Returns the keys that keep their fresh values: of the classifier those that differ in shape, and of activations'
    thresholds likewise, or all of them where the activation is another than the checkpoint's or `activation`, the
    arguments it was asked for with, has some that the checkpoint's was not given.
    Raises ValueError as `load_weights` for any other difference.
    """
    config, weights = read_config(folder), read_weights(folder)
    saved = {key: value.shape for key, value in weights.items()}
    own = {key: value.shape for key, value in model.state_dict().items()}
    differ = sorted(key for key in saved.keys() | own.keys() if saved.get(key) != own.get(key))
    fresh = [key for key in differ if key.startswith(head_prefixes(config)) or key.endswith("_threshold")]
    arguments = {key: value for key, value in activation.items() if key != "activation"}
    another = activation_name(model) != config["dsc"]["activation"]
    if another or any(config["model_args"].get(key) != value for key, value in arguments.items()):
        fresh += [key for key in own if key.endswith("_threshold") and key not in fresh]
    _put(weights, model, folder, tuple(fresh))
    return [key for key in fresh if key in own]


def head_prefixes(config: Mapping[str, Any]) -> tuple[str, ...]:
    """What the classifier's keys start with: for one classifier, for several (timm's distilled models), or none."""
    named = config["pretrained_cfg"].get("classifier") or ()
    return tuple(f"{name}." for name in ([named] if isinstance(named, str) else named))


def check_free(folder: Path) -> None:
    """Raise FileExistsError where that folder holds a checkpoint."""
    if (folder / CONFIG).exists():
        raise FileExistsError(f"{folder} holds a checkpoint already: it is never overwritten")


def halved(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights with what has two or more dimensions in float16. Raises ValueError where that has no such number."""
    large = {key: value for key, value in weights.items() if value.is_floating_point() and value.ndim > 1}
    half = {key: value.half() for key, value in large.items()}
    for key, value in half.items():
        if not value.isfinite().all():
            raise ValueError(f"{key} has entries beyond ±65504, the largest of half precision")
    return {**weights, **half}


def save(
    model: nn.Module,
    folder: str | Path,
    architecture: str,
    model_args: dict[str, Any],
    pretrained_cfg: dict[str, Any],
    facts: dict[str, Any],
    half: bool = False,
) -> Path:
    """Write a checkpoint folder; `facts` are our own keys (activation, data set, metrics, …).

    With `half`, matrices and filters take 16 bits an entry; loading gives them the model's own precision.

    Raises FileExistsError rather than replace another checkpoint, ValueError as `halved`.
    """
    folder = Path(folder)
    check_free(folder)
    folder.mkdir(parents=True, exist_ok=True)
    weights = halved(model.state_dict()) if half else model.state_dict()
    save_file({k: v.contiguous() for k, v in weights.items()}, folder / WEIGHTS)
    config = {
        "architecture": architecture,
        "num_classes": pretrained_cfg["num_classes"],
        "model_args": model_args,
        "pretrained_cfg": pretrained_cfg,
        "dsc": facts
        | {
            "sha256": hashlib.sha256((folder / WEIGHTS).read_bytes()).hexdigest(),
            "torch": torch.__version__,
        },
    }
    (folder / CARD).write_text(card(config))
    (folder / CONFIG).write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n")
    return folder


def card(config: dict[str, Any]) -> str:
    """Model card of a checkpoint, in Markdown, from its `config.json` alone."""
    facts = config["dsc"]
    name = f"{config['architecture']}, {facts['dataset']}, {facts['activation']}"
    rows = "\n".join(f"| {key} | {value:.4f} |" for key, value in facts["metrics"].items())
    start = trained_with(facts, "model").get("initial_checkpoint")
    recipe = f"Seed {facts['seed']}; " + (f"trained from the weights of `{start}`; " if start else "")
    return (
        "---\nlibrary_name: timm\nlicense: mit\ntags: [sparse-coding, deep-sparse-coding]\n---\n"
        f"# {name}\n\n{recipe}the training configuration is in `{CONFIG}` under `dsc.training`. "
        "`dsc evaluate path/to/this/folder` measures these figures anew.\n\n"
        f"| test figure | value |\n| --- | --- |\n{rows}\n\n"
        '```python\nimport dsc\n\nmodel = dsc.load("path/to/this/folder").eval()\n```\n'
    )
