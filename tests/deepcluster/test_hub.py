import math

import pytest
import torch
from torch import nn

from deepcluster.checkpoints import official_names
from deepcluster.convnets import alexnet
from deepcluster.hub import build_network, load_network
from shared.networks.weights import UnsafeFileError, WeightMismatch, safe_load
from tests.deepcluster.tiny import write_checkpoint
from tests.shared.networks.test_legacy_tar import write as write_legacy_tar


def test_a_checkpoint_of_the_official_layout_gives_the_network_back(checkpoint, capsys):
    network = load_network(checkpoint)
    saved = {k.replace("module.", ""): v for k, v in safe_load(checkpoint)["state_dict"].items()}
    assert not network.training
    assert network.top_layer.out_features == 7 and network.sobel is not None
    for name, value in network.state_dict().items():
        assert torch.equal(value, saved[name]), name
    assert f"{len(saved)}/{len(saved)} entries of the network matched" in capsys.readouterr().out


def test_the_file_says_whether_there_is_a_filter_and_a_top_layer(small_layers, tmp_path):
    network = load_network(write_checkpoint(tmp_path / "a.pth.tar", sobel=False), keep_top_layer=False)
    assert network.sobel is None and network.top_layer is None
    assert network.features[0].in_channels == 3


def test_a_file_that_does_not_fill_the_network_is_refused(checkpoint):
    state = safe_load(checkpoint)
    del state["state_dict"]["features.module.4.weight"]
    torch.save(state, checkpoint)
    with pytest.raises(WeightMismatch, match=r"1 missing in the file: features\.4\.weight"):
        load_network(checkpoint)


def test_other_files_are_refused_with_the_flag(tmp_path):
    with pytest.raises(ValueError, match=r"--model .*missing\.pth\.tar is neither a file nor a release"):
        load_network(tmp_path / "missing.pth.tar")
    torch.save({"state_dict": {"a": torch.zeros(1)}}, tmp_path / "other.pth")
    with pytest.raises(WeightMismatch, match=r"no checkpoint of DeepCluster \(it has no 'arch'\)"):
        load_network(tmp_path / "other.pth")
    (tmp_path / "text.pth").write_text("hello")
    with pytest.raises(UnsafeFileError):
        load_network(tmp_path / "text.pth")


@pytest.mark.parametrize(("arch", "dim"), [("resnet18", 512), ("squeezenet1_1", 512), ("test_vit", 64)])
def test_networks_of_torchvision_and_timm_work_with_and_without_the_filter(arch, dim, tmp_path):
    for sobel in (False, True):
        network = build_network(arch, sobel, out=5, img_size=32).eval()
        images = torch.randn(2, 3, 32, 32)
        assert network.dim == dim
        assert network.embed(images).shape == (2, dim) and network(images).shape == (2, 5)
    state = {"arch": arch, "state_dict": official_names(network.state_dict()), "args": {"crop_size": 32}}
    torch.save(state, tmp_path / "checkpoint.pth.tar")
    torch.testing.assert_close(load_network(tmp_path / "checkpoint.pth.tar")(images), network(images))


def test_files_of_the_torch_version_of_the_official_code_are_read(checkpoint, tmp_path):
    """They are tar archives with strings of Python 2, without counters of batches."""
    state = safe_load(checkpoint)
    weights = {k: v for k, v in state["state_dict"].items() if not k.endswith("num_batches_tracked")}
    old = {"epoch": 3, "arch": "alexnet", "state_dict": weights, "optimizer": {}, "args": {"crop_size": 64}}
    write_legacy_tar(tmp_path / "old.pth.tar", old, list(weights.values()))
    network, expected = load_network(tmp_path / "old.pth.tar"), load_network(checkpoint)
    images = torch.randn(1, 3, 64, 64)
    assert torch.equal(network(images), expected(images))


# --- Networks of the paper --------------------------------------------------------------------------------------------


def test_initial_weights_have_the_published_spread(small_layers):
    torch.manual_seed(0)
    network = alexnet(out=50, img_size=64)
    convolution = network.features[8]
    assert convolution.weight.std().item() == pytest.approx(math.sqrt(2 / (9 * 384)), rel=0.02)
    assert network.top_layer.weight.std().item() == pytest.approx(0.01, rel=0.1)
    biases = [m.bias for m in network.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    assert all(bias.abs().max() == 0 for bias in biases)
