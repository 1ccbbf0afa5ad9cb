import numpy as np
import pytest
import torch
from jsonargparse import ArgumentParser
from torch import nn

from dsc.activations import create_activation
from dsc.dictionaries import ConvDictionary, DenseDictionary
from dsc.layers import DeepSparseCoding, SparseCoding
from dsc.observe import Observer
from dsc.regularizers import L1, Coherence, GroupL21, Hoyer, Log, Reconstruction, Regularizer
from dsc.solvers import ISTA

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
        (Log, {"eps": 1.0}, np.log(4 * 5 * 3) / 8, np.log(7 * 9 * 5) / 8),
        (Log, {"eps": 2.0}, np.log(2.5 * 3 * 2) / 8, np.log(4 * 5 * 3) / 8),
    ],
)
def test_penalties_by_hand(kind, kwargs, first, second):
    assert penalty(kind(0.5, "first", **kwargs)).item() == pytest.approx(0.5 * first)
    assert penalty(kind(0.5, "second", **kwargs)).item() == pytest.approx(0.5 * second)
    assert penalty(kind(0.5, **kwargs)).item() == pytest.approx(0.5 * (first + second))
    assert penalty(kind(0.5, "*s*", **kwargs)).item() == pytest.approx(0.5 * (first + second))
    assert penalty(kind(0.0, **kwargs)).item() == 0


def test_zero_codes_cost_nothing_and_have_finite_gradients():
    for regularizer in (L1(1.0), GroupL21(1.0), Hoyer(1.0), Log(1.0)):
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


@pytest.mark.parametrize("kind", [L1, GroupL21, Hoyer, Log])
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
@pytest.mark.parametrize("kind", [L1, GroupL21, Hoyer, Log, Coherence, Reconstruction])
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


class Coders(nn.Module):
    """A chain of two dictionaries and a third layer that has none; tiny, and in double precision."""

    def __init__(self, joint=False, steps=3, prox="soft", **kwargs):
        super().__init__()
        torch.manual_seed(0)
        act = dict(threshold=0.02, **kwargs)
        first = SparseCoding(ConvDictionary(2, 4, 3, 2, 1), create_activation(prox, **act), ISTA(steps), step=0.2)
        second = SparseCoding(ConvDictionary(4, 6, 2), create_activation(prox, **act), ISTA(steps), step=0.2)
        self.coder = DeepSparseCoding([first, second], ISTA(steps), joint)
        self.last = create_activation("soft", threshold=0.0)
        self.double()

    def forward(self, x):
        return self.last(self.coder(x))


IMAGES = torch.randn(2, 2, 6, 5, generator=torch.Generator().manual_seed(1)).double()


def cosines(dictionary):
    atoms = dictionary.weight.detach().flatten(1).numpy()
    unit = atoms / np.linalg.norm(atoms, axis=1, keepdims=True)
    return unit @ unit.T


def test_coherence_is_the_mean_over_pairs_of_atoms():
    model = Coders()
    expected = []
    for layer in model.coder:
        with torch.no_grad():
            layer.dictionary.weight.mul_(3)  # atoms count with unit norm
        gram = cosines(layer.dictionary)
        expected.append(np.mean([gram[i, j] ** 2 for i in range(len(gram)) for j in range(len(gram)) if i != j]))
    assert penalty(Coherence(0.5), IMAGES, model).item() == pytest.approx(0.5 * sum(expected))
    assert penalty(Coherence(0.5, "*1"), IMAGES, model).item() == pytest.approx(0.5 * expected[1])


def test_coherence_leaves_out_pairs_within_a_group():
    model = Coders(prox="group_relu", group_size=2)
    gram = cosines(model.coder.layers[1].dictionary)
    pairs = [gram[i, j] ** 2 for i in range(6) for j in range(6) if i // 2 != j // 2]
    assert penalty(Coherence(1.0, "*1"), IMAGES, model).item() == pytest.approx(np.mean(pairs))


@pytest.mark.parametrize("joint", [False, True])
def test_reconstruction_is_what_the_codes_leave_of_the_inputs(joint):
    model = Coders(joint)
    codes = model.coder.codes(IMAGES)
    expected = []
    for layer, x, z in zip(model.coder, [IMAGES, codes[0]], codes, strict=True):
        x, estimate = x.detach().numpy(), layer.decode(z, x.shape[-2:]).detach().numpy()
        expected.append(((x - estimate) ** 2).sum() / (x**2).sum())
    assert penalty(Reconstruction(2.0), IMAGES, model).item() == pytest.approx(2 * sum(expected))
    assert penalty(Reconstruction(2.0, "*0"), IMAGES, model).item() == pytest.approx(2 * expected[0])


def test_reconstruction_of_a_layer_that_runs_twice_takes_each_input():
    coder = SparseCoding(DenseDictionary(4, 4), create_activation("soft", -1), ISTA(2))
    coder.eval()
    x = torch.randn(3, 4)
    with torch.no_grad():
        y = coder(x)
        parts = [(a - coder.decode(b)).square().sum() / a.square().sum() for a, b in ((x, y), (y, coder(y)))]
    assert penalty(Reconstruction(1.0), x, nn.Sequential(coder, coder)).item() == pytest.approx(sum(parts).item())


@pytest.mark.parametrize("joint", [False, True])
@pytest.mark.parametrize("kind", [L1, GroupL21, Hoyer, Log, Coherence, Reconstruction])
def test_gradients_agree_with_finite_differences(kind, joint):
    model = Coders(joint, prox="group_relu", group_size=2)
    for layer in model.coder:
        weight = layer.dictionary.weight
        value = penalty(kind(1.0), IMAGES, model)
        slope = torch.autograd.grad(value, weight)[0]
        direction, h = torch.randn_like(weight), 1e-6
        with torch.no_grad():
            weight.add_(h * direction)
            above = penalty(kind(1.0), IMAGES, model)
            weight.sub_(2 * h * direction)
            below = penalty(kind(1.0), IMAGES, model)
            weight.add_(h * direction)
        assert (slope * direction).sum().item() == pytest.approx(((above - below) / (2 * h)).item(), rel=1e-4, abs=1e-9)


@pytest.mark.parametrize("kind", [Coherence, Reconstruction])
def test_layers_without_a_dictionary_are_passed_over_but_not_alone(kind):
    model = Coders()
    assert penalty(kind(1.0), IMAGES, model) == penalty(kind(1.0, "coder*"), IMAGES, model)
    with pytest.raises(ValueError, match=f"{kind.__name__} needs layers with a.*, and last has none.*layers.1"):
        penalty(kind(1.0, "last"), IMAGES, model)


def test_reconstruction_of_zeros_by_zeros_costs_nothing():
    model = Coders()
    assert penalty(Reconstruction(1.0), torch.zeros_like(IMAGES), model).item() == 0


def test_weight_rises_linearly_over_the_warmup():
    regularizer = L1(0.5, "first", warmup=0.4)
    with Observer(model := Model()) as observer:
        model(CODE)
        for progress, part in ((0, 0), (0.1, 0.25), (0.2, 0.5), (0.4, 1), (0.9, 1), (1.0, 1)):
            assert regularizer(observer, progress).item() == pytest.approx(part * 0.5 * 9 / 8)
            assert regularizer.weight_at(progress).item() == pytest.approx(part * 0.5)
        assert regularizer(observer).item() == pytest.approx(0.5 * 9 / 8)
    assert L1(0.5).weight_at(0.0).item() == 0.5


# A tenth of the running mean is new; the weight moves by at most 2 %, with the relative error of the mean.
@pytest.mark.parametrize("layer, active", [("first", 3 / 8), ("second", 2 / 4), ("*", (3 / 8 + 2 / 4) / 2)])
@pytest.mark.parametrize("target", [0.3, 0.8])
def test_the_rule_of_the_target_step_by_step(layer, active, target):
    regularizer = L1(0.5, layer, target=target, warmup=0.5)
    mean, weight = 1.0, 0.5
    with Observer(model := Model()) as observer:
        model(CODE)
        regularizer(observer, 0.4)  # warming up: nothing is adapted
        for _ in range(15):
            mean += (active - mean) / 10
            weight *= np.exp(0.02 * np.clip(mean / target - 1, -1, 1))
            regularizer(observer, 0.5)
            assert regularizer.weight.item() == pytest.approx(weight, rel=1e-5)
            assert regularizer.active.item() == pytest.approx(mean, rel=1e-5)
            assert regularizer.weight_at(0.5).item() == pytest.approx(weight * mean**2, rel=1e-5)
        before = {name: value.clone() for name, value in regularizer.state_dict().items()}
        regularizer.eval()(observer)
        assert all(torch.equal(value, before[name]) for name, value in regularizer.state_dict().items())


def train(regularizer, steps, model=None, first=0):
    """A linear layer and a ReLU that learn a random map from fresh random signals; the active fraction a step."""
    torch.manual_seed(0)
    mixing = torch.randn(16, 8)
    model = model or nn.Sequential(nn.Linear(16, 64), create_activation("relu", threshold=0.05), nn.Linear(64, 8))
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    fractions = []
    with Observer(model) as observer:
        for step in range(first, first + steps):
            x = torch.randn(64, 16, generator=torch.Generator().manual_seed(step))
            loss = (model(x) - (x @ mixing).tanh()).square().mean() + regularizer(observer)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            fractions.append(observer.features["1"][0].ne(0).float().mean())
    return torch.stack(fractions), model


@pytest.mark.parametrize("weight", [0.01, 1.0])
def test_target_is_reached_and_held_whatever_the_first_weight(weight):
    fractions, _ = train(L1(weight, "1", target=0.15), 1000)
    assert fractions[:20].mean() > 0.3
    for part in fractions[700:].split(100):
        assert part.mean().item() == pytest.approx(0.15, abs=0.02)


def test_a_saved_regularizer_goes_on_bitwise():
    whole = L1(0.1, "1", target=0.15)
    _, model = train(whole, 60)
    part = L1(0.1, "1", target=0.15)
    _, resumed = train(part, 30)
    other = L1(7.0, "1", target=0.15)  # the saved weight, not the one it was built with
    other.load_state_dict(part.state_dict())
    train(other, 30, resumed, first=30)
    assert all(torch.equal(value, whole.state_dict()[name]) for name, value in other.state_dict().items())
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), resumed.parameters(), strict=True))
    assert set(whole.state_dict()) == {"weight", "active"} and not L1(0.1).state_dict()


@pytest.mark.parametrize(
    "kwargs, message",
    [
        (dict(target=0.0), r"target is an active fraction in \(0, 1\), got 0.0"),
        (dict(target=1.0), r"in \(0, 1\), got 1.0"),
        (dict(target=float("nan")), "got nan"),
        (dict(weight=0.0, target=0.1), "start from one above 0"),
        (dict(warmup=-0.1), r"warmup is a fraction of the run in \[0, 1\], got -0.1"),
        (dict(warmup=1.5), "got 1.5"),
        (dict(warmup=1.0, target=0.1), "warmup below 1"),
    ],
)
@pytest.mark.parametrize("kind", [L1, GroupL21, Hoyer, Log])
def test_arguments_out_of_range_are_named(kind, kwargs, message):
    with pytest.raises(ValueError, match=message):
        kind(**(dict(weight=0.1) | kwargs))


def test_log_needs_a_positive_eps():
    with pytest.raises(ValueError, match="eps must be above 0, got 0"):
        Log(1.0, eps=0.0)


@pytest.mark.parametrize("name, kwargs", [("gelu", {}), ("top_k", {"k": 2})])
def test_target_needs_an_activation_whose_zeros_can_follow(name, kwargs):
    act = create_activation(name, -1, **kwargs)
    with pytest.raises(ValueError, match="target=0.1 cannot be held in layer"):
        penalty(L1(1.0, target=0.1), model=nn.Sequential(act))


@pytest.mark.parametrize(
    "kind, init_args",
    [
        ("L1", {"target": 0.1, "warmup": 0.2}),
        ("GroupL21", {"group_size": 4, "target": 0.1}),
        ("Log", {"eps": 0.2, "target": 0.1}),
        ("Coherence", {"warmup": 0.5}),
        ("Reconstruction", {"layers": "coder*"}),
    ],
)
def test_configuration_builds_them(kind, init_args):
    parser = ArgumentParser()
    parser.add_argument("--regularizers", type=list[Regularizer])
    entry = {"class_path": f"dsc.regularizers.{kind}", "init_args": {"weight": 0.5, **init_args}}
    made = parser.instantiate_classes(parser.parse_object({"regularizers": [entry]})).regularizers[0]
    assert type(made).__name__ == kind and made.weight.item() == 0.5
    assert all(getattr(made, name) == value for name, value in init_args.items())
