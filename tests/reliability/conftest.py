from pathlib import Path

import pytest

from tests.reliability.runs import Run, write_images


def pytest_collection_modifyitems(items):
    """Every test here starts and kills training processes: they belong to `make test-slow`."""
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.slow)


@pytest.fixture(scope="session")
def images(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp("data") / "images")


@pytest.fixture(scope="session")
def uninterrupted(images, tmp_path_factory):
    """Output folder of a run that nothing has disturbed."""
    folder = tmp_path_factory.mktemp("uninterrupted") / "run"
    Run(folder, "--data_path", images).assert_ends()
    return folder
