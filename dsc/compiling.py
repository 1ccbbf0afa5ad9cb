"""`torch.compile` for training, with one of its choices made otherwise."""

from collections.abc import Callable
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import torch
from torch._functorch import config

P = ParamSpec("P")
T = TypeVar("T")


def compiled(function: Callable[P, T], **options: Any) -> Callable[P, T]:
    """`function` through `torch.compile` with these options, so that its backward pass makes views of codes anew.

    What a linear layer keeps of rectified tokens is a view of them. torch would keep the rectifier's mask beside it, in
    booleans, which a CPU reads and writes one at a time: longer than the layer takes. With the tokens kept in the
    view's place, the backward pass makes both from them (`benchmarks/step.py --compile`).
    """
    fast = torch.compile(function, **options)

    @wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> T:
        with config.patch(recompute_views=True):  # it compiles when it is called
            return fast(*args, **kwargs)

    return call
