"""All benchmarks of the solvers, as one Markdown page: `uv run --group benchmarks benchmarks/run.py [--quick]`.

Only ratios within a run mean anything: every table measures its rows, and the floor beside them, in turn.
"""

import os

import iteration
import lasso
import layer


def main() -> None:
    for module in (lasso, iteration, layer):
        print(f"\n## {(module.__doc__ or '').splitlines()[0]}\n", flush=True)
        module.main()


if __name__ == "__main__":
    os.environ.setdefault("PYTHONWARNINGS", "ignore")
    main()
