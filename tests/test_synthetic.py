import numpy as np
import pytest
import torch
from lightning.pytorch import LightningModule, Trainer

from dsc.measures import nmse
from dsc.synthetic import BernoulliGaussian, GroupSparse
from dsc.synthetic_data import SyntheticData


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
    with pytest.raises(ValueError, match="snr_db must be a number of dB, or None for no noise, got -inf"):
        BernoulliGaussian(snr_db=-np.inf)


def test_nmse_by_hand():
    truth = torch.tensor([[3.0, 0.0], [0.0, 4.0]])
    assert float(nmse(torch.zeros(2, 2), truth)) == 0
    assert float(nmse(truth + 0.5, truth)) == pytest.approx(10 * np.log10(4 * 0.25 / 25))
    assert float(nmse(0.9 * truth, truth)) == pytest.approx(-20, abs=1e-4)
    assert float(nmse(truth, truth)) == -torch.inf
    with pytest.raises(ValueError, match="the true code is zero"):
        nmse(truth, torch.zeros(2, 2))


# Unions of group subspaces


def group_sparse(**kwargs):
    return GroupSparse(**dict(num_features=16, num_atoms=24, group_size=3, active_groups=2) | kwargs)


@pytest.mark.parametrize("case", [{}, {"nonneg": True}, {"group_size": 1}, {"norms": None, "active_groups": 8}])
def test_group_signals_are_made_from_their_codes_and_supports(case):
    problem = group_sparse(**case)
    x, z, support = problem.sample(500, stream())
    d, groups = problem.group_size, problem.num_groups
    assert x.shape == (500, 16) and z.shape == (500, 24) and support.shape == (500, groups)
    np.testing.assert_allclose(x, z.double() @ problem.dictionary.weight.double(), atol=1e-4)
    norms = z.unflatten(1, (groups, d)).norm(dim=2)
    assert torch.equal(norms > 0, support) and (support.sum(1) == problem.active_groups).all()
    if problem.norms:
        assert norms[support].min() >= 4 - 1e-5 and norms[support].max() <= 5 + 1e-5
    assert (z >= 0).all() == problem.nonneg
    assert problem.noise == 0


def test_groups_are_uniform_and_codes_uncorrelated():
    """The paper's assumptions 2 and 3: p_g = γ/Γ, p_gh = γ(γ − 1)/(Γ(Γ − 1)), E[z_v z_hᵀ | v, h active] = 0."""
    problem = group_sparse(active_groups=3)
    _, z, support = problem.sample(40_000, stream())
    counts = support.double()
    together = counts.mT @ counts / len(z)
    expected = torch.full((8, 8), 3 * 2 / (8 * 7)).fill_diagonal_(3 / 8).double()
    torch.testing.assert_close(together, expected, atol=0.012, rtol=0)  # five standard deviations
    second = z.double().mT @ z.double() / len(z)
    torch.testing.assert_close(second, 3 / 8 * 61 / 3 / 3 * torch.eye(24).double(), atol=0.15, rtol=0)


@pytest.mark.parametrize("snr_db", [-3.0, 1.0, 10.0])
@pytest.mark.parametrize(
    "case",
    [{}, {"group_size": 1, "nonneg": True}, {"nonneg": True}, {"norms": None}, {"norms": None, "nonneg": True},
     {"active_groups": 8, "nonneg": True}, {"num_atoms": 3, "active_groups": 1, "nonneg": True}],
)  # fmt: skip
def test_the_noise_has_the_stated_ratio_to_groups(case, snr_db):
    problem = group_sparse(**case, snr_db=snr_db)
    x, z, _ = problem.sample(20_000, stream())
    clean = z @ problem.dictionary.weight
    energies = clean.square().sum(1)
    assert float(energies.mean()) == pytest.approx(problem.energy, abs=5 * float(energies.std()) / 20_000**0.5)
    ratio = problem.energy / (x - clean).square().sum(1).mean()
    assert float(10 * ratio.log10()) == pytest.approx(snr_db, abs=0.05)


def test_the_papers_noise():
    # Three groups of norm U(4, 5) in 950 dimensions: σ² is the floor of Figure 3b times 10,000.
    for snr_db, variance in {1.0: 0.051, 5.0: 0.0203, 10.0: 0.00642}.items():
        problem = GroupSparse(950, 6, 2, 3, snr_db=snr_db)
        assert problem.energy == pytest.approx(61) and problem.noise**2 == pytest.approx(variance, rel=2e-3)
    assert GroupSparse(950, 6, 2, 3, snr_db=np.inf).noise == 0


def test_one_active_group_of_gaussian_codes_is_a_gaussian_mixture():
    problem = group_sparse(num_features=4, num_atoms=6, group_size=2, active_groups=1, norms=None, snr_db=3.0)
    sample = problem.sample(60_000, stream())
    assert torch.equal(torch.nn.functional.one_hot(sample.labels, 3).bool(), sample.supports)
    atoms = problem.dictionary.weight.unflatten(0, (3, 2))
    for g in range(3):
        x = sample.signals[sample.labels == g]
        assert x.mean(0).abs().max() < 0.05
        covariance = atoms[g].mT @ atoms[g] + problem.noise**2 * torch.eye(4)
        torch.testing.assert_close(x.mT @ x / len(x), covariance, atol=0.05, rtol=0)


def test_orthonormal_groups_span_the_same_subspaces():
    plain, orthonormal = (group_sparse(orthonormal=o).dictionary.weight.unflatten(0, (8, 3)) for o in (False, True))
    torch.testing.assert_close(orthonormal @ orthonormal.mT, torch.eye(3).expand(8, 3, 3))
    projected = plain @ orthonormal.mT @ orthonormal
    torch.testing.assert_close(projected, plain)


def test_group_codes_are_the_same_at_every_noise_level_and_in_double():
    clean, noisy, double = (group_sparse(snr_db=snr) for snr in (None, 5.0, None))
    double.dictionary.double()
    assert torch.equal(clean.sample(5, stream(3)).codes, noisy.sample(5, stream(3)).codes)
    assert double.sample(5, stream(3)).signals.dtype == torch.float64
    assert not torch.equal(clean.dictionary.weight, group_sparse(seed=1).dictionary.weight)


@pytest.mark.parametrize(
    "case, message",
    [
        ({"group_size": 5}, "groups of 5 do not tile 24 atoms; nearest sizes that do: 4 or 6"),
        ({"group_size": 0}, "groups of 0 do not tile 24 atoms; nearest sizes that do: 1"),
        ({"active_groups": 9}, "active_groups must be from 1 to the number of groups, 8, got 9"),
        ({"active_groups": 0}, "active_groups must be from 1 to the number of groups, 8, got 0"),
        ({"norms": (5.0, 4.0)}, r"norms must be .* 0 < least ≤ largest < inf, got \(5.0, 4.0\)"),
        ({"snr_db": -np.inf}, "snr_db must be a number of dB, or None for no noise, got -inf"),
        ({"snr_db": np.nan}, "snr_db must be a number of dB, or None for no noise, got nan"),
        ({"num_features": 0}, "num_features must be at least 1, got 0"),
        ({"num_features": 2, "orthonormal": True}, "group_size=3 atoms of 2 features cannot be orthonormal"),
    ],
)
def test_bad_group_arguments(case, message):
    with pytest.raises(ValueError, match=message):
        group_sparse(**case)


class Recorder(LightningModule):
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen = []

    def training_step(self, batch, index):
        self.seen.append(batch)
        return self.weight**2

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("fresh", [True, False])
def test_an_epoch_has_fresh_signals_or_the_same(fresh):
    problem = group_sparse(snr_db=5.0)
    data, module = SyntheticData(problem, 2, 7, fresh, seed=4), Recorder()
    Trainer(max_epochs=2, barebones=True, accelerator="cpu").fit(module, data.train_dataloader())
    x = [signals for signals, _ in module.seen]
    assert [tuple(part.shape) for part in x] == [(7, 16)] * 4 and module.seen[0][1].dtype == torch.int64
    assert torch.equal(x[0], x[2]) == torch.equal(x[1], x[3]) == (not fresh)
    assert not torch.equal(x[0], x[1])
    held_out = next(iter(data.val_dataloader()))[0]
    assert all(not torch.equal(part, held_out) for part in x)
    assert torch.equal(held_out, next(iter(SyntheticData(problem, 5, 7, not fresh, seed=4).val_dataloader()))[0])
    again = data.train_dataloader()
    again.sampler.set_epoch(1)  # as a resumed run does
    assert torch.equal(list(again)[1][0], x[3])
