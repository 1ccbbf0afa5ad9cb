"""Slow, plain restatements of what the package computes: the tests compare against these."""

from itertools import product

import numpy as np
import torch
from scipy.optimize import minimize
from torch import Tensor

torch.set_num_threads(1)  # tensors here are tiny: threads would only wait for each other

NONNEG = {"relu": True, "soft": False, "group_relu": False, "group_relu_nonneg": True}
NONNEG |= {"sparse_group": False, "elastic": False, "hard": False, "jump_relu": True}
NONNEG |= {"top_k": False, "group_top_k": False}
GROUPED = {name: "group" in name for name in NONNEG}
CONVEX = ("relu", "soft", "group_relu", "group_relu_nonneg", "sparse_group", "elastic")


def weights(name: str, l1_ratio: float = 0.5) -> tuple[float, float, float]:
    """(a, b, e) of a convex ``Ω(u_g) = a‖u_g‖₁ + b‖u_g‖₂ + e/2‖u_g‖₂²``."""
    return {
        "sparse_group": (l1_ratio, 1 - l1_ratio, 0.0),
        "elastic": (l1_ratio, 0.0, 1 - l1_ratio),
    }.get(name, (0.0, 1.0, 0.0))


def rows(z: Tensor, size: int = 1, dim: int = 1) -> np.ndarray:
    """Groups of `size` consecutive entries along `dim` as rows: (others, groups, size)."""
    last = np.moveaxis(z.detach().double().numpy(), dim, -1)
    return last.reshape(-1, last.shape[-1] // size, size)


def unrows(values: np.ndarray, like: Tensor, dim: int = 1) -> Tensor:
    """The inverse of `rows`."""
    moved = np.moveaxis(np.empty(like.shape), dim, -1).shape
    return torch.from_numpy(np.moveaxis(values.reshape(moved), -1, dim).copy())


def penalty(name: str, z: Tensor, threshold, size: int = 1, dim: int = 1, l1_ratio: float = 0.5) -> np.ndarray:
    """λΩ(z) of each signal, by the definition; `threshold` is a number or one value a group. Convex ones and ℓ0."""
    a, b, e = weights(name, l1_ratio)
    values = []
    for signal in z:
        groups = rows(signal[None], size, dim)
        norm = np.linalg.norm(groups, axis=-1)
        omega = a * abs(groups).sum(-1) + b * norm + e / 2 * norm**2 if name in CONVEX else norm != 0
        feasible = not NONNEG[name] or (groups >= 0).all()
        values.append((threshold * omega).sum() if feasible else np.inf)
    return np.array(values)


def minimise(name: str, z: Tensor, threshold, size: int = 1, dim: int = 1, l1_ratio: float = 0.5) -> Tensor:
    """``argmin_u ½‖u − z‖² + Σ_g t_g Ω(u_g)`` of a convex Ω by a general optimiser, group by group."""
    groups = rows(z, size, dim)
    thresholds = np.broadcast_to(threshold, groups.shape[:2])
    best = np.zeros_like(groups)
    for i in np.ndindex(groups.shape[:2]):
        best[i] = _minimise_group(groups[i], thresholds[i], *weights(name, l1_ratio), NONNEG[name])
    return unrows(best, z, dim)


def _minimise_group(z: np.ndarray, t: float, a: float, b: float, e: float, nonneg: bool) -> np.ndarray:
    # With u = p − n, p ≥ 0 and n ≥ 0, the ℓ1 part is linear, and u = 0 the only kink. Without it n is 0, or free.
    split = np.concatenate([np.eye(len(z)), -np.eye(len(z))]) if a else np.eye(len(z))

    def value(x):
        u = x @ split
        norm = max(np.linalg.norm(u), 1e-300)
        slope = u - z + t * (b / norm + e) * u
        return ((u - z) ** 2).sum() / 2 + t * (
            a * x.sum() * bool(a) + b * norm + e / 2 * norm**2
        ), split @ slope + t * a

    bounds = [(0, None)] * len(split) if a or nonneg else None
    start = np.maximum(split @ z, 0) if a else z
    found = minimize(value, start, jac=True, bounds=bounds, method="L-BFGS-B", tol=1e-15)
    return found.x @ split if found.fun < (z**2).sum() / 2 else np.zeros_like(z)


def search_supports(z: Tensor, cost, nonneg: bool = False, size: int = 1) -> Tensor:
    """``argmin_u ½‖u − z‖² + cost(S)`` over the sets S of groups where u may be non-zero: each signal (batch, n).

    `cost` takes the set as a tuple of booleans and may be infinite. On a given set the best u is z, or its positive
    part.
    """
    best = []
    for signal in rows(z.flatten(1), size):
        kept = np.maximum(signal, 0) if nonneg else signal
        points = [(np.array(s)[:, None] * kept, cost(s)) for s in product((False, True), repeat=len(signal))]
        best.append(min(points, key=lambda point: ((point[0] - signal) ** 2).sum() / 2 + point[1])[0])
    return torch.from_numpy(np.stack(best)).reshape(z.shape)


def kkt_residual(
    name: str, z: Tensor, descent: Tensor, threshold, size: int = 1, dim: int = 1, l1_ratio: float = 0.5
) -> float:
    """Largest distance of the `descent` direction ``Dᵀ(x − Dz) + b`` from the subdifferential of a convex λΩ."""
    if NONNEG[name] and (z < 0).any():
        return np.inf
    a, b, e = weights(name, l1_ratio)
    u, g = rows(z, size, dim), rows(descent, size, dim)
    norm = np.linalg.norm(u, axis=-1, keepdims=True)
    t = np.broadcast_to(threshold, u.shape[:2])[..., None]
    distance = g - t * (b / np.where(norm > 0, norm, 1) + e) * u
    if NONNEG[name]:  # the normal cone of u ≥ 0 takes what points down
        distance, g = np.where(u > 0, distance, np.maximum(distance, 0)), np.maximum(g, 0)
    distance = np.where(u != 0, distance - t * a * np.sign(u), _soft(distance, t * a))
    at_zero = np.maximum(np.linalg.norm(_soft(g, t * a), axis=-1, keepdims=True) - t * b, 0)
    return float(np.where(norm > 0, np.linalg.norm(distance, axis=-1, keepdims=True), at_zero).max())


def _soft(g: np.ndarray, t: np.ndarray) -> np.ndarray:
    return np.sign(g) * np.maximum(abs(g) - t, 0)


def unfold(dictionary, size: tuple[int, int]) -> Tensor:
    """The matrix of a conv dictionary on images of `size`: a column is one atom put at one place."""
    weight = dictionary.weight.detach()
    k, s, p = dictionary.kernel_size, dictionary.stride, dictionary.padding
    height, width = ((n + 2 * p - k) // s + 1 for n in size)
    images = weight.new_zeros(len(weight), height, width, weight.shape[1], size[0] + 2 * p, size[1] + 2 * p)
    for i in range(height):
        for j in range(width):
            images[:, i, j, :, i * s : i * s + k, j * s : j * s + k] = weight
    return images[..., p : p + size[0], p : p + size[1]].flatten(3).flatten(0, 2).T


def torus_norm(weight: Tensor, stride: int, points: int) -> Tensor:
    """``‖D‖²`` of a conv dictionary on a torus of `points` code positions a side; differentiable.

    At one frequency of the code the atoms meet stride² aliased frequencies of the image.
    """
    spectrum = torch.fft.fft2(weight.double(), s=(points * stride, points * stride)) / stride
    symbol = spectrum.unflatten(-1, (stride, points)).unflatten(-3, (stride, points))  # m, c, s, N, s, N
    symbol = symbol.permute(3, 5, 0, 1, 2, 4).flatten(3).flatten(0, 1)
    return torch.linalg.matrix_norm(symbol, 2).square().max()


def operator_norm(dictionary) -> Tensor:
    """``‖D‖²``: of the matrix, or of the infinite image on a fine grid of frequencies."""
    weight = dictionary.weight.detach()
    if weight.ndim == 2:
        return torch.linalg.matrix_norm(weight.double(), 2).square()
    return torus_norm(weight, dictionary.stride, 64)
