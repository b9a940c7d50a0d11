"""The container recipes, as far as they can be read without Docker and Apptainer."""

import json
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
EXTRAS = set(
    re.findall(r"^(\w+) = \[", (ROOT / "pyproject.toml").read_text().partition("optional-dep")[2], re.MULTILINE)
)


def test_the_dockerfile_installs_extras_that_exist_and_starts_a_script_that_exists():
    text = (ROOT / "Dockerfile").read_text()
    (extras,) = re.findall(r"^ARG EXTRAS=(\S+)", text, re.MULTILINE)
    (command,) = re.findall(r"^CMD (.*)", text, re.MULTILINE)
    assert set(extras.split(",")) <= EXTRAS
    assert json.loads(command)[0] == "python" and (ROOT / json.loads(command)[1]).is_file()


def test_the_apptainer_recipe_installs_extras_that_exist():
    (extras,) = re.findall(r'-e "\.\[(.*)\]"', (ROOT / "apptainer.def").read_text())
    assert set(extras.split(",")) <= EXTRAS
