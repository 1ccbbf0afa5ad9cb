"""The solver loop, written once over a ``step``; ISTA and FISTA differ by their momentum rule.

`steps` counts proximal steps from zero. The first is given by the layer (from zero the synthesis vanishes), so a
solver with one step is a convolution and an activation. Sources: Daubechies et al. 2004 (ISTA); Beck and
Teboulle 2009 (FISTA); O'Donoghue and Candès 2015 (adaptive restart).
"""

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal, get_args

import torch
from torch import Tensor

from dsc._names import unknown
from dsc.certificates import fixed_point_residual
from dsc.gradients import Gradient, Step, checkpointed, implicit

Criterion = Literal["residual", "gap"]
Measure = Callable[[Tensor], Tensor]
GAP_EVERY = 10  # steps between two evaluations of the gap, each of which costs about a step


class ConvergenceWarning(UserWarning):
    """A solver took all the steps it may and has not reached its tolerance."""


@dataclass(frozen=True)
class ISTA:
    """Proximal gradient: ``z_{k+1} = step(z_k)``; its objective falls like O(1/k).

    Args:
        steps: proximal steps from zero, at least 1; with a tolerance, the most to take.
        tol: stop once the criterion of every signal is at most this, or warn (`ConvergenceWarning`). Each test waits
            for the device, and has no place in a compiled program. None: always all steps.
        criterion: "residual", ``‖z_k − y_k‖/‖z_k‖`` with y_k the point that led to z_k by one step: at least the
            fixed-point residual ``‖z_k − step(z_k)‖/‖z_k‖``. "gap", the duality gap over the objective: at least the
            relative error of the objective. Tested every 10 steps, and defined for a convex penalty without bias.
        gradient: "unroll", "checkpoint", "last" or "implicit", see `dsc.gradients`. The last two differentiate the
            last step; where there is a tolerance, one more step.
        damping: of "implicit": ridge added to ``D_SᵀD_S``, as a fraction of the Lipschitz constant 1/s.

    Raises:
        ValueError: no step (with a tolerance, fewer than 2), a tolerance that is not positive, a negative damping or
            one without "implicit", an unknown word.
    """

    steps: int = 1
    tol: float | None = field(default=None, kw_only=True)
    criterion: Criterion = field(default="residual", kw_only=True)
    gradient: Gradient = field(default="unroll", kw_only=True)
    damping: float = field(default=0.0, kw_only=True)

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"steps counts proximal steps from zero and must be at least 1, got {self.steps}")
        if self.tol is not None and not self.tol > 0:
            raise ValueError(f"tol must be above 0 (such as 1e-4), or None for a fixed number of steps; got {self.tol}")
        if self.tol is not None and self.steps < 2:
            raise ValueError(f"with a tol, steps is the most to take and must be at least 2, got {self.steps}")
        for name, words in (("criterion", get_args(Criterion)), ("gradient", get_args(Gradient))):
            if getattr(self, name) not in words:
                raise ValueError(unknown(name, getattr(self, name), words))
        if not self.damping >= 0 or (self.damping and self.gradient != "implicit"):
            raise ValueError(f"damping must be at least 0, and belongs to gradient='implicit'; got {self.damping}")

    def solve(
        self,
        first: Tensor,
        step: Step,
        record: list[Tensor] | None = None,
        gap: Measure | None = None,
        start: Tensor | None = None,
    ) -> Tensor:
        """Code after `steps` steps, of which `first` is the one from `start` (None: zero); each goes to `record`.

        `gap` gives the relative duality gap of each signal's code, shape (batch,).

        Raises ValueError for the criterion "gap" without a `gap`, and for "implicit" unless `step` is a
        `dsc.gradients.ProximalStep`.
        """
        stop = None if self.tol is None else Stop(self.tol, self._criterion(gap))
        gradient = self.gradient if torch.is_grad_enabled() and first.requires_grad else "unroll"
        if gradient == "unroll" or (gradient == "last" and self.steps == 1):
            return iterate(first, step, self.steps, self._momentum(), record, stop)
        if gradient == "checkpoint":
            return iterate(first, checkpointed(step), self.steps, self._momentum(), record, stop)
        with torch.no_grad():
            before_last = torch.zeros_like(first) if start is None else start
            steps = self.steps if stop else self.steps - 1
            if steps:
                momentum = self._momentum()
                before_last = momentum(iterate(first.detach(), step, steps, momentum, record, stop))
        z = step(before_last) if gradient == "last" else implicit(step, before_last, self.damping)
        if record is not None:
            record.append(z)
        return z

    def _criterion(self, gap: Measure | None) -> Measure | None:
        if self.criterion == "residual":
            return None
        if gap is None:
            raise ValueError("criterion='gap' needs one layer with a convex penalty and no bias; here 'residual'")
        return gap

    def _momentum(self) -> Step:
        return lambda z: z


@dataclass(frozen=True)
class FISTA(ISTA):
    """Accelerated proximal gradient: ``z_{k+1} = step(z_k + β_k (z_k − z_{k−1}))``, O(1/k²).

    Args:
        steps: proximal steps from zero, at least 1.
        restart: drop a signal's momentum whenever it points uphill; restores linear convergence where ISTA has it.
        tol, criterion, gradient, damping: as of `ISTA`.
    """

    restart: bool = False

    def _momentum(self) -> Step:
        return Momentum(self.restart)


class Momentum:
    """Nesterov's extrapolation ``β_k = (t_k − 1)/t_{k+1}``, ``t_{k+1} = (1 + √(1 + 4t_k²))/2`` and ``t_1 = 1``.

    With restart there is one t a signal, set back to 1 where the last step and the move disagree.
    """

    def __init__(self, restart: bool) -> None:
        self.restart = restart
        self.t: float | Tensor = 1.0
        self.before: tuple[Tensor, Tensor] | None = None  # the code before, and the point that the last step left

    def __call__(self, z: Tensor) -> Tensor:
        """Point to step from next, after the step that led to `z`."""
        start = z  # β_1 = 0
        if self.before is not None:
            previous, left = self.before
            if self.restart:
                uphill = ((left - z) * (z - previous)).flatten(1).sum(1) > 0
                self.t = torch.where(uphill.reshape(-1, *[1] * (z.ndim - 1)), 1.0, self.t)
            start = torch.lerp(previous, z, self._weight(z.dtype))
        self.t = self._following()
        self.before = z, start
        return start

    def _weight(self, dtype: torch.dtype) -> float | Tensor:
        weight = 1 + (self.t - 1) / self._following()
        return weight.to(dtype) if isinstance(weight, Tensor) else weight

    def _following(self) -> float | Tensor:
        return (1 + (1 + 4 * self.t**2) ** 0.5) / 2


class Stop:
    """Whether all signals have reached a tolerance: by `criterion`, or by how far the last step moved them."""

    def __init__(self, tol: float, criterion: Measure | None) -> None:
        self.tol, self.criterion = tol, criterion
        self.value = math.inf  # of the signal that is farthest

    def __call__(self, k: int, steps: int, start: Tensor, z: Tensor) -> bool:
        """Whether to stop after step `k` of at most `steps`, which led from `start` to `z`."""
        if self.criterion is None:
            values = fixed_point_residual(z, start)
        elif k % GAP_EVERY and k < steps:
            return False
        else:
            values = self.criterion(z)
        self.value = values.max().item() if len(values) else 0.0
        if math.isnan(self.value):
            i = int(values.isnan().nonzero()[0])
            raise ValueError(f"signal {i} became NaN in step {k}: signals must be finite, and steps at most 1/‖D‖²")
        return self.value <= self.tol

    def warn(self, steps: int) -> None:
        """Say how far from the tolerance `steps` steps ended."""
        name = "fixed-point residual" if self.criterion is None else "relative duality gap"
        message = f"{name} {self.value:.1e} after {steps} steps, above tol={self.tol:.1e}: allow more steps"
        warnings.warn(message, ConvergenceWarning, stacklevel=4)


def iterate(
    first: Tensor,
    step: Step,
    steps: int,
    momentum: Step | None = None,
    record: list[Tensor] | None = None,
    stop: Stop | None = None,
) -> Tensor:
    """The loop: `steps` steps in all, the first already taken; ``record`` receives every iterate."""
    z = first
    if record is not None:
        record.append(z)
    for k in range(2, steps + 1):
        start = z if momentum is None else momentum(z)
        z = step(start)
        if record is not None:
            record.append(z)
        if stop is not None and stop(k, steps, start, z):
            return z
    if stop is not None:
        stop.warn(steps)
    return z


SOLVERS: dict[str, type[ISTA]] = {"ista": ISTA, "fista": FISTA}


def create_solver(
    name: str,
    steps: int = 1,
    tol: float | None = None,
    criterion: Criterion = "residual",
    gradient: Gradient = "unroll",
    damping: float = 0.0,
) -> ISTA:
    """Solver by name, with the options of `ISTA`. Raises ValueError for an unknown name or a wrong option."""
    if name not in SOLVERS:
        raise ValueError(unknown("solver", name, SOLVERS))
    return SOLVERS[name](steps=steps, tol=tol, criterion=criterion, gradient=gradient, damping=damping)
