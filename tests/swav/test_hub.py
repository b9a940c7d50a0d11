"""Networks by name, all with the same heads, and files of every official layout that fill them."""

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import nn

from shared.networks.backbones import Through
from shared.networks.weights import WeightMismatch
from swav import hub
from swav.hub import build_network
from swav.resnet50 import LibraryNetwork
from tests.swav.tiny import (
    build_small,
    finetuned_checkpoint,
    linear_checkpoint,
    make_network,
    pretraining_file,
    small_resnet50,
    training_checkpoint,
)

IMAGES = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def small(monkeypatch):
    build_small(monkeypatch)


def save(tmp_path, contents):
    torch.save(contents, tmp_path / "weights.pth.tar")
    return tmp_path / "weights.pth.tar"


# --- Networks ---------------------------------------------------------------------------------------------------------


def test_the_trunk_is_torchvisions_resnet50(monkeypatch):
    monkeypatch.undo()  # the real ResNets
    torch.manual_seed(0)
    theirs = torchvision.models.resnet50(weights=None)
    theirs.fc = nn.Identity()
    with torch.device("meta"):  # initial values would be overwritten
        ours = build_network("resnet50").eval()
    assert list(ours.state_dict()) == list(theirs.state_dict())
    ours.load_state_dict(theirs.state_dict(), assign=True)
    images = torch.randn(1, 3, 64, 48)
    torch.testing.assert_close(ours(images), theirs.eval()(images), rtol=1e-4, atol=1e-5)


def test_the_official_state_dict_has_328_entries_of_these_names(monkeypatch):
    monkeypatch.undo()  # the real ResNets
    with torch.device("meta"):
        one = build_network("resnet50", output_dim=128, hidden_mlp=2048, nmb_prototypes=3000).state_dict()
        several = build_network("resnet50", output_dim=128, hidden_mlp=2048, nmb_prototypes=[3000] * 3).state_dict()
        linear = build_network("resnet50", output_dim=1000).state_dict()
    assert len(one) == 328
    assert one["prototypes.weight"].shape == (3000, 128) and one["projection_head.3.bias"].shape == (128,)
    assert several["prototypes.prototypes2.weight"].shape == (3000, 128)
    assert linear["projection_head.weight"].shape == (1000, 2048) and linear["projection_head.bias"].shape == (1000,)


@pytest.mark.parametrize("arch", ["resnet18", "test_resnet"])
def test_networks_of_libraries_get_the_same_heads(arch):
    torch.manual_seed(0)
    network = build_network(arch, output_dim=6, hidden_mlp=10, nmb_prototypes=[4, 3], normalize=True, in_chans=1).eval()
    assert isinstance(network, LibraryNetwork)
    large, small_views = torch.randn(4, 1, 48, 48), torch.randn(2, 1, 32, 32)
    embeddings, scores = network([large, small_views])
    assert embeddings.shape == (6, 6) and [s.shape for s in scores] == [(6, 4), (6, 3)]
    features = torch.cat([network.forward_backbone(large), network.forward_backbone(small_views)])
    assert features.shape == (6, network.embed_dim)
    torch.testing.assert_close(embeddings, F.normalize(network.projection_head(features), dim=1))
    torch.testing.assert_close(Through(network, "forward_backbone")(large), features[:4])


def test_scores_are_cosines_in_float32_also_under_autocast():
    network = small_resnet50(output_dim=6, hidden_mlp=10, nmb_prototypes=5, normalize=True).eval()
    images = torch.randn(3, 3, 32, 32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        embeddings, scores = network(images)
    assert embeddings.dtype == scores.dtype == torch.float32
    torch.testing.assert_close(embeddings.norm(dim=1), torch.ones(3))
    torch.testing.assert_close(scores, embeddings @ network.prototypes.weight.T)


# --- Files ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arch", ["resnet50", "test_resnet"])
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
    with pytest.raises(ValueError, match=r"--arch resnet50w3 is unknown; did you mean [^?]*resnet50w2"):
        build_network("resnet50w3")


def test_width_of_a_file_is_named(tmp_path):
    wide = {"conv1.weight": torch.zeros(128, 3, 7, 7), "layer1.0.conv3.weight": torch.zeros(512, 128, 1, 1)}
    for load in (hub.load_backbone, hub.load_network):
        with pytest.raises(WeightMismatch, match=r"a network of the width of resnet50w2, not of --arch resnet50$"):
            load("resnet50", save(tmp_path, wide))


def test_linear_classifier_is_told_from_a_network(tmp_path):
    file = save(tmp_path, linear_checkpoint())
    with pytest.raises(WeightMismatch, match=r"holds a linear classifier .* --linear_weights"):
        hub.load_backbone("resnet50", file)
