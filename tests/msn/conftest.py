"""Images, networks and one trained run that many tests look at."""

from pathlib import Path

import pytest

from tests.msn import runs


@pytest.fixture(autouse=True)
def small_networks():
    with runs.small_networks():
        yield


@pytest.fixture(scope="session")
def images(tmp_path_factory) -> Path:
    """24 images in three classes: three steps of 8."""
    return runs.write_images(tmp_path_factory.mktemp("data") / "images")


@pytest.fixture(scope="session")
def run(images, tmp_path_factory) -> Path:
    """The folder of a finished run of two epochs that has saved after every step and kept every epoch."""
    folder = tmp_path_factory.mktemp("run")
    flags = ("--epochs", 2, "--checkpoint_freq", 1, "--saveckp_steps", 1, "--drop_path_rate", 0.2)
    with runs.small_networks():
        runs.train(folder, "--data_path", images, *flags)
    return folder
