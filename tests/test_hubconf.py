"""Hub entry points: offline without weights, and with weights from the published paths of a local server."""

import functools
import http.server
import threading
from pathlib import Path

import pytest
import torch
import torchvision

import hubconf
from deepcluster import convnets
from deepcluster import hub as deepcluster_hub
from dino import hub
from dino.hub import CARD, build_backbone
from shared.networks.weights import DownloadError, WeightMismatch

ROOT = Path(__file__).resolve().parents[1]
ENTRIES = [name for name in dir(hubconf) if name.startswith("dino_")]


class Handler(http.server.SimpleHTTPRequestHandler):
    requested: list[str]

    def do_GET(self):
        self.requested.append(self.path)
        super().do_GET()

    def log_message(self, *_):
        pass


@pytest.fixture
def server(tmp_path, monkeypatch):
    """Serves ``files``; downloads go to an empty hub folder."""
    handler = type("Recording", (Handler,), {"requested": []})
    folder = tmp_path / "files"
    folder.mkdir()
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(handler, directory=str(folder))) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        for method in ("dino", "deepcluster"):
            address = f"http://127.0.0.1:{server.server_port}/{method}"
            monkeypatch.setenv(f"{method.upper()}_WEIGHTS_URL", address)
        monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
        server.folder, server.requested = folder, handler.requested
        yield server
        server.shutdown()


def publish(server, file: str, tensors: dict, method: str = "dino") -> None:
    path = server.folder / method / file
    path.parent.mkdir(parents=True)
    torch.save(tensors, path)


def test_every_release_has_an_entry_and_the_published_path(monkeypatch):
    monkeypatch.setattr(hub, "fetch", lambda file: file)
    assert set(ENTRIES) == set(CARD.releases)
    folders = {
        "dino_vits16": "dino_deitsmall16",
        "dino_vits8": "dino_deitsmall8",
        "dino_vitb16": "dino_vitbase16",
        "dino_vitb8": "dino_vitbase8",
    }
    for name, release in CARD.releases.items():
        stem = folders.get(name, name)
        assert release.file == f"{stem}_pretrain/{stem}_pretrain.pth"
        linear = hub.fetch_linear_weights(release.arch, release.options.get("patch_size", 16))
        assert linear == f"{stem}_pretrain/{stem}_linearweights.pth"


@pytest.mark.parametrize("name", ENTRIES)
def test_entry_builds_offline_and_asks_for_its_file(name, server):
    with torch.device("meta"):
        backbone = getattr(hubconf, name)(pretrained=False)
        assert sum(p.numel() for p in backbone.parameters()) > 20e6
        with pytest.raises(DownloadError, match=CARD.releases[name].file):
            getattr(hubconf, name)()
    assert server.requested == [f"/dino/{CARD.releases[name].file}"]


def test_vit_is_filled_from_the_server_once(server):
    source = hubconf.dino_vits16(pretrained=False, img_size=[32])
    publish(server, CARD.releases["dino_vits16"].file, source.state_dict())
    for _ in range(2):
        backbone = torch.hub.load(str(ROOT), "dino_vits16", source="local", img_size=[32])
        torch.testing.assert_close(backbone.state_dict(), source.state_dict())
    assert len(server.requested) == 1


def test_convnet_file_may_hold_a_classifier(server):
    source = torchvision.models.resnet50()
    publish(server, CARD.releases["dino_resnet50"].file, source.state_dict())
    backbone = hubconf.dino_resnet50()
    torch.testing.assert_close(backbone.layer1.state_dict(), source.layer1.state_dict())


def test_entry_points_work_from_another_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    backbone = torch.hub.load(str(ROOT), "dino_vits8", source="local", pretrained=False, img_size=[16])
    assert backbone(torch.randn(1, 3, 16, 16)).shape == (1, 384)


@pytest.mark.parametrize("arch", ["alexnet", "vgg16"])
def test_deepcluster_entry_builds_offline_and_asks_for_its_file(arch, server):
    entry = getattr(hubconf, f"deepcluster_{arch}")
    with torch.device("meta"):
        network = entry(pretrained=False)
        assert sum(p.numel() for p in network.parameters()) == {"alexnet": 58_272_504, "vgg16": 134_268_440}[arch]
        with pytest.raises(DownloadError, match=f"{arch}/checkpoint.pth.tar"):
            entry()
    assert server.requested == [f"/deepcluster/{arch}/checkpoint.pth.tar"]


@pytest.mark.parametrize(("arch", "img_size"), [("alexnet", 63), ("vgg16", 32)])
def test_deepcluster_network_is_filled_from_the_server_once(arch, img_size, server, monkeypatch):
    monkeypatch.setattr(convnets, "HIDDEN", 16)  # the published file is too large for a test
    source = deepcluster_hub.build_network(arch, sobel=True, out=5, img_size=img_size)
    state = {"arch": arch, "state_dict": deepcluster_hub.official_names(source.state_dict())}
    publish(server, f"{arch}/checkpoint.pth.tar", state, "deepcluster")
    network = getattr(hubconf, f"deepcluster_{arch}")(img_size=img_size)
    expected = {name: value for name, value in source.state_dict().items() if not name.startswith("top_layer.")}
    torch.testing.assert_close(dict(network.state_dict()), expected)
    getattr(hubconf, f"deepcluster_{arch}")(img_size=img_size)
    assert len(server.requested) == 1


# --- Weights for the scripts ------------------------------------------------------------------------------------------


def test_scripts_get_the_release_without_a_file(server):
    source, _ = build_backbone("vit_small", patch_size=8, img_size=32)
    publish(server, CARD.releases["dino_vits8"].file, source.state_dict())
    backbone, embed_dim = hub.load_pretrained("deit_small", 8)
    torch.testing.assert_close(backbone.state_dict(), source.state_dict())
    assert embed_dim == 384
    assert not backbone.training
    assert not any(p.requires_grad for p in backbone.parameters())


@pytest.mark.parametrize(
    ("arch", "img_size", "in_chans"),
    [("vit_tiny", 24, 1), ("vit_tiny", 16, 3), ("resnet18", 0, 1), ("vit_tiny_patch16_224", 32, 1)],
)
def test_size_and_channels_come_from_the_file(arch, img_size, in_chans, tmp_path):
    source, _ = build_backbone(arch, patch_size=8, img_size=img_size or 224, in_chans=in_chans)
    torch.save({"teacher": {f"backbone.{k}": v for k, v in source.state_dict().items()}}, tmp_path / "checkpoint.pth")
    backbone, _ = hub.load_pretrained(arch, 8, tmp_path / "checkpoint.pth")
    torch.testing.assert_close(backbone.state_dict(), source.state_dict())


def test_weights_that_fill_a_part_are_loaded_when_that_is_allowed(tmp_path):
    source, _ = build_backbone("vit_tiny", patch_size=8, img_size=16)
    state = source.state_dict()
    del state["norm.bias"]
    torch.save(state, tmp_path / "part.pth")
    with pytest.raises(WeightMismatch, match="149/150 entries"):
        hub.load_pretrained("vit_tiny", 8, tmp_path / "part.pth")
    backbone, _ = hub.load_pretrained("vit_tiny", 8, tmp_path / "part.pth", allow_partial=True)
    torch.testing.assert_close(backbone.cls_token.data, source.cls_token.data)


@pytest.mark.parametrize(
    ("arch", "patch_size", "weights", "message"),
    [
        ("vit_small", 5, "", "no weights are released for --arch vit_small --patch_size 5"),
        ("resnet18", 16, "", "no weights are released for --arch resnet18"),
        ("vit_small", 16, "nowhere.pth", "--pretrained_weights nowhere.pth is neither a file nor a release"),
    ],
)
def test_absent_weights_are_an_error(arch, patch_size, weights, message):
    with pytest.raises(ValueError, match=message):
        hub.load_pretrained(arch, patch_size, weights)


def test_random_weights_are_asked_for_by_name():
    backbone, embed_dim = hub.load_pretrained("vit_tiny", 16, "random")
    assert backbone(torch.zeros(1, 3, 32, 32)).shape == (1, embed_dim)
