"""Text that comes with the dependencies: the documentation inside installed packages, for runs without any data."""

import ast
import importlib.util
import inspect
import re
from collections.abc import Iterator
from pathlib import Path

PACKAGES = ("sklearn", "numpy")
LEAST_CHARACTERS, MOST_CHARACTERS = 400, 6000


def documentation(packages: tuple[str, ...] = PACKAGES) -> list[dict]:
    """Docstrings of the functions and classes of installed packages.

    Nothing is imported; the source files are parsed. The same versions of the packages give the same documents.

    Returns:
        Documents with ``id`` (the dotted name), ``title`` (the bare name) and ``text`` (prose, on one line): the
        docstring without its examples, which are code.
    """
    documents, seen = [], set()
    for package in packages:
        folder = Path(importlib.util.find_spec(package).origin).parent
        for file in sorted(folder.rglob("*.py")):
            if "tests" in file.parts:
                continue
            module = ".".join([package, *file.relative_to(folder).with_suffix("").parts])
            for name, docstring in docstrings(file):
                text = prose(docstring)
                if LEAST_CHARACTERS <= len(text) <= MOST_CHARACTERS and text not in seen:  # aliases repeat docstrings
                    seen.add(text)
                    documents.append({"id": f"{module}.{name}", "title": name, "text": text})
    return documents


def docstrings(file: Path) -> Iterator[tuple[str, str]]:
    """Names and docstrings of the functions, classes and methods of a source file."""
    try:
        tree = ast.parse(file.read_text(encoding="utf-8"))
    except (SyntaxError, UnicodeDecodeError):  # templates and files for other versions of Python
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and (docstring := ast.get_docstring(node)):
            yield node.name, inspect.cleandoc(docstring)


def prose(docstring: str) -> str:
    """A docstring on one line, without its examples, rulers and markup."""
    text = re.split(r"\n(?:Examples?|References|See Also)\n-+\n", docstring)[0]
    text = re.sub(r"^\s*[-=~^]{3,}\s*$", "", text, flags=re.M)
    text = re.sub(r":\w+:`~?([^`]*)`|`+", r"\1", text)
    text = re.sub(r"^\s*\.\. .*$", "", text, flags=re.M)
    return " ".join(text.split())
