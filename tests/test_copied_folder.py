"""A method's folder with ``shared/`` beside it is all that another project needs."""

import ast
import shutil
from pathlib import Path

import pytest

from tests.processes import run_script
from tests.tiny_training import trainings

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = {file.parent.name for file in ROOT.glob("*/__init__.py")}
METHODS = sorted(FOLDERS - {"shared", "tests"})
SCRIPTS = {training.module: training for training in trainings().values()}


def copy_to(project: Path, method: str) -> None:
    for folder in (method, "shared"):
        shutil.copytree(ROOT / folder, project / folder, ignore=shutil.ignore_patterns("__pycache__", "runs"))


@pytest.mark.parametrize("training", SCRIPTS.values(), ids=SCRIPTS)
def test_a_training_runs_in_a_copied_folder(training, places, tmp_path):
    method, _, script = training.module.partition(".")
    copy_to(tmp_path, method)
    flags = [*training.data_flags(places), *training.flags, *training.whole, "--saveckp_steps", "0", "--epochs", "1"]
    if "--total_steps" in flags:
        flags = [*flags[:-2], "--total_steps", "3"]
    path = script.replace(".", "/") + ".py"
    done = run_script(path, *flags, "--output_dir", "run", cwd=tmp_path / method)
    assert done.returncode == 0, done.stdout + done.stderr
    assert list((tmp_path / method / "run").rglob("*.pth*"))
    shutil.copytree(tmp_path / method / "run", tmp_path / "copy")  # no link in it leads up


def test_a_script_starts_as_a_module_and_its_parts_can_be_imported(places, tmp_path):
    copy_to(tmp_path, "dino")
    training = SCRIPTS["dino.main_dino"]
    flags = [*training.data_flags(places), *training.flags, *training.whole, "--saveckp_steps", "0", "--epochs", "1"]
    done = run_script("-m", "dino.main_dino", *flags, "--output_dir", "run", cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    (tmp_path / "mine.py").write_text(
        "from dino.losses import DINOLoss; print(DINOLoss(8, 4, 0.04, 0.04, 0, 1).center.shape)"
    )
    done = run_script("mine.py", cwd=tmp_path)
    assert done.stdout.strip() == "torch.Size([1, 8])", done.stderr


@pytest.mark.parametrize("method", METHODS)
def test_a_folder_imports_no_other_method(method):
    others = FOLDERS - {method, "shared"}
    for file in (ROOT / method).rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) and not node.level else []
            assert not {name.partition(".")[0] for name in names} & others, file


def test_shared_knows_no_method():
    for file in (ROOT / "shared").rglob("*.py"):
        code = ast.unparse(ast.parse(file.read_text())).lower()
        for method in METHODS:
            assert f"{method}." not in code and f"'{method}" not in code, f"{file} names {method}"
