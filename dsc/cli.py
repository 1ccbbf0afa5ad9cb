"""The command line: `dsc train` (configuration → fit → test → report) and what is done with models and runs."""

import os
import re
import sys
import warnings
from argparse import ArgumentParser, ArgumentTypeError, RawDescriptionHelpFormatter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jsonargparse
import torch
import yaml
from lightning.pytorch import LightningDataModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger

from dsc import catalogue, figures, hub, report, runs
from dsc import export as exporting
from dsc import predict as prediction
from dsc._names import unknown
from dsc.data import ImageData
from dsc.models import load
from dsc.reproduce import EXPERIMENTS, results
from dsc.tasks import Classifier, Reconstructor, Task

DEFAULT_CONFIG = "configs/digits.yaml"
PLACE = "a published name, a checkpoint folder, or a run folder"


class Parser(LightningArgumentParser):
    """Lightning's parser, whose errors are the cause alone, and name the nearest valid key to an unknown one."""

    def error(self, message: str, ex: Exception | None = None) -> Any:
        found = re.search(r"Option '(\S+)' is not accepted|unrecognized arguments: (\S+)", message)
        if found:
            wrong = (found[1] or found[2]).lstrip("-").split("=")[0]
            known = [action.dest for action in self._actions] + _task_and_data_keys()
            message = unknown("key", wrong, known).split(" Known:")[0]
        super().error(_cause(message), ex)


def _cause(message: str) -> str:
    # A wrong value deep inside is reported with every type that was tried and the whole configuration.
    causes = re.findall(r"^ *((?:- (?!Expected|Problem)|unknown key).+)$", message, re.M)
    return causes[0].removeprefix("- ") if causes else message


def _task_and_data_keys() -> list[str]:
    keys: list[str] = []
    for kind in (Classifier, Reconstructor, ImageData):
        parser = jsonargparse.ArgumentParser()
        parser.add_class_arguments(kind)
        keys += [action.dest for action in parser._actions]
    return keys


class SaveConfig(SaveConfigCallback):
    """Keeps every configuration of a run: a continued run writes `config-2.yaml` beside `config.yaml`."""

    def setup(self, trainer: Trainer, pl_module: Any, stage: str) -> None:
        if not self.already_saved and trainer.log_dir:
            self.config_filename = runs.fresh(Path(trainer.log_dir) / self.config_filename).name
        super().setup(trainer, pl_module, stage)


class CLI(LightningCLI):
    """Lightning's CLI with a run folder, `--ckpt_path last`, and the data set's facts linked to the model."""

    run_dir: Path | None = None
    ckpt_path: Path | None = None

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_argument("--name", type=str, default="run", help="name of the run: it is kept in <runs>/<name>/<n>/")
        parser.add_argument("--runs", type=str, default="runs", help="folder of all runs")
        parser.add_argument(
            "--ckpt_path",
            type=str | None,
            default=None,
            help="'last' to continue the newest run of that name in its own folder, or a resume checkpoint",
        )
        parser.link_arguments("data", "model.init_args.data", apply_on="instantiate")

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        if self.config.trainer.fast_dev_run:
            return super().instantiate_trainer(**kwargs)
        self.run_dir, self.ckpt_path = self._folder()
        where: dict[str, Any] = dict(save_dir=str(self.run_dir.parent), name="", version=self.run_dir.name)
        loggers = [CSVLogger(**where, flush_logs_every_n_steps=1), TensorBoardLogger(**where)]
        own = self.config_init.trainer.callbacks or []
        # Ours first: the trainer's checkpoint callback is the first one, and a user may add another.
        callbacks = [*self._checkpoints(), *(own if isinstance(own, list) else [own])]
        return super().instantiate_trainer(**kwargs, logger=loggers, callbacks=callbacks)

    def _checkpoints(self) -> list[ModelCheckpoint]:
        assert self.run_dir is not None
        folder = self.run_dir / runs.RESUME.parent
        kept: dict[str, Any] = dict(dirpath=folder, enable_version_counter=False, save_on_train_epoch_end=True)
        # Lightning's own `save_last` saves only beside a new best: a stopped run would go back to that epoch.
        return [
            ModelCheckpoint(filename="best", monitor=self.model.monitor, mode=self.model.mode, **kept),
            ModelCheckpoint(filename=runs.RESUME.stem, **kept),
        ]

    def _folder(self) -> tuple[Path, Path | None]:
        config = self.config
        if config.ckpt_path == "last":
            folder = runs.latest_resumable(config.runs, config.name)
            metrics = folder / "metrics.csv"
            if metrics.exists():  # Lightning's logger would delete it
                metrics.rename(runs.fresh(metrics))
            return folder, folder / runs.RESUME
        return runs.new_run(config.runs, config.name), Path(config.ckpt_path) if config.ckpt_path else None


def train(args: Sequence[str]) -> dict[str, Any] | None:
    """Fit by a configuration, test the best weights, write the run folder's report and print its table.

    Returns the summary; a run of `--trainer.fast_dev_run` leaves no folder and returns None.
    """
    return _fit_and_report(cli_of(args))


def cli_of(args: Sequence[str]) -> CLI:
    """The parsed command line: its task, data and trainer, made but not run."""
    _quiet()
    if not any(a == "--config" or a.startswith("--config=") or a in ("-c", "-h", "--help") for a in args):
        args = ["--config", DEFAULT_CONFIG, *args]
    args = [part for a in args for part in (a.split("=", 1) if a.startswith("--config=") else [a])]
    args = [_config(a) if before in ("--config", "-c") else a for before, a in zip(["", *args], args, strict=False)]
    return CLI(
        model_class=Task,
        datamodule_class=LightningDataModule,
        subclass_mode_model=True,
        subclass_mode_data=True,
        parser_class=Parser,
        save_config_callback=SaveConfig,
        seed_everything_default=0,
        trainer_defaults=dict(devices=1, num_sanity_val_steps=0, enable_model_summary=False),
        auto_configure_optimizers=False,
        load_from_checkpoint_support=False,
        args=list(args),
        run=False,
    )


def _fit_and_report(cli: CLI) -> dict[str, Any] | None:
    task, trainer = cli.model, cli.trainer
    if trainer.world_size > 1:  # what a run adapts and measures is not synchronized
        raise ValueError(f"a run is trained on one device, not on {trainer.world_size}: give --trainer.devices 1")
    if _emulates_bfloat16(trainer):
        sys.stderr.write("this processor emulates bfloat16: --trainer.precision 32-true is about twice as fast\n")
    if cli.run_dir is None:
        trainer.fit(task, cli.datamodule)
        trainer.test(task, cli.datamodule, verbose=False)
        return None
    trainer.fit(task, cli.datamodule, ckpt_path=cli.ckpt_path, weights_only=True)
    checkpoints = trainer.checkpoint_callback
    assert isinstance(checkpoints, ModelCheckpoint)
    if checkpoints.best_model_path:  # a run that ends before its first validation keeps its last weights
        best = torch.load(checkpoints.best_model_path, weights_only=True, map_location="cpu")
        task.load_state_dict(best["state_dict"])
    config = yaml.safe_load((cli.run_dir / "config.yaml").read_text())
    summary = report.finish(cli.run_dir, task, cli.datamodule, config)
    print(f"\n{report.text(summary)}\n\nweights, logs, pictures and the report: {cli.run_dir}")
    return summary


def _emulates_bfloat16(trainer: Trainer) -> bool:
    if not trainer.precision.startswith("bf16") or trainer.strategy.root_device.type != "cpu":
        return False
    known: Mapping[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()  # of newer torch
    return bool(known) and not any(known.get(name) for name in ("avx512_bf16", "amx_bf16", "avx10_2", "bf16"))


def _quiet() -> None:
    # Batches are slices of tensors in memory: worker processes would only copy them.
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    warnings.filterwarnings("ignore", message=".*LightningCLI's args parameter.*")
    warnings.filterwarnings("ignore", message=".*smaller than the logging interval.*")
    warnings.filterwarnings("ignore", message=".*could not find the monitored key")  # before the first validation
    warnings.filterwarnings("ignore", message="Checkpoint directory .* exists and is not empty")
    warnings.filterwarnings("ignore", message=".*isinstance.treespec, LeafSpec.*")
    warnings.filterwarnings("ignore", message=".*validation_step. but have no .val_dataloader.*")
    warnings.filterwarnings("ignore", message=".*Sparse invariant checks are implicitly disabled.*")


def _config(path: str) -> str:
    # `configs/…` means this library's own from any folder: of a clone, or inside the installed package.
    here = Path(__file__).resolve().parent
    found = [folder / path for folder in (Path.cwd(), here.parent, here) if (folder / path).is_file()]
    return str(found[0]) if found else path


def main(args: Sequence[str] | None = None) -> None:
    """Entry point of `dsc`: a command and its arguments; wrong input ends with one message and exit code 2."""
    command, *rest = (list(sys.argv[1:] if args is None else args)) or ["--help"]
    if command in ("-h", "--help"):
        print(f"{__doc__}\n\n" + "\n".join(f"  {name:10} {_summary(run)}" for name, run in COMMANDS.items()))
        print("\nEach has --help.")
        return
    if command not in COMMANDS:
        sys.exit(f"dsc: {unknown('command', command, COMMANDS)}")
    try:
        COMMANDS[command](rest)
        sys.stdout.flush()
    except BrokenPipeError:  # who reads the output, as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or flushing at the exit fails again
        sys.exit(1)
    except (ValueError, FileNotFoundError, FileExistsError, FloatingPointError, ImportError) as error:
        sys.stderr.write(f"dsc {command}: {_cause(str(error))}\n")
        sys.exit(2)


def _summary(command: Callable[..., Any]) -> str:
    return (command.__doc__ or "").splitlines()[0]


def evaluate(args: Sequence[str]) -> None:
    """Re-measure checkpoints and print every figure beside its card's; a difference is an error, told at the end."""
    parser = ArgumentParser(prog="dsc evaluate", description=evaluate.__doc__)
    parser.add_argument("checkpoint", nargs="+", help=PLACE)
    parser.add_argument("--data.root", dest="root", help="folder of the data sets (default: DSC_DATA, else data)")
    parser.add_argument("--picture", type=Path, help="write the convergence curves there, of one checkpoint")
    parsed = parser.parse_args(args)
    if parsed.picture:
        if len(parsed.checkpoint) > 1:
            raise ValueError(f"--picture is of one checkpoint, got {len(parsed.checkpoint)}")
        runs.check_new(parsed.picture)
    _quiet()
    wrong = []
    for name, folder in [(name, hub.locate(name)) for name in parsed.checkpoint]:
        summary, curves = report.measure_checkpoint(folder, parsed.root)
        facts = hub.read_config(folder)["dsc"]
        card = report.flat_figures(facts["metrics"], facts["convergence"])
        measured = report.flat_figures(summary["test"], summary["convergence"])
        print(f"{name}: {report.text(summary)}\n\n{report.beside(measured, card)}\n")
        if parsed.picture:
            figures.convergence_figure(curves).savefig(parsed.picture, dpi=120)
        wrong += [f"{name}: {difference}" for difference in report.differences(measured, card)]
    if wrong:
        raise ValueError("these figures are not their card's: " + "; ".join(wrong))


def halve(args: Sequence[str]) -> None:
    """Write a checkpoint again with its matrices in half precision, and the figures that it then has."""
    parser = ArgumentParser(prog="dsc halve", description=halve.__doc__)
    parser.add_argument("checkpoint", help=PLACE)
    parser.add_argument("out", type=Path, help="folder to write, which holds no checkpoint yet")
    parser.add_argument("--data.root", dest="root", help="folder of the data sets (default: DSC_DATA, else data)")
    parsed = parser.parse_args(args)
    _quiet()
    summary = report.halve(hub.locate(parsed.checkpoint), parsed.out, parsed.root)
    print(f"{parsed.out}: {report.text(summary)}")


def write_report(args: Sequence[str]) -> None:
    """Write the page of a run or of a checkpoint, or of two side by side: one HTML file, without a network."""
    parser = ArgumentParser(prog="dsc report", description=write_report.__doc__)
    parser.add_argument("place", help=PLACE)
    parser.add_argument("other", nargs="?", help="another, to be shown beside it")
    parser.add_argument("--out", type=Path, help="the file (default: report.html in the run, or in this folder)")
    parser.add_argument("--data.root", dest="root", help="folder of the data sets (default: DSC_DATA, else data)")
    parsed = parser.parse_args(args)
    _quiet()
    places = [place for place in (parsed.place, parsed.other) if place is not None]
    print(report.write_report(places, parsed.out, parsed.root))


def reproduce(args: Sequence[str]) -> None:
    """Run an experiment of the literature; its figures, table and picture go to a folder of their own."""
    if args and not args[0].startswith("-") and args[0] not in EXPERIMENTS:
        raise ValueError(unknown("experiment", args[0], EXPERIMENTS))
    parser = ArgumentParser(prog="dsc reproduce", description=reproduce.__doc__)
    names = parser.add_subparsers(dest="experiment", metavar="experiment", required=True)
    for name, experiment in EXPERIMENTS.items():
        text, title = experiment.description, experiment.description.splitlines()[0]
        own = names.add_parser(name, help=title, description=text, formatter_class=RawDescriptionHelpFormatter)
        own.add_argument("--fast", action="store_true", help="a small instance, in under a minute")
        own.add_argument("--seeds", type=_count, default=1, help="how many repetitions, seeds 0, 1, … (default: 1)")
        own.add_argument("--out", type=Path, help=f"folder of the results (default: a new runs/reproduce/{name}/<n>)")
        experiment.add_arguments(own)
    parsed = parser.parse_args(args)
    parsed.out = parsed.out or runs.new_run("runs/reproduce", parsed.experiment)
    results.check_fresh(parsed.out, parsed.experiment)  # before the work, not after it
    print(f"results go to {parsed.out}")
    _quiet()
    found = EXPERIMENTS[parsed.experiment].run(parsed, print)
    results.write(parsed.out, parsed.experiment, found)
    print(f"\n{found.table}\n\nfigures, table and picture: {parsed.out}")


def models(args: Sequence[str]) -> None:
    """List models: family, parameters, multiply-accumulates of one image with all steps, stages, pretrained tags."""
    parser = ArgumentParser(prog="dsc models", description=models.__doc__)
    parser.add_argument(
        "pattern", nargs="?", default="*", help="shell pattern of our names; where none fits, of timm's"
    )
    parser.add_argument("--pretrained", action="store_true", help="list published checkpoints, with their figures")
    parsed = parser.parse_args(args)
    if parsed.pretrained:
        rows = [row.cells() for row in catalogue.describe_checkpoints(parsed.pattern)]
        print(report.table(catalogue.CHECKPOINT_HEADER, rows))
    else:
        print(report.table(catalogue.HEADER, [row.cells() for row in catalogue.describe_models(parsed.pattern)]))


def predict(args: Sequence[str]) -> None:
    """Classes of image files with their probabilities, and which atoms and groups fired, the strongest first."""
    parser = ArgumentParser(prog="dsc predict", description=predict.__doc__)
    parser.add_argument("image", nargs="+", help="a file that Pillow reads; it is resized to the model's input")
    parser.add_argument("--checkpoint", required=True, help=PLACE)
    parser.add_argument("--top", type=_count, default=5, help="how many classes, atoms and groups (default: 5)")
    parsed = parser.parse_args(args)
    model = load(hub.locate(parsed.checkpoint))
    images = prediction.read_images(model, parsed.image)
    for path, found in zip(parsed.image, prediction.predict(model, images), strict=True):
        print(f"{path}: {prediction.text(found, parsed.top)}\n")


def export(args: Sequence[str]) -> None:
    """Write a checkpoint as a file that runs without this library, and check what it computes."""
    parser = ArgumentParser(prog="dsc export", description=export.__doc__)
    parser.add_argument("checkpoint", help=PLACE)
    parser.add_argument("--format", choices=exporting.SUFFIX, default="onnx", help="default: %(default)s")
    parser.add_argument("--out", type=Path, help="the file (default: the checkpoint's name, in this folder)")
    parsed = parser.parse_args(args)
    folder = hub.locate(parsed.checkpoint)
    path = parsed.out or Path(folder.name + exporting.SUFFIX[parsed.format])
    _quiet()
    difference = exporting.export(load(folder), path, parsed.format)
    print(f"{path}: {path.stat().st_size:,} bytes, any batch size, outputs within {difference:.1e} of the model's")


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise ArgumentTypeError(f"expected a number of at least 1, got {text!r}")
    return int(text)


COMMANDS: dict[str, Callable[[Sequence[str]], Any]] = {
    "train": train,
    "models": models,
    "evaluate": evaluate,
    "halve": halve,
    "report": write_report,
    "reproduce": reproduce,
    "predict": predict,
    "export": export,
}
