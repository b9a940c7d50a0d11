import pytest

from resmlp.resmlp_models import ARCHITECTURES
from tests.reliability.runs import write_images
from tests.resmlp.training_runs import shrink_networks, train


@pytest.fixture(scope="session")
def images(tmp_path_factory):
    """24 small noise images in three class folders, of which one in ten is for evaluation."""
    return write_images(tmp_path_factory.mktemp("resmlp") / "images")


@pytest.fixture
def small_networks(monkeypatch):
    """ResMLP-S12 has 5 thousand parameters, for tests that are not about it."""
    monkeypatch.setitem(ARCHITECTURES, "resmlp_12", ARCHITECTURES["resmlp_12"])  # what is put back after the test
    shrink_networks()


EVERYTHING = ("--epochs", 2, "--drop-path", 0.2, "--saveckp_steps", 1, "--clip-grad", 1.0, "--lr", 0.05)


@pytest.fixture(scope="session")
def finished(images, tmp_path_factory):
    """A run of two epochs with everything on."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(ARCHITECTURES, "resmlp_12", ARCHITECTURES["resmlp_12"])
        shrink_networks()
        folder = tmp_path_factory.mktemp("finished") / "run"
        train(folder, "--data_path", images, *EVERYTHING, "--pictures", "on")
    return folder
