import numpy as np
import pytest
import torch
from oracles import GROUPED, NONNEG, minimise, penalty
from torch import nn
from torch.nn import functional as F

from dsc.prox import (
    PROX,
    TORCH,
    Elementwise,
    ReLU,
    Soft,
    activation_factory,
    create_activation,
    group_relu,
    group_relu_nonneg,
    list_activations,
    relu,
    soft,
)

NAMES = ["relu", "soft", "group_relu", "group_relu_nonneg"]
SHAPES = {1: (3, 6, 2, 2), -1: (2, 3, 6)}


def make(name, size=3, **kwargs):
    return create_activation(name, group_size=size if GROUPED[name] else None, **kwargs)


def size_of(name):
    return 3 if GROUPED[name] else 1


def thresholds(name, kind):
    return torch.linspace(0.2, 0.9, 6 // size_of(name)).tolist() if kind == "several" else 0.4


def signals(dim, seed=0):
    return torch.randn(SHAPES[dim], dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("dim", [1, -1])
@pytest.mark.parametrize("learn", [False, True])
@pytest.mark.parametrize("kind", ["scalar", "several"])
@pytest.mark.parametrize("name", NAMES)
def test_forward_minimises_and_penalty_is_the_norm(name, kind, learn, dim):
    z, t, step = signals(dim), thresholds(name, kind), 0.7
    prox = make(name, threshold=t, learn=learn, dim=dim).double()
    u = prox(z, step)
    expected = minimise(name, z, step * np.array(t), size_of(name), dim)
    torch.testing.assert_close(u, expected, atol=2e-7, rtol=0, check_dtype=False)
    omega = penalty(name, expected, np.array(t), size_of(name), dim)
    torch.testing.assert_close(prox.penalty(expected), torch.from_numpy(omega), rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", NAMES)
def test_functional_form_minimises_with_threshold_tensors(name):
    z = signals(1)
    t = torch.tensor([0.3, 0.8] if GROUPED[name] else [0.1, 0.2, 0.3, 0.5, 0.8, 1.3], dtype=torch.float64)
    if GROUPED[name]:
        u = {"group_relu": group_relu, "group_relu_nonneg": group_relu_nonneg}[name](z, t.view(2, 1, 1, 1), 3)
    else:
        u = {"relu": relu, "soft": soft}[name](z, t.view(6, 1, 1))
    torch.testing.assert_close(u, minimise(name, z, t.numpy(), size_of(name)), atol=2e-7, rtol=0)


@pytest.mark.parametrize("dim", [1, -1])
@pytest.mark.parametrize("name", NAMES)
def test_no_feasible_point_beats_the_prox(name, dim):
    # ½‖·−z‖² is 1-strongly convex: F(u) ≥ F(p) + ½‖u − p‖² for every u.
    z, step = signals(dim), 0.8
    prox = make(name, threshold=thresholds(name, "several"), dim=dim).double()
    p = prox(z, step)

    def objective(u):
        return (u - z).square().flatten(1).sum(1) / 2 + step * prox.penalty(u)

    for seed in range(300):
        u = p + 10.0 ** -(seed % 5) * signals(dim, seed)
        u = u.clamp_min(0) if NONNEG[name] else u
        assert (objective(u) >= objective(p) + (u - p).square().flatten(1).sum(1) / 2 - 1e-6).all()


@pytest.mark.parametrize("threshold", [0.0, 0.5])
@pytest.mark.parametrize("name", ["relu", "group_relu_nonneg"])
def test_penalty_is_infinite_for_the_infeasible_signals_only(name, threshold):
    z = signals(1).abs()
    z[1, 0, 0, 0] = -1e-3
    expected = torch.from_numpy(penalty(name, z, threshold, size_of(name)))
    torch.testing.assert_close(make(name, threshold=threshold).double().penalty(z), expected)
    assert expected.isinf().tolist() == [False, True, False]


@pytest.mark.parametrize("threshold", [0.0, 0.3, "tensor"])
@pytest.mark.parametrize("grouped,plain", [(group_relu, soft), (group_relu_nonneg, relu)])
def test_groups_of_one_are_the_ungrouped_form(grouped, plain, threshold):
    z = signals(1)
    t = torch.full((6, 1, 1), 0.3, dtype=torch.float64) if threshold == "tensor" else threshold
    expected = plain(F.relu(z) if plain is relu else z, t)
    torch.testing.assert_close(grouped(z, t[:, None] if threshold == "tensor" else t, 1), expected)


@pytest.mark.parametrize("name", ["group_relu", "group_relu_nonneg"])
def test_number_of_groups_equals_their_size(name):
    z, t = signals(1), [0.2, 0.6]
    by_groups = create_activation(name, groups=2, threshold=t).double()
    by_size = create_activation(name, group_size=3, threshold=t).double()
    assert torch.equal(by_groups(z), by_size(z))
    assert torch.equal(by_groups.penalty(z.abs()), by_size.penalty(z.abs()))
    assert by_groups.group_size_of(6) == by_size.group_size_of(6) == 3


def test_groups_have_eight_channels_by_default():
    z = torch.randn(2, 16, generator=torch.Generator().manual_seed(0))
    assert torch.equal(create_activation("group_relu")(z), group_relu(z, 0.1, 8))


@pytest.mark.parametrize("name", NAMES)
def test_firmly_nonexpansive(name):
    prox = make(name, threshold=0.5).double()
    for seed in range(50):
        a, b = signals(1, seed), signals(1, seed + 1000) * 3
        move = (prox(a) - prox(b)).flatten(1)
        assert (move.square().sum(1) <= (move * (a - b).flatten(1)).sum(1) + 1e-12).all()


@pytest.mark.parametrize("learn", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("value", [0.0, 1e-30, 1e30, -1e30])
@pytest.mark.parametrize("name", NAMES)
def test_extreme_inputs_have_the_right_value_and_gradient(name, value, dtype, learn):
    z = torch.full((2, 6), value, dtype=dtype, requires_grad=True)
    prox = make(name, threshold=0.4, learn=learn)
    u = prox(z)
    u.float().sum().backward()
    active = abs(value) > 1 and (value > 0 or not NONNEG[name])
    assert torch.equal(u, z if active else torch.zeros_like(z))
    assert torch.equal(z.grad, torch.full_like(z, float(active)))
    assert all(p.grad.isfinite().all() for p in prox.parameters())


@pytest.mark.parametrize("name", NAMES)
def test_gradients_match_finite_differences_away_from_kinks(name):
    z = torch.tensor([[1.5, -2.0, 0.7, 0.05, -0.1, 0.08]], dtype=torch.float64, requires_grad=True)
    prox = make(name, threshold=0.4, learn=True).double()
    step = torch.tensor(0.8, dtype=torch.float64, requires_grad=True)

    def call(z, step, raw):
        return torch.func.functional_call(prox, {"raw_threshold": raw}, (z, step))

    assert torch.autograd.gradcheck(call, (z, step, prox.raw_threshold))


@pytest.mark.parametrize("learn", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_bfloat16_is_close_to_float32(name, learn):
    z = signals(1).float()
    prox = make(name, threshold=0.4, learn=learn)
    u = prox(z.bfloat16())
    assert u.dtype == torch.bfloat16
    torch.testing.assert_close(u.float(), prox(z), atol=0.02, rtol=0.01)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("value", [1e-4, 0.1, 3.0, 100.0])
def test_learned_threshold_starts_at_its_value(name, value):
    start = make(name, threshold=value, learn=True).threshold.detach()
    torch.testing.assert_close(start, torch.tensor(value))


@pytest.mark.parametrize("name", NAMES)
def test_a_threshold_keeps_the_precision_it_was_given(name):
    prox = make(name, threshold=0.1)
    assert prox.threshold == 0.1
    assert "threshold=0.1," in repr(prox)


def test_relu_without_threshold_is_torch_relu():
    z = signals(1).requires_grad_()
    assert torch.equal(ReLU()(z, torch.tensor(0.3)), F.relu(z))


@pytest.mark.parametrize("name", sorted(TORCH))
def test_torch_activations_pass_through(name):
    z = signals(1)
    wrapped = create_activation(name)
    assert torch.equal(wrapped(z, 0.3), TORCH[name]()(z))
    assert not wrapped.is_prox
    with pytest.raises(TypeError, match="no prox"):
        wrapped.penalty(z)


@pytest.mark.parametrize("activation", [nn.Hardtanh, torch.tanh, nn.Mish()])
def test_classes_and_callables_pass_through(activation):
    z = signals(1)
    plain = activation() if isinstance(activation, type) else activation
    assert torch.equal(create_activation(activation)(z), plain(z))


def test_a_prox_class_is_made_with_its_arguments():
    z = signals(-1)
    assert torch.equal(create_activation(Soft, dim=-1, threshold=0.5)(z), soft(z, 0.5))


def test_names_listed_are_the_names_created():
    assert list_activations() == sorted([*PROX, *TORCH])
    for name in list_activations():
        assert isinstance(create_activation(name), PROX.get(name, Elementwise))


@pytest.mark.parametrize(
    "arguments,message",
    [
        ({"activation": "relu", "threshold": -0.1}, "at least 0, got -0.1"),
        ({"activation": "soft", "threshold": [0.1, -0.1]}, "at least 0"),
        ({"activation": "soft", "threshold": float("nan")}, "finite"),
        ({"activation": "soft", "threshold": float("inf")}, "finite"),
        ({"activation": "relu", "threshold": 0.0, "learn": True}, "threshold > 0"),
        ({"activation": "group_relu", "group_size": 2, "groups": 4}, "not both .got 2 and 4"),
        ({"activation": "group_relu", "group_size": 0}, "group_size must be at least 1, got 0"),
        ({"activation": "group_relu", "groups": -1}, "groups must be at least 1, got -1"),
        ({"activation": "group_rleu"}, "'group_rleu'; did you mean 'group_relu'.*silu"),
        ({"activation": "soft", "group_size": 2}, "'soft' takes no group_size .*group_relu, group_relu_n"),
        ({"activation": "gelu", "threshold": 0.1}, "'gelu' takes no threshold .*relu, soft"),
        ({"activation": "relu", "colour": 1}, "'relu' takes no colour .*none"),
    ],
)
def test_wrong_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        create_activation(**arguments)


@pytest.mark.parametrize(
    "arguments,message",
    [
        ({"group_size": 5}, "group_size=5 does not divide the 12 channels.*: 4 or 6"),
        ({"group_size": 13}, "group_size=13 does not divide the 12 channels.*: 12$"),
        ({"groups": 5}, "groups=5 does not divide the 12 channels.*: 4 or 6"),
        ({"group_size": 4, "threshold": [0.1, 0.2]}, "threshold has 2 values, expected 1 or 3"),
    ],
)
def test_channels_that_do_not_fit_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        create_activation("group_relu", **arguments)(torch.ones(2, 12))


@pytest.mark.parametrize("name", NAMES)
def test_one_threshold_in_a_list_holds_for_all(name):
    z = signals(1)
    torch.testing.assert_close(make(name, threshold=[0.4]).double()(z), make(name, threshold=0.4).double()(z))


@pytest.mark.parametrize("activation", ["soft", Soft, Soft(0.5)])
def test_factory_makes_fresh_modules_and_ignores_inplace(activation):
    factory = activation_factory(activation, threshold=None if isinstance(activation, Soft) else 0.5)
    first, second = factory(inplace=True), factory()
    z = signals(1)
    before = z.clone()
    assert torch.equal(first(z), soft(before, 0.5))
    assert torch.equal(z, before)
    assert first is not second


def test_arguments_beside_a_ready_prox_are_not_dropped_silently():
    with pytest.raises(ValueError, match="threshold"):
        create_activation(Soft(0.1), threshold=0.5)
