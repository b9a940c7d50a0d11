"""What each folder tests of its scripts holds on the pretended GPU, too: evaluations, exports, pictures, searches.

``pytest --pretended_gpu tests/dino/test_evaluations.py`` shows where one does not.
"""

import re
from pathlib import Path

import pytest

from tests.processes import ROOT, run_script

FOLDERS = ["shared/evaluation", *sorted(file.parent.name for file in (ROOT / "tests").glob("*/tiny.py"))]


def assert_pass_on_gpu(*words) -> None:
    """These tests pass when their scripts compute there, and some script does."""
    options = ("--pretended_gpu", "-n0", "-p", "no:cacheprovider", "-m", "not slow and not slurm", "--tb=short")
    done = run_script("-m", "pytest", *options, *words, cwd=ROOT, timeout_s=1200)
    assert done.returncode == 0 and re.search("[1-9][0-9]* scripts on the pretended GPU", done.stdout), done.stdout


def test_neighbours_and_probes():
    assert_pass_on_gpu("tests/shared/evaluation/test_scripts.py", "-k", "open_flags or unreadable_images_of_probes")


@pytest.mark.slow
@pytest.mark.parametrize("folder", FOLDERS)
def test_scripts(folder):
    assert_pass_on_gpu(Path("tests", folder))
