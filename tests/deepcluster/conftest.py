"""Images and networks small enough for a laptop."""

import numpy as np
import pytest
import torch
from PIL import Image

from deepcluster import networks
from deepcluster.backbones import build_network, official_names
from deepcluster.networks import new_top_layer


@pytest.fixture(scope="session")
def images(tmp_path_factory):
    """24 small images in three class folders: coarse blocks around a colour of the class."""
    folder = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for i in range(24):
        path = folder / f"class{i % 3}" / f"{i:02d}.png"
        path.parent.mkdir(exist_ok=True)
        colour = np.array([40, 40, 40]) + 150 * np.eye(3)[i % 3]
        blocks = np.clip(rng.normal(colour, 40, size=(5, 6, 3)), 0, 255).astype(np.uint8)
        Image.fromarray(blocks.repeat(8, axis=0).repeat(8, axis=1)).save(path)
    return folder


@pytest.fixture
def small_layers(monkeypatch):
    """Networks of the paper with fully connected layers of 32 instead of 4,096 units."""
    monkeypatch.setattr(networks, "HIDDEN", 32)


@pytest.fixture
def checkpoint(small_layers, tmp_path):
    """A file as the official code writes it, of an AlexNet for images of 64 pixels."""
    return write_checkpoint(tmp_path / "checkpoint.pth.tar")


def write_checkpoint(path, arch="alexnet", sobel=True, clusters=7, img_size=64):
    torch.manual_seed(0)
    network = build_network(arch, sobel, img_size=img_size)
    weights = official_names(network.state_dict())
    weights |= {f"top_layer.{k}": v for k, v in new_top_layer(network.dim, clusters).state_dict().items()}
    state = {"epoch": 3, "arch": arch, "state_dict": weights, "optimizer": {}, "args": {"crop_size": img_size}}
    torch.save(state, path)
    return path
