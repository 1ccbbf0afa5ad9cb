import copy

import numpy as np
import pytest
import torch
from oracles import operator_norm, unfold
from torch import nn
from torch.nn.utils import parametrize
from torch.utils.flop_counter import FlopCounterMode

from dsc.dictionaries import ConvDictionary, DenseDictionary, Dictionary

# in_channels, atoms, kernel_size, stride, padding
CONV = [(1, 2, 1, 1, 0), (1, 4, 3, 1, 0), (2, 3, 3, 1, 2), (3, 5, 5, 1, 2), (2, 4, 3, 2, 1)]
CONV += [(5, 3, 3, 2, 1), (6, 2, 4, 3, 0), (1, 3, 4, 2, 0), (2, 6, 4, 4, 0), (1, 4, 5, 3, 2), (2, 2, 2, 3, 1)]
DENSE = [(8, 16), (16, 8), (12, 12)]
SIZES = [(5, 5), (9, 6)]


def conv(*arguments, seed=0):
    torch.manual_seed(seed)
    return ConvDictionary(*arguments)


def dense(*arguments, seed=0):
    torch.manual_seed(seed)
    return DenseDictionary(*arguments)


def build(arguments, seed=0):
    return (dense if len(arguments) == 2 else conv)(*arguments, seed=seed)


@pytest.mark.parametrize("shape", [(3,), (2, 4)])
def test_dense_maps_are_the_matrix_and_its_transpose(shape):
    d = dense(8, 16).double()
    matrix = d.weight.detach().T  # features × atoms
    x, z = torch.randn(*shape, 8).double(), torch.randn(*shape, 16).double()
    torch.testing.assert_close(d.synthesize(z), torch.einsum("fa,...a->...f", matrix, z))
    torch.testing.assert_close(d.analyze(x), torch.einsum("fa,...f->...a", matrix, x))
    torch.testing.assert_close((d.synthesize(z) * x).sum(), (z * d.analyze(x)).sum())
    torch.testing.assert_close(d.gram(), matrix.T @ matrix)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("arguments", CONV)
def test_conv_maps_are_the_unfolded_matrix_and_its_transpose(arguments, size):
    d = conv(*arguments).double()
    matrix = unfold(d, size)
    x = torch.randn(2, arguments[0], *size).double()
    correlations = d.analyze(x)
    z = torch.randn_like(correlations)
    torch.testing.assert_close(correlations.flatten(1), x.flatten(1) @ matrix)
    torch.testing.assert_close(d.synthesize(z, size).flatten(1), z.flatten(1) @ matrix.T)
    torch.testing.assert_close((d.synthesize(z, size) * x).sum(), (z * correlations).sum())


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("step", [0.3, torch.tensor(0.3).double()])
@pytest.mark.parametrize("arguments,shape", [(a, (7, a[0])) for a in DENSE] + [((8, 3), (2, 5, 8)), ((8, 3), (1, 8))])
def test_dense_gradient_step_is_that_of_the_matrix(arguments, shape, step, bias):
    d = dense(*arguments).double()
    matrix = d.weight.detach().T
    x, z, b = torch.randn(shape).double(), torch.randn(*shape[:-1], d.num_atoms).double(), torch.randn(d.num_atoms)
    b = b.double() if bias else torch.zeros(())
    move = d.gradient_step(step, x, b if bias else None)
    expected = z + 0.3 * ((x - z @ matrix.T) @ matrix + b)
    torch.testing.assert_close(move(x, 0.3 * (x @ matrix + b))(z), expected)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("arguments", CONV)
def test_conv_gradient_step_is_that_of_the_unfolded_matrix(arguments, bias):
    d = conv(*arguments).double()
    x = torch.randn(2, arguments[0], 9, 6).double()
    matrix, z = unfold(d, (9, 6)), torch.randn_like(d.analyze(x))
    b = torch.randn(d.num_atoms).double() if bias else None
    got = d.gradient_step(torch.tensor(0.3), x, b)(x, 0.3 * d.analyze(x))(z)
    expected = z.flatten(1) + 0.3 * (x.flatten(1) - z.flatten(1) @ matrix.T) @ matrix
    expected = expected.view_as(z) + (0.3 * b.view(-1, 1, 1) if bias else 0)
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-6)  # the step is in single precision


def test_the_cheaper_form_is_chosen_by_its_multiplications():
    for features, atoms, batch in [(8, 4, 3), (8, 4, 2), (8, 8, 8), (8, 8, 7), (8, 12, 23), (8, 12, 24), (8, 16, 999)]:
        d, x = dense(features, atoms), torch.ones(batch, features)
        with FlopCounterMode(display=False) as gram:
            _ = torch.addmm(x @ d.weight.mT, torch.ones(batch, atoms), d.gram())
        with FlopCounterMode(display=False) as residual:
            d.analyze(x - d.synthesize(d.analyze(x)))
        assert d.gram_is_cheaper(x) == (gram.get_total_flops() <= residual.get_total_flops())
        assert d.gram_is_cheaper(x[:, None]) == d.gram_is_cheaper(x)  # tokens count as signals


def test_conv_synthesis_without_a_size_gives_the_smallest_signal():
    d = conv(2, 3, 3, 2, 1).double()
    z = torch.randn(1, 3, 4, 4).double()
    assert torch.equal(d.synthesize(z), d.synthesize(z, (7, 7)))


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("arguments", CONV)
def test_conv_bound_covers_every_image_size(arguments, size):
    d = conv(*arguments)
    assert d.lipschitz() >= torch.linalg.matrix_norm(unfold(d, size).double(), 2) ** 2


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("arguments", CONV)
def test_conv_bound_is_within_5_percent_of_the_infinite_image(arguments, seed):
    d = conv(*arguments, seed=seed)
    assert operator_norm(d) <= d.lipschitz() <= 1.05 * operator_norm(d)


def test_infinite_image_norm_is_what_large_images_approach():
    d = conv(1, 2, 3, 1, 0)
    small, large = (torch.linalg.matrix_norm(unfold(d, (n, n)).double(), 2) ** 2 for n in (8, 24))
    assert small < large < operator_norm(d)
    assert large > 0.95 * operator_norm(d)


@pytest.mark.parametrize("arguments", DENSE)
def test_dense_bound_is_exact(arguments):
    d = dense(*arguments).double()
    torch.testing.assert_close(d.lipschitz(), torch.linalg.matrix_norm(d.weight, 2) ** 2, rtol=1e-12, atol=0)


@pytest.mark.parametrize("arguments", [*DENSE, (64, 128), (1, 1, 3), (1, 4, 3), (1, 8, 5), (3, 16, 3, 2, 1)])
def test_training_curvature_starts_just_above_the_norm(arguments):
    dictionaries = [build(arguments, seed) for seed in range(10)]
    ratios = [(d.curvature() / operator_norm(d)).item() for d in dictionaries]
    assert 1 <= min(ratios) <= max(ratios) <= 1.12


@pytest.mark.parametrize("arguments", [*DENSE, (3, 8, 3), (2, 4, 3, 2, 1)])
def test_training_curvature_follows_the_weights(arguments):
    d = build(arguments)
    x = torch.randn(4, arguments[0]) if len(arguments) == 2 else torch.randn(4, arguments[0], 7, 7)
    optimiser = torch.optim.SGD(d.parameters(), lr=0.01)
    for _ in range(200):
        before = d.curvature().detach()  # warmed up, so that this is about following alone
    for _ in range(30):  # weights move by 1 % a step: they learn to reconstruct, and grow
        optimiser.zero_grad()
        error = x - d.synthesize(d.analyze(x).relu(), x.shape[-2:])
        (error.square().mean() - d.weight.square().sum() / 2).backward()
        optimiser.step()
        curvature = d.curvature().detach()
        assert operator_norm(d) <= curvature <= 1.12 * operator_norm(d)
    assert curvature > 1.2 * before


def warm_curvature(d, weight):
    twin = copy.deepcopy(d)
    twin.weight.data.copy_(weight)
    for _ in range(400):
        curvature = twin.curvature()
    return curvature, twin


@pytest.mark.parametrize("arguments", [(8, 16), (16, 8), (1, 3, 3), (2, 3, 4, 2, 1)])
def test_training_curvature_has_the_gradient_of_its_value(arguments):
    d = build(arguments).double()
    curvature, d = warm_curvature(d, d.weight.detach())
    (gradient,) = torch.autograd.grad(curvature, d.weight)
    for _ in range(5):
        move = torch.randn_like(gradient)
        up, down = (warm_curvature(d, d.weight.detach() + step * move)[0].item() for step in (1e-5, -1e-5))
        assert (gradient * move).sum().item() == pytest.approx((up - down) / 2e-5, rel=1e-4)


@pytest.mark.parametrize("arguments", [(8, 16), (16, 8)])
def test_dense_training_curvature_has_the_gradient_of_the_largest_eigenvalue(arguments):
    d = build(arguments).double()
    curvature, d = warm_curvature(d, d.weight.detach())
    (gradient,) = torch.autograd.grad(curvature, d.weight)
    weight = d.weight.detach().requires_grad_()
    largest = torch.linalg.eigvalsh(weight @ weight.mT)[-1]
    (expected,) = torch.autograd.grad(largest, weight)
    torch.testing.assert_close(gradient / curvature.detach(), expected / largest.detach(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("arguments", [(8, 16), (1, 3, 3)])
def test_curvatures_of_two_calls_share_one_backward(arguments):
    d = build(arguments)
    total = d.curvature() + d.curvature()
    (gradient,) = torch.autograd.grad(total, d.weight)
    (last,) = torch.autograd.grad(d.curvature(), d.weight)
    torch.testing.assert_close(gradient, 2 * last, rtol=0.2, atol=0.1)


def scale_in_place(d):
    with torch.no_grad():
        d.weight.mul_(3)
    return d


def scale_by_load(d):
    d.load_state_dict({**d.state_dict(), "weight": 3 * d.weight.detach()})
    return d


def scale_by_assigned_load(d):
    d.load_state_dict({**d.state_dict(), "weight": 3 * d.weight.detach()}, assign=True)
    return d


def scale_a_copy(d):
    return scale_in_place(copy.deepcopy(d))


def scale_by_training(d):
    d.train()
    optimiser = torch.optim.SGD(d.parameters(), lr=1.0)
    (-d.weight.square().sum()).backward()  # W + 2W
    optimiser.step()
    return d.eval()


def scale_data_by_training(d):
    d.train()
    d.weight.data.mul_(3)
    return d.eval()


CHANGES = [scale_in_place, scale_by_load, scale_by_assigned_load, scale_a_copy, scale_by_training]


@pytest.mark.parametrize("change", [*CHANGES, scale_data_by_training])
@pytest.mark.parametrize("arguments", [(8, 16), (1, 3, 3)])
def test_eval_curvature_follows_every_change_of_the_weights(arguments, change):
    d = build(arguments).eval()
    before = d.curvature().clone()
    changed = change(d)
    torch.testing.assert_close(changed.curvature(), 9 * before)
    assert operator_norm(changed) <= changed.curvature() <= 1.05 * operator_norm(changed)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_eval_curvature_stays_a_bound_when_the_precision_changes(dtype):
    for seed in range(20):
        d = dense(8, 16, seed=seed).double().eval().to(dtype)
        assert d.curvature().double() >= operator_norm(d)


def test_eval_curvature_follows_a_parametrized_weight():
    class Scale(nn.Module):
        def __init__(self):
            super().__init__()
            self.factor = nn.Parameter(torch.ones(()))

        def forward(self, weight):
            return self.factor * weight

    d = dense(8, 16)
    parametrize.register_parametrization(d, "weight", Scale())
    d.eval()
    first = operator_norm(d).item()
    for factor in range(1, 9):
        with torch.no_grad():
            d.parametrizations.weight[0].factor.fill_(factor)
        torch.testing.assert_close(d.curvature(), torch.tensor(factor**2 * first))


def test_eval_curvature_of_a_module_made_in_inference_mode():
    with torch.inference_mode():
        d = dense(8, 16).eval()
        torch.testing.assert_close(d.curvature(), operator_norm(d).float())


@pytest.mark.parametrize("arguments", [(8, 16), (2, 3, 3)])
def test_atoms_are_made_and_kept_at_unit_norm(arguments):
    d = build(arguments)
    torch.testing.assert_close(d.weight.flatten(1).norm(dim=1), torch.ones(d.num_atoms))
    before = d.weight.detach().clone()
    with torch.no_grad():
        d.weight.mul_(torch.linspace(0.1, 4, d.num_atoms).view(-1, *[1] * (d.weight.ndim - 1)))
    torch.testing.assert_close(d.normalize_().weight.detach(), before)


def test_a_zero_atom_is_named():
    d = dense(8, 16)
    with torch.no_grad():
        d.weight[5] = 0
    with pytest.raises(ValueError, match="atom 5 is zero"):
        d.normalize_()


@pytest.mark.parametrize(
    "call,message",
    [
        (lambda: conv(1, 2, 5, 1, 1).analyze(torch.ones(1, 1, 2, 9)), "2×9 pixels is too small.*least 3"),
        (lambda: conv(1, 2, 3).synthesize(torch.ones(1, 2, 4, 4), (6, 7)), r"\(4, 4\) does not .*\(6, 7\)"),
        (lambda: conv(1, 2, 3, 2).synthesize(torch.ones(1, 2, 4, 4), (8, 9)), "does not come from"),
        (lambda: conv(1, 2, 3, 1, 3), r"padding must be in \[0, kernel_size=3\), got 3"),
        (lambda: conv(1, 2, 3, 1, -1), "padding must be in"),
        (lambda: conv(1, 2, 3, 0), "stride must be at least 1, got 0"),
        (lambda: conv(1, 0, 3), "num_atoms must be at least 1, got 0"),
        (lambda: dense(0, 3), "num_features must be at least 1, got 0"),
        (lambda: dense(8, 3).analyze(torch.ones(2, 7)), r"signals of shape \(2, 7\) do not fit: expected 8"),
        (lambda: dense(8, 3).synthesize(torch.ones(2, 8)), r"codes of shape \(2, 8\) do not fit: expected 3"),
        (lambda: conv(2, 3, 3).analyze(torch.ones(1, 3, 5, 5)), "signals of .*expected 2 in dimension -3"),
        (lambda: conv(2, 3, 3).analyze(torch.ones(5, 5)), r"signals of shape \(5, 5\) do not fit"),
        (lambda: conv(2, 3, 3).synthesize(torch.ones(1, 2, 5, 5)), "codes of .*expected 3 in dimension -3"),
        (lambda: dense(8, 3).atoms(), "8 features are no 1-channel square image"),
        (lambda: dense(8, 4).block_coherence(3), "group_size=3 does not divide the 4 channels"),
    ],
)
def test_wrong_sizes_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("arguments", [(8, 12), (2, 12, 3)])
def test_coherences_match_loops_over_atoms(arguments):
    d = build(arguments)
    scale_in_place(d)  # they normalise
    unit = d.weight.detach().flatten(1).double().numpy() / 3
    pairs = [abs(unit[i] @ unit[j]) for i in range(12) for j in range(i)]
    assert d.coherence().item() == pytest.approx(max(pairs))
    blocks = unit.reshape(4, 3, -1)
    norms = [np.linalg.norm(blocks[g] @ blocks[h].T, 2) / 3 for g in range(4) for h in range(g)]
    assert d.block_coherence(3).item() == pytest.approx(max(norms), rel=1e-5)


def test_atoms_are_images_of_the_weights():
    images = dense(27, 4).atoms(in_chans=3)
    assert torch.equal(images, dense(27, 4).weight.view(4, 3, 3, 3))
    assert dense(16, 4).atoms().shape == (4, 1, 4, 4)
    assert torch.equal(conv(3, 4, 5).atoms(), conv(3, 4, 5).weight)


def test_from_atoms_keeps_them_and_the_random_stream():
    atoms = torch.randn(6, 4).double() * torch.arange(1, 7)[:, None]
    before = torch.get_rng_state()
    d = DenseDictionary.from_atoms(atoms)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(d.weight, atoms) and d.weight.dtype == torch.float64 and d.weight is not atoms
    norm = torch.linalg.matrix_norm(atoms, 2).item() ** 2
    assert d.train().curvature().item() == pytest.approx(1.05 * norm, rel=0.05)  # follows these atoms from the start
    assert d.eval().curvature().item() == pytest.approx(norm)
    with pytest.raises(ValueError, match=r"atoms as rows, got shape \(4,\)"):
        DenseDictionary.from_atoms(atoms[0])


class Plain(Dictionary):
    """A dense dictionary that leaves to the base class all that it can."""

    def synthesize(self, z, size=None):
        return z @ self.weight

    def analyze(self, x):
        return x @ self.weight.mT

    def lipschitz(self):
        return torch.linalg.matrix_norm(self.weight, 2) ** 2


@pytest.mark.parametrize("bias", [False, True])
def test_what_the_base_class_fills_in(bias):
    reference = DenseDictionary.from_atoms(torch.randn(6, 4).double())
    plain = Plain(reference.weight.detach().clone())
    assert torch.allclose(plain.weight.norm(dim=1), torch.ones(6).double()) and set(plain.state_dict()) == {"weight"}
    reference.normalize_()
    x, z, b = torch.randn(3, 4).double(), torch.randn(3, 6).double(), torch.randn(6).double() if bias else None
    driven = 0.3 * (plain.analyze(x) + (b if bias else 0))
    moves = [d.gradient_step(0.3, x, b)(x, driven)(z) for d in (plain, reference)]
    torch.testing.assert_close(*moves)
    for mode in (True, False):
        assert plain.train(mode).curvature().item() == pytest.approx(plain.lipschitz().item())
    slope = torch.autograd.grad(plain.train().curvature(), plain.weight)[0]
    assert slope.abs().max() > 0


def test_parametrized_atoms_are_not_said_to_be_normalised():
    dictionary = nn.utils.parametrizations.weight_norm(dense(6, 4), dim=0)
    with pytest.raises(ValueError, match="the weight is parametrized"):
        dictionary.normalize_()
