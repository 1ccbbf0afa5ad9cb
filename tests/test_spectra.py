import math

import pytest
import torch

from dsc import spectra


def kernel(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def symbols(weight, points):
    """Ŵ at all frequencies of a grid, summed tap by tap: (points², atoms, channels)."""
    grid = 2 * math.pi / points * torch.cartesian_prod(torch.arange(points), torch.arange(points))
    side = weight.shape[-1]
    taps = torch.cartesian_prod(torch.arange(side), torch.arange(side))
    waves = torch.polar(torch.ones(len(grid), len(taps)), -(grid @ taps.float().mT))
    return torch.einsum("ft,act->fac", waves, weight.flatten(2).to(waves.dtype))


SHAPES = [(8, 3, 3, 3), (3, 8, 5, 5), (40, 40, 3, 3), (6, 6, 1, 1)]


@pytest.mark.parametrize("shape", SHAPES)
def test_bound_is_above_every_singular_value_and_close(shape):
    weight = kernel(*shape)
    bound = spectra.squared_norm_bound(weight)
    largest = torch.linalg.matrix_norm(symbols(weight, 48), 2).square().max()
    assert largest <= bound <= 1.05 * largest


@pytest.mark.parametrize("shape", SHAPES)
def test_largest_eigenvalue_is_that_of_the_frequencies_asked_for(shape, monkeypatch):
    monkeypatch.setattr(spectra, "FREQUENCIES_AT_ONCE", 5)
    weight = kernel(*shape, seed=1)
    angles = 2 * math.pi / 7 * torch.cartesian_prod(torch.arange(7), torch.arange(7))
    expected = torch.linalg.matrix_norm(symbols(weight, 7), 2).square().max()
    found = spectra.largest_eigenvalue(weight, angles)
    assert expected <= found * (1 + 1e-5) and found <= expected * (1 + 1.1e-3)


def test_a_single_peak_on_the_grid_is_not_missed():
    weight = torch.ones(1, 1, 3, 3)  # largest at frequency 0 alone: 9² = 81
    angles = 2 * math.pi / 32 * torch.cartesian_prod(torch.arange(32), torch.arange(17))
    assert spectra.largest_eigenvalue(weight, angles).item() == pytest.approx(81, rel=1.1e-3)


@pytest.mark.parametrize("shape", SHAPES)
def test_autocorrelation_is_the_gram_symbol(shape):
    weight = kernel(*shape)
    lags, offsets = spectra.autocorrelation(weight)
    at = torch.tensor([0.3, -1.1])
    taps = torch.cartesian_prod(torch.arange(shape[-1]), torch.arange(shape[-1])).float()
    symbol = torch.einsum("t,act->ac", torch.polar(torch.ones(len(taps)), -(taps @ at)), weight.flatten(2).cfloat())
    gram = symbol.mH @ symbol if shape[1] <= shape[0] else (symbol @ symbol.mH).conj()
    found = torch.einsum("ijl,l->ij", lags.cfloat(), torch.polar(torch.ones(len(offsets)), offsets @ at))
    close = [torch.allclose(found, g, rtol=1e-4, atol=1e-4) for g in (gram, gram.conj())]
    assert any(close)  # which sign a lag has does not matter: both have the same eigenvalues
