"""Backbones by name, with the right feature size, without a network, and errors that help."""

import re
import socket
import warnings

import pytest
import torch
import torchvision
from torch import nn

from dino.hub import available_architectures, build_backbone
from dino.vision_transformer import VisionTransformer
from shared.multicrop import MultiCropWrapper


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    def refuse(*_):
        raise AssertionError("the network was used")

    monkeypatch.setattr(socket.socket, "connect", refuse)


@pytest.mark.parametrize(
    ("arch", "dimension"), [("vit_tiny", 192), ("deit_tiny", 192), ("vit_small", 384), ("deit_small", 384)]
)
def test_vit_is_ours(arch, dimension):
    backbone, embed_dim = build_backbone(arch, patch_size=8, img_size=16, in_chans=1)
    assert isinstance(backbone, VisionTransformer)
    assert isinstance(backbone.head, nn.Identity)
    assert embed_dim == dimension
    assert backbone.pos_embed.shape == (1, 5, dimension)
    assert backbone(torch.randn(2, 1, 24, 16)).shape == (2, dimension)


def test_vit_base_has_the_published_size():
    with torch.device("meta"):
        backbone, embed_dim = build_backbone("vit_base", patch_size=16)
    assert embed_dim == 768
    assert sum(p.numel() for p in backbone.parameters()) == 85_798_656


@pytest.mark.parametrize(
    ("arch", "in_chans"),
    [
        # torchvision, one for each kind of classifier
        ("resnet18", 1),
        ("resnet18", 3),
        ("mobilenet_v3_small", 1),
        ("squeezenet1_1", 1),
        ("convnext_tiny", 1),
        ("swin_t", 1),
        # timm
        ("resnet10t", 1),
        ("mobilenetv3_small_050", 3),
        ("convnext_atto", 3),
        ("test_vit", 1),
        ("vit_tiny_patch16_224", 3),
        ("xcit_nano_12_p16", 1),
    ],
)
def test_features_have_the_stated_dimension(arch, in_chans):
    torch.manual_seed(0)
    backbone, embed_dim = build_backbone(arch, in_chans=in_chans)
    features = backbone.eval()(torch.randn(2, in_chans, 64, 64))
    assert features.shape == (2, embed_dim)


@pytest.mark.parametrize("arch", ["resnet18", "convnext_atto", "test_vit", "xcit_nano_12_p16"])
def test_views_of_two_sizes_go_through_the_wrapper(arch):
    backbone, embed_dim = build_backbone(arch)
    wrapper = MultiCropWrapper(backbone.eval(), nn.Linear(embed_dim, 5))
    large, small = torch.randn(2, 3, 64, 64), torch.randn(6, 3, 32, 32)
    features = wrapper.embed([large, small])
    torch.testing.assert_close(features, torch.cat([backbone(large), backbone(small)]))
    assert wrapper([large, small]).shape == (8, 5)


def test_name_known_to_both_libraries_is_torchvision():
    with torch.device("meta"):
        backbone, embed_dim = build_backbone("resnet50")
    assert isinstance(backbone, torchvision.models.ResNet)
    assert isinstance(backbone.fc, nn.Identity)
    assert embed_dim == 2048


@pytest.mark.parametrize("arch", ["convnext_tiny", "convnext_atto", "vit_tiny"])
def test_only_drop_path_makes_training_mode_random(arch):
    torch.manual_seed(0)
    images = torch.randn(4, 3, 64, 64)
    for rate in (0.0, 0.8):
        backbone, _ = build_backbone(arch, drop_path_rate=rate)
        for parameter in backbone.parameters():
            nn.init.normal_(parameter, std=0.1)  # layer scales start near 0
        backbone.train()
        assert torch.equal(backbone(images), backbone(images)) == (rate == 0)


def test_dropout_of_the_classifier_is_off():
    torch.manual_seed(0)
    backbone, _ = build_backbone("squeezenet1_1")
    images = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(backbone(images), backbone(images))


def test_unused_drop_path_is_said():
    with pytest.warns(UserWarning, match="vgg11_bn has no stochastic depth"):
        build_backbone_of_timm("vgg11_bn", drop_path_rate=0.1)


def build_backbone_of_timm(arch, drop_path_rate):
    from shared.networks.backbones import _build_timm

    with torch.device("meta"):
        return _build_timm(arch, drop_path_rate, img_size=224, in_chans=3)


@pytest.mark.parametrize(("typo", "meant"), [("resnt50", "resnet50"), ("vit_smal", "vit_small"), ("xcit", "xcit")])
def test_unknown_name_lists_close_ones(typo, meant):
    with pytest.raises(ValueError, match=rf"--arch {typo} is unknown; did you mean [^?]*{meant}"):
        build_backbone(typo)


def test_list_of_names_is_complete():
    names = available_architectures()
    assert len(names) == len(set(names)) > 1000
    assert {"vit_small", "deit_small", "resnet50", "xcit_small_12_p16_224"} <= set(names)
    assert "list_models" not in names


@pytest.mark.parametrize("patch_size", [0, 33])
def test_patch_that_does_not_fit_is_refused(patch_size):
    with pytest.raises(ValueError, match=re.escape(f"--patch_size {patch_size}")):
        build_backbone("vit_tiny", patch_size=patch_size, img_size=32)


def test_patch_that_does_not_divide_is_said():
    with pytest.warns(UserWarning, match="--patch_size 5 does not divide 32; the last 2 rows"):
        build_backbone("vit_tiny", patch_size=5, img_size=32)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        build_backbone("vit_tiny", patch_size=8, img_size=32)
