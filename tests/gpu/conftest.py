"""These tests need one GPU and are skipped without: `pytest tests/gpu`."""

from pathlib import Path

import pytest
import torch

from tests.contriever.training_runs import make_data
from tests.reliability.runs import write_images


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available():
        return
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.skip(reason="needs a GPU"))


@pytest.fixture(scope="session")
def images(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp("data") / "images")


@pytest.fixture(scope="session")
def places(images, tmp_path_factory):
    """What stands for ``{images}``, ``{tokens}`` and ``{encoder}`` in flags that lead to data."""
    text = make_data(tmp_path_factory.mktemp("text"))
    return {"images": images, "tokens": text / "tokens", "encoder": text / "encoder"}
