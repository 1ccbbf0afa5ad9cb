"""Muon's update against its polynomial of the singular values, in double precision."""

import pytest
import torch
from timm.optim import Muon as TimmMuon
from timm.optim import muon
from torch import Tensor, nn

from dsc.optimizers import Muon


def polynomial_of_singular_values(g: Tensor, steps: int) -> Tensor:
    u, s, vh = torch.linalg.svd(g.double().flatten(1), full_matrices=False)
    s = s / s.norm()
    for _ in range(steps):
        s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
    return ((u * s) @ vh).view_as(g)


def first_update(optimizer: type[TimmMuon], g: Tensor) -> Tensor:
    weight = nn.Parameter(torch.zeros_like(g))
    weight.grad = g.clone()
    optimizer(
        [weight], lr=1.0, weight_decay=0.0, ns_steps=3, ns_coefficients="original", adjust_lr_fn="original"
    ).step()
    return -weight.detach()


@pytest.mark.parametrize("shape", [(8, 20), (8, 3, 3, 3), (6, 4, 2, 2)])
def test_updates_have_the_accuracy_of_float32_and_timms_own_that_of_bfloat16(shape):
    g = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    exact = polynomial_of_singular_values(g, 3)
    error, timms = ((first_update(o, g) - exact).norm() / exact.norm() for o in (Muon, TimmMuon))
    assert error < 1e-5
    assert 1e-4 < timms < 0.05  # what the replacement is for; once timm computes in float32 too, it can go


def test_timm_is_as_before_after_a_step_and_after_a_failed_one():
    before = muon.zeropower_via_newtonschulz
    weight = nn.Parameter(torch.ones(2, 2))
    optimizer = Muon([weight], lr=1.0)

    def closure() -> float:
        raise RuntimeError("no loss")

    with pytest.raises(RuntimeError, match="no loss"):
        optimizer.step(closure)
    assert muon.zeropower_via_newtonschulz is before
    weight.grad = torch.ones(2, 2)
    optimizer.step()
    assert muon.zeropower_via_newtonschulz is before
