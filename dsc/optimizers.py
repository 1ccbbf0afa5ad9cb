"""Muon on processors: timm's own, in the precision they are fast in."""

from collections.abc import Callable
from functools import partial
from unittest.mock import patch

import timm.optim
import torch
from timm.optim import muon


class Muon(timm.optim.Muon):  # type: ignore[misc]  # timm is untyped
    """timm's Muon (Jordan, 2024), which on a CPU orthogonalizes its updates in float32 rather than bfloat16.

    Processors without bfloat16 arithmetic emulate it, and a step can then take as long as the gradient itself
    (`benchmarks/muon.py`). timm has no argument for this precision, so its function is replaced while a step runs. On
    a GPU nothing changes.
    """

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        if any(p.device.type != "cpu" for group in self.param_groups for p in group["params"]):
            return super().step(closure)
        orthogonalize = partial(muon.zeropower_via_newtonschulz, dtype=torch.float32)
        with patch.object(muon, "zeropower_via_newtonschulz", orthogonalize):
            return super().step(closure)
