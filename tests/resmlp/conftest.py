import pytest

from tests.resmlp.tiny import train


@pytest.fixture(scope="session")
def finished(images, tmp_path_factory):
    """A run of two epochs with pictures."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    train(folder, "--data_path", images, "--pictures", "on")
    return folder
