"""For classical users: `sparse_encode`, codes of signals over a given dictionary, certified by their duality gap."""

import warnings
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dsc.activations import create_activation
from dsc.active_set import ActiveSet
from dsc.dictionaries import Dictionary
from dsc.layers import SparseCoding
from dsc.prox import Prox
from dsc.solvers import FISTA, ConvergenceWarning

ROUNDS = 30  # of the active-set method; as many again in double precision
FISTA_STEPS, FISTA_BLOCKS = 50, 200  # steps between two looks at the duality gaps, and how many such blocks
CODES_AT_ONCE = 2**22  # entries, a thread
FEWEST_SIGNALS = 128  # that are worth a thread

Signals = Tensor | np.ndarray[Any, Any]


@torch.no_grad()
def sparse_encode(
    x: Signals,
    dictionary: Signals | Dictionary,
    threshold: float | list[float] | Tensor | None = None,
    prox: str | Prox = "soft",
    tol: float = 1e-4,
    return_gap: bool = False,
    **arguments: Any,
) -> Any:
    """Codes ``argmin_z ½‖x − Dz‖² + λΩ(z)`` of every signal, to a relative duality gap of at most `tol`.

    The objective is that of scikit-learn's ``sparse_encode(x, dictionary, algorithm="lasso_cd", alpha=λ)``: λ is not
    divided by the number of features, as in its `Lasso`, nor scaled otherwise. The objective P of a certified code
    obeys ``(P − P*)/P ≤ tol``, with P* the least there is.

    Args:
        x: signals (signals, features), or images (signals, channels, h, w) for a convolutional dictionary.
        dictionary: atoms as rows, (atoms, features), of any norm, as scikit-learn has them; or a `Dictionary`.
        threshold: λ > 0: a number, or one value an atom (a group, for group prox).
        prox: Ω: the name of a convex prox, or such a module, which has its own λ.
        tol: relative duality gap, above 0. What single precision does not reach is finished in double precision.
        return_gap: return ``(codes, gaps)``, with the relative duality gap of each signal.
        **arguments: of the prox, such as `group_size` and `l1_ratio`.

    Returns:
        Codes (signals, atoms), or (signals, atoms, h', w'): a tensor for a tensor, an array for an array. No gradient
        passes; `SparseCoding` has that.

    Warns:
        ConvergenceWarning: some signals have not reached `tol`: how many, and how far the last is.

    Raises:
        ValueError: shapes that do not match, a value that is not finite, an atom of zeros, a threshold that is not
            positive or has the wrong number of values, a tolerance that is not positive.
        TypeError: a prox whose penalty is not convex: nothing certifies a solution.

    A dense dictionary is served by the active-set method of `dsc.active_set`, whose cost follows the supports; any
    other by FISTA with restart, which certified signals leave.
    """
    if not tol > 0:
        raise ValueError(f"tol, a relative duality gap, must be above 0 (such as 1e-4), got {tol}")
    omega = _convex_prox(prox, threshold, arguments)
    signals = torch.as_tensor(x)
    signals = signals.to(torch.promote_types(signals.dtype, torch.float32))
    if isinstance(dictionary, Dictionary):
        codes, gaps = _encode_by_steps(signals, dictionary, omega, tol)
    else:
        atoms = torch.as_tensor(dictionary).to(signals)
        _check(signals, atoms, omega)
        codes, gaps = _encode_dense(signals, atoms, omega, tol)
    _warn_of(gaps, tol)
    if isinstance(x, Tensor):
        return (codes, gaps) if return_gap else codes
    return (codes.numpy(), gaps.numpy()) if return_gap else codes.numpy()


def _convex_prox(prox: str | Prox, threshold: Any, arguments: dict[str, Any]) -> Prox:
    if isinstance(prox, str) and threshold is None:
        raise ValueError(f"give the threshold λ > 0 of {prox!r}: sparse_encode(x, dictionary, threshold=0.1)")
    omega = create_activation(prox, threshold=threshold, **arguments)
    if not omega.is_convex:
        raise TypeError(
            f"the penalty of {prox} is not convex, so no duality gap certifies its codes: take one of relu, soft, "
            "elastic, group_relu, group_relu_nonneg, sparse_group, or a SparseCoding layer for a fixed number of steps"
        )
    if not (torch.as_tensor(omega.threshold) > 0).all():
        raise ValueError(f"threshold must be above 0 (with 0 the problem is least squares), got {omega.threshold}")
    return omega


def _check(signals: Tensor, atoms: Tensor, omega: Prox) -> None:
    if signals.ndim != 2 or atoms.ndim != 2 or signals.shape[1] != atoms.shape[1]:
        raise ValueError(
            "signals must be (signals, features) and the dictionary (atoms, features), atoms as rows; "
            f"got {tuple(signals.shape)} and {tuple(atoms.shape)}"
        )
    for name, values in (("signal", signals), ("atom", atoms)):
        wrong = ~values.isfinite().all(1)
        if wrong.any():
            raise ValueError(f"{name} {int(wrong.nonzero()[0])} has values that are not finite")
    zero = ~atoms.any(1)
    if zero.any():
        raise ValueError(f"atom {int(zero.nonzero()[0])} is zero: no code uses it, and it has no scale; remove it")
    omega.penalty(atoms.new_zeros(1, len(atoms)))  # says what is wrong with groups or a threshold of the wrong size


def _encode_dense(x: Tensor, atoms: Tensor, omega: Prox, tol: float) -> tuple[Tensor, Tensor]:
    codes, gaps = _in_parts(ActiveSet(atoms, omega), tol, x)
    left = (gaps > tol).nonzero().squeeze(1)
    if len(left) and x.dtype != torch.float64:
        solver = ActiveSet(atoms.double(), omega)
        better, gaps[left] = _in_parts(solver, tol, x[left].double(), codes[left].double())
        codes[left] = better.to(codes.dtype)
    return codes, gaps


def _in_parts(solver: ActiveSet, tol: float, x: Tensor, start: Tensor | None = None) -> tuple[Tensor, Tensor]:
    # Signals are independent, and the small operations of a part do not spread over threads: so whole parts do.
    threads = min(torch.get_num_threads(), -(-len(x) // FEWEST_SIGNALS)) if x.device.type == "cpu" else 1
    size = max(1, min(-(-len(x) // max(threads, 1)), CODES_AT_ONCE // len(solver.atoms)))
    parts = x.split(size)
    starts = [None] * len(parts) if start is None else start.split(size)
    if threads <= 1 or len(parts) == 1:
        return _joined(solver.solve(part, tol, ROUNDS, first) for part, first in zip(parts, starts, strict=True))

    def alone(part: Tensor, first: Tensor | None) -> tuple[Tensor, Tensor]:
        torch.set_num_threads(1)  # of this worker; for a new thread it holds until it is set back below
        with torch.no_grad():  # which is a thread's own, too
            return solver.solve(part, tol, ROUNDS, first)

    before = torch.get_num_threads()
    try:
        with ThreadPoolExecutor(threads) as pool:
            return _joined(pool.map(alone, parts, starts))
    finally:
        torch.set_num_threads(before)


def _joined(results: Iterable[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    codes, gaps = zip(*results, strict=True)
    return torch.cat(codes), torch.cat(gaps)


def _encode_by_steps(x: Tensor, dictionary: Dictionary, omega: Prox, tol: float) -> tuple[Tensor, Tensor]:
    if not x.isfinite().all():
        raise ValueError("the signals have values that are not finite")
    training = dictionary.training
    layer = SparseCoding(dictionary, omega).eval()  # steps of the certified 1/L
    solver = FISTA(FISTA_STEPS, restart=True)
    codes = layer.solve(x, solver)
    gaps = layer.relative_gap(x, codes)
    for _ in range(FISTA_BLOCKS):
        left = (gaps > tol).nonzero().squeeze(1)
        if len(left) == 0:
            break
        better = layer.solve(x[left], solver, start=codes[left])
        codes[left], gaps[left] = better, layer.relative_gap(x[left], better)
    dictionary.train(training)
    return codes, gaps


def _warn_of(gaps: Tensor, tol: float) -> None:
    left = gaps > tol
    if left.any():
        warnings.warn(
            f"{int(left.sum())} of {len(gaps)} signals have not reached the relative duality gap tol={tol:g}: "
            f"the farthest is at {float(gaps.max()):.2g}",
            ConvergenceWarning,
            stacklevel=3,
        )
