"""`SparseCoding`, a dictionary, a prox and a solver as one layer; `DeepSparseCoding`, several of them."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from itertools import pairwise, repeat
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from dsc.certificates import fixed_point_residual, relative_duality_gap
from dsc.dictionaries import Dictionary
from dsc.gradients import ProximalStep, checkpointed
from dsc.prox import Prox
from dsc.shrinkage import Threshold
from dsc.solvers import FISTA, ISTA, Measure

StepSize = float | Literal["lipschitz", "learned"]
BLOCK_BYTES = 2**21  # of the code, a thread: a few tensors of this size stay in the cache


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

    Without gradients, on a CPU, a fixed number of steps is taken block after block of the batch, each of which stays
    in the cache.

    Raises:
        ValueError: a step that is not positive, an unknown word for it, or a learned one under ``gradient="implicit"``
            (the fixed point does not move with the step, whose gradient is zero).
        TypeError: ``gradient="implicit"`` with an activation that is no prox of a convex penalty.
    """

    solves: ClassVar[bool] = True  # more steps lead on to the minimiser

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
        dictionary.bound_ahead |= isinstance(step, str)
        self._check(self.solver)
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
        """Code of `x` by `solver` (default: the layer's own), from zero or `start`; iterates go to `record`.

        Raises ValueError for a start of another shape than the code's.
        """
        solver = solver or self.solver
        self._check(solver)
        step = self._step_of(solver)
        driven = self.dictionary.drive(x, step, self.bias, self.prox.dim)
        if start is not None and start.shape != driven.shape:
            raise ValueError(f"start of shape {tuple(start.shape)}, expected the code's, {tuple(driven.shape)}")
        # From zero the synthesis vanishes: the first step is a plain layer, and the only one may well be.
        if start is None and solver.steps == 1 and solver.gradient != "implicit":
            return solver.solve(self.prox(driven, step), _no_second_step, record)
        move = self.dictionary.gradient_step(step, x, self.bias)

        def solve_part(x: Tensor, driven: Tensor, start: Tensor | None) -> Tensor:
            proximal_step = ProximalStep(move(x, driven), lambda z: self.prox(z, step))
            first = self.prox(driven, step) if start is None else proximal_step(start)
            return solver.solve(first, proximal_step, record, self._gap_of(x), start)

        rows = rows_in_cache(driven) if record is None and solver.tol is None else None
        if rows is None:
            return solve_part(x, driven, start)
        starts = repeat(None) if start is None else start.split(rows)
        return torch.cat([solve_part(*part) for part in zip(x.split(rows), driven.split(rows), starts, strict=False)])

    def descend(self, z: Tensor | None, residual: Tensor, step: Threshold) -> Tensor:
        """``prox(z + s(Dᵀ residual + b), s)``, where None stands for a code of zero."""
        driven = self.dictionary.drive(residual, step, self.bias, self.prox.dim)
        return self.prox(driven if z is None else z + driven, step)

    def _dims_behind(self, z: Tensor) -> int:
        return z.ndim - 1 - self.prox.dim % z.ndim

    def _check(self, solver: ISTA) -> None:
        if solver.gradient != "implicit":
            return
        if self.step == "learned":
            raise ValueError("an implicit gradient does not reach a learned step: take step='lipschitz' or 'unroll'")
        if not self.prox.is_convex:
            raise TypeError(
                f"an implicit gradient needs the prox of a convex penalty, and {type(self.prox).__name__} is none: "
                "take 'unroll', 'checkpoint' or 'last'"
            )

    def _step_of(self, solver: ISTA) -> Threshold:
        step = self.step_size()
        if isinstance(step, float):
            return step
        plain = type(step) is Tensor and step.device.type == "cpu" and not torch.compiler.is_compiling()
        if plain and not torch.is_grad_enabled():
            return step.item()  # thresholding by a number takes one pass
        return step.detach() if solver.gradient == "implicit" else step

    def _gap_of(self, x: Tensor) -> Measure | None:
        if not self.has_gap:
            return None
        return lambda z: self.relative_gap(x, z)

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

    @property
    def has_gap(self) -> bool:
        """Whether the duality gap is defined: for a convex penalty, without a bias."""
        return self.bias is None and self.prox.is_convex

    @torch.no_grad()
    def relative_gap(self, x: Tensor, z: Tensor) -> Tensor:
        """Duality gap over the objective of each signal, float64 of shape (batch,): see `dsc.certificates`.

        Raises TypeError with a bias, or unless the penalty is convex.
        """
        if self.bias is not None:
            raise TypeError("a layer with a bias has no duality gap here: its problem may have no minimum")
        residual = x - self.dictionary.synthesize(z, x.shape[-2:])
        return relative_duality_gap(self.prox, z, residual, self.dictionary.analyze(residual))

    @torch.no_grad()
    def trace(self, x: Tensor, steps: int = 32, solver: type[ISTA] | None = None) -> "Trace":
        """Codes after 1, …, `steps` steps with the input frozen, by the layer's own kind of solver or another."""
        codes: list[Tensor] = []
        rule = solver() if solver else self.solver
        self.solve(x, replace(rule, steps=steps, tol=None, gradient="unroll", damping=0.0), codes)
        return Trace(self, x, codes)

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


@dataclass(frozen=True)
class Trace:
    """Codes after 1, 2, … steps of a layer on the frozen input `x`, and how near they are to its minimiser.

    Figures have shape (steps, signals). Each is computed when it is first asked for, by the layer as it then is.
    """

    layer: SparseCoding
    x: Tensor
    codes: list[Tensor]

    @cached_property
    @torch.no_grad()
    def objective(self) -> Tensor:
        """``½‖x − Dz‖² − ⟨b, z⟩ + λΩ(z)``. Raises TypeError for an activation without a penalty."""
        return torch.stack([self.layer.objective(self.x, z) for z in self.codes])

    @cached_property
    @torch.no_grad()
    def residual(self) -> Tensor | None:
        """Fixed-point residual ``‖z − T(z)‖/‖z‖``, T a step of the layer; None where its steps are learned ones."""
        if not self.layer.solves:
            return None
        stepped = (self.layer.solve(self.x, ISTA(), start=z) for z in self.codes)
        return torch.stack([fixed_point_residual(z, after) for z, after in zip(self.codes, stepped, strict=True)])

    @cached_property
    def gap(self) -> Tensor | None:
        """Relative duality gap; None where it is not defined: with a bias, or unless the penalty is convex."""
        if not self.layer.has_gap:
            return None
        return torch.stack([self.layer.relative_gap(self.x, z) for z in self.codes])

    @property
    def support_size(self) -> Tensor:
        """Number of entries that are not zero."""
        return torch.stack([(z != 0).flatten(1).sum(1) for z in self.codes])

    @property
    def support_change(self) -> Tensor:
        """Number of entries that the step made zero or not zero; the first step counts from zero."""
        supports = [torch.zeros_like(self.codes[0], dtype=torch.bool), *(z != 0 for z in self.codes)]
        return torch.stack([(a ^ b).flatten(1).sum(1) for a, b in pairwise(supports)])


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

    Raises:
        ValueError: no layer, or an implicit gradient in the joint mode.
    """

    def __init__(self, layers: Sequence[SparseCoding], solver: ISTA | None = None, joint: bool = False) -> None:
        super().__init__()
        if not layers:
            raise ValueError("DeepSparseCoding needs at least one layer")
        if joint and solver is not None and solver.gradient == "implicit":
            raise ValueError("the joint mode has no implicit gradient: take 'unroll', 'checkpoint' or 'last'")
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
        solver = solver or self.solver
        steps = [layer.step_size() for layer in self]
        codes, sizes = self._first(x, steps)

        sweep: Callable[[Tensor], list[Tensor]] = partial(self._sweep, x, steps=steps, sizes=sizes)
        if solver.gradient == "checkpoint":  # of what returns all codes, and not of what only leaves them behind
            sweep, solver = checkpointed(sweep), replace(solver, gradient="unroll")

        def joint_step(deepest: Tensor) -> Tensor:
            codes[:] = sweep(deepest)
            return codes[-1]

        solver.solve(codes[-1], joint_step, record)
        return codes

    def _first(self, x: Tensor, steps: list[Threshold]) -> tuple[list[Tensor], list[torch.Size]]:
        below, codes, sizes = x, [], []
        for layer, step in zip(self, steps, strict=True):
            sizes.append(below.shape[-2:])
            below = layer.descend(None, below, step)
            codes.append(below)
        return codes, sizes

    def _sweep(self, x: Tensor, deepest: Tensor, steps: list[Threshold], sizes: list[torch.Size]) -> list[Tensor]:
        estimates = [deepest]
        for layer, size in zip(reversed(list(self)), reversed(sizes), strict=True):
            estimates.insert(0, layer.decode(estimates[0], size))
        below, codes = x, []
        for layer, step, signal, z in zip(self, steps, estimates[:-1], estimates[1:], strict=True):
            below = layer.descend(z, below - signal, step)
            codes.append(below)
        return codes


def rows_in_cache(codes: Tensor) -> int | None:
    """How many signals to solve at a time so that their codes stay in the cache; None for all of them."""
    if torch.is_grad_enabled() or torch.compiler.is_compiling() or codes.device.type != "cpu":
        return None
    bytes_at_once = BLOCK_BYTES * torch.get_num_threads()
    return None if codes.nbytes <= bytes_at_once else max(1, bytes_at_once * len(codes) // codes.nbytes)


def _no_second_step(z: Tensor) -> Tensor:
    raise RuntimeError("a solver of one step asked for a second")
