"""What is trained: `Classifier` (images to classes) and `Reconstructor` (images to themselves)."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities import rank_zero_info
from timm.models import get_pretrained_cfg, split_model_name_tag
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import AdamW, Optimizer
from torchmetrics import MeanSquaredError, Metric
from torchmetrics.classification import MulticlassAccuracy

from dsc import hub, measures
from dsc.compiling import compiled
from dsc.dictionaries import Dictionary
from dsc.layers import SparseCoding
from dsc.metrics import ClusterAccuracy, SparsityMetrics, convergence
from dsc.models import create_model, list_models
from dsc.observe import Observer
from dsc.regularizers import Regularizer
from dsc.schedules import OneCycle, Schedule, scheduled

PROBE_IMAGES = 16
EPOCHS_FOR_RATE = 5
VIEW_WEIGHTS = (0.25, 0.125, 0.125) * 2  # of `views`: half for what is not shifted, as airbench has it (Jordan 2024)
INITIAL_IMAGES = 5000  # shown to models that start from data


class Task(LightningModule):
    """A model from the zoo, its loss, its optimizer, and the figures every run logs.

    Args:
        model: name of one of our models or of any timm backbone (see `dsc.create_model`).
        activation: one of `dsc.list_activations()`; None keeps the model's own.
        group_size, groups, threshold, learn_threshold: the activation's arguments.
        model_args: further arguments of the model, as `steps` or `channels`.
        initial_checkpoint: published name, or folder (as a run's `best`), of the weights to start from. The model's
            head and activation may be others: then the classifier and the thresholds start afresh.
        regularizers: penalties on the codes of the model's sparse layers (`dsc.regularizers`).
        optimizer: one of torch's or timm's, None for AdamW; weight decay reaches only parameters of two or more
            dimensions, and timm's Muon (`dsc.optimizers.Muon`) leaves the classifier to its fallback.
        lr_scheduler: called with the optimizer and the run's number of steps, stepped after each; None for none. Of
            torch's those fit whose second argument is that number, as `CosineAnnealingLR`.
        bias_lr: rate of biases, normalisations and thresholds, all of one dimension, as a multiple of the optimizer's.
            Many times the rate of the matrices saves a fast training epochs (as in airbench, Jordan 2024).
        keep_norms: after each step scale every matrix, but the classifier's, back to the norm that it had at first.
            For networks that normalise behind their layers: there the scale means nothing, and without this weights
            grow, by Muon's updates above all, and steps become small in comparison (as in airbench, Jordan 2024).
        channels_last: keep images and convolutions in that layout.
        compile: train through `torch.compile`, which fuses what is no product: up to twice as fast, after a minute for
            the first step. Evaluation is not compiled. On a CPU it needs a C++ compiler.
        data: facts of the data set (the CLI links them): sets the model's channels, classes and image size.

    Convergence figures are of the data module's ``probe(n)`` of n fixed images, and absent without one; models that
    start from images take its ``sample(n)``. Those of `dsc.data` have both.

    Raises:
        ValueError: no data, or a rate of biases that is not above 0; in training, a model that starts from images
            without a `sample`, or a schedule that does not fit (`dsc.schedules.scheduled`).
    """

    monitor = "val/loss"
    mode = "min"

    def __init__(
        self,
        model: str = "dsc_cnn",
        activation: str | None = None,
        group_size: int | None = None,
        groups: int | None = None,
        threshold: float | None = None,
        learn_threshold: bool | None = None,
        model_args: dict[str, Any] | None = None,
        initial_checkpoint: str | None = None,
        regularizers: Sequence[Regularizer] = (),
        optimizer: Callable[[Iterable[Any]], Optimizer] | None = None,
        lr_scheduler: Schedule | None = OneCycle,
        bias_lr: float = 1.0,
        keep_norms: bool = False,
        channels_last: bool = False,
        compile: bool = False,
        data: Any = None,
    ) -> None:
        super().__init__()
        if data is None:
            raise ValueError("data is needed: a data module, or anything with num_classes, in_chans and image_size")
        if not bias_lr > 0:
            raise ValueError(f"bias_lr multiplies the optimizer's rate and must be above 0, got {bias_lr!r}")
        act = dict(activation=activation, group_size=group_size, groups=groups, threshold=threshold)
        act |= dict(learn_threshold=learn_threshold)
        given = {k: v for k, v in act.items() if v is not None}
        self.architecture = model
        size = dict(img_size=data.image_size) if _has_fixed_size(model) else {}
        self.model_args = given | size | (model_args or {}) | self.shape_args(data)
        self.model = create_model(model, **self.model_args)
        self.starts_trained = bool(initial_checkpoint or self.model_args.get("pretrained"))
        if self.model_args.pop("pretrained", False) and model in list_models():
            # What is kept of the run builds the network alone, with what an untagged name's checkpoint was made with.
            self.model_args = (
                hub.read_config(hub.find(str(hub.default_checkpoint(model))))["model_args"] | self.model_args
            )
        if initial_checkpoint is not None:
            fresh = hub.start_from(self.model, hub.locate(initial_checkpoint), given)
            rank_zero_info(f"starts from {initial_checkpoint}" + (f"; afresh: {', '.join(fresh)}" if fresh else ""))
        self.regularizers = nn.ModuleList(regularizers)  # their state is the run's: a target's weight moves
        # As a default in the signature, AdamW would hand its weight decay on to whatever a configuration puts there.
        self.make_optimizer, self.make_schedule = optimizer or AdamW, lr_scheduler
        self.bias_lr, self.keep_norms = bias_lr, keep_norms
        self.norms: dict[str, float] = {}
        self.memory_format = torch.channels_last if channels_last else torch.contiguous_format
        self.model.to(memory_format=self.memory_format)
        self.observer = Observer(self.model)
        # Of a function, so that the model itself stays as it is: for a checkpoint's keys, and to be observed again.
        self.train_forward = compiled(lambda x: self.model(x)) if compile else None
        self.sparsity = nn.ModuleDict({stage: SparsityMetrics(self.observer.layers) for stage in ("val", "test")})
        self.quality: nn.ModuleDict = nn.ModuleDict()
        self.epoch_losses: list[float] = []
        self._planned_steps: float | None = None
        self._loss_sum = torch.zeros(())
        self._dictionaries_before: dict[str, Tensor] = {}

    def shape_args(self, data: Any) -> dict[str, Any]:
        """The model's arguments that the data set decides."""
        raise TypeError(f"{type(self).__name__} defines no task")

    def loss(self, batch: tuple[Tensor, Tensor], stage: str) -> Tensor:
        """The task's own loss of a batch; outside training it also feeds `quality[stage]`."""
        raise TypeError(f"{type(self).__name__} defines no loss")

    def forward(self, x: Tensor) -> Tensor:
        call = self.train_forward if self.training and self.train_forward else self.model
        return call(x.contiguous(memory_format=self.memory_format))

    def _step(self, batch: tuple[Tensor, Tensor], stage: str) -> Tensor:
        loss = self.loss(batch, stage)
        progress = self._progress() if stage == "train" and len(self.regularizers) else 1.0
        tested = stage == "test"  # a checkpoint keeps its model's figures, not its training's
        penalties = [] if tested else [regularizer(self.observer, progress) for regularizer in self.regularizers]
        if penalties:
            self.log(f"{stage}/penalty", torch.stack(penalties).sum(), on_step=False, on_epoch=True)
        return loss + sum(penalties) if stage == "train" else loss

    def _quality(self, stage: str) -> Any:
        """Metrics of that stage by name; none in training."""
        return dict(self.quality.items()).get(stage, {})

    def _progress(self) -> float:
        return self.global_step / self.trainer.estimated_stepping_batches

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        loss = self._step(batch, "train")
        if not loss.isfinite():
            raise FloatingPointError(
                f"the loss is {loss.item()} at step {self.global_step} (epoch {self.current_epoch}): training stops; "
                "a smaller learning rate is the usual cure"
            )
        self._loss_sum += loss.detach()
        self.log("train/loss", loss, on_step=False, on_epoch=True, prog_bar=True)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self._evaluate(batch, "val")

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self._evaluate(batch, "test")

    def _evaluate(self, batch: tuple[Tensor, Tensor], stage: str) -> None:
        loss = self._step(batch, stage)
        self.sparsity[stage].update(self.observer)  # type: ignore[operator]
        self.log(f"{stage}/loss", loss, batch_size=len(batch[0]))
        for name, metric in self.quality[stage].items():  # type: ignore[operator]
            self.log(f"{stage}/{name}", metric, prog_bar=stage == "val")

    def setup(self, stage: str) -> None:
        # Before a resumed run loads its weights, which then take the place of these.
        starts_from_images = getattr(self.model, "starts_from_images", False)
        if stage == "fit" and starts_from_images and not self.starts_trained:
            sample = self._from_data("sample")
            if sample is None:
                raise ValueError(f"{self.architecture} starts from images: its data needs sample(n), as ImageData has")
            self.model.initialize(sample(INITIAL_IMAGES).float())  # type: ignore[operator]

    def on_fit_start(self) -> None:
        steps = self.trainer.estimated_stepping_batches  # infinite for a run that only its time ends
        if self.make_schedule is not None and self._planned_steps not in (None, steps):
            raise ValueError(
                f"the run was planned for {self._planned_steps} steps and is resumed for {steps}, which its learning "
                "rates do not fit: give the same trainer.max_epochs (and data), or train on in a new run that starts "
                "from its weights, --model.initial_checkpoint RUN/best"
            )
        if steps == float("inf") and any(regularizer.warmup for regularizer in self.regularizers):
            raise ValueError("a warm-up is a fraction of the run: give trainer.max_epochs or trainer.max_steps")
        self._planned_steps = steps
        # Drawn anew for each epoch, so that a resumed run draws what the unbroken one would have.
        self._seed = torch.initial_seed()
        if self.keep_norms and not self.norms:  # a resumed run has loaded them
            norms = {name: float(p.detach().norm()) for name, p in self._matrices().items()}
            self.norms = {name: norm for name, norm in norms.items() if norm > 0}

    def on_train_epoch_start(self) -> None:
        torch.manual_seed(self._seed + self.current_epoch)
        self._loss_sum = torch.zeros((), device=self.device)
        self._dictionaries_before = {name: d.weight.detach().clone() for name, d in self._dictionaries().items()}

    @torch.no_grad()
    def on_train_batch_end(self, *args: Any) -> None:
        if self.keep_norms:
            matrices = self._matrices()
            for name, norm in self.norms.items():
                matrices[name].mul_(norm / matrices[name].norm())

    def on_train_epoch_end(self) -> None:
        self.epoch_losses.append(float(self._loss_sum) / max(1, int(self.trainer.num_training_batches)))
        rate = measures.fitted_rate(torch.tensor(self.epoch_losses[-EPOCHS_FOR_RATE:]), floor=0.0)
        if rate is not None:
            self.log("convergence/train/rate", float(rate))
        for i, regularizer in enumerate(self.regularizers):
            self.log(f"train/penalty_weight/{i}", regularizer.weight_at(self._progress()))  # type: ignore[operator]
        for name, dictionary in self._dictionaries().items():
            change = measures.relative_error(dictionary.weight.detach(), self._dictionaries_before[name])
            self.log(f"convergence/dictionary/{name}", change)

    def on_validation_epoch_start(self) -> None:
        for dictionary in self._dictionaries().values():  # averaged weights may have taken the place of the trained
            dictionary.remeasure()
        if not self.trainer.sanity_checking:  # here, as averaged weights are gone again at the epoch's end
            self.log_dict({f"convergence/{k}": v for k, v in self._convergence().items()})

    def on_validation_epoch_end(self) -> None:
        figures = self._sparsity_figures("val")
        self.log("active", figures.get("sparsity/active_fraction/total", 1.0), logger=False, prog_bar=True)
        self.log_dict(figures)

    def on_test_epoch_end(self) -> None:
        self.log_dict({f"test/{k}": v for k, v in self._sparsity_figures("test").items()})

    def _sparsity_figures(self, stage: str) -> dict[str, float]:
        metrics: SparsityMetrics = self.sparsity[stage]  # type: ignore[assignment]
        figures = {f"sparsity/{name}": value for name, value in metrics.compute().items()}
        metrics.reset()
        return figures

    def _convergence(self) -> dict[str, float]:
        probe = self._from_data("probe")
        if probe is None:
            return {}
        images = probe(PROBE_IMAGES).to(self.device)
        return convergence(self.model, images.contiguous(memory_format=self.memory_format))

    def _from_data(self, method: str) -> Callable[[int], Tensor] | None:
        return getattr(getattr(self.trainer, "datamodule", None), method, None)

    def _dictionaries(self) -> dict[str, Dictionary]:
        return {n: m.dictionary for n, m in self.model.named_modules() if isinstance(m, SparseCoding)}

    def configure_optimizers(self) -> Any:
        groups: list[dict[str, Any]] = [
            {"params": list(self._matrices().values())},
            {"params": [p for p in self._undecayed() if p.ndim > 1], "weight_decay": 0.0},
            {"params": [p for p in self._classifier() if p.ndim > 1], "use_fallback": True},
            {"params": [p for p in self.model.parameters() if p.requires_grad and p.ndim <= 1], "weight_decay": 0.0},
        ]
        optimizer = self.make_optimizer([group for group in groups if group["params"]])
        for group in optimizer.param_groups:
            if all(p.ndim <= 1 for p in group["params"]):
                group["lr"] = group["lr"] * self.bias_lr
        if self.make_schedule is None:
            return optimizer
        schedule = scheduled(self.make_schedule, optimizer, self.trainer.estimated_stepping_batches)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def _matrices(self) -> dict[str, nn.Parameter]:
        """What is learned in two or more dimensions, by name, without the classifier and what does not decay."""
        others = {id(p) for p in (*self._classifier(), *self._undecayed())}
        named = self.model.named_parameters()
        return {name: p for name, p in named if p.requires_grad and p.ndim > 1 and id(p) not in others}

    def _undecayed(self) -> list[nn.Parameter]:
        """What a backbone of timm's says is not to decay, as the embeddings of positions."""
        names: set[str] = getattr(self.model, "no_weight_decay", set)()
        return [p for name, p in self.model.named_parameters() if name in names and p.requires_grad]

    def _classifier(self) -> list[nn.Parameter]:
        found = getattr(self.model, "get_classifier", nn.Identity)()
        heads = found if isinstance(found, tuple) else (found,)  # timm's distilled models have two
        return [p for head in heads for p in head.parameters()]

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["epoch_losses"], checkpoint["norms"] = self.epoch_losses, self.norms
        checkpoint["planned_steps"] = self._planned_steps

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.epoch_losses, self.norms = list(checkpoint["epoch_losses"]), dict(checkpoint.get("norms", {}))
        self._planned_steps = checkpoint.get("planned_steps")


class Classifier(Task):
    """Images to classes by cross entropy.

    Args:
        label_smoothing: in [0, 1).
        test_time_augmentation: also measure `test/accuracy_tta`, of the mean logits of `views`, with
            `VIEW_WEIGHTS`; `test/accuracy` stays plain.
        **kwargs: see `Task`.
    """

    monitor = "val/accuracy"
    mode = "max"

    def __init__(
        self, label_smoothing: float = 0.0, test_time_augmentation: bool = False, data: Any = None, **kwargs: Any
    ) -> None:
        super().__init__(data=data, **kwargs)
        self.label_smoothing = label_smoothing
        classes = self.model_args["num_classes"]
        self.quality = _metrics(lambda: {"accuracy": MulticlassAccuracy(classes, average="micro")})
        if test_time_augmentation:
            self.quality["test"]["accuracy_tta"] = MulticlassAccuracy(classes, average="micro")  # type: ignore[operator]

    def shape_args(self, data: Any) -> dict[str, Any]:
        return dict(num_classes=data.num_classes, in_chans=data.in_chans)

    def loss(self, batch: tuple[Tensor, Tensor], stage: str) -> Tensor:
        x, y = batch
        figures = self._quality(stage)
        if "accuracy_tta" in figures:
            logits = sum(weight * self(view) for weight, view in zip(VIEW_WEIGHTS, views(x), strict=True))
            figures["accuracy_tta"].update(logits, y)
        logits = self(x)  # last: the sparsity figures are those of the plain images
        if "accuracy" in figures:
            figures["accuracy"].update(logits, y)
        return F.cross_entropy(logits, y, label_smoothing=self.label_smoothing if stage == "train" else 0.0)


def views(x: Tensor) -> list[Tensor]:
    """The images (N, C, H, W), themselves shifted by one pixel towards two opposite corners, and mirrors of all three.

    Source: Jordan, 94% on CIFAR-10 in 3.29 seconds (2024).
    """
    padded = F.pad(x, (1, 1, 1, 1), mode="reflect")
    height, width = x.shape[-2:]
    shifted = [x, padded[..., :height, :width], padded[..., 2 : 2 + height, 2 : 2 + width]]
    return [*shifted, *(view.flip(-1) for view in shifted)]


class Reconstructor(Task):
    """Images to themselves by half the squared error of a pixel; labels are not used in training.

    Where the deepest code is in groups, a test also measures `test/strongest_group_accuracy`: how well each image's
    strongest group tells its class.

    Args:
        normalize_atoms: scale every atom back to unit norm after each step.
        **kwargs: see `Task`.
    """

    def __init__(self, normalize_atoms: bool = True, data: Any = None, **kwargs: Any) -> None:
        super().__init__(data=data, **kwargs)
        self.normalize_atoms = normalize_atoms
        self.quality = _metrics(lambda: {"mse": MeanSquaredError()})
        units: int = self.model.num_features  # type: ignore[assignment]
        prox = list(self.observer.layers.values())[-1].prox
        self.group_size, self.dim = prox.group_size_of(units), prox.dim
        classes = getattr(data, "num_classes", 0)  # signals need have none
        if prox.is_grouped and classes:
            count = max(units // self.group_size, classes)
            self.quality["test"]["strongest_group_accuracy"] = ClusterAccuracy(count)  # type: ignore[operator]

    def shape_args(self, data: Any) -> dict[str, Any]:
        return dict(in_chans=data.in_chans)

    def loss(self, batch: tuple[Tensor, Tensor], stage: str) -> Tensor:
        x, y = batch
        reconstruction = self(x)
        figures = self._quality(stage)
        if "mse" in figures:
            figures["mse"].update(reconstruction.contiguous(), x.contiguous())
        if "strongest_group_accuracy" in figures:
            code = list(self.observer.features.values())[-1][-1]
            figures["strongest_group_accuracy"].update(measures.strongest_group(code, self.group_size, self.dim), y)
        return F.mse_loss(reconstruction, x) / 2

    def on_train_batch_end(self, *args: Any) -> None:
        super().on_train_batch_end(*args)
        if self.normalize_atoms:
            for dictionary in self._dictionaries().values():
                dictionary.normalize_()


def _has_fixed_size(model: str) -> bool:
    cfg = get_pretrained_cfg(split_model_name_tag(model)[0])
    return cfg is not None and bool(cfg.fixed_input_size)


def _metrics(make: Callable[[], dict[str, Metric]]) -> nn.ModuleDict:
    return nn.ModuleDict({stage: nn.ModuleDict(make()) for stage in ("val", "test")})
