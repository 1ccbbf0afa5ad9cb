import math

import numpy as np
import pytest
import torch

from dsc import measures, theory
from dsc.recovery import orthonormal_groups
from dsc.shrinkage import group_relu, grouped
from dsc.synthetic import GroupSparse


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def problem(features, atoms, d, active, **kwargs):
    made = GroupSparse(features, atoms, d, active, **dict(orthonormal=True) | kwargs)
    made.dictionary.double()
    return made, made.dictionary.weight


def drawn(made, count=2000, seed=0):
    return made.sample(count, torch.Generator().manual_seed(seed))


def perturbed(truth, d, size, seed=1):
    """An orthonormal dictionary near the true one."""
    return orthonormal_groups(truth + size * randn(*truth.shape, seed=seed), d)


def found(atoms, signals, threshold, d):
    return measures.group_support(group_relu(signals @ atoms.mT, threshold, d), d)


# Assumptions


def test_assumptions_by_hand():
    atoms = torch.tensor([[1.0, 0, 0, 0], [0, 1, 0, 0], [0.6, 0, 0.8, 0], [0, 0, 0, 1]])
    assert theory.coherence(atoms).value == pytest.approx(0.6)
    blocks = theory.block_coherence(atoms, 2)
    assert blocks.value == pytest.approx(0.3) and blocks.holds and "dμ_B = 0.6" in str(blocks)
    assert str(theory.coherence(atoms)) == "coherence μ < 1: 0.6 (holds)"
    assert not theory.coherence(atoms[[0, 0, 1]]).holds
    moved = atoms + torch.tensor([[0.3, 0, 0, 0], [0, 0.4, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]])
    assert theory.dictionary_error(moved, atoms, 2).value == pytest.approx(0.5)
    assert not theory.dictionary_error(moved + 1, atoms, 2).holds
    bounds = theory.code_bounds(torch.tensor([[3.0, 4, 0, 0], [0, 0, 0, -2]]), 2)
    assert (bounds.smallest, bounds.largest, bounds.value) == (2, 5, 2.5)
    with pytest.raises(ValueError, match="no group is active"):
        theory.code_bounds(torch.zeros(2, 4), 2)


@pytest.mark.parametrize("d", [1, 2, 4])
def test_block_coherence_is_below_coherence(d):
    for seed in range(5):
        assert theory.block_coherence(randn(8, 6, seed=seed), d).holds


# Lemma 1


@pytest.mark.parametrize(
    "features, d, active, error", [(60, 2, 1, 0.0), (60, 2, 1, 0.03), (700, 3, 2, 0.002), (200, 1, 2, 0.01)]
)
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("orthonormal", [True, False])
def test_every_support_is_found_inside_the_range(features, d, active, error, seed, orthonormal):
    made, truth = problem(features, 12 * d, d, active, seed=seed, orthonormal=orthonormal)
    atoms = perturbed(truth, d, error) if orthonormal else truth + error * randn(*truth.shape)
    x, z, support = drawn(made, 500)
    span = theory.support_range(atoms, truth, z, d)
    assert span.holds and not span.vacuous and span.value == span.upper - span.lower > 0
    for threshold in np.linspace(span.lower, span.upper, 7, endpoint=False):
        assert span.guarantees(threshold)
        assert torch.equal(found(atoms, x, threshold, d), support)
    assert span.lower < span.middle() < span.upper and not span.guarantees(span.upper + 1e-9)
    observed = theory.observed_support_range(atoms, x, z, d)
    assert observed.lower <= span.lower + 1e-9 and span.upper <= observed.upper + 1e-9  # the proved is within
    assert torch.equal(found(atoms, x, observed.lower + 1e-9, d), support)
    assert not torch.equal(found(atoms, x, observed.lower - 1e-6, d), support)
    assert not torch.equal(found(atoms, x, observed.upper + 1e-6, d), support)


@pytest.mark.parametrize("d", [1, 2, 4])
@pytest.mark.parametrize("error", [0.0, 0.01, 0.1])
def test_the_lemma_with_the_factor_d_is_within_what_is_proved(d, error):
    """Of orthonormal groups: Propositions 1 and 2, with dμ_B for μ_B."""
    made, truth = problem(100, 12 * d, d, 2, norms=(4.0, 4.5))
    atoms, z = perturbed(truth, d, error / 10), drawn(made).codes
    span, delta = theory.support_range(atoms, truth, z, d), theory.dictionary_error(atoms, truth, d).value
    bounds, coherence = theory.code_bounds(z, d), theory.block_coherence(truth, d).value
    interference = 2 * bounds.largest * (d * coherence + delta)
    assert span.lower <= interference and bounds.smallest * (1 - delta) - interference <= span.upper
    printed = 2 * bounds.largest * (coherence + delta)
    assert span.printed == pytest.approx((printed, bounds.smallest * (1 - delta) - printed))


def test_the_lemma_as_printed_can_promise_too_much():
    # Two planes that share a direction up to an angle with cosine 0.8: μ_B is 0.4, half the norm of A_1ᵀA_2.
    truth = torch.tensor([[1.0, 0, 0, 0], [0, 1, 0, 0], [0.8, 0, 0.6, 0], [0, 0, 0, 1]])
    z = torch.tensor([[1.0, 0, 0, 0]])
    span = theory.support_range(truth, truth, z, 2)
    assert span.printed == pytest.approx((0.4, 0.6)) and (span.lower, span.upper) == pytest.approx((0.8, 1))
    assert found(truth, z @ truth, 0.5, 2).tolist() == [[True, True]]  # inside the printed range, and wrong
    assert found(truth, z @ truth, 0.9, 2).tolist() == [[True, False]]
    assert not span.guarantees(0.5) and span.guarantees(0.9)


def test_an_empty_range_is_flagged_and_guarantees_nothing():
    made, truth = problem(20, 60, 2, 3)
    span = theory.support_range(truth, truth, drawn(made).codes, 2)
    assert span.vacuous and not span.holds and span.value < 0
    assert "is empty" in str(span) and "fails, vacuous" in str(span) and "Lemma 1 prints" in str(span)
    for ask in (span.middle, lambda: span.guarantees(1.0)):
        with pytest.raises(ValueError, match=r"no λ is guaranteed to find the support: the range \[.*\) is empty"):
            ask()
    with pytest.raises(ValueError, match="the codes need both"):
        theory.observed_support_range(truth, truth[:1], torch.zeros(1, 60), 2)


# Theorem 1


def expected_gradient(atoms, x, threshold, d):
    """Of ½‖y − Aσ(Aᵀy)‖², signal by signal, with the Jacobian of σ written out."""
    total = np.zeros(atoms.shape)
    for y in x.numpy():
        u = atoms.numpy() @ y
        z, jacobian = np.zeros_like(u), np.zeros((len(u), len(u)))
        for g in range(0, len(u), d):
            part = slice(g, g + d)
            norm = np.linalg.norm(u[part])
            if norm > threshold:
                z[part] = (1 - threshold / norm) * u[part]
                outer = np.outer(u[part], u[part]) * threshold / norm**3
                jacobian[part, part] = (1 - threshold / norm) * np.eye(d) + outer
        residual = atoms.numpy().T @ z - y
        total += np.outer(z, residual) + np.outer(jacobian @ (atoms.numpy() @ residual), y)
    return total / len(x)


@pytest.mark.parametrize("d", [1, 2, 3])
def test_alignment_is_that_of_the_gradient_written_out(d):
    made, truth = problem(12, 4 * d, d, 2)
    x, z, _ = drawn(made, 60)
    atoms, threshold = perturbed(truth, d, 0.03), 1.5
    result = theory.alignment(atoms, truth, x, z, threshold, d)
    g, delta = expected_gradient(atoms, x, threshold, d), (atoms - truth).numpy()
    assert result.value == pytest.approx((g * delta).sum() / np.linalg.norm(g) / np.linalg.norm(delta))
    assert result.aligned == pytest.approx(((g * delta).sum(1) > 0).mean())
    norms = grouped(x @ atoms.mT, d).norm(dim=2).numpy()
    sizes = grouped(z, d).norm(dim=2).numpy()
    tau = np.where((norms > threshold) & (sizes > 0), 1 - threshold / norms, 0)
    c = (tau * (2 - tau) * sizes**2 / d).mean(0).repeat(d)
    alpha = (atoms * truth).sum(1).numpy()
    errors = grouped(atoms - truth, d, 0).flatten(1).norm(dim=1).numpy()
    rest = np.linalg.norm(g - (c * alpha)[:, None] * delta, axis=1) / (c * errors.repeat(d))
    assert result.remainder == pytest.approx(rest.max())
    assert result.bound == pytest.approx(alpha.max() * math.sqrt(d * d + 1) + errors.max())
    assert result.holds == (result.remainder <= result.bound) and result.vacuous
    tangent = g.copy()
    for start in range(0, len(g), d):
        part, own = g[start : start + d], atoms[start : start + d].numpy()
        tangent[start : start + d] -= (part @ own.T + own @ part.T) / 2 @ own
    cosine = (tangent * delta).sum() / np.linalg.norm(tangent) / np.linalg.norm(delta)
    assert result.tangential == pytest.approx(cosine)


@pytest.mark.parametrize("size", [0.05, 0.02, 0.005])
def test_inside_the_range_the_gradient_points_to_the_truth_once_rescaling_is_taken_out(size):
    made, truth = problem(60, 24, 2, 1)
    x, z, _ = drawn(made, 8000)
    atoms = perturbed(truth, 2, size)
    threshold = 2.5
    assert theory.support_range(atoms, truth, z, 2).guarantees(threshold)
    result = theory.alignment(atoms, truth, x, z, threshold, 2)
    assert result.tangential > 0.95 and result.aligned == 1


def test_near_the_truth_the_printed_bound_fails_as_shrinkage_makes_atoms_grow():
    made, truth = problem(60, 24, 2, 1)
    x, z, _ = drawn(made, 8000)
    remainders = []
    for size in (0.05, 0.01, 0.002):
        result = theory.alignment(perturbed(truth, 2, size), truth, x, z, 2.5, 2)
        remainders.append(result.remainder)
    assert not result.holds and result.vacuous and "implies no descent" in str(result)
    # The bound tends to √5; what it bounds grows as 1/‖Δ‖.
    assert remainders[2] / remainders[1] == pytest.approx(5, rel=0.2) and result.bound == pytest.approx(
        5**0.5, rel=0.05
    )


def test_the_gradient_knows_nothing_of_rotations_within_a_group():
    """So Theorem 2's contraction cannot hold for an error that is one, whatever the data."""
    made, truth = problem(20, 12, 3, 2)
    x, z, _ = drawn(made, 500)
    turn = torch.linalg.matrix_exp(0.1 * (skew := randn(3, 3) - randn(3, 3).mT))
    atoms = (turn @ grouped(truth, 3, 0)).flatten(0, 1)
    gradient = torch.from_numpy(expected_gradient(atoms, x, 2.0, 3))
    along = (gradient * (skew @ grouped(atoms, 3, 0)).flatten(0, 1)).sum()
    assert abs(float(along)) < 1e-10 * float(gradient.norm())
    torch.testing.assert_close(
        gradient, (turn @ grouped(torch.from_numpy(expected_gradient(truth, x, 2.0, 3)), 3, 0)).flatten(0, 1)
    )


def test_alignment_needs_an_error_and_an_active_group():
    made, truth = problem(12, 6, 2, 1)
    x, z, _ = drawn(made, 20)
    with pytest.raises(ValueError, match="no direction towards them"):
        theory.alignment(truth, truth, x, z, 1.0, 2)
    with pytest.raises(ValueError, match="threshold=100.0 is too large"):
        theory.alignment(perturbed(truth, 2, 0.1), truth, x, z, 100.0, 2)


# Theorem 2


@pytest.mark.parametrize("d", [1, 2, 4])
def test_the_printed_rate_is_vacuous_for_every_dictionary(d):
    truth = orthonormal_groups(randn(12, 20), d)
    for size in (0.0, 0.01, 0.05):
        atoms = perturbed(truth, d, size)
        result = theory.printed_contraction(atoms, truth, d)
        alpha, delta = (atoms * truth).sum(1), theory.dictionary_error(atoms, truth, d).value
        worst = (float(alpha.max()) * math.sqrt(d * d + 1) + delta) ** 2
        rho = (float(alpha.min()) - d * worst / float(alpha.min())) / float(alpha.max())
        assert result.value == pytest.approx(rho) and rho <= -(d**3) + 1e-6  # 1 − d(d² + 1) ≤ −d³ at the truth
        assert result.vacuous and not result.holds and "predicts no contraction" in str(result)
    with pytest.raises(ValueError, match="needs every ⟨a_i, a\\*_i⟩ > 0"):
        theory.printed_contraction(-truth, truth, d)


def test_the_condition_on_norms_turns_at_two_thirds():
    made, truth = problem(20, 6, 2, 1, norms=(3.0, 3.0))
    x, z, _ = drawn(made, 200)
    for threshold, holds in ((0.9, True), (1.1, False)):  # ‖A_gᵀy‖ is 3
        result = theory.norm_condition(truth, truth, x, z, threshold, 2)
        assert result.value == pytest.approx(1 - threshold / 3) and result.holds == holds
    with pytest.raises(ValueError, match="is active in no signal"):
        theory.norm_condition(truth, truth, x, z, 3.1, 2)


@pytest.mark.parametrize("rate", [0.3, 0.9, 0.99])
@pytest.mark.parametrize("floor", [1.0, 0.01, 1e-6])
def test_contraction_and_floor_of_an_exact_decay(rate, floor):
    result = theory.contraction([floor + 880 * rate**k for k in range(150)])
    assert result.value == pytest.approx(rate, rel=1e-4) and result.holds and not result.vacuous
    assert result.misfit < 1e-3
    if rate < 0.95:  # a floor that is reached
        assert result.floor == pytest.approx(floor, rel=1e-2)


def test_contraction_of_noisy_growing_and_constant_runs():
    noise = np.exp(0.05 * np.random.default_rng(0).standard_normal(60))
    result = theory.contraction((4.6 + 880 * 0.8 ** np.arange(60)) * noise)
    assert result.value == pytest.approx(0.8, abs=0.01) and result.floor == pytest.approx(4.6, rel=0.05)
    assert result.misfit == pytest.approx(0.05, rel=0.3)
    growing = theory.contraction([2.0**k for k in range(8)])
    assert growing.value == pytest.approx(2, rel=1e-3) and not growing.holds
    assert theory.contraction([1.0] * 6).vacuous


@pytest.mark.parametrize("distances", [[1.0, 0.5, 0.2], [1.0, 0.5, 0.2, 0.0], [1.0, 0.5, math.nan, 0.1]])
def test_contraction_needs_distances(distances):
    with pytest.raises(ValueError, match="at least four distances"):
        theory.contraction(distances)


def test_findings_are_frozen():
    with pytest.raises(AttributeError):
        theory.coherence(torch.eye(2)).value = 0.0
