import math
from itertools import combinations

import numpy as np
import oracles
import pytest
import torch

from dsc import frames, theory
from dsc.dictionaries import ConvDictionary, DenseDictionary
from dsc.layers import DeepSparseCoding, SparseCoding
from dsc.prox import ReLU, Soft
from dsc.solvers import ISTA
from dsc.synthetic import DeepSparse
from dsc.theory.deep import sparsity


def stream(seed=0):
    return torch.Generator().manual_seed(seed)


def dense(atoms):
    return DenseDictionary.from_atoms(atoms).requires_grad_(False)


def conv(channels, atoms, kernel, stride=1, padding=0, seed=0):
    torch.manual_seed(seed)
    return ConvDictionary(channels, atoms, kernel, stride, padding).double().normalize_().requires_grad_(False)


def chain(*kinds, seed=0):
    """Steiner's 28 × 64 frame (μ = 1/7), and above it pairs of these coherences."""
    g = stream(seed)
    first = frames.shuffled(frames.steiner(8), g)
    return [dense(first), *(dense(frames.sparse_pairs(64, mu, generator=g)) for mu in kinds)]


def cosines(atoms):
    gram = np.abs(np.asarray(atoms) @ np.asarray(atoms).T)
    np.testing.assert_allclose(np.diag(gram), 1, atol=1e-12)
    return gram[~np.eye(len(gram), dtype=bool)]


# Frames


@pytest.mark.parametrize(
    "atoms, shape, coherence",
    [
        (frames.paley(13), (14, 7), 13**-0.5),
        (frames.paley(29), (30, 15), 29**-0.5),
        (frames.steiner(4), (16, 6), 1 / 3),
        (frames.steiner(8), (64, 28), 1 / 7),
    ],
)
def test_equiangular_frames_reach_the_least_coherence_there_is(atoms, shape, coherence):
    assert atoms.shape == shape
    np.testing.assert_allclose(cosines(atoms), coherence, atol=1e-12)
    count, features = shape
    assert coherence == pytest.approx(math.sqrt((count - features) / features / (count - 1)))  # Welch's bound


def test_frames_of_known_coherence():
    assert cosines(frames.identity_hadamard(16)).max() == 0.25
    assert cosines(frames.identity_hadamard(2)).shape == (12,)
    for mu in (0.0, 0.1, 0.7):
        for nonneg in (False, True):
            atoms = frames.sparse_pairs(12, mu, nonneg, stream())
            assert atoms.shape == (12, 12) and cosines(atoms).max() == pytest.approx(mu, abs=1e-12)
            assert (atoms != 0).sum(1).max() <= 2 and (not nonneg or atoms.min() >= 0)
    lines = frames.sparse_lines(23, 4, 25, stream())  # all lines over the field of five
    assert lines.shape == (25, 23) and ((lines != 0).sum(1) == 4).all() and not lines[:, 20:].any()
    assert np.unique(cosines(lines).round(12)).tolist() == [0, 0.25]
    moved = frames.shuffled(frames.paley(5), stream())
    assert not torch.equal(moved, frames.paley(5)) and cosines(moved) == pytest.approx(5**-0.5)


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: frames.identity_hadamard(12), "powers of 2 above 1, got 12; the nearest is"),
        (lambda: frames.steiner(1), "powers of 2 above 1, got 1; the nearest is 2"),
        (lambda: frames.paley(7), r"got 7; the nearest is 5"),
        (lambda: frames.paley(25), r"a prime q with q mod 4 = 1, got 25; the nearest is 29"),
        (lambda: frames.sparse_pairs(5, 0.1), "even number of features, got 5; the nearest is 6"),
        (lambda: frames.sparse_pairs(4, 1.0), r"coherence must lie in \[0, 1\), got 1.0"),
        (lambda: frames.sparse_lines(19, 4, 9), "lines of 4 points, at least one, need at least 20 features, got 19"),
        (lambda: frames.sparse_lines(9, 0, 4), "at least one"),
        (lambda: frames.sparse_lines(9, 3, 10), "9 features have 9 lines of 3 points, got 10 atoms"),
    ],
)
def test_frames_that_do_not_exist(make, message):
    with pytest.raises(ValueError, match=message):
        make()


# The generative model


@pytest.mark.parametrize("tolerances", [None, [0.1, 0.02, 0.03]])
@pytest.mark.parametrize("nonneg", [False, True])
def test_signals_and_codes_follow_the_model(tolerances, nonneg):
    dictionaries = chain()
    dictionaries += [dense(frames.sparse_pairs(64, mu, nonneg, stream())) for mu in (0.1, 0.3)]
    model = DeepSparse(dictionaries, 2, tolerances, (0.5, 2.0), nonneg)
    sample = model.sample(50, stream())
    assert model.sparsities == [8, 4, 2]
    above = [sample.signals, *sample.codes[:-1]]
    for j, (x, code, dictionary) in enumerate(zip(above, sample.codes, dictionaries, strict=True)):
        error = x.numpy() - code.numpy() @ dictionary.weight.numpy()
        np.testing.assert_allclose(np.linalg.norm(error, axis=1), (tolerances or [0, 0, 0])[j], atol=1e-14)
        assert (code != 0).sum(1).max() <= model.sparsities[j] and code.abs().max() <= model.bounds[j] + 1e-12
        assert not nonneg or code.min() >= 0
    deepest = sample.codes[-1]
    sizes = deepest[deepest != 0].abs()
    assert ((deepest != 0).sum(1) == 2).all() and sizes.min() >= 0.5 and sizes.max() <= 2
    again = model.sample(50, stream())
    assert torch.equal(again.signals, sample.signals)


def test_a_convolutional_model():
    first, second = conv(1, 6, 4, 2), conv(6, 5, 2)
    model = DeepSparse([first, second], 2, [0.1, 0.2], side=13)
    sample = model.sample(4, stream())
    assert [z.shape[1:] for z in (sample.signals, *sample.codes)] == model.shapes == [(1, 13, 13), (6, 5, 5), (5, 4, 4)]
    assert model.sparsities == [48, 2] and model.bounds[0] >= sample.codes[0].abs().max()
    for dictionary, x, code, tolerance in zip(
        (first, second), (sample.signals, sample.codes[0]), sample.codes, (0.1, 0.2), strict=True
    ):
        made = code.flatten(1) @ oracles.unfold(dictionary, x.shape[-2:]).T
        torch.testing.assert_close((x.flatten(1) - made).norm(dim=1), torch.full((4,), tolerance, dtype=torch.float64))
    assert (sample.codes[1] != 0).flatten(1).sum(1).tolist() == [2] * 4


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: DeepSparse([], 1), "at least one dictionary"),
        (lambda: DeepSparse([dense(torch.eye(4)), dense(torch.eye(5))], 1),
         "do not chain: layer 2 synthesizes 5 features or channels, but layer 1 has 4 atoms"),
        (lambda: DeepSparse([conv(1, 4, 2), dense(torch.eye(4))], 1, side=4), "DenseDictionary after ConvDictionary"),
        (lambda: DeepSparse([dense(torch.eye(4))], 5), "sparsity must be from 1 to the 4 entries, got 5"),
        (lambda: DeepSparse([dense(torch.eye(4))], 1, [0.1, 0.1]), "tolerances are 1 numbers of at least 0"),
        (lambda: DeepSparse([dense(torch.eye(4))], 1, [-0.1]), r"got \[-0.1\]"),
        (lambda: DeepSparse([dense(torch.eye(4))], 1, magnitudes=(0, 1)), "0 < least ≤ largest < inf, got"),
        (lambda: DeepSparse([dense(torch.eye(4))], 1, side=4), "expected side=None, got 4"),
        (lambda: DeepSparse([conv(1, 4, 2)], 1), "give their height and width as side"),
        (lambda: DeepSparse([conv(1, 4, 2), conv(4, 4, 3)], 1, side=3), "layer 2 would code 2 pixels"),
        (lambda: DeepSparse([dense(torch.eye(4)), dense(-torch.eye(4))], 1, nonneg=True), "layer 2 has -1.0"),
    ],
)  # fmt: skip
def test_models_that_make_no_sense(make, message):
    with pytest.raises(ValueError, match=message):
        make()


# Coherence, and the inequality all rests on


@pytest.mark.parametrize("stride, padding", [(1, 0), (2, 0), (3, 0), (1, 1), (1, 2), (2, 1), (2, 2)])
def test_coherence_of_translates_is_that_of_the_unfolded_matrix(stride, padding):
    dictionary = conv(2, 3, 3, stride, padding)
    size = (8, 9)
    matrix = oracles.unfold(dictionary, size).numpy()
    gram = matrix.T @ matrix
    found = theory.mutual_coherence(dictionary, size)
    assert found.energy == pytest.approx(gram.diagonal().min()) and (padding > 0 or found.energy == pytest.approx(1))
    largest = np.abs(gram[~np.eye(len(gram), dtype=bool)]).max()
    assert found.value * found.energy == pytest.approx(largest)
    assert ("padding leaves border atoms" in found.note) == (padding > 0)


@pytest.mark.parametrize("stride, kernel", [(1, 3), (2, 3), (3, 3), (2, 2), (3, 2)])
def test_a_stripe_holds_the_atoms_that_overlap(stride, kernel):
    dictionary = conv(1, 2, kernel, stride)
    z = (torch.rand(1, 2, 6, 6, generator=stream()) < 0.2).double()
    places = np.argwhere(z[0].numpy())
    centres = np.argwhere(np.ones((6, 6)))  # a stripe is that of any entry, active or not
    most = max(sum((np.abs(p[1:] - c) * stride < kernel).all() for p in places) for c in centres)
    assert sparsity(dictionary, z) == most
    assert sparsity(dense(torch.eye(4)), torch.tensor([[0, 1.0, 2, 0], [0, 0, 1, 0]])) == 2


@pytest.mark.parametrize("dictionary", [conv(1, 2, 6, 3), conv(1, 2, 6, 3, 1), dense(frames.paley(29))])
def test_sparse_differences_keep_what_the_bound_says(dictionary):
    size = (12, 12)
    matrix = dictionary.weight.T if dictionary.weight.ndim == 2 else oracles.unfold(dictionary, size)
    found = theory.mutual_coherence(dictionary, size)
    most = 0
    for count in (1, 2, 3):
        kept = theory.Layer(found, count, 0.0, 1.0).kept
        for seed in range(50 if kept > 0 else 0):
            support = torch.randperm(matrix.shape[1], generator=stream(seed))[: 2 * count]
            assert float(torch.linalg.matrix_norm(matrix[:, support], ord=-2)) ** 2 >= kept - 1e-12
            most = count
    assert most >= 1


def test_coherence_needs_unit_atoms_and_the_size_of_padded_images():
    with pytest.raises(ValueError, match=r"the dictionary has atoms of norm 1 to 2, .*normalize_\(\)"):
        theory.mutual_coherence(dense(torch.tensor([[1.0, 0], [0, 2.0]])))
    with pytest.raises(ValueError, match="padding=1 cuts atoms at the border: give the size"):
        theory.mutual_coherence(conv(1, 2, 3, 1, 1))


# Uniqueness


def layer(mu, s, tolerance=0.1, norm=1.0):
    return theory.Layer(theory.Coherence("", mu, True, False, "", 1.0), s, tolerance, norm)


def test_uniqueness_by_hand():
    assert theory.uniqueness(layer(1 / 8, 4)).value == 4.5
    assert theory.uniqueness(layer(1 / 8, 4)).holds and not theory.uniqueness(layer(1 / 8, 5)).holds
    assert not theory.uniqueness(layer(1 / 7, 4)).holds  # s = ½(1 + 1/μ): the inequality is strict
    found = theory.uniqueness(layer(0.0, 9))
    assert found.value == math.inf and found.holds and not found.vacuous
    assert theory.uniqueness(layer(0.1, 0)).vacuous and theory.uniqueness(layer(1 / 8, 5)).vacuous
    assert "covers up to 3 non-zeros, the codes have 4" in str(theory.uniqueness(layer(1 / 7, 4)))


def test_codes_are_unique_below_the_bound_and_not_at_it():
    atoms = frames.steiner(4)  # μ = 1/3: one non-zero is covered, two are the bound itself
    assert theory.uniqueness(layer(float(theory.mutual_coherence(dense(atoms)).value), 1)).holds
    for pair in combinations(range(16), 2):
        assert torch.linalg.matrix_rank(atoms[list(pair)]) == 2
    simplex = atoms[:4]  # 1 + 1/μ atoms that sum to zero: two codes of two non-zeros, one signal
    torch.testing.assert_close(simplex[0] + simplex[1], -simplex[2] - simplex[3])


# Stability


def test_stability_is_the_formula_written_out():
    layers = [layer(0.05, 4, 0.1), layer(0.1, 2, 0.2), layer(0.2, 1, 0.0)]
    one = 2 * 0.1 / math.sqrt(1 - 7 * 0.05)
    two = (one + 0.4) / math.sqrt(1 - 3 * 0.1)
    three = two / math.sqrt(1 - 0.2)
    assert [f.value for f in theory.stability(layers)] == pytest.approx([one, two, three])
    assert all(f.holds for f in theory.stability(layers))
    assert [f.vacuous for f in theory.stability(layers)] == [False, False, False]
    assert [f.vacuous for f in theory.stability([layer(0.05, 4, 0.1, norm=one / 2 - 1e-3)])] == [True]
    broken = theory.stability([layer(0.05, 4), layer(0.5, 2), layer(0.0, 1)])
    assert [f.holds for f in broken] == [True, False, False] and broken[2].value == math.inf and broken[2].vacuous


def test_input_stability_is_papyans_product():
    layers = [layer(0.05, 4, 0.1), layer(0.1, 2, 0.0), layer(0.2, 1, 0.0)]
    found = [f.value for f in theory.input_stability(layers)]
    factors = np.cumprod([1 / (1 - 7 * 0.05), 1 / (1 - 0.3), 1 / 0.8])
    assert found == pytest.approx(np.sqrt(4 * 0.1**2 * factors))
    assert found == pytest.approx([f.value for f in theory.stability(layers)])
    first, second = theory.input_stability([layer(0.05, 4, 0.1), layer(0.1, 2, 0.3)])
    assert first.holds and not second.holds and second.vacuous and "these err by 0.3" in second.note


@pytest.mark.parametrize("mus, count", [((), 3), ((0.1,), 1), ((0.0, 0.2), 1)])
@pytest.mark.parametrize("seed", range(3))
def test_no_pair_is_farther_apart_than_the_bound(mus, count, seed):
    dictionaries = chain(*mus, seed=seed)
    model = DeepSparse(dictionaries[: 1 + len(mus)], count, [0.3, 0.1, 0.0][: 1 + len(mus)])
    if model.sparsities[0] > 3:
        model = DeepSparse(dictionaries[:2], 1, [0.3, 0.1])
    layers = len(model.dictionaries)
    known = zip(model.dictionaries, model.sparsities, model.tolerances, strict=True)
    bounds = [
        f.value for f in theory.stability([theory.Layer(theory.mutual_coherence(d), s, e, 1) for d, s, e in known])
    ]
    for target in range(1, layers + 1):
        pair, drawn = (theory.distant_pair(model, target, stream(seed), worst) for worst in (True, False))
        for each in (pair, drawn):
            assert all(d <= bound + 1e-12 for d, bound in zip(each.distances, bounds, strict=True))
            for codes in (each.codes, each.others):  # both are codes of the signal, in the model
                found = theory.measure_layers(model.dictionaries, each.signal, codes)
                assert all(a.sparsity <= s for a, s in zip(found, model.sparsities, strict=True))
                assert all(a.tolerance <= e + 1e-12 for a, e in zip(found, model.tolerances, strict=True))
        assert pair.distances[target - 1] > 0.3 * bounds[target - 1]
        assert pair.distances[target - 1] >= drawn.distances[target - 1]


def test_the_bound_is_attained():
    """By two codes on the two halves of a simplex, which Steiner's frame has."""
    model = DeepSparse([dense(frames.steiner(8))], 3, [0.25])
    bound = 0.5 / math.sqrt(1 - 5 / 7)
    assert max(theory.distant_pair(model, 1, stream(seed)).distances[0] for seed in range(3)) == pytest.approx(bound)


def test_convolutional_pairs():
    patches = ConvDictionary(1, 14, 7, stride=7).double()
    with torch.no_grad():
        patches.weight.copy_(frames.sparse_pairs(49 + 1, 0.0)[:14, :49].view(14, 1, 7, 7))
    patches.normalize_().requires_grad_(False)
    model = DeepSparse([patches], 2, [0.1], side=14)
    pair = theory.distant_pair(model, 1, stream())
    found = theory.measure_layers([patches], pair.signal, pair.codes)[0]
    assert pair.signal.shape == (1, 1, 14, 14) and found.tolerance <= 0.1 + 1e-12 and found.sparsity <= 2


def test_pairs_that_cannot_be_found():
    model = DeepSparse(chain(0.1), 1, [0.1, 0.1])
    with pytest.raises(ValueError, match="target is a layer from 1 to 2, got 3"):
        theory.distant_pair(model, 3)
    with pytest.raises(ValueError, match="give a tolerance above 0"):
        theory.distant_pair(DeepSparse(chain(0.1), 1), 1)
    with pytest.raises(ValueError, match="codes of 3 non-zeros need twice as many atoms, not 4"):
        theory.distant_pair(DeepSparse([dense(torch.eye(4))], 3, [0.1]), 1)
    with pytest.raises(ValueError, match="any distance apart"):
        theory.distant_pair(DeepSparse([dense(frames.steiner(4)[:4])], 2, [0.1]), 1, stream())


# The checker


def test_a_model_that_enjoys_its_guarantees_and_one_that_does_not():
    dictionaries = chain(0.1)
    layers = [SparseCoding(d, Soft(0.05, dim=-1), ISTA(300)) for d in dictionaries]
    model = DeepSparseCoding(layers).eval()
    sample = DeepSparse(dictionaries, 1).sample(20, stream())
    found = theory.check_model(model, sample.signals)
    codes = model.codes(sample.signals)
    first, second = (each.layer for each in found.layers)
    residual = sample.signals - codes[0] @ dictionaries[0].weight
    assert first.tolerance == pytest.approx(float(residual.norm(dim=1).max()))
    assert first.sparsity == int((codes[0] != 0).sum(1).max()) and second.norm == pytest.approx(
        float(codes[1].norm(dim=1).max())
    )
    assert found.layers[0].uniqueness.holds and found.layers[0].stability.holds and found.layers[0].rate.holds
    assert found.layers[0].rate.value == pytest.approx((2 * first.sparsity - 1) / 7)
    assert not found.layers[1].input_stability.holds  # the second layer errs, too
    lines = str(found).splitlines()
    assert len(lines) == 3 and lines[0].split()[0] == "layer" and lines[1].split()[:3] == ["1", "0.1429", "2"]
    torch.manual_seed(0)
    random = DeepSparseCoding([SparseCoding(DenseDictionary(10, 40), Soft(0.01, dim=-1), ISTA(5))])
    shown = theory.check_model(random, torch.randn(8, 10))
    assert shown.layers[0].uniqueness.vacuous and not shown.layers[0].stability.holds and "no" in str(shown)
    assert "inf" in str(shown)


@pytest.mark.parametrize("joint", [False, True])
def test_convolutional_models_are_checked(joint):
    torch.manual_seed(0)
    layers = [SparseCoding(ConvDictionary(*shape), ReLU(0.1), ISTA(2)) for shape in ((3, 4, 3, 1, 1), (4, 5, 3, 2))]
    found = theory.check_model(DeepSparseCoding(layers, ISTA(2), joint), torch.randn(2, 3, 8, 8))
    assert len(found.layers) == 2 and found.layers[0].layer.coherence.energy < 1
    assert not found.layers[0].rate.holds and "padding" in found.layers[0].rate.note


def test_the_norms_of_atoms_change_the_distance_alone():
    unit, sample = chain(0.1), DeepSparse(chain(0.1), 1, [0.1, 0.1]).sample(5, stream())
    codes = sample.codes
    scaled = [dense(unit[0].weight), dense(2 * unit[1].weight)]
    first, second = (theory.measure_layers(d, sample.signals, [codes[0], z])
                     for d, z in ((unit, codes[1]), (scaled, codes[1] / 2)))  # fmt: skip
    assert [each.coherence for each in first] == [each.coherence for each in second]
    assert [f.value for f in theory.stability(second)] == pytest.approx(
        [theory.stability(first)[0].value, theory.stability(first)[1].value / 2]
    )
    with pytest.raises(ValueError, match="of norm 2 to 2"):
        theory.mutual_coherence(scaled[1])


def test_models_that_cannot_be_checked():
    good, bad = DenseDictionary(4, 6), DenseDictionary(5, 6)
    model = DeepSparseCoding([SparseCoding(d, Soft(0.1, dim=-1)) for d in (good, bad)])
    with pytest.raises(ValueError, match="do not chain"):
        theory.check_model(model, torch.randn(2, 4))
    with torch.no_grad():
        good.weight[3] = 0
    with pytest.raises(ValueError, match="atom 3 is zero and cannot be normalised"):
        theory.check_model(DeepSparseCoding([SparseCoding(good, Soft(0.1, dim=-1))]), torch.randn(2, 4))
    with pytest.raises(ValueError, match="1 dictionaries need as many codes, got 2"):
        theory.measure_layers([good], torch.randn(2, 4), [torch.randn(2, 6)] * 2)
