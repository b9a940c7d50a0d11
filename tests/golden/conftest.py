"""The order of the tests with golden files."""

import pytest


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items):
    """The tests of what the others of their file have read come last, in whatever order the others run."""
    items.sort(key=lambda item: item.name.startswith("test_every_array"))
