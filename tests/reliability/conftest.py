import pytest

from tests.reliability.runs import Run, write_images


@pytest.fixture(scope="session")
def images(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp("data") / "images")


@pytest.fixture(scope="session")
def uninterrupted(images, tmp_path_factory):
    """Output folder of a run that nothing has disturbed."""
    folder = tmp_path_factory.mktemp("uninterrupted") / "run"
    Run(folder, "--data_path", images).assert_ends()
    return folder
