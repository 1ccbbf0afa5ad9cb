import copy

import numpy as np
import pytest
import torch

from dsc.activations import create_activation
from dsc.dictionaries import ConvDictionary, DenseDictionary
from dsc.layers import SparseCoding
from dsc.learned import ALISTA, LISTA, LISTACP, SupportSelection, analytic_weights
from dsc.prox import Soft
from dsc.solvers import FISTA, ISTA

PROX = {"soft": {}, "relu": {}, "group_relu": {"group_size": 2}, "group_relu_nonneg": {"group_size": 2}}
LAYERS = {
    "lista": lambda d, p, **kwargs: LISTA(d, p, **kwargs),
    "lista tied": lambda d, p, **kwargs: LISTA(d, p, tied=True, **kwargs),
    "lista-cp": lambda d, p, **kwargs: LISTACP(d, p, **kwargs),
    "alista": lambda d, p, **kwargs: ALISTA(d, p, **kwargs),
}
SELECTION = SupportSelection(rate=0.1, most=0.25)


def dense(features=6, atoms=10, seed=0):
    torch.manual_seed(seed)
    return DenseDictionary(features, atoms).double().normalize_()


def activation(name="soft", threshold=0.2, dim=-1):
    return create_activation(name, dim, threshold=threshold, **PROX[name])


def signals(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def disturb(layer, seed=1):
    """Every parameter away from its start, as training would have it."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return layer


def iterates(layer, x, solver=None):
    record = []
    z = layer.solve(x, solver, record)
    assert z is record[-1]
    return torch.stack(record)


@pytest.mark.parametrize("steps", [1, 7])
@pytest.mark.parametrize("name", PROX)
@pytest.mark.parametrize("kind", ["lista", "lista tied", "lista-cp"])
def test_an_untrained_layer_is_ista_of_its_depth(kind, name, steps):
    dictionary, x = dense(), signals(5, 6)
    layer = LAYERS[kind](dictionary, activation(name), steps=steps)
    ista = SparseCoding(dictionary, activation(name), ISTA(steps)).eval()
    torch.testing.assert_close(iterates(layer, x), iterates(ista, x), rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(layer(x.reshape(1, 5, 6)), layer(x)[None])  # tokens are coded like rows


@pytest.mark.parametrize("name", PROX)
@pytest.mark.parametrize("stride", [1, 2])
def test_an_untrained_convolutional_lista_cp_is_ista(stride, name):
    torch.manual_seed(0)
    dictionary, x = ConvDictionary(2, 4, 3, stride, 1).double(), signals(2, 2, 7, 8)
    layer = LISTACP(dictionary, activation(name, dim=1), steps=4)
    ista = SparseCoding(dictionary, activation(name, dim=1), ISTA(4)).eval()
    torch.testing.assert_close(iterates(layer, x), iterates(ista, x), rtol=1e-12, atol=1e-13)


def shrink(u, threshold):
    return np.sign(u) * np.maximum(np.abs(u) - threshold, 0)


def selected(u, threshold, count):
    """Support selection, entry by entry: the `count` largest of a signal pass, if they exceed the threshold."""
    z = shrink(u, threshold)
    for i, row in enumerate(u):
        for j in sorted(range(len(row)), key=lambda j: -abs(row[j]))[:count]:
            if abs(row[j]) > threshold:
                z[i, j] = row[j]
    return z


@pytest.mark.parametrize("tied", [False, True])
def test_lista_is_its_equation(tied):
    layer, x = disturb(LISTA(dense(), activation(), steps=4, tied=tied)), signals(3, 6)
    encoders = [p.detach().numpy() for p in layer.encoders] * (4 if tied else 1)
    inhibitions = [p.detach().numpy() for p in layer.inhibitions] * (3 if tied else 1)
    thresholds = layer.thresholds.detach().numpy()
    z = shrink(x.numpy() @ encoders[0].T, thresholds[0])
    for k in range(1, 4):
        z = shrink(x.numpy() @ encoders[k].T + z @ inhibitions[k - 1].T, thresholds[k])
    np.testing.assert_allclose(layer(x).detach(), z, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("selection", [None, SELECTION, SupportSelection(1, 1)])
@pytest.mark.parametrize("kind", ["lista-cp", "alista"])
def test_coupled_steps_are_their_equation(kind, selection):
    layer = disturb(LAYERS[kind](dense(), activation(), steps=5, selection=selection))
    x, matrix = signals(4, 6), layer.dictionary.weight.detach().numpy()
    z = np.zeros((4, 10))
    for k, (gain, threshold) in enumerate(zip(layer.gains.tolist(), layer.thresholds.tolist(), strict=True)):
        w = layer.weights(k).weight.detach().numpy()
        u = z + gain * (x.numpy() - z @ matrix) @ w.T
        count = {None: 0, SELECTION: [1, 2, 2, 2, 2][k]}.get(selection, 10)  # 0.25 · 10, rounded to even
        z = selected(u, threshold, count)
    np.testing.assert_allclose(layer(x).detach(), z, rtol=1e-12, atol=1e-14)


def test_nonnegative_codes_stay_so_under_selection():
    dictionary, x = dense(), signals(4, 6)
    z = LISTACP(dictionary, activation("relu"), steps=3, selection=SupportSelection(1, 1))(x)
    assert (z >= 0).all() and (z > 0).any()


@pytest.mark.parametrize("rate, most", [(0.012, 0.13), (0.5, 0.6), (1.0, 1.0)])
def test_selected_counts(rate, most):
    counts = [SupportSelection(rate, most).count(k, 500) for k in range(1, 17)]
    assert counts == [round(500 * min(rate * k, most)) for k in range(1, 17)]
    assert counts == sorted(counts) and counts[-1] == round(500 * most)


@pytest.mark.parametrize("shape", [(6, 10), (10, 6), (4, 4)])
def test_analytic_weights_satisfy_the_optimality_conditions(shape):
    dictionary = dense(*shape)
    weights, coherence = analytic_weights(dictionary)
    atoms = dictionary.weight.detach()
    torch.testing.assert_close((weights * atoms).sum(1), torch.ones(shape[1], dtype=torch.float64))
    # ½‖Dᵀw‖² on the hyperplane wᵀd = 1: the gradient DDᵀw is a multiple of d.
    gradient = weights @ atoms.mT @ atoms
    multiplier = (gradient * atoms).sum(1, keepdim=True) / atoms.square().sum(1, keepdim=True)
    assert (gradient - multiplier * atoms).abs().max() < 1e-12
    products = weights @ atoms.mT
    assert coherence == max(abs(products[i, j]) for i in range(shape[1]) for j in range(shape[1]) if i != j)


def test_analytic_weights_are_where_projected_gradient_descent_ends():
    dictionary = dense()
    atoms = dictionary.weight.detach()
    step = 1 / torch.linalg.matrix_norm(atoms, 2).square()
    w = atoms.clone()
    for _ in range(3000):
        w = w - step * w @ atoms.mT @ atoms
        w = w + (1 - (w * atoms).sum(1, keepdim=True)) * atoms  # unit atoms: the nearest point of the hyperplane
    torch.testing.assert_close(analytic_weights(dictionary)[0], w, rtol=1e-8, atol=1e-8)


def test_analytic_weights_do_not_depend_on_the_atoms_norms():
    dictionary = dense()
    weights, _ = analytic_weights(dictionary)
    with torch.no_grad():
        dictionary.weight.mul_(3)
    torch.testing.assert_close(analytic_weights(dictionary)[0], weights / 3)


@pytest.mark.parametrize("name", PROX)
@pytest.mark.parametrize("kind", LAYERS)
def test_gradients_reach_every_parameter_and_agree_with_finite_differences(kind, name):
    layer = disturb(LAYERS[kind](dense(), activation(name), steps=3, decay=0.9))
    x, target = signals(4, 6), signals(4, 10, seed=2)

    def loss():
        z = layer(x)
        return ((z - target) ** 2).sum() + (layer.decode(z) - x).square().sum()  # LISTA's D only decodes

    loss().backward()
    learned = [p for p in layer.parameters() if p.requires_grad]
    assert all(p.grad is not None and (p.grad != 0).any() for p in learned)
    torch.manual_seed(3)
    with torch.no_grad():
        for p in learned:
            direction = torch.randn_like(p)
            values = []
            for size in (1e-6, -2e-6):
                p.add_(size * direction)
                values.append(loss().item())
            p.add_(1e-6 * direction)
            slope = float((p.grad * direction).sum())
            assert (values[0] - values[1]) / 2e-6 == pytest.approx(slope, rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_selection_passes_its_gradient_straight_through(dtype):
    layer = LISTACP(dense().to(dtype), activation(), steps=2, selection=SupportSelection(1, 1))
    z = layer(signals(3, 6).to(dtype))
    z.sum().backward()
    assert z.dtype == dtype
    assert not layer.raw_thresholds.grad.any()  # all that is not zero has passed unshrunk
    assert layer.raw_gains.grad.isfinite().all()


@pytest.mark.parametrize("kind", LAYERS)
def test_thresholds_start_where_they_are_told_and_stay_positive(kind):
    dictionary = dense()
    layer = LAYERS[kind](dictionary, activation(threshold=0.3), steps=4, decay=0.5)
    scale = 1 if kind == "alista" else 1 / dictionary.lipschitz().item()
    expected = 0.3 * scale * torch.tensor([1, 0.5, 0.25, 0.125], dtype=torch.float64)
    torch.testing.assert_close(layer.thresholds.detach(), expected, rtol=1e-12, atol=0)
    with torch.no_grad():
        layer.raw_thresholds.fill_(-50)
    assert (layer.thresholds > 0).all()


def test_the_analytic_start_of_lista_is_that_of_alista():
    dictionary, x = dense(), signals(3, 6)
    start = ALISTA(copy.deepcopy(dictionary), activation(), steps=4, decay=0.8)
    for kind in ("lista", "lista tied", "lista-cp"):
        layer = LAYERS[kind](dictionary, activation(), steps=4, decay=0.8, initial="analytic")
        torch.testing.assert_close(layer(x), start(x))


def test_only_the_scalars_of_alista_are_learned():
    layer = ALISTA(dense(), activation(), steps=16)
    assert sum(p.numel() for p in layer.parameters() if p.requires_grad) == 32
    tied, untied = (LISTA(dense(), activation(), steps=16, tied=tied) for tied in (True, False))
    own = [sum(p.numel() for p in [*layer.encoders, *layer.inhibitions]) for layer in (tied, untied)]
    assert own == [60 + 100, 16 * 60 + 15 * 100]
    dictionary = dense().requires_grad_(False)
    coupled = LISTACP(dictionary, activation(), steps=2)
    assert sum(p.numel() for p in coupled.parameters() if p.requires_grad) == 2 * 60 + 4
    assert not dictionary.weight.requires_grad


@pytest.mark.parametrize("kind", LAYERS)
def test_the_first_steps_alone_and_the_trace(kind):
    layer, x = disturb(LAYERS[kind](dense(), activation(), steps=5)), signals(3, 6)
    every = iterates(layer, x)
    torch.testing.assert_close(iterates(layer, x, ISTA(3)), every[:3])
    trace = layer.trace(x)
    torch.testing.assert_close(torch.stack(trace.codes), every.detach())
    assert not layer.solves and trace.residual is None
    assert SparseCoding.solves


@pytest.mark.parametrize("kind", LAYERS)
def test_weights_round_trip(kind):
    layer, x = disturb(LAYERS[kind](dense(), activation(), steps=3)), signals(3, 6)
    other = LAYERS[kind](dense(seed=5), activation(threshold=0.7), steps=3)
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other(x), layer(x))


@pytest.mark.slow
def test_it_compiles_in_one_graph():
    layer, x = LISTACP(dense(), activation(), steps=3, selection=SELECTION), signals(3, 6)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), layer(x))


@pytest.mark.parametrize("kind", LAYERS)
def test_its_depth_is_fixed(kind):
    layer, x = LAYERS[kind](dense(), activation(), steps=5), signals(3, 6)
    for solver in (ISTA(6), FISTA(5), ISTA(5, tol=1e-3), ISTA(5, gradient="implicit")):
        with pytest.raises(ValueError, match=r"has 5 learned steps and no other solver: expected at most ISTA\(steps"):
            layer.solve(x, solver)
    with pytest.raises(ValueError, match="has 5 learned steps"):
        layer.reference(x)
    with pytest.raises(ValueError, match="starts from zero: its first step was learned there"):
        layer.solve(x, start=signals(3, 10))


@pytest.mark.parametrize(
    "prox, error, message",
    [
        (Soft(0.0), ValueError, "start from one λ above 0 .* got Soft with threshold=0.0"),
        (Soft([0.1] * 10), ValueError, "start from one λ above 0"),
        (Soft(0.1, learn=True), ValueError, "learn their own thresholds: give Soft a fixed λ"),
        (create_activation("gelu"), TypeError, "a prox with a threshold, such as soft, relu or group_relu"),
        (create_activation("top_k", k=3), TypeError, "a prox with a threshold"),
    ],
)
def test_a_prox_that_gives_no_start(prox, error, message):
    for kind in LAYERS:
        with pytest.raises(error, match=message):
            LAYERS[kind](dense(), prox)


def test_what_does_not_fit_together():
    conv = ConvDictionary(2, 4, 3)
    with pytest.raises(TypeError, match="LISTA needs a DenseDictionary, got ConvDictionary: LISTACP takes any"):
        LISTA(conv, activation())
    with pytest.raises(TypeError, match="needs a DenseDictionary, got ConvDictionary"):
        ALISTA(conv, activation())
    with pytest.raises(TypeError, match='initial="analytic" needs a DenseDictionary.*: take initial="ista"'):
        LISTACP(conv, activation(), initial="analytic")
    with pytest.raises(TypeError, match="analytic_weights needs a DenseDictionary"):
        analytic_weights(conv)
    with pytest.raises(ValueError, match='initial must be "ista" or "analytic", got \'fista\''):
        LISTACP(dense(), activation(), initial="fista")
    with pytest.raises(ValueError, match=r"decay is a ratio of thresholds in \(0, 1\], got 1.5"):
        LISTA(dense(), activation(), decay=1.5)
    with pytest.raises(ValueError, match="steps counts proximal steps from zero and must be at least 1, got 0"):
        LISTA(dense(), activation(), steps=0)
    for kind in (LISTACP, ALISTA):
        with pytest.raises(ValueError, match="keeps entries, but GroupReLU keeps groups: take an elementwise prox"):
            kind(dense(), activation("group_relu"), selection=SELECTION)
    with pytest.raises(ValueError, match=r"most is a fraction of the channels in \(0, 1\], got 13"):
        SupportSelection(0.012, 13)
