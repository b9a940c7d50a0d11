import pytest

from tests.resmlp.tiny import train


@pytest.fixture(scope="session")
def finished(images, tmp_path_factory):
    """A run of two epochs."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    train(folder, "--data_path", images)
    return folder
