"""Exported files compute what the torch network computes, or are not kept."""

import json

import numpy as np
import onnx
import onnxruntime
import pytest
import timm
import torch
from torch import nn

from dino.export import export, main
from dino.hub import build_backbone
from shared.networks.export import timm_arguments
from shared.networks.weights import load_backbone_weights, safe_load


def make_backbone(arch: str, seed: int = 0, **options) -> nn.Module:
    torch.manual_seed(seed)
    backbone, _ = build_backbone(arch, **options)
    return backbone.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A ViT for images of one channel and its files."""
    backbone = make_backbone("vit_tiny", patch_size=8, img_size=24, in_chans=1)
    folder = tmp_path_factory.mktemp("export")
    return backbone, export(backbone, "vit_tiny", folder, image_size=[24, 40])


def test_safetensors_fill_the_network_again(exported):
    backbone, files = exported
    other = make_backbone("vit_tiny", seed=1, patch_size=8, img_size=24, in_chans=1)
    load_backbone_weights(other, files["safetensors"])
    torch.testing.assert_close(other.state_dict(), backbone.state_dict())
    header_bytes = files["safetensors"].read_bytes()[8:400]
    metadata, _ = json.JSONDecoder().raw_decode(header_bytes[header_bytes.index(b"__metadata__") + 14 :].decode())
    assert metadata["arch"] == "vit_tiny"
    assert metadata["img_size"] == "24"


def test_timm_gives_the_same_features(exported):
    backbone, files = exported
    twin = timm.create_model("vit_tiny_patch16_224", patch_size=8, img_size=24, in_chans=1, num_classes=0)
    twin.load_state_dict(safe_load(files["timm"]))
    images = torch.randn(2, 1, 24, 24)
    torch.testing.assert_close(twin.eval()(images), backbone(images), rtol=1e-4, atol=1e-5)


def test_onnx_takes_any_batch_of_its_image_size(exported):
    backbone, files = exported
    onnx.checker.check_model(str(files["onnx"]))
    session = onnxruntime.InferenceSession(str(files["onnx"]), providers=["CPUExecutionProvider"])
    for batch_size in (1, 2, 5):
        images = torch.randn(batch_size, 1, 24, 40)  # positions are interpolated
        (features,) = session.run(["features"], {"images": images.numpy()})
        np.testing.assert_allclose(features, backbone(images).numpy(), rtol=1e-3, atol=1e-4)


def test_other_networks_are_exported(tmp_path):
    files = export(make_backbone("squeezenet1_1"), "squeezenet1_1", tmp_path, image_size=[64, 64])
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(p.name for p in files.values())
    assert "timm" not in files  # which does not have this network


def test_network_of_another_shape_is_not_taken_for_that_of_timm():
    backbone = make_backbone("resnet18")
    backbone.layer4 = nn.Identity()
    assert timm_arguments("resnet18", backbone, {"in_chans": 3}) is None


def test_command_exports_a_training_checkpoint(tmp_path, monkeypatch, capsys):
    backbone = make_backbone("vit_tiny", patch_size=8, img_size=16)
    teacher = {f"backbone.{name}": value for name, value in backbone.state_dict().items()}
    torch.save({"teacher": teacher, "student": teacher}, tmp_path / "checkpoint.pth")
    command = f"export.py --arch vit_tiny --patch_size 8 --pretrained_weights {tmp_path / 'checkpoint.pth'}"
    monkeypatch.setattr("sys.argv", [*command.split(), "--output_dir", str(tmp_path / "out")])
    main()
    assert capsys.readouterr().out.count("equal to the torch network") == 3
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        "vit_tiny.onnx",
        "vit_tiny.safetensors",
        "vit_tiny_timm.pth",
    ]
