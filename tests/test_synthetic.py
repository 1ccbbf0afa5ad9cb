import numpy as np
import pytest
import torch

from dsc.measures import nmse
from dsc.synthetic import BernoulliGaussian


def stream(seed=0):
    return torch.Generator().manual_seed(seed)


def test_signals_are_made_from_their_codes():
    problem = BernoulliGaussian(20, 40, 0.1)
    x, z = problem.sample(2000, stream())
    atoms = problem.dictionary.weight  # one a row
    assert x.shape == (2000, 20) and z.shape == (2000, 40)
    torch.testing.assert_close(atoms.norm(dim=1), torch.ones(40))
    np.testing.assert_allclose(x, z.double() @ atoms.double(), atol=1e-5)
    assert problem.noise == 0


def test_codes_are_bernoulli_gaussian():
    _, z = BernoulliGaussian(20, 40, 0.1).sample(20_000, stream())
    values = z[z != 0]
    assert len(values) / z.numel() == pytest.approx(0.1, abs=4 * (0.09 / z.numel()) ** 0.5)
    assert float(values.mean()) == pytest.approx(0, abs=4 / len(values) ** 0.5)
    assert float(values.var()) == pytest.approx(1, abs=4 * (2 / len(values)) ** 0.5)
    assert float((values**4).mean()) == pytest.approx(3, rel=0.05)  # a Gaussian's


@pytest.mark.parametrize("snr_db", [-3.0, 20.0, 30.0])
def test_the_noise_has_the_stated_ratio(snr_db):
    problem = BernoulliGaussian(20, 40, 0.1, snr_db)
    assert problem.noise**2 == pytest.approx(0.1 * 40 / (20 * 10 ** (snr_db / 10)), rel=1e-12)
    x, z = problem.sample(20_000, stream())
    clean = z @ problem.dictionary.weight
    ratio = clean.square().sum() / (x - clean).square().sum()
    assert float(10 * ratio.log10()) == pytest.approx(snr_db, abs=0.1)


def test_the_seed_is_the_dictionarys_and_the_codes_are_the_same_at_every_noise_level():
    clean, noisy, other = (BernoulliGaussian(6, 9, 0.3, snr, seed) for snr, seed in ((None, 1), (20, 1), (None, 2)))
    before = torch.get_rng_state()
    assert torch.equal(clean.dictionary.weight, BernoulliGaussian(6, 9, seed=1).dictionary.weight)
    assert torch.equal(before, torch.get_rng_state())  # it leaves the global stream alone
    assert torch.equal(clean.dictionary.weight, noisy.dictionary.weight)
    assert not torch.equal(clean.dictionary.weight, other.dictionary.weight)
    assert torch.equal(clean.sample(5, stream(3))[1], noisy.sample(5, stream(3))[1])
    assert not torch.equal(clean.sample(5, stream(3))[1], clean.sample(5, stream(4))[1])


def test_bad_arguments():
    for active in (0, 1.5, -0.1):
        with pytest.raises(ValueError, match=rf"non-zero entry, in \(0, 1\], got {active}"):
            BernoulliGaussian(active=active)
    with pytest.raises(ValueError, match="num_atoms must be at least 1, got 0"):
        BernoulliGaussian(num_atoms=0)


def test_nmse_by_hand():
    truth = torch.tensor([[3.0, 0.0], [0.0, 4.0]])
    assert float(nmse(torch.zeros(2, 2), truth)) == 0
    assert float(nmse(truth + 0.5, truth)) == pytest.approx(10 * np.log10(4 * 0.25 / 25))
    assert float(nmse(0.9 * truth, truth)) == pytest.approx(-20, abs=1e-4)
    assert float(nmse(truth, truth)) == -torch.inf
    with pytest.raises(ValueError, match="the true code is zero"):
        nmse(truth, torch.zeros(2, 2))
