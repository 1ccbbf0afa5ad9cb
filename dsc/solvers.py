"""The solver loop, written once over a ``step``; ISTA and FISTA differ by their momentum rule.

`steps` counts proximal steps from zero. The first is given by the layer (from zero the synthesis vanishes), so a
solver with one step is a convolution and an activation. Sources: Daubechies et al. 2004 (ISTA); Beck and
Teboulle 2009 (FISTA); O'Donoghue and Candès 2015 (adaptive restart).
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from dsc._names import unknown

Step = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class ISTA:
    """Proximal gradient: ``z_{k+1} = step(z_k)``; its objective falls like O(1/k).

    Args:
        steps: proximal steps from zero, at least 1.
    """

    steps: int = 1

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"steps counts proximal steps from zero and must be at least 1, got {self.steps}")

    def solve(self, first: Tensor, step: Step, record: list[Tensor] | None = None) -> Tensor:
        """Code after `steps` steps, of which `first` is the one from zero; every iterate is added to `record`."""
        return iterate(first, step, self.steps, self._momentum(first), record)

    def _momentum(self, first: Tensor) -> "Momentum | None":
        return None


@dataclass(frozen=True)
class FISTA(ISTA):
    """Accelerated proximal gradient: ``z_{k+1} = step(z_k + β_k (z_k − z_{k−1}))``, O(1/k²).

    Args:
        steps: proximal steps from zero, at least 1.
        restart: drop a signal's momentum whenever it points uphill; restores linear convergence where ISTA has it.
    """

    restart: bool = False

    def _momentum(self, first: Tensor) -> "Momentum | None":
        return Momentum(first, self.restart)


class Momentum:
    """Nesterov's extrapolation ``β_k = (t_k − 1)/t_{k+1}``, ``t_{k+1} = (1 + √(1 + 4t_k²))/2``, a t a signal."""

    def __init__(self, first: Tensor, restart: bool) -> None:
        self.restart = restart
        self.t = first.new_ones(first.shape[:1] + (1,) * (first.ndim - 1), dtype=torch.float32)

    def __call__(self, start: Tensor, previous: Tensor, z: Tensor) -> Tensor:
        """Point to step from next, after the step that led from `start` to `z` (the one before: `previous`)."""
        move = z - previous
        if self.restart:
            uphill = ((start - z) * move).flatten(1).sum(1) > 0
            self.t = torch.where(uphill.reshape(self.t.shape), 1.0, self.t)
        following = (1 + (1 + 4 * self.t.square()).sqrt()) / 2
        beta = (self.t - 1) / following
        self.t = following
        return z + beta.to(z.dtype) * move


def iterate(
    first: Tensor, step: Step, steps: int, momentum: Momentum | None = None, record: list[Tensor] | None = None
) -> Tensor:
    """The loop: `steps` steps in all, the first already taken; ``record`` receives every iterate."""
    z, start = first, first
    previous = torch.zeros_like(first)
    for _ in range(steps - 1):
        if record is not None:
            record.append(z)
        if momentum is not None:
            start = momentum(start, previous, z)
            previous = z
        else:
            start = z
        z = step(start)
    if record is not None:
        record.append(z)
    return z


SOLVERS: dict[str, type[ISTA]] = {"ista": ISTA, "fista": FISTA}


def create_solver(name: str, steps: int = 1) -> ISTA:
    """Solver by name. Raises ValueError for an unknown name or fewer than one step."""
    if name not in SOLVERS:
        raise ValueError(unknown("solver", name, SOLVERS))
    return SOLVERS[name](steps=steps)
