"""ResNets with their heads, and any other network with the same ones."""

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import nn

from swav import resnet50
from swav.hub import RESNETS, available_architectures, build_network
from swav.resnet50 import LibraryNetwork, ResNet, Trunk


def small(**kwargs) -> ResNet:
    torch.manual_seed(0)
    return ResNet([1, 1, 1, 1], width_per_group=8, **kwargs)


@pytest.mark.parametrize(
    ("arch", "hidden", "trunk", "complete"),
    [
        ("resnet50", 2048, 23_508_032, 28_354_752),
        ("resnet50w2", 8192, 93_907_072, 128_918_784),
        ("resnet50w4", 8192, 375_378_176, 443_944_320),
        ("resnet50w5", 8192, 586_450_240, 671_793_600),
    ],
)
def test_networks_have_the_published_sizes(arch, hidden, trunk, complete):
    with torch.device("meta"):
        bare = build_network(arch)
        network = build_network(arch, output_dim=128, hidden_mlp=hidden, nmb_prototypes=3000, normalize=True)
    assert sum(p.numel() for p in bare.parameters()) == trunk
    assert sum(p.numel() for p in network.parameters()) == complete
    assert bare.embed_dim == 2048 * bare.conv1.out_channels // 64


def test_the_trunk_is_torchvisions_resnet50():
    torch.manual_seed(0)
    theirs = torchvision.models.resnet50(weights=None)
    theirs.fc = nn.Identity()
    with torch.device("meta"):  # initial values would be overwritten
        ours = build_network("resnet50").eval()
    assert list(ours.state_dict()) == list(theirs.state_dict())
    ours.load_state_dict(theirs.state_dict(), assign=True)
    images = torch.randn(1, 3, 64, 48)
    torch.testing.assert_close(ours(images), theirs.eval()(images), rtol=1e-4, atol=1e-5)


def test_the_official_state_dict_has_328_entries_of_these_names():
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
    torch.testing.assert_close(Trunk(network)(large), features[:4])


def test_the_trunk_for_evaluations_shares_weights_and_mode():
    network = small(output_dim=4).train()
    trunk = Trunk(network).eval()
    assert not network.training
    images = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(trunk(images), network.forward_backbone(images))
    assert trunk(images).shape == (2, network.embed_dim)


def test_scores_are_cosines_in_float32_also_under_autocast():
    network = small(output_dim=6, hidden_mlp=10, nmb_prototypes=5, normalize=True).eval()
    images = torch.randn(3, 3, 32, 32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        embeddings, scores = network(images)
    assert embeddings.dtype == scores.dtype == torch.float32
    torch.testing.assert_close(embeddings.norm(dim=1), torch.ones(3))
    torch.testing.assert_close(scores, embeddings @ network.prototypes.weight.T)


def test_without_heads_the_network_gives_features_and_in_eval_mode_the_map():
    images = torch.randn(2, 3, 64, 64)
    features, feature_map = (small(eval_mode=mode).eval()(images) for mode in (False, True))
    assert feature_map.shape == (2, 256, 2, 2)
    torch.testing.assert_close(feature_map.mean(dim=(2, 3)), features)


def test_the_list_of_names_is_complete_and_unknown_ones_get_close_ones():
    names = available_architectures()
    assert tuple(names[:4]) == RESNETS and len(names) == len(set(names)) > 1000
    assert all(callable(getattr(resnet50, name)) for name in RESNETS)
    with pytest.raises(ValueError, match=r"--arch resnet50w3 is unknown; did you mean [^?]*resnet50w2"):
        build_network("resnet50w3")
