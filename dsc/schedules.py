"""Learning rates over a run, stepped after each of its optimizer's steps, in fractions of the run."""

from typing import Literal

from torch.optim import Optimizer
from torch.optim.lr_scheduler import OneCycleLR, StepLR


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
