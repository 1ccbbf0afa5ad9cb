"""Time to start: `import dsc`, and loading a checkpoint, over `import torch, timm`, each in a fresh process, in turn.

uv run benchmarks/start.py
"""

import subprocess
import sys
import time
from argparse import ArgumentParser
from statistics import median

COMMANDS = {
    "import torch, timm": "import torch, timm",
    "import dsc": "import dsc",
    "and load a checkpoint": "import dsc; dsc.create_model('dsc_mlp_pico.mnist_relu', pretrained=True)",
}


def main() -> None:
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--turns", type=int, default=7, help="processes of each kind (default: %(default)s)")
    seconds: dict[str, list[float]] = {name: [] for name in COMMANDS}
    for turn in range(parser.parse_args().turns + 1):
        for name, command in COMMANDS.items():
            begin = time.perf_counter()
            subprocess.run([sys.executable, "-c", command], check=True)
            if turn:  # the first fills the disk's cache
                seconds[name].append(time.perf_counter() - begin)
    base = seconds["import torch, timm"]
    for name, found in seconds.items():
        ratios = [a / b for a, b in zip(found, base, strict=True)]
        print(
            f"{name}: {median(found):.2f} s, {median(ratios):.2f} ({min(ratios):.2f}–{max(ratios):.2f}) times the first"
        )


if __name__ == "__main__":
    main()
