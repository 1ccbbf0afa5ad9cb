"""What a run leaves behind beside its weights: figures of the test set, pictures of the model at work, its page."""

import json
from itertools import pairwise

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.accelerators import CPUAccelerator
from sklearn.metrics import adjusted_rand_score, confusion_matrix, normalized_mutual_info_score
from torch.nn import functional as F

from dsc import cli, figures, hub, report, trainers
from dsc.data import ImageData
from dsc.details import atom_use, clusters, gather
from dsc.gallery import gallery, image_layer
from dsc.prox import GroupReLU, ReLU
from dsc.tasks import Classifier, Reconstructor

AUTOENCODER = dict(num_atoms=24, group_size=4, threshold=0.3, steps=3, solver="ista")
CNN = dict(channels=(6, 8, 10), steps=2)


@pytest.fixture(scope="module")
def data():
    data = ImageData("digits")
    data.setup()
    return data


@pytest.fixture(scope="module")
def plain_data():
    return ImageData("digits", normalize=False)


def classifier(data, **args):
    torch.manual_seed(0)
    return Classifier(model="dsc_cnn_pico", model_args=CNN | args, data=data)


def autoencoder(data, **args):
    torch.manual_seed(0)
    return Reconstructor(model="gsae", model_args=AUTOENCODER | args, data=data)


def raw_tests(data):
    data.setup()
    images, labels, _ = data._parts["test"].tensors
    return data._as_input(images), labels


@pytest.fixture(scope="module")
def run(tmp_path_factory, plain_data):
    """A run that was finished without any training."""
    return finished(tmp_path_factory.mktemp("runs") / "gsae" / "1", autoencoder(plain_data), plain_data)


def finished(folder, task, data):
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text("seed_everything: 0\n")
    (folder / "metrics.csv").write_text("epoch,step,train/loss,val/loss\n0,1,0.5,\n0,1,,0.4\n1,2,0.3,0.2\n")
    report.finish(folder, task, data, {"seed_everything": 0, "data": {"class_path": "dsc.data.ImageData"}})
    return folder


# Figures of the test set


def test_figures_of_a_classifier_against_brute_force(data):
    task = classifier(data)
    found = gather(task, data)
    x, y = raw_tests(data)
    with torch.no_grad():
        probability = task.model.eval()(x).softmax(1)
        codes = task.model.coder.codes(x)
    assert found.confusion == confusion_matrix(y, probability.argmax(1), labels=range(10)).tolist()
    assert found.use == pytest.approx([float((codes[0][:, i] != 0).float().mean()) for i in range(6)], abs=1e-6)
    assert found.units == {f"coder.layers.{i}": n for i, n in enumerate(CNN["channels"])}
    assert [e["label"] for e in found.examples] == list("0123456789")
    for label, example in enumerate(found.examples):
        i = example["index"]
        assert y[i] == label and label not in y[:i]
        assert example["predicted"] == str(int(probability[i].argmax()))
        assert example["probability"] == pytest.approx(float(probability[i].max()), abs=1e-5)
    assert found.groups is None and found.clustering is None and not found.by_centroid
    assert {"rate", "error", "steps"} == {key.split("/")[0] for key in found.convergence}


def test_figures_of_an_autoencoder_against_brute_force(plain_data):
    task = autoencoder(plain_data)
    found = gather(task, plain_data)
    x, y = raw_tests(plain_data)
    held, classes, _ = plain_data._parts["val"].tensors
    with torch.no_grad():
        z, known = (task.model.eval().encode(images) for images in (x, plain_data._as_input(held)))
    means = torch.stack([known[classes == c].mean(0) for c in range(10)])
    assert found.confusion == confusion_matrix(y, torch.cdist(z, means).argmin(1), labels=range(10)).tolist()
    strongest = z.unflatten(1, (6, 4)).norm(dim=2).argmax(1)
    shares = torch.stack([F.one_hot(strongest[y == c], 6).float().mean(0) for c in range(10)])
    torch.testing.assert_close(torch.tensor(found.groups), shares)
    assert sorted(found.group_order) == list(range(6))
    row = found.clustering[1]
    assert row["method"] == "strongest group" and row["images"] == len(y)
    assert row["nmi"] == pytest.approx(normalized_mutual_info_score(y, strongest), abs=1e-5)
    assert row["ari"] == pytest.approx(adjusted_rand_score(y, strongest), abs=1e-5)


def test_clusters_of_codes_that_are_clusters():
    y = torch.arange(40) % 4
    z = F.one_hot(y.roll(1), 4).float().repeat_interleave(2, 1)  # class c has the group of class c − 1
    found = clusters(z, y, GroupReLU(group_size=2), seed=0)
    assert all(row["accuracy"] == row["nmi"] == row["ari"] == pytest.approx(1) for row in found["clustering"])
    assert [found["groups"][c][found["group_order"][c]] for c in range(4)] == [1, 1, 1, 1]  # the diagonal
    maps = z[:, :, None, None].repeat(1, 1, 2, 3)
    assert clusters(maps, y, GroupReLU(group_size=2), seed=0)["groups"] == found["groups"]
    assert "groups" not in clusters(z, y, ReLU(), seed=0)


@pytest.mark.parametrize("groups", [2, 7])  # of fewer and of more groups than classes
def test_each_group_has_one_place(groups):
    y = torch.arange(30) % 5
    z = torch.rand(30, groups, generator=torch.Generator().manual_seed(0))
    order = clusters(z, y, GroupReLU(group_size=1), seed=0)["group_order"]
    assert sorted(order) == list(range(groups))


def test_use_counts_signals_and_positions():
    tokens = torch.zeros(2, 3, 4)
    tokens[0, :, 1] = 1.0
    assert atom_use(tokens, -1).tolist() == [0, 0.5, 0, 0]
    assert atom_use(tokens.mT, 1).tolist() == [0, 0.5, 0, 0]


# Pictures of the model at work


def test_a_film_shows_what_the_steps_make_of_an_image(plain_data):
    task = autoencoder(plain_data)
    x, _ = raw_tests(plain_data)
    shown = gallery(task, plain_data, [5, 2])
    torch.testing.assert_close(shown.images, x[[5, 2]])
    film, atoms = shown.film, task.model.coder.dictionary.weight.detach()
    assert film.own == 3 and film.depths == [1, 2, 3, 4, 8, 16, 32]
    step, signal = 1 / float(task.model.coder.dictionary.lipschitz()), x[[5, 2]].flatten(1)
    z = torch.zeros(2, 24)
    for k in range(1, 33):  # proximal gradient, written out
        z = (z + step * (signal - z @ atoms) @ atoms.mT).unflatten(1, (6, 4))
        norm = z.norm(dim=2, keepdim=True)
        z = (z * (1 - 0.3 * step / norm).clamp_min(0)).flatten(1)
        if k in film.depths:
            i = film.depths.index(k)
            torch.testing.assert_close(film.frames[i].flatten(1), z @ atoms, atol=1e-4, rtol=1e-3)
            error = (signal - z @ atoms).square().sum(1) / signal.square().sum(1)
            torch.testing.assert_close(film.errors[i], error, atol=1e-4, rtol=1e-3)
        if k == 3:
            torch.testing.assert_close(shown.codes, z, atol=1e-4, rtol=1e-3)
    assert all((a >= b - 1e-6).all() for a, b in pairwise(film.errors[:4]))
    assert shown.group_size == 4 and shown.layer == "coder"


def test_a_film_is_in_the_range_of_its_image(data):
    x, _ = raw_tests(data)
    pixels = x[:2] * data.std[0] + data.mean[0]
    task = classifier(data)
    shown = gallery(task, data, [0, 1])
    torch.testing.assert_close(shown.images, pixels)
    torch.testing.assert_close(shown.film.signals, pixels)
    with torch.no_grad():
        layer = task.model.coder.layers[0]
        frame = layer.decode(layer.trace(x[:2], 1).codes[0], x.shape[-2:])
    torch.testing.assert_close(shown.film.frames[0], frame * data.std[0] + data.mean[0])
    torch.manual_seed(0)
    normed = Classifier(model="dsc_mlp_pico", model_args=dict(num_atoms=(12,)), data=data)  # layer norm comes first
    film = gallery(normed, data, [0, 1]).film
    lowest, highest = film.signals.amin((1, 2, 3)), film.signals.amax((1, 2, 3))
    torch.testing.assert_close(torch.stack([lowest, highest]), torch.tensor([[0.0, 0.0], [1.0, 1.0]]))


def test_a_film_is_absent_where_it_has_no_meaning(data):
    assert gallery(classifier(data, steps=1), data, [0]).film is None  # a plain layer
    attention = Classifier(model="dsc_attn_pico", model_args=dict(dim=16, depth=1), data=data)
    shown = gallery(attention, data, [0])
    assert shown.film is None and shown.codes.shape == (1, 16, 4)
    bare = Classifier(model="resnet10t", data=ImageData("cifar10"))
    assert image_layer(bare.model, 3 * 32 * 32) is None


def test_tokens_of_as_many_values_as_the_image_are_no_images(data):
    transformer = Classifier(model="dsc_vit_pico", model_args=dict(depth=1), data=data)
    assert transformer.model.blocks[0].coder.dictionary.num_features == 8 * 8
    assert image_layer(transformer.model, 8 * 8) is None
    shown = gallery(transformer, data, [0])
    assert shown.film is None and shown.layer == "blocks.0.coder"


def test_a_test_takes_one_device_of_several(data, monkeypatch):
    made = []

    def trainer(**kwargs):
        made.append(Trainer(accelerator="cpu", **kwargs))
        return made[-1]

    monkeypatch.setattr(CPUAccelerator, "auto_device_count", staticmethod(lambda: 2))
    monkeypatch.setattr(trainers, "Trainer", trainer)
    report.measure(classifier(data), data, 0)
    assert [each.world_size for each in made] == [1]


def test_a_network_of_single_steps_has_no_convergence_to_draw(data):
    curves = report.probe_curves(classifier(data, steps=1), data)
    with pytest.raises(ValueError, match="no layer of several steps"):
        figures.convergence_figure(curves)


def test_dead_codes_are_told_as_they_are(plain_data):
    found = gather(autoencoder(plain_data, threshold=1e6), plain_data)
    assert found.use == [0.0] * 24
    assert [sum(row) for row in zip(*found.confusion, strict=True)][1:] == [0] * 9  # all are as near to every class


# The page of a run


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_figures_are_taken_in_single_precision_whatever_the_training_s(data, dtype):
    task = classifier(data).to(dtype)
    summary, _ = report.measure(task, data, 0)
    again, _ = report.measure(classifier(data), data, 0)
    assert next(task.parameters()).dtype == torch.float32
    assert summary["test"]["loss"] == pytest.approx(again["test"]["loss"], rel=1e-6 if dtype == torch.float64 else 0.05)


def test_a_network_without_sparse_layers_is_told_without_them(data):
    bare = Classifier(model="resnet10t", data=data)
    summary, _ = report.measure(bare, data, 3)
    lines = report.text(summary).splitlines()
    parameters = sum(p.numel() for p in bare.model.parameters())
    assert lines[0] == f"digits, seed 3, {parameters:,} parameters" and len(lines) == 3
    assert lines[2].startswith(f"test accuracy: {summary['test']['accuracy']:.4f}") and "active" not in lines[2]


def test_a_run_ends_with_its_page_and_is_measured_once(run, plain_data, monkeypatch):
    assert (run / "report.html").read_text().startswith("<!doctype html>")
    kept = json.loads((run / "details.json").read_text())
    assert kept.pop("sha256") == hub.read_config(run / "best")["dsc"]["sha256"]
    monkeypatch.setattr(report, "gather", lambda *args: pytest.fail("measured again"))
    again = report.write_report([str(run)])
    assert again == run / "report-2.html"
    assert again.read_text() == (run / "report.html").read_text()


def test_figures_of_other_weights_are_measured_anew(tmp_path, plain_data):
    folder = finished(tmp_path / "1", autoencoder(plain_data), plain_data)
    before = json.loads((folder / "details.json").read_text())
    report.finish(folder, autoencoder(plain_data, num_atoms=16), plain_data, {"seed_everything": 0})
    after = json.loads((folder / "details.json").read_text())
    assert len(before["use"]) == 24 and len(after["use"]) == 16
    assert report.locate(str(folder)) == (folder, folder / "best-2")


def test_a_checkpoint_alone_has_its_page_in_the_current_folder(run, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    cli.main(["report", str(run / "best")])
    cli.main(["report", str(run / "best")])
    cli.main(["report", str(run / "best"), str(run)])
    assert capsys.readouterr().out.split() == ["report-best.html", "report-best-2.html", "report-best-and-gsae-1.html"]
    assert "Learning curves" not in (tmp_path / "report-best.html").read_text()
    assert sorted(p.name for p in (run / "best").iterdir()) == ["README.md", "config.json", "model.safetensors"]


def failure(capsys, *args):
    with pytest.raises(SystemExit) as stop:
        cli.main(["report", *map(str, args)])
    assert stop.value.code == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    return line


def test_wrong_places_get_one_clear_line(run, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    empty = tmp_path / "runs" / "1"
    empty.mkdir(parents=True)
    assert "runs is neither a run nor a checkpoint: a run has config.yaml" in failure(capsys, tmp_path / "runs")
    (empty / "config.yaml").write_text("name: run\n")
    assert "1 has no weights yet: its run has not finished; `--ckpt_path last`" in failure(capsys, empty)
    assert f"did you mean {str(empty)!r}?" in failure(capsys, tmp_path / "runs")
    assert "nowhere/1 is neither a run nor a checkpoint" in failure(capsys, "nowhere/1")
    assert "did you mean 'dsc_cnn.mnist_relu'?" in failure(capsys, "dsc_cnn.mnist_rleu")
    taken = tmp_path / "taken.html"
    taken.write_text("mine")
    assert "taken.html exists already: choose another file" in failure(capsys, run, "--out", taken)
    assert "no is no folder" in failure(capsys, run, "--out", tmp_path / "no" / "page.html")
    assert "neither a run" in failure(capsys, run, empty.parent / "2", "--out", "two.html")
    assert taken.read_text() == "mine" and sorted(p.name for p in tmp_path.iterdir()) == ["runs", "taken.html"]


def test_altered_weights_are_an_error(run, tmp_path, capsys):
    other = tmp_path / "altered"
    other.mkdir()
    (other / "config.json").write_text((run / "best/config.json").read_text())
    (other / "model.safetensors").write_bytes((run / "best/model.safetensors").read_bytes()[:-1])
    assert "was altered or truncated" in failure(capsys, other, "--out", tmp_path / "page.html")
    assert not (tmp_path / "page.html").exists()


def test_a_page_is_whole_or_not_there(run, tmp_path, monkeypatch):
    class Full(type(tmp_path)):
        def write_text(self, text, *args, **kwargs):
            super().write_text(text[: len(text) // 2], *args, **kwargs)
            raise OSError("no space left on device")

    with pytest.raises(OSError, match="no space left"):
        report.write_page(report_sources(run), Full(tmp_path / "page.html"))
    assert not list(tmp_path.iterdir())


def report_sources(run):
    return [report.source(run, run / "best", *report.restore(run / "best"))]
