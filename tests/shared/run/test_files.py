"""Files that appear when they are complete."""

import resource

import pytest
import safetensors.torch
import torch

from shared.run.files import atomic_file

WRITERS = {"torch": torch.save, "safetensors": safetensors.torch.save_file}


@pytest.fixture
def no_room():
    """No file of this process can be larger than 10,000 bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("library", WRITERS)
def test_a_file_that_cannot_be_written_is_an_error_of_the_disk_whoever_writes(library, no_room, tmp_path):
    """Both libraries raise errors of their own, which ended a command with a traceback."""
    with pytest.raises(OSError, match=r"could not write .*/file: "), atomic_file(tmp_path / "file") as temporary:
        WRITERS[library]({"weight": torch.zeros(100_000)}, temporary)
    assert not list(tmp_path.iterdir())


def test_other_errors_stay_what_they_are(tmp_path):
    with pytest.raises(RuntimeError, match="a mistake"), atomic_file(tmp_path / "file"):
        raise RuntimeError("a mistake")
