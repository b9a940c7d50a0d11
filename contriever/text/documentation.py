"""Text that comes with the dependencies: the documentation inside installed packages, for runs without any data."""

import ast
import importlib.util
import re
from collections.abc import Iterator
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from .files import write_json_lines
from .tokens import Job, read_facts, tokenize_lines, vocabulary_fingerprint, write_shard

PACKAGES = ("sklearn", "numpy")
MIN_CHARACTERS, MOST_CHARACTERS = 400, 6000


def documentation(packages: tuple[str, ...] = PACKAGES) -> list[dict]:
    """Docstrings of the functions and classes of installed packages; their files are parsed, nothing is imported.

    Returns:
        Documents with ``id`` (the dotted name), ``title`` (the bare name) and ``text``, see :func:`prose`.
    """
    documents, seen = [], set()
    for package in packages:
        folder = Path(importlib.util.find_spec(package).origin).parent
        for file in sorted(folder.rglob("*.py")):
            if "tests" in file.parts:
                continue
            module = ".".join([package, *file.relative_to(folder).with_suffix("").parts])
            try:
                tree = ast.parse(file.read_text(encoding="utf-8"))
            except (SyntaxError, UnicodeDecodeError):  # templates and files for other versions of Python
                continue
            for name, docstring in docstrings(tree):
                text = prose(docstring)
                if MIN_CHARACTERS <= len(text) <= MOST_CHARACTERS and text not in seen:  # aliases repeat docstrings
                    seen.add(text)
                    documents.append({"id": f"{module}.{name}", "title": name.rpartition(".")[2], "text": text})
    return documents


def docstrings(node: ast.AST, prefix: str = "") -> Iterator[tuple[str, str]]:
    """Dotted names and docstrings of the functions, classes and methods of a source file."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef | ast.ClassDef):
            name = prefix + child.name
            if docstring := ast.get_docstring(child):
                yield name, docstring
            yield from docstrings(child, f"{name}.")
        else:
            yield from docstrings(child, prefix)


def prose(docstring: str) -> str:
    """A docstring on one line, without its examples, rulers and markup."""
    text = re.split(r"\n(?:Examples?|References|See Also)\n-+\n", docstring)[0]
    text = re.sub(r"^\s*[-=~^]{3,}\s*$", "", text, flags=re.M)
    text = re.sub(r":\w+:`~?([^`]*)`|`+", r"\1", text)
    text = re.sub(r"^\s*\.\. .*$", "", text, flags=re.M)
    return " ".join(text.split())


def tokenized_documentation(folder: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """Make a data set of the documentation in ``folder``, as ``preprocess.py`` does, unless it is there."""
    file = folder / "documentation.jsonl"
    if not file.exists():
        write_json_lines(file, documentation())
    shard = folder / "documentation-00000"
    job = Job.of(file, shard, tokenizer=type(tokenizer).__name__, vocabulary=vocabulary_fingerprint(tokenizer))
    if not job.facts.items() <= read_facts(shard.with_name(f"{shard.name}.tokens.npy")).items():
        write_shard(shard, *tokenize_lines(job, tokenizer), job.facts)
