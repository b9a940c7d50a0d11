import pytest

from shared.run.packages import need_packages


def test_every_missing_package_is_named_as_pip_knows_it():
    message = "^detection needs packages that are not installed: pip install one-package other$"
    with pytest.raises(ModuleNotFoundError, match=message):
        need_packages("detection", no_such_module="one-package", torch="torch", nor_this_one="other")


def test_installed_packages_are_fine():
    assert need_packages("training", torch="torch", numpy="numpy") is None
