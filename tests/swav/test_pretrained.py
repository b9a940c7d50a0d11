"""Every official layout fills its network, and nothing is filled by half."""

import pytest
import safetensors.torch
import torch
import torchvision

import hubconf
from shared.networks import pretrained
from shared.networks.weights import WeightMismatch
from swav import hub
from tests.swav.official_layouts import (
    build_small,
    finetuned_checkpoint,
    linear_checkpoint,
    make_network,
    pretraining_file,
    training_checkpoint,
)

IMAGES = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
LAYOUTS = {"pre-training file": pretraining_file, "training checkpoint": training_checkpoint}


@pytest.fixture(autouse=True)
def small(monkeypatch):
    build_small(monkeypatch)


def save(tmp_path, contents):
    torch.save(contents, tmp_path / "weights.pth.tar")
    return tmp_path / "weights.pth.tar"


# --- Layouts ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arch", ["resnet50", "resnet18"])  # ours, and a network of torchvision
@pytest.mark.parametrize("layout", LAYOUTS)
def test_trunk_is_filled_and_the_heads_are_counted_apart(layout, arch, tmp_path, capsys):
    source = make_network(arch)
    network = hub.load_backbone(arch, save(tmp_path, LAYOUTS[layout](source)))
    torch.testing.assert_close(network(IMAGES), source.forward_backbone(IMAGES))
    total = len(network.state_dict())
    assert f"{total}/{total} entries of the network matched, 10 of a head left out" in " ".join(
        capsys.readouterr().out.split()
    )
    assert not network.training
    assert not any(parameter.requires_grad for parameter in network.parameters())


@pytest.mark.parametrize("arch", ["resnet50", "resnet18"])
@pytest.mark.parametrize("heads", [{}, {"nmb_prototypes": [20, 5, 7]}, {"hidden_mlp": 0}], ids=str)
def test_network_gets_the_heads_of_the_file(heads, arch, tmp_path, capsys):
    source = make_network(arch, **heads)
    network = hub.load_network(arch, save(tmp_path, training_checkpoint(source)))
    torch.testing.assert_close(network(IMAGES), source(IMAGES))
    total = len(source.state_dict())
    assert f"{total}/{total} entries of the network matched\n" in capsys.readouterr().out


def test_fine_tuned_networks_are_understood(tmp_path):
    source, checkpoint = finetuned_checkpoint()
    file = save(tmp_path, checkpoint)
    torch.testing.assert_close(hub.load_network("resnet50", file)(IMAGES), source(IMAGES))
    torch.testing.assert_close(hub.load_backbone("resnet50", file)(IMAGES), source.forward_backbone(IMAGES))


def test_safetensors_and_files_of_torchvision_are_understood(tmp_path):
    source = make_network(output_dim=0, hidden_mlp=0, nmb_prototypes=0, normalize=False)
    safetensors.torch.save_file(source.state_dict(), tmp_path / "trunk.safetensors")
    network = hub.load_backbone("resnet50", tmp_path / "trunk.safetensors")
    torch.testing.assert_close(network(IMAGES), source(IMAGES))

    torch.manual_seed(0)
    whole = torchvision.models.resnet18().eval()
    network = hub.load_backbone("resnet18", save(tmp_path, whole.state_dict()))
    whole.fc = torch.nn.Identity()
    torch.testing.assert_close(network(IMAGES), whole(IMAGES))


def test_channels_come_from_the_file(tmp_path):
    file = save(tmp_path, training_checkpoint(make_network(in_chans=1)))
    assert hub.load_backbone("resnet50", file).conv1.in_channels == 1


# --- Mistakes ---------------------------------------------------------------------------------------------------------


def test_a_network_with_heads_is_not_filled_by_half_unless_told(tmp_path):
    contents = pretraining_file(make_network())
    del contents["module.projection_head.3.bias"]
    file = save(tmp_path, contents)
    with pytest.raises(WeightMismatch, match=r"1 missing in the file: projection_head.3.bias"):
        hub.load_network("resnet50", file)
    hub.load_network("resnet50", file, allow_partial=True)
    with pytest.raises(ValueError, match="--pretrained random: a file is needed here"):
        hub.load_network("resnet50", "random")


def test_width_of_a_file_is_named(tmp_path):
    wide = {"conv1.weight": torch.zeros(128, 3, 7, 7), "layer1.0.conv3.weight": torch.zeros(512, 128, 1, 1)}
    for load in (hub.load_backbone, hub.load_network):
        with pytest.raises(WeightMismatch, match=r"a network of the width of resnet50w2, not of --arch resnet50$"):
            load("resnet50", save(tmp_path, wide))


def test_linear_classifier_is_told_from_a_network(tmp_path):
    file = save(tmp_path, linear_checkpoint())
    with pytest.raises(WeightMismatch, match=r"holds a linear classifier .* --linear_weights"):
        hub.load_backbone("resnet50", file)


# --- Releases ---------------------------------------------------------------------------------------------------------


def test_address_and_file_names_are_the_published_ones():
    names = ["swav_100ep", "swav_200ep", "swav_400ep", "swav_800ep", "swav_200ep_bs256", "swav_400ep_bs256"]
    names += ["swav_400ep_2x224", "deepclusterv2_800ep", "deepclusterv2_400ep", "deepclusterv2_400ep_2x224"]
    names += ["selav2_400ep", "selav2_400ep_2x224", *(f"swav_RN50w{w}_400ep" for w in (2, 4, 5))]
    assert {name: release.file for name, release in hub.CARD.releases.items()} == {
        name: f"{name}_pretrain.pth.tar" for name in names
    }
    assert hub.CARD.address == "https://dl.fbaipublicfiles.com/deepcluster/"
    assert hub.LINEAR_CLASSIFIER == "swav_800ep_eval_linear.pth.tar"
    firsts = [pretrained.find_release(hub.CARD, arch) for arch in hub.RESNETS]
    assert firsts == ["swav_800ep", "swav_RN50w2_400ep", "swav_RN50w4_400ep", "swav_RN50w5_400ep"]


@pytest.mark.parametrize(
    ("entry", "name", "dim"),
    [
        ("swav_resnet50", "swav_800ep", 256),
        ("swav_resnet50w2", "swav_RN50w2_400ep", 4096),
        ("swav_resnet50w4", "swav_RN50w4_400ep", 8192),
        ("swav_resnet50w5", "swav_RN50w5_400ep", 10240),
        ("deepclusterv2_resnet50", "deepclusterv2_800ep", 256),
        ("selav2_resnet50", "selav2_400ep", 256),
    ],
)
def test_hub_entries_build_offline_and_name_their_release(entry, name, dim):
    assert hub.CARD.releases[name].entry == entry and len(hub.ENTRIES) == 6
    with torch.device("meta"):
        assert getattr(hubconf, entry)(pretrained=False).embed_dim == dim
