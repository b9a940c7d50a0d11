"""Networks of torchvision and timm by name, with the right feature size, offline, and errors that help."""

import pytest
import torch
import torchvision
from torch import nn

from shared.networks.backbones import build_library_backbone, library_architectures

pytestmark = pytest.mark.usefixtures("no_network")


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
    backbone, embed_dim = build_library_backbone(arch, in_chans=in_chans)
    features = backbone.eval()(torch.randn(2, in_chans, 64, 64))
    assert features.shape == (2, embed_dim)


def test_name_known_to_both_libraries_is_torchvision():
    with torch.device("meta"):
        backbone, embed_dim = build_library_backbone("resnet50")
    assert isinstance(backbone, torchvision.models.ResNet)
    assert isinstance(backbone.fc, nn.Identity)
    assert embed_dim == 2048


@pytest.mark.parametrize("arch", ["convnext_tiny", "convnext_atto"])
def test_only_drop_path_makes_training_mode_random(arch):
    torch.manual_seed(0)
    images = torch.randn(4, 3, 64, 64)
    for rate in (0.0, 0.8):
        backbone, _ = build_library_backbone(arch, drop_path_rate=rate)
        for parameter in backbone.parameters():
            nn.init.normal_(parameter, std=0.1)  # layer scales start near 0
        backbone.train()
        assert torch.equal(backbone(images), backbone(images)) == (rate == 0)


def test_dropout_of_the_classifier_is_off():
    torch.manual_seed(0)
    backbone, _ = build_library_backbone("squeezenet1_1")
    images = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(backbone(images), backbone(images))


@pytest.mark.parametrize(("typo", "meant"), [("resnt50", "resnet50"), ("my_vi", "my_vit"), ("xcit", "xcit")])
def test_unknown_name_lists_close_ones(typo, meant):
    with pytest.raises(ValueError, match=rf"--arch {typo} is unknown; did you mean [^?]*{meant}"):
        build_library_backbone(typo, own_names=["my_vit"])


def test_modules_of_the_libraries_are_no_architectures():
    names = library_architectures()
    assert {"resnet50", "xcit_small_12_p16_224"} <= names and "list_models" not in names
