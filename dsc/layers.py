"""`SparseCoding`, a dictionary, a prox and a solver as one layer; `DeepSparseCoding`, several of them."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor, nn

from dsc.dictionaries import Dictionary
from dsc.prox import Prox, Threshold
from dsc.solvers import FISTA, ISTA

StepSize = float | Literal["lipschitz", "learned"]


class SparseCoding(nn.Module):
    """Code ``argmin_z ½‖x − Dz‖² − ⟨b, z⟩ + λΩ(z)`` by a few proximal steps ``z ← prox(z + s(Dᵀ(x − Dz) + b), s)``.

    With one step of size 1 this is ``prox(Dᵀx + b)``: a convolution (or linear map), a bias and an activation.

    Args:
        dictionary: D.
        prox: Ω, its threshold λ, and the channels' dimension.
        solver: how many steps and with which momentum.
        step: s: "lipschitz" for 1/L, "learned" for σ(θ)/L with a parameter θ (starting at 0.9/L, never above
            1/L, so that the iteration keeps its guarantee), or a number.
        bias: add b, one signed value an atom, zero at first: for layers of one step, as a plain layer has it. The
            problem stays convex, but where some z ≥ 0 has Dz = 0 and ⟨b, z⟩ > λΩ(z) it has no minimum, and more
            steps lead nowhere: unrolled layers learn λ instead.

    Shapes: x as the dictionary's signals, the code as its codes.

    Raises:
        ValueError: a step that is not positive, or an unknown word for it.
    """

    def __init__(
        self,
        dictionary: Dictionary,
        prox: Prox,
        solver: ISTA | None = None,
        step: StepSize = "lipschitz",
        bias: bool = False,
    ) -> None:
        super().__init__()
        if (isinstance(step, str) and step not in ("lipschitz", "learned")) or (
            not isinstance(step, str) and not 0 < step < math.inf
        ):
            raise ValueError(f'step must be "lipschitz", "learned" or a number above 0, got {step!r}')
        self.dictionary, self.prox = dictionary, prox
        self.solver = solver or ISTA()
        self.step = step
        self.relative_step = nn.Parameter(torch.tensor(0.9).logit()) if step == "learned" else None
        self.bias = nn.Parameter(torch.zeros(dictionary.num_atoms)) if bias else None
        self.code_size = 1.0  # root mean square of the code to expect, where a model keeps track of it
        self.code = nn.Identity()  # every final code passes here once: what `dsc.observe` watches

    def forward(self, x: Tensor) -> Tensor:
        return self.code(self.solve(x))

    def decode(self, z: Tensor, size: Sequence[int] | None = None) -> Tensor:
        """Signal ``Dz``; `size` is its spatial size, where a strided dictionary leaves that open."""
        return self.dictionary.synthesize(z, size)

    def solve(
        self, x: Tensor, solver: ISTA | None = None, record: list[Tensor] | None = None, start: Tensor | None = None
    ) -> Tensor:
        """Code of `x` by `solver` (default: the layer's own), from zero or `start`; iterates go to `record`."""
        step = self.step_size()
        size = x.shape[-2:]

        def proximal_step(z: Tensor) -> Tensor:
            residual = x - self.dictionary.synthesize(z, size)
            return self.descend(z, self.dictionary.analyze(residual), step)

        # From zero the synthesis vanishes: the first step is a plain layer.
        first = self.descend(None, self.dictionary.analyze(x), step) if start is None else proximal_step(start)
        return (solver or self.solver).solve(first, proximal_step, record)

    def descend(self, z: Tensor | None, correlations: Tensor, step: Threshold) -> Tensor:
        """``prox(z + s(correlations + b), s)``, where None stands for a code of zero."""
        if self.bias is not None:
            correlations = correlations + self.bias.reshape(-1, *[1] * self._dims_behind(correlations))
        scaled = correlations if isinstance(step, float) and step == 1 else step * correlations
        return self.prox(scaled if z is None else z + scaled, step)

    def _dims_behind(self, z: Tensor) -> int:
        return z.ndim - 1 - self.prox.dim % z.ndim

    def step_size(self) -> Threshold:
        """s: a number where it is fixed, else a tensor."""
        if not isinstance(self.step, str):
            return float(self.step)
        inverse = 1 / self.dictionary.curvature()
        return inverse if self.relative_step is None else self.relative_step.sigmoid() * inverse

    def objective(self, x: Tensor, z: Tensor) -> Tensor:
        """``½‖x − Dz‖² − ⟨b, z⟩ + λΩ(z)`` of each signal, shape (batch,). Raises TypeError without a penalty."""
        residual = x - self.dictionary.synthesize(z, x.shape[-2:])
        value = residual.square().flatten(1).sum(1) / 2 + self.prox.penalty(z)
        if self.bias is not None:
            bias = self.bias.reshape(-1, *[1] * self._dims_behind(z))
            value = value - (bias * z).flatten(1).sum(1)
        return value

    @torch.no_grad()
    def trace(self, x: Tensor, steps: int = 32, solver: type[ISTA] | None = None) -> list[Tensor]:
        """Codes after 1, …, `steps` steps with the input frozen, by the layer's own kind of solver or another."""
        record: list[Tensor] = []
        self.solve(x, solver(steps=steps) if solver else replace(self.solver, steps=steps), record)
        return record

    @torch.no_grad()
    def reference(self, x: Tensor, max_steps: int = 2000, tol: float = 1e-6) -> Tensor:
        """Code by a long solve, to measure errors against: FISTA until 100 steps move it by less than `tol`."""
        solver = FISTA(steps=100, restart=True)
        z = self.solve(x, solver)
        for _ in range(max_steps // solver.steps - 1):
            previous, z = z, self.solve(x, solver, start=z)
            if (z - previous).norm() <= tol * z.norm():
                break
        return z


class DeepSparseCoding(nn.Module):
    """A chain of dictionaries, ``z_{j−1} ≈ D_j z_j`` with ``z_0 = x``, each code sparse.

    Greedy: layer by layer, which is a CNN (or MLP) of sparse-coding layers.
    Joint: all layers in each step (ML-ISTA, or ML-FISTA with momentum on the deepest code). From the deepest code
    ``ẑ_{j−1} = D_j ẑ_j`` runs down, then ``z_j ← prox(ẑ_j + s_j(D_jᵀ(z_{j−1} − D_j ẑ_j) + b_j))`` runs up. The first
    step, from zero, is the greedy network with one step a layer. Source: Sulam et al., arXiv 1806.00701.

    Args:
        layers: from the image to the deepest code. In the joint mode they take over `solver`.
        solver: of the joint mode; its number of steps counts the first pass, so T unfoldings are T + 1 steps.
        joint: which mode.
    """

    def __init__(self, layers: Sequence[SparseCoding], solver: ISTA | None = None, joint: bool = False) -> None:
        super().__init__()
        if not layers:
            raise ValueError("DeepSparseCoding needs at least one layer")
        self.layers = nn.ModuleList(layers)
        self.solver = solver or ISTA()
        self.joint = joint
        if joint:
            for layer in layers:
                layer.solver = self.solver

    def __iter__(self) -> Iterator[SparseCoding]:
        return iter(self.layers)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        return self.codes(x)[-1]

    def codes(self, x: Tensor) -> list[Tensor]:
        """Codes of every layer, from the first to the deepest; each passes its layer's `code` once."""
        if self.joint:
            return [layer.code(z) for layer, z in zip(self, self.solve(x), strict=True)]
        codes: list[Tensor] = []
        for layer in self:
            codes.append(layer(codes[-1] if codes else x))
        return codes

    def solve(self, x: Tensor, solver: ISTA | None = None, record: list[Tensor] | None = None) -> list[Tensor]:
        """Codes by the joint iteration; `record` receives the deepest code after every step."""
        steps = [layer.step_size() for layer in self]
        codes, sizes = self._first(x, steps)

        def joint_step(deepest: Tensor) -> Tensor:
            codes[:] = self._sweep(x, deepest, steps, sizes)
            return codes[-1]

        (solver or self.solver).solve(codes[-1], joint_step, record)
        return codes

    def _first(self, x: Tensor, steps: list[Threshold]) -> tuple[list[Tensor], list[torch.Size]]:
        below, codes, sizes = x, [], []
        for layer, step in zip(self, steps, strict=True):
            sizes.append(below.shape[-2:])
            below = layer.descend(None, layer.dictionary.analyze(below), step)
            codes.append(below)
        return codes, sizes

    def _sweep(self, x: Tensor, deepest: Tensor, steps: list[Threshold], sizes: list[torch.Size]) -> list[Tensor]:
        estimates = [deepest]
        for layer, size in zip(reversed(list(self)), reversed(sizes), strict=True):
            estimates.insert(0, layer.decode(estimates[0], size))
        below, codes = x, []
        for layer, step, signal, z in zip(self, steps, estimates[:-1], estimates[1:], strict=True):
            below = layer.descend(z, layer.dictionary.analyze(below - signal), step)
            codes.append(below)
        return codes
