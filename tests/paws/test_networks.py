"""Sizes of the published networks, shared statistics, and files that need torch alone."""

import pytest
import torch

from paws.evaluation import Representation
from paws.hub import build_encoder
from tests.paws.tiny import ROOT
from tests.standalone import load_alone

SIZES = {  # backbone, projection head, prediction head
    ("resnet50", 2048): (23_508_032, 12_597_248, 2_104_832),
    ("resnet50w2", 4096): (93_907_072, 50_360_320, 8_403_968),
    ("resnet50w4", 8192): (375_378_176, 201_383_936, 33_585_152),
    ("resnet101", 2048): (42_500_160, 12_597_248, 2_104_832),
    ("resnet151", 2048): (58_143_808, 12_597_248, 2_104_832),
    ("resnet200", 2048): (62_624_832, 12_597_248, 2_104_832),
    ("wide_resnet28w2", 128): (1_468_352, 50_048, 8_672),
}


@pytest.mark.parametrize("name, output_dim", SIZES)
def test_published_sizes(name, output_dim):
    with torch.device("meta"):
        encoder = build_encoder(name, output_dim, use_pred_head=True)
    fc, pred = (sum(p.numel() for p in head.parameters()) for head in (encoder.fc, encoder.pred))
    total = sum(p.numel() for p in encoder.parameters())
    assert (total - fc - pred, fc, pred) == SIZES[name, output_dim]


def test_supports_and_large_views_share_statistics_and_small_ones_have_their_own():
    torch.manual_seed(0)
    encoder = build_encoder("wide_resnet10w1", 8, use_pred_head=True)
    supports, large, small = torch.randn(4, 3, 16, 16), torch.randn(6, 3, 16, 16), torch.randn(5, 3, 12, 12)
    h, z = encoder([supports, large, small])
    assert h.shape == z.shape == (15, 8) and not torch.equal(h, z)
    together, _ = encoder(torch.cat([supports, large]))
    torch.testing.assert_close(h[:10], together)
    apart, _ = encoder(small)
    torch.testing.assert_close(h[10:], apart)
    assert not torch.allclose(encoder(supports)[0], h[:4], atol=1e-3)


@pytest.mark.parametrize("name", ["wide_resnet10w1", "test_resnet"])
def test_parts_of_an_encoder_share_its_weights(name):
    torch.manual_seed(0)
    encoder = build_encoder(name, 8, use_pred_head=True, img_size=32).eval()
    images = torch.randn(2, 3, 32, 32)
    h, z = encoder(images)
    assert torch.equal(Representation(encoder)(images), h)
    assert torch.equal(Representation(encoder, use_pred=True)(images), z)
    assert encoder.forward_backbone(images).shape == (2, encoder.embed_dim)


def test_without_a_prediction_head_anchors_are_what_targets_are():
    encoder = build_encoder("wide_resnet10w1", 8).eval()
    h, z = encoder(torch.randn(2, 3, 16, 16))
    assert torch.equal(h, z)


@pytest.mark.parametrize(
    ("name", "message"), [("wide_resnet11w1", "6 n \\+ 4 layers, not 11"), ("resnt50", "did you mean .*resnet50")]
)
def test_unknown_networks_are_an_error(name, message):
    with pytest.raises(ValueError, match=message):
        build_encoder(name, 8)


def test_the_network_files_need_torch_alone(tmp_path):
    resnet, wide_resnet, heads = (
        load_alone(ROOT / f"paws/{name}.py", tmp_path) for name in ("resnet", "wide_resnet", "heads")
    )
    assert wide_resnet.WideResNet(10, 1).eval()(torch.zeros(1, 3, 16, 16)).shape == (1, 64)
    assert resnet.ResNet((1, 1, 1, 1), base_planes=8).eval()(torch.zeros(1, 3, 32, 32)).shape == (1, 256)
    assert heads.projection_head(8, 4).eval()(torch.zeros(1, 8)).shape == (1, 4)
