from pathlib import Path

import pytest

from tests.reliability.runs import Run

FAST = ("test_files", "test_kill", "test_save", "test_signals", "test_silent_degradation", "test_trainings")


def pytest_collection_modifyitems(items):
    """Tests here start and kill training processes: files that take minutes belong to `make test-slow` as a whole."""
    for item in items:
        if Path(__file__).parent in item.path.parents and item.path.stem not in FAST:
            item.add_marker(pytest.mark.slow)


@pytest.fixture(scope="session")
def uninterrupted(images, tmp_path_factory):
    """Output folder of a run that nothing has disturbed."""
    folder = tmp_path_factory.mktemp("uninterrupted") / "run"
    Run(folder, "--data_path", images).assert_ends()
    return folder
