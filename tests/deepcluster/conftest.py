"""Images and networks small enough for a laptop."""

import pytest

from deepcluster import convnets
from tests.deepcluster import tiny
from tests.pictures import write_images


@pytest.fixture(scope="session")
def images(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp("images"))


@pytest.fixture
def small_layers(monkeypatch):
    """Networks of the paper with fully connected layers of 32 instead of 4,096 units."""
    monkeypatch.setattr(convnets, "HIDDEN", 32)


@pytest.fixture
def checkpoint(small_layers, tmp_path):
    """A file as the official code writes it, of an AlexNet for images of 64 pixels."""
    return tiny.write_checkpoint(tmp_path / "checkpoint.pth.tar")
