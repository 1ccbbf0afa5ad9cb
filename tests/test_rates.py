import math

import numpy as np
import pytest
import torch

from dsc import frames, theory
from dsc.dictionaries import ConvDictionary, DenseDictionary
from dsc.learned import analytic_weights
from dsc.synthetic import DeepSparse
from dsc.theory.deep import inner_products


def stream(seed=0):
    return torch.Generator().manual_seed(seed)


def dense(atoms):
    return DenseDictionary.from_atoms(atoms).requires_grad_(False)


def gaussian(features=12, atoms=16, seed=0):
    made = torch.randn(atoms, features, generator=stream(seed), dtype=torch.float64)
    return dense(made / made.norm(dim=1, keepdim=True))


def patches(atoms=6, side=3, seed=0):
    """Orthonormal filters side by side: a convolution of coherence 0, with a little mixed in."""
    torch.manual_seed(seed)
    made = ConvDictionary(1, atoms, side, stride=side).double()
    mixed = torch.linalg.qr(torch.randn(side**2, atoms, dtype=torch.float64)).Q.T
    with torch.no_grad():
        made.weight.copy_((mixed + 0.05 * torch.randn_like(mixed)).view_as(made.weight))
    return made.normalize_().requires_grad_(False)


def model(kind, layers, noise=0.0, nonneg=False, seed=0):
    first = patches() if kind == "conv" else dense(frames.shuffled(frames.paley(61), stream(seed)))
    dictionaries = [first]
    for _ in range(layers - 1):
        pairs = frames.sparse_pairs(first.num_atoms, 0.2, nonneg, stream(seed))
        deeper = ConvDictionary(first.num_atoms, first.num_atoms, 1).double() if kind == "conv" else None
        if deeper is not None:
            with torch.no_grad():
                deeper.weight.copy_(pairs[..., None, None])
        dictionaries.append(dense(pairs) if deeper is None else deeper.requires_grad_(False))
    side = 6 if kind == "conv" else None
    return DeepSparse(dictionaries, 2 if layers == 1 else 1, [noise] * layers, nonneg=nonneg, side=side)


def predicted(problem):
    """Weights, and each layer's rate with its own error."""
    weights = [theory.coupled_weights(d) for d in problem.dictionaries]
    known = zip(problem.dictionaries, weights, problem.sparsities, problem.bounds, problem.tolerances, strict=True)
    return weights, [theory.linear_rate(*each) for each in known]


def rate(factor=0.5, s=2, magnitude=1.0, noise=0.0, gain=1.0):
    mu = factor / (2 * s - 1)
    return theory.LinearRate("", factor, factor < 1, factor >= 1, "", mu, gain, s, magnitude, noise)


# What is predicted


@pytest.mark.parametrize("analytic", [False, True])
def test_the_constants_are_those_of_the_definition(analytic):
    dictionary = gaussian()
    d = dictionary.weight.numpy()
    w = analytic_weights(dictionary)[0].numpy() if analytic else d
    found = theory.linear_rate(dictionary, dense(torch.from_numpy(w)), 1, 2.0, 0.1)
    products = np.abs(w @ d.T)
    np.fill_diagonal(products, 0)
    assert found.coherence == pytest.approx(products.max()) and found.value == pytest.approx(products.max())
    assert found.gain == pytest.approx(np.linalg.norm(w, axis=1).max())
    assert found.holds and found.floor == pytest.approx(
        2 * 0.1 * found.gain / (1 + products.max() - 2 * products.max())
    )
    three = theory.linear_rate(dictionary, dense(torch.from_numpy(w)), 3, 2.0)
    assert three.value == pytest.approx(2 * 3 * products.max() - products.max())


def test_analytic_weights_serve_where_the_dictionary_itself_does_not():
    """Of atoms whose mean is far from 0, which W takes out."""
    dictionary = dense(torch.nn.functional.normalize(gaussian(20, 24).weight + 0.15, dim=1))
    with_itself = theory.linear_rate(dictionary, dictionary, 1, 1.0)
    with_weights = theory.linear_rate(dictionary, theory.coupled_weights(dictionary), 1, 1.0)
    assert with_weights.value < with_itself.value
    conv = patches()
    assert theory.coupled_weights(conv) is conv
    assert theory.linear_rate(conv, conv, 2, 1.0).coherence == pytest.approx(theory.mutual_coherence(conv).value)


@pytest.mark.parametrize("noise", [0.0, 0.01])
def test_bounds_and_thresholds_follow_their_recursion(noise):
    r = rate(0.6, s=3, magnitude=2.0, noise=noise, gain=1.5)
    t, bounds, thresholds = 3 * 2.0, [], []
    for _ in range(12):
        bounds.append(t)
        thresholds.append(r.coherence * t + 1.5 * noise)
        t = 0.6 * t + 2 * 3 * 1.5 * noise
    assert r.bounds(11).tolist() == pytest.approx(bounds) and r.thresholds(12).tolist() == pytest.approx(thresholds)
    assert (r.bounds(40) <= 6 * 0.6 ** torch.arange(41, dtype=torch.float64) + r.floor + 1e-12).all()
    assert float(r.bounds(200)[-1]) == pytest.approx(r.floor, abs=1e-12)


def test_layers_in_sequence_inherit_errors():
    first, second = theory.in_sequence([rate(0.5, noise=0.01), rate(0.4, noise=0.02)], 5)
    assert first.noise == 0.01 and second.noise == pytest.approx(0.02 + float(first.bounds(5)[-1]))
    exact = [rate(0.5), rate(0.4), rate(0.3)]
    steps = theory.steps_to(exact, 1e-6)
    error = [float(theory.in_sequence(exact, k)[-1].bounds(k)[-1]) for k in (steps - 1, steps)]
    assert error[1] <= 1e-6 < error[0]
    assert theory.steps_to([rate(0.0)], 1e-9) == 1


@pytest.mark.parametrize(
    "ask, message",
    [
        (lambda d: theory.linear_rate(d, d, 0, 1.0), "s ≥ 1, 0 < B < inf and 0 ≤ σ < inf, got 0, 1.0 and 0.0"),
        (lambda d: theory.linear_rate(d, d, 1, 0.0), "got 1, 0.0 and 0.0"),
        (lambda d: theory.linear_rate(d, d, 1, 1.0, -1.0), "and -1.0"),
        (lambda d: theory.linear_rate(d, dense(2 * d.weight), 1, 1.0), "every w_iᵀd_i must be 1, got 2"),
        (lambda d: theory.linear_rate(dense(2 * d.weight), d, 1, 1.0), r"call dictionary.normalize_\(\)"),
        (lambda d: theory.linear_rate(ConvDictionary(1, 2, 3, 1, 1), d, 1, 1.0), "expected padding=0"),
        (lambda d: theory.linear_rate(d, d, 8, 1.0).floor, r"no rate is guaranteed: \(2s − 1\)μ̃ = .* takes s < "),
        (lambda d: rate(1.0).thresholds(3), "no rate is guaranteed"),
        (lambda d: theory.in_sequence([rate(0.5), rate(1.5)], 3), "no rate is guaranteed"),
        (lambda d: theory.steps_to([rate()], 0.0), "an error above 0 and without noise, got error=0.0"),
        (lambda d: theory.steps_to([rate(noise=0.1)], 1e-3), r"noise \[0.1\]"),
    ],
)
def test_where_no_rate_is_predicted(ask, message):
    with pytest.raises(ValueError, match=message):
        ask(gaussian())


def test_too_many_non_zeros_are_flagged():
    found = theory.linear_rate(gaussian(), gaussian(), 8, 1.0)
    assert found.vacuous and not found.holds and "fails, vacuous" in str(found)


# What is measured


@pytest.mark.parametrize("nonneg", [False, True])
def test_the_network_is_the_iteration_written_out(nonneg):
    problem = model("dense", 1, 0.01, nonneg)
    weights, rates = predicted(problem)
    x = problem.sample(5, stream()).signals
    codes = []
    network = theory.predicted_network(problem.dictionaries, weights, rates, 7, nonneg)
    with torch.no_grad():
        next(iter(network)).solve(x, record=codes)
    d, w, z = problem.dictionaries[0].weight.numpy(), weights[0].weight.numpy(), np.zeros((5, 62))
    for theta, code in zip(rates[0].thresholds(7).tolist(), codes, strict=True):
        u = z + (x.numpy() - z @ d) @ w.T
        z = np.maximum(u - theta, 0) if nonneg else np.sign(u) * np.maximum(abs(u) - theta, 0)
        np.testing.assert_allclose(code, z, atol=1e-13)


@pytest.mark.parametrize("kind", ["dense", "conv"])
@pytest.mark.parametrize("layers", [1, 2, 3])
@pytest.mark.parametrize("noise, nonneg", [(0.0, False), (0.0, True), (1e-3, False), (1e-3, True)])
def test_errors_stay_below_the_bound_without_false_positives(kind, layers, noise, nonneg):
    problem = model(kind, layers, noise, nonneg)
    weights, rates = predicted(problem)
    sample = problem.sample(10, stream(1))
    for steps in (1, 2, 3, 5, 9, 20):
        network = theory.predicted_network(problem.dictionaries, weights, rates, steps, nonneg)
        bounds = [r.bounds(steps)[-1] for r in theory.in_sequence(rates, steps)]
        with torch.no_grad():
            codes = network.codes(sample.signals)
        for z, truth, bound in zip(codes, sample.codes, bounds, strict=True):
            assert z[truth == 0].abs().max() <= 1e-14  # not 0: equiangular atoms reach the threshold, up to rounding
            assert (z - truth).flatten(1).norm(p=1, dim=1).max() <= bound * (1 + 1e-9) + 1e-13


@pytest.mark.parametrize("kind", ["dense", "conv"])
def test_without_noise_the_error_is_straight_down_to_rounding(kind):
    problem = model(kind, 2)
    weights, rates = predicted(problem)
    steps = theory.steps_to(rates, 1e-12)
    sample = problem.sample(5, stream())
    errors = [sample.codes[-1].flatten(1).norm(dim=1).max()]
    for k in range(1, steps + 1):
        with torch.no_grad():
            z = theory.predicted_network(problem.dictionaries, weights, rates, k)(sample.signals)
        errors.append((z - sample.codes[-1]).flatten(1).norm(dim=1).max())
    found = theory.measured_rate(torch.stack(errors))
    assert errors[-1] <= 1e-12 and found.holds and found.value >= 0.99
    assert found.rate == pytest.approx(max(r.value for r in rates), abs=0.06)


# The fit


@pytest.mark.parametrize("floor", [0.0, 1e-5])
def test_a_straight_line_is_measured(floor):
    errors = 3 * 0.5 ** torch.arange(40, dtype=torch.float64) + floor
    found = theory.measured_rate(errors)
    assert found.value > 0.999 and found.holds and found.rate == pytest.approx(0.5, abs=0.01)
    assert found.last == errors[-1] and found.steps == int((errors > 10 * errors[-1]).sum())
    if not floor:
        assert found.value == pytest.approx(1) and found.rate == pytest.approx(0.5)


def test_r_squared_is_that_of_the_line():
    errors = torch.tensor([5.0, 1.0, 0.9, 0.05, 0.03, 1e-4])
    found = theory.measured_rate(errors)
    logs, steps = np.log(errors[:5].double()), np.arange(5)
    slope, offset = np.polyfit(steps, logs, 1)
    residual = ((logs - slope * steps - offset) ** 2).sum() / ((logs - logs.mean()) ** 2).sum()
    assert found.value == pytest.approx(float(1 - residual)) and found.rate == pytest.approx(math.exp(slope))
    assert not found.holds and not found.vacuous
    assert theory.measured_rate(torch.tensor([1.0, 0.5, 0.01])).vacuous


@pytest.mark.parametrize(
    "errors, message", [([1.0, 0.0], "positive and finite"), ([1.0, math.nan, 0.1], "positive and finite"),
                        ([1.0, 0.9, 0.8], "fewer than two errors")]
)  # fmt: skip
def test_errors_without_a_rate(errors, message):
    with pytest.raises(ValueError, match=message):
        theory.measured_rate(torch.tensor(errors))


def test_inner_products_of_translates():
    conv = ConvDictionary(1, 2, 3, stride=2).double().requires_grad_(False)
    products = inner_products(conv, conv.weight)
    assert products.shape == (2, 2, 3, 3)
    for i in range(2):
        for j in range(2):
            overlap = conv.weight[i, 0, 2:, :1] * conv.weight[j, 0, :1, 2:]
            torch.testing.assert_close(products[i, j, 2, 0], overlap.sum())
