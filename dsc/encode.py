"""For classical users: `sparse_encode`, codes of signals over a given dictionary, certified by their duality gap."""

import copy
import warnings
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dsc._names import unknown
from dsc.activations import PROX, create_activation, list_activations
from dsc.active_set import STALLED_BELOW, ActiveSet
from dsc.dictionaries import ConvDictionary, DenseDictionary, Dictionary
from dsc.layers import SparseCoding
from dsc.prox import Prox
from dsc.solvers import FISTA, ConvergenceWarning

ROUNDS = 30  # of the active-set method; as many again in double precision
STEPS, BLOCKS = FISTA(50, restart=True), 400  # between two looks at the duality gaps, and how many such blocks
FIRST_BLOCKS, COARSE = 2, 1e-8  # of those, before the active-set method, with groups, for tolerances from this on
NEAR = 0.1  # relative gap of a code worth starting from
MOST_ATOMS = 2**14  # whose Gram matrix, of 1 GiB in single precision, the active-set method takes
CODES_AT_ONCE = 2**22  # entries, a thread
FEWEST_SIGNALS = 128  # that are worth a thread

CONVEX = [name for name, kind in PROX.items() if kind.is_convex]
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
        x: signals (signals, features), images (signals, channels, h, w) for a convolutional dictionary, or batches of
            what a dictionary of your own analyzes.
        dictionary: atoms as rows, (atoms, features), of any norm, as scikit-learn has them; or a `Dictionary`.
        threshold: λ > 0: a number, or one value an atom (a group, for group prox).
        prox: Ω: the name of a convex prox, or such a module, which has its own λ.
        tol: relative duality gap, between 0 and 1. What single precision does not reach is finished in double
            precision, certified there, and rounded back.
        return_gap: return ``(codes, gaps)``, with the relative duality gap of each signal.
        **arguments: of the prox, such as `group_size` and `l1_ratio`.

    Returns:
        Codes (signals, atoms), or (signals, atoms, h', w'): a tensor for a tensor, an array for an array. No gradient
        passes; `SparseCoding` has that.

    Warns:
        ConvergenceWarning: some signals have not reached `tol`: how many, and how far the last is.

    Raises:
        ValueError: shapes that do not match, a value that is not finite, an atom of zeros, a threshold that is not
            positive or has the wrong number of values, a tolerance outside (0, 1).
        TypeError: a prox whose penalty is not convex: nothing certifies a solution.

    A dense dictionary is served by the active-set method of `dsc.active_set`, whose cost follows the supports (with
    groups, and unless tol is below 1e-8, after a hundred steps of FISTA); any other, and one of more than 16,384 atoms,
    by FISTA with restart, which certified signals leave. With the extra ``deep-sparse-coding[numba]`` an ℓ1,
    non-negative or elastic code takes a fraction of the time on a CPU (`dsc.coordinate_descent`), after the second or
    so that a process's first call takes to load it.
    """
    if not (isinstance(tol, int | float) and 0 < tol < 1):
        raise ValueError(f"tol, a relative duality gap, must lie between 0 and 1 (such as 1e-4), got {tol!r}")
    signals = _tensor(x, "signals")
    signals = signals.to(torch.promote_types(signals.dtype, torch.float32))
    omega = _convex_prox(prox, threshold, arguments, signals)
    if isinstance(dictionary, DenseDictionary):
        dictionary = dictionary.weight.detach()
    if isinstance(dictionary, Dictionary):
        coder = SparseCoding(copy.deepcopy(dictionary), omega).to(signals).eval()  # in steps of the certified 1/L
        if isinstance(dictionary, ConvDictionary):
            _check_images(signals, dictionary)
        _check_finite("signal", signals)
        _check_finite("atom", dictionary.weight)
        codes, gaps = _encode_by_steps(signals, coder, tol)
    else:
        atoms = _tensor(dictionary, "the dictionary").to(signals)
        _check(signals, atoms, omega)
        codes, gaps = _encode_dense(signals, atoms, omega, tol)
    _warn_of(gaps, tol)
    if isinstance(x, Tensor):
        return (codes, gaps) if return_gap else codes
    return (codes.numpy(), gaps.numpy()) if return_gap else codes.numpy()


def _tensor(values: Any, name: str) -> Tensor:
    if isinstance(values, Tensor):
        tensor = values.detach()
    else:
        array = np.asarray(values)
        native = array.astype(array.dtype.newbyteorder("="), copy=False)
        tensor = torch.from_numpy(np.require(native, requirements=["C", "W"]))  # copies only what torch cannot share
    if tensor.is_complex():
        raise ValueError(f"{name} must be real numbers, got {tensor.dtype}")
    return tensor


def _convex_prox(prox: str | Prox, threshold: Any, arguments: dict[str, Any], signals: Tensor) -> Prox:
    kind = PROX.get(prox) if isinstance(prox, str) else prox
    if (kind is None and prox in list_activations()) or (kind is not None and not kind.is_convex):
        raise TypeError(
            f"the penalty of {prox} is not convex, so no duality gap certifies its codes: take one of "
            f"{', '.join(CONVEX)}, or a SparseCoding layer for a fixed number of steps"
        )
    if kind is None:
        raise ValueError(unknown("prox", str(prox), CONVEX))
    if "alpha" in arguments:
        raise ValueError("scikit-learn's alpha is threshold here, in the same units: give threshold")
    if isinstance(prox, str) and threshold is None:
        raise ValueError(f"give the threshold λ > 0 of {prox!r}: sparse_encode(x, dictionary, threshold=0.1)")
    if threshold is not None and not isinstance(threshold, int | float):
        threshold = torch.as_tensor(threshold).to(signals)
    value = prox.threshold if isinstance(prox, Prox) else threshold
    if not (torch.as_tensor(value) > 0).all():
        raise ValueError(f"threshold must be above 0 (with 0 the problem is least squares), got {value}")
    return copy.deepcopy(create_activation(prox, threshold=threshold, **arguments))


def _check(signals: Tensor, atoms: Tensor, omega: Prox) -> None:
    if signals.ndim != 2 or atoms.ndim != 2 or signals.shape[1] != atoms.shape[1]:
        turned = " (is the dictionary transposed?)" if atoms.ndim == 2 and signals.shape[-1:] == atoms.shape[:1] else ""
        raise ValueError(
            "signals must be (signals, features) and the dictionary (atoms, features), atoms as rows; "
            f"got {tuple(signals.shape)} and {tuple(atoms.shape)}{turned}"
        )
    if atoms.numel() == 0:
        raise ValueError(f"the dictionary has no atoms or no features: {tuple(atoms.shape)}")
    for name, values in (("signal", signals), ("atom", atoms)):
        _check_finite(name, values)
    zero = ~atoms.any(1)
    if zero.any():
        raise ValueError(f"atom {int(zero.nonzero()[0])} is zero: no code uses it, and it has no scale; remove it")
    omega.penalty(atoms.new_zeros(1, len(atoms)))  # says what is wrong with groups or a threshold of the wrong size


def _check_images(signals: Tensor, dictionary: ConvDictionary) -> None:
    channels = dictionary.weight.shape[1]
    if signals.ndim != 4 or signals.shape[1] != channels:
        raise ValueError(f"signals must be images (signals, {channels}, height, width), got {tuple(signals.shape)}")


def _check_finite(name: str, values: Tensor) -> None:
    wrong = ~values.flatten(1).isfinite().all(1)
    if wrong.any():
        raise ValueError(f"{name} {int(wrong.nonzero()[0])} has values that are not finite")


def _encode_dense(x: Tensor, atoms: Tensor, omega: Prox, tol: float) -> tuple[Tensor, Tensor]:
    if len(atoms) > MOST_ATOMS:
        return _encode_by_steps(x, _coder(atoms, omega), tol)
    if omega.is_grouped and tol >= COARSE:  # greedy steps are dear with groups: what FISTA soon certifies needs none
        codes, gaps = _by_steps(x, _coder(atoms, omega), tol, FIRST_BLOCKS)
    else:
        codes, gaps = x.new_zeros(len(x), len(atoms)), x.new_full((len(x),), torch.inf, dtype=torch.float64)
    for dtype in dict.fromkeys((x.dtype, torch.float64)):
        left = _uncertified(gaps, tol)
        if len(left):
            near = gaps[left, None] < NEAR  # single precision may have led astray
            start = torch.where(near, codes[left], 0).to(dtype) if near.any() else None
            better, gaps[left] = _in_parts(ActiveSet(atoms.to(dtype), omega), tol, x[left].to(dtype), start)
            codes[left] = better.to(codes.dtype)
    return codes, gaps


def _coder(atoms: Tensor, omega: Prox) -> SparseCoding:
    return SparseCoding(DenseDictionary.from_atoms(atoms), omega).eval()


def _in_parts(solver: ActiveSet, tol: float, x: Tensor, start: Tensor | None) -> tuple[Tensor, Tensor]:
    # Signals are independent, and the small operations of a part do not spread over threads: so whole parts do.
    threads = min(torch.get_num_threads(), -(-len(x) // FEWEST_SIGNALS)) if x.device.type == "cpu" else 1
    size = max(1, min(-(-len(x) // threads), CODES_AT_ONCE // len(solver.atoms)))
    parts = x.split(size)
    starts = [None] * len(parts) if start is None else start.split(size)
    if threads == 1 or len(parts) == 1:
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


def _encode_by_steps(x: Tensor, coder: SparseCoding, tol: float) -> tuple[Tensor, Tensor]:
    codes, gaps = _by_steps(x, coder, tol, BLOCKS)
    left = _uncertified(gaps, tol)
    if len(left) and x.dtype != torch.float64:
        better, gaps[left] = _by_steps(x[left].double(), coder.double(), tol, BLOCKS, codes[left].double())
        codes[left] = better.to(codes.dtype)
    return codes, gaps


def _by_steps(
    x: Tensor, coder: SparseCoding, tol: float, blocks: int, start: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    # Certified signals leave the batch; where single precision brings nobody nearer all do.
    codes = coder.solve(x, STEPS, start=start)
    gaps = coder.relative_gap(x, codes)
    for _ in range(blocks - 1):
        open_ = _uncertified(gaps, tol)
        if len(open_) == 0:
            break
        better = coder.solve(x[open_], STEPS, start=codes[open_])
        gap, before = coder.relative_gap(x[open_], better), gaps[open_]
        codes[open_], gaps[open_] = better, gap
        if x.dtype != torch.float64 and (gap < STALLED_BELOW[x.dtype]).all() and (gap > 0.9 * before).all():
            break
    return codes, gaps


def _uncertified(gaps: Tensor, tol: float) -> Tensor:
    # A gap that is no number certifies nothing.
    return (~(gaps <= tol)).nonzero().squeeze(1)


def _warn_of(gaps: Tensor, tol: float) -> None:
    left = len(_uncertified(gaps, tol))
    if left:
        warnings.warn(
            f"{left} of {len(gaps)} signals have not reached the relative duality gap tol={tol:g}: "
            f"the farthest is at {float(gaps.max()):.2g}",
            ConvergenceWarning,
            stacklevel=4,
        )
