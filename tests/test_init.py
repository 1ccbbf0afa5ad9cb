import numpy as np
import pytest
import torch
from scipy.stats import kstest

from dsc import init
from dsc.dictionaries import DenseDictionary
from dsc.recovery import match_groups
from dsc.synthetic import GroupSparse


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def cosines(atoms, truth):
    return ((atoms * truth).sum(1) / atoms.norm(dim=1) / truth.norm(dim=1)).numpy()


@pytest.mark.parametrize("correlation", [0.0, 0.15, 0.56, 0.9, 1.0])
def test_perturbed_atoms_have_the_correlation_asked_for(correlation):
    truth = randn(12, 30)
    atoms = init.perturbed(truth, correlation, seeded(1))
    assert cosines(atoms, truth).mean() == pytest.approx(correlation, abs=1e-8)
    np.testing.assert_allclose(atoms.norm(dim=1), 1)


def test_the_perturbation_is_one_gaussian_for_all_atoms():
    truth = randn(40, 300) / 300**0.5
    truth /= truth.norm(dim=1, keepdim=True)
    atoms = init.perturbed(truth, 0.56, seeded(1))
    # a = (a* + σb)/r: the part of b orthogonal to a*, over the part of a along it, is what σ scales.
    along = (atoms * truth).sum(1, keepdim=True)
    noise = (atoms - along * truth).numpy()
    size = np.linalg.norm(noise, axis=1, keepdims=True)
    assert kstest((noise / size * 299**0.5).flatten(), "norm").pvalue > 0.01
    # E r = 1/along to first order, with σ²n = (1 − c²)/c²: the same for each to within its fluctuation.
    sigma = size / along.numpy() / 299**0.5
    assert sigma.std() / sigma.mean() < 0.15
    assert sigma.mean() == pytest.approx((1 / 0.56**2 - 1) ** 0.5 / 300**0.5, rel=0.05)


def test_the_start_of_the_paper():
    """Figure 3a begins at 880 for 1,000 atoms: ‖A − A*‖² = 2·1000(1 − c) with c = 0.56."""
    truth = DenseDictionary(95, 100).weight.detach()
    distance = (init.perturbed(truth, 0.56, seeded()) - truth).square().sum()
    assert float(distance) == pytest.approx(88, rel=1e-4)


def test_atoms_of_data_are_different_signals():
    signals = randn(20, 6)
    signals[3] = 0
    atoms = init.data_samples(signals, 19, seeded())
    matches = (atoms @ (signals / signals.norm(dim=1, keepdim=True).clamp_min(1e-9)).T).numpy()
    np.testing.assert_allclose(matches.max(1), 1)
    assert sorted(matches.argmax(1)) == [i for i in range(20) if i != 3]
    assert not torch.equal(atoms, init.data_samples(signals, 19, seeded(1)))


@pytest.mark.parametrize("shape", [(50, 8), (8, 8), (5, 8)])
def test_singular_vectors_are_numpys(shape):
    signals = randn(*shape)
    expected = np.linalg.svd(signals.numpy(), full_matrices=False)[2][:4]
    found = init.singular(signals, 4).numpy()
    np.testing.assert_allclose(np.abs(np.sum(found * expected, axis=1)), 1)


def test_singular_groups_are_turns_of_one_subspace():
    signals = randn(50, 8)
    groups = init.singular_groups(signals, 200, 3, seeded()).unflatten(0, (200, 3))
    leading = np.linalg.svd(signals.numpy(), full_matrices=False)[2][:3]
    turns = (groups @ torch.from_numpy(leading.T)).numpy()
    np.testing.assert_allclose(turns @ leading, groups, atol=1e-12)
    np.testing.assert_allclose(turns @ turns.transpose(0, 2, 1), np.broadcast_to(np.eye(3), (200, 3, 3)), atol=1e-12)
    # Haar: an entry of a turn in three dimensions is uniform in [−1, 1].
    assert all(kstest(turns[:, i, j], "uniform", (-1, 2)).pvalue > 1e-3 for i in range(3) for j in range(3))


@pytest.mark.parametrize("d", [1, 2, 3])
def test_shared_subspaces_of_signals_without_noise_are_the_true_ones(d):
    problem = GroupSparse(300, 30, d, active_groups=1)
    signals = problem.sample(300, seeded()).signals
    groups = init.shared_subspaces(signals, 30 // d, d, 2.5)
    assert float(match_groups(groups, problem.dictionary.weight, d).affinities.min()) == pytest.approx(1, abs=1e-5)
    inner = groups.unflatten(0, (-1, d)) @ groups.unflatten(0, (-1, d)).mT
    torch.testing.assert_close(inner, torch.eye(d).expand_as(inner), atol=1e-5, rtol=0)


def test_shared_subspaces_are_nearly_those_of_known_supports():
    """With noise, no more can be hoped for than the first singular vectors of the signals that do have the group."""
    problem = GroupSparse(300, 80, 2, active_groups=2, snr_db=10)
    sample, truth = problem.sample(1000, seeded()), problem.dictionary.weight
    known = torch.cat([init.singular(sample.signals[active], 2) for active in sample.supports.mT])
    found = init.shared_subspaces(sample.signals, 40, 2, 2.0)
    bound, reached = (match_groups(atoms, truth, 2) for atoms in (known, found))
    assert reached.mean_squared_cosine > bound.mean_squared_cosine - 0.01
    assert float(reached.affinities.min()) > 0.9


def test_one_generator_one_start():
    signals, truth = randn(50, 8), randn(6, 8)
    for make in (
        lambda g: init.perturbed(truth, 0.5, g),
        lambda g: init.data_samples(signals, 6, g),
        lambda g: init.singular_groups(signals, 2, 3, g),
    ):
        assert torch.equal(make(seeded(5)), make(seeded(5)))
        assert not torch.equal(make(seeded(5)), make(seeded(6)))


@pytest.mark.parametrize(
    "start, message",
    [
        (lambda: init.perturbed(randn(3, 4), 1.2), "correlation must be from 0 to 1, got 1.2"),
        (lambda: init.perturbed(randn(3, 4), float("nan")), "correlation must be from 0 to 1, got nan"),
        (lambda: init.perturbed(torch.eye(3, 4)[[0, 1, 2]] * torch.tensor([[1.0], [0], [1]]), 0.5),
         "true atom 1 is zero and has no direction"),
        (lambda: init.data_samples(randn(3, 4) * torch.tensor([[1], [0], [1]]), 3),
         "num_atoms=3 of signals that are not zero: there are 2"),
        (lambda: init.singular(randn(3, 4), 4), "num_atoms=4 singular vectors: 3 signals of 4 features have 3"),
        (lambda: init.shared_subspaces(randn(9, 4), 3, 2, 1.0),
         "9 signals of 4 features for 3 groups of 2: it takes at least 12 signals of 2 features"),
        (lambda: init.singular_groups(randn(9, 4), 2, 5), "9 signals of 4 features have 4"),
    ],
)  # fmt: skip
def test_wrong_input(start, message):
    with pytest.raises(ValueError, match=message):
        start()
