"""Entry points of torch.hub: offline, from any folder, and with the stated packages only."""

import subprocess
import sys
from pathlib import Path

import torch
import torchvision

import hubconf
from dino import hub
from dino.hub import CARD

ROOT = Path(__file__).resolve().parents[1]


def test_linear_classifiers_of_dino_are_beside_their_backbones(monkeypatch):
    monkeypatch.setattr(hub, "fetch", lambda file: file)
    for release in CARD.releases.values():
        file = hub.fetch_linear_weights(release.arch, release.options.get("patch_size", 16))
        assert file == release.file.replace("_pretrain.pth", "_linearweights.pth")


def test_file_of_a_convnet_may_hold_a_classifier(tmp_path, monkeypatch):
    monkeypatch.setenv("DINO_WEIGHTS_URL", tmp_path.as_uri())
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    source, file = torchvision.models.resnet50(), tmp_path / CARD.releases["dino_resnet50"].file
    file.parent.mkdir()
    torch.save(source.state_dict(), file)
    torch.testing.assert_close(hubconf.dino_resnet50().layer1.state_dict(), source.layer1.state_dict())


def test_scripts_get_the_release_without_a_file(tmp_path, monkeypatch):
    monkeypatch.setenv("DINO_WEIGHTS_URL", tmp_path.as_uri())
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    source, file = hubconf.dino_vits8(pretrained=False, img_size=32), tmp_path / CARD.releases["dino_vits8"].file
    file.parent.mkdir()
    torch.save(source.state_dict(), file)
    backbone, embed_dim = hub.load_pretrained("deit_small", 8)  # another name of vit_small
    torch.testing.assert_close(backbone.state_dict(), source.state_dict())
    assert embed_dim == 384 and not backbone.training


def test_entry_points_work_from_another_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    backbone = torch.hub.load(str(ROOT), "dino_vits8", source="local", pretrained=False, img_size=[16])
    assert backbone(torch.randn(1, 3, 16, 16)).shape == (1, 384)


def test_entry_points_need_the_stated_packages_only():
    others = ["cv2", "simplejpeg", "sklearn", "faiss", "submitit", "matplotlib"]
    code = f"import sys, hubconf; print(*[name for name in {others} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split() == []
