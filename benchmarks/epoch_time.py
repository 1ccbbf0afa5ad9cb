"""Where a training epoch's time goes: `uv run benchmarks/epoch_time.py --config configs/mnist_cnn.yaml`.

Runs one epoch of a configuration, validation and convergence measurements included, under Lightning's own profiler
and prints the share of each part. Takes every argument of `dsc train`.
"""

import sys

from lightning.pytorch.profilers import SimpleProfiler

from dsc.cli import cli_of


def main(args: list[str]) -> None:
    cli = cli_of([*args, "--trainer.max_epochs", "1", "--runs", "runs/benchmarks"])
    profiler = SimpleProfiler()
    cli.trainer.profiler = profiler
    cli.trainer.fit(cli.model, cli.datamodule)

    def seconds(suffix: str) -> float:
        return sum(sum(times) for action, times in profiler.recorded_durations.items() if action.endswith(suffix))

    epoch = seconds("run_training_epoch")
    step = seconds(".optimizer_step")  # Lightning runs forward and backward inside the optimizer's step
    forward, backward = seconds("Strategy.training_step"), seconds("Strategy.backward")
    parts = {
        "forward": forward,
        "backward": backward,
        "optimizer": step - forward - backward,
        "batches: fetch, augment": seconds("train_dataloader_next") + seconds("batch_to_device"),
        "validation and its figures": seconds("validation_step") + seconds(".on_validation_epoch_end"),
    }
    parts["everything else"] = epoch - sum(parts.values())
    for part, value in parts.items():
        print(f"{part:28s} {value:8.2f} s  {value / epoch:6.1%}")
    print(f"{'forward, backward, optimizer':28s} {step:8.2f} s  {step / epoch:6.1%}")


if __name__ == "__main__":
    main(sys.argv[1:])
