"""READMEs and other pages: links lead somewhere, and every command line is one that its script understands."""

import importlib
import re
import shlex
from pathlib import Path

import pytest

from shared.launch.slurm import add_slurm_flags

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = sorted(file.parent.name for file in ROOT.glob("*/__init__.py") if (file.parent / "README.md").exists())
PAGES = [page for folder in (".", "docs", *FOLDERS) for page in sorted((ROOT / folder).glob("*.md"))]


def commands(page: Path) -> list[tuple[str, list[str]]]:
    """(module, arguments) of every Python script of this repository that the page's shell blocks start."""
    found = []
    for block in re.findall(r"```bash\n(.*?)```", page.read_text(), re.S):
        folder = page.parent
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            if words[:1] == ["cd"]:
                folder = ROOT / words[1] if (ROOT / words[1]).is_dir() else folder / words[1]
                words = words[3:]  # cd FOLDER && ...
            for i, word in enumerate(words):
                if word.endswith(".py") and (script := _script(folder, word)):
                    found.append((".".join(script.relative_to(ROOT).with_suffix("").parts), words[i + 1 :]))
                    break
                if i and words[i - 1] == "-m" and (ROOT / word.replace(".", "/")).with_suffix(".py").exists():
                    found.append((word, words[i + 1 :]))
                    break
            else:
                assert not any(word.endswith(".py") for word in words), f"{page}: no such script: {line}"
    return found


def _script(folder: Path, name: str) -> Path | None:
    return next((path for path in (folder / name, ROOT / name) if path.exists()), None)


COMMANDS = [(page, *command) for page in PAGES for command in commands(page)]


@pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_and_pictures_exist(page):
    for target in re.findall(r"\]\(([^)#\s]+)", page.read_text()):
        if "://" not in target:
            assert (page.parent / target).exists(), f"{page}: {target} does not exist"


@pytest.mark.parametrize(("page", "module", "arguments"), COMMANDS, ids=lambda value: str(value)[-60:])
def test_commands_are_understood_by_their_scripts(page, module, arguments):
    method, _, name = module.partition(".")
    if name == "main" and (ROOT / method / f"main_{method}.py").exists():  # the alias
        module = f"{method}.main_{method}"
    script = importlib.import_module(module)
    parser = getattr(script, "training", script).get_args_parser()  # a launcher has the flags of its training
    if module.endswith("run_with_submitit"):
        add_slurm_flags(parser)
    parser.parse_args(arguments)


def test_every_folder_of_a_paper_documents_commands():
    documented = {module.partition(".")[0] for _, module, _ in COMMANDS}
    assert documented >= set(FOLDERS) and len(FOLDERS) >= 8
