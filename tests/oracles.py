"""Slow, plain restatements of what the package computes: the tests compare against these."""

import numpy as np
import torch
from scipy.optimize import minimize
from torch import Tensor

torch.set_num_threads(1)  # tensors here are tiny: threads would only wait for each other

NONNEG = {"relu": True, "soft": False, "group_relu": False, "group_relu_nonneg": True}
GROUPED = {"relu": False, "soft": False, "group_relu": True, "group_relu_nonneg": True}


def rows(z: Tensor, size: int = 1, dim: int = 1) -> np.ndarray:
    """Groups of `size` consecutive entries along `dim` as rows: (others, groups, size)."""
    last = np.moveaxis(z.detach().double().numpy(), dim, -1)
    return last.reshape(-1, last.shape[-1] // size, size)


def unrows(values: np.ndarray, like: Tensor, dim: int = 1) -> Tensor:
    """The inverse of `rows`."""
    moved = np.moveaxis(np.empty(like.shape), dim, -1).shape
    return torch.from_numpy(np.moveaxis(values.reshape(moved), -1, dim).copy())


def penalty(name: str, z: Tensor, threshold, size: int = 1, dim: int = 1) -> np.ndarray:
    """λΩ(z) of each signal, by the definition; `threshold` is a number or one value a group."""
    values = []
    for signal in z:
        groups = rows(signal[None], size, dim)
        feasible = not NONNEG[name] or (groups >= 0).all()
        values.append((threshold * np.linalg.norm(groups, axis=-1)).sum() if feasible else np.inf)
    return np.array(values)


def minimise(name: str, z: Tensor, threshold, size: int = 1, dim: int = 1) -> Tensor:
    """``argmin_u ½‖u − z‖² + Σ_g t_g ‖u_g‖₂`` by a general optimiser, group by group."""
    groups = rows(z, size, dim)
    thresholds = np.broadcast_to(threshold, groups.shape[:2])
    best = np.zeros_like(groups)  # u = 0 is the only kink: elsewhere the objective is smooth
    for i in np.ndindex(groups.shape[:2]):
        target, t = groups[i], thresholds[i]

        def value(u, target=target, t=t):
            norm = max(np.linalg.norm(u), 1e-300)
            return ((u - target) ** 2).sum() / 2 + t * norm, u - target + t * u / norm

        bounds = [(0, None)] * size if NONNEG[name] else None
        found = minimize(value, target, jac=True, bounds=bounds, method="L-BFGS-B", tol=1e-15)
        if found.fun < (target**2).sum() / 2:
            best[i] = found.x
    return unrows(best, z, dim)


def kkt_residual(name: str, z: Tensor, descent: Tensor, threshold, size: int = 1, dim: int = 1) -> float:
    """Largest distance of the `descent` direction ``Dᵀ(x − Dz) + b`` from the subdifferential of λΩ."""
    if NONNEG[name] and (z < 0).any():
        return np.inf
    u, g = rows(z, size, dim), rows(descent, size, dim)
    norm = np.linalg.norm(u, axis=-1, keepdims=True)
    t = np.broadcast_to(threshold, u.shape[:2])[..., None]
    distance = g - t * u / np.where(norm > 0, norm, 1)
    if NONNEG[name]:  # the normal cone of u ≥ 0 takes what points down
        distance, g = np.where(u > 0, distance, np.maximum(distance, 0)), np.maximum(g, 0)
    at_zero = np.maximum(np.linalg.norm(g, axis=-1, keepdims=True) - t, 0)
    return float(np.where(norm > 0, np.linalg.norm(distance, axis=-1, keepdims=True), at_zero).max())


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
