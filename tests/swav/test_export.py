"""Exported files compute what the torch network computes."""

import numpy as np
import onnx
import onnxruntime
import timm
import torch
import torchvision
from torch import nn

from shared.networks.weights import safe_load
from swav.export import export, main
from swav.hub import build_network, load_backbone
from tests.swav.official_layouts import build_small, make_network, training_checkpoint, with_random_statistics

IMAGES = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))


def test_resnet50_goes_to_torchvision_and_timm(tmp_path):
    torch.manual_seed(0)
    network = with_random_statistics(build_network("resnet50"))
    files = export(network, "resnet50", tmp_path, [64, 64])
    assert sorted(files) == ["onnx", "safetensors", "timm", "torchvision"]
    expected = network(IMAGES)

    plain = torchvision.models.resnet50()
    missing = plain.load_state_dict(safe_load(files["torchvision"]), strict=False)
    assert (missing.missing_keys, missing.unexpected_keys) == (["fc.weight", "fc.bias"], [])
    plain.fc = nn.Identity()
    torch.testing.assert_close(plain.eval()(IMAGES), expected, rtol=1e-4, atol=1e-4)

    twin = timm.create_model("resnet50", num_classes=0, checkpoint_path=str(files["timm"])).eval()
    torch.testing.assert_close(twin(IMAGES), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(load_backbone("resnet50", files["safetensors"])(IMAGES), expected)

    onnx.checker.check_model(str(files["onnx"]))
    session = onnxruntime.InferenceSession(str(files["onnx"]), providers=["CPUExecutionProvider"])
    for images in (IMAGES, IMAGES[:1]):
        (features,) = session.run(["features"], {"images": images.numpy()})
        np.testing.assert_allclose(features, network(images).numpy(), rtol=1e-3, atol=1e-4)


def test_a_network_of_timm_alone_is_exported(tmp_path):
    files = export(load_backbone("test_resnet", "random"), "test_resnet", tmp_path, [64, 64])
    assert set(files) == {"safetensors", "onnx", "timm"}
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(p.name for p in files.values())


def test_network_that_no_library_has_is_exported_without_them(tmp_path, monkeypatch, capsys):
    build_small(monkeypatch)
    network = make_network(output_dim=0, hidden_mlp=0, nmb_prototypes=0, normalize=False, in_chans=1)
    files = export(network, "resnet50", tmp_path, [48, 32])
    assert sorted(files) == ["onnx", "safetensors"]
    assert "no file for torchvision and timm" in capsys.readouterr().out


def test_command_exports_a_training_checkpoint(tmp_path, monkeypatch, capsys):
    torch.save(training_checkpoint(make_network("resnet18")), tmp_path / "checkpoint.pth.tar")
    command = f"export.py --arch resnet18 --pretrained {tmp_path / 'checkpoint.pth.tar'} --image_size 64 64"
    monkeypatch.setattr("sys.argv", [*command.split(), "--output_dir", str(tmp_path / "out")])
    main()
    assert capsys.readouterr().out.count("equal to the torch network") == 4
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        "resnet18.onnx",
        "resnet18.safetensors",
        "resnet18_timm.pth",
        "resnet18_torchvision.pth",
    ]
