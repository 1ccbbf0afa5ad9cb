import pytest
import timm
import torch

import dsc
from dsc import catalogue, hub, models


def test_every_model_of_the_zoo_is_described():
    rows = dsc.describe_models()
    assert [row.name for row in rows] == models.list_models()
    assert all(row.parameters > 0 and row.macs > 0 for row in rows)
    assert all(len(row.cells()) == len(catalogue.HEADER) for row in rows)


@pytest.mark.parametrize("name", ["dsc_cnn_pico", "dsc_vit_pico", "gsae", "sae_conv_deep"])
def test_facts_are_those_of_a_model_that_was_built(name):
    model, row = models.create_model(name), dsc.describe_model(name)
    assert row.parameters == sum(p.numel() for p in model.parameters())
    assert row.input_size == tuple(model.pretrained_cfg["input_size"])
    assert row.family == type(model).__module__.rpartition(".")[2]
    assert row.stages == len(getattr(model, "feature_info", ()))


def conv(side, channels, atoms, kernel):
    return side**2 * channels * atoms * kernel**2


@pytest.mark.parametrize("steps", [1, 2, 5])
@pytest.mark.parametrize("joint", [False, True])
def test_convolutional_network_analyses_k_times_and_synthesizes_once_less(steps, joint):
    layers = conv(14, 3, 32, 6) + conv(5, 32, 64, 6) + conv(2, 64, 512, 4)
    expected = (2 * steps - 1) * layers + 512 * 10  # of a transposed convolution as of its convolution
    assert dsc.describe_model("dsc_cnn", steps=steps, joint=joint).macs == expected


@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("solver", ["ista", "fista"])
def test_autoencoders_count_every_step_and_the_decoder(steps, solver):
    uses = 2 * steps  # K analyses, K − 1 syntheses, and the decoder
    assert dsc.describe_model("sae", steps=steps, solver=solver).macs == uses * 784 * 160
    assert dsc.describe_model("sae", steps=steps, img_size=8, in_chans=3).macs == uses * 3 * 64 * 160
    deep = 784 * 320 + 320 * 240 + 240 * 160
    assert dsc.describe_model("gsae_deep", steps=steps, solver=solver).macs == uses * deep
    deep = conv(14, 1, 32, 4) + conv(7, 32, 64, 4) + conv(3, 64, 128, 4)
    assert dsc.describe_model("sae_conv_deep", steps=steps, solver=solver).macs == uses * deep


def test_attention_and_everything_around_it_is_counted():
    tokens, dim, atoms = 64, 64, 256
    stem = conv(16, 3, 32, 3) + conv(8, 32, 64, 3) + conv(8, 1, 64, 3)
    attention = tokens * dim * 3 * dim + 2 * tokens * tokens * dim + tokens * dim * dim
    for steps in (1, 2):
        block = attention + (2 * steps - 1) * tokens * dim * atoms + tokens * atoms * dim
        row = dsc.describe_model("dsc_vit_pico", steps=steps)
        assert row.macs == stem + 4 * block + dim * 10


def test_backbone_of_timm_is_found_where_no_model_of_ours_matches():
    (row,) = dsc.describe_models("resnet18")
    assert {"a1_in1k", "cifar10_group_relu_nonneg"} <= set(row.pretrained)
    model = timm.create_model("resnet18")
    assert (row.family, row.stages) == ("resnet", 5)
    assert row.parameters == sum(p.numel() for p in model.parameters())
    assert row.macs == 1_814_073_344  # He et al. 2016 count 1.8e9
    assert "a1_in1k" in row.pretrained


def test_patterns():
    assert catalogue.matching_models("dsc_resnet3*") == ["dsc_resnet34"]
    assert catalogue.matching_models("*") == models.list_models()
    assert catalogue.matching_models("resnet1?") == ["resnet18"]
    with pytest.raises(ValueError, match=r"unknown model 'dsc_vit_pic\?\?'; did you mean 'dsc_vit_pico'"):
        dsc.describe_models("dsc_vit_pic??")


def test_describing_leaves_the_random_numbers_alone():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    dsc.describe_model("sae")
    assert torch.equal(torch.get_rng_state(), before)


def test_work_is_counted_for_the_image_size_that_is_asked_for():
    small, large = (catalogue.describe_model("dsc_cnn_pico", (side, side), in_chans=1, steps=1) for side in (16, 32))
    assert (small.input_size, large.input_size) == ((1, 16, 16), (1, 32, 32))
    head = 128 * 10
    assert large.macs - head == 4 * (small.macs - head)


def test_checkpoints_are_described_by_their_cards():
    for row in catalogue.describe_checkpoints():
        config = hub.read_config(hub.find(row.name))
        metrics = config["dsc"]["metrics"]
        assert (row.accuracy, row.mse) == (metrics.get("accuracy"), metrics.get("mse"))
        assert row.active_fraction == metrics["sparsity/active_fraction/total"]
        assert row.name.startswith(config["architecture"] + ".") and config["dsc"]["dataset"] in row.name
        assert len(row.cells()) == len(catalogue.CHECKPOINT_HEADER)
    assert [row.name for row in catalogue.describe_checkpoints("dsc_cnn.mnist_relu")] == ["dsc_cnn.mnist_relu"]


def test_epochs_are_counted_from_where_a_training_started():
    epochs = {row.name: row.epochs for row in catalogue.describe_checkpoints("*.cifar10_relu*")}
    assert epochs["dsc_speed.cifar10_relu"] == (20,)
    assert epochs["dsc_speed.cifar10_relu_averaged"] == (20, 7, 5)
    row = catalogue.describe_checkpoint(hub.find("dsc_cnn.mnist_relu_cutout"))
    assert "8 + 12" in row.cells()


def test_unknown_checkpoints_name_the_nearest():
    with pytest.raises(ValueError, match="did you mean 'dsc_cnn.mnist_relu'"):
        catalogue.describe_checkpoints("dsc_cnn.mnist_rel")
