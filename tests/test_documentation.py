"""READMEs: links lead somewhere, and every command line is one that its script understands."""

import importlib
import re
import shlex
from pathlib import Path

import pytest

from shared.launch.slurm import add_slurm_flags

ROOT = Path(__file__).resolve().parents[1]
READMES = sorted(path for path in [ROOT / "README.md", *ROOT.glob("*/README.md")] if ".venv" not in path.parts)
SCRIPTS = (
    r"\b(main|translate|main_\w+|eval_\w+|\w+_eval|\w+_train|\w*fine_tune|pseudo_labels|few_labels|visualize_\w+"
    r"|video_\w+|run_with_\w+|\w+_retrieval|\w+_ascent"
    r"|train|preprocess|finetuning|mine_\w+|new_\w+|generate_\w+|evaluate_\w+|search)\.py|-m \w+\.export"
)
# flags that a README must give but that would start something are checked by parsing only
COMMANDS = [
    (path, line)
    for path in READMES
    for block in re.findall(r"```bash\n(.*?)```", path.read_text(), re.S)
    for line in block.replace("\\\n", " ").splitlines()
    if re.search(SCRIPTS, line)
]


@pytest.mark.parametrize("path", READMES, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_and_pictures_exist(path):
    for target in re.findall(r"\]\(([^)#\s]+)", path.read_text()):
        if "://" not in target:
            assert (path.parent / target).exists(), f"{path}: {target} does not exist"


@pytest.mark.parametrize(("path", "line"), COMMANDS, ids=lambda value: str(value)[:60])
def test_commands_are_understood_by_their_scripts(path, line):
    words = shlex.split(line, comments=True)
    method = path.parent.name
    if words[0] == "cd":
        method, words = words[1], words[3:]
    if "-m" in words:
        start = words.index("-m") + 1
        module = words[start]
    else:
        start = next(i for i, word in enumerate(words) if word.endswith(".py"))
        module = f"{method}.{words[start][:-3]}".replace("/", ".")
    if module.endswith(".main") and (ROOT / method / f"main_{method}.py").exists():  # the alias
        module = f"{method}.main_{method}"
    parser = importlib.import_module(module).get_args_parser()
    if module.endswith("run_with_submitit"):
        add_slurm_flags(parser)
    parser.parse_args(words[start + 1 :])


def test_there_are_commands_to_check():
    assert len(COMMANDS) > 10
