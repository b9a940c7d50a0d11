"""Exported files compute what the torch network computes."""

import pytest
import torch
import torchvision
from torch import nn

from shared.networks.export import export_backbone
from shared.networks.weights import safe_load
from swav.export import main
from swav.hub import CARD, build_network, load_backbone
from tests.swav.tiny import make_network, training_checkpoint, with_random_statistics


@pytest.mark.slow
def test_resnet50_goes_to_torchvision_and_timm(tmp_path):
    torch.manual_seed(0)
    network, images = with_random_statistics(build_network("resnet50")), torch.randn(2, 3, 64, 64)
    files = export_backbone(CARD, network, "resnet50", tmp_path, [64, 64])
    assert sorted(files) == ["onnx", "safetensors", "timm", "torchvision"]
    plain = torchvision.models.resnet50()
    missing = plain.load_state_dict(safe_load(files["torchvision"]), strict=False)
    assert (missing.missing_keys, missing.unexpected_keys) == (["fc.weight", "fc.bias"], [])
    plain.fc = nn.Identity()
    torch.testing.assert_close(plain.eval()(images), network(images), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(load_backbone("resnet50", files["safetensors"])(images), network(images))


def test_command_exports_the_trunk_of_a_training_checkpoint(tmp_path, monkeypatch, capsys):
    source = make_network("test_resnet")
    torch.save(training_checkpoint(source), tmp_path / "checkpoint.pth.tar")
    command = f"export.py --arch test_resnet --pretrained {tmp_path / 'checkpoint.pth.tar'} --image_size 32 32"
    monkeypatch.setattr("sys.argv", [*command.split(), "--output_dir", str(tmp_path / "out")])
    main()
    assert capsys.readouterr().out.count("equal to the torch network") == 3
    files = ["test_resnet.onnx", "test_resnet.safetensors", "test_resnet_timm.pth"]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == files
    images = torch.randn(2, 3, 32, 32)
    network = load_backbone("test_resnet", tmp_path / "out/test_resnet.safetensors")
    torch.testing.assert_close(network(images), source.forward_backbone(images))
