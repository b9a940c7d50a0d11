"""Files that people lift out of this repository on their own."""

import ast
import importlib.util
import shutil
import sys
from pathlib import Path
from types import ModuleType


def imported_packages(path: Path) -> set[str]:
    """Top-level packages that a file imports anywhere, in functions too; ``.`` for its siblings."""
    packages = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            packages |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            packages.add("." if node.level else node.module.partition(".")[0])
    return packages


def load_alone(path: Path, folder: Path) -> ModuleType:
    """A copy of the file in ``folder``, imported; AssertionError if it needs more than torch and Python itself."""
    foreign = imported_packages(path) - {"torch", *sys.stdlib_module_names}
    assert not foreign, f"{path} imports {', '.join(sorted(foreign))}"
    spec = importlib.util.spec_from_file_location(f"copied_{path.stem}", shutil.copy(path, folder))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
