"""How sparse codes are, as torchmetrics, how fast they converge, and how well they recover supports and classes.

Names say the unit: a *fraction* lies in [0, 1], *hoyer* is the Hoyer index in [0, 1], *rate* is the factor an
error shrinks by in a step, *error* is relative to the converged code.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics import MeanMetric, Metric, MetricCollection
from torchmetrics.classification import BinaryPrecision, BinaryRecall, MulticlassConfusionMatrix, MultilabelExactMatch
from torchmetrics.clustering import AdjustedRandScore, NormalizedMutualInfoScore

from dsc import measures
from dsc.layers import SparseCoding
from dsc.observe import Observer, SparseLayer, coder_inputs, sparse_layers
from dsc.recovery import assign
from dsc.solvers import ISTA, SOLVERS

RATE_STEPS = 32  # a rate is fitted over the errors after 1 … this many steps


class ActiveFraction(MeanMetric):
    """Fraction of code entries that are not zero, over all signals."""

    def update(self, z: Tensor) -> None:  # type: ignore[override]
        super().update(measures.active_fraction(z), weight=z.numel())


class ActiveGroupFraction(MeanMetric):
    """Fraction of groups with an entry that is not zero, over all signals; `group_size_of` a number of channels."""

    def __init__(self, group_size_of: Callable[[int], int], dim: int = 1) -> None:
        super().__init__()
        self.group_size_of, self.dim = group_size_of, dim

    def update(self, z: Tensor) -> None:  # type: ignore[override]
        size = self.group_size_of(z.shape[self.dim])
        super().update(measures.active_group_fraction(z, size, self.dim), weight=z.numel() // size)


class HoyerIndex(MeanMetric):
    """Mean Hoyer index over the signals whose code is not all zero; NaN if there is none."""

    def update(self, z: Tensor) -> None:  # type: ignore[override]
        values = measures.hoyer(z)
        if len(values):
            super().update(values)


def _fmax(states: Tensor) -> Tensor:
    return states.nan_to_num(-1).amax(0).where(~states.isnan().all(0), torch.nan)


class DeadFraction(Metric):
    """Fraction of channels that are zero for every signal and everywhere; NaN before any signal.

    The channels of codes of several widths, as of one module that a network calls in several places, count together.
    """

    def __init__(self, dim: int = 1) -> None:
        super().__init__()
        self.dim = dim

    def update(self, z: Tensor) -> None:
        active = measures.active_units(z, self.dim).float()
        state = f"active_{len(active)}"
        if state not in self._defaults:
            self.add_state(state, torch.full_like(active, torch.nan), dist_reduce_fx=_fmax)  # NaN: nothing seen yet
        setattr(self, state, torch.fmax(getattr(self, state), active))

    def compute(self) -> Tensor:
        seen = [getattr(self, state) for state in self._defaults]
        return 1 - torch.cat(seen).nanmean() if seen else torch.tensor(torch.nan)


class SparsityMetrics(nn.Module):
    """Every sparsity figure of a model's sparse layers, per layer and in total.

    `update(observer)` after each forward; `compute()` gives ``{"active_fraction/<layer>": …}`` and the like. A
    figure without meaning (groups of a layer that has none, an index of zero codes) is absent.
    """

    def __init__(self, layers: dict[str, SparseLayer]) -> None:
        super().__init__()
        self.layers = layers
        self.total = ActiveFraction()
        self.by_layer = nn.ModuleDict()

    def update(self, observer: Observer) -> None:
        """Take in the codes of the latest forward."""
        for name, codes in observer.features.items():
            for z in codes:
                self.total.update(z.detach())
                for metric in self._metrics(name, z).values():
                    metric.update(z.detach())  # type: ignore[operator]

    def _metrics(self, name: str, z: Tensor) -> nn.ModuleDict:
        key = name.replace(".", "/")  # a module's name may hold no dot
        if key not in self.by_layer:
            prox = self.layers[name].prox
            metrics: dict[str, Metric] = {
                "active_fraction": ActiveFraction(),
                "hoyer": HoyerIndex(),
                "dead_fraction": DeadFraction(prox.dim),
            }
            if prox.is_grouped:
                metrics["active_group_fraction"] = ActiveGroupFraction(prox.group_size_of, prox.dim)
            self.by_layer[key] = nn.ModuleDict(metrics).to(z.device)
        return self.by_layer[key]  # type: ignore[return-value]

    def compute(self) -> dict[str, float]:
        """All figures since the last `reset`, by ``<quantity>/<layer>`` and ``active_fraction/total``."""
        values = {"active_fraction/total": self.total.compute()} if self.by_layer else {}
        for key, metrics in self.by_layer.items():
            for quantity, metric in metrics.items():  # type: ignore[operator]
                values[f"{quantity}/{key.replace('/', '.')}"] = metric.compute()
        return {name: float(value) for name, value in values.items() if value.isfinite()}

    def reset(self) -> None:
        """Forget what was taken in."""
        for module in self.modules():
            if isinstance(module, Metric):
                module.reset()


def support_metrics(num_groups: int) -> MetricCollection:
    """``recall``, ``precision`` and ``exact`` of found supports and true ones, bool (signals, groups).

    The fraction of active groups that are found, of found groups that are active, and of signals whose groups are all
    right. A recall without active groups, or a precision without found ones, is 0. `dsc.measures.group_support` gives
    the support of a code; groups of one atom make it that of entries.
    """
    # Supports are bool by construction: checking their values would sort them all.
    metrics: dict[str, Metric | MetricCollection] = {
        "recall": BinaryRecall(validate_args=False),
        "precision": BinaryPrecision(validate_args=False),
        "exact": MultilabelExactMatch(num_groups, validate_args=False),
    }
    return MetricCollection(metrics, compute_groups=False)


class ClusterAccuracy(MulticlassConfusionMatrix):
    """Fraction of signals in the right class, each cluster taken for the class that makes it largest (Hungarian).

    Args:
        num_classes: how many classes or clusters there are, the larger of both.

    Raises:
        ValueError: a label that is not from 0 to num_classes − 1.
    """

    def __init__(self, num_classes: int) -> None:
        super().__init__(num_classes)

    def update(self, preds: Tensor, target: Tensor) -> None:
        """Take in clusters (N,) and classes (N,), int64."""
        for what, labels in (("cluster", preds), ("class", target)):
            wrong = labels[(labels < 0) | (labels >= self.num_classes)]
            if len(wrong):  # which a confusion matrix would count elsewhere
                raise ValueError(f"{what} {int(wrong[0])} is not from 0 to {self.num_classes - 1}: give more classes")
        super().update(preds, target)

    def compute(self) -> Tensor:
        counts: Tensor = super().compute()
        return counts.gather(1, assign(counts).unsqueeze(1)).sum() / counts.sum()


def clustering_metrics(num_classes: int) -> MetricCollection:
    """``accuracy`` (`ClusterAccuracy`), ``nmi`` (arithmetic mean) and ``ari`` of clusters (N,) and classes (N,)."""
    metrics: dict[str, Metric | MetricCollection] = {
        "accuracy": ClusterAccuracy(num_classes),
        "nmi": NormalizedMutualInfoScore(),
        "ari": AdjustedRandScore(),
    }
    return MetricCollection(metrics, compute_groups=False)


def clustering_scores(clusters: Tensor, labels: Tensor) -> dict[str, float]:
    """`clustering_metrics` of clusters and classes, both int64 (N,)."""
    metrics = clustering_metrics(int(max(clusters.max(), labels.max())) + 1)
    with torch.sparse.check_sparse_tensor_invariants(True):  # torch warns of contingency tables that are not checked
        return {name: float(value) for name, value in metrics(clusters, labels.cpu()).items()}


def solving_layers(model: nn.Module) -> dict[str, SparseCoding]:
    """Layers whose steps lead to a minimiser: those of a convex penalty, without the bias of a plain layer."""
    coders = {name: layer.coder for name, layer in sparse_layers(model).items()}
    return {n: c for n, c in coders.items() if c is not None and c.solves and c.has_gap}


Curves = dict[str, dict[str, Tensor]]


def convergence_curves(model: nn.Module, x: Tensor, steps: int = RATE_STEPS, reference_steps: int = 1000) -> Curves:
    """Errors after 1…`steps` steps of ISTA and of FISTA, by layer and solver, for the layers that `convergence` knows.

    ``curves[layer][solver]`` has shape (steps,).
    """
    with torch.no_grad():
        inputs = coder_inputs(model, x)
    curves: Curves = {}
    for name, coder in solving_layers(model).items():
        reference = coder.reference(inputs[name], reference_steps)
        if reference.any():
            errors = (convergence_errors(coder, inputs[name], steps, kind, reference) for kind in SOLVERS.values())
            curves[name] = dict(zip(SOLVERS, errors, strict=True))
    return curves


def curve_figures(curves: Curves, depths: Iterable[int]) -> list[dict[str, Any]]:
    """A row a layer and solver: the errors at `depths` and, where it can be fitted, the rate a step."""
    rows: list[dict[str, Any]] = []
    for layer, by_solver in curves.items():
        for solver, errors in by_solver.items():
            row = {"layer": layer, "solver": solver, "errors": {str(k): float(errors[k - 1]) for k in depths}}
            rate = measures.fitted_rate(errors)
            rows.append(row if rate is None else row | {"rate": float(rate)})
    return rows


def convergence_errors(
    coder: SparseCoding,
    x: Tensor,
    steps: int = RATE_STEPS,
    solver: type[ISTA] | None = None,
    reference: Tensor | None = None,
) -> Tensor:
    """``‖z_k − z_ref‖/‖z_ref‖`` for k = 1…`steps` of the layer's own iteration with input `x`, shape (steps,).

    Raises ValueError where the converged code is zero.
    """
    reference = coder.reference(x) if reference is None else reference
    return torch.stack([measures.relative_error(z, reference) for z in coder.trace(x, steps, solver).codes])


def convergence(model: nn.Module, x: Tensor, reference_steps: int = 200) -> dict[str, float]:
    """``rate``, ``error`` and ``steps`` of every `SparseCoding` layer of `model` on the images `x`.

    Each layer runs its own step on its frozen input, against at most `reference_steps` of FISTA with restart.
    Absent where it has no meaning: a plain layer (with a bias), an activation that is no prox, a code that
    converges to zero, a rate with fewer than two errors above 1e-6.
    """
    figures: dict[str, float] = {}
    with torch.no_grad():
        inputs = coder_inputs(model, x)
    for name, coder in solving_layers(model).items():
        reference = coder.reference(inputs[name], reference_steps)
        if not reference.any():
            continue
        depth = coder.solver.steps
        errors = convergence_errors(coder, inputs[name], max(depth, RATE_STEPS), reference=reference)
        figures[f"steps/{name}"] = depth
        figures[f"error/{name}"] = float(errors[depth - 1])
        rate = measures.fitted_rate(errors[:RATE_STEPS])
        if rate is not None:
            figures[f"rate/{name}"] = float(rate)
    return figures
