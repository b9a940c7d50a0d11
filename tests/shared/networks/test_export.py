"""A file whose network computes something else is an error, and not kept."""

import pytest
import torch
import torchvision
from torch import nn

from shared.networks.export import ExportMismatch, check_outputs, export_onnx, export_safetensors, export_state_dict


class Shifted(nn.Module):
    def __init__(self, backbone: nn.Module, shift: float):
        super().__init__()
        self.backbone, self.shift = backbone, shift

    def forward(self, images):
        return self.backbone(images) + self.shift


@pytest.fixture(scope="module")
def backbone():
    torch.manual_seed(0)
    return torchvision.models.resnet18(num_classes=8).eval().requires_grad_(False)


@pytest.mark.parametrize("shift", [0.01, float("nan")])
def test_difference_is_an_error(shift, backbone):
    with pytest.raises(ExportMismatch, match="file differs"):
        check_outputs("file", Shifted(backbone, shift), backbone, [32, 32])


@pytest.mark.parametrize("kind", ["safetensors", "state_dict", "onnx"])
def test_file_that_computes_something_else_is_not_kept(kind, backbone, tmp_path):
    path = tmp_path / "network.file"
    path.write_bytes(b"old")
    other = Shifted(backbone, 0.01).eval()
    with pytest.raises(ExportMismatch, match=r"network.file differs"):
        if kind == "safetensors":
            export_safetensors(backbone, path, [32, 32], {"arch": "resnet18"}, lambda _: other)
        elif kind == "state_dict":
            export_state_dict(backbone, path, [32, 32], lambda _: other)
        else:
            export_onnx(other, path, backbone, [32, 32])
    assert [p.name for p in tmp_path.iterdir()] == ["network.file"]
    assert path.read_bytes() == b"old"
