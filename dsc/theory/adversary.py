"""Two codes of one signal that are as far apart as can be found: what a stability bound is to be tested with."""

from dataclasses import dataclass

import numpy as np
import torch
from scipy.linalg import eigh
from torch import Tensor

from dsc.dictionaries import Dictionary
from dsc.synthetic import DeepSparse

ROUNDS = 8  # of reweighting; sixty raise the distances by one percent at most


@dataclass(frozen=True)
class Pair:
    """A signal (1, …) with two chains of codes, each within the sparsities and tolerances of the model."""

    signal: Tensor
    codes: list[Tensor]
    others: list[Tensor]

    @property
    def distances(self) -> list[float]:
        """``‖x_j − x̂_j‖₂`` of each layer."""
        return [float((x - other).norm()) for x, other in zip(self.codes, self.others, strict=True)]


@torch.no_grad()
def distant_pair(
    problem: DeepSparse, target: int, generator: torch.Generator | None = None, worst: bool = True
) -> Pair:
    """Codes x and x̂ of one signal with a large ‖x_t − x̂_t‖₂ in layer t = `target`, from 1 to J.

    Their deepest supports are chosen greedily, so that the atoms on both are as nearly dependent as can be, and above
    they are what these atoms reach. On given supports all is linear in the deepest codes and the errors e_j: the
    distance is the largest generalised eigenvalue of ‖x_t − x̂_t‖² against the weighted sum of the squared errors,
    with the weights of the errors that are largest raised in turn. Not `worst`: random supports and values.

    Raises ValueError for a target that is no layer, codes of more non-zeros than half the atoms, no tolerance in the
    first layer (then there is but one code), or dependent atoms on both supports (then there is no largest distance).
    """
    count = len(problem.dictionaries)
    if not 1 <= target <= count:
        raise ValueError(f"target is a layer from 1 to {count}, got {target}")
    if problem.tolerances[0] == 0:
        raise ValueError("with ε_1 = 0 a signal has a single code, where the theory applies: give a tolerance above 0")
    maps = [_matrix(d, shape) for d, shape in zip(problem.dictionaries, problem.shapes[1:], strict=True)]
    if 2 * problem.sparsities[-1] > len(maps[-1]):
        raise ValueError(
            f"two codes of {problem.sparsities[-1]} non-zeros need twice as many atoms, not {len(maps[-1])}"
        )
    system = _System(maps, problem.tolerances, _supports(maps, problem.sparsities[-1], generator, worst))
    unknowns = system.farthest(target) if worst else system.drawn(generator)
    first = problem.dictionaries[0]
    codes, others = (
        [torch.from_numpy(layer @ unknowns).to(first.weight).view(1, *shape)
         for layer, shape in zip(chain, problem.shapes[1:], strict=True)]
        for chain in system.chains
    )  # fmt: skip
    return Pair(first.synthesize((codes[0] + others[0]) / 2, problem.shapes[0][-2:]), codes, others)


class _System:
    """Codes and errors as matrices that act on the unknowns: both deepest codes, and both chains' e_j for j ≥ 2.

    `chains` has a matrix a layer, for each chain; `errors` those whose product with the unknowns must not exceed 1 in
    norm. The signal lies half way between what the two chains synthesize.
    """

    def __init__(self, maps: list[np.ndarray], tolerances: list[float], supports: list[list[int]]) -> None:
        places = [_reached(maps, tolerances, support) for support in supports]
        sizes = [len(place) for chain in places for place in chain]
        blocks = iter(np.split(np.eye(sum(sizes)), np.cumsum(sizes)[:-1]))
        self.chains: list[list[np.ndarray]] = []
        self.errors: list[np.ndarray] = []
        for deepest, *above in places:
            layers = [np.zeros((len(maps[-1]), sum(sizes)))]
            layers[0][deepest] = next(blocks)
            for atoms, tolerance, place in zip(maps[:0:-1], tolerances[:0:-1], above, strict=True):
                error = next(blocks)
                layers.insert(0, atoms.T @ layers[0])
                layers[0][place] += error
                if tolerance:
                    self.errors.append(error / tolerance)
            self.chains.append(layers)
        self.errors.append(maps[0].T @ (self.chains[0][0] - self.chains[1][0]) / (2 * tolerances[0]))
        if np.linalg.matrix_rank(np.vstack(self.errors)) < sum(sizes):
            raise ValueError("the atoms on these supports are dependent: two codes can be any distance apart")

    def farthest(self, target: int) -> np.ndarray:
        difference = self.chains[0][target - 1] - self.chains[1][target - 1]
        distance, squares = difference.T @ difference, np.stack([error.T @ error for error in self.errors])
        weights, last, best = np.ones(len(squares)), len(distance) - 1, np.zeros(len(distance))
        for _ in range(ROUNDS):
            x = eigh(distance, np.tensordot(weights, squares, 1), subset_by_index=[last, last])[1][:, 0]
            sizes = self._sizes(x)
            x = x / sizes.max()
            best = max(best, x, key=lambda each: np.linalg.norm(difference @ each))
            weights = weights * (sizes / sizes.max()) ** 2
            weights = np.maximum(weights / weights.max(), 1e-4)  # 0 would leave the matrix singular
        return best

    def drawn(self, generator: torch.Generator | None) -> np.ndarray:
        x = torch.randn(self.errors[0].shape[1], dtype=torch.float64, generator=generator).numpy()
        return x / self._sizes(x).max()

    def _sizes(self, x: np.ndarray) -> np.ndarray:
        return np.array([np.linalg.norm(error @ x) for error in self.errors])


def _matrix(dictionary: Dictionary, shape: tuple[int, ...]) -> np.ndarray:
    """All atoms, translates among them, as rows."""
    size = int(np.prod(shape))
    unit = torch.eye(size, dtype=dictionary.weight.dtype, device=dictionary.weight.device).view(size, *shape)
    return dictionary.synthesize(unit).flatten(1).double().cpu().numpy()


def _supports(maps: list[np.ndarray], sparsity: int, generator: torch.Generator | None, worst: bool) -> list[list[int]]:
    """Two disjoint sets of deepest atoms; at worst, nearly dependent ones."""
    order = torch.randperm(len(maps[-1]), generator=generator)[: 2 * sparsity].tolist()
    if not worst:
        return [order[::2], order[1::2]]
    atoms = maps[-1]
    for below in reversed(maps[:-1]):
        atoms = atoms @ below
    atoms = atoms / np.linalg.norm(atoms, axis=1, keepdims=True)
    chosen = order[:1]
    while len(chosen) < 2 * sparsity:
        own = atoms[chosen]
        weakest = own.T @ np.linalg.eigh(own @ own.T)[1][:, 0]
        gains = abs(atoms @ weakest)
        gains[chosen] = -1
        chosen.append(int(gains.argmax()))
    return [chosen[::2], chosen[1::2]]


def _reached(maps: list[np.ndarray], tolerances: list[float], support: list[int]) -> list[list[int]]:
    """The deepest support, and of each layer above it where an error may lie: what the atoms reach, if any may be."""
    places = [support]
    for atoms, tolerance in zip(maps[:0:-1], tolerances[:0:-1], strict=True):
        support = np.flatnonzero(atoms[support].any(0)).tolist()
        places.append(support if tolerance else [])
    return places
