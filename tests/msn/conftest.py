"""Images, networks and one trained run that many tests look at."""

from pathlib import Path

import pytest

from tests.msn import tiny
from tests.pictures import write_images


@pytest.fixture(autouse=True)
def small_networks():
    with tiny.small_networks():
        yield


@pytest.fixture(scope="session")
def images(tmp_path_factory) -> Path:
    """24 images in three classes: three steps of 8."""
    return write_images(tmp_path_factory.mktemp("data") / "images")


@pytest.fixture(scope="session")
def run(images, tmp_path_factory) -> Path:
    """The folder of a finished run of two epochs that has kept both."""
    folder = tmp_path_factory.mktemp("run")
    with tiny.small_networks():
        tiny.train(folder, "--data_path", images, "--epochs", 2, "--checkpoint_freq", 1, "--drop_path_rate", 0.2)
    return folder
