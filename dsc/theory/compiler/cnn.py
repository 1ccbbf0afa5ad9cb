"""An iteration as convolutions and activations alone, a step after the other.

A dense step is one convolution: what lies in the channels decodes to the code and to what drives it, ``s(Dᵀx + b)`` or
x itself, whichever is smaller; one matrix gives the next point ``y − sDᵀDy + s(Dᵀx + b)``, and units shrink it.
A convolutional step is two: a transposed convolution gives Dy on the image's grid, where the code is carried too, a
pixel a stride; then a convolution takes ``sDᵀDy`` away from it. Both have the dictionary's stride and padding, so that
the border of the image is the dictionary's own; the size of an image that strides do not divide must be known for it.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from dsc.theory.compiler.chain import Chain, Part
from dsc.theory.compiler.factor import factor
from dsc.theory.compiler.groups import add_groups, elementwise
from dsc.theory.compiler.iteration import Iteration


def build(
    chain: Chain,
    iterations: Sequence[Iteration],
    grid: tuple[int, ...],
    remainders: Sequence[tuple[int, int]],
    kernel_size: int | None,
    scale: float | None,
    reach: float | None,
) -> list[int]:
    """Append all iterations to `chain`; the signals of dense ones have shape `grid`, (channels, *lengths).

    `remainders` are those of convolutional ones, see `Iteration.remainder`. Returns how many entries are carried by
    each of the activations before the first step.
    """
    reads: list[int] = []
    for j, one in enumerate(iterations):
        if j > 0:
            chain.state = {"x": chain.state["z"]}
        if one.is_dense:
            reads += _dense(chain, one, grid if j == 0 else None, kernel_size, scale, reach)
        else:
            _convolutional(chain, one, remainders[j], scale, reach)
    chain.finish()
    return reads


def _dense(
    chain: Chain,
    one: Iteration,
    grid: tuple[int, ...] | None,
    kernel_size: int | None,
    scale: float | None,
    reach: float | None,
) -> list[int]:
    atoms, features = one.weight.shape
    drive, identity = one.step * one.weight, torch.eye(atoms).to(one.weight)
    turn = identity - drive @ one.weight.mT
    keeps_signal = features < atoms
    maps = {"z": drive}
    if one.momentum:
        maps |= {"x": torch.eye(features).to(drive)} if keeps_signal else {"c": drive}
    biases: dict[str, Tensor | float] = {"z": one.shift, "x": 0.0, "c": one.shift}
    kernels, reads = _reading(chain, maps, grid, kernel_size)
    units = {"z": elementwise(one.shrinkage, chain.pieces)}
    chain.layer({n: [Part({"x": k}, units.get(n, chain.pieces.identity), biases[n])] for n, k in kernels.items()})
    _groups(chain, one, scale, reach)
    driven = {"x": chain.point(drive)} if keeps_signal else {"c": chain.point(identity)}
    for beta, following in zip(one.momentum, (*one.momentum, None)[1:], strict=True):
        moved = _extrapolated(chain, chain.point(turn), beta)
        bias = one.shift if keeps_signal else 0.0
        outputs = {"z": [Part(moved | driven, units["z"], bias)]}
        if following is not None:
            outputs |= {name: [chain.keep(name)] for name in driven}
        if following:
            outputs["before"] = [chain.keep("z")]
        chain.layer(outputs)
        _groups(chain, one, scale, reach)
    return reads


def _reading(
    chain: Chain, maps: dict[str, Tensor], grid: tuple[int, ...] | None, kernel_size: int | None
) -> tuple[dict[str, Tensor], list[int]]:
    # Kernels that apply the matrices to "x", a signal on a grid or the channels of one pixel.
    if grid is None:
        return {name: chain.point(matrix) for name, matrix in maps.items()}, []
    kernels = {name: matrix.unflatten(1, grid) for name, matrix in maps.items()}
    if kernel_size is None:
        return kernels, []
    factors, rest = factor(torch.cat(list(kernels.values())), kernel_size)
    for part in factors:
        chain.layer({"x": [chain.keep("x", by=part.kernel)]}, part.stride, part.padding)
    last = dict(zip(kernels, rest.split([len(kernel) for kernel in kernels.values()]), strict=True))
    return last, [part.entries for part in factors]


def _convolutional(
    chain: Chain, one: Iteration, remainder: tuple[int, int], scale: float | None, reach: float | None
) -> None:
    weight, grid = one.weight, (one.stride, one.padding)
    units = elementwise(one.shrinkage, chain.pieces)
    first = {"z": [Part({"x": one.step * weight}, units, one.shift)]}
    if one.momentum:
        first["c"] = [Part({"x": one.step * weight}, chain.pieces.identity, one.shift)]
    chain.layer(first, *grid)
    _groups(chain, one, scale, reach)
    place = torch.zeros(one.atoms, *weight.shape[:1], *weight.shape[2:]).to(weight)
    place[range(one.atoms), range(one.atoms), one.padding, one.padding] = 1
    for beta, following in zip(one.momentum, (*one.momentum, None)[1:], strict=True):
        on_image = {
            "y": [Part(_extrapolated(chain, weight.transpose(0, 1), beta), chain.pieces.identity)],
            "v": [Part(_extrapolated(chain, place, beta) | {"c": place}, chain.pieces.identity)],
        }
        if following is not None:
            on_image["c"] = [chain.keep("c", by=place)]
        if following:
            on_image["before"] = [chain.keep("z", by=place)]
        chain.layer(on_image, *grid, remainder)
        outputs = {"z": [Part({"v": place, "y": -one.step * weight}, units)]}
        outputs |= {n: [chain.keep(n, by=place)] for n in ("c", "before") if n in on_image}
        chain.layer(outputs, *grid)
        _groups(chain, one, scale, reach)


def _extrapolated(chain: Chain, kernel: Tensor, beta: float) -> dict[str, Tensor]:
    # The kernel applied to z + β(z − z_before); where there is no z_before, β is 0.
    if "before" not in chain.state:
        return {"z": kernel}
    return {"z": (1 + beta) * kernel, "before": -beta * kernel}


def _groups(chain: Chain, one: Iteration, scale: float | None, reach: float | None) -> None:
    if one.shrinkage.group is not None:
        assert scale is not None and reach is not None
        add_groups(chain, one.shrinkage, scale, reach)
