import numpy as np
import pytest
import torch

import dsc
from dsc.dictionary_learning import DictionaryLearning
from dsc.recovery import match_groups
from dsc.reproduce.baselines import alternating_minimisation, learn, online_learning
from dsc.synthetic import GroupSparse

D = 2
PROBLEM = GroupSparse(12, 8, D, active_groups=1, norms=(4.0, 5.0), snr_db=20.0)
SAMPLE = PROBLEM.sample(200, torch.Generator().manual_seed(1))
TRUTH = PROBLEM.dictionary.weight
START = TRUTH + 0.1 * torch.randn(TRUTH.shape, generator=torch.Generator().manual_seed(2))


def objective(learned, threshold, group_size):
    """½‖x − zD‖² + λΩ(z), written out."""
    z, d = learned.codes.double().numpy(), learned.atoms.double().numpy()
    residual = SAMPLE.signals.double().numpy() - z @ d
    norms = np.linalg.norm(z.reshape(len(z), -1, group_size), axis=2)
    return (residual**2).sum(1) / 2 + threshold * norms.sum(1)


@pytest.mark.parametrize("group_size", [D, None])
def test_alternating_minimisation_is_dictionary_learning(group_size):
    found = alternating_minimisation(SAMPLE.signals, START, 0.5, 4, group_size)
    prox = "soft" if group_size is None else "group_relu"
    learner = DictionaryLearning(alpha=0.5, prox=prox, group_size=group_size, max_iter=4, dict_init=START.numpy())
    with pytest.warns(match="not converged"):
        learner.fit(SAMPLE.signals.numpy())
    np.testing.assert_allclose(found.atoms.numpy(), learner.components_, atol=2e-3)
    expected = objective(found, 0.5, group_size or 1).mean()
    assert found.objective == pytest.approx(expected, rel=1e-5)
    assert len(SAMPLE.signals) * expected <= learner.error_[-1] * (1 + 1e-3)  # codes of the last atoms: no worse
    assert found.turns == 4 and found.seconds > 0


def test_the_online_method_means_the_same_by_its_threshold():
    found = online_learning(SAMPLE.signals, START, 0.5, 5)
    certified = dsc.sparse_encode(SAMPLE.signals, found.atoms, threshold=0.5, tol=1e-8)
    np.testing.assert_allclose(found.codes.numpy(), certified.numpy(), atol=2e-3)
    assert found.objective == pytest.approx(objective(found, 0.5, 1).mean(), rel=1e-5)


def test_every_baseline_recovers_the_groups_from_near_the_truth():
    rows = {learned.method: learned for learned in learn(SAMPLE.signals, START, 0.5, D, turns=10, sparse_threshold=0.2)}
    assert list(rows) == [
        "alternating minimisation, group",
        "alternating minimisation, ℓ1",
        "MiniBatchDictionaryLearning, ℓ1",
    ]
    before = match_groups(START, TRUTH, D).mean_squared_cosine
    for learned in rows.values():
        torch.testing.assert_close(learned.atoms.norm(dim=1), torch.ones(8), atol=1e-4, rtol=0)
        assert learned.codes.shape == (200, 8) and learned.atoms.dtype == learned.codes.dtype == torch.float32
        assert set(learned.row()) == {"method", "objective", "turns", "seconds"}
        assert match_groups(learned.atoms, TRUTH, D).mean_squared_cosine > max(before, 0.99), learned.method


def test_the_caller_s_start_stays_as_it_is():
    before = START.clone()
    list(learn(SAMPLE.signals[:20], START, 0.5, D, turns=1))
    assert torch.equal(START, before)


@pytest.mark.parametrize("method", [alternating_minimisation, online_learning])
@pytest.mark.parametrize("threshold", [0.0, -1.0])
def test_a_threshold_of_zero(method, threshold):
    with pytest.raises(ValueError, match=str(threshold)):
        method(SAMPLE.signals, START, threshold, 1)


def test_groups_that_do_not_tile_the_atoms():
    with pytest.raises(ValueError, match="group_size=3 does not divide n_components=8"):
        alternating_minimisation(SAMPLE.signals, START, 0.5, 1, 3)
