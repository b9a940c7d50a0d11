import pytest

from tests.xcit.tiny import shrink_networks, train
from xcit.cross_covariance_transformer import SIZES


@pytest.fixture
def small_networks(monkeypatch):
    """The nano networks have 40 thousand parameters, for tests that are not about them."""
    monkeypatch.setitem(SIZES, "nano_12", SIZES["nano_12"])  # what is put back after the test
    shrink_networks()


@pytest.fixture(scope="session")
def finished(images, tmp_path_factory):
    """A run of two epochs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(SIZES, "nano_12", SIZES["nano_12"])
        shrink_networks()
        folder = tmp_path_factory.mktemp("finished") / "run"
        train(folder, "--data_path", images)
    return folder
