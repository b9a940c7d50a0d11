"""Every layout of weights fills a network completely or is refused; downloads appear complete or not at all."""

import argparse
import hashlib
import http.server
import threading
from functools import partial

import pytest
import timm
import torch
import torchvision
from torch import Tensor, nn

from shared.networks.weights import (
    DownloadError,
    WeightMismatch,
    download,
    load_backbone_weights,
    select_backbone_weights,
    vit_shape,
)

# timm's ViT has the state dict of the published ViTs
make_vit = partial(
    timm.models.vision_transformer.VisionTransformer, img_size=32, patch_size=8, embed_dim=64, depth=2, num_heads=2
)


def make_backbone(seed: int = 0, **options) -> nn.Module:
    torch.manual_seed(seed)
    return make_vit(num_classes=0, **options).eval()


def prefixed(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {prefix + name: value for name, value in tensors.items()}


SOURCE = make_backbone(seed=1)
WEIGHTS = SOURCE.state_dict()
HEAD = {"mlp.0.weight": torch.zeros(8, 64), "last_layer.weight_v": torch.zeros(5, 8)}
OTHER = {"cls_token": torch.full((1, 1, 64), 7.0)}
LAYOUTS = {
    "flat": WEIGHTS,
    "distributed": prefixed("module.", WEIGHTS),
    "compiled": prefixed("_orig_mod.", WEIGHTS),
    "wrapped": prefixed("module.backbone.", WEIGHTS) | prefixed("module.head.", HEAD),
    "wrapped and compiled": prefixed("backbone._orig_mod.", WEIGHTS) | prefixed("head.", HEAD),
    "parts wrapped": {
        "_fsdp_wrapped_module."
        + name.replace("blocks.0.", "blocks.0._orig_mod.")
        .replace("blocks.1.", "blocks.1._fsdp_wrapped_module._checkpoint_wrapped_module.")
        .replace("mlp.", "mlp._orig_mod."): w
        for name, w in WEIGHTS.items()
    },
    "of Lightning": {"state_dict": prefixed("model.", WEIGHTS), "pytorch-lightning_version": "2.4"},
    "in another module": prefixed("module.net.model.", WEIGHTS),
    "beside a classifier": prefixed("encoder.", WEIGHTS) | {"fc.weight": torch.zeros(10, 64)},
    "first of a sequence": nn.Sequential(SOURCE, nn.Linear(64, 10)).state_dict(),
    "within the backbone": prefixed("teacher.backbone.net.", WEIGHTS) | prefixed("teacher.head.", HEAD),
    "two backbones": prefixed("student_backbone.", OTHER)
    | prefixed("teacher_backbone.", WEIGHTS)
    | prefixed("teacher_head.", HEAD),
    "a student only": prefixed("student_backbone.", WEIGHTS),
    "of DINOv2's training": {
        "model": prefixed("student.backbone.", OTHER)
        | prefixed("teacher.backbone.", WEIGHTS)
        | prefixed("teacher.dino_head.", HEAD),
        "iteration": 3,
    },
    "mask token": WEIGHTS | {"mask_token": torch.zeros(1, 64)},
    "classifier": WEIGHTS | {"head.weight": torch.zeros(10, 64), "head.bias": torch.zeros(10)},
    "part of another network": prefixed("features.", WEIGHTS) | {"top_layer.bias": torch.zeros(3)},
    "state_dict": {"state_dict": prefixed("module.", WEIGHTS), "epoch": 3},
    "model": {"model": WEIGHTS, "model_ema_decay": 0.9},
    "official, teacher": {
        "student": prefixed("module.backbone.", OTHER),
        "teacher": prefixed("backbone.", WEIGHTS) | prefixed("head.", HEAD),
        "optimizer": {"state": {}, "param_groups": []},
        "epoch": 100,
        "args": argparse.Namespace(arch="vit_small"),
        "dino_loss": {"center": torch.zeros(1, 5)},
        "fp16_scaler": {"scale": 1.0},
    },
    "official with BatchNorm": {
        "student": prefixed("module.backbone.", OTHER),
        "teacher": prefixed("module.backbone.", WEIGHTS) | prefixed("module.head.", HEAD),
    },
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layout_fills_the_whole_network(layout, tmp_path, capsys):
    torch.save(LAYOUTS[layout], tmp_path / "weights.pth")
    backbone = make_backbone()
    report = load_backbone_weights(backbone, tmp_path / "weights.pth")
    assert report.matched == report.total == len(WEIGHTS)
    torch.testing.assert_close(backbone.state_dict(), WEIGHTS)
    assert f"{len(WEIGHTS)}/{len(WEIGHTS)} entries of the network matched" in capsys.readouterr().out


@pytest.mark.parametrize("layout", ["wrapped", "wrapped and compiled", "classifier", "official, teacher"])
def test_head_entries_are_counted_apart(layout):
    assert load_backbone_weights(make_backbone(), select_backbone_weights(LAYOUTS[layout])).head_entries == 2


def test_absent_checkpoint_key_is_refused_with_the_present_ones():
    checkpoint = {"student": OTHER, "teacher": OTHER, "epoch": 1}
    with pytest.raises(WeightMismatch, match="no --checkpoint_key target; it holds student, teacher"):
        select_backbone_weights(checkpoint, checkpoint_key="target", required=True)


def test_a_key_that_is_asked_for_must_be_there():
    for checkpoint in (WEIGHTS, {"state_dict": WEIGHTS}, prefixed("teacher_backbone.", WEIGHTS)):
        with pytest.raises(WeightMismatch, match=r"no --checkpoint_key student; it holds (one network|state_dict)"):
            select_backbone_weights(checkpoint, "student", required=True)
    both = prefixed("student.", OTHER) | prefixed("teacher.", WEIGHTS)
    assert torch.equal(select_backbone_weights(both, "student", required=True).tensors["cls_token"], OTHER["cls_token"])


@pytest.mark.parametrize("contents", [[1, 2], {}, {"epoch": 3, "optimizer": {}}, {"linear": 1.0}])
def test_file_without_a_network_is_refused(contents):
    with pytest.raises(WeightMismatch):
        select_backbone_weights(contents)


def test_torchvision_vit_gives_the_same_features():
    torch.manual_seed(0)
    official = torchvision.models.VisionTransformer(32, 8, num_layers=2, num_heads=2, hidden_dim=64, mlp_dim=256).eval()
    nn.init.normal_(official.conv_proj.bias)
    images = torch.randn(2, 3, 32, 32)
    backbone = make_backbone()
    report = load_backbone_weights(backbone, select_backbone_weights(official.state_dict()))
    official.heads = nn.Identity()
    assert report.head_entries == 2
    torch.testing.assert_close(backbone(images), official(images), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["ViTModel", "ViTForImageClassification", "ViTMSNModel", "Dinov2Model", "registers"])
@pytest.mark.parametrize("file", ["model.safetensors", "memory.pth"])
def test_vits_of_transformers_give_the_same_features(kind, file, tmp_path):
    transformers = pytest.importorskip("transformers")
    kind = {"registers": "Dinov2WithRegistersModel"}.get(kind, kind)
    torch.manual_seed(0)
    network_class, of_dinov2 = getattr(transformers, kind), kind.startswith("Dinov2")
    config = network_class.config_class(
        image_size=32,
        patch_size=8,
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=256,
        layer_norm_eps=1e-6,
    )
    theirs = network_class(config).eval()
    for parameter in theirs.parameters():
        nn.init.normal_(parameter, std=0.1)
    registers = {"reg_tokens": 4, "no_embed_class": True} if "Registers" in kind else {}
    ours = make_backbone(**({"init_values": 1.0} if of_dinov2 else {}), **registers)
    theirs.save_pretrained(tmp_path)
    torch.save(theirs.state_dict(), tmp_path / "memory.pth")  # of transformers 5 under other names
    report = load_backbone_weights(ours, tmp_path / file)
    assert report.is_complete()
    images = torch.randn(2, 3, 32, 32)
    trunk = theirs.base_model if kind.startswith("ViT") else theirs
    torch.testing.assert_close(ours(images), trunk(images).last_hidden_state[:, 0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("official", [True, False], ids=["of the paper", "of timm"])
def test_dinov2_with_registers_says_its_image_size(official):
    source = make_backbone(reg_tokens=4, no_embed_class=True, init_values=1.0)
    tensors = source.state_dict()
    if official:  # a position for the class token, but none for the registers
        place = torch.randn(1, 1, 64)
        tensors |= {"pos_embed": torch.cat([place, tensors["pos_embed"]], 1), "cls_token": tensors["cls_token"] - place}
        tensors |= {"register_tokens": tensors.pop("reg_token"), "mask_token": torch.zeros(1, 64)}
    assert vit_shape(tensors).img_size == 32
    backbone = make_backbone(reg_tokens=4, no_embed_class=True, init_values=1.0)
    assert load_backbone_weights(backbone, select_backbone_weights(tensors)).is_complete()
    torch.testing.assert_close(backbone.state_dict(), source.state_dict())


def test_torchvision_convnet_loads_without_its_classifier():
    whole, backbone = torchvision.models.resnet18(num_classes=5), torchvision.models.resnet18(num_classes=5)
    backbone.fc = nn.Identity()
    report = load_backbone_weights(backbone, select_backbone_weights(whole.state_dict()))
    assert (report.matched, report.head_entries) == (120, 2)
    torch.testing.assert_close(backbone.layer4.state_dict(), whole.layer4.state_dict())
    children = nn.Sequential(*list(whole.children())[:-1])
    assert load_backbone_weights(backbone, select_backbone_weights(children.state_dict())).is_complete()


def test_names_of_the_original_xcit_are_understood():
    torch.manual_seed(0)
    xcit = timm.create_model("xcit_nano_12_p16_224", num_classes=0)
    official = {name.replace("pos_embed.", "pos_embeder."): value for name, value in xcit.state_dict().items()}
    for i in range(2):
        for kind in ("weight", "bias"):
            parts = [official.pop(f"cls_attn_blocks.{i}.attn.{part}.{kind}") for part in "qkv"]
            official[f"cls_attn_blocks.{i}.attn.qkv.{kind}"] = torch.cat(parts)
    torch.manual_seed(1)
    loaded = timm.create_model("xcit_nano_12_p16_224", num_classes=0)
    report = load_backbone_weights(loaded, select_backbone_weights(official))
    assert report.is_complete()
    torch.testing.assert_close(loaded.state_dict(), xcit.state_dict())


def without(name: str) -> dict[str, Tensor]:
    return {key: value for key, value in WEIGHTS.items() if key != name}


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        (without("norm.weight"), r"1 missing in the file: norm\.weight"),
        (WEIGHTS | {"blocks.2.norm1.weight": torch.ones(64)}, r"1 unknown to the network: blocks\.2\.norm1\.weight"),
        (WEIGHTS | {"norm.weight": torch.ones(32)}, r"1 of another shape: norm\.weight \(32,\) instead of \(64,\)"),
    ],
)
def test_partial_match_is_refused_unless_allowed(tensors, message):
    backbone = make_backbone()
    before = {name: value.clone() for name, value in backbone.state_dict().items()}
    weights = select_backbone_weights(tensors)
    with pytest.raises(WeightMismatch, match=message):
        load_backbone_weights(backbone, weights)
    torch.testing.assert_close(backbone.state_dict(), before)

    report = load_backbone_weights(backbone, weights, allow_partial=True)
    assert not report.is_complete()
    torch.testing.assert_close(backbone.state_dict()["cls_token"], WEIGHTS["cls_token"])


def test_nothing_in_common_is_refused_even_if_partial_is_allowed():
    with pytest.raises(WeightMismatch, match="0/"):
        load_backbone_weights(nn.Linear(2, 2), select_backbone_weights(WEIGHTS), allow_partial=True)
    unknown = select_backbone_weights(prefixed("visual.", without("norm.weight")))
    with pytest.raises(WeightMismatch, match=r"all names in the file begin with visual\."):
        load_backbone_weights(make_backbone(), unknown)


def test_other_resolution_of_position_embeddings_is_named():
    weights = select_backbone_weights(make_backbone(img_size=48).state_dict())
    with pytest.raises(WeightMismatch, match=r"for 48-pixel images of 3 channels, .* for 32-pixel images"):
        load_backbone_weights(make_backbone(), weights)


def test_weights_that_are_not_finite_are_refused():
    broken = WEIGHTS | {"norm.bias": torch.full((64,), float("nan"))}
    with pytest.raises(WeightMismatch, match=r"norm\.bias holds values that are not finite"):
        load_backbone_weights(make_backbone(), select_backbone_weights(broken))


# --- Downloads --------------------------------------------------------------------------------------------------------

CONTENT = bytes(range(256)) * 8192


class Handler(http.server.BaseHTTPRequestHandler):
    """``/whole`` sends CONTENT, ``/cut`` half of it under the full length, ``/unsized`` without a length."""

    def do_GET(self):
        if self.path == "/missing":
            self.send_error(404)
            return
        self.send_response(200)
        if self.path != "/unsized":
            self.send_header("Content-Length", str(len(CONTENT)))
        self.end_headers()
        self.wfile.write(CONTENT[: len(CONTENT) // 2] if self.path == "/cut" else CONTENT)

    def log_message(self, *_):
        pass


@pytest.fixture(scope="module")
def server():
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.mark.parametrize("page", ["whole", "unsized"])
def test_download_is_complete_and_verified(server, page, tmp_path):
    path = tmp_path / "folder" / "file"
    download(f"{server}/{page}", path, sha256=hashlib.sha256(CONTENT).hexdigest(), length=len(CONTENT))
    assert path.read_bytes() == CONTENT
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize(
    ("page", "expected", "message"),
    [
        ("cut", {}, "ended after"),
        ("unsized", {"length": len(CONTENT) + 1}, "ended after"),
        ("whole", {"length": len(CONTENT) - 1}, "longer than"),
        ("whole", {"sha256": "0" * 64}, "SHA-256"),
        ("missing", {}, "Not Found"),
    ],
)
def test_bad_download_leaves_nothing_and_keeps_the_old_file(server, page, expected, message, tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"old")
    with pytest.raises(DownloadError, match=message):
        download(f"{server}/{page}", path, **expected)
    assert [p.name for p in tmp_path.iterdir()] == ["file"]
    assert path.read_bytes() == b"old"


@pytest.mark.parametrize("url", ["http://127.0.0.1:9/file", "ftp://127.0.0.1/file", "file"])
def test_unreachable_address_is_named(url, tmp_path):
    with pytest.raises(DownloadError, match=url):
        download(url, tmp_path / "file", timeout_s=5)
