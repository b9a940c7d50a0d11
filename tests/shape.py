"""Figures of the repository's shape beside their bars; ``make shape`` prints them and fails where a bar is missed.

    python tests/shape.py

- *Loops*: functions that iterate over ``run.steps``, and those that make the ``Run``: lines and parameters.
- *Share of the method*: lines of the statements of these functions in which none of the words of ``MECHANICS`` occurs.
- *Duplicates*: pairs of files that share at least ten lines of code in a row, equal but for names, numbers and texts;
  imports, comments, docstrings and lines of punctuation do not count.
- *Boilerplate roles*: files of the folders that hold no method (see ``ROLES``).
"""

import argparse
import ast
import io
import keyword
import re
import subprocess
import sys
import tokenize
from collections import defaultdict
from collections.abc import Iterator
from itertools import combinations
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
METHODS = sorted(file.parent.name for file in ROOT.glob("*/__init__.py") if file.parent.name not in ("shared", "tests"))
MECHANICS = set(
    """Run resume log guard checkpoint checkpointer monitor health knn evaluation is_new seed randomness first_step
    first_epoch steps_per_epoch step_in_epoch report summary pictures stop save print_once problems problem end_step
    end_epoch log_epoch log_evaluation keep_as logs_this_step""".split()
)
ROLES = set(
    """report pictures pretrained export flags resuming setup collapse networks eval_knn hub training_setup
    training_flags run_with_submitit main_distributed retrieval_flags""".split()
)
MIN_LINES = 10  # of a duplicate
FURTHER = len(METHODS) - 8  # folders beyond those for which the bars on lines were set; each may add so many to them


def python_files(*folders: str) -> list[Path]:
    """Python files that git tracks, or would, in these folders."""
    command = ["git", "-C", str(ROOT), "ls-files", "--cached", "--others", "--exclude-standard", "--", *folders]
    names = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    return [ROOT / name for name in names if name.endswith(".py") and (ROOT / name).exists()]


def count_lines(files: list[Path]) -> int:
    return sum(len(file.read_text().splitlines()) for file in files)


# --- Loops ------------------------------------------------------------------------------------------------------------


def loops() -> Iterator[tuple[Path, ast.FunctionDef, str]]:
    """Functions of the folders that hold a loop over steps or make a run."""
    for file in python_files(*METHODS, "shared/supervised"):
        for node in ast.parse(file.read_text()).body:
            if isinstance(node, ast.FunctionDef):
                calls = {ast.unparse(call.func) for call in ast.walk(node) if isinstance(call, ast.Call)}
                if "run.steps" in calls:
                    yield file, node, "epoch"
                elif "Run" in calls:
                    yield file, node, "main"


def parameters(function: ast.FunctionDef) -> int:
    return len(function.args.args) + len(function.args.kwonlyargs)


def statements(function: ast.FunctionDef) -> Iterator[tuple[int, bool]]:
    """(lines, whether mechanics) of every simple statement and every head of a compound one, the docstring left out."""
    body = function.body[1:] if ast.get_docstring(function) else function.body
    pending = list(body)
    while pending:
        node = pending.pop()
        inner = [child for field in ("body", "orelse", "handlers", "finalbody") for child in getattr(node, field, [])]
        pending += inner
        last = min((child.lineno for child in inner), default=node.end_lineno + 1) - 1
        head = [child for child in ast.iter_child_nodes(node) if child not in inner]
        names = {n.id for part in head for n in ast.walk(part) if isinstance(n, ast.Name)}
        names |= {n.attr for part in head for n in ast.walk(part) if isinstance(n, ast.Attribute)}
        yield last - node.lineno + 1, bool(names & MECHANICS)


def share_of_method(functions: list[ast.FunctionDef]) -> float:
    counted = [statement for function in functions for statement in statements(function)]
    return sum(lines for lines, mechanics in counted if not mechanics) / sum(lines for lines, _ in counted)


# --- Duplicates -------------------------------------------------------------------------------------------------------


def shapes(file: Path) -> list[str]:
    """The lines of a file without their names, numbers and texts; docstrings as they are."""
    text = file.read_text()
    skipped, lines = set(), defaultdict(list)
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            skipped |= set(range(node.lineno, node.end_lineno + 1))
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.start[0] in skipped or token.type in (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE):
            continue
        if token.type == tokenize.STRING and "\n" in token.string:
            for number, line in enumerate(token.string.splitlines(), start=token.start[0]):
                lines[number].append(line.strip())
        elif token.type == tokenize.NAME and not keyword.iskeyword(token.string):
            lines[token.start[0]].append("n")
        elif token.type in (tokenize.STRING, tokenize.NUMBER):
            lines[token.start[0]].append("v")
        elif token.string.strip():
            lines[token.start[0]].append(token.string)
    found = ["".join(tokens) for _, tokens in sorted(lines.items())]
    return [shape for shape in found if len(re.findall(r"\w", shape)) > 1]  # a lone name or value is an argument


def duplicates() -> list[tuple[str, str]]:
    """Pairs of files that share ``MIN_LINES`` lines in a row, in at most eight places."""
    places = defaultdict(set)
    for file in python_files("."):
        lines = shapes(file)
        for i in range(len(lines) - MIN_LINES + 1):
            window = tuple(lines[i : i + MIN_LINES])
            if len(set(window)) > 2:  # else the rows of a table
                places[window].add(str(file.relative_to(ROOT)))
    return sorted({pair for files in places.values() if 1 < len(files) <= 8 for pair in combinations(sorted(files), 2)})


# --- Figures ----------------------------------------------------------------------------------------------------------


def seconds_over_torch(module: str) -> float:
    """Least of three times that a fresh Python needs to import the module, less that for torch alone."""
    code = (
        f"import time; start = time.perf_counter(); import torch; between = time.perf_counter(); import {module}; "
        "print(time.perf_counter() - between)"
    )
    runs = [subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True) for _ in range(3)]
    return min(float(run.stdout) for run in runs)


def figures() -> Iterator[tuple[str, float, float, bool]]:
    """(what, figure, bar, whether the bar is the least)."""
    found = list(loops())
    main_functions = {f"{file.parent.name}/{f.name}": f for file, f, kind in found if kind == "main"}
    lengths = {name: f.end_lineno - f.lineno + 1 for name, f in main_functions.items()}
    longest = max(lengths, key=lengths.get)
    yield f"lines of the longest of {len(lengths)} functions that make a run ({longest})", lengths[longest], 80, False
    most = max((f for _, f, kind in found if kind == "epoch"), key=parameters)
    yield "most parameters of a loop over steps", parameters(most), 10, False
    for method in METHODS:
        if functions := [f for file, f, _ in found if method in file.relative_to(ROOT).parts]:
            share = round(100 * share_of_method(functions))
            yield f"% of the main functions of {method}/ that are the method", share, 60, True
    folders, product = python_files(*METHODS), python_files(*METHODS, "shared", "hubconf.py")
    yield "tails of a step", count_matches(product, r"\.too_many\(\)"), 1, False
    yield "states of a run, written or read", count_matches(product, r"\"skipped_steps\""), 2, False
    yield "pairs of files that share ten lines", len(duplicates()), 20, False
    roles = [file for file in folders if file.stem in ROLES]
    yield "lines of the folders that are boilerplate roles", count_lines(roles), 3000 + 150 * FURTHER, False
    yield "lines of run.py", count_lines([ROOT / "shared/run/run.py"]), 250, False
    yield "lines of hubconf.py", count_lines([ROOT / "hubconf.py"]), 60, False
    yield "seconds of import hubconf over torch", round(seconds_over_torch("hubconf"), 2), 0.3, False
    yield "lines of the product", count_lines(product), 33_000 + 1200 * FURTHER, False
    yield "lines of the tests", count_lines(python_files("tests")), 28_000 + 600 * FURTHER, False
    pages = {page.parent.name: page for page in [ROOT / "README.md", *ROOT.glob("*/README.md")]}
    words = {name: len(page.read_text().split()) for name, page in pages.items()}
    longest = max(words, key=words.get)
    yield f"words of the longest README ({longest})", words[longest], 1600, False
    yield "comments that switch formatting off", count_matches(product, r"# fmt: skip"), 0, False


def count_matches(files: list[Path], pattern: str) -> int:
    return sum(len(re.findall(pattern, file.read_text())) for file in files)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--duplicates", action="store_true", help="list the pairs of files that share ten lines")
    args = parser.parse_args()
    if args.duplicates:
        print("\n".join(f"{a}  ~  {b}" for a, b in duplicates()))
        return
    missed = 0
    for what, figure, bar, least in figures():
        fits = figure >= bar if least else figure <= bar
        missed += not fits
        print(f"{'' if fits else 'MISSED':8s}{figure:>9,} {'>=' if least else '<='} {bar:<8,} {what}")
    sys.exit(missed > 0)


if __name__ == "__main__":
    main()
