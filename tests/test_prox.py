import numpy as np
import pytest
import torch
from oracles import CONVEX, GROUPED, NONNEG, minimise, penalty, search_supports
from scipy.optimize import brentq
from torch.nn import functional as F

from dsc import shrinkage
from dsc.activations import PROX, create_activation
from dsc.prox import ReLU

NAMES = sorted(PROX)
COUNTING = sorted(PROX.keys() - set(CONVEX))
WITH_THRESHOLD = [name for name in NAMES if PROX[name].has_threshold]
KEPT = {"top_k": {"k": 2}, "group_top_k": {"k": 1}}
SHAPES = {1: (3, 6, 2, 2), -1: (2, 3, 6)}


def make(name, size=3, threshold=0.4, learn=False, **kwargs):
    given = {"threshold": threshold, "learn": learn} if PROX[name].has_threshold else {}
    return create_activation(name, group_size=size if GROUPED[name] else None, **given | KEPT.get(name, {}) | kwargs)


def size_of(name):
    return 3 if GROUPED[name] else 1


def thresholds(name, kind):
    return torch.linspace(0.2, 0.9, 6 // size_of(name)).tolist() if kind == "several" else 0.4


def signals(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def feasible(name, z):
    return z.abs() if NONNEG[name] else z


# What the forward minimises


@pytest.mark.parametrize("dim", [1, -1])
@pytest.mark.parametrize("learn", [False, True])
@pytest.mark.parametrize("kind", ["scalar", "several"])
@pytest.mark.parametrize("name", CONVEX)
def test_forward_minimises_and_penalty_is_the_norm(name, kind, learn, dim):
    z, t, step = signals(*SHAPES[dim]), thresholds(name, kind), 0.7
    prox = make(name, threshold=t, learn=learn, dim=dim).double()
    u = prox(z, step)
    expected = minimise(name, z, step * np.array(t), size_of(name), dim)
    torch.testing.assert_close(u, expected, atol=3e-7, rtol=0, check_dtype=False)
    omega = penalty(name, expected, np.array(t), size_of(name), dim)
    torch.testing.assert_close(prox.penalty(expected), torch.from_numpy(omega), rtol=1e-6, atol=0)


@pytest.mark.parametrize("l1_ratio", [0.0, 0.2, 0.9, 1.0])
@pytest.mark.parametrize("name", ["elastic", "sparse_group"])
def test_forward_minimises_at_every_l1_ratio(name, l1_ratio):
    z, t = signals(3, 6), thresholds(name, "several")
    prox = make(name, threshold=t, l1_ratio=l1_ratio).double()
    u = minimise(name, z, np.array(t), size_of(name), l1_ratio=l1_ratio)
    torch.testing.assert_close(prox(z), u, atol=3e-7, rtol=0, check_dtype=False)
    omega = penalty(name, u, np.array(t), size_of(name), l1_ratio=l1_ratio)
    torch.testing.assert_close(prox.penalty(u), torch.from_numpy(omega), rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", CONVEX)
def test_functional_form_minimises_with_threshold_tensors(name):
    z = signals(*SHAPES[1])
    t = torch.tensor([0.3, 0.8] if GROUPED[name] else [0.1, 0.2, 0.3, 0.5, 0.8, 1.3], dtype=torch.float64)
    shaped = (t.view(2, 1, 1, 1), 3) if GROUPED[name] else (t.view(6, 1, 1),)
    u = getattr(shrinkage, name)(z, *shaped)
    torch.testing.assert_close(u, minimise(name, z, t.numpy(), size_of(name)), atol=3e-7, rtol=0)


@pytest.mark.parametrize("dim", [1, -1])
@pytest.mark.parametrize("name", CONVEX)
def test_no_feasible_point_beats_the_prox(name, dim):
    # ½‖·−z‖² is 1-strongly convex: F(u) ≥ F(p) + ½‖u − p‖² for every u.
    z, step = signals(*SHAPES[dim]), 0.8
    prox = make(name, threshold=thresholds(name, "several"), dim=dim).double()
    p = prox(z, step)

    def objective(u):
        return (u - z).square().flatten(1).sum(1) / 2 + step * prox.penalty(u)

    for seed in range(300):
        u = p + 10.0 ** -(seed % 5) * signals(*SHAPES[dim], seed=seed)
        u = u.clamp_min(0) if NONNEG[name] else u
        assert (objective(u) >= objective(p) + (u - p).square().flatten(1).sum(1) / 2 - 1e-6).all()


@pytest.mark.parametrize("learn", [False, True])
@pytest.mark.parametrize("t", [0.3, [0.05, 0.2, 0.6, 1.5]])
@pytest.mark.parametrize("name", ["hard", "jump_relu"])
def test_l0_forward_has_the_best_of_all_supports(name, t, learn):
    z, step = signals(40, 4), 0.7
    prox = make(name, threshold=t, learn=learn).double()
    best = search_supports(z, lambda s: step * (np.array(t) * s).sum(), NONNEG[name])
    assert 0.2 < (best != 0).double().mean() < 0.8
    torch.testing.assert_close(prox(z, step), best)
    omega = torch.from_numpy(penalty(name, best, np.array(t)))
    torch.testing.assert_close(prox.penalty(best), omega, check_dtype=False)


@pytest.mark.parametrize("nonneg", [False, True])
@pytest.mark.parametrize("k", [1, 2, 4])
@pytest.mark.parametrize("name", ["top_k", "group_top_k"])
def test_top_k_forward_has_the_best_of_all_supports_it_allows(name, k, nonneg):
    size = size_of(name)
    z, prox = signals(40, 4 * size), make(name, k=k, nonneg=nonneg).double()
    best = search_supports(z, lambda s: 0 if sum(s) <= k else np.inf, nonneg, size)
    torch.testing.assert_close(prox(z, 0.3), best)
    assert torch.equal(prox.penalty(best), torch.zeros(40).double())


@pytest.mark.parametrize("name", ["hard", "jump_relu"])
def test_l0_entries_minimise_on_a_grid(name):
    prox, step = make(name, threshold=0.4).double(), 0.7
    z = torch.linspace(-2, 2, 40, dtype=torch.float64)[:, None]
    grid = torch.linspace(0.0 if NONNEG[name] else -2.5, 2.5, 5001, dtype=torch.float64)
    grid = torch.cat([grid, torch.zeros(1).double()])
    values = (grid - z).square() / 2 + step * 0.4 * (grid != 0)
    torch.testing.assert_close(prox(z, step), grid[values.argmin(1)][:, None], atol=6e-4, rtol=0)


@pytest.mark.parametrize("threshold", [0.0, 0.5])
@pytest.mark.parametrize("name", ["relu", "group_relu_nonneg", "jump_relu"])
def test_penalty_is_infinite_for_the_infeasible_signals_only(name, threshold):
    z = signals(*SHAPES[1]).abs()
    z[1, 0, 0, 0] = -1e-3
    expected = torch.from_numpy(penalty(name, z, threshold, size_of(name)))
    torch.testing.assert_close(make(name, threshold=threshold).double().penalty(z), expected)
    assert expected.isinf().tolist() == [False, True, False]


@pytest.mark.parametrize("nonneg", [False, True])
@pytest.mark.parametrize("name", ["top_k", "group_top_k"])
def test_top_k_penalty_is_infinite_for_the_infeasible_signals_only(name, nonneg):
    prox = make(name, nonneg=nonneg)
    z = prox(signals(*SHAPES[1]))
    z[1, :, 1, 0] = 1
    z[2, z[2, :, 0, 0].nonzero()[0], 0, 0] = -1
    assert prox.penalty(z).tolist() == [0, torch.inf, torch.inf if nonneg else 0]


@pytest.mark.parametrize("threshold", [0.0, 0.3, "tensor"])
@pytest.mark.parametrize(
    "name, plain", [("group_relu", "soft"), ("group_relu_nonneg", "relu"), ("sparse_group", "soft")]
)
def test_groups_of_one_are_the_ungrouped_form(name, plain, threshold):
    z = signals(*SHAPES[1])
    t = torch.full((6, 1, 1), 0.3, dtype=torch.float64) if threshold == "tensor" else threshold
    expected = getattr(shrinkage, plain)(F.relu(z) if plain == "relu" else z, t)
    grouped = getattr(shrinkage, name)(z, t[:, None] if threshold == "tensor" else t, 1)
    torch.testing.assert_close(grouped, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("dim", [1, -1])
def test_norm_of_groups_and_its_gradient_are_torchs_norm(dim, dtype):
    z = signals(*SHAPES[1]).to(dtype)
    z[0] = 0
    z.requires_grad_()
    wide = torch.promote_types(dtype, torch.float32)
    expected = torch.linalg.vector_norm(z, dim=dim, keepdim=True, dtype=wide)
    norm = shrinkage.group_norm(z, dim)
    torch.testing.assert_close(norm, expected)
    gradients = (torch.autograd.grad(value.cos().sum(), z)[0] for value in (norm, expected))
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("nonneg", [False, True])
def test_top_groups_of_one_are_the_top_entries(nonneg):
    z = signals(*SHAPES[1])
    assert torch.equal(shrinkage.group_top_k(z, 2, 1, nonneg=nonneg), shrinkage.top_k(z, 2, nonneg=nonneg))


def test_nonnegative_top_k_is_that_of_sparse_autoencoders():
    z = signals(20, 6)
    kept = z.topk(4, dim=-1)
    expected = torch.zeros_like(z).scatter(-1, kept.indices, kept.values.relu())
    assert torch.equal(shrinkage.top_k(z, 4, -1, nonneg=True), expected)


@pytest.mark.parametrize("t", [0.0, 0.4])
def test_l1_ratio_leads_from_one_penalty_to_the_other(t):
    z = signals(*SHAPES[1])
    group, soft = shrinkage.group_relu(z, t, 3), shrinkage.soft(z, t)
    torch.testing.assert_close(shrinkage.sparse_group(z, t, 3, l1_ratio=0.0), group)
    torch.testing.assert_close(shrinkage.sparse_group(z, t, 3, l1_ratio=1.0), soft)
    torch.testing.assert_close(shrinkage.elastic(z, t, l1_ratio=1.0), soft)
    torch.testing.assert_close(shrinkage.elastic(z, t, l1_ratio=0.0), z / (1 + t))


@pytest.mark.parametrize("name", NAMES)
def test_channels_lie_along_the_dimension_given(name):
    z, kind = signals(2, 6, 3, 2), "several" if PROX[name].has_threshold else None
    first, *others = (make(name, threshold=thresholds(name, kind), dim=dim).double() for dim in (1, 2, 3, -1, -2))
    for prox in others:
        moved = z.movedim(1, prox.dim).contiguous()
        torch.testing.assert_close(prox(moved).movedim(prox.dim, 1), first(z))
        torch.testing.assert_close(prox.penalty(prox(moved)), first.penalty(first(z)))


@pytest.mark.parametrize("kind", [None, "several"])
@pytest.mark.parametrize("name", NAMES)
def test_the_order_in_memory_changes_no_code_and_no_gradient(name, kind):
    kind = kind if PROX[name].has_threshold else None
    prox = make(name, threshold=thresholds(name, kind)).double()
    weights = signals(*SHAPES[1])
    results = []
    for memory_format in (torch.contiguous_format, torch.channels_last):
        z = signals(*SHAPES[1]).contiguous(memory_format=memory_format).requires_grad_()
        code = prox(z, 0.9)
        assert code.is_contiguous(memory_format=memory_format)
        results.append((code, *torch.autograd.grad((code * weights).sum(), z)))
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("name", [name for name in NAMES if GROUPED[name]])
def test_number_of_groups_equals_their_size(name):
    z, t = signals(*SHAPES[1]), {"threshold": [0.2, 0.6]} if PROX[name].has_threshold else {}
    by_groups = create_activation(name, groups=2, **t).double()
    by_size = create_activation(name, group_size=3, **t).double()
    assert torch.equal(by_groups(z), by_size(z))
    assert torch.equal(by_groups.penalty(z.abs()), by_size.penalty(z.abs()))
    assert by_groups.group_size_of(6) == by_size.group_size_of(6) == 3


def test_groups_have_eight_channels_by_default():
    z = torch.randn(2, 16, generator=torch.Generator().manual_seed(0))
    assert torch.equal(create_activation("group_relu")(z), shrinkage.group_relu(z, 0.1, 8))


@pytest.mark.parametrize("name", WITH_THRESHOLD)
def test_zeroing_threshold_zeroes_a_code_and_less_does_not(name):
    z = torch.full((1, 6), 0.7, dtype=torch.float64)
    value = make(name).zeroing_threshold(0.7, 6)
    assert not make(name, threshold=value * (1 + 1e-9)).double()(z).any()
    assert make(name, threshold=value * (1 - 1e-9)).double()(z).all()


# Duality


@pytest.mark.parametrize("l1_ratio", [0.2, 1.0])
@pytest.mark.parametrize("dim", [1, -1])
@pytest.mark.parametrize("kind", ["scalar", "several"])
@pytest.mark.parametrize("name", CONVEX)
def test_the_residual_of_the_prox_is_a_certified_subgradient(name, kind, dim, l1_ratio):
    mixed = {"l1_ratio": l1_ratio} if name in ("elastic", "sparse_group") else {}
    prox = make(name, threshold=thresholds(name, kind), dim=dim, **mixed).double()
    for scale in (0.1, 1.0, 10.0):
        z = scale * signals(*SHAPES[dim])
        u = prox(z)
        c = z - u
        assert (prox.gauge(c) <= 1 + 1e-12).all()
        inner = (u * c).flatten(1).sum(1)
        torch.testing.assert_close(prox.penalty(u) + prox.conjugate(c), inner)  # Fenchel–Young, with equality
        for seed in range(20):  # and without, elsewhere
            v = feasible(name, signals(*SHAPES[dim], seed=seed + 1))
            assert (prox.penalty(v) + prox.conjugate(c) >= (v * c).flatten(1).sum(1) - 1e-9).all()


@pytest.mark.parametrize("name", CONVEX)
def test_gauge_is_the_least_scale_at_which_zero_is_the_minimiser(name):
    mixed = {"l1_ratio": 1.0} if name == "elastic" else {}
    t = np.array(thresholds(name, "several"))
    prox, c = make(name, threshold=t.tolist(), **mixed).double(), signals(2, 6, seed=3)
    for signal, found in zip(c.split(1), prox.gauge(c), strict=True):
        low, high = 1e-2, 1e2
        while high - low > 1e-4 * high:
            middle = (low * high) ** 0.5
            zero = not minimise(name, signal / middle, t, size_of(name), **mixed).any()
            low, high = (low, middle) if zero else (middle, high)
        assert found.item() == pytest.approx(high, rel=2e-4)


@pytest.mark.parametrize("l1_ratio", [0.0, 0.01, 0.5, 0.99, 1 - 1e-7, 1.0])
@pytest.mark.parametrize("dtype, rtol", [(torch.float32, 3e-6), (torch.float64, 1e-11)])
def test_gauge_of_sparse_groups_is_the_root_of_its_equation(dtype, rtol, l1_ratio):
    c = signals(60, 8)
    c[:20] = 1 + 1e-3 * c[:20]  # near ties
    c[20:30, 3:] = 0
    c = c.to(dtype)
    prox = create_activation("sparse_group", group_size=8, threshold=1.0, l1_ratio=l1_ratio)

    def excess(v, group):
        return np.linalg.norm(np.maximum(group - l1_ratio * v, 0)) - (1 - l1_ratio) * v

    for group, found in zip(c.double().abs().numpy(), prox.gauge(c), strict=True):
        above = (1 + 1e-9) * np.linalg.norm(group) / max(l1_ratio, 1 - l1_ratio)
        root = group.max() if l1_ratio == 1 else brentq(excess, 0, above, (group,), xtol=1e-15, rtol=1e-15)
        assert found.item() == pytest.approx(root, rel=rtol)


@pytest.mark.parametrize("scale", [1e-30, 1e30])
@pytest.mark.parametrize("name", [name for name in CONVEX if "group_relu" not in name])
def test_gauge_keeps_the_scale_of_its_argument(name, scale):
    mixed = {"l1_ratio": 1.0} if name == "elastic" else {}
    prox, c = make(name, **mixed), signals(4, 6).float()
    torch.testing.assert_close(prox.gauge(scale * c) / scale, prox.gauge(c))


@pytest.mark.parametrize("name", CONVEX)
def test_gauge_without_a_threshold_is_infinite_or_zero(name):
    several = [0.0, 0.5] if GROUPED[name] else [0.0, 0.0, 0.0, 0.5, 0.5, 0.5]
    c = torch.tensor([[0.0, 0, 0, 1, 1, 1], [0, 1, 0, 1, 1, 1], [0, 0, 0, 0, 0, 0], [-1, 0, 0, 0, 0, 0]])
    inf = torch.inf
    some = make(name, threshold=several).gauge(c)
    none = make(name, threshold=0.0).gauge(c)
    assert some.isinf().tolist() == [False, True, False, not NONNEG[name]]
    assert none.tolist() == [inf, inf, 0, 0 if NONNEG[name] else inf]


def test_gauge_of_an_elastic_net_is_zero_since_its_conjugate_is_finite():
    c = signals(*SHAPES[1])
    prox = make("elastic").double()
    assert torch.equal(prox.gauge(c), torch.zeros(3).double())
    u = torch.linspace(-30, 30, 60001, dtype=torch.float64)
    best = [(u * x - 0.4 * (0.5 * u.abs() + 0.25 * u.square())).max() for x in c.flatten()]
    torch.testing.assert_close(prox.conjugate(c), torch.stack(best).view(3, -1).sum(1), atol=1e-5, rtol=0)


def test_gauge_does_not_certify_what_is_not_a_number():
    for name in CONVEX:
        if name != "elastic":
            assert make(name).gauge(torch.tensor([[0.1, torch.nan, 0, 0, 0, 0]])).isnan()


@pytest.mark.parametrize("name", COUNTING)
def test_penalties_that_are_not_convex_have_no_gauge_and_no_conjugate(name):
    prox, c = make(name), signals(2, 6)
    assert prox.is_prox and not prox.is_convex
    for call in (prox.gauge, prox.conjugate, prox.polar):
        with pytest.raises(TypeError, match=f"{type(prox).__name__} is not convex: it has no conjugate"):
            call(c)


# The forward as a function


@pytest.mark.parametrize("name", CONVEX)
def test_firmly_nonexpansive(name):
    prox = make(name, threshold=0.5).double()
    for seed in range(50):
        a, b = signals(*SHAPES[1], seed=seed), signals(*SHAPES[1], seed=seed + 1000) * 3
        move = (prox(a) - prox(b)).flatten(1)
        assert (move.square().sum(1) <= (move * (a - b).flatten(1)).sum(1) + 1e-12).all()


@pytest.mark.parametrize("name", CONVEX)
def test_jacobian_is_that_of_a_convex_function(name):
    prox = make(name, threshold=thresholds(name, "several")).double()
    for z in signals(5, 1, 6):
        jacobian = torch.autograd.functional.jacobian(prox, z)[0, :, 0]
        torch.testing.assert_close(jacobian, jacobian.mT)
        eigenvalues = torch.linalg.eigvalsh(jacobian)
        assert (eigenvalues >= -1e-12).all() and (eigenvalues <= 1 + 1e-12).all()


@pytest.mark.parametrize("learn", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("value", [0.0, 1e-30, 1e30, -1e30])
@pytest.mark.parametrize("name", NAMES)
def test_extreme_inputs_have_the_right_value_and_gradient(name, value, dtype, learn):
    z = torch.full((2, 6), value, dtype=dtype, requires_grad=True)
    prox = make(name, learn=learn, **({"k": 6 // size_of(name)} if name in KEPT else {}))
    u = prox(z)
    u.float().sum().backward()
    active = name in KEPT or (abs(value) > 1 and (value > 0 or not NONNEG[name]))
    slope = active / 1.2 if name == "elastic" else float(active)
    torch.testing.assert_close(u, z * slope, rtol=0.01 if name == "elastic" else 0, atol=0)
    torch.testing.assert_close(z.grad, torch.full_like(z, slope))
    assert all(p.grad.isfinite().all() for p in prox.parameters())


@pytest.mark.parametrize("name", NAMES)
def test_gradients_match_finite_differences_away_from_kinks(name):
    z = torch.tensor([[1.5, -2.0, 0.7, 0.05, -0.1, 0.08]], dtype=torch.float64, requires_grad=True)
    prox = make(name, learn=PROX[name].has_threshold).double()
    step = torch.tensor(0.8, dtype=torch.float64, requires_grad=True)
    weights = {key: value.detach().requires_grad_() for key, value in prox.named_parameters()}

    def call(z, step, *values):
        return torch.func.functional_call(prox, dict(zip(weights, values, strict=True)), (z, step))

    assert torch.autograd.gradcheck(call, (z, step, *weights.values()))


@pytest.mark.parametrize("name", ["hard", "jump_relu"])
def test_gradient_of_a_jump_is_the_difference_across_the_bandwidth(name):
    z = torch.linspace(-2, 2, 400_001, dtype=torch.float64)[:, None].expand(-1, 2)
    upstream, bandwidth = 2 + torch.cos(z + 0.3), 0.04
    threshold = torch.tensor([0.5, 1.2], dtype=torch.float64, requires_grad=True)
    function = getattr(shrinkage, name)
    u = function(z, threshold, bandwidth)
    assert torch.equal(u, function(z, threshold.detach()))
    (upstream * u).mean(0).sum().backward()
    with torch.no_grad():
        above, below = (function(z, threshold + move * bandwidth / 2) for move in (1, -1))
    difference = (upstream * (above - below)).mean(0) / bandwidth
    torch.testing.assert_close(threshold.grad, difference, rtol=1e-3, atol=0)


@pytest.mark.parametrize("name", ["hard", "jump_relu"])
def test_a_jump_passes_the_gradient_of_what_it_keeps(name):
    z = signals(50, 6).requires_grad_()
    for learn in (False, True):
        prox = make(name, threshold=0.3, learn=learn, bandwidth=0.5).double()
        upstream = signals(50, 6, seed=1)
        gradient = torch.autograd.grad(prox(z), z, upstream)[0]
        assert torch.equal(gradient, upstream * (prox(z) != 0))


@pytest.mark.parametrize("learn", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_bfloat16_is_close_to_float32(name, learn):
    z = signals(*SHAPES[1]).bfloat16()
    prox = make(name, learn=learn)
    u = prox(z)
    assert u.dtype == torch.bfloat16
    torch.testing.assert_close(u.float(), prox(z.float()), atol=0.02, rtol=0.01)


@pytest.mark.parametrize("name", NAMES)
def test_compiled_value_and_gradients_equal_eager(name):
    torch.compiler.reset()
    learn = PROX[name].has_threshold
    prox, z = make(name, threshold=thresholds(name, "several"), learn=learn), signals(5, 6).float()
    results = []
    for call in (prox, torch.compile(prox, backend="aot_eager", fullgraph=True)):
        z = z.detach().requires_grad_()
        step = torch.tensor(0.7, requires_grad=True)
        u = call(z, step)
        results.append([u, *torch.autograd.grad(u.square().sum(), [z, *[step] * learn, *prox.parameters()])])
    for eager, compiled in zip(*results, strict=True):
        torch.testing.assert_close(compiled, eager)


@pytest.mark.parametrize("learn", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_forward_asks_for_no_value(name, learn):
    # A tensor without data raises where a forward would wait for a device to answer.
    with torch.device("meta"):
        z, step = torch.empty(2, 6, 3, requires_grad=True), torch.empty(())
    u = make(name, learn=learn).to("meta")(z, step)
    assert u.shape == z.shape
    u.sum().backward()


@pytest.mark.parametrize("name", WITH_THRESHOLD)
def test_gradients_signal_by_signal_add_up(name):
    prox, z = make(name, learn=True), signals(4, 6).float()

    def loss(parameters, signal):
        return torch.func.functional_call(prox, parameters, signal[None]).square().sum()

    each = torch.func.vmap(torch.func.grad(loss), (None, 0))(dict(prox.named_parameters()), z)
    total = torch.autograd.grad(prox(z).square().sum(), prox.raw_threshold)[0]
    torch.testing.assert_close(each["raw_threshold"].sum(0), total)


# Thresholds


@pytest.mark.parametrize("name", WITH_THRESHOLD)
@pytest.mark.parametrize("value", [1e-4, 0.1, 3.0, 100.0])
def test_learned_threshold_starts_at_its_value(name, value):
    start = make(name, threshold=value, learn=True).threshold.detach()
    torch.testing.assert_close(start, torch.tensor(value))


@pytest.mark.parametrize("name", WITH_THRESHOLD)
def test_a_threshold_keeps_the_precision_it_was_given(name):
    prox = make(name, threshold=0.1)
    assert prox.threshold == 0.1
    assert "threshold=0.1," in repr(prox)


@pytest.mark.parametrize("name", WITH_THRESHOLD)
def test_one_threshold_in_a_list_holds_for_all(name):
    z = signals(*SHAPES[1])
    torch.testing.assert_close(make(name, threshold=[0.4]).double()(z), make(name, threshold=0.4).double()(z))


@pytest.mark.parametrize("kind", [float, list])
@pytest.mark.parametrize("name", WITH_THRESHOLD)
def test_a_threshold_of_zero_changes_nothing_that_is_feasible(name, kind):
    z = signals(*SHAPES[1]).requires_grad_()
    step = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    u = make(name, threshold=0.0 if kind is float else [0.0, 0.0] * (1 if GROUPED[name] else 3)).double()(z, step)
    torch.testing.assert_close(u, z.clamp_min(0) if NONNEG[name] else z)
    gradients = torch.autograd.grad(u.sum(), (z, step), allow_unused=True)
    assert all(g is None or g.isfinite().all() for g in gradients)


def test_relu_without_threshold_is_torch_relu():
    z = signals(*SHAPES[1]).requires_grad_()
    assert torch.equal(ReLU()(z, torch.tensor(0.3)), F.relu(z))


# Errors


@pytest.mark.parametrize(
    "arguments,message",
    [
        ({"activation": "relu", "threshold": -0.1}, "at least 0, got -0.1"),
        ({"activation": "soft", "threshold": [0.1, -0.1]}, "at least 0"),
        ({"activation": "soft", "threshold": float("nan")}, "finite"),
        ({"activation": "soft", "threshold": float("inf")}, "finite"),
        ({"activation": "soft", "threshold": [[0.1, 0.2]]}, r"a number or a list of them, got shape \(1, 2\)"),
        ({"activation": "relu", "threshold": 0.0, "learn": True}, "threshold > 0"),
        ({"activation": "group_relu", "group_size": 2, "groups": 4}, "not both .got 2 and 4"),
        ({"activation": "group_relu", "group_size": 0}, "group_size must be at least 1, got 0"),
        ({"activation": "group_top_k", "group_size": 2.5}, "group_size must be a whole number, got 2.5"),
        ({"activation": "group_relu", "groups": -1}, "groups must be at least 1, got -1"),
        ({"activation": "top_k", "k": 0}, "k must be at least 1, got 0"),
        ({"activation": "group_top_k", "k": 0.5}, "k must be a whole number, got 0.5"),
        ({"activation": "elastic", "l1_ratio": 1.5}, "l1_ratio must lie between 0 .* and 1 .*, got 1.5"),
        ({"activation": "sparse_group", "l1_ratio": -0.1}, "l1_ratio must lie between 0 .* and 1 .*, got -0.1"),
        ({"activation": "hard", "bandwidth": 0}, "bandwidth must be finite and above 0, got 0"),
        ({"activation": "jump_relu", "bandwidth": float("inf")}, "bandwidth must be finite and above 0, got inf"),
    ],
)
def test_wrong_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        create_activation(**arguments)


@pytest.mark.parametrize(
    "name,arguments,message",
    [
        ("group_relu", {"group_size": 5}, "group_size=5 does not divide the 12 channels.*: 4 or 6"),
        ("sparse_group", {"group_size": 13}, "group_size=13 does not divide the 12 channels.*: 12$"),
        ("group_top_k", {"groups": 5}, "groups=5 does not divide the 12 channels.*: 4 or 6"),
        ("group_relu", {"group_size": 4, "threshold": [0.1, 0.2]}, "threshold has 2 values, expected 1 or 3"),
        ("hard", {"threshold": [0.1, 0.2]}, "threshold has 2 values, expected 1 or 12"),
        ("top_k", {"k": 13}, "k=13 is more than the 12 channels of dimension 1: at most 12 can be kept"),
        ("group_top_k", {"k": 4, "groups": 3}, "k=4 is more than the 3 groups of dimension 1: at most 3 can be kept"),
    ],
)
def test_channels_that_do_not_fit_are_named(name, arguments, message):
    with pytest.raises(ValueError, match=message):
        create_activation(name, **arguments)(torch.ones(2, 12))


def test_an_elastic_net_that_only_scales_has_no_threshold_that_zeroes():
    with pytest.raises(ValueError, match="l1_ratio=0 only scales"):
        make("elastic", l1_ratio=0.0).zeroing_threshold(1.0, 6)


@pytest.mark.parametrize("name", sorted(KEPT))
def test_top_k_has_no_threshold_that_zeroes(name):
    with pytest.raises(TypeError, match="TopK has no threshold"):
        make(name).zeroing_threshold(1.0, 6)


@pytest.mark.parametrize("name", ["group_relu", "group_relu_nonneg", "sparse_group"])
@pytest.mark.parametrize("scale", [1e-11, 1e-6, 1.0, 1e6, 1e16])
def test_group_shrinkage_has_no_scale_of_its_own(name, scale):
    z = torch.tensor([[3.0, 4.0, 0.3, 0.4]])
    expected = make(name, 2, threshold=1.0)(z)
    assert expected[0, :2].all() and not expected[0, 2:].any()
    scaled = (z * scale).requires_grad_()
    found = make(name, 2, threshold=scale)(scaled)
    torch.testing.assert_close(found / scale, expected)
    found.sum().backward()
    assert scaled.grad.isfinite().all()


def test_numbers_of_numpy_count():
    z = torch.randn(2, 6)
    assert torch.equal(create_activation("top_k", k=np.int64(2))(z), create_activation("top_k", k=2)(z))
    assert make("group_relu", np.int64(3)).group_size == 3
