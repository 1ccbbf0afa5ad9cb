"""How a gradient passes a solver of K steps ``z_{k+1} = T(z_k)``, ``T(z) = prox(z + s Dᵀ(x − Dz), s)``.

============ =========================== ==========================================================================
mode         keeps for the backward pass gradient
============ =========================== ==========================================================================
`unroll`     K steps                     of the K steps, exact
`checkpoint` K codes and one step        the same; each step is computed once more
`last`       one step                    of the last step, with the code it starts from held fixed: biased
`implicit`   one step                    of the fixed point ``z = T(z)``: exact where the code has converged
============ =========================== ==========================================================================

The bias of `last`: of ``∂z*/∂θ = Σ_j (∂T/∂z)ʲ ∂T/∂θ`` it keeps the term j = 0. For the lasso with 64 features and 128
atoms (`benchmarks/layer.py`), its gradient of the dictionary has a cosine of 0.98, 0.92, 0.72 and 0.31 with the exact
one where a code has 2, 9, 28 and 51 non-zeros, and 0.17, 0.15, 0.09 and 0.04 of its length.

Sources: Chen et al. 2016, arXiv 1604.06174 (checkpoints); Bai, Kolter and Koltun 2019, arXiv 1909.01377, and Bertrand
et al. 2020, arXiv 2002.08943 (implicit differentiation, on the support of the lasso); Fung et al. 2022, arXiv
2103.12803 (`last`, "Jacobian-free").
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

Gradient = Literal["unroll", "checkpoint", "last", "implicit"]
Step = Callable[[Tensor], Tensor]
Codes = TypeVar("Codes", Tensor, list[Tensor])

TOLERANCE = {torch.float32: 1e-6, torch.float64: 1e-12}  # relative residual of the adjoint system
MAX_PRODUCTS = 1000


@dataclass(frozen=True)
class ProximalStep:
    """``T(z) = shrink(descend(z))``: a gradient step, then a prox."""

    descend: Step
    shrink: Step

    def __call__(self, z: Tensor) -> Tensor:
        return self.shrink(self.descend(z))


def checkpointed(step: Callable[[Tensor], Codes]) -> Callable[[Tensor], Codes]:
    """The same step, which keeps its input alone and is computed again in the backward pass."""
    return lambda z: checkpoint(step, z, use_reentrant=False, preserve_rng_state=False)


@torch.compiler.disable(reason="gradient='implicit' solves a linear system in its backward pass: compile without it")
def implicit(step: Step, start: Tensor, damping: float = 0.0) -> Tensor:
    """``T(start)``, whose gradient is that of the fixed point ``z = T(z)``, which `start` should be.

    With P and N = I − sDᵀD the (symmetric) Jacobians of the prox and of the gradient step, the gradient v of the code
    becomes the solution u of ``(I − NP)u = v``, and passes from there through this one step to x, D, b and λ. The
    operator I − NP is symmetric and positive semi-definite in the inner product ⟨·, P·⟩, where conjugate gradients
    solve for ``y = Pu``, which lives on the support; there the system is ``(P⁺ − I + s D_SᵀD_S) y = v``. Each signal
    has its own, and stops on its own. Memory is that of one step and of a few codes.

    The size of the step has no gradient, as it does not move the fixed point: `step` is to hold it constant.

    Args:
        step: T, a `ProximalStep` of a convex penalty.
        start: the converged code, shape (batch, …).
        damping: ridge ``damping/s`` added to D_SᵀD_S: the answer is then that of a problem regularised so, and exists
            where ``D_SᵀD_S`` is singular. 0 for the exact one.

    Raises:
        ValueError: a step that is no `ProximalStep`.
        TypeError: a code in half precision, which does not get near enough to its limit.
        torch.linalg.LinAlgError: in the backward pass, where ``D_SᵀD_S`` is singular to working precision.
    """
    if not isinstance(step, ProximalStep):
        raise ValueError("gradient='implicit' belongs to a single layer; here 'unroll', 'checkpoint' or 'last'")
    if start.dtype not in TOLERANCE:
        raise TypeError(f"an implicit gradient needs codes in float32 or float64 (no autocast), got {start.dtype}")
    point = start.detach().requires_grad_()
    moved = step.descend(point)
    code = step.shrink(moved)

    def prox_product(v: Tensor) -> Tensor:
        return torch.autograd.grad(code, moved, v, retain_graph=True)[0]

    def descent_product(y: Tensor) -> Tensor:
        return torch.autograd.grad(moved, point, y, retain_graph=True)[0] - damping * y

    def adjoint(v: Tensor) -> Tensor:
        return v + descent_product(solve_on_support(prox_product, descent_product, v, TOLERANCE[v.dtype]))

    return _Adjoint.apply(code, adjoint)


class _Adjoint(torch.autograd.Function):
    """The identity, whose gradient passes `adjoint`; it has no second derivative."""

    @staticmethod
    def forward(ctx: Any, code: Tensor, adjoint: Step) -> Tensor:
        ctx.adjoint = adjoint
        return code.detach()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return ctx.adjoint(grad), None


def solve_on_support(prox_product: Step, descent_product: Step, v: Tensor, tolerance: float) -> Tensor:
    """``y = Pu`` of ``(I − NP)u = v`` from the products with P and N, by conjugate gradients; shape of `v`.

    Stops where every signal's residual, in the norm ‖·‖_P, is at most `tolerance` times that of v.

    Raises:
        torch.linalg.LinAlgError: I − NP is singular on the range of P, or nearly so.
    """
    y = torch.zeros_like(v)
    residual, direction = v, v
    shrunk = image = prox_product(v)  # P residual and P direction
    power = _dots(residual, shrunk)
    goal = tolerance**2 * power
    floor = 8 * torch.finfo(v.dtype).eps
    for _ in range(MAX_PRODUCTS):
        unsolved = power > goal
        if not unsolved.any():
            return y
        turned = direction - descent_product(image)
        curvature, scale = _dots(image, turned), _dots(image, direction)
        _check(unsolved & (curvature <= floor * scale), image, "is singular to working precision")
        length = torch.where(unsolved, power / curvature, 0)
        y = y + length * image
        residual = residual - length * turned
        shrunk = prox_product(residual)
        former, power = power, _dots(residual, shrunk)
        bend = torch.where(unsolved, power / former, 0)
        direction, image = residual + bend * direction, shrunk + bend * image
    _check(power > goal, image, f"is nearly singular: {MAX_PRODUCTS} conjugate gradient steps do not solve with it")
    return y


def _dots(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).flatten(1).sum(1).reshape(-1, *[1] * (a.ndim - 1))


def _check(failed: Tensor, support: Tensor, what: str) -> None:
    if failed.any():
        i = int(failed.flatten().nonzero()[0])
        entries = int((support[i] != 0).sum())
        raise torch.linalg.LinAlgError(  # type: ignore[attr-defined]
            f"no implicit gradient: D_SᵀD_S on the support of signal {i} ({entries} entries) {what}. More steps or a "
            "tol bring the code nearer to its limit, which has a smaller support; damping > 0 regularises; "
            "gradient='unroll' needs no inverse"
        )
