import math

import numpy as np
import pytest
import torch

from dsc import measures

CODE = torch.tensor([[[1.0, 0.0], [0.0, 0.0], [0.0, 0.0], [0.0, -2.0]], [[0.0, 0.0]] * 4])  # (2, 4, 2)


@pytest.mark.parametrize(
    "value,expected",
    [
        (measures.active_fraction(CODE), 2 / 16),
        (measures.active_fraction(torch.zeros(2, 3)), 0.0),
        (measures.active_fraction(torch.full((2, 3), 1e-30)), 1.0),
        (measures.active_group_fraction(CODE, 2), 2 / 8),  # groups: 2 signals × 2 × 2 places
        (measures.active_group_fraction(CODE, 1), 2 / 16),
        (measures.active_group_fraction(CODE, 2, dim=-1), 2 / 8),
        (measures.relative_error(torch.tensor([3.0, 0.0]), torch.tensor([3.0, 4.0])), 4 / 5),
        (measures.coherence(torch.tensor([[1.0, 0.0], [-3.0, 4.0], [0.0, 2.0]])), 0.8),
        (measures.coherence(torch.eye(3)), 0.0),
        (measures.block_coherence(torch.eye(4), 2), 0.0),
        (measures.block_coherence(torch.tensor([[1.0, 0, 0], [0, 1, 0], [1, 0, 0], [0, 0, 1]]), 2), 0.5),
    ],
)
def test_hand_computed_values(value, expected):
    torch.testing.assert_close(value, torch.tensor(expected))


@pytest.mark.parametrize("dim,expected", [(1, [1, 0, 0, 1]), (-1, [1, 1]), (0, [1, 0])])
def test_active_units_of_each_dimension(dim, expected):
    assert measures.active_units(CODE, dim).tolist() == expected


def test_active_units_of_a_vector():
    assert measures.active_units(torch.tensor([0.0, 2.0]), 0).tolist() == [False, True]


def test_group_fraction_refuses_sizes_that_do_not_divide():
    with pytest.raises(ValueError, match="group_size=3 does not divide the 4 channels.*2 or 4"):
        measures.active_group_fraction(CODE, 3)


def test_hoyer_is_0_for_equal_entries_and_1_for_a_single_one():
    signals = torch.stack([torch.full((4, 4), -3.0), 5 * torch.eye(16)[3].view(4, 4), torch.zeros(4, 4)])
    torch.testing.assert_close(measures.hoyer(signals), torch.tensor([0.0, 1.0]))  # not the zero one


def test_hoyer_of_two_among_four_and_its_invariance_to_scale():
    expected = torch.full((3,), 2 - math.sqrt(2))  # (2 − 2/√2)/(2 − 1)
    signals = torch.tensor([[1.0, 0, -1, 0], [1e-4, 1e-4, 0, 0], [1e8, 0, 0, 1e8]])
    torch.testing.assert_close(measures.hoyer(signals), expected)


def test_hoyer_without_signals_is_empty():
    assert measures.hoyer(torch.zeros(3, 5)).shape == (0,)


def test_relative_error_needs_a_reference():
    with pytest.raises(ValueError, match="reference code is zero"):
        measures.relative_error(torch.ones(2), torch.zeros(2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("rate", [0.3, 0.9, 1.0, 1.1])
def test_fitted_rate_is_exact_on_geometric_sequences_above_a_floor(rate, dtype):
    errors = 5 * rate ** torch.arange(8, dtype=dtype)
    assert measures.fitted_rate(errors).item() == pytest.approx(rate, rel=1e-5)
    floored = torch.cat([errors, torch.full((20,), 1e-7, dtype=dtype), errors])
    assert measures.fitted_rate(floored).item() == pytest.approx(rate, rel=1e-5)


def test_fitted_rate_is_the_least_squares_slope():
    errors = torch.tensor([1.0, 0.2, 0.15, 0.01])
    slope = np.polyfit(range(4), np.log(errors.numpy()), 1)[0]
    assert measures.fitted_rate(errors).item() == pytest.approx(math.exp(slope))


@pytest.mark.parametrize(
    "errors", [[], [1.0], [1.0, 1e-9, 1.0], [1e-9, 1.0, 0.5], [1.0, math.inf, 2.0], [1.0, 0.5, math.nan]]
)
def test_fitted_rate_is_none_where_it_is_undefined(errors):
    assert measures.fitted_rate(torch.tensor(errors)) is None


def test_coherences_match_loops_over_pairs():
    atoms = torch.randn(12, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 3
    unit = atoms.numpy() / np.linalg.norm(atoms.numpy(), axis=1, keepdims=True)
    pairs = [abs(unit[i] @ unit[j]) for i in range(12) for j in range(i)]
    assert measures.coherence(atoms).item() == pytest.approx(max(pairs))
    for d in (1, 2, 3, 4):
        blocks = unit.reshape(-1, d, 7)
        norms = [np.linalg.norm(blocks[g] @ blocks[h].T, 2) / d for g in range(12 // d) for h in range(g)]
        assert measures.block_coherence(atoms, d).item() == pytest.approx(max(norms))


@pytest.mark.parametrize("group_size", [1, 2, 3, 4, 6])
def test_mean_squared_coherence_is_a_mean_over_pairs_of_other_groups(group_size):
    atoms = torch.randn(12, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 3
    unit = atoms.numpy() / np.linalg.norm(atoms.numpy(), axis=1, keepdims=True)
    pairs = [(unit[i] @ unit[j]) ** 2 for i in range(12) for j in range(12) if i // group_size != j // group_size]
    assert measures.mean_squared_coherence(atoms, group_size).item() == pytest.approx(np.mean(pairs))
    assert measures.mean_squared_coherence(torch.eye(12), group_size).item() == 0


def test_mean_squared_coherence_needs_two_groups():
    with pytest.raises(ValueError, match="4 atoms in one group"):
        measures.mean_squared_coherence(torch.eye(4), 4)


def test_mean_log_and_relative_residual_by_hand():
    assert measures.mean_log(torch.tensor([0.0, -2.0]), 0.5).item() == pytest.approx(math.log(5) / 2)
    x = torch.tensor([[3.0, 0.0], [0.0, 4.0]])
    assert measures.relative_residual(x, torch.tensor([[2.0, 0.0], [0.0, 6.0]])).item() == pytest.approx(5 / 25)
    assert measures.relative_residual(0 * x, 0 * x).item() == 0


@pytest.mark.parametrize("shape,dim", [((50, 12), 1), ((50, 12), -1), ((20, 12, 3, 2), 1), ((20, 5, 12), -1)])
def test_the_strongest_group_is_that_of_largest_norm_over_all_positions(shape, dim):
    z = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    norms = np.linalg.norm(np.moveaxis(z.numpy(), dim, 1).reshape(len(z), 4, -1), axis=2)
    assert measures.strongest_group(z, 3, dim).tolist() == norms.argmax(1).tolist()
    assert measures.strongest_group(torch.zeros(2, 12), 3).tolist() == [0, 0]
