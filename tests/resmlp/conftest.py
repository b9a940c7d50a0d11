import pytest

from tests.reliability.runs import write_images
from tests.resmlp.training_runs import train


@pytest.fixture(scope="session")
def images(tmp_path_factory):
    """24 small noise images in three class folders, of which one in ten is for evaluation."""
    return write_images(tmp_path_factory.mktemp("resmlp") / "images")


EVERYTHING = ("--epochs", 2, "--drop-path", 0.2, "--saveckp_steps", 1, "--clip-grad", 1.0, "--lr", 0.05)


@pytest.fixture(scope="session")
def finished(images, tmp_path_factory):
    """A run of two epochs with everything on."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    train(folder, "--data_path", images, *EVERYTHING, "--pictures", "on")
    return folder
