import pytest

from tests.reliability.runs import write_images
from tests.xcit.training_runs import shrink_networks
from xcit.cross_covariance_transformer import SIZES


@pytest.fixture(scope="session")
def images(tmp_path_factory):
    """24 small noise images in three class folders: three steps of 8; one in ten of them is for evaluation."""
    return write_images(tmp_path_factory.mktemp("xcit") / "images")


@pytest.fixture
def small_networks(monkeypatch):
    """The nano networks have 40 thousand parameters, for tests that are not about them."""
    monkeypatch.setitem(SIZES, "nano_12", SIZES["nano_12"])  # what is put back after the test
    shrink_networks()
