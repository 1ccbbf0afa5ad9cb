"""Exact codes of many signals at once, at a cost that follows their supports: greedy descent and Newton's method.

It minimises ``½‖x − Dz‖² + h(z)`` for every convex penalty of the library. A round takes, for each signal that is
not certified yet,

1. its residual and the correlations of all atoms with it, hence its duality gap: certified signals leave the batch;
2. steps of block coordinate descent on the group that moves most (Gauss–Southwell; Li and Osher 2009), which find the
   support: a correlation changes by a row of the Gram matrix, so a step costs a few passes over the correlations;
3. Newton's step on the support, which is exact where h is piecewise linear, and taken where it goes downhill
   (feature-sign search, Lee et al. 2006, with many signs a step).

Signals with supports of similar size share a batch, so all of this is batched products and factorisations. Where numba
is installed, for ℓ1 on a CPU, coordinate descent on working sets comes first (`dsc.coordinate_descent`): most signals
then need no round.
"""

import warnings
from collections.abc import Callable, Iterator
from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor
from torch.nn import functional as F

from dsc.certificates import relative_duality_gap
from dsc.penalties import Penalty, given, penalty_of
from dsc.prox import Prox

GREEDY_STEPS = 32
BETWEEN_SIGNALS = 64  # that are coded before an interrupt is heard
IN_CACHE = 2**18  # correlations, of signals that take these steps together
ALIGNED = 16  # entries, of which a row is a multiple
WIDTHS = (4, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 2048, 4096, 8192, 16384)
ENTRIES = 2**24  # of the supports' Gram matrices held at once
STALLED_BELOW = {torch.float32: 1e-4, torch.float64: 1e-10}
RIDGE = {torch.float32: 1e-6, torch.float64: 1e-11}  # relative


class ActiveSet:
    """Solver for one dictionary, with its atoms as the rows of `atoms`, and one convex prox."""

    def __init__(self, atoms: Tensor, prox: Prox) -> None:
        self.prox, self.size = prox, prox.group_size_of(len(atoms))
        # Every group is scaled to curvature ‖D_g‖² = 1.
        norms = torch.linalg.matrix_norm(atoms.unflatten(0, (-1, self.size)), 2)
        self.scale = None
        if not torch.allclose(norms, torch.ones_like(norms), rtol=0, atol=1e-5):
            self.scale = norms.repeat_interleave(self.size)
            atoms = atoms / self.scale[:, None]
        # Of the groups of zeros at the end the last pads supports, the others rows: those of odd length are slow.
        padding = 1 if self.size > 1 else ALIGNED - len(atoms) % ALIGNED
        self.penalty = penalty_of(prox, self.size, None if self.scale is None else norms, padding)
        self.count, self.atoms = len(atoms), F.pad(atoms, (0, 0, 0, padding * self.size))
        self.gram = self.atoms @ self.atoms.mT
        self.descend = descent_on(self.gram, self.penalty)

    def solve(self, x: Tensor, tol: float, max_rounds: int, start: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Codes of the signals `x` and the relative duality gap of each, certified where it is at most `tol`.

        Signals that single precision brings no nearer are given up early.
        """
        z, gaps = self._start(x, start), x.new_full((len(x),), torch.inf, dtype=torch.float64)
        residual = x.clone() if start is None else x - z @ self.atoms
        if self.descend is not None:  # after which most signals need no round
            self.descend(z, residual @ self.atoms.mT, tol)
            residual = x - z @ self.atoms
        open_ = torch.arange(len(x), device=x.device)
        for round_ in range(max_rounds + 1):
            r, codes, before = (t.index_select(0, open_) for t in (residual, z, gaps))
            correlations = r @ self.atoms.mT
            gap = self._gaps(r, codes, correlations, tol)
            gaps.index_copy_(0, open_, gap)
            stalled = (gap < STALLED_BELOW[x.dtype]) & (gap > before / 2) & (round_ > (self.descend is not None))
            left = (~(gap <= tol) & ~stalled).nonzero().squeeze(1)
            if round_ == max_rounds or len(left) == 0:
                break
            if len(left) < len(open_):
                open_, codes, correlations = (t.index_select(0, left) for t in (open_, codes, correlations))
            steps = 1 + round_ // 4 + (x.dtype == torch.float64)  # one more refines what the ridge has left
            if round_ == 0 and self.descend is not None:  # fresh correlations may be all that is missing
                self.descend(codes, correlations, tol)
                images = codes @ self.atoms
            else:
                self._greedy(codes, correlations)
                codes, images = self._newton(codes, correlations, steps)
            z.index_copy_(0, open_, codes)
            residual.index_copy_(0, open_, x.index_select(0, open_) - images)
        z = z[:, : self.count]
        return (z if self.scale is None else z / self.scale), gaps

    def _start(self, x: Tensor, start: Tensor | None) -> Tensor:
        z = x.new_zeros(len(x), len(self.atoms))
        if start is not None:
            z[:, : self.count] = start if self.scale is None else start * self.scale
        return z

    def _gaps(self, residual: Tensor, z: Tensor, correlations: Tensor, tol: float) -> Tensor:
        # A lower bound in the precision of the codes tells what is worth the certificate in double precision.
        z, correlations = z[:, : self.count], correlations[:, : self.count]
        if self.scale is not None:
            z, correlations = z / self.scale, correlations * self.scale
        if self.descend is not None:  # most are
            return relative_duality_gap(self.prox, z, residual, correlations)
        scale = 1 / self.prox.gauge(correlations).clamp_min(1)
        energy, value = torch.linalg.vecdot(residual, residual) / 2, self.prox.penalty(z)
        gap = (1 - scale).square() * energy + value - scale * torch.linalg.vecdot(z, correlations)
        rough = (gap / (energy + value)).nan_to_num(0).double()
        done = (rough <= tol).nonzero().squeeze(1)
        certified = relative_duality_gap(self.prox, *(t.index_select(0, done) for t in (z, residual, correlations)))
        return rough.index_copy(0, done, certified)

    def _greedy(self, z: Tensor, correlations: Tensor) -> None:
        """Better codes, and their correlations, both in place."""
        rows = max(1, IN_CACHE // z.shape[1] if z.device.type == "cpu" else len(z))
        for part in zip(z.split(rows), correlations.split(rows), strict=True):
            self._greedy_steps(*part)

    def _greedy_steps(self, z: Tensor, correlations: Tensor) -> None:
        u = correlations.add_(z)  # a group's exact minimisation starts from its part of u: its curvature is 1
        for _ in range(GREEDY_STEPS):
            best = argmax_(self.penalty.norms(self.penalty.minimiser(u).sub_(z)).squeeze(2))
            entries = self._entries(best)
            move = self.penalty.take(entries, best).minimiser(u.gather(1, entries)) - z.gather(1, entries)
            z.scatter_add_(1, entries, move)
            u.scatter_add_(1, entries, move)
            if self.size == 1:
                u.addcmul_(self.gram.index_select(0, best[:, 0]), move, value=-1)
            else:
                u.unsqueeze(1).baddbmm_(move.unsqueeze(1), self.gram[entries], alpha=-1)
        u.sub_(z)

    def _newton(self, z: Tensor, correlations: Tensor, steps: int) -> tuple[Tensor, Tensor]:
        """Codes after Newton's step on their support, and their images ``Dz``."""
        polished, images = torch.zeros_like(z), z.new_zeros(len(z), self.atoms.shape[1])
        for signals, groups in self._supports(z):
            entries = self._entries(groups)
            penalty = self.penalty.take(entries, groups)
            short = entries.int()  # half the traffic
            flat = short[:, :, None] * len(self.gram) + short[:, None, :]
            gram = self.gram.view(-1).index_select(0, flat.view(-1)).view(flat.shape)
            code, c = (t.index_select(0, signals).gather(1, entries) for t in (z, correlations))
            for _ in range(steps * (3 if penalty.is_curved else 1)):
                code, c = newton(gram, code, c, penalty)
            # Padding entries all point into the group of zeros, whose code stays zero.
            polished.index_copy_(0, signals, code.new_zeros(len(code), z.shape[1]).scatter_(1, entries, code))
            images.index_copy_(0, signals, F.embedding_bag(entries, self.atoms, per_sample_weights=code, mode="sum"))
        return polished, images

    def _supports(self, z: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Groups of each signal's support, (signals, width), by batches of signals with about `width` of them."""
        support = self.penalty.norms(z).squeeze(2) > 0
        signal, group = support.nonzero(as_tuple=True)
        count = support.sum(1)
        place = torch.arange(len(signal), device=z.device) - (count.cumsum(0) - count)[signal]
        groups = group.new_full((len(z), max(1, int(count.max()))), support.shape[1] - 1)
        groups[signal, place] = group
        bins = torch.bucketize(count, torch.tensor(WIDTHS, device=z.device))
        for b in bins.unique().tolist():
            width = max(1, min(WIDTHS[b], groups.shape[1]))
            for signals in (bins == b).nonzero().squeeze(1).split(max(1, ENTRIES // (width * self.size) ** 2)):
                yield signals, groups[signals, :width]

    def _entries(self, groups: Tensor) -> Tensor:
        if self.size == 1:
            return groups
        inside = torch.arange(self.size, device=groups.device)
        return (groups.unsqueeze(-1) * self.size + inside).flatten(1)


def newton(gram: Tensor, z: Tensor, c: Tensor, penalty: Penalty) -> tuple[Tensor, Tensor]:
    """Codes after Newton's step on the support of z, where ``c = Dᵀ(x − Dz)``, and their correlations.

    Entries and groups that would pass a kink of the penalty become 0. Where this goes uphill the step ends at the first
    of them, and where that does, half-way to it.
    """
    on = (z != 0).to(z.dtype)
    hessian = (gram * on[:, :, None]).mul_(on[:, None, :])
    penalty.add_curvature(hessian, z)
    # Some ridge keeps the factor finite where atoms are dependent, and a step then leads along their null space until
    # an entry vanishes; rows off the support become the identity's.
    hessian.diagonal(dim1=1, dim2=2).mul_(1 + RIDGE[z.dtype]).add_(1 - on)
    factor, failed = torch.linalg.cholesky_ex(hessian.mT)
    slope = (c - penalty.gradient(z)) * on
    step = torch.cholesky_solve(slope.unsqueeze(2), factor).squeeze(2).masked_fill_((failed > 0)[:, None], 0)
    reach = penalty.reach(z, step)
    first = reach.amin(1, keepdim=True)
    candidates = [
        (z + step).masked_fill(reach < 1, 0),
        (z + first * step).masked_fill((reach == first) & (first < 1), 0),
        z + first / 2 * step,
        z + first / 8 * step,
    ]
    return _accept(gram, z, c, penalty, candidates)


def _accept(gram: Tensor, z: Tensor, c: Tensor, penalty: Penalty, candidates: list[Tensor]) -> tuple[Tensor, Tensor]:
    """For each signal the first candidate with an objective not above that of z, else z; and its correlations."""
    if not candidates:
        return z, c
    code, *others = candidates
    move = code - z
    image = torch.bmm(move.unsqueeze(1), gram).squeeze(1)
    before = penalty.value(z)
    change = (move * (image / 2 - c)).sum(1) + penalty.value(code) - before
    rounding = 8 * torch.finfo(z.dtype).eps * before  # must not reject the last steps
    rejected = (~(change <= rounding)).nonzero().squeeze(1)
    after = c - image
    if len(rejected):
        rows = (gram[rejected], z[rejected], c[rejected], penalty.rows(rejected))
        instead, c_instead = _accept(*rows, [other[rejected] for other in others])
        code, after = code.index_copy(0, rejected, instead), after.index_copy(0, rejected, c_instead)
    return code, after


def descent_on(gram: Tensor, penalty: Penalty) -> Callable[[Tensor, Tensor, float], None] | None:
    """Coordinate descent on codes and correlations, in place, to a relative tolerance; None where it does not apply."""
    if gram.device.type != "cpu" or penalty.size > 1 or given(penalty.l2) or (descend := compiled_descent()) is None:
        return None
    l1, ridge = (
        torch.as_tensor(weight, dtype=gram.dtype, device="cpu").expand(len(gram)).numpy().copy()
        for weight in (penalty.l1, penalty.ridge)
    )
    least = float(l1[gram.diagonal().numpy() > 0].min())  # of atoms, not of the padding
    inverse, rounding = 1 / (1 + ridge), 10 * torch.finfo(gram.dtype).eps

    def descent(z: Tensor, correlations: Tensor, tol: float) -> None:
        goal = max(tol, rounding) * least
        for rows in zip(z.split(BETWEEN_SIGNALS), correlations.split(BETWEEN_SIGNALS), strict=True):
            descend(*(part.numpy() for part in rows), gram.numpy(), l1, inverse, penalty.nonneg, goal)

    return descent


@cache
def compiled_descent() -> Callable[..., None] | None:
    """`dsc.coordinate_descent.descend`; None without numba, and, with a warning, where numba does not work."""
    if find_spec("numba") is None:
        return None
    try:
        from dsc.coordinate_descent import descend
    except (ImportError, RuntimeError, SystemError) as error:  # another numpy's, or no folder to keep what it compiles
        warnings.warn(f"numba is installed but does not work, so codes take longer: {error}", stacklevel=2)
        return None
    return descend


def argmax_(score: Tensor) -> Tensor:
    """Index of (about) the largest of each row of non-negative numbers, shape (rows, 1); it consumes them.

    The index rides in the low bits of the numbers, which order like integers: torch's own argmax takes several times
    as long as its maximum on a CPU.
    """
    bits = (score.shape[1] - 1).bit_length()
    integers = score.view(torch.int32 if score.dtype == torch.float32 else torch.int64)
    index = torch.arange(score.shape[1], dtype=integers.dtype, device=score.device)
    packed = integers.bitwise_and_(-(1 << bits)).bitwise_or_(index)
    return packed.amax(1, keepdim=True).bitwise_and_((1 << bits) - 1).long()
