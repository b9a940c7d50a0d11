"""The run of one folder is a network for the others that can take it, for torch.hub and for one line of Python."""

import functools
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from shared.networks.own_run import folder_of, load_run
from shared.networks.weights import WeightMismatch
from tests.networks import card_of

ROOT = Path(__file__).resolve().parents[3]


def prefixed(prefix: str, tensors: dict) -> dict:
    return {prefix + name: value for name, value in tensors.items()}


def head(*names: str) -> dict:
    return {name: torch.ones(3, 2) for name in names}


@functools.cache
def backbone(kind: str) -> nn.Module:
    """A ViT-Ti/16 or a ResNet-18 for images of 32 pixels."""
    torch.manual_seed(0)
    options = {"patch_size": 16, "img_size": 32} if kind == "vit" else {}
    return (
        card_of("dino").build({"vit": "vit_tiny", "resnet": "resnet18"}[kind], **options).eval().requires_grad_(False)
    )


def write_run(folder: Path, method: str, kind: str) -> Path:
    """What a training of this method leaves, around the same network."""
    state, name = backbone(kind).state_dict(), "resnet18" if kind == "resnet" else "deit_tiny"
    other = {key: value + 1 for key, value in state.items()}
    file, contents = {
        "dino": (
            "checkpoint.pth",
            {
                "student": prefixed("backbone.", other),
                "teacher": prefixed("backbone.", state) | prefixed("head.", head("mlp.0.weight")),
                "args": {"arch": name.replace("deit", "vit"), "patch_size": 16, "global_crop_size": 32},
            },
        ),
        "msn": (
            "msn-latest.pth.tar",
            {
                "encoder": other,
                "target_encoder": state | head("fc.fc1.weight"),
                "prototypes": torch.ones(4, 8),
                "args": {"model_name": name, "patch_size": None, "rand_size": 32},
            },
        ),
        "swav": (
            "checkpoint.pth.tar",
            {
                "state_dict": prefixed("module.backbone.", state) | head("module.prototypes.weight"),
                "args": {"arch": name if kind == "resnet" else "vit_tiny_patch16_224", "size_crops": [32, 16]},
            },
        ),
        "paws": (
            "paws-latest.pth.tar",
            {
                "encoder": prefixed("backbone.", state) | head("fc.fc1.weight", "pred.fc1.weight"),
                "args": {"model_name": name if kind == "resnet" else "vit_tiny_patch16_224", "image_size": 32},
            },
        ),
        "deepcluster": (
            "checkpoint.pth.tar",
            {
                "arch": name,
                "state_dict": prefixed("features.module.", state) | head("top_layer.weight"),
                "args": {"arch": name, "crop_size": 32},
            },
        ),
    }[method]
    folder.mkdir()
    torch.save(contents, folder / file)
    return folder


PAIRS = [("vit", by, other) for by in ("dino", "msn", "swav", "paws") for other in ("dino", "msn", "swav", "paws")] + [
    ("resnet", by, other)
    for by in ("dino", "swav", "paws", "deepcluster")
    for other in ("dino", "swav", "paws", "deepcluster")
]


@pytest.mark.parametrize(("kind", "trained_by", "taken_by"), PAIRS, ids=lambda value: value)
def test_a_run_fills_the_same_network_of_another_folder(kind, trained_by, taken_by, tmp_path, capsys):
    run, images = write_run(tmp_path / "run", trained_by, kind), torch.randn(2, 3, 32, 32)
    network = load_run(run, taken_by)
    torch.testing.assert_close(network(images), backbone(kind)(images), rtol=1e-5, atol=1e-5)
    assert "entries of the network matched" in capsys.readouterr().out


def test_a_run_says_which_folder_trained_it_unless_two_could_have(tmp_path):
    for kind, method in (("vit", "dino"), ("vit", "msn"), ("resnet", "paws")):
        assert folder_of(write_run(tmp_path / method, method, kind)) == method
    torch.save({"model": {"x": torch.ones(1)}, "args": {"model": "resmlp_12"}}, tmp_path / "mlp.pth")
    assert folder_of(tmp_path / "mlp.pth") == "resmlp"  # those with classifiers differ in the names of networks
    assert folder_of("msn_vits16") == "msn" and folder_of("swav_resnet50") == "swav"
    for arch, method in (
        ("flexivit_micro", "flexivit"),
        ("navit_micro", "navit"),
        ("regnet_mini", "seer"),
        ("vit_micro", "vit22b"),
    ):
        torch.save({"model": {"x": torch.ones(1)}, "args": {"arch": arch}}, tmp_path / "run.pth")
        assert folder_of(tmp_path / "run.pth") == method
    with pytest.raises(ValueError, match="can be of deepcluster or swav: say the folder"):
        folder_of(write_run(tmp_path / "run", "swav", "resnet"))
    with pytest.raises(ValueError, match=r"is no run or file below .*, nor the name of a release"):
        folder_of(tmp_path / "nowhere")


def test_networks_that_do_not_fit_are_one_sentence(tmp_path):
    run = write_run(tmp_path / "run", "dino", "vit")
    with pytest.raises(WeightMismatch, match=r"looks like a vit_tiny/16 .* the network is a vit_small/16"):
        load_run(run, "dino", arch="vit_small")
    with pytest.raises(WeightMismatch, match=r"vit_tiny/16 .* the network is a vit_small/8"):
        load_run(run, "swav", arch="vit_small_patch8_224")
    file = write_run(tmp_path / "sobel", "deepcluster", "resnet") / "checkpoint.pth.tar"
    checkpoint = torch.load(file, weights_only=True)
    checkpoint["state_dict"] |= {"sobel.0.weight": torch.ones(1, 3, 1, 1)}
    torch.save(checkpoint, file)
    with pytest.raises(WeightMismatch, match="looks at Sobel gradients, not at colours"):
        load_run(file, "swav")


HUB = """
import sys, torch
repository, run, features = sys.argv[1:]
expected = torch.load(features, weights_only=True)
network = torch.hub.load(repository, "run", run, source="local")
torch.testing.assert_close(network(expected["images"]), expected["features"])
try:
    torch.hub.load(repository, "dino_vits16", source="local", pretrained=run)
except ValueError as error:
    assert "looks like a vit_tiny/16" in str(error)
assert not any(name.partition(".")[0] in ("shared", "dino") for name in sys.modules)
"""


def test_torch_hub_loads_a_run_in_a_process_that_knows_nothing_of_it(tmp_path):
    run, images = write_run(tmp_path / "run", "dino", "vit"), torch.randn(2, 3, 32, 32)
    torch.save({"images": images, "features": backbone("vit")(images)}, tmp_path / "features.pth")
    words = [sys.executable, "-c", HUB, str(ROOT), str(run), str(tmp_path / "features.pth")]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
