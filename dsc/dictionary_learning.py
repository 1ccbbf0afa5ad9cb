"""Dictionary learning by alternating minimisation, the classical baseline, as a scikit-learn estimator."""

import warnings
from numbers import Integral, Real
from typing import Any, ClassVar, Self

import numpy as np
import torch
from sklearn.base import BaseEstimator, ClassNamePrefixFeaturesOutMixin, TransformerMixin
from sklearn.exceptions import ConvergenceWarning
from sklearn.utils import check_array, check_random_state
from sklearn.utils._param_validation import Interval
from sklearn.utils.validation import check_is_fitted, validate_data
from torch import Tensor
from torch.nn.functional import normalize

from dsc._names import unknown
from dsc.activations import create_activation
from dsc.encode import CONVEX, sparse_encode
from dsc.prox import Prox

SWEEPS = 5  # over the atoms, a turn: with 30 of them it ends no lower, and not in fewer turns
DTYPES = [np.float64, np.float32]

Array = np.ndarray[Any, Any]


class DictionaryLearning(ClassNamePrefixFeaturesOutMixin, TransformerMixin, BaseEstimator):  # type: ignore[misc]
    """A dictionary for given signals, found together with their sparse codes.

    It minimises ``Σ_i ½‖x_i − z_i D‖² + α Ω(z_i)`` over the codes z and the dictionary D, whose atoms, its rows, have
    unit norm, by turns: codes with D fixed, each certified by `sparse_encode`; then least squares for D with the codes
    fixed. Neither raises the objective, to within `transform_tol`: it ends in a local minimum. With
    ``prox="group_relu"`` this is the classical baseline of group-sparse autoencoders (arXiv 2102.07003, equations 9
    and 10).

    The objective, `alpha`, `error_` and the stopping rule are those of `sklearn.decomposition.DictionaryLearning`,
    which has ℓ1 alone; `transform` has the same objective as `fit`.

    Args:
        n_components: number of atoms; None for as many as `dict_init` has, or as there are features.
        alpha: α > 0, not scaled by the numbers of features or signals.
        prox: Ω, by the name of its prox: soft (ℓ1), relu (ℓ1, z ≥ 0), elastic, group_relu, group_relu_nonneg (z ≥ 0) or
            sparse_group.
        group_size: atoms a group, for group prox (8 if None).
        l1_ratio: of elastic and sparse_group (0.5 if None).
        max_iter: the most turns.
        tol: relative decrease of the objective in a turn, at or below which it has converged.
        transform_alpha: α in `transform`; None for `alpha`.
        transform_tol: relative duality gap of every code, in `fit` too, between 0 and 1.
        dict_init: first atoms (n_components, n_features), of any norm; None for signals drawn at random.
        random_state: of that draw. Atoms that no code uses are replaced by the signals represented worst.

    Attributes:
        components_: D, unit-norm atoms (n_components, n_features).
        error_: the objective after each turn, (n_iter_,).
        n_iter_: turns taken.
        n_features_in_, feature_names_in_: as in every estimator.

    Warns:
        sklearn.exceptions.ConvergenceWarning: `fit` has taken `max_iter` turns and not converged.

    Raises:
        ValueError: a parameter out of its range, a prox that is none of these or does not take `group_size` or
            `l1_ratio`, groups that do not divide `n_components`, `dict_init` of another shape, X that is not finite.
    """

    _parameter_constraints: ClassVar[dict[str, list[Any]]] = {
        "n_components": [Interval(Integral, 1, None, closed="left"), None],
        "alpha": [Interval(Real, 0, None, closed="neither")],
        "prox": [str],
        "group_size": [Interval(Integral, 1, None, closed="left"), None],
        "l1_ratio": [Interval(Real, 0, 1, closed="both"), None],
        "max_iter": [Interval(Integral, 1, None, closed="left")],
        "tol": [Interval(Real, 0, None, closed="left")],
        "transform_alpha": [Interval(Real, 0, None, closed="neither"), None],
        "transform_tol": [Interval(Real, 0, 1, closed="neither")],
        "dict_init": ["array-like", None],
        "random_state": ["random_state"],
    }

    def __init__(
        self,
        n_components: int | None = None,
        *,
        alpha: float = 1.0,
        prox: str = "soft",
        group_size: int | None = None,
        l1_ratio: float | None = None,
        max_iter: int = 1000,
        tol: float = 1e-5,
        transform_alpha: float | None = None,
        transform_tol: float = 1e-6,
        dict_init: Array | None = None,
        random_state: int | np.random.RandomState | None = None,
    ) -> None:
        self.n_components = n_components
        self.alpha = alpha
        self.prox = prox
        self.group_size = group_size
        self.l1_ratio = l1_ratio
        self.max_iter = max_iter
        self.tol = tol
        self.transform_alpha = transform_alpha
        self.transform_tol = transform_tol
        self.dict_init = dict_init
        self.random_state = random_state

    def fit(self, X: Any, y: object = None) -> Self:
        """Learn the dictionary of the signals `X`, (signals, features); `y` is not used."""
        self._validate_params()
        x = torch.from_numpy(validate_data(self, X, dtype=DTYPES, order="C", force_writeable=True))
        random, omega = check_random_state(self.random_state), self._omega(self.alpha)
        atoms = self._first_atoms(x, omega, random)
        errors: list[float] = []
        while len(errors) < self.max_iter:
            codes = sparse_encode(x, atoms, prox=omega, tol=float(self.transform_tol))
            atoms, codes = improved_atoms(x, codes, atoms)
            residual = x - codes @ atoms
            errors.append(float(residual.double().square().sum() / 2 + omega.penalty(codes).double().sum()))
            unused = ~codes.any(0)
            if unused.any():  # which leaves ZD as it is
                worst = residual.square().sum(1).argsort(descending=True, stable=True)
                atoms[unused] = signals_as_atoms(x[worst], int(unused.sum()), omega, random)
            if len(errors) > 1 and errors[-2] - errors[-1] <= self.tol * errors[-2]:
                break
        else:
            warnings.warn(
                f"not converged to tol={self.tol:g} in max_iter={self.max_iter} turns: raise one of the two",
                ConvergenceWarning,
                stacklevel=2,
            )
        self.components_, self.error_, self.n_iter_ = atoms.numpy(), np.array(errors), len(errors)
        return self

    def transform(self, X: Any) -> Array:
        """Codes (signals, n_components) of the signals `X`, by `sparse_encode`."""
        check_is_fitted(self)
        x = validate_data(self, X, dtype=DTYPES, order="C", force_writeable=True, reset=False)
        alpha = self.alpha if self.transform_alpha is None else self.transform_alpha
        codes: Array = sparse_encode(x, self.components_, prox=self._omega(alpha), tol=float(self.transform_tol))
        return codes

    def inverse_transform(self, X: Any) -> Array:
        """Signals (signals, n_features) that the codes `X`, (signals, n_components), stand for: ``zD``."""
        check_is_fitted(self)
        codes = check_array(X, dtype=DTYPES)
        if codes.shape[1] != len(self.components_):
            raise ValueError(f"codes have {codes.shape[1]} entries, expected {len(self.components_)}, one an atom")
        return codes @ self.components_

    def _omega(self, alpha: float) -> Prox:
        if self.prox not in CONVEX:
            raise ValueError(unknown("convex prox", self.prox, CONVEX))
        size = None if self.group_size is None else int(self.group_size)  # a grid may hold NumPy's integers
        return create_activation(self.prox, threshold=float(alpha), group_size=size, l1_ratio=self.l1_ratio)

    def _first_atoms(self, x: Tensor, omega: Prox, random: np.random.RandomState) -> Tensor:
        if self.dict_init is None:
            count = x.shape[1] if self.n_components is None else self.n_components
            _check_groups(count, omega)
            return signals_as_atoms(x[torch.from_numpy(random.permutation(len(x)))], count, omega, random)
        atoms = torch.tensor(check_array(self.dict_init, input_name="dict_init"), dtype=x.dtype)
        expected = (len(atoms) if self.n_components is None else self.n_components, x.shape[1])
        if atoms.shape != expected:
            raise ValueError(
                f"dict_init has shape {tuple(atoms.shape)}, expected (n_components, n_features) = {expected}"
            )
        _check_groups(len(atoms), omega)
        return normalize(atoms)

    @property
    def _n_features_out(self) -> int:
        return len(self.components_)

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.transformer_tags.preserves_dtype = ["float64", "float32"]
        return tags


def improved_atoms(x: Tensor, codes: Tensor, atoms: Tensor) -> tuple[Tensor, Tensor]:
    """Unit-norm atoms from ``min_D ½‖X − ZD‖²`` subject to ``‖d_j‖ ≤ 1``, and codes scaled to go with them.

    By block coordinate descent on the normal equations, an atom at a time (Mairal et al. 2009, algorithm 2). An atom
    that ends inside its ball is stretched to unit norm and its code entries shrink, which lowers Ω and leaves ZD as it
    is; so the objective does not rise. Without the bound it would: shrunk codes ask for atoms longer than 1, and to
    normalise these (MOD, Engan et al. 1999) makes the codes larger. Atoms that no code uses stay as they are.
    """
    gram, cross, improved = codes.mT @ codes, codes.mT @ x, atoms.clone()
    used = gram.diagonal().nonzero().squeeze(1).tolist()
    for _ in range(SWEEPS):
        for j in used:
            best = improved[j] + (cross[j] - gram[j] @ improved) / gram[j, j]
            improved[j] = best / best.norm().clamp_min(1)
    norms = improved.norm(dim=1)
    improved = torch.where(norms[:, None] > 0, improved / norms[:, None], atoms)
    return improved, codes * norms


def signals_as_atoms(x: Tensor, count: int, omega: Prox, random: np.random.RandomState) -> Tensor:
    """`count` unit-norm atoms: the first signals of `x` that are not zero, one a group of `omega`.

    The group's other atoms complete it to an orthonormal basis of this signal and those that resemble it most, for
    groups that start from unrelated signals end in poor local minima. What is missing after that has random directions.
    """
    size = omega.group_size_of(count)
    unit = normalize(x[x.any(1)])
    groups = torch.from_numpy(random.standard_normal((-(-count // size), size, x.shape[1]))).to(x)
    seeds = unit[: len(groups)]
    alike = unit[(seeds @ unit.mT).topk(min(size, len(unit))).indices]
    basis, r = torch.linalg.qr(alike.mT)
    basis = torch.where(r.diagonal(dim1=1, dim2=2)[:, None] < 0, -basis, basis).mT  # the signal itself, not −x
    groups[: len(seeds), : basis.shape[1]] = basis
    return normalize(groups.flatten(0, 1)[:count])


def _check_groups(count: int, omega: Prox) -> None:
    size = omega.group_size_of(count)
    if count % size:
        below = count - count % size
        nearest = f"{below} or {below + size}" if below else f"{size}"
        raise ValueError(f"group_size={size} does not divide n_components={count}; nearest that it divides: {nearest}")
