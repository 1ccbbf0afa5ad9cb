"""Learning rates over a run, stepped after each of its optimizer's steps, in fractions of the run."""

import inspect
import math
from collections.abc import Callable
from types import FunctionType
from typing import Literal

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, OneCycleLR, StepLR

Schedule = Callable[[Optimizer, int], LRScheduler]
LENGTHS = ("total_steps", "T_max", "T_0", "total_iters")  # what schedules call the number of a run's steps


def scheduled(make: Schedule, optimizer: Optimizer, steps: float) -> LRScheduler:
    """The schedule of a run of that many steps.

    Raises ValueError for a run without an end, or a class that would take the number of steps for something else.
    """
    if math.isinf(steps):
        raise ValueError(
            "a schedule needs the run's length: give trainer.max_epochs or trainer.max_steps, or lr_scheduler: null"
        )
    schedule = make(optimizer, int(steps))
    second = list(inspect.signature(type(schedule)).parameters)[1]
    if second not in LENGTHS and not isinstance(make, FunctionType):  # a function knows what it passes on
        raise ValueError(
            f"{type(schedule).__name__} takes the run's number of steps for its {second}: give a schedule whose second "
            f"argument is {', '.join(LENGTHS[:-1])} or {LENGTHS[-1]}, as dsc.schedules.OneCycle or dsc.schedules.Steps"
        )
    return schedule


class OneCycle(OneCycleLR):
    """Torch's one-cycle schedule with its peak at the optimizer's own learning rate.

    Args:
        total_steps: optimizer steps of the whole run; the task fills them in.
        warmup: fraction of the run in which the rate rises to its peak.
        anneal: "cos" or "linear".
    """

    def __init__(
        self, optimizer: Optimizer, total_steps: int, warmup: float = 0.2, anneal: Literal["cos", "linear"] = "linear"
    ) -> None:
        peaks = [group["lr"] for group in optimizer.param_groups]
        super().__init__(
            optimizer,
            peaks,
            total_steps,
            pct_start=warmup if warmup * total_steps > 1 else 0.0,  # torch divides by zero in a rise of one step
            anneal_strategy=anneal,
            cycle_momentum=False,
        )


class Steps(StepLR):
    """The rate times `gamma` each time that another `every` of the run (a fraction of it) is over."""

    def __init__(self, optimizer: Optimizer, total_steps: int, every: float = 0.3, gamma: float = 0.2) -> None:
        if not 0 < every <= 1:
            raise ValueError(f"every is a fraction of the run in (0, 1], got {every}")
        super().__init__(optimizer, max(1, round(every * total_steps)), gamma)
