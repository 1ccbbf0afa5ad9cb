from functools import partial

import torch
from torch import nn

from dsc.compiling import compiled
from dsc.models import create_model

BACKEND = "aot_eager_decomp_partition"  # partitions as inductor does, and needs no C++ compiler


def kept_types(function, x):
    """Types of what the backward pass of a compiled `function` at x is given from the forward one."""
    torch._dynamo.reset()
    types = set()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (types.add(t.dtype), t)[1], lambda t: t):
        out = function(x)
    out.sum().backward()
    return types


def test_the_rectifier_of_tokens_keeps_no_mask_beside_them():
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8))
    x = torch.randn(2, 3, 8)
    assert kept_types(torch.compile(model, backend=BACKEND), x) == {torch.float32, torch.bool}  # what is mended
    assert kept_types(compiled(model, backend=BACKEND), x) == {torch.float32}


def test_values_and_gradients_are_those_of_the_function():
    torch._dynamo.reset()
    x = torch.randn(2, 3, 16, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    found = []
    for wrap in (lambda function: function, partial(compiled, backend=BACKEND)):
        torch.manual_seed(0)
        model = create_model("dsc_vit_pico", depth=1).double()
        out = wrap(model)(x)
        out.square().sum().backward()
        found.append([out.detach(), *(p.grad for p in model.parameters())])
    for eager, fused in zip(*found, strict=True):
        torch.testing.assert_close(fused, eager, rtol=1e-9, atol=1e-11)
