"""Lasso on natural-image patches: time to a relative objective gap, against scikit-learn, SPAMS and plain FISTA.

`uv run --group benchmarks benchmarks/lasso.py` prints a Markdown table for each number of atoms. Atoms and signals are
16×16 patches without their mean, of scikit-learn's two sample photographs; λ is 0.2 of the mean largest correlation.
A gap is ``ΣP/ΣP* − 1`` over all signals, P* from a run to 1e-10 in double precision.
"""

import argparse
import os
import time
from collections.abc import Callable, Iterator
from unittest.mock import patch

import numpy as np
import torch
from sklearn.datasets import load_sample_images
from sklearn.decomposition import sparse_encode as sklearn_encode
from sklearn.feature_extraction.image import extract_patches_2d
from torch import Tensor
from torch.nn import functional as F

import dsc
from common import header, interleaved, markdown

GAPS = (1e-2, 1e-4, 1e-6)
SLOW_SIGNALS = 200  # of which scikit-learn's solvers get to code, their time being proportional


def patches(atoms: int, signals: int, seed: int = 0) -> tuple[Tensor, Tensor, float]:
    """Signals, unit-norm atoms and λ."""
    images = [image.mean(2, dtype=np.float32) / 255 for image in load_sample_images().images]
    found = [extract_patches_2d(i, (16, 16), max_patches=3 * (atoms + signals), random_state=seed) for i in images]
    rows = torch.from_numpy(np.unique(np.concatenate(found).reshape(-1, 256), axis=0))  # drawn with replacement
    rows = rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))]
    rows = rows - rows.mean(1, keepdim=True)
    rows = rows[rows.norm(dim=1) > 0.1]
    dictionary, x = F.normalize(rows[:atoms], dim=1), rows[atoms : atoms + signals]
    return x, dictionary, 0.2 * float((x @ dictionary.mT).abs().amax(1).mean())


def objective(x: Tensor, dictionary: Tensor, threshold: float, z: Tensor) -> Tensor:
    """½‖x − zD‖² + λ‖z‖₁ of each signal, in double precision."""
    residual = x[: len(z)].double() - z.double() @ dictionary.double()
    return residual.square().sum(1) / 2 + threshold * z.double().abs().sum(1)


def fista(x: Tensor, dictionary: Tensor, threshold: float) -> Iterator[Tensor]:
    """A loop as one writes it at first, in Gram form."""
    gram, correlations = dictionary @ dictionary.mT, x @ dictionary.mT
    step = 1 / torch.linalg.eigvalsh(gram.double())[-1].item()
    z = y = torch.zeros_like(correlations)
    t = 1.0
    while True:
        after = F.softshrink(y + step * (correlations - y @ gram), step * threshold)
        following = (1 + (1 + 4 * t * t) ** 0.5) / 2
        y = after + (t - 1) / following * (after - z)
        z, t = after, following
        yield z


def fista_times(problem: tuple[Tensor, Tensor, float], best: Tensor, seconds: float) -> dict[float, float]:
    """Time of the plain loop to each gap that it reaches within `seconds`, without the time of looking."""
    reached: dict[float, float] = {}
    spent, iterates = 0.0, fista(*problem)
    while spent < seconds and len(reached) < len(GAPS):
        start = time.perf_counter()
        for _ in range(5):
            z = next(iterates)
        spent += time.perf_counter() - start
        gap = relative_gap(problem, z, best)
        reached |= {goal: spent for goal in GAPS if gap <= goal and goal not in reached}
    return reached


def relative_gap(problem: tuple[Tensor, Tensor, float], z: Tensor, best: Tensor) -> float:
    """ΣP/ΣP* − 1."""
    return float(objective(*problem, z).sum() / best[: len(z)].sum() - 1)


def exact_solvers(problem: tuple[Tensor, Tensor, float]) -> dict[str, tuple[int, Callable[[], Tensor]]]:
    """Solvers without a tolerance to set, by name: how many signals they code here, and the call."""
    x, dictionary, threshold = problem
    few = min(len(x), SLOW_SIGNALS)

    def sklearn(algorithm: str) -> Callable[[], Tensor]:
        # In double precision: in single, lasso_cd runs into its iteration limit, which takes longer.
        rows, atoms = x[:few].double().numpy(), dictionary.double().numpy()
        jobs = torch.get_num_threads()
        return lambda: torch.from_numpy(sklearn_encode(rows, atoms, algorithm=algorithm, alpha=threshold, n_jobs=jobs))

    found = {f"scikit-learn {name}": (few, sklearn(name)) for name in ("lasso_cd", "lasso_lars")}
    try:
        import spams
    except ImportError:
        return found
    columns, atoms = np.asfortranarray(x.numpy().T), np.asfortranarray(dictionary.numpy().T)

    def lars() -> Tensor:
        codes = spams.lasso(columns, D=atoms, lambda1=threshold, mode=2, numThreads=torch.get_num_threads())
        return torch.from_numpy(codes.toarray().T)

    return {"SPAMS lasso (LARS)": (len(x), lars)} | found


def without_numba(call: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """The same call where numba is not installed, or so it seems."""

    def batched() -> Tensor:
        with patch("dsc.active_set.compiled_descent", return_value=None):
            return call()

    return batched


def table(atoms: int, signals: int, repeats: int, seconds: float) -> str:
    """One Markdown table."""
    problem = patches(atoms, signals)
    x, dictionary, threshold = problem
    z = dsc.sparse_encode(x.double(), dictionary.double(), threshold, tol=1e-10)
    best = objective(*problem, z)
    exact = exact_solvers(problem)
    quick = {name: call for name, (count, call) in exact.items() if count == signals}
    calls = {goal: lambda goal=goal: dsc.sparse_encode(x, dictionary, threshold, tol=goal) for goal in GAPS}
    calls |= {f"{GAPS[1]:g}, without numba": without_numba(calls[GAPS[1]])}
    times = interleaved(calls | quick, repeats)
    rows = [
        [f"`dsc.sparse_encode`, tol={goal}", f"{relative_gap(problem, call(), best):.0e}", times[goal]]
        for goal, call in calls.items()
    ]
    for name, (count, call) in exact.items():
        spent = times[name] if name in times else interleaved({name: call}, 1)[name] * signals / count
        rows.append([name, f"{relative_gap(problem, call(), best):.0e}", spent])
    rows += [["plain FISTA loop", f"{goal:.0e}", spent] for goal, spent in fista_times(problem, best, seconds).items()]
    gram = dictionary @ dictionary.mT
    floor = interleaved({0: lambda: x @ dictionary.mT, 1: lambda: z.float() @ gram}, repeats)
    rows.append(["floor: x Dᵀ, once", "", floor[0]])
    rows.append(["floor: z DDᵀ, what a first-order step needs", "", floor[1]])
    ours = times[GAPS[1]]
    title = f"{signals} signals, {atoms} atoms, {float((z != 0).sum(1).double().mean()):.1f} non-zeros a code"
    shown = [[name, gap, f"{spent:.4f}", f"{spent / ours:.2f}"] for name, gap, spent in rows]
    return f"{title}\n\n" + markdown(["solver", "gap reached", "seconds", "over ours at 1e-4"], shown)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer signals and atoms")
    quick = parser.parse_args().quick
    print(header())
    for atoms in (128,) if quick else (512, 2048):
        print("\n" + table(atoms, 300 if quick else 2000, 3 if quick else 7, 2 if quick else 60))


if __name__ == "__main__":
    os.environ.setdefault("PYTHONWARNINGS", "ignore")  # scikit-learn's worker processes warn of every signal
    main()
