"""The container recipes, as far as they can be read without Docker and Apptainer."""

import json
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
EXTRAS = set(
    re.findall(r"^(\w+) = \[", (ROOT / "pyproject.toml").read_text().partition("optional-dep")[2], re.MULTILINE)
)
INSTRUCTIONS = {"ARG", "FROM", "WORKDIR", "COPY", "RUN", "CMD"}


def instructions(text: str) -> list[tuple[str, str]]:
    """(instruction, its argument) of a Dockerfile without line continuations outside comments."""
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    return [tuple(line.split(" ", 1)) for line in lines]


def test_the_dockerfile_installs_extras_that_exist_and_starts_a_script_that_exists():
    text = (ROOT / "Dockerfile").read_text()
    found = instructions(text)
    assert {name for name, _ in found} == INSTRUCTIONS and [name for name, _ in found][:2] == ["ARG", "FROM"]
    arguments = dict(value.split("=") for name, value in found if name == "ARG")
    assert set(arguments["EXTRAS"].split(",")) <= EXTRAS and set(re.findall(r"\$\{(\w+)\}", text)) == set(arguments)
    command = json.loads(dict(found)["CMD"])
    assert command[0] == "python" and (ROOT / command[1]).is_file()
    assert "--shm-size" in text


def test_the_apptainer_recipe_copies_installs_and_runs():
    text = (ROOT / "apptainer.def").read_text()
    header, *sections = re.split(r"^%(\w+)\n", text, flags=re.MULTILINE)
    assert re.search(r"^Bootstrap: docker\nFrom: python:\S+$", header, re.MULTILINE)
    sections = dict(zip(sections[::2], sections[1::2], strict=True))
    assert list(sections) == ["files", "post", "runscript"]
    target = sections["files"].split()[1]
    assert f"cd {target}\n" in sections["post"] and f"{target}/dino/main_dino.py" in header
    (extras,) = re.findall(r'-e "\.\[(.*)\]"', sections["post"])
    assert set(extras.split(",")) <= EXTRAS
