import pytest
import torch
from torch import nn

from dsc.activations import create_activation
from dsc.observe import Observer
from dsc.regularizers import L1, GroupL21, Hoyer, Regularizer

CODE = torch.tensor([[3.0, -4.0, 0.0, 0.0], [0.0, 0.0, 0.0, 2.0]])


class Model(nn.Module):
    """Two sparse layers that pass what they are given (λ = 0), the second one with groups of two."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))
        self.first = create_activation("soft", threshold=0.0)
        self.second = create_activation("group_relu", threshold=0.0, group_size=2)

    def forward(self, x):
        return self.second(2 * self.first(self.scale * x))


def penalty(regularizer, x=CODE, model=None):
    model = model or Model()
    with Observer(model) as observer:
        model(x)
        return regularizer(observer)


# Means over the eight entries of CODE; the second layer's code is twice the first one's.
@pytest.mark.parametrize(
    "kind, kwargs, first, second",
    [
        (L1, {}, 9 / 8, 18 / 8),
        (GroupL21, {}, 9 / 8, 2 * (5 + 2) / 8),  # the layers' own groups: one entry, then two
        (GroupL21, {"group_size": 2}, (5 + 2) / 8, 2 * (5 + 2) / 8),
        (GroupL21, {"group_size": 4}, (5 + 2) / 8, 2 * (5 + 2) / 8),
        (GroupL21, {"group_size": 1}, 9 / 8, 18 / 8),
        (Hoyer, {}, (49 / 25 + 1) / 2 / 4, (49 / 25 + 1) / 2 / 4),  # blind to the scale
    ],
)
def test_penalties_by_hand(kind, kwargs, first, second):
    assert penalty(kind(0.5, "first", **kwargs)).item() == pytest.approx(0.5 * first)
    assert penalty(kind(0.5, "second", **kwargs)).item() == pytest.approx(0.5 * second)
    assert penalty(kind(0.5, **kwargs)).item() == pytest.approx(0.5 * (first + second))
    assert penalty(kind(0.5, "*s*", **kwargs)).item() == pytest.approx(0.5 * (first + second))
    assert penalty(kind(0.0, **kwargs)).item() == 0


def test_zero_codes_cost_nothing_and_have_finite_gradients():
    for regularizer in (L1(1.0), GroupL21(1.0), Hoyer(1.0)):
        model = Model()
        value = penalty(regularizer, torch.zeros(2, 4), model)
        value.backward()
        assert value.item() == 0 and model.scale.grad.isfinite()


@pytest.mark.parametrize(
    "regularizer, slope", [(L1(0.5), 0.5 * 27 / 8), (GroupL21(0.5), 0.5 * 23 / 8), (Hoyer(0.5), 0.0)]
)
def test_gradient_reaches_the_weights(regularizer, slope):
    model = Model()  # its codes, and so the first two penalties, are proportional to the weight
    penalty(regularizer, model=model).backward()
    assert model.scale.grad.item() == pytest.approx(slope, abs=1e-6)


@pytest.mark.parametrize("kind", [L1, GroupL21, Hoyer])
@pytest.mark.parametrize("x", [torch.randn(2, 4, 3, 3), torch.randn(5, 4)])
def test_one_weight_means_the_same_for_every_batch_and_image_size(kind, x):
    value = penalty(kind(1.0), x)
    tiled = x.repeat(3, *[1] * (x.ndim - 1))
    torch.testing.assert_close(penalty(kind(1.0), tiled), value)
    if x.ndim == 4:
        torch.testing.assert_close(penalty(kind(1.0), x.repeat(1, 1, 2, 2)), value)


def test_groups_lie_along_the_channels_of_the_layer():
    x = torch.randn(2, 3, 4)
    for dim in (-1, 1):
        act = create_activation("group_relu", dim, threshold=0.0, groups=2 if dim == -1 else 3)
        expected = x.unflatten(2, (2, 2)).norm(dim=3).sum() if dim == -1 else x.abs().sum()
        assert penalty(GroupL21(1.0), x, act).item() == pytest.approx(expected.item() / x.numel(), rel=1e-5)


def test_layer_that_runs_twice_is_counted_twice():
    act = create_activation("soft", threshold=0.0)
    assert penalty(L1(1.0), model=nn.Sequential(act, act)).item() == pytest.approx(2 * 9 / 8)


def test_unknown_pattern_names_the_nearest_layer():
    with pytest.raises(ValueError, match="unknown layer 'secnd'; did you mean 'second'.*first, second"):
        penalty(L1(1.0, "secnd"))


@pytest.mark.parametrize("weight", [-0.1, float("nan")])
@pytest.mark.parametrize("kind", [L1, GroupL21, Hoyer])
def test_weight_must_not_be_negative(kind, weight):
    with pytest.raises(ValueError, match=f"at least 0, got {weight}"):
        kind(weight)


def test_group_size_that_does_not_divide_names_those_that_do():
    with pytest.raises(ValueError, match="group_size=3 does not divide the 4 channels.*2 or 4"):
        penalty(GroupL21(1.0, group_size=3))


def test_own_regularizer_needs_only_a_penalty():
    class Largest(Regularizer):
        def penalty(self, z, layer):
            return z.abs().max()

    assert penalty(Largest(2.0)).item() == 2 * (4 + 8)
