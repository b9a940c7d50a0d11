"""Exported files compute what the network does, say how they are fed, and follow the umask; else they are not kept."""

import importlib
import json
import os
import runpy
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import safetensors
import timm
import torch
import torchvision
from PIL import Image
from torch import nn

from dino.hub import build_backbone
from shared.images.decode import read_image
from shared.images.loading import EvalTransform
from shared.networks.export import (
    ExportMismatch,
    check_outputs,
    export_backbone,
    timm_arguments,
    write_checked,
)
from shared.networks.pretrained import backbone_of
from shared.networks.weights import safe_load
from tests.networks import card_of, small_network

COMMANDS = {  # flags of <folder>/export.py for a file of the small network, and what it writes
    "dino": (
        "--arch vit_tiny --patch_size 8 --pretrained_weights FILE --image_size 16 24",
        "vit_tiny.safetensors vit_tiny_timm.pth vit_tiny.onnx vit_tiny_transformers",
    ),
    "msn": (
        "--model_name deit_tiny --pretrained FILE --image_size 24",
        "deit_tiny.safetensors deit_tiny_timm.pth deit_tiny.onnx deit_tiny_transformers",
    ),
    "swav": (
        "--arch test_resnet --pretrained FILE --image_size 32 32",
        "test_resnet.safetensors test_resnet_timm.pth test_resnet.onnx",
    ),
    "paws": (
        "--model_name wide_resnet10w1 --pretrained FILE --image_size 32 32",
        "wide_resnet10w1.safetensors wide_resnet10w1.onnx",
    ),
    "xcit": (
        "--model xcit_nano_12_p16 --pretrained FILE --image_size 32",
        "xcit_nano_12_p16.safetensors xcit_nano_12_p16_timm.pth xcit_nano_12_p16.onnx",
    ),
    "resmlp": ("--pretrained_weights FILE", "resmlp.safetensors resmlp_timm.pth resmlp.onnx"),
}


@pytest.fixture(scope="module", params=COMMANDS)
def exported(request, tmp_path_factory):
    """Name of a folder, its small network, and the folder with the files that its export script makes of it."""
    method, folder = request.param, tmp_path_factory.mktemp(request.param)
    network = small_network(method)
    torch.save(backbone_of(network).state_dict(), folder / "weights.pth")
    flags, _ = COMMANDS[method]
    words = ["export.py", *flags.replace("FILE", str(folder / "weights.pth")).split(), "--output_dir"]
    umask = os.umask(0o027)
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("sys.argv", [*words, str(folder / "out")])
            importlib.import_module(f"{method}.export").main()
    finally:
        os.umask(umask)
    return method, network, folder / "out"


def test_the_files_are_there_and_follow_the_umask(exported):
    method, _, folder = exported
    _, names = COMMANDS[method]
    card = f"{names.split('.')[0]}_card.md"
    assert {path.name for path in folder.iterdir()} == {*names.split(), card}
    assert ("v2.Normalize" in (folder / card).read_text()) == (method != "dino")  # which has one channel here
    assert all(path.stat().st_mode & 0o777 == 0o640 for path in folder.rglob("*.*") if path.is_file())


def test_headers_say_how_the_network_is_built_and_fed(exported):
    method, network, folder = exported
    card, (onnx_file,) = card_of(method), folder.glob("*.onnx")
    session = onnxruntime.InferenceSession(str(onnx_file), providers=["CPUExecutionProvider"])
    onnx.checker.check_model(str(onnx_file))
    with safetensors.safe_open(onnx_file.with_suffix(".safetensors"), "pt") as file:
        header = file.metadata()
    assert header == session.get_modelmeta().custom_metadata_map
    size, in_chans = json.loads(header["image_size"]), json.loads(header["in_chans"])
    expected = EvalTransform(mean=card.mean, std=card.std, in_chans=in_chans)  # one channel takes the averages
    for name in ("mean", "std"):
        assert json.loads(header[name]) == pytest.approx(getattr(expected, name).flatten().tolist())
    is_free = method != "resmlp"  # whose cross-patch layers are made for one size
    assert session.get_inputs()[0].shape[1:] == [in_chans, *(["height", "width"] if is_free else size)]
    for batch_size, *image_size in ((1, *size), (4, *size), *([(2, 64, 32), (2, 16, 48)] if is_free else ())):
        images = torch.randn(batch_size, in_chans, *image_size)
        (features,) = session.run(["features"], {"images": images.numpy()})
        torch.testing.assert_close(torch.from_numpy(features), network(images), rtol=1e-3, atol=1e-4)


TIMM = {
    "dino": ("vit_tiny_patch16_224", {"patch_size": 8, "img_size": 16, "in_chans": 1}),
    "msn": ("vit_tiny_patch16_224", {"patch_size": 8, "img_size": 16}),
    "swav": ("test_resnet", {}),
    "xcit": ("xcit_nano_12_p16_224", {}),
    "resmlp": ("resmlp_12_224", {"img_size": 32}),
}


def test_timm_reads_the_state_dict_and_the_safetensors_file(exported):
    method, network, folder = exported
    if method not in TIMM:
        return
    name, options = TIMM[method]
    side = options.get("img_size", 32)
    images = torch.randn(2, options.get("in_chans", 3), side, side)
    for file in (*folder.glob("*_timm.pth"), *folder.glob("*.safetensors")):
        twin = timm.create_model(name, num_classes=0, checkpoint_path=str(file), **options).eval()
        torch.testing.assert_close(twin(images), network(images), rtol=1e-3, atol=1e-4)


def test_transformers_opens_the_folder_of_a_vit_with_its_image_processor(exported):
    method, network, folder = exported
    transformers = pytest.importorskip("transformers")
    if method not in ("dino", "msn"):
        assert not list(folder.glob("*_transformers"))
        return
    (file,) = folder.glob("*_transformers")
    model = transformers.AutoModel.from_pretrained(file).eval()
    assert type(model).__name__ == {"dino": "ViTModel", "msn": "ViTMSNModel"}[method]
    images = torch.randn(2, model.config.num_channels, 16, 16)
    torch.testing.assert_close(model(images).last_hidden_state[:, 0], network(images), rtol=1e-4, atol=1e-5)
    processor = json.loads((file / "preprocessor_config.json").read_text())
    assert (
        processor["crop_size"] == {"height": 16, "width": 16}
        and len(processor["image_std"]) == model.config.num_channels
    )


def test_networks_of_torchvision_get_a_file_for_it(tmp_path):
    backbone, _ = build_backbone("squeezenet1_1")
    files = export_backbone(card_of("dino"), backbone.eval(), "squeezenet1_1", tmp_path, [64])
    assert files.keys() == {"safetensors", "torchvision", "onnx", "card"}  # timm does not have it
    plain = torchvision.models.squeezenet1_1()
    missing = plain.load_state_dict(safe_load(files["torchvision"]), strict=False)
    assert (missing.missing_keys, missing.unexpected_keys) == (["classifier.1.weight", "classifier.1.bias"], [])
    torch.testing.assert_close(plain.features[0].weight, backbone.features[0].weight)


# --- Mistakes ---------------------------------------------------------------------------------------------------------


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


def test_file_that_computes_something_else_is_not_kept(backbone, tmp_path):
    path = tmp_path / "network.file"
    path.write_bytes(b"old")
    with pytest.raises(ExportMismatch, match=r"network.file differs"):
        write_checked(path, lambda file: file.touch(), lambda file: Shifted(backbone, 0.01), backbone, [32, 32])
    assert [p.name for p in tmp_path.iterdir()] == ["network.file"]
    assert path.read_bytes() == b"old"


def test_network_of_another_shape_is_not_taken_for_that_of_timm(backbone):
    assert timm_arguments("resnet18", backbone, {"in_chans": 3}) is None  # it has a classifier


RUNS = {  # flags of <folder>/export.py, and those of the run that tell the size of its images
    "swav": ("--pretrained FILE", {"arch": "test_resnet", "size_crops": [48, 24]}, {}),
    "xcit": ("--pretrained FILE --model xcit_nano_12_p16", {"model": "xcit_nano_12_p16", "input_size": 48}, {}),
    "paws": (
        "--pretrained FILE --model_name wide_resnet10w1",
        {"dataset": "cifar10", "image_size": 48},
        {"mean": [0.4914, 0.4822, 0.4465], "std": [0.2023, 0.1994, 0.2010]},
    ),
}


@pytest.mark.parametrize("method", RUNS)
def test_files_of_a_run_state_how_its_images_were_seen(method, tmp_path, monkeypatch):
    flags, trained_with, stated = RUNS[method]
    network, file = small_network(method), tmp_path / "checkpoint.pth"
    torch.save({card_of(method).checkpoint_key: network.state_dict(), "args": trained_with}, file)
    (tmp_path / "metrics.jsonl").write_text('{"step": 9, "knn_top1": 3.0}\n{"step": 18, "knn_top1": 12.5}\n')
    script = importlib.import_module(f"{method}.export")
    words = [*flags.replace("FILE", str(file)).split(), "--output_dir", str(tmp_path / "out")]
    files = script.export(script.get_args_parser().parse_args(words))
    with safetensors.safe_open(files["safetensors"], "pt") as opened:
        header = {key: json.loads(value) for key, value in opened.metadata().items() if value[0] == "["}
    assert header["image_size"] == [48, 48]
    page = files["card"].read_text()
    for part in (f"exported by {method}", "license: other", "--image_size 48", "torch 2.", "| knn_top1 | 12.5 | 18 |"):
        assert part in page.replace("size_crops [48, 24]", "image_size 48").replace("input_size", "image_size"), part
    assert stated.items() <= header.items() and {"mean", "std"} <= header.keys()
    monkeypatch.chdir(tmp_path / "out")
    photo = np.random.default_rng(0).integers(256, size=(90, 70, 3), dtype=np.uint8)
    Image.fromarray(photo).save("photo.jpg", quality=95)
    Path("use.py").write_text(page.partition("```python")[2].partition("```")[0])
    used = runpy.run_path("use.py")
    centre = EvalTransform(55, 48, header["mean"], header["std"], interpolation=card_of(method).interpolation)
    torch.testing.assert_close(used["images"][0], centre(read_image("photo.jpg").decode()), rtol=0, atol=0.1)
    torch.testing.assert_close(torch.from_numpy(used["features"]), network(used["images"]), rtol=1e-3, atol=1e-4)
