"""Dictionary learning to compare autoencoders with: alternating minimisation, and scikit-learn's online method."""

import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from sklearn.decomposition import MiniBatchDictionaryLearning
from sklearn.exceptions import ConvergenceWarning
from torch import Tensor
from torch.nn import functional as F

from dsc.activations import create_activation
from dsc.dictionary_learning import DictionaryLearning


@dataclass(frozen=True)
class Learned:
    """What a method made of signals.

    Attributes:
        method: its name, for a table.
        atoms: the dictionary, (atoms, features), of unit norm.
        codes: of the signals over it, (signals, atoms), by the method's own encoder.
        objective: mean over the signals of ``½‖x − zD‖² + λΩ(z)``; Ω is the method's own, so that of a group norm and
            that of ℓ1 are not comparable.
        turns: passes over the signals.
        seconds: of the learning, without the codes at its end.
    """

    method: str
    atoms: Tensor
    codes: Tensor
    objective: float
    turns: int
    seconds: float

    def row(self) -> dict[str, Any]:
        """The figures of a table or a JSON file."""
        return {
            "method": self.method,
            "objective": round(self.objective, 6),
            "turns": self.turns,
            "seconds": round(self.seconds, 1),
        }


def learn(
    signals: Tensor,
    start: Tensor,
    threshold: float,
    group_size: int,
    turns: int,
    sparse_threshold: float | None = None,
    seed: int = 0,
) -> Iterator[Learned]:
    """Every baseline from the same first atoms: alternating minimisation with groups and with ℓ1, and online ℓ1.

    Args:
        signals: (signals, features).
        start: first atoms, (atoms, features).
        threshold: λ of the group norm, not scaled by the numbers of features or signals.
        group_size: atoms a group.
        turns: the most passes over the signals.
        sparse_threshold: λ of ℓ1; None for `threshold`.
        seed: of the order in which the online method sees the signals.

    Raises:
        ValueError: λ that is not positive, groups that do not tile the atoms, shapes that do not match.
    """
    sparse = threshold if sparse_threshold is None else sparse_threshold
    yield alternating_minimisation(signals, start, threshold, turns, group_size)
    yield alternating_minimisation(signals, start, sparse, turns)
    yield online_learning(signals, start, sparse, turns, seed)


def alternating_minimisation(
    signals: Tensor, start: Tensor, threshold: float, turns: int, group_size: int | None = None
) -> Learned:
    """`dsc.DictionaryLearning`: the best codes, then the best atoms, by turns (arXiv 2102.07003, equations 9 and 10).

    Ω is the group norm for a `group_size`, ℓ1 without. Shapes and errors as in `learn`.
    """
    prox = "soft" if group_size is None else "group_relu"
    learner = DictionaryLearning(
        alpha=threshold, prox=prox, group_size=group_size, max_iter=turns, transform_tol=1e-4, dict_init=start.numpy()
    )
    name = f"alternating minimisation, {'ℓ1' if group_size is None else 'group'}"
    return _learned(name, learner, signals, threshold, group_size)


def online_learning(signals: Tensor, start: Tensor, threshold: float, turns: int, seed: int = 0) -> Learned:
    """scikit-learn's `MiniBatchDictionaryLearning` (Mairal et al. 2009): ℓ1 codes of a batch, then an update of atoms.

    Shapes and errors as in `learn`.
    """
    if not threshold > 0:
        raise ValueError(f"threshold must be above 0, got {threshold}")
    learner = MiniBatchDictionaryLearning(
        n_components=len(start),
        alpha=threshold,
        max_iter=turns,
        fit_algorithm="cd",
        transform_algorithm="lasso_cd",
        transform_alpha=threshold,
        dict_init=F.normalize(start).numpy(),
        random_state=seed,
    )
    return _learned("MiniBatchDictionaryLearning, ℓ1", learner, signals, threshold)


def _learned(name: str, learner: Any, signals: Tensor, threshold: float, group_size: int | None = None) -> Learned:
    x = signals.numpy()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # `turns` is in the row
        begin = time.perf_counter()
        learner.fit(x)
        seconds = time.perf_counter() - begin
        codes = torch.as_tensor(learner.transform(x)).to(signals)
    atoms = torch.as_tensor(learner.components_).to(signals)
    omega = create_activation("group_relu" if group_size else "soft", threshold=threshold, group_size=group_size)
    objective = (signals - codes @ atoms).square().sum(1) / 2 + omega.penalty(codes)
    return Learned(name, atoms, codes, float(objective.double().mean()), int(learner.n_iter_), seconds)
