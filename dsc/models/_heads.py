"""What networks share: timm's gradient checkpointing, and of classifiers a head, its pooling, and a fresh one."""

from collections.abc import Sequence
from dataclasses import replace
from typing import ClassVar

from timm.layers import ClassifierHead
from torch import Tensor, nn

from dsc.layers import DeepSparseCoding, SparseCoding


class Unrolled(nn.Module):
    """A network of layers that may take several steps."""

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Keep of these layers' steps the codes alone, and take each step once more in the backward pass."""
        for module in self.modules():
            if isinstance(module, SparseCoding | DeepSparseCoding):
                module.solver = replace(module.solver, gradient="checkpoint" if enable else "unroll")


class MapClassifier(Unrolled):
    """A network whose `forward_features` gives maps (batch, channels, h, w), pooled before a linear classifier."""

    def add_head(self, channels: int, num_classes: int, global_pool: str, drop_rate: float) -> None:
        """Make `head`, for maps of that many channels."""
        self.num_classes = num_classes
        self.num_features = self.head_hidden_size = channels
        self.head = ClassifierHead(channels, num_classes, pool_type=global_pool, drop_rate=drop_rate)

    def forward_features(self, x: Tensor) -> Tensor:
        """Features of images."""
        raise TypeError(f"{type(self).__name__} defines no features")

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Pooled features, or logits."""
        return self.head(x, pre_logits=pre_logits)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))

    def get_classifier(self) -> nn.Module:
        """The last linear layer."""
        return self.head.fc

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """A fresh head for another number of classes."""
        self.num_classes = num_classes
        self.head.reset(num_classes, global_pool)


class VectorClassifier(Unrolled):
    """A network whose features, once `pool`ed, are vectors (batch, features), before a linear classifier."""

    pools: ClassVar[Sequence[str]] = ("",)  # what `global_pool` may be; "" leaves the features as they are

    def add_head(self, features: int, num_classes: int, global_pool: str, drop_rate: float) -> None:
        """Make `head`, for that many features."""
        self.num_features = self.head_hidden_size = features
        self.head_drop = nn.Dropout(drop_rate)
        self.reset_classifier(num_classes, global_pool)

    def forward_features(self, x: Tensor) -> Tensor:
        """Features of images."""
        raise TypeError(f"{type(self).__name__} defines no features")

    def pool(self, x: Tensor) -> Tensor:
        """Features as `global_pool` says."""
        return x

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Pooled features, or logits."""
        x = self.head_drop(self.pool(x))
        return x if pre_logits else self.head(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))

    def get_classifier(self) -> nn.Module:
        """The last linear layer."""
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """A fresh head for another number of classes, and another pooling. Raises ValueError for an unknown one."""
        if global_pool is not None:
            if global_pool not in self.pools:
                known = " or ".join(map(repr, self.pools))
                raise ValueError(f"global_pool of {type(self).__name__} must be {known}, got {global_pool!r}")
            self.global_pool = global_pool
        self.num_classes = num_classes
        like = next(self.parameters())
        self.head = nn.Linear(self.num_features, num_classes).to(like) if num_classes else nn.Identity()
