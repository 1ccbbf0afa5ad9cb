from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from dsc import models, observe, report
from dsc.activations import create_activation
from dsc.dictionaries import DenseDictionary
from dsc.layers import SparseCoding
from dsc.metrics import SparsityMetrics, convergence, convergence_curves, curve_figures
from dsc.observe import Observer, sparse_layers
from dsc.solvers import FISTA, ISTA


def sparse_codes(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    z = torch.randn(*shape, generator=generator)
    z[torch.rand(z.shape, generator=generator) < 0.6] = 0
    z[:, 1] = 0  # a dead channel
    z[:, 4:6] = 0  # and a dead group of two
    return z


def by_hand(z, size, dim):
    """Every figure from its definition, of all signals at once."""
    z = z.double().numpy()
    flat = z.reshape(len(z), -1)
    flat, n = flat[(flat != 0).any(1)], flat.shape[1]
    ratio = np.abs(flat).sum(1) / np.sqrt((flat**2).sum(1))
    channels = np.moveaxis(z, dim, 0)
    groups = channels.reshape(channels.shape[0] // size, size, -1)
    return {
        "active_fraction": (z != 0).mean(),
        "hoyer": ((n**0.5 - ratio) / (n**0.5 - 1)).mean(),
        "dead_fraction": (channels.reshape(len(channels), -1) == 0).all(1).mean(),
        "active_group_fraction": (groups != 0).any(1).mean(),
    }


@pytest.mark.parametrize("dim, shape", [(1, (6, 5, 4)), (1, ()), (-1, (7,))])
@pytest.mark.parametrize("name", ["soft", "group_relu"])
def test_figures_over_batches_are_those_of_all_codes_at_once(name, dim, shape):
    size = {"group_size": 2} if name == "group_relu" else {}
    model = nn.ModuleDict({"a": create_activation(name, dim, **size)})
    metrics = SparsityMetrics(sparse_layers(model))
    batches = [sparse_codes(n, 8, *shape, seed=n) for n in (5, 1, 3)]
    if dim == -1:
        batches = [z.movedim(1, -1) for z in batches]
    batches[0][2] = 0  # one signal without a Hoyer index
    for z in batches:
        metrics.update(SimpleNamespace(features={"a": [z]}))
    expected = by_hand(torch.cat(batches), 2, dim)
    if name == "soft":
        expected.pop("active_group_fraction")
    found = metrics.compute()
    assert found.pop("active_fraction/total") == pytest.approx(expected["active_fraction"])
    assert found == pytest.approx({f"{quantity}/a": value for quantity, value in expected.items()}, rel=1e-5)


def test_figures_of_a_model_are_those_of_its_codes():
    torch.manual_seed(0)
    kwargs = {"channels": (8, 8, 16), "kernel_sizes": (3, 3, 3), "strides": (2, 1, 1)}
    model = models.create_model("dsc_cnn", activation="group_relu", group_size=2, threshold=1.0, **kwargs)
    x = torch.randn(6, 3, 12, 12)
    metrics = SparsityMetrics(sparse_layers(model.eval()))
    with Observer(model) as observer, torch.no_grad():
        for part in (x[:1], x[1:]):
            model(part)
            metrics.update(observer)
        codes = model.coder.codes(x)
    found = metrics.compute()
    for i, code in enumerate(codes):
        for quantity, value in by_hand(code, 2, 1).items():
            assert found[f"{quantity}/coder.layers.{i}"] == pytest.approx(value, rel=1e-5, abs=1e-6)
    entries = torch.cat([code.flatten() for code in codes])
    assert found["active_fraction/total"] == pytest.approx((entries != 0).double().mean().item())
    assert 0 < found["active_fraction/total"] < 1 and len(found) == 1 + 3 * 4


def test_layer_that_runs_twice_has_both_codes_counted():
    act = create_activation("relu")
    model, x = nn.Sequential(act, nn.Linear(6, 6), act), torch.randn(4, 6)
    metrics = SparsityMetrics(sparse_layers(model))
    with Observer(model) as observer:
        out = model(x)
        metrics.update(observer)
    expected = (torch.cat([act(x), out]) != 0).double().mean().item()
    assert metrics.compute()["active_fraction/0"] == pytest.approx(expected)


@pytest.mark.filterwarnings("ignore:The ``compute`` method")
@pytest.mark.parametrize("shape", [{"group_size": 2}, {"groups": 2}])
def test_layer_that_runs_at_several_widths_has_all_counted(shape):
    # As the ReLU that timm's res2net and hrnet share between the convolutions of a block.
    metrics = SparsityMetrics(sparse_layers(nn.ModuleDict({"a": create_activation("group_relu", **shape)})))
    batches = [(sparse_codes(5, 8, seed=i), sparse_codes(5, 4, seed=9 + i)) for i in range(2)]
    for batch in batches:
        batch[0][:, 0] = batch[1][:, 2:] = 0
        metrics.update(SimpleNamespace(features={"a": list(batch)}))
    wide, narrow = (torch.cat(codes).numpy() for codes in zip(*batches, strict=True))
    sizes = (2, 2) if "group_size" in shape else (4, 2)
    groups = [(z.reshape(10, -1, n) != 0).any(2).ravel() for z, n in zip((wide, narrow), sizes, strict=True)]
    found = metrics.compute()
    assert found["active_group_fraction/a"] == pytest.approx(np.concatenate(groups).mean())
    dead = np.concatenate([(wide == 0).all(0), (narrow == 0).all(0)])
    assert found["dead_fraction/a"] == pytest.approx(dead.mean()) and 0 < dead.sum() < 12
    metrics.reset()
    assert metrics.compute() == {}
    metrics.update(SimpleNamespace(features={"a": [torch.from_numpy(narrow)]}))
    assert metrics.compute()["dead_fraction/a"] == pytest.approx((narrow == 0).all(0).mean())


def test_figure_without_meaning_is_absent():
    metrics = SparsityMetrics(sparse_layers(nn.ModuleDict({"a": create_activation("soft")})))
    assert metrics.compute() == {}
    metrics.update(SimpleNamespace(features={"a": [torch.zeros(3, 8)]}))
    zero = {"active_fraction/total": 0.0, "active_fraction/a": 0.0, "dead_fraction/a": 1.0}
    assert metrics.compute() == zero  # no index of zero codes, no groups


@pytest.mark.filterwarnings("ignore:The ``compute`` method")
def test_reset_forgets_everything():
    model = nn.ModuleDict({"a": create_activation("group_relu", group_size=2)})
    metrics = SparsityMetrics(sparse_layers(model))
    metrics.update(SimpleNamespace(features={"a": [torch.ones(3, 8)]}))
    metrics.reset()
    assert metrics.compute() == {}
    z = sparse_codes(4, 8)
    metrics.update(SimpleNamespace(features={"a": [z]}))
    for quantity, value in by_hand(z, 2, 1).items():
        assert metrics.compute()[f"{quantity}/a"] == pytest.approx(value, rel=1e-5)


# Convergence


def orthogonal_coder(step, norm, threshold, activation="soft", solver=None):
    """D = norm·Q with QᵀQ = 1, whose codes are known in closed form."""
    torch.manual_seed(0)
    prox = create_activation(activation, -1, threshold=threshold)
    coder = SparseCoding(DenseDictionary(8, 6), prox, solver, step).double().eval()
    nn.init.orthogonal_(coder.dictionary.weight, gain=norm)
    return coder


@pytest.mark.parametrize("activation", ["soft", "relu"])
@pytest.mark.parametrize("step, norm", [(0.5, 1.0), (0.2, 1.5), (0.05, 3.0)])
@pytest.mark.parametrize("threshold", [0.0, 0.3])
def test_rate_and_error_of_a_linear_iteration(threshold, step, norm, activation):
    # On the support of the solution every step from zero multiplies the error by 1 − s‖D‖².
    coder = orthogonal_coder(step, norm, threshold, activation, ISTA(4))
    figures = convergence(nn.Sequential(coder), torch.randn(5, 8).double())
    contraction = 1 - step * norm**2
    expected = {"steps/0": 4, "error/0": contraction**4, "rate/0": contraction}
    assert figures == pytest.approx(expected, rel=1e-3)


def lasso(solver, seed=0, step="lipschitz"):
    torch.manual_seed(seed)
    prox = create_activation("soft", -1, threshold=0.1)
    coder = SparseCoding(DenseDictionary(16, 32), prox, solver, step)
    return coder.double().eval(), torch.randn(4, 16).double()


@pytest.mark.parametrize("solver", [ISTA(3), FISTA(7), ISTA(40)])
def test_error_at_depth_is_the_distance_to_the_converged_code(solver):
    coder, x = lasso(solver)
    far = coder.solve(x, ISTA(6000))
    figures = convergence(coder, x, reference_steps=2000)
    expected = ((coder(x) - far).norm() / far.norm()).item()
    assert figures["error/SparseCoding"] == pytest.approx(expected, rel=1e-3)
    assert figures["steps/SparseCoding"] == solver.steps
    assert 0 < figures["rate/SparseCoding"] < 1


def test_convergence_of_a_model_is_measured_on_frozen_inputs():
    torch.manual_seed(0)
    model = models.create_model("dsc_vit_pico", dim=16, depth=2, steps=3).eval()
    x = torch.randn(2, 3, 16, 16)
    figures = convergence(model, x)
    with Observer(model) as observer:
        model(x)
    tokens = model.blocks[0](model.stem(x))
    block = model.blocks[1]
    tokens = block.norm2(tokens + block.attention(block.norm1(tokens)))
    reference = block.coder.reference(tokens, 200)
    code = observer.features["blocks.1.coder"][0]
    expected = ((code - reference).norm() / reference.norm()).item()
    assert figures["error/blocks.1.coder"] == pytest.approx(expected, rel=1e-4)
    assert {key.split("/")[1] for key in figures} == {"blocks.0.coder", "blocks.1.coder"}


def test_convergence_has_no_meaning_for_these():
    x = torch.randn(2, 3, 16, 16)
    assert convergence(models.create_model("dsc_vit_pico", steps=1).eval(), x) == {}  # plain layers
    assert convergence(models.create_model("dsc_attn_pico").eval(), x) == {}  # no coders
    signals = torch.randn(5, 8).double()
    for coder in (orthogonal_coder(0.5, 1.0, None, "gelu"), orthogonal_coder(0.5, 1.0, 1e3)):
        assert convergence(coder, signals) == {}  # no prox; codes that are zero
        assert convergence_curves(coder, signals) == {}
    solved = convergence(orthogonal_coder(1.0, 1.0, 0.3), signals)  # by the first step: there is no rate
    assert solved == pytest.approx({"steps/SparseCoding": 1, "error/SparseCoding": 0}, abs=1e-6)


@pytest.mark.parametrize("seed", range(3))
def test_fista_is_ahead_of_ista(seed):
    coder, x = lasso(ISTA(2), seed)
    curves = convergence_curves(nn.Sequential(coder), x)
    ista, fista = curves["0"]["ista"], curves["0"]["fista"]
    assert ista.shape == fista.shape == (32,)
    torch.testing.assert_close(ista[0], fista[0])
    assert fista[31] < ista[31] and (ista.diff() < 0).all()
    for solver, errors in curves["0"].items():
        far = coder.solve(x, FISTA(1500, restart=True))
        kind = {"ista": ISTA, "fista": FISTA}[solver]
        direct = [((coder.solve(x, kind(k)) - far).norm() / far.norm()).item() for k in (1, 2, 9)]
        assert [errors[k - 1].item() for k in (1, 2, 9)] == pytest.approx(direct, rel=1e-3)


def test_rows_of_figures_hold_the_errors_and_the_rate():
    halves = 0.5 ** torch.arange(32)
    rows = curve_figures({"a": {"ista": halves, "fista": torch.zeros(32)}}, (1, 2, 4))
    assert rows[0] == {
        "layer": "a", "solver": "ista", "errors": {"1": 1.0, "2": 0.5, "4": 0.125}, "rate": pytest.approx(0.5)
    }  # fmt: skip
    assert rows[1] == {"layer": "a", "solver": "fista", "errors": {"1": 0.0, "2": 0.0, "4": 0.0}}


# What the report says of them


def test_report_shows_every_figure_once_and_blanks_what_is_absent():
    errors = {str(k): 2.0**-k for k in report.DEPTHS}
    test = {"accuracy": 0.75, "loss": 0.5, "sparsity/active_fraction/total": 0.25}
    test |= {"sparsity/active_fraction/a": 0.25, "sparsity/hoyer/a": 0.625, "sparsity/dead_fraction/a": 0.0}
    convergence = [{"layer": "a", "solver": "ista", "errors": errors, "rate": 0.5}]
    summary = {"dataset": "digits", "seed": 3, "parameters": 12345, "test": test, "convergence": convergence}
    lines = report.text(summary).splitlines()
    assert lines[0] == "digits, seed 3, 12,345 parameters"
    assert lines[2] == "test accuracy: 0.7500, loss: 0.5000, active fraction 0.2500"
    cells = [[cell.strip() for cell in line.strip("| ").split(" | ")] for line in lines]
    assert ["a", "0.2500", "", "0.6250", "0.0000"] in cells
    assert ["a", "ista", "0.5000", "0.2500", "0.0625", "0.0039", "1.5e-05", "2.3e-10", "0.5000"] in cells


def test_table_is_aligned():
    lines = report.table(["a", "long"], [["wide cell", "1"], ["", "22"]]).splitlines()
    assert lines[1] == "| --------- | ---- |" and lines[2] == "| wide cell | 1    |"
    assert len({len(line) for line in lines}) == 1


def test_figures_that_miss_the_card_are_named():
    card = {"accuracy": 0.98, "loss": 0.1}
    assert report.differences({"accuracy": 0.9801, "loss": 0.1, "more": 1.0}, card) == []
    assert report.differences({"accuracy": 0.97, "loss": 0.1}, card) == ["accuracy: card 0.9800, measured 0.97"]
    assert report.differences({"accuracy": 0.98}, card) == ["loss: card 0.1000, measured None"]
    assert report.differences({"accuracy": float("nan"), "loss": 0.1}, card) == ["accuracy: card 0.9800, measured nan"]


def test_figures_of_convergence_have_names_of_their_own():
    rows = [{"layer": "a", "solver": "ista", "errors": {"1": 0.5, "2": 0.25}, "rate": 0.5}]
    rows += [{"layer": "a", "solver": "fista", "errors": {"1": 0.0}, "rate": None}]
    found = report.flat_figures({"loss": 1.0}, rows)
    assert found == {
        "loss": 1.0,
        "convergence/a ista k=1": 0.5,
        "convergence/a ista k=2": 0.25,
        "convergence/a ista rate": 0.5,
        "convergence/a fista k=1": 0.0,
    }


def test_figures_stand_beside_the_card_s():
    lines = report.beside({"new": 2.0, "accuracy": 0.97}, {"accuracy": 0.98, "loss": 0.1}).splitlines()
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]
    assert cells[2:] == [["accuracy", "0.9800", "0.9700"], ["loss", "0.1000", ""], ["new", "", "2.0000"]]


@pytest.mark.parametrize(
    "name, kwargs, expected",
    [
        ("gsae", {"img_size": 4, "num_atoms": 32}, "GroupReLU"),
        ("sae", {"img_size": 4, "num_atoms": 32}, "Soft"),
        ("dsc_attn_pico", {"activation": "relu", "dim": 16, "depth": 1}, "ReLU"),
        ("resnet18", {"activation": "gelu"}, "GELU"),
        ("resnet18", {}, "none"),
    ],
)
def test_activation_of_a_model_by_name(name, kwargs, expected):
    assert observe.activation_name(models.create_model(name, **kwargs)) == expected


def test_atoms_of_the_first_layer_are_its_images():
    cnn = models.create_model("dsc_cnn", channels=(8, 8, 8))
    assert torch.equal(report.image_atoms(cnn, 3 * 32 * 32), next(iter(cnn.coder)).dictionary.weight)
    ae = models.create_model("gsae", img_size=6, num_atoms=32)
    assert torch.equal(report.image_atoms(ae, 36).flatten(1), ae.coder.dictionary.weight)
    assert report.image_atoms(models.create_model("dsc_attn_pico"), 3 * 32 * 32) is None
