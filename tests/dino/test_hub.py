"""Networks by name: our ViTs before those of the libraries, and patches that fit."""

import pytest
import torch
from torch import nn

import hubconf
from dino import hub
from dino.hub import CARD, build_backbone
from dino.vision_transformer import VisionTransformer


@pytest.mark.parametrize(("arch", "dimension"), [("vit_tiny", 192), ("deit_tiny", 192), ("deit_small", 384)])
def test_vit_is_ours(arch, dimension):
    backbone, embed_dim = build_backbone(arch, patch_size=8, img_size=16, in_chans=1)
    assert isinstance(backbone, VisionTransformer) and isinstance(backbone.head, nn.Identity)
    assert embed_dim == dimension and backbone.pos_embed.shape == (1, 5, dimension)
    assert backbone(torch.randn(2, 1, 24, 16)).shape == (2, dimension)


def test_linear_classifiers_are_beside_their_backbones(monkeypatch):
    monkeypatch.setattr(hub, "fetch", lambda file: file)
    for release in CARD.releases.values():
        file = hub.fetch_linear_weights(release.arch, release.options.get("patch_size", 16))
        assert file == release.file.replace("_pretrain.pth", "_linearweights.pth")


def test_scripts_get_the_release_without_a_file(tmp_path, monkeypatch):
    monkeypatch.setenv("DINO_WEIGHTS_URL", tmp_path.as_uri())
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    source, file = hubconf.dino_vits8(pretrained=False, img_size=32), tmp_path / CARD.releases["dino_vits8"].file
    file.parent.mkdir()
    torch.save(source.state_dict(), file)
    backbone, embed_dim = hub.load_pretrained("deit_small", 8)  # another name of vit_small
    torch.testing.assert_close(backbone.state_dict(), source.state_dict())
    assert embed_dim == 384 and not backbone.training
